"""Videos of which some frames are given: their tokens are keys of the same self-attention as the generated ones.

Who is given is read from each forward: tokens or frames that stand at a lower timestep than the others (LTX, Wan 2.2
TI2V, SkyReels V2's diffusion forcing, AnyFlow), a mask (Cosmos), or a branch of their own (VACE). Generated frames are
a strip, ``(frames · h, w)``, below each other; given frames next to each other are one reference, a strip as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from i2am.families import Family, ForwardInputs, Request, TokenLayout
from i2am.families.arguments import attribute, named_arguments
from i2am.families.joint import NO_REFERENCE
from i2am.families.registry import described_tokens
from i2am.families.tokens import reference_names
from i2am.references import Grid, Reference
from i2am.tracing.intercept import LayerContext


class Frames(NamedTuple):
    """Consecutive tokens that are whole frames of one size, each row by row."""

    frames: int
    grid: Grid  # of one frame
    given: bool
    name: str = ""  # of a reference; empty: it is numbered

    @property
    def tokens(self) -> int:
        return self.frames * self.grid[0] * self.grid[1]

    @property
    def strip(self) -> Grid:
        """Grid of all of them below each other."""
        return self.frames * self.grid[0], self.grid[1]


class VideoFrames(Family):
    """Base of transformers whose self-attention sees a whole video, given frames among it.

    A subclass says which tokens are whose (:meth:`frames_of`).
    """

    conditional_call: ClassVar[int | None] = 0
    batched_guidance: ClassVar[bool] = False
    latent_pixels: ClassVar[int] = 2
    attentions: ClassVar[tuple[str, ...]] = ("attn1",)  # how the names of the attention modules end
    blocks: ClassVar[tuple[str, ...]] = ("transformer_blocks.", "blocks.")  # how they begin

    def __init__(self, transformer: nn.Module):
        self.transformer = transformer
        self.carried: TokenLayout | None = None

    @classmethod
    def read(cls, model: nn.Module, request: Request) -> Family:
        refuse_video_options(model, request)
        if described_tokens(model, request) is not None:
            raise ValueError(
                f"the given frames of a {type(model).__name__} are told by its arguments: trace it without reference="
            )
        return cls(model)

    def has_adapters(self) -> bool:
        return True  # whether a call is given frames, only the call says

    def layers(self) -> dict[str, nn.Module]:
        named = self.transformer.named_modules()
        return {n: m for n, m in named if n.startswith(self.blocks) and n.rpartition(".")[2] in self.attentions}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.transformer, args, kwargs)
        parts = self.frames_of(given)
        self.carried = self.layout(parts, given)
        conditioning = given.get("encoder_hidden_states")
        return ForwardInputs(
            self.latents(given),
            self.timestep(given),
            self.carried.grid,
            strip=sum(part.frames for part in parts if not part.given),
            lead=self.lead_of(parts),
            conditioning=(conditioning,) if isinstance(conditioning, Tensor) else (),
            stepped=False,
            aside=self.aside(given),
        )

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer.awaits = self.carried

    def frames_of(self, given: dict[str, Any]) -> Sequence[Frames]:
        """Return whose the tokens are, in their order.

        Args:
            given: the forward's arguments by name.

        Raises:
            ValueError: some tokens are no whole frames.
        """
        raise NotImplementedError

    def layout(self, parts: Sequence[Frames], given: dict[str, Any]) -> TokenLayout:
        """Return what the layers carry. Raises ValueError where no frame is given, or none is generated."""
        return video_layout(type(self.transformer).__name__, parts, keys=sum(part.tokens for part in parts))

    def lead_of(self, parts: Sequence[Frames]) -> int:
        """Return how many frames of the video that the pipeline makes are given, and come before the generated ones."""
        return 0

    def latents(self, given: dict[str, Any]) -> Tensor:
        """Return what is denoised, ``[B, …]``."""
        latents: Tensor = given["hidden_states"]
        return latents

    def timestep(self, given: dict[str, Any]) -> Tensor | float:
        """Return the timestep of the generated frames."""
        return latest(given["timestep"])

    def aside(self, given: dict[str, Any]) -> str | None:
        """Return why a forward is no evaluation of the run; None: it is one."""
        return None


def refuse_video_options(model: nn.Module, request: Request) -> None:
    """Refuse what no video transformer has. Raises ValueError."""
    if request.rollout:
        raise ValueError(
            f"rollout=True needs an adapter with a resampler, and i2am knows none of {type(model).__name__}"
        )
    if request.self_attention:
        raise ValueError(
            "the self-attention of a video transformer goes over frames, where i2am has no grid to draw on"
        )


def video_layout(
    model: str, parts: Sequence[Frames], *, keys: int | None, more: Iterable[Reference] = ()
) -> TokenLayout:
    """Return the layout of a sequence that begins with the tokens of ``parts``.

    Args:
        model: its name, for messages.
        keys: how many the attention has; None: any number that the references fit.
        more: references among the tokens behind.

    Raises:
        ValueError: nothing is given, or nothing is generated, or its frames differ in size.
    """
    generated = [part for part in parts if not part.given]
    if len({part.grid for part in generated}) != 1:
        shown = ", ".join(f"{h}×{w}" for h, w in {part.grid for part in generated}) or "none"
        raise ValueError(f"this call of the {model} generates frames of {shown} tokens, which make no one strip")
    starts = [sum(part.tokens for part in parts[:i]) for i in range(len(parts))]
    spans = {i: slice(start, start + part.tokens) for i, (start, part) in enumerate(zip(starts, parts, strict=True))}
    own = [spans[i] for i, part in enumerate(parts) if not part.given]
    names = iter(reference_names(sum(part.given and not part.name for part in parts)))
    references = [
        Reference(part.strip, spans[i], name=part.name or next(names)) for i, part in enumerate(parts) if part.given
    ]
    references += more
    if not references:
        raise ValueError(NO_REFERENCE.format(model=model))
    queries = own[0] if len(own) == 1 else torch.cat([torch.arange(span.start, span.stop) for span in own])
    grid = sum(part.frames for part in generated) * generated[0].grid[0], generated[0].grid[1]
    return TokenLayout(grid, tuple(references), queries, keys=keys)


def frames_before(parts: Sequence[Frames]) -> int:
    """Return how many frames are given before the first generated one."""
    return sum(part.frames for part in itertools.takewhile(lambda part: part.given, parts))


def latest(timestep: Tensor | float) -> Tensor | float:
    """Return the highest of the timesteps of tokens or frames: where the generated ones stand."""
    return timestep.max() if isinstance(timestep, Tensor) else timestep


def video_grid(model: nn.Module, latents: Tensor) -> tuple[int, Grid]:
    """Return frames, and the grid of one, of latents ``[B, C, F, H, W]``, by the patch size in a model's config."""
    frames, h, w = (n // p for n, p in zip(latents.shape[2:], attribute(model, "config.patch_size"), strict=True))
    return frames, (h, w)


def masked_frames(mask: Tensor, frames: int, grid: Grid, name: str) -> list[Frames]:
    """Return which frames a mask ``[B, F, H, W]`` gives: whole ones, and the same of every sample.

    Args:
        frames: of tokens, which may hold several latent ones each.
        grid: of one.
        name: of the mask, for messages.

    Raises:
        ValueError: it gives a part of a frame, or other frames to each sample.
    """
    each = mask.detach().cpu().flatten(2).bool()
    whole, any_of_it = each.all(-1), each.any(-1)
    if not whole.equal(any_of_it) or not bool((whole == whole[0]).all()):
        raise ValueError(f"{name} gives a part of a frame, or other frames to each sample of the batch")
    return in_a_row(whole[0].unflatten(0, (frames, -1)).any(-1).tolist(), grid)


def in_a_row(given: Sequence[bool], grid: Grid) -> list[Frames]:
    """Return frames of one grid, those next to each other that are all given or all generated together."""
    found: list[Frames] = []
    for one in given:
        if found and found[-1].given == one:
            found[-1] = found[-1]._replace(frames=found[-1].frames + 1)
        else:
            found.append(Frames(1, grid, one))
    return found


class Roles:
    """Tells given tokens from generated ones by their timesteps, for the length of a run.

    Given ones stand lower. Where a condition is not at full strength, the generated ones come down to where it stands,
    and both go on together: they stay what they were, until the timesteps rise for another run.
    """

    def __init__(self) -> None:
        self._given: list[bool] = []
        self._last = float("-inf")

    def read(self, timesteps: Tensor) -> list[bool]:
        """Return which of ``N`` tokens or frames are given.

        Args:
            timesteps: ``[B, N]``.

        Raises:
            ValueError: samples differ, or what was generated is given now (asynchronous diffusion forcing).
        """
        rows = timesteps.detach().double().cpu()
        if not bool((rows == rows[0]).all()):
            raise ValueError("the samples of this batch are given different frames: trace one at a time")
        now = float(rows[0].max())
        given = [bool(t < now) for t in rows[0]]
        again = now > self._last or len(given) != len(self._given)
        self._last = now
        if again:
            self._given = given
        elif any(new and not old for new, old in zip(given, self._given, strict=True)):
            self._last = float("-inf")
            raise ValueError(
                "a frame that was generated is given in this call: frames stand at timesteps of their own "
                "(asynchronous diffusion forcing, ar_step), so that none is generated or given for a whole run"
            )
        return self._given
