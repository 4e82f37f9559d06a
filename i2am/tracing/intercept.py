"""The seam between a running model and the fused op: attention calls are intercepted, processors never replaced.

While a traced model's forward runs, and nowhere else, the functions that compute attention are replaced by ones that
ask the running thread's scope whether a reference-carrying call is expected. Every other call, of any thread, goes
through untouched. The last scope to close puts the originals back. Replaced are ``F.scaled_dot_product_attention``, the
entries of diffusers' backend registry (``dispatch_attention_fn``) and ``xformers.ops.memory_efficient_attention``, as
far as they have been imported.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2am.references import Carried, Grid
from i2am.tracing.clock import Moment


@dataclass(frozen=True)
class Call:
    """An intercepted attention call: ``[B, H, N, d]`` tensors, and what else the model passed.

    ``original`` computes a call as the model would have; None: ``scaled_dot_product_attention``.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None  # None: only the attribution is asked for
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    original: Callable[[Call], Tensor] | None = None

    def on(self, samples: slice) -> Call:
        """The same call for some samples of the batch."""
        mask = self.attn_mask
        if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
            mask = mask[samples]
        value = None if self.value is None else self.value[samples]
        return replace(self, query=self.query[samples], key=self.key[samples], value=value, attn_mask=mask)

    def run(self) -> Tensor:
        """The model's own attention."""
        if self.original is not None:
            return self.original(self)
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


Carries = Carried | Callable[[Call], Carried | None]  # a function where only the call tells


@dataclass(eq=False)
class RunningLayer:
    """An attention module that is executing."""

    name: str
    grid: Grid | None = None  # of the generated tokens
    carries: Carries | None = None  # what its next attention call carries; that call takes it
    computed: bool = True  # False: its forward was skipped, a cache answered
    arguments: tuple[tuple, dict] | None = None  # of the module, where a family needs them
    projected: dict[str, Tensor] = field(default_factory=dict)  # what its projections gave, by their names
    inputs: dict[str, Tensor | None] = field(default_factory=dict)  # and were given
    images: dict[int, int] = field(default_factory=dict)  # IP-Adapter index → reference images that came one by one


@dataclass(eq=False)
class Scope:
    """One forward of a traced model: what is running, and whom to ask when a reference-carrying call comes."""

    attend: Callable[[Scope, RunningLayer, Carries, Call], Tensor | None]
    batch: int
    conditional: slice  # the samples of the batch that count
    moment: Moment  # where in the run this forward stands
    frame: object  # of the forward: the scope is alive while this is on the stack
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


COMPILED = "i2am traces this model, and its hooks run uncompiled: compile without fullgraph, or unpatch() first"
_original = F.scaled_dot_product_attention
_lock = threading.Lock()
_open = 0  # scopes of all threads
_replaced = ExitStack()
_local = threading.local()


def open_scope(scope: Scope) -> None:
    """Makes ``scope`` the running thread's; the first one anywhere replaces the attention functions."""
    global _open, _replaced
    if not hasattr(_local, "scopes"):
        _local.scopes = []
    scope.stack = _local.scopes
    with _lock:
        if _open == 0:
            with ExitStack() as undo:
                _replace_all(undo)
                _replaced = undo.pop_all()
        _open += 1
        scope.stack.append(scope)


def close_scope(scope: Scope) -> None:
    """Ends ``scope`` and what was left open inside it; the last one anywhere puts the attention functions back."""
    global _open
    with _lock:
        if scope not in scope.stack:
            return
        at = scope.stack.index(scope)
        _open -= len(scope.stack) - at
        del scope.stack[at:]
        if _open == 0:
            _replaced.close()


def running_scope() -> Scope | None:
    """The innermost living scope of this thread; dead ones are closed on the way."""
    scopes = getattr(_local, "scopes", None)
    while scopes:
        if scopes[-1].alive():
            return scopes[-1]
        close_scope(scopes[-1])
    return None


def _pending() -> tuple[Scope, RunningLayer, Carries] | None:
    """The carried references that this thread's next attention call takes; asked for once."""
    scopes = getattr(_local, "scopes", None)
    if not scopes or not scopes[-1].layers or scopes[-1].layers[-1].carries is None:
        return None
    scope = running_scope()
    if scope is None or not scope.layers or scope.layers[-1].carries is None:
        return None
    layer = scope.layers[-1]
    carried, layer.carries = layer.carries, None
    return scope, layer, carried


@functools.cache
def _disabled(function: Callable) -> Callable:
    return eager(function)


def eager(function: Callable) -> Callable:
    """``function``, kept out of the graphs of torch.compile: there they break, and it runs as it is."""
    known = inspect.signature(torch.compiler.disable).parameters
    reason = {"reason": COMPILED} if "reason" in known else {}
    return torch.compiler.disable(function, **reason)


def refuse_compiled(model: nn.Module) -> None:
    """Hooks added to a compiled module never fire, without an error."""
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
            where = f"its part {name}" if name else f"this {type(model).__name__}"
            raise ValueError(f"{where} is compiled, so a tracer would see nothing: trace the uncompiled model")


