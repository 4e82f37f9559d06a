"""HunyuanVideo 1.5 image-to-video: SigLIP's tokens of the first frame, first among the text's.

Keys are ``[video ‖ image ‖ text]``. The generated tokens are a video's: a strip of its latent frames below each other,
``(frames · h, w)``. The first frame's latents enter as channels besides.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from i2am.families import ForwardInputs, PipelineFacts
from i2am.families.arguments import attribute, named_arguments
from i2am.families.joint import JointTransformer, Segment
from i2am.families.tokens import square
from i2am.references import Grid

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
            conditioning=tuple(texts),
            stepped=False,
        )
