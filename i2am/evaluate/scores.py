"""The scores of one sample, from its unified maps and masks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from i2am.detect import Box, box_of, detect_box
from i2am.metrics import imacs

MEANING = {  # score → (title, what it says)
    "imacs_r2g": ("IMACS of R2G", "inside the inpainted region; −3 … 1, higher is better"),
    "imacs_g2r": ("IMACS of G2R", "inside the reference's object; −3 … 1, higher is better"),
    "box_iou": ("Box IoU", "of the object found in R2G with the true box; 0 … 1, nothing found counts 0"),
}


def score(
    r2g: Tensor,
    g2r: Tensor | None,
    mask: np.ndarray | Tensor | None = None,
    reference_mask: np.ndarray | Tensor | None = None,
    box: Box | None = None,
) -> dict[str, float]:
    """Compute the scores that the masks allow.

    Args:
        r2g, g2r: unified maps ``[h, w]``; None: there is no G2R.
        mask: ``[H, W]`` in 0…1, the inpainted region.
        reference_mask: ``[H, W]`` in 0…1, the object on the reference.
        box: the true object's, in the mask's pixels (without a mask, the map's). None: the mask's.

    Returns:
        ``{name: value}``, names as in ``MEANING``.

    Raises:
        ValueError: a mask is empty, or outside 0…1.
    """
    scores = {}
    if mask is not None:
        mask = torch.as_tensor(mask)
        scores["imacs_r2g"] = float(imacs(r2g, mask))
    if g2r is not None and reference_mask is not None:
        scores["imacs_g2r"] = float(imacs(g2r, torch.as_tensor(reference_mask)))
    if mask is not None or box is not None:
        found = detect_box(r2g, size=None if mask is None else tuple(mask.shape))
        scores["box_iou"] = 0.0 if found is None else found.iou(box_of(mask) if box is None else box)
    return scores