def frame_of_forward() -> object:
    """The frame of the innermost module that is being called, seen from one of its hooks."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_name != "_wrapped_call_impl":
        frame = frame.f_back
    return frame


# ---------------------------------------------------------------------------------------- the functions of attention


def _replace_all(undo: ExitStack) -> None:
    """Replaces every attention function that has been imported; ``undo`` puts them back."""
    global _original
    _original = F.scaled_dot_product_attention
    _replace(undo, F, "scaled_dot_product_attention", _disabled(_sdpa))
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    for name, backend in list(getattr(registry, "_backends", {}).items()):
        registry._backends[name] = replacement = _disabled(_through_registry(name, backend))
        undo.callback(_put_back, registry._backends, name, replacement, backend)
    xformers = sys.modules.get("xformers.ops")
    if xformers is not None and hasattr(xformers, "memory_efficient_attention"):
        own = xformers.memory_efficient_attention
        _replace(undo, xformers, "memory_efficient_attention", _disabled(_through_xformers(own)))


def _replace(undo: ExitStack, module, name: str, replacement: Callable) -> None:
    own = getattr(module, name)
    setattr(module, name, replacement)
    undo.callback(_put_back, vars(module), name, replacement, own)


def _put_back(names: dict, name: object, replacement: Callable, own: Callable) -> None:
    if names.get(name) is replacement:  # else someone replaced it after us
        names[name] = own


def _sdpa(*args, **kwargs):
    pending = _pending()
    if pending is None:
        return _original(*args, **kwargs)
    return pending[0].attend(*pending, Call(*args, **kwargs))


@functools.cache  # the same replacement in every forward, or compiled code would see a new one each time
def _through_registry(name: object, backend: Callable) -> Callable:
    """A backend of diffusers, which takes ``[B, N, H, d]`` by keyword."""

    @functools.wraps(backend)
    def intercepted(*args, **kwargs):
        pending = None if args else _pending()
        if pending is None:
            return backend(*args, **kwargs)
        scope, layer, carried = pending
        if kwargs.get("_parallel_config") is not None or kwargs.get("return_lse"):
            raise ValueError(
                f"layer {layer.name}: backend {getattr(name, 'value', name)} runs with context parallelism or "
                "return_lse, where one call does not see all tokens; trace without it"
            )
        tensors = {x: kwargs.pop(x) for x in ("query", "key", "value")}
        passed = kwargs.keys() & {"attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}
        known = {x: kwargs.pop(x) for x in passed}
        if isinstance(known.get("attn_mask"), Tensor) and known["attn_mask"].ndim == 2:
            known["attn_mask"] = known["attn_mask"][:, None, None]  # [B, keys], as diffusers' native backend reads it

        def original(call: Call) -> Tensor:
            own = {x: getattr(call, x).transpose(1, 2) for x in tensors} | {x: getattr(call, x) for x in passed}
            return backend(**own, **kwargs).transpose(1, 2)

        call = Call(**{x: t.transpose(1, 2) for x, t in tensors.items()}, **known, original=original)
        return scope.attend(scope, layer, carried, call).transpose(1, 2)

    return intercepted


@functools.cache
def _through_xformers(attention: Callable) -> Callable:
    """``memory_efficient_attention(query, key, value, attn_bias, p, scale)``: ``[B, N, H, d]`` or ``[B·H, N, d]``."""

    @functools.wraps(attention)
    def intercepted(query, key, value, attn_bias=None, p=0.0, scale=None, **options):
        pending = _pending()
        if pending is None:
            return attention(query, key, value, attn_bias=attn_bias, p=p, scale=scale, **options)
        scope, layer, carried = pending
        if attn_bias is not None and not isinstance(attn_bias, Tensor):
            raise ValueError(
                f"layer {layer.name}: xformers runs with a {type(attn_bias).__name__} as its mask, which i2am does not "
                "read; switch xformers off for tracing (disable_xformers_memory_efficient_attention)"
            )
        merged = query.ndim == 3  # heads are part of the batch

        def split(x: Tensor) -> Tensor:
            return x.unflatten(0, (scope.batch, -1)) if merged else x.transpose(1, 2)

        def join(x: Tensor) -> Tensor:
            return x.flatten(0, 1) if merged else x.transpose(1, 2)

        mask = None if attn_bias is None else split(attn_bias) if merged and attn_bias.ndim == 3 else attn_bias

        def original(call: Call) -> Tensor:
            bias = None
            if call.attn_mask is not None:
                bias = call.attn_mask.flatten(0, 1) if merged else call.attn_mask
            parts = (join(x).contiguous() for x in (call.query, call.key, call.value))
            out = attention(*parts, attn_bias=bias, p=p, scale=scale, **options)
            return out.unflatten(0, (call.query.shape[0], -1)) if merged else out.transpose(1, 2)

        call = Call(split(query), split(key), split(value), mask, dropout_p=p, scale=scale, original=original)
        return join(scope.attend(scope, layer, carried, call))

    return intercepted
