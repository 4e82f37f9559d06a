"""Bria Fibo 2: ``[gist ‖ generated ‖ references]``, or the gist last where prompts of a batch are padded.

The first blocks (``noise_refiner``) see ``[generated ‖ references]`` alone; the cross-attention that some blocks have
besides looks at text.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from i2am.families import ForwardInputs, PipelineFacts, TokenLayout
from i2am.families.arguments import argument, attribute, named_arguments
from i2am.families.joint import NO_REFERENCE, JointTransformer, Segment
from i2am.tracing.intercept import AttentionCall, LayerContext


class Fibo2(JointTransformer):
    """``BriaFibo2Transformer2DModel``."""

    models = ("BriaFibo2Transformer2DModel",)
    attentions = ("BriaFibo2Attention",)
    sets = ()
    pipelines = (PipelineFacts("BriaFibo2*", several=True),)

    def layers(self) -> dict[str, nn.Module]:
        found = super().layers()
        return {n: m for n, m in found.items() if n.endswith(".attention") and not n.startswith("perceiver")}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.transformer, args, kwargs)
        patch, latents = int(attribute(self.transformer, "config").patch_size), given["hidden_states"]
        pictures = [latents, *(given.get("context_latents") or ())]
        if len(pictures) == 1 and not self.self_attention:
            raise ValueError(NO_REFERENCE.format(model=type(self.transformer).__name__))
        self._pictures: list[Segment] = []
        for picture in pictures:
            start = self._pictures[-1].stop if self._pictures else 0
            self._pictures.append(Segment(start, (picture.shape[-2] // patch, picture.shape[-1] // patch)))
        text = given["encoder_hidden_states"]
        return ForwardInputs(
            latents,
            given["timestep"] * self.timestep_scale,
            self._pictures[0].grid,
            conditioning=(text,),
            stepped=False,
        )

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = argument(args, kwargs, 2, "attention_mask", None)
        layer.awaits = partial(self._layout, mask)

    def _layout(self, mask: Tensor | None, call: AttentionCall) -> TokenLayout:
        generated, *references = self._pictures
        keys, pictures = call.key.shape[2], self._pictures[-1].stop
        gist = keys - pictures
        start = gist if mask is None else 0
        text = slice(0, gist) if mask is None else slice(pictures, keys)
        return self.in_context(generated, references, start, text, keys)
