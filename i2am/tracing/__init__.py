"""``trace``, ``patch_unet``, ``patch_transformer``, ``patch_modules``: from a pipeline or a model to attribution maps.

The one path the data takes: a root hook opens a context (``tracer``) with the step (``clock``), the conditional
samples (``guidance``) and the place on the picture (``tiles``), if the call is the traced pipeline's own (``who``);
module hooks say which attention runs, the family says what it carries; the intercepted attention call (``intercept``,
``observe``) runs the fused op (``ops``), which adds into the running sums (``sums``); ``maps`` reads them,
``provenance`` says what they are a mean of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from i2am.families import Described, Family, Request
from i2am.references import Banked, Concatenated, Grid, LayerFilter, Reference
from i2am.tracing.claims import unpatch
from i2am.tracing.clock import Clock, CountingClock, SchedulerClock, TimestepClock, ViewsClock
from i2am.tracing.guidance import Told
from i2am.tracing.layers import BlindLayerError
from i2am.tracing.options import (
    KeywordOptions,
    ModuleOptions,
    TimeGroups,
    TraceOptions,
    TraceSettings,
    takes_trace_options,
)
from i2am.tracing.samplers import SamplerClock
from i2am.tracing.tracer import Tracer
from i2am.tracing.watch import is_sampler
from i2am.tracing.who import calling_pipeline
from i2am.tracing.wrappers import inside

if TYPE_CHECKING:
    from typing_extensions import Unpack

References = Reference | Sequence[Reference] | Concatenated | Banked | None

__all__ = [
    "BlindLayerError",
    "TraceOptions",
    "Tracer",
    "patch_modules",
    "patch_transformer",
    "patch_unet",
    "trace",
    "unpatch",
]


@takes_trace_options()
def trace(
    pipe: Any,
    time_groups: TimeGroups = 5,
    layers: LayerFilter = None,
    *,
    reference: References = None,
    **options: Unpack[KeywordOptions],
) -> Tracer:
    """Trace a diffusers pipeline: what its images take from the reference.

    ::

        with i2am.trace(pipe) as tracer:
            image = pipe(...).images[0]
        maps = tracer.maps()

    Only calls that this pipeline makes itself count. Its scheduler gives the steps, its guidance the conditional
    samples, its image encoder the reference grid. Load IP-Adapters and LoRAs before tracing.

    Args:
        pipe: a diffusers pipeline.
        time_groups: into how many groups the steps are summed; "steps": one group a step.
        layers: which attention modules: a name, a glob pattern, several, or a predicate. None: all that carry the
            reference.
        reference: which keys encode it, where the pipeline does not tell: one :class:`Reference` per IP-Adapter; among
            a transformer's text tokens (Redux: ``Reference(grid=(27, 27), tokens=slice(-729, None))``); or
            :class:`Concatenated` or :class:`Banked`, where self-attention carries it.
        options: see :class:`i2am.tracing.options.TraceSettings`.

    Returns:
        a :class:`Tracer`, already tracing; use it as a context manager or call ``unpatch()``.

    Raises:
        TypeError: an option that there is not.
        ValueError: the pipeline has no reference keys or is traced already; an argument does not fit. Nothing changed.
    """
    from i2am.families.pipeline import read_pipeline, scheduler_of

    settings = TraceSettings(time_groups=time_groups, layers=layers, **options)
    traced = read_pipeline(pipe, _request(reference, settings))
    kind = ViewsClock if traced.by_timestep or traced.views is not None else SchedulerClock
    scheduler = scheduler_of(type(pipe))
    clock = kind(
        lambda: getattr(pipe, scheduler),
        evaluations=lambda: getattr(pipe, "_num_timesteps", None),
        given=traced.timestep,
    )
    return Tracer(
        traced.model,
        traced.family,
        clock,
        settings,
        pipe=pipe,
        told=traced.told,
        views=traced.views,
        pixels=traced.pixels,
    )


@takes_trace_options()
def patch_unet(
    unet: nn.Module,
    *,
    reference: References = None,
    num_steps: int | None = None,
    scheduler: Any = None,
    **options: Unpack[TraceOptions],
) -> Tracer:
    """Trace a bare UNet, called from any code, in one thread.

    ::

        tracer = i2am.patch_unet(unet, reference=i2am.Reference(grid=(16, 16), skip=1), num_steps=50)
        ...  # denoise
        maps = tracer.maps()
        tracer.unpatch()

    Args:
        unet: a UNet2DConditionModel or a model built like it.
        reference: which cross-attention keys encode the reference; several for several references. Not needed with an
            IP-Adapter. :class:`Concatenated` or :class:`Banked` where self-attention carries it.
        num_steps: denoising steps of a run; steps are counted by their timesteps.
        scheduler: the diffusers scheduler that drives the loop, or the CompVis sampler (PLMSSampler, DDIMSampler); its
            steps are counted. With neither, calls are grouped by timestep, in equal ranges of [0, 1000).
        options: see :class:`i2am.tracing.options.TraceSettings`.

    Returns:
        a :class:`Tracer`, already tracing.

    Raises:
        TypeError: an option that there is not.
        ValueError: the UNet does not tell where the reference is (the message shows the line to write), is traced
            already or compiled; an argument does not fit. Nothing changed.
    """
    return _patch(unet, "patch_unet", reference, num_steps, scheduler, TraceSettings(**options))


@takes_trace_options()
def patch_transformer(
    transformer: nn.Module,
    *,
    reference: References = None,
    num_steps: int | None = None,
    scheduler: Any = None,
    **options: Unpack[TraceOptions],
) -> Tracer:
    """Trace a bare diffusion transformer, called from any code, in one thread.

    ::

        tracer = i2am.patch_transformer(transformer, num_steps=28)
        ...  # denoise
        maps = tracer.maps()
        tracer.unpatch()

    Args:
        transformer: a FluxTransformer2DModel, Flux2Transformer2DModel, QwenImageTransformer2DModel, … whose references
            are tokens behind (or before) the generated ones, as their pipelines lay them out.
        reference: which *text* tokens encode a reference, where that is so (Redux).
        num_steps, scheduler: as in :func:`patch_unet`.
        options: see :class:`i2am.tracing.options.TraceSettings`.

    Returns:
        a :class:`Tracer`, already tracing.

    Raises:
        TypeError: an option that there is not.
        ValueError: the model is of no known family, is traced already or compiled; an argument does not fit. Nothing
            changed.
    """
    return _patch(transformer, "patch_transformer", reference, num_steps, scheduler, TraceSettings(**options))


@takes_trace_options(ModuleOptions)
def patch_modules(
    model: nn.Module,
    *,
    reference: Reference | Sequence[Reference] | Callable[[str, int, Grid], Reference | Sequence[Reference]],
    where: LayerFilter = None,
    queries: slice | Callable[[str, int], slice] | None = None,
    grid: Grid | Callable[[str, int], Grid] | None = None,
    mask: Callable[[nn.Module, dict[str, Any]], Tensor | None] | None = None,
    inputs: Callable[[tuple[Any, ...], dict[str, Any]], tuple[Tensor, Tensor | float]] | None = None,
    projections: tuple[str, str] = ("to_q", "to_k"),
    num_steps: int | None = None,
    scheduler: Any = None,
    **options: Unpack[ModuleOptions],
) -> Tracer:
    """Trace attention modules of any code base, without importing it: those with ``to_q``, ``to_k`` and ``heads``; with
    ``queries=``, any modules that call attention on one sequence of text, generated and reference tokens.

    ::

        tracer = i2am.patch_modules(          # StableVITON: features of the garment branch at the same resolution
            model.model.diffusion_model,
            layers="warp_flow_blks*attn2",
            reference=i2am.Reference(grid="queries"),
            num_steps=50,
        )

        tracer = i2am.patch_modules(          # original Flux: [text ‖ generated ‖ reference], fused projections
            model,
            layers=["double_blocks.*", "single_blocks.*"],
            queries=slice(-2 * 4096, -4096),
            reference=i2am.Reference(grid=(64, 64), tokens=slice(-4096, None)),
            grid=(64, 64),
            num_steps=28,
        )

    The first is what Paint-by-Example's, StableVITON's, DCI-VTON's, PASD's and SeeSR's own code is made of. Hooks on
    the projections see the very queries and keys where the attention is einsums; one that goes through
    ``scaled_dot_product_attention``, xformers or flash-attn is intercepted. The model's output stays its own, bit for
    bit.

    Args:
        model: the module whose forward is one evaluation of the denoiser.
        reference: which keys encode the reference; ``Reference(grid="queries")``: on the same grid as the generated
            tokens, at every resolution. Or a function of (layer, number of keys, grid of the generated tokens).
        layers, where: which attention modules: a name, a glob pattern, several, or a predicate. None: all. One whose
            queries and keys come from the same tensor is taken only by its very name. With ``queries=``: any modules;
            of modules inside each other, the outermost.
        queries: which queries of a sequence are the generated tokens: a slice, whose negative numbers count from the
            end, or a function of (layer, number of queries). Then nothing is asked of the modules but a call of an
            attention function; where they make several, ``Reference(call=…)`` says which, else it is the first.
        grid: (layer, number of tokens) → (height, width) of the generated tokens, where no module around the attention
            is given a feature map of that size. With ``queries=`` it may be (height, width) itself.
        mask: (module, its arguments by name) → mask that broadcasts to ``[B, heads, queries, keys]``, for modules that
            mask in a way of their own. None: CompVis' ``mask`` over keys is read, any other is refused.
        inputs: (args, kwargs) of the model → (latents ``[B, …]``, timestep); None: the argument called like latents, or
            the first 4-D tensor, and the argument called like a timestep.
        projections: names of the query and key projection, or their paths in the module ("processor.to_k_ip").
        num_steps, scheduler: as in :func:`patch_unet`.
        options: see :class:`i2am.tracing.options.TraceSettings`.

    Returns:
        a :class:`Tracer`, already tracing.

    Raises:
        TypeError: an option that there is not.
        ValueError: there is no such module, the model is traced already or compiled; an argument does not fit. Nothing
            changed.
    """
    from i2am.families.modules import AttentionModules
    from i2am.families.sequences import Sequences

    model, layers = inside(model), options.pop("layers", None)
    settings = TraceSettings(output="model", **options)
    described = reference if callable(reference) else _described(reference)
    if described is None or isinstance(described, (Concatenated, Banked)):
        raise ValueError(f"patch_modules takes i2am.Reference, several, or a function, got reference={reference!r}")
    if where is not None and layers is not None:
        raise ValueError("layers= and where= are the same: pass one")
    chosen = where if layers is None else layers
    if queries is not None:
        if chosen is None or grid is None:
            raise ValueError("queries= needs layers=, the modules that call attention, and grid=, (height, width)")
        if mask is not None or projections != ("to_q", "to_k"):
            raise ValueError("queries= takes attention as it is called: without mask= and projections=")
        sequences = Sequences(model, chosen, queries, described, grid, inputs)
        return Tracer(model, sequences, _clock(num_steps, scheduler), settings, told=_told_by_caller(sequences))
    if grid is not None and not callable(grid):
        raise ValueError("grid= is a function of (layer, number of tokens), or with queries= (height, width)")
    family = AttentionModules(
        model,
        chosen,
        described,
        grid=grid,
        mask=mask,
        inputs=inputs,
        projections=(projections[0], projections[1]),
    )
    return Tracer(model, family, _clock(num_steps, scheduler), settings, told=_told_by_caller(family))


def _patch(
    model: nn.Module, entry: str, reference: References, num_steps: int | None, scheduler: Any, settings: TraceSettings
) -> Tracer:
    from i2am.families.registry import read_model

    model = inside(model)
    family = read_model(model, _request(reference, settings), entry=entry)
    return Tracer(model, family, _clock(num_steps, scheduler), settings, told=_told_by_caller(family))


def _told_by_caller(family: Family) -> Callable[[], Told]:
    """Return what asks the pipeline that is calling a bare model, if one does."""
    from i2am.families.pipeline import told_by

    def told() -> Told:
        pipe = calling_pipeline()
        return Told() if pipe is None else told_by(pipe, family)

    return told


def _clock(num_steps: int | None, scheduler: Any) -> Clock:
    """Return a bare model's clock; it watches the scheduler from now on."""
    if num_steps is not None and scheduler is not None:
        raise ValueError("pass num_steps or scheduler, not both: the scheduler knows its steps")
    if scheduler is not None and is_sampler(scheduler):
        return SamplerClock(scheduler)
    if scheduler is not None and not all(hasattr(scheduler, name) for name in ("step", "set_timesteps")):
        raise ValueError(
            f"scheduler= takes a scheduler of diffusers or a sampler of CompVis, got {type(scheduler).__name__}, which "
            "has no step and set_timesteps: pass num_steps= where each step has a timestep of its own"
        )
    if scheduler is not None:
        return SchedulerClock(scheduler)
    return TimestepClock() if num_steps is None else CountingClock(num_steps)


def _request(reference: References, settings: TraceSettings) -> Request:
    if settings.mode == "self" and reference is not None:
        raise ValueError(f'mode="self" looks at no reference, got reference={reference!r}')
    return Request(
        _described(reference), self_attention=settings.mode == "self", rollout=settings.rollout, sets=settings.sets
    )


def _described(reference: References) -> Described:
    if reference is None or isinstance(reference, (Concatenated, Banked)):
        return reference
    references = [reference] if isinstance(reference, Reference) else list(reference)
    if not references or not all(isinstance(r, Reference) for r in references):
        raise ValueError(f"reference must be an i2am.Reference or several of them, got {reference!r}")
    names = [r.name for r in references]
    if len(set(names)) < len(names):
        raise ValueError(f"references need different names, got {names}: Reference(..., name=...)")
    return references
