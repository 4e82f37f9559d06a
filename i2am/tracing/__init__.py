"""``trace``, ``patch_unet``, ``patch_transformer``, ``patch_modules``: from a pipeline or a model to attribution maps.

The one path the data takes: a root hook opens a scope (``intercept``) with the step (``clock``) and the conditional
samples (``guidance``); module hooks say which attention runs, the family says what it carries; the intercepted
attention call runs the fused op (``ops``), which adds into the running sums (``sums``); ``maps`` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from i2am.maps.sram import Region
from i2am.references import Banked, Concatenated, Grid, LayerFilter, Reference
from i2am.tracing.clock import Clock, CountingClock, SchedulerClock, TimestepClock
from i2am.tracing.tracer import BlindLayerError, Tracer

MODES = ("reference", "self")
Described = Reference | Sequence[Reference] | Concatenated | Banked | None

__all__ = ["BlindLayerError", "Tracer", "patch_modules", "patch_transformer", "patch_unet", "trace"]


def trace(
    pipe,
    time_groups: int = 5,
    layers: LayerFilter = None,
    *,
    reference: Described = None,
    mode: str = "reference",
    rollout: bool = False,
    guidance: str | int = "auto",
    output: str = "i2am",
    backend: str | None = None,
    sram: Mapping[str, Region] | None = None,
    canvas: Grid | None = None,
    **record: Any,
) -> Tracer:
    """Traces a diffusers pipeline: what its images take from the reference.

    ::

        with i2am.trace(pipe) as tracer:
            image = pipe(...).images[0]
        maps = tracer.maps()

    Args:
        pipe: a diffusers pipeline. Its scheduler gives the steps, its guidance the conditional samples, its image
            encoder the reference grid. Load IP-Adapters and LoRAs before tracing.
        time_groups: into how many groups the steps are summed.
        layers: which attention modules: a name, a glob pattern, several, or a predicate. None: all that carry the
            reference.
        reference: which keys encode it, where the pipeline does not tell: one :class:`Reference` per IP-Adapter; among
            a transformer's text tokens (Redux: ``Reference(grid=(27, 27), tokens=slice(-729, None))``); or
            :class:`Concatenated` or :class:`Banked`, where self-attention carries it.
        mode: "reference"; or "self" for a model without reference keys (channel concatenation, ControlNet): maps of the
            generated picture's attention to itself, which say what positions exchange information, never what came
            from the reference. They are named "self".
        rollout: roll G2R and SRAM of an IP-Adapter Plus, or SD3's, back through its resampler to the image encoder's
            patches: see :mod:`i2am.families.resampler`. Its few tokens have no layout of their own.
        guidance: "auto", "none" (every sample counts), or the index of the conditional part of the batch.
        output: "i2am": the fused op's output goes on into the model; "model": the model's own attention runs too, and
            its output goes on, so that images are bit-identical to an untraced run.
        backend: as in :func:`i2am.attention`.
        sram: name → patch of the generated image to follow, a point ``(y, x)`` or a mask, at most 64: read with
            ``maps.sram(name)``.
        canvas: ``(height, width)`` in which points are given; None: pixels of the output image (of a bare UNet: the
            latent grid).
        record: ``record="qk"`` keeps queries and keys so that any patch can be asked afterwards, with ``record_to``,
            ``record_every``, ``record_times``, ``record_dtype`` and ``record_limit``: see
            :class:`i2am.tracing.qk.RecordOptions`.

    Returns:
        a :class:`Tracer`, already tracing; use it as a context manager or call ``unpatch()``.

    Raises:
        ValueError: the pipeline has no reference keys or is traced already; an argument does not fit. Nothing changed.
    """
    from i2am.families.pipelines import read_pipeline

    traced = read_pipeline(pipe, _references(reference), itself=_itself(mode, reference), rollout=rollout)
    _check_rollout(rollout, record)
    return Tracer(
        traced.model,
        traced.family,
        clock=SchedulerClock(pipe.scheduler, evaluations=lambda: getattr(pipe, "_num_timesteps", None)),
        time_groups=time_groups,
        layers=layers,
        guidance=guidance,
        guidance_parts=traced.guidance_parts,
        output=output,
        backend=backend,
        sram=sram,
        canvas=canvas,
        pixels=traced.pixels,
        record=record,
    )


def patch_unet(
    unet: nn.Module,
    *,
    reference: Described = None,
    time_groups: int = 5,
    num_steps: int | None = None,
    scheduler=None,
    mode: str = "reference",
    rollout: bool = False,
    guidance: str | int = "auto",
    layers: LayerFilter = None,
    output: str = "i2am",
    backend: str | None = None,
    sram: Mapping[str, Region] | None = None,
    canvas: Grid | None = None,
    **record: Any,
) -> Tracer:
    """Traces a bare UNet, wherever it is called from.

    ::

        tracer = i2am.patch_unet(unet, reference=i2am.Reference(grid=(16, 16), skip=1), num_steps=50)
        ...  # denoise
        maps = tracer.maps()
        tracer.unpatch()

    Args:
        unet: a UNet2DConditionModel or a model built like it.
        reference: which cross-attention keys encode the reference; several for several references. Not needed with an
            IP-Adapter. :class:`Concatenated` or :class:`Banked` where self-attention carries it.
        time_groups: into how many groups the steps are summed.
        num_steps: denoising steps of a run; steps are counted by their timesteps.
        scheduler: the diffusers scheduler that drives the loop; its steps are counted. With neither, calls are grouped
            by timestep, in equal ranges of [0, 1000).
        guidance: "auto": parts of the batch with identical latents are guidance ([uncond, cond], or InstructPix2Pix's
            [cond, image, uncond]); "none"; or the index of the conditional part.
        mode, rollout, layers, output, backend, sram, canvas, record: as in :func:`trace`; ``record="qk"`` needs
            num_steps or scheduler.

    Returns:
        a :class:`Tracer`, already tracing.

    Raises:
        ValueError: the UNet does not tell where the reference is (the message shows the line to write), is traced
            already or compiled; an argument does not fit. Nothing changed.
    """
    from i2am.families.unet import read_unet

    _check_rollout(rollout, record)
    _check_steps(num_steps, scheduler)
    return Tracer(
        unet,
        read_unet(unet, _references(reference), itself=_itself(mode, reference), rollout=rollout),
        clock=_clock(num_steps, scheduler),
        time_groups=time_groups,
        layers=layers,
        guidance=guidance,
        output=output,
        backend=backend,
        sram=sram,
        canvas=canvas,
        record=record,
    )


def patch_transformer(
    transformer: nn.Module,
    *,
    reference: Described = None,
    time_groups: int = 5,
    num_steps: int | None = None,
    scheduler=None,
    mode: str = "reference",
    rollout: bool = False,
    guidance: str | int = "auto",
    layers: LayerFilter = None,
    output: str = "i2am",
    backend: str | None = None,
    sram: Mapping[str, Region] | None = None,
    canvas: Grid | None = None,
    **record: Any,
) -> Tracer:
    """Traces a bare diffusion transformer, wherever it is called from.

    ::

        tracer = i2am.patch_transformer(transformer, num_steps=28)
        ...  # denoise
        maps = tracer.maps()
        tracer.unpatch()

    Args:
        transformer: a FluxTransformer2DModel, Flux2Transformer2DModel, QwenImageTransformer2DModel, … whose references
            are tokens behind (or before) the generated ones, as their pipelines lay them out.
        reference: which *text* tokens encode a reference, where that is so (Redux).
        guidance: "auto": a call on the latents of the call before, at the same timestep, is the other half of
            guidance and does not count; "none": every call counts; or the index of the conditional call.
        canvas: as in :func:`trace`; None: the grid of the generated tokens.
        time_groups, num_steps, scheduler, mode, rollout, layers, output, backend, sram, record: as in
            :func:`patch_unet`.

    Returns:
        a :class:`Tracer`, already tracing.

    Raises:
        ValueError: the model is of no known family, is traced already or compiled; an argument does not fit. Nothing
            changed.
    """
    from i2am.families.transformers import read_transformer

    _check_rollout(rollout, record)
    _check_steps(num_steps, scheduler)
    return Tracer(
        transformer,
        read_transformer(transformer, _references(reference), itself=_itself(mode, reference), rollout=rollout),
        clock=_clock(num_steps, scheduler),
        time_groups=time_groups,
        layers=layers,
        guidance=guidance,
        output=output,
        backend=backend,
        sram=sram,
        canvas=canvas,
        record=record,
    )


def patch_modules(
    model: nn.Module,
    *,
    reference: Reference | Sequence[Reference] | Callable[[str, int, Grid], Reference | Sequence[Reference]],
    where: LayerFilter = None,
    grid: Callable[[str, int], Grid] | None = None,
    mask: Callable[[nn.Module, dict[str, Any]], Tensor | None] | None = None,
    inputs: Callable[[tuple, dict[str, Any]], tuple[Tensor, Tensor | float]] | None = None,
    projections: tuple[str, str] = ("to_q", "to_k"),
    time_groups: int = 5,
    num_steps: int | None = None,
    scheduler=None,
    guidance: str | int = "auto",
    backend: str | None = None,
    sram: Mapping[str, Region] | None = None,
    canvas: Grid | None = None,
    **record: Any,
) -> Tracer:
    """Traces attention modules of any code base, without importing it: those with ``to_q``, ``to_k`` and ``heads``.

    ::

        tracer = i2am.patch_modules(          # StableVITON: features of the garment branch at the same resolution
            model.model.diffusion_model,
            where="*zero_crossattn*",
            reference=i2am.Reference(grid="queries"),
            num_steps=50,
        )

    What Paint-by-Example's, StableVITON's, DCI-VTON's, PASD's and SeeSR's own code is made of. Hooks on the projections
    see the very queries and keys where the attention is einsums; one that goes through
    ``scaled_dot_product_attention`` or xformers is intercepted. The model's output stays its own, bit for bit.

    Args:
        model: the module whose forward is one evaluation of the denoiser.
        reference: which keys encode the reference; ``Reference(grid="queries")``: on the same grid as the generated
            tokens, at every resolution. Or a function of (layer, number of keys, grid of the generated tokens).
        where: which attention modules: a name, a glob pattern, several, or a predicate. None: all that attend to
            something else than their own input.
        grid: (layer, number of tokens) → (height, width) of the generated tokens, where no module around the attention
            is given a feature map of that size.
        mask: (module, its arguments by name) → mask that broadcasts to ``[B, heads, queries, keys]``, for modules that
            mask in a way of their own. None: CompVis' ``mask`` over keys is read, any other is refused.
        inputs: (args, kwargs) of the model → (latents ``[B, …]``, timestep); None: the first 4-D tensor, and the
            argument called like a timestep or the second one.
        projections: names of the query and key projection.
        time_groups, num_steps, scheduler, guidance, backend, sram, canvas, record: as in :func:`patch_unet`.

    Returns:
        a :class:`Tracer`, already tracing.

    Raises:
        ValueError: there is no such module, the model is traced already or compiled; an argument does not fit. Nothing
            changed.
    """
    from i2am.families.modules import AttentionModules

    _check_steps(num_steps, scheduler)
    described = reference if callable(reference) else _references(reference)
    if described is None or isinstance(described, (Concatenated, Banked)):
        raise ValueError(f"patch_modules takes i2am.Reference, several, or a function, got reference={reference!r}")
    return Tracer(
        model,
        AttentionModules(model, where, described, grid=grid, mask=mask, inputs=inputs, projections=tuple(projections)),
        clock=_clock(num_steps, scheduler),
        time_groups=time_groups,
        layers=None,
        guidance=guidance,
        output="model",
        backend=backend,
        sram=sram,
        canvas=canvas,
        record=record,
    )


def _check_rollout(rollout: bool, record: Mapping[str, Any]) -> None:
    if rollout and record.get("record") is not None:
        raise ValueError(
            "rollout=True rolls sums back, not recorded keys: register patches with sram= instead of record="
        )


def _check_steps(num_steps: int | None, scheduler) -> None:
    if num_steps is not None and scheduler is not None:
        raise ValueError("pass num_steps or scheduler, not both: the scheduler knows its steps")


def _clock(num_steps: int | None, scheduler) -> Clock:
    """A bare model's clock; it watches the scheduler from now on."""
    if scheduler is not None:
        return SchedulerClock(scheduler)
    return TimestepClock() if num_steps is None else CountingClock(num_steps)


def _itself(mode: str, reference: Described) -> bool:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "self" and reference is not None:
        raise ValueError(f'mode="self" looks at no reference, got reference={reference!r}')
    return mode == "self"


def _references(reference: Described) -> list[Reference] | Concatenated | Banked | None:
    if reference is None or isinstance(reference, (Concatenated, Banked)):
        return reference
    references = [reference] if isinstance(reference, Reference) else list(reference)
    if not references or not all(isinstance(r, Reference) for r in references):
        raise ValueError(f"reference must be an i2am.Reference or several of them, got {reference!r}")
    names = [r.name for r in references]
    if len(set(names)) < len(names):
        raise ValueError(f"references need different names, got {names}: Reference(..., name=...)")
    return references
