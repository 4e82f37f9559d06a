"""The interactive report: what is in the file, and what a reader sees and does in a browser."""

import base64
import dataclasses
import io
import itertools
import json
import re
import zlib

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from scipy.spatial.distance import cdist

import i2am
from i2am.report.data import PLANS, Axes, choose_plan, fitted, key, shrunk
from tests.helpers.browser import chromium
from tests.helpers.tiny_models import unet as pipelines

UNDECODED = "sl\udcffeve"  # as Python reads a file name that is not UTF-8
GRID, LATENT = (4, 6), (16, 12)  # neither square: rows and columns can't be confused
PICTURE, REFERENCE = (96, 128), (72, 48)  # width, height
REGION = "corner </script><!--<script>"


@pytest.fixture(scope="module")
def maps():
    """A run of a narrow UNet with queries and keys kept, patches registered, and a provenance."""
    torch.manual_seed(0)
    unet, scheduler = pipelines.unet(), pipelines.ddim()
    latents, context = torch.randn(1, 4, *LATENT), 3 * torch.randn(1, 1 + GRID[0] * GRID[1], pipelines.CONTEXT)
    reference = i2am.Reference(grid=GRID, skip=1)
    with i2am.patch_unet(
        unet,
        reference=reference,
        scheduler=scheduler,
        time_groups=3,
        record="qk",
        sram={REGION: (0, 0), UNDECODED: (8, 8)},
    ) as tracer:
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            with torch.no_grad():
                latents = scheduler.step(unet(latents, t, context).sample, t, latents).prev_sample
    maps = tracer.maps()
    told = {"summary": ["four steps of <b>DDIM</b>"], "calls": {"seen": 4, "counted": 4}, "file": UNDECODED}
    return i2am.AttributionMaps(
        maps._sums, canvas=maps.canvas, regions=maps.regions, entries=maps._entries, provenance=told
    )


@pytest.fixture(scope="module")
def pictures():
    return pipelines.image(PICTURE), pipelines.image(REFERENCE, seed=1)


@pytest.fixture(scope="module")
def masks():
    mask = np.zeros(PICTURE[::-1], np.float32)
    mask[30:90, 20:70] = 1
    reference_mask = np.zeros(REFERENCE[::-1], np.float32)
    reference_mask[:24, :36] = 1
    return mask, reference_mask


@pytest.fixture(scope="module")
def report(maps, pictures, masks, tmp_path_factory):
    mask, reference_mask = masks
    settings = {
        "path": UNDECODED,
        "log": "\x1b[31mred\x00\x85",
        "prompt": 'a "cat" & </script><script>alert(1)</script> {{bytes}}',
        "steps": 4,
    }
    return maps.report(
        tmp_path_factory.mktemp("report") / "out.html",
        *pictures,
        mask=mask,
        reference_mask=reference_mask,
        settings=settings,
        title="<b>Run</b> {{floats}}",
        progress=False,
    )


def contents(path):
    """(header, bytes, floats) of a report."""
    text = path.read_text(encoding="utf-8")
    part = {i: re.search(rf'id="{i}">(.*?)</script>', text, re.S)[1] for i in ("header", "bytes", "floats")}
    raw = {i: zlib.decompress(base64.b64decode(part[i])) for i in ("bytes", "floats")}
    return json.loads(part["header"]), np.frombuffer(raw["bytes"], np.uint8), np.frombuffer(raw["floats"], "<f4")


# ----------------------------------------------------------------------------------------------------------- contents


def stored_map(data, direction, pick):
    header, values, _ = data
    found = header["frames"][0]["maps"][direction][pick]
    size = found["grid"][0] * found["grid"][1]
    scaled = values[found["at"] : found["at"] + size].astype(float) / 255
    return (found["low"] + scaled * (found["high"] - found["low"])).reshape(found["grid"])


def stored_row(data, slices, cell, pick):
    _, values, floats = data
    found = slices[pick]
    size = found["grid"][0] * found["grid"][1]
    row = values[found["at"] + cell * size : found["at"] + (cell + 1) * size].reshape(found["grid"])
    return row * (floats[found["peaks"] + cell] / 255.0)


@pytest.mark.parametrize("direction", ["r2g", "g2r"])
@pytest.mark.parametrize("pick", [(None, None, None), (2, None, None), (None, 1, None), (None, None, 3), (1, 2, 0)])
def test_maps_are_the_levels(maps, report, direction, pick):
    t, h, i = pick
    want = maps.ulam(direction, times=t, heads=h, layers=None if i is None else maps.layers[i])[0].numpy()
    got = stored_map(contents(report), direction, key(pick))
    np.testing.assert_allclose(got, want, atol=1.01 * np.ptp(want) / 510)


