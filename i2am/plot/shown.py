"""Figures and axes that show themselves in a notebook, without pyplot and without any magic command."""

from __future__ import annotations

import io

from matplotlib.axes import Axes as _Axes
from matplotlib.figure import Figure as _Figure


class Figure(_Figure):
    """A figure that Jupyter, VS Code and Colab draw when it is the last line of a cell."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=self.dpi)
        return buffer.getvalue()


class Axes(_Axes):
    """The only axes of a figure of ours: shown as that figure."""

    def _repr_png_(self) -> bytes:
        return self.figure._repr_png_()


def single_axes(width: float, height: float) -> Axes:
    """Return the axes of a new figure of so many inches."""
    return Figure(figsize=(width, height), layout="constrained").add_subplot(axes_class=Axes)
