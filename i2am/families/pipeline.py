"""From a diffusers pipeline to the model to trace, its family, and what the pipeline says of its guidance."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from i2am.families import CHANNELS, RESIDUAL, Family, Request, View, no_reference_keys
from i2am.families.ip_adapter import has_ip_adapter
from i2am.families.kandinsky import added_key_attentions
from i2am.families.registry import calls_own_code, facts_of, read_model, why_not, with_adapter
from i2am.families.tokens import patch_grid
from i2am.families.unet import channels_beside
from i2am.tracing.guidance import Told
from i2am.tracing.who import images_of_call
from i2am.tracing.wrappers import inside


class TracedPipeline(NamedTuple):
    """Facts of a pipeline about how it is to be traced."""

    model: nn.Module
    family: Family
    told: Callable[[], Told]  # about the guidance of its running call
    pixels: int  # of the output image per latent pixel (per token where latents are tokens)
    views: Callable[[dict[str, Any]], View] | None = None  # see PipelineFacts
    by_timestep: bool = False  # see PipelineFacts
    timestep: Callable[[float], float] | None = None  # see PipelineFacts


def read_pipeline(pipe: Any, request: Request) -> TracedPipeline:
    """Find the denoising model of ``pipe`` and where the reference enters it.

    Raises:
        ValueError: not a pipeline, or one whose reference never becomes attention keys.
    """
    transformer = inside(getattr(pipe, "transformer", None))
    unet = inside(getattr(pipe, "unet", None) or getattr(pipe, "image_unet", None))
    if hasattr(pipe, "scheduler") and isinstance(transformer, nn.Module):
        return _read_transformer(pipe, transformer, request)
    facts = facts_of(type(pipe))
    if facts is not None and facts.model is not None:
        unet = inside(getattr(pipe, facts.model))
    if hasattr(pipe, scheduler_of(type(pipe))) and isinstance(unet, nn.Module):
        return _read_unet(pipe, unet, request)
    if facts is not None and facts.refused is not None:
        raise ValueError(no_reference_keys(type(pipe).__name__, facts.refused))
    raise ValueError(
        f"trace takes a diffusers pipeline with a UNet or transformer and a scheduler, got {type(pipe).__name__}; "
        "for a bare model use i2am.patch_unet, i2am.patch_transformer or i2am.patch_modules"
    )


def scheduler_of(kind: type[Any]) -> str:
    """Return the attribute of a pipeline that holds the scheduler of what is traced."""
    facts = facts_of(kind)
    return "scheduler" if facts is None else facts.scheduler


def _read_unet(pipe: Any, unet: nn.Module, request: Request) -> TracedPipeline:
    facts = facts_of(type(pipe))
    if facts is not None and facts.described is not None and request.references is None:
        described = facts.described
        request = request._replace(references=described(pipe) if callable(described) else described)
    encoder = getattr(pipe, "image_encoder", None)
    text = any(getattr(pipe, part, None) is not None for part in ("text_encoder", "text_encoder_2", "tokenizer"))
    known = facts is not None and facts.refused is None and not facts.adapter
    has_keys = known or request.references or has_ip_adapter(unet) or added_key_attentions(unet)
    if not (request.self_attention or has_keys or request.sets) and (encoder is None or text):
        raise ValueError(no_reference_keys(type(pipe).__name__, _why_not(pipe, unet)))
    request = request._replace(image_only=encoder is not None and not text, image_grid=patch_grid(encoder))
    family = read_model(unet, request, entry="patch_unet")
    views = None if facts is None else facts.views
    return TracedPipeline(unet, family, lambda: told_by(pipe, family), _latent_pixels(pipe), views)


def _read_transformer(pipe: Any, transformer: nn.Module, request: Request) -> TracedPipeline:
    name, facts = type(pipe).__name__, facts_of(type(pipe))
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(f"{name} has two denoising models: trace one with i2am.patch_transformer")
    request = request._replace(image_grid=patch_grid(getattr(pipe, "image_encoder", None)))
    refused = facts is None or facts.refused is not None
    asked = request.self_attention or request.references or request.sets
    sometimes = facts is not None and facts.keys is not None
    if refused and not asked and not sometimes and not _adapted(transformer):
        raise ValueError(no_reference_keys(name, why_not(type(pipe))))
    family = read_model(transformer, request, entry="patch_transformer")
    if refused and not (asked or family.has_adapters()):
        raise ValueError(no_reference_keys(name, why_not(type(pipe))))
    pixels = _latent_pixels(pipe) * family.latent_pixels
    by_timestep, timestep = (False, None) if facts is None else (facts.by_timestep, facts.timestep)
    return TracedPipeline(transformer, family, lambda: told_by(pipe, family), pixels, None, by_timestep, timestep)


def _adapted(transformer: nn.Module) -> bool:
    """Tell whether modules of an adapter may be in a transformer: then its family is asked."""
    return any("_ip" in name or "image_proj" in name or "add_k_proj" in name for name, _ in transformer.named_modules())


def told_by(pipe: Any, family: Family) -> Told:
    """Return how the running call of ``pipe`` lays out guidance.

    In a batch: [unconditional, conditional], with perturbed attention [unconditional, conditional, perturbed],
    InstructPix2Pix [conditional, image only, unconditional]. Of older pipelines (Paint-by-Example, ImageVariation) and
    of others' code only the number of pictures is known: as often as the batch holds them, so many parts it has.
    """
    name = type(pipe).__name__
    guider = getattr(pipe, "guider", None)
    predictions = getattr(guider, "_input_predictions", None)
    if predictions and "pred_cond" in predictions:
        how = f"{name}'s guider {type(guider).__name__}"
        return Told(1, 0, predictions.index("pred_cond"), how=how)
    facts = facts_of(type(pipe))
    if facts is not None and facts.told is not None:
        return facts.told(pipe)
    call = family.conditional_call if _of_diffusers(pipe) else None
    if not family.batched_guidance:
        return Told(1, 0, call, how=f"{name}'s order of calls")
    if calls_own_code(type(pipe)):  # its attributes may be called like those of diffusers, and mean something else
        return Told(images=images_of_call(pipe), how=name)
    try:
        guided = bool(pipe.do_classifier_free_guidance)
    except AttributeError:  # no such property, or not called yet
        return Told(call=call, images=images_of_call(pipe), how=name)
    if guided and hasattr(pipe, "image_guidance_scale"):
        return Told(3, 0, call, how=name)
    perturbed = bool(getattr(pipe, "do_perturbed_attention_guidance", False))
    return Told(1 + guided + perturbed, 1 if guided else 0, call, how=name)


def _of_diffusers(pipe: Any) -> bool:
    """Tell whether the pipeline's call is diffusers' own code, whose order of calls is known."""
    module = getattr(type(pipe).__call__, "__module__", "") or ""
    return module.startswith("diffusers.") and module in sys.modules


def _latent_pixels(pipe: Any) -> int:
    """Return pixels of the output image per pixel of its latents."""
    names = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
    own = next((x for x in (getattr(pipe, name, None) for name in names) if x), None)
    if own:
        return int(own)
    coder = getattr(pipe, "vae", None) or getattr(pipe, "movq", None)  # Kandinsky's
    return 2 ** (len(coder.config.block_out_channels) - 1) if coder is not None else 1


def _why_not(pipe: Any, unet: nn.Module) -> str:
    """Return why a UNet pipeline without adapter has no reference keys."""
    if facts_of(type(pipe)) is None and calls_own_code(type(pipe)):
        return why_not(type(pipe))
    if channels_beside(unet):
        return with_adapter(type(pipe), CHANNELS)
    if getattr(pipe, "controlnet", None) is not None or getattr(pipe, "adapter", None) is not None:
        return with_adapter(type(pipe), RESIDUAL)
    return why_not(type(pipe))