@pytest.mark.parametrize("pick", [(None, None, None), (2, None, None), (None, 1, None), (None, None, 3), (1, 2, 0)])
def test_rows_are_sram_and_its_reverse(maps, report, pick):
    t, h, i = pick
    options = dict(times=t, heads=h, layers=None if i is None else maps.layers[i])
    data = contents(report)
    rows, columns = data[0]["frames"][0]["rows"]["generated"]["cells"]
    assert (rows, columns) == (16, 12)
    for y, x in [(0, 0), (5, 11), (15, 3)]:
        mask = torch.zeros(rows, columns)
        mask[y, x] = 1
        want = maps.sram(mask, **options)[0].numpy()
        got = stored_row(data, data[0]["frames"][0]["rows"]["generated"]["slices"], y * columns + x, key(pick))
        np.testing.assert_allclose(got, want, atol=1.01 * want.max() / 510)
    assert data[0]["frames"][0]["rows"]["reference"]["cells"] == list(GRID)
    want = maps.where_did_it_go((3, 1), **options)[0].numpy()
    got = stored_row(data, data[0]["frames"][0]["rows"]["reference"]["slices"], 3 * GRID[1] + 1, key(pick))
    np.testing.assert_allclose(got, want, atol=1.01 * want.max() / 510)


def test_registered_patch(maps, report):
    data = contents(report)
    got = stored_row(data, data[0]["frames"][0]["regions"][REGION], 0, "*,*,*")
    np.testing.assert_allclose(got, maps.sram(REGION)[0].numpy(), atol=maps.sram(REGION).max().item() / 500)


def test_scores_are_the_metrics(maps, report, masks):
    scores = {name: float(value.replace("−", "-")) for name, value, _ in contents(report)[0]["scores"]}
    mask, reference_mask = map(torch.from_numpy, masks)
    assert scores["IMACS of R2G"] == pytest.approx(i2am.imacs(maps.ulam("r2g")[0], mask).item(), abs=5e-4)
    assert scores["IMACS of G2R"] == pytest.approx(i2am.imacs(maps.ulam("g2r")[0], reference_mask).item(), abs=5e-4)
    box = i2am.detect_box(maps.ulam("r2g")[0], size=tuple(mask.shape))
    want = 0 if box is None else box.iou(i2am.Box(30, 20, 90, 70))
    assert scores["Box IoU"] == pytest.approx(want, abs=5e-4)
    height, width = mask.shape
    drawn = [box.top / height, box.left / width, box.bottom / height, box.right / width]
    assert contents(report)[0]["box"] == pytest.approx(drawn)


def test_file_is_self_contained_and_safe(report):
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:)[\w/.]""", text)
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'" in text
    assert "<script>alert" not in text
    assert "<b>Run" not in text
    assert text.count("</script>") == 4  # the page's own
    header = re.search(r'id="header">(.*?)</script>', text, re.S)[1]
    assert "<" not in header
    assert list(json.loads(header)["frames"][0]["regions"]) == [REGION, UNDECODED]
    assert "&lt;b&gt;DDIM" in text
    assert "sl\\udcffeve" in text  # in the provenance, escaped
    assert "<td>\\x1b[31mred\\x00\\x85</td>" in text


def test_without_a_record_there_are_levels_only(maps, tmp_path):
    bare = i2am.AttributionMaps.load(maps.save(tmp_path / "bare.safetensors", record=False))
    assert not bare.recorded
    header, *_ = contents(bare.report(tmp_path / "bare.html", progress=False))
    assert header["frames"][0]["rows"] == {}
    assert any('record="qk"' in note for note in header["notes"])
    assert header["order"] == 3
    np.testing.assert_allclose(
        stored_map(contents(tmp_path / "bare.html"), "g2r", "1,*,*"), maps.ulam("g2r", times=1)[0], atol=1e-3
    )


def test_reference_without_a_grid(tmp_path):
    torch.manual_seed(0)
    unet = pipelines.unet()
    with i2am.patch_unet(unet, reference=i2am.Reference(), num_steps=1, record="qk") as tracer, torch.no_grad():
        unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 1, pipelines.CONTEXT))
    header, *_ = contents(tracer.maps().report(tmp_path / "one.html", progress=False))
    assert set(header["frames"][0]["maps"]) == {"r2g"}
    assert "identically 1" in header["notes"][0]


@pytest.mark.parametrize(
    ("layers", "heads", "cells", "reference", "order"),
    [
        (15, 8, (64, 64), (16, 16), 1),  # Stable Diffusion 1.5 at 512 pixels, an image encoder's 257 tokens
        (3, 4, (32, 32), (16, 16), 2),
        (3, 4, (16, 16), (8, 8), 3),
        (60, 0, (128, 128), (64, 64), 1),
        (11, 8, (64, 48), (64, 48), 1),
    ],
)
def test_plan_fits_the_limit(monkeypatch, layers, heads, cells, reference, order):
    """By arithmetic, for sizes that tests can't run: raw bytes stay below the budget."""
    monkeypatch.setattr("i2am.report.data._finest", lambda *_: (cells, reference))
    axes = Axes(5, heads, tuple(map(str, range(layers))))
    plan, sides = choose_plan(None, axes, "", 10e6, None, True)
    row = np.prod(fitted(reference, plan.side)) * np.prod(sides["generated"])
    row += np.prod(fitted(cells, plan.side)) * np.prod(sides["reference"])
    assert row * axes.count(plan.order) < 10e6
    assert plan.order == order
    assert choose_plan(None, axes, "", 10e6, 0, True)[0].order == 0
    assert all(a.order >= b.order for a, b in itertools.pairwise(PLANS))


