"""The differentiable op: attention, its attribution and further read-outs, O(N) memory forwards and backwards.

``P`` is the softmax over all keys, ``C`` the one over the generated queries 𝒬; 𝒦 is one reference's keys. Every read-out
is linear in P or C. What is a vector per *normalised* row or column is its own side, the rest crosses:

================  ==========================================  =======================================
                  own side                                    cross side
================  ==========================================  =======================================
P                 ``out, mass, expected, entropy, row_lse``   ``g2r, sram`` (per key)
C                 ``landing, col_lse`` (per key)              ``r2g`` (per query)
================  ==========================================  =======================================

With ``S`` the logits, L and M the row and column log-sum-exps, the chain rule gives::

    dS = P ∘ (dP − δ_i) + C ∘ (dC − ε_j)
    dP_ij = dout_i·V_j + dexpected_i·x_j + dmass_i + W_i·dG_j − dentropy_i ln P_ij      δ_i = Σ_j P_ij dP_ij − dL_i
    dC_ij = dr2g_i / |𝒦| + y_i·dlanding_j                                             ε_j = Σ_i C_ij dC_ij − dM_j

``dP`` and ``dC`` are products of a few columns, so each side is one flash backward (:func:`i2am.ops.sweeps.backward`).
The own sides' shares of δ and ε are known from the outputs; those of the cross sides take one sweep. Where their range
allows, both sides are one: ``C = P ∘ u wᵀ`` with ``u = exp(L − c)``, ``w = exp(c − M)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i2am.ops import sweeps

READS = ("r2g", "g2r", "mass", "sram", "expected", "landing", "entropy", "col_lse")  # as the custom op is asked
OWN = ("mass", "expected", "landing", "entropy")  # what the backward takes from the forward, besides out and col_lse
BASE = frozenset({"r2g", "g2r", "sram"})  # what the fused op computes; the rest is one plain attention
REACH = {torch.float32: 60.0, torch.float64: 500.0}  # max L − min M (nats) up to which both sides are one
LARGE = 20.0  # nats: from here on the rounding of float32 logits would cost the gradient more than 1e-5

Span = tuple[int, int]


class Outputs(NamedTuple):
    """What the custom op returns; empty where it was not asked for. The hull spans all references' keys.

    ``n`` references, ``Q`` generated queries, ``K`` keys in the hull, ``R`` regions, ``c`` coordinates.
    """

    out: Tensor  # [B, H, Nq, dv]
    row_lse: Tensor  # [B, H, Nq]
    col_lse: Tensor  # [B, H, K]
    r2g: Tensor  # [n, B, H, Q]
    g2r: Tensor  # [B, H, K]
    mass: Tensor  # [n, B, H, Q]
    sram: Tensor  # [B, H, R, K]
    expected: Tensor  # [n, B, H, Q, c]
    landing: Tensor  # [B, H, K, c]
    entropy: Tensor  # [B, H, Q]


class Setting(NamedTuple):
    """What forward and backward agree on besides tensors."""

    scale: float
    queries: Span
    keys: list[Span]

    @classmethod
    def of(cls, scale: float, queries: list[int], keys: list[int]) -> Setting:
        return cls(scale, (queries[0], queries[1]), list(zip(keys[::2], keys[1::2], strict=True)))

    @property
    def generated(self) -> slice:
        """The generated queries."""
        return slice(*self.queries)

    @property
    def hull(self) -> slice:
        """From the first reference key to the last."""
        return slice(min(a for a, _ in self.keys), max(b for _, b in self.keys))

    def within(self, n: int) -> slice:
        """Reference ``n``'s keys within the hull."""
        return slice(self.keys[n][0] - self.hull.start, self.keys[n][1] - self.hull.start)

    def members(self, like: Tensor, *, shares: bool = False) -> Tensor:
        """Return ``[hull, n]``: 1 (or ``1 / |𝒦|``) where a key is one of reference ``n``'s."""
        inside = like.new_zeros(self.hull.stop - self.hull.start, len(self.keys))
        for n, (start, stop) in enumerate(self.keys):
            inside[self.within(n), n] = 1.0 / (stop - start) if shares else 1.0
        return inside

    def among_keys(self, x: Tensor, length: int) -> Tensor:
        """Return ``x [..., hull, w]`` among all keys, with zeros around: ``[..., length, w]``."""
        return torch.nn.functional.pad(x, (0, 0, self.hull.start, length - self.hull.stop))

    def among_queries(self, x: Tensor, length: int) -> Tensor:
        """Return ``x [..., Q, w]`` among all queries, with zeros around: ``[..., length, w]``."""
        return torch.nn.functional.pad(x, (0, 0, self.queries[0], length - self.queries[1]))

    def exchanged(self, q: Tensor, k: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """The reference keys as queries of the generated queries: whose row softmax is C, transposed."""
        between = None if mask is None else mask[:, :, self.generated, self.hull].transpose(2, 3)
        return dict(q=k[:, :, self.hull], k=q[:, :, self.generated], scale=self.scale, mask=between)


# ---------------------------------------------------------------------------------------------------------- forward


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    regions: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    setting: Setting,
    reads: Sequence[str],
    backend: str,
) -> Outputs:
    """Return what ``reads`` names, and ``out`` and ``row_lse``. Shapes: :class:`Outputs`, :func:`attention_maps`."""
    B, H, Nq, _ = q.shape
    dtype = sweeps.statistic(q.dtype)
    none, fused = q.new_empty(0, dtype=dtype), bool(BASE & set(reads))
    asked = Outputs(q.new_empty(0), none, none, none, none, none, none, none, none, none)
    if fused and dtype == torch.float32:
        asked = _fused(q, k, v, mask, regions, setting, reads, backend, asked)
        v = None
    side = _own_columns(q, k, v, x, setting, reads, dtype)
    if side is not None or asked.row_lse.numel() == 0 or "entropy" in reads:
        wide, row_lse, entropy = sweeps.attend(
            q,
            k,
            q.new_empty(B, H, k.shape[2], 0, dtype=dtype) if side is None else side,
            scale=setting.scale,
            mask=mask,
            entropy="entropy" in reads,
        )
        asked = _split(wide, v, x, setting, reads, asked)
        asked = asked._replace(row_lse=row_lse if asked.row_lse.numel() == 0 else asked.row_lse)
        asked = asked._replace(entropy=none if entropy is None else entropy[:, :, setting.generated].contiguous())
    if "landing" in reads or ((fused or "col_lse" in reads) and asked.col_lse.numel() == 0):
        values = q.new_empty(B, H, setting.queries[1] - setting.queries[0], 0, dtype=dtype)
        values = values if y is None else y.to(dtype).unsqueeze(1).expand(B, H, -1, -1)
        landing, col_lse, _ = sweeps.attend(values=values, **setting.exchanged(q, k, mask))
        asked = asked._replace(landing=none if y is None else landing.contiguous())
        asked = asked._replace(col_lse=col_lse if asked.col_lse.numel() == 0 else asked.col_lse)
    return asked if asked.r2g.numel() or not fused else _crossed(q, k, mask, regions, setting, asked)


