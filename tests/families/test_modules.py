"""Attention modules of the paper's own code bases: projections, two branches, pixel attention, xformers."""

import functools
from dataclasses import replace

import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import compvis as networks
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import PerLayerGrid, capture_calls, generated
from tests.helpers.truth import Captured, Truth, assert_peak

SAME = i2am.Reference(grid="queries", name="garment")
SPATIAL = "warp_zero_crossattn_blks.*.attn2"
GRIDS = {2: (3, 3), 1: (6, 5), 0: (12, 9)}  # 4:3 latents, halved upwards


def inputs(batch=2):
    g = torch.Generator().manual_seed(3)
    return dict(
        latents=torch.randn(batch, 4, 12, 9, generator=g),
        agnostic=torch.randn(batch, 5, 12, 9, generator=g),
        garment=torch.randn(batch, 4, 12, 9, generator=g),
        text=torch.randn(2 * batch, 5, 12, generator=g),
        scheduler=pipelines.ddim(),
    )


def seen(model, run, pattern="warp_zero", batch=4, attention="attn2"):
    """What the modules compared while ``run()``: the truth's calls, in order."""
    modules = {n: m for n, m in model.model.named_modules() if pattern in n and n.endswith(attention)}
    calls = []
    for module in modules.values():
        module.seen = []
    run()
    for name, module in modules.items():
        level = int(name.split(".")[1])
        for evaluation, (q, k, blocked) in enumerate(module.seen):
            q, k = (x.unflatten(0, (batch, -1)) for x in (q, k))
            mask = None
            if blocked is not None:
                mask = torch.zeros(blocked[:, None].shape).masked_fill(blocked[:, None], float("-inf"))
            calls.append(Captured(evaluation, name, 0, GRIDS[level], q, k, mask))
        module.seen = None
    return sorted(calls, key=lambda c: (c.evaluation, -int(c.layer.split(".")[1])))


check = functools.partial(support.check, directions=("r2g", "g2r"))


