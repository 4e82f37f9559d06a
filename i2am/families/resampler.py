"""Back through a resampler: from the few tokens that it makes of an image to the encoder's patches.

A resampler's blocks attend from ``T`` learned latents to ``[X image tokens ‖ T latents]``. Attention rollout (Abnar &
Zuidema, ACL 2020, arXiv 2005.00928), with half of each block's attention and half of its residual, heads averaged:

``R ← ½·(A[:, :X] + A[:, X:]·R) + ½·R`` from ``R = 0``, rows made to sum to 1 at the end (what stays on the learned
latents says nothing of the image). A map over the ``T`` tokens times ``R`` is a map over the ``X`` image tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from i2am.families import Hooked
from i2am.families.arguments import attribute
from i2am.tracing.intercept import running_context

KINDS = ("IPAdapterPlusImageProjection", "IPAdapterTimeImageProjection")


class Rollout:
    """Follows one resampler while it runs; ``matrix`` is ``[images, T, X]`` of its last run.

    Args:
        resampler: of an IP-Adapter Plus or SD3's.
    """

    def __init__(self, resampler: nn.Module):
        self.resampler = resampler
        self.matrix: Tensor | None = None
        self._query: Tensor | None = None

    def watch(self) -> Iterable[Hooked]:
        yield self.resampler, self._begin, "before"
        for block in attribute(self.resampler, "layers"):
            attn = block.attn
            key = attn.to_kv if getattr(attn, "to_k", None) is None else attn.to_k
            yield attn.to_q, self._see_query, "after"
            yield key, partial(self._see_key, attn), "after"
        yield self.resampler, self._end, "after"

    def _begin(self, *_: Any) -> None:
        self.matrix = None

    def _see_query(self, module: nn.Module, args: tuple[Any, ...], query: Tensor) -> None:
        self._query = query

    def _see_key(self, attn: nn.Module, module: nn.Module, args: tuple[Any, ...], key: Tensor) -> None:
        q = self._query
        if q is None or running_context() is None:
            return
        key = key[..., : q.shape[-1]]  # a fused projection gives values behind the keys
        T, X = q.shape[1], key.shape[1] - q.shape[1]
        q, k = (x.detach().float().unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, key))
        A = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)  # [images, T, X + T]
        R = A.new_zeros(A.shape[0], T, X) if self.matrix is None else self.matrix
        self.matrix = (A[..., :X] + A[..., X:] @ R + R) / 2

    def _end(self, *_: Any) -> None:
        self._query = None
        if self.matrix is not None:
            self.matrix = self.matrix / self.matrix.sum(-1, keepdim=True)
