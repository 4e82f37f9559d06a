"""diffusers UNets: the reference as the whole cross-attention context, or through IP-Adapters beside a text.

Covers Paint-by-Example and ImageVariation (one image token), Versatile-like contexts (CLIP's 257 tokens) and any UNet
whose reference keys the caller describes; :mod:`i2am.families.ip_adapter` has the adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from i2am.families import (
    CHANNELS,
    RESIDUAL,
    SELF_HINT,
    START,
    Family,
    ForwardInputs,
    Hooked,
    PipelineFacts,
    Request,
    TextPart,
    TokenLayout,
    View,
    no_reference_keys,
)
from i2am.families.arguments import argument, argument_of, named_arguments
from i2am.families.keysets import key_sets
from i2am.families.tokens import clip_tokens
from i2am.ops.tokens import TokenSet
from i2am.references import QUERIES, Banked, Concatenated, Grid, Reference
from i2am.tracing.guidance import Told
from i2am.tracing.intercept import AttentionCall, LayerContext, running_context
from i2am.tracing.who import images_of_call, local_of_call

EXAMPLE = "i2am.patch_unet(unet, reference=i2am.Reference(grid=(16, 16), skip=1))  # 16×16 tokens after a class token"
CONCATENATED = " Channels beside the latents never reach the keys, so they are no reference either."


def _self_attention_guidance(pipe: Any) -> Told:
    """Return the layout of self-attention guidance: a second call of each step runs on degraded latents."""
    return Told(extra="self-attention guidance, on degraded latents", images=images_of_call(pipe))


def _panorama(variables: dict[str, Any]) -> View:
    """Return the view that MultiDiffusion's loop is at.

    Raises:
        ValueError: it looks at several views in one call, or goes round the edge of the picture.
    """
    views, latents = variables["batch_view"], variables["latents"]
    canvas = (latents.shape[-2], latents.shape[-1])
    if len(views) != 1:
        raise ValueError(f"{len(views)} views of the picture in one call: trace with view_batch_size=1")
    top, _, left, right = views[0]
    if right > canvas[1]:
        raise ValueError("a view goes round the edge of the picture: trace with circular_padding=False")
    return View((top, left), canvas)


def _safe(pipe: Any) -> Told:
    """Return how the safe pipeline lays out guidance: [unconditional, conditional, what to stay away from]."""
    guided, safe = (bool(local_of_call(pipe, x)) for x in ("do_classifier_free_guidance", "enable_safety_guidance"))
    return Told(1 + guided + safe, 1 if guided else 0, how="the pipeline's safety guidance")


def _subject(pipe: Any) -> list[Reference]:
    """Return BLIP-Diffusion's tokens of the subject, which stand among the prompt's."""
    start, count = int(pipe.config.ctx_begin_pos), int(pipe.qformer.config.num_query_tokens)
    return [Reference(tokens=slice(start, start + count), name="subject")]


class UNetFamily(Family):
    """Base of all UNets: cross-attention modules, and grids read from the spatial transformers around them."""

    why_not_itself = 'the picture\'s own tokens are the keys of attention of their own (attn1): mode="self" maps that'
    texts = (TextPart("tokenizer", same=("prompt_2",)),)  # of SDXL both encoders share channels of the same tokens

    def __init__(self, unet: nn.Module):
        self.unet = unet

    def layers(self) -> dict[str, nn.Module]:
        return attentions(self.unet)

    def by_default(self, layer: str) -> bool:
        return not any(part in ("mid_block", "middle_block") for part in layer.split("."))

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        sample = argument_of(self.unet, args, kwargs, 0, "sample")
        timestep = argument_of(self.unet, args, kwargs, 1, "timestep")
        channels = getattr(getattr(self.unet, "config", None), "out_channels", None) or sample.shape[1]
        return ForwardInputs(sample[:, :channels], timestep, conditioning=self.conditioning(args, kwargs))

    def conditioning(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return the embeddings of a forward that carry the reference, ``[B, …]``."""
        context = argument_of(self.unet, args, kwargs, 2, "encoder_hidden_states", None)
        return (context,) if isinstance(context, Tensor) else ()

    def watch(self) -> Iterable[Hooked]:
        for _, module in self.unet.named_modules():
            if type(module).__name__.endswith("Transformer2DModel"):
                yield module, read_grid, "before"


