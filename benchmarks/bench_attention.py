"""Op level: attention with both maps beside ``scaled_dot_product_attention`` without any.

Every provider is verified against the float64 definitions before it is timed. A round times SDPA and then the provider;
the table holds the median of the rounds' ratios (and their lowest), so that a neighbour on the machine slows both.

    pytest benchmarks/bench_attention.py
"""

import time
from functools import cache
from statistics import median

import pytest
import torch
from peers import materialise
from torch.nn import functional as F

import i2am
from i2am import ops, reference

ROUNDS = 7
DEVICE, DTYPE = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}[DTYPE]  # of the peak; eager half precision rounds on the way
CASES = [  # heads, queries, keys, head dim
    (8, 4096, 4096, 40),
    (8, 4096, 4096, 64),
    (8, 1024, 1024, 80),
    (8, 256, 256, 160),
    (8, 4096, 257, 40),
    (8, 4096, 257, 80),
    (8, 4096, 77, 40),
    (8, 4096, 16, 40),
    (8, 4096, 4, 40),
    (8, 4096, 1, 40),
]


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v), None, None


def i2am_attention(q, k, v):
    found = i2am.attention(q, k, v)
    return found.out, found.r2g, found.g2r


def i2am_statistics(q, k, v):
    """What a tracer runs beside the model's own attention."""
    (B, H, Nq, _), Nk = q.shape, k.shape[2]
    sums = ops.Sums(torch.zeros(B, H, Nq, device=q.device), torch.zeros(B, H, Nk, device=q.device))
    ops.accumulate(q, k, None, sums=[sums])
    return None, sums.r2g, sums.g2r


PROVIDERS = {
    "sdpa": sdpa,
    "i2am": i2am_attention,
    "i2am maps only": i2am_statistics,
    "materialise": materialise.attention,
}


@cache
def inputs(case):
    H, Nq, Nk, d = case
    torch.manual_seed(0)
    return [torch.randn(1, H, n, d, device=DEVICE).to(DTYPE) for n in (Nq, Nk, Nk)]


@cache
def truth(case):
    """Of the last head: it is float64 and materialised."""
    q, k, v = (x[:, -1:] for x in inputs(case))
    return reference.attention(q, k, v, scale=q.shape[-1] ** -0.5)


def verify(provider, case):
    """A wrong answer is not timed."""
    for name, got in zip(("out", "r2g", "g2r"), provider(*inputs(case)), strict=True):
        if got is not None:
            want = getattr(truth(case), name)
            assert (got[:, -1:] - want).abs().max() <= TOLERANCE * want.abs().max(), name


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def table(request):
    """``{case: {provider: (milliseconds, median ratio, lowest ratio)}}``, printed when all have run."""
    rows = {}
    yield rows
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{DEVICE}, {str(DTYPE)[6:]}, {torch.get_num_threads()} threads")
        print("ratio to the sdpa of the same round: median (lowest)")
        print(f"{'heads × queries × keys, d':28s}{'sdpa':>10s}" + "".join(f"{n:>20s}" for n in list(PROVIDERS)[1:]))
        for (H, Nq, Nk, d), found in rows.items():
            line = f"{f'{H} × {Nq} × {Nk}, {d}':28s}"
            if "sdpa" in found:
                line += f"{found['sdpa'][0]:7.2f} ms"
            for name in list(PROVIDERS)[1:]:
                cell = f"{found[name][1]:.2f} ({found[name][2]:.2f})" if name in found else ""
                line += f"{cell:>20s}"
            print(line)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "x".join(map(str, c)))
@torch.no_grad()
def test_attention(benchmark, table, provider, case):
    H, Nq, Nk, d = case
    q, k, v = inputs(case)
    verify(PROVIDERS[provider], case)
    baseline = []
    benchmark.group = f"{H} × {Nq} × {Nk}, d {d}"
    benchmark.pedantic(
        lambda: seconds(lambda: PROVIDERS[provider](q, k, v)),
        setup=lambda: baseline.append(seconds(lambda: sdpa(q, k, v))),
        rounds=ROUNDS,
        warmup_rounds=1,
    )
    times = benchmark.stats.stats.data
    ratios = [t / s for t, s in zip(times, baseline[-ROUNDS:], strict=True)]
    benchmark.extra_info.update(ratio_to_sdpa=median(ratios), lowest_ratio_to_sdpa=min(ratios))
    table.setdefault(case, {})[provider] = (median(times) * 1e3, median(ratios), min(ratios))
