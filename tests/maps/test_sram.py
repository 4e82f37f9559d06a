"""SRAM: registered regions, recorded queries, reverse and pooled questions, against materialised rows in float64."""

import pytest
import torch

import i2am
from i2am._files import parse_size
from i2am.maps.entries import QKEntry
from i2am.maps.sram import grid_cells, match, region_rows, region_weights
from tests.helpers.families import GUIDED, PROMPT, denoise
from tests.helpers.families import run_at as run
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.truth import Truth, assert_peak, capture

GRID, LATENT = (8, 6), (13, 9)
REFERENCE = i2am.Reference(grid=GRID, skip=1)
SOFT = torch.rand(26, 18, generator=torch.Generator().manual_seed(3)) * (torch.arange(18) > 6)
REGIONS = {"corner": (0, 0), "spot": (7.9, 4), "last": (12, 8), "soft": SOFT}


class SramTruth(Truth):
    """As its base, with the probabilities themselves: ``rows`` and ``columns`` of each call."""

    def __init__(self, calls, *, weights, reverse=False, **kwargs):
        super().__init__(calls, **kwargs)
        nth, samples, keys = kwargs.get("nth", 0), kwargs.get("samples", slice(None)), kwargs.get("keys", slice(None))
        self.maps, skip = {}, kwargs.get("skip", 0)
        for c in (c for c in calls if c.nth == nth):
            q, k = c.q[samples].double(), c.k[samples].double()
            s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            row, column = torch.softmax(s, -1)[..., keys], torch.softmax(s[..., keys], -2)
            if reverse:
                w = torch.nn.functional.pad(weights(kwargs["reference_grid"]).double(), (skip, 0))
                pooled = {"r2g": torch.einsum("k,bhqk->bhq", w / w.sum(), column)}
            else:
                w = weights(c.grid).double()
                pooled = {"g2r": torch.einsum("q,bhqk->bhk", w / w.sum(), row)}
            self.maps.setdefault(c.layer, []).append((c.evaluation, pooled))


def flat(region, canvas=LATENT):
    """Weights of one region, independent of the package where its grid divides the mask."""

    def weights(grid):
        if isinstance(region, tuple):
            w = torch.zeros(grid)
            w[int(region[0] * grid[0] / canvas[0]), int(region[1] * grid[1] / canvas[1])] = 1
            return w.flatten()
        return region_weights(region, canvas)(grid).flatten()

    return weights


@pytest.fixture(scope="module")
def traced():
    """A run of the narrow UNet with two images, its calls, and its maps with regions registered and queries kept."""
    torch.manual_seed(0)
    unet, scheduler = pipelines.unet(), pipelines.ddim()
    latents, context = torch.randn(2, 4, *LATENT), torch.randn(4, 49, pipelines.CONTEXT)

    def go():
        return denoise(unet, scheduler, context, latents)

    calls = capture(unet, go)
    with i2am.patch_unet(
        unet, reference=REFERENCE, scheduler=scheduler, time_groups=2, record="qk", sram=REGIONS, output="model"
    ) as tracer:
        go()
    return calls, tracer.maps()


def truth(calls, region, **kwargs):
    common = dict(groups=[0, 0, 1, 1], samples=slice(2, 4), reference_grid=GRID, skip=1)
    return SramTruth(calls, weights=flat(region) if not callable(region) else region, **common, **kwargs)


@pytest.mark.parametrize("name", REGIONS)
def test_registered_and_recorded_agree_with_the_rows(traced, name):
    calls, maps = traced
    want = truth(calls, REGIONS[name])
    for ask in (name, REGIONS[name]):
        assert_peak(maps.sram(ask), want.ulam("g2r"))
        assert_peak(maps.sram(ask, level="time"), want.tlam("g2r", 2))
        assert_peak(maps.sram(ask, level="head"), want.hlam("g2r"))
        assert_peak(maps.sram(ask, level="layer"), want.llam("g2r"))
        assert_peak(maps.sram(ask, times=1, size=(5, 9)), want.ulam("g2r", groups=[1], size=(5, 9)))
    assert_peak(maps.sram(name), maps.sram(REGIONS[name]).double(), 1e-5)


