"""Losses over the read-outs of attention: they teach a model where to look, in O(N) memory.

Each takes vectors per query or key that ``i2am.attention(..., read=)`` or ``i2am.probe`` gives, and returns one number.
Coordinates are ``(y, x)`` in tokens, as in ``maps.sram((y, x))``: :func:`grid` writes them down.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["distil", "entropy", "flow", "grid", "inside", "matches", "photometric", "place", "variation"]

LEAST = 1e-6  # of a mass or a probability, so that a logarithm or a quotient of it stays finite


def grid(size: tuple[int, int], *, device: torch.device | str | None = None) -> Tensor:
    """Return the tokens' places ``[h·w, 2]``, ``(y, x)`` in tokens, row by row."""
    h, w = size
    if h < 1 or w < 1:
        raise ValueError(f"size must be a grid (h, w) of at least one token, got {size}")
    y, x = torch.arange(h, dtype=torch.float32, device=device), torch.arange(w, dtype=torch.float32, device=device)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), 2).flatten(0, 1)


def place(expected: Tensor, mass: Tensor | None = None) -> Tensor:
    """Return where in the reference each query looks, ``[B, H, Q, c]``: the expectation given that it looks there.

    ``expected`` sums coordinates over the reference keys only. Where these are some of all keys, divide by the mass.

    Args:
        expected: ``[B, H, Q, c]``.
        mass: ``[B, H, Q]``; None where the reference is every key.
    """
    if mass is None:
        return expected
    _check(mass, expected.shape[:3], "mass", "as expected without its last axis")
    return expected / mass.unsqueeze(3).clamp_min(LEAST)


def flow(
    expected: Tensor, target: Tensor, *, mass: Tensor | None = None, weight: Tensor | None = None, heads: bool = True
) -> Tensor:
    """Pull the expected place of each query towards its known place in the reference.

    ``mean_i w_i ‖e_i − t_i‖²`` with ``e`` the :func:`place`, averaged over heads first (``heads=True``) or each head
    by itself. Correspondence supervision by coordinates, as in Leffa (Zhou et al., 2024, arXiv 2412.08486), which
    warps the reference with the field instead: :func:`photometric`.

    Args:
        expected: ``[B, H, Q, c]`` read-out, on :func:`grid` coordinates of the reference keys.
        target: ``[Q, c]`` or ``[B, Q, c]`` known places.
        mass: ``[B, H, Q]`` read-out; None where the reference is every key.
        weight: ``[Q]`` or ``[B, Q]`` non-negative: which queries have a known place.
        heads: whether the heads' mean is compared, else every head.

    Raises:
        ValueError: shapes do not fit, or no query has weight.
    """
    e = place(expected, mass)
    e = e.mean(1, keepdim=True) if heads else e  # [B, 1 | H, Q, c]
    t = _batched(target.to(e), 3, e.shape[0], e.shape[2:], "target")
    off = (e - t.unsqueeze(1)).square().sum(3).mean(1)  # [B, Q]
    return _weighted(off, weight)


