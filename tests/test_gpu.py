"""On hardware: what the interpreter and ahead-of-time compilation vouch for, seen to hold. Skipped without a GPU."""

import pytest
import torch
from torch.nn import functional as F

import i2am
from i2am.ops import Sums, accumulate

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the output's peak
STATISTICS = 2e-5  # of the map's peak: float32 whatever the inputs are


def qkv(Nq, Nk, d=64, B=2, H=3, dtype=torch.float16):
    """Transposed views, as a model passes them."""
    return tuple(torch.randn(B, n, H, d, device="cuda").to(dtype).transpose(1, 2) for n in (Nq, Nk, Nk))


def check(q, k, v, **arguments):
    got = i2am.attention(q, k, v, backend="triton", **arguments)
    want = i2am.attention(q, k, v, backend="reference", **arguments)
    for name, x, y in zip(got._fields, got, want, strict=True):
        if y is None:
            continue
        tolerance = TOLERANCE[q.dtype] if name == "out" else STATISTICS
        assert torch.equal(x.isneginf(), y.isneginf()), name
        x, y = (z.double().masked_fill(z.isneginf(), 0.0) for z in (x, y))
        scale = y.abs().max().clamp(min=1.0 if name.endswith("lse") else 1e-30)
        assert (x - y).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("d", [40, 64, 80, 128, 160, 256])
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 1), (65, 3), (257, 49), (1025, 77), (1025, 257), (257, 1025), (4096, 4096)])
def test_against_the_definitions(Nq, Nk, d, dtype):
    q, k, v = qkv(Nq, Nk, d, B=1, H=2, dtype=dtype)
    check(q, k, v)
    if Nk > 3:
        check(q, k, v, queries=slice(1, None), keys=slice(2, Nk - 1))


@pytest.mark.parametrize("kind", ["bool", "additive", "padding"])
def test_masks(kind):
    mask = {
        "bool": torch.rand(130, 257, device="cuda") < 0.7,
        "additive": torch.randn(2, 1, 130, 257, device="cuda", dtype=torch.float16),
        "padding": (torch.arange(257, device="cuda") < 200)[None, None, None],
    }[kind]
    check(*qkv(130, 257), attn_mask=mask, keys=slice(5, 250))


@pytest.mark.parametrize("reach", [80.0, 1e4])
def test_logits_of_any_size(reach):
    q, k, v = qkv(257, 300, dtype=torch.float32)
    q *= reach / (q @ k.transpose(-1, -2)).abs().max()
    got = i2am.attention(q, k, v, scale=1.0, backend="triton")
    want = i2am.attention(q, k, v, scale=1.0, backend="reference")
    assert (got.r2g - want.r2g).abs().max() <= (1e-4 + 4e-7 * reach) * want.r2g.max()


@pytest.mark.parametrize("R", [1, 17, 64])
def test_regions_and_several_references(R):
    q, k, v = qkv(1025, 300)
    regions = torch.rand(1, R, 1025, device="cuda").softmax(-1)
    keys = [slice(0, 100), slice(100, 300)]

    def run(backend):
        shapes = [((2, 3, 1025), (2, 3, K), (2, 3, 1025), (2, 3, R, K)) for K in (100, 200)]
        sums = [Sums(*(torch.zeros(shape, device="cuda") for shape in each)) for each in shapes]
        accumulate(q, k, v, sums=sums, keys=keys, regions=regions, backend=backend)
        return [x for each in sums for x in each]

    for x, y in zip(run("triton"), run("reference"), strict=True):
        assert (x - y).abs().max() <= 2e-4 * y.abs().max()  # regions multiply on tensor cores, in three tf32 parts


