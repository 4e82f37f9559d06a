"""A run that made a video: its frames, maps that move over them, and one frame that figures show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

    from i2am.maps import AttributionMaps, Direction


class Shown(NamedTuple):
    """Maps and picture that figures show: of a video's frame in the middle, or of a picture as they are."""

    maps: AttributionMaps
    picture: Image
    note: str | None = None  # which frame it is


def shown(maps: AttributionMaps, generated: Image | Sequence[Image]) -> Shown:
    """Return what figures show of a run.

    Raises:
        ValueError: so many pictures are no video of the maps' frames.
    """
    if not isinstance(generated, Sequence):
        return Shown(maps, generated)
    if not maps.of_video:
        return Shown(maps, generated[len(generated) // 2])
    middle = maps.frames // 2
    note = f"frame {middle + 1} of {maps.frames} of the latents"
    return Shown(maps.frame(middle), maps.pictures(generated)[middle], note)


def moving(
    maps: AttributionMaps, frames: Sequence[Image], reference: Image, name: str, suffix: str
) -> dict[str, Callable[[Path], object]]:
    """Return file name → function that writes it, of each unified map that differs from frame to frame."""
    if maps.frames == 1:
        return {}
    found: dict[str, Callable[[Path], object]] = {}
    both: dict[Direction, Image | Sequence[Image]] = {"r2g": frames, "g2r": reference}
    for direction, pictures in both.items():
        try:
            maps.video(direction, reference=name)
        except ValueError:  # no such map, or G2R of the whole video
            continue
        found[f"ulam_{direction}{suffix}.webp"] = partial(_animate, maps, pictures, direction, name)
    return found


def _animate(
    maps: AttributionMaps, pictures: Image | Sequence[Image], direction: Direction, name: str, path: Path
) -> None:
    from i2am import plot

    plot.animate(maps, pictures, direction, reference=name).save(path)
