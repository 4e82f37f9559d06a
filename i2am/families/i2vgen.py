"""I2VGen-XL: a context of ``[text ‖ 8×8 tokens of the first frame's latents ‖ tokens of its CLIP embedding]``.

The model makes it itself, the same for every frame, and a frame is an image of the batch. The first frame's latents
enter as channels besides.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from i2am.families import Family, ForwardInputs, Hooked, PipelineFacts, Request, TokenLayout
from i2am.families.arguments import attribute, named_arguments
from i2am.families.frames import refuse_video_options
from i2am.families.registry import described_tokens
from i2am.families.unet import UNetFamily, attentions, grid_of, read_grid
from i2am.references import Reference
from i2am.tracing.intercept import LayerContext

LATENTS = (8, 8)  # what its two strided convolutions leave of 32×32, whatever the picture's shape


class I2VGen(UNetFamily):
    """``I2VGenXLUNet``."""

    models = ("I2VGenXLUNet",)
    pipelines = (PipelineFacts("I2VGenXL*"),)

    @classmethod
    def read(cls, model: nn.Module, request: Request) -> Family:
        refuse_video_options(model, request)
        if described_tokens(model, request) is not None:
            raise ValueError(f"the context of a {type(model).__name__} is known: trace it without reference=")
        return cls(model)

    def layers(self) -> dict[str, nn.Module]:
        return {n: m for n, m in attentions(self.unet).items() if ".attentions." in n}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.unet, args, kwargs)
        sample, text = given["sample"], given["encoder_hidden_states"]
        first = text.shape[1]
        second = first + LATENTS[0] * LATENTS[1]
        self._keys = second + int(attribute(self.unet, "config.in_channels"))
        self._references = (
            Reference(LATENTS, slice(first, second), name="first_frame"),
            Reference(tokens=slice(second, self._keys), name="clip"),
        )
        embedding = given["image_embeddings"]
        conditioning: tuple[Tensor, ...] = (text, embedding) if embedding.shape[0] == sample.shape[0] else (text,)
        return ForwardInputs(
            sample, given["timestep"], frames=sample.shape[2], conditioning=conditioning, stepped=False
        )

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer.awaits = TokenLayout(grid_of(layer), self._references, keys=self._keys)

    def watch(self) -> Iterable[Hooked]:
        for name, module in self.unet.named_modules():
            if type(module).__name__ == "Transformer2DModel" and ".attentions." in name:
                yield module, read_grid, "before"
