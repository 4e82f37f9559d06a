"""The smallest pipelines that the commands run on."""

import torch


def tiny_unet(**changes):
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**config | changes)


def tiny_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
    )


def tiny_vision(**changes):
    from transformers import CLIPVisionConfig

    config = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "projection_dim": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    return CLIPVisionConfig(**config | changes)


def feature_extractor():
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size=28, crop_size=28)


def build_paint_by_example(**unet_changes):
    from diffusers import DDIMScheduler, PaintByExamplePipeline
    from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder

    torch.manual_seed(0)
    return PaintByExamplePipeline(
        vae=tiny_vae(),
        image_encoder=PaintByExampleImageEncoder(tiny_vision(), proj_size=8),
        unet=tiny_unet(in_channels=9, **unet_changes),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=feature_extractor(),
        requires_safety_checker=False,
    )
