"""A zoo model on held-out tasks: pictures, maps, errors, and intervals around their means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import i2am
from i2am import zoo
from i2am.zoo.storage import read

SEED = 20_000  # of the first held-out batch


@dataclass(frozen=True)
class Setting:
    """How much is measured."""

    samples: int = 208
    steps: int = 4  # of a traced picture; each is a time group
    short: int = 2  # steps where hundreds of pictures are drawn again
    batch: int = 16
    draws: int = 2  # random choices to average
    checkpoints: Path | None = None
    weights: Path | None = None  # folder of NAME.safetensors; None: the shipped ones

    @property
    def batches(self) -> int:
        return -(-self.samples // self.batch)

    def load(self, name: str) -> zoo.ZooPipeline:
        return zoo.load(name) if self.weights is None else read(self.weights / f"{name}.safetensors")[0]


def tasks(name: str, setting: Setting, split: str = "held-out", share: float = 1.0) -> Iterator[zoo.Sample]:
    """The batches of one task; the same for every part."""
    first = SEED if split == "held-out" else 2 * SEED
    for i in tqdm(range(max(round(setting.batches * share), 1)), desc=f"{name}, {split}", unit="batch", leave=False):
        yield zoo.samples(name, setting.batch, split=split, seed=first + i)


def paint(pipe, sample: zoo.Sample, steps: int, reference: Tensor | None = None, **extra) -> Tensor:
    """Pictures ``[B, 3, H, W]`` in [-1, 1]; always from the same noise."""
    reference = sample.reference if reference is None else reference
    options = dict(num_inference_steps=steps, output_type="pt", generator=torch.Generator().manual_seed(SEED)) | extra
    if isinstance(pipe, zoo.SuperResolutionPipeline):
        return pipe(reference, **options).images * 2 - 1
    return pipe(sample.picture, sample.mask, reference, pose=sample.pose, **options).images * 2 - 1


def patches(pipe, sample: zoo.Sample) -> i2am.Reference:
    """Return the reference's tokens but the one that means "nothing"."""
    return i2am.Reference(grid=pipe.image_encoder.grid(*sample.reference.shape[-2:]), tokens=slice(1, None))


def patch_pixels(pipe, sample: zoo.Sample) -> float:
    """Return how many pixels of the reference a side of one of its tokens is apart from the next."""
    return sample.reference.shape[-1] / pipe.image_encoder.grid(*sample.reference.shape[-2:])[0]


def finest(maps: i2am.AttributionMaps) -> str:
    """Return the pattern of the finest decoder layers that were traced."""
    return zoo.finest_layers(maps.layers)


def traced(pipe, sample: zoo.Sample, steps: int, **options) -> tuple[Tensor, i2am.AttributionMaps]:
    """Pictures and their maps."""
    if not isinstance(pipe, zoo.SuperResolutionPipeline):
        options.setdefault("reference", patches(pipe, sample))
    with i2am.trace(pipe, time_groups=steps, **options) as tracer:
        pictures = paint(pipe, sample, steps)
    return pictures, tracer.maps()


@contextmanager
def muted(pipe, heads: dict[str, list[int]]):
    """Heads of cross-attention layers, by name, whose output is zero meanwhile."""
    handles = []
    for name, silent in heads.items():
        attention = pipe.unet.get_submodule(name)

        def silence(_, args, silent=tuple(silent), count=attention.heads):
            x = args[0].unflatten(-1, (count, -1)).clone()  # [B, N, heads, d]
            x[:, :, list(silent)] = 0
            return (x.flatten(-2),)

        handles.append(attention.to_out[0].register_forward_pre_hook(silence))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ----------------------------------------------------------------------------------------------------------- quality


def masked_error(pictures: Tensor, sample: zoo.Sample) -> Tensor:
    """``[B]`` mean squared error on the object, colours in [-1, 1]."""
    return masked_change(pictures, sample.picture, sample.object)


def masked_change(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return ((a - b).square() * mask).sum((1, 2, 3)).double() / (3 * mask.sum((1, 2, 3)))


def masked_ssim(pictures: Tensor, sample: zoo.Sample) -> Tensor:
    """``[B]`` structural similarity, averaged over the object's pixels (Wang et al. 2004, 7×7 windows)."""
    from skimage.metrics import structural_similarity

    scores = []
    for x, y, mask in zip(pictures, sample.picture, sample.object[:, 0], strict=True):
        _, each = structural_similarity(x.numpy(), y.numpy(), channel_axis=0, data_range=2.0, full=True)
        scores.append(each.mean(0)[mask.numpy() > 0.5].mean())
    return torch.tensor(scores, dtype=torch.float64)


def true_places(sample: zoo.Sample, grid: tuple[int, int]) -> Tensor:
    """``[B, h, w, 2]`` mean true source, in reference pixels, of cells that lie on the object wholly; else NaN."""
    cell = sample.picture.shape[-1] // grid[0]
    known = (~sample.source.isnan().any(-1)).float()[:, None]
    total = F.avg_pool2d(sample.source.nan_to_num(0).permute(0, 3, 1, 2) * known, cell)
    share = F.avg_pool2d(known, cell)
    places = (total / share.clamp_min(1e-6)).permute(0, 2, 3, 1)
    return places.masked_fill(share[:, 0, ..., None] < 0.999, float("nan"))


# --------------------------------------------------------------------------------------------------------- intervals


def interval(values, seed: int = 0) -> list[float]:
    """``[mean, low, high]``: 95 % of 2,000 bootstrap means over samples. Unknown (NaN) samples are left out."""
    x = np.asarray(values, dtype=np.float64).ravel()
    x = x[np.isfinite(x)]
    if x.size == 0:
        raise ValueError("no sample to average")
    picks = np.random.default_rng(seed).integers(x.size, size=(2000, x.size))
    low, high = np.quantile(x[picks].mean(1), [0.025, 0.975])
    return [float(x.mean()), float(low), float(high)]


def rank_correlation(a, b, seed: int = 0) -> list[float]:
    """``[Spearman's ρ, low, high]``: 95 % of 2,000 bootstrap draws of the pairs."""
    from scipy.stats import spearmanr

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(a.size, size=(2000, a.size))
    drawn = [spearmanr(a[d], b[d]).statistic for d in draws if np.ptp(a[d]) > 0 and np.ptp(b[d]) > 0]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return [float(spearmanr(a, b).statistic), float(low), float(high)]
