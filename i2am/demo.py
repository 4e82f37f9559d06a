"""What ``i2am demo`` runs: a real inpainting pipeline with an image prompt, small enough for a laptop, and offline.

The pipeline's weights are random, so its pictures mean nothing and its maps show the mechanics: which call is traced,
how the levels relate, what is written. ``build_pipeline`` is the only place that knows.
"""

from __future__ import annotations

import importlib.util
import json
import string
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from diffusers import StableDiffusionInpaintPipeline
    from PIL.Image import Image

    from i2am.maps import AttributionMaps

NOTE = "The demo's weights are random: these maps show the mechanics, not a meaning."
SIZE = 256  # pixels of the generated image; 64×64 latents, attention at 32×32 and 16×16
PATCH_GRID = 16  # reference tokens a side, as CLIP ViT-L/14 has at 224 pixels
CROSS_DIM = 64
SHARPNESS = 3.0  # of the adapter's attention: untrained, it is nearly uniform, and there would be little to see
PHOTOGRAPHS = {  # in scikit-image's wheel: (file, square to cut out)
    "image": ("coffee.png", (100, 0, 500, 400)),
    "reference": ("chelsea.png", (75, 0, 375, 300)),
}


class MissingPhotographs(RuntimeError):
    """scikit-image is not installed, or came without its photographs."""


@contextmanager
def one_thread():
    """torch on one thread: a model this small loses more to threads waiting for each other (10× on a busy machine)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(steps: int = 10, seed: int = 0, time_groups: int = 5) -> tuple[AttributionMaps, Image, Image]:
    """Paints a reference into a photograph, traced.

    Args:
        steps: denoising steps.
        seed: of the initial noise; the weights are always the same.
        time_groups: as in :func:`i2am.trace`.

    Returns:
        ``(maps, generated, reference)``.

    Raises:
        MissingPhotographs: there is nothing to paint on.
    """
    import i2am

    image, reference, mask = photographs()
    pipe = build_pipeline()
    with i2am.trace(pipe, time_groups=time_groups) as tracer:
        generated = pipe(
            prompt="a cat in a cup",
            image=image,
            mask_image=mask,
            ip_adapter_image=reference,
            num_inference_steps=steps,
            guidance_scale=3.0,
            height=SIZE,
            width=SIZE,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
    return tracer.maps(), generated, reference


def photographs() -> tuple[Image, Image, Image]:
    """``(image, reference, mask)``, square RGB photographs of SIZE pixels and a mask (L) of the part to paint.

    Read from scikit-image's own folder, so nothing is ever downloaded.

    Raises:
        MissingPhotographs: scikit-image is not installed, or this build has no such photograph.
    """
    from PIL import Image, ImageDraw

    package = importlib.util.find_spec("skimage")
    if package is None:
        raise MissingPhotographs('the demo\'s photographs come with scikit-image: pip install "i2am[demo]"')
    folder = Path(package.origin).parent / "data"
    squares = {}
    for name, (file, box) in PHOTOGRAPHS.items():
        if not (folder / file).is_file():
            raise MissingPhotographs(f'this scikit-image has no {file} in {folder}: pip install -U "i2am[demo]"')
        squares[name] = Image.open(folder / file).convert("RGB").crop(box).resize((SIZE, SIZE), Image.LANCZOS)
    mask = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(mask).ellipse([SIZE * 0.28, SIZE * 0.14, SIZE * 0.74, SIZE * 0.62], fill=255)
    return squares["image"], squares["reference"], mask


def build_pipeline(seed: int = 0) -> StableDiffusionInpaintPipeline:
    """A Stable Diffusion inpainting pipeline with an IP-Adapter that keeps CLIP's tokens: 16×16 after a class token.

    The classes are diffusers' and transformers' own, at a small size and with random weights; but the autoencoder
    averages and enlarges pixels, so that what lies outside the mask stays a photograph.

    Args:
        seed: of the weights.
    """
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=SIZE // 4,
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=CROSS_DIM,
            attention_head_dim=4,  # this is the number of heads
            norm_num_groups=8,
        )
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CROSS_DIM,
            intermediate_size=CROSS_DIM,
            num_hidden_layers=1,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        vision = CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            projection_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=14 * PATCH_GRID,
            patch_size=14,
        )
        pipe = StableDiffusionInpaintPipeline(
            vae=averaging_autoencoder(),
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=DDIMScheduler(steps_offset=1),
            safety_checker=None,
            feature_extractor=CLIPImageProcessor(size=vision.image_size, crop_size=vision.image_size),
            image_encoder=CLIPVisionModelWithProjection(vision),
            requires_safety_checker=False,
        )
        weights = ip_adapter_weights(unet, vision.hidden_size)
        pipe.load_ip_adapter(weights, subfolder="", weight_name="", low_cpu_mem_usage=False)
    return pipe


def averaging_autoencoder():
    """Stands in for Stable Diffusion's autoencoder: 4×4 pixels become the mean of each colour, and of all three."""
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
    from diffusers.models.autoencoders.vae import DecoderOutput

    class AveragingAutoencoder(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, block_out_channels=(3, 3, 4), latent_channels=4, scaling_factor=1.5):
            super().__init__()
            self.mix = nn.Parameter(torch.cat([torch.eye(3), torch.full((1, 3), 1 / 3)]))  # [latents, colours]

        def encode(self, pixels):
            return AutoencoderTinyOutput(latents=torch.einsum("lc,bchw->blhw", self.mix, F.avg_pool2d(pixels, 4)))

        def decode(self, latents, return_dict=True, generator=None):
            pixels = F.interpolate(latents[:, :3], scale_factor=4, mode="bicubic").clamp(-1, 1)
            return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    return AveragingAutoencoder()


def build_tokenizer():
    """A CLIP tokenizer that spells: its vocabulary is ASCII. Needs no download."""
    from transformers import CLIPTokenizer

    letters = sorted(set(string.printable) - set(string.whitespace))
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def ip_adapter_weights(unet: nn.Module, image_dim: int) -> dict[str, dict[str, torch.Tensor]]:
    """A random "full" IP-Adapter for ``unet``, in the layout of the published files (``load_ip_adapter`` reads it).

    Args:
        unet: a UNet2DConditionModel; its text cross-attentions give the shapes.
        image_dim: width of the image encoder's tokens.
    """
    cross_dim = unet.config.cross_attention_dim
    projection = nn.Sequential(
        nn.Linear(image_dim, image_dim), nn.GELU(), nn.Linear(image_dim, cross_dim), nn.LayerNorm(cross_dim)
    )
    adapter = {}
    cross_attentions = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    for i, name in enumerate(cross_attentions):
        for part in ("to_k", "to_v"):
            linear = nn.Linear(cross_dim, unet.get_submodule(f"{name}.{part}").out_features, bias=False)
            adapter[f"{2 * i + 1}.{part}_ip.weight"] = SHARPNESS * linear.weight.detach()
    return {"image_proj": projection.state_dict(prefix="proj."), "ip_adapter": adapter}
