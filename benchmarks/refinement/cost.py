"""What the losses cost: forward and backward of one attention, beside autograd through materialised softmaxes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

import i2am
from benchmarks.memory import Memory
from i2am import losses

SIDES = (32, 64, 96, 128)  # tokens a side
HEADS, DIM = 1, 40
ROUNDS = 3
ARRAYS = 10  # of N × N float32 that a materialised step is given room for

Step = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # q, k, v, tokens a side → the loss


def attention(q: Tensor, k: Tensor, v: Tensor, side: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).square().mean()


def ours(q: Tensor, k: Tensor, v: Tensor, side: int, *, name: str) -> Tensor:
    given = {"key_coordinates": losses.grid((side, side))} if name in ("flow", "variation") else {}
    read = {"flow": "expected", "variation": "expected", "inside": "r2g"}[name]
    att = i2am.attention(q, k, v, read=(read,), **given)
    return att.out.square().mean() + _loss(name, getattr(att, read), side)


def materialised(q: Tensor, k: Tensor, v: Tensor, side: int, *, name: str) -> Tensor:
    s = q @ k.transpose(2, 3) * DIM**-0.5
    p = s.softmax(3)
    value = s.softmax(2).mean(3) if name == "inside" else p @ losses.grid((side, side))
    return (p @ v).square().mean() + _loss(name, value, side)


def _loss(name: str, value: Tensor, side: int) -> Tensor:
    if name == "flow":
        return 1e-3 * losses.flow(value, losses.grid((side, side)))
    if name == "variation":
        return 1e-3 * losses.variation(value, size=(side, side))
    return losses.inside(value, (torch.arange(side * side) < side * side // 3).float())


def measure(side: int) -> dict:
    """Return milliseconds of CPU time and MiB of peak growth per row; None where there is no room for it."""
    torch.manual_seed(0)
    N = side * side
    qkv = [torch.randn(1, HEADS, N, DIM, requires_grad=True) for _ in range(3)]
    rows: dict[str, Step] = {"attention alone": attention}
    for name in ("flow", "variation", "inside"):
        rows[name] = lambda q, k, v, side, name=name: ours(q, k, v, side, name=name)
        rows[f"{name}, materialised"] = lambda q, k, v, side, name=name: materialised(q, k, v, side, name=name)
    room = psutil.virtual_memory().available > 4 * ARRAYS * HEADS * N * N
    rows = {name: step for name, step in rows.items() if room or "materialised" not in name}
    times: dict[str, list[float]] = {name: [] for name in rows}
    peaks: dict[str, float] = {}
    for turn in range(ROUNDS + 2):  # the first warms up, the second is watched, the others are timed
        for name, step in rows.items():
            if turn == 1:
                with Memory() as memory:
                    torch.autograd.grad(step(*qkv, side), qkv)
                peaks[name] = memory.peak
                continue
            start = time.process_time()
            torch.autograd.grad(step(*qkv, side), qkv)
            if turn:
                times[name].append(time.process_time() - start)
    found = {name: {"ms": 1e3 * statistics.median(times[name]), "MiB": peaks[name] / 2**20} for name in rows}
    return {"tokens": N, "heads": HEADS, "dim": DIM, "rows": found}
