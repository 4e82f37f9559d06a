"""Whole pipelines of video and in-context models, traced as they run, against a materialised recomputation.

The transformers of these are checked bare in the family's own test; here the pipeline's own call gives their arguments:
its scheduler, its guidance, its way to put what is given among what is generated. Their encoders are stand-ins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import nn

import i2am
from tests.helpers.families import generator
from tests.helpers.tiny_models import dit, offline, prompts, videos
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tiny_models.context import Device, stand_in
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth, assert_peak

SIZE = dict(width=48, height=32)  # latents of 4×6, tokens of 2×3
CFG_CALLS = dict(evaluations=range(0, 4, 2), groups=[0, 0, 1, 1])  # two steps: conditional, unconditional
ONE_CALL = dict(evaluations=range(2), groups=[0, 1])
BATCHED = dict(evaluations=range(2), groups=[0, 1], samples=slice(1, 2))


class Run(NamedTuple):
    """A pipeline's call, and where its tokens are."""

    pipe: Any
    call: dict[str, Any]
    layers: tuple[str, ...]  # ends of the names of the attention modules
    grid: tuple[int, int]  # of all generated tokens
    queries: Any
    parts: dict[str, tuple[Any, tuple[int, int] | None]]  # name of a reference → its keys, its grid
    counted: dict[str, Any] = ONE_CALL  # which calls, of which time groups and samples
    keys: int = 0  # calls with fewer do not count
    frames: int = 1
    lead: int = 0
    nth: int = 0  # which attention call of a layer's pass
    skip: int = 0  # keys before the reference's grid


class Coder(nn.Module):
    """An encoder of pictures and videos: means over patches, mixed to four channels."""

    dtype, device, use_slicing, use_tiling = torch.float32, torch.device("cpu"), False, False

    def __init__(self, space: int = 8, time: int = 4, channels: int = 4):
        super().__init__()
        halvings = space.bit_length() - 1
        self.spatial_compression_ratio, self.temporal_compression_ratio = space, time
        self.temperal_downsample = [i < time.bit_length() - 1 for i in range(halvings)]
        self.mix = torch.randn(channels, 3, generator=torch.Generator().manual_seed(3))
        self.config = SimpleNamespace(
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
            z_dim=channels,
            latent_channels=channels,
            scaling_factor=1.0,
            shift_factor=0.0,
            scale_factor_temporal=time,
            scale_factor_spatial=space,
            block_out_channels=[1] * (halvings + 1),
            spatial_compression_ratio=space,
            temporal_compression_ratio=time,
            timestep_conditioning=False,
        )
        self.latents_mean, self.latents_std = torch.zeros(channels), torch.ones(channels)

    def latents(self, x):
        space = self.spatial_compression_ratio
        video = x if x.ndim == 5 else x[:, :, None]
        small = nn.functional.avg_pool3d(video[:, :, :: self.temporal_compression_ratio], (1, space, space))
        z = torch.einsum("cd,bdfhw->bcfhw", self.mix, small)
        return z if x.ndim == 5 else z[:, :, 0]

    def encode(self, x):
        z = self.latents(x)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z, sample=lambda generator=None: z))

    def decode(self, z, **options):
        return (z[:, :3],)

    def _encode(self, x):
        z = self.latents(x)
        return torch.cat([z, torch.zeros_like(z)], dim=1)


class Lenient(nn.Module):
    """A safety checker."""

    dtype, device = torch.float32, torch.device("cpu")

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


def unipc():
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


def text(count: int = 512, **masks: int) -> dict[str, torch.Tensor]:
    found = {"prompt_embeds": dit.text_tokens(count), "negative_prompt_embeds": dit.text_tokens(count, seed=3)}
    return found | {name: torch.ones(1, n) for name, n in masks.items()}


def picture(seed: int = 0):
    return pipelines.image((48, 32), seed=seed)


