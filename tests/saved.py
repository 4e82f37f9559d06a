"""Small pipelines saved in folders, and images to run them on: what the commands are tested with."""

import numpy as np
import offline
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file


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


@pytest.fixture(scope="session")
def paint_by_example(tmp_path_factory):
    """Folder of a Paint-by-Example pipeline: the reference is one token."""
    folder = tmp_path_factory.mktemp("pbe")
    build_paint_by_example().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def inpaint(tmp_path_factory):
    """(folder of a Stable Diffusion inpainting pipeline, folder of an IP-Adapter of 4×4 tokens after a class token)."""
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    tokenizer = offline.build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    unet = tiny_unet(in_channels=9)
    pipe = StableDiffusionInpaintPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=feature_extractor(),
        requires_safety_checker=False,
    )
    folder, adapter = tmp_path_factory.mktemp("inpaint"), tmp_path_factory.mktemp("adapter")
    pipe.save_pretrained(folder)
    CLIPVisionModelWithProjection(tiny_vision()).save_pretrained(adapter / "models" / "image_encoder")
    weights = offline.ip_adapter_weights(unet, image_dim=8)
    flat = {f"{part}.{name}": x.contiguous() for part, tensors in weights.items() for name, x in tensors.items()}
    save_file(flat, adapter / "models" / "ip.safetensors")
    return folder, adapter


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Folder with image.png (72×64), mask.png (of another size), reference.png (60×40) and a file that is no image."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 72, 3), dtype=np.uint8)).save(folder / "image.png")
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / "reference.png")
    mask = Image.new("L", (36, 32))
    mask.paste(255, (8, 8, 24, 24))
    mask.save(folder / "mask.png")
    (folder / "broken.png").write_bytes((folder / "image.png").read_bytes()[:600])
    (folder / "text.png").write_text("not an image")
    return folder
