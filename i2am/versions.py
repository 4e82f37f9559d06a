"""What a run was made with."""

from __future__ import annotations

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Return the versions of this package, Python and what decides over a model's arithmetic."""
    import i2am

    installed = {package: version(package) for package in ("torch", "diffusers", "transformers")}
    return {"i2am": i2am.__version__, "python": platform.python_version(), **installed}
