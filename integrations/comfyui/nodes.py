"""The nodes: *I2AM Trace* (MODEL → MODEL) and *I2AM Maps* (→ IMAGE overlays, MASK, report file)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from i2am import plot

from .trace import Trace

LEVELS = {"unified": "ulam", "over time": "tlam", "by head": "hlam", "by layer": "llam"}
DIRECTIONS = {"influence on the image (R2G)": "r2g", "parts of the reference (G2R)": "g2r", "mass": "mass"}


class I2AMTrace:
    """Traces a model while it samples."""

    RETURN_TYPES = ("MODEL", "I2AM_TRACE")
    RETURN_NAMES = ("model", "trace")
    FUNCTION = "trace"
    CATEGORY = "i2am"
    DESCRIPTION = "Observes what the model takes from its reference image; the image stays the same, bit for bit."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs of the node, as ComfyUI asks for them."""
        return {
            "required": {
                "model": ("MODEL",),
                "time_groups": ("INT", {"default": 5, "min": 0, "max": 1000, "tooltip": "0: one group a step"}),
                "record": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "the report answers for any patch"},
                ),
            }
        }

    def trace(self, model: Any, time_groups: int, record: bool) -> tuple[Any, Trace]:
        """Return the traced model, and what *I2AM Maps* reads."""
        trace = Trace("steps" if time_groups == 0 else time_groups, record)
        return trace.apply(model), trace


class I2AMMaps:
    """Draws the maps of a traced run; connect the decoded image, so that it runs after the sampler."""

    RETURN_TYPES = ("IMAGE", "MASK", "STRING")
    RETURN_NAMES = ("overlays", "map", "report")
    FUNCTION = "maps"
    CATEGORY = "i2am"
    OUTPUT_NODE = True
    DESCRIPTION = "Overlays, a mask, and a report in one HTML file of what the image took from its reference."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs of the node, as ComfyUI asks for them."""
        return {
            "required": {
                "trace": ("I2AM_TRACE",),
                "image": ("IMAGE",),
                "direction": (list(DIRECTIONS),),
                "level": (list(LEVELS),),
                "opacity": ("FLOAT", {"default": 0.65, "min": 0.0, "max": 1.0, "step": 0.05}),
                "reference_name": ("STRING", {"default": "", "tooltip": "where there are several references"}),
                "write_report": ("BOOLEAN", {"default": True}),
            },
            "optional": {"reference": ("IMAGE",)},
        }

    def maps(
        self,
        trace: Trace,
        image: Tensor,
        direction: str,
        level: str,
        opacity: float,
        reference_name: str = "",
        write_report: bool = True,
        reference: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, str]:
        """Return overlays ``[N, H, W, 3]``, maps ``[N, H, W]`` in 0…1, and the path of the report, or nothing.

        Args:
            trace: of *I2AM Trace*.
            image: ``[B, H, W, 3]`` the decoded image.
            direction, level: keys of ``DIRECTIONS`` and ``LEVELS``; on the reference, overlays lie on it.
            opacity: of the overlay.
            reference_name: one of the names in the report, where there are several.
            write_report: whether to write a report into ComfyUI's output folder.
            reference: ``[1 | B, H, W, 3]`` the reference image.

        Raises:
            ValueError: the model has not sampled, or there is no such map; says why.
        """
        maps, kind = trace.maps(), DIRECTIONS[direction]
        name = reference_name.strip() or None
        drawn = getattr(maps, LEVELS[level])(kind, reference=name)
        drawn = drawn[:, None] if level == "unified" else drawn  # [B, N, h, w]
        below = image if kind != "g2r" else reference
        if below is None:
            raise ValueError("I2AM Maps: parts of the reference are drawn on it: connect the reference image")
        overlays, masks = [], []
        for i, own in enumerate(drawn):
            picture = below[min(i, len(below) - 1)].float().cpu()
            for x in own:
                if bool(x.isfinite().all()):  # no step ran in a time group without
                    overlays.append(torch.from_numpy(plot.blend(picture.numpy(), x.numpy(), alpha=opacity)).float())
                    masks.append(_stretched(x, picture.shape[:2]))
        report = ""
        if write_report:
            report = str(maps.report(_report_path(), image, reference, reference_name=name, progress=False))
        return torch.stack(overlays), torch.stack(masks), report


def _stretched(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a map at the picture's size, from 0 at its lowest to 1 at its highest value."""
    x = F.interpolate(x[None, None], tuple(size), mode="bicubic", align_corners=False)[0, 0]
    span = x.max() - x.min()
    return (x - x.min()) / span if span > 0 else torch.zeros_like(x)


def _report_path() -> Path:
    """Return a new file in ComfyUI's output folder; outside of ComfyUI in the folder at hand."""
    try:
        import folder_paths
    except ImportError:
        folder = Path.cwd()
    else:
        folder = Path(folder_paths.get_output_directory())
    number = 1
    while os.path.exists(folder / f"i2am_{number:05d}.html"):
        number += 1
    return folder / f"i2am_{number:05d}.html"


NODE_CLASS_MAPPINGS: dict[str, type] = {"I2AMTrace": I2AMTrace, "I2AMMaps": I2AMMaps}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {"I2AMTrace": "I2AM Trace", "I2AMMaps": "I2AM Maps"}
