"""Backward of the differentiable op: the equations of :mod:`i2am.ops.gradients`, each side one flash backward."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i2am.ops import sweeps
from i2am.ops.forward import Outputs, Setting, factors, forward, query_weights, within_reach

OWN = ("mass", "expected", "landing")  # what is taken from the forward, besides out and col_lse
VARIANCE = 0.25  # of logits under P from which the mean of ln P need not be exact to the last bit
TINY = 1e-30  # below any sum of C, or of P u
LARGE = 20.0  # nats: from here on the rounding of float32 logits would cost the gradient more than 1e-5
NOTABLE = 5.0  # nats: from here on a small call may be so near one-hot that 1 − p has too few digits in float32


class _Side(NamedTuple):
    """One softmax's part of the gradient: what :func:`i2am.ops.sweeps.backward` takes."""

    left: Tensor  # [B, H, rows, w]
    right: Tensor  # [B, H, columns, w]
    delta: Tensor  # [B, H, rows]
    surprise: Tensor | None = None  # [B, H, rows]
    outputs: int = 0  # columns of left that are the gradient of out


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    regions: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    kept: Outputs,
    grads: dict[str, Tensor | None],
    setting: Setting,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k and v. ``grads`` holds one tensor per field of :class:`Outputs`, or None."""
    given = q.dtype
    if _needs_double(q, k, kept):
        q, k, v = q.double(), k.double(), None if v is None else v.double()
        reads = [name for name in (*OWN, "col_lse") if getattr(kept, name).numel()]
        kept = forward(q, k, v, mask, regions, x, y, setting, reads, "streaming")
    dtype = sweeps.statistic(q.dtype)
    d = {name: None if g is None else g.to(dtype) for name, g in grads.items()}
    joined = kept.col_lse.numel() > 0 and within_reach(kept.row_lse, kept.col_lse, setting)
    gathered, spent = _cross(q, k, mask, regions, kept, d, setting, joined)
    rows = _row_side(q, k, v, regions, x, kept, d, setting, spent, mask is not None)
    columns = _column_side(y, kept, d, setting, gathered)
    dq, dk = torch.zeros_like(q, dtype=dtype), torch.zeros_like(k, dtype=dtype)
    dv = None if v is None else torch.zeros_like(v, dtype=dtype)
    if rows is not None and columns is not None and joined:
        rows, columns = _joined(rows, columns, kept, setting), None
    if rows is not None:
        whole = d["out"] is not None or d["row_lse"] is not None
        at = slice(None) if whole else setting.generated  # elsewhere its gradient is 0
        part = sweeps.backward(
            q[:, :, at],
            k,
            kept.row_lse[:, :, at],
            rows.left[:, :, at],
            rows.right,
            rows.delta[:, :, at],
            scale=setting.scale,
            mask=None if mask is None else mask[:, :, at],
            outputs=rows.outputs,
            surprise=None if rows.surprise is None else rows.surprise[:, :, at],
        )
        dq[:, :, at] += part[0]
        dk += part[1]
        dv = part[2] if rows.outputs else dv
    if columns is not None:
        exchanged = setting.exchanged(q, k, mask)
        part = sweeps.backward(
            lse=kept.col_lse, left=columns.left, right=columns.right, delta=columns.delta, **exchanged
        )
        dk[:, :, setting.hull] += part[0]
        dq[:, :, setting.generated] += part[1]
    return dq.to(given), dk.to(given), None if dv is None else dv.to(given)


def _needs_double(q: Tensor, k: Tensor, kept: Outputs) -> bool:
    """Return whether float32 inputs have logits so large that their gradient is computed in float64."""
    if q.dtype != torch.float32:
        return False
    lse = torch.cat([x.flatten() for x in (kept.row_lse, kept.col_lse)])
    bound = NOTABLE if sweeps.costs_little(q, k) else LARGE
    return bool(lse.masked_fill(lse.isneginf(), 0.0).abs().amax() > bound)


def _cross(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    regions: Tensor | None,
    kept: Outputs,
    d: dict[str, Tensor | None],
    setting: Setting,
    joined: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return what the cross sides add to ε, ``[B, H, hull]``, and to δ, ``[B, H, Q]``; None: nothing."""
    dr2g, values = d["r2g"], _per_key(d)
    # [B, H, Q, n + 1]: the last column sums C itself, which rounded logits leave off 1; near one-hot, ε needs that 1
    weights = None if dr2g is None else torch.cat([dr2g, torch.ones_like(dr2g[:1])]).permute(1, 2, 3, 0)
    row_lse = kept.row_lse[:, :, setting.generated]
    between = None if mask is None else mask[:, :, setting.generated, setting.hull]
    sides: dict[str, Any] = dict(
        q=q[:, :, setting.generated], k=k[:, :, setting.hull], lse=row_lse, scale=setting.scale, mask=between
    )
    spent, gathered = None, None  # [B, H, Q, 1 + R], [B, H, hull, n]
    if joined and weights is not None:
        u, _ = factors(kept.row_lse, kept.col_lse, setting)
        spent, gathered = sweeps.weigh(**sides, values=values, weights=weights * u)
    else:
        if values is not None:
            spent, _ = sweeps.weigh(**sides, values=values)
        if weights is not None:
            gathered, _ = sweeps.weigh(lse=kept.col_lse, values=weights, **setting.exchanged(q, k, mask))
    if gathered is not None:
        gathered = gathered[..., :-1] / gathered[..., -1:].clamp_min(TINY)  # nothing of a fully masked column
        gathered = (gathered * setting.members(gathered, shares=True)).sum(3)
    if spent is not None:
        spent = (spent * query_weights(regions, setting, like=spent)[..., : spent.shape[3]]).sum(3)
    return gathered, spent


