"""ConsisID: tokens of a face, which the video's tokens look at between some of the blocks.

A perceiver makes them, so that they have no layout. Their attention is a softmax written out, whose keys and values
share a projection: hooks on the projections see the very queries and keys. The picture enters as channels besides.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from i2am.families import (
    CHANNELS,
    Family,
    ForwardInputs,
    Hooked,
    PipelineFacts,
    Request,
    TokenLayout,
    no_reference_keys,
)
from i2am.families.arguments import attribute, named_arguments
from i2am.families.frames import refuse_video_options
from i2am.families.modules import Parts
from i2am.families.registry import described_tokens
from i2am.references import Reference
from i2am.tracing.intercept import AttentionCall, LayerContext, running_layer

PROJECTIONS = ("to_q", "to_kv")


class ConsisID(Family):
    """``ConsisIDTransformer3DModel`` with its face modules. Latents are ``[B, F, C, H, W]``; maps are a strip."""

    models = ("ConsisIDTransformer3DModel",)
    pipelines = (PipelineFacts("ConsisID*"),)
    latent_pixels = 2

    def __init__(self, transformer: nn.Module):
        self.transformer = transformer
        self._parts = {name: Parts(module, PROJECTIONS) for name, module in self.layers().items()}
        self.carried: TokenLayout | None = None

    @classmethod
    def read(cls, model: nn.Module, request: Request) -> Family:
        refuse_video_options(model, request)
        if described_tokens(model, request) is not None:
            raise ValueError(f"the face tokens of a {type(model).__name__} are known: trace it without reference=")
        if not attribute(model, "config.is_train_face"):
            raise ValueError(no_reference_keys(type(model).__name__, CHANNELS))
        return cls(model)

    def layers(self) -> dict[str, nn.Module]:
        named = self.transformer.named_modules()
        return {n: m for n, m in named if n.rpartition(".")[0] == "perceiver_cross_attention"}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.transformer, args, kwargs)
        video, patch = given["hidden_states"], attribute(self.transformer, "config.patch_size")
        frames, (h, w) = video.shape[1], (n // patch for n in video.shape[-2:])
        self.carried = TokenLayout((frames * h, w), (Reference(name="face"),))
        return ForwardInputs(
            video[:, :, : attribute(self.transformer, "config.out_channels")],
            given["timestep"],
            self.carried.grid,
            strip=frames,
            conditioning=(given["encoder_hidden_states"],),
            stepped=False,
        )

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._parts[layer.name].check(layer.name)
        layer.awaits, layer.state = self.carried, {}

    def leave(self, layer: LayerContext, module: nn.Module) -> AttentionCall | None:
        heads = attribute(module, "heads")
        q, kv = (layer.state[name] for name in PROJECTIONS)
        q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, kv.chunk(2, dim=-1)[0]))
        return AttentionCall(q, k.expand(len(q), -1, -1, -1), None, scale=attribute(module, "scale"))

    def watch(self) -> Iterable[Hooked]:
        for module in self.layers().values():
            for name in PROJECTIONS:
                yield module.get_submodule(name), partial(_keep, name), "after"


def _keep(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Keep what a projection of the running layer gave."""
    layer = running_layer()
    if layer is not None and isinstance(layer.state, dict):
        layer.state[name] = output
