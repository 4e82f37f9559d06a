"""Flux, LongCat and Fibo: references in context (Kontext), among the text tokens (Redux), and through IP-Adapters.

Tokens are ``[text ‖ generated ‖ reference …]``; the position ids' first axis is 0 for the generated picture and 1 for
Kontext's reference. Redux puts SigLIP's 27×27 tokens behind the text, so a caller says which of the text's tokens they
are. IP-Adapters add attention calls of their own to the double blocks, from the generated queries (and, under Kontext,
the reference's, which come after them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import nn

from i2am.families import CHANNELS, RESIDUAL, START, Hooked, PipelineFacts, TextPart, TokenLayout
from i2am.families.arguments import attribute
from i2am.families.joint import JointTransformer, Positions, Segment, apart
from i2am.families.keysets import key_sets
from i2am.families.tokens import among
from i2am.families.visualcloze import cloze, is_cloze
from i2am.references import Reference
from i2am.tracing.intercept import LayerContext, running_context


class Flux(JointTransformer):
    """``FluxTransformer2DModel``."""

    models = ("FluxTransformer2DModel",)
    attentions = ("FluxAttention",)
    shards = True
    texts: ClassVar[tuple[TextPart, ...]] = (TextPart("tokenizer_2", ("prompt_2", "prompt"), "max_sequence_length"),)
    pipelines: ClassVar[tuple[PipelineFacts, ...]] = (
        PipelineFacts("FluxKontext*"),
        PipelineFacts("FluxFill*", refused=CHANNELS),
        PipelineFacts("FluxControlNet*", refused=RESIDUAL),
        PipelineFacts("FluxControl*", refused=CHANNELS),
        PipelineFacts("Flux*Img2Img*", refused=START),
        PipelineFacts("Flux*Inpaint*", refused=START),
        PipelineFacts("FluxKontextInpaint*", "image_reference"),
        PipelineFacts(
            "FluxPriorRedux*",
            refused="it makes embeddings and runs no attention of a denoiser: trace the pipeline that they are given "
            "to, with "
            "reference=i2am.Reference(grid=(27, 27), tokens=slice(-729, None))",
        ),
        PipelineFacts("VisualCloze*", refused="it runs two pipelines: trace the first, its generation_pipe"),
        PipelineFacts("VisualClozeGeneration*"),
    )

    def __init__(
        self, transformer: nn.Module, references: Sequence[Reference] | None = None, *, self_attention: bool = False
    ):
        super().__init__(transformer, references, self_attention=self_attention)
        self._positions = Positions()
        self._generated: Segment | None = None
        self._tokens = 0  # of pictures

    def layout(self, given: dict[str, Any]) -> TokenLayout:
        text = given["encoder_hidden_states"].shape[1]
        own = getattr(attribute(self.transformer, "config"), "out_channels", None) or given["hidden_states"].shape[-1]
        if is_cloze(given["img_ids"], given["hidden_states"].shape[-1], own):
            return self._cloze(given, text, own)
        generated, references = apart(self._positions.segments(given["img_ids"]))
        self._generated, self._tokens = generated, given["hidden_states"].shape[1]
        asked = references or self.references or self.self_attention or self.key_sets.asked
        if not asked and self.has_adapters():
            return TokenLayout(generated.grid, ())
        return self.in_context(generated, references, text, slice(0, text), text + given["hidden_states"].shape[1])

    def _cloze(self, given: dict[str, Any], text: int, own: int) -> TokenLayout:
        """Return the layout of a grid of pictures, whose last channels say what is to be generated."""
        if self.self_attention:
            raise ValueError("pictures that share a grid are each other's keys: their self-attention is not traced")
        masks = given["hidden_states"][..., 2 * own :].detach().cpu() > 0.5
        generate = masks.any(-1)
        if not masks.all(-1).equal(generate) or not bool((generate == generate[0]).all()):
            raise ValueError("a part of a token, or another picture of each sample, is to be generated")
        rows = [segment for _, segment in self._positions.segments(given["img_ids"])]
        stop = text + rows[-1].stop
        grid, queries, references = cloze(rows, generate[0])
        parts = [among(slice(text, stop), r) for r in references] + [among(slice(0, text), r) for r in self.references]
        sets = key_sets(self.key_sets, range(text), queries + text, grid)
        return TokenLayout(grid, tuple(parts), queries + text, keys=stop, sets=sets)

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.carried is not None and (self.carried.references or self.carried.sets):
            layer.awaits = self.carried

    def watch(self) -> Iterable[Hooked]:
        for module in () if self.self_attention else self.layers().values():
            for adapter, to_k in enumerate(getattr(module.processor, "to_k_ip", ())):
                yield to_k, partial(self._announce, adapter), "before"

    def _announce(self, adapter: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Announce an adapter's call, its keys ``args[0] [B, images, T, C]`` in one softmax."""
        context = running_context()
        if context is None or not context.layers or self._generated is None:
            return
        several = len(attribute(self.transformer, "encoder_hid_proj.image_projection_layers")) > 1
        name = f"ip_adapter_{adapter}" if several else "ip_adapter"
        images, T = args[0].shape[1:3]
        references = tuple(
            Reference(tokens=slice(i * T, (i + 1) * T), name=name if images == 1 else f"{name}.image_{i}")
            for i in range(images)
        )
        queries = slice(self._generated.start, self._generated.stop)
        context.layers[-1].awaits = TokenLayout(
            self._generated.grid,
            references,
            queries,
            keys=images * T,
            parts=(self._tokens,) if self.shards else None,
            whole_keys=True,
        )


class LongCat(Flux):
    """``LongCatImageTransformer2DModel``: laid out like Kontext, with 1 and 2 on the position ids' first axis."""

    texts = ()  # a chat template, with the picture in it

    models = ("LongCatImageTransformer2DModel",)
    attentions = ("LongCatImageAttention",)
    shards = False
    pipelines = (PipelineFacts("LongCatImageEdit*"),)


class Fibo(Flux):
    """``BriaFiboTransformer2DModel``: laid out like Kontext, with references 1, 2, … and batched guidance.

    Tokens are single latents, or 2×2 of them with ``do_patching=True``: then give ``trace`` its ``canvas``.
    """

    texts = ()
    models = ("BriaFiboTransformer2DModel",)
    attentions = ("BriaFiboAttention",)
    shards = False
    pipelines = (PipelineFacts("BriaFiboEdit*"),)
    conditional_call = None
    timestep_scale = 1.0
    batched_guidance = True
    latent_pixels = 1


class Chroma(Flux):
    """``ChromaTransformer2DModel``: Flux without its guidance; a reference comes by IP-Adapter."""

    models = ("ChromaTransformer2DModel",)
    shards = False
    pipelines = (PipelineFacts("ChromaI*", refused=START),)
