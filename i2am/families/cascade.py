"""Stable Cascade's prior: keys ``[the layer's own tokens ‖ text ‖ its pooled token ‖ four tokens of each picture]``.

A picture's tokens come from one CLIP embedding, so they have no grid. What is generated are the 24×24 tokens that the
decoder draws the picture from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from i2am.families import Family, ForwardInputs, Hooked, PipelineFacts, Request, TokenLayout
from i2am.families.arguments import argument, attribute, named_arguments
from i2am.families.joint import NO_REFERENCE
from i2am.families.registry import described_tokens
from i2am.families.tokens import reference_names
from i2am.families.unet import UNetFamily
from i2am.references import SELF, Reference
from i2am.tracing.guidance import Told
from i2am.tracing.intercept import LayerContext


class Cascade(UNetFamily):
    """``StableCascadeUNet`` that is given ``clip_img``."""

    models = ("StableCascadeUNet",)
    pipelines = (
        PipelineFacts(
            "StableCascadePrior*",
            "images",
            several=True,
            model="prior",
            told=lambda pipe: Told(
                1 + bool(pipe.do_classifier_free_guidance), 0, how="Stable Cascade: [conditional, unconditional]"
            ),
        ),
    )

    def __init__(self, unet: nn.Module, *, self_attention: bool = False):
        super().__init__(unet)
        self.self_attention = self_attention

    @classmethod
    def read(cls, model: nn.Module, request: Request) -> Family:
        if request.rollout or described_tokens(model, request) is not None:
            name = type(model).__name__
            raise ValueError(f"the keys of a {name} are known: trace it without reference= and rollout=")
        return cls(model, self_attention=request.self_attention)

    def layers(self) -> dict[str, nn.Module]:
        named = dict(self.unet.named_modules())
        blocks = {n: m for n, m in named.items() if type(m).__name__ == "SDCascadeAttnBlock"}
        wanted = {n: m for n, m in blocks.items() if m.self_attn or not self.self_attention}
        return {f"{n}.attention": named[f"{n}.attention"] for n in wanted}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.unet, args, kwargs)
        pictures, text, pooled = given.get("clip_img"), given.get("clip_text"), given["clip_text_pooled"]
        if not self.self_attention and (pictures is None or text is None or not bool(pictures.any())):
            raise ValueError(NO_REFERENCE.format(model=type(self.unet).__name__))
        self._each = int(attribute(self.unet, "config.clip_seq"))
        self._pictures = 0 if pictures is None or text is None else _count(pictures)
        self._before = 0 if text is None else text.shape[1]
        self._before += self._each * _count(pooled)
        conditioning = tuple(x for x in (text, pictures) if isinstance(x, Tensor))
        return ForwardInputs(given["sample"], given["timestep_ratio"], conditioning=conditioning)

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid = tuple(argument(args, kwargs, 0, "hidden_states").shape[-2:])
        keys = argument(args, kwargs, 1, "encoder_hidden_states").shape[1]
        own = keys - self._before - self._each * self._pictures  # none where a block has no attention to itself
        if self.self_attention:
            references: tuple[Reference, ...] = (Reference(grid, slice(0, own), name=SELF),)
        else:
            start = own + self._before
            references = tuple(
                Reference(tokens=slice(start + i * self._each, start + (i + 1) * self._each), name=name)
                for i, name in enumerate(reference_names(self._pictures))
            )
        layer.awaits = TokenLayout(grid, references, keys=keys)

    def watch(self) -> Iterable[Hooked]:
        return ()


def _count(embedding: Tensor) -> int:
    """Return how many vectors an embedding ``[B, n, C]`` or ``[B, C]`` has."""
    return 1 if embedding.ndim == 2 else embedding.shape[1]
