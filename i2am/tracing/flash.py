"""flash-attn's function, intercepted like torch's."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from i2am.tracing.intercept import Attention, AttentionCall, waiting_layer


@functools.cache
def through_flash(attention: Attention) -> Attention:
    """Intercept flash-attn's ``flash_attn_func``, on ``[B, N, H, d]``, called by way of its module."""

    @functools.wraps(attention)
    def intercepted(q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None, **options: Any) -> Any:
        waiting = waiting_layer()
        if waiting is None:
            return attention(q, k, v, dropout_p, softmax_scale, **options)
        given = {name: value for name, value in options.items() if value not in (None, False, 0, 0.0, (-1, -1))}
        if given:
            raise ValueError(f"layer {waiting[1].name}: flash_attn_func runs with {given}, which i2am does not read")

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
