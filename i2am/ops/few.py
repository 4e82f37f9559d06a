"""Host side where keys are few: two launches a call, whatever it asks for and however many references it has."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i2am.kernels import few_attribution, few_forward, tiles
from i2am.kernels.tiles import MOST_SPLITS, cdiv
from i2am.ops.launch import LOG2E, NONE3, NONE4, Launch, Shape, Workspace, launch, strides, upcast
from i2am.ops.results import Sums
from i2am.ops.tokens import Span


class FewPlan(NamedTuple):
    """Both launches of a call; places are floats of the workspace."""

    workspace: int
    forward: Launch
    forward_tiles: int  # of queries, a split
    splits: int
    column: Span
    g2r: Span
    sram: Span | None
    attribution: Launch
    attribution_tiles: int
    spans: tuple[int, ...]  # [start, stop) of every reference, one after the other


@functools.lru_cache(maxsize=4096)
def plan(shape: Shape, rows_given: bool) -> FewPlan:
    """Choose tiles, grids and places for calls of one shape."""
    call, B, H, Nq, queries, keys, at_once, unit, out_unit = shape
    heads, R, K = B * H, call.regions, max(b for _, b in keys) - min(a for a, _ in keys)
    t = tiles.few_tiles(call.d, call.itemsize, call.device, call.kind, R, call.level).fit(call.keys)
    query_tiles, generated = cdiv(Nq, t.m), cdiv(queries[1] - queries[0], t.m)
    each = tiles.tiles_per_program(query_tiles, heads, at_once, 4 * heads * K * (2 + R))
    each = max(each, cdiv(query_tiles, MOST_SPLITS))
    splits = cdiv(query_tiles, each)
    again = tiles.tiles_per_program(generated, heads, at_once, 4)
    workspace = Workspace()
    return FewPlan(
        forward=Launch((heads, splits), few_forward.constants(call, t, unit, out_unit, rows_given, upcast(call)), t),
        forward_tiles=each,
        splits=splits,
        column=workspace.place(heads * splits * K),
        g2r=workspace.place(heads * splits * K),
        sram=workspace.place(heads * splits * R * K) if R else None,
        attribution=Launch(
            (heads, cdiv(generated, again) + 1 + R),
            few_attribution.constants(call, t, len(keys), splits, unit, upcast(call)),
            t,
        ),
        attribution_tiles=again,
        spans=tuple(edge for span in keys for edge in span),
        workspace=workspace.size,
    )


def run(
    shape: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    row_lse: Tensor | None,
    scale: float,
    mask: Tensor | None,
    regions: Tensor | None,
    sums: Sequence[Sums],
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Run one attention call with few keys and add to the running sums: all of them or, if it fails to build, none.

    Args:
        row_lse: ``[B, H, Nq]``, natural, of somebody else's attention; None: it is computed, and the output if there
            is ``v``.
        scale: not negative; mask: expanded to ``[B, H, Nq, Nk]``; regions: ``[1 | B, R, Q]``.

    Returns:
        ``out`` or None, ``row_lse``, ``col_lse`` over the hull of the references; natural.
    """
    call, B, H, Nq, queries, keys, _, unit, out_unit = shape
    p = plan(shape, row_lse is not None)
    hull = min(a for a, _ in keys), max(b for _, b in keys)
    out = None if v is None else torch.empty(B, Nq, H, call.d, dtype=q.dtype, device=q.device).transpose(1, 2)
    rows = torch.empty(B, H, Nq, dtype=torch.float32, device=q.device) if row_lse is None else row_lse
    col_lse = torch.empty(B, H, hull[1] - hull[0], dtype=torch.float32, device=q.device)
    memory = torch.empty(p.workspace, dtype=torch.float32, device=q.device)
    column, g2r, sram = (None if x is None else memory[slice(*x)] for x in (p.column, p.g2r, p.sram))
    factor = max(scale, 1e-30) * LOG2E  # a masked score stays -inf even when the scale is 0
    sizes = (H, Nq, k.shape[2])
    q_strides, k_strides = strides(q, unit), strides(k, unit)
    mask_strides = NONE4 if mask is None else mask.stride()
    launch(
        few_forward.few_forward_kernel, p.forward, q, q_strides, k, k_strides,
        v, NONE3 if v is None else strides(v, unit), mask, mask_strides,
        regions, NONE3 if regions is None else (regions.stride(0) * (regions.shape[0] > 1), *regions.stride()[1:]),
        out, NONE3 if out is None else strides(out, out_unit), rows, column, g2r, sram,
        factor, sizes, queries, hull, p.forward_tiles, call.regions,
    )  # fmt: skip
    r2g, columns = tuple(s.r2g for s in sums), tuple(s.g2r for s in sums)
    mass = tuple(s.mass for s in sums if s.mass is not None) if call.mass else None
    seen = tuple(s.sram for s in sums if s.sram is not None) if call.regions else None
    launch(
        few_attribution.few_attribution_kernel, p.attribution, q, q_strides, k, k_strides, mask, mask_strides,
        rows, column, g2r, sram, col_lse,
        r2g, _flat(r2g, 2), columns, _flat(columns, 2), mass, _flat(mass, 2), seen, _flat(seen, 3),
        factor, sizes, queries, hull, p.spans, p.attribution_tiles, p.splits, call.regions,
    )  # fmt: skip
    return out, rows, col_lse


def _flat(tensors: Sequence[Tensor] | None, axes: int) -> tuple[int, ...] | None:
    """Return the first strides of all tensors, one after the other."""
    return None if tensors is None else tuple(stride for x in tensors for stride in x.stride()[:axes])
