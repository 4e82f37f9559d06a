"""The streaming path: attention and attribution in torch ops, in tiles, never an ``Nq × Nk`` tensor.

What a machine without the Triton kernels runs; any device, float16 to float64 in, float32 statistics (float64 for
float64 inputs). There are two sweeps over the logits:

1. ``out``, row log-sum-exp, and the columns' sums, gathered from the same exponentials.
2. Against the finished sums: R2G, over the reference columns only.

Without a mask tiles are parts of rows (:mod:`i2am.ops.blockwise`), else whole rows (:mod:`i2am.ops.shifted`). On a CPU
heads, or pieces of one head, are tasks that run side by side (:mod:`i2am.ops.workers`). What a task is depends on the
shapes alone and every task runs in one thread, so the bits do not depend on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from i2am.ops import workers
from i2am.ops.blockwise import Blockwise
from i2am.ops.heads import Heads, Reference, Sweeps, both, in_steps
from i2am.ops.results import Sums
from i2am.ops.shifted import Shifted
from i2am.ops.tokens import Span

T = TypeVar("T")

SMALL = 1 << 18  # logits, or multiply-adds of a query: heads are worked on together up to this size
FEW = 4  # tasks that keep the threads of most machines busy
LONG = 1 << 25  # multiply-adds of a head from which it is split if there are few heads
HUGE = 1 << 32  # and from which it is split in any case: one head at a time needs the least memory
PIECES, PIECE = 16, 256  # most pieces of a split head, and least queries of a piece
BLOCKS = 64  # keys from which tiles are parts of rows: fewer are a shift's sample themselves
KEPT = 6 << 20  # exponentials of a call that are kept rather than computed twice: 24 MiB of float32


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    scale: float,
    mask: Tensor | None,
    regions: Tensor | None,
    queries: Span,
    keys: Sequence[Span],
    sums: Sequence[Sums],
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute one attention call and add to the running sums of every reference; see :func:`i2am.ops.accumulate`.

    ``mask`` is expanded to ``[B, H, Nq, Nk]``; spans are ``[start, stop)``; ``col_lse`` covers the hull of ``keys``.
    """
    (B, H, Nq, d), Nk = q.shape, k.shape[2]
    hull = slice(min(a for a, _ in keys), max(b for _, b in keys))  # the columns whose statistics are kept
    out = None if v is None else q.new_empty(B, Nq, H, v.shape[-1]).transpose(1, 2)
    row_lse = q.new_empty(B, H, Nq, dtype=torch.float32)
    col_lse = q.new_empty(B, H, hull.stop - hull.start, dtype=torch.float32)

    def heads(at: tuple[int, slice]) -> Heads:
        return Heads.of(
            q[at],
            k[at],
            None if v is None else v[at],
            None if mask is None else mask[at],
            None if regions is None else regions[at[0] % len(regions)],
            scale=scale,
            queries=slice(*queries),
            hull=hull,
            references=[
                Reference(
                    slice(*span),
                    s.r2g[at],
                    s.g2r[at],
                    None if s.mass is None else s.mass[at],
                    None if s.sram is None else s.sram[at],
                )
                for span, s in zip(keys, sums, strict=True)
            ],
            out=None if out is None else out[at],
            row_lse=row_lse[at],
        )

    groups = list(_groups(q, k))
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():  # neither may reach the statistics
        if Nq * Nk * d > HUGE or (Nq * Nk * d > LONG and len(groups) < FEW):
            for at in groups:
                _in_pieces(heads(at), col_lse[at])
        else:
            keep = KEPT // min(torch.get_num_threads(), len(groups))
            tasks = [partial(_whole, partial(heads, at), col_lse[at], keep) for at in groups]
            workers.run(tasks, _nothing, q.device)
    return out, row_lse, col_lse


def _groups(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield which heads are worked on together: ``(image, heads)``."""
    B, H, Nq, d = q.shape
    step = max(1, min(H, SMALL // (k.shape[2] * max(Nq, d))))
    for b in range(B):
        for h in range(0, H, step):
            yield b, slice(h, min(h + step, H))


def _whole(collect: Callable[[], Heads], col_lse: Tensor, keep: int) -> None:
    """Take a few heads through both sweeps."""
    heads = collect()
    everything = slice(0, heads.q.shape[1])
    sweeps = _sweeps(heads, keep)
    found = sweeps.columns([sweeps.first(everything)])
    if found is None:
        sweeps = Shifted(heads)
        found = sweeps.columns([sweeps.first(everything)])
    assert found is not None  # that form takes any logits
    col_lse.copy_(found)
    sweeps.finish([sweeps.second(heads.queries)])


def _in_pieces(heads: Heads, col_lse: Tensor) -> None:
    """Take a few heads through both sweeps, split over the queries; the pieces' sums are merged in their order."""
    device = col_lse.device
    Nq = heads.q.shape[1]
    pieces = list(in_steps(slice(0, Nq), max(PIECE, -(-Nq // PIECES))))
    generated = [part for part in (both(rows, heads.queries) for rows in pieces) if part.start < part.stop]
    sweeps: Sweeps = workers.run([lambda: _sweeps(heads, KEPT // len(pieces))], _only, device)
    found = workers.run([partial(sweeps.first, rows) for rows in pieces], sweeps.columns, device)
    if found is None:
        sweeps = workers.run([lambda: Shifted(heads)], _only, device)
        found = workers.run([partial(sweeps.first, rows) for rows in pieces], sweeps.columns, device)
    assert found is not None  # that form takes any logits
    col_lse.copy_(found)
    workers.run([partial(sweeps.second, rows) for rows in generated], sweeps.finish, device)


def _sweeps(heads: Heads, keep: int) -> Sweeps:
    blocks = heads.bias is None and heads.k.shape[1] >= BLOCKS
    return Blockwise(heads, keep) if blocks else Shifted(heads)


def _only(results: list[T]) -> T:
    return results[0]


def _nothing(results: list[None]) -> None:
    return None


def _keep_freed_memory() -> None:
    """Have glibc reuse a freed tile. By default it goes back to the system, and its page faults cost 4× its arithmetic.

    Freeing one large block (never touched) raises the size from which malloc does so to its maximum of 32 MiB.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


_keep_freed_memory()