def test_every_row_of_the_finest_layer(traced):
    calls, maps = traced
    name = "up_blocks.2.attentions.1.transformer_blocks.0.attn2"
    for row in (0, 50, 100, 116):
        point = (row // 9, row % 9)
        assert_peak(maps.sram(point, layers=name), truth(calls, point).ulam("g2r", names=[name]))


def test_sram_of_the_whole_picture_is_g2r(traced):
    _, maps = traced
    torch.testing.assert_close(maps.sram(torch.ones(13, 9)), maps.ulam("g2r"), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("region", [(3, 5), (7.5, 0.2)])
def test_where_did_it_go(traced, region):
    calls, maps = traced
    want = truth(calls, flat(region, GRID), reverse=True)
    assert_peak(maps.where_did_it_go(region), want.ulam("r2g"))
    assert_peak(maps.where_did_it_go(region, level="layer"), want.llam("r2g"))
    mask = torch.zeros(16, 12)
    mask[2:7, 3:9] = 1
    assert_peak(maps.where_did_it_go(mask), truth(calls, lambda grid: flat(mask)(grid), reverse=True).ulam("r2g"))


def test_where_everything_went_sums_to_r2g_without_the_class_token():
    """Column probabilities over all grid tokens, averaged: R2G's own definition."""
    torch.manual_seed(0)
    unet, scheduler = pipelines.unet(), pipelines.ddim()
    args = (unet, scheduler, torch.randn(2, 12, pipelines.CONTEXT), torch.randn(1, 4, 8, 8))
    with i2am.patch_unet(unet, reference=i2am.Reference(grid=(3, 4)), scheduler=scheduler, record="qk") as tracer:
        denoise(*args)
    maps = tracer.maps()
    torch.testing.assert_close(maps.where_did_it_go(torch.ones(3, 4)), maps.ulam("r2g"), rtol=1e-5, atol=1e-7)


def test_correspondence_pools_every_cell(traced):
    calls, maps = traced
    got = maps.correspondence((3, 2))
    assert got.shape == (2, 6, *GRID)
    for cell in range(6):
        y, x = divmod(cell, 2)
        want = truth(calls, lambda grid, y=y, x=x: overlap(grid, 3, 2, y, x))
        assert_peak(got[:, cell], want.ulam("g2r"))
    whole = maps.correspondence((1, 1))[:, 0]
    torch.testing.assert_close(whole, maps.ulam("g2r"), rtol=1e-5, atol=1e-7)


def overlap(grid, rows, columns, y, x):
    """Area of each token inside one cell, by fine sampling in exact fractions."""
    n = rows * columns * grid[0] * grid[1]
    fy = (torch.arange(n) + 0.5) / n
    ty, cy = (fy * grid[0]).long(), (fy * rows).long()
    tx, cx = (fy * grid[1]).long(), (fy * columns).long()
    wy = torch.bincount(ty[cy == y], minlength=grid[0]).double()
    wx = torch.bincount(tx[cx == x], minlength=grid[1]).double()
    return torch.outer(wy, wx).flatten()


def test_match(traced):
    calls, maps = traced
    name = "up_blocks.2.attentions.1.transformer_blocks.0.attn2"
    got = maps.match(layers=name)
    assert got.expected.shape == got.best.shape == (2, *LATENT, 2)
    p = truth(calls, (4, 7)).ulam("g2r", names=[name])
    p = p / p.sum((1, 2), keepdim=True)
    ys, xs = torch.arange(8) + 0.5, torch.arange(6) + 0.5
    torch.testing.assert_close(got.expected[:, 4, 7, 0].double(), (p.sum(2) * ys).sum(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(got.expected[:, 4, 7, 1].double(), (p.sum(1) * xs).sum(1), rtol=1e-4, atol=0)
    best = p.flatten(1).argmax(1)
    assert got.best[:, 4, 7].tolist() == [[(b // 6) + 0.5, (b % 6) + 0.5] for b in best.tolist()]
    entropy = -(p * p.log()).sum((1, 2)) / torch.log(torch.tensor(48.0))
    torch.testing.assert_close(got.confidence[:, 4, 7].double(), 1 - entropy, rtol=1e-3, atol=1e-5)
    everywhere = maps.match()  # every layer, coarse ones by the cell that holds the token
    assert_peak(match(maps.sram((4.5, 7.5))[:, None]).expected[:, 0], everywhere.expected[:, 4, 7].double(), 1e-5)


def test_confidence_runs_from_even_to_certain():
    even, certain = torch.ones(1, 1, 4, 5), torch.zeros(1, 1, 4, 5)
    certain[..., 2, 3] = 1
    assert match(even).confidence.item() == pytest.approx(0, abs=1e-6)
    assert match(certain).confidence.item() == pytest.approx(1)
    assert match(certain).expected.tolist() == [[[2.5, 3.5]]]


# ----------------------------------------------------------------------------------------------------- what is asked


def test_area_average_is_exact():
    mask = torch.rand(12, 18)
    blocks = torch.nn.functional.avg_pool2d(mask[None], (3, 3))[0]
    torch.testing.assert_close(region_weights(mask, (1, 1))((4, 6)).reshape(4, 6), blocks / blocks.sum())
    odd = region_weights(torch.tensor([[1.0, 0.0, 0.0]]), (1, 1))((1, 2))  # a cell cuts the second pixel
    torch.testing.assert_close(odd.flatten(), torch.tensor([1.0, 0.0]))
    odd = region_weights(torch.tensor([[0.0, 1.0, 0.0]]), (1, 1))((1, 2))
    torch.testing.assert_close(odd.flatten(), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(grid_cells((2, 3))((4, 5)).sum(-1), torch.ones(1, 6))


def test_a_point_is_the_token_whose_cell_holds_it():
    weights = region_weights((31.9, 64), (64, 128))
    assert weights((4, 8)).argmax().item() == 1 * 8 + 4
    assert region_weights((63.99, 127.99), (64, 128))((7, 5)).argmax().item() == 34


@pytest.mark.parametrize(
    ("region", "error", "message"),
    [
        ((13, 0), IndexError, r"\(13, 0\) is outside the picture: valid are 0 ≤ y < 13 and 0 ≤ x < 9"),
        ((0, -0.1), IndexError, "outside the picture"),
        (torch.zeros(5, 5), ValueError, "empty mask"),
        (torch.full((5, 5), float("nan")), ValueError, "finite"),
        (-torch.ones(5, 5), ValueError, "not negative"),
        (torch.ones(5), ValueError, r"a point \(y, x\) or a mask"),
        (torch.ones(3, 5, 5), ValueError, "a mask for each of 3 images, but the maps hold 2"),
        ("sleeve", ValueError, "no region 'sleeve' was registered.*there are: corner, spot, last, soft"),
    ],
)
def test_refused_questions(traced, region, error, message):
    with pytest.raises(error, match=message):
        traced[1].sram(region)


def test_a_mask_per_image(traced):
    _, maps = traced
    masks = torch.zeros(2, 13, 9)
    masks[0, :5], masks[1, 6:] = 1, 1
    got = maps.sram(masks)
    torch.testing.assert_close(got[0], maps.sram(masks[0])[0])
    torch.testing.assert_close(got[1], maps.sram(masks[1])[1])


def test_canvas(traced):
    _, maps = traced
    assert maps.canvas == LATENT  # a bare UNet: the latent grid
    assert maps.sram((104, 36), canvas=(8 * 13 + 1, 8 * 9)).shape == (2, *GRID)
    assert maps.sram((8 * 4 + 7, 8 * 3), canvas=(104, 72)).equal(maps.sram((4, 3)))


def test_maps_without_records_say_how_to_get_them():
    unet = pipelines.unet()
    with i2am.patch_unet(unet, reference=REFERENCE, sram={"a": (0, 0)}) as tracer, torch.no_grad():
        unet(torch.randn(1, 4, 8, 8), 500, torch.randn(1, 49, pipelines.CONTEXT))
    maps = tracer.maps()
    assert maps.sram("a").shape == (1, *GRID)
    for ask in (lambda: maps.sram((0, 0)), maps.correspondence, maps.match, lambda: maps.where_did_it_go((0, 0))):
        with pytest.raises(ValueError, match=r'record="qk".*sram='):
            ask()


def test_references_without_a_grid():
    pipe = pipelines.sd("base")
    go = run(pipe, ip_adapter_image=pipelines.image(), **PROMPT)
    with i2am.trace(pipe, record="qk") as tracer:
        go()
    maps = tracer.maps()
    with pytest.raises(ValueError, match="no SRAM for reference 'ip_adapter': its 4 tokens have no 2-D layout"):
        maps.sram((0, 0))
    with pytest.raises(ValueError, match="no 2-D layout"):
        maps.where_did_it_go((0, 0))


def test_two_adapters_in_pixels():
    """Points are pixels of the output image; each adapter answers for itself; both share the layer's queries."""
    pipe = pipelines.sd("full", "full")
    go = run(pipe, size=(48, 32), ip_adapter_image=[pipelines.image(seed=3), pipelines.image(seed=4)], **PROMPT)
    calls = capture(pipe.unet, go)
    with i2am.trace(pipe, time_groups=2, record="qk", sram={"p": (21, 33)}, output="model") as tracer:
        go()
    maps = tracer.maps()
    assert maps.canvas == (32, 48)
    for nth, name in enumerate(maps.references, start=1):
        want = SramTruth(
            calls,
            weights=flat((21, 33), (32, 48)),
            nth=nth,
            samples=GUIDED,
            groups=[0, 0, 1, 1],
            reference_grid=pipelines.PATCHES,
            skip=1,
        ).ulam("g2r")
        assert_peak(maps.sram((21, 33), reference=name), want)
        assert_peak(maps.sram("p", reference=name), want)
    first, second = maps._entries[:2]
    assert first.tensors["q"] is second.tensors["q"]


def test_masked_keys(traced):
    """A padded context: recorded masks keep padding out of rows and columns."""
    unet = pipelines.unet()
    keep = torch.tensor([[True] * 4 + [False] * 2])
    args = (torch.randn(1, 4, 8, 8), 500, torch.randn(1, 6, pipelines.CONTEXT))
    with i2am.patch_unet(
        unet, reference=i2am.Reference(grid=(2, 3)), num_steps=1, record="qk", sram={"p": (3, 3)}
    ) as tracer:
        with torch.no_grad():
            unet(*args, encoder_attention_mask=keep)
    maps = tracer.maps()
    got = maps.sram((3, 3)).flatten()
    assert got[4:].max() < 1e-6
    assert got.sum().item() == pytest.approx(1, abs=1e-5)
    assert_peak(maps.sram("p"), maps.sram((3, 3)).double(), 1e-5)


# ----------------------------------------------------------------------------------------------------------- records


def record_run(**options):
    torch.manual_seed(0)
    unet, scheduler = pipelines.unet(), pipelines.ddim()
    args = (unet, scheduler, torch.randn(2, 49, pipelines.CONTEXT), torch.randn(1, 4, *LATENT))
    with i2am.patch_unet(
        unet, reference=REFERENCE, scheduler=scheduler, time_groups=2, output="model", **options
    ) as tracer:
        denoise(*args)
    return tracer.maps()


@pytest.mark.parametrize("where", ["cpu", None, "disk", "folder"])
def test_records_anywhere_answer_alike(where, tmp_path):
    want = record_run(record="qk").sram((5, 5))
    maps = record_run(record="qk", record_to=tmp_path / "record" if where == "folder" else where)
    assert maps.sram((5, 5)).equal(want)
    if where == "folder":
        assert sorted(p.name for p in (tmp_path / "record").iterdir()) == [f"{i:06d}.safetensors" for i in range(4)]


def test_record_every_and_times():
    every = record_run(record="qk", record_every=2)
    assert [e.group for e in every._entries].count(0) == [e.group for e in every._entries].count(1) == 7
    last = record_run(record="qk", record_times=[1])
    assert {e.group for e in last._entries} == {1}
    assert last.sram((5, 5), level="time")[:, 0].isnan().all()
    assert last.sram((5, 5), times=1).equal(record_run(record="qk").sram((5, 5), times=1))


def test_half_precision_records():
    full, half = record_run(record="qk"), record_run(record="qk", record_dtype=torch.float16)
    assert half._entries[0].tensors["q"].dtype == torch.float16
    assert half._entries[0].tensors["row_lse"].dtype == torch.float32
    assert_peak(half.sram((5, 5)), full.sram((5, 5)).double(), 5e-3)


def test_the_limit_is_checked_before_the_first_step(caplog):
    torch.manual_seed(0)
    unet, scheduler = pipelines.unet(), pipelines.ddim()
    ran = []
    unet.conv_out.register_forward_hook(lambda m, a, o: ran.append(type(o)))
    full = record_run(record="qk")
    size = {id(x): x.nbytes for e in full._entries for x in e.tensors.values()}
    total = sum(size.values())
    with caplog.at_level("INFO", logger="i2am"):
        record_run(record="qk", record_limit=total)
    assert f"{total / 1e3:.3g} KB for 4 steps" in caplog.text
    with i2am.patch_unet(
        unet, reference=REFERENCE, scheduler=scheduler, time_groups=2, record="qk", record_limit=total - 1
    ) as tracer:
        with pytest.raises(ValueError, match=r"too much\. These fit: record_every=2 .*record_times=\[1\] .*GB"):
            denoise(unet, scheduler, torch.randn(2, 49, pipelines.CONTEXT), torch.randn(1, 4, *LATENT))
    assert torch.Tensor not in ran  # only the shape-only forward has run
    with pytest.raises(ValueError, match="nothing was recorded"):
        tracer.maps()
    record_run(record="qk", record_limit=total - 1, record_every=2)
    record_run(record="qk", record_limit=total - 1, record_times=[1])


def test_a_second_run_needs_room_too():
    torch.manual_seed(0)
    unet, scheduler = pipelines.unet(), pipelines.ddim()
    args = (unet, scheduler, torch.randn(2, 49, pipelines.CONTEXT), torch.randn(1, 4, *LATENT))
    with i2am.patch_unet(unet, reference=REFERENCE, scheduler=scheduler, record="qk", record_limit="1MB") as tracer:
        denoise(*args)
        first = tracer.maps()
        assert 500_000 < tracer._record.nbytes < 1_000_000
        with pytest.raises(ValueError, match="too much"):
            denoise(*args)
        assert tracer.maps().sram((1, 1)).equal(first.sram((1, 1)))  # the finished run is whole


def test_the_announced_size_is_the_size(caplog):
    """Heun calls the model 7 times in 4 steps; the shape-only forward knows every layer."""
    from diffusers import HeunDiscreteScheduler

    torch.manual_seed(0)
    unet, scheduler = pipelines.unet(), HeunDiscreteScheduler()
    args = (unet, scheduler, torch.randn(2, 49, pipelines.CONTEXT), torch.randn(1, 4, *LATENT))
    with i2am.patch_unet(unet, reference=REFERENCE, scheduler=scheduler, record="qk") as tracer:
        with caplog.at_level("INFO", logger="i2am"):
            denoise(*args)
    assert f"{tracer._record.nbytes / 1e6:.3g} MB for 4 steps" in caplog.text


def test_masked_rows_have_no_probabilities():
    """A query that sees no key (its log-sum-exp is -inf) adds nothing, and no NaN."""
    x = {"q": torch.randn(1, 1, 3, 4), "k": torch.randn(1, 1, 5, 4)}
    s = x["q"] @ x["k"].transpose(-1, -2)
    x["row_lse"] = s.logsumexp(-1)
    x["row_lse"][..., 1] = -torch.inf
    x["mask"] = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    x["mask"][:, :, 1] = False
    got = region_rows(QKEntry("a", "r", 0, 1.0, tensors=x), torch.eye(3)[None], [0])
    want = s.softmax(-1)
    want[:, :, 1] = 0
    torch.testing.assert_close(got[:, :, 0], want[:, 0])


def test_a_failed_forward_records_nothing():
    unet = pipelines.unet()
    context, boom = torch.randn(1, 49, pipelines.CONTEXT), []

    def fail(*_):
        if boom:
            raise RuntimeError("boom")

    unet.conv_out.register_forward_hook(fail)
    with i2am.patch_unet(unet, reference=REFERENCE, num_steps=2, record="qk") as tracer, torch.no_grad():
        unet(torch.randn(1, 4, 8, 8), 900, context)
        boom.append(1)
        with pytest.raises(RuntimeError, match="boom"):
            unet(torch.randn(1, 4, 8, 8), 400, context)
    assert len(tracer.maps()._entries) == 7


@pytest.mark.parametrize(
    ("written", "size"), [("2GB", 2e9), ("1.5 GiB", 1.5 * 2**30), ("2kib", 2048), (7, 7), (" 12 b ", 12)]
)
def test_sizes_as_people_write_them(written, size):
    assert parse_size(written) == size


@pytest.mark.parametrize("written", ["iB", "GiB", "0B", True, -1, None, "1e3B", "99999999TiB", 2.5, "12"])
def test_what_is_no_size(written):
    with pytest.raises(ValueError, match="a size is a number of bytes"):
        parse_size(written)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record": "all"}, 'record must be "qk"'),
        ({"record": "qk", "record_every": 0}, "record_every must be"),
        ({"record": "qk", "record_limit": "2 apples"}, 'like "2GB" or "2GiB", got'),
        ({"record": "qk", "record_dtype": torch.int8}, "floating point"),
        ({"record": "qk"}, "needs num_steps= or scheduler="),
        ({"sram": {"a": torch.zeros(4, 4)}}, "empty mask"),
        ({"sram": {str(i): torch.ones(2, 2) for i in range(65)}}, "at most 64"),
    ],
)
def test_refused_options(options, message):
    unet = pipelines.unet()
    with pytest.raises(ValueError, match=message):
        i2am.patch_unet(unet, reference=REFERENCE, **options)
    with pytest.raises(IndexError, match="valid are 0 ≤ y < 8"):
        i2am.patch_unet(unet, reference=REFERENCE, sram={"a": (8, 0)}, canvas=(8, 8))
    i2am.patch_unet(unet, reference=REFERENCE).unpatch()


def test_a_registered_point_outside_is_refused_before_the_model_runs():
    unet = pipelines.unet()
    with i2am.patch_unet(unet, reference=REFERENCE, sram={"a": (8, 0)}):
        with pytest.raises(IndexError, match="valid are 0 ≤ y < 8"):
            unet(torch.randn(1, 4, 8, 8), 500, torch.randn(1, 49, pipelines.CONTEXT))


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("where", ["cpu", "folder"])
def test_records_survive_in_files(where, embed, tmp_path):
    maps = record_run(
        record="qk", record_to="cpu" if where == "cpu" else tmp_path / "record", sram={"p": (2, 2)}, canvas=(26, 18)
    )
    path = maps.save(tmp_path / "maps.safetensors", embed=embed)
    loaded = i2am.AttributionMaps.load(path)
    assert loaded.canvas == (26, 18)
    assert loaded.regions == ["p"]
    for ask in ((11, 11), "p"):
        assert loaded.sram(ask).equal(maps.sram(ask))
    assert loaded.where_did_it_go((1, 1)).equal(maps.where_did_it_go((1, 1)))
    again = loaded.save(path)  # over the file that its record lives in
    assert i2am.AttributionMaps.load(again).sram((11, 11)).equal(maps.sram((11, 11)))
    want = maps.sram((11, 11))
    if where == "folder" and not embed:
        moved = tmp_path / "elsewhere"
        moved.mkdir()
        (tmp_path / "record").rename(moved / "record")
        with pytest.raises(FileNotFoundError, match="refers to the record"):
            i2am.AttributionMaps.load(path)
        path.rename(moved / "maps.safetensors")
        assert i2am.AttributionMaps.load(moved / "maps.safetensors").sram((11, 11)).equal(want)


def test_a_truncated_record_is_refused(tmp_path):
    path = record_run(record="qk", record_to=tmp_path / "record").save(tmp_path / "maps.safetensors")
    victim = tmp_path / "record" / "000002.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"000002\.safetensors is truncated"):
        i2am.AttributionMaps.load(path)


def test_an_existing_folder_is_not_written_over(tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ValueError, match="is not empty"):
        record_run(record="qk", record_to=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
