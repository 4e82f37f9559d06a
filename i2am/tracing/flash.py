"""flash-attn's functions, intercepted like torch's: of batches, and of packed sequences of several lengths.

Code that did ``from flash_attn import flash_attn_func`` holds a name of its own, which is replaced as well: wherever a
module that has been imported keeps one of these functions under its name.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from i2am.tracing.intercept import Attention, AttentionCall, waiting_layer

PACKED = (
    "flash_attn_qkvpacked_func",
    "flash_attn_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_with_kvcache",
)
HOMES = ("flash_attn", "flash_attn_interface")  # FlashAttention 2, and 3


def flash_places() -> Iterator[tuple[dict[str, Any], str, Callable[[Attention], Attention]]]:
    """Yield where flash-attn's functions are kept, as far as they have been imported, and what wraps each."""
    functions: dict[str, list[Any]] = {}  # name → functions of that name, of FlashAttention 2 or 3
    wraps: dict[Any, Callable[[Attention], Attention]] = {}
    for home in HOMES:
        package = sys.modules.get(home)
        read = {"flash_attn_func": through_flash, "flash_attn_varlen_func": through_varlen}
        known = dict.fromkeys((*read, *PACKED), refuse_flash) | (read if home == "flash_attn" else {})
        for name, wrap in known.items():
            if hasattr(package, name):
                function = getattr(package, name)
                functions.setdefault(name, []).append(function)
                wraps[function] = wrap
    for module in list(sys.modules.values()) if functions else ():
        names = getattr(module, "__dict__", {})
        for name, those in functions.items():
            found = names.get(name)
            if found is not None and any(found is function for function in those):
                yield names, name, wraps[found]


def _refuse(layer: str, name: str, options: dict[str, Any]) -> None:
    """Refuse options that change which keys are attended to, or how. Raises ValueError."""
    options = {option: value for option, value in options.items() if option != "deterministic"}
    given = {n: v for n, v in options.items() if isinstance(v, Tensor) or v not in (None, False, 0, 0.0, (-1, -1))}
    if given:
        shown = {n: tuple(v.shape) if isinstance(v, Tensor) else v for n, v in given.items()}
        raise ValueError(f"layer {layer}: {name} runs with {shown}, which i2am does not read")


@functools.cache
def through_flash(attention: Attention) -> Attention:
    """Intercept ``flash_attn_func``, on ``[B, N, H, d]``."""

    @functools.wraps(attention)
    def intercepted(q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None, **options: Any) -> Any:
        waiting = waiting_layer()
        if waiting is None:
            return attention(q, k, v, dropout_p, softmax_scale, **options)
        _refuse(waiting[1].name, "flash_attn_func", options)

        def original(call: AttentionCall) -> Tensor:
            parts = (x.transpose(1, 2) for x in (call.query, call.key, call.value) if x is not None)
            result: Tensor = attention(*parts, call.dropout_p, call.scale, **options)
            return result.transpose(1, 2)

        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        gqa = query.shape[1] != key.shape[1]
        call = AttentionCall(
            query, key, value, dropout_p=dropout_p, scale=softmax_scale, enable_gqa=gqa, original=original
        )
        out: Any = waiting[0].attend(*waiting, call)
        return out.transpose(1, 2)

    return intercepted


@functools.cache
def through_varlen(attention: Attention) -> Attention:
    """Intercept ``flash_attn_varlen_func``, on the tokens ``[ΣN, H, d]`` of samples behind each other.

    Shorter samples are padded for the maps, and what is padded is masked. The model's own output is the function's.
    """

    @functools.wraps(attention)
    def intercepted(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: Any = None,
        **options: Any,
    ) -> Any:
        def run() -> Any:
            lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
            return attention(q, k, v, *lengths, dropout_p, softmax_scale, **options)

        waiting = waiting_layer()
        if waiting is None:
            return run()
        _refuse(waiting[1].name, "flash_attn_varlen_func", options)
        asking, keys = Lengths(q, cu_seqlens_q, max_seqlen_q), Lengths(k, cu_seqlens_k, max_seqlen_k)
        for lengths in (asking, keys):
            lengths.check(waiting[1].name, waiting[0].conditional)
        query, key, value = asking.unpack(q), keys.unpack(k), keys.unpack(v)

        def original(call: AttentionCall) -> Tensor:
            return asking.unpack(run()) if call.query is query else replace(call, original=None).run()

        call = AttentionCall(
            query,
            key,
            value,
            keys.mask(),
            dropout_p=dropout_p,
            scale=softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
            original=original,
        )
        out: Any = waiting[0].attend(*waiting, call)
        return asking.pack(out)

    return intercepted


@functools.cache
def refuse_flash(attention: Attention) -> Attention:
    """Refuse a function of flash-attn that i2am does not read, when a traced layer calls it."""

    @functools.wraps(attention)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        waiting = waiting_layer()
        if waiting is not None:
            raise ValueError(
                f"layer {waiting[1].name}: it calls {attention.__module__}.{attention.__name__}, which i2am does not "
                "read: let it call flash_attn_func, flash_attn_varlen_func or scaled_dot_product_attention"
            )
        return attention(*args, **kwargs)

    return intercepted


class Lengths:
    """Lengths of samples whose tokens lie behind each other.

    Args:
        packed: ``[ΣN, H, d]``.
        ends: ``[B + 1]`` cumulative lengths, from 0.
        most: no sample is longer.
    """

    def __init__(self, packed: Tensor, ends: Tensor, most: int):
        full = packed.shape[0] == (len(ends) - 1) * int(most)  # reading the ends makes a GPU wait
        self.each = [int(most)] * (len(ends) - 1) if full else [int(n) for n in ends.diff()]
        self.longest = max(self.each)
        self._device = packed.device

    def check(self, layer: str, counted: slice) -> None:
        """Refuse samples that count and are shorter than others, whose last tokens a description would miss."""
        if any(n != self.longest for n in self.each[counted]):
            raise ValueError(
                f"layer {layer}: flash_attn_varlen_func runs on samples of {self.each} tokens, and one that counts is "
                "not the longest, so that the places of its tokens are not those described: trace one prompt at a time"
            )

    def unpack(self, packed: Tensor) -> Tensor:
        """Return ``[B, H, longest, d]``, shorter samples padded with zeros."""
        rows = torch.nn.utils.rnn.pad_sequence(list(packed.split(self.each)), batch_first=True)
        return rows.transpose(1, 2)

    def pack(self, padded: Tensor) -> Tensor:
        """Return ``[ΣN, H, d]`` of ``[B, H, longest, d]``."""
        rows = padded.transpose(1, 2)
        return torch.cat([row[:n] for row, n in zip(rows, self.each, strict=True)])

    def mask(self) -> Tensor | None:
        """Return ``[B, 1, 1, longest]``, True where a sample has a token; None: everywhere."""
        if all(n == self.longest for n in self.each):
            return None
        lengths = torch.tensor(self.each, device=self._device)
        return (torch.arange(self.longest, device=self._device) < lengths[:, None])[:, None, None]
