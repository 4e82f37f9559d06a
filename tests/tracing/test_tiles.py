"""Tiles: refused without a place, laid on the picture with one."""

import contextlib

import diffusers
import pytest
import torch

import i2am
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.truth import Truth, assert_peak, capture

REFERENCE = i2am.Reference(grid=(4, 4), skip=1)
pytestmark = pytest.mark.usefixtures("one_thread")


def tiled(unet, scheduler, context, lefts, size=(16, 28), place=None, steps=2):
    """A loop over windows 16 wide, guidance in the batch; ``place(top, left)`` around each call."""
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for t in scheduler.timesteps:
            out, n = torch.zeros_like(x), torch.zeros_like(x)
            for left in lefts:
                part = (..., slice(left, left + 16))
                given = torch.cat([x[part]] * 2), t, context
                if place is None:
                    u, c = unet(*given).sample.chunk(2)
                else:
                    with place(0, left):
                        u, c = unet(*given).sample.chunk(2)
                out[part] += u + 5 * (c - u)
                n[part] += 1
            x = scheduler.step(out / n, t, x).prev_sample


@pytest.fixture(scope="module")
def setting():
    return pipelines.unet(), pipelines.ddim(), torch.randn(2, 17, pipelines.CONTEXT)


def test_tiles_without_a_place_are_refused(setting):
    unet, scheduler, context = setting
    with i2am.patch_unet(unet, reference=REFERENCE, scheduler=scheduler) as tracer:
        with pytest.raises(ValueError, match=r"on other latents.*tracer\.tile\(top, left\)"):
            tiled(unet, scheduler, context, (0, 12))
        with pytest.raises(ValueError, match="no maps that can be trusted"):
            tracer.maps()
    with i2am.patch_unet(unet, reference=REFERENCE, scheduler=scheduler):  # one tile a step: told by its size
        with pytest.raises(ValueError, match=r"latents are 16×16, those that the scheduler steps are 16×28"):
            tiled(unet, scheduler, context, (0,))


def test_a_scheduler_that_steps_more_than_was_looked_at(setting):
    """The only step of a run over tiles, all of which count by the user's word: nothing else would tell."""
    unet, scheduler, context = setting
    scheduler.set_timesteps(1)
    with i2am.patch_unet(unet, reference=REFERENCE, scheduler=scheduler, guidance="none") as tracer, torch.no_grad():
        x, t = torch.randn(1, 4, 16, 28), scheduler.timesteps[0]
        for left in (0, 12):
            unet(x[..., left : left + 16], t, context[:1])
        scheduler.step(x, t, x)
        with pytest.raises(ValueError, match=r"latents are 16×16, those that the scheduler steps are 16×28"):
            tracer.maps()
        tracer.reset()
        scheduler.set_timesteps(1)
        unet(x, t, context[:1])
        scheduler.step(x, t, x)
        assert tracer.maps().ulam("r2g").shape == (1, 16, 28)


@pytest.mark.parametrize("lefts", [(0, 12), (12, 0)], ids=["in order", "the other way round"])
def test_each_tile_in_its_place(setting, lefts, tmp_path):
    unet, scheduler, context = setting
    calls = capture(unet, lambda: tiled(unet, scheduler, context, lefts))
    finest = "up_blocks.2.attentions.0.transformer_blocks.0.attn2"
    by_tile = {}
    for i, left in enumerate(lefts):
        mine = [c for c in calls if c.evaluation % 2 == i]
        truth = Truth(mine, groups=[0] * 4, samples=slice(1, 2), reference_grid=(4, 4), skip=1)
        by_tile[left] = {d: truth.ulam(d, names=[finest]) for d in ("r2g", "g2r")}
    with i2am.patch_unet(unet, reference=REFERENCE, scheduler=scheduler, time_groups=1) as tracer:
        tiled(unet, scheduler, context, lefts, place=tracer.tile)
    maps = tracer.maps()
    want = torch.zeros(1, 16, 28, dtype=torch.float64)
    want[..., :12] = by_tile[0]["r2g"][..., :12]
    want[..., 12:16] = (by_tile[0]["r2g"][..., 12:] + by_tile[12]["r2g"][..., :4]) / 2
    want[..., 16:] = by_tile[12]["r2g"][..., 4:]
    assert_peak(maps.ulam("r2g", layers=finest), want)
    assert_peak(maps.ulam("g2r", layers=finest), (by_tile[0]["g2r"] + by_tile[12]["g2r"]) / 2)
    lifted = maps.ulam("r2g", layers=finest, normalize="lift")
    assert_peak(lifted, 256 * want)  # of a tile's 16×16 tokens each, 1.0 is uniform
    saved = i2am.AttributionMaps.load(maps.save(tmp_path / "maps.safetensors"))
    assert saved.ulam("r2g", layers=finest, normalize="lift").equal(lifted)
    assert maps.canvas == (16, 28)
    assert maps.ulam("r2g").shape == (1, 16, 28)
    assert maps.provenance["tiles"] == [[0, 0], [0, 12]]


