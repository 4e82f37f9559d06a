"""One intercepted attention call → the running sums, and the output that goes on into the model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i2am.families import TokenLayout
from i2am.maps.aggregate import LayerSums
from i2am.ops import Sums, accumulate
from i2am.ops.checks import choose_backend
from i2am.ops.tokens import TokenSet
from i2am.references import Grid
from i2am.tracing.intercept import AttentionCall, ForwardContext, LayerContext
from i2am.tracing.keysets import KeySetSums
from i2am.tracing.options import TraceSettings
from i2am.tracing.parallel import own_call
from i2am.tracing.qk import QKRecord, mask_between
from i2am.tracing.regions import RegisteredRegions
from i2am.tracing.shards import Share
from i2am.tracing.sums import Place, SumStore
from i2am.tracing.tiles import OwnReferences, cell_of, placed_at

PADDING = -1e4  # an additive mask this low means "no such key"


def layout_of(layer: LayerContext, call: AttentionCall) -> TokenLayout | None:
    """Return the layout of a call, if it is the one that its layer waits for; else note what came."""
    awaited = layer.awaits
    layout = awaited(call) if callable(awaited) else awaited
    if layout is not None and layout.keys is not None and layout.keys != call.key.shape[2]:
        layout = None
    if layout is None:
        layer.seen.append((call.query.shape[0], call.key.shape[2]))
    else:
        layer.found, layer.awaits = True, None
    return layout


def take_awaited(
    layer: LayerContext, call: AttentionCall, take: Callable[[TokenLayout], Tensor | None]
) -> Tensor | None:
    """Hand a call's layout to ``take``, if it is the call that its layer waits for; run any other as it is."""
    awaited = layer.awaits
    layout = layout_of(layer, call)
    layer.awaits = None  # what the call itself calls is not asked
    try:
        return call.run() if layout is None else take(layout)
    finally:
        layer.awaits = awaited if layout is None else layer.then


