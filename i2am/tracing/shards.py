"""What one of several processes holds of an attention call, and how their sums become those of the whole call.

Under context parallelism the sequence is cut into as many pieces as there are processes, each stretch of it that a
model splits by itself (text, picture) into its own. Attention then runs on all tokens of some heads (Ulysses), on some
queries of all heads (ring), or on some queries of some heads (both). Every process adds the sums of the whole call:

- heads are independent, so those of each process are put in their place;
- R2G needs the log-sum-exp of a column over *all* generated queries: it is merged before the second sweep;
- G2R, mass and SRAM are sums over queries, each of which one process holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from i2am.ops import Selector, Sums, TokenSet, accumulate
from i2am.ops.sweeps import weigh
from i2am.ops.tokens import Positions

SPLIT = "ContextParallelSplitHook"  # diffusers' class of the hooks that cut a sequence


class Processes(NamedTuple):
    """Processes among which one model's tokens are shared out, and this one's place: ``ring × ulysses``."""

    ring: int
    ulysses: int
    at: tuple[int, int]
    group: Any  # all of them
    ring_group: Any  # those that have the same heads

    @property
    def size(self) -> int:
        return self.ring * self.ulysses

    @property
    def piece(self) -> int:
        """Return which piece of the sequence this process was given."""
        return self.at[0] * self.ulysses + self.at[1]

    @classmethod
    def of(cls, model: nn.Module) -> Processes | None:
        """Return those of a diffusers model; None: it runs in one.

        Raises:
            ValueError: its sequence is split in a way of the caller's own.
        """
        config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
        if config is None:
            return None
        known = getattr(type(model), "_cp_plan", None) or {}
        hooks = [
            hook
            for module in model.modules()
            for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
            if type(hook).__name__ == SPLIT
        ]
        if not hooks or any(hook.metadata not in known.values() for hook in hooks):
            raise ValueError(
                f"this {type(model).__name__} is split over processes by a cp_plan of its caller's own, so which "
                "tokens a process holds is not known: enable_parallelism(config=…) without cp_plan=, or trace in one "
                "process"
            )
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Any) -> Processes:
        """Return those of a ``ContextParallelConfig`` that is set up."""
        at = config._ring_local_rank, config._ulysses_local_rank
        group = config._flattened_mesh.get_group()
        found = cls(config.ring_degree, config.ulysses_degree, at, group, config._ring_mesh.get_group())
        if dist.get_rank(group) != found.piece:
            raise ValueError(
                f"process {dist.get_rank(group)} of the context-parallel mesh stands at {at} of {found.ring}×"
                f"{found.ulysses}: i2am knows meshes that are numbered row by row"
            )
        return found

    def held(self, parts: tuple[int, ...], ring: int) -> Positions:
        """Return the tokens that processes of one place in the ring hold together, in the order of their attention."""
        pieces = range(ring * self.ulysses, (ring + 1) * self.ulysses)
        return np.concatenate([_piece(parts, self.size, i) for i in pieces])

    def mine(self, parts: tuple[int, ...]) -> Positions:
        """Return the tokens that this process was given."""
        return _piece(parts, self.size, self.piece)

    @property
    def told(self) -> dict[str, int]:
        """Return what the provenance says."""
        return {"ring": self.ring, "ulysses": self.ulysses}


@lru_cache(maxsize=256)
def _piece(parts: tuple[int, ...], count: int, index: int) -> Positions:
    """Return the tokens of one of ``count`` pieces: of every part its share, as ``torch.tensor_split`` cuts it."""
    found, start = [], 0
    for length in parts:
        each, longer = divmod(length, count)
        first = start + index * each + min(index, longer)
        found.append(np.arange(first, first + each + (index < longer), dtype=np.int64))
        start += length
    return np.concatenate(found)


class Share(NamedTuple):
    """Part of an attention call that this process holds: some heads, all keys, all of the queries or some."""

    heads: slice  # of all_heads
    all_heads: int
    rows: Positions | None  # [Nq] places of its queries in the whole sequence; None: all of them, in their order
    length: int  # of the whole sequence of queries
    group: Any  # the processes among which the call is shared out
    row_group: Any  # those with the same heads and other queries

    def chosen(self, queries: Selector) -> tuple[Positions, Positions, int]:
        """Return the generated ones among this process's queries, their places among all generated, and how many these
        are.
        """
        every = TokenSet.of(queries, self.length, "queries")
        place = np.full(self.length, -1, dtype=np.int64)
        place[np.asarray(every.positions)] = np.arange(every.count)
        own = place if self.rows is None else place[self.rows]
        here = np.flatnonzero(own >= 0)
        return here, own[here], every.count

    def fresh(self, total: Sums, queries: Selector) -> Sums:
        """Return sums that begin at zero, of this process's heads and generated queries."""
        return total.fresh(heads=self.heads, queries=len(self.chosen(queries)[0]))

    def accumulate(
        self,
        q: Tensor,
        k: Tensor,
        *,
        sums: Sequence[Sums],
        queries: Selector,
        keys: Sequence[Selector],
        scale: float | None,
        attn_mask: Tensor | None,
        regions: Tensor | None,
        backend: str | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Add this process's part of a call to fresh sums, as :func:`i2am.ops.accumulate` does of a whole one.

        Args:
            q: ``[B, h, n, d]`` the queries and heads that it holds; k: ``[B, h, Nk, d]`` all keys.
            queries: generated ones, among those of the whole call.

        Returns:
            ``row_lse [B, h, n]``, and of every reference the ``col_lse [B, h, K]`` over the queries of all processes.
        """
        here, generated, count = self.chosen(queries)
        given: dict[str, Any] = {"scale": scale, "attn_mask": attn_mask, "backend": backend}
        if len(here):
            on_rows = None if regions is None else regions[..., torch.from_numpy(generated).to(regions.device)]
            rows = torch.from_numpy(here)
            _, row_lse, col_lse = accumulate(q, k, None, sums=sums, queries=rows, keys=keys, regions=on_rows, **given)
        else:
            row_lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
            empty = [TokenSet.of(selector, k.shape[2], "keys").count for selector in keys]
            col_lse = [q.new_full((*q.shape[:2], n), -torch.inf, dtype=torch.float32) for n in empty]
        if self.rows is None:
            return row_lse, col_lse
        merged = merge_log_sums(torch.cat(col_lse, dim=-1), self.row_group).split([x.shape[-1] for x in col_lse], -1)
        for one, selector, lse in zip(sums, keys, merged, strict=True):
            one.g2r.mul_(len(here) / count)  # a mean over all generated queries
            if len(here):
                index = TokenSet.of(selector, k.shape[2], "keys").index
                one.r2g.copy_(_column_shares(q, k, lse, rows, index, scale, attn_mask))
        return row_lse, list(merged)

    def add(self, totals: Sequence[Sums], own: Sequence[Sums], queries: Selector) -> None:
        """Add the sums of all processes to every one's totals."""
        _, generated, _ = self.chosen(queries)
        wholes = []
        for total, one in zip(totals, own, strict=True):
            for x, part, by_query in (
                (total.r2g, one.r2g, True),
                (total.g2r, one.g2r, False),
                (total.mass, one.mass, True),
                (total.sram, one.sram, False),
            ):
                if x is not None and part is not None:
                    whole = torch.zeros_like(x)
                    if by_query:
                        whole[:, self.heads, generated] = part
                    else:
                        whole[:, self.heads] = part
                    wholes.append((x, whole))
        together = torch.cat([whole.flatten() for _, whole in wholes])
        dist.all_reduce(together, group=self.group)
        for (x, whole), part in zip(wholes, together.split([w.numel() for _, w in wholes]), strict=True):
            x.add_(part.view_as(whole))

    def whole_queries(self, x: Tensor, queries: Selector) -> Tensor:
        """Return ``x [B, h, n, …]`` of this process's queries as that of all generated ones, ``[B, H, Q, …]``."""
        here, generated, count = self.chosen(queries)
        out = x.new_zeros(x.shape[0], self.all_heads, count, *x.shape[3:])
        out[:, self.heads, generated] = x[:, :, here]
        dist.all_reduce(out, group=self.group)
        return out

    def whole_keys(self, x: Tensor) -> Tensor:
        """Return ``x [B, h, K, …]`` of keys, which all with the same heads hold, as that of all heads."""
        out = x.new_zeros(x.shape[0], self.all_heads, *x.shape[2:])
        if dist.get_rank(self.row_group) == 0:
            out[:, self.heads] = x
        dist.all_reduce(out, group=self.group)
        return out


def merge_log_sums(lse: Tensor, group: Any) -> Tensor:
    """Return the log-sum-exp of what all processes of a group have summed; -inf where none has anything."""
    found = [torch.empty_like(lse) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, lse.contiguous(), group=group)
    return torch.logsumexp(torch.stack(found), 0)


def _column_shares(
    q: Tensor,
    k: Tensor,
    col_lse: Tensor,
    rows: Tensor,
    keys: slice | Tensor,
    scale: float | None,
    mask: Tensor | None,
) -> Tensor:
    """Return R2G ``[B, h, n]`` of some queries: their mean column probability, given the columns' log-sum-exp."""
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])[:, :, rows][..., keys].transpose(2, 3)
    count = col_lse.shape[-1]
    weights = col_lse.new_full((*col_lse.shape, 1), 1 / count)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _, shares = weigh(k[:, :, keys], q[:, :, rows], col_lse, scale=scale, mask=mask, weights=weights)
    assert shares is not None
    return shares.squeeze(-1)
