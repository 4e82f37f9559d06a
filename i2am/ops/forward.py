"""Forward of the differentiable op: what is read, from the fused op and from plain attentions on wider values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i2am.ops import sweeps

READS = ("r2g", "g2r", "mass", "sram", "expected", "landing", "entropy", "col_lse")  # as the custom op is asked
REACH = {torch.float32: 60.0, torch.float64: 500.0}  # max L − min M (nats) up to which both sides are one
CLOSE = 20.0  # nats of a log-sum-exp up to which ln P = S − L has an error of 1e-6
BASE = frozenset({"r2g", "g2r", "sram"})  # what the fused op computes; the rest is one plain attention

Span = tuple[int, int]


class Outputs(NamedTuple):
    """Results of the custom op; empty where it was not asked for. The hull spans all references' keys.

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
    """Settings that forward and backward agree on besides tensors."""

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
        """Return reference ``n``'s keys within the hull."""
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
        """Take the reference keys as queries of the generated queries: whose row softmax is C, transposed."""
        between = None if mask is None else mask[:, :, self.generated, self.hull].transpose(2, 3)
        return dict(q=k[:, :, self.hull], k=q[:, :, self.generated], scale=self.scale, mask=between)


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
    """Return what ``reads`` names, and ``out`` and ``row_lse``; no two share memory.

    Shapes: :class:`Outputs`, and :func:`i2am.ops.gradients.attention_maps` for the arguments.
    """
    B, H = q.shape[:2]
    dtype = sweeps.statistic(q.dtype)
    fused = bool(BASE & set(reads))
    asked = Outputs(q.new_empty(0), *(q.new_empty(0, dtype=dtype) for _ in Outputs._fields[1:]))
    if fused and dtype == torch.float32:
        asked = _fused(q, k, v, mask, regions, setting, reads, backend, asked)
        v = None
        further = {"expected", "landing", "entropy"} & set(reads)
        close = "entropy" not in reads or float(_magnitude(asked.row_lse)) <= CLOSE
        if further and close and within_reach(asked.row_lse, asked.col_lse, setting):
            return _beside(q, k, mask, x, y, setting, reads, asked)
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
        if entropy is not None:
            asked = asked._replace(entropy=entropy[:, :, setting.generated].clone())
    if "landing" in reads or ((fused or "col_lse" in reads) and asked.col_lse.numel() == 0):
        values = q.new_empty(B, H, setting.queries[1] - setting.queries[0], 0, dtype=dtype)
        values = values if y is None else y.to(dtype).unsqueeze(1).expand(B, H, -1, -1)
        landing, col_lse, _ = sweeps.attend(values=values, **setting.exchanged(q, k, mask))
        asked = asked if y is None else asked._replace(landing=landing.contiguous())
        asked = asked._replace(col_lse=col_lse if asked.col_lse.numel() == 0 else asked.col_lse)
    return asked if asked.r2g.numel() or not fused else _crossed(q, k, mask, regions, setting, asked)


def _crossed(
    q: Tensor, k: Tensor, mask: Tensor | None, regions: Tensor | None, setting: Setting, asked: Outputs
) -> Outputs:
    """Return r2g, g2r and sram in float64, which the fused op does not keep: a sweep for each side."""
    weights = query_weights(regions, setting, like=asked.row_lse).expand(*q.shape[:2], -1, -1)
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
    asked = asked._replace(
        r2g=r2g.permute(3, 0, 1, 2).clone(memory_format=torch.contiguous_format), g2r=spent[..., 0].clone()
    )
    return (
        asked
        if regions is None
        else asked._replace(sram=spent[..., 1:].transpose(2, 3).clone(memory_format=torch.contiguous_format))
    )


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