class Observer:
    """Adds the attention calls of a tracer to its sums.

    Args:
        settings: the tracer's.
        sums, record, regions: where to.
        note: keeps a sentence for the provenance.
    """

    def __init__(
        self,
        settings: TraceSettings,
        sums: SumStore,
        record: QKRecord,
        regions: RegisteredRegions,
        note: Callable[[str], None],
    ):
        self.settings = settings
        self.note = note
        self._finite = True
        self._waiting: list[tuple[str, Place, _Seen, list[Sums]]] = []  # calls on tiles, until all are known
        self.own_references = OwnReferences(note)
        self.sums = sums
        self.record = record
        self.regions = regions

    def attend(self, context: ForwardContext, layer: LayerContext, call: AttentionCall) -> Tensor | None:
        """Add an attention call to the sums; return its output, the fused op's or the model's own."""
        return take_awaited(layer, call, lambda layout: self._take(context, layer, layout, call))

    def _take(
        self, context: ForwardContext, layer: LayerContext, layout: TokenLayout, call: AttentionCall
    ) -> Tensor | None:
        """Add the call that a layer waited for; return its output."""
        if context.processes is not None and call.share is None:
            call = own_call(context.processes, layer, layout, call)
        if context.settle is not None:
            context.settle(context, layer, layout, call)
        if call.value is None:
            return self._observe(context, layer, layout, call)
        if call.share is not None:
            self._observe(context, layer, layout, replace(call, value=None))
            return call.run()
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value))
        if self.settings.output == "model" or call.dropout_p != 0 or trained:
            fused = choose_backend(call.query, call.value, self.settings.backend) == "triton"
            own, row_lse = call.run_with_lse() if fused and not trained else (call.run(), None)
            self._observe(context, layer, layout, replace(call, value=None), row_lse)
            return own
        return among_others(self._observe(context, layer, layout, call), call, context.conditional)

    def _observe(
        self,
        context: ForwardContext,
        layer: LayerContext,
        layout: TokenLayout,
        call: AttentionCall,
        known: Tensor | None = None,
    ) -> Tensor | None:
        """Add one call to the sums; return its output for the conditional samples, where the call has values.

        ``known``: the row log-sum-exp ``[B, H, Nq]`` of all samples, from the kernel that computed the output.
        """
        queries = self._check(context, layer, layout, call)
        part = call.on(context.conditional)
        mask = padding_is_masked(part.attn_mask)
        q, k = as_autocast(part.query), as_autocast(part.key)
        v = None if part.value is None else as_autocast(part.value)
        if call.enable_gqa:
            repeats = q.shape[1] // k.shape[1]
            k = k.repeat_interleave(repeats, dim=1)
            v = None if v is None else v.repeat_interleave(repeats, dim=1)
        group = context.info.group
        share, all_heads = call.share, None if call.share is None else call.share.all_heads
        tracks = self.sums.open(layer.name, layout, q, k, queries, len(self.regions.names), context.tile, all_heads)
        if layout.weights is not None and not self.settings.weighted:
            self.note(
                "R2G is before the IP-Adapter's masks and scales, which the model multiplies its part with: "
                "weighted=True "
                "multiplies R2G with them"
            )
        count = len(layout.references)
        seen = _Seen(layout, q, k, mask, call.scale, context.conditional, share)
        regions, totals = self.regions.weights(layout.grid), [track.at(group) for track in tracks]
        if context.tile is not None:
            when = context.info.group, context.info.step, context.info.taken
            self.own_references.see(context.tile, when, layer.name, layout, k)
        if context.tile is not None and self.regions.names:
            regions = self.regions.on_tile(layer.name, context.tile, layout.grid)
            if regions is None:  # not all tiles are known
                self._waiting.append((layer.name, context.tile, seen, totals))
                totals = [total._replace(sram=None) for total in totals]
        row_lse = None if known is None else known[context.conditional]
        out, row_lse, col_lse = self._add(seen, totals, regions, v, row_lse)
        for track in tracks:
            track.count(group)
        if self._finite and q.device.type == "cpu":  # elsewhere it would wait for the device: see check_finite
            self._see_finite(layer.name, context, q, k, row_lse)
        if count and self.record.options.wants(context.info):
            self._keep(context, layer.name, seen, row_lse, col_lse[:count])
        return out

    def _add(
        self,
        seen: _Seen,
        totals: Sequence[Sums],
        regions: Tensor | None,
        v: Tensor | None = None,
        row_lse: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, list[Tensor]]:
        """Add a call to the totals; return its output, ``row_lse`` and every reference's ``col_lse``.

        Args:
            seen: its conditional samples.
            totals: one a reference and set.
            regions: registered ones, on the grid of the generated queries.
            v: values, where the output is asked for.
            row_lse: where another kernel has computed it.
        """
        layout, share, count = seen.layout, seen.share, len(seen.layout.references)
        own = totals if share is None else [share.fresh(total, layout.queries) for total in totals]
        keys = seen.k.shape[2]
        aside = _Aside(layout, seen.samples, keys, own[:count], weighted=self.settings.weighted)
        beside = KeySetSums(layout.sets, own[count:], keys)
        given: dict[str, Any] = {
            "sums": [*aside.sums, *beside.sums],
            "queries": layout.queries,
            "keys": [*(reference.tokens for reference in layout.references), *beside.keys],
            "scale": seen.scale,
            "attn_mask": seen.mask,
            "regions": None if regions is None else regions.to(seen.q.device),
            "backend": self.settings.backend,
        }
        out: Tensor | None = None
        with torch.no_grad():
            if share is None:
                out, rows, columns = accumulate(seen.q, seen.k, v, row_lse=row_lse, **given)
            else:
                rows, columns = share.accumulate(seen.q, seen.k, **given)
            aside.add()
            beside.add()
            if share is not None:
                share.add(totals, own, layout.queries)
        return out, rows, columns

    def settle_tiles(self, tiles: Mapping[Place, Grid], canvas: Grid) -> None:
        """Add the rows of regions of the calls that came before all tiles were known.

        Args:
            tiles: place → size in latents.
            canvas: size of the picture's latents.
        """
        waiting, self._waiting = self._waiting, []
        self.regions.settle(tiles, canvas)
        for layer, place, seen, totals in waiting:
            scratch = [total.fresh() for total in totals]
            self._add(seen, scratch, self.regions.on_tile(layer, place, seen.layout.grid))
            for total, one in zip(totals, scratch, strict=True):
                if total.sram is not None and one.sram is not None:
                    total.sram.add_(one.sram)

    def _check(self, context: ForwardContext, layer: LayerContext, layout: TokenLayout, call: AttentionCall) -> int:
        """Return the number of generated queries. Raises ValueError for a call that is not the one described."""
        if call.query.ndim != 4 or call.query.shape[0] != context.batch:
            before = "".join(f"; a call on a batch of {b} with {n} keys came before" for b, n in layer.seen)
            raise ValueError(
                f"layer {layer.name}: attention on {tuple(call.query.shape)} with {call.key.shape[2]} keys, expected "
                f"[B, H, N, d] with the model's batch of {context.batch}{before}: i2am can't tell which samples these "
                "are"
            )
        if call.is_causal:
            raise ValueError(f"layer {layer.name}: causal attention is not supported")
        length = call.query.shape[2] if call.share is None else call.share.length
        count = TokenSet.of(layout.queries, length, "queries").count
        if layout.grid[0] * layout.grid[1] != count:
            raise ValueError(f"layer {layer.name}: {count} generated queries do not fill its grid {layout.grid}")
        return count

    def _see_finite(self, layer: str, context: ForwardContext, q: Tensor, k: Tensor, row_lse: Tensor) -> None:
        """Say once where values stop being finite."""
        if bool((row_lse < math.inf).all()):  # -inf is a fully masked row
            return
        which = (
            " and ".join(name for name, x in (("q", q), ("k", k)) if not bool(x.isfinite().all())) or "their product"
        )
        when = "" if context.info.step is None else f" at step {context.info.step}"
        self._tell(f"layer {layer}: {which} is not finite{when}: did {str(q.dtype).removeprefix('torch.')} overflow?")

    def check_finite(self, tracks: Iterable[LayerSums]) -> None:
        """Say which layer's sums are the first that are not finite, if any are."""
        for track in tracks if self._finite else ():
            bad = [g for g, n in enumerate(track.counts) if n and not bool(track.r2g[g].isfinite().all())]
            if bad:
                self._tell(
                    f"layer {track.layer}: sums are not finite from time group {bad[0]} on: did the model overflow?"
                )
                return

    def _tell(self, text: str) -> None:
        self._finite = False
        self.note(text)
        warnings.warn(f"i2am: {text} Maps that it is part of are not finite", RuntimeWarning, stacklevel=2)

    def _keep(
        self, context: ForwardContext, layer: str, seen: _Seen, row_lse: Tensor, col_lse: Sequence[Tensor]
    ) -> None:
        """Record one call's generated queries and reference keys, of all processes that share it."""
        layout, q, k, share = seen.layout, seen.q, seen.k, seen.share

        def generated(x: Tensor) -> Tensor:
            return x[:, :, queries] if share is None else share.whole_queries(x, layout.queries)

        def all_heads(x: Tensor) -> Tensor:
            return x if share is None else share.whole_keys(x)

        queries = TokenSet.of(layout.queries, q.shape[2] if share is None else share.length, "queries").index
        references: dict[str, dict[str, Tensor]] = {}
        for reference, lse in zip(layout.references, col_lse, strict=True):
            keys = TokenSet.of(reference.tokens, k.shape[2], "keys").index
            references[reference.name] = {"k": all_heads(k[:, :, keys]), "col_lse": all_heads(lse)}
            if seen.mask is not None:
                references[reference.name]["mask"] = mask_between(seen.mask, queries, keys, layer)
        scale = q.shape[-1] ** -0.5 if seen.scale is None else seen.scale
        tile = None
        if context.tile is not None and context.size is not None:
            tile = placed_at(context.tile, cell_of(context.size, layout.grid), layout.grid)
        self.record.add(layer, context.info.group, scale, generated(q), generated(row_lse), references, tile)


