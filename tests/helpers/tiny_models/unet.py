"""Small, randomly initialised diffusers models and pipelines, built offline: what the tests trace."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

CONTEXT = 24  # cross-attention width
VISION = 32  # image encoder width; 24 px in patches of 6: a 4×4 grid and a class token
PATCHES = (4, 4)


def unet(in_channels: int = 4, seed: int = 0, **config) -> UNet2DConditionModel:
    """Three levels like SD 1.5's: cross-attention on the upper two and in the mid block, 2 to 4 wide heads."""
    torch.manual_seed(seed)
    defaults = dict(
        sample_size=16,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CONTEXT,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return UNet2DConditionModel(**(defaults | config)).eval()


def vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
    ).eval()


def _vision_config(**extra) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=VISION,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=6,
        projection_dim=CONTEXT,
        **extra,
    )


def image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(_vision_config()).eval()


def feature_extractor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})


def text(kind=CLIPTextModel):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=CONTEXT,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=62,
        eos_token_id=63,
        projection_dim=CONTEXT,
    )
    return kind(config).eval()


def tokenizer() -> CLIPTokenizer:
    vocab = {chr(97 + i) + end: 2 * i + bool(end) for i in range(26) for end in ("", "</w>")}
    vocab |= {"<|startoftext|>": 62, "<|endoftext|>": 63}
    if int(transformers.__version__.split(".")[0]) >= 5:
        return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    with tempfile.TemporaryDirectory() as folder:  # transformers 4 reads files
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        for path, text in zip(files, (json.dumps(vocab), "#version: 0.2\n"), strict=True):
            path.write_text(text, encoding="utf-8")
        return CLIPTokenizer(*map(str, files), model_max_length=77)


def image(size=(32, 32), seed: int = 0) -> Image.Image:
    """A smooth random picture; ``size`` is (width, height)."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def mask(size=(32, 32)) -> Image.Image:
    m = np.zeros(size[::-1], dtype=np.uint8)
    m[size[1] // 4 : size[1] // 2, size[0] // 4 :] = 255
    return Image.fromarray(m)


def ddim() -> DDIMScheduler:
    return DDIMScheduler(steps_offset=1, clip_sample=False)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_ip_adapters(model: UNet2DConditionModel, *kinds: str) -> None:
    """Loads random IP-Adapters ("base": 4 tokens, "plus": 16, "full": 4×4 patches and CLS) as diffusers does."""
    torch.manual_seed(1)
    width = model.config.cross_attention_dim
    make = {
        "base": lambda: ImageProjection(CONTEXT, width, num_image_text_embeds=4),
        "plus": lambda: IPAdapterPlusImageProjection(VISION, width, 16, 1, 8, 2, 16, 2),
        "full": lambda: IPAdapterFullImageProjection(VISION, width),
    }
    tokens = {"base": 4, "plus": 16, "full": 257}  # a label for "full": diffusers writes 257 whatever the encoder
    processors = {}
    for name, processor in model.attn_processors.items():
        module = model.get_submodule(name.removesuffix(".processor"))
        if module.is_cross_attention:
            processor = IPAdapterAttnProcessor2_0(module.inner_dim, width, [tokens[k] for k in kinds]).eval()
        processors[name] = processor
    model.set_attn_processor(processors)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([make[kind]() for kind in kinds]).eval()
    model.config.encoder_hid_dim_type = "ip_image_proj"


def paint_by_example(**unet_config):
    from diffusers import PaintByExamplePipeline
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder

    torch.manual_seed(0)
    encoder = PaintByExampleImageEncoder(_vision_config(), proj_size=CONTEXT).eval()
    return quiet(
        PaintByExamplePipeline(vae(), encoder, unet(9, **unet_config), ddim(), None, feature_extractor(), False)
    )


def image_variation():
    return quiet(
        StableDiffusionImageVariationPipeline(vae(), image_encoder(), unet(), ddim(), None, feature_extractor(), False)
    )


def versatile():
    from diffusers import VersatileDiffusionImageVariationPipeline

    return quiet(VersatileDiffusionImageVariationPipeline(feature_extractor(), image_encoder(), unet(), vae(), ddim()))


def _sd_parts(in_channels: int, adapters: tuple[str, ...]) -> dict:
    model = unet(in_channels)
    if adapters:
        add_ip_adapters(model, *adapters)
    return dict(
        vae=vae(),
        text_encoder=text(),
        tokenizer=tokenizer(),
        unet=model,
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=feature_extractor(),
        image_encoder=image_encoder(),
        requires_safety_checker=False,
    )


def sd(*adapters: str) -> StableDiffusionPipeline:
    return quiet(StableDiffusionPipeline(**_sd_parts(4, adapters)))


def sd_inpaint(*adapters: str) -> StableDiffusionInpaintPipeline:
    return quiet(StableDiffusionInpaintPipeline(**_sd_parts(9, adapters)))


def sd_controlnet(*adapters: str) -> StableDiffusionControlNetPipeline:
    controlnet = ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=(8, 8)).eval()
    return quiet(StableDiffusionControlNetPipeline(**_sd_parts(4, adapters), controlnet=controlnet))


def sdxl(*adapters: str) -> StableDiffusionXLPipeline:
    """Head counts differ between levels, as SDXL's 10 and 20 do."""
    model = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=CONTEXT + 6 * 8,
        cross_attention_dim=2 * CONTEXT,
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 2, 2),
        use_linear_projection=True,
    )
    if adapters:
        add_ip_adapters(model, *adapters)
    return quiet(
        StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=text(),
            text_encoder_2=text(CLIPTextModelWithProjection),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=model,
            scheduler=ddim(),
            image_encoder=image_encoder(),
            feature_extractor=feature_extractor(),
            add_watermarker=False,
        )
    )
