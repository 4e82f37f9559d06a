"""Flux, LongCat and Fibo: references in context (Kontext), among the text tokens (Redux), and through IP-Adapters.

Tokens are ``[text ‖ generated ‖ reference …]``; the position ids' first axis is 0 for the generated picture and 1 for
Kontext's reference. Redux puts SigLIP's 27×27 tokens behind the text, so a caller says which of the text's tokens they
are. IP-Adapters add attention calls of their own to the double blocks, from the generated queries (and, under Kontext,
the reference's, which come after them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from i2am.families.joint import JointTransformer, Positions, Segment, apart
from i2am.references import Carried, Reference
from i2am.tracing.intercept import eager, running_scope


class Flux(JointTransformer):
    """``FluxTransformer2DModel``."""

    attentions = ("FluxAttention",)

    def __init__(self, transformer: nn.Module, references: Sequence[Reference] | None = None, *, itself: bool = False):
        super().__init__(transformer, references, itself=itself)
        self._positions = Positions()
        self._generated: Segment | None = None

    def layout(self, given: dict[str, Any]) -> Carried:
        text = given["encoder_hidden_states"].shape[1]
        generated, references = apart(self._positions.segments(given["img_ids"]))
        self._generated = generated
        if not (references or self.references or self.itself) and self.has_adapters():
            return Carried(generated.grid, ())
        return self.in_context(generated, references, text, slice(0, text))

    def enter(self, layer, module, args, kwargs) -> None:
        if self.carried.references:
            layer.carries = self.carried

    def watch(self) -> Iterable[RemovableHandle]:
        for module in () if self.itself else self.layers().values():
            for adapter, to_k in enumerate(getattr(module.processor, "to_k_ip", ())):
                announce = eager(lambda _, args, adapter=adapter: self._announce(adapter, args[0]))
                yield to_k.register_forward_pre_hook(announce)

    def _announce(self, adapter: int, embeds: Tensor) -> None:
        """The next call is an adapter's, its keys ``embeds [B, images, T, C]`` in one softmax."""
        scope = running_scope()
        if scope is None or not scope.layers:
            return
        several = len(self.transformer.encoder_hid_proj.image_projection_layers) > 1
        name = f"ip_adapter_{adapter}" if several else "ip_adapter"
        images, T = embeds.shape[1:3]
        references = tuple(
            Reference(tokens=slice(i * T, (i + 1) * T), name=name if images == 1 else f"{name}.image_{i}")
            for i in range(images)
        )
        generated = self._generated
        scope.layers[-1].carries = Carried(generated.grid, references, slice(generated.start, generated.stop))


class LongCat(Flux):
    """``LongCatImageTransformer2DModel``: laid out like Kontext, with 1 and 2 on the position ids' first axis."""

    attentions = ("LongCatImageAttention",)


class Fibo(Flux):
    """``BriaFiboTransformer2DModel``: laid out like Kontext, with references 1, 2, … and batched guidance.

    Tokens are single latents, or 2×2 of them with ``do_patching=True``: then give ``trace`` its ``canvas``.
    """

    attentions = ("BriaFiboAttention",)
    conditional_call = None
    timestep_scale = 1.0
    batched_guidance = True
    latent_pixels = 1
