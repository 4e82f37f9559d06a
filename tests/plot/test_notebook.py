"""Figures in a real Jupyter kernel: every cell that ends in one shows its picture, with and without a magic command."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETUP = """
import numpy as np, torch
from PIL import Image
from i2am import plot
from i2am.maps import AttributionMaps, LayerSums
sums = LayerSums(layer="a", reference="r", grid=(4, 4), reference_grid=(4, 4), skip=0, keys=16, default=True,
                 counts=(1, 1), r2g=torch.rand(2, 1, 2, 16), g2r=torch.rand(2, 1, 2, 16),
                 sram=torch.rand(2, 1, 2, 1, 16))
maps, image = AttributionMaps([sums], regions=["p"]), Image.new("RGB", (32, 32))
"""
CELLS = [
    "plot.overlay(image, maps.ulam('r2g')[0])",
    "plot.difference(maps.ulam('r2g')[0], maps.ulam('g2r')[0])",
    "plot.levels(maps, 'r2g', image, 'head')",
    "plot.summary(maps, image, image)",
    "plot.sram(maps, 'p', image, image)",
    "plot.side_by_side(maps, maps, 'r2g', [image, image])",
    "maps",
]


def test_every_plot_cell_shows_its_picture(monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install i2am[docs]")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install i2am[docs]")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # what a kernel sets for itself
    cell = nbformat.v4.new_code_cell
    book = nbformat.v4.new_notebook()
    once = [*CELLS, "plot.animate(maps, image)"]
    book.cells = [cell(SETUP), *map(cell, once), cell("%matplotlib inline"), *map(cell, CELLS)]
    nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    shown = [
        (c.source, [kind for output in c.outputs for kind in output.get("data", {})])
        for c in book.cells
        if c.source.startswith(("plot.", "maps"))
    ]
    assert len(shown) == 2 * len(CELLS) + 1
    for source, kinds in shown:
        assert ("text/html" if "animate" in source else "image/png") in kinds, source
        assert kinds.count("image/png") == (0 if "animate" in source else 1), source  # not drawn twice
