"""Qwen-Image-Edit and -Plus: ``[text ‖ generated ‖ reference 0 ‖ …]``, laid out as ``img_shapes`` says.

The text tokens hold Qwen-VL's own view of the reference beside the words; they count as text here.
"""

from __future__ import annotations

from typing import Any, ClassVar

from i2am.families import RESIDUAL, START, PipelineFacts, TextPart, TokenLayout
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
        PipelineFacts(
            "QwenImageLayered*", refused="i2am draws on one picture, and it generates several layers at once"
        ),
        PipelineFacts("QwenImageImg2Img*", refused=START),
        PipelineFacts("QwenImageInpaint*", refused=START),
    )

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
        if getattr(getattr(self.transformer, "config", None), "use_layer3d_rope", False):
            raise ValueError(f"img_shapes {shapes} are several layers generated at once, and i2am draws on one picture")
        return self.in_context(segments[0], segments[1:], text, slice(0, text), text + tokens)