class CrossAttention(UNetFamily):
    """Every cross-attention key is part of the context that carries the reference.

    Args:
        unet: a UNet2DConditionModel or one built like it.
        references: which keys encode which reference; None: the context is one image, laid out as its length says.
        image_grid: grid of the image encoder's patches, where it is known.
    """

    models = ("UNet2DConditionModel",)
    pipelines: ClassVar[tuple[PipelineFacts, ...]] = (
        PipelineFacts("PaintByExample*", "example_image"),
        PipelineFacts("StableDiffusionImageVariation*"),
        PipelineFacts("VersatileDiffusionImageVariation*"),
        PipelineFacts("StableDiffusionInstructPix2Pix*", refused=CHANNELS),
        PipelineFacts("StableDiffusionXLInstructPix2Pix*", refused=CHANNELS),
        PipelineFacts("StableDiffusionUpscale*", refused=CHANNELS),
        PipelineFacts("StableDiffusionLatentUpscale*", refused=CHANNELS),
        PipelineFacts("StableDiffusion*Img2Img*", refused=START),
        PipelineFacts("StableDiffusion*ControlNet*", refused=RESIDUAL),
        PipelineFacts("StableDiffusion*Adapter*", refused=RESIDUAL),
        PipelineFacts("StableUnCLIPImg2Img*", refused="the image enters as a class embedding"),
        PipelineFacts("BlipDiffusion*", "reference_image", described=_subject),
        PipelineFacts("StableDiffusionSAG*", adapter=True, told=_self_attention_guidance),
        PipelineFacts("StableDiffusionPanorama*", adapter=True, views=_panorama),
        PipelineFacts("StableDiffusionPipelineSafe*", adapter=True, told=_safe),
    )

    def __init__(self, unet: nn.Module, references: Sequence[Reference] | None, image_grid: Grid | None = None):
        super().__init__(unet)
        self.references = references
        self.image_grid = image_grid

    def known_sets(self) -> tuple[str, ...]:
        return () if self.references is None else ("words", "text")  # else its context is the image and nothing else

    @classmethod
    def read(cls, model: nn.Module, request: Request) -> Family:
        return read_unet(model, request)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        context = argument_of(self.unet, args, kwargs, 2, "encoder_hidden_states")
        if isinstance(context, Tensor):
            for reference in self._references(context.shape[1]):
                if reference.grid != QUERIES and reference.call is None and not self._has_other_context(args, kwargs):
                    reference.check(context.shape[1])
        return super().begin(args, kwargs)

    def _has_other_context(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether some layers may be given a context of their own (SeeSR): then each is checked when it runs."""
        given = named_arguments(self.unet, args, kwargs)
        return any(n != "encoder_hidden_states" and n.endswith("encoder_hidden_states") for n in given)

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = argument(args, kwargs, 1, "encoder_hidden_states", None)
        if isinstance(context, Tensor):  # None: self-attention
            layer.expects = context.shape[1]
            layer.awaits = partial(self._layout, layer, context.shape[1])

    def _layout(self, layer: LayerContext, length: int, call: AttentionCall) -> TokenLayout | None:
        """Return the layout of a call, if it is the one that is described: checked at ``length`` keys."""
        references = self._references(length)
        numbers = {reference.call for reference in references if reference.call is not None}
        keys = call.key.shape[2]
        if len(numbers) > 1:
            raise ValueError(
                f"layer {layer.name}: references in several calls, {sorted(numbers)}, need one tracer each"
            )
        if numbers:
            if len(layer.seen) != numbers.pop():
                return None
        elif keys != length:
            return None
        grid = grid_of(layer)
        here = tuple(reference.on(grid) for reference in references)
        try:
            for reference in here:
                reference.check(keys)
        except ValueError as error:
            raise ValueError(
                f"layer {layer.name}: {error}; or leave out layers of another context with layers="
            ) from None
        described = {i for r in here for i in TokenSet.of(r.tokens, keys, "tokens").positions}
        sets = key_sets(self.key_sets, [i for i in range(keys) if i not in described])
        return TokenLayout(grid, here, keys=keys, sets=sets)

    def _references(self, length: int) -> tuple[Reference, ...]:
        if self.references is not None:
            return tuple(self.references)
        return (clip_tokens(length, self.image_grid),)


def read_unet(unet: nn.Module, request: Request) -> Family:
    """Return the family of a UNet.

    Raises:
        ValueError: no attention key encodes a reference, or it can't be told which do; says what to write.
    """
    from i2am.families.gligen import Gligen, has_picture_boxes
    from i2am.families.ip_adapter import IPAdapter, has_ip_adapter
    from i2am.families.kandinsky import AddedKeys, added_key_attentions
    from i2am.families.selfattention import read_self_attention

    name, references = type(unet).__name__, request.references
    if request.self_attention and added_key_attentions(unet):
        return AddedKeys(unet, None, self_attention=True)
    if request.self_attention or isinstance(references, (Concatenated, Banked)):
        described = references if isinstance(references, (Concatenated, Banked)) else None
        return read_self_attention(unet, described)
    if has_ip_adapter(unet):
        return IPAdapter(unet, references, request.image_grid, request.rollout)
    if request.rollout:
        raise ValueError(f"rollout=True needs an adapter with a resampler, but this {name} has no IP-Adapter")
    if added_key_attentions(unet):
        return AddedKeys(unet, references)
    if references is None and has_picture_boxes(unet):
        return Gligen(unet)
    if not attentions(unet):
        raise ValueError(no_reference_keys(name, "it has no cross-attention that i2am can trace"))
    if references is None and not request.image_only and request.sets:
        references = []
    if references is None and not request.image_only:
        raise ValueError(
            f"which cross-attention keys of this {name} encode the reference? The model alone does not tell text tokens"
            f" from image tokens.{CONCATENATED if channels_beside(unet) else ''} Load the IP-Adapter first, trace the "
            f"pipeline instead, or describe the keys:\n    {EXAMPLE}\n{SELF_HINT}"
        )
    return CrossAttention(unet, references, request.image_grid)


def channels_beside(unet: nn.Module) -> bool:
    """Return whether an image enters as channels beside the latents."""
    config = getattr(unet, "config", None)
    return (getattr(config, "in_channels", None) or 0) > (getattr(config, "out_channels", None) or 0)


def attentions(unet: nn.Module, cross: bool = True) -> dict[str, nn.Module]:
    """Return cross- or self-attention modules by name, without those of a resampler, of time and with added keys."""
    return {
        name: m
        for name, m in unet.named_modules()
        if all(hasattr(m, part) for part in ("to_q", "to_k", "to_v", "heads"))
        and _is_cross(name, m) is cross
        and getattr(m, "added_kv_proj_dim", None) is None
        and not name.startswith("encoder_hid_proj")
        and "motion_modules" not in name
        and not name.endswith(".fuser.attn")  # GLIGEN's, of which gligen.py knows
    }


def _is_cross(name: str, attention: Any) -> bool:
    """Tell whether an attention module is cross-attention; one of before that was an attribute, by its block."""
    told = getattr(attention, "is_cross_attention", None)
    if told is not None:
        return bool(told)
    widths = [getattr(part, "in_features", None) for part in (attention.to_q, attention.to_k)]
    return name.endswith("attn2") or widths[0] != widths[1]


def read_grid(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note the size of the feature map that a spatial transformer is given."""
    context = running_context()
    hidden_states = argument(args, kwargs, 0, "hidden_states")
    if context is not None and hidden_states.ndim == 4:
        context.grid = tuple(hidden_states.shape[-2:])


def grid_of(layer: LayerContext) -> Grid:
    """Return the grid of the generated tokens of a running layer."""
    if layer.grid is None:
        raise ValueError(f"layer {layer.name} runs outside a spatial transformer: its grid is unknown")
    return layer.grid