def _crossed(
    q: Tensor, k: Tensor, mask: Tensor | None, regions: Tensor | None, setting: Setting, asked: Outputs
) -> Outputs:
    """Return r2g, g2r and sram in float64, which the fused op does not keep: a sweep for each side."""
    weights = _query_weights(regions, setting, like=asked.row_lse).expand(*q.shape[:2], -1, -1)
    between = None if mask is None else mask[:, :, setting.generated, setting.hull]
    _, spent = sweeps.weigh(
        q[:, :, setting.generated],
        k[:, :, setting.hull],
        asked.row_lse[:, :, setting.generated],
        scale=setting.scale,
        mask=between,
        weights=weights,
    )
    shares = setting.members(asked.col_lse, shares=True).expand(*q.shape[:2], -1, -1)
    _, r2g = sweeps.weigh(lse=asked.col_lse, weights=shares, **setting.exchanged(q, k, mask))
    if spent is None or r2g is None:
        raise AssertionError("weigh was given weights")
    asked = asked._replace(r2g=r2g.permute(3, 0, 1, 2).contiguous(), g2r=spent[..., 0].contiguous())
    return asked if regions is None else asked._replace(sram=spent[..., 1:].transpose(2, 3).contiguous())


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    regions: Tensor | None,
    setting: Setting,
    reads: Sequence[str],
    backend: str,
    asked: Outputs,
) -> Outputs:
    """Return what the fused op computes: exactly what it returns where nothing requires a gradient."""
    (B, H), n, Q = q.shape[:2], len(setting.keys), setting.queries[1] - setting.queries[0]
    widths = [stop - start for start, stop in setting.keys]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=q.device)

    r2g, mass = zeros(n, B, H, Q), zeros(n, B, H, Q) if "mass" in reads else None
    g2r = [zeros(B, H, width) for width in widths]
    sram = [] if regions is None else [zeros(B, H, regions.shape[1], width) for width in widths]
    out, row_lse, col_lse = torch.ops.i2am.attention(
        q,
        k,
        v,
        mask,
        regions,
        setting.scale,
        list(setting.queries),
        [edge for span in setting.keys for edge in span],
        list(r2g),
        g2r,
        [] if mass is None else list(mass),
        sram,
        backend,
    )
    among = zeros(B, H, setting.hull.stop - setting.hull.start)
    everywhere = None if regions is None else zeros(B, H, regions.shape[1], among.shape[2])
    for i in range(n):
        among[..., setting.within(i)] = g2r[i]
        if everywhere is not None:
            everywhere[..., setting.within(i)] = sram[i]
    return asked._replace(
        out=asked.out if v is None else out,
        row_lse=row_lse,
        col_lse=col_lse,
        r2g=r2g,
        g2r=among,
        mass=asked.mass if mass is None else mass,
        sram=asked.sram if everywhere is None else everywhere,
    )


