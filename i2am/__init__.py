"""i2am: what did an image-to-image diffusion model take from its reference image?

::

    with i2am.trace(pipe) as tracer:
        image = pipe(...).images[0]
    maps = tracer.maps()
    maps.ulam("r2g"), maps.ulam("g2r")

Names are imported on first use: ``import i2am`` costs nothing, and ``i2am --help`` answers without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from i2am import compare as compare
    from i2am import evaluate as evaluate
    from i2am import losses as losses
    from i2am import plot as plot
    from i2am import zoo as zoo
    from i2am.detect import Box, detect_box
    from i2am.maps import AttributionMaps
    from i2am.metrics import imacs
    from i2am.ops import AttentionOutput, attention
    from i2am.references import Banked, Concatenated, Reference
    from i2am.tracing import BlindLayerError, Tracer, patch_modules, patch_transformer, patch_unet, trace, unpatch
    from i2am.tracing.accumulator import Accumulator
    from i2am.tracing.probe import probe

__version__ = "0.2.0"
MODULES = ("compare", "evaluate", "losses", "plot", "zoo")
HOMES = {
    "detect": ("Box", "detect_box"),
    "maps": ("AttributionMaps",),
    "metrics": ("imacs",),
    "ops": ("AttentionOutput", "attention"),
    "references": ("Banked", "Concatenated", "Reference"),
    "tracing": ("BlindLayerError", "Tracer", "patch_modules", "patch_transformer", "patch_unet", "trace", "unpatch"),
    "tracing.accumulator": ("Accumulator",),
    "tracing.probe": ("probe",),
}
HOME = {name: home for home, names in HOMES.items() for name in names}
__all__ = [
    "Accumulator",
    "AttentionOutput",
    "AttributionMaps",
    "Banked",
    "BlindLayerError",
    "Box",
    "Concatenated",
    "Reference",
    "Tracer",
    "__version__",
    "attention",
    "detect_box",
    "imacs",
    "patch_modules",
    "patch_transformer",
    "patch_unet",
    "probe",
    "trace",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return importlib.import_module(f"i2am.{name}")
    if name in HOME:
        value = getattr(importlib.import_module(f"i2am.{HOME[name]}"), name)
        globals()[name] = value  # asked for once
        return value
    raise AttributeError(f"module 'i2am' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES, *HOME})
