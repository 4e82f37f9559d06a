"""Running sums of key sets that overlap or have gaps: the op sums their runs of neighbours, joined afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from i2am.ops import Sums
from i2am.ops.tokens import TokenSet
from i2am.references import KeySet


class KeySetSums:
    """Sums of one attention call of several key sets. What the op adds to is in ``sums``; :meth:`add` joins it.

    Args:
        sets: which keys; they may overlap.
        totals: where to add, one a set.
        keys: number of keys of the call.

    Attributes:
        keys: contiguous spans, one a :class:`Sums`.
        sums: what the op adds to.
    """

    def __init__(self, sets: Sequence[KeySet], totals: Sequence[Sums], keys: int):
        self.keys: list[slice] = []
        self.sums: list[Sums] = []
        self._joins: list[tuple[Sums, list[Sums]]] = []
        for one, total in zip(sets, totals, strict=True):
            spans = _spans(TokenSet.of(one.tokens, keys, "keys"))
            own = [total] if len(spans) == 1 else [total.fresh(keys=span.stop - span.start) for span in spans]
            if len(spans) > 1:
                self._joins.append((total, own))
            self.keys += spans
            self.sums += own

    def add(self) -> None:
        """Add what was summed of parts to the totals: R2G is the mean over a set's keys, mass their sum."""
        for total, parts in self._joins:
            count = total.g2r.shape[-1]
            for part in parts:
                total.r2g.add_(part.r2g, alpha=part.g2r.shape[-1] / count)
                if total.mass is not None and part.mass is not None:
                    total.mass.add_(part.mass)
            total.g2r.add_(torch.cat([part.g2r for part in parts], dim=-1))
            if total.sram is not None:
                total.sram.add_(torch.cat([part.sram for part in parts if part.sram is not None], dim=-1))


def _spans(tokens: TokenSet) -> list[slice]:
    """Return the runs of neighbours among a set's tokens, which are in their order."""
    if isinstance(tokens.positions, range):
        return [slice(tokens.positions.start, tokens.positions.stop)]
    breaks = [0, *(np.flatnonzero(np.diff(tokens.positions) != 1) + 1).tolist(), tokens.count]
    return [slice(int(tokens.positions[a]), int(tokens.positions[b - 1]) + 1) for a, b in pairwise(breaks)]