def test_tiles_that_do_not_meet_a_layers_grid_are_shared_out(setting):
    """A tile at column 12 begins in the middle of a token of 8 latents: each of the picture's cells takes its share."""
    unet, scheduler, context = setting
    with i2am.patch_unet(unet, reference=REFERENCE, scheduler=scheduler, layers="mid_block*") as tracer:
        tiled(unet, scheduler, context, (0, 12), place=tracer.tile)
    coarse = tracer.maps().ulam("r2g")
    assert coarse.shape == (1, 4, 7)
    assert (coarse > 0).all()


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (((0, 0), (0, 20)), "does not lie on the picture's 16×28"),
        (((0, 0), None), "a call without a place came after tiles"),
    ],
)
def test_places_that_can_not_be(setting, places, message):
    unet, scheduler, context = setting
    with i2am.patch_unet(unet, reference=REFERENCE, scheduler=scheduler) as tracer:
        tiled(unet, scheduler, context, (0, 12), place=tracer.tile, steps=1)
        scheduler.set_timesteps(1)
        t = scheduler.timesteps[0]
        scheduler.step(torch.zeros(1, 4, 16, 28), t, torch.zeros(1, 4, 16, 28))
        with pytest.raises(ValueError, match=message), torch.no_grad():
            tracer._clock.on_set_timesteps()
            tracer._clock.on_step(torch.zeros(1, 4, 16, 28))
            tracer._clock._count = 0
            if places[1] is None:
                unet(torch.randn(1, 4, 16, 28).repeat(2, 1, 1, 1), t, context)
            else:
                with tracer.tile(*places[1]):
                    unet(torch.randn(1, 4, 16, 16).repeat(2, 1, 1, 1), t, context)


FINEST, COARSEST = (f"{x}.attentions.0.transformer_blocks.0.attn2" for x in ("up_blocks.2", "mid_block"))
CORNER = torch.zeros(16, 28)
CORNER[2:9, 8:22] = torch.rand(7, 14, generator=torch.Generator().manual_seed(2))  # tiles overlap in some of it