def _own_columns(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    x: Tensor | None,
    setting: Setting,
    reads: Sequence[str],
    dtype: torch.dtype,
) -> Tensor | None:
    """Return the values ``[B, H, Nk, w]`` of the own side of P: v, each reference's coordinates, its membership."""
    (B, H), Nk = q.shape[:2], k.shape[2]
    columns = [] if v is None else [v.to(dtype)]
    members = setting.members(k.new_empty(0, dtype=dtype))  # [hull, n]
    if x is not None:
        shared = (members[:, :, None] * x.to(dtype)[:, :, None]).flatten(2)  # [1 | B, hull, n c]
        columns.append(setting.among_keys(shared, Nk).unsqueeze(1).expand(B, H, -1, -1))
    if "mass" in reads and (dtype == torch.float64 or not BASE & set(reads)):
        columns.append(setting.among_keys(members, Nk).expand(B, H, -1, -1))
    return torch.cat(columns, 3) if columns else None


def _split(
    wide: Tensor, v: Tensor | None, x: Tensor | None, setting: Setting, reads: Sequence[str], asked: Outputs
) -> Outputs:
    """Return the read-outs that :func:`_own_columns` has put side by side."""
    n, at = len(setting.keys), 0
    if v is not None:
        at = v.shape[3]
        asked = asked._replace(out=_tokens_first(wide[..., :at].to(v.dtype)))
    wide = wide[:, :, setting.generated]
    if x is not None:
        places = wide[..., at : at + n * x.shape[2]].unflatten(3, (n, -1))  # [B, H, Q, n, c]
        asked, at = asked._replace(expected=places.permute(3, 0, 1, 2, 4).contiguous()), at + n * x.shape[2]
    if "mass" in reads and asked.mass.numel() == 0:
        asked = asked._replace(mass=wide[..., at : at + n].permute(3, 0, 1, 2).contiguous())
    return asked


def _tokens_first(out: Tensor) -> Tensor:
    """Return ``out [B, H, N, d]`` with tokens before heads in memory, as torch's own attention leaves it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


# --------------------------------------------------------------------------------------------------------- backward


class _Side(NamedTuple):
    """One softmax's part of the gradient: ``dS = P ∘ (left rightᵀ + surprise ln P − delta)``."""

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
    if _large(given, kept):
        q, k, v = q.double(), k.double(), None if v is None else v.double()
        reads = [name for name in (*OWN, "col_lse") if getattr(kept, name).numel()]
        kept = forward(q, k, v, mask, regions, x, y, setting, reads, "streaming")
    dtype = sweeps.statistic(q.dtype)
    d = {name: None if g is None else g.to(dtype) for name, g in grads.items()}
    reach = kept.row_lse[:, :, setting.generated].amax() - _lowest(kept.col_lse) if kept.col_lse.numel() else None
    joined = reach is not None and bool(reach <= REACH[dtype])
    gathered, spent = _cross(q, k, mask, regions, kept, d, setting, joined)
    rows = _row_side(q, k, v, regions, x, kept, d, setting, spent)
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


def _large(dtype: torch.dtype, kept: Outputs) -> bool:
    """Return whether float32 inputs have logits so large that their gradient is computed in float64."""
    if dtype != torch.float32:
        return False
    lse = torch.cat([x.flatten() for x in (kept.row_lse, kept.col_lse)])
    return bool(lse.masked_fill(lse.isneginf(), 0.0).abs().amax() > LARGE)


