"""Tasks with a known answer, cut from scikit-image's photographs: which reference pixel every picture pixel came from.

Photographs are split: the held-out ones are never trained on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from i2am.zoo.encoder import centres

SIZE = 64  # pixels of a picture and of a reference
FACTOR = 4  # of the super-resolution
MARGIN = {"exemplar": 3, "tryon": 1}  # pixels by which the mask is larger than the object
FILL = 0.88  # share of the reference that its object spans
PHOTOGRAPHS = {
    "train": (
        "astronaut.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png", "brick.png", "grass.png",
        "camera.png", "coins.png", "retina.jpg",
    ),
    "held-out": ("chelsea.png", "motorcycle_left.png", "gravel.png"),
}  # fmt: skip


class MissingPhotographs(RuntimeError):
    """scikit-image is not installed, or came without its photographs."""


class Sample(NamedTuple):
    """A batch of tasks and their truth. Images are ``[B, 3, H, W]`` in [-1, 1], masks ``[B, 1, H, W]`` in [0, 1]."""

    picture: Tensor  # the answer
    mask: Tensor  # what the model paints; all of it in superres
    reference: Tensor
    object: Tensor  # where the reference really is in the picture
    reference_object: Tensor  # where the object is on the reference
    source: Tensor  # [B, H, W, 2] (y, x) pixel of the reference behind each picture pixel; NaN outside the object
    pose: Tensor | None  # [B, H, W, 2] the same, going on around the object: what a try-on model is given

    @property
    def scene(self) -> Tensor:
        """The picture without what is to be painted: grey there."""
        return self.picture * (1 - self.mask)


def photograph_file(name: str) -> Path:
    """Find a file of scikit-image's own folder; nothing is ever downloaded. Raises MissingPhotographs."""
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise MissingPhotographs('the photographs come with scikit-image: pip install "i2am[demo]"')
    file = Path(package.origin).parent / "data" / name
    if not file.is_file():
        raise MissingPhotographs(f'this scikit-image has no {name} in {file.parent}: pip install -U "i2am[demo]"')
    return file


@lru_cache(maxsize=64)
def photograph(name: str, halvings: int = 0) -> Tensor:
    """Return ``[3, H, W]`` in [-1, 1], area-averaged to a half as often as asked."""
    from PIL import Image

    image = Image.open(photograph_file(name)).convert("RGB")
    image = image.reduce(2**halvings) if halvings else image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class Cutter:
    """Random square pieces of one split's photographs.

    Args:
        split: "train" or "held-out".
        rng: of everything that is drawn.
        recolour: permute, invert and tint colours, so that few photographs make many textures.
    """

    def __init__(self, split: str, rng: np.random.Generator, recolour: bool = True):
        if split not in PHOTOGRAPHS:
            raise ValueError(f"split must be one of {', '.join(PHOTOGRAPHS)}, got {split!r}")
        self.names = PHOTOGRAPHS[split]
        self.rng = rng
        self.recolour = recolour

    def cut(self, size: int = SIZE) -> Tensor:
        """Cut ``[3, size, size]``; one that is not flat, if there is any among a few."""
        return self._cut(size, self._name())

    def pair(self, size: int = SIZE) -> tuple[Tensor, Tensor]:
        """Return two pieces of different photographs."""
        first = self._name()
        return self._cut(size, first), self._cut(size, self._name(other_than=first))

    def _name(self, other_than: str | None = None) -> str:
        return self.rng.choice([name for name in self.names if name != other_than])

    def _cut(self, size: int, name: str) -> Tensor:
        for _ in range(6):
            piece = self._piece(size, name)
            if piece.std() > 0.12:
                break
        return self._recoloured(piece) if self.recolour else piece

    def _piece(self, size: int, name: str) -> Tensor:
        levels = [n for n in range(3) if min(photograph(name, n).shape[1:]) > 1.4 * size]
        photo = photograph(name, int(self.rng.choice(levels)))
        side = size * self.rng.uniform(1, 1.4)
        top, left = (self.rng.uniform(0, n - side) for n in photo.shape[1:])
        grid = centres((size, size), side / size) + torch.tensor([top, left])
        piece = look_up(photo[None], grid[None].float())[0]
        return piece.flip(-1) if self.rng.random() < 0.5 else piece

    def _recoloured(self, piece: Tensor) -> Tensor:
        piece = piece[torch.from_numpy(self.rng.permutation(3))]
        if self.rng.random() < 0.3:
            piece = -piece
        gain, shift = self.rng.uniform(0.7, 1.3, (3, 1, 1)), self.rng.uniform(-0.3, 0.3, (3, 1, 1))
        return (piece * torch.from_numpy(gain).float() + torch.from_numpy(shift).float()).clamp(-1, 1)


