"""Small pipelines that take an image as a prompt: Flux and SD3 IP-Adapters, Redux, Kandinsky 2.2, SVD."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterTimeImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.helpers.tiny_models import dit
from tests.helpers.tiny_models import unet as pipelines

SIGLIP = (3, 3)  # patches
WAN = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=dit.TEXT,
    freq_dim=16,
    ffn_dim=16,
    num_layers=2,
    rope_max_seq_len=32,
)


def add_flux_ip_adapters(transformer, tokens: tuple[int, ...]) -> None:
    """Random IP-Adapters of so many tokens each, on the double blocks, as ``load_ip_adapter`` leaves them."""
    torch.manual_seed(1)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(transformer.inner_dim, dit.TEXT, tokens).eval())
    layers = [ImageProjection(12, dit.TEXT, num_image_text_embeds=n) for n in tokens]
    transformer.encoder_hid_proj = MultiIPAdapterImageProjection(layers).eval()
    transformer.config.encoder_hid_dim_type = "ip_image_proj"


def flux_ip(*tokens: int, pipeline=diffusers.FluxPipeline):
    pipe = dit.flux(pipeline)
    add_flux_ip_adapters(pipe.transformer, tokens)
    return pipe


def siglip() -> SiglipVisionModel:
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=18, patch_size=6
    )
    return SiglipVisionModel(config).eval()


def siglip_processor() -> SiglipImageProcessor:
    return SiglipImageProcessor(size={"height": 18, "width": 18})


def redux(pipeline=diffusers.FluxPipeline, in_channels: int = 16):
    """The prior and the Flux pipeline that draws from what it gives."""
    torch.manual_seed(0)
    prior = diffusers.FluxPriorReduxPipeline(
        image_encoder=siglip(), feature_extractor=siglip_processor(), image_embedder=ReduxImageEncoder(12, 4096).eval()
    )
    return prior, dit.flux(pipeline, in_channels=in_channels, joint_attention_dim=4096, pooled_projection_dim=768)


def sd3(adapter: bool = True, **config):
    torch.manual_seed(0)
    width = 32
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=dit.TEXT,
        caption_projection_dim=width,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
        **config,
    ).eval()
    if adapter:
        processors = {
            name: SD3IPAdapterJointAttnProcessor2_0(width, 20, 16, timesteps_emb_dim=24, scale=0.8).eval()
            for name in transformer.attn_processors
        }
        transformer.set_attn_processor(processors)
        transformer.image_proj = IPAdapterTimeImageProjection(12, 20, 24, 1, 8, 2, 6, 2, 8).eval()
    parts = {f"{kind}{n}": None for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    return pipelines.quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=dit.flow(),
            vae=dit.flux_vae(),
            image_encoder=siglip(),
            feature_extractor=siglip_processor(),
            **parts,
        )
    )


def kandinsky(pipeline=diffusers.KandinskyV22Pipeline, in_channels: int = 4):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=12,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=12,
        attention_head_dim=16,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=8,
    ).eval()
    movq = diffusers.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    ).eval()
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="epsilon")
    return pipelines.quiet(pipeline(unet=unet, scheduler=scheduler, movq=movq))


def svd():
    torch.manual_seed(0)
    clip = CLIPVisionConfig(  # the pipeline resizes to 224 pixels whatever the encoder
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=56,
        projection_dim=pipelines.CONTEXT,
    )
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=16,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=pipelines.CONTEXT,
        num_attention_heads=2,
        layers_per_block=1,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    ).eval()
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1
    ).eval()
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_type="continuous",
    )
    return pipelines.quiet(
        diffusers.StableVideoDiffusionPipeline(
            vae=vae,
            image_encoder=CLIPVisionModelWithProjection(clip).eval(),
            unet=unet,
            scheduler=scheduler,
            feature_extractor=CLIPImageProcessor(size=224, crop_size=224),
        )
    )


def wan(image_keys: bool = True, last_image: bool = False):
    torch.manual_seed(0)
    clip = CLIPVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=18, patch_size=6
    )
    transformer = diffusers.WanTransformer3DModel(
        **(WAN | {"in_channels": 12}),
        image_dim=12 if image_keys else None,
        added_kv_proj_dim=24 if image_keys else None,
        pos_embed_seq_len=2 * 10 if last_image else None,
    ).eval()
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    return pipelines.quiet(
        diffusers.WanImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            scheduler=dit.flow(),
            image_processor=CLIPImageProcessor(size={"shortest_edge": 18}, crop_size={"height": 18, "width": 18}),
            image_encoder=CLIPVisionModel(clip).eval(),
            transformer=transformer,
        )
    )


def wan_kin(kind: str):
    """A transformer that attends to CLIP's tokens as Wan's does."""
    torch.manual_seed(0)
    extra = {}
    if kind == "WanAnimateTransformer3DModel":
        extra = dict(
            latent_channels=4,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        )
    return getattr(diffusers, kind)(**(WAN | {"in_channels": 12}), image_dim=12, added_kv_proj_dim=24, **extra).eval()


def chroma_ip(*tokens: int):
    torch.manual_seed(0)
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=dit.TEXT,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()
    add_flux_ip_adapters(transformer, tokens)
    parts = dict(scheduler=dit.flow(), vae=dit.flux_vae(), text_encoder=None, tokenizer=None)
    return pipelines.quiet(diffusers.ChromaPipeline(transformer=transformer, **parts))