def hooks(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    return {(n, h): len(getattr(m, h)) for n, m in model.named_modules() for h in names}


@pytest.mark.parametrize("clock", ["num_steps", "scheduler"])
@support.family(
    "CompVis-style attention, two branches (StableVITON's shape)",
    "`i2am.patch_modules`",
    "a second branch's features at every resolution",
)
def test_try_on_with_einsum_attention(clock):
    model, given = networks.TryOnModel(), inputs()
    want, before = model.sample(**given), hooks(model)
    truth = PerLayerGrid(seen(model, lambda: model.sample(**given)), samples=slice(2, 4), groups=[0, 0, 1, 1])
    steps = {"num_steps": 4} if clock == "num_steps" else {"scheduler": given["scheduler"]}
    with i2am.patch_modules(model.model, where=SPATIAL, reference=SAME, time_groups=2, **steps) as tracer:
        assert model.sample(**given).equal(want)
    assert hooks(model) == before
    assert model.sample(**given).equal(want)
    maps = tracer.maps()
    assert maps.references == ["garment"]
    assert maps.layers == [f"warp_zero_crossattn_blks.{i}.attn2" for i in (2, 1, 0)]
    assert list(maps.grids().values()) == list(GRIDS.values())
    assert maps.ulam("r2g").shape == maps.ulam("g2r").shape == (2, 12, 9)
    check(maps, truth, 2)
    with pytest.raises(ValueError, match="all the keys"):
        maps.ulam("mass")


def test_all_cross_attentions_when_none_are_named():
    """Self-attention is left out; a function says what the keys of each are."""
    model, given = networks.TryOnModel(), inputs(batch=1)

    def describe(layer, keys, grid):
        return i2am.Reference(name="text") if layer.startswith("texts") else i2am.Reference(grid=grid, name="garment")

    with i2am.patch_modules(model.model, reference=describe, num_steps=4) as tracer:
        model.sample(**given)
    maps = tracer.maps()
    assert maps.references == ["text", "garment"]
    assert all(name.endswith("attn2") for name in maps.recorded_layers)
    assert len(maps.recorded_layers) == 6
    assert maps.ulam("r2g", reference="text").shape == (1, 12, 9)


def test_masks():
    model, given = networks.TryOnModel(), inputs(batch=1)
    keep = torch.rand(2, 12, 9) > 0.3
    others = [model.model.warp_zero_crossattn_blks[i] for i in (1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        for block in others:  # the mask has the size of the finest level alone
            own = type(block).forward
            patch.setattr(block, "forward", lambda x, c, mask=None, block=block, own=own: own(block, x, c))
        calls = [c for c in seen(model, lambda: model.sample(**given, mask=keep), batch=2) if ".0." in c.layer]
        with i2am.patch_modules(
            model.model, where="warp*.0.attn2", reference=SAME, num_steps=4, time_groups=2
        ) as tracer:
            model.sample(**given, mask=keep)
    kept = keep[1].flatten()
    short = [replace(c, k=c.k[:, :, kept], mask=None) for c in calls]  # as if the masked keys were not there
    truth = Truth(short, samples=slice(1, 2), groups=[0, 0, 1, 1], reference_grid=(1, int(kept.sum())))
    maps = tracer.maps()
    assert_peak(maps.tlam("r2g"), truth.tlam("r2g", 2) * kept.float().mean())
    g2r = maps.tlam("g2r").flatten(2)
    assert_peak(g2r[..., kept], truth.tlam("g2r", 2).flatten(2))
    assert not g2r[..., ~kept].any()


def test_masks_of_their_own_are_asked_for():
    """StableVITON blocks pairs by the product of two spatial masks."""
    model = networks.TryOnModel()
    person, cloth = torch.rand(2, 12, 9) > 0.6, torch.rand(2, 12, 9) > 0.6
    block = model.model.warp_zero_crossattn_blks[0]
    x = torch.randn(2, 16, 12, 9)
    context = torch.randn(2, 108, 16)

    @torch.no_grad()
    def run():
        block(x, context, mask1=person, mask2=cloth)

    def blocked(module, arguments):
        return ~(arguments["mask1"].flatten(1)[:, None, :, None] * arguments["mask2"].flatten(1)[:, None, None])

    common = dict(where="attn2", reference=SAME, inputs=lambda args, kwargs: (args[0], 0.0), guidance="none")
    with i2am.patch_modules(block, **common), pytest.raises(ValueError, match="ran with mask1, mask2"):
        run()
    with i2am.patch_modules(block, mask=blocked, time_groups=1, **common) as tracer:
        run()
    block.attn2.seen = []
    run()
    ((q, k, mask),) = block.attn2.seen
    mask = torch.zeros(mask[:, None].shape).masked_fill(mask[:, None], float("-inf"))
    call = Captured(0, "attn2", 0, (12, 9), q.unflatten(0, (2, 4)), k.unflatten(0, (2, 4)), mask)
    check(tracer.maps(), Truth([call], groups=[0], reference_grid=(12, 9)), 1)


@support.family(
    "CompVis-style attention, two branches (StableVITON's shape)",
    "`i2am.patch_modules`",
    "a second branch's features at every resolution",
)
@pytest.mark.parametrize("learned", [False, True])
def test_a_scale_of_the_modules_own(learned):
    model, given = networks.TryOnModel(), inputs(batch=1)
    for block in model.model.warp_zero_crossattn_blks:
        block.attn2.scale = torch.nn.Parameter(torch.tensor(2.0)) if learned else 2.0
    calls = seen(model, lambda: model.sample(**given), batch=2)
    for c in calls:
        c.q *= 2.0 * c.q.shape[-1] ** 0.5  # the truth divides by √d
    truth = PerLayerGrid(calls, samples=slice(1, 2), groups=[0, 0, 1, 1])
    with i2am.patch_modules(model.model, where=SPATIAL, reference=SAME, num_steps=4, time_groups=2) as tracer:
        model.sample(**given)
    check(tracer.maps(), truth, 2)


def test_a_scale_that_is_no_number_is_refused():
    model, given = networks.TryOnModel(), inputs(batch=1)
    model.model.warp_zero_crossattn_blks[1].attn2.scale = torch.full((8, 1, 1), 2.0)
    with i2am.patch_modules(model.model, where=SPATIAL, reference=SAME, num_steps=4):
        with pytest.raises(ValueError, match=r"scales its logits by torch\.Size\(\[8, 1, 1\]\), .* one number"):
            model.sample(**given)


def test_patches_can_be_asked():
    model, given = networks.TryOnModel(), inputs(batch=1)
    regions = {"sleeve": (5, 4)}
    with i2am.patch_modules(
        model.model, where=SPATIAL, reference=SAME, num_steps=4, record="qk", sram=regions
    ) as tracer:
        model.sample(**given)
    maps = tracer.maps()
    assert maps.canvas == (12, 9)
    assert_peak(maps.sram((5, 4)), maps.sram("sleeve").double())
    calls = [c for c in seen(model, lambda: model.sample(**given), batch=2) if ".0." in c.layer]
    rows = [(c.q[1:].double() @ c.k[1:].double().mT / 8**0.5).softmax(-1)[:, :, 5 * 9 + 4] for c in calls]
    truth = torch.stack(rows).mean((0, 2)).reshape(1, 12, 9)
    assert_peak(maps.sram((5, 4), layers="*.0.attn2"), truth)
    assert maps.match(layers="*.0.attn2").expected.shape == (1, 12, 9, 2)


def test_modules_that_change_their_projections_are_blind():
    model, given = networks.TryOnModel(), inputs(batch=1)
    model.model.warp_zero_crossattn_blks[1].attn2.norm_q = torch.nn.LayerNorm(8)
    with i2am.patch_modules(model.model, where=SPATIAL, reference=SAME, num_steps=4):
        with pytest.raises(i2am.BlindLayerError, match=r"warp_zero_crossattn_blks\.1\.attn2"):
            model.sample(**given)


class SplitContext(torch.nn.Module):
    """A processor that takes the last tokens of its context for a picture's, as the authors' IP-Adapter does."""

    def __init__(self, attn, tokens):
        super().__init__()
        self.tokens = tokens
        self.to_k_ip, self.to_v_ip = (torch.nn.Linear(attn.to_k.in_features, attn.inner_dim) for _ in range(2))

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        split = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        text, picture = encoder_hidden_states.tensor_split([-self.tokens], dim=1)
        q = split(attn.to_q(hidden_states))
        pairs = ((attn.to_k(text), attn.to_v(text)), (self.to_k_ip(picture), self.to_v_ip(picture)))
        out = sum((q @ split(k).mT * attn.scale).softmax(-1) @ split(v) for k, v in pairs)  # no function is called
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def test_a_processor_that_splits_its_context_and_has_projections_of_its_own():
    unet = pipelines.unet()
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(SplitContext(module, 12))
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 19, pipelines.CONTEXT)
    given = dict(reference=i2am.Reference(grid=(3, 4)), where="*attn2", num_steps=1, time_groups=1)
    with i2am.patch_modules(unet, **given), torch.no_grad():
        with pytest.raises(ValueError, match=r'splits its context.*projections=\("to_q", "processor.to_k_ip"\)'):
            unet(x, 5, context)
    layer, kept = "mid_block.attentions.0.transformer_blocks.0.attn2", {}
    attention = unet.get_submodule(layer)
    parts = {"q": attention.to_q, "k": attention.processor.to_k_ip}
    handles = [m.register_forward_hook(lambda *a, name=name: kept.update({name: a[2]})) for name, m in parts.items()]
    with torch.no_grad():
        unet(x, 5, context)
    [h.remove() for h in handles]
    q, k = (kept[n].double().unflatten(-1, (attention.heads, -1)).transpose(1, 2) for n in "qk")
    logits = q @ k.mT / q.shape[-1] ** 0.5
    with i2am.patch_modules(unet, projections=("to_q", "processor.to_k_ip"), **given) as tracer, torch.no_grad():
        unet(x, 5, context)
    maps = tracer.maps()
    assert_peak(maps.ulam("g2r", layers=layer), logits.softmax(-1).mean((1, 2)).unflatten(-1, (3, 4)))
    assert_peak(maps.ulam("r2g", layers=layer).flatten(1), logits.softmax(-2).mean((1, 3)))


def test_an_exception_inside_leaves_nothing():
    model, given = networks.TryOnModel(), inputs(batch=1)
    before = hooks(model)

    def fail(*_):
        raise RuntimeError("stop")

    handle = model.model.warp_zero_crossattn_blks[1].attn2.to_out.register_forward_hook(fail)
    with i2am.patch_modules(model.model, where=SPATIAL, reference=SAME, num_steps=4, guidance=1) as tracer:
        with pytest.raises(RuntimeError, match="stop"):
            model.sample(**given)
        handle.remove()
    assert hooks(model) == before
    assert tracer.maps().recorded_layers == ["warp_zero_crossattn_blks.2.attn2"]  # the one that ended


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"where": "nowhere"}, "selects no layer; there are: texts.0.attn1"),
        ({"projections": ("q_proj", "k_proj")}, "no attention module with q_proj, k_proj"),
        ({"reference": None}, "takes i2am.Reference, several, or a function"),
        ({"reference": i2am.Concatenated()}, "takes i2am.Reference, several, or a function"),
        ({"num_steps": 4, "scheduler": pipelines.ddim()}, "not both"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_a_refused_patch_changes_nothing(arguments, message):
    model = networks.TryOnModel()
    before = hooks(model)
    with pytest.raises(ValueError, match=message):
        i2am.patch_modules(model.model, **({"reference": SAME} | arguments))
    assert hooks(model) == before
    i2am.patch_modules(model.model, reference=SAME).unpatch()


def test_references_that_do_not_fit_and_unknown_grids():
    model, given = networks.TryOnModel(), inputs(batch=1)
    with i2am.patch_modules(model.model, where=SPATIAL, reference=i2am.Reference(grid=(2, 2)), num_steps=4):
        with pytest.raises(ValueError, match="makes 4 tokens, but 9 of the 9 keys"):
            model.sample(**given)
    attention = networks.Attention(16, 12)
    outer = torch.nn.Sequential(attention)
    outer.forward = lambda *args: attention(*args)
    common = dict(reference=i2am.Reference(), inputs=lambda args, kwargs: (args[0], 0.0))
    with i2am.patch_modules(outer, **common), pytest.raises(ValueError, match=r"10 tokens \(none seen.*pass grid="):
        outer(torch.randn(1, 10, 16), torch.randn(1, 7, 12))
    with i2am.patch_modules(outer, grid=lambda layer, tokens: (5, tokens // 5), **common) as tracer:
        outer(torch.randn(1, 10, 16), torch.randn(1, 7, 12))
    assert tracer.maps().ulam("r2g").shape == (1, 5, 2)


class TokenModel(torch.nn.Module):
    """Halves its feature map where no module is given it as such: attention sees tokens alone."""

    def __init__(self):
        super().__init__()
        self.attn = networks.Attention(4, 12)

    def forward(self, x, t, context):
        small = torch.nn.functional.avg_pool2d(x, 2, ceil_mode=True)
        return self.attn(small.flatten(2).transpose(1, 2), context)


@pytest.mark.parametrize(("size", "grid"), [((12, 9), (6, 5)), ((13, 7), (7, 4))])
def test_grids_by_halving_the_latents(size, grid):
    """The one feature map around the attention is the latents'; odd sizes round up."""
    model = TokenModel()
    with i2am.patch_modules(model, reference=i2am.Reference(grid=(2, 3)), num_steps=1) as tracer, torch.no_grad():
        model(torch.randn(1, 4, *size), 500, torch.randn(1, 6, 12))
    assert tracer.maps().grids() == {"attn": grid}


class Lying(torch.nn.Module):
    """Its attention works on a feature map as large as the latents, but turned."""

    def __init__(self):
        super().__init__()
        self.block = networks.Spatial(4, 12)

    def forward(self, x, t, context):
        return self.block(x.mT, context)


def test_the_feature_map_next_to_the_attention_tells_its_grid():
    model = Lying()
    with i2am.patch_modules(model, reference=i2am.Reference(grid=(2, 3)), num_steps=1) as tracer, torch.no_grad():
        model(torch.randn(1, 4, 12, 9), 500, torch.randn(1, 6, 12))
    assert tracer.maps().grids() == {"block.attn2": (9, 12)}


@support.family("the same through xformers", "`i2am.patch_modules`", "a second branch's features at every resolution")
def test_try_on_through_xformers(monkeypatch):
    networks.install(networks.stand_in_for_xformers(), monkeypatch)
    import xformers.ops

    own = xformers.ops.memory_efficient_attention
    model, given = networks.TryOnModel(networks.EfficientAttention), inputs()
    want = model.sample(**given)
    truth = PerLayerGrid(seen(model, lambda: model.sample(**given)), samples=slice(2, 4), groups=[0, 0, 1, 1])
    with i2am.patch_modules(model.model, where=SPATIAL, reference=SAME, num_steps=4, time_groups=2) as tracer:
        assert model.sample(**given).equal(want)
    check(tracer.maps(), truth, 2)
    assert xformers.ops.memory_efficient_attention is own


# ------------------------------------------------------------------------------------------------- pixel attention


def upscale(model, scheduler, batch=1, size=(10, 6)):
    g = torch.Generator().manual_seed(5)
    latents = torch.randn(batch, 4, *size, generator=g)
    low, text = torch.randn(batch, 3, *size, generator=g), torch.randn(batch, 5, 8, generator=g)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            latents = scheduler.step(model(latents, t, text, low), t, latents).prev_sample
    return latents


@support.family(
    "pixel-aware cross-attention (PASD's shape)", "`i2am.patch_modules`", "features of the low-resolution image"
)
def test_pixel_aware_super_resolution():
    model, scheduler = networks.PixelAwareUpscaler().eval(), pipelines.ddim()
    want = upscale(model, scheduler)
    calls = capture_calls(model, lambda: upscale(model, scheduler), ("attn2",))
    pixel = [c for c in calls if c.layer.startswith("pixel")]
    grid = {"0": (10, 6), "1": (5, 3)}
    truth = PerLayerGrid(generated(pixel, lambda c: grid[c.layer.split(".")[1]]), groups=[0, 0, 1, 1])
    with i2am.patch_modules(
        model,
        where="pixel_attentions.*.attn2",
        reference=i2am.Reference(grid="queries", name="low resolution"),
        scheduler=scheduler,
        time_groups=2,
    ) as tracer:
        assert upscale(model, scheduler).equal(want)
    maps = tracer.maps()
    assert len(maps.layers) == 2
    assert maps.ulam("g2r").shape == (1, 10, 6)
    check(maps, truth, 2)
    assert upscale(model, scheduler).equal(want)
