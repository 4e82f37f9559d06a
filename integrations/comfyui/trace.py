"""The attention of a sampling ComfyUI model, observed; nothing of ComfyUI is imported.

A wrapper around the diffusion model's forward says how its tokens are laid out; ``optimized_attention_override`` hands
over every attention call of transformers; the ``attn2`` patches of IPAdapter_plus call ``optimized_attention`` by the
name in their own module, which stands for ours while the forward runs. The model's own attention computes the output,
bit for bit; an :class:`i2am.Accumulator` sums the attribution beside it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import i2am
from i2am.families.tokens import clip_tokens, reference_names

KEY = "i2am"  # of our wrapper
JOINT = ("Flux", "QwenImageTransformer2DModel")  # [text ‖ generated ‖ reference latents]
UNETS = ("UNetModel",)
NAME = "optimized_attention"  # in the module of an attn2 patch


@dataclass
class Joint:
    """Tokens of a transformer's forward: ``[text ‖ generated ‖ references]``."""

    grid: tuple[int, int]
    text: int
    references: list[tuple[int, int]]

    @property
    def total(self) -> int:
        """Number of all tokens."""
        return self.text + sum(h * w for h, w in (self.grid, *self.references))

    def keys(self) -> list[i2am.Reference]:
        """Return each reference's keys."""
        at, found = self.text + self.grid[0] * self.grid[1], []
        for name, (h, w) in zip(reference_names(len(self.references)), self.references, strict=True):
            found.append(i2am.Reference((h, w), slice(at, at + h * w), name=name))
            at += h * w
        return found


