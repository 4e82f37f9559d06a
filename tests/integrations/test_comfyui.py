"""The ComfyUI nodes, on a stand-in of what ComfyUI promises: maps against a recomputation, images untouched.

With ``I2AM_COMFYUI=/path/to/ComfyUI`` ComfyUI's own Flux, Qwen-Image and UNet take the place of the stand-ins.
"""

import functools
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import comfyui
from tests.helpers.truth import Captured, Truth, assert_peak

FOLDER = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"
REAL = os.environ.get("I2AM_COMFYUI")
TEXT, HEADS, STEPS = comfyui.TEXT, comfyui.HEADS, comfyui.STEPS


@pytest.fixture(scope="module")
def pack():
    """The package as ComfyUI imports a folder of custom_nodes."""
    spec = importlib.util.spec_from_file_location("i2am_nodes", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["i2am_nodes"] = module
    spec.loader.exec_module(module)
    yield module
    for name in [n for n in sys.modules if n.startswith("i2am_nodes")]:
        del sys.modules[name]


def node(pack, name):
    return pack.NODE_CLASS_MAPPINGS[name]()


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def record(patcher):
    """Record the joint calls of a run, by an override that was there before."""
    calls = []

    def override(function, q, k, v, heads, *args, **kwargs):
        options = kwargs["transformer_options"]
        kept = [
            x.clone() if kwargs.get("skip_reshape") else x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k)
        ]
        if "scale" in kwargs:
            kept[0] = kept[0] * (kwargs["scale"] * kept[0].shape[-1] ** 0.5)
        mask = args[0] if args else kwargs.get("mask")
        layer = f"{options['block_type']}_blocks.{options['block_index']}"
        calls.append((layer, options["cond_or_uncond"], *kept, mask))
        return function(q, k, v, heads, *args, **kwargs)

    patcher.model_options["transformer_options"]["optimized_attention_override"] = override
    return calls


def real(kind):
    """A tiny model of ComfyUI's own code; skips without."""
    if not REAL:
        pytest.skip("I2AM_COMFYUI names no folder of ComfyUI")
    if REAL not in sys.path:
        sys.path.insert(0, REAL)
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.ops

    torch.manual_seed(0)
    given = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    if kind == "flux":
        from comfy.ldm.flux.model import Flux

        model = Flux(
            in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=32, hidden_size=32, mlp_ratio=2.0, num_heads=2,
            depth=2, depth_single_blocks=1, axes_dim=[4, 6, 6], theta=10_000, patch_size=2, qkv_bias=True,
            guidance_embed=False, txt_ids_dims=[], **given,
        )  # fmt: skip
    elif kind == "qwen":
        from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

        model = QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6), **given,
        )  # fmt: skip
    else:
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        model = UNetModel(
            image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, channel_mult=(1, 2),
            num_heads=2, use_spatial_transformer=True, transformer_depth=[1, 1], context_dim=32,
            transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=1, **given,
        )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.05)
    return model.eval()


JOINT = [
    pytest.param("stand-in", False, id="together"),
    pytest.param("stand-in", True, id="calls apart"),
    pytest.param("scaled", False, id="a scale of its own"),
    pytest.param("flux", False, id="ComfyUI's Flux"),
    pytest.param("qwen", False, id="ComfyUI's Qwen-Image"),
]