def assembled(kind: Any, transformer: nn.Module, coder: nn.Module | None = None, **parts: Any) -> Any:
    known = dict(tokenizer=None, text_encoder=None, vae=coder or Coder(), scheduler=dit.flow())
    kind = getattr(diffusers, kind) if isinstance(kind, str) else kind
    return pipelines.quiet(kind(**(known | parts), transformer=transformer))


# ------------------------------------------------------------------------------------------------------------ videos


def vace():
    model = videos.build("WanVACETransformer3DModel", **prompts.WAN, vace_layers=[0, 1], vace_in_channels=2 * 4 + 64)
    call = dict(reference_images=[picture(), picture(1)], num_frames=5, guidance_scale=3.0, **text(), **SIZE)
    parts = {"reference_0": (slice(0, 6), (2, 3)), "reference_1": (slice(6, 12), (2, 3))}
    return Run(assembled("WanVACEPipeline", model), call, ("attn1",), (4, 3), slice(12, 24), parts, CFG_CALLS, frames=2)


def skyreels():
    model = videos.build("SkyReelsV2Transformer3DModel", **prompts.WAN)
    pipe = assembled("SkyReelsV2DiffusionForcingImageToVideoPipeline", model, scheduler=unipc())
    call = dict(image=picture(), num_frames=9, guidance_scale=3.0, **text(), **SIZE)
    parts = {"reference": (slice(0, 6), (2, 3))}
    return Run(pipe, call, ("attn1",), (4, 3), slice(6, 18), parts, CFG_CALLS, frames=2, lead=1)


def anyflow():
    model = videos.build("AnyFlowTransformer3DModel", **prompts.WAN)
    pipe = assembled("AnyFlowPipeline", model, scheduler=diffusers.FlowMapEulerDiscreteScheduler())
    call = dict(video=[picture()], num_frames=9, guidance_scale=3.0, **text(), **SIZE)
    parts = {"reference": (slice(0, 6), (2, 3))}
    return Run(pipe, call, ("attn1",), (4, 3), slice(6, 18), parts, BATCHED, frames=2, lead=1)


def cosmos(kind, scheduler, **call):
    pipe = assembled(kind, videos.cosmos(), scheduler=scheduler, safety_checker=Lenient())
    call = dict(image=picture(), num_frames=9, guidance_scale=3.0, **text(5), **SIZE, **call)
    parts = {"reference": (slice(0, 6), (2, 3))}
    return Run(pipe, call, ("attn1",), (4, 3), slice(6, 18), parts, CFG_CALLS, frames=2, lead=1)


def cosmos_1():
    return cosmos("CosmosVideoToWorldPipeline", diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0))


def cosmos_2():
    return cosmos("Cosmos2VideoToWorldPipeline", diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True))


def cosmos_25():
    """torchvision, which it takes its picture through, is not needed otherwise: the picture is given as a video."""
    run = cosmos("Cosmos2_5_PredictBasePipeline", unipc(), video=[picture()], num_latent_conditional_frames=1)
    run.call.pop("image")
    return run


class Words:
    """A tokenizer that makes three tokens of a prompt, and five of none."""

    eos_token_id = 0

    def convert_tokens_to_ids(self, word):
        return 1

    def apply_chat_template(self, conversation, **options):
        return SimpleNamespace(input_ids=[2] * (3 if conversation[-1]["content"] else 5))


def cosmos_3():
    """Five tokens of text, or seven of the negative one; then the video."""
    pipe = diffusers.Cosmos3OmniPipeline(videos.cosmos3(), Words(), Coder(), unipc(), enable_safety_checker=False)
    call = dict(prompt="a", image=picture(), num_frames=9, guidance_scale=3.0, use_system_prompt=False, **SIZE)
    call |= dict(add_resolution_template=False, add_duration_template=False)
    parts = {"reference": (slice(5, 11), (2, 3))}
    pipelines.quiet(pipe)
    return Run(pipe, call, ("self_attn",), (4, 3), slice(6, 18), parts, CFG_CALLS, frames=2, lead=1, nth=1)


