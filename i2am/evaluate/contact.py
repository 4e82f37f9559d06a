"""The sheet of an evaluation's best and worst samples. It is drawn without matplotlib, which would take 30 MB."""

from __future__ import annotations

import functools
import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from i2am.evaluate.scores import MEANING

if TYPE_CHECKING:
    from PIL import ImageDraw
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

    from i2am.evaluate.store import Store

SHOWN = 5  # best, and worst
NARROWEST, WIDEST = 750, 1350  # pixels of the strips' column
MARGIN, GAP = 15, 12  # pixels
HEADING, CAPTION, NOTE = 21, 15, 13  # pixels of letters
NOTE_TEXT = "generated (mask outlined), R2G on it, reference, G2R on it; each map on its own scale"


class Row(NamedTuple):
    """One sample's strip and what is written above it."""

    title: str  # "best" or "worst"
    name: str
    scores: str
    preview: Path


def sheet_rows(best: Sequence[dict[str, Any]], worst: Sequence[dict[str, Any]], store: Store) -> list[Row]:
    """Say what the sheet shows: the best ones, best first, and the worst, worst last, each with all its scores."""
    rows = []
    for title, records in (("best", best), ("worst", worst)):
        for record in records:
            scores = "   ".join(f"{MEANING[n][0]} {_signed(record[n])}" for n in MEANING if n in record)
            rows.append(Row(title, record["id"], scores, store.path("previews", record["id"], ".jpg")))
    return rows


def contact_sheet(rows: Sequence[Row], count: int, by: str) -> Image:
    """Draw the best and worst of ``count`` samples by one score."""
    from PIL import Image, ImageDraw

    strips = [_strip(row.preview) for row in rows]
    width = min(max(*(strip.width for strip in strips), NARROWEST), WIDEST)
    sizes = [(min(s.width, width), max(round(s.height * min(1, width / s.width)), 1)) for s in strips]
    note = textwrap.wrap(NOTE_TEXT, width // 7)
    height = 2 * MARGIN + HEADING + GAP + sum(CAPTION + 4 + h + GAP for _, h in sizes) + (NOTE + 3) * len(note)
    sheet = Image.new("RGB", (width + 2 * MARGIN, height), "white")
    draw, y = ImageDraw.Draw(sheet), MARGIN
    _centred(draw, sheet.width, y, f"Best and worst of {count} samples by {MEANING[by][0]}", HEADING, "black")
    y += HEADING + GAP
    for row, strip, size in zip(rows, strips, sizes, strict=True):
        draw.text((MARGIN, y), _fitting(draw, row, width), fill="black", font=_font(CAPTION))
        y += CAPTION + 4
        sheet.paste(strip.resize(size, Image.Resampling.LANCZOS), (MARGIN, y))
        y += size[1] + GAP
    for line in note:
        _centred(draw, sheet.width, y, line, NOTE, "#404040")
        y += NOTE + 3
    return sheet


def _strip(preview: Path) -> Image:
    """Read a sample's strip; one that is gone or damaged is drawn as an empty one that says so."""
    import PIL.Image
    from PIL import ImageDraw

    try:
        with PIL.Image.open(preview) as strip:
            return strip.convert("RGB")
    except OSError:
        empty = PIL.Image.new("RGB", (NARROWEST, 2 * HEADING), "#e0e0e0")
        ImageDraw.Draw(empty).text((GAP, GAP), f"previews/{preview.name} is gone or damaged", "black", _font(CAPTION))
        return empty


def _centred(draw: ImageDraw.ImageDraw, width: int, y: int, text: str, size: int, colour: str) -> None:
    font = _font(size)
    draw.text(((width - draw.textlength(text, font=font)) / 2, y), text, fill=colour, font=font)


def _fitting(draw: ImageDraw.ImageDraw, row: Row, width: int) -> str:
    """Write a row's caption, its id cut where the whole does not fit into ``width`` pixels."""
    text = ""
    for kept in range(len(row.name), 0, -1):
        name = row.name if kept == len(row.name) else f"{row.name[:kept]}…"
        text = f"{row.title} · {name} · {row.scores}"
        if draw.textlength(text, font=_font(CAPTION)) <= width:
            break
    return text


@functools.cache
def _font(size: int) -> FreeTypeFont | ImageFont:
    """Return matplotlib's DejaVu Sans, which knows most scripts; Pillow's own font where it is not there."""
    from PIL import ImageFont

    spec = importlib.util.find_spec("matplotlib")  # found, not imported
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
    try:
        return ImageFont.truetype(str(folder / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
    except OSError:
        return ImageFont.load_default()


def _signed(value: float) -> str:
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")
