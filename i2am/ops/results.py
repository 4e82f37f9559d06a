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


class Sums(NamedTuple):
    """Running sums of one reference, added into in place; float32, last stride 1.

    ``Q`` generated queries, ``K`` this reference's keys, ``R`` registered regions.
    """

    r2g: Tensor  # [B, H, Q]
    g2r: Tensor  # [B, H, K]
    mass: Tensor | None = None  # [B, H, Q]
    sram: Tensor | None = None  # [B, H, R, K]

    @classmethod
    def bundled(
        cls, r2g: Sequence[Tensor], g2r: Sequence[Tensor], mass: Sequence[Tensor], sram: Sequence[Tensor]
    ) -> list[Sums]:
        """Return one ``Sums`` per reference from the custom op's lists, where an empty list means "not kept"."""
        missing = [None] * len(r2g)
        return [cls(*fields) for fields in zip(r2g, g2r, mass or missing, sram or missing, strict=True)]
