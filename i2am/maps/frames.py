"""Frames of a video: maps of one of them, and of all in a row.

Where a model sees a video at once (Wan), its generated tokens are a strip, frames below each other, ``(frames·h, w)``,
and a key's column softmax goes over all of them. Where it sees each frame as an image (AnimateDiff), the batch holds
``images · frames``. Either way :meth:`FramedLayers.frame` takes one frame out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from i2am._images import pictures_of
from i2am.maps.aggregate import LayerSums
from i2am.maps.entries import QKEntry
from i2am.maps.names import Direction
from i2am.maps.reading import Options, RecordedLayers
from i2am.references import Grid

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

Along = Literal["rows", "images"]
ALONG: tuple[Along, ...] = get_args(Along)


class Video(NamedTuple):
    """Frames of a video, and where they lie."""

    frames: int
    along: Along  # of each grid, below each other; or of the batch
    lead: int = 0  # further frames of the same video that were given, and come before these


PICTURE = Video(1, "images")


class FramedLayers(RecordedLayers):
    """The sums of every layer, and those of each frame where they are of a video."""

    def __init__(
        self,
        sums: Sequence[LayerSums],
        regions: Sequence[str] = (),
        *,
        canvas: Grid | None = None,
        entries: Sequence[QKEntry] = (),
        video: Video = PICTURE,
    ):
        super().__init__(sums, regions)
        check_video(video, self._sums)
        self._video = video
        self._canvas = canvas
        self._entries = list(entries)

    @property
    def frames(self) -> int:
        """Number of frames of a video, as the model's latents have them; 1: these are maps of a picture."""
        return self._video.frames

    @property
    def of_video(self) -> bool:
        """True where these maps are of a video, or of the one frame of it that was not given."""
        return self._video != PICTURE

    @property
    def sees_all_frames(self) -> bool:
        """True where one attention sees all frames of a video: G2R and patches' column softmax are over all of them."""
        return self.frames > 1 and self._video.along == "rows"

    def frame(self, frame: int) -> Self:
        """Return the maps of one frame of a video: every level, patch, figure and report of it.

        R2G keeps its column softmax over all frames that the model sees at once, so that frames can be compared. Where
        it sees the whole video (``sees_all_frames``), G2R is the whole video's.

        Raises:
            IndexError: there is no such frame.
        """
        if not 0 <= frame < self.frames:
            raise IndexError(f"frame={frame}, but the maps hold {self.frames} frames")
        if self.frames == 1:
            return self
        canvas = self._canvas
        if canvas is not None and self.sees_all_frames:
            canvas = (canvas[0] // self.frames, canvas[1])
        sums = [_frame_of(s, self._video, frame) for s in self._sums]
        return self._of(sums, [_entry_of(e, self._video, frame) for e in self._entries], canvas)

    def pictures(self, video: Any, index: int = 0) -> list[Any]:
        """Return the picture that each frame of the maps lies on.

        Args:
            video: what the pipeline made: a sequence of pictures or an array of them, or a batch of such; those of the
                maps' frames alone; or one picture, which is every frame's.
            index: which video of a batch.

        Raises:
            ValueError: so many pictures are no video of these frames.
        """
        return pictures_of(video, self.frames, index, self._video.lead)

    def video(self, direction: Direction, **options: Unpack[Options]) -> Tensor:
        """Return unified maps ``[B, frames, h, w]`` of a video. Options: as at every level.

        Raises:
            ValueError: there is no such map; "g2r" where the model sees all frames at once, as it is summed over them.
        """
        if direction == "g2r" and self.sees_all_frames:
            raise ValueError('G2R is summed over the whole video: maps.ulam("g2r"); R2G and mass have frames')
        return torch.stack([self.frame(i)._read(direction, None, **options) for i in range(self.frames)], dim=1)

    def _of(self, sums: Sequence[LayerSums], entries: Sequence[QKEntry], canvas: Grid | None) -> Self:
        """Return maps like these of other sums."""
        raise NotImplementedError


def check_video(video: Video, sums: Sequence[LayerSums]) -> None:
    """Refuse sums whose grids or batch do not divide into a video's frames.

    Raises:
        ValueError: names the layer and the numbers.
    """
    if video.frames < 1 or video.lead < 0 or video.along not in ALONG:
        raise ValueError(
            f"a video has 1 or more frames along {' or '.join(ALONG)}, behind 0 or more given ones, got {tuple(video)}"
        )
    for s in sums:
        what, length = ("rows", s.grid[0]) if video.along == "rows" else ("images", s.r2g.shape[1])
        if length % video.frames:
            raise ValueError(f"layer {s.layer!r}: {length} {what} are not {video.frames} frames of equal size")


def _frame_of(s: LayerSums, video: Video, frame: int) -> LayerSums:
    """Return the sums of one frame, on its own grid; on the reference those of the whole video, if it is a strip."""
    if video.along == "images":
        mine = slice(frame, None, video.frames)
        fields = {name: x[:, mine] for name in ("r2g", "g2r", "mass", "sram") if (x := getattr(s, name)) is not None}
        return replace(s, **fields)
    height = s.grid[0] // video.frames
    tokens = _rows(s.r2g.shape[-1], video, frame)
    return replace(
        s,
        grid=(height, s.grid[1]),
        r2g=s.r2g[..., tokens],
        mass=None if s.mass is None else s.mass[..., tokens],
        queries=s.queries or s.r2g.shape[-1],
    )


def _entry_of(entry: QKEntry, video: Video, frame: int) -> QKEntry:
    """Return what one frame's recorded call reads."""

    def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if video.along == "images":
            mine = slice(frame, None, video.frames)
            return {name: x if x.shape[0] == 1 and name == "mask" else x[mine] for name, x in tensors.items()}
        tokens = _rows(tensors["q"].shape[2], video, frame)
        return {name: x[:, :, tokens] if name in ("q", "row_lse") else x for name, x in tensors.items()}

    return replace(entry, cut=cut)


def _rows(tokens: int, video: Video, frame: int) -> slice:
    """Return which tokens of a strip are a frame's."""
    each = tokens // video.frames
    return slice(frame * each, (frame + 1) * each)
