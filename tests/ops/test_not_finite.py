"""NaN and inf where they take no part: the definitions and the streaming path answer as if they were not there."""

import pytest
import torch

import i2am
from i2am.ops import Sums, accumulate, blockwise, shifted, streaming

BROKEN = [float("nan"), float("inf"), -float("inf")]
BACKENDS = ["reference", "streaming"]
MAPS = ("r2g", "g2r", "mass", "col_lse")


def inputs(Nq=70, Nk=77, d=40):
    return [torch.randn(1, 2, n, d) for n in (Nq, Nk, Nk)]


def run(backend, q, k, v, keys=slice(1, 60), **given):
    return i2am.attention(q, k, v, backend=backend, keys=keys, **given)


def assert_same(got, want, names):
    for name in names:
        x, y = getattr(got, name), getattr(want, name)
        if y is not None:
            torch.testing.assert_close(
                x.double(), y.double(), rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_key_takes_no_part_whatever_it_holds(backend, value, additive, rows):
    """Padding is often memory that nobody wrote. Key 59 is the reference's last, which a ragged tile has again."""
    q, k, v = inputs()
    allowed = torch.rand(1, 1, 70 if rows else 1, 77) < 0.8
    allowed[..., [3, 59, 76]] = False
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf) if additive else allowed
    want = run("reference", q, k, v, attn_mask=mask)
    k[0, 0, [3, 59, 76]], v[0, 1, [3, 59, 76], :5] = value, value
    assert_same(run(backend, q, k, v, attn_mask=mask), want, want._fields)


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_pair_takes_no_part_whatever_its_key_holds(backend, value):
    """A key that only some queries see: their rows are not finite, the others are as if it were not there."""
    q, k, v = inputs()
    allowed = torch.ones(1, 1, 70, 77, dtype=torch.bool)
    allowed[:, :, :50, 76] = False
    want = run("reference", q, k, v, attn_mask=allowed, queries=slice(0, 50))
    k[0, 0, 76], v[0, 1, 76, [2, 39]] = value, value
    got = run(backend, q, k, v, attn_mask=allowed, queries=slice(0, 50))
    assert_same(got, want, MAPS)
    torch.testing.assert_close(got.out[:, :, :50].double(), want.out[:, :, :50].double(), rtol=1e-4, atol=1e-5)
    assert not got.out[0, 0, 50:].isfinite().any()
    assert not got.out[0, 1, 50:][:, [2, 39]].isfinite().any()
    assert_same(got._replace(out=got.out[0, 1, 50:, 3:39]), want._replace(out=want.out[0, 1, 50:, 3:39]), ["out"])


@pytest.mark.parametrize("Nk", [17, 77])  # one tile of the kernels, and more
@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_is_not_generated_spoils_nothing(backend, value, Nk):
    """Before, behind and amid the generated ones, in tiles of their own and shared with them."""
    for queries, others in ((slice(3, 66), [0, 2, 66, 69]), (torch.arange(70) % 3 > 0, [0, 33, 69])):
        q, k, v = inputs(Nk=Nk)
        want = run("reference", q, k, v, keys=slice(1, Nk - 2), queries=queries)
        q[0, 0, others] = value
        got = run(backend, q, k, v, keys=slice(1, Nk - 2), queries=queries)
        assert_same(got, want, MAPS)
        assert not got.out[0, 0, others].isfinite().any()
        rows = torch.ones(70, dtype=torch.bool)
        rows[others] = False
        assert_same(got._replace(out=got.out[:, :, rows]), want._replace(out=want.out[:, :, rows]), ["out"])


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_is_masked_out_spoils_nothing(backend, value):
    q, k, v = inputs()
    mask = (torch.arange(70) != 2)[:, None].expand(70, 77)
    want = run("reference", q, k, v, attn_mask=mask)
    q[0, 0, 2] = value
    assert_same(run(backend, q, k, v, attn_mask=mask), want, want._fields)


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("backend", ["streaming"])
def test_a_key_of_nobodys_reference_spoils_nothing(backend, value):
    """Of two references, each walks its own keys: one that is not a number stays with the other."""
    q, k, _ = inputs()
    allowed = torch.ones(70, 77, dtype=torch.bool)
    allowed[:, 30] = False
    found = []
    for which in ("reference", backend):
        sums = [Sums(*(torch.zeros(1, 2, n) for n in (70, K, 70))) for K in (30, 20)]
        if which == backend:
            k[0, 0, 30] = value
        accumulate(q, k, None, sums=sums, keys=[slice(0, 30), slice(31, 51)], attn_mask=allowed, backend=which)
        found.append(sums)
    for want, got in zip(*found, strict=True):
        assert_same(got, want, ("r2g", "g2r", "mass"))


@pytest.fixture(params=["blocks", "pieces of blocks", "rows", "pieces of rows"], autouse=True)
def form(request, monkeypatch):
    """Every form of the streaming path, in several tiles."""
    monkeypatch.setattr(blockwise, "TILE", 512)
    monkeypatch.setattr(shifted, "TILE", 512)
    monkeypatch.setattr(streaming, "BLOCKS", 1 if "blocks" in request.param else 1 << 30)
    if "pieces" in request.param:
        monkeypatch.setattr(streaming, "LONG", 0)
        monkeypatch.setattr(streaming, "FEW", 1 << 20)
        monkeypatch.setattr(streaming, "PIECE", 20)


def test_an_overflow_is_not_a_mask():
    """A row or column whose logits all overflow to -inf is NaN, never the zeros of one without partners."""
    q, k, v = inputs(d=16)
    q[0, 0, 2], k[0, 0] = -3e38, k[0, 0].abs() + 1
    for mask in (None, torch.ones(70, 77, dtype=torch.bool), torch.zeros(70, 77)):
        got = run("streaming", q, k, v, attn_mask=mask)
        assert got.out[0, 0, 2].isnan().all()
        assert got.out[0, 0, :2].isfinite().all()
        assert got.row_lse[0, 0, 2].isnan()
    q, k, v = inputs(d=16)
    q[0, 0], k[0, 0, 4] = q[0, 0].abs() + 1, -3e38
    got = run("streaming", q, k, v)
    assert got.col_lse[0, 0, 3].isnan()
    assert got.out.isfinite().all()