def test_limit_is_kept_or_refused(maps, pictures, tmp_path):
    small = maps.report(tmp_path / "small.html", *pictures, limit="1MB", progress=False)
    assert small.stat().st_size <= 1_000_000
    assert contents(small)[0]["order"] < 3
    with pytest.raises(ValueError, match=r"limit='20KB'"):
        maps.report(tmp_path / "none.html", *pictures, limit="20KB", progress=False)
    assert not (tmp_path / "none.html").exists()


def test_arguments_are_checked(maps, tmp_path):
    for error, options in [
        (ValueError, {"detail": 4}),
        (IndexError, {"index": 1}),
        (ValueError, {"reference_name": "other"}),
        (ValueError, {"layers": "nothing.*"}),
        (ValueError, {"mask": np.zeros((8, 8))}),
    ]:
        with pytest.raises(error):
            maps.report(tmp_path / "x.html", progress=False, **options)
        assert not (tmp_path / "x.html").exists()


def test_what_the_maps_are_a_mean_of(maps, report, tmp_path):
    text = report.read_text(encoding="utf-8")
    listed = re.findall(r"<li>(.*?)</li>", re.search(r'id="provenance".*?</section>', text, re.S)[0])
    assert listed[0] == "4 attention calls of each layer, by time group: 2 + 1 + 1"
    assert listed[1] == f"{len(maps.layers)} layers of 4 heads; reference &#x27;reference&#x27;"
    assert listed[2:] == ["four steps of &lt;b&gt;DDIM&lt;/b&gt;"]
    assert "calls · counted</th><td>4</td>" in text
    one, *others = maps._sums
    skipped = i2am.AttributionMaps(
        [dataclasses.replace(one, counts=(1, 1, 1), sram=None)] + [dataclasses.replace(s, sram=None) for s in others]
    )
    text = skipped.report(tmp_path / "x.html", detail=0, progress=False).read_text(encoding="utf-8")
    assert f"<li>1 of these layers ran less often: {one.layer}</li>" in text
    assert "All that was seen" not in text


@pytest.mark.parametrize("field", ["r2g", "g2r"])
def test_sums_that_are_not_finite_are_called_that(maps, field, tmp_path):
    """Never "no step ran": R2G refuses the report; without G2R there is a note in its place."""
    broken = getattr(maps._sums[0], field).clone()
    broken[2, 0, 0, 0] = torch.nan
    sums = [dataclasses.replace(s, sram=None) for s in maps._sums]
    sums[0] = dataclasses.replace(sums[0], **{field: broken})
    bad = i2am.AttributionMaps(sums)
    message = rf"{field.upper()} sums .* are not finite .*{re.escape(sums[0].layer)} \(time groups 2\)"
    if field == "r2g":
        with pytest.raises(ValueError, match=message):
            bad.report(tmp_path / "x.html", progress=False)
        assert not (tmp_path / "x.html").exists()
    else:
        header, *_ = contents(bad.report(tmp_path / "x.html", progress=False))
        assert re.search(message, header["notes"][0])
    bad.report(tmp_path / "y.html", layers=maps.layers[1:], progress=False)  # the remedy that it names


