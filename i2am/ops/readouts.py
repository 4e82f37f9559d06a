"""Read-outs of one attention call, vectors per query or key, with gradients: what ``attention(..., read=)`` gives.

The front door of :mod:`i2am.ops.gradients`: selectors and coordinates are read, what has no gradient is refused, token
sets with gaps are brought together. ``backend="reference"`` is the float64 twin, by plain autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i2am.ops import gradients, naive, sweeps
from i2am.ops.checks import check_call, refuse_gradient, refuse_undifferentiable
from i2am.ops.forward import READS as STREAMED
from i2am.ops.forward import Outputs
from i2am.ops.results import Readouts
from i2am.ops.tokens import Selector, TokenSet, gather, inverse, on_device

READS = ("r2g", "g2r", "mass", "col_lse", "sram", "expected", "landing", "entropy", "columns", "log_p", "log_c")
FEW = {"columns", "log_p", "log_c"}  # read beside the op, from the log-sum-exps
NEEDS = {  # which argument a read-out needs
    "sram": "regions",
    "expected": "key_coordinates",
    "landing": "query_coordinates",
    "columns": "columns",
    "log_p": "pairs",
    "log_c": "pairs",
}


class _Asked(NamedTuple):
    """One checked call: token sets, and everything else as tensors over them."""

    read: frozenset[str]
    scale: float
    mask: Tensor | None  # [B, H, Nq, Nk]
    queries: TokenSet
    keys: list[TokenSet]
    regions: Tensor | None  # [1 | B, R, Q]
    key_coordinates: list[Tensor] | None  # [1 | B, K, c] per reference
    query_coordinates: Tensor | None  # [1 | B, Q, c]
    columns: list[TokenSet] | None  # per reference, among its keys
    pairs: list[Tensor] | None  # [1 | B, M, 2] per reference


def readouts(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    read: Sequence[str],
    queries: Selector = None,
    keys: Sequence[Selector] = (None,),
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    regions: Tensor | None = None,
    key_coordinates: Sequence[Tensor] | None = None,
    query_coordinates: Tensor | None = None,
    columns: Sequence[Selector] | None = None,
    pairs: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> list[Readouts]:
    """Read one attention call about several references; differentiable in q, k and v.

    Args:
        q, k, v, scale, attn_mask, queries, backend: as in :func:`i2am.attention`; ``v=None`` computes no output.
        read: names of :data:`READS`.
        keys: one selector per reference.
        regions: ``[R, Q]`` or ``[1 | B, R, Q]`` non-negative weights over the generated queries, for ``sram``; each
            region is divided by its sum.
        key_coordinates: one ``[K, c]`` or ``[1 | B, K, c]`` per reference, for ``expected``: any c numbers per key.
        query_coordinates: ``[Q, c]`` or ``[1 | B, Q, c]``, for ``landing``.
        columns: one selector per reference among its keys, for ``columns``.
        pairs: one ``[M, 2]`` or ``[1 | B, M, 2]`` of integers per reference, (generated query, reference key), for
            ``log_p`` and ``log_c``.

    Returns:
        One :class:`Readouts` per reference; ``out``, ``row_lse`` and ``entropy`` are the same in each.

    Raises:
        ValueError: as :func:`i2am.attention`, or a read-out lacks its argument, or an argument its read-out.
        NotImplementedError: a gradient is asked for that is not given: of the mask, the regions or the coordinates;
            forward mode.
    """
    scale, mask, backend = check_call(q, k, v, scale, attn_mask, backend)
    given = {"regions": regions, "key_coordinates": key_coordinates, "query_coordinates": query_coordinates}
    _check_names(read, {**given, "columns": columns, "pairs": pairs})
    chosen = [TokenSet.of(selector, k.shape[2], "keys") for selector in keys]
    generated = TokenSet.of(queries, q.shape[2], "queries")
    B = q.shape[0]
    asked = _Asked(
        frozenset(read),
        scale,
        mask,
        generated,
        chosen,
        None if regions is None else _regions(regions, B, generated.count),
        None if key_coordinates is None else _coordinates(key_coordinates, B, chosen),
        None if query_coordinates is None else _coordinate(query_coordinates, B, generated.count, "query_coordinates"),
        None if columns is None else _columns(columns, chosen),
        None if pairs is None else _pairs(pairs, B, generated, chosen),
    )
    if backend == "reference":
        return _naive(q, k, v, asked)
    refuse_undifferentiable(q, k, v, attn_mask)
    for name, x in (("regions", regions), ("query_coordinates", query_coordinates)):
        refuse_gradient(name, x)
    for x in key_coordinates or ():
        refuse_gradient("key_coordinates", x)
    return _streamed(q, k, v, asked, backend)


# ----------------------------------------------------------------------------------------------------- what is refused


# ------------------------------------------------------------------------------------------------- reading the request


def _check_names(read: Sequence[str], arguments: dict[str, object]) -> None:
    names = (read,) if isinstance(read, str) else tuple(read)
    unknown = [name for name in names if name not in READS]
    if isinstance(read, str) or unknown or not names:
        raise ValueError(f"read must be a sequence of names among {', '.join(READS)}; got {read!r}")
    for name in names:
        if name in NEEDS and arguments[NEEDS[name]] is None:
            raise ValueError(f"read {name!r} needs {NEEDS[name]}=")
    for argument, value in arguments.items():
        served = [name for name in READS if NEEDS.get(name) == argument]
        if value is not None and not set(served) & set(names):
            raise ValueError(f"{argument}= is given, but read={names} does not ask for {' or '.join(served)}")


def _shape(x: object) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else f"{type(x).__name__}: {x!r:.80}"


def _regions(regions: Tensor, B: int, count: int) -> Tensor:
    full = regions[None] if isinstance(regions, Tensor) and regions.ndim == 2 else regions
    if not isinstance(full, Tensor) or full.ndim != 3 or full.shape[0] not in (1, B) or full.shape[2] != count:
        raise ValueError(f"regions must be [R, {count}] or [1 or {B}, R, {count}] weights, got {_shape(regions)}")
    total = full.sum(2, keepdim=True)
    if not torch.compiler.is_compiling() and (bool((full < 0).any()) or not bool((total > 0).all())):
        raise ValueError("regions must be non-negative weights, each region with a positive sum")
    return full / total


def _coordinate(x: Tensor, B: int, count: int, name: str) -> Tensor:
    full = x[None] if isinstance(x, Tensor) and x.ndim == 2 else x
    if not isinstance(full, Tensor) or full.ndim != 3 or full.shape[0] not in (1, B) or full.shape[1] != count:
        raise ValueError(f"{name} must be [{count}, c] or [1 or {B}, {count}, c] numbers, got {_shape(x)}")
    return full


def _per_reference(values: Sequence[object], keys: list[TokenSet], name: str) -> None:
    if isinstance(values, Tensor) or len(values) != len(keys):
        raise ValueError(f"{name} needs one entry per reference: {len(keys)} references, got {_shape(values)}")


def _coordinates(given: Sequence[Tensor], B: int, keys: list[TokenSet]) -> list[Tensor]:
    _per_reference(given, keys, "key_coordinates")
    found = [_coordinate(x, B, K.count, "key_coordinates") for x, K in zip(given, keys, strict=True)]
    if len({x.shape[2] for x in found}) > 1:
        raise ValueError(f"key_coordinates must have one width, got {[tuple(x.shape) for x in given]}")
    return found


def _columns(given: Sequence[Selector], keys: list[TokenSet]) -> list[TokenSet]:
    _per_reference(given, keys, "columns")
    return [TokenSet.of(selector, K.count, "columns") for selector, K in zip(given, keys, strict=True)]


def _pairs(given: Sequence[Tensor], B: int, queries: TokenSet, keys: list[TokenSet]) -> list[Tensor]:
    _per_reference(given, keys, "pairs")
    found = []
    for x, K in zip(given, keys, strict=True):
        full = x[None] if isinstance(x, Tensor) and x.ndim == 2 else x
        if not isinstance(full, Tensor) or full.ndim != 3 or full.shape[0] not in (1, B) or full.shape[2] != 2:
            raise ValueError(f"pairs must be [M, 2] or [1 or {B}, M, 2] of (query, key), got {_shape(x)}")
        if full.is_floating_point() or full.dtype == torch.bool:
            raise ValueError(f"pairs must hold integers, got {full.dtype}")
        if not torch.compiler.is_compiling() and full.numel():
            most = full.amax((0, 1)).tolist()
            if int(full.amin()) < 0 or most[0] >= queries.count or most[1] >= K.count:
                raise ValueError(
                    f"pairs hold (query, key) up to {tuple(most)}, of {queries.count} generated queries and {K.count} "
                    f"reference keys; the least is {int(full.amin())}"
                )
        found.append(full.long())
    return found


# ------------------------------------------------------------------------------------------------------------ reading


def _streamed(q: Tensor, k: Tensor, v: Tensor | None, asked: _Asked, backend: str) -> list[Readouts]:
    (query_span,), query_order = gather([asked.queries], q.shape[2])
    spans, key_order = gather(asked.keys, k.shape[2])
    mask = asked.mask
    if query_order is not None:
        order = on_device(query_order, q.device)
        q = q[:, :, order]
        mask = None if mask is None else mask[:, :, order]
    if key_order is not None:
        order = on_device(key_order, q.device)
        k, v = k[:, :, order], None if v is None else v[:, :, order]
        mask = None if mask is None else mask[..., order]
    first, last = min(a for a, _ in spans), max(b for _, b in spans)
    wanted = [name for name in STREAMED if name in asked.read]
    everything = spans == [(0, k.shape[2])]
    if everything and "mass" in wanted:
        wanted.remove("mass")
    if "log_c" in asked.read and "col_lse" not in wanted:
        wanted.append("col_lse")
    got = Outputs(
        *gradients.attention_maps(
            q,
            k,
            v,
            mask,
            asked.regions,
            None if asked.key_coordinates is None else _hull(asked.key_coordinates, spans, first, last),
            asked.query_coordinates,
            asked.scale,
            list(query_span),
            [edge for span in spans for edge in span],
            ",".join(wanted),
            backend,
        )
    )
    exact = q, k, got.row_lse, got.col_lse
    if FEW & asked.read and q.dtype == torch.float32 and sweeps.costs_little(q, k):
        exact = _exact_lse(q, k, mask, asked, query_span, spans)
    found = []
    for n, (start, stop) in enumerate(spans):
        at = slice(start - first, stop - first)
        generated, few = slice(*query_span), slice(start, stop)
        one = Readouts(
            out=None if v is None else got.out,
            row_lse=got.row_lse,
            col_lse=got.col_lse[..., at] if "col_lse" in wanted else None,
            r2g=got.r2g[n] if "r2g" in asked.read else None,
            g2r=got.g2r[..., at] if "g2r" in asked.read else None,
            mass=got.mass[n] if "mass" in wanted else None,
            sram=got.sram[..., at] if "sram" in asked.read else None,
            expected=got.expected[n] if "expected" in asked.read else None,
            landing=got.landing[:, :, at] if "landing" in asked.read else None,
            entropy=got.entropy if "entropy" in asked.read else None,
        )
        if everything and "mass" in asked.read:  # 1, and 0 where a row is fully masked
            one = one.having(mass=(~got.row_lse.detach()[:, :, generated].isneginf()).to(got.row_lse.dtype))
        between = None if mask is None else mask[:, :, generated, few]
        few_of = exact[0][:, :, generated], exact[1][:, :, few], exact[2][:, :, generated], exact[3][..., at]
        one = _with_few(one, *few_of, between, asked, n)
        found.append(one if "col_lse" in asked.read else one.having(col_lse=None))
    if query_order is None:
        return found
    back = on_device(inverse(query_order), q.device)
    return [
        one.having(out=None if one.out is None else one.out[:, :, back], row_lse=one.row_lse[:, :, back])
        for one in found
    ]


def _exact_lse(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    asked: _Asked,
    query_span: tuple[int, int],
    spans: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k and both log-sum-exps in float64: p's gradient is a difference of theirs, and of one-hot's small."""
    q, k = q.double(), k.double()
    reads = "col_lse" if "log_c" in asked.read else ""
    edges = [edge for span in spans for edge in span]
    found = gradients.attention_maps(
        q, k, None, mask, None, None, None, asked.scale, list(query_span), edges, reads, "streaming"
    )
    got = Outputs(*found)
    return q, k, got.row_lse, got.col_lse


