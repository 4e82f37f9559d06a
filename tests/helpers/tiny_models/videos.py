"""Small video transformers and pipelines whose own sequence holds the frames that are given."""

from __future__ import annotations

import diffusers
import torch

from tests.helpers.tiny_models import dit
from tests.helpers.tiny_models.prompts import WAN
from tests.helpers.tiny_models.unet import quiet

HUNYUAN = dict(
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=1,
    guidance_embeds=False,
    text_embed_dim=dit.TEXT,
    pooled_projection_dim=8,
    rope_axes_dim=(4, 6, 6),
)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(kind, **config):
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**config).eval()
    for parameter in model.parameters():  # gates and tables begin at zero in some
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def denoise(model, call, *, guided=True, timesteps=(900.0, 700.0, 400.0, 100.0)):
    """Return a function that makes four steps: ``call(t, text, seed)`` gives the arguments of a forward.

    guided: with an unconditional call behind each.
    """

    @torch.no_grad()
    def go():
        for t in timesteps:
            for seed in (0, 3)[: 1 + guided]:
                out = model(return_dict=False, **call(t, dit.text_tokens(5, seed=seed)))[0]
        return out

    return go


def ltx_transformer():
    return build(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=dit.TEXT,
    )


def ltx(kind):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    parts = dict(text_encoder=None, tokenizer=None, scheduler=dit.flow(), vae=vae, transformer=ltx_transformer())
    return quiet(getattr(diffusers, kind)(**parts))


def ltx2():
    return build(
        "LTX2VideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=dit.TEXT,
        rope_double_precision=False,
        perturbed_attn=True,
    )


def framepack():
    return build(
        "HunyuanVideoFramepackTransformer3DModel",
        in_channels=4,
        has_image_proj=True,
        image_proj_dim=12,
        has_clean_x_embedder=True,
        **HUNYUAN,
    )


def hunyuan_video(condition):
    return build(
        "HunyuanVideoTransformer3DModel",
        in_channels=4 if condition == "token_replace" else 9,
        image_condition_type=condition,
        **HUNYUAN,
    )


def helios():
    config = WAN | {"num_attention_heads": 2, "attention_head_dim": 16}
    config.pop("rope_max_seq_len")
    return build("HeliosTransformer3DModel", **config, rope_dim=(4, 6, 6), is_amplify_history=True)


def cosmos():
    return build(
        "CosmosTransformer3DModel",
        in_channels=5,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=dit.TEXT,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )


def vace():
    return build("WanVACETransformer3DModel", **WAN, vace_layers=[0, 1], vace_in_channels=12)


def i2vgen():
    return build(
        "I2VGenXLUNet",
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=dit.TEXT,
        attention_head_dim=8,
    )


def kandinsky6():
    return build(
        "Kandinsky6Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=dit.TEXT,
        in_text_dim2=8,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        in_audio_dim=4,
        out_audio_dim=4,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
    )


def cosmos3():
    return build(
        "Cosmos3OmniTransformer",
        head_dim=12,
        hidden_size=24,
        intermediate_size=24,
        latent_channel=4,
        latent_patch_size=2,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=16,
        vocab_size=16,
        sound_dim=4,
        sound_gen=True,
        rope_axes_dim=(2, 2, 2),
    )


def consisid(is_train_face=True):
    return build(
        "ConsisIDTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=8,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=dit.TEXT,
        num_layers=4,
        use_rotary_positional_embeddings=True,
        is_train_face=is_train_face,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=6,
        LFE_vit_dim=8,
        LFE_depth=5,
        LFE_dim_head=4,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=16,
        LFE_ff_mult=2,
    )