def photometric(
    expected: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    size: tuple[int, int],
    mass: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Warp the reference image with the attention's flow field, and compare it with the true picture.

    ``mean_i w_i ‖R(e_i) − I_i‖²``, R sampled bilinearly at the heads' mean place: Leffa (Zhou et al., 2024, arXiv
    2412.08486). Leffa reads places from a softmax at a raised temperature; here that is the op's own:
    pass ``scale / temperature`` as the attention's ``scale`` of the read-out, and the same ``temperature`` here, which
    multiplies the loss (as distillation does) so that the gradient in the logits keeps its size.

    Args:
        expected: ``[B, H, Q, 2]`` read-out, on :func:`grid` coordinates of the reference keys.
        reference: ``[B, C, Y, X]`` reference image; its corners' pixels belong to the grid's corner tokens.
        target: ``[B, C, Q]`` or ``[B, C, h, w]`` true picture at the queries.
        size: grid ``(h, w)`` of the reference keys.
        mass: ``[B, H, Q]`` read-out; None where the reference is every key.
        weight: ``[Q]`` or ``[B, Q]`` non-negative: where the comparison holds (a garment's mask).
        temperature: > 0, of the softmax that ``expected`` was read from, over the model's own.

    Raises:
        ValueError: shapes do not fit, or no query has weight.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    e = place(expected, mass).mean(1)  # [B, Q, 2]
    if e.shape[2] != 2:
        raise ValueError(f"expected must hold (y, x) places, got {e.shape[2]} coordinates")
    B, Q, _ = e.shape
    flat = target.flatten(2)
    _check(flat, (B, reference.shape[1], Q), "target", "[B, C, Q] with the reference's channels")
    scale = e.new_tensor([2 / max(1, size[0] - 1), 2 / max(1, size[1] - 1)])
    at = (e * scale - 1).flip(2).unsqueeze(2)  # [B, Q, 1, 2] as (x, y) from -1 to 1
    warped = F.grid_sample(reference.to(e), at, align_corners=True, padding_mode="border").squeeze(3)  # [B, C, Q]
    return temperature * _weighted((warped - flat.to(e)).square().mean(1), weight)


def variation(
    expected: Tensor, *, size: tuple[int, int], mass: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Ask that neighbouring queries look at neighbouring places: the total variation of the field of places.

    ``mean |e(y+1, x) − e(y, x)| + mean |e(y, x+1) − e(y, x)|`` of the heads' mean place, over pairs of neighbours that
    both have weight: the attention total variation loss of StableVITON (Kim et al., CVPR 2024, arXiv 2312.01725),
    whose places are centre coordinates of the cross-attention map.

    Args:
        expected: ``[B, H, h·w, c]`` read-out, on :func:`grid` coordinates of the reference keys.
        size: grid ``(h, w)`` of the queries.
        mass: ``[B, H, h·w]`` read-out; None where the reference is every key.
        weight: ``[h·w]`` or ``[B, h·w]`` non-negative (the garment's mask); a pair weighs as the product.

    Raises:
        ValueError: shapes do not fit, or no pair of neighbours has weight.
    """
    h, w = size
    e = place(expected, mass).mean(1)  # [B, Q, c]
    if e.shape[1] != h * w or h * w < 2:
        raise ValueError(f"expected holds {e.shape[1]} queries, but size={size} is a grid of {h * w}")
    field = e.reshape(e.shape[0], h, w, -1)  # [B, h, w, c]
    m = e.new_ones(e.shape[:2]) if weight is None else _batched(weight.to(e), 2, e.shape[0], (h * w,), "weight")
    m = m.expand(e.shape[0], -1).reshape(-1, h, w)
    total = e.new_zeros(())
    pairs = False
    for axis in (1, 2):
        n = field.shape[axis] - 1
        both = m.narrow(axis, 0, n) * m.narrow(axis, 1, n)  # [B, h', w']
        steps = (field.narrow(axis, 1, n) - field.narrow(axis, 0, n)).abs().sum(3)
        if n and bool(both.sum() > 0):
            total, pairs = total + (steps * both).sum() / both.sum(), True
    if not pairs:
        raise ValueError("weight leaves no two neighbouring queries: nothing to compare")
    return total


def matches(log_p: Tensor, log_c: Tensor | None = None, *, weight: Tensor | None = None) -> Tensor:
    """Raise the probability of known matches: cross entropy of pairs (query, key).

    ``−mean_m w_m ln P(m)``: one-sided, as SIFT-VTON (2026, arXiv 2605.01296) and CORAL (2026, arXiv 2602.17636)
    supervise attention with another detector's matches. With ``log_c`` the dual softmax of LoFTR (Sun et al., CVPR
    2021, arXiv 2104.00680): ``−mean_m w_m ln (P(m) C(m))``.

    Args:
        log_p: ``[B, H, M]`` read-out of ``pairs``.
        log_c: ``[B, H, M]`` read-out of the same pairs, or None.
        weight: ``[M]`` or ``[B, M]`` non-negative confidence.

    Raises:
        ValueError: shapes do not fit, no match has weight, or a match is masked out of the attention.
    """
    total = log_p if log_c is None else log_p + _check(log_c, log_p.shape, "log_c", "as log_p")
    if bool(total.detach().isneginf().any()):
        raise ValueError("a match is masked out of the attention (its logarithm is -inf): leave it out of pairs")
    return _weighted(-total.mean(1), weight)


def inside(share: Tensor, mask: Tensor, *, total: Tensor | None = None) -> Tensor:
    """Ask that attention lies inside a mask: ``−ln`` of the share that does, averaged over images and heads.

    One functional of three read-outs: ``r2g`` and a mask of the picture (what the reference influenced), ``g2r`` or
    ``sram`` and a mask of the reference (what was looked at), ``mass`` and a mask of the picture (who looks at the
    reference). In-mask shares are what FastComposer (Xiao et al., 2023, arXiv 2305.10431) and TokenCompose (Wang et
    al., CVPR 2024, arXiv 2312.03626: squared ``1 − share``) train; the logarithm does not fade at shares
    near 0.

    Args:
        share: ``[B, H, N]`` non-negative.
        mask: ``[N]`` or ``[B, N]`` in 0…1.
        total: ``[B, H]`` what the share is of; default: the sum of ``share`` itself.

    Raises:
        ValueError: shapes do not fit, or the mask is empty.
    """
    m = _batched(mask.to(share), 2, share.shape[0], share.shape[2:], "mask")
    if not bool((m.detach().sum(1) > 0).all()):
        raise ValueError("mask is empty: nothing can lie inside")
    part = (share * m.unsqueeze(1)).sum(2)  # [B, H]
    whole = share.sum(2) if total is None else _check(total, part.shape, "total", "[B, H]")
    return -(part / whole.clamp_min(LEAST)).clamp_min(LEAST).log().mean()


def entropy(spread: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Ask that every query looks at few keys: the mean entropy of its attention, in nats.

    As CORAL (2026, arXiv 2602.17636) sharpens its attention. Subtract it from the objective to blur instead.

    Args:
        spread: ``[B, H, Q]`` read-out ``entropy``.
        weight: ``[Q]`` or ``[B, Q]`` non-negative.
    """
    return _weighted(spread.mean(1), weight)


def distil(student: Tensor, teacher: Tensor) -> Tensor:
    """Teach one model another's map: ``KL(teacher ‖ student)`` of maps that are made to sum to 1.

    Attention transfer (Zagoruyko & Komodakis, ICLR 2017, arXiv 1612.03928) with a divergence for the
    distance: of ``r2g``, ``g2r``, ``mass`` or ``sram``, whatever the heads: maps are averaged over them first.

    Args:
        student: ``[B, H, …, N]`` non-negative.
        teacher: ``[B, H', …, N]`` non-negative; it gets no gradient.
    """
    s, t = student.mean(1), teacher.detach().to(student).mean(1)
    _check(t, s.shape, "teacher", "as student, but for the heads")
    s, t = s.clamp_min(LEAST * LEAST), t.clamp_min(LEAST * LEAST)
    s, t = s / s.sum(-1, keepdim=True), t / t.sum(-1, keepdim=True)
    return (t * (t / s).log()).sum(-1).mean()


def _batched(x: Tensor, ndim: int, batch: int, rest: torch.Size | tuple[int, ...], name: str) -> Tensor:
    """Return ``x [1 | B, *rest]``, given with or without its batch axis."""
    full = x.unsqueeze(0) if x.ndim == ndim - 1 else x
    if full.ndim != ndim or full.shape[0] not in (1, batch) or tuple(full.shape[1:]) != tuple(rest):
        raise ValueError(f"{name} must be {list(rest)} or [{batch}, …] of it, got {list(x.shape)}")
    return full


def _check(x: Tensor, shape: torch.Size | tuple[int, ...], name: str, what: str) -> Tensor:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must be {what}, {list(shape)}; got {list(x.shape)}")
    return x


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return the mean of ``x [B, N]`` under ``weight [N]`` or ``[B, N]``: every image counts the same."""
    if weight is None:
        return x.mean()
    w = _batched(weight.to(x), 2, x.shape[0], x.shape[1:], "weight").expand_as(x)
    total = w.sum(1)
    if bool((w < 0).any()) or not bool((total > 0).any()):
        raise ValueError("weight must be non-negative and not zero everywhere")
    some = total > 0  # an image without any weight does not count
    return ((x * w).sum(1)[some] / total[some]).mean()
