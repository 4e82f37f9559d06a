"""Which attention module is running: what its hooks say, and what it means when no attention call came."""

from __future__ import annotations

from typing import Any

from torch import nn

from i2am.families import Family
from i2am.tracing import hooks
from i2am.tracing.intercept import ForwardContext, LayerContext, running_context


class BlindLayerError(RuntimeError):
    """A reference-carrying layer ran, but its attention could not be seen: its maps would be missing."""


def watch_layer(owner: object, family: Family, name: str, module: nn.Module) -> None:
    """Hook an attention module: while it runs in a context of ``owner``, it is the context's innermost layer."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = running_context()
        if context is not None and context.owner is owner:
            _refuse_sharded(name, module)
            layer = LayerContext(name, grid=context.grid, computed=not parts)
            context.layers.append(layer)
            family.enter(layer, module, args, kwargs)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        context = _innermost(owner, name)
        if context is None:
            return
        layer = context.layers.pop()
        if layer.found or layer.awaits is None or not layer.computed or output is None:
            return
        call = family.leave(layer, module)
        if call is not None:
            context.attend(context, layer, call)
        elif not (layer.seen and callable(layer.awaits) and family.told_by_keys):  # a bank was only written
            context.blind[name] = layer

    def computed(*_: Any) -> None:
        context = _innermost(owner, name)
        if context is not None:
            context.layers[-1].computed = True

    parts = _parts(module)
    for part in parts:
        hooks.before(owner, part, computed)
    hooks.before(owner, module, enter)
    hooks.after(owner, module, leave, always=True)


def _refuse_sharded(name: str, module: nn.Module) -> None:
    """Raise ValueError for a module whose heads are shared out over processes: each sees its own heads alone.

    (Weights that FSDP2 shards are whole while their module runs.)
    """
    for part in module.children():
        weight: Any = part._parameters.get("weight")
        if weight is not None and type(weight).__name__ == "DTensor" and weight.device_mesh.size() > 1:
            raise ValueError(
                f"layer {name} is tensor-parallel over {weight.device_mesh.size()} processes, of which each computes "
                "its own "
                "heads alone: trace a model that is not"
            )


def _innermost(owner: object, name: str) -> ForwardContext | None:
    """Return the running context of ``owner``, if the module of that name is its innermost layer."""
    context = running_context()
    if context is None or context.owner is not owner or not context.layers or context.layers[-1].name != name:
        return None
    return context


def _parts(attention: nn.Module) -> list[nn.Module]:
    """Return what an attention module calls on its way, unless a cache answers in its place."""
    children = [m[0] if isinstance(m, nn.ModuleList) and len(m) else m for m in attention.children()]
    return [m for m in children if not isinstance(m, nn.ModuleList)]


def blind_message(layers: dict[str, LayerContext]) -> str:
    """Return what to say of layers whose reference-carrying call never came."""
    names = list(layers)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    other = next((layer for layer in layers.values() if layer.seen), None)
    if other is not None:
        calls = ", ".join(f"{keys} keys (batch of {batch})" for batch, keys in other.seen)
        wanted = other.expects if other.expects is not None else getattr(other.awaits, "keys", None)
        described = "the keys that were described" if wanted is None else f"{wanted} keys"
        return (
            f"{shown}: the reference is described among {described}, but its attention calls have {calls}, so none is "
            "the one "
            "that is meant: say which call it is with Reference(call=…), counted from 0, its tokens counted in that "
            "call"
        )
    return (
        f"{shown}: ran with the reference, but through no attention function that can be seen (torch's, a backend of "
        "diffusers, xformers'), so nothing was recorded. Switch off attention slicing (disable_attention_slicing), set "
        "the default processors (set_attn_processor(AttnProcessor2_0())), or call i2am.attention inside the module"
    )
