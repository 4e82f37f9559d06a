"""What a run was made with."""

from __future__ import annotations

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Return the versions of this package, Python and what decides over a model's arithmetic."""
    import torch

    import i2am

    installed = {package: version(package) for package in ("diffusers", "transformers")}
    build = str(torch.__version__)  # names the CUDA or ROCm it was built for, which the package's metadata does not
    return {"i2am": i2am.__version__, "python": platform.python_version(), "torch": build, **installed}
