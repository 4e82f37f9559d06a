"""The seam between a running model and the fused op: attention calls are intercepted, processors never replaced.

While a traced model's forward runs, and nowhere else, ``F.scaled_dot_product_attention`` is replaced by a function that
asks the running thread's scope whether a reference-carrying call is expected. Every other call, of any thread, goes
through untouched. The last scope to close puts the original back.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch.nn.functional as F
from torch import Tensor

from i2am.clock import Moment
from i2am.layout import Carried, Grid


@dataclass(frozen=True)
class Call:
    """An intercepted ``scaled_dot_product_attention``: ``[B, H, N, d]`` tensors, as the model passed them."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def on(self, samples: slice) -> Call:
        """The same call for some samples of the batch."""
        mask = self.attn_mask
        if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
            mask = mask[samples]
        return replace(
            self, query=self.query[samples], key=self.key[samples], value=self.value[samples], attn_mask=mask
        )

    def run(self) -> Tensor:
        """The model's own attention."""
        return _original(
            self.query,
            self.key,
            self.value,
            attn_mask=self.attn_mask,
            dropout_p=self.dropout_p,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )


@dataclass(eq=False)
class RunningLayer:
    """An attention module that is executing."""

    name: str
    grid: Grid | None = None  # of the generated tokens
    carries: Carried | None = None  # what its next attention call carries; that call takes it
    images: dict[int, int] = field(default_factory=dict)  # IP-Adapter index → reference images that came one by one


@dataclass(eq=False)
class Scope:
    """One forward of a traced model: what is running, and whom to ask when a reference-carrying call comes."""

    attend: Callable[[Scope, RunningLayer, Carried, Call], Tensor]
    batch: int
    conditional: slice  # the samples of the batch that count
    moment: Moment  # where in the run this forward stands
    frame: object  # the forward's caller: the scope is alive while this is on the stack
    grid: Grid | None = None  # of the spatial transformer that is executing
    layers: list[RunningLayer] = field(default_factory=list)
    blind: list[str] = field(default_factory=list)  # layers whose reference-carrying call never came
    stack: list[Scope] = field(default_factory=list)  # the opening thread's scopes, innermost last

    def alive(self) -> bool:
        """False for a scope left behind by an interrupted forward (Ctrl-C skips a module's hooks)."""
        frame = sys._getframe()
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None


_original = F.scaled_dot_product_attention
_lock = threading.Lock()
_open = 0  # scopes of all threads
_local = threading.local()


def open_scope(scope: Scope) -> None:
    """Makes ``scope`` the running thread's; the first one anywhere replaces the attention function."""
    global _open, _original
    if not hasattr(_local, "scopes"):
        _local.scopes = []
    scope.stack = _local.scopes
    with _lock:
        if _open == 0:
            _original = F.scaled_dot_product_attention
            F.scaled_dot_product_attention = _intercept
        _open += 1
        scope.stack.append(scope)


def close_scope(scope: Scope) -> None:
    """Ends ``scope`` and what was left open inside it; the last one anywhere puts the attention function back."""
    global _open
    with _lock:
        if scope not in scope.stack:
            return
        at = scope.stack.index(scope)
        _open -= len(scope.stack) - at
        del scope.stack[at:]
        if _open == 0 and F.scaled_dot_product_attention is _intercept:
            F.scaled_dot_product_attention = _original


def running_scope() -> Scope | None:
    """The innermost living scope of this thread; dead ones are closed on the way."""
    scopes = getattr(_local, "scopes", None)
    while scopes:
        if scopes[-1].alive():
            return scopes[-1]
        close_scope(scopes[-1])
    return None


def _intercept(*args, **kwargs):
    scopes = getattr(_local, "scopes", None)
    if not scopes or not scopes[-1].layers or scopes[-1].layers[-1].carries is None:
        return _original(*args, **kwargs)
    scope = running_scope()
    if scope is None or not scope.layers or scope.layers[-1].carries is None:
        return _original(*args, **kwargs)
    layer = scope.layers[-1]
    carried, layer.carries = layer.carries, None
    return scope.attend(scope, layer, carried, Call(*args, **kwargs))
