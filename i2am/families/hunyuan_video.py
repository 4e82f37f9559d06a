"""HunyuanVideo image-to-video: SigLIP's tokens of the first frame, first among the text's (1.5), or that frame itself.

Keys of 1.5 are ``[video ‖ image ‖ text]``, and the first frame's latents enter as channels besides. HunyuanVideo (1.0)
either replaces the tokens of the first frame (``token_replace``) or gives it as channels (``latent_concat``); what
LLaVA sees of it stands among the text's tokens, first of all, every second column of 24×24. The generated tokens are a
video's: a strip of its latent frames below each other, ``(frames · h, w)``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from i2am.families import CHANNELS, Family, ForwardInputs, PipelineFacts, Request, no_reference_keys
from i2am.families.arguments import attribute, named_arguments
from i2am.families.frames import Frames, refuse_video_options, video_layout
from i2am.families.joint import JointTransformer, Segment
from i2am.families.tokens import among, square
from i2am.references import Grid

REPLACED = "token_replace"
AMONG_WORDS = (
    f"{CHANNELS}; what LLaVA sees of it stands among the words, and is traced when it is described: "
    "reference=i2am.Reference(grid=(24, 12), tokens=slice(0, 288)), with the pipeline's image_embed_interleave=2"
)
TEXTS = ("encoder_hidden_states", "encoder_hidden_states_2")


class HunyuanVideo15(JointTransformer):
    """``HunyuanVideo15Transformer3DModel``."""

    models = ("HunyuanVideo15Transformer3DModel",)
    attentions = ("Attention",)
    sets = ()
    pipelines = (PipelineFacts("HunyuanVideo15ImageToVideo*"),)
    timestep_scale = 1.0

    def layers(self) -> dict[str, nn.Module]:
        return {n: m for n, m in super().layers().items() if n.startswith("transformer_blocks.")}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.transformer, args, kwargs)
        config = attribute(self.transformer, "config")
        latents, image = given["hidden_states"], given.get("image_embeds")
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        frames, h, w = (n // p for n, p in zip(latents.shape[2:], patch, strict=True))
        grid: Grid = (frames * h, w)
        video = Segment(0, grid)
        texts = [given[name] for name in TEXTS if given.get(name) is not None]
        tokens = 0 if image is None or not image.any() else image.shape[1]  # zeros: none, and the model masks them
        total = video.stop + sum(text.shape[1] for text in texts) + (0 if image is None else image.shape[1])
        references = [Segment(video.stop, square(tokens))] if tokens else []
        self.carried = self.in_context(video, references, 0, slice(0, 0), total)
        return ForwardInputs(
            latents[:, : config.out_channels],
            given["timestep"],
            grid,
            strip=frames,
            conditioning=tuple(texts),
            stepped=False,
        )


class HunyuanVideo(JointTransformer):
    """``HunyuanVideoTransformer3DModel``, of which the image-to-video models' first frame is given."""

    models = ("HunyuanVideoTransformer3DModel",)
    attentions = ("Attention",)
    sets = ()
    pipelines = (
        PipelineFacts("HunyuanVideoImageToVideo*"),
        PipelineFacts("HunyuanSkyreelsImageToVideo*", refused=CHANNELS),
    )
    timestep_scale = 1.0

    @classmethod
    def read(cls, model: nn.Module, request: Request) -> Family:
        refuse_video_options(model, request)
        if attribute(model, "config.image_condition_type") != REPLACED and not request.references:
            raise ValueError(no_reference_keys(type(model).__name__, AMONG_WORDS))
        return super().read(model, request)

    def layers(self) -> dict[str, nn.Module]:
        blocks = ("transformer_blocks.", "single_transformer_blocks.")
        return {n: m for n, m in super().layers().items() if n.startswith(blocks)}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.transformer, args, kwargs)
        config, latents, text = attribute(self.transformer, "config"), given["hidden_states"], given[TEXTS[0]]
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        frames, h, w = (n // p for n, p in zip(latents.shape[2:], patch, strict=True))
        replaced = int(config.image_condition_type == REPLACED)
        parts = [*[Frames(1, (h, w), given=True)] * replaced, Frames(frames - replaced, (h, w), given=False)]
        video, tokens = frames * h * w, frames * h * w + text.shape[1]
        more = [among(slice(video, tokens), reference) for reference in self.references]
        self.carried = video_layout(type(self.transformer).__name__, parts, keys=tokens, more=more)
        return ForwardInputs(
            latents[:, : config.out_channels],
            given["timestep"],
            self.carried.grid,
            strip=frames - replaced,
            lead=replaced,
            conditioning=(text,),
            stepped=False,
        )
