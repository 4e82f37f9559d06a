"""Packaging of i2am. ``kernels/`` installs as ``i2am.kernels`` (CONTRIBUTING.md says why it is laid out so)."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (here / "i2am" / "__init__.py").read_text(), re.M).group(1)

extras = {
    "demo": ["scikit-image>=0.24"],  # the photographs of `i2am demo`
    "test": [
        "accelerate>=1.0",
        "hypothesis>=6.100",
        "peft>=0.13",  # LoRA
        "playwright>=1.45",  # the report's tests, with any installed Chromium
        "pytest>=8",
        "pytest-benchmark>=5",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.5",
        "setuptools>=77",
    ],
    "bench": ["flash-colreduce==0.2.2", "psutil>=5.9"],  # a peer and the memory meter of `make bench`
    "evaluate": ["accelerate>=1.0", "pyarrow>=15"],  # `i2am evaluate` over several devices; Parquet
    "docs": [
        "ipykernel>=6.29",
        "latex2mathml>=3.77",
        "mkdocs-material>=9.5",
        "mkdocstrings[python]>=0.26",
        "nbclient>=0.10",
        "nbformat>=5.10",
    ],
    "lint": ["ruff>=0.9"],
}

setup(
    name="i2am",
    version=version,
    description="What did an image-to-image diffusion model take from its reference? Bidirectional attribution, "
    "accumulated inside fused attention kernels.",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "i2am",
        "i2am.cli",
        "i2am.evaluate",
        "i2am.families",
        "i2am.kernels",
        "i2am.maps",
        "i2am.ops",
        "i2am.plot",
        "i2am.report",
        "i2am.tracing",
        "i2am.zoo",
    ],
    package_dir={"i2am.kernels": "kernels"},
    package_data={"i2am.report": ["page.html", "page.css", "page.js"], "i2am.zoo": ["weights/*.safetensors"]},
    install_requires=[
        "torch>=2.6",
        "triton>=3.2; platform_system == 'Linux'",
        "diffusers>=0.33",
        "transformers>=4.45",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "matplotlib>=3.8",
        "pillow>=10",
        "scipy>=1.11",
        "tqdm>=4.66",
    ],
    extras_require={**extras, "dev": sorted({p for group in extras.values() for p in group})},
    entry_points={"console_scripts": ["i2am=i2am.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
