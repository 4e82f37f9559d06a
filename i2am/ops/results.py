"""What the op returns, and the running sums that it adds to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class AttentionOutput(NamedTuple):
    """One attention call and what it says about the reference. ``Q`` generated queries, ``K`` reference keys.

    Attributes:
        out: ``[B, H, Nq, dv]`` attention output, in the dtype of the query.
        r2g: ``[B, H, Q]`` mean over the reference keys of the column softmax (over the generated queries); sums to 1
            (less where a key is masked for every query: such a column contributes nothing).
        g2r: ``[B, H, K]`` mean over the generated queries of the row softmax; sums to 1 when ``keys`` is every key,
            else to the share of attention spent on the reference.
        mass: ``[B, H, Q]`` row probability on the reference keys; None when ``keys`` is every key (identically 1).
        row_lse: ``[B, H, Nq]`` natural log-sum-exp of the logits over all keys; -inf for a fully masked row.
        col_lse: ``[B, H, K]`` natural log-sum-exp of the logits over the generated queries; -inf if fully masked.
    """

    out: Tensor
    r2g: Tensor
    g2r: Tensor
    mass: Tensor | None
    row_lse: Tensor
    col_lse: Tensor


class Readouts(NamedTuple):
    """Readings of one attention call about one reference; None where it was not asked for.

    ``Q`` generated queries, ``K`` reference keys, P the softmax over all keys, C the one over the generated queries.
    Statistics are float32; float64 for float64 inputs and from ``backend="reference"``.

    Attributes:
        out: ``[B, H, Nq, dv]`` attention output, in the dtype of the query; None without values.
        row_lse: ``[B, H, Nq]`` natural log-sum-exp over all keys.
        col_lse: ``[B, H, K]`` natural log-sum-exp over the generated queries.
        r2g: ``[B, H, Q]`` mean over the reference keys of C.
        g2r: ``[B, H, K]`` mean over the generated queries of P.
        mass: ``[B, H, Q]`` ``Σ_j P`` over the reference keys; 1 (without a gradient) where these are all keys.
        sram: ``[B, H, R, K]`` ``Σ_i w_i P`` per region w.
        expected: ``[B, H, Q, c]`` ``Σ_j P x_j`` over the reference keys at coordinates x: where in the reference a
            query looks, times its ``mass``.
        landing: ``[B, H, K, c]`` ``Σ_i C y_i`` for queries at coordinates y: where in the picture a key went.
        entropy: ``[B, H, Q]`` ``−Σ_j P ln P`` over all keys, in nats.
        columns: ``[B, H, Q, n]`` P of a few reference keys.
        log_p: ``[B, H, M]`` ``ln P_ij`` of pairs (i, j).
        log_c: ``[B, H, M]`` ``ln C_ij`` of pairs (i, j).
    """

    out: Tensor | None
    row_lse: Tensor
    col_lse: Tensor | None = None
    r2g: Tensor | None = None
    g2r: Tensor | None = None
    mass: Tensor | None = None
    sram: Tensor | None = None
    expected: Tensor | None = None
    landing: Tensor | None = None
    entropy: Tensor | None = None
    columns: Tensor | None = None
    log_p: Tensor | None = None
    log_c: Tensor | None = None

    def having(self, **changes: Tensor | None) -> Readouts:
        """Return read-outs with some of them replaced; ``torch.compile`` of torch 2.7 does not follow ``_replace``."""
        return Readouts(*[changes.get(name, getattr(self, name)) for name in Readouts._fields])


class Sums(NamedTuple):
    """Running sums of one reference, added into in place; float32, last stride 1.

    ``Q`` generated queries, ``K`` this reference's keys, ``R`` registered regions.
    """

    r2g: Tensor  # [B, H, Q]
    g2r: Tensor  # [B, H, K]
    mass: Tensor | None = None  # [B, H, Q]
    sram: Tensor | None = None  # [B, H, R, K]

    def fresh(self, *, heads: slice = slice(None), queries: int | None = None, keys: int | None = None) -> Sums:
        """Return sums that begin at zero, of the same things.

        Args:
            heads: which of these heads.
            queries, keys: how many. None: as many as these have.
        """
        B, H, Q = self.r2g[:, heads].shape
        Q, K = queries if queries is not None else Q, keys if keys is not None else self.g2r.shape[-1]
        return Sums(
            self.r2g.new_zeros(B, H, Q),
            self.g2r.new_zeros(B, H, K),
            None if self.mass is None else self.mass.new_zeros(B, H, Q),
            None if self.sram is None else self.sram.new_zeros(B, H, self.sram.shape[2], K),
        )

    @classmethod
    def bundled(
        cls, r2g: Sequence[Tensor], g2r: Sequence[Tensor], mass: Sequence[Tensor], sram: Sequence[Tensor]
    ) -> list[Sums]:
        """Return one ``Sums`` per reference from the custom op's lists, where an empty list means "not kept"."""
        missing = [None] * len(r2g)
        return [cls(*fields) for fields in zip(r2g, g2r, mass or missing, sram or missing, strict=True)]