class Trace:
    """Sums of the latest sampling run of a traced model: what *I2AM Trace* hands to *I2AM Maps*.

    Args:
        time_groups: number of groups, or "steps".
        record: whether queries and keys are kept, so that the report answers for any patch.
        record_limit: of that, "2GB" or bytes.
    """

    def __init__(self, time_groups: int | str = 5, record: bool = False, record_limit: str = "2GB"):
        kept = {"record": "qk", "record_limit": record_limit} if record else {}
        self._options: dict[str, Any] = {"time_groups": time_groups, **kept}
        self._sums: i2am.Accumulator | None = None
        self._sigmas: Tensor | None = None  # of the run
        self._step = -1
        self._only_middle = True
        self._seen: dict[str, set[Any]] = {}  # layer → conditionings that came at this step
        self._live: dict[str, Any] = {}  # the running forward's transformer_options
        self._joint: Joint | None = None
        self._calls: list[tuple[Tensor, Tensor, int]] = []  # of the running attn2 patch: the text's, then the adapters'
        self._patch: tuple[str, tuple[int, int], int] | None = None  # layer, grid and adapters of that patch

    def __deepcopy__(self, memo: dict[int, Any]) -> Trace:
        return self  # cloned models fill the same sums

    def maps(self) -> i2am.AttributionMaps:
        """Return the maps of the latest run.

        Raises:
            ValueError: the traced model has not sampled.
        """
        if self._sums is None:
            raise ValueError("I2AM Trace saw no sampling: connect its MODEL to the sampler")
        return self._sums.maps()

    def apply(self, model: Any) -> Any:
        """Return a clone of a MODEL that is traced."""
        traced = model.clone()
        options = traced.model_options.setdefault("transformer_options", {})
        before = options.get("optimized_attention_override")
        options["optimized_attention_override"] = _Override(self, before)
        traced.add_wrapper_with_key("diffusion_model", KEY, self.forward)
        return traced

    # --------------------------------------------------------------------------------------------------- one forward

    def forward(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the diffusion model's forward, observed; ``executor`` is ComfyUI's."""
        kind = next((c.__name__ for c in type(executor.class_obj).__mro__ if c.__name__ in JOINT + UNETS), None)
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        bound.apply_defaults()
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        self._live = given["transformer_options"]
        if "multigpu_thread_device" in self._live:
            raise ValueError(
                "I2AM Trace: the model samples on several GPUs at once: trace on one, without MultiGPU nodes"
            )
        if conditional(self._live) is None:  # a call for the negative prompt alone
            return executor(*args, **kwargs)
        if kind is None or (kind == "Flux" and type(executor.class_obj).__name__ != "Flux"):
            raise ValueError(
                f"I2AM Trace does not know where a {type(executor.class_obj).__name__} keeps its reference: it knows "
                "SD and SDXL with IPAdapter_plus, Flux Kontext, Flux 2 and Qwen-Image-Edit"
            )
        try:
            if kind in UNETS:
                with self._adapters():
                    out = executor(*args, **kwargs)
                self._end_patch()
            else:
                self._joint = _joint(executor.class_obj, given)
                out = executor(*args, **kwargs)
        finally:
            self._joint, self._calls, self._patch, self._live = None, [], None, {}
        return out

    def joint_call(self, q: Tensor, k: Tensor, heads: int, mask: Tensor | None, given: dict[str, Any]) -> None:
        """Add a joint attention call of the running forward; ``given`` are its options."""
        joint = self._joint
        if joint is None:
            return
        if "block_index" not in self._live:
            raise ValueError("I2AM Trace: this ComfyUI does not say which block is running: update it")
        if given.get("enable_gqa"):
            raise ValueError("I2AM Trace: several heads share their keys, and i2am knows no such model of ComfyUI")
        q, k = (x if given.get("skip_reshape") else _split(x, heads) for x in (q, k))
        layer = f"{self._live.get('block_type', 'double')}_blocks.{self._live['block_index']}"
        if q.shape[2] != joint.total or k.shape[2] != joint.total:
            raise ValueError(
                f"{layer}: attention over {q.shape[2]} × {k.shape[2]} tokens, but text, picture and reference latents "
                f"make {joint.total}: another node adds tokens, and I2AM Trace can't tell which"
            )
        queries = slice(joint.text, joint.text + joint.grid[0] * joint.grid[1])
        self._add(q, k, layer, joint.grid, joint.keys(), queries, _mask(mask), given.get("scale"))

    # ---------------------------------------------------------------------------------------- IPAdapter's attn2 patches

    @contextmanager
    def _adapters(self) -> Iterator[None]:
        """Observe the attention calls of IPAdapter's patches while the forward runs."""
        patches = self._live.get("patches_replace", {}).get("attn2", {})
        homes = {type(patch).__module__ for patch in patches.values() if adapters_of(patch)}
        spaces = [vars(sys.modules[name]) for name in homes if NAME in vars(sys.modules[name])]
        if not spaces:
            raise ValueError(
                "I2AM Trace: no IPAdapter is applied, so that this model's cross-attention looks at text alone: apply "
                "the IPAdapter to the model first"
            )
        own = [space[NAME] for space in spaces]
        for space, function in zip(spaces, own, strict=True):
            space[NAME] = self._through(function, patches)
        try:
            yield
        finally:
            for space, function in zip(spaces, own, strict=True):
                space[NAME] = function

    def _through(self, function: Callable[..., Tensor], patches: dict[Any, Any]) -> Callable[..., Tensor]:
        def observed(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
            if args or any(kwargs.get(name) is not None for name in ("skip_reshape", "mask", "scale", "enable_gqa")):
                raise ValueError("I2AM Trace: this IPAdapter calls attention in a way that i2am does not know")
            block, index = self._live["block"], self._live.get("block_index", 0)
            layer = f"{block[0]}_blocks.{block[1]}.{index}.attn2"
            if self._patch is None or self._patch[0] != layer:
                self._end_patch()
                patch = patches.get((*block, index), patches.get(tuple(block)))
                height, width = self._live["activations_shape"][-2:]
                self._patch = layer, (int(height), int(width)), adapters_of(patch)
            self._calls.append((q, k, heads))
            return function(q, k, v, heads, **kwargs)

        return observed

    def _end_patch(self) -> None:
        """Add the adapters' calls of the patch that has run."""
        patch, calls = self._patch, self._calls[1:]  # the first is the text's
        self._patch, self._calls = None, []
        if patch is None or not calls:
            return
        layer, grid, adapters = patch
        if len(calls) != adapters:
            raise ValueError(
                f"{layer}: {len(calls)} of {adapters} IPAdapters ran, and nothing tells which: give all the same "
                "start, end and layers, or trace one at a time"
            )
        for i, (q, k, heads) in enumerate(calls):
            name = "ip_adapter" if adapters == 1 else f"ip_adapter_{i}"
            tokens = clip_tokens(k.shape[1], None)
            reference = i2am.Reference(tokens.grid, skip=tokens.skip, name=name)
            self._add(_split(q, heads), _split(k, heads), layer, grid, [reference])

    # -------------------------------------------------------------------------------------------------------- sums

    def _add(
        self,
        q: Tensor,
        k: Tensor,
        layer: str,
        grid: tuple[int, int],
        keys: Sequence[i2am.Reference],
        queries: slice = slice(None),
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        """Add one call of the conditional samples."""
        samples = conditional(self._live)
        assert samples is not None, "forward leaves such calls out"
        sums, step = self._at(f"{layer} {keys[0].name}")
        chosen = slice(samples[0] * len(q) // samples[1], (samples[0] + 1) * len(q) // samples[1])
        self._only_middle &= layer.startswith("middle")
        where: dict[str, Any] = {"layer": layer, "step": step, "grid": grid, "keys": keys, "queries": queries}
        with torch.no_grad():
            sums.attention(q, k, None, samples=chosen, attn_mask=mask, scale=scale, **where)

    def _by_default(self, layer: str) -> bool:
        """Return whether a layer is in the default set of the maps: the paper leaves a UNet's mid block out."""
        return self._only_middle or not layer.startswith("middle")

    def _at(self, call: str) -> tuple[i2am.Accumulator, int]:
        """Return the sums of the running run, and its step.

        Raises:
            ValueError: several positive conditionings come at the same step.
        """
        options = self._live
        schedule, step = options["sample_sigmas"], step_of(options)
        chunk = conditional(options)
        who = options["uuids"][chunk[0]] if chunk is not None and options.get("uuids") else None
        back = step < self._step or (step == self._step and call in self._seen)
        if self._sums is None or (schedule is not self._sigmas and back):
            self._sums = i2am.Accumulator(len(schedule) - 1, default_layers=self._by_default, **self._options)
            self._step, self._seen, self._only_middle = -1, {}, True
        if step != self._step:
            self._step, self._seen = step, {}
        self._sigmas = schedule
        seen = self._seen.setdefault(call, set())
        seen.add(who)
        if len(seen) > 1:
            raise ValueError(
                "I2AM Trace: several positive conditionings are sampled at the same step (combined, or areas), and "
                "nothing tells which one is meant: sample with one"
            )
        return self._sums, step


class _Override:
    """ComfyUI's ``optimized_attention_override``: observes joint attention, and lets the model's own compute."""

    def __init__(self, trace: Trace, before: Callable[..., Any] | None):
        self.trace, self.before = trace, before

    def __deepcopy__(self, memo: dict[int, Any]) -> _Override:
        return self

    def __call__(
        self, function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Any:
        mask = args[0] if args else kwargs.get("mask")
        self.trace.joint_call(q, k, heads, mask, kwargs)
        run = function if self.before is None else partial(self.before, function)
        return run(q, k, v, heads, *args, **kwargs)


def conditional(options: dict[str, Any]) -> tuple[int, int] | None:
    """Return ``(index, number)`` of the positive part of a batch; None: it holds none.

    Raises:
        ValueError: there are several.
    """
    parts = options.get("cond_or_uncond")
    if parts is None:
        raise ValueError("I2AM Trace: nothing tells which samples are conditional (no cond_or_uncond): use a KSampler")
    positive = [i for i, part in enumerate(parts) if part == 0]
    if len(positive) > 1:
        raise ValueError(
            f"I2AM Trace: {len(positive)} positive conditionings in one batch (combined, or areas), and nothing tells "
            "which one is meant: sample with one"
        )
    return (positive[0], len(parts)) if positive else None


def step_of(options: dict[str, Any]) -> int:
    """Return the denoising step that a forward belongs to, by its sigma among those of the run."""
    sigma, schedule = float(options["sigmas"].flatten()[0]), options["sample_sigmas"].float().cpu()
    below = (schedule[:-1] >= sigma * (1 - 1e-3) - 1e-6).nonzero()  # a solver may also stand between two
    return int(below[-1]) if len(below) else 0


def adapters_of(patch: Any) -> int:
    """Return how many IPAdapters an attn2 patch of IPAdapter_plus applies; 0: it is none of its."""
    for name in ("callback", "weights"):
        found = getattr(patch, name, None)
        if isinstance(found, list) and type(patch).__name__ in ("Attn2Replace", "CrossAttentionPatch"):
            return len(found)
    return 0


def _joint(model: Any, given: dict[str, Any]) -> Joint:
    """Return how a transformer's tokens are laid out in one forward."""
    latents, references, context = given["x"], given.get("ref_latents"), given["context"]
    if not references:
        raise ValueError(
            "I2AM Trace: the positive conditioning has no reference latents, so that no attention keys encode a "
            "reference: add a ReferenceLatent node, or the image of TextEncodeQwenImageEdit"
        )
    if latents.ndim == 5 and latents.shape[2] != 1:
        raise ValueError(f"I2AM Trace: {latents.shape[2]} frames or layers at once, and i2am draws on one picture")
    patch = int(model.patch_size)

    def grid(x: Tensor) -> tuple[int, int]:
        return -(-x.shape[-2] // patch), -(-x.shape[-1] // patch)

    return Joint(grid(latents), context.shape[1], [grid(x) for x in references])


def _split(x: Tensor, heads: int) -> Tensor:
    """``[B, N, heads · d]`` → ``[B, heads, N, d]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _mask(mask: Tensor | None) -> Tensor | None:
    """Return a mask that broadcasts to ``[B, H, Nq, Nk]``, as ComfyUI's attention reads it."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask[:, None]
