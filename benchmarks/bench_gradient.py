"""Forward and backward: attention with read-outs in the loss beside ``scaled_dot_product_attention`` without any.

Peers: autograd through the materialised softmax. Gradients are verified against the float64 definitions on a part of
the queries before anything is timed. ``pytest benchmarks/bench_gradient.py -o python_files='bench_*.py'``
"""

from collections.abc import Callable

import pytest
import torch
from compare import compare, show
from torch import Tensor
from torch.nn import functional as F

import i2am
from i2am import losses
from i2am.ops import READS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MATERIALISED = 1 << 27  # scores up to which the peer is run
CASES = [(2, 1024, 40), (2, 4096, 40), (2, 4096, 64), (1, 16384, 40)]
EVERYTHING = tuple(name for name in READS if name not in ("columns", "log_p", "log_c"))


def leaves(case: tuple[int, int, int], queries: int | None = None) -> list[Tensor]:
    H, N, d = case
    torch.manual_seed(0)
    full = [torch.randn(1, H, N, d, device=DEVICE) for _ in range(4)]
    full[0], full[3] = full[0][:, :, :queries], full[3][:, :, :queries]
    return [x.clone().requires_grad_(n < 3) for n, x in enumerate(full)]


def side(n: int) -> tuple[int, int]:
    return (n // 32, 32)


def plain(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    return {"out": F.scaled_dot_product_attention(q, k, v)}


def read(*names: str, backend: str | None = None) -> Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        Nq, Nk = q.shape[2], k.shape[2]
        given = {
            "expected": {"key_coordinates": losses.grid(side(Nk), device=q.device) / 32},
            "landing": {"query_coordinates": losses.grid(side(Nq), device=q.device) / 32},
            "sram": {"regions": torch.eye(4, device=q.device).repeat_interleave(Nq // 4, 1)},
        }
        arguments = {key: x for name in names for key, x in given.get(name, {}).items()}
        found = i2am.attention(q, k, v, read=names, backend=backend, **arguments)._asdict()
        return {name: x for name, x in found.items() if x is not None}

    return call


def materialised(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Everything by autograd through both softmaxes, in float32."""
    s = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    p, c = s.softmax(3), s.softmax(2)
    x, y = losses.grid(side(k.shape[2]), device=q.device) / 32, losses.grid(side(q.shape[2]), device=q.device) / 32
    regions = torch.eye(4, device=q.device).repeat_interleave(q.shape[2] // 4, 1) / (q.shape[2] // 4)
    return {
        "out": p @ v,
        "r2g": c.mean(3),
        "g2r": p.mean(2),
        "sram": regions @ p,
        "expected": p @ x,
        "landing": c.transpose(2, 3) @ y,
        "entropy": -(p * p.log()).sum(3),
        "row_lse": s.logsumexp(3),
        "col_lse": s.logsumexp(2),
    }


PROVIDERS = {
    "sdpa": plain,
    "expected": read("expected"),
    "expected, landing": read("expected", "landing"),
    "r2g, g2r, sram": read("r2g", "g2r", "sram"),
    "i2am": read(*EVERYTHING),
    "materialise": materialised,
}


def step(provider: Callable[..., dict[str, Tensor]], inputs: list[Tensor]) -> list[Tensor]:
    """One forward and backward; of every read-out the mean square counts, of the output what the model sends back."""
    *qkv, sent = inputs
    found = provider(*qkv)
    loss = (found["out"] * sent).sum()
    for name, x in found.items():
        if name not in ("out", "mass") and (name in ("row_lse", "col_lse")) <= (len(found) > 6):
            loss = loss + x.square().mean()
    return list(torch.autograd.grad(loss, qkv))


def verify(name: str, case: tuple[int, int, int]) -> None:
    """A wrong gradient is not timed."""
    if name in ("sdpa", "materialise"):
        return
    inputs = leaves(case, queries=512)
    names = EVERYTHING if name == "i2am" else tuple(name.split(", "))
    for a, b in zip(step(PROVIDERS[name], inputs), step(read(*names, backend="reference"), inputs), strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5, name


@pytest.mark.parametrize("case", CASES, ids=lambda c: "x".join(map(str, c)))
def test_gradient(benchmark, capsys, case):
    H, N, d = case
    providers = {n: p for n, p in PROVIDERS.items() if n != "materialise" or H * N * N <= MATERIALISED}
    for name in providers:
        verify(name, case)
    inputs = leaves(case)
    calls = {name: lambda provider=provider: step(provider, inputs) for name, provider in providers.items()}
    label = f"{H} head{'s' * (H > 1)}, {N} × {N}, d {d}, forward and backward"
    show(capsys, label, compare(benchmark, "gradient", label, calls, rounds=3 if N > 4096 else 9, processor=True))
