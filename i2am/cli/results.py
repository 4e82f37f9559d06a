"""What a run leaves behind: a folder of figures, maps and settings, written beside and swapped in at the end."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2am._files import abandoned, sync, unfinished_path
from i2am.cli.arguments import RunFailed, StoppedEarly, UserError
from i2am.cli.streams import no_interrupt, say
from i2am.cli.videos import moving, shown
from i2am.versions import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from i2am.maps import AttributionMaps

SETTINGS = "i2am.json"  # lists the files of a run, by which a later one knows its own
OWN_FILES = re.compile(
    r"(demo|generated|words|budget|(reference|summary|[utlh]lam_(r2g|g2r)(_\d+_heads)?)(_\d+)?)\.png"
    r"|(generated|ulam_(r2g|g2r)(_\d+)?)\.webp"
    r"|maps\.safetensors|i2am\.json|report(_\d+)?\.html"
)
FAILED = "failed"  # folder of a run whose figures could not be drawn, beside those of an earlier run
DPI = 150


class NotFinite(RunFailed):
    """Maps with values that are not finite; what could be written is."""


def write_results(
    out: Path,
    maps: AttributionMaps,
    generated: Image | Sequence[Image],
    reference: Image | Sequence[Image],
    settings: dict[str, Any],
    footer: str | None = None,
    masks: dict[str, Image | None] | None = None,
    story: Callable[[], Figure] | None = None,
) -> None:
    """Write a run: its maps, images, figures of every level in both directions, and settings with versions.

    All is written beside and takes its place at the end, when the earlier run's files leave: whatever goes wrong
    before, they are as they were.

    Args:
        out: an existing folder.
        maps: of one image, or of one video.
        generated: what the pipeline made: a picture, or a video's frames. Figures show the frame in the middle.
        reference: the part of the reference that its encoder saw; of each, where there are several: their files are
            numbered.
        settings: JSON values; versions are added.
        footer: a note below every figure.
        masks: ``mask`` and ``reference_mask`` of an interactive report; None: no report is written.
        story: draws ``demo.png``; None: there is none.

    Raises:
        NotFinite: the maps hold NaN or infinity; maps, images and settings are kept, without figures.
        StoppedEarly: there is no room on the disk.
    """
    from i2am._images import save_film

    beside = unfinished_path(out)
    try:
        beside.mkdir()
        numbered = _numbered(maps, reference)
        names = maps.references if len(numbered) > 1 else maps.references[0]
        document = {**settings, "layers": maps.layers, "reference_name": names, "versions": versions()}
        files = {"maps.safetensors": partial(maps.save, record=False)}
        one = shown(maps, generated)
        footer = "\n".join(filter(None, (one.note, footer))) or None
        files |= {"generated.png": partial(one.picture.save, format="png")}
        if isinstance(generated, Sequence):
            files["generated.webp"] = partial(save_film, generated)
        files |= {f"reference{suffix}.png": picture.save for suffix, (_, picture) in numbered.items()}
        bad = {layer: groups for name in maps.references for layer, groups in maps.not_finite(name).items()}
        if not bad:
            if story is not None:
                files["demo.png"] = partial(_save_figure, story)
            for suffix, (name, picture) in numbered.items():
                files |= _figures(one.maps, one.picture, picture, footer, name, suffix)
                if isinstance(generated, Sequence):
                    files |= moving(maps, generated, picture, name, suffix)
                if masks is not None:
                    given = {"reference_name": name, "settings": document, **masks}
                    files[f"report{suffix}.html"] = partial(_report, maps, generated, picture, given)
            if maps.words:
                files |= _of_words(one.maps, one.picture, footer)
        _write_all(beside, files, document)
        if bad:
            _keep_failed(out, beside, maps, bad)
        swap_in(beside, out)
    except OSError as error:
        raise _explained(error, out) from error
    except Exception as error:  # safetensors' own error carries the code in its text only
        if "os error 28" in str(error):
            raise StoppedEarly(_no_room(out)) from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    say(f"wrote {', '.join(files)} and {SETTINGS} to {out}")


def _numbered(maps: AttributionMaps, reference: Image | Sequence[Image]) -> dict[str, tuple[str, Image]]:
    """Return each reference's name and picture by the end of its files' names: nothing, or _1, _2, …

    One picture may have several sets of keys, such as its latents' and its encoder's: all lie on it.

    Raises:
        UserError: there are other pictures than maps of references.
    """
    pictures = list(reference) if isinstance(reference, (list, tuple)) else [reference]
    if len(pictures) == 1:
        pictures *= len(maps.references)
    if len(pictures) != len(maps.references):
        raise UserError(f"{len(pictures)} references were given, and the maps are of {', '.join(maps.references)}")
    pairs = zip(maps.references, pictures, strict=True)
    return {"" if len(pictures) == 1 else f"_{i}": pair for i, pair in enumerate(pairs, 1)}


def _report(
    maps: AttributionMaps, generated: Image | Sequence[Image], reference: Image, given: dict[str, Any], path: Path
) -> None:
    maps.report(path, generated, reference, **given)


def _write_all(folder: Path, files: dict[str, Callable[[Path], Any]], document: dict[str, Any]) -> None:
    for name, write in files.items():
        write(folder / name)
        sync(folder / name)
    text = json.dumps({**document, "files": list(files)}, indent=2, ensure_ascii=False) + "\n"
    (folder / SETTINGS).write_text(text, "utf-8", "backslashreplace")
    sync(folder / SETTINGS)


def _keep_failed(out: Path, beside: Path, maps: AttributionMaps, bad: dict[str, list[int]]) -> None:
    """Keep what there is of a run without figures, in ``out`` or, beside an earlier run, in a folder of its own."""
    place = out / FAILED if written_before(out) else out
    place.mkdir(exist_ok=True)
    swap_in(beside, place)
    layer = min(bad, key=lambda name: bad[name][0])  # of equal ones the first in the order that they ran in
    where = f"{layer} in {_steps(maps, layer, bad[layer][0])}"
    raise NotFinite(
        f"maps of {len(bad)} layers hold values that are not finite, first {where}: the model overflowed; try --dtype "
        f"bfloat16 or float32. There are no figures; maps.safetensors and generated.png are in {place}"
    )


def _steps(maps: AttributionMaps, layer: str, group: int) -> str:
    """Name the steps of a layer's time group."""
    counts = next(s.counts for s in maps._sums if s.layer == layer)
    first, last = sum(counts[:group]) + 1, sum(counts[: group + 1])
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    return f"{steps} of {sum(counts)} (time group {group})"


