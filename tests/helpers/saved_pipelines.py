"""Small pipelines saved in folders, and images to run them on: what the commands are tested with."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.helpers.tiny_models import offline
from tests.helpers.tiny_models.small import build_paint_by_example, feature_extractor, tiny_unet, tiny_vae, tiny_vision


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
