"""Stand-ins for published pipelines: the same classes and calls, a few thousand random weights, no download.

What runs on them runs on the checkpoints. Their maps say nothing about those: random attention looks nowhere.
"""

from __future__ import annotations

import inspect
import json
import string
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL
from torch import nn

WIDTH = 32  # of every token
SHARPNESS = 3.0  # of the adapter's attention: untrained, it is nearly uniform
LETTERS = sorted(set(string.printable) - set(string.whitespace))


def _tokenizer(vocab: dict[str, int]) -> Any:
    """Return a CLIP tokenizer of letters, which transformers 4 reads from files."""
    from transformers import CLIPTokenizer

    if "vocab" in inspect.signature(CLIPTokenizer.__init__).parameters:
        return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps(vocab), encoding="utf-8")
        files[1].write_text("#version: 0.2\n", encoding="utf-8")
        return CLIPTokenizer(*map(str, files), model_max_length=77)


def ip_adapter() -> diffusers.StableDiffusionPipeline:
    """Build Stable Diffusion with an IP-Adapter of the "full" kind: 8×8 image tokens; pictures have 64 px a side."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import IPAdapterFullImageProjection, MultiIPAdapterImageProjection
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(0)
    layers = dict(hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVisionConfig(**layers, image_size=64, patch_size=8, projection_dim=WIDTH)
    words = {x + end: 2 * i + bool(end) for i, x in enumerate(LETTERS) for end in ("", "</w>")}
    special = {"<|startoftext|>": len(words), "<|endoftext|>": len(words) + 1}
    text = CLIPTextConfig(**layers, vocab_size=len(words) + 2, eos_token_id=len(words) + 1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text),
        tokenizer=_tokenizer(words | special),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        image_encoder=CLIPVisionModelWithProjection(vision),
        requires_safety_checker=False,
    )
    processors = {}
    for name, processor in unet.attn_processors.items():
        attention = unet.get_submodule(name.removesuffix(".processor"))
        if attention.is_cross_attention:  # 257 is what diffusers calls this kind, whatever the encoder
            processor = IPAdapterAttnProcessor2_0(attention.inner_dim, WIDTH, [257])
            sharpen(processor.to_k_ip)
        processors[name] = processor
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([IPAdapterFullImageProjection(WIDTH, WIDTH)])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    return quiet(pipe)


def flux_kontext() -> diffusers.FluxKontextPipeline:
    """Build FLUX.1 Kontext without its text encoders (see :func:`flux_prompt`): 4 pixels a token each way."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    encoders = dict(text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return quiet(
        diffusers.FluxKontextPipeline(vae=autoencoder(), transformer=transformer, scheduler=scheduler, **encoders)
    )


def flux_prompt() -> dict[str, torch.Tensor]:
    """Return what a text would have become: arguments of the stand-in's call, in the place of ``prompt=``."""
    noise = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(1, 8, WIDTH, generator=noise),
        "pooled_prompt_embeds": torch.randn(1, WIDTH, generator=noise),
    }


def autoencoder() -> AutoencoderKL:
    """Build an autoencoder of 2 pixels a latent each way."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        shift_factor=0.1,
        scaling_factor=0.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def sharpen(layers: nn.Module) -> None:
    """Multiply an adapter's key weights, so that its attention is not flat."""
    with torch.no_grad():
        for weight in layers.parameters():
            weight.mul_(SHARPNESS)


def quiet(pipe: diffusers.DiffusionPipeline) -> diffusers.DiffusionPipeline:
    """Put the parts into inference mode and hide the progress bar."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
