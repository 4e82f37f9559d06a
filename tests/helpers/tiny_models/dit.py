"""Small, randomly initialised diffusion-transformer pipelines, built offline: what the tests of families trace."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from tests.helpers.tiny_models.unet import quiet

TEXT = 16  # width of the text tokens


def flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler()


def text_tokens(count: int, width: int = TEXT, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed))


def flux_vae(levels: int = 2) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        shift_factor=0.1,
        scaling_factor=0.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def wan_vae(channels: int = 4, *, halvings: int = 1):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=2,
        z_dim=channels,
        dim_mult=[1] * (halvings + 1),
        num_res_blocks=1,
        temperal_downsample=[False] * halvings,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    ).eval()


class Device(torch.nn.Module):
    """What a pipeline asks of a text encoder whose embeddings are given."""

    dtype, device = torch.float32, torch.device("cpu")


def flux_transformer(in_channels: int = 16, **config) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    defaults = dict(
        in_channels=in_channels,
        out_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    return FluxTransformer2DModel(**(defaults | config)).eval()


def _flux_parts(transformer: FluxTransformer2DModel) -> dict:
    return dict(
        scheduler=flow(),
        vae=flux_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def flux(pipeline=FluxKontextPipeline, **config):
    """Any Flux pipeline; its text is given as ``prompt_embeds`` and ``pooled_prompt_embeds``."""
    return quiet(pipeline(**_flux_parts(flux_transformer(**config))))


def flux_prompt(tokens: int = 5, seed: int = 0, batch: int = 1, prefix: str = "") -> dict:
    pooled = torch.randn(batch, 8, generator=torch.Generator().manual_seed(seed))
    embeds = text_tokens(tokens, seed=seed, batch=batch)
    return {f"{prefix}prompt_embeds": embeds, f"{prefix}pooled_prompt_embeds": pooled}


def flux2(pipeline=Flux2Pipeline):
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=pipeline is Flux2Pipeline,
    ).eval()
    vae = AutoencoderKLFlux2(  # 16 pixels a token, as published: references have at least 64 pixels a side
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
    ).eval()
    return quiet(pipeline(scheduler=flow(), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer))


def flux2_klein():
    return flux2(Flux2KleinPipeline)


def flux2_klein_kv():
    return flux2(Flux2KleinKVPipeline)


def qwen(pipeline=QwenImageEditPipeline):
    """Text tokens are given, so that no vision-language model is needed."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
        **({"zero_cond_t": True} if pipeline is QwenImageEditPlusPipeline else {}),
    ).eval()
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    parts = dict(scheduler=flow(), vae=vae, text_encoder=None, tokenizer=None)
    if pipeline is not QwenImagePipeline:
        parts["processor"] = None
    return quiet(pipeline(transformer=transformer, **parts))


class _Processor:
    """Stands for a vision-language processor, whose tokens are given."""

    image_processor = None


def longcat():
    from diffusers import LongCatImageEditPipeline, LongCatImageTransformer2DModel

    torch.manual_seed(0)
    transformer = LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        shift_factor=0.1,
        scaling_factor=0.5,
    ).eval()
    parts = dict(scheduler=flow(), vae=vae, text_encoder=None, tokenizer=None, text_processor=_Processor())
    pipe = quiet(LongCatImageEditPipeline(transformer=transformer, **parts))
    pipe._encode_prompt = lambda prompt, image: text_tokens(6 if prompt == [""] else 4, seed=len(prompt[0]))
    return pipe


def fibo():
    from diffusers import BriaFiboEditPipeline, BriaFiboTransformer2DModel

    torch.manual_seed(0)
    transformer = BriaFiboTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=[4, 6, 6],
        text_encoder_dim=8,
    ).eval()
    vae = wan_vae(halvings=4)  # 16 pixels a latent, as published

    class Pipeline(BriaFiboEditPipeline):
        """Five text tokens, of which the negative prompt leaves two as padding."""

        def encode_prompt(self, guidance_scale, num_images_per_prompt, **options):
            n = num_images_per_prompt
            embeds, layers = (text_tokens(5).repeat(n, 1, 1), [text_tokens(5, 8).repeat(n, 1, 1)] * 2)
            mask = torch.ones(n, 5)
            if guidance_scale <= 1:
                return embeds, None, torch.zeros(5, 3), mask, None, layers, None
            negative = text_tokens(5, seed=3).repeat(n, 1, 1), [text_tokens(5, 8, seed=3).repeat(n, 1, 1)] * 2
            negative_mask = torch.tensor([[1.0, 1, 1, 0, 0]]).repeat(n, 1)
            return embeds, negative[0], torch.zeros(5, 3), mask, negative_mask, layers, negative[1]

    Pipeline.__name__ = BriaFiboEditPipeline.__name__
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(Pipeline(transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=Device(), tokenizer=None))


def dreamlite(mobile: bool = False):
    from diffusers import AutoencoderTiny, DreamLiteMobilePipeline, DreamLitePipeline
    from diffusers.models.unets.unet_dreamlite import DreamLiteUNetModel

    torch.manual_seed(0)
    unet = DreamLiteUNetModel(
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=TEXT,
        attention_head_dim=2,
        addition_embed_type="time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16,
    ).eval()
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    ).eval()

    class Pipeline(DreamLiteMobilePipeline if mobile else DreamLitePipeline):
        def encode_prompt(self, mode, prompts, **options):
            return text_tokens(5, batch=len(prompts)), torch.ones(len(prompts), 5)

    Pipeline.__name__ = Pipeline.__mro__[1].__name__
    return quiet(Pipeline(text_encoder=Device(), tokenizer=None, processor=None, vae=vae, unet=unet, scheduler=flow()))
