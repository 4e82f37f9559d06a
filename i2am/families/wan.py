"""Wan image-to-video and its kin: CLIP's tokens of the first frame (and the last), in an attention call of their own.

The generated tokens are a video's: they are drawn as a strip, its latent frames below each other, ``(frames · h, w)``;
a key's column softmax goes over all of them. The first frame's latents enter as channels besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from i2am.families import CHANNELS, Family, ForwardInputs, PipelineFacts, Request, TokenLayout, no_reference_keys
from i2am.families.arguments import argument, attribute, named_arguments
from i2am.families.registry import described_tokens
from i2am.families.timed_frames import TimedFrames
from i2am.families.tokens import among, clip_tokens, reference_names
from i2am.references import Grid, Reference
from i2am.tracing.intercept import LayerContext

ATTENTIONS = ("WanAttention", "SkyReelsV2Attention", "Attention")  # the last: SkyReels before diffusers 0.36
FRAMES_GIVEN = ("WanTransformer3DModel", "SkyReelsV2Transformer3DModel")  # to models without image keys, if any
TEXT = 512  # text tokens, a constant of Wan's attention: what stands before them is the image


class Wan(Family):
    """``WanTransformer3DModel`` and its kin, with image keys.

    Args:
        transformer: the model.
        references: the image tokens as the caller describes them; None: CLIP's.
    """

    models = (
        "WanTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "ChronoEditTransformer3DModel",
        "WanAnimateTransformer3DModel",
    )
    pipelines = (
        PipelineFacts("WanImageToVideo*", refused=CHANNELS, keys="add_k_proj"),
        PipelineFacts("WanAnimate*", refused=CHANNELS, keys="add_k_proj"),
        PipelineFacts("ChronoEdit*", refused=CHANNELS, keys="add_k_proj"),
        PipelineFacts("SkyReelsV2ImageToVideo*", refused=CHANNELS, keys="add_k_proj"),
        PipelineFacts("SkyReelsV2DiffusionForcing*", by_timestep=True),
        PipelineFacts("WanVideoToVideo*", refused="the video is only what denoising starts from"),
        PipelineFacts("LucyEdit*", refused="the video enters as channels beside the latents"),
    )
    conditional_call = 0
    batched_guidance = False
    latent_pixels = 2

    def __init__(
        self, transformer: nn.Module, references: Sequence[Reference] | None = None, image_grid: Grid | None = None
    ):
        self.transformer = transformer
        self.references = references
        self.image_grid = image_grid  # of the pipeline's image encoder
        self._grid: Grid = (0, 0)

    @classmethod
    def read(cls, model: nn.Module, request: Request) -> Family:
        references = described_tokens(model, request)
        if request.rollout:
            raise ValueError("rollout=True needs an adapter with a resampler, and i2am knows none of Wan")
        if request.self_attention:
            raise ValueError(
                "the self-attention of a video transformer goes over frames, where i2am has no grid to draw on"
            )
        family = cls(model, references, request.image_grid)
        if references is None and not family.has_adapters() and type(model).__name__ in FRAMES_GIVEN:
            return TimedFrames.read(model, request)
        return family

    def has_adapters(self) -> bool:
        return bool(self._image_attentions())

    def layers(self) -> dict[str, nn.Module]:
        found = self._image_attentions()
        if not found:
            raise ValueError(
                no_reference_keys(type(self.transformer).__name__, "the image enters as channels beside the latents")
            )
        return found

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.transformer, args, kwargs)
        latents, image = given["hidden_states"], given.get("encoder_hidden_states_image")
        patch = attribute(self.transformer, "config.patch_size")
        frames, h, w = (n // p for n, p in zip(latents.shape[2:], patch, strict=True))
        self._grid = (frames * h, w)
        conditioning = tuple(x for x in (given.get("encoder_hidden_states"), image) if isinstance(x, Tensor))
        return ForwardInputs(
            latents, given["timestep"], self._grid, strip=frames, conditioning=conditioning, stepped=False
        )

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = argument(args, kwargs, 1, "encoder_hidden_states").shape[1] - TEXT
        if tokens > 0:
            video = (self._grid[0] * self._grid[1],)
            layer.awaits = TokenLayout(self._grid, self._references(tokens), keys=tokens, parts=video)

    def _image_attentions(self) -> dict[str, nn.Module]:
        named = self.transformer.named_modules()
        return {n: m for n, m in named if type(m).__name__ in ATTENTIONS and getattr(m, "add_k_proj", None) is not None}

    def _references(self, tokens: int) -> tuple[Reference, ...]:
        if self.references is not None:
            return tuple(among(slice(0, tokens), r) for r in self.references)
        both = getattr(self.transformer.config, "pos_embed_seq_len", None)  # of a model of first and last frames
        per_image = both // 2 if both else tokens
        if tokens % per_image:
            raise ValueError(f"{tokens} image tokens are not {per_image} for each image: describe them with reference=")
        names = reference_names(tokens // per_image)
        reference = clip_tokens(per_image, self.image_grid)
        return tuple(
            replace(reference, tokens=slice(i * per_image, (i + 1) * per_image), name=name)
            for i, name in enumerate(names)
        )