def _lowest(lse: Tensor) -> Tensor:
    """Return the smallest of those that are finite: what is fully masked has no say."""
    return lse.masked_fill(lse.isneginf(), float("inf")).amin()


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
    weights = None if dr2g is None else dr2g.permute(1, 2, 3, 0)  # [B, H, Q, n]
    row_lse = kept.row_lse[:, :, setting.generated]
    between = None if mask is None else mask[:, :, setting.generated, setting.hull]
    sides = dict(q=q[:, :, setting.generated], k=k[:, :, setting.hull], lse=row_lse, scale=setting.scale, mask=between)
    spent, gathered = None, None  # [B, H, Q, 1 + R], [B, H, hull, n]
    if joined and weights is not None:
        u, w = _factors(kept, setting)
        spent, gathered = sweeps.weigh(**sides, values=values, weights=weights * u)
        gathered = None if gathered is None else gathered * w
    else:
        if values is not None:
            spent, _ = sweeps.weigh(**sides, values=values)
        if weights is not None:
            gathered, _ = sweeps.weigh(lse=kept.col_lse, values=weights, **setting.exchanged(q, k, mask))
    if gathered is not None:
        gathered = (gathered * setting.members(gathered, shares=True)).sum(3)
    if spent is not None:
        spent = (spent * _query_weights(regions, setting, like=spent)[..., : spent.shape[3]]).sum(3)
    return gathered, spent


def _per_key(d: dict[str, Tensor | None]) -> Tensor | None:
    """Return the gradients of g2r and sram side by side, ``[B, H, hull, 1 + R]``; None where there are none."""
    dg2r, dsram = d["g2r"], d["sram"]
    if dsram is None:
        return None if dg2r is None else dg2r.unsqueeze(3)
    dg2r = torch.zeros_like(dsram[:, :, 0]) if dg2r is None else dg2r
    return torch.cat([dg2r.unsqueeze(2), dsram], 2).transpose(2, 3)


def _query_weights(regions: Tensor | None, setting: Setting, like: Tensor) -> Tensor:
    """Return the weights over the generated queries that g2r and sram are means with: ``[1 | B, 1, Q, 1 + R]``."""
    count = setting.queries[1] - setting.queries[0]
    mean = like.new_full((1, 1, count), 1.0 / count)
    weights = mean if regions is None else torch.cat([mean.expand(len(regions), -1, -1), regions.to(like)], 1)
    return weights.transpose(1, 2).unsqueeze(1)


def _factors(kept: Outputs, setting: Setting) -> tuple[Tensor, Tensor]:
    """Return ``u [B, H, Q, 1]`` and ``w [B, H, hull, 1]`` with ``C = P ∘ u wᵀ``, around each head's middle."""
    row_lse, col_lse = kept.row_lse[:, :, setting.generated], kept.col_lse
    low = col_lse.masked_fill(col_lse.isneginf(), float("inf")).amin(2, keepdim=True)
    middle = ((row_lse.amax(2, keepdim=True) + low) / 2).nan_to_num(0.0, 0.0, 0.0)  # [B, H, 1]
    u = (row_lse - middle).exp()
    w = (middle - col_lse).exp().masked_fill(col_lse.isneginf(), 0.0)
    return u.unsqueeze(3), w.unsqueeze(3)


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
        generated.append((_query_weights(regions, setting, like=like)[..., : values.shape[3]], values))
        own += spent
    if dentropy is not None:
        own += dentropy * kept.entropy
    for over_queries, over_keys in generated:
        left.append(setting.among_queries(over_queries, Nq).expand(B, H, -1, -1))
        right.append(setting.among_keys(over_keys, Nk).expand(B, H, -1, -1))
    delta += setting.among_queries(own.unsqueeze(3), Nq)
    if dlse is not None:
        delta -= dlse.unsqueeze(3)
    surprise = None if dentropy is None else setting.among_queries(-dentropy.unsqueeze(3), Nq).squeeze(3)
    outputs = 0 if dout is None else dout.shape[3]
    return _Side(torch.cat(left, 3), torch.cat(right, 3), delta.squeeze(3), surprise, outputs)


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
    u, w = _factors(kept, setting)  # [B, H, Q, 1], [B, H, hull, 1]
    over_queries = torch.cat([columns.right, -torch.ones_like(columns.right[..., :1])], 3) * u
    over_keys = torch.cat([columns.left, columns.delta.unsqueeze(3)], 3) * w
    return rows._replace(
        left=torch.cat([rows.left, setting.among_queries(over_queries, Nq)], 3),
        right=torch.cat([rows.right, setting.among_keys(over_keys, Nk)], 3),
    )