def random_sums(g, name, grid, counts, heads=2):
    """Sums of a layer: two images, one region, three time groups, a share of the attention for the reference."""
    Q, K = grid[0] * grid[1], 1 + GRID[0] * GRID[1]
    calls = torch.tensor(counts)[:, None, None, None]
    return i2am.maps.LayerSums(
        layer=name,
        reference="reference",
        grid=grid,
        reference_grid=GRID,
        skip=1,
        keys=2 * K,
        default=True,
        counts=counts,
        r2g=torch.rand(3, 2, heads, Q, generator=g) * calls,
        g2r=torch.rand(3, 2, heads, K, generator=g) * calls,
        mass=torch.rand(3, 2, heads, Q, generator=g) * calls,
        sram=torch.rand(3, 2, heads, 1, K, generator=g) * calls[..., None],
    )


@pytest.fixture(scope="module")
def two_images():
    """Two images in one run, each with marks of its own, of maps with no queries and keys."""
    g = torch.Generator().manual_seed(5)
    return i2am.AttributionMaps(
        [random_sums(g, "a", (8, 6), (1, 2, 1)), random_sums(g, "b", (4, 3), (1, 0, 1))], regions=["p"]
    )


@pytest.mark.parametrize("index", [0, 1, -1])
def test_the_image_of_a_batch_that_was_asked_for(two_images, index, tmp_path):
    """Maps, regions, pictures, masks, scores are all that image's; a layer that did not run counts in no mean."""
    pictures = torch.rand(2, 3, 16, 12), torch.rand(2, 3, 8, 12)
    masks = torch.zeros(2, 16, 12)
    masks[0, 2:8, 2:6], masks[1, 6:14, 4:10] = 1, 1
    path = two_images.report(tmp_path / "x.html", *pictures, mask=masks, index=index, progress=False)
    data = contents(path)
    for direction in ("r2g", "g2r", "mass"):
        for pick in ((None, None, None), (1, None, None), (None, 1, 0), (2, 0, None)):
            t, h, i = pick
            layers = None if i is None else two_images.layers[i]
            want = two_images.ulam(direction, times=t, heads=h, layers=layers)[index].numpy()
            got = stored_map(data, direction, key(pick))
            np.testing.assert_allclose(got, want, atol=1.01 * np.ptp(want) / 510, err_msg=f"{direction} {pick}")
    np.testing.assert_allclose(
        stored_row(data, data[0]["frames"][0]["regions"]["p"], 0, "2,*,*"),
        two_images.sram("p", times=2)[index],
        atol=2e-3,
    )
    assert "1,*,1" not in data[0]["frames"][0]["maps"]["r2g"]  # layer b did not run in group 1
    scores = {name: float(value.replace("−", "-")) for name, value, _ in data[0]["scores"]}
    r2g, mask = two_images.ulam("r2g")[index].double(), masks[index].double()
    a = torch.nn.functional.interpolate((r2g - r2g.min())[None, None] / np.ptp(r2g.numpy()), (16, 12), mode="bicubic")[
        0, 0
    ]
    a = (a - a.min()) / (a.max() - a.min())
    a = torch.where(a > 0.4, a, 0)
    want = (a * mask).sum() / mask.sum() - 3 * (a * (1 - mask)).sum() / (1 - mask).sum()
    assert scores["IMACS of R2G"] == pytest.approx(want.item(), abs=1e-3)
    text = path.read_text(encoding="utf-8")
    shown = base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', text)[1])
    drawn = np.asarray(Image.open(io.BytesIO(shown)))
    np.testing.assert_allclose(drawn / 255, pictures[0][index].permute(1, 2, 0), atol=0.003)
    places = np.array(re.findall(r"[ML]([\d.]+) ([\d.]+)", data[0]["outlines"]["generated"]), float) * (12, 16)
    box = [*places.min(0), *places.max(0)]  # x, y: the mask's own edges, between its pixels and their neighbours
    assert box == pytest.approx([2, 2, 6, 8] if index == 0 else [4, 6, 10, 14], abs=0.01)


