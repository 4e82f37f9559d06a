"""``Tracer``: hooks on, one forward after the other, hooks off."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from i2am.families import Family, ForwardInputs, View
from i2am.families.arguments import tensors_of
from i2am.maps import AttributionMaps
from i2am.maps.frames import PICTURE, Video
from i2am.references import Grid, choose_layers
from i2am.tracing import claims, hooks
from i2am.tracing.clock import Clock, StepInfo, Unexplained, read_timestep
from i2am.tracing.evidence import frames_of, settle_by_keys
from i2am.tracing.guidance import Guidance, Told
from i2am.tracing.intercept import (
    ForwardContext,
    close_context,
    frame_of_forward,
    open_context,
    refuse_compiled,
    restore_when_idle,
    running_context,
)
from i2am.tracing.layers import BlindLayerError, blind_message, watch_layer
from i2am.tracing.observe import Observer
from i2am.tracing.options import TraceSettings
from i2am.tracing.provenance import Ledger
from i2am.tracing.qk import QKRecord
from i2am.tracing.qk_size import check_limit, record_size
from i2am.tracing.regions import RegisteredRegions
from i2am.tracing.shards import Processes
from i2am.tracing.sums import Place, SumStore
from i2am.tracing.tiles import check_place, extent, needs_place, on_canvas
from i2am.tracing.who import Caller, PipelineCaller, ThreadCaller, replaced
from i2am.tracing.words import AskedSets


class Tracer:
    """A model being traced, and its running sums. Made by :func:`trace`, :func:`patch_unet` and their kin.

    Args:
        model: the denoiser.
        family: what it is.
        clock: which step is running.
        settings: the caller's options.
        pipe: the pipeline whose calls count; None: the model's own thread's.
        told: returns what the pipeline says of its running call's guidance.
        views: returns where the pipeline's running call looks, from the local variables of it; None: at the whole.
        pixels: of the output image per latent pixel.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        clock: Clock,
        settings: TraceSettings,
        *,
        pipe: Any = None,
        told: Callable[[], Told] = Told,
        views: Callable[[dict[str, Any]], View] | None = None,
        pixels: int = 1,
    ):
        self._model = weakref.ref(model)
        self._family = family
        self._clock = clock
        self._settings = settings
        self._told = told
        self._views = views
        self._pixels = pixels
        self._caller: PipelineCaller | ThreadCaller = ThreadCaller() if pipe is None else PipelineCaller(pipe)
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._ledger = Ledger(type(model).__name__, None if pipe is None else type(pipe).__name__)
        self._local = threading.local()  # the place of the tile that this thread's next call is
        self.entered = False
        clock.on_other_size = lambda size, whole: self._spoil(needs_place(size, whole))
        try:  # a failure or an interrupt on the way in leaves nothing behind
            if settings.record is not None and not clock.knows_steps:
                raise ValueError(
                    "record= needs num_steps= or scheduler=, so that its size is known before the first step"
                )
            if not clock.knows_steps:
                settings.groups(None)
            self._regions = RegisteredRegions(settings.sram or {}, settings.canvas, pixels)
            self._forget()
            self._asked = AskedSets(settings, pipe, family)
            modules = family.layers()
            chosen = choose_layers(modules, settings.layers)
            named = settings.layers is not None
            self._defaults = {name for name in chosen if named or family.by_default(name)}
            refuse_compiled(model)
            claims.claim(model, self)
            clock.open()
            for name in chosen:
                watch_layer(self, family, name, modules[name])
            for module, function, when in family.watch():
                (hooks.before if when == "before" else hooks.after)(self, module, function)
            hooks.before(self, model, self._begin)
            hooks.after(self, model, self._end, always=True)
        except BaseException:
            self.unpatch()
            raise

    def __enter__(self) -> Tracer:
        self.entered = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.unpatch()

    def unpatch(self) -> None:
        """Stop tracing: no hook, no replaced function stays; what was recorded remains readable. Idempotent."""
        model = self._model()
        if model is not None:
            hooks.remove(self, model)
            claims.release(model, self)
        self._clock.close()
        context = running_context()
        while context is not None and context.owner is self:
            close_context(context)
            context = running_context()
        restore_when_idle()

    def reset(self) -> None:
        """Forget what was recorded and go on tracing: call it between runs of different batches or sizes."""
        self._clock.restart()
        self._forget()

    def _forget(self) -> None:
        self._sums = SumStore()  # a forward that another thread is in keeps the old one
        self._record = QKRecord(self._settings.record_options)
        self._regions.restart()
        self._ledger = Ledger(self._ledger.model, self._ledger.pipeline)
        self._guidance: dict[Place, Guidance] = {}
        self._tiles: dict[Place, Grid] = {}
        self._video = PICTURE
        self._canvas: Grid | None = None  # of the tiles, where the pipeline says
        self._spoiled: str | None = None  # why what was counted can't be trusted
        self._doubts: dict[Place, str | None] = {}  # what the guidance of one evaluation leaves open; None: settled
        self._observer = Observer(self._settings, self._sums, self._record, self._regions, self._ledger.note)

    @contextmanager
    def tile(self, top: int, left: int) -> Iterator[None]:
        """Place the calls inside on the picture: their latents begin at row ``top``, column ``left`` of the whole.

        ::

            with tracer.tile(top, left):
                noise[..., top : top + 64, left : left + 64] = unet(part, t, …).sample

        Maps are on the whole picture then; where tiles overlap, their mean stands.

        Args:
            top, left: in latent pixels (tokens of a transformer whose latents are tokens).
        """
        if not all(isinstance(x, int) and x >= 0 for x in (top, left)):
            raise ValueError(f"tile takes the row and column of latents where the tile begins, got {(top, left)!r}")
        before = getattr(self._local, "place", None)
        self._local.place = (top, left)
        try:
            yield
        finally:
            self._local.place = before

    def maps(self) -> AttributionMaps:
        """Return the maps of all that was recorded since the start or the last ``reset``, detached from the model.

        Raises:
            ValueError: nothing was recorded, or what was recorded can't be trusted; says why.
        """
        doubts = self._doubts.values() if self._sums.tracks else ()
        spoiled = next(filter(None, (self._spoiled, *doubts)), None)
        if spoiled is not None:
            raise ValueError(f"there are no maps that can be trusted: {spoiled} (reset() forgets what was recorded)")
        if not self._sums.tracks:
            calls = max((g.calls for g in self._guidance.values()), default=0)
            raise ValueError(self._ledger.nothing() + self._unmet(calls) + replaced(self.pipe, self._model()))
        tracks, canvas = list(self._sums.tracks.values()), None
        if self._ledger.tiles:
            canvas = self._canvas_latents()
            if self._regions.unsettled:
                self._observer.settle_tiles(self._tiles, canvas)
            tracks = on_canvas(self._sums.tracks, self._tiles, canvas, self._observer.own_references.found)
        self._observer.check_finite(tracks)
        pixels = self._regions.canvas
        if canvas is not None:
            pixels = (canvas[0] * self._pixels, canvas[1] * self._pixels)
        return AttributionMaps.of(
            tracks,
            default=self._defaults,
            canvas=pixels,
            regions=self._regions.names,
            entries=self._record.entries,
            provenance=self.provenance,
            video=self._video,
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """Account of what the maps average: calls seen and counted, steps, guidance, layers, references, tiles."""
        canvas = self._canvas_latents() if self._ledger.tiles else None
        return self._ledger.told(self._sums.tracks.values(), self._sums.tokens, canvas)

    @property
    def pipe(self) -> Any:
        """The pipeline whose calls count; None: the model's own thread's."""
        return None if self._pipe is None else self._pipe()

    @property
    def record_bytes(self) -> int:
        """Size of the recorded queries and keys so far."""
        return self._record.nbytes

    def _unmet(self, calls: int) -> str:
        """Say what a user's index was taken for, when nothing fitted it."""
        guidance = self._settings.guidance
        if not isinstance(guidance, int) or not any(g.by_calls for g in self._guidance.values()):
            return ""
        return (
            f" (the batch does not divide into {max(2, guidance + 1)} parts, or the model runs guidance as calls of "
            "its own, so "
            f"guidance={guidance} names a call of each evaluation; there were {calls} a step)"
        )

    def _canvas_latents(self) -> Grid:
        if self._canvas is not None:
            return self._canvas
        stepped = self._clock.latents()
        return (stepped[-2], stepped[-1]) if stepped is not None and len(stepped) >= 4 else extent(self._tiles.items())

    # ------------------------------------------------------------------------------------------------------- hooks

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running = running_context()
        if running is not None and running.owner is self:
            if running.dry:
                return
            open_context(_nobody(frame_of_forward()))
            self._ledger.pass_by(f"calls of {self._ledger.model} inside its own forward")
            return
        if isinstance(self._caller, ThreadCaller) and self._caller.taken_over:
            self._forget()
            self._ledger.note(
                "another thread had called the model before the one that traces it: those calls do not count"
            )
        observer, ledger = self._observer, self._ledger  # of now: the thread that made the tracer may take over
        caller = self._caller.who()
        if not caller.ours:
            ledger.pass_by(caller.why)
            return
        _refuse_faster_cache(model)
        self._family.key_sets = self._asked.read(caller.frame)
        forward = self._family.begin(args, kwargs)
        if forward.aside is not None:
            ledger.pass_by(f"calls beside the denoising: {forward.aside}")
            return
        timestep = read_timestep(forward.timestep)
        try:
            info, told = self._read_clock(timestep), self._told()
            if info.first and self._caller.same_call(caller.frame) and self._clock.cut_short:
                raise Unexplained(
                    f"the scheduler was set anew in the middle of a run of {self._ledger.pipeline}: another pipeline "
                    "or thread shares it, and its steps are no longer this run's: give each a scheduler of its own"
                )
            place = self._place(forward, caller, timestep)
            if info.first:
                self._guidance.clear()
            ledger.run(info.step, info.steps, first=info.first)
            guidance = self._guidance.setdefault(place, Guidance(self._settings.guidance))
            verdict = guidance.judge(
                forward.latents,
                forward.conditioning,
                timestep,
                info,
                told,
                as_calls=not self._family.batched_guidance,
                from_keys=self._family.told_by_keys and self._settings.guidance == "auto",
                given=() if self._family.told_by_keys else tensors_of((*args, *kwargs.values())),
            )
        except Unexplained as error:
            self._spoil(str(error))
            raise
        if guidance.doubt is None or self._doubts.get(place, "") is not None:
            self._doubts[place] = guidance.doubt
        if verdict.samples is None:
            ledger.pass_by(f"calls beside the denoising: {verdict.how}")
            return
        if place is None:
            self._regions.see(_size(forward))
            self._clock.called = _size(forward) if forward.stepped else None
        context = ForwardContext(
            owner=self,
            attend=observer.attend,
            batch=forward.latents.shape[0] * forward.frames,
            conditional=frames_of(verdict.samples, forward.frames),
            info=info,
            frame=frame_of_forward(),
            tile=place,
            size=None if place is None else _size(forward),
            parts=verdict.parts,
            processes=Processes.of(model),
        )
        ledger.processes = None if context.processes is None else context.processes.told
        if verdict.provisional:
            context.settle = settle_by_keys(guidance, verdict, forward, told, ledger.note, self._spoil)
        if self._record.options.record and info.first:
            nbytes = record_size(model, args, kwargs, context, self._record.options)
            if nbytes is not None:
                check_limit(self._record.options, nbytes, info, self._sums.time_groups, have=self._record.nbytes)
        rows = forward.strip > 1 or forward.lead > 0
        self._video = Video(forward.strip, "rows", forward.lead) if rows else Video(forward.frames, "images")
        ledger.count(verdict.how, place)
        open_context(context)

    def _read_clock(self, timestep: float) -> StepInfo:
        """Return where a call that is about to run stands, in its time group."""
        each = self._settings.time_groups == "steps"
        info = self._clock.read(timestep, 1 if each else self._settings.groups(None))
        self._sums.settle(self._settings.groups(info.steps))
        return info if not each or info.step is None else info._replace(group=info.step)

    def _place(self, forward: ForwardInputs, caller: Caller, timestep: float) -> Place:
        """Return where a call lies on the picture; None: it is the whole of it.

        Raises:
            ValueError: its latents are a part of what the scheduler steps, and nothing says which.
        """
        place: Place = getattr(self._local, "place", None)
        if self._views is not None and caller.frame is not None:
            place, self._canvas = self._views(dict(caller.frame.f_locals))
        size, stepped = _size(forward), self._clock.latents()
        whole = (stepped[-2], stepped[-1]) if stepped is not None and len(stepped) >= 4 and forward.stepped else None
        if place is None:
            if whole is not None and whole != size:
                raise Unexplained(needs_place(size, whole))
            if self._tiles:
                raise ValueError(
                    "a call without a place came after tiles with one: place every call with tracer.tile(…)"
                )
            return None
        if not forward.stepped:
            raise ValueError(f"tiles of a {self._ledger.model} can't be placed: its latents are not the picture alone")
        if whole is not None:
            check_place(place, size, whole)
        if None in {place for _, _, place in self._sums.tracks}:
            raise ValueError("a tile with a place came after calls without one: place every call, or reset() first")
        if self._regions.follow(timestep, place):
            self._observer.settle_tiles(self._tiles, self._canvas_latents())
        if self._tiles.setdefault(place, size) != size:
            raise ValueError(f"the tile at {place} was {self._tiles[place]} latents and is now {size}: reset() between")
        return place

    def _spoil(self, why: str) -> None:
        """Note why what was counted can't be trusted."""
        self._spoiled = why

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        context = running_context()
        if context is None or context.dry or context.frame is not frame_of_forward():
            return
        close_context(context)
        if context.owner is not self:
            return
        if output is None:  # the forward itself failed
            self._record.drop()
            self._ledger.note("a forward failed half-way: the layers before that point hold one call more")
            return
        if context.blind:
            self._record.drop()
            raise BlindLayerError(blind_message(context.blind))
        self._record.flush()


def _nobody(frame: Any) -> ForwardContext:
    """Return a context in which nothing is looked for: of a forward inside a traced one."""
    return ForwardContext(
        owner=None, attend=lambda *_: None, batch=0, conditional=slice(0, 0), info=StepInfo(0), frame=frame
    )


def _size(forward: ForwardInputs) -> Grid:
    return forward.grid or (forward.latents.shape[-2], forward.latents.shape[-1])


def _refuse_faster_cache(model: nn.Module) -> None:
    """Raise ValueError for a cache that leaves the unconditional half of the batch out of some calls."""
    cached = getattr(getattr(model, "_diffusers_hook", None), "hooks", {})
    if "faster_cache_denoiser" in cached:
        raise ValueError(
            "FasterCache changes the batch from call to call, so that the conditional samples are not known: "
            "disable_cache() before tracing (PyramidAttentionBroadcast and FirstBlockCache can be traced)"
        )