def test_bit_for_bit():
    """Whatever order the programs ran in."""
    q, k, v = qkv(4096, 4096)
    first = i2am.attention(q, k, v)
    for _ in range(5):
        again = i2am.attention(q, k, v)
        assert all(x is None or torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_no_attention_tensor():
    """At 16,384 × 16,384 a head's scores alone are 1 GiB in float32."""
    q, k, v = qkv(16384, 16384, B=1, H=1)
    i2am.attention(q, k, v)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    i2am.attention(q, k, v)
    assert torch.cuda.max_memory_allocated() - before < 160 * 2**20


def test_cuda_graph():
    """Captured once and replayed on other inputs: nothing of a call happens on the host."""
    q, k, v = qkv(1024, 257)
    sums = [Sums(torch.zeros(2, 3, 1024, device="cuda"), torch.zeros(2, 3, 257, device="cuda"))]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        accumulate(q, k, v, sums=sums)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _, _ = accumulate(q, k, v, sums=sums)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    for x in sums[0][:2]:
        x.zero_()
    graph.replay()
    want = i2am.attention(q, k, v, backend="reference")
    assert (out - want.out).abs().max() <= TOLERANCE[torch.float16] * want.out.abs().max()
    assert (sums[0].r2g - want.r2g).abs().max() <= STATISTICS * want.r2g.max()
    assert (sums[0].g2r - want.g2r).abs().max() <= STATISTICS * want.g2r.max()


def test_compiled_module_is_one_graph():
    def attend(q, k, v):
        found = i2am.attention(q, k, v)
        return found.out * 2, found.r2g, found.g2r

    q, k, v = qkv(257, 77)
    for x, y in zip(torch.compile(attend, fullgraph=True)(q, k, v), attend(q, k, v), strict=True):
        torch.testing.assert_close(x, y)


def test_autocast_and_the_models_own_kernel_agree():
    q, k, v = qkv(1024, 257)
    got = i2am.attention(q, k, v).out
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v), atol=2e-3, rtol=2e-3)


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    q, k, v = (x.to("cuda:1") for x in qkv(257, 77))
    assert i2am.attention(q, k, v).r2g.device == torch.device("cuda:1")


def test_traced_pipeline(monkeypatch):
    """The maps of a run on the GPU are those of the same run on the CPU."""
    pytest.importorskip("diffusers")
    from tests.helpers.tiny_models import unet as pipelines

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def maps(device):
        pipe = pipelines.quiet(pipelines.sd("full")).to(device)
        with i2am.trace(pipe, time_groups=2) as tracer:
            pipe(
                prompt="a",
                ip_adapter_image=pipelines.image(),
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            )
        return tracer.maps()

    gpu, cpu = maps("cuda"), maps("cpu")
    for direction in ("r2g", "g2r"):
        want = cpu.llam(direction)
        assert (gpu.llam(direction) - want).abs().max() <= 1e-3 * want.max()  # the networks themselves differ by more


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
@pytest.mark.parametrize(("Nq", "Nk", "d"), [(1025, 257, 64), (4096, 4096, 64), (1024, 1024, 128), (4096, 77, 40)])
def test_the_models_own_output_and_the_sweeps(Nq, Nk, d, backend):
    """Bit for bit the kernel's own output, its log-sum-exp, and both maps behind it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from i2am.ops import beside, stock

    q, k, v = qkv(Nq, Nk, d)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        try:
            own = F.scaled_dot_product_attention(q, k, v)
        except RuntimeError as error:
            pytest.skip(f"{backend} does not run here: {error}")
        found = stock.forward_with_lse(q, k, v)
    assert found is not None
    out, row_lse = found
    assert torch.equal(out, own)
    B, H = q.shape[:2]
    shapes = (B, H, Nq), (B, H, Nk), (B, H, Nq)
    sums = Sums(*(torch.zeros(shape, device="cuda") for shape in shapes))
    spans = {"queries": (0, Nq), "keys": [(0, Nk)]}
    beside.sweeps(q, k, row_lse, scale=d**-0.5, mask=None, regions=None, sums=[sums], **spans)
    want = i2am.attention(q, k, v, backend="reference")
    for name in ("r2g", "g2r"):
        assert (getattr(sums, name) - getattr(want, name)).abs().max() <= 1e-3 * getattr(want, name).max(), name
    assert (sums.mass - 1).abs().max() <= 1e-3
