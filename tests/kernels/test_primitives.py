"""What one tile goes through, by itself. Interpreted on CPU."""

import pytest
import torch
import triton
import triton.language as tl

from i2am.kernels.primitives import sum_columns
from tests.kernels.test_attention import DEVICE


@triton.jit
def sum_columns_kernel(x, out, BM: tl.constexpr, BN: tl.constexpr, LANE_ROWS: tl.constexpr):
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    tl.store(out + o_n, sum_columns(tl.load(x + o_m[:, None] * BN + o_n[None, :]), BM, BN, LANE_ROWS))


@pytest.mark.parametrize(
    ("BM", "BN", "LANE_ROWS"),
    [
        (128, 128, 64),
        (128, 64, 64),
        (128, 32, 64),
        (128, 64, 32),
        (64, 128, 32),
        (64, 16, 32),
        (32, 64, 32),
        (64, 64, 0),
    ],
)
def test_columns_are_summed_whatever_lies_in_which_thread(BM, BN, LANE_ROWS):
    """Tiles of every table on Hopper; small integers, so that each order of additions gives the same."""
    x = torch.randint(-8, 9, (BM, BN), device=DEVICE).float()
    out = torch.empty(BN, device=DEVICE)
    sum_columns_kernel[(1,)](x, out, BM, BN, LANE_ROWS)
    assert torch.equal(out, x.sum(0))
