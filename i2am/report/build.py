"""The page: template, styles, script and data in one file."""

from __future__ import annotations

import html
import io
import json
import os
import re
from base64 import b64encode
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from i2am import plot
from i2am._files import parse_size, show_size, write_atomically
from i2am._images import one_mask
from i2am.detect import detect_box
from i2am.evaluate.scores import MEANING, score
from i2am.maps import AttributionMaps
from i2am.maps.provenance import rows as provenance_rows
from i2am.maps.provenance import summary_lines
from i2am.references import Grid, LayerFilter
from i2am.report.data import Arrays, Axes, Plan, choose_plan, level_maps, picked, rows
from i2am.report.data import key as key_of
from i2am.versions import versions

CMAPS = ("inferno", "viridis", "cividis", "jet")  # the first three are perceptually even; jet is the paper's look
PICTURE_SIDE = 1024  # pixels of an embedded image, at most
FRAME_SIDE = 512  # and of a frame of a video
LOSSLESS = 1_000_000  # bytes: an image that takes more as PNG is embedded as JPEG
REST = 600_000  # bytes kept free for styles, script, colour maps and settings
BASE64 = 4 / 3
REGION_SIDE = 32  # tokens of a registered patch's map, on the longer side
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tabs and the ends of lines
RECORD_HINT = 'Trace with record="qk" to ask any patch here.'