def kandinsky_6():
    """The picture is a frame behind two of the video; without sound."""
    pipe = assembled("Kandinsky6TI2VAPipeline", videos.kandinsky6(), text_encoder_2=None, tokenizer_2=None)
    call = dict(image=picture(), num_frames=5, guidance_scale=3.0, sample_audio=False, **text(5), **SIZE)
    call |= {f"{prefix}pooled_prompt_embeds": torch.ones(1, 8) for prefix in ("", "negative_")}
    parts = {"reference": (slice(12, 18), (2, 3))}
    layers = ("video_dec_block.self_attention",)
    return Run(pipe, call, layers, (4, 3), slice(0, 12), parts, CFG_CALLS, frames=2)


def hunyuan():
    model = videos.hunyuan_video("token_replace")
    parts = dict(text_encoder_2=None, tokenizer_2=None, image_processor=None)
    pipe = assembled("HunyuanVideoImageToVideoPipeline", model, **parts)
    call = dict(image=picture(), num_frames=9, true_cfg_scale=3.0, **text(5), **SIZE)
    for prefix in ("", "negative_"):
        call |= {f"{prefix}pooled_prompt_embeds": torch.ones(1, 8), f"{prefix}prompt_attention_mask": torch.ones(1, 5)}
    references = {"reference": (slice(0, 6), (2, 3))}
    return Run(pipe, call, ("attn",), (4, 3), slice(6, 18), references, CFG_CALLS, keys=18, frames=2, lead=1)


def framepack():
    """One section of two latent frames: the picture, then zeros where nothing came before."""
    parts = dict(text_encoder_2=None, tokenizer_2=None, image_encoder=prompts.siglip())
    pipe = assembled(
        "HunyuanVideoFramepackPipeline", videos.framepack(), feature_extractor=prompts.siglip_processor(), **parts
    )
    call = dict(image=picture(), num_frames=5, latent_window_size=2, **text(5), **SIZE)
    del call["negative_prompt_embeds"]
    call |= dict(pooled_prompt_embeds=torch.ones(1, 8), prompt_attention_mask=torch.ones(1, 5))
    references = {
        "history_4x": (slice(0, 4), (4, 1)),
        "history_2x": (slice(4, 6), (1, 2)),
        "clean": (slice(6, 18), (4, 3)),
        "picture": (slice(30, 39), (3, 3)),
    }
    return Run(pipe, call, ("attn",), (4, 3), slice(18, 30), references, keys=30, frames=2)


def helios():
    """One chunk of two latent frames."""
    pipe = assembled("HeliosPipeline", videos.helios(), scheduler=diffusers.HeliosScheduler(stages=1))
    call = dict(image=picture(), num_frames=5, num_latent_frames_per_chunk=2, guidance_scale=3.0, **text(), **SIZE)
    references = {"long": (slice(0, 4), (4, 1)), "mid": (slice(4, 6), (1, 2)), "short": (slice(6, 18), (4, 3))}
    return Run(pipe, call, ("attn1",), (4, 3), slice(18, 30), references, CFG_CALLS, keys=30, frames=2)


