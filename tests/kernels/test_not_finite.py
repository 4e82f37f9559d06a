"""NaN and inf where they take no part spoil nothing; where they do, exactly what sees them. Interpreted on CPU."""

import pytest
import torch

import i2am
from i2am.kernels import tiles
from i2am.ops import Sums, accumulate, beside
from i2am.ops import triton as host
from tests.kernels.test_attention import DEVICE

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(encountered in|All-NaN slice):RuntimeWarning"
)  # of the interpreter, and meant

NAN, INF = float("nan"), float("inf")
NQ, NK, D = 70, 45, 40  # two query tiles, two key tiles, and features in two parts


@pytest.fixture(params=["pointers", "descriptors", "few keys"])
def way(request, monkeypatch):
    """Every kernel of a call with an output: pass 1 and 2 by either way of loading, and the two of few keys."""
    monkeypatch.setattr(tiles, "FEW_KEYS", 320 if request.param == "few keys" else 0)
    if request.param == "descriptors":
        pytest.importorskip("triton.tools.tensor_descriptor", reason="Triton before 3.4 makes none on the host")
        monkeypatch.setattr(host, "device_of", lambda device: tiles.Device(1 << 16, "none", True))


def inputs():
    return [torch.randn(1, 2, n, D, device=DEVICE) for n in (NQ, NK, NK)]


def run(backend, q, k, v, **given):
    return i2am.attention(q, k, v, backend=backend, keys=slice(1, 40), **given)


def assert_same(got, want, names=("out", "r2g", "g2r", "mass", "row_lse", "col_lse")):
    for name in names:
        x, y = getattr(got, name).double(), getattr(want, name).double()
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", ["padding", "additive padding", "rows", "additive rows"])
def test_a_masked_key_takes_no_part_whatever_it_holds(kind, way):
    """Padding is often memory that nobody wrote. Key 39 is the reference's last, which a ragged tile has again."""
    q, k, v = inputs()
    allowed = torch.rand(1, 1, NQ if "rows" in kind else 1, NK, device=DEVICE) < 0.8
    allowed[..., [3, 39, 44]] = False
    mask = torch.zeros(allowed.shape, device=DEVICE).masked_fill(~allowed, -INF) if "additive" in kind else allowed
    want = run("reference", q, k, v, attn_mask=mask)
    broken = torch.tensor([NAN, INF, -INF], device=DEVICE)[:, None]
    k[0, 0, [3, 39, 44]], v[0, 1, [3, 39, 44], 30:34] = broken, broken
    assert_same(run("triton", q, k, v, attn_mask=mask), want)


def test_a_masked_pair_takes_no_part_whatever_its_key_holds(way):
    """A key that only some queries see: their rows are not finite, the others are as if it were not there."""
    q, k, v = inputs()
    allowed = torch.rand(1, 1, NQ, NK, device=DEVICE) < 0.8
    allowed[:, :, :50, 43:] = False
    allowed[:, :, 50:, 43:] = True
    selected = {"attn_mask": allowed, "queries": slice(2, 50)}
    want = run("reference", q, k, v, **selected)
    k[0, 0, 43], v[0, 1, 43, [2, 37]], v[0, 1, 44, 5] = NAN, NAN, INF
    got = run("triton", q, k, v, **selected)
    assert_same(got, want, ("r2g", "g2r", "mass", "col_lse"))
    seen = torch.ones(2, NQ, D, dtype=torch.bool, device=DEVICE)
    seen[0, 50:] = False
    seen[1, 50:, [2, 5, 37]] = False
    assert torch.equal(got.out[0].isfinite(), seen)
    assert torch.equal(run("reference", q, k, v, **selected).out[0].isfinite(), seen)
    torch.testing.assert_close(got.out[0][seen].double(), want.out[0][seen].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_a_query_that_is_not_generated_spoils_nothing(masked, way):
    """Before and behind the generated ones, in the tiles that these are in, and masked out amid them."""
    q, k, v = inputs()
    selected = {"queries": slice(3, 66)}
    others = [0, 2, 66, 69]
    if masked:
        selected["attn_mask"] = (torch.arange(NQ, device=DEVICE) != 33)[:, None].expand(NQ, NK)
    want = run("reference", q, k, v, **selected)
    q[0, 0, others] = torch.tensor([NAN, INF, NAN, -INF], device=DEVICE)[:, None]
    if masked:
        q[0, 0, 33] = NAN
    got = run("triton", q, k, v, **selected)
    assert_same(got, want, ("r2g", "g2r", "mass", "col_lse"))
    assert not got.out[0, 0, others].isfinite().any()
    rows = torch.ones(NQ, dtype=torch.bool)
    rows[others] = False
    torch.testing.assert_close(got.out[:, :, rows].double(), want.out[:, :, rows].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["query", "key"])
def test_what_takes_part_spoils_what_the_twin_says(where, way):
    """And never a finite map where the definition has none."""
    q, k, v = inputs()
    if where == "query":
        q[0, 0, 65] = NAN
    else:
        k[0, 0, 42], k[0, 1, 33] = NAN, NAN  # of no reference, and of it
    v[0, 1, 2, 5] = NAN
    want, got = (run(backend, q, k, v) for backend in ("reference", "triton"))
    for name, x, y in zip(got._fields, got, want, strict=True):
        assert torch.equal(x.isfinite(), y.isfinite()), name
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("few", [0, 320])
@pytest.mark.parametrize("programs", [1, 64])
def test_the_sweeps_behind_somebody_elses_attention(programs, few, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_PROGRAMS", programs)
    monkeypatch.setattr(tiles, "FEW_KEYS", few)
    q, k, v = inputs()
    allowed = torch.ones(NQ, NK, dtype=torch.bool, device=DEVICE)
    allowed[:, [39, 42]] = False
    given = {"queries": slice(3, 66), "attn_mask": allowed}
    want = run("reference", q, k, v, **given)
    q[0, 0, [0, 66, 69]], k[0, 1, [39, 42]] = NAN, NAN
    sums = Sums(*(torch.zeros(1, 2, n, device=DEVICE) for n in (63, 39, 63)))
    (col,) = beside.sweeps(
        q, k, want.row_lse.float(), scale=D**-0.5, mask=allowed.expand(1, 2, NQ, NK), regions=None,
        queries=(3, 66), keys=[(1, 40)], sums=[sums],
    )  # fmt: skip
    assert_same(sums, want, ("r2g", "g2r", "mass"))
    torch.testing.assert_close(col.double(), want.col_lse, rtol=1e-4, atol=1e-5)


def test_a_key_of_another_reference_spoils_nothing(way):
    """Of two references, each walks its own keys: one that is not a number and nobody sees stays with the other."""
    q, k, _ = inputs()
    allowed = torch.ones(NQ, NK, dtype=torch.bool, device=DEVICE)
    allowed[:, 20] = False
    found = []
    for which in ("reference", "triton"):
        sums = [Sums(*(torch.zeros(1, 2, n, device=DEVICE) for n in (NQ, K, NQ))) for K in (20, 21)]
        if which == "triton":
            k[0, 0, 20] = NAN
        accumulate(q, k, None, sums=sums, keys=[slice(0, 20), slice(21, 42)], attn_mask=allowed, backend=which)
        found.append(sums)
    for want, got in zip(*found, strict=True):
        assert_same(got, want, ("r2g", "g2r", "mass"))
