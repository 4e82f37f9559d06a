"""Which part of a batch, or which of the calls of one evaluation, is the conditional one. Only it counts.

The others look at an empty reference, or follow the negative prompt. What the pipeline says comes first, then the
evidence; where neither tells, the call is refused with what was seen. A user's index always wins.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i2am.tracing.clock import StepInfo, Unexplained


class Told(NamedTuple):
    """Guidance of a pipeline's running call, as it says; None: it does not say."""

    parts: int | None = None  # of the batch
    part: int | None = None  # index of the conditional one among them
    call: int | None = None  # index of the conditional one among the calls of an evaluation
    images: int | None = None  # how many it denoises, where the batch holds each several times
    extra: str | None = None  # why it calls the model again on other latents without a step: those calls do not count
    how: str = "the pipeline"  # who says so


class Verdict(NamedTuple):
    """Verdict on what counts of one forward."""

    samples: slice | None  # of the batch; None: nothing
    parts: int = 1  # of the batch
    how: str = ""  # how that is known, or why nothing counts
    provisional: bool = False  # which part is conditional shows in the reference keys alone
    seen: bool = False  # repeated latents say so: looked at once more in the run's second evaluation
    doubt: str = ""  # what to say where there is no second one, and nothing else says so


class Guidance:
    """Finds what counts among the calls and samples of a run.

    Args:
        mode: "auto"; "none" (every sample of every call counts); or the index of the conditional part of the batch, or
            (index, parts), or, where guidance runs as calls of its own, the index of the conditional call of an
            evaluation: (index, 1) says that it does. With an index alone, the parts are what the pipeline says, else as
            often as the latents repeat, else max(2, index + 1).

    Under "auto", guidance in a batch repeats the same latents: halves are [unconditional, conditional], diffusers'
    order, unless the embeddings of all parts but one are zeros: that one is conditional then. More parts have no order
    that is everybody's. A call on the very latents of the call before, without a step between, is guidance as a call of
    its own.
    """

    def __init__(self, mode: str | int | tuple[int, int] = "auto"):
        self.mode = mode
        self._index = mode[0] if isinstance(mode, tuple) else mode if isinstance(mode, int) else 0
        self._parts = mode[1] if isinstance(mode, tuple) else None
        self.restart()

    def restart(self) -> None:
        """Forget the run so far."""
        self._layout: dict[tuple[int, Told], Verdict] = {}  # per batch size, looked up once a run: a GPU waits for it
        self._doubted: set[tuple[int, Told]] = set()  # those of which the second evaluation is looked at, too
        self._last: tuple[Tensor, float, list[tuple[Tensor, int]]] | None = None  # latents, timestep, what was given
        self._taken: int | None = None  # steps of the scheduler at the last call
        self.doubt: str | None = ""  # what the second evaluation is to settle; None: it has
        self.call = 0  # index of the running call among those of its evaluation
        self.calls = 0  # the most that one evaluation has had
        self.by_calls = self._parts == 1  # the index names a call

    def judge(
        self,
        latents: Tensor,
        conditioning: Sequence[Tensor],
        timestep: float,
        info: StepInfo,
        told: Told,
        *,
        from_keys: bool = False,
        as_calls: bool = False,
        given: Sequence[Tensor] | None = None,
    ) -> Verdict:
        """Return what counts of a forward.

        Args:
            latents: ``[B, …]`` what it denoises, without channels concatenated from elsewhere.
            conditioning: ``[B, …]`` tensors that carry text or reference.
            timestep: at which.
            info: where in the run it stands.
            told: what the pipeline says.
            as_calls: the model runs guidance as calls of its own: an index names one of these, unless latents repeat.
            from_keys: an unconditional half of zeros shows in the reference keys alone.
            given: all tensors of the forward, by which the very same evaluation is known when it comes once more; none:
                some of what it looks at is not among them. None: the conditioning.

        Raises:
            ValueError: neither the pipeline nor the evidence tells what counts.
        """
        if info.first:
            self.restart()
        if info.taken is not None:  # other tiles may have been evaluated since
            info, self._taken = info._replace(stepped=info.taken != self._taken), info.taken
        everything = conditioning if given is None else given
        again = self._again(latents, everything, timestep, info, told)
        before = None if self._last is None else self._last[0]
        self._last = latents, timestep, [(x, _version(x)) for x in everything] if info.stepped is None else []
        counted = info.step is not None and info.stepped is None  # num_steps=: nobody tells the picture's size
        if again == "other latents" and (self.mode != "none" or counted):
            if told.extra is not None:
                return Verdict(None, how=told.extra)
            raise Unexplained(
                f"the model is called again at timestep {timestep:g} on other latents, and "
                f"{'no scheduler is known' if counted else 'the scheduler has not stepped'}: tiles, several pictures "
                "in turn, or guidance on degraded latents? Place tiles with tracer.tile(top, left), pass scheduler= "
                "where a solver evaluates a step twice, or reset() between pictures"
                + ("" if counted else "; pass guidance='none' if every call counts")
            )
        self.call = self.call + 1 if again == "same latents" else 0
        self.calls = max(self.calls, self.call + 1)
        if self.mode == "none":
            how = "guidance='none': every sample counts"
            if again == "other latents":
                how += ", in calls at one timestep on several latents, too, as views of the whole (is it tiles? tile())"
            return Verdict(slice(0, latents.shape[0]), how=how)
        if self.mode != "auto" and not self.by_calls and self._parts is None:
            told_apart = (latents.shape[0], told) in self._layout  # it is a part of the batch
            self.by_calls = told.call is not None or (as_calls and not told_apart and _copies(latents) == 1)
        wanted = self._wanted_call(latents, told, timestep)
        if wanted is not None and self.call != wanted:
            return Verdict(None, how=f"call {self.call} of an evaluation, the conditional one is {wanted}")
        key = latents.shape[0], told
        if key in self._doubted and self.call == 0 and not (before is not None and _same(before, latents)):
            self._doubted.remove(key)
            self.doubt = None
            if not _repeats(latents, self._layout[key].parts):
                raise Unexplained(
                    f"the batch of {key[0]} began with the same latents {self._layout[key].parts} times, as guidance "
                    f"has it, but at timestep {timestep:g} they differ: pictures of one seed? Pass guidance='none' if "
                    "every sample counts"
                )
        known = self._layout.get(key)
        if known is None or info.step is None:  # without steps, nothing tells where a run ends
            self._layout[key] = self._look(latents, conditioning, told, wanted, from_keys)
            if known is None and self._layout[key].seen:
                self._doubted.add(key)
                self.doubt = self._layout[key].doubt
        return self._layout[key]

    def settle(self, latents: int, verdict: Verdict, told: Told) -> None:
        """Note which part is conditional, found in the reference keys, for the rest of the run."""
        self._layout[latents, told] = verdict

    def _again(
        self, latents: Tensor, given: Sequence[Tensor], timestep: float, info: StepInfo, told: Told
    ) -> str | None:
        """Return how a call relates to the one before: None is a new evaluation."""
        if self._last is None or info.stepped or self._last[1] != timestep:
            return None
        if self._last[0].shape != latents.shape:
            if info.stepped is None:
                return None
            return "other latents" if told.call is None else "same latents"
        if not _same(self._last[0], latents):
            return "other latents"
        if info.stepped is None and given and _all_same(self._last[2], given):
            return None  # the very same evaluation once more
        return "same latents"

    def _wanted_call(self, latents: Tensor, told: Told, timestep: float) -> int | None:
        """Return the index of the conditional call; None: guidance lies in the batch, or there is none."""
        if self.mode == "auto":
            if told.call is None and self.call:
                first, second = (0, 1) if latents.shape[0] == 1 else ((0, 1), (1, 1))
                raise Unexplained(
                    f"{self.call + 1} calls at timestep {timestep:g} on the same latents without a step between: "
                    "guidance as calls of its own, and nothing tells which one is conditional: pass its index, "
                    f"guidance={first} for the first call or guidance={second} for the second, or guidance='none' if "
                    "every call counts"
                )
            return told.call
        index, batch = self._index, latents.shape[0]
        if self.by_calls:
            return index
        if self._parts is not None and self.call == 0:
            return None
        parts = self._parts or self._parts_of(latents, told)
        if not self.by_calls and self.call == 0 and batch % parts:
            if any(verdict.parts > 1 for verdict in self._layout.values()):
                raise Unexplained(
                    f"guidance={index} has named a part of each batch so far, and the batch of {batch} that came at "
                    f"timestep {timestep:g} does not divide into {parts}: a call beside the denoising? Make it on a "
                    "copy of the model, or unpatch() before it"
                )
            self.by_calls = True
        elif not self.by_calls and self.call:
            raise Unexplained(
                f"guidance={index} was taken for a part of the batch of {batch}, but {self.call + 1} calls came at "
                f"timestep {timestep:g} on the same latents: pass guidance=({index}, 1) if each call is one part, and "
                "it is the index of the conditional call"
            )
        return index if self.by_calls else None

    def _parts_of(self, latents: Tensor, told: Told) -> int:
        """Return how many parts a user's index is one of.

        Raises:
            Unexplained: the latents repeat in ways that make it two different parts.
        """
        key = latents.shape[0], told
        if key in self._layout:
            return self._layout[key].parts
        least = max(2, self._index + 1)
        if self._parts is not None:
            return self._parts
        if told.parts is not None and told.parts > self._index:
            return told.parts
        copies = _images_parts(latents, told) or _copies(latents)
        fitting = [n for n in range(least, copies + 1) if copies % n == 0]
        if len(fitting) > 1:
            raise Unexplained(
                f"the batch of {latents.shape[0]} holds the same latents {copies} times, so guidance={self._index} may "
                f"be one of {' or '.join(map(str, fitting))} parts: pass guidance=({self._index}, {fitting[0]}) for "
                f"part {self._index} of {fitting[0]}"
            )
        return fitting[0] if fitting else least

    def _look(
        self, latents: Tensor, conditioning: Sequence[Tensor], told: Told, wanted: int | None, from_keys: bool
    ) -> Verdict:
        batch = latents.shape[0]
        if self.by_calls:
            return Verdict(slice(0, batch), how=f"guidance={self.mode}: call {wanted} of each evaluation")
        if self.mode != "auto":
            parts = self._parts_of(latents, told)
            return Verdict(
                _part(batch, parts, self._index), parts, f"guidance={self.mode}: part {self._index} of {parts}"
            )
        if told.parts is not None and told.part is not None:
            chosen = _part(batch, told.parts, told.part)
            if told.parts > 1 and not _repeats(latents, told.parts):
                raise ValueError(
                    f"{told.how} says that the batch of {batch} is {told.parts} parts of guidance, but they denoise "
                    "different "
                    "latents: pass guidance='none' if every sample counts, or the index of the conditional part"
                )
            how = (
                f"{told.how}: part {told.part} of {told.parts}"
                if told.parts > 1
                else f"{told.how}: no guidance in the batch"
            )
            return Verdict(chosen, told.parts, how)
        known = _images_parts(latents, told)
        parts = known or _copies(latents)
        if parts == 1:
            how = "latents do not repeat" if known is None else f"{told.how} denoises {told.images}"
            return Verdict(slice(0, batch), how=f"{how}: no guidance in the batch")
        full = _not_empty(conditioning, parts)
        if len(full) == 1:
            how = f"latents repeat, and part {full[0]} of {parts} alone has embeddings that are not zeros"
            return Verdict(_part(batch, parts, full[0]), parts, how, seen=known is None)
        if parts == 2:
            how = "latents repeat: [unconditional, conditional], diffusers' order"
            sure = from_keys or known is not None
            if not sure:
                how += ", assumed"
                warnings.warn(
                    f"i2am: the latents of a batch of {batch} repeat, and nothing tells which half is conditional: the "
                    "second is taken, as in diffusers' own loops. Say guidance=1 where that is so, guidance=0 where "
                    "the first half is",
                    UserWarning,
                    stacklevel=2,
                )
            doubt = (
                f"a batch of {batch} held the same latents twice in the only evaluation of a run: guidance, or "
                "pictures of one seed? Pass guidance=1 where the second half is conditional, guidance='none' where "
                "every sample counts"
            )
            return Verdict(_part(batch, 2, 1), 2, how, from_keys, known is None, "" if sure else doubt)
        raise Unexplained(
            f"the batch of {batch} holds the same latents {parts} times: guidance of {parts} parts, or several "
            "pictures of one seed? Nothing tells which part is conditional: pass its index and how many there are, "
            f"guidance=(1, {parts}), or guidance='none' if every sample counts"
        )


