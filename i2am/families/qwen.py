"""Qwen-Image-Edit and -Plus: ``[text ‖ generated ‖ reference 0 ‖ …]``, laid out as ``img_shapes`` says.

The text tokens hold Qwen-VL's own view of the reference beside the words; they count as text here. Qwen-Image-Layered
generates several pictures at once, the whole one and its layers: they are a strip, as the frames of a video are.
"""

from __future__ import annotations

from typing import Any, ClassVar

from i2am.families import RESIDUAL, START, ForwardInputs, PipelineFacts, TextPart, TokenLayout
from i2am.families.joint import JointTransformer, Segment


def _template(pipe: Any) -> tuple[str, str]:
    """Return what the pipeline's template has before and behind the prompt."""
    before, _, behind = pipe.prompt_template_encode.partition("{}")
    return before, behind


class QwenImage(JointTransformer):
    """``QwenImageTransformer2DModel``."""

    models = ("QwenImageTransformer2DModel",)
    texts: ClassVar[tuple[TextPart, ...]] = (
        TextPart("tokenizer", length="max_sequence_length", chat=_template, from_end=True),
    )
    attentions = ("Attention",)
    shards = True
    pipelines = (
        PipelineFacts("QwenImageEdit*"),
        PipelineFacts("QwenImageEditPlus*", several=True),
        PipelineFacts("QwenImageControlNet*", refused=RESIDUAL),
        PipelineFacts("QwenImageLayered*"),
        PipelineFacts("QwenImageImg2Img*", refused=START),
        PipelineFacts("QwenImageInpaint*", refused=START),
    )

    _layers = 1  # pictures that the running forward generates

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        forward = super().begin(args, kwargs)
        return forward._replace(strip=self._layers)

    def layout(self, given: dict[str, Any]) -> TokenLayout:
        shapes = [tuple(shape) for shape in given["img_shapes"][0]]
        if any(tuple(map(tuple, sample)) != tuple(shapes) for sample in given["img_shapes"]):
            raise ValueError(f"img_shapes differ within the batch: {given['img_shapes']}; trace one size at a time")
        segments, start = [], 0
        for frames, height, width in shapes:
            if frames != 1:
                raise ValueError(f"img_shapes {shapes}: {frames} layers have no one grid of generated tokens")
            segments.append(Segment(start, (height, width)))
            start = segments[-1].stop
        tokens = given["hidden_states"].shape[1]
        if start != tokens:
            raise ValueError(f"img_shapes {shapes} make {start} tokens, but hidden_states has {tokens}")
        text = given["encoder_hidden_states"].shape[1]
        own, references = segments[0], segments[1:]
        if getattr(getattr(self.transformer, "config", None), "use_layer3d_rope", False):
            own, references = self._strip(segments), segments[-1:]
        return self.in_context(own, references, text, slice(0, text), text + tokens)

    def _strip(self, segments: list[Segment]) -> Segment:
        """Return the generated pictures as one, below each other: all but the last, which is given."""
        grids = [segment.grid for segment in segments[:-1]]
        if not grids or len(set(grids)) != 1:
            raise ValueError(f"layers of {grids} tokens make no one strip")
        if self.self_attention:
            raise ValueError("the self-attention of several layers goes over all of them: trace it without mode=")
        self._layers = len(grids)
        return Segment(0, (self._layers * grids[0][0], grids[0][1]))
