"""High-resolution super-resolution: a reference aligned with the picture, 16,384 and 65,536 tokens on each side.

One head. Materialising is run in a process that may take no more memory than the machine has, and fails where it must.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from compare import compare, seconds, show
from memory import Memory
from peers import materialise
from torch.nn import functional as F

import i2am

SIZES = {1024: 16384, 2048: 65536}  # pixels of the output: tokens at an eighth of its side
D = 64

EAGER = """
import json, resource, sys, torch
sys.path.insert(0, sys.argv[1])
from peers import materialise
n, d, limit = map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
q, k, v = (torch.randn(1, 1, n, d) for _ in range(3))
try:
    materialise.attention(q, k, v)
    print(json.dumps("done"))
except (RuntimeError, MemoryError) as error:
    print(json.dumps(str(error).splitlines()[0]))
"""


def eager_fate(n: int) -> str:
    """What becomes of the materialising form at ``n × n``: "done", or the error it died of."""
    arguments = [str(Path(__file__).parent), str(n), str(D), str(psutil.virtual_memory().total)]
    done = subprocess.run([sys.executable, "-c", EAGER, *arguments], capture_output=True, text=True)
    return json.loads(done.stdout) if done.stdout else f"killed by signal {-done.returncode}"


@pytest.mark.parametrize("pixels", SIZES)
@torch.no_grad()
def test_aligned_reference(benchmark, capsys, pixels):
    n = SIZES[pixels]
    q, k, v = (torch.randn(1, 1, n, D) for _ in range(3))
    calls = {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v), "i2am": lambda: i2am.attention(q, k, v)}
    fate = eager_fate(n)
    if fate == "done":
        calls["materialise"] = lambda: materialise.attention(q, k, v)
    case = f"{pixels} px, {n} × {n}"
    found = compare(benchmark, "highres", case, calls, rounds=1 if n > 20000 else 3)
    benchmark.extra_info["materialise"] = fate
    show(capsys, case, found)
    if fate != "done":
        with capsys.disabled():
            print(f"  materialise: {fate}")


@torch.no_grad()
def test_growth(benchmark, capsys):
    """Exponents of time and extra memory in the number of tokens, fitted from 2,048 to 16,384: ~2 and ~1 (or 0)."""
    found = {}
    for name, call in (("i2am", i2am.attention), ("materialise", materialise.attention)):
        points = [point(call, n) for n in (2048, 4096, 8192, 16384)]
        found[name] = {
            "time": slope([(math.log(n), math.log(t)) for n, t, _ in points]),
            "memory": slope([(math.log(n), math.log(max(peak, 1 << 20))) for n, _, peak in points]),
            "points": points,
        }
    benchmark.extra_info.update(table="growth", case="one head, 2,048 to 16,384 tokens", exponents=found)
    benchmark.pedantic(lambda: None, rounds=1)
    with capsys.disabled():
        print()
        for name, row in found.items():
            peaks = ", ".join(f"{peak / 2**20:.0f}" for *_, peak in row["points"])
            print(f"  {name:12s} time ~ N^{row['time']:.2f}, memory ~ N^{row['memory']:.2f} ({peaks} MiB)")


def point(call, n: int) -> tuple[int, float, int]:
    """``(n, seconds, bytes beyond the inputs)`` of one call on ``n × n``."""
    q, k, v = (torch.randn(1, 1, n, D) for _ in range(3))
    call(q, k, v)
    with Memory() as meter:
        call(q, k, v)
    return n, min(seconds(lambda: call(q, k, v)) for _ in range(3)), meter.peak


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())
