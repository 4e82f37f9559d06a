"""Stable Diffusion 3 with an IP-Adapter: a second call of the image tokens, keys ``[image ‖ resampled tokens]``.

The joint call before it runs over ``[image ‖ text]``; that is what ``mode="self"`` looks at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from i2am.families import (
    RESIDUAL,
    START,
    Family,
    ForwardInputs,
    Hooked,
    PipelineFacts,
    Request,
    TextPart,
    TokenLayout,
    no_reference_keys,
)
from i2am.families.arguments import attribute, named_arguments
from i2am.families.keysets import key_sets
from i2am.families.registry import described_tokens
from i2am.families.resampler import Rollout
from i2am.families.tokens import square
from i2am.references import SELF, Grid, Reference
from i2am.tracing.intercept import LayerContext, running_context


class StableDiffusion3(Family):
    """``SD3Transformer2DModel``."""

    models = ("SD3Transformer2DModel",)
    pipelines = (
        PipelineFacts("StableDiffusion3ControlNet*", refused=RESIDUAL),
        PipelineFacts("StableDiffusion3I*", refused=START),
        PipelineFacts("StableDiffusion3PAGI*", refused=START),
    )
    texts = (
        TextPart("tokenizer", same=("prompt_2",)),  # CLIP's two encoders share channels of the same tokens
        TextPart("tokenizer_3", ("prompt_3", "prompt"), "max_sequence_length"),
    )
    conditional_call = 0  # skip-layer guidance calls once more

    def __init__(
        self, transformer: nn.Module, *, self_attention: bool = False, rollout: bool = False, sets: bool = False
    ):
        self.transformer = transformer
        self.self_attention = self_attention
        self._grid: Grid = (0, 0)
        self._rollout = Rollout(attribute(transformer, "image_proj")) if rollout else None
        self._sets = sets
        self._text = 0  # tokens of the running forward

    @classmethod
    def read(cls, model: nn.Module, request: Request) -> Family:
        if described_tokens(model, request):
            raise ValueError("SD3's text tokens encode no reference: load its IP-Adapter, which needs no description")
        return cls(model, self_attention=request.self_attention, rollout=request.rollout, sets=bool(request.sets))

    def known_sets(self) -> tuple[str, ...]:
        return ("words", "text", "itself")

    def has_adapters(self) -> bool:
        return bool(self._adapters())

    def layers(self) -> dict[str, nn.Module]:
        if self.self_attention or self._sets:
            return {n: m for n, m in self._attentions().items() if n.endswith(".attn")}
        if not self._adapters():
            raise ValueError(no_reference_keys(type(self.transformer).__name__, "no IP-Adapter is loaded"))
        return self._adapters()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.transformer, args, kwargs)
        latents, patch = given["hidden_states"], attribute(self.transformer, "config.patch_size")
        self._grid = (latents.shape[-2] // patch, latents.shape[-1] // patch)
        context = given.get("encoder_hidden_states")
        self._text = context.shape[1] if isinstance(context, Tensor) else 0
        return ForwardInputs(latents, given["timestep"], conditioning=(context,) if isinstance(context, Tensor) else ())

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own_tokens = self._grid[0] * self._grid[1]
        own = slice(0, own_tokens)
        if self.self_attention:
            layer.awaits = TokenLayout(self._grid, (Reference(self._grid, own, name=SELF),), own)
        elif self._sets:  # the joint call, before an adapter's
            stop = own_tokens + self._text
            sets = key_sets(self.key_sets, range(own_tokens, stop), own, self._grid)
            layer.awaits = TokenLayout(self._grid, (), own, keys=stop, sets=sets)

    def watch(self) -> Iterable[Hooked]:
        if self._rollout is not None:
            yield from self._rollout.watch()
        for module in () if self.self_attention else self._adapters().values():
            yield attribute(module, "processor.to_k_ip"), self._announce, "before"

    def _attentions(self) -> dict[str, nn.Module]:
        return {n: m for n, m in self.transformer.named_modules() if type(m).__name__ == "Attention"}

    def _adapters(self) -> dict[str, nn.Module]:
        return {n: m for n, m in self._attentions().items() if hasattr(m.processor, "to_k_ip")}

    def _announce(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Announce the adapter's call: its tokens stand behind the image's own."""
        context = running_context()
        if context is None or not context.layers:
            return
        own, tokens = self._grid[0] * self._grid[1], args[0].shape[-2]
        reference = Reference(tokens=slice(own, own + tokens), name="ip_adapter")
        rolls = None
        if self._rollout is not None and self._rollout.matrix is not None:
            rolls = (self._rollout.matrix,)
            reference = replace(reference, grid=square(self._rollout.matrix.shape[-1]))
        context.layers[-1].awaits = TokenLayout(self._grid, (reference,), rollout=rolls, keys=own + tokens)