def _images_parts(latents: Tensor, told: Told) -> int | None:
    """Return how many parts a batch has that holds each of a pipeline's pictures so often; None: it does not say."""
    if told.images is None or latents.shape[0] % told.images:
        return None
    parts = latents.shape[0] // told.images
    return parts if parts == 1 or _repeats(latents, parts) else None


def _copies(latents: Tensor) -> int:
    """Return how often a batch holds the same latents, one after the other."""
    batch = latents.shape[0]
    return next(n for n in range(batch, 0, -1) if batch % n == 0 and _repeats(latents, n))


def empty_parts(keys: Tensor, parts: int) -> list[int]:
    """Return the parts of a batch whose keys ``[B, H, N, d]`` are all alike: they were made of zeros."""
    return [i for i, part in enumerate(keys.chunk(parts)) if bool((part == part[:, :, :1]).all())]


def _repeats(latents: Tensor, parts: int) -> bool:
    first, *others = latents.chunk(parts)
    return all(first.equal(other) for other in others)


def _not_empty(conditioning: Sequence[Tensor], parts: int) -> list[int]:
    """Return the parts of a batch whose embeddings are not all zeros."""
    given = [x for x in conditioning if x.shape[0] % parts == 0]
    return [i for i in range(parts) if any(bool(x.chunk(parts)[i].any()) for x in given)]


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors hold the same values; a GPU waits only where pointers differ."""
    if a.shape != b.shape or a.device != b.device or a.dtype != b.dtype:
        return False
    if a is b:
        return True
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return a.device.type == "meta" or bool(torch.equal(a, b))


def _all_same(before: Sequence[tuple[Tensor, int]], given: Sequence[Tensor]) -> bool:
    """Tell whether the same tensors are given as before, which nobody has written into since."""
    if len(before) != len(given) or any(_version(x) != version for x, version in before):
        return False
    return all(_same(x, y) for (x, _), y in zip(before, given, strict=True))


def _version(x: Tensor) -> int:
    """Return how often a tensor has been written into; 0 where torch does not count that (inference mode)."""
    return 0 if x.is_inference() else x._version


def _part(batch: int, parts: int, index: int) -> slice:
    if batch % parts:
        raise ValueError(
            f"a batch of {batch} does not divide into the {parts} parts of guidance; pass guidance='none' if every "
            "sample is conditional, or the index alone where guidance runs as calls of its own"
        )
    size = batch // parts
    return slice(index * size, (index + 1) * size)
