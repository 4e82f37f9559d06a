"""Adding up partials, at sizes beyond one program's block (512 entries)."""

import pytest
import torch

from i2am.kernels import accumulate, tiles
from tests.kernels.test_attention import check, check_accumulate, leveled, qkv, regions

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's log2(0) is meant


@pytest.mark.parametrize(("Q", "K"), [(20, accumulate.BLOCK + 188), (accumulate.BLOCK + 39, 20)])
def test_sums_of_several_blocks(Q, K, monkeypatch):
    """SRAM and G2R of more keys than a block has entries, R2G and mass of more queries; no multiple of it."""
    monkeypatch.setattr(tiles, "FEW_KEYS", 0)
    check_accumulate(*qkv(Q + 5, K + 9, d=16, H=1), [slice(5, K + 5)], regions(1, 2, Q), queries=slice(3, Q + 3))


def test_columns_taken_afresh_for_queries_across_splits(monkeypatch):
    """Columns too far below their rows, of queries that begin within a split's tile and end within another's."""
    monkeypatch.setattr(tiles, "FEW_KEYS", 0)
    monkeypatch.setattr(tiles, "CPU_PROGRAMS", 64)
    levels = torch.zeros(77)
    levels[::2] = -60.0
    q, k, v = leveled(210, 77, torch.zeros(210), levels)
    check(q, k, v, queries=slice(37, 171), keys=slice(3, 70), scale=1.0)
