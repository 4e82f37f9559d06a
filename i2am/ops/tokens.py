"""Which tokens: the one form below ``Reference(...)`` of the generated queries and the reference's keys."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Positions: TypeAlias = npt.NDArray[np.int64]
Span = tuple[int, int]  # [start, stop)


class TokenSet:
    """A set of tokens of one sequence, in the order in which results about them come.

    Attributes:
        positions: a ``range`` of step 1, or a read-only int64 array of unique positions ``[n]`` where the set has gaps
            or an order of its own. Never a tensor: whoever launches a kernel reads it without waiting for a GPU.
    """

    __slots__ = ("_hash", "positions")

    positions: range | Positions

    def __init__(self, positions: range | Positions):
        self.positions = positions

    @classmethod
    def of(cls, selector: Selector, length: int, name: str) -> TokenSet:
        """Read which of ``length`` tokens are meant.

        Args:
            selector: None (all), a slice, a bool mask ``[length]``, indices in any order, or a ``TokenSet``.
            length: of the sequence.
            name: of the argument, for messages.

        Raises:
            ValueError: it selects nothing, repeats a token, reaches outside, or is no such thing.
        """
        if selector is None:
            return cls(range(length))
        if isinstance(selector, cls):
            if selector.stop > length:
                raise ValueError(f"{name} holds {selector.stop - 1}, outside the valid range 0…{length - 1}")
            return selector
        if isinstance(selector, slice):
            return cls._of_range(range(length)[selector], f"{name}={selector} selects none of {length} tokens")
        if isinstance(selector, Tensor) and not selector.is_cpu:
            return _read_once(selector, length, lambda x: cls._of_array(x, length, name))
        return cls._of_array(_array(selector, name), length, name)

    @classmethod
    def _of_range(cls, chosen: range, nothing: str) -> TokenSet:
        if len(chosen) == 0:
            raise ValueError(nothing)
        if chosen.step == 1 or len(chosen) == 1:
            return cls(range(chosen.start, chosen.start + len(chosen)))
        return cls(_frozen(np.arange(chosen.start, chosen.stop, chosen.step)))

    @classmethod
    def _of_array(cls, tokens: npt.NDArray[np.generic], length: int, name: str) -> TokenSet:
        if tokens.ndim != 1:
            raise ValueError(f"{name} must be a slice or one-dimensional, got shape {tokens.shape}")
        if tokens.dtype == np.bool_:
            if tokens.size != length:
                raise ValueError(f"{name} is a bool mask of {tokens.size} tokens, but there are {length}")
            tokens = tokens.nonzero()[0]
        if tokens.size == 0:
            raise ValueError(f"{name} selects none of {length} tokens")
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"{name} must hold integers, got {tokens.dtype}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= length:
            raise ValueError(f"{name} holds {low if low < 0 else high}, outside the valid range 0…{length - 1}")
        positions = tokens.astype(np.int64)
        if tokens.size == high + 1 - low and (np.diff(positions) == 1).all():
            return cls(range(low, high + 1))
        if np.unique(positions).size != positions.size:
            raise ValueError(f"{name} holds the same token more than once")
        return cls(_frozen(positions))

    @property
    def count(self) -> int:
        """Number of tokens."""
        return len(self.positions)

    @property
    def start(self) -> int:
        """The first token's position."""
        return self.positions.start if isinstance(self.positions, range) else int(self.positions.min())

    @property
    def stop(self) -> int:
        """One behind the last token's position."""
        return self.positions.stop if isinstance(self.positions, range) else int(self.positions.max()) + 1

    @property
    def index(self) -> slice | Tensor:
        """Index for an axis of tokens: a slice, or int64 positions ``[n]`` on CPU."""
        if isinstance(self.positions, range):
            return slice(self.positions.start, self.positions.stop)
        return torch.from_numpy(self.positions.copy())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenSet):
            return NotImplemented
        return type(self.positions) is type(other.positions) and np.array_equal(self.positions, other.positions)

    def __hash__(self) -> int:
        if not hasattr(self, "_hash"):  # only when asked: torch.compile of PyTorch 2.7 cannot trace a range's hash
            chosen = self.positions
            self._hash = hash((chosen.start, chosen.stop) if isinstance(chosen, range) else chosen.tobytes())
        return self._hash

    def __repr__(self) -> str:
        if isinstance(self.positions, range):
            return f"TokenSet({self.positions.start}…{self.positions.stop - 1})"
        return f"TokenSet({self.count} tokens within {self.start}…{self.stop - 1})"