def build_report(
    maps: AttributionMaps,
    path: str | os.PathLike,
    generated: Any = None,
    reference: Any = None,
    *,
    mask: Any = None,
    reference_mask: Any = None,
    reference_name: str | None = None,
    index: int = 0,
    layers: LayerFilter = None,
    detail: int | None = None,
    limit: str | int = "15MB",
    title: str = "Attribution report",
    settings: dict[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Write a report; see :meth:`AttributionMaps.report`."""
    if detail is not None and detail not in (0, 1, 2, 3):
        raise ValueError(f"detail must be 0, 1, 2 or 3 (how many of time, head and layer at once), got {detail!r}")
    name = maps._reference(reference_name)
    each = [maps.frame(i) for i in range(maps.frames)]
    batch = each[0].batch
    if not -batch <= index < batch:
        raise IndexError(f"index={index}, but the maps hold {batch} images")
    index %= batch
    axes, budget = Axes.of(maps, name, layers), parse_size(limit)
    options = {"reference": name}
    if maps.frames > 1 and (mask is not None or reference_mask is not None):
        raise ValueError("masks are of a picture, these maps of a video: report one frame of it, maps.frame(i)")
    film = _film(maps, generated, index)
    images = {"generated": film[0], "reference": _image(reference, index)}
    masks = {side: _mask(x, index) for side, x in (("generated", mask), ("reference", reference_mask))}
    room = (budget - REST - sum(len(x["src"]) for x in (*film, images["reference"]) if x)) / BASE64 / maps.frames

    has_g2r, why = _has(maps, "g2r", options)
    plan, cells = choose_plan(each[0], axes, name, room, detail, asked=has_g2r and maps.recorded)
    arrays = Arrays()
    parts = [_parts(x, axes, plan, cells, index, arrays, options, has_g2r, progress) for x in each]
    everywhere = options | {"layers": list(axes.layers)}
    header = {
        "axes": {
            "time": [_share(t, axes.times, maps.one_group_a_step) for t in range(axes.times)],
            "head": [str(h) for h in range(axes.heads)],
            "layer": plot.short_layer_names(axes.layers),
        },
        "layerNames": axes.layers,
        "order": plan.order,
        "steps": maps.one_group_a_step,
        "frames": parts,
        "film": [x["src"] for x in film if x][1:],
        "images": {side: bool(x) for side, x in images.items()},
        "aspect": _aspects(images, parts[0]["maps"]),
        "outlines": {side: _outline(x) for side, x in masks.items() if x is not None},
        "box": _box(each[0], index, masks, everywhere),
        "scores": _scores(each[0], index, masks, has_g2r, everywhere),
        "notes": _notes(maps, axes, plan, has_g2r, why),
        "colours": {cmap: _colours(cmap) for cmap in CMAPS},
    }
    facts = _facts(maps, axes, name, settings or {})
    document = _fill(title, header, arrays.packed(), images, facts, _mean_of(maps, axes, name), maps.provenance)
    size = len(document.encode())
    if size > budget:
        raise ValueError(
            f"the report would take {show_size(size)}, more than limit={limit!r}: raise it, or give smaller images"
        )
    path = Path(path)
    write_atomically(path, lambda unfinished: unfinished.write_text(document, encoding="utf-8"))
    return path


def _parts(
    maps: AttributionMaps,
    axes: Axes,
    plan: Plan,
    cells: dict[str, Grid],
    index: int,
    arrays: Arrays,
    options: dict,
    has_g2r: bool,
    progress: bool,
) -> dict[str, dict]:
    """Keep maps, rows and registered regions for every pick of a plan in ``arrays``."""
    directions = ["r2g", *(["g2r"] if has_g2r else []), *(["mass"] if _has(maps, "mass", options)[0] else [])]
    levels = {d: level_maps(maps, axes, d, plan.order, index, arrays, **options) for d in directions}
    regions = _regions(maps, axes, plan, index, arrays, options) if has_g2r else {}
    with tqdm(
        total=len(cells) * len(axes.layers), desc="report", unit="layer", disable=not progress, leave=False
    ) as bar:
        asked = {
            side: rows(maps, axes, grid, plan, index, arrays, bar.update, reverse=side == "reference", **options)
            for side, grid in cells.items()
        }
    return {"maps": levels, "rows": asked, "regions": regions}


def _share(group: int, groups: int, steps: bool) -> str:
    """Say which part of the run a time group covers."""
    if steps:
        return f"{group + 1} of {groups}"
    return f"{round(100 * group / groups)}–{round(100 * (group + 1) / groups)}\N{NO-BREAK SPACE}%"


def _has(maps: AttributionMaps, direction: str, options: dict) -> tuple[bool, str]:
    try:
        maps.ulam(direction, **options)
    except ValueError as error:
        return False, str(error)
    return True, ""


def _regions(maps, axes: Axes, plan: Plan, index: int, arrays: Arrays, options: dict) -> dict[str, dict]:
    """Return SRAM of the registered regions, by name."""

    size = tuple(maps.ulam("g2r", layers=list(axes.layers), **options).shape[-2:])
    found: dict[str, dict] = {}
    for name in maps.regions:

        def ask(level: str | None, region: str = name, **chosen) -> Tensor:
            return maps.sram(region, level=level, **chosen, **options)[index]

        kept = picked(ask, axes, plan.order, size, REGION_SIDE)
        found[name] = {key_of(pick): arrays.add_rows(x[None]) for pick, x in kept}
    return found


# ------------------------------------------------------------------------------------------------------- small parts


def _image(image: Any, index: int, side: int = PICTURE_SIDE) -> dict[str, Any] | None:
    """Encode a picture as a data URI."""
    from PIL import Image

    if image is None:
        return None
    picture = Image.fromarray((plot.as_picture(image, index) * 255).round().astype(np.uint8))
    size = picture.size
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 92, "subsampling": 0})):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        if buffer.tell() <= LOSSLESS:
            break
    return {"src": f"data:image/{kind};base64,{b64encode(buffer.getvalue()).decode()}", "size": size}


def _film(maps: AttributionMaps, generated: Any, index: int) -> list[dict[str, Any] | None]:
    """Encode the generated image, or the picture of each frame of a video; one alone is every frame's."""
    if maps.frames == 1 or generated is None:
        return [_image(generated, index)]
    pictures = maps.pictures(generated, index)
    if all(picture is pictures[0] for picture in pictures):
        pictures = pictures[:1]
    return [_image(picture, 0, FRAME_SIDE) for picture in pictures]


def _mask(mask: Any, index: int) -> np.ndarray | None:
    """Return a mask ``[H, W]`` in 0…1."""
    return None if mask is None else one_mask(mask, index).numpy()


def _outline(mask: np.ndarray) -> str:
    """Trace an SVG path around a mask, in a square of 0…1."""
    from contourpy import contour_generator

    height, width = mask.shape
    padded = np.pad(mask, 1)
    lines = contour_generator(
        x=(np.arange(width + 2) - 0.5) / width, y=(np.arange(height + 2) - 0.5) / height, z=padded
    ).lines(0.5)
    thinned = (line[:: max(len(line) // 400, 1)].clip(0, 1) for line in lines)
    return "".join("M" + "L".join(f"{x:.4f} {y:.4f}" for x, y in line) + "Z" for line in thinned)


def _box(maps: AttributionMaps, index: int, masks: dict, options: dict) -> list[float] | None:
    """Find the detected object's box, as shares of the picture: top, left, bottom, right."""
    if masks["generated"] is None:
        return None
    height, width = masks["generated"].shape
    box = detect_box(maps.ulam("r2g", **options)[index], size=(height, width))
    return None if box is None else [box.top / height, box.left / width, box.bottom / height, box.right / width]


def _scores(maps: AttributionMaps, index: int, masks: dict, has_g2r: bool, options: dict) -> list[list[str]]:
    """Return (what, value, what it means) of every score that the masks allow."""
    r2g = maps.ulam("r2g", **options)[index]
    g2r = maps.ulam("g2r", **options)[index] if has_g2r else None
    values = score(r2g, g2r, masks["generated"], masks["reference"])
    return [[MEANING[k][0], plot.signed(v), MEANING[k][1]] for k, v in values.items()]


def _aspects(images: dict, levels: dict) -> dict[str, list[int]]:
    """Return [width, height] of both pictures: the image's, or else its grid's."""

    def of(side, direction):
        if images[side]:
            return list(images[side]["size"])
        grid = levels[direction]["*,*,*"]["grid"] if direction in levels else [1, 1]
        return [grid[1], grid[0]]

    return {"generated": of("generated", "r2g"), "reference": of("reference", "g2r")}


def _colours(cmap: str) -> str:
    from matplotlib import colormaps

    table = (colormaps[cmap](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)
    return b64encode(table.tobytes()).decode()


def _notes(maps: AttributionMaps, axes: Axes, plan: Plan, has_g2r: bool, why: str) -> list[str]:
    notes = []
    if not has_g2r:
        notes.append(why)
    elif not maps.recorded:
        notes.append("This run kept no queries and keys, so that patches can't be asked. " + RECORD_HINT)
    elif not plan.cells:
        notes.append("The rows of the attention do not fit this file's limit; raise limit= to ask patches.")
    if maps.sees_all_frames:
        notes.append(
            f"The model sees all {maps.frames} frames at once: R2G is over all of them, G2R is the whole video's."
        )
    if not axes.heads:
        notes.append(
            "Heads can't be picked: these layers have different numbers of heads (layers= chooses alike ones)."
        )
    if plan.order < 3:
        which = ["none", "one", "two"][plan.order]
        notes.append(
            f"To keep this file small, {which} of time, head and layer can be picked at once; "
            "maps.report(..., limit=, layers=) allows more."
        )
    return notes


def _facts(maps: AttributionMaps, axes: Axes, reference: str, settings: dict[str, Any]) -> dict[str, dict[str, str]]:
    counts = maps.counts(reference)
    return {
        "Maps": {
            "reference": reference,
            "layers": "\n".join(
                f"{n}: {maps.grids(reference)[n][0]}×{maps.grids(reference)[n][1]} tokens, "
                f"{maps.heads(reference)[n]} heads, {sum(counts[n])} calls"
                for n in axes.layers
            ),
            "time groups": str(maps.time_groups),
        },
        "Settings": {str(k): _said(v) for k, v in settings.items() if k not in ("versions", "files")},
        "Versions": {k: str(v) for k, v in (settings.get("versions") or versions()).items()},
    }


def _mean_of(maps: AttributionMaps, axes: Axes, reference: str) -> list[str]:
    """Return a few lines that say what the pictures are a mean of: counted here, and as the tracer tells."""
    counts = maps.counts(reference)
    calls = [counts[name] for name in axes.layers]
    most = [max(group) for group in zip(*calls, strict=True)]
    heads = sorted({maps.heads(reference)[name] for name in axes.layers})
    lines = [
        f"{sum(most)} attention calls of each layer, by time group: {' + '.join(map(str, most))}",
        f"{len(axes.layers)} layers of {' or '.join(map(str, heads))} heads; reference {reference!r}",
    ]
    fewer = [name for name, seen in zip(axes.layers, calls, strict=True) if seen != most]
    if fewer:
        lines.append(f"{len(fewer)} of these layers ran less often: {', '.join(fewer[:3])}{', …' * (len(fewer) > 3)}")
    return lines + summary_lines(maps.provenance)


def _said(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# ------------------------------------------------------------------------------------------------------------- page


def _fill(
    title: str,
    header: dict,
    arrays: dict[str, str],
    images: dict,
    facts: dict[str, dict[str, str]],
    mean_of: list[str],
    provenance: dict[str, Any],
) -> str:
    """Return the page's text."""
    everything = {"Provenance": {k: v for k, v in provenance_rows(provenance) if k != "summary"}}
    page = files("i2am.report")
    parts = {
        "title": html.escape(title),
        "style": (page / "page.css").read_text("utf-8"),
        "script": (page / "page.js").read_text("utf-8"),
        "header": _json(header),
        "bytes": arrays["bytes"],
        "floats": arrays["floats"],
        "facts": _tables(facts),
        "mean_of": "".join(f"<li>{html.escape(line)}</li>" for line in mean_of),
        "provenance": f"<details><summary>All that was seen</summary>{_tables(everything)}</details>"
        if any(everything.values())
        else "",
        **{side: images[side]["src"] if images[side] else _blank(header["aspect"][side]) for side in images},
    }
    template = (page / "page.html").read_text("utf-8")
    return _printable(re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template))


def _json(header: dict) -> str:
    """Return JSON that no parser of HTML can take for markup: pure ASCII, and no ``<`` (``<!--<script>`` opens one)."""
    return json.dumps(header, separators=(",", ":")).replace("<", "\\u003c")


def _printable(text: str) -> str:
    """Return text that UTF-8 holds and a reader sees: control characters, and lone surrogates, as undecodable file
    names have them, are written as escapes.
    """
    text = CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _tables(facts: dict[str, dict[str, str]]) -> str:
    def row(name: str, value: str) -> str:
        return f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"

    def table(caption: str, values: dict[str, str]) -> str:
        body = "".join(row(*item) for item in values.items())
        return f"<table><caption>{html.escape(caption)}</caption><tbody>{body}</tbody></table>"

    return "".join(table(caption, values) for caption, values in facts.items() if values)


def _blank(aspect: list[int]) -> str:
    """Make a plain picture, where the user gave none."""
    size = f'width="{aspect[0] * 8}" height="{aspect[1] * 8}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect width="100%" height="100%" fill="#999"/></svg>'
    return "data:image/svg+xml;base64," + b64encode(svg.encode()).decode()
