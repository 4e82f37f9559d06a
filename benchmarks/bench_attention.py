"""Op level: attention with both maps beside ``scaled_dot_product_attention`` without any, and the eager peers.

Every provider is verified against the float64 definitions before it is timed: the speed of a wrong answer is not
reported. ``pytest benchmarks/bench_attention.py``
"""

from functools import cache

import pytest
import torch
from compare import compare, show
from peers import daam, materialise
from torch.nn import functional as F

import i2am
from i2am import ops
from i2am.ops import naive as reference

DEVICE, DTYPE = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}[DTYPE]  # of the peak; eager half precision rounds on the way
EAGER = 1 << 29  # scores up to which the eager peers are run
CROSS = [*((8, 4096, Nk, 40) for Nk in (1, 4, 16, 77, 257, 3072)), (8, 4096, 257, 80), (8, 1024, 257, 160)]
JOINT = [(8, 256, 256, 160), (8, 1024, 1024, 80), (8, 4096, 4096, 40), (8, 4096, 4096, 64), (4, 4096, 4096, 128)]
LARGE = [(1, 16384, 16384, 64)]


def sdpa(q, k, v):
    return {"out": F.scaled_dot_product_attention(q, k, v)}


def i2am_attention(q, k, v):
    return i2am.attention(q, k, v)._asdict()


def i2am_statistics(q, k, v):
    """What a tracer runs beside the model's own attention."""
    (B, H, Nq, _), Nk = q.shape, k.shape[2]
    sums = ops.Sums(torch.zeros(B, H, Nq, device=q.device), torch.zeros(B, H, Nk, device=q.device))
    ops.accumulate(q, k, None, sums=[sums])
    return {"r2g": sums.r2g, "g2r": sums.g2r}


def eager(q, k, v):
    return dict(zip(("out", "r2g", "g2r"), materialise.attention(q, k, v), strict=True))


def daam_maps(q, k, v):
    out, heat = daam.attention(q, k, v)
    return {"out": out, "heat": heat}


PROVIDERS = {
    "sdpa": sdpa,
    "i2am": i2am_attention,
    "i2am, maps only": i2am_statistics,
    "materialise": eager,
    "daam": daam_maps,
}


@cache
def inputs(case):
    H, Nq, Nk, d = case
    torch.manual_seed(0)
    return [torch.randn(1, H, n, d, device=DEVICE).to(DTYPE) for n in (Nq, Nk, Nk)]


def verify(provider, case):
    """A wrong answer is not timed. The truth is float64 and materialised, so of large cases a part of the queries."""
    q, k, v = inputs(case)
    q = q[:, :, :1024]
    truth = reference.attention(q, k, v, scale=q.shape[-1] ** -0.5)
    for name, got in provider(q, k, v).items():
        if name == "heat":
            assert (got.mean(-1) - truth.g2r.mean(1)).abs().max() <= TOLERANCE * truth.g2r.max()
        elif name in ("out", "r2g", "g2r"):
            want = getattr(truth, name)
            assert (got - want).abs().max() <= TOLERANCE * want.abs().max(), name


@pytest.mark.parametrize("case", CROSS + JOINT + LARGE, ids=lambda c: "x".join(map(str, c)))
@torch.no_grad()
def test_attention(benchmark, capsys, case):
    H, Nq, Nk, d = case
    providers = {n: p for n, p in PROVIDERS.items() if H * Nq * Nk <= EAGER or n not in ("materialise", "daam")}
    for provider in providers.values():
        verify(provider, case)
    q, k, v = inputs(case)
    label = f"{H} head{'s' * (H > 1)}, {Nq} × {Nk}, d {d}"
    calls = {name: lambda provider=provider: provider(q, k, v) for name, provider in providers.items()}
    found = compare(
        benchmark, "op", label, calls, rounds=3 if H * Nq * Nk > 1 << 27 else 7, flops=4.0 * H * Nq * Nk * d
    )
    show(capsys, label, found)
    inputs.cache_clear()
