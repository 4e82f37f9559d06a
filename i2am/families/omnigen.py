"""OmniGen: ``[words and references ‖ time ‖ generated]``, references where the prompt names them.

Guidance is a batch of thirds, [conditional, unconditional, image only]; prompts are padded on the left, so that each
sample has its references in places of its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from i2am.families import ForwardInputs, PipelineFacts
from i2am.families.arguments import attribute, named_arguments
from i2am.families.joint import NO_REFERENCE, JointTransformer, Segment
from i2am.references import Grid
from i2am.tracing.guidance import Told
from i2am.tracing.intercept import LayerContext, running_context


class OmniGen(JointTransformer):
    """``OmniGenTransformer2DModel``."""

    models = ("OmniGenTransformer2DModel",)
    attentions = ("Attention",)
    sets = ()
    pipelines = (
        PipelineFacts(
            "OmniGen*",
            "input_images",
            several=True,
            told=lambda pipe: Told(3, 0, how="OmniGen: [conditional, unconditional, image only]"),
        ),
    )
    conditional_call = None
    batched_guidance = True

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.transformer, args, kwargs)
        latents, patch = given["hidden_states"], int(attribute(self.transformer, "config").patch_size)
        pictures = iter(given["input_img_latents"])
        self._references: dict[int, list[Segment]] = {
            sample: [_segment(int(start), int(stop), next(pictures), patch) for start, stop in places]
            for sample, places in given["input_image_sizes"].items()
        }
        if not self.self_attention and not any(self._references.values()):
            raise ValueError(NO_REFERENCE.format(model=type(self.transformer).__name__))
        self._text = 0 if given["input_ids"] is None else given["input_ids"].shape[1]
        self._grid: Grid = (latents.shape[-2] // patch, latents.shape[-1] // patch)
        return ForwardInputs(latents, given["timestep"], self._grid, stepped=False)

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = running_context()
        assert context is not None
        samples = range(context.batch)[context.conditional]
        references = self._references.get(samples[0], [])
        if any(self._references.get(sample, []) != references for sample in samples):
            raise ValueError(
                "the samples of this batch have their references in different places: trace one prompt at a time"
            )
        generated = Segment(self._text + 1, self._grid)  # behind the time token
        layer.awaits = self.in_context(generated, references, 0, slice(0, self._text), generated.stop)


def _segment(start: int, stop: int, picture: Any, patch: int) -> Segment:
    segment = Segment(start, (picture.shape[-2] // patch, picture.shape[-1] // patch))
    if segment.stop != stop:
        raise ValueError(f"a reference of {segment.grid} tokens stands in {stop - start} places of the prompt")
    return segment