def _per_key(d: dict[str, Tensor | None]) -> Tensor | None:
    """Return the gradients of g2r and sram side by side, ``[B, H, hull, 1 + R]``; None where there are none."""
    dg2r, dsram = d["g2r"], d["sram"]
    if dsram is None:
        return None if dg2r is None else dg2r.unsqueeze(3)
    dg2r = torch.zeros_like(dsram[:, :, 0]) if dg2r is None else dg2r
    return torch.cat([dg2r.unsqueeze(2), dsram], 2).transpose(2, 3)


def _row_side(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    regions: Tensor | None,
    x: Tensor | None,
    kept: Outputs,
    d: dict[str, Tensor | None],
    setting: Setting,
    spent: Tensor | None,
    masked: bool,
) -> _Side | None:
    """Return P's part of the gradient, over all queries and keys; None where nothing of it is asked for."""
    (B, H, Nq), Nk = q.shape[:3], k.shape[2]
    dout, dlse, dmass, dexpected, dentropy = d["out"], d["row_lse"], d["mass"], d["expected"], d["entropy"]
    values = _per_key(d)
    if all(g is None for g in (dout, dlse, dmass, dexpected, dentropy, values)):
        return None
    like = kept.row_lse
    left, right = [like.new_empty(B, H, Nq, 0)], [like.new_empty(B, H, Nk, 0)]
    delta = like.new_zeros(B, H, Nq, 1)
    members = setting.members(like)  # [hull, n]
    if dout is not None and v is not None:
        left.append(dout)
        right.append(v.to(like))
        delta += (dout * kept.out.to(like)).sum(3, keepdim=True)
    generated: list[tuple[Tensor, Tensor]] = []  # columns over the generated queries and over the hull
    own = like.new_zeros(B, H, setting.queries[1] - setting.queries[0])
    if dexpected is not None and x is not None:
        shared = (members[:, :, None] * x.to(like)[:, :, None]).flatten(2).unsqueeze(1)  # [1 | B, 1, hull, n c]
        generated.append((dexpected.permute(1, 2, 3, 0, 4).flatten(3), shared))
        own += (dexpected * kept.expected).sum((0, 4))
    if dmass is not None:
        generated.append((dmass.permute(1, 2, 3, 0), members))
        own += (dmass * kept.mass).sum(0)
    if values is not None and spent is not None:
        generated.append((query_weights(regions, setting, like=like)[..., : values.shape[3]], values))
        own += spent
    for over_queries, over_keys in generated:
        left.append(setting.among_queries(over_queries, Nq).expand(B, H, -1, -1))
        right.append(setting.among_keys(over_keys, Nk).expand(B, H, -1, -1))
    delta += setting.among_queries(own.unsqueeze(3), Nq)
    if dlse is not None:
        delta -= dlse.unsqueeze(3)
    surprise = None
    if dentropy is not None and _spread(kept.entropy, Nk) and not masked:
        # ln P = S − L, and S is a product of q and k: d more columns, instead of passes over every tile
        over_queries = -dentropy.unsqueeze(3) * setting.scale * q[:, :, setting.generated].to(like)
        left.append(setting.among_queries(over_queries, Nq))
        right.append(k.to(like))
        mean = kept.row_lse[:, :, setting.generated] - kept.entropy
        delta -= setting.among_queries((dentropy * mean).unsqueeze(3), Nq)
    elif dentropy is not None:
        surprise = setting.among_queries(-dentropy.unsqueeze(3), Nq).squeeze(3)
    outputs = 0 if dout is None else dout.shape[3]
    return _Side(torch.cat(left, 3), torch.cat(right, 3), delta.squeeze(3), surprise, outputs)


