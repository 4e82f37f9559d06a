"""IP-Adapters on UNets: image prompts in attention calls of their own, one per adapter, or per masked image.

The text's call comes first; an adapter's key projection announces each of the others. Of every kind on SD 1.5, SDXL,
inpainting, ControlNet and AnimateDiff pipelines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from i2am.families import ForwardInputs, Hooked, TokenLayout
from i2am.families.arguments import argument, attribute, named_arguments
from i2am.families.keysets import key_sets
from i2am.families.resampler import KINDS, Rollout
from i2am.families.tokens import clip_tokens
from i2am.families.unet import UNetFamily, grid_of
from i2am.references import Grid, Reference
from i2am.tracing.intercept import LayerContext, running_context

PROJECTIONS = "encoder_hid_proj.image_projection_layers"  # of a UNet's IP-Adapters
Scales = list[list[float]]  # per adapter, per image


@dataclass
class AdapterCalls:
    """Announcements of one attention module so far."""

    images: dict[int, int] = field(default_factory=dict)  # adapter → reference images that came one by one
    masks: Any = None  # ip_adapter_masks, as the module was given them
    scales: Scales | None = None  # of its processor


class IPAdapter(UNetFamily):
    """Image prompts in attention calls of their own.

    Args:
        unet: with IP-Adapter weights loaded.
        references: one description per adapter; None: read from the projection layers.
        image_grid: grid of the image encoder's patches, where it is known.
        rollout: roll resampled tokens back to the encoder's patches.
    """

    def __init__(
        self,
        unet: nn.Module,
        references: Sequence[Reference] | None,
        image_grid: Grid | None = None,
        rollout: bool = False,
    ):
        super().__init__(unet)
        self.projections = list(attribute(unet, PROJECTIONS))
        if references is not None and len(references) != len(self.projections):
            raise ValueError(f"{len(self.projections)} IP-Adapters are loaded, but {len(references)} references given")
        self.references = references
        self.image_grid = image_grid
        self.images = [1] * len(self.projections)  # per adapter, of the running forward
        resampled = {i: p for i, p in enumerate(self.projections) if type(p).__name__ in KINDS}
        if rollout and not resampled:
            kinds = ", ".join(type(p).__name__ for p in self.projections)
            raise ValueError(f"rollout=True needs an adapter with a resampler (IP-Adapter Plus), there is {kinds}")
        self.rollouts = {i: Rollout(p) for i, p in resampled.items()} if rollout else {}
        self.processors = {name: m.processor for name, m in self.layers().items()}

    def known_sets(self) -> tuple[str, ...]:
        return ("words", "text")

    def has_adapters(self) -> bool:
        return True

    def layers(self) -> dict[str, nn.Module]:
        return {name: m for name, m in super().layers().items() if hasattr(m.processor, "to_k_ip")}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        replaced = [n for n, p in self.processors.items() if self.unet.get_submodule(n).processor is not p]
        if replaced or list(attribute(self.unet, PROJECTIONS)) != self.projections:
            raise ValueError(
                f"the attention processors{' of ' + replaced[0] if replaced else ''} were replaced after tracing "
                "began, so "
                "its keys can't be seen: load IP-Adapters first, then trace"
            )
        embeds = self._embeds(args, kwargs)
        if embeds:
            self.images = [e.shape[1] for e in embeds]
        forward = super().begin(args, kwargs)
        if forward.latents.ndim == 5:  # AnimateDiff: [B, C, frames, h, w], each frame an image of the batch
            forward = forward._replace(frames=forward.latents.shape[2])
        for adapter, e in enumerate(embeds):
            if e.shape[0] != forward.latents.shape[0]:
                raise ValueError(
                    f"the image embeddings of adapter {adapter} are a batch of {e.shape[0]}, the latents one of "
                    f"{forward.latents.shape[0]}, so that samples attend to each other's images (diffusers#9813): give "
                    "each sample its own embeddings, the unconditional ones too, and none when guidance is cut off"
                )
        return forward

    def conditioning(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        return tuple(self._embeds(args, kwargs))

    def _embeds(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the image embeddings of a forward, ``[B, images, …]`` per adapter."""
        given = (named_arguments(self.unet, args, kwargs).get("added_cond_kwargs") or {}).get("image_embeds")
        return list(given) if isinstance(given, (list, tuple)) else []

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scales = getattr(module.processor, "scale", None)
        layer.state = AdapterCalls(
            masks=kwargs.get("ip_adapter_masks"),
            scales=[s if isinstance(s, list) else [s] for s in scales] if isinstance(scales, list) else None,
        )
        if self.key_sets.asked:  # the text's call, before the adapters'
            context = argument(args, kwargs, 1, "encoder_hidden_states", None)
            length = (context[0] if isinstance(context, tuple) else context).shape[1]
            layer.awaits = TokenLayout(grid_of(layer), (), keys=length, sets=key_sets(self.key_sets, range(length)))

    def watch(self) -> Iterable[Hooked]:
        yield from super().watch()
        for rollout in self.rollouts.values():
            yield from rollout.watch()
        for module in self.layers().values():
            for adapter, to_k in enumerate(attribute(module, "processor.to_k_ip")):
                yield to_k, partial(self._announce, adapter), "before"

    def _announce(self, adapter: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Announce an adapter's call. ``args[0]``: ``[B, images, T, C]``, all in one softmax, or ``[B, T, C]``: one
        image, with a mask.
        """
        context = running_context()
        if context is None or not context.layers or not isinstance(context.layers[-1].state, AdapterCalls):
            return
        layer, embeds = context.layers[-1], args[0]
        T = embeds.shape[-2]
        if embeds.shape[0] != context.batch:
            raise ValueError(
                f"layer {layer.name}: the image embeddings of adapter {adapter} are a batch of {embeds.shape[0]}, the "
                f"latents one of {context.batch}: give each sample its own (diffusers#9813)"
            )
        if embeds.ndim == 4:
            found = [(image, image * T) for image in range(embeds.shape[1])]
        else:
            image = layer.state.images.get(adapter, 0)
            layer.state.images[adapter] = image + 1
            if self._scale(layer, adapter, image) == 0:  # computed, then multiplied by 0: it has no influence
                return
            found = [(image, 0)]
        references, rolls, weights = [], [], []
        roll = None
        if adapter in self.rollouts:
            matrix = self.rollouts[adapter].matrix
            assert matrix is not None, "the resampler runs before the first layer that takes its tokens"
            roll = matrix.unflatten(0, (-1, self.images[adapter]))  # [B, images, T, X]
        for image, start in found:
            reference = self._reference(adapter, image, T if roll is None else roll.shape[-1])
            reference.check(T if roll is None else roll.shape[-1])
            references.append(replace(reference, tokens=slice(start, start + T)))
            rolls.append(None if roll is None else roll[:, image])
            weights.append(self._weight(layer, adapter, image))
        grid = grid_of(layer)
        layer.awaits = TokenLayout(
            grid,
            tuple(references),
            rollout=None if roll is None else tuple(rolls),
            keys=T * len(found),
            weights=None if all(w is None for w in weights) else tuple(weights),
        )

    def _scale(self, layer: LayerContext, adapter: int, image: int) -> float:
        scales: Scales | None = layer.state.scales
        if scales is None:
            return 1.0
        return scales[adapter][image if len(scales[adapter]) > 1 else 0]

    def _weight(self, layer: LayerContext, adapter: int, image: int) -> Tensor | None:
        """Return what an image's part is multiplied with at each query, ``[1, Q]``, as its processor does it: its scale
        and its mask. None: nothing.
        """
        h, w = grid_of(layer)
        masks, scale = layer.state.masks, self._scale(layer, adapter, image)
        if isinstance(masks, Tensor):
            masks = list(masks.unsqueeze(1))
        if masks is None or masks[adapter] is None:
            return None if scale == 1 else torch.full((1, h * w), float(scale))
        from diffusers.image_processor import IPAdapterMaskProcessor

        mask = masks[adapter][:, image]  # [1, H, W]
        at_queries: Tensor = IPAdapterMaskProcessor.downsample(mask, 1, h * w, 1)[..., 0]  # [1, Q]
        return scale * at_queries.detach().to(torch.float32)

    def _reference(self, adapter: int, image: int, T: int) -> Reference:
        if self.references is not None:
            reference = self.references[adapter]
            name = reference.name
        else:
            full = type(self.projections[adapter]).__name__ == "IPAdapterFullImageProjection"
            reference = clip_tokens(T, self.image_grid) if full or adapter in self.rollouts else Reference()
            name = "ip_adapter" if len(self.projections) == 1 else f"ip_adapter_{adapter}"
        if self.images[adapter] > 1:
            name += f".image_{image}"
        return replace(reference, name=name)


def has_ip_adapter(unet: nn.Module) -> bool:
    """Return whether IP-Adapter weights are loaded into a UNet."""
    return getattr(getattr(unet, "config", None), "encoder_hid_dim_type", None) == "ip_image_proj" and hasattr(
        getattr(unet, "encoder_hid_proj", None), "image_projection_layers"
    )