def swap_in(beside: Path, out: Path) -> None:
    """Give a finished run's files their places; files of an earlier run that this one does not have go."""
    with no_interrupt():
        names = [path.name for path in beside.iterdir()]
        for name in set(written_before(out)) - {*names}:
            (out / name).unlink(missing_ok=True)
        for name in sorted(names, key=lambda n: n == SETTINGS):  # which says what is there: last
            os.replace(beside / name, out / name)
        sync(out)


def _explained(error: OSError, out: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoppedEarly(_no_room(out))
    return StoppedEarly(f"cannot write to {out}: {error.strerror or error}; what was there is as it was")


def _no_room(out: Path) -> str:
    return f"no room left for results in {out}: what was there is as it was"


def _figures(
    maps: AttributionMaps, generated: Image, reference: Image, footer: str | None, name: str, suffix: str
) -> dict[str, Callable[[Path], None]]:
    """Return file name → function that writes it, for each figure of a run about one reference."""
    directions = {"r2g": generated, "g2r": reference}
    try:
        maps.ulam("g2r", reference=name)
    except ValueError as error:
        say(str(error))
        del directions["g2r"]

    drawings = _drawings(maps, generated, reference, directions, footer, name)
    return {f"{figure}{suffix}.png": partial(_save_figure, draw) for figure, draw in drawings}


def _of_words(maps: AttributionMaps, generated: Image, footer: str | None) -> dict[str, Callable[[Path], None]]:
    """Return the figures about the prompt's words."""
    from i2am import plot

    drawings = {"words": partial(plot.words, maps, generated, footer=footer), "budget": partial(_budget, maps, footer)}
    return {f"{name}.png": partial(_save_figure, draw) for name, draw in drawings.items()}


def _save_figure(draw: Callable[[], Figure], path: Path) -> None:
    draw().savefig(path, format="png", dpi=DPI)


def _drawings(
    maps: AttributionMaps,
    generated: Image,
    reference: Image,
    directions: dict[str, Image],
    footer: str | None,
    name: str,
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Yield (name, function that draws it) of each figure of a run."""
    from i2am import plot
    from i2am.plot.labels import quantity

    def unified(direction: str, image: Image) -> Figure:
        says = {"title": f"ULAM · {plot.meaning(maps, direction)}", "quantity": quantity(direction, {})}
        ax = plot.overlay(image, maps.ulam(direction, reference=name), **says)
        return plot.note(ax.figure, footer) if footer else ax.figure

    yield "summary", partial(plot.summary, maps, generated, reference, reference_name=name, footer=footer)
    for direction, image in directions.items():
        draw = partial(plot.levels, maps, direction, image, footer=footer, reference=name)
        yield f"ulam_{direction}", partial(unified, direction, image)
        yield f"tlam_{direction}", partial(draw, "time")
        for suffix, layers in _head_groups(maps, name).items():
            yield f"hlam_{direction}{suffix}", partial(draw, "head", layers=layers)
        yield f"llam_{direction}", partial(draw, "layer")


def _budget(maps: AttributionMaps, footer: str | None) -> Figure:
    """Draw who got the attention: of all sources, or of the text's own where an adapter has a softmax of its own."""
    from i2am import plot
    from i2am.references import TEXT

    try:
        shares = maps.budget()
    except ValueError:
        shares = maps.budget(sources=[*maps.words, TEXT])
    figure = plot.budget(shares).figure
    return plot.note(figure, footer) if footer else figure


def _head_groups(maps: AttributionMaps, reference: str) -> dict[str, list[str]]:
    """Return layers that share a head count, by a suffix for their picture: empty where all do (SDXL: 10 and 20)."""
    groups: dict[int, list[str]] = {}
    heads = maps.heads(reference)
    for layer in maps.chosen_layers(reference=reference):
        groups.setdefault(heads[layer], []).append(layer)
    return {f"_{heads}_heads" if len(groups) > 1 else "": layers for heads, layers in groups.items()}


def prepare_output_dir(out: Path) -> None:
    """Make the folder ``out``, and refuse one whose files a run would overwrite although i2am did not write them."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        own = written_before(out)
        foreign = sorted(p.name for p in out.iterdir() if OWN_FILES.fullmatch(p.name) and p.name not in own)
        with tempfile.TemporaryFile(dir=out):
            pass
        for path in out.glob(".i2am-*"):
            if abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except (OSError, ValueError) as error:
        raise UserError(f"--out: cannot write to {out}: {getattr(error, 'strerror', None) or error}") from error
    if foreign:
        raise UserError(f"--out: {out} has files that i2am did not write, and would overwrite: {', '.join(foreign)}")


def written_before(out: Path) -> list[str]:
    """Return names of the files that an earlier run wrote to ``out``, as its settings list them."""
    try:
        listed = json.loads((out / SETTINGS).read_text(encoding="utf-8"))["files"]
        names = [SETTINGS, *listed]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--out: {out / SETTINGS} was not written by i2am") from error
    return [name for name in names if isinstance(name, str) and OWN_FILES.fullmatch(name)]


def quiet_libraries(warnings_too: bool = False) -> None:
    """Silence hints on installation and the bars for loading: the one progress bar is that of the denoising steps."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    if warnings_too:
        diffusers_logging.set_verbosity_error()
