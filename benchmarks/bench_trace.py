"""Model level: one step of a full-size UNet, untraced, traced, and traced in the authors' manner.

Weights are random (time does not depend on them), one image, float32 on CPU, half precision on a GPU. The SDXL-shaped
UNet and 1024 px need minutes and 12 GB: ``pytest benchmarks/bench_trace.py -m slow``.
"""

from functools import cache

import pytest
import torch
from compare import compare, show
from peers.hook import HookTracer

import i2am

DEVICE, DTYPE = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
CONTEXTS = {257: i2am.Reference(grid=(16, 16), skip=1), 3072: i2am.Reference(grid=(64, 48))}
slow = pytest.mark.slow
CASES = [
    ("SD 1.5", 512, 257),
    ("SD 1.5", 512, 3072),
    pytest.param("SD 1.5", 1024, 257, marks=slow),
    pytest.param("SDXL", 512, 257, marks=slow),
    pytest.param("SDXL", 1024, 257, marks=slow),
]


@cache
def unet(kind):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    if kind == "SD 1.5":
        config = {"cross_attention_dim": 768}
    else:
        config = {
            "cross_attention_dim": 2048,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
        }
    return UNet2DConditionModel(sample_size=64, **config).eval().to(DEVICE, DTYPE)


def verify(model, reference, inputs):
    """A wrong answer is not timed: the hook's maps and ours agree, layer by layer."""
    with HookTracer(model, keep=1) as hook:
        model(**inputs)
    with i2am.patch_unet(model, reference=reference, output="model") as tracer:
        model(**inputs)
    maps = tracer.maps()
    tolerance = 2e-5 if DTYPE.itemsize == 4 else 5e-3
    for layer in maps.recorded_layers:
        h, w = maps.grids()[layer]
        for direction, theirs in (("r2g", hook.r2g), ("g2r", hook.g2r)):
            ours = maps.ulam(direction, layers=layer)
            want = theirs[layer][0].mean(1).float().cpu()
            want = want.unflatten(1, (h, w)) if direction == "r2g" else want[:, -ours[0].numel() :].view_as(ours)
            assert (ours - want).abs().max() <= tolerance * want.abs().max(), (layer, direction)


@pytest.mark.parametrize(("kind", "pixels", "tokens"), CASES)
@torch.no_grad()
def test_unet_step(benchmark, capsys, kind, pixels, tokens):
    model, reference = unet(kind), CONTEXTS[tokens]
    width = model.config.cross_attention_dim
    inputs = {
        "sample": torch.randn(1, 4, pixels // 8, pixels // 8, device=DEVICE, dtype=DTYPE),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(1, tokens, width, device=DEVICE, dtype=DTYPE),
    }
    small = kind == "SD 1.5" and pixels == 512
    if small:
        verify(model, reference, inputs)
    around = {
        "i2am": lambda: i2am.patch_unet(model, reference=reference),
        "i2am, output=model": lambda: i2am.patch_unet(model, reference=reference, output="model"),
        "hook": lambda: HookTracer(model, keep=1),
    }
    calls = dict.fromkeys(("untraced", *around), lambda: model(**inputs))
    case = f"{kind}, {pixels} px, {tokens} reference tokens"
    found = compare(benchmark, "model", case, calls, around=around, rounds=5 if small else 1)
    show(capsys, case, found)


@torch.no_grad()
def test_fixed_cost_of_a_call(benchmark, capsys):
    """A UNet so small that hooks, checks and launches are what tracing costs: per attention call, in milliseconds."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = dict(block_out_channels=(32, 64), cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8)
    kinds = dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
    )
    model = UNet2DConditionModel(sample_size=8, layers_per_block=2, **config, **kinds).eval().to(DEVICE, DTYPE)
    inputs = (torch.randn(1, 4, 8, 8, device=DEVICE, dtype=DTYPE), 500)
    context = torch.randn(1, 17, 24, device=DEVICE, dtype=DTYPE)
    around = {"i2am": lambda: i2am.patch_unet(model, reference=i2am.Reference(grid=(4, 4), skip=1))}

    def ten():
        for _ in range(10):
            model(*inputs, context)

    calls = {"untraced": ten, "i2am": ten}
    found = compare(benchmark, "fixed", "tiny UNet, 17 reference tokens", calls, around=around, rounds=9)
    with i2am.patch_unet(model, reference=i2am.Reference(grid=(4, 4), skip=1)) as tracer:
        model(*inputs, context)
    number = 10 * len(tracer.maps().recorded_layers)
    cost = (found["i2am"]["seconds"] - found["untraced"]["seconds"]) / number * 1e3
    benchmark.extra_info["milliseconds a call"] = cost
    show(capsys, f"tiny UNet: {cost:.2f} ms a traced attention call", found)