def _beside(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    setting: Setting,
    reads: Sequence[str],
    asked: Outputs,
) -> Outputs:
    """Return expected, landing and entropy, both sides' normalisers being known: one sweep for all three."""
    (B, H), Q, n = q.shape[:2], setting.queries[1] - setting.queries[0], len(setting.keys)
    span = slice(0, k.shape[2]) if "entropy" in reads else setting.hull  # the entropy is one over all keys
    values = weights = entropy = None
    if x is not None:
        shared = (setting.members(asked.row_lse)[:, :, None] * x.to(asked.row_lse)[:, :, None]).flatten(2)
        shared = setting.among_keys(shared, k.shape[2])[:, span]  # [1 | B, keys, n c]
        values = shared.unsqueeze(1).expand(B, H, -1, -1)
    u, w = factors(asked.row_lse, asked.col_lse, setting)  # [B, H, Q, 1], [B, H, hull, 1]
    if y is not None:
        weights = y.to(u).unsqueeze(1) * u  # [B, H, Q, c]
    if "entropy" in reads:
        entropy = asked.row_lse.new_empty(B, H, Q)
    places, landing = sweeps.weigh(
        q[:, :, setting.generated],
        k[:, :, span],
        asked.row_lse[:, :, setting.generated],
        scale=setting.scale,
        mask=None if mask is None else mask[:, :, setting.generated, span],
        values=values,
        weights=weights,
        entropy=entropy,
    )
    if places is not None and x is not None:
        places = places.reshape(B, H, Q, n, x.shape[2]).permute(3, 0, 1, 2, 4)
        asked = asked._replace(expected=places)
    if landing is not None:
        inside = slice(setting.hull.start - span.start, setting.hull.stop - span.start)
        asked = asked._replace(landing=landing[:, :, inside] * w)
    return asked if entropy is None else asked._replace(entropy=entropy)


def within_reach(row_lse: Tensor, col_lse: Tensor, setting: Setting) -> bool:
    """Return whether C can be had from P: the largest L lies no more than REACH above the smallest M."""
    lowest = col_lse.masked_fill(col_lse.isneginf(), float("inf")).amin()  # what is fully masked has no say
    return bool(row_lse[:, :, setting.generated].amax() - lowest <= REACH[row_lse.dtype])


def factors(row_lse: Tensor, col_lse: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Return ``u [B, H, Q, 1]`` and ``w [B, H, hull, 1]`` with ``C = P ∘ u wᵀ``, around each head's middle."""
    row_lse = row_lse[:, :, setting.generated]
    low = col_lse.masked_fill(col_lse.isneginf(), float("inf")).amin(2, keepdim=True)
    middle = ((row_lse.amax(2, keepdim=True) + low) / 2).nan_to_num(0.0, 0.0, 0.0)  # [B, H, 1]
    u = (row_lse - middle).exp()
    w = (middle - col_lse).exp().masked_fill(col_lse.isneginf(), 0.0)
    return u.unsqueeze(3), w.unsqueeze(3)


def _magnitude(lse: Tensor) -> Tensor:
    """Return the largest magnitude among log-sum-exps, fully masked ones apart."""
    return lse.masked_fill(lse.isneginf(), 0.0).abs().amax()


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
        places = wide[..., at : at + n * x.shape[2]].reshape(*wide.shape[:3], n, x.shape[2])  # [B, H, Q, n, c]
        asked, at = (
            asked._replace(expected=places.permute(3, 0, 1, 2, 4).clone(memory_format=torch.contiguous_format)),
            at + n * x.shape[2],
        )
    if "mass" in reads and asked.mass.numel() == 0:
        asked = asked._replace(
            mass=wide[..., at : at + n].permute(3, 0, 1, 2).clone(memory_format=torch.contiguous_format)
        )
    return asked


def _tokens_first(out: Tensor) -> Tensor:
    """Return ``out [B, H, N, d]`` with tokens before heads in memory, as torch's own attention leaves it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def query_weights(regions: Tensor | None, setting: Setting, like: Tensor) -> Tensor:
    """Return the weights over the generated queries that g2r and sram are means with: ``[1 | B, 1, Q, 1 + R]``."""
    count = setting.queries[1] - setting.queries[0]
    mean = like.new_full((1, 1, count), 1.0 / count)
    weights = mean if regions is None else torch.cat([mean.expand(len(regions), -1, -1), regions.to(like)], 1)
    return weights.transpose(1, 2).unsqueeze(1)
