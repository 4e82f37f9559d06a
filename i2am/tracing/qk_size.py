"""What a run's record will take, known before its first step: from a forward on shapes alone."""

from __future__ import annotations

import functools
import logging
import math
import sys
from dataclasses import replace
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_map

from i2am._files import parse_size, show_size
from i2am.families import TokenLayout
from i2am.ops.tokens import TokenSet
from i2am.tracing.clock import StepInfo
from i2am.tracing.intercept import AttentionCall, ForwardContext, LayerContext, close_context, open_context
from i2am.tracing.observe import as_autocast, take_awaited
from i2am.tracing.options import RecordOptions

logger = logging.getLogger("i2am")

CACHE: Any = functools._lru_cache_wrapper
WRAPPING = CACHE, FunctionType, MethodType, staticmethod, classmethod, property, functools.partial
WORTH_SAYING = 0.1  # of the limit: a smaller record is not announced as loudly


def record_size(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], context: ForwardContext, options: RecordOptions
) -> int | None:
    """Return the bytes that one forward will record, from a run on shapes alone; None where it can't be run so.

    Raises:
        ValueError: an attention call does not fit the description, or several do.
    """
    sizes: dict[object, int] = {}
    refused: list[ValueError] = []

    def attend(context: ForwardContext, layer: LayerContext, call: AttentionCall) -> Tensor | None:
        try:
            return take_awaited(layer, call, lambda layout: measure(context, layer, call, layout))
        except ValueError as error:  # the description does not fit: so it will be in the forward itself
            refused.append(error)
            raise

    def measure(
        context: ForwardContext, layer: LayerContext, call: AttentionCall, layout: TokenLayout
    ) -> Tensor | None:
        part = call.on(context.conditional)
        B, H, Nq, d = part.query.shape
        width = d * (options.record_dtype or as_autocast(part.query).dtype).itemsize
        Q = TokenSet.of(layout.queries, Nq, "queries").count
        sizes[layer.name] = B * H * Q * width
        for reference in layout.references:
            sizes[layer.name, reference.name] = B * H * (reference.count(part.key.shape[2]) * (width + 4) + Q * 4)
        return None if call.value is None else call.query.new_empty(*call.query.shape[:-1], call.value.shape[-1])

    if _keeps_state(model):
        logger.warning(
            "the record's size is not known beforehand (the model is offloaded, or has a cache); its limit is "
            "watched as it grows"
        )
        return None
    dry = replace(context, attend=attend, frame=sys._getframe(), dry=True, settle=None, layers=[], blind={}, stack=[])
    open_context(dry)
    try:
        run_on_shapes(model, args, kwargs)
    except Exception as error:
        if error in refused:
            raise
        logger.warning("the record's size is not known beforehand (%s); its limit is watched as it grows", error)
        return None
    finally:
        close_context(dry)
    return sum(sizes.values())


def check_limit(options: RecordOptions, per_evaluation: int, info: StepInfo, time_groups: int, have: int = 0) -> None:
    """Announce what a run's record will take, and refuse it when that is too much.

    Args:
        per_evaluation: bytes of one evaluation of the model.
        info: the run's first.
        have: bytes of earlier runs.

    Raises:
        ValueError: it would not fit; names three settings that would.
    """

    if info.steps is None or info.evaluations is None:
        raise ValueError("a record's size needs a clock that knows the run's steps: pass num_steps= or scheduler=")
    steps, evaluations = info.steps, info.evaluations

    def total(o: RecordOptions) -> int:
        kept = sum(o.wants(StepInfo(i * time_groups // steps, i)) for i in range(steps))
        return per_evaluation * math.ceil(kept * evaluations / steps)

    limit, needed = parse_size(options.record_limit), total(options)
    places: dict[object, str] = {"cpu": "main memory", None: "the model's device"}
    where = places.get(options.record_to, "a folder on disk")
    plan = (
        f"record: {show_size(per_evaluation)} a model call, {show_size(needed)} for {steps} steps, in {where} "
        f"(record_limit {show_size(limit)})"
    )
    if have + needed <= limit:
        logger.log(logging.WARNING if needed > WORTH_SAYING * limit else logging.INFO, plan)
        return
    room = max(limit - have, 1)
    every = next((n for n in range(2, steps + 1) if total(replace(options, record_every=n)) <= room), None)
    group = replace(options, record_times=(time_groups - 1,))
    fits = [
        f"record_every={every} ({show_size(total(replace(options, record_every=every)))})" if every else None,
        f"record_times=[{time_groups - 1}] ({show_size(total(group))})" if total(group) <= room else None,
        f'record_limit="{math.ceil((have + needed) / 1e9)}GB" with record_to="disk"',
        "fewer layers=",
    ]
    raise ValueError(f"{plan}: too much. These fit: {', '.join([f for f in fits if f][:3])}")


def run_on_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run one forward of ``model`` on fake tensors: every module runs, nothing is computed."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(x: Any) -> Any:
        return mode.from_tensor(x) if isinstance(x, Tensor) else x

    state = {name: fake(x) for name, x in (*model.named_parameters(), *model.named_buffers())}
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        with torch.no_grad(), mode:
            functional_call(model, state, tree_map(fake, args), tree_map(fake, kwargs))
    finally:
        for module, attributes in before:
            _restore(vars(module), attributes)
        _forget_fakes(model)


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Undo what a run on shapes has kept in a module for later, such as a ``cached_property``."""
    for name in now.keys() - before.keys():
        del now[name]
    for name, value in before.items():
        if now.get(name) is not value:
            now[name] = value


def _forget_fakes(model: nn.Module) -> None:
    """Empty the ``lru_cache``s that the files of a model's classes know: a run on shapes fills them, too.

    (Rotary embeddings are kept so: Qwen-Image's would be fake tensors in the forward itself.)
    """
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    kinds = {kind for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "builtins")}
    files = [sys.modules[name] for name in {kind.__module__ for kind in kinds} & sys.modules.keys()]
    seen: set[int] = set()
    for place in (*kinds, *files, *model.modules()):
        for value in list(vars(place).values()):
            _clear(value, seen)


def _clear(found: Any, seen: set[int]) -> None:
    """Empty ``found``, if it is a cache other than torch's own, and those that it wraps: a decorator's, a property's.

    (The garbage collector's list would be shorter to walk, but knows nothing that ``gc.freeze()`` has set aside.)
    """
    if id(found) in seen or not isinstance(found, WRAPPING):
        return
    seen.add(id(found))
    if isinstance(found, CACHE) and not str(found.__module__).startswith("torch"):
        found.cache_clear()
    for inner in ("__wrapped__", "__func__", "fget", "func"):
        _clear(getattr(found, inner, None), seen)
    for cell in getattr(found, "__closure__", None) or ():
        if cell != CellType():  # filled
            _clear(cell.cell_contents, seen)


def _keeps_state(model: nn.Module) -> bool:
    """Tell whether caches or offloading hook into the forward: a run on shapes would leave fake tensors in them."""
    return any(
        hasattr(module, "_hf_hook") or getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        for module in model.modules()
    )
