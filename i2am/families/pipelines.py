"""From a diffusers pipeline to the model to trace and its family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from i2am.families import Family
from i2am.families.unet import read_unet
from i2am.layout import Grid, Reference


class Traced(NamedTuple):
    """What a pipeline says about how it is to be traced."""

    model: nn.Module
    family: Family
    guidance_parts: Callable[[], tuple[int | None, int | None]]  # (parts, index of the conditional one); None: unknown
    pixels: int  # of the output image per latent pixel


def read_pipeline(pipe, references: Sequence[Reference] | None) -> Traced:
    """Finds the denoising model of ``pipe`` and where the reference enters it.

    Raises:
        ValueError: not a pipeline, or one whose reference never becomes attention keys.
    """
    unet = getattr(pipe, "unet", None) or getattr(pipe, "image_unet", None)
    if not hasattr(pipe, "scheduler") or not isinstance(unet, nn.Module):
        raise ValueError(
            f"trace takes a diffusers pipeline with a UNet and a scheduler, got {type(pipe).__name__}; for a bare UNet "
            "use i2am.patch_unet"
        )
    encoder = getattr(pipe, "image_encoder", None)
    text = any(getattr(pipe, part, None) is not None for part in ("text_encoder", "text_encoder_2", "tokenizer"))
    family = read_unet(unet, references, image_only=encoder is not None and not text, image_grid=_patch_grid(encoder))
    return Traced(unet, family, lambda: _guidance_parts(pipe), getattr(pipe, "vae_scale_factor", 1))


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
    try:
        guided = bool(pipe.do_classifier_free_guidance)
    except AttributeError:  # no such property, or not called yet
        return None, None
    if guided and hasattr(pipe, "image_guidance_scale"):
        return 3, 0
    perturbed = bool(getattr(pipe, "do_perturbed_attention_guidance", False))
    parts = 1 + guided + perturbed
    return parts, 1 if guided else 0
