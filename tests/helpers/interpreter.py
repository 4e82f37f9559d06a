"""Triton's interpreter at a part of its cost, with the same numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class _Kept:
    """In place of a scope whose changes were made, and will be undone, by an earlier one of the same launch."""

    def restore(self) -> None:
        pass


def hasten() -> None:
    """Have the interpreter do once what it does at every device function and at every tensor.

    A kernel calls hundreds of device functions (``tl.sum`` is one), and at each the interpreter looks through all of
    ``triton.language`` for what to exchange, though a launch has exchanged it; at each tensor it makes the table of
    dtypes anew. Whether sums and products of integers overflow, which takes a quarter of its time, it looks at where
    :func:`tests.helpers.interpreter_watch.watched` says so.
    """
    _exchange_once_a_launch()
    _know_dtypes()
    look_for_overflow(False)


def look_for_overflow(wanted: bool) -> bool:
    """Have the interpreter look for overflow of integers, or not; return whether it did."""
    builder = interpreter.interpreter_builder
    before = builder.options.sanitize_overflow
    builder.options = replace(builder.options, sanitize_overflow=wanted)
    return before


def _exchange_once_a_launch() -> None:
    exchange, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    exchanged: set[int] = set()  # modules, in this launch
    modules: dict[Callable, frozenset[int]] = {}  # that a function names

    def patch_lang(fn):
        named = modules.get(fn)
        if named is None:
            named = frozenset(id(x) for x in fn.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core))
            modules[fn] = named
        if named and named <= exchanged:
            return _Kept()
        exchanged.update(named)
        return exchange(fn)

    def call(self, *args, **kwargs):
        exchanged.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            exchanged.clear()

    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor.__call__ = call


def _know_dtypes() -> None:
    find, known = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype) -> np.dtype:
        found = known.get(dtype.name)
        if found is None:
            found = known[dtype.name] = find(dtype)
        return found

    interpreter._get_np_dtype = get_np_dtype
