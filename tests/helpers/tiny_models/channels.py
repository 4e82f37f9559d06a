"""Small pipelines whose image never becomes attention keys: channels, residuals, starting points."""

from __future__ import annotations

from diffusers import (
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
)

from tests.helpers.tiny_models import unet as pipelines


def instruct_pix2pix():
    return pipelines.quiet(StableDiffusionInstructPix2PixPipeline(**pipelines._sd_parts(8, ())))


def img2img():
    return pipelines.quiet(StableDiffusionImg2ImgPipeline(**pipelines._sd_parts(4, ())))


def upscaler():
    parts = pipelines._sd_parts(4, ()) | dict(
        unet=pipelines.unet(7, num_class_embeds=1000), low_res_scheduler=DDPMScheduler()
    )
    for name in ("image_encoder", "requires_safety_checker", "feature_extractor", "safety_checker"):
        parts.pop(name)
    parts["vae"].register_to_config(scaling_factor=0.08333)
    return pipelines.quiet(StableDiffusionUpscalePipeline(**parts))
