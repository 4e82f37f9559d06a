"""i2am: what did an image-to-image diffusion model take from its reference image?

::

    with i2am.trace(pipe) as tracer:
        image = pipe(...).images[0]
    maps = tracer.maps()
    maps.ulam("r2g"), maps.ulam("g2r")
"""

import importlib
from types import ModuleType

from i2am.detect import Box, detect_box
from i2am.maps import AttributionMaps
from i2am.metrics import imacs
from i2am.ops import AttentionOutput, attention
from i2am.references import Banked, Concatenated, Reference
from i2am.tracing import BlindLayerError, Tracer, patch_modules, patch_transformer, patch_unet, trace, unpatch

__version__ = "0.2.0"
ON_FIRST_USE = ("compare", "evaluate", "losses", "plot", "zoo")  # `i2am.plot.…` needs no import
__all__ = [
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
    "trace",
    "unpatch",
]


def __getattr__(name: str) -> ModuleType:
    if name in ON_FIRST_USE:
        return importlib.import_module(f"i2am.{name}")
    raise AttributeError(f"module 'i2am' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *ON_FIRST_USE})