@pytest.mark.parametrize("detail", [0, 1, 2, 3])
def test_no_more_is_picked_at_once_than_is_said(two_images, detail, tmp_path):
    """Each choice of at most so many of time, head and layer, if anything ran, and no other."""
    header, *_ = contents(two_images.report(tmp_path / "x.html", detail=detail, progress=False))
    assert header["order"] == detail
    choices = itertools.product(["*", "0", "1", "2"], ["*", "0", "1"], ["*", "0", "1"])
    want = {",".join(c) for c in choices if 3 - c.count("*") <= detail} - {"1,*,1", "1,0,1", "1,1,1"}  # b did not run
    found = header["frames"][0]
    assert all(set(found["maps"][direction]) == want for direction in ("r2g", "g2r", "mass"))
    assert set(found["regions"]["p"]) == want
    assert any(f"{['none', 'one', 'two', ''][detail]} of time, head" in note for note in header["notes"]) == (
        detail < 3
    )
    assert header["axes"]["time"] == [
        "0–33\N{NO-BREAK SPACE}%",
        "33–67\N{NO-BREAK SPACE}%",
        "67–100\N{NO-BREAK SPACE}%",
    ]
    assert header["aspect"] == {"generated": [6, 8], "reference": [6, 4]}  # the maps' own: width, height


def test_heads_of_layers_that_have_different_ones(tmp_path):
    g = torch.Generator().manual_seed(5)
    layers = [random_sums(g, name, (4, 3), (1, 2, 1), heads) for name, heads in (("a", 4), ("b", 2))]
    maps = i2am.AttributionMaps(layers, regions=["p"])
    header, *_ = contents(maps.report(tmp_path / "x.html", progress=False))
    assert header["axes"]["head"] == []
    assert set(header["frames"][0]["maps"]["r2g"]) == {
        ",".join((t, "*", x)) for t in ("*", "0", "1", "2") for x in ("*", "0", "1")
    }
    assert any("Heads can't be picked" in note for note in header["notes"])
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "4 attention calls of each layer, by time group: 1 + 2 + 1" in text
    assert "2 layers of 2 or 4 heads" in text


def test_a_layer_that_ran_less_often_hides_none_of_the_others_calls(two_images, tmp_path):
    text = two_images.report(tmp_path / "x.html", detail=0, progress=False).read_text(encoding="utf-8")
    assert "4 attention calls of each layer, by time group: 1 + 2 + 1" in text
    assert "1 of these layers ran less often: b" in text


def test_fine_maps_are_averaged():
    values = np.random.default_rng(0).random((2, 12, 8)).astype(np.float32)
    got = shrunk(values, 6)
    np.testing.assert_allclose(got, values.reshape(2, 6, 2, 4, 2).mean((2, 4)), rtol=1e-5)
    assert shrunk(values, 12) is values
    assert [fitted(grid, 8) for grid in ((100, 2), (2, 100), (7, 8), (24, 16))] == [(8, 1), (1, 8), (7, 8), (8, 5)]


def test_picks_are_counted():
    axes = Axes(5, 8, ("a", "b", "c"))
    every = list(itertools.product([None, *range(5)], [None, *range(8)], [None, *range(3)]))
    for order in range(4):
        assert axes.count(order) == sum(3 - pick.count(None) <= order for pick in every)


# ------------------------------------------------------------------------------------------------------------ browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def opened(browser, report):
    """The report, opened once; requests to the network, messages and errors are kept."""
    context = browser.new_context(viewport={"width": 1100, "height": 1000}, has_touch=True, offline=True)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request", lambda r: complaints.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None
    )
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-ready]")
    yield page, complaints
    context.close()


@pytest.fixture
def page(opened):
    """The report as it opens: nothing picked, nothing pointed at; a complaint of the browser fails the test."""
    page, complaints = opened
    page.evaluate(
        """() => { Object.assign(state, {pick: {time: null, head: null, layer: null}, place: null, level: "time",
        colours: "inferno", strip: null, outline: true});
        syncTabs(); draw(); document.activeElement.blur(); scrollTo(0, 0); }"""
    )
    page.mouse.move(2, 2)
    settle(page)
    yield page
    assert [text for text in complaints if "willReadFrequently" not in text] == []  # that one is about heat() below


def heat(page, side):
    """The map drawn on a side, ``[H', W']`` in 0…1 at every fourth pixel, read back from its colours; None: none."""
    shot = page.evaluate(
        """side => {
          const c = document.querySelector(`#${side} .stage canvas`), found = [];
          if (c.hidden) return null;
          const pixels = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
          for (let y = 2; y < c.height; y += 4)
            for (let x = 2, i = 4 * (y * c.width + x); x < c.width; x += 4, i += 16)
              found.push(...pixels.subarray(i, i + 3));
          return [c.width, c.height, found];
        }""",
        side,
    )
    if shot is None:
        return None
    width, height, pixels = shot
    table = (colormaps["inferno"](np.linspace(0, 1, 256))[:, :3] * 255).round()
    values = cdist(np.reshape(pixels, (-1, 3)), table).argmin(1) / 255
    return values.reshape(len(range(2, height, 4)), -1), (height, width)


