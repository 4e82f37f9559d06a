"""One pipeline, checked and loaded, and how a sample's inputs go through it: what ``trace`` and ``evaluate`` share."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import i2am
from i2am.cli.arguments import UserError
from i2am.cli.images import fit_images, part_seen
from i2am.cli.parts import Part, find_parts, load_parts
from i2am.cli.pipelines import check_adapter, find_class, load_pipeline, makes_videos, route

if TYPE_CHECKING:
    from PIL.Image import Image

    from i2am.maps import AttributionMaps


class Outcome(NamedTuple):
    """A traced run."""

    maps: AttributionMaps
    generated: Image | list[Image]  # a video's frames
    seen: Image  # the part of the reference that its encoder saw


@dataclass
class Job:
    """Run to make, decided before any weights are read; ``load`` reads them."""

    args: argparse.Namespace
    pipeline_class: type
    parameters: set[str]
    routes: dict[str, str]  # argument of the pipeline's call → option
    device: torch.device
    dtype: torch.dtype
    parts: list[Part]
    pipe: Any = None

    @classmethod
    def of(cls, args: argparse.Namespace, unneeded: Sequence[str] = ()) -> Job:
        """Check the options of a command against what its pipeline takes.

        Args:
            unneeded: images that serve another purpose where the pipeline takes none such (a mask scores maps).

        Raises:
            UserError: there is no such pipeline or adapter; an input is missing, or is of no use.
        """
        check_adapter(args)
        pipeline_class = find_class(args.pipeline, args.revision, args.pipeline_class)
        parts = find_parts(pipeline_class, args)
        parameters = set(inspect.signature(pipeline_class.__call__).parameters)
        dropped = {o: None for o in unneeded if not {o, f"{o}_image"} & parameters}
        args = argparse.Namespace(**{**vars(args), **dropped})
        device, dtype = placement(args)
        routes = route(pipeline_class, parameters, args)
        if getattr(args, "more_references", None) and not _takes_several(pipeline_class, routes):
            raise UserError(f"{pipeline_class.__name__} takes one --reference")
        if args.word is not None and "prompt" not in parameters:
            raise UserError(f"{pipeline_class.__name__} takes no --word: it has no prompt")
        if args.offload is not None and device.type == "cpu":
            raise UserError("--offload is of no use on cpu: weights are there already")
        return cls(args, pipeline_class, parameters, routes, device, dtype, parts)

    @property
    def makes_videos(self) -> bool:
        """Tell whether the pipeline makes videos."""
        return makes_videos(self.parameters)

    @property
    def name(self) -> str:
        """Name of the pipeline's class."""
        return self.pipeline_class.__name__

    def load(self) -> None:
        """Read the weights."""
        parts = load_parts(self.parts, self.dtype)
        self.pipe = load_pipeline(self.pipeline_class, self.args, self.device, self.dtype, parts)

    def run(
        self,
        images: dict[str, Image | None],
        seed: int,
        texts: Mapping[str, str] | None = None,
        *,
        others: Sequence[Image] = (),
        **traced: Any,
    ) -> Outcome:
        """Run the pipeline once.

        Args:
            images: by option ("reference", "image", "mask", "control_image"); those that are painted on get one size.
            seed: of the initial noise, drawn on the CPU: the same on every device.
            texts: what replaces the command's own options, such as a sample's prompt.
            others: references after the first.
            **traced: of :func:`i2am.trace`.
        """
        args = self.args
        images = fit_images(images, args.size)
        call: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)}
        if self.makes_videos and "output_type" in self.parameters:
            call["output_type"] = "pil"
        if "prompt" in self.parameters:
            call["prompt"] = ""
        if args.size is not None and "height" in self.parameters:
            call["height"], call["width"] = args.size
        values = {**vars(args), **(texts or {}), **images}
        call |= {argument: values[option] for argument, option in self.routes.items()}
        if others:
            argument = next(argument for argument, option in self.routes.items() if option == "reference")
            every = [images["reference"], *others]
            call[argument] = [every] if argument == "ip_adapter_image" else every  # a list an adapter
        if args.word is not None:
            traced |= {"words": args.word, "text": True}
        with i2am.trace(self.pipe, time_groups=args.time_groups, layers=args.layers, **traced) as tracer:
            result = self.pipe(**call)
        generated = list(result.frames[0]) if self.makes_videos else result.images[0]
        return Outcome(tracer.maps(), generated, part_seen(images["reference"], self.pipe, generated))

    def as_seen(self, mask: Image | None, reference: Image, generated: Image | list[Image]) -> Image | None:
        """Cut a mask of the reference to the part that its encoder sees."""
        if mask is None:
            return None
        return part_seen(mask.resize(reference.size), self.pipe, generated)


def placement(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Return where a command's pipeline runs, and in which dtype."""
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "float16"))


def _takes_several(pipeline_class: type, routes: Mapping[str, str]) -> bool:
    """Return whether a pipeline's call takes several references, by itself or through an adapter."""
    from i2am.families.registry import facts_of

    facts = facts_of(pipeline_class)
    return "ip_adapter_image" in routes or (facts is not None and facts.several)