@pytest.mark.parametrize(("kind", "apart"), JOINT)
def test_reference_latents_in_context(pack, kind, apart):
    """Two references; the truth is recomputed from the calls that an earlier override saw."""
    own = {"stand-in": {}, "scaled": {"scale": 0.3}}
    model = comfyui.Flux(**own[kind]) if kind in own else real(kind)
    base = comfyui.Patcher(model)
    calls = record(base)
    x, references = rand(2, 4, 12, 8), [rand(2, 4, 4, 8, seed=1), rand(2, 4, 6, 4, seed=2)]
    if kind == "qwen":
        x, references = x.unsqueeze(2), [r.unsqueeze(2) for r in references]
    run = dict(positive=rand(1, TEXT, 32, seed=3), negative=rand(1, TEXT, 32, seed=4), ref_latents=references)
    plain = comfyui.sample(base, x, apart=apart, **run)
    seen = list(calls)
    model_out, trace = node(pack, "I2AMTrace").trace(base, 0, True)
    assert comfyui.sample(model_out.clone(), x, apart=apart, **run).equal(plain)  # also through later clones
    maps = trace.maps()
    assert maps.references == ["reference_0", "reference_1"]
    assert maps.time_groups == STEPS
    assert maps.one_group_a_step
    assert len(maps.layers) == len({layer for layer, *_ in seen})
    counted = [c for c in seen if 0 in c[1]]
    captured = []
    per_step = len(maps.layers)
    for number, (layer, parts, q, k, mask) in enumerate(counted):
        half = len(q) // len(parts)
        own = slice(parts.index(0) * half, (parts.index(0) + 1) * half)
        captured.append(Captured(number // per_step, layer, 0, (6, 4), q[own, :, TEXT : TEXT + 24], k[own], None))
        assert mask is None
    at = TEXT + 24
    for name, grid in (("reference_0", (2, 4)), ("reference_1", (3, 2))):
        keys = slice(at, at := at + grid[0] * grid[1])
        truth = Truth(captured, groups=list(range(STEPS)), keys=keys, reference_grid=grid)
        for direction in ("r2g", "g2r", "mass"):
            assert_peak(maps.tlam(direction, reference=name), truth.tlam(direction, STEPS))
            assert_peak(maps.llam(direction, reference=name), truth.llam(direction))
    assert maps.sram((3, 2), reference="reference_0").shape == (2, 2, 4)


def adapted(pack, monkeypatch, model, blocks, adapters=1, **changes):
    module, log = comfyui.adapter_module(monkeypatch), []
    base = comfyui.Patcher(model)
    patches = {}
    for block in blocks:
        wide = not isinstance(model, comfyui.UNetModel) and block in WIDE
        width = 64 if wide else 32
        cond, uncond = rand(1, 257, width, seed=5), torch.zeros(1, 257, width)
        patches[block] = module.Attn2Replace(module.ipadapter_attention, cond=cond, uncond=uncond, log=log)
        for i in range(1, adapters):
            given = {"cond": rand(1, 4, width, seed=5 + i), "uncond": torch.zeros(1, 4, width), "log": log} | changes
            patches[block].add(module.ipadapter_attention, **given)
    base.model_options["transformer_options"]["patches_replace"] = {"attn2": patches}
    return base, log, module


WIDE = [("input", 4), ("middle", 0), ("output", 0), ("output", 1)]
UNETS = [pytest.param("stand-in", id="stand-in"), pytest.param("unet", id="ComfyUI's UNet")]


@pytest.mark.parametrize("kind", UNETS)
def test_ip_adapters(pack, monkeypatch, kind):
    model = comfyui.UNetModel() if kind == "stand-in" else real(kind)
    blocks = [("input", 1), ("middle", 0), ("output", 3)]
    grids = {"input": (12, 8), "middle": (6, 4), "output": (12, 8)}
    base, log, module = adapted(pack, monkeypatch, model, blocks, adapters=2)
    before = module.optimized_attention
    x, run = rand(2, 4, 12, 8), dict(positive=rand(1, TEXT, 32, seed=3), negative=rand(1, TEXT, 32, seed=4))
    plain, seen = comfyui.sample(base, x, **run), list(log)
    model_out, trace = node(pack, "I2AMTrace").trace(base, 1, False)
    assert comfyui.sample(model_out, x, **run).equal(plain)
    assert module.optimized_attention is before
    maps = trace.maps()
    assert maps.references == ["ip_adapter_0", "ip_adapter_1"]
    assert maps.recorded_layers == ["input_blocks.1.0.attn2", "middle_blocks.0.0.attn2", "output_blocks.3.0.attn2"]
    assert maps.layers == [maps.recorded_layers[0], maps.recorded_layers[2]]
    for adapter in (0, 1):
        captured = []
        for number, (block, parts, q, k) in enumerate(seen):
            if number % 2 == adapter and block[0] != "middle":
                own = slice(parts.index(0) * 2, parts.index(0) * 2 + 2)
                q, k = (y[own].unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k))
                captured.append(Captured(number // 6, str(block), 0, grids[block[0]], q, k, None))
        truth = Truth(captured, groups=[0] * STEPS, reference_grid=(16, 16), skip=1)
        assert_peak(maps.ulam("r2g", reference=f"ip_adapter_{adapter}"), truth.ulam("r2g"))
        if adapter == 0:
            assert_peak(maps.ulam("g2r", reference="ip_adapter_0"), truth.ulam("g2r"))


@pytest.fixture
def traced(pack):
    base = comfyui.Patcher(comfyui.Flux())
    model, trace = node(pack, "I2AMTrace").trace(base, 5, False)
    run = dict(positive=rand(1, TEXT, 32, seed=3), negative=rand(1, TEXT, 32, seed=4), ref_latents=[rand(1, 4, 4, 8)])
    return model, trace, run


def test_a_new_run_starts_new_sums(traced):
    model, trace, run = traced
    comfyui.sample(model, rand(1, 4, 12, 8), **run)
    first = trace.maps().ulam("r2g")
    comfyui.sample(model, rand(1, 4, 8, 8, seed=9), **run)  # of another size
    assert trace.maps().ulam("r2g").shape == (1, 4, 4)
    assert sum(trace.maps().counts()["double_blocks.0"]) == STEPS
    comfyui.sample(model, rand(1, 4, 12, 8), **run)
    assert trace.maps().ulam("r2g").equal(first)
    for _ in range(2):
        comfyui.sample(model, rand(1, 4, 12, 8), steps=1, **run)
        assert sum(trace.maps().counts()["double_blocks.0"]) == 1


def test_nodes_draw(pack, traced, tmp_path, monkeypatch):
    model, trace, run = traced
    draw = node(pack, "I2AMMaps").maps
    image, reference = torch.rand(1, 96, 64, 3), torch.rand(1, 32, 64, 3)
    with pytest.raises(ValueError, match="saw no sampling"):
        draw(trace, image, "mass", "unified", 0.6)
    comfyui.sample(model, rand(1, 4, 12, 8), **run)
    monkeypatch.chdir(tmp_path)
    overlays, masks, report = draw(trace, image, "influence on the image (R2G)", "unified", 0.6, "", True, reference)
    assert overlays.shape == (1, 96, 64, 3)
    assert masks.shape == (1, 96, 64)
    assert (masks.min(), masks.max()) == (0, 1)
    best = divmod(int(trace.maps().ulam("r2g")[0].argmax()), 4)
    assert tuple(n // 16 for n in divmod(int(masks[0].argmax()), 64)) == best
    assert Path(report).stat().st_size > 10_000
    overlays, *_ = draw(trace, image, "parts of the reference (G2R)", "over time", 0.6, "", False, reference)
    assert overlays.shape == (STEPS, 32, 64, 3)  # two of the five groups hold no step
    with pytest.raises(ValueError, match="connect the reference image"):
        draw(trace, image, "parts of the reference (G2R)", "unified", 0.6)
    for kind in pack.NODE_CLASS_MAPPINGS.values():
        assert set(kind.INPUT_TYPES()) <= {"required", "optional"}
        assert callable(getattr(kind, kind.FUNCTION))
        assert len(kind.RETURN_TYPES) == len(kind.RETURN_NAMES)


def test_what_can_not_be_known_is_refused(pack, traced, monkeypatch):
    model, _, run = traced
    x = rand(1, 4, 12, 8)
    with pytest.raises(ValueError, match="the positive conditioning has no reference latents"):
        comfyui.sample(model, x, run["positive"], run["negative"])
    monkeypatch.setattr(model.model, "_forward", _adds_tokens(model.model._forward))
    with pytest.raises(ValueError, match="another node adds tokens"):
        comfyui.sample(model, x, **run)
    monkeypatch.undo()

    class Chroma(comfyui.Flux):
        pass

    unknown, _ = node(pack, "I2AMTrace").trace(comfyui.Patcher(Chroma()), 5, False)
    with pytest.raises(ValueError, match="does not know where a Chroma keeps its reference"):
        comfyui.sample(unknown, x, **run)
    bare, _ = node(pack, "I2AMTrace").trace(comfyui.Patcher(comfyui.UNetModel()), 5, False)
    with pytest.raises(ValueError, match="no IPAdapter is applied"):
        comfyui.sample(bare, x, run["positive"], run["negative"])
    base, _, module = adapted(pack, monkeypatch, comfyui.UNetModel(), [("input", 1)], adapters=2, weight=0)
    some, _ = node(pack, "I2AMTrace").trace(base, 5, False)
    before = module.optimized_attention
    with pytest.raises(ValueError, match=r"input_blocks\.1\.0\.attn2: 1 of 2 IPAdapters ran"):
        comfyui.sample(some, x, run["positive"], run["negative"])
    assert module.optimized_attention is before
    grouped, trace = node(pack, "I2AMTrace").trace(comfyui.Patcher(comfyui.Flux(enable_gqa=True)), 5, False)
    with pytest.raises(ValueError, match="several heads share their keys"):
        comfyui.sample(grouped, x, **run)
    grouped.model_options["transformer_options"]["multigpu_thread_device"] = torch.device("cpu")
    with pytest.raises(ValueError, match="several GPUs at once"):
        comfyui.sample(grouped, x, **run)
    trace._joint = True
    with pytest.raises(ValueError, match="does not say which block is running"):  # before late 2025
        trace.joint_call(x, x, 1, None, {})


def _adds_tokens(forward):
    @functools.wraps(forward)
    def longer(x, timestep, context, *args, **kwargs):
        return forward(x, timestep, torch.cat([context, context[:, :1]], 1), *args, **kwargs)

    return longer


def test_positive_conditionings(pack):
    conditional = sys.modules["i2am_nodes.trace"].conditional
    step_of = sys.modules["i2am_nodes.trace"].step_of
    assert conditional({"cond_or_uncond": [1, 0]}) == (1, 2)
    assert conditional({"cond_or_uncond": [1]}) is None
    with pytest.raises(ValueError, match="2 positive conditionings in one batch"):
        conditional({"cond_or_uncond": [0, 0, 1]})
    with pytest.raises(ValueError, match="no cond_or_uncond"):
        conditional({})
    schedule = torch.tensor([14.6, 7.0, 2.0, 0.0])
    steps = [step_of({"sigmas": torch.tensor([s]), "sample_sigmas": schedule}) for s in (14.6, 9.0, 7.0, 2.0, 0.5)]
    assert steps == [0, 0, 1, 2, 2]  # a solver may stand between two
