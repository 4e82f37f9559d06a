"""Host side of the Triton kernels: what to launch for a call, one workspace, the launches. The twin of ``streaming``.

Where keys are few, :mod:`i2am.ops.few` does it in two launches. What depends on shapes alone (tiles, grids, constants,
where each partial lies) is a :class:`Plan`, made once and kept; a call allocates its results and one workspace and
launches. Where a configuration does not compile or fit, the call runs with smaller tiles and at last in torch ops, and
says so once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i2am.kernels import attribution, column_lse, forward, tiles
from i2am.kernels.tiles import FALLBACKS, MAX_REGIONS, Call, Tiles, cdiv
from i2am.ops import few, streaming
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

# --------------------------------------------------------------------------------------------------------------- plan


class ReferencePlan(NamedTuple):
    """Pass 2 and the addition of one reference; places are floats of the workspace."""

    attribution: Launch
    sizes: tuple[int, int, int, int]  # of accumulate: (H, Q, K, R)
    tiles_per_group: int
    tiles_per_split: int
    r2g: Span
    g2r: Span
    mass: Span | None
    sram: Span | None
    counts: tuple[int, int]  # of key groups and query splits


class Plan(NamedTuple):
    """All launches of a call; places are floats of the workspace."""

    workspace: int
    forward: Launch
    tiles_per_split: int
    splits: int
    columns: int  # of a split's slot: whole key tiles
    column_sum: Span
    pivots: Span
    column_lse: Launch
    row_lse_max: Span
    references: tuple[ReferencePlan, ...]


@functools.lru_cache(maxsize=4096)
def plan(shape: Shape) -> Plan:
    """Choose tiles, grids and places for calls of one shape."""
    call, B, H, Nq, queries, keys, at_once, unit, out_unit = shape
    heads, start, stop = B * H, min(a for a, _ in keys), max(b for _, b in keys)
    workspace = Workspace()

    t = forward.attention_tiles(call.d, call.itemsize, call.device, call.kind, call.keys, call.level)
    query_tiles = cdiv(Nq, t.m)
    columns = cdiv(stop - start // t.n * t.n, t.n) * t.n
    each = tiles.tiles_per_program(query_tiles, heads, at_once, 4 * heads * columns)
    splits = cdiv(query_tiles, each)
    first = Launch((heads, splits), forward.constants(call, t, unit, out_unit, upcast(call)), t)
    pivots = workspace.place(heads * splits)

    t2 = attribution.attribution_tiles(call.d, call.itemsize, call.device, call.kind, call.regions, call.level)
    between = tiles.column_tiles(t2)
    peak_tiles = cdiv(queries[1] - queries[0], t2.m)
    row_lse_max = workspace.place(heads * peak_tiles)
    grid = heads, cdiv(stop - start, between.n) + peak_tiles
    head = tiles.head_constants(call.d, between, call.kind, unit, upcast(call))
    freed = workspace.at  # when pass 2 runs, the column sums' memory serves its partials
    column_sum = workspace.place(heads * splits * columns)
    references = []
    for span in keys:
        workspace.at = freed
        references.append(_reference(shape, span, t2, workspace))
    return Plan(
        workspace.size, first, each, splits, columns, column_sum, pivots,
        Launch(grid, head, between), row_lse_max, tuple(references),
    )  # fmt: skip


def _reference(shape: Shape, span: Span, t: Tiles, workspace: Workspace) -> ReferencePlan:
    """Plan pass 2 of one reference."""
    call, heads = shape.call, shape.B * shape.H
    Q, K, R = shape.queries[1] - shape.queries[0], span[1] - span[0], call.regions
    t = t.fit(K)
    key_tiles, query_tiles = cdiv(K, t.n), cdiv(Q, t.m)
    group = tiles.tiles_per_program(key_tiles, heads, shape.at_once, 4 * heads * Q * (1 + call.mass))
    groups = cdiv(key_tiles, group)
    split = tiles.tiles_per_program(query_tiles, heads * groups, shape.at_once, 4 * heads * K * (1 + R))
    splits = cdiv(query_tiles, split)
    constants = attribution.constants(call._replace(keys=K), t, shape.unit, upcast(call))
    return ReferencePlan(
        Launch((heads, groups, splits), constants, t),
        (shape.H, Q, K, R),
        group,
        split,
        r2g=workspace.place(heads * groups * Q),
        g2r=workspace.place(heads * splits * K),
        mass=workspace.place(heads * groups * Q) if call.mass else None,
        sram=workspace.place(heads * splits * R * K) if R else None,
        counts=(groups, splits),
    )


# --------------------------------------------------------------------------------------------------------------- call


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
    """Run one attention call and add to the running sums of every reference. See :func:`i2am.ops.accumulate`.

    Args:
        mask: expanded to ``[B, H, Nq, Nk]``.
        regions: ``[1 | B, R, Q]`` with weights that sum to 1.
        queries: ``[start, stop)`` of the generated tokens; keys: of each reference.

    Returns:
        ``out [B, H, Nq, d]`` (in memory ``[B, Nq, H, d]``, so that the transpose and reshape that follow in a model
        cost nothing; None without ``v``), ``row_lse [B, H, Nq]``, ``col_lse`` over the hull of ``keys``; natural.

    Raises:
        ValueError: more than :data:`MAX_REGIONS` regions.
    """
    R = 0 if regions is None else regions.shape[1]
    if R > MAX_REGIONS:
        raise ValueError(f"at most {MAX_REGIONS} regions at a time, got {R}")
    if scale < 0:
        q, scale = -q, -scale  # the kernels take the maximum before they scale
    (B, H, Nq, d), device = q.shape, q.device
    call = Call(
        device_of(device), NAMES[q.dtype], d, k.shape[2], None if mask is None else str(mask.dtype), mask_kind(mask),
        sums[0].mass is not None, R, v is not None,
    )  # fmt: skip
    unit, whole = unit_of(q, k, v), tiles.unit_of(q.element_size())
    if not may_describe(unit, q, k, v):
        call = call._replace(device=call.device._replace(tma=False))
    shape = Shape(call, B, H, Nq, queries, tuple(keys), programs(device), unit, whole if d % whole == 0 else 1)
    progress = Progress()
    error: Exception | None = None
    for level in range(_broken.get(shape, 0) if _broken else 0, FALLBACKS + 1):
        reduced = shape._replace(call=call._replace(level=level)) if level else shape
        try:
            with torch.cuda.device_of(q) if q.is_cuda else contextlib.nullcontext():
                found = _run(reduced, progress, q, k, v, scale, mask, regions, sums)
        except Exception as raised:
            if not is_compilers(raised):
                raise
            _broken[shape], error = level + 1, raised
        else:
            if error is not None:
                warn_once(device, call, B * H, Nq, "with smaller tiles", error)
            return found
    if error is not None:
        warn_once(device, call, B * H, Nq, "in torch ops (slower)", error)
    done = progress.done
    found = streaming.attention(
        q, k, v, scale=scale, mask=mask, regions=regions, queries=queries, keys=keys[done:], sums=sums[done:]
    )
    return progress.results or found


class Progress:
    """Progress of a call: a configuration that fails must not make anything count twice."""

    def __init__(self) -> None:
        self.results: tuple[Tensor | None, Tensor, Tensor] | None = None
        self.done = 0  # references added to their sums


def _run(
    shape: Shape,
    progress: Progress,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    mask: Tensor | None,
    regions: Tensor | None,
    sums: Sequence[Sums],
) -> tuple[Tensor | None, Tensor, Tensor]:
    if shape.call.keys <= tiles.FEW_KEYS:
        progress.results = few.run(shape, q, k, v, None, scale, mask, regions, sums)
        return progress.results
    p = plan(shape)
    call, B, H, Nq, queries, keys, _, unit, out_unit = shape
    start, stop = min(a for a, _ in keys), max(b for _, b in keys)
    out = None if v is None else torch.empty(B, Nq, H, call.d, dtype=q.dtype, device=q.device).transpose(1, 2)
    row_lse = torch.empty(B, H, Nq, dtype=torch.float32, device=q.device)
    col_lse = torch.empty(B, H, stop - start, dtype=torch.float32, device=q.device)
    memory = torch.empty(p.workspace, dtype=torch.float32, device=q.device)
    column_sum, pivots, row_lse_max = (memory[slice(*x)] for x in (p.column_sum, p.pivots, p.row_lse_max))

    factor = max(scale, 1e-30) * LOG2E  # a masked score stays -inf even when the scale is 0
    sizes = (H, Nq, k.shape[2])
    q_strides, k_strides = strides(q, unit), strides(k, unit)
    mask_strides = NONE4 if mask is None else mask.stride()

    f = p.forward
    launch(
        forward.attention_fwd_kernel, f,
        head(q, f, f.tiles.m), q_strides, head(k, f, f.tiles.n), k_strides,
        None if v is None else head(v, f, f.tiles.n), NONE3 if v is None else strides(v, unit),
        mask, mask_strides, out, NONE3 if out is None else strides(out, out_unit), row_lse,
        column_sum, pivots, factor, sizes, queries, (start, stop), p.tiles_per_split,
    )  # fmt: skip
    first = start - start // f.tiles.n * f.tiles.n  # the hull's first column within the slot
    c = p.column_lse
    launch(
        column_lse.column_lse_kernel, c, q, q_strides, k, k_strides, mask, mask_strides,
        column_sum[first:] if first else column_sum, p.columns, pivots, row_lse, col_lse, stop - start, row_lse_max,
        factor, sizes, queries, (start, stop), p.splits, p.tiles_per_split * f.tiles.m, 0,
    )  # fmt: skip
    results = progress.results = out, row_lse, col_lse
    for i in range(progress.done, len(keys)):
        r, total, span = p.references[i], sums[i], keys[i]
        r2g_partial, g2r_partial, mass_partial, sram_partial = (
            None if x is None else memory[slice(*x)] for x in (r.r2g, r.g2r, r.mass, r.sram)
        )
        a = r.attribution
        launch(
            attribution.attribution_kernel, a, head(q, a, a.tiles.m, queries[1]), q_strides,
            head(k, a, a.tiles.n, span[1]), k_strides, mask, mask_strides, regions,
            NONE3 if regions is None else (regions.stride(0) * (regions.shape[0] > 1), *regions.stride()[1:]),
            row_lse, col_lse.view(-1)[span[0] - start :] if span[0] > start else col_lse, stop - start, row_lse_max,
            r2g_partial, g2r_partial, mass_partial, sram_partial,
            factor, sizes, queries, span, r.tiles_per_group, r.tiles_per_split, call.regions,
        )  # fmt: skip
        partials = r2g_partial, g2r_partial, mass_partial, sram_partial
        start_accumulate(total, partials, r.sizes, r.counts, B * H)
        progress.done = i + 1
    return results


_broken: dict[Shape, int] = {}  # the first level that is worth trying
