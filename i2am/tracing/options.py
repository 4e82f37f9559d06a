"""What a caller of ``trace`` and its kin may set: every keyword, default and check, written once."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

import torch

from i2am._files import parse_size
from i2am.maps.sram import MAX_REGIONS, Region
from i2am.ops import BACKENDS
from i2am.references import SELF, TEXT, Grid, LayerFilter

if TYPE_CHECKING:
    from i2am.tracing.clock import StepInfo

Mode = Literal["reference", "self"]
Output = Literal["i2am", "model"]
Backend = Literal["triton", "streaming", "reference"]
GuidanceMode = Literal["auto", "none"] | int | tuple[int, int]
TimeGroups = Literal["steps"] | int
MODES: tuple[Mode, ...] = ("reference", "self")
OUTPUTS: tuple[Output, ...] = ("i2am", "model")


class _SharedOptions(TypedDict, total=False):
    """Keywords of every entry point."""

    backend: Backend | None
    sram: Mapping[str, Region] | None
    canvas: Grid | None
    record: Literal["qk"] | None
    record_to: str | os.PathLike[str] | None
    record_every: int
    record_times: Sequence[int] | None
    record_dtype: torch.dtype | None
    record_limit: str | int


class KeywordOptions(_SharedOptions, total=False):
    """Keywords of :func:`i2am.trace` beside ``time_groups`` and ``layers``, which it also takes by position."""

    guidance: GuidanceMode
    mode: Mode
    words: Sequence[str] | Mapping[str, Sequence[int]] | None
    text: bool
    itself: bool
    rollout: bool
    weighted: bool
    output: Output


class AccumulatorOptions(_SharedOptions, total=False):
    """Keywords of :class:`i2am.Accumulator`."""

    time_groups: TimeGroups
    output: Output


class ModuleOptions(_SharedOptions, total=False):
    """Keywords of :func:`i2am.patch_modules`."""

    guidance: GuidanceMode
    time_groups: TimeGroups
    layers: LayerFilter


class TraceOptions(KeywordOptions, ModuleOptions, total=False):
    """Keywords of :func:`i2am.patch_unet` and :func:`i2am.patch_transformer`: all that there are.

    :class:`TraceSettings` holds their defaults and what each one means.
    """


@dataclass(frozen=True)
class RecordOptions:
    """Options of what to keep while tracing, so that patches can be asked afterwards.

    Args:
        record: "qk" keeps queries and keys of the conditional samples; None: nothing.
        record_to: "cpu" (main memory), "disk" (a new folder, which survives the process), the path of a folder to make,
            or None (where the model runs).
        record_every: keep every so many-th step.
        record_times: keep only these time groups. None: all.
        record_dtype: dtype of the kept queries and keys; None: the model's own.
        record_limit: what a run may take, "2GB" or bytes; checked before its first step.
    """

    record: Literal["qk"] | None = None
    record_to: str | os.PathLike[str] | None = "cpu"
    record_every: int = 1
    record_times: Sequence[int] | None = None
    record_dtype: torch.dtype | None = None
    record_limit: str | int = "2GB"

    def __post_init__(self) -> None:
        if self.record not in (None, "qk"):
            raise ValueError(f'record must be "qk" or None, got {self.record!r}')
        if not _is_count(self.record_every):
            raise ValueError(f"record_every must be a positive number of steps, got {self.record_every!r}")
        if self.record_dtype is not None and not (
            isinstance(self.record_dtype, torch.dtype) and self.record_dtype.is_floating_point
        ):
            raise ValueError(f"record_dtype must be a floating point dtype, got {self.record_dtype!r}")
        parse_size(self.record_limit)

    def wants(self, info: StepInfo) -> bool:
        """Return whether the calls of an evaluation are kept."""
        if self.record is None or (self.record_times is not None and info.group not in self.record_times):
            return False
        return info.step is None or info.step % self.record_every == 0


@dataclass(frozen=True)
class TraceSettings:
    """The options of one tracer, checked."""

    time_groups: TimeGroups = field(
        default=5,
        metadata={
            "doc": (
                'into how many groups the steps are summed; "steps": one group a step, of a run whose steps are known '
                "(a pipeline, num_steps or scheduler)."
            )
        },
    )
    layers: LayerFilter = field(
        default=None,
        metadata={
            "doc": (
                "which attention modules: a name, a glob pattern, several, or a predicate. None: all that carry the "
                "reference."
            )
        },
    )
    guidance: GuidanceMode = field(
        default="auto",
        metadata={
            "doc": (
                '"auto": what the pipeline says, else the evidence (repeated latents, embeddings that are all zeros); '
                '"none": every sample of every call counts; or the index of the conditional part of a guided batch '
                "(of as many as the pipeline says or the latents repeat, else max(2, index + 1)), (index, parts), or "
                "the index of the conditional call where guidance runs as calls of its own; (index, 1): where each "
                "call is one part."
            )
        },
    )
    mode: Mode = field(
        default="reference",
        metadata={
            "doc": (
                '"reference"; or "self" for a model without reference keys (channel concatenation, ControlNet): maps '
                "of the generated picture's attention to itself, which say what positions exchange information, never "
                'what came from the reference. They are named "self".'
            )
        },
    )
    words: Sequence[str] | Mapping[str, Sequence[int]] | None = field(
        default=None,
        metadata={
            "doc": (
                "words of the prompt to tell apart, found by the pipeline's tokenizers; or name → text tokens, counted "
                'from the first one. Each is read like a reference: maps.ulam("r2g", reference="sleeve").'
            )
        },
    )
    text: bool = field(
        default=False,
        metadata={"doc": ('whether the whole prompt is told apart, as "text".')},
    )
    itself: bool = field(
        default=False,
        metadata={
            "doc": ('whether the attention that the picture pays to itself is told apart, as "self" (joint attention).')
        },
    )
    rollout: bool = field(
        default=False,
        metadata={
            "doc": (
                "roll G2R and SRAM of an IP-Adapter Plus, or SD3's, back through its resampler to the image encoder's "
                "patches, since its few tokens have no layout of their own."
            )
        },
    )
    weighted: bool = field(
        default=False,
        metadata={
            "doc": (
                "multiply R2G of an IP-Adapter's image with what its part is multiplied with in the model: its mask "
                "(ip_adapter_masks) and its scale. False: attention alone, as the paper has it; maps.provenance says "
                "where a mask or a scale comes after it."
            )
        },
    )
    output: Output = field(
        default="i2am",
        metadata={
            "doc": (
                '"i2am": the fused op\'s output goes on into the model; "model": the model\'s own attention runs too, '
                "and its output goes on, so that images are bit-identical to an untraced run."
            )
        },
    )
    backend: Backend | None = field(
        default=None,
        metadata={"doc": ("as in i2am.attention.")},
    )
    sram: Mapping[str, Region] | None = field(
        default=None,
        metadata={
            "doc": (
                "name → patch of the generated image to follow, a point (y, x) or a mask, at most 64: read with "
                "maps.sram(name)."
            )
        },
    )
    canvas: Grid | None = field(
        default=None,
        metadata={
            "doc": (
                "(height, width) in which points are given; None: pixels of the output image (of a bare model: its "
                "latent grid)."
            )
        },
    )
    record: Literal["qk"] | None = field(
        default=None,
        metadata={
            "doc": (
                '"qk" keeps queries and keys, so that any patch can be asked afterwards; needs num_steps or scheduler.'
            )
        },
    )
    record_to: str | os.PathLike[str] | None = field(
        default="cpu",
        metadata={
            "doc": (
                '"cpu" (main memory), "disk" (a new folder, which survives the process), the path of a folder to '
                "make, or None (where the model runs)."
            )
        },
    )
    record_every: int = field(
        default=1,
        metadata={"doc": ("keep every so many-th step.")},
    )
    record_times: Sequence[int] | None = field(
        default=None,
        metadata={"doc": ("keep only these time groups. None: all.")},
    )
    record_dtype: torch.dtype | None = field(
        default=None,
        metadata={"doc": ("dtype of the kept queries and keys; None: the model's own.")},
    )
    record_limit: str | int = field(
        default="2GB",
        metadata={"doc": ("what a run's record may take, like this or in bytes; checked before its first step.")},
    )

    def __post_init__(self) -> None:
        if self.time_groups != "steps" and not _is_count(self.time_groups):
            raise ValueError(f'time_groups must be a positive integer or "steps", got {self.time_groups!r}')
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {self.output!r}")
        if self.backend is not None and self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {self.backend!r}")
        if self.guidance not in ("auto", "none") and not (_is_index(self.guidance) or _is_part(self.guidance)):
            raise ValueError(
                'guidance must be "auto", "none", the index of the conditional part, or (index, parts), got '
                f"{self.guidance!r}"
            )
        if self.sram is not None and len(self.sram) > MAX_REGIONS:
            raise ValueError(f"at most {MAX_REGIONS} regions can be registered, got {len(self.sram)}")
        self._check_sets()
        self._check_record()

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the options that ask for key sets beside the references."""
        return tuple(name for name in ("words", "text", "itself") if getattr(self, name))

    def _check_sets(self) -> None:
        if self.sets and self.mode != "reference":
            raise ValueError(f'{self.sets[0]}= goes with mode="reference", got mode={self.mode!r}')
        words = self.words
        if words is None:
            return
        if isinstance(words, str) or not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f'words must be a sequence of words, such as ["sleeve", "red"], got {words!r}')
        taken = [word for word in words if word in (TEXT, SELF)]
        if taken or len(set(words)) < len(words):
            raise ValueError(f"words need names of their own, other than {TEXT!r} and {SELF!r}; got {list(words)}")

    def _check_record(self) -> None:
        options = self.record_options
        if self.record is None:
            idle = [f.name for f in fields(options) if getattr(options, f.name) != f.default]
            if idle:
                raise ValueError(f'{", ".join(f"{n}=" for n in idle)} without record= keeps nothing: add record="qk"')
            return
        if self.rollout:
            raise ValueError(
                "rollout=True rolls sums back, not recorded keys: register patches with sram= instead of record="
            )
        times = self.record_times
        if times is not None:
            last = math.inf if isinstance(self.time_groups, str) else self.time_groups - 1
            if isinstance(times, (int, str)) or not all(_is_index(t) and t <= last for t in times) or not len(times):
                raise ValueError(
                    f"record_times must be a sequence of time groups 0…{'' if last == math.inf else last} "
                    f"(time_groups={self.time_groups!r}), got {times!r}"
                )

    def groups(self, steps: int | None) -> int:
        """Return the number of time groups of a run of ``steps``; None: the number of steps is not known.

        Raises:
            ValueError: there is to be one group a step, and nothing tells the steps.
        """
        if not isinstance(self.time_groups, str):
            return self.time_groups
        if steps is None:
            raise ValueError(
                'time_groups="steps" needs num_steps= or scheduler=, so that the number of steps is known before the '
                "first one"
            )
        return steps

    @property
    def record_options(self) -> RecordOptions:
        """Options of what to keep while tracing."""
        return RecordOptions(**{f.name: getattr(self, f.name) for f in fields(RecordOptions)})


