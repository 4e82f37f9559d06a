"""A watch on Triton's interpreter: who reads and writes which bytes, and in what order programs run."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from tests.helpers.interpreter import look_for_overflow


class Fault(AssertionError):
    """A launch did what no kernel of i2am may do."""


class Launch:
    """What the programs of one launch touched, as byte addresses of elements."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.allowed = np.unique(np.concatenate([_addresses(x) for x in tensors]))
        self.read: dict[tuple, list[np.ndarray]] = {}
        self.written: dict[tuple, list[np.ndarray]] = {}

    def note(self, kind: str, program: tuple, pointers: np.ndarray, mask: np.ndarray) -> None:
        touched = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))[mask]
        if not touched.size:
            return
        at = np.searchsorted(self.allowed, touched).clip(max=len(self.allowed) - 1)
        outside = touched[self.allowed[at] != touched]
        if len(outside):
            raise Fault(f"program {program} {kind} {len(np.unique(outside))} elements outside its tensors")
        getattr(self, kind).setdefault(program, []).append(touched)

    def check(self) -> None:
        """No two programs wrote one element, and none read what another wrote."""
        written = {program: np.unique(np.concatenate(parts)) for program, parts in self.written.items()}
        if not written:
            return
        everything = np.concatenate(list(written.values()))
        if len(np.unique(everything)) < len(everything):
            raise Fault("two programs wrote the same element")
        owners = np.repeat(np.arange(len(written)), [len(x) for x in written.values()])
        order = np.argsort(everything)
        everything, owners = everything[order], owners[order]
        number = {program: i for i, program in enumerate(written)}
        for program, parts in self.read.items():
            read = np.unique(np.concatenate(parts))
            at = np.searchsorted(everything, read).clip(max=len(everything) - 1)
            if ((everything[at] == read) & (owners[at] != number.get(program, -1))).any():
                raise Fault(f"program {program} read what another program of its launch wrote")

    def forget(self) -> None:
        """Let what was noted go."""
        self.read.clear()
        self.written.clear()


def _addresses(x: torch.Tensor) -> np.ndarray:
    """Of every element of a tensor of any strides."""
    at = np.zeros(1, dtype=np.int64)
    for length, stride in zip(x.shape, x.stride(), strict=True):
        at = (at[:, None] + np.arange(length) * stride).ravel() if stride else at
    return (at * x.element_size() + x.data_ptr()).astype(np.uint64)


@contextmanager
def watched(order: int | None = None):
    """Checks every launch inside, and that no integer overflows; yields the list of launches.

    Args:
        order: seeds a shuffle of the programs.
    """
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    launches: list[Launch] = []
    init, call = executor._init_args_hst, executor.__call__
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    load, store = builder.create_masked_load, builder.create_masked_store
    permutation: list[np.ndarray] = []

    def init_args(self, args, kwargs):
        on_host = init(self, args, kwargs)
        given = [y for x in (*on_host[0], *on_host[1].values()) for y in (x if isinstance(x, tuple) else (x,))]
        given = [getattr(x, "base", x) for x in given]  # descriptors hold a tensor
        launches.append(Launch([x for x in given if isinstance(x, torch.Tensor) and x.numel()]))
        return on_host

    def run(self, *args, **kwargs):
        call(self, *args, **kwargs)
        launches[-1].check()
        launches[-1].forget()

    def set_grid_dim(*grid):
        set_dim(*grid)
        programs = int(np.prod(grid))
        shuffled = np.arange(programs) if order is None else np.random.default_rng(order).permutation(programs)
        permutation[:] = [shuffled]

    def set_grid_idx(*index):
        place = permutation[0][np.ravel_multi_index(index, builder.grid_dim)]
        set_idx(*(int(i) for i in np.unravel_index(place, builder.grid_dim)))

    def masked_load(pointers, mask, *rest, **options):
        launches[-1].note("read", builder.grid_idx, pointers.data, mask.data)
        return load(pointers, mask, *rest, **options)

    def masked_store(pointers, value, mask, *rest, **options):
        launches[-1].note("written", builder.grid_idx, pointers.data, mask.data)
        return store(pointers, value, mask, *rest, **options)

    replacements = {"set_grid_dim": set_grid_dim, "set_grid_idx": set_grid_idx}
    replacements |= {"create_masked_load": masked_load, "create_masked_store": masked_store}
    with ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(mock.patch.object(builder, name, replacement))
        stack.enter_context(mock.patch.object(executor, "_init_args_hst", init_args))
        stack.enter_context(mock.patch.object(executor, "__call__", run))
        stack.callback(look_for_overflow, look_for_overflow(True))
        yield launches
