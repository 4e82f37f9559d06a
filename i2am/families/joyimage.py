"""JoyImage-Edit and -Plus: ``[generated ‖ references ‖ text]``; Plus pads ragged pictures before the text."""

from __future__ import annotations

from typing import Any

from torch import nn

from i2am.families import ForwardInputs, PipelineFacts
from i2am.families.arguments import attribute, named_arguments
from i2am.families.joint import JointTransformer, Segment
from i2am.references import Grid
from i2am.tracing.intercept import LayerContext, running_context


class JoyImage(JointTransformer):
    """``JoyImageEditTransformer3DModel``: pictures of one size, of which the last given is the generated one."""

    models = ("JoyImageEditTransformer3DModel",)
    attentions = ("JoyImageAttention",)
    sets = ()
    pipelines = (PipelineFacts("JoyImageEdit*"),)
    timestep_scale = 1.0

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.transformer, args, kwargs)
        pictures = given["hidden_states"]  # [B, pictures, C, frames, H, W]
        if pictures.ndim == 5:
            pictures = pictures[:, None]
        count, frames, *size = (pictures.shape[i] for i in (1, 3, 4, 5))
        if frames != 1:
            raise ValueError(f"{frames} frames have no one grid of generated tokens")
        _, *patch = attribute(self.transformer, "config").patch_size
        grid: Grid = (size[0] // patch[0], size[1] // patch[1])
        segments = [Segment(i * grid[0] * grid[1], grid) for i in range(count)]
        text = slice(segments[-1].stop, segments[-1].stop + given["encoder_hidden_states"].shape[1])
        self.carried = self.in_context(segments[0], segments[1:], 0, text, text.stop)
        return ForwardInputs(
            pictures[:, -1],
            given["timestep"],
            grid,
            conditioning=(given["encoder_hidden_states"],),
            stepped=False,
        )


class JoyImagePlus(JointTransformer):
    """``JoyImageEditPlusTransformer3DModel``: patches of pictures of any size, of which the first is generated."""

    models = ("JoyImageEditPlusTransformer3DModel",)
    attentions = ("JoyImageEditPlusAttention",)
    sets = ()
    pipelines = (PipelineFacts("JoyImageEditPlus*", "images", several=True),)
    conditional_call = None
    batched_guidance = True

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.transformer, args, kwargs)
        patches, text = given["hidden_states"], given["encoder_hidden_states"]
        self._shapes = [[tuple(shape) for shape in sample] for sample in given["shape_list"]]
        self._text = slice(patches.shape[1], patches.shape[1] + text.shape[1])
        (frames, *grid), *_ = self._shapes[0]
        if any(shape[0] != 1 for sample in self._shapes for shape in sample):
            raise ValueError(f"{frames} frames have no one grid of generated tokens")
        return ForwardInputs(patches, given["timestep"], tuple(grid), conditioning=(text,), stepped=False)

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = running_context()
        assert context is not None
        counted = self._shapes[context.conditional]
        if any(shapes != counted[0] for shapes in counted):
            raise ValueError("the samples of this batch have pictures of different sizes: trace one at a time")
        segments, start = [], 0
        for _, height, width in counted[0]:
            segments.append(Segment(start, (height, width)))
            start = segments[-1].stop
        layer.awaits = self.in_context(segments[0], segments[1:], 0, self._text, self._text.stop)
