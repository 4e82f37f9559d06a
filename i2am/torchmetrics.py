"""Scores of maps as ``torchmetrics.Metric`` classes, for loops of one's own: ``pip install "i2am[torchmetrics]"``.

::

    imacs = IMACS()
    for maps, masks in batches:
        imacs.update(maps, masks)
    imacs.compute()

Each keeps the sum of its scores as a whole number, and how many there were: what comes out is the mean over samples,
bit by bit the same however they are split into batches or over processes, and whatever dtype the model is cast to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from torchmetrics import Metric
except ImportError as error:
    if error.name != "torchmetrics":  # it is there, and does not import: its own words say why
        raise
    raise ImportError('torchmetrics is not installed: pip install "i2am[torchmetrics]"', name=error.name) from error

from i2am._images import read_mask
from i2am.detect import Box, box_of, check_threshold, detect_box
from i2am.metrics import box_iou, imacs

__all__ = ["IMACS", "BoxIoU"]

UNIT = 2.0**-32  # of the sums: 2^63 of them hold 700 million scores of -3 … 1


class _MeanOverSamples(Metric):
    """Mean of one score a sample, summed over processes before it is divided.

    int64 sums: torchmetrics casts floats with the model (``.to(torch.bfloat16)``), and MPS has no float64.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def set_dtype(self, dst_type: str | torch.dtype) -> _MeanOverSamples:
        """Return the metric as it is: its sums are exact in int64 only."""
        return self

    def compute(self) -> Tensor:
        """Return the mean over all samples of all processes: a float32 scalar on the metric's device.

        Raises:
            ValueError: there was none.
        """
        if not self.count:
            raise ValueError(f"{type(self).__name__} has seen no sample: call update(maps, masks) before compute()")
        mean = int(self.total) * UNIT / int(self.count)
        return torch.tensor(mean, dtype=torch.float32, device=self.count.device)

    def _add(self, scores: Tensor) -> None:
        """Take in the scores of a batch, ``[B]`` or a scalar."""
        self.total += int((scores.double() / UNIT).round().long().sum())
        self.count += scores.numel()


class IMACS(_MeanOverSamples):
    """Mean IMACS over samples: how well maps keep to masks, in [-3, 1]; see :func:`i2am.metrics.imacs`.

    Args:
        complement, premultiply: as there.
        **kwargs: of ``torchmetrics.Metric``.
    """

    plot_lower_bound, plot_upper_bound = -3.0, 1.0

    def __init__(self, *, complement: bool = False, premultiply: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.complement, self.premultiply = complement, premultiply

    def update(self, maps: Any, masks: Any) -> None:
        """Score a batch; nothing is added where anything in it is refused.

        Args:
            maps: ``[B, h, w]`` (or one, ``[h, w]``), of any scale and dtype: ``tracer.maps().ulam("r2g")``.
            masks: ``[B, H, W]`` or ``[B, 1, H, W]`` (or one for all), as :func:`i2am.metrics.imacs` takes them.

        Raises:
            ValueError: as there.
        """
        self._add(imacs(maps, masks, complement=self.complement, premultiply=self.premultiply))


class BoxIoU(_MeanOverSamples):
    """Mean intersection over union of the boxes found in R2G maps with the true ones, in [0, 1]; none found counts 0.

    Args:
        threshold, smallest: as in :func:`i2am.detect_box`.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: a threshold that is neither "otsu" nor in (0, 1).
    """

    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def __init__(self, *, threshold: float | str = "otsu", smallest: float = 0.01, **kwargs: Any) -> None:
        check_threshold(threshold)
        super().__init__(**kwargs)
        self.threshold, self.smallest = threshold, smallest

    def update(
        self,
        maps: Any,
        masks: Any = None,
        *,
        boxes: Tensor | Sequence[Sequence[int]] | Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Score a batch; nothing is added where anything in it is refused.

        Args:
            maps: ``[B, h, w]`` (or one, ``[h, w]``), not negative.
            masks: ``[B, H, W]`` or ``[B, 1, H, W]`` (or one for all): the true box is that of their pixels of at least
                one half, and maps are resized to them.
            boxes: the true ones instead, ``[B, 4]`` or ``[4]``: top, left, bottom, right in pixels of ``size``.
            size: ``(height, width)`` of the picture that ``boxes`` lie in. None: the masks', or else the maps'.

        Raises:
            ValueError: neither masks nor boxes; as many boxes or masks as maps are needed; a box without area, an empty
                mask; a size beside masks; what :func:`i2am.detect_box` refuses.
        """
        if masks is None and boxes is None:
            raise ValueError("BoxIoU compares with masks or with boxes: give one of them")
        if masks is not None and size is not None:
            raise ValueError(f"size={size} beside masks: maps are resized to the masks, and boxes lie in them")
        inside = None if masks is None else read_mask(masks)[0]
        found = detect_box(
            maps,
            size=size if inside is None else (inside.shape[1], inside.shape[2]),
            threshold=self.threshold,
            smallest=self.smallest,
        )
        several = found if isinstance(found, list) else [found]
        if inside is not None:
            _check_count(len(several), len(inside), "masks")
        truth = _read_boxes(boxes) if boxes is not None else [] if inside is None else [box_of(m) for m in inside]
        _check_count(len(several), len(truth), "true boxes")
        self._add(box_iou(several, truth * (len(several) // len(truth))))


def _check_count(maps: int, others: int, what: str) -> None:
    """Refuse a batch whose maps have neither one companion each nor one for all."""
    if others not in (1, maps):
        raise ValueError(f"{maps} maps, but {others} {what}")


def _read_boxes(boxes: Any) -> list[Box]:
    """Read boxes ``[B, 4]`` or ``[4]``: tensors, arrays, or (lists of) four numbers."""
    try:
        x = torch.as_tensor(boxes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"boxes must be [B, 4]: top, left, bottom, right; got {boxes!r}") from error
    if x.ndim not in (1, 2) or x.shape[-1] != 4 or not x.numel() or x.is_complex() or not x.isfinite().all():
        raise ValueError(f"boxes must be [B, 4]: top, left, bottom, right, finite; got {x.tolist()!r:.200}")
    return [Box(*row) for row in x.reshape(-1, 4).tolist()]
