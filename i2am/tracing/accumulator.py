"""``Accumulator``: maps of an attention that calls i2am itself, without a tracer.

A call goes the way of a traced one (:mod:`i2am.tracing.observe`) into the same running sums, so that levels, SRAM,
records, reports and files are those of any other maps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from i2am._images import read_point
from i2am.families import TokenLayout
from i2am.maps import AttributionMaps
from i2am.maps.sram import Region
from i2am.ops.tokens import Selector, TokenSet
from i2am.references import Grid, LayerFilter, Reference, choose_layers
from i2am.tracing.clock import StepInfo
from i2am.tracing.intercept import AttentionCall, ForwardContext, LayerContext, eager
from i2am.tracing.observe import Observer
from i2am.tracing.options import AccumulatorOptions, TraceSettings, takes_trace_options
from i2am.tracing.provenance import Ledger
from i2am.tracing.qk import QKRecord
from i2am.tracing.regions import RegisteredRegions
from i2am.tracing.sums import SumStore

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Accumulator:
    """Running sums that a model's own attention calls fill.

    ::

        sums = i2am.Accumulator(steps=20)
        out = sums.attention(q, k, v, layer="blocks.3", step=i, grid=(32, 32), keys=i2am.Reference(grid=(16, 16)))
        maps = sums.maps()

    Attributes:
        steps: denoising steps of a run.
    """

    @takes_trace_options(AccumulatorOptions)
    def __init__(self, steps: int, *, default_layers: LayerFilter = None, **options: Unpack[AccumulatorOptions]):
        """Begin with empty sums.

        Args:
            steps: denoising steps of a run; each call says which of them it belongs to.
            default_layers: the default layer set of the maps, of the layers named in calls: names, glob patterns or a
                predicate. None: all.
            options: see :class:`i2am.tracing.options.TraceSettings`. Points of ``sram`` need ``canvas``.

        Raises:
            TypeError: an option that there is not.
            ValueError: an argument does not fit.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a positive number of denoising steps, got {steps!r}")
        self.steps = steps
        self._layers = default_layers
        self._settings = TraceSettings(**options)
        self._regions = _regions(self._settings.sram or {}, self._settings.canvas)
        self.reset()

    def reset(self) -> None:
        """Forget what was added: call it between runs of different batches or sizes."""
        self._groups = self._settings.groups(self.steps)
        self._sums = SumStore()
        self._sums.settle(self._groups)
        self._record = QKRecord(self._settings.record_options)
        self._ledger = Ledger("Accumulator")
        self._observer = Observer(self._settings, self._sums, self._record, self._regions, self._ledger.note)
        self._images: int | None = None
        self._step: int | None = None

    @eager
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        *,
        layer: str,
        step: int,
        grid: Grid,
        keys: Reference | Sequence[Reference],
        queries: Selector = None,
        samples: slice | None = None,
        scale: float | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor | None:
        """Compute one attention call and add what it takes from the reference; stands in for
        ``scaled_dot_product_attention``.

        Args:
            q, k, v, scale, attn_mask: as in :func:`i2am.attention`; ``v=None`` adds only, where the model has its own.
            layer: name of the attention, one for all steps.
            step: of the run, counted from 0.
            grid: ``(height, width)`` of the generated tokens.
            keys: which keys encode the reference, and on which grid they lie; several references have names.
            queries: the generated tokens among the queries. Default: all.
            samples: the samples of the batch that count (the conditional half of guidance). Default: all.

        Returns:
            the output ``[B, H, Nq, dv]`` of every sample, differentiable; None without ``v``.

        Raises:
            ValueError: step, grid, keys, heads, batch or sizes do not fit; names the layer and what was expected.
        """
        references = [keys] if isinstance(keys, Reference) else list(keys)
        if not layer or not isinstance(layer, str):
            raise ValueError(f"layer must be a name, got {layer!r}")
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < self.steps:
            raise ValueError(
                f"layer {layer}: step must be one of 0…{self.steps - 1} (steps={self.steps}), got {step!r}"
            )
        for name, x in (("q", q), ("k", k)):
            if not isinstance(x, Tensor) or x.ndim != 4:
                raise ValueError(f"layer {layer}: {name} must be a [B, H, N, d] tensor, got {getattr(x, 'shape', x)!r}")
        layout = _layout(layer, grid, references, k.shape[2], queries, q.shape[2])
        chosen = slice(*(samples or slice(None)).indices(q.shape[0]))
        self._check_images(layer, chosen)
        self._begin(step)
        info = StepInfo(step * self._groups // self.steps, step, self.steps, self.steps)
        context = ForwardContext(
            owner=self,
            attend=self._observer.attend,
            batch=q.shape[0],
            conditional=chosen,
            info=info,
            frame=sys._getframe(),
        )
        call = AttentionCall(q, k, v, attn_mask, scale=scale)
        out = self._observer.attend(context, LayerContext(layer, grid=layout.grid, awaits=layout), call)
        self._ledger.count("told with each call" if samples is not None else "every sample counts", None)
        return out

    def maps(self) -> AttributionMaps:
        """Return the maps of all that was added since the start or the last ``reset``.

        Raises:
            ValueError: nothing was added, or ``default_layers`` selects none of the layers.
        """
        if not self._sums.tracks:
            raise ValueError("nothing was added: call attention() of this Accumulator in the model's own attention")
        self._record.flush()
        tracks = list(self._sums.tracks.values())
        self._observer.check_finite(tracks)
        names = dict.fromkeys(track.layer for track in tracks)
        return AttributionMaps.of(
            tracks,
            default=set(choose_layers(names, self._layers)),
            canvas=self._regions.canvas,
            regions=self._regions.names,
            entries=self._record.entries,
            provenance=self._ledger.told(tracks, self._sums.tokens, None),
        )

    def _begin(self, step: int) -> None:
        """Note that a call of ``step`` comes: a step back is a new run."""
        if step != self._step:
            self._record.flush()
            self._ledger.run(step, self.steps, first=self._step is None or step < self._step)
            self._step = step

    def _check_images(self, layer: str, samples: slice) -> None:
        count = len(range(samples.start, samples.stop, samples.step))
        if samples.step != 1 or not count:
            raise ValueError(f"layer {layer}: samples must be a slice of step 1 that holds some of the batch")
        if self._images is not None and count != self._images:
            raise ValueError(
                f"layer {layer}: {count} samples count, earlier calls had {self._images}: one set of maps needs one "
                "batch: maps() then reset() between such runs, or name the conditional ones with samples="
            )
        self._images = count


def _layout(
    layer: str, grid: Grid, references: Sequence[Reference], keys: int, queries: Selector, length: int
) -> TokenLayout:
    """Return the layout of a call that its caller described."""
    size = tuple(grid) if isinstance(grid, Sequence) else ()
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"layer {layer}: grid must be (height, width) in tokens, both positive, got {grid!r}")
    if not references or not all(isinstance(r, Reference) for r in references):
        raise ValueError(f"layer {layer}: keys must be an i2am.Reference or several of them, got {references!r:.80}")
    names = [r.name for r in references]
    if len(set(names)) < len(names):
        raise ValueError(f"layer {layer}: references need different names, got {names}: Reference(..., name=...)")
    here = tuple(r.on((size[0], size[1])) for r in references)
    for reference in here:
        try:
            reference.check(keys)
        except ValueError as error:  # noqa: PERF203 (a handful)
            raise ValueError(f"layer {layer}: {error}") from None
    chosen = slice(None) if queries is None else TokenSet.of(queries, length, "queries").index
    return TokenLayout((size[0], size[1]), here, chosen)


def _regions(regions: Mapping[str, Region], canvas: Grid | None) -> RegisteredRegions:
    points = [name for name, region in regions.items() if read_point(region) is not None]
    if points and canvas is None:
        raise ValueError(f"sram: the point {points[0]!r} needs canvas=(height, width) of the picture it is a place of")
    return RegisteredRegions(regions, canvas, 1)
