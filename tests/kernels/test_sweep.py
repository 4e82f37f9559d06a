"""The thin sweeps behind somebody else's attention, against the float64 definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from i2am.kernels import tiles
from i2am.ops import Sums, accumulate, beside
from tests.helpers.interpreter_watch import watched
from tests.kernels.test_attention import DEVICE, assert_close, leveled, qkv, regions, strided

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's log2(0) is meant


def check(q, k, references, weights=None, mass=True, queries=slice(None), attn_mask=None, scale=None, tolerance=2e-5):
    """``sweeps`` adds to sums that are not empty what the twin adds to empty ones."""
    (B, H, Nq, d), Nk = q.shape, k.shape[2]
    Q, R = len(range(Nq)[queries]), 0 if weights is None else weights.shape[1]
    sums, truth = [], []
    for keys in references:
        K = len(range(Nk)[keys])
        shapes = [(B, H, Q), (B, H, K), (B, H, Q) if mass else None, (B, H, R, K) if R else None]
        sums.append(Sums(*(None if shape is None else strided(*shape) for shape in shapes)))
        truth.append(Sums(*(None if shape is None else torch.zeros(shape, device=DEVICE) for shape in shapes)))
    start = [[None if x is None else x.clone() for x in each] for each in sums]
    arguments = {"queries": queries, "keys": references, "regions": weights, "attn_mask": attn_mask, "scale": scale}
    _, row, want_cols = accumulate(q, k, None, sums=truth, backend="reference", **arguments)
    spans = [(range(Nk)[keys].start, range(Nk)[keys].stop) for keys in references]
    chosen = range(Nq)[queries]
    cols = beside.sweeps(
        q,
        k,
        row.float(),
        scale=d**-0.5 if scale is None else scale,
        mask=None if attn_mask is None else attn_mask.expand(B, H, Nq, Nk),
        regions=weights,
        queries=(chosen.start, chosen.stop),
        keys=spans,
        sums=sums,
    )
    for got, want, before, col, want_col in zip(sums, truth, start, cols, want_cols, strict=True):
        assert_close("col_lse", col, want_col, max(tolerance, 1e-5))
        for name, x, y, z in zip(got._fields, got, want, before, strict=True):
            if x is not None:
                assert_close(name, x - z, y, tolerance)


@pytest.mark.parametrize(("Nq", "Nk", "d"), [(1, 2, 40), (65, 77, 40), (130, 257, 64), (257, 33, 72)])
def test_sizes(Nq, Nk, d):
    q, k, _ = qkv(Nq, Nk, d=d)
    check(q, k, [slice(0, Nk), slice(1, Nk)], mass=False)


@pytest.mark.parametrize("programs", [1, 64])
def test_spans_mass_and_regions(programs, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_PROGRAMS", programs)
    q, k, _ = qkv(130, 77, B=2, dtype=torch.float16)
    check(q, k, [slice(40, 77), slice(3, 50)], regions(2, 3, 120), queries=slice(5, 125))


@pytest.mark.parametrize("kind", ["bool", "additive", "padding"])
def test_masks(kind):
    mask = {
        "bool": torch.rand(65, 77, device=DEVICE) < 0.7,
        "additive": torch.randn(1, 2, 65, 77, device=DEVICE),
        "padding": (torch.arange(77, device=DEVICE) < 60)[None, None, None],
    }[kind]
    q, k, _ = qkv(65, 77)
    check(q, k, [slice(5, 75)], queries=slice(2, 60), attn_mask=mask)


def test_fully_masked_rows_and_columns():
    allowed = torch.rand(65, 77, device=DEVICE) < 0.8
    allowed[[0, 31, 64]] = False
    allowed[:, [0, 40, 76]] = False
    q, k, _ = qkv(65, 77)
    check(q, k, [slice(0, 77)], attn_mask=allowed)


def test_columns_far_below_their_rows():
    """Nothing is left of their sums in units of the strongest row: these are taken afresh, wherever the splits lie."""
    levels = torch.zeros(77)
    levels[::2], levels[5] = -60.0, -200.0
    q, k, _ = leveled(130, 77, 0.0, levels)
    check(q, k, [slice(3, 77)], queries=slice(7, 130), scale=1.0, tolerance=5e-5)


def test_rows_far_apart():
    q, k, _ = leveled(130, 77, torch.linspace(0, 200, 130), 0.0)
    check(q, k, [slice(0, 50)], scale=1.0, tolerance=5e-5)


def test_single_owners_and_any_order():
    """No two programs write one element, none reads what another wrote, any order gives the same bits."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs where there is no GPU")
    q, k, _ = qkv(130, 77, B=2)
    with torch.no_grad():
        row = torch.logsumexp(q @ k.transpose(-1, -2) * 40**-0.5, -1)
    weights, runs = regions(1, 2, 120), []
    for order in (None, 7):
        shapes = (2, 2, 120), (2, 2, 60), (2, 2, 120), (2, 2, 2, 60)
        sums = [Sums(*(torch.zeros(shape) for shape in shapes))]
        arguments = {"mask": None, "regions": weights, "queries": (5, 125), "keys": [(10, 70)], "sums": sums}
        with watched(order) as launches:
            cols = beside.sweeps(q, k, row, scale=40**-0.5, **arguments)
        assert len(launches) == 4
        runs.append([*cols, *sums[0]])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_the_models_own_output(masked):
    """Bit for bit that of ``scaled_dot_product_attention``, and its log-sum-exp is the definition's."""
    q, k, v = (x.to("cpu") for x in qkv(130, 77, d=64))
    mask = torch.randn(130, 77) if masked else None
    found = beside.forward_with_lse(q, k, v, mask)
    assert found is not None
    assert torch.equal(found[0], F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    s = q.double() @ k.double().transpose(-1, -2) / 8
    torch.testing.assert_close(found[1], torch.logsumexp(s if mask is None else s + mask, -1).float())


def test_a_kernel_that_keeps_its_log_sum_exp(monkeypatch):
    """Nothing runs, and the caller hears of it."""
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: SDPBackend.MATH.value)
    assert beside.forward_with_lse(*qkv(65, 77)) is None
