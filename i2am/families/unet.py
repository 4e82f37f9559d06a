"""diffusers UNets: the reference as the whole cross-attention context, or through IP-Adapters beside a text.

Covers Paint-by-Example and ImageVariation (one image token), Versatile-like contexts (CLIP's 257 tokens), any UNet
whose reference keys the caller describes, and IP-Adapters of every kind on SD 1.5, SDXL, inpainting and ControlNet
pipelines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from i2am.families import Forward
from i2am.families.arguments import argument
from i2am.families.resampler import KINDS, Rollout
from i2am.references import QUERIES, Banked, Carried, Concatenated, Grid, Reference
from i2am.tracing.intercept import RunningLayer, eager, refuse_compiled, running_scope

EXAMPLE = "i2am.patch_unet(unet, reference=i2am.Reference(grid=(16, 16), skip=1))  # 16×16 tokens after a class token"
SELF_HINT = 'mode="self" gives maps of spatial self-attention instead, which are named "self"'
CONCATENATED = " Channels beside the latents never reach the keys, so they are no reference either."


class UNetFamily:
    """What all UNets share: cross-attention modules, and grids read from the spatial transformers around them."""

    conditional_call = None

    def __init__(self, unet: nn.Module):
        self.unet = unet

    def layers(self) -> dict[str, nn.Module]:
        return attentions(self.unet)

    def by_default(self, layer: str) -> bool:
        return not layer.startswith("mid_block")

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> Forward:
        sample, timestep = argument(args, kwargs, 0, "sample"), argument(args, kwargs, 1, "timestep")
        channels = getattr(getattr(self.unet, "config", None), "out_channels", None) or sample.shape[1]
        return Forward(latents=sample[:, :channels], timestep=timestep)

    def leave(self, layer: RunningLayer, module: nn.Module) -> None:
        return None

    def watch(self) -> Iterable[RemovableHandle]:
        for _, module in self.unet.named_modules():
            if type(module).__name__.endswith("Transformer2DModel"):
                yield module.register_forward_pre_hook(eager(read_grid), with_kwargs=True)


class CrossAttention(UNetFamily):
    """Every cross-attention key is part of the context that carries the reference.

    Args:
        unet: a UNet2DConditionModel or one built like it.
        references: which keys encode which reference; None: the context is one image, laid out as its length says.
        image_grid: grid of the image encoder's patches, where it is known.
    """

    def __init__(self, unet: nn.Module, references: Sequence[Reference] | None, image_grid: Grid | None = None):
        super().__init__(unet)
        self.references = references
        self.image_grid = image_grid

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> Forward:
        context = argument(args, kwargs, 2, "encoder_hidden_states")
        if isinstance(context, Tensor):
            for reference in self._references(context.shape[1]):
                if reference.grid != QUERIES:
                    reference.check(context.shape[1])
        return super().begin(args, kwargs)

    def enter(self, layer: RunningLayer, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        context = argument(args, kwargs, 1, "encoder_hidden_states", None)
        if isinstance(context, Tensor):  # None: self-attention
            grid = grid_of(layer)
            references = tuple(reference.on(grid) for reference in self._references(context.shape[1]))
            for reference in references:
                reference.check(context.shape[1])
            layer.carries = Carried(grid, references)

    def _references(self, length: int) -> tuple[Reference, ...]:
        if self.references is not None:
            return tuple(self.references)
        return (clip_tokens(length, self.image_grid),)


class IPAdapter(UNetFamily):
    """Image prompts in attention calls of their own, after the text's: one per adapter, or per masked image.

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
        self.projections = list(unet.encoder_hid_proj.image_projection_layers)
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

    def layers(self) -> dict[str, nn.Module]:
        return {name: m for name, m in super().layers().items() if hasattr(m.processor, "to_k_ip")}

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> Forward:
        embeds = (kwargs.get("added_cond_kwargs") or {}).get("image_embeds")
        if isinstance(embeds, (list, tuple)):
            self.images = [e.shape[1] for e in embeds]
        return super().begin(args, kwargs)

    def enter(self, layer: RunningLayer, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        pass  # the text's call comes first; an adapter's key projection announces each of the others

    def watch(self) -> Iterable[RemovableHandle]:
        yield from super().watch()
        for rollout in self.rollouts.values():
            yield from rollout.watch()
        for module in self.layers().values():
            for adapter, to_k in enumerate(module.processor.to_k_ip):
                announce = eager(lambda _, args, adapter=adapter: self._announce(adapter, args[0]))
                yield to_k.register_forward_pre_hook(announce)

    def _announce(self, adapter: int, embeds: Tensor) -> None:
        """``embeds`` are ``[B, images, T, C]``, all in one softmax, or ``[B, T, C]``: one of them, with a mask."""
        scope = running_scope()
        if scope is None or not scope.layers:
            return
        layer = scope.layers[-1]
        T = embeds.shape[-2]
        if embeds.ndim == 4:
            carried = [(image, image * T) for image in range(embeds.shape[1])]
        else:
            image = layer.images.get(adapter, 0)
            layer.images[adapter] = image + 1
            carried = [(image, 0)]
        references, rolls = [], []
        roll = None
        if adapter in self.rollouts:
            roll = self.rollouts[adapter].matrix.unflatten(0, (-1, self.images[adapter]))  # [B, images, T, X]
        for image, start in carried:
            reference = self._reference(adapter, image, T if roll is None else roll.shape[-1])
            reference.check(T if roll is None else roll.shape[-1])
            references.append(replace(reference, tokens=slice(start, start + T)))
            rolls.append(None if roll is None else roll[:, image])
        layer.carries = Carried(grid_of(layer), tuple(references), rolls=None if roll is None else tuple(rolls))

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


def read_unet(
    unet: nn.Module,
    references: Sequence[Reference] | None,
    *,
    image_only: bool = False,
    image_grid: Grid | None = None,
    itself: bool = False,
    rollout: bool = False,
) -> UNetFamily:
    """The family of a UNet.

    Args:
        unet: the model.
        references: as the caller describes them, or None.
        image_only: a pipeline says that the context is the reference image and nothing else.
        image_grid: grid of the pipeline's image encoder.
        itself: trace self-attention as it is (``mode="self"``).
        rollout: roll an IP-Adapter Plus' tokens back through its resampler.

    Raises:
        ValueError: no attention key encodes a reference, or it can't be told which do; says what to write.
    """
    from i2am.families.kandinsky import AddedKeys, added_key_attentions
    from i2am.families.selfattention import read_self_attention
    from i2am.families.video import StableVideo

    refuse_compiled(unet)
    if itself and type(unet).__name__ == "UNetSpatioTemporalConditionModel":
        raise ValueError("the self-attention of a video UNet goes over frames too, where i2am has no grid to draw on")
    if itself and added_key_attentions(unet):
        return AddedKeys(unet, None, itself=True)
    if itself or isinstance(references, (Concatenated, Banked)):
        return read_self_attention(unet, None if itself else references)
    name = type(unet).__name__
    if has_ip_adapter(unet):
        return IPAdapter(unet, references, image_grid, rollout)
    if rollout:
        raise ValueError(f"rollout=True needs an adapter with a resampler, but this {name} has no IP-Adapter")
    if added_key_attentions(unet):
        return AddedKeys(unet, references)
    if not attentions(unet):
        raise ValueError(no_reference_keys(name, "it has no cross-attention that i2am can trace"))
    if references is None and not image_only:
        raise ValueError(
            f"which cross-attention keys of this {name} encode the reference? The model alone does not tell text tokens"
            f" from image tokens.{CONCATENATED if channels_beside(unet) else ''} Load the IP-Adapter first, trace the "
            f"pipeline instead, or describe the keys:\n    {EXAMPLE}\n{SELF_HINT}"
        )
    family = StableVideo if name == "UNetSpatioTemporalConditionModel" else CrossAttention
    return family(unet, references, image_grid)


def channels_beside(unet: nn.Module) -> bool:
    """Whether an image enters as channels beside the latents."""
    config = getattr(unet, "config", None)
    return (getattr(config, "in_channels", None) or 0) > (getattr(config, "out_channels", None) or 0)


def no_reference_keys(name: str, reason: str) -> str:
    """The message for a pipeline or model without reference keys."""
    return (
        f"{name}: no attention keys encode a reference ({reason}). Attention then tells which positions exchange "
        f"information, never reference from generation. {SELF_HINT}"
    )


def attentions(unet: nn.Module, cross: bool = True) -> dict[str, nn.Module]:
    """Cross- or self-attention modules by name, without those of an adapter's resampler and added-KV attention."""
    return {
        name: m
        for name, m in unet.named_modules()
        if all(hasattr(m, part) for part in ("to_q", "to_k", "to_v", "heads"))
        and getattr(m, "is_cross_attention", None) is cross
        and getattr(m, "added_kv_proj_dim", None) is None
        and not name.startswith("encoder_hid_proj")
    }


def clip_tokens(length: int, image_grid: Grid | None) -> Reference:
    """A CLIP image as ``length`` tokens: one pooled token has no grid; else a class token and the patches.

    CLIP encoders see square images; without the encoder's own grid, a square number of patches is a square.
    """
    patches = length - 1
    side = math.isqrt(patches)
    if image_grid is not None and image_grid[0] * image_grid[1] == patches:
        return Reference(grid=image_grid, skip=1)
    if patches > 0 and side * side == patches:
        return Reference(grid=(side, side), skip=1)
    return Reference()


def has_ip_adapter(unet: nn.Module) -> bool:
    return getattr(getattr(unet, "config", None), "encoder_hid_dim_type", None) == "ip_image_proj" and hasattr(
        getattr(unet, "encoder_hid_proj", None), "image_projection_layers"
    )


def read_grid(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    scope = running_scope()
    hidden_states = argument(args, kwargs, 0, "hidden_states")
    if scope is not None and hidden_states.ndim == 4:
        scope.grid = tuple(hidden_states.shape[-2:])


def grid_of(layer: RunningLayer) -> Grid:
    if layer.grid is None:
        raise ValueError(f"layer {layer.name} runs outside a spatial transformer: its grid is unknown")
    return layer.grid
