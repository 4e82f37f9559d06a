"""Few keys, in two launches a call, against the float64 definitions; interpreted on CPU."""

import pytest
import torch

from i2am.kernels import few_attribution, few_forward, tiles
from i2am.ops import accumulate, beside, few, streaming
from i2am.ops import launch as launching
from i2am.ops import triton as host
from tests.helpers.interpreter_watch import watched
from tests.kernels import test_attention as fused
from tests.kernels import test_sweep as behind
from tests.kernels.test_attention import DEVICE, DTYPES, ERRORS, MASKS, check, check_accumulate, leveled, qkv, regions

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's log2(0) is meant

SPANS = [slice(40, 77), slice(0, 33), slice(33, 40), slice(10, 50)]  # apart, adjacent and overlapping, in any order


@pytest.fixture(autouse=True)
def no_other_way(monkeypatch):
    """Whatever runs here takes the two launches, or fails."""

    def refuse(*arguments, **given):
        raise AssertionError("torch ops ran")

    monkeypatch.setattr(streaming, "attention", refuse)


@pytest.mark.parametrize(("Nq", "Nk", "d"), [(1, 1, 8), (63, 16, 40), (130, 77, 40), (65, 257, 64), (33, 320, 160)])
def test_sizes(Nq, Nk, d):
    check(*qkv(Nq, Nk, d=d))
    check(*qkv(Nq, Nk, d=d), queries=slice(Nq // 3, None), keys=slice(Nk // 4, Nk))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    check(*qkv(130, 77, d=80, H=1, dtype=dtype), queries=slice(1, 127), keys=slice(2, 70))


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask):
    B, H, Nq, Nk = 2, 2, 65, 77
    mask = MASKS[mask](B, H, Nq, Nk).to(DEVICE)
    tolerance = 2e-3 if mask.double().abs().max() == 1e4 else 1e-5  # float32 logits near 1e4 have three decimals
    check(*qkv(Nq, Nk, B=B, H=H), attn_mask=mask, keys=slice(5, 75), queries=slice(0, 60), tolerance=tolerance)


def test_fully_masked():
    allowed = torch.rand(130, 77, device=DEVICE) < 0.8
    allowed[[0, 64, 65, 129]] = False
    allowed[:, [0, 31, 32, 76]] = False
    got = check(*qkv(130, 77), attn_mask=allowed)
    assert not got.out[:, :, 64].any()
    assert not got.g2r[:, :, 76].any()
    assert not check(*qkv(65, 20), attn_mask=torch.zeros(65, 20, dtype=torch.bool, device=DEVICE)).r2g.any()


@pytest.mark.parametrize("programs", [1, 5, 64])
@pytest.mark.parametrize("R", [0, 3])
def test_references_regions_and_splits(programs, R, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_PROGRAMS", programs)
    weights = regions(2, R, 125) if R else None
    check_accumulate(*qkv(130, 77, B=2), SPANS, weights, mass=programs > 1, queries=slice(3, 128))


def test_without_values():
    q, k, _ = qkv(65, 77)
    check_accumulate(q, k, None, [slice(0, 77), slice(3, 9)])


@pytest.mark.parametrize("programs", [1, 64])
def test_columns_far_below_their_rows(programs, monkeypatch):
    """Their sums in units of the strongest row underflow: taken afresh, by the program that owns them."""
    monkeypatch.setattr(tiles, "CPU_PROGRAMS", programs)
    levels = torch.zeros(77)
    levels[::2], levels[5] = -60.0, -200.0
    check(*leveled(130, 77, 0.0, levels), scale=1.0, tolerance=5e-5)
    check(*leveled(130, 77, torch.linspace(0, 200, 130), 0.0), scale=1.0, tolerance=1e-4)


def test_behind_somebody_elses_attention():
    q, k, _ = qkv(130, 77, B=2)
    mask = torch.rand(130, 77, device=DEVICE) < 0.7
    behind.check(q, k, SPANS, regions(2, 3, 120), queries=slice(5, 125))
    behind.check(q, k, [slice(3, 77)], mass=False, attn_mask=mask)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
@pytest.mark.parametrize("given", [False, True])
def test_two_launches_of_single_owners(given, monkeypatch):
    """However many references, regions and masses; any order of programs gives the same bits."""
    monkeypatch.setattr(tiles, "CPU_PROGRAMS", 5)
    q, k, v = qkv(70, 40, d=16)
    spans = [slice(30, 40), slice(0, 33), slice(10, 20)]
    mask, weights, found = torch.rand(70, 40) < 0.8, regions(1, 2, 63), []
    row = accumulate(q, k, None, sums=zeros(spans), keys=spans, backend="reference", attn_mask=mask)[1].float()
    for order in (None, 7):
        sums = zeros(spans, R=2, Q=63)
        with watched(order=order) as launches:
            if given:
                beside.sweeps(
                    q, k, row, scale=0.25, mask=mask.expand(1, 2, 70, 40), regions=weights, queries=(5, 68),
                    keys=[(s.start, s.stop) for s in spans], sums=sums,
                )  # fmt: skip
            else:
                selected = {"queries": slice(5, 68), "keys": spans, "attn_mask": mask, "regions": weights}
                accumulate(q, k, v, sums=sums, backend="triton", **selected)
        assert len(launches) == 2
        found.append([x for s in sums for x in s])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def zeros(spans, R=0, Q=70):
    """Return running sums of one image and two heads."""
    shapes = [[(Q,), (s.stop - s.start,), (Q,), (R, s.stop - s.start)] for s in spans]
    return [fused.Sums(*(torch.zeros(1, 2, *n) if n[0] else None for n in each)) for each in shapes]


@pytest.mark.parametrize("kernel", [few_forward.few_forward_kernel, few_attribution.few_attribution_kernel])
def test_smaller_tiles_where_a_launch_does_not_build(kernel, monkeypatch):
    """Nothing was added before the second launch, so nothing is added twice."""
    monkeypatch.setattr(host, "_broken", {})
    monkeypatch.setattr(launching, "_warned", set())
    real, tried = few.launch, []

    def launch(given, what, *arguments):
        if given is kernel:
            tried.append(what.tiles)
            if what.tiles.m * what.tiles.n > 1024:
                raise ERRORS[0]
        real(given, what, *arguments)

    monkeypatch.setattr(few, "launch", launch)
    with pytest.warns(RuntimeWarning, match="does not build on cpu .* with smaller tiles"):
        check_accumulate(*qkv(65, 77), [slice(0, 40), slice(40, 77)])
    assert tried[0].m * tried[0].n > 1024 >= tried[-1].m * tried[-1].n
