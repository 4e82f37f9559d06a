"""Maps over the denoising steps, or over the frames of a video, as a moving picture."""

from __future__ import annotations

import io
import shutil
import subprocess
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from i2am._files import write_atomically
from i2am._images import one_of, read_picture
from i2am.maps import AttributionMaps, Direction
from i2am.plot.arrays import grey, limits_of
from i2am.plot.figures import blend
from i2am.plot.labels import meaning, share_of_run
from i2am.plot.panels import CMAP, SCALES

if TYPE_CHECKING:
    from PIL.Image import Image

KINDS = {".gif": "GIF", ".webp": "WEBP", ".mp4": "MP4"}
SIDE = 512  # pixels of the longer side, at most
CAPTION = 22  # pixels below the picture
Over = Literal["steps", "frames"]
OVER: tuple[Over, ...] = get_args(Over)
SECONDS = {"steps": 0.7, "frames": 0.25}


@dataclass(frozen=True)
class Animation:
    """Frames of a moving picture: a notebook plays it, :meth:`save` writes it."""

    frames: Sequence[Image]
    seconds: float  # a frame
    title: str

    def save(self, path: str | Path) -> Path:
        """Write a ``.gif``, ``.webp`` or ``.mp4`` file, at once or not at all; return its path.

        Raises:
            ValueError: another ending; an MP4 where ffmpeg is not on the path, or where it fails.
        """
        path = Path(path)
        kind = KINDS.get(path.suffix.lower())
        if kind is None:
            raise ValueError(f"an animation is a file of {', '.join(KINDS)}, got {path.name!r}")
        data = self._mp4() if kind == "MP4" else self._looping(kind)
        write_atomically(path, lambda unfinished: unfinished.write_bytes(data))
        return path

    def _repr_html_(self) -> str:
        return f'<img alt="{self.title}" src="data:image/gif;base64,{b64encode(self._looping("GIF")).decode()}">'

    def _looping(self, kind: str) -> bytes:
        first, *others = self.frames
        buffer = io.BytesIO()
        quality = {} if kind == "GIF" else {"quality": 90}
        duration = round(1000 * self.seconds)
        first.save(buffer, kind, save_all=True, append_images=others, duration=duration, loop=0, **quality)
        return buffer.getvalue()

    def _mp4(self) -> bytes:
        ffmpeg = shutil.which("ffmpeg")
        if ffmpeg is None:
            raise ValueError("an MP4 needs the program ffmpeg on the path; .gif and .webp need nothing")
        width, height = self.frames[0].size
        read = [
            "-f",
            "rawvideo",
            "-pix_fmt",
            "rgb24",
            "-s",
            f"{width}x{height}",
            "-r",
            f"{1 / self.seconds:g}",
            "-i",
            "-",
        ]
        even = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p", "-r", "25"]  # what every player takes
        stream = ["-movflags", "frag_keyframe+empty_moov", "-f", "mp4", "-"]
        pixels = b"".join(frame.convert("RGB").tobytes() for frame in self.frames)
        command = [ffmpeg, "-v", "error", *read, "-i", "-", *even, *stream]
        done = subprocess.run(command, input=pixels, capture_output=True, check=False)
        if done.returncode or not done.stdout:
            raise ValueError(f"ffmpeg could not write the MP4: {done.stderr.decode(errors='replace').strip()[-300:]}")
        return done.stdout


def animate(
    maps: AttributionMaps,
    image: Any,
    direction: Direction = "r2g",
    *,
    over: Over | None = None,
    index: int = 0,
    scale: str = "shared",
    seconds: float | None = None,
    cmap: str = CMAP,
    alpha: float = 0.65,
    **options: Any,
) -> Animation:
    """Show a map as it changes over the denoising steps, a frame a time group; or over the frames of a video.

    Trace with ``time_groups="steps"`` for a frame a step.

    Args:
        maps: the attribution maps.
        image: what they lie on: the generated image; for "g2r" the reference. Forms: see :func:`overlay`. Over frames:
            the video, a sequence of pictures, of which each frame of the latents takes the one that is there.
        direction: "r2g", "g2r" or "mass".
        over: "steps" or "frames". None: frames where the maps are of a video. For the steps of one frame, animate
            ``maps.frame(i)``.
        index: which sample of a batch.
        scale: "shared": one colour scale for all frames; "each": every frame from its own minimum to its maximum.
        seconds: a frame. None: 0.7 over steps, 0.25 over frames.
        cmap, alpha: see :func:`overlay`.
        **options: of :class:`AttributionMaps`' levels: ``reference``, ``layers``, ``heads``, ``times``, ``normalize``.

    Raises:
        ValueError: there is no such map, nothing ran, or an argument is not one of the above.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    over = over or ("frames" if maps.frames > 1 else "steps")
    if over not in OVER:
        raise ValueError(f"over must be one of {', '.join(OVER)}, got {over!r}")
    if seconds is None:
        seconds = SECONDS[over]
    if not 0 < seconds < 60:
        raise ValueError(f"seconds a frame must lie between 0 and 60, got {seconds}")
    if over == "frames":
        values = one_of(maps.video(direction, **options), index, "maps").numpy()
        pictures = [_fitted(read_picture(x, 0)) for x in maps.pictures(image, index)]
        labels = [f"frame {i + 1} of {maps.frames}" for i in range(maps.frames)]
    elif maps.sees_all_frames:
        raise ValueError(f"these maps are of {maps.frames} frames: over='frames', or animate maps.frame(i)")
    else:
        values = one_of(maps.tlam(direction, **options), index, "maps").numpy()
        labels = share_of_run(maps, options)
        pictures = [_fitted(read_picture(image, index))] * len(labels)
    finite = [x for x in values if np.isfinite(x).all()]
    if not finite:
        raise ValueError("no step ran in any of the chosen time groups")
    common = limits_of(finite)
    frames: list[Image] = []
    for x, label, picture in zip(values, labels, pictures, strict=True):
        ran = bool(np.isfinite(x).all())
        low, high = common if scale == "shared" or not ran else limits_of([x])
        pixels = blend(picture, x, cmap=cmap, alpha=alpha, vmin=low, vmax=high) if ran else grey(picture)
        frames.append(_captioned(pixels, label if ran else f"{label}: no step", len(frames) + 1, len(labels)))
    return Animation(frames, seconds, meaning(maps, direction))


def _fitted(picture: np.ndarray) -> np.ndarray:
    """Return ``[H, W, 3]`` of at most SIDE pixels on the longer side; small ones are enlarged to half of it."""
    from PIL import Image

    longer = max(picture.shape[:2])
    scale = SIDE / longer if longer > SIDE else max(SIDE // 2 / longer, 1)
    if scale == 1:
        return picture
    size = [max(round(n * scale), 1) for n in picture.shape[1::-1]]
    image = Image.fromarray((picture * 255).round().astype(np.uint8)).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.float32) / 255


def _captioned(pixels: np.ndarray, label: str, number: int, count: int) -> Image:
    """Draw a frame: the picture, a bar of how far the run is, and which part of it this is."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 11)  # Pillow's has no dash
    height, width = pixels.shape[:2]
    frame = Image.new("RGB", (width, height + CAPTION), "white")
    frame.paste(Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8)), (0, 0))
    pen = ImageDraw.Draw(frame)
    pen.rectangle([0, height, round(width * number / count) - 1, height + 3], fill=(154, 52, 18))
    pen.text((4, height + 6), label, fill=(29, 31, 35), font=font)
    return frame