class _Seen(NamedTuple):
    """The conditional samples of a call, as attribution reads them."""

    layout: TokenLayout
    q: Tensor  # [B, H, Nq, d]
    k: Tensor  # [B, H, Nk, d]
    mask: Tensor | None
    scale: float | None
    samples: slice  # of the model's batch
    share: Share | None


class _Aside:
    """Sums of one call that are worked on before they are added: rolled back through a resampler, or weighted.

    Args:
        layout: with ``rollout [B, K, X]``, ``weights [B | 1, Q]``, or neither.
        samples: the conditional ones.
        keys: number of keys of the call.
        totals: where to add.
        weighted: whether R2G is multiplied with the weights.
    """

    def __init__(self, layout: TokenLayout, samples: slice, keys: int, totals: Sequence[Sums], weighted: bool):
        nothing = (None,) * len(layout.references)
        self._rolls = [None if roll is None else roll[samples] for roll in layout.rollout or nothing]
        self._weights = list(layout.weights or nothing) if weighted else list(nothing)
        self._totals = totals
        self.sums = [
            self._fresh(total, reference.count(keys), roll, weight)
            for total, roll, weight, reference in zip(
                totals, self._rolls, self._weights, layout.references, strict=True
            )
        ]

    @staticmethod
    def _fresh(total: Sums, keys: int, roll: Tensor | None, weight: Tensor | None) -> Sums:
        """Return sums in which what is worked on begins at zero, and the rest is the totals' own."""
        if weight is None and roll is None:
            return total
        fresh = total.fresh(keys=None if roll is None else keys)
        kept = total if weight is None else total._replace(r2g=fresh.r2g)
        return kept if roll is None else kept._replace(g2r=fresh.g2r, sram=fresh.sram)

    def add(self) -> None:
        """Add what was worked on to the totals."""
        for total, one, roll, weight in zip(self._totals, self.sums, self._rolls, self._weights, strict=True):
            if weight is not None:
                total.r2g.add_(one.r2g * weight.to(one.r2g)[:, None])
            if roll is not None:
                total.g2r.add_(torch.einsum("bhk,bkx->bhx", one.g2r, roll.to(one.g2r)))
                if total.sram is not None and one.sram is not None:
                    total.sram.add_(torch.einsum("bhrk,bkx->bhrx", one.sram, roll.to(one.sram)))