def by_hand(calls, lefts, layer, cell):
    """Mean row and column ``[h, w, K]`` of every cell of the picture: over heads, and over the tiles that cover it."""
    rows, columns, cover = [], [], []
    for c in (c for c in calls if c.layer == layer):
        start = lefts[c.evaluation % len(lefts)] / cell
        place = [[max(0.0, 1 - abs(start + token - x)) for token in range(16 // cell)] for x in range(28 // cell)]
        place = torch.tensor(place, dtype=torch.float64)  # [cells, tokens] of a row
        s = (c.q[1:].double() @ c.k[1:].double().mT / c.q.shape[-1] ** 0.5)[0]  # [H, h·w, K]
        for kept, softmax in ((rows, s.softmax(-1)), (columns, s.softmax(-2))):
            kept.append(torch.einsum("hwk,cw->hck", softmax.mean(0).unflatten(0, c.grid), place))
        cover.append(place.sum(1))
    cover = torch.stack(cover).sum(0)[None, :, None]
    return torch.stack(rows).sum(0) / cover, torch.stack(columns).sum(0) / cover


@pytest.mark.parametrize(("layer", "cell"), [(FINEST, 1), (COARSEST, 4)], ids=["finest", "between two tokens"])
@pytest.mark.parametrize("kind", ["DDIMScheduler", "HeunDiscreteScheduler"])
def test_regions_of_tiles(setting, layer, cell, kind, tmp_path):
    """A region's row is the mean over the tiles of each of its cells, registered or asked afterwards."""
    unet, _, context = setting
    scheduler, lefts = getattr(diffusers, kind)(), (12, 0, 10)
    calls = capture(unet, lambda: tiled(unet, scheduler, context, lefts))
    ran = len({c.evaluation for c in calls})
    assert ran == (6 if kind == "DDIMScheduler" else 9)  # Heun: 3 evaluations for 2 steps
    rows, columns = by_hand(calls, lefts, layer, cell)
    weights = torch.nn.functional.avg_pool2d(CORNER[None].double(), cell)[0, ..., None]
    wanted = {
        "mask": (rows * weights).sum((0, 1)) / weights.sum(),
        "overlap": rows[3 // cell, 13 // cell],
        "alone": rows[15 // cell, 27 // cell],
    }
    sram = {"mask": CORNER, "overlap": (3, 13), "alone": (15, 27)}
    given = dict(reference=REFERENCE, scheduler=scheduler, time_groups=1, layers=layer)
    with i2am.patch_unet(unet, **given, sram=sram, record="qk") as tracer:
        tiled(unet, scheduler, context, lefts, place=tracer.tile)
    maps = tracer.maps()
    assert maps.counts()[layer] == [ran]
    saved = i2am.AttributionMaps.load(maps.save(tmp_path / "maps.safetensors"))
    for name, region in sram.items():
        want = wanted[name][1:].reshape(1, 4, 4)  # the first of 17 is a class token
        assert_peak(maps.sram(name), want)
        assert_peak(maps.sram(region), want)
        assert saved.sram(region).equal(maps.sram(region))
    went = columns[..., 1 + 4 * 2 + 1][None]  # token (2, 1) of the reference
    assert_peak(maps.where_did_it_go((2.5, 1.5)), went)
    assert saved.where_did_it_go((2.5, 1.5)).equal(maps.where_did_it_go((2.5, 1.5)))
    assert_peak(maps.ulam("r2g"), columns[..., :].mean(-1)[None])


def test_registered_regions_need_the_same_tiles_in_each_step(setting):
    unet, scheduler, context = setting
    given = dict(reference=REFERENCE, scheduler=scheduler, sram={"eye": (3, 13)}, time_groups=1, guidance=1)
    with i2am.patch_unet(unet, **given) as tracer:
        tiled(unet, scheduler, context, (0, 12), place=tracer.tile, steps=1)
        one = tracer.maps().sram("eye")  # a single step: the tiles are all that there were
        tiled(unet, scheduler, context, (0, 12), place=tracer.tile, steps=1)
        assert_peak(tracer.maps().sram("eye"), one.double())
        tiled(unet, scheduler, context, (0,), place=tracer.tile, steps=1)
        with pytest.raises(ValueError, match=r"tiles ran differently often in time group 0.*record=.qk."):
            tracer.maps()
    with i2am.patch_unet(unet, **given) as tracer:
        tiled(unet, scheduler, context, (0, 12), place=tracer.tile)
        with pytest.raises(ValueError, match=r"a tile at \(0, 8\) came that the first step did not have"):
            tiled(unet, scheduler, context, (0, 8), place=tracer.tile)


@pytest.mark.parametrize("window", [True, False], ids=["on the tile's grid", "on a grid of its own"])
def test_each_tile_with_a_reference_of_its_own(window, tmp_path):
    """As super-resolution has features of the small image's window: they lie where the tile does."""
    model, scheduler, lefts = pipelines.unet(cross_attention_dim=8), pipelines.ddim(), (0, 12)
    side = 16 if window else 4
    contexts = {left: torch.randn(2, side * side, 8, generator=torch.Generator().manual_seed(left)) for left in lefts}

    def go(place=contextlib.nullcontext):
        scheduler.set_timesteps(2)
        x = torch.randn(1, 4, 16, 28, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            for t in scheduler.timesteps:
                for left in lefts:
                    with place(*(() if place is contextlib.nullcontext else (0, left))):
                        model(torch.cat([x[..., left : left + 16]] * 2), t, contexts[left])
                x = scheduler.step(x * 0.1, t, x).prev_sample

    calls = [c for c in capture(model, go) if c.layer == FINEST]
    rows = torch.zeros(16, 28, 16, 28, dtype=torch.float64)  # of a cell, on the picture
    cover, seen = torch.zeros(16, 28), torch.zeros(16, 28, dtype=torch.float64)
    for c in calls if window else ():
        part = slice(lefts[c.evaluation % 2], lefts[c.evaluation % 2] + 16)
        p = (c.q[1].double() @ c.k[1].double().mT / c.q.shape[-1] ** 0.5).softmax(-1).mean(0)
        rows[:, part, :, part] += p.reshape(16, 16, 16, 16)
        seen[:, part] += p.mean(0).reshape(16, 16)
        cover[:, part] += 1
    given = dict(reference=i2am.Reference(grid=(side, side)), scheduler=scheduler, time_groups=1, layers=FINEST)
    with i2am.patch_unet(model, **given, sram={"eye": (3, 13)}, record="qk") as tracer:
        go(tracer.tile)
    maps = tracer.maps()
    assert maps.ulam("r2g").shape == (1, 16, 28)
    assert any("reference" in note and "of its own" in note for note in maps.provenance["notes"])
    if not window:
        for ask in (lambda: maps.ulam("g2r"), lambda: maps.sram("eye"), lambda: maps.sram((3, 13))):
            with pytest.raises(ValueError, match=r"no G2R|no SRAM"):
                ask()
        return
    assert_peak(maps.ulam("g2r"), (seen / cover)[None])
    saved = i2am.AttributionMaps.load(maps.save(tmp_path / "maps.safetensors"))
    for point in ("eye", (3, 13), (15, 27)):
        y, x = (3, 13) if point == "eye" else point
        for one in (maps, saved):
            assert_peak(one.sram(point), (rows[y, x] / cover[y, x])[None])
    with pytest.raises(ValueError, match="each tile has a reference of its own"):
        maps.where_did_it_go((2, 2))


def test_two_calls_on_each_tile_are_no_reference_of_its_own(setting):
    unet, scheduler, context = setting
    scheduler.set_timesteps(2)
    with i2am.patch_unet(unet, reference=REFERENCE, scheduler=scheduler, guidance="none") as tracer, torch.no_grad():
        x = torch.randn(1, 4, 16, 28)
        for t in scheduler.timesteps:
            for left in (0, 12):
                for one in context.split(1):
                    with tracer.tile(0, left):
                        unet(x[..., left : left + 16], t, one)
            x = scheduler.step(x, t, x).prev_sample
    assert tracer.maps().ulam("g2r").shape == (1, 4, 4)


def test_a_place_is_a_row_and_a_column(setting):
    with i2am.patch_unet(setting[0], reference=REFERENCE) as tracer, pytest.raises(ValueError, match="row and column"):
        tracer.tile(-1, 0).__enter__()


def test_a_panorama_places_its_own_views():
    parts = pipelines._sd_parts(4, ("full",))
    pipe = pipelines.quiet(diffusers.StableDiffusionPanoramaPipeline(**parts))
    pipe.get_views = lambda height, width, **_: [(0, 16, 0, 16), (0, 16, 12, 28)]

    def go(**more):
        given = dict(height=32, width=56, num_inference_steps=2, output_type="latent", guidance_scale=1.0)
        pipe(
            "a", ip_adapter_image=pipelines.image((40, 40)), generator=torch.Generator().manual_seed(1), **given, **more
        )

    calls = capture(pipe.unet, go)
    finest = "up_blocks.2.attentions.0.transformer_blocks.0.attn2"
    left, right = (
        Truth([c for c in calls if c.evaluation % 2 == i], groups=[0] * 4, nth=1).ulam("r2g", names=[finest])
        for i in (0, 1)
    )
    want = torch.cat([left[..., :12], (left[..., 12:] + right[..., :4]) / 2, right[..., 4:]], dim=-1)
    with i2am.trace(pipe, time_groups=2) as tracer:
        go()
        maps = tracer.maps()
    assert_peak(maps.ulam("r2g", layers=finest), want)
    assert maps.counts()[finest] == [2, 2]  # two views in each of two steps
    assert maps.canvas == (32, 56)


def test_a_panorama_of_a_solver_of_order_2_is_refused():
    """It steps its scheduler for every view, so nothing tells the second evaluation from another view's."""
    parts = pipelines._sd_parts(4, ("full",)) | {"scheduler": diffusers.HeunDiscreteScheduler()}
    pipe = pipelines.quiet(diffusers.StableDiffusionPanoramaPipeline(**parts))
    pipe.get_views = lambda height, width, **_: [(0, 16, 0, 16), (0, 16, 12, 28)]
    given = dict(height=32, width=56, num_inference_steps=3, output_type="latent", guidance_scale=1.0)
    with i2am.trace(pipe), pytest.raises(ValueError, match="HeunDiscreteScheduler evaluates a step twice"):
        pipe("a", ip_adapter_image=pipelines.image((40, 40)), **given)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([(0, 16, 0, 16), (0, 16, 8, 24)], "2 views of the picture in one call: trace with view_batch_size=1"),
        ([(0, 16, 20, 36)], "goes round the edge of the picture"),
    ],
)
def test_views_that_have_no_place(views, message):
    from i2am.families.registry import facts_of

    facts = facts_of(type("StableDiffusionPanoramaPipeline", (), {"__module__": "diffusers"}))
    with pytest.raises(ValueError, match=message):
        facts.views({"batch_view": views, "latents": torch.zeros(1, 4, 16, 28)})
