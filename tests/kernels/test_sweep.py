"""The thin sweeps behind somebody else's attention, against the float64 definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from i2am.kernels import tiles
from i2am.ops import Sums, accumulate, beside, launch, stock
from i2am.ops import triton as fused
from tests.helpers.interpreter_watch import watched
from tests.kernels.test_attention import DEVICE, assert_close, leveled, qkv, regions, strided

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's log2(0) is meant


@pytest.fixture(autouse=True)
def many_keys(monkeypatch):
    """However few the keys are here: what few keys take is the subject of test_few_keys.py."""
    monkeypatch.setattr(tiles, "FEW_KEYS", 0)


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


@pytest.mark.parametrize("kind", [None, "additive", "bool", "padding"])
def test_the_models_own_output(kind):
    """Bit for bit that of ``scaled_dot_product_attention``, and its log-sum-exp is the definition's."""
    q, k, v = (x.to("cpu") for x in qkv(130, 77, d=64))
    allowed = torch.rand(130, 77) < 0.7
    mask = {None: None, "additive": torch.randn(130, 77), "bool": allowed, "padding": allowed[:1, None, None]}[kind]
    found = stock.forward_with_lse(q, k, v, mask)
    assert found is not None
    assert torch.equal(found[0], F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    s = q.double() @ k.double().transpose(-1, -2) / 8
    if mask is not None:
        s = s + mask if kind == "additive" else s.masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(found[1], torch.logsumexp(s, -1).float())


def test_a_kernel_that_keeps_its_log_sum_exp(monkeypatch):
    """Nothing runs, and the caller hears of it."""
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: SDPBackend.MATH.value)
    assert stock.forward_with_lse(*qkv(65, 77)) is None


# ------------------------------------------------------------------------------------- the way there from the op's door


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that are launched; those of ``launched.broken`` fail as a compiler does."""

    class Names(list):
        broken = ()

    names, real = Names(), launch.launch

    def watching(kernel, *arguments):
        names.append(kernel.fn.__name__)
        if names[-1] in names.broken:
            raise RuntimeError("PassManager::run failed")
        real(kernel, *arguments)

    for module in (beside, fused, launch):
        monkeypatch.setattr(module, "launch", watching)
    monkeypatch.setattr(beside, "_broken", set())
    monkeypatch.setattr(fused, "_broken", {})
    monkeypatch.setattr(launch, "_warned", set())
    return names


def behind(q, k, queries, references, weights=None, **options):
    """``accumulate`` with a known log-sum-exp on Triton, and the float64 twin: [(name, found, true)]."""
    (B, H, Nq, _), R = q.shape, 0 if weights is None else weights.shape[1]
    Q = torch.arange(Nq)[queries].numel()
    found, truth = [], []
    for into in (found, truth):
        for keys in references:
            K = torch.arange(k.shape[2])[keys].numel()
            shapes = (B, H, Q), (B, H, K), (B, H, Q), (B, H, R, K) if R else None
            into.append(Sums(*(None if x is None else torch.zeros(x, device=DEVICE) for x in shapes)))
    arguments = {"queries": queries, "keys": references, "regions": weights, **options}
    _, row, cols = accumulate(q, k, None, sums=truth, backend="reference", **arguments)
    out, same, got = accumulate(q, k, None, sums=found, backend="triton", row_lse=row.float(), **arguments)
    assert out is None
    pairs = [("row_lse", same, row), *(("col_lse", x, y) for x, y in zip(got, cols, strict=True))]
    for x, y in zip(found, truth, strict=True):
        pairs += [(name, a, b) for name, a, b in zip(x._fields, x, y, strict=True) if a is not None]
    return pairs


def test_known_row_lse_is_what_the_sweeps_take(launched):
    """Sets with gaps, several references, regions: right, and pass 1 is not run."""
    q, k, _ = qkv(65, 77)
    odd, even = torch.arange(1, 77, 2), torch.arange(0, 60, 2)
    for name, x, y in behind(q, k, torch.arange(64, 3, -2), [odd, even], regions(1, 2, 31)):
        assert_close(name, x, y, 2e-5)
    assert set(launched) == {"sweep_kernel", "column_lse_kernel", "accumulate_kernel"}


@pytest.mark.parametrize("broken", ["sweep_kernel", "accumulate_kernel"])
def test_sweeps_that_do_not_build(launched, broken, monkeypatch):
    """The fused kernels (or torch ops) do their work, once and with one warning; nothing counts twice."""
    launched.broken = (broken,)
    q, k, _ = qkv(65, 77)
    with pytest.warns(RuntimeWarning, match="does not build on cpu .* 65 × 77 tokens") as warned:
        pairs = behind(q, k, slice(2, 60), [slice(0, 40), slice(40, 77)])
    for name, x, y in pairs:
        assert_close(name, x, y, 2e-5)
    assert sum("by the fused kernels" in str(w.message) for w in warned) == 1
    count = launched.count("sweep_kernel")
    behind(q, k, slice(2, 60), [slice(0, 40)])
    assert launched.count("sweep_kernel") == count  # remembered


def test_a_second_sweep_that_fails_adds_the_first_once(launched, monkeypatch):
    q, k, _ = qkv(65, 77)
    real, calls = beside.launch, []

    def second_fails(kernel, *arguments):
        calls.append(kernel)
        if len(calls) == 5:  # after the four launches of the first reference
            raise RuntimeError("PassManager::run failed")
        real(kernel, *arguments)

    monkeypatch.setattr(beside, "launch", second_fails)
    monkeypatch.setattr(
        beside, "start_accumulate", lambda *x: calls.append("accumulate") or launch.start_accumulate(*x)
    )
    with pytest.warns(RuntimeWarning, match="by the fused kernels"):
        pairs = behind(q, k, slice(None), [slice(0, 40), slice(40, 77)])
    for name, x, y in pairs:
        assert_close(name, x, y, 2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(1, 2, 77, 40)}, "give v=None"),
        ({"row_lse": torch.zeros(1, 2, 64)}, r"row_lse must be \[B, H, Nq\] = \(1, 2, 65\)"),
        ({"row_lse": torch.zeros(1, 2, 65, dtype=torch.float64)}, "torch.float64"),
    ],
)
def test_row_lse_that_does_not_fit(change, message):
    q, k = torch.zeros(1, 2, 65, 40), torch.zeros(1, 2, 77, 40)
    sums = [Sums(torch.zeros(1, 2, 65), torch.zeros(1, 2, 77), torch.zeros(1, 2, 65), None)]
    given = {"v": None, "row_lse": torch.zeros(1, 2, 65)} | change
    with pytest.raises(ValueError, match=message):
        accumulate(q, k, given["v"], sums=sums, row_lse=given["row_lse"], backend="streaming")
    assert not sums[0].r2g.any()
