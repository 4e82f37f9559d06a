"""From a diffusers pipeline to the model to trace and its family."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from i2am.families import Family
from i2am.families.kandinsky import added_key_attentions
from i2am.families.transformers import read_transformer
from i2am.families.unet import channels_beside, has_ip_adapter, no_reference_keys, read_unet
from i2am.families.wan import Wan
from i2am.references import Concatenated, Grid, Reference

IN_CONTEXT = (
    "BriaFiboEdit*",
    "FluxKontext*",
    "Flux2*",
    "QwenImageEdit*",
    "LongCatImageEdit*",
)  # their reference becomes tokens of its own
CHANNELS = "the image enters as channels beside the latents, so that every token mixes both"
RESIDUAL = "the control image enters as residuals of a ControlNet"
START = "the image is only what denoising starts from"
NO_KEYS = {
    "FluxFill*": CHANNELS,
    "FluxControlNet*": RESIDUAL,
    "FluxControl*": CHANNELS,
    "Flux*Img2Img*": START,
    "Flux*Inpaint*": START,
    "VisualCloze*": "several pictures share rows of one grid, which i2am does not take apart",
    "QwenImageControlNet*": RESIDUAL,
    "QwenImageLayered*": "the generated tokens are several layers, which have no one grid",
    "QwenImageI*": START,
    "StableDiffusion3ControlNet*": RESIDUAL,
    "StableDiffusion3I*": START,
    "WanImageToVideo*": CHANNELS,
    "*": "it draws from text alone",
}


class Traced(NamedTuple):
    """What a pipeline says about how it is to be traced."""

    model: nn.Module
    family: Family
    guidance_parts: Callable[[], tuple[int | None, int | None]]  # (parts, index of the conditional one); None: unknown
    pixels: int  # of the output image per latent pixel (per token where latents are tokens)


def read_pipeline(
    pipe, references: Sequence[Reference] | None, *, itself: bool = False, rollout: bool = False
) -> Traced:
    """Finds the denoising model of ``pipe`` and where the reference enters it.

    Args:
        pipe: a diffusers pipeline.
        references: as the caller describes them, or None.
        itself: trace the generated picture's attention to itself (``mode="self"``).
        rollout: roll resampled tokens back to the image encoder's patches.

    Raises:
        ValueError: not a pipeline, or one whose reference never becomes attention keys.
    """
    transformer = getattr(pipe, "transformer", None)
    if hasattr(pipe, "scheduler") and isinstance(transformer, nn.Module):
        return _read_transformer_pipeline(pipe, transformer, references, itself, rollout)
    unet = getattr(pipe, "unet", None) or getattr(pipe, "image_unet", None)
    if not hasattr(pipe, "scheduler") or not isinstance(unet, nn.Module):
        raise ValueError(
            f"trace takes a diffusers pipeline with a UNet or transformer and a scheduler, got {type(pipe).__name__}; "
            "for a bare model use i2am.patch_unet, i2am.patch_transformer or i2am.patch_modules"
        )
    if _is_a(pipe, "DreamLite*") and references is None:
        references = Concatenated("width")
    encoder = getattr(pipe, "image_encoder", None)
    text = any(getattr(pipe, part, None) is not None for part in ("text_encoder", "text_encoder_2", "tokenizer"))
    told = references or has_ip_adapter(unet) or added_key_attentions(unet)
    if not (itself or told) and (encoder is None or text):
        raise ValueError(no_reference_keys(type(pipe).__name__, _why_not(pipe, unet)))
    family = read_unet(
        unet,
        references,
        image_only=encoder is not None and not text,
        image_grid=_patch_grid(encoder),
        itself=itself,
        rollout=rollout,
    )
    return Traced(unet, family, lambda: _guidance_parts(pipe), _latent_pixels(pipe))


def _read_transformer_pipeline(pipe, transformer: nn.Module, references, itself: bool, rollout: bool) -> Traced:
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(f"{type(pipe).__name__} has two denoising models: trace one with i2am.patch_transformer")
    family = read_transformer(transformer, references, itself=itself, rollout=rollout)
    name = type(pipe).__name__
    known = any(_is_a(pipe, pattern) for pattern in IN_CONTEXT)
    if not (itself or references or known or family.has_adapters()):
        reason = next(reason for pattern, reason in NO_KEYS.items() if _is_a(pipe, pattern))
        raise ValueError(no_reference_keys(name, reason))
    if isinstance(family, Wan):
        family.image_grid = _patch_grid(getattr(pipe, "image_encoder", None))
    guidance_parts = (lambda: _guidance_parts(pipe)) if family.batched_guidance else (lambda: (1, 0))
    return Traced(transformer, family, guidance_parts, _latent_pixels(pipe) * family.latent_pixels)


def _latent_pixels(pipe) -> int:
    """Pixels of the output image per pixel of its latents."""
    own = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None)
    if own:
        return own
    coder = getattr(pipe, "vae", None) or getattr(pipe, "movq", None)  # Kandinsky's
    return 2 ** (len(coder.config.block_out_channels) - 1) if coder is not None else 1


def _is_a(pipe, pattern: str) -> bool:
    """Whether the name of the pipeline's class, or of one that it is made from, fits a glob pattern."""
    return any(fnmatch.fnmatchcase(kind.__name__, pattern) for kind in type(pipe).__mro__)


def _why_not(pipe, unet: nn.Module) -> str:
    """Why a UNet pipeline without adapter has no reference keys."""
    if channels_beside(unet):
        return CHANNELS
    if getattr(pipe, "controlnet", None) is not None or getattr(pipe, "adapter", None) is not None:
        return RESIDUAL
    return "its cross-attention looks at text; load the IP-Adapter first, or describe the keys with reference="


def _patch_grid(encoder) -> Grid | None:
    """The patch grid of a CLIP-like image encoder, from its config."""
    config = getattr(encoder, "config", None)
    config = getattr(config, "vision_config", config)
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(image, int) or not isinstance(patch, int):
        return None
    return image // patch, image // patch


def _guidance_parts(pipe) -> tuple[int | None, int | None]:
    """How the running call of ``pipe`` lays out guidance: [uncond, cond], with perturbed attention [uncond, cond, ptb],
    InstructPix2Pix [cond, image only, uncond].

    Older pipelines (Paint-by-Example, ImageVariation) keep it in a local variable: then the latents must tell.
    """
    if _is_a(pipe, "DreamLitePipeline"):
        return 3, 2  # [uncond, image only, cond]; a picture from text alone has two parts, and no reference
    try:
        guided = bool(pipe.do_classifier_free_guidance)
    except AttributeError:  # no such property, or not called yet
        return None, None
    if guided and hasattr(pipe, "image_guidance_scale"):
        return 3, 0
    perturbed = bool(getattr(pipe, "do_perturbed_attention_guidance", False))
    parts = 1 + guided + perturbed
    return parts, 1 if guided else 0
