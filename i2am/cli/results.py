"""What a run leaves behind: a folder of figures, maps and settings."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2am.cli.arguments import UserError
from i2am.versions import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from i2am.maps import AttributionMaps

SETTINGS = "i2am.json"  # lists the files of a run, by which a later one knows its own
OWN_FILES = re.compile(
    r"(demo|generated|reference|summary|[utlh]lam_(r2g|g2r)(_\d+_heads)?)\.png|maps\.safetensors|i2am\.json|report\.html"
)
REPORT = "report.html"
DPI = 150


def write_results(
    out: Path,
    maps: AttributionMaps,
    generated: Image,
    reference: Image,
    settings: dict[str, Any],
    footer: str | None = None,
    masks: dict[str, Image | None] | None = None,
    story: Callable[[], Figure] | None = None,
) -> None:
    """Writes a run: its images, figures of every level in both directions, maps, and settings with versions.

    Pictures of an earlier run in ``out`` are removed first, so that none is left that this run does not have.

    Args:
        out: an existing folder.
        maps: of one image and one reference.
        generated: what the pipeline made.
        reference: the part of the reference that its encoder saw.
        settings: JSON values; versions are added.
        footer: a note below every figure.
        masks: ``mask`` and ``reference_mask`` of an interactive report; None: no report is written.
        story: draws ``demo.png``; None: there is none.
    """
    for name in _written_before(out):
        (out / name).unlink(missing_ok=True)
    files = {"generated.png": generated, "reference.png": reference}
    directions = {"r2g": generated, "g2r": reference}
    try:
        maps.ulam("g2r")
    except ValueError as error:
        print(error)
        del directions["g2r"]
    figures = {f"{name}.png": draw for name, draw in _figures(maps, generated, reference, directions, footer)}
    if story is not None:
        figures = {"demo.png": story, **figures}
    names = [*files, *figures, *([] if masks is None else [REPORT]), "maps.safetensors"]
    document = {
        **settings,
        "layers": maps.layers,
        "reference_name": maps.references[0],
        "versions": versions(),
        "files": names,
    }
    (out / SETTINGS).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, image in files.items():
        image.save(out / name)
    for name, draw in figures.items():
        draw().savefig(out / name, dpi=DPI)
    if masks is not None:
        maps.report(out / REPORT, generated, reference, settings=document, **masks)
    maps.save(out / "maps.safetensors", record=False)
    print(f"wrote {', '.join(names)} and {SETTINGS} to {out}")


def _figures(
    maps: AttributionMaps, generated: Image, reference: Image, directions: dict[str, Image], footer: str | None
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """(name, function that draws it) of each figure of a run."""
    from i2am import plot

    def unified(direction: str, image: Image) -> Figure:
        ax = plot.overlay(image, maps.ulam(direction), title=f"ULAM · {plot.meaning(maps, direction)}")
        return plot.note(ax.figure, footer) if footer else ax.figure

    yield "summary", partial(plot.summary, maps, generated, reference, footer=footer)
    for direction, image in directions.items():
        draw = partial(plot.levels, maps, direction, image, footer=footer)
        yield f"ulam_{direction}", partial(unified, direction, image)
        yield f"tlam_{direction}", partial(draw, "time")
        for suffix, layers in _head_groups(maps).items():
            yield f"hlam_{direction}{suffix}", partial(draw, "head", layers=layers)
        yield f"llam_{direction}", partial(draw, "layer")


def _head_groups(maps: AttributionMaps) -> dict[str, list[str]]:
    """Layers that share a head count, by a suffix for their picture: empty where all do (SDXL: 10 and 20)."""
    groups: dict[int, list[str]] = {}
    heads = maps.heads()
    for layer in maps.layers:
        groups.setdefault(heads[layer], []).append(layer)
    return {f"_{heads}_heads" if len(groups) > 1 else "": layers for heads, layers in groups.items()}


def claim(out: Path) -> None:
    """Makes the folder ``out``, and refuses one whose files a run would overwrite although i2am did not write them."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        own = _written_before(out)
        foreign = sorted(p.name for p in out.iterdir() if OWN_FILES.fullmatch(p.name) and p.name not in own)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"--out: cannot write to {out}: {error.strerror}") from error
    if foreign:
        raise UserError(f"--out: {out} has files that i2am did not write, and would overwrite: {', '.join(foreign)}")


def _written_before(out: Path) -> list[str]:
    """Names of the files that an earlier run wrote to ``out``, as its settings list them."""
    try:
        listed = json.loads((out / SETTINGS).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--out: {out / SETTINGS} was not written by i2am") from error
    return [name for name in (SETTINGS, *listed) if isinstance(name, str) and OWN_FILES.fullmatch(name)]


def hush(warnings_too: bool = False) -> None:
    """Hushes hints on installation and the bars for loading: the one progress bar is that of the denoising steps."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    if warnings_too:
        diffusers_logging.set_verbosity_error()
