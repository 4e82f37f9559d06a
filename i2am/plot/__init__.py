"""Figures of attribution maps: on their image, at every level, in both directions.

Every function takes or makes an Axes or a Figure and hands it back; none opens a window, switches the backend or
touches pyplot's list of figures. ``figure.savefig(...)`` writes it; a notebook shows it, without any magic command.
"""

from i2am.maps import AXES
from i2am.plot.animation import Animation, animate
from i2am.plot.arrays import PANEL_PIXELS, as_picture
from i2am.plot.budget import budget, words
from i2am.plot.figures import blend, levels, overlay, summary, thumbnail
from i2am.plot.labels import MEANING, meaning, short_layer_names, signed
from i2am.plot.panels import CMAP, SCALES, note
from i2am.plot.patches import holding, sram
from i2am.plot.runs import difference, side_by_side

__all__ = [
    "AXES",
    "CMAP",
    "MEANING",
    "PANEL_PIXELS",
    "SCALES",
    "Animation",
    "animate",
    "as_picture",
    "blend",
    "budget",
    "difference",
    "holding",
    "levels",
    "meaning",
    "note",
    "overlay",
    "short_layer_names",
    "side_by_side",
    "signed",
    "sram",
    "summary",
    "thumbnail",
    "words",
]
