"""Scores of attribution maps: against masks, against true correspondences, and against the model itself.

Everything is computed in float64. "map" arguments are tensors or arrays ``[h, w]`` or ``[B, h, w]`` of any scale and
dtype unless a function says otherwise. Masks belong to the picture that the map lies on: a PIL image, or a tensor or
array ``[H, W]``, ``[H, W, 1]`` or a batch. Bool and floats are 0…1, integers 0 and 1 or the range of their 8 or 16
bits. Masks whose values have no known meaning (labels, colours, transparency) are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from i2am._images import as_array, is_pil, read_mask

if TYPE_CHECKING:
    from i2am.detect import Box

MapLike = Any  # a tensor or array [h, w] or [B, h, w]
MaskLike = Any  # a PIL image, a tensor or an array [H, W] or [B, H, W]
OUTSIDE_WEIGHT = 3.0
THRESHOLD = 0.4


def imacs(map: MapLike, mask: MaskLike, *, complement: bool = False, premultiply: bool = False) -> Tensor:
    """Score how well a map keeps to a mask: IMACS (Park & Jang, ICLR 2025, section 3.4).

    The map is min-max normalised, resized to the mask (bicubic), normalised again, and values up to 0.4 are set to 0:
    ``IMACS = Σ a·m / Σ m − 3 · Σ a·(1−m) / Σ (1−m)``. R2G is scored with the inpainting region, G2R with the mask of
    the reference object.

    Args:
        map: ``[h, w]`` or ``[B, h, w]``, any scale. A constant map scores 0.
        mask: ``[H, W]`` or ``[B, H, W]``, a PIL image, tensor or array, 0…1 by its kind; soft values are weights. Where
            it is 1 everywhere, the outside term is 0.
        complement: score ``max − map`` instead, as the authors' published script does for R2G.
        premultiply: multiply the resized map by the mask first, as that script does for G2R; the outside term is
            then 0.

    Returns:
        a scalar, or ``[B]``; in [-3, 1], higher is better.

    Raises:
        ValueError: an empty mask, values that are not finite or outside [0, 1], or shapes that don't fit.
    """
    a, m, single = _checked(map, mask)
    a = _min_max(-a if complement else a)
    a = F.interpolate(a[:, None], m.shape[-2:], mode="bicubic", align_corners=False)[:, 0]
    a = _min_max(a * m if premultiply else a)
    a = torch.where(a > THRESHOLD, a, 0.0)
    outside = (1 - m).sum((1, 2))
    leaked = (a * (1 - m)).sum((1, 2)) / outside.clamp_min(torch.finfo(outside.dtype).tiny)
    score = (a * m).sum((1, 2)) / m.sum((1, 2)) - OUTSIDE_WEIGHT * leaked
    return score[0] if single else score


# ------------------------------------------------------------------------------------------------------ localisation


def mask_iou(map: MapLike, mask: MaskLike, threshold: float = THRESHOLD) -> Tensor:
    """Score the overlap of the thresholded map with a mask, intersection over union.

    The map is resized to the mask (bicubic) and min-max normalised; what exceeds ``threshold`` counts, as do mask
    values above 0.5. A constant map marks nothing and scores 0.

    Args:
        map, mask: as in :func:`imacs`.
        threshold: of the normalised map, in (0, 1).

    Returns:
        a scalar, or ``[B]``; in [0, 1].

    Raises:
        ValueError: as :func:`imacs`; or a threshold outside (0, 1).
    """
    hot, inside, single = _hot(map, mask, threshold)
    return _unbatched(_overlap(hot, inside), single)


def mean_iou(map: MapLike, mask: MaskLike, threshold: float = THRESHOLD) -> Tensor:
    """Score the mIoU over the two classes, inside and outside: the mean of both :func:`mask_iou`.

    A map that marks nothing still earns the outside's share, so read it beside that. A mask without an outside has
    one class only. Arguments, errors and range as :func:`mask_iou`.
    """
    hot, inside, single = _hot(map, mask, threshold)
    has_outside = (~inside).flatten(1).any(1)
    score = _overlap(hot, inside)
    return _unbatched(torch.where(has_outside, (score + _overlap(~hot, ~inside)) / 2, score), single)


def box_iou(found: Sequence[Box | None], truth: Sequence[Box]) -> Tensor:
    """Return ``[B]`` intersection over union of boxes, pair by pair; nothing found (None) scores 0.

    Raises:
        ValueError: lists of different lengths, or a true box without area.
    """
    if len(found) != len(truth):
        raise ValueError(f"{len(found)} boxes found, but {len(truth)} true ones")
    for box in truth:
        if box.bottom <= box.top or box.right <= box.left:
            raise ValueError(f"a true box needs an area, got {box}")
    return torch.tensor(
        [0.0 if f is None else f.iou(t) for f, t in zip(found, truth, strict=True)], dtype=torch.float64
    )


def pointing_game(map: MapLike, mask: MaskLike, tolerance: int = 0) -> Tensor:
    """Return 1 where the map's maximum lies on the object, else 0 ("Top-down neural attention", IJCV 2018).

    Several equal maxima share the point: the answer is the part of them that lies on the object, so that a constant
    map scores the object's area and gains nothing by its first pixel's place.

    Args:
        map, mask: as in :func:`imacs`; the map is resized to the mask (bicubic).
        tolerance: pixels of the mask by which a miss still counts (the source: 15, on photographs).

    Returns:
        a scalar, or ``[B]``; in [0, 1].
    """
    if tolerance < 0:
        raise ValueError(f"tolerance is a number of pixels, at least 0, got {tolerance}")
    a, m, single = _paired(map, mask)
    inside = (m > 0.5).double()[:, None]
    if tolerance:
        inside = F.max_pool2d(inside, 2 * tolerance + 1, 1, tolerance)
    peak = (a == a.amax((1, 2), keepdim=True)).double()
    return _unbatched((peak * inside[:, 0]).sum((1, 2)) / peak.sum((1, 2)), single)


def contrast(map: MapLike, mask: MaskLike) -> Tensor:
    """Return the mean of the map inside the mask over its mean outside: 1 says nothing, ``inf``: nothing is outside.

    Args:
        map: ``[h, w]`` or ``[B, h, w]``, not negative. It is resized to the mask (bicubic, clamped at 0).
        mask: as in :func:`imacs`, with an outside.

    Returns:
        a scalar, or ``[B]``; at least 0. A map that is 0 everywhere has no contrast and scores 1.

    Raises:
        ValueError: as :func:`imacs`; also a negative map, or a mask without outside.
    """
    low = float(_read_map(map)[0].min())
    if low < 0:
        raise ValueError(f"contrast compares means, so the map must not be negative; its minimum is {low:g}")
    a, m, single = _paired(map, mask)
    if ((1 - m).sum((1, 2)) == 0).any():
        raise ValueError("full mask: contrast compares inside with outside, and there is no outside")
    a = a.clamp_min(0)
    inside = (a * m).sum((1, 2)) / m.sum((1, 2))
    outside = (a * (1 - m)).sum((1, 2)) / (1 - m).sum((1, 2))
    return _unbatched(torch.where(inside + outside == 0, 1.0, inside / outside), single)


def ranking_auc(map: MapLike, mask: MaskLike) -> Tensor:
    """Compute the area under the ROC curve: how often a pixel inside the mask outranks one outside, at any threshold.

    Ties count half, so a constant map scores 0.5.

    Args:
        map, mask: as in :func:`imacs`; the map is resized to the mask (bicubic), mask values above 0.5 are inside.

    Returns:
        a scalar, or ``[B]``; in [0, 1].

    Raises:
        ValueError: as :func:`imacs`; also a mask without inside or outside.
    """
    from scipy.stats import rankdata

    a, m, single = _paired(map, mask)
    inside = (m > 0.5).flatten(1)
    n = inside.sum(1).double()
    if (n == 0).any() or (n == inside.shape[1]).any():
        raise ValueError("ranking_auc compares inside with outside: the mask must have both")
    ranks = torch.from_numpy(rankdata(a.flatten(1).numpy(), axis=1))
    score = ((ranks * inside).sum(1) - n * (n + 1) / 2) / (n * (inside.shape[1] - n))
    return _unbatched(score, single)


# ---------------------------------------------------------------------------------------------------- correspondence


def correspondence_error(found: Tensor, truth: Tensor, scale: float | tuple[float, float] = 1.0) -> Tensor:
    """Return the distance between found and true places: what :meth:`AttributionMaps.match` is worth.

    Args:
        found: ``[..., 2]`` places ``(y, x)``, in reference tokens as ``match`` gives them.
        truth: ``[..., 2]`` true places in pixels; NaN where there is none.
        scale: pixels per token, or ``(vertical, horizontal)``.

    Returns:
        ``[...]`` Euclidean distances in pixels; NaN where there is no truth.

    Raises:
        ValueError: shapes that don't fit, or a found place that is not finite.
    """
    if found.shape != truth.shape or found.shape[-1] != 2:
        raise ValueError(f"found and truth must be [..., 2] alike, got {tuple(found.shape)} and {tuple(truth.shape)}")
    if not found.isfinite().all():
        raise ValueError("a place that was found must be finite")
    apart: Tensor = found.double() * torch.as_tensor(scale, dtype=torch.float64) - truth.double()
    distance: Tensor = torch.linalg.vector_norm(apart, dim=-1)
    return distance


def pck(error: Tensor, threshold: float) -> Tensor:
    """Return the share of correct keypoints (PCK): errors up to ``threshold`` (same unit) among the known ones.

    Raises:
        ValueError: no error is known, or the threshold is negative.
    """
    if threshold < 0:
        raise ValueError(f"the threshold is a distance, at least 0, got {threshold}")
    known = error[error.isfinite()]
    if known.numel() == 0:
        raise ValueError("no error is known: every place is NaN")
    return (known <= threshold).double().mean()


# ------------------------------------------------------------------------------------------------------ faithfulness

ORDERS = ("map", "opposite", "random")


def removal_curve(
    map: Tensor,
    change: Callable[[Tensor], Tensor],
    *,
    shares: Sequence[float] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0),
    order: str = "map",
    insertion: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Measure how the output changes as cells go in the order a map gives (Petsiuk et al., RISE, BMVC 2018).

    Deletion takes the highest cells first, from nothing to ``shares[-1]`` of them: of a faithful map the change rises
    at once. Insertion starts with everything taken away and gives the highest back first: the change falls at once.
    Compare with the opposite and with a random order of the same cells.

    Args:
        map: ``[B, h, w]``. Equal values keep the order of a random draw, not that of the scan lines.
        change: ``removed [B, h, w] bool`` → ``[B]``: how much the output differs without these cells, any unit.
        shares: of the cells that are taken (or given back), rising, in [0, 1].
        order: "map", "opposite" or "random".
        insertion: give back instead of taking away.
        generator: of the random draws.

    Returns:
        ``[B, len(shares)]`` changes, float64; ``area(curve, shares)`` is the AUC.

    Raises:
        ValueError: not a batch of finite maps, shares that do not rise in [0, 1], an unknown order, or a ``change``
            that does not answer ``[B]``.
    """
    if map.ndim != 3 or not map.isfinite().all():
        raise ValueError(f"removal_curve takes finite maps [B, h, w], got shape {tuple(map.shape)}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    _check_shares(shares)
    B, cells = map.shape[0], map.shape[1] * map.shape[2]
    draw = torch.rand(B, cells, generator=generator).argsort(1)
    if order == "random":
        rank = draw.argsort(1)
    else:
        values = map.flatten(1).double() if order == "map" else -map.flatten(1).double()
        shuffled = values.gather(1, draw).argsort(dim=1, descending=True, stable=True)
        rank = draw.gather(1, shuffled).argsort(1)
    curve = []
    for share in shares:
        chosen = rank < round(share * cells)
        removed = (~chosen if insertion else chosen).reshape(map.shape)
        answer = torch.as_tensor(change(removed)).detach().double().cpu()
        if answer.shape != (B,):
            raise ValueError(f"change must answer one number a map, [{B}], got {tuple(answer.shape)}")
        curve.append(answer)
    return torch.stack(curve, dim=1)


def area(curve: Tensor, shares: Sequence[float]) -> Tensor:
    """Return the area under curves ``[..., len(shares)]`` (trapezoids), per unit of share: the curve's mean height.

    Raises:
        ValueError: shares that do not rise in [0, 1], or as many as the curve has points.
    """
    _check_shares(shares)
    if curve.shape[-1] != len(shares):
        raise ValueError(f"a curve of {curve.shape[-1]} points, but {len(shares)} shares")
    x = torch.tensor(shares, dtype=torch.float64)
    return torch.trapezoid(curve.double(), x, dim=-1) / (x[-1] - x[0])


def _check_shares(shares: Sequence[float]) -> None:
    rising = all(a < b for a, b in pairwise(shares))
    if len(shares) < 2 or not rising or shares[0] < 0 or shares[-1] > 1:
        raise ValueError(f"shares must be at least two, rise, and lie in [0, 1], got {tuple(shares)}")


# ----------------------------------------------------------------------------------------------------------- helpers


def _paired(map: MapLike, mask: MaskLike) -> tuple[Tensor, Tensor, bool]:
    """Return maps on the masks' grid and masks, ``[B, H, W]`` float64, and whether there was only one of each."""
    a, m, single = _checked(map, mask)
    if a.shape[-2:] != m.shape[-2:]:
        flat = a.amax((1, 2), keepdim=True) == a.amin((1, 2), keepdim=True)  # resizing would add rounding to it
        a = torch.where(flat, a[:, :1, :1], F.interpolate(a[:, None], m.shape[-2:], mode="bicubic")[:, 0])
    B = max(len(a), len(m))
    return a.expand(B, -1, -1), m.expand(B, -1, -1), single


def _hot(map: MapLike, mask: MaskLike, threshold: float) -> tuple[Tensor, Tensor, bool]:
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie in (0, 1), got {threshold}")
    a, m, single = _paired(map, mask)
    return _min_max(a) > threshold, m > 0.5, single


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    union = (a | b).sum((1, 2)).double()
    return torch.where(union > 0, (a & b).sum((1, 2)) / union.clamp_min(1), 1.0)


def _unbatched(score: Tensor, single: bool) -> Tensor:
    return score[0] if single else score


def _checked(map: Any, mask: Any) -> tuple[Tensor, Tensor, bool]:
    """Return maps and masks as ``[B, h, w]`` float64, and whether there was only one of each."""
    a, single_map = _read_map(map)
    m, single_mask = read_mask(mask)
    m = m.double()
    if len(a) != len(m) and 1 not in (len(a), len(m)):
        raise ValueError(f"{len(a)} maps, but {len(m)} masks")
    if (m.sum((1, 2)) == 0).any():
        raise ValueError("empty mask: there is no inside to compare with the outside")
    return a, m, single_map and single_mask


def _read_map(map: Any) -> tuple[Tensor, bool]:
    """Return maps as finite ``[B, h, w]`` float64, and whether one alone was given."""
    x = None if is_pil(map) else as_array(map)
    if x is None or x.ndim not in (2, 3) or not x.size:
        shape = type(map).__name__ if x is None else f"shape {x.shape}"
        raise ValueError(f"a map must be [h, w] or [B, h, w], got {shape}")
    a = torch.from_numpy(x.astype(np.float64)).reshape(-1, *x.shape[-2:])
    broken = int((~a.isfinite()).sum())
    if broken:
        raise ValueError(
            f"the map is not finite: {broken} of its {a.numel()} values are NaN or infinite. A level is NaN for a time "
            "group in which nothing ran; maps.not_finite() names layers whose own sums are not finite"
        )
    return a, x.ndim == 2


def _min_max(x: Tensor) -> Tensor:
    """Scale ``[B, h, w]`` to [0, 1] each; a constant one becomes 0."""
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny), 0.0)