# --------------------------------------------------------------------------------------------------- the custom ops


@torch.library.custom_op("i2am::attention_maps", mutates_args=())
def attention_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    regions: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    scale: float,
    queries: list[int],
    keys: list[int],
    reads: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return :class:`Outputs`: the functional op, which carries the gradient.

    Args:
        q, k, v, mask: as in :func:`i2am.attention`, the mask of full shape.
        regions: ``[1 | B, R, Q]`` weights, each summing to 1.
        x: ``[1 | B, hull, c]`` coordinates of the keys.
        y: ``[1 | B, Q, c]`` coordinates of the generated queries.
        scale: multiplies ``q kᵀ``.
        queries: start and stop of 𝒬.
        keys: start and stop of each reference, one after the other.
        reads: names of :data:`READS`, with commas between (custom ops take no list of strings).
        backend: of the fused op.
    """
    return tuple(forward(q, k, v, mask, regions, x, y, Setting.of(scale, queries, keys), reads.split(","), backend))


@attention_maps.register_fake
def _(q, k, v, mask, regions, x, y, scale, queries, keys, reads, backend):  # type: ignore[no-untyped-def]
    (B, H, Nq, _), n, Q, reads = q.shape, len(keys) // 2, queries[1] - queries[0], reads.split(",")
    K = max(keys[1::2]) - min(keys[::2])
    fused, column = BASE & set(reads), BASE & set(reads) or {"landing", "col_lse"} & set(reads)

    def new(asked: object, *shape: int) -> Tensor:
        return q.new_empty(shape if asked else (0,), dtype=sweeps.statistic(q.dtype))

    fields = Outputs(
        out=q.new_empty(0) if v is None else q.new_empty(B, Nq, H, v.shape[-1]).transpose(1, 2),
        row_lse=new(True, B, H, Nq),
        col_lse=new(column, B, H, K),
        r2g=new(fused, n, B, H, Q),
        g2r=new(fused, B, H, K),
        mass=new("mass" in reads, n, B, H, Q),
        sram=new(fused and regions is not None, B, H, 0 if regions is None else regions.shape[1], K),
        expected=new(x is not None, n, B, H, Q, 0 if x is None else x.shape[2]),
        landing=new("landing" in reads, B, H, K, 0 if y is None else y.shape[2]),
        entropy=new("entropy" in reads, B, H, Q),
    )
    return tuple(fields)


@torch.library.custom_op("i2am::attention_maps_backward", mutates_args=())
def attention_maps_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    regions: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    scale: float,
    queries: list[int],
    keys: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v (empty without v). ``kept`` and ``grads`` in the order of :class:`Outputs`."""
    setting = Setting.of(scale, queries, keys)
    named = dict(zip(Outputs._fields, grads, strict=True))
    with torch.autocast(q.device.type, enabled=False):  # the model's own autocast must not reach the statistics
        dq, dk, dv = backward(q, k, v, mask, regions, x, y, Outputs(*kept), named, setting)
    return dq.contiguous(), dk.contiguous(), q.new_empty(0) if dv is None else dv.contiguous()


@attention_maps_backward.register_fake
def _(q, k, v, mask, regions, x, y, kept, grads, scale, queries, keys):  # type: ignore[no-untyped-def]
    shapes = [q.shape, k.shape, (0,) if v is None else v.shape]
    return tuple(q.new_empty(shape) for shape in shapes)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the backward needs: the inputs and vectors, nothing of size Nq × Nk."""
    ctx.set_materialize_grads(False)
    *tensors, scale, queries, keys, _, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.setting = scale, queries, keys


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    tensors, kept = saved[:7], saved[7:]
    if all(g is None for g in grads):
        return (None,) * 12
    dq, dk, dv = attention_maps_backward(*tensors, list(kept), list(grads), *ctx.setting)
    return dq, dk, None if tensors[2] is None else dv, *(None,) * 9


def _no_second(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "i2am's read-outs have no second derivative (a gradient penalty, create_graph=True or a Hessian needs one): "
        "compute that term with backend='reference'"
    )


attention_maps.register_autograd(_gradient, setup_context=_keep)
attention_maps_backward.register_autograd(_no_second)
