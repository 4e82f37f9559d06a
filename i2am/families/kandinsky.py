"""UNets with added keys (Kandinsky 2, UnCLIP): one softmax over ``[context ‖ the layer's own tokens]``.

Kandinsky 2.2's context is an image embedding as several tokens, 2.1's and UnCLIP's have them before the text's. They
come from one pooled vector, so they have no grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from i2am.families import Hooked, PipelineFacts, TokenLayout
from i2am.families.arguments import argument
from i2am.families.tokens import among
from i2am.families.unet import UNetFamily
from i2am.references import SELF, Reference
from i2am.tracing.intercept import LayerContext


class AddedKeys(UNetFamily):
    """Attention modules with ``add_k_proj``, which are given a feature map and the context.

    Args:
        unet: the model.
        references: tokens of the context that encode a reference; None: as the UNet's own projection lays them out.
        self_attention: trace the layer's own tokens among the keys (``mode="self"``).
    """

    pipelines = (
        PipelineFacts("KandinskyV22*", "image_embeds"),
        PipelineFacts(
            "UnCLIPImageVariation*",
            model="decoder",
            scheduler="decoder_scheduler",
            described=lambda pipe: [
                Reference(tokens=slice(0, int(pipe.text_proj.clip_extra_context_tokens)), name="image")
            ],
        ),
        *(PipelineFacts(f"Kandinsky{kind}*", "image_embeds") for kind in ("Pipeline", "Combined", "I")),
    )

    def __init__(self, unet: nn.Module, references: Sequence[Reference] | None, *, self_attention: bool = False):
        super().__init__(unet)
        self.self_attention = self_attention
        self.references = tuple(references or (Reference(tokens=image_tokens(unet), name="image"),))

    def layers(self) -> dict[str, nn.Module]:
        return added_key_attentions(self.unet)

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid = tuple(argument(args, kwargs, 0, "hidden_states").shape[-2:])
        context = argument(args, kwargs, 1, "encoder_hidden_states").shape[1]
        keys = context + (0 if getattr(module, "only_cross_attention", False) else grid[0] * grid[1])
        if self.self_attention:
            layer.awaits = TokenLayout(grid, (Reference(grid, slice(context, None), name=SELF),), keys=keys)
            return
        for reference in self.references:
            reference.check(context)
        layer.awaits = TokenLayout(grid, tuple(among(slice(0, context), r) for r in self.references), keys=keys)

    def watch(self) -> Iterable[Hooked]:
        return ()


def added_key_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """Return attention modules by name that join added keys with their own."""
    return {n: m for n, m in unet.named_modules() if getattr(m, "added_kv_proj_dim", None) and hasattr(m, "add_k_proj")}


def image_tokens(unet: nn.Module) -> slice:
    """Return which tokens of the context are the image's, by the UNet's projection."""
    kind = getattr(getattr(unet, "config", None), "encoder_hid_dim_type", None)
    if kind == "image_proj":
        return slice(None)
    if kind == "text_image_proj":
        projection: Any = unet.encoder_hid_proj
        return slice(0, projection.num_image_text_embeds)
    raise ValueError(
        f"which keys of this {type(unet).__name__} encode the reference? Its context is of kind {kind!r}: describe it "
        "with reference=i2am.Reference(tokens=...), counted from the first context token"
    )
