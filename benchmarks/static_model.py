"""A model of time from counts, held against published rates, and what it predicts for i2am: nothing was measured here.

**The model.** A tile's clocks are those of its matrix products plus those of the busiest other pipe (exponentials,
multiply-adds, shared memory, issue slots, …), all at the processor's peak rates::

    clocks = max(tensor + max(other pipes), bytes from the second-level cache / its share)

That is: products overlap with nothing but loads, everything else overlaps perfectly. Launches, the tail of the grid,
the columns' merge between the passes and the reading of ``q``, ``k``, ``v`` from main memory are left out; all are
linear in the tokens, or less. It has no free parameter, and :data:`PUBLISHED` is what it is held against.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

SCORES = 8192  # 128 × 64
PROCESSORS, CLOCK = 132, 1.83e9  # H100 80GB SXM5, at the fixed clock of the published figures
L2_BYTES = 5120  # a clock, of the whole GPU: what NVIDIA's A100 paper says; nothing is said to have become less since

# TFLOP/s of a forward on an H100 SXM5, fp16, not causal, 16,384 tokens, by head dim. Figure 5 of "FlashAttention-3:
# Fast and Accurate Attention with Asynchrony and Low-precision", arXiv 2407.08608v2; its appendix names the versions:
# CUDA 12.3, cuDNN 9.1.1.17, FlashAttention 2.5.8, Triton nightly 3.0.0.post20240424212437, a clock of 1,830 MHz.
PUBLISHED = {
    "FlashAttention-3": {64: 497, 128: 648},
    "cuDNN 9.1": {64: 413, 128: 595},
    "Triton's tutorial": {64: 403, 128: 395},
    "FlashAttention-2": {64: 324, 128: 370},
}
# The same tutorial kernel at d = 128 in pytorch/benchmark (commit ff65cb6, July 2024), where FlashAttention-3 has 621.
TUTORIAL_LATER = {128: 477}
FASTEST, USUAL = "FlashAttention-3", "FlashAttention-2"  # PyTorch's usual choice on Hopper: flash before cuDNN
GOALS = {(FASTEST, 64): 1.9, (FASTEST, 128): 1.65, (USUAL, 128): 1.5}


class Prediction(NamedTuple):
    """Clocks of one processor for 128 × 64 scores."""

    tensor: float
    other: float
    loads: float = 0.0

    @property
    def clocks(self) -> float:
        return max(self.tensor + self.other, self.loads)


def clocks(tflops: float, d: int) -> float:
    """Return the clocks of one processor for SCORES scores at a forward's rate."""
    return 4 * d * SCORES * PROCESSORS * CLOCK / (tflops * 1e12)


def published(name: str, d: int) -> float:
    """Return the published clocks of a forward."""
    return clocks(PUBLISHED[name][d], d)


def predict(pipes: Mapping[str, float], loads: float = 0.0) -> Prediction:
    """Predict one kernel from the clocks of its pipes and of its loads."""
    return Prediction(pipes["tensor"], max(value for pipe, value in pipes.items() if pipe != "tensor"), loads)


def loads(operands: int, d: int, rows: int) -> float:
    """Return the clocks for what passes by a tile of ``rows``: so many 16-bit operands of d features a column."""
    return operands * 2 * d * SCORES / rows / (L2_BYTES / PROCESSORS)


def floor(d: int) -> float:
    """Return what three products and two exponentials a score take one after another: no fused kernel can do better."""
    return 3 * d * SCORES / 2048 + 2 * SCORES / 16
