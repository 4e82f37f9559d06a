"""Op level beside six busy processes, which this benchmark starts itself: notebook servers and CI are such machines.

Attention with both maps over ``scaled_dot_product_attention`` without any, in the threads that torch takes by default.
Both are timed in turn: the ratio of their times on the wall is what somebody waits, that of their processor time what
the arithmetic costs. ``pytest benchmarks/bench_busy.py -o python_files='bench_*.py'``
"""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from statistics import median

import pytest
import torch
from torch.nn import functional as F

import i2am
from i2am.ops import naive

BUSY = 6
CASES = [  # images, heads, queries, keys, head dim
    (1, 8, 4096, 4096, 40),
    (1, 8, 4096, 4096, 64),
    (1, 8, 4096, 257, 40),
    (2, 8, 4096, 77, 40),
    (1, 8, 4096, 16, 40),
    (1, 8, 1024, 1024, 80),
    (1, 1, 4096, 4096, 40),
    (4, 8, 256, 256, 160),
    (1, 1, 16384, 16384, 64),
]


@contextmanager
def busy(processes):
    """Other processes that each keep a processor busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def attention(q, k, v):
    return i2am.attention(q, k, v)


def verify(q, k, v):
    """A wrong answer is not timed."""
    q = q[:1, :, :512]
    truth = naive.attention(q, k[:1], v[:1], scale=q.shape[-1] ** -0.5)
    got = attention(q, k[:1], v[:1])
    for name in ("out", "r2g", "g2r"):
        want = getattr(truth, name)
        assert (getattr(got, name) - want).abs().max() <= 1e-5 * want.abs().max(), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU path")
@pytest.mark.parametrize("processes", [0, BUSY])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "x".join(map(str, c)))
@torch.no_grad()
def test_beside_busy_processes(benchmark, capsys, case, processes):
    B, H, Nq, Nk, d = case
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, n, d) for n in (Nq, Nk, Nk))
    verify(q, k, v)
    calls = {"sdpa": F.scaled_dot_product_attention, "i2am": attention}
    wall = {name: [] for name in calls}
    processor = {name: [] for name in calls}
    before = os.getloadavg()[0]
    with busy(processes):
        for n in range(4 if B * H * Nq * Nk > 1 << 27 else 6 if B * H * Nq * Nk > 1 << 24 else 12):
            for name, call in calls.items():
                start, spent = time.perf_counter(), time.process_time()
                call(q, k, v)
                if n:  # the first warms up
                    wall[name].append(time.perf_counter() - start)
                    processor[name].append(time.process_time() - spent)
    found = {}
    for name in calls:
        ratios = [a / b for a, b in zip(wall[name], wall["sdpa"], strict=True)]
        costs = [a / b for a, b in zip(processor[name], processor["sdpa"], strict=True)]
        found[name] = {"seconds": median(wall[name]), "ratio": median(ratios), "lowest": min(ratios)}
        found[name]["processor_ratio"] = median(costs)
    label = f"{B} × {H} head{'s' * (H > 1)}, {Nq} × {Nk}, d {d}"
    load = f"beside {processes} busy processes" if processes else "alone"
    benchmark.extra_info.update(table=f"busy {processes}", case=label, providers=found, load_before=before)
    benchmark.pedantic(lambda: None, rounds=1)
    with capsys.disabled():
        row = found["i2am"]
        print(
            f"\n{label}, {load}: {row['ratio']:.2f} × on the wall, {row['processor_ratio']:.2f} × processor time"
            f" (sdpa {found['sdpa']['seconds'] * 1e3:.1f} ms; load before {before:.1f})"
        )
