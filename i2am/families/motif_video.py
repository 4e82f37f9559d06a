"""Motif-Video image-to-video: SigLIP's tokens of the first frame, among those of the text.

Keys are ``[video ‖ image ‖ text]`` in the blocks of both streams and in the single ones before the decoder, whose
blocks look at the video alone; where there is cross-attention besides, it looks at the text alone. The first frame's
latents enter as channels besides. The generated tokens are a video's: a strip of its latent frames below each other,
``(frames · h, w)``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from i2am.families import Family, ForwardInputs, PipelineFacts, Request
from i2am.families.arguments import attribute, named_arguments
from i2am.families.frames import refuse_video_options
from i2am.families.joint import JointTransformer, Segment
from i2am.families.tokens import square


class MotifVideo(JointTransformer):
    """``MotifVideoTransformer3DModel``."""

    models = ("MotifVideoTransformer3DModel",)
    attentions = ("MotifVideoAttention",)
    sets = ()
    pipelines = (PipelineFacts("MotifVideoImage2Video*"),)
    timestep_scale = 1.0

    @classmethod
    def read(cls, model: nn.Module, request: Request) -> Family:
        refuse_video_options(model, request)
        return super().read(model, request)

    def has_adapters(self) -> bool:
        return True  # whether a call is given a picture, only the call says

    def layers(self) -> dict[str, nn.Module]:
        single = attribute(self.transformer, "config.num_single_layers")
        encoder = single - attribute(self.transformer, "config.num_decoder_layers")
        decoder = {f"single_transformer_blocks.{i}.attn" for i in range(encoder, single)}
        return {name: module for name, module in super().layers().items() if name not in decoder}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.transformer, args, kwargs)
        config, latents = attribute(self.transformer, "config"), given["hidden_states"]
        patch = config.patch_size_t, config.patch_size, config.patch_size
        frames, h, w = (n // p for n, p in zip(latents.shape[2:], patch, strict=True))
        video, text, image = Segment(0, (frames * h, w)), given["encoder_hidden_states"], given.get("image_embeds")
        tokens = 0 if image is None else image.shape[1]
        references = [Segment(video.stop, square(tokens))] if tokens else []
        total = video.stop + tokens + text.shape[1]
        self.carried = self.in_context(video, references, 0, slice(video.stop + tokens, total), total)
        return ForwardInputs(
            latents[:, : config.out_channels],
            given["timestep"],
            video.grid,
            strip=frames,
            conditioning=(text,),
            stepped=False,
        )
