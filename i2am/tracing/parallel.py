"""Attention calls of a model that runs over several processes (diffusers' context parallelism), seen where they run.

diffusers exchanges heads for tokens, or passes keys around a ring, inside one attention call, and computes it by an
inner function. That function's queries and keys are what is looked at: of Ulysses all tokens of some heads; of a ring
this process's queries and every block of keys. They are put back into the model's own order of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from i2am.families import TokenLayout
from i2am.ops.tokens import Positions, inverse, on_device
from i2am.tracing.intercept import AttentionCall, LayerContext, waiting_layer
from i2am.tracing.shards import Processes, Share


@functools.cache
def through_context_parallel(template: Callable[..., Any]) -> Callable[..., Any]:
    """Intercept what diffusers' backends call under context parallelism, on ``[B, n, H, d]`` of this process."""

    @functools.wraps(template)
    def intercepted(
        query: Tensor, key: Tensor, value: Tensor, *args: Any, forward_op: Callable[..., Any], **kwargs: Any
    ) -> Any:
        waiting = waiting_layer()
        if waiting is None:
            return template(query, key, value, *args, forward_op=forward_op, **kwargs)
        context, layer = waiting
        blocks: list[tuple[Any, ...]] = []

        def seen(ctx: Any, *call: Any, **options: Any) -> Any:
            blocks.append(call)
            return forward_op(ctx, *call, **options)

        awaited, layer.awaits = layer.awaits, None  # the inner function may call torch's attention, too
        try:
            out = template(query, key, value, *args, forward_op=seen, **kwargs)
        finally:
            layer.awaits = awaited
        processes = Processes.from_config(kwargs["_parallel_config"].context_parallel_config)
        context.attend(context, layer, whole_call(processes, layer, query, key, blocks))
        return out

    return intercepted


def whole_call(
    processes: Processes, layer: LayerContext, query: Tensor, key: Tensor, blocks: list[tuple[Any, ...]]
) -> AttentionCall:
    """Return the attention of which one process has computed its share, in the model's order of tokens.

    Keys that are no part of the sequence (an IP-Adapter's) come from every process alike, and attention over so many
    copies of them is attention over one: that is kept.

    Args:
        processes: among which it is shared out.
        layer: that waits for it.
        query, key: ``[B, n, H, d]`` what this process came with.
        blocks: arguments of the inner function, one call a block of keys: queries and keys ``[B, n, h, d]``, values,
            mask, dropout, causal, scale.

    Raises:
        ValueError: the tokens of a process are not those that the model's parts make.
    """
    layout = layer.awaits
    parts = _parts(processes, layer, layout)
    copied = layout.keys if isinstance(layout, TokenLayout) and layout.whole_keys else None
    ring, ulysses = processes.at
    rows = processes.held(parts, ring)
    order = [processes.held(parts, (ring + i) % processes.ring) for i in range(processes.ring)]
    each = -(-query.shape[2] // processes.ulysses)
    heads = slice(each * ulysses, min(each * (ulysses + 1), query.shape[2]))
    q, mask, scale = blocks[0][0], blocks[0][3], blocks[0][6]
    seen = [q.shape[1], *(block[1].shape[1] for block in blocks), query.shape[1], key.shape[1], q.shape[2]]
    mine = len(processes.mine(parts))
    held = [len(places) if copied is None else copied * processes.ulysses for places in order]
    wanted = [len(rows), *held, mine, mine if copied is None else copied, heads.stop - heads.start]
    if seen != wanted:
        raise ValueError(
            f"layer {layer.name}: context parallelism of {processes.ring}×{processes.ulysses} processes (ring × "
            f"Ulysses) shares out tokens {parts} so that this one has {wanted} (queries, blocks of keys, its own "
            f"queries and keys, heads), but its attention has {seen}: trace in one process"
        )
    if mask is not None and (processes.ring > 1 or mask.shape[-2] > 1 or copied is not None):
        why = "with a row per query, of which each process has its own"
        if processes.ring > 1:
            why = "in a ring, where diffusers lays this process's part of it over the keys of every other, too"
        raise ValueError(
            f"layer {layer.name}: an attention mask {why}: use Ulysses without such a mask, or one process"
        )
    if copied is None:
        k = _ordered(torch.cat([block[1] for block in blocks], dim=1), np.concatenate(order), 1)
    else:
        k = blocks[0][1][:, :copied]
    if mask is not None and mask.shape[-1] > 1:
        mask = _ordered(mask, rows, -1)
    whole = processes.ring == 1
    share = Share(
        heads,
        query.shape[2],
        None if whole else rows,
        sum(parts),
        processes.group,
        processes.ring_group,
    )
    q = _ordered(q, rows, 1) if whole else q
    return AttentionCall(q.transpose(1, 2), k.transpose(1, 2), None, mask, scale=scale, share=share)


def own_call(processes: Processes, layer: LayerContext, layout: TokenLayout, call: AttentionCall) -> AttentionCall:
    """Return a call that diffusers does not exchange, as this process's share: its queries look at keys that every one
    has (Wan's image tokens). A call with all queries is whole.

    Raises:
        ValueError: its queries are neither all nor this process's.
    """
    parts = _parts(processes, layer, layout)
    mine, queries = processes.mine(parts), call.query.shape[2]
    if queries == sum(parts):
        return call
    if queries != len(mine):
        raise ValueError(
            f"layer {layer.name}: context parallelism over {processes.size} processes shares out tokens {parts} so "
            f"that this one has {len(mine)}, but its attention has {queries} queries: trace in one process"
        )
    heads = call.query.shape[1]
    return replace(call, share=Share(slice(0, heads), heads, mine, sum(parts), processes.group, processes.group))


def _parts(processes: Processes, layer: LayerContext, awaited: object) -> tuple[int, ...]:
    """Return the stretches of the sequence that are split one by one."""
    if not isinstance(awaited, TokenLayout) or awaited.parts is None:
        raise ValueError(
            f"layer {layer.name}: context parallelism over {processes.size} processes splits its sequence, and i2am "
            "does not know which tokens each of them holds here: trace in one process"
        )
    return awaited.parts


def _ordered(x: Tensor, places: Positions, axis: int) -> Tensor:
    """Return ``x``, whose tokens along an axis belong in ``places``, in their order."""
    return x.index_select(axis, on_device(inverse(places), x.device))