def _spread(entropy: Tensor, keys: int) -> bool:
    """Return whether P is so far from uniform that rounding its mean of ln P costs the gradient less than 1e-5.

    For logits that deviate little, their variance under P is ``2 (ln keys − entropy)``.
    """
    return entropy.dtype == torch.float32 and bool((math.log(keys) - entropy).amin() > VARIANCE / 2)


def _column_side(
    y: Tensor | None, kept: Outputs, d: dict[str, Tensor | None], setting: Setting, gathered: Tensor | None
) -> _Side | None:
    """Return C's part of the gradient, with the hull's keys as rows; None where nothing of it is asked for."""
    dlse, dr2g, dlanding = d["col_lse"], d["r2g"], d["landing"]
    if dlse is None and dr2g is None and dlanding is None:
        return None
    like = kept.col_lse
    B, H, K = like.shape
    left = [like.new_empty(B, H, K, 0)]
    right = [like.new_empty(B, H, setting.queries[1] - setting.queries[0], 0)]
    epsilon = torch.zeros_like(like)
    if dr2g is not None and gathered is not None:
        left.append(setting.members(like, shares=True).expand(B, H, -1, -1))
        right.append(dr2g.permute(1, 2, 3, 0))
        epsilon += gathered
    if dlanding is not None and y is not None:
        left.append(dlanding)
        right.append(y.to(like).unsqueeze(1).expand(B, H, -1, -1))
        epsilon += (dlanding * kept.landing).sum(3)
    if dlse is not None:
        epsilon -= dlse
    return _Side(torch.cat(left, 3), torch.cat(right, 3), epsilon)


def _joined(rows: _Side, columns: _Side, kept: Outputs, setting: Setting) -> _Side:
    """Return both parts as P's: ``C ∘ (…) = P ∘ u wᵀ ∘ (…)``."""
    Nq, Nk = rows.left.shape[2], rows.right.shape[2]
    u, w = factors(kept.row_lse, kept.col_lse, setting)  # [B, H, Q, 1], [B, H, hull, 1]
    over_queries = torch.cat([columns.right, -torch.ones_like(u)], 3) * u
    over_keys = torch.cat([columns.left, columns.delta.unsqueeze(3)], 3) * w
    return rows._replace(
        left=torch.cat([rows.left, setting.among_queries(over_queries, Nq)], 3),
        right=torch.cat([rows.right, setting.among_keys(over_keys, Nk)], 3),
    )
