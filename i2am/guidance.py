"""Which part of a batch is the conditional one. Only it counts: the others look at an empty reference."""

from __future__ import annotations

from torch import Tensor


class Guidance:
    """Finds the conditional samples of a model's batch.

    Args:
        mode: "auto", "none" (every sample counts), or the index of the conditional part of a batch of equal parts (two,
            or as many as the index needs, unless a pipeline says how many).

    "auto" on a bare model: guidance repeats the same latents, so a batch whose halves carry identical latents is
    [unconditional, conditional], and one whose thirds do is [conditional, image only, unconditional], InstructPix2Pix's
    order. Different images never start from identical latents unless they share a seed; then pass "none".
    """

    def __init__(self, mode: str | int = "auto"):
        if mode not in ("auto", "none") and (isinstance(mode, bool) or not isinstance(mode, int) or mode < 0):
            raise ValueError(f'guidance must be "auto", "none" or the index of the conditional part, got {mode!r}')
        self.mode = mode
        self._known: dict[int, slice] = {}

    def restart(self) -> None:
        """Forget what was seen of earlier runs."""
        self._known.clear()

    def conditional(self, latents: Tensor, parts: int | None = None, index: int | None = None) -> slice:
        """The samples of ``latents [B, C, …]`` that count.

        Args:
            latents: what the model is about to denoise, without channels concatenated from elsewhere.
            parts: number of guidance parts of the batch where a pipeline tells; None: unknown.
            index: which of these is conditional.

        Raises:
            ValueError: the batch does not divide into the parts asked for.
        """
        batch = latents.shape[0]
        if self.mode == "none":
            return slice(0, batch)
        if self.mode != "auto":
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
