"""Which part of a batch, or which of two calls, is the conditional one. Only it counts.

The others look at an empty reference, or follow the negative prompt.
"""

from __future__ import annotations

from torch import Tensor


class Guidance:
    """Finds the conditional samples of a model's batch.

    Args:
        mode: "auto", "none" (every sample counts), or the index of the conditional part of a batch of equal parts (two,
            or as many as the index needs, unless a pipeline says how many); where guidance runs as calls of its own, of
            the conditional call.

    "auto" on a bare model: guidance repeats the same latents, so a batch whose halves carry identical latents is
    [unconditional, conditional], and one whose thirds do is [conditional, image only, unconditional], InstructPix2Pix's
    order. Different images never start from identical latents unless they share a seed; then pass "none".

    Models that run guidance as calls of their own are recognised by the same latents coming again at the same timestep:
    the very tensor, an evaluation without a step of the scheduler, or, where there is none to watch, equal values.
    """

    def __init__(self, mode: str | int = "auto"):
        if mode not in ("auto", "none") and (isinstance(mode, bool) or not isinstance(mode, int) or mode < 0):
            raise ValueError(f'guidance must be "auto", "none" or the index of the conditional part, got {mode!r}')
        self.mode = mode
        self.restart()

    def restart(self) -> None:
        """Forget what was seen of earlier runs."""
        self._known: dict[int, slice] = {}
        self._last: tuple[Tensor, float] | None = None  # latents and timestep of the last call
        self._call = 0  # how many calls on these came before

    def counts(self, latents: Tensor, timestep: float, stepped: bool | None, conditional: int | None) -> bool:
        """Whether a call of the model is the conditional one.

        Args:
            latents: what the call denoises, references in context among it.
            timestep: at which.
            stepped: whether the scheduler has stepped since the last call; None: unknown.
            conditional: index of the conditional one among the calls of one evaluation; None: guidance does not run as
                calls of its own.
        """
        if conditional is None or self.mode == "none":
            return True
        again = self._last is not None and self._last[1] == timestep
        again = again and (self._last[0] is latents or stepped is False or (stepped is None and self._same(latents)))
        self._call = self._call + 1 if again else 0
        self._last = latents, timestep
        return self._call == (conditional if self.mode == "auto" else self.mode)

    def _same(self, latents: Tensor) -> bool:
        last = self._last[0]
        return last.shape == latents.shape and last.device == latents.device and last.equal(latents)

    def conditional(
        self, latents: Tensor, parts: int | None = None, index: int | None = None, by_calls: bool = False
    ) -> slice:
        """The samples of ``latents [B, C, …]`` that count.

        Args:
            latents: what the model is about to denoise, without channels concatenated from elsewhere.
            parts: number of guidance parts of the batch where a pipeline tells; None: unknown.
            index: which of these is conditional.
            by_calls: guidance runs as calls of its own, so that a given index speaks of these.

        Raises:
            ValueError: the batch does not divide into the parts asked for.
        """
        batch = latents.shape[0]
        if self.mode == "none":
            return slice(0, batch)
        if self.mode != "auto" and not by_calls:
            index = self.mode
            parts = parts if parts is not None and parts > index else max(2, index + 1)
        if parts is not None:
            return _part(batch, parts, index)
        if batch not in self._known:  # looked up once: comparing latents makes a GPU wait
            self._known[batch] = _part(batch, *_repeats(latents))
        return self._known[batch]


def _repeats(latents: Tensor) -> tuple[int, int]:
    """(parts, index of the conditional one) of a batch that repeats the same latents."""
    batch = latents.shape[0]
    for parts, index in ((2, 1), (3, 0)):
        if batch % parts == 0:
            first, *others = latents.chunk(parts)
            if all(first.equal(other) for other in others):
                return parts, index
    return 1, 0


def _part(batch: int, parts: int, index: int) -> slice:
    if batch % parts:
        raise ValueError(
            f"a batch of {batch} does not divide into the {parts} parts of guidance; pass guidance='none' if every "
            "sample is conditional"
        )
    size = batch // parts
    return slice(index * size, (index + 1) * size)