F = TypeVar("F", bound=Callable[..., Any])


def takes_trace_options(options: type = TraceOptions) -> Callable[[F], F]:
    """Decorate an entry point ``f(…, **options)``: unknown names are refused, signature and help list every option.

    Args:
        options: the TypedDict whose keywords it takes.
    """
    known = {f.name: f for f in fields(TraceSettings) if f.name in options.__annotations__}

    def decorate(function: F) -> F:
        called = function.__qualname__.removesuffix(".__init__")
        own = inspect.signature(function)
        named = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]

        @functools.wraps(function)
        def wrapper(*args: Any, **given: Any) -> Any:
            names = [*(p.name for p in named), *known]
            for name in given:
                if name not in names:
                    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
                    hint = f"did you mean {near[0]}=?" if near else f"it takes {', '.join(names[1:])}"
                    raise TypeError(f"{called}() takes no {name}=; {hint}")
            return function(*args, **given)

        taken = {p.name for p in named}
        rest = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in known.values()
            if f.name not in taken
        ]
        wrapper.__signature__ = own.replace(parameters=[*named, *rest])  # type: ignore[attr-defined]
        lines = "".join(f"\n    {f.name}: {f.metadata['doc']}" for f in known.values())
        wrapper.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:{lines}\n"
        return wrapper  # type: ignore[return-value]

    return decorate


def _is_index(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _is_part(x: object) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and all(map(_is_index, x)) and (x[0] < x[1] or x[1] == 1)


def _is_count(x: object) -> bool:
    return _is_index(x) and x != 0