def among_others(out: Tensor | None, call: AttentionCall, samples: slice) -> Tensor:
    """Concatenate our output ``[b, H, N, d]`` for the conditional samples with the model's own for the others.

    In memory heads come after tokens, as torch's kernels leave them: processors take a view of it.
    """
    before, after = slice(0, samples.start), slice(samples.stop, call.query.shape[0])
    parts = [
        call.on(before).run() if samples.start else None,
        out,
        call.on(after).run() if after.start < after.stop else None,
    ]
    turned = [part.transpose(1, 2) for part in parts if part is not None]
    return (turned[0].contiguous() if len(turned) == 1 else torch.cat(turned)).transpose(1, 2)


def padding_is_masked(mask: Tensor | None) -> Tensor | None:
    """Return an additive mask whose padding is -inf: diffusers adds -10000, which a column softmax would not notice.

    A row with nothing but padding keeps it, so that the output stays the model's.
    """
    if mask is None or mask.dtype == torch.bool:
        return mask
    padding = mask <= PADDING
    return mask.masked_fill(padding & ~padding.all(-1, keepdim=True), float("-inf"))


def as_autocast(x: Tensor) -> Tensor:
    """Return what ``scaled_dot_product_attention`` would see under the autocast that is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return x.to(torch.get_autocast_dtype(kind))
    return x
