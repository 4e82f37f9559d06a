"""The attention call of a running model, intercepted; processors are never replaced.

While a traced model's forward runs, and nowhere else, the functions that compute attention are replaced by ones that
ask the running thread's context whether its layer waits for a reference-carrying call. Every other call, of any thread,
goes through untouched. The last context to close puts the originals back. Replaced are
``F.scaled_dot_product_attention``, the entries of diffusers' backend registry (``dispatch_attention_fn``),
``xformers.ops.memory_efficient_attention`` and flash-attn's functions, as far as they have been imported.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2am.families import TokenLayout
from i2am.ops.stock import STOCK, forward_with_lse
from i2am.references import Grid
from i2am.tracing.clock import StepInfo
from i2am.tracing.shards import Processes, Share

Attention = Callable[..., Any]
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class AttentionCall:
    """An intercepted attention call: ``[B, H, N, d]`` tensors, and what else the model passed.

    ``original`` computes a call as the model would have; None: ``scaled_dot_product_attention``. ``stock``: it is
    nothing but PyTorch's own.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None  # None: only the attribution is asked for
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    original: Callable[[AttentionCall], Tensor] | None = None
    stock: bool = False
    share: Share | None = None  # of a call that several processes compute together

    def on(self, samples: slice) -> AttentionCall:
        """Return the same call for some samples of the batch."""
        if samples.start == 0 and samples.stop == self.query.shape[0]:
            return self
        mask = self.attn_mask
        if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
            mask = mask[samples]
        value = None if self.value is None else self.value[samples]
        return replace(self, query=self.query[samples], key=self.key[samples], value=value, attn_mask=mask)

    @property
    def values(self) -> Tensor:
        """Values ``[B, H, Nk, dv]`` of a call whose output is asked for."""
        if self.value is None:
            raise ValueError("this attention call has no values: only its attribution is asked for")
        return self.value

    def run(self) -> Tensor:
        """Return the model's own attention."""
        if self.original is not None:
            return self.original(self)
        return _original(
            self.query,
            self.key,
            self.values,
            attn_mask=self.attn_mask,
            dropout_p=self.dropout_p,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    def run_with_lse(self) -> tuple[Tensor, Tensor | None]:
        """Return the model's own attention, and its row log-sum-exp ``[B, H, Nq]`` where its kernel tells it."""
        stock = self.stock or (self.original is None and _original is STOCK)
        cast = torch.is_autocast_enabled(self.query.device.type)
        if not stock or cast or self.is_causal or self.enable_gqa or self.dropout_p:
            return self.run(), None
        found = forward_with_lse(self.query, self.key, self.values, self.attn_mask, self.scale)
        return (self.run(), None) if found is None else found


# What a layer waits for: the layout of its reference-carrying call; or a function of the call where only that tells,
# which returns None for a call that is not it.
Awaited = TokenLayout | Callable[[AttentionCall], TokenLayout | None]


@dataclass(eq=False)
class LayerContext:
    """An attention module that is executing."""

    name: str
    grid: Grid | None = None  # of the generated tokens
    awaits: Awaited | None = None  # its reference-carrying attention call; None: it has none (any more)
    then: Awaited | None = None  # what it is to be asked of further calls, after that one
    found: bool = False  # that call has come
    computed: bool = True  # False: its forward was skipped, a cache answered
    expects: int | None = None  # keys of the context that the description was checked against
    seen: list[tuple[int, int]] = field(default_factory=list)  # (batch, keys) of the calls that did not fit
    state: Any = None  # the family's own


@dataclass(eq=False)
class ForwardContext:
    """One counted forward of a traced model: what is running, and whom to ask when an attention call comes."""

    owner: object  # the tracer; None: nothing is looked for
    attend: Callable[[ForwardContext, LayerContext, AttentionCall], Tensor | None]
    batch: int
    conditional: slice  # the samples of the batch that count
    info: StepInfo  # where in the run this forward stands
    frame: FrameType  # of the forward: the context is alive while this is on the stack
    dry: bool = False  # a run on shapes alone
    settle: Callable[[ForwardContext, LayerContext, TokenLayout, AttentionCall], None] | None = (
        None  # asked of the first call
    )
    grid: Grid | None = None  # of the spatial transformer that is executing
    tile: tuple[int, int] | None = None  # where the latents lie on the picture's, when they are a part of it
    size: Grid | None = None  # of the tile's latents
    parts: int = 1  # of the batch, of which one is conditional
    processes: Processes | None = None  # among which the tokens are shared out
    layers: list[LayerContext] = field(default_factory=list)
    blind: dict[str, LayerContext] = field(default_factory=dict)  # layers whose reference-carrying call never came
    stack: list[ForwardContext] = field(default_factory=list)  # the opening thread's contexts, innermost last

    def alive(self) -> bool:
        """Return False for a context left behind by an interrupted forward (Ctrl-C skips a module's hooks)."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None


COMPILED = "i2am traces this model, and its hooks run uncompiled: compile without fullgraph, or unpatch() first"
_original = F.scaled_dot_product_attention
_lock = threading.Lock()
_open: set[ForwardContext] = set()  # of all threads
_local = threading.local()


def open_context(context: ForwardContext) -> None:
    """Make ``context`` the running thread's; the first one anywhere replaces the attention functions."""
    if not hasattr(_local, "contexts"):
        _local.contexts = []
    context.stack = _local.contexts
    try:
        with _lock:
            if not _open:
                _replace_all()
            _open.add(context)
            context.stack.append(context)
    except BaseException:  # Ctrl-C between two lines
        close_context(context)
        raise


def close_context(context: ForwardContext) -> None:
    """End ``context`` and what was left open inside it; the last one anywhere puts the attention functions back."""
    with _lock:
        at = context.stack.index(context) if context in context.stack else len(context.stack)
        _open.difference_update(context.stack[at:], (context,))
        del context.stack[at:]
        if not _open:
            _restore_all()


def running_context() -> ForwardContext | None:
    """Return the innermost living context of this thread; dead ones are closed on the way."""
    contexts: list[ForwardContext] = getattr(_local, "contexts", [])
    while contexts:
        if contexts[-1].alive():
            return contexts[-1]
        close_context(contexts[-1])
    return None


def running_layer() -> LayerContext | None:
    """Return the attention module that is executing in this thread's context."""
    context = running_context()
    return context.layers[-1] if context is not None and context.layers else None


def waiting_layer() -> tuple[ForwardContext, LayerContext] | None:
    """Return this thread's layer that waits for its reference-carrying attention call."""
    contexts = getattr(_local, "contexts", None)
    if not contexts or not contexts[-1].layers or contexts[-1].layers[-1].awaits is None:
        return None
    context = running_context()
    if context is None or not context.layers or context.layers[-1].awaits is None:
        return None
    return context, context.layers[-1]


@functools.cache
def _disabled(function: Attention) -> Attention:
    disabled: Attention = eager(function)
    return disabled


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Return ``function``, kept out of the graphs of torch.compile: there they break, and it runs as it is."""
    known = inspect.signature(torch.compiler.disable).parameters
    reason = {"reason": COMPILED} if "reason" in known else {}
    disabled: Callable[P, R] = torch.compiler.disable(function, **reason)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # asked first: 15 such calls a layer cost more than what they call
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return called


def refuse_compiled(model: nn.Module) -> None:
    """Raise ValueError for a compiled model: hooks added to it never fire, without an error."""
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
            where = f"its part {name}" if name else f"this {type(model).__name__}"
            raise ValueError(f"{where} is compiled, so a tracer would see nothing: trace the uncompiled model")


def frame_of_forward() -> FrameType:
    """Return the frame of the innermost module that is being called, seen from one of its hooks."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name != "_wrapped_call_impl":
        frame = frame.f_back
    return frame


# ---------------------------------------------------------------------------------------- the functions of attention


_own: dict[Attention, Attention] = {}  # what stands in a place → what stood there


def _places() -> Iterator[tuple[dict[Any, Any], Any, Callable[[Attention], Attention]]]:
    """Yield where attention functions are kept, as far as they have been imported, and what wraps each."""
    yield vars(F), "scaled_dot_product_attention", _through_torch
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    backends = getattr(getattr(dispatch, "_AttentionBackendRegistry", None), "_backends", {})
    for name in list(backends):
        yield backends, name, functools.partial(_through_registry, name)
    if hasattr(dispatch, "_templated_context_parallel_attention"):
        from i2am.tracing.parallel import through_context_parallel

        yield vars(dispatch), "_templated_context_parallel_attention", through_context_parallel
    if "flash_attn" in sys.modules or "flash_attn_interface" in sys.modules:
        from i2am.tracing.flash import flash_places

        yield from flash_places()
    xformers = sys.modules.get("xformers.ops")
    if xformers is not None and hasattr(xformers, "memory_efficient_attention"):
        yield vars(xformers), "memory_efficient_attention", _through_xformers


def _replace_all() -> None:
    """Replace every attention function. What an interrupt has left in a place is not wrapped again."""
    global _original
    for names, name, through in _places():
        own = _own.get(names[name], names[name])
        if names is vars(F):
            _original = own
        replacement = _disabled(through(own))
        _own[replacement] = own
        names[name] = replacement


def restore_when_idle() -> None:
    """Put the attention functions back unless a context is open. Who replaced one after us is left alone."""
    with _lock:
        if not _open:
            _restore_all()


def _restore_all() -> None:
    for names, name, _ in _places():
        if names[name] in _own:
            names[name] = _own[names[name]]


def _output(out: Tensor | None) -> Tensor:
    """Return the output of a call that had values."""
    assert out is not None
    return out


@functools.cache
def _through_torch(sdpa: Attention) -> Attention:
    """Intercept torch's ``scaled_dot_product_attention``."""

    @functools.wraps(sdpa)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        waiting = waiting_layer()
        if waiting is None:
            return sdpa(*args, **kwargs)
        return waiting[0].attend(*waiting, AttentionCall(*args, **kwargs))

    return intercepted


@functools.cache  # the same replacement in every forward, or compiled code would see a new one each time
def _through_registry(name: object, backend: Attention) -> Attention:
    """Intercept a backend of diffusers, which takes ``[B, N, H, d]`` by keyword."""

    @functools.wraps(backend)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        waiting = None if args else waiting_layer()
        if waiting is None:
            return backend(*args, **kwargs)
        context, layer = waiting
        if kwargs.get("_parallel_config") is not None and context.processes is not None:
            return backend(*args, **kwargs)  # its inner call is seen: i2am.tracing.parallel
        if kwargs.get("_parallel_config") is not None or kwargs.get("return_lse"):
            raise ValueError(
                f"layer {layer.name}: backend {getattr(name, 'value', name)} runs with a parallel_config that is not "
                "the traced model's, or with return_lse, where one call may not see all tokens; trace without it"
            )
        tensors = {x: kwargs.pop(x) for x in ("query", "key", "value")}
        passed = kwargs.keys() & {"attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}
        known = {x: kwargs.pop(x) for x in passed}
        if isinstance(known.get("attn_mask"), Tensor) and known["attn_mask"].ndim == 2:
            known["attn_mask"] = known["attn_mask"][:, None, None]  # [B, keys], as diffusers' native backend reads it

        def original(call: AttentionCall) -> Tensor:
            own = {x: getattr(call, x).transpose(1, 2) for x in tensors} | {x: getattr(call, x) for x in passed}
            out: Tensor = backend(**own, **kwargs)
            return out.transpose(1, 2)

        stock = name == "native" or getattr(name, "value", None) == "native"
        heads = {x: t.transpose(1, 2) for x, t in tensors.items()}
        call = AttentionCall(**heads, **known, original=original, stock=stock and _original is STOCK)
        return _output(context.attend(context, layer, call)).transpose(1, 2)

    return intercepted


@functools.cache
def _through_xformers(attention: Attention) -> Attention:
    """Intercept xformers' ``memory_efficient_attention``, on ``[B, N, H, d]`` or ``[B·H, N, d]``."""

    @functools.wraps(attention)
    def intercepted(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        **options: Any,
    ) -> Any:
        waiting = waiting_layer()
        if waiting is None:
            return attention(query, key, value, attn_bias=attn_bias, p=p, scale=scale, **options)
        context, layer = waiting
        if attn_bias is not None and not isinstance(attn_bias, Tensor):
            raise ValueError(
                f"layer {layer.name}: xformers runs with a {type(attn_bias).__name__} as its mask, which i2am does not "
                "read; switch xformers off for tracing (disable_xformers_memory_efficient_attention)"
            )
        merged = query.ndim == 3  # heads are part of the batch

        def split(x: Tensor) -> Tensor:
            return x.unflatten(0, (context.batch, -1)) if merged else x.transpose(1, 2)

        def join(x: Tensor) -> Tensor:
            return x.flatten(0, 1) if merged else x.transpose(1, 2)

        mask = None if attn_bias is None else split(attn_bias) if merged and attn_bias.ndim == 3 else attn_bias

        def original(call: AttentionCall) -> Tensor:
            bias = None
            if call.attn_mask is not None:
                bias = call.attn_mask.flatten(0, 1) if merged else call.attn_mask
            parts = (join(x).contiguous() for x in (call.query, call.key, call.values))
            out: Tensor = attention(*parts, attn_bias=bias, p=p, scale=scale, **options)
            return out.unflatten(0, (call.query.shape[0], -1)) if merged else out.transpose(1, 2)

        call = AttentionCall(split(query), split(key), split(value), mask, dropout_p=p, scale=scale, original=original)
        return join(_output(context.attend(context, layer, call)))

    return intercepted
