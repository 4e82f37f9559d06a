"""Attribution beside somebody else's attention: its output and row log-sum-exp as they are, then two thin sweeps.

:func:`i2am.ops.stock.forward_with_lse` has the log-sum-exp of PyTorch's own kernels; ``sweeps`` turns it into
attribution. So the model's output is its own kernel's bit for bit, and every speed-up of that kernel is one of the
traced model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i2am.kernels import column_lse, sweep, tiles
from i2am.kernels.tiles import Call, cdiv
from i2am.ops import few, triton
from i2am.ops.launch import (
    LOG2E,
    NAMES,
    NONE3,
    NONE4,
    Launch,
    Shape,
    Workspace,
    device_of,
    head,
    is_compilers,
    launch,
    mask_kind,
    may_describe,
    programs,
    start_accumulate,
    strides,
    unit_of,
    upcast,
    warn_once,
)
from i2am.ops.results import Sums
from i2am.ops.tokens import Span


class Half(NamedTuple):
    """One sweep: its launch, walks and places (floats of the workspace)."""

    launch: Launch
    tiles_per_group: int
    tiles_per_split: int
    splits: int
    total: Span
    column_sum: Span | None
    pivots: Span | None
    own: Span | None
    weighted: Span | None


@functools.lru_cache(maxsize=4096)
def plan_half(call: Call, heads: int, X: int, Y: int, at_once: int, unit: int, columns: bool, start: int) -> Half:
    """Choose the grid of one sweep; ``columns``: the one over queries, which leaves column sums and SRAM."""
    R = call.regions if columns else 0
    own = call.mass and not columns
    t = tiles.sweep_tiles(call.d, call.itemsize, call.device, call.kind, R, call.level).fit(X)
    x_tiles, y_tiles = cdiv(X, t.n), cdiv(Y, t.m)
    groups = cdiv(x_tiles, tiles.tiles_per_program(x_tiles, heads, at_once, 4))
    split = tiles.tiles_per_program(y_tiles, heads * groups, at_once, 4 * heads * X * (1 + columns + own + R))
    splits = cdiv(y_tiles, split)
    workspace = Workspace(start)
    return Half(
        Launch((heads, groups, splits), sweep.constants(call._replace(keys=X, regions=R), t, unit, upcast(call)), t),
        cdiv(x_tiles, groups),
        split,
        splits,
        total=workspace.place(heads * splits * X),
        column_sum=workspace.place(heads * splits * X) if columns else None,
        pivots=workspace.place(heads * splits) if columns else None,
        own=workspace.place(heads * splits * X) if own else None,
        weighted=workspace.place(heads * splits * R * X) if R else None,
    )


def sweeps(
    q: Tensor,
    k: Tensor,
    row_lse: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    regions: Tensor | None,
    queries: Span,
    keys: Sequence[Span],
    sums: Sequence[Sums],
) -> list[Tensor]:
    """Add the attribution of one attention call to the running sums, given its row log-sum-exp.

    Args:
        row_lse: ``[B, H, Nq]`` natural log-sum-exp of the rows over all keys, float32.
        mask: expanded to ``[B, H, Nq, Nk]``; regions: ``[1 | B, R, Q]``; queries, keys: ``[start, stop)``.

    Returns:
        The natural column log-sum-exp ``[B, H, K]`` of every reference.

    Where a sweep does not compile or fit, the fused kernels without an output do its work, and that is said once.
    """
    (B, H, Nq, d), Nk, device = q.shape, k.shape[2], q.device
    if scale < 0:
        q, scale = -q, -scale  # the kernels take the maximum before they scale
    row_lse = row_lse if row_lse.is_contiguous() else row_lse.contiguous()
    unit = unit_of(q, k)
    call = Call(
        device_of(device), NAMES[q.dtype], d, Nk, None if mask is None else str(mask.dtype), mask_kind(mask),
        sums[0].mass is not None, 0 if regions is None else regions.shape[1], False,
    )  # fmt: skip
    if not may_describe(unit, q, k):
        call = call._replace(device=call.device._replace(tma=False))
    factor = max(scale, 1e-30) * LOG2E
    q_strides, k_strides = strides(q, unit), strides(k, unit)
    by_key = NONE4 if mask is None else mask.stride()
    by_query = (by_key[0], by_key[1], by_key[3], by_key[2])
    weight_strides = NONE3 if regions is None else (regions.stride(0) * (regions.shape[0] > 1), *regions.stride()[1:])
    Q, at_once = queries[1] - queries[0], programs(device)

    def one(span: Span, total: Sums) -> Tensor:
        K = span[1] - span[0]
        a = plan_half(call, B * H, K, Q, at_once, unit, True, 0)
        size = max(x[1] for x in a[4:] if x is not None)
        b = plan_half(call, B * H, Q, K, at_once, unit, False, size)
        size = max(x[1] for x in b[4:] if x is not None)
        memory = torch.empty(size, dtype=torch.float32, device=device)
        g2r, column_sum, pivots, _, sram = (None if x is None else memory[slice(*x)] for x in a[4:])
        r2g, _, _, mass, _ = (None if x is None else memory[slice(*x)] for x in b[4:])
        col_lse = torch.empty(B, H, K, dtype=torch.float32, device=device)
        rows = row_lse.view(-1)[queries[0] :]
        launch(
            sweep.sweep_kernel, a.launch,
            head(k, a.launch, a.launch.tiles.n), k_strides, head(q, a.launch, a.launch.tiles.m, queries[1]), q_strides,
            mask, by_key, rows, Nq, None, 0, regions, weight_strides,
            g2r, column_sum, pivots, None, sram,
            factor, (H, Nk, Nq), span, queries, a.tiles_per_group, a.tiles_per_split, call.regions,
        )  # fmt: skip
        between = tiles.column_tiles(a.launch.tiles)
        constants = tiles.head_constants(d, between, call.kind, unit, upcast(call))
        launch(
            column_lse.column_lse_kernel, Launch((B * H, cdiv(K, between.n)), constants, between),
            q, q_strides, k, k_strides, mask, by_key, column_sum, K, pivots, row_lse, col_lse, K, None,
            factor, (H, Nq, Nk), queries, span, a.splits, a.tiles_per_split * a.launch.tiles.m, queries[0],
        )  # fmt: skip
        launch(
            sweep.sweep_kernel, b.launch,
            head(q, b.launch, b.launch.tiles.n), q_strides, head(k, b.launch, b.launch.tiles.m, span[1]), k_strides,
            mask, by_query, col_lse, K, None if mass is None else rows, Nq, None, NONE3,
            r2g, None, None, mass, None,
            factor, (H, Nq, Nk), queries, span, b.tiles_per_group, b.tiles_per_split, 0,
        )  # fmt: skip
        start_accumulate(total, (r2g, g2r, mass, sram), (H, Q, K, call.regions), (b.splits, a.splits), B * H)
        return col_lse

    found: list[Tensor] = []
    try:
        if Nk <= tiles.FEW_KEYS and call not in _broken:
            shape = Shape(call, B, H, Nq, queries, tuple(keys), at_once, unit, 1)
            _, _, hull = few.run(shape, q, k, None, row_lse, scale, mask, regions, sums)
            first = min(start for start, _ in keys)
            return [hull[..., a - first : b - first] for a, b in keys]
        while call not in _broken and len(found) < len(keys):
            found.append(one(keys[len(found)], sums[len(found)]))
    except Exception as raised:  # of a launch, before anything of that reference was added
        if not is_compilers(raised):
            raise
        _broken.add(call)
        warn_once(device, call, B * H, Nq, "by the fused kernels", raised)
    rest = keys[len(found) :]
    if rest:
        more = sums[len(found) :]
        _, _, hull = triton.attention(
            q, k, None, scale=scale, mask=mask, regions=regions, queries=queries, keys=rest, sums=more
        )
        first = min(start for start, _ in rest)
        found += [hull[..., a - first : b - first] for a, b in rest]
    return found


_broken: set[Call] = set()