Selector: TypeAlias = slice | Tensor | Sequence[int] | Positions | npt.NDArray[np.bool_] | TokenSet | None


class Gathered(NamedTuple):
    """Token sets as spans: where each lies once the tokens are taken in ``order`` (None: as they are)."""

    spans: list[Span]
    order: Positions | None  # [length] a permutation


def gather(sets: Sequence[TokenSet], length: int) -> Gathered:
    """Return the spans of ``sets`` and the order of all ``length`` tokens that makes them contiguous.

    Softmax does not mind the order of tokens, so that whoever computes it need know spans only.

    Raises:
        ValueError: sets with gaps share tokens.
    """
    spans = [(s.positions.start, s.positions.stop) for s in sets if isinstance(s.positions, range)]
    return Gathered(spans, None) if len(spans) == len(sets) else _gather(tuple(sets), length)


@lru_cache(maxsize=256)
def _gather(sets: tuple[TokenSet, ...], length: int) -> Gathered:
    chosen = np.concatenate([np.asarray(s.positions, dtype=np.int64) for s in sets])
    if np.unique(chosen).size != chosen.size:
        raise ValueError("references given as index sets must not share tokens")
    rest = np.setdiff1d(np.arange(length), chosen, assume_unique=True)
    stops = np.cumsum([s.count for s in sets]).tolist()
    return Gathered(list(zip([0, *stops[:-1]], stops, strict=True)), _frozen(np.concatenate([chosen, rest])))


def inverse(order: Positions) -> Positions:
    """Return the permutation that undoes ``order [length]``."""
    back = np.empty_like(order)
    back[order] = np.arange(order.size)
    return back


_copies: dict[tuple[bytes, torch.device], Tensor] = {}
COPIES = 256  # index tensors kept on their devices; a model has a handful


def on_device(positions: Positions, device: torch.device) -> Tensor:
    """Return ``positions [n]`` as an int64 tensor on ``device``, copied there once and not at every call."""
    key = (positions.tobytes(), device)
    found = _copies.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = torch.from_numpy(positions.copy()).to(device)
        if type(found) is Tensor:  # not a fake one, whose mode will be over by the next call
            if len(_copies) >= COPIES:
                _copies.clear()
            _copies[key] = found
    return found


# ----------------------------------------------------------------------------------------------- reading what was given

# tensor on a device → its version, the sequence's length, what was read
_seen: MutableMapping[Tensor, tuple[int, int, TokenSet]] = WeakTensorKeyDictionary()


def _read_once(selector: Tensor, length: int, read: Callable[[npt.NDArray[np.generic]], TokenSet]) -> TokenSet:
    """Read a tensor that lies on a device: the copy waits for the device, so an unchanged tensor is read once."""
    version = None if selector.is_inference() else selector._version
    if selector in _seen:
        *seen, tokens = _seen[selector]
        if version is not None and seen == [version, length]:
            return tokens
    tokens = read(selector.detach().cpu().numpy())
    if version is not None:
        _seen[selector] = (version, length, tokens)
    return tokens


def _array(selector: object, name: str) -> npt.NDArray[np.generic]:
    if isinstance(selector, Tensor):
        return selector.detach().numpy()
    try:
        found = np.asarray(selector)
    except ValueError:  # ragged
        found = np.asarray(None)
    if found.dtype == object:
        raise ValueError(f"{name} must be a slice, a bool mask or indices, got {selector!r:.80}")
    return found


def _frozen(positions: Positions) -> Positions:
    positions.setflags(write=False)
    return positions