def _hull(coordinates: list[Tensor], spans: Sequence[tuple[int, int]], first: int, last: int) -> Tensor:
    """Return every reference's coordinates in one ``[1 | B, hull, c]``, zeros between them."""
    batch = max(x.shape[0] for x in coordinates)
    if len(spans) == 1:
        return coordinates[0]
    full = coordinates[0].new_zeros(batch, last - first, coordinates[0].shape[2])
    for x, (start, stop) in zip(coordinates, spans, strict=True):
        full[:, start - first : stop - first] = x
    return full


def _with_few(
    one: Readouts, q: Tensor, k: Tensor, row_lse: Tensor, col_lse: Tensor, mask: Tensor | None, asked: _Asked, n: int
) -> Readouts:
    """Return ``one`` with its few columns and pairs: from the log-sum-exps, by plain autograd.

    Args:
        one: what was read of the whole call.
        q: ``[B, H, Q, d]`` generated queries.
        k: ``[B, H, K, d]`` keys of reference ``n``.
        row_lse: ``[B, H, Q]``.
        col_lse: ``[B, H, K]``; used where "log_c" is asked for.
        mask: ``[B, H, Q, K]``.
    """
    dtype = one.row_lse.dtype
    if asked.columns is not None:
        few = k[:, :, asked.columns[n].index]  # [B, H, n, d]
        s = _exact(q) @ _exact(few).transpose(2, 3) * asked.scale  # [B, H, Q, n]
        s = _masked(s, None if mask is None else mask[..., asked.columns[n].index])
        p = (s - _finite(row_lse).unsqueeze(3)).exp()
        one = one.having(columns=p.to(dtype))
    if asked.pairs is not None:
        pairs = asked.pairs[n].to(q.device).expand(q.shape[0], -1, -1)
        i, j = (index[:, None].expand(-1, q.shape[1], -1) for index in pairs.unbind(2))  # [B, H, M]
        s = (_exact(_at(q, i)) * _exact(_at(k, j))).sum(3) * asked.scale  # [B, H, M]
        if mask is not None:
            s = _masked(s, mask.gather(2, i[..., None].expand(*i.shape, k.shape[2])).gather(3, j[..., None])[..., 0])
        if "log_p" in asked.read:
            one = one.having(log_p=(s - row_lse.gather(2, i)).to(dtype))
        if "log_c" in asked.read:
            one = one.having(log_c=(s - col_lse.gather(2, j)).to(dtype))
    return one


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Return tokens ``index [B, H, M]`` of ``x [B, H, N, d]``."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[3]))


