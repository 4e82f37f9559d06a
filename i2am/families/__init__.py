"""Where the reference enters attention, one file a model family.

A family is read from a pipeline or a bare model once, when tracing starts; from then on it answers, for each forward
and each attention module, which tokens are generated, which encode the reference, and on which grids.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from i2am.references import Grid
from i2am.tracing.intercept import Call, RunningLayer


class Forward(NamedTuple):
    """What a family reads from the arguments of one forward of the traced model."""

    latents: Tensor  # [B, C, …] what is denoised, without channels concatenated from elsewhere
    timestep: Tensor | float  # in the scheduler's units
    grid: Grid | None = None  # of the latents, where their shape does not tell (tokens)
    frames: int = 1  # of a video: attention sees each as an image of the batch


class Family(Protocol):
    """What a tracer asks of a model family."""

    conditional_call: int | None  # where guidance runs as calls of its own: the index of the conditional one

    def layers(self) -> dict[str, nn.Module]:
        """The attention modules that may carry the reference, by name."""

    def by_default(self, layer: str) -> bool:
        """Whether a layer is in the default set of the maps (the paper leaves the mid block out)."""

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> Forward:
        """Reads one forward's arguments. Raises ValueError when the layout does not fit; nothing has run then."""

    def enter(self, layer: RunningLayer, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """An attention module starts: sets ``layer.carries`` when its next attention call carries the reference."""

    def leave(self, layer: RunningLayer, module: nn.Module) -> Call | None:
        """A reference-carrying module ends and no call of it was intercepted: the attention that it computed by itself
        (``value=None``), or None where nobody can tell; then the layer was blind.
        """

    def watch(self) -> Iterable[RemovableHandle]:
        """Hooks of the family's own, for as long as tracing lasts."""


class TransformerFamily(Family, Protocol):
    """What reading a transformer's pipeline asks besides."""

    batched_guidance: bool  # guidance is part of the batch, as the pipeline says
    latent_pixels: int  # of the latent image per side of what ``Forward`` calls its grid

    def has_adapters(self) -> bool:
        """Whether an adapter gives the model keys of a reference, whatever the pipeline."""