def click(page, side, y, x, *, move=False):
    """At a share of the picture's height and width."""
    (page.mouse.move if move else page.mouse.click)(*spot(page, side, y, x))
    settle(page)


def spot(page, side, y, x):
    """That place in the window, ``(x, y)``."""
    page.evaluate("scrollTo(0, 0)")  # moving a slider may have scrolled
    box = page.locator(f"#{side} .stage").bounding_box()
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def settle(page):
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def slide(page, kind, value):
    page.locator(f"#pick-{kind}").fill(str(value))
    settle(page)


def assert_drawn(drawn, want):
    """A drawn heat map is that map, at every pixel, from its minimum to its maximum; two roundings to 8 bits apart."""
    values, size = drawn
    want = want[None, None]
    scaled = torch.nn.functional.interpolate(want, size, mode="bicubic", align_corners=False)[0, 0, 2::4, 2::4]
    scaled = ((scaled - want.min()) / (want.max() - want.min())).clamp(0, 1)
    np.testing.assert_allclose(values, scaled, atol=2.5 / 255)


def test_opens_on_the_unified_maps(page, maps):
    assert_drawn(heat(page, "generated"), maps.ulam("r2g")[0])
    assert_drawn(heat(page, "reference"), maps.ulam("g2r")[0])
    assert page.locator("#scores tbody tr").count() == 3
    assert 'a "cat" & </script>' in page.locator(".facts").text_content()
    assert i2am.__version__ in page.locator(".facts").text_content()


def test_click_on_the_generated_image_shows_its_sram(page, maps):
    click(page, "generated", 5.5 / 16, 10.5 / 12)
    cell = torch.zeros(16, 12)
    cell[5, 10] = 1
    assert_drawn(heat(page, "reference"), maps.sram(cell)[0])
    assert heat(page, "generated") is None
    want = maps.sram(cell)[0]
    y, x = divmod(int(want.argmax()), GRID[1])
    place = f"strongest {round(100 * (y + 0.5) / GRID[0])} % down, {round(100 * (x + 0.5) / GRID[1])} % across"
    lift = f"{float(want.max() / want.mean()):.1f} × the mean"
    assert f"row 6, column 11 → reference: {place}, {lift} (kept)" in page.inner_text("#said").replace(
        "generated, ", ""
    )
    ring = page.locator("#reference svg .peak")
    assert float(ring.get_attribute("cx")) == pytest.approx((x + 0.5) / GRID[1])
    assert float(ring.get_attribute("cy")) == pytest.approx((y + 0.5) / GRID[0])
    click(page, "generated", 0.1, 0.1, move=True)
    assert "row 6, column 11" in page.inner_text("#said")  # kept
    page.keyboard.press("Escape")
    settle(page)
    assert_drawn(heat(page, "reference"), maps.ulam("g2r")[0])


def test_click_on_the_reference_shows_where_it_went(page, maps):
    click(page, "reference", 2.5 / 4, 4.5 / 6)
    assert_drawn(heat(page, "generated"), maps.where_did_it_go((2, 4))[0])
    assert heat(page, "reference") is None


def test_hover_follows_and_lets_go(page, maps):
    click(page, "generated", 0.5 / 16, 0.5 / 12, move=True)
    cell = torch.zeros(16, 12)
    cell[0, 0] = 1
    assert_drawn(heat(page, "reference"), maps.sram(cell)[0])
    page.mouse.move(2, 2)
    settle(page)
    assert page.inner_text("#said") == ""


def test_sliders_pick_time_head_and_layer(page, maps):
    slide(page, "time", 2)
    assert_drawn(heat(page, "generated"), maps.ulam("r2g", times=1)[0])
    slide(page, "head", 4)
    assert_drawn(heat(page, "reference"), maps.ulam("g2r", times=1, heads=3)[0])
    slide(page, "layer", 2)
    assert_drawn(heat(page, "generated"), maps.ulam("r2g", times=1, heads=3, layers=maps.layers[1])[0])
    assert maps.layers[1] in page.locator("#picks").inner_text()
    click(page, "generated", 0.4, 0.6)
    assert "row 7, column 8" in page.inner_text("#said")
    cell = torch.zeros(16, 12)
    cell[6, 7] = 1
    assert_drawn(heat(page, "reference"), maps.sram(cell, times=1, heads=3, layers=maps.layers[1])[0])
    page.click("#reset")
    settle(page)
    assert_drawn(heat(page, "generated"), maps.ulam("r2g")[0])