def _exact(x: Tensor) -> Tensor:
    """Return a few tokens in float64, or float32 for half precision: their large logits must not be rounded."""
    return x.double() if x.dtype in (torch.float32, torch.float64) else x.float()


def _masked(s: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return s
    return s.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else s + mask.to(s.dtype)


def _finite(x: Tensor) -> Tensor:
    return x.masked_fill(x.isneginf(), 0.0)


def _naive(q: Tensor, k: Tensor, v: Tensor | None, asked: _Asked) -> list[Readouts]:
    """Read by definition, in float64, from materialised probabilities."""
    found = []
    for n, K in enumerate(asked.keys):
        p = naive.probabilities(q, k, scale=asked.scale, mask=asked.mask, queries=asked.queries.index, keys=K.index)
        rows = p.rows[:, :, asked.queries.index]  # [B, H, Q, Nk]
        spent = rows[..., K.index]  # [B, H, Q, K]
        one = Readouts(None if v is None else (p.rows @ v.double()).to(q.dtype), p.row_lse, p.col_lse)
        surprise = torch.where(rows > 0, rows, 1.0).log()  # ln P, and 0 where P is 0
        x, y, w = asked.key_coordinates, asked.query_coordinates, asked.regions
        one = one.having(
            r2g=p.columns.mean(3) if "r2g" in asked.read else None,
            g2r=spent.mean(2) if "g2r" in asked.read else None,
            mass=spent.sum(3) if "mass" in asked.read else None,
            sram=None if w is None else torch.einsum("brq,bhqk->bhrk", w.double().expand(len(q), -1, -1), spent),
            expected=None if x is None else spent @ x[n].double().unsqueeze(1),
            landing=None if y is None else p.columns.transpose(2, 3) @ y.double().unsqueeze(1),
            entropy=-(rows * surprise).sum(3) if "entropy" in asked.read else None,
            columns=None if asked.columns is None else spent[..., asked.columns[n].index],
        )
        if asked.pairs is not None:
            pairs = asked.pairs[n].expand(len(q), -1, -1)
            at = torch.arange(len(q))[:, None], slice(None), pairs[..., 0], pairs[..., 1]  # [B, M, H]
            one = one.having(log_p=spent[at].transpose(1, 2).log() if "log_p" in asked.read else None)
            one = one.having(log_c=p.columns[at].transpose(1, 2).log() if "log_c" in asked.read else None)
        found.append(one if "col_lse" in asked.read else one.having(col_lse=None))
    return found
