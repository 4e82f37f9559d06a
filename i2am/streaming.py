"""The streaming path: attention and attribution in torch ops, in tiles, never an ``Nq × Nk`` tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    scale: float,
    mask: Tensor | None,
    regions: Tensor | None,
    queries: tuple[int, int],
    keys: list[tuple[int, int]],
    r2g: list[Tensor],
    g2r: list[Tensor],
    mass: list[Tensor],
    sram: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """One attention call; adds to the running sums of every reference. See :func:`i2am.ops.accumulate`."""
    from i2am import reference

    p = reference.probabilities(q, k, scale=scale, mask=mask, queries=slice(*queries), keys=slice(min(keys)[0], max(e for _, e in keys)))
    out = q.new_empty(0)
    if v is not None:
        out = (p.rows @ v.double()).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    first = min(keys)[0]
    for n, (a, b) in enumerate(keys):
        spent = p.rows[:, :, queries[0]:queries[1], a:b]
        r2g[n].add_(p.columns[..., a - first:b - first].mean(-1))
        g2r[n].add_(spent.mean(-2))
        if mass:
            mass[n].add_(spent.sum(-1))
        if sram:
            sram[n].add_(regions.double() @ spent if regions.shape[0] > 1 else torch.einsum("rq,bhqk->bhrk", regions[0].double(), spent))
    return out, p.row_lse.float(), p.col_lse.float()