def test_levels_strip(page, maps):
    assert page.locator("#strip button").count() == 3
    page.click("#tab-layer")
    settle(page)
    assert page.locator("#strip button").count() == len(maps.layers)
    page.locator("#strip button").nth(2).click()
    settle(page)
    assert page.locator("#pick-layer").input_value() == "3"
    assert_drawn(heat(page, "generated"), maps.ulam("r2g", layers=maps.layers[2])[0])
    page.locator("#strip button").nth(2).click()
    settle(page)
    assert page.locator("#pick-layer").input_value() == "0"
    page.keyboard.press("Tab")
    page.focus("#tab-layer")
    page.keyboard.press("ArrowLeft")
    settle(page)
    assert page.locator("#strip button").count() == 4  # heads


def test_keyboard_alone(page, maps):
    page.focus("#generated .stage")
    page.keyboard.press("ArrowRight")  # the middle
    for key_ in ("ArrowDown", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key_)
    settle(page)
    assert "row 10, column 9" in page.inner_text("#said")
    assert "kept" in page.inner_text("#said")
    cell = torch.zeros(16, 12)
    cell[9, 8] = 1
    assert_drawn(heat(page, "reference"), maps.sram(cell)[0])


def test_touch(page, maps):
    page.touchscreen.tap(*spot(page, "reference", 3.5 / 4, 0.5 / 6))
    page.wait_for_function("() => state.place?.kept")  # a tap arrives when the browser thinks so
    settle(page)
    assert_drawn(heat(page, "generated"), maps.where_did_it_go((3, 0))[0])


def test_registered_patch_has_a_button(page, maps):
    page.click("#regions button")
    settle(page)
    assert_drawn(heat(page, "reference"), maps.sram(REGION)[0])


def test_colours_opacity_and_marks(page):
    page.select_option("#colours", "jet")
    settle(page)
    pixel = page.evaluate(
        "[...document.querySelector('#generated .scale canvas').getContext('2d').getImageData(0, 0, 1, 1).data]"
    )
    assert pixel[:3] == [0, 0, 128]  # jet's lowest
    page.locator("#opacity").fill("20")
    settle(page)
    assert page.evaluate("getComputedStyle(document.querySelector('#generated .stage canvas')).opacity") == "0.2"
    assert page.locator("#generated svg .outline").count() == 1
    page.click("#outline")
    settle(page)
    assert page.locator("#generated svg .outline").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_theme_and_contrast(browser, report, scheme):
    """The paper is light or dark as the system asks, the button turns it, and text stays readable (WCAG AAA: 7)."""
    page = browser.new_page(color_scheme=scheme)
    page.goto(report.as_uri())

    def lightness(what):
        numbers = page.evaluate(f"getComputedStyle(document.body).{what}.match(/\\d+/g).map(Number)")
        channels = [c / 3294 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in numbers[:3]]
        return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]

    def contrast():
        pair = sorted([lightness("backgroundColor"), lightness("color")])
        return (pair[1] + 0.05) / (pair[0] + 0.05)

    before = lightness("backgroundColor")
    assert (before > 0.5) == (scheme == "light")
    assert contrast() > 7
    page.click("#theme")
    assert (lightness("backgroundColor") > 0.5) != (before > 0.5)
    assert contrast() > 7
    page.close()


def test_everything_has_a_name(page):
    """Images have alternative texts, controls have labels."""
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("img, button, select, input, [tabindex='0']")]
          .filter(e => !(e.alt || e.textContent.trim() || e.ariaLabel || e.labels?.[0]?.textContent.trim()))
          .map(e => e.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize("detail", [0, 1])
@pytest.mark.parametrize("kind", ["rows", "levels", "one token"])
def test_every_kind_of_report_opens(browser, maps, pictures, tmp_path, kind, detail):
    """Without rows, without G2R, with nothing to pick: what there is works, and nothing complains."""
    if kind == "levels":
        maps = i2am.AttributionMaps.load(maps.save(tmp_path / "bare.safetensors", record=False))
    if kind == "one token":
        unet = pipelines.unet()
        with i2am.patch_unet(unet, reference=i2am.Reference(), num_steps=1, time_groups=1) as tracer, torch.no_grad():
            unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 1, pipelines.CONTEXT))
        maps = tracer.maps()
    images = pictures if detail else ()
    path, complaints = maps.report(tmp_path / "x.html", *images, detail=detail, progress=False), []
    page = browser.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", timeout=30_000)
    assert heat(page, "generated") is not None
    assert (heat(page, "reference") is None) == (kind == "one token")
    assert page.locator("#strip button").count() == (0 if not detail else 4 if kind == "one token" else 3)
    click(page, "generated", 0.3, 0.3)
    assert (heat(page, "generated") is None) == (kind == "rows")
    if detail:
        slide(page, "head", 1)
        slide(page, "layer", 1)
        assert page.locator("#pick-head").input_value() == "0"  # one at once: the head was let go
        assert "let go" in page.inner_text("#dropped")
    page.close()
    assert [text for text in complaints if "willReadFrequently" not in text] == []