def look_up(images: Tensor, positions: Tensor) -> Tensor:
    """Return colours of ``images [B, C, H, W]`` at ``positions [B, h, w, 2]``, ``(y, x)`` in pixels (bilinear)."""
    size = torch.tensor(images.shape[-2:], dtype=positions.dtype)
    grid = (positions / size * 2 - 1).flip(-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


# ------------------------------------------------------------------------------------------------------ silhouettes

Silhouette = Callable[[Tensor], Tensor]  # [..., 2] object coordinates (y, x) in [-1, 1] → soft inside [...]
SOFTNESS = 24.0  # of an edge, in object coordinates


def blob(rng: np.random.Generator) -> Silhouette:
    """Draw a random smooth star-shaped outline that touches all four sides of its box."""
    orders = torch.arange(2, 6)
    waves = torch.from_numpy(rng.normal(0, 0.16, 4) / np.sqrt([1, 1.5, 2, 3])).float()
    phases = torch.from_numpy(rng.uniform(0, 2 * np.pi, 4)).float()

    def radius(angle: Tensor) -> Tensor:
        return (1 + (waves * torch.cos(orders * angle[..., None] + phases)).sum(-1)).clamp_min(0.45)

    angles = torch.linspace(0, 2 * np.pi, 256)
    outline = radius(angles)[:, None] * torch.stack([angles.sin(), angles.cos()], -1)
    low, high = outline.amin(0), outline.amax(0)

    def inside(points: Tensor) -> Tensor:
        p = low + (points + 1) / 2 * (high - low)
        return torch.sigmoid(SOFTNESS * (radius(torch.atan2(p[..., 0], p[..., 1])) - p.norm(dim=-1)))

    return inside


def shirt(rng: np.random.Generator) -> Silhouette:
    """Draw a garment: a body, two sleeves and a neck."""
    body, sleeve, neck = rng.uniform(0.55, 0.7), rng.uniform(-0.35, 0.0), rng.uniform(0.15, 0.3)

    def inside(points: Tensor) -> Tensor:
        y, x = points[..., 0], points[..., 1].abs()
        in_body = torch.minimum(1 - y.abs(), body - x)
        in_sleeve = torch.minimum(torch.minimum(sleeve - y + 0.35 * (1 - x), 1 - x), y + 1 - 0.4 * (x - neck))
        out_of_neck = torch.hypot(y + 1, x) - neck
        return torch.sigmoid(SOFTNESS * torch.minimum(torch.maximum(in_body, in_sleeve), out_of_neck))

    return inside


# ------------------------------------------------------------------------------------------------------------ tasks


def exemplar(cutter: Cutter, batch: int, size: int = SIZE) -> Sample:
    """Draw tasks: a reference object put into a scene: moved, and scaled each way."""
    sample = _inserted(cutter, batch, blob, lambda rng, points: points, MARGIN["exemplar"], (13.0, 25.0), size)
    return sample._replace(pose=None)


def tryon(cutter: Cutter, batch: int, size: int = SIZE) -> Sample:
    """Draw tasks: a garment put into a scene: moved, scaled, turned and bent."""
    return _inserted(cutter, batch, shirt, _bent, MARGIN["tryon"], (18.0, 28.0), size)


def _bent(rng: np.random.Generator, points: Tensor) -> Tensor:
    turn, bends = rng.uniform(-0.4, 0.4), rng.uniform(-0.25, 0.25, 4)
    y, x = points[..., 0], points[..., 1]
    y, x = y * np.cos(turn) - x * np.sin(turn), y * np.sin(turn) + x * np.cos(turn)
    return torch.stack([y + bends[0] * x**2 + bends[1] * x * y, x + bends[2] * y**2 + bends[3] * torch.sin(2 * y)], -1)


def _inserted(cutter: Cutter, batch: int, outline, warp, margin: int, halves: tuple[float, float], size: int) -> Sample:
    samples = [_insert(cutter, outline(cutter.rng), warp, margin, halves, size) for _ in range(batch)]
    return Sample(*(torch.stack(x) for x in zip(*samples, strict=True)))


def _insert(cutter: Cutter, inside: Silhouette, warp, margin: int, halves: tuple[float, float], size: int) -> Sample:
    rng, pixels = cutter.rng, centres((size, size), 1.0)
    half = rng.uniform(*halves, 2) * (size / SIZE)
    room = half + margin + 1
    centre = rng.uniform(room, np.maximum(size - room, room + 1e-3))
    points = warp(rng, (pixels - torch.from_numpy(centre).float()) / torch.from_numpy(half).float())
    source = size / 2 * (1 + FILL * points)  # in reference pixels
    scene, texture = cutter.pair(size)
    there = inside(points)[None]
    here = inside((pixels / (size / 2) - 1) / FILL)[None]
    background = torch.from_numpy(rng.uniform(-1, 1, (3, 1, 1))).float()
    moved = look_up(texture[None], source[None])[0]
    mask = (there > 0.5).float()
    return Sample(
        picture=there * moved + (1 - there) * scene,
        mask=F.max_pool2d(mask, 2 * margin + 1, 1, margin),
        reference=here * texture + (1 - here) * background,
        object=mask,
        reference_object=(here > 0.5).float(),
        source=source.masked_fill(mask[0, ..., None] == 0, float("nan")),
        pose=source,
    )


def superres(cutter: Cutter, batch: int, size: int = SIZE) -> Sample:
    """Draw tasks: a picture and the same one with a quarter of the pixels each way."""
    picture = torch.stack([cutter.cut(size) for _ in range(batch)])
    reference = F.avg_pool2d(picture, FACTOR)
    everywhere = torch.ones(batch, 1, size, size)
    source = (centres((size, size), 1 / FACTOR)).expand(batch, -1, -1, -1)
    return Sample(picture, everywhere, reference, everywhere, torch.ones_like(reference[:, :1]), source, None)


TASKS = {"exemplar": exemplar, "tryon": tryon, "superres": superres}


def samples(task: str, batch: int, *, split: str = "held-out", seed: int = 0, recolour: bool | None = None) -> Sample:
    """Draw ``batch`` tasks with their truth; the same for the same seed.

    Raises:
        ValueError: no such task or split.
        MissingPhotographs: scikit-image is not there.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    recolour = split == "train" if recolour is None else recolour
    return TASKS[task](Cutter(split, np.random.default_rng(seed), recolour), batch)