class Connectors(nn.Module):
    """Makes the words of the video and of its sound."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, embeds, mask, **options):
        return embeds, embeds, torch.ones(embeds.shape[:2], dtype=torch.long)


class Sound(nn.Module):
    """An encoder of sounds: four channels of one mel bin."""

    dtype, device = torch.float32, torch.device("cpu")
    mel_compression_ratio = temporal_compression_ratio = 4
    config = SimpleNamespace(mel_bins=4, latent_channels=4, sample_rate=16000, mel_hop_length=160)
    latents_mean, latents_std = torch.zeros(4), torch.ones(4)


def ltx2(kind="LTX2ImageToVideoPipeline", guided=3, references=None, **given):
    """Three calls a step: both halves of guidance, then two whose attention is perturbed or kept apart."""
    parts = dict(audio_vae=Sound(), connectors=Connectors(), vocoder=None)
    pipe = assembled(kind, videos.ltx2(), Coder(16, 4), **parts)
    call = dict(width=96, height=64, num_frames=9, guidance_scale=3.0, image_crf=0, spatio_temporal_guidance_blocks=[1])
    call |= text(5, prompt_attention_mask=5, negative_prompt_attention_mask=5)
    if kind != "LTX2ImageToVideoPipeline":
        call.pop("image_crf")
    counted = dict(evaluations=range(0, 2 * guided, guided), groups=[0] * guided + [1] * guided, samples=slice(1, 2))
    references = references or {"reference": (slice(0, 24), (4, 6))}
    return Run(pipe, call | given, ("attn1",), (8, 6), slice(24, 72), references, counted, frames=2, lead=1)


def ltx2_image():
    return ltx2(image=picture())


def ltx2_conditions():
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    first = LTX2VideoCondition(frames=picture(), index=0, strength=1.0, crf=0)
    return ltx2("LTX2ConditionPipeline", conditions=[first])


def ltx2_in_context():
    from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

    run = ltx2("LTX2InContextPipeline", reference_conditions=[LTX2ReferenceCondition(frames=[picture()] * 5)])
    return run._replace(
        queries=slice(0, 72), grid=(12, 6), parts={"reference": (slice(72, 120), (8, 6))}, frames=3, lead=0
    )


def i2vgen():
    encoder = pipelines.image_encoder()
    encoder.visual_projection = nn.Linear(pipelines.VISION, dit.TEXT, bias=False)
    torch.manual_seed(0)
    pipe = pipelines.quiet(
        diffusers.I2VGenXLPipeline(
            vae=Coder(2, 1),
            text_encoder=None,
            tokenizer=None,
            image_encoder=encoder.eval(),
            feature_extractor=pipelines.feature_extractor(),
            unet=videos.i2vgen(),
            scheduler=diffusers.DDIMScheduler(clip_sample=False),
        )
    )
    call = dict(image=picture(), num_frames=3, guidance_scale=3.0, **text(5), **SIZE)
    parts = {"first_frame": (slice(5, 69), (8, 8)), "clip": (slice(69, 73), None)}
    grids = {16 * 24: (16, 24), 8 * 12: (8, 12)}
    counted = dict(BATCHED, samples=slice(3, 6))

    def grid(call):
        return grids[call.q.shape[2]]

    return Run(pipe, call, ("attn2",), grid, slice(None), parts, counted, keys=73, frames=3)


# ---------------------------------------------------------------------------------------------------------- pictures


def visualcloze():
    """An example of two pictures, 6×9 tokens each; below it one, and beside that the one to be generated."""
    transformer = dit.flux_transformer(in_channels=3 * 16)
    parts = dict(tokenizer_2=None, text_encoder_2=None, resolution=32)
    given = dit.flux_prompt()
    words = (given["prompt_embeds"], given["pooled_prompt_embeds"], torch.zeros(5, 3))
    kind = stand_in(diffusers.VisualClozeGenerationPipeline, encode_prompt=lambda self, **options: words)
    pipe = assembled(kind, transformer, Coder(2, 1), **parts)
    rows = [[picture(), picture(1)], [picture(2), None]]
    call = dict(task_prompt="t", content_prompt="c", image=rows)
    at = 5 + 108 + torch.arange(108).reshape(6, 18)
    references = {"row_0": (slice(5, 113), (6, 18)), "row_1": (at[:, :9].flatten(), (6, 9))}
    return Run(pipe, call, ("attn",), (6, 9), at[:, 9:].flatten(), references)


def layered():
    """The whole picture and two layers, of 5×5 tokens each."""
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=dit.TEXT,
        axes_dims_rope=(4, 6, 6),
        use_layer3d_rope=True,
        use_additional_t_cond=True,
    ).eval()
    coder = Coder(64, 1)
    pipe = assembled("QwenImageLayeredPipeline", transformer, coder, processor=None, text_encoder=Device())
    call = dict(image=pipelines.image((64, 64)), prompt="a", layers=2, true_cfg_scale=3.0, output_type="pt")
    call |= text(4) | dict(prompt_embeds_mask=torch.ones(1, 4), negative_prompt_embeds_mask=torch.ones(1, 4))
    parts = {"reference": (slice(79, 104), (5, 5))}
    return Run(pipe, call, ("attn",), (15, 5), slice(4, 79), parts, CFG_CALLS, frames=3)


def kolors():
    """Its UNet projects the text first, and keeps doing so beside an IP-Adapter."""
    unet = pipelines.unet(
        encoder_hid_dim=dit.TEXT,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 8,
    )
    torch.manual_seed(2)
    unet._load_ip_adapter_weights([offline.ip_adapter_weights(unet, pipelines.VISION)])
    if not diffusers.utils.is_sentencepiece_available():  # which only the tokenizer needs
        sys.modules["sentencepiece"] = stub = ModuleType("sentencepiece")
        stub.SentencePieceProcessor = None
    from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline

    sys.modules.pop("sentencepiece", None)
    pipe = KolorsPipeline(
        vae=pipelines.vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet.eval(),
        scheduler=diffusers.EulerDiscreteScheduler(),
        image_encoder=pipelines.image_encoder(),
        feature_extractor=pipelines.feature_extractor(),
    )
    call = dict(ip_adapter_image=picture(), guidance_scale=3.0, **text(7), **SIZE)
    call |= {f"{prefix}pooled_prompt_embeds": torch.ones(1, 8) for prefix in ("", "negative_")}
    grids = {16 * 24: (16, 24), 8 * 12: (8, 12), 4 * 6: (4, 6)}

    def grid(call):
        return grids[call.q.shape[2]]

    parts = {"ip_adapter": (slice(0, 17), (4, 4))}
    return Run(pipelines.quiet(pipe), call, ("attn2",), grid, slice(None), parts, BATCHED, nth=1, skip=1)


RUNS: dict[str, Callable[[], Run]] = {
    run.__name__: run
    for run in (
        vace,
        skyreels,
        anyflow,
        cosmos_1,
        cosmos_2,
        cosmos_25,
        cosmos_3,
        kandinsky_6,
        hunyuan,
        framepack,
        helios,
        ltx2_image,
        ltx2_conditions,
        ltx2_in_context,
        i2vgen,
        visualcloze,
        layered,
        kolors,
    )
}


def same(a, b):
    return all(map(same, a, b)) if isinstance(a, list) else torch.equal(a, b)


QUICK = ("skyreels", "cosmos_1", "ltx2_in_context", "kolors")  # the others differ from a test of their family in little


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in RUNS])
def test_a_whole_run(name):
    run = RUNS[name]()
    model = getattr(run.pipe, "transformer", None) or run.pipe.unet

    def go():
        torch.manual_seed(5)  # some draw without the generator
        common = dict(num_inference_steps=2, output_type="latent", generator=generator())
        out = run.pipe(**(common | run.call))
        return next(getattr(out, name) for name in ("frames", "images", "video") if hasattr(out, name))

    calls = [c for c in capture_calls(model, go, run.layers) if c.k.shape[2] >= run.keys]
    plain = go()
    with i2am.trace(run.pipe, time_groups=2, output="model", record="qk") as tracer:
        assert same(go(), plain)
    maps = tracer.maps()
    assert maps.references == list(run.parts)
    assert (maps.frames, maps._video.lead) == (run.frames, run.lead)
    counted = dict(run.counted)
    chosen = generated(calls, run.grid, run.queries, nth=run.nth, evaluations=counted.pop("evaluations"))
    for reference, (keys, grid) in run.parts.items():
        truth = Truth(chosen, keys=keys, reference_grid=grid, skip=run.skip, **counted)
        for direction in ("r2g", "g2r") if grid else ("r2g",):
            assert_peak(maps.ulam(direction, reference=reference), truth.ulam(direction))
            assert_peak(maps.tlam(direction, reference=reference), truth.tlam(direction, 2))
            assert_peak(maps.llam(direction, reference=reference), truth.llam(direction))