def test_narrow_screen_does_not_scroll_sideways(browser, report):
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    tops = "[...document.querySelectorAll('.scale')].map(s => ['.low', '.high'].map(e => s.querySelector(e).offsetTop))"
    assert all(low == high for low, high in page.evaluate(tops))  # both ends beside the bar
    page.close()


def test_controls_are_visible_on_a_laptop(browser, report):
    """Everything that can be chosen is on the first screen of 1366 × 850, and nothing is cut off."""
    page = browser.new_page(viewport={"width": 1366, "height": 850})
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-ready]")
    click(page, "generated", 0.4, 0.4)
    parts = page.evaluate(
        """() => [...document.querySelectorAll('.controls :is(button, input, select), .stage, #said, .legend')]
          .filter(e => e.offsetParent).map(e => [e.id || e.className, e.getBoundingClientRect().toJSON()])"""
    )
    assert len(parts) >= 16
    for name, box in parts:
        assert box["top"] >= 0, name
        assert box["bottom"] <= 850, name
        assert box["right"] <= 1366, name
    room = page.evaluate(
        """() => [...document.querySelectorAll('select')].map(e => {
          const style = getComputedStyle(e), pen = document.createElement('canvas').getContext('2d');
          pen.font = `${style.fontSize} ${style.fontFamily}`;
          const widest = Math.max(...[...e.options].map(o => pen.measureText(o.text).width));
          return [e.id, e.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight) - widest];
        })"""
    )
    assert [name for name, left in room if left < 12] == []  # the arrow's room
    page.close()


def test_every_mark_has_a_legend(page):
    legend = {side: page.locator(f"#{side} .legend") for side in ("generated", "reference")}
    marks = "side => [...new Set([...document.querySelectorAll(`#${side} .stage svg *`)].map(e => e.classList[0]))]"
    seen = set()
    for act in (lambda: None, lambda: click(page, "generated", 0.5, 0.5), lambda: click(page, "reference", 0.5, 0.5)):
        act()
        for side, listed in legend.items():
            drawn = {name for name in page.evaluate(marks, side) if name != "shade"}
            assert listed.locator("li").count() == len(drawn), (side, drawn)
            for name in drawn:
                assert listed.locator(f".{name}").count() == 1
            seen |= drawn
    assert {"outline", "cell", "peak"} <= seen
    assert "the cell asked about" in legend["reference"].inner_text()
    page.evaluate("() => { state.outline = false; draw(); }")
    settle(page)
    assert "mask" not in legend["generated"].inner_text()


def test_play_goes_through_the_time_groups(page, maps):
    page.clock.install()
    button = page.locator("#play")
    seen = []
    button.click()
    for _ in range(4):
        settle_now(page)
        seen.append(page.locator("#pick-time").input_value())
        page.clock.run_for(700)
    assert seen == ["1", "2", "3", "1"]
    assert button.get_attribute("aria-pressed") == "true"
    assert page.locator("#said").get_attribute("aria-live") == "off"  # a screen reader need not hear every frame
    button.click()
    settle_now(page)
    stopped = page.locator("#pick-time").input_value()
    page.clock.run_for(5000)
    assert page.locator("#pick-time").input_value() == stopped
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    page.locator("#pick-time").fill("3")  # a hand on the slider stops it
    page.clock.run_for(5000)
    assert page.locator("#pick-time").input_value() == "3"
    page.clock.resume()
    settle(page)
    assert_drawn(heat(page, "generated"), maps.ulam("r2g", times=2)[0])


def settle_now(page):
    """As settle, where the clock stands still."""
    page.clock.run_for(50)
