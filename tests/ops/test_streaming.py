"""The streaming path against the float64 definitions, at its seams: tiles, layouts, ranges, masks and memory."""

import math
import subprocess
import sys
import textwrap
import weakref
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import i2am
from i2am import ops
from i2am.ops import blockwise, heads, shifted, streaming
from i2am.ops import naive as reference

LENGTHS = (1, 3, 63, 64, 65, 77, 257, 1025)
EXACT = 1e-5  # of the map's RMS and of its peak: statistics are float32 whatever the inputs are
OUT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # out has their precision
EPS = torch.finfo(torch.float32).eps
MIB = 1 << 20


def randn(*shape, dtype=torch.float32, amplitude=1.0):
    return (torch.randn(shape) * amplitude).to(dtype)


def inputs(Nq, Nk, d=40, B=1, H=2, dv=None, **kwargs):
    return randn(B, H, Nq, d, **kwargs), randn(B, H, Nk, d, **kwargs), randn(B, H, Nk, dv or d, **kwargs)


def assert_close(name, got, true, tolerance):
    """Within ``tolerance`` of the RMS in the mean and of the peak anywhere; -inf where and only where it is true."""
    got, true = got.double(), true.double()
    assert got.shape == true.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(true.shape)}"
    assert torch.equal(got.isneginf(), true.isneginf()), f"{name}: -inf in the wrong places"
    got, true = got[~true.isneginf()], true[~true.isneginf()]
    if true.numel() == 0:
        return
    error = (got - true).abs()
    floor = 1.0 if name.endswith("lse") else 1e-30  # a log-sum-exp may be near 0: its error is absolute there
    assert error.square().mean().sqrt() <= tolerance * true.square().mean().sqrt().clamp(min=floor), f"{name}: RMS"
    assert error.max() <= tolerance * true.abs().max().clamp(min=floor), f"{name}: off by {error.max():.2e}"


def check(q, k, v, tolerance=EXACT, **kwargs):
    """``i2am.attention`` by streaming against the reference, field by field."""
    got = i2am.attention(q, k, v, backend="streaming", **kwargs)
    true = i2am.attention(q.double(), k.double(), v.double(), backend="reference", **kwargs)
    assert got.out.dtype == q.dtype
    assert got.r2g.dtype == got.row_lse.dtype == torch.float32
    assert (got.mass is None) == (true.mass is None)
    for name, x, y in zip(got._fields, got, true, strict=True):
        if y is not None:
            assert_close(name, x, y, max(tolerance, OUT[q.dtype]) if name == "out" else tolerance)
    return got


TILES = {(blockwise, "TILE"): 1000, (blockwise, "KEYS"): 50, (streaming, "KEPT"): 0, (shifted, "TILE"): 1000}
PIECES = {(streaming, "LONG"): 0, (streaming, "FEW"): 1 << 20, (streaming, "PIECES"): 3, (streaming, "PIECE"): 20}
ROWS = {(streaming, "BLOCKS"): 1 << 30}
BLOCKS = {(streaming, "BLOCKS"): 1}
FORMS = {  # what is one tile in a test is many, or another form, in a model
    "blocks": BLOCKS,
    "tiled blocks": BLOCKS | TILES,
    "pieces of blocks": BLOCKS | PIECES | TILES,
    "rows": ROWS,
    "tiled rows": ROWS | TILES,
    "pieces of rows": ROWS | PIECES | TILES,
}


def take(form, patch):
    for (module, name), value in FORMS[form].items():
        patch.setattr(module, name, value)


@pytest.fixture(params=["blocks", "pieces of blocks", "tiled rows"])
def tiled(request, monkeypatch):
    """Tiles of parts of rows and of whole rows, as sizes dictate and of a few rows and keys, heads and pieces."""
    take(request.param, monkeypatch)


# ----------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("Nk", LENGTHS)
@pytest.mark.parametrize("Nq", LENGTHS)
def test_every_pair_of_lengths_and_head_dim(Nq, Nk):
    for d in (40, 64, 80, 128, 160):
        check(*inputs(Nq, Nk, d))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 1), (65, 3), (64, 64), (77, 257), (257, 77), (1025, 257)])
def test_other_dtypes_round_the_output_only(Nq, Nk, dtype, tiled):
    check(*inputs(Nq, Nk, 40, dtype=dtype))
    check(*inputs(Nq, Nk, 160, dtype=dtype))


@pytest.mark.parametrize(("Nq", "Nk"), [(130, 1), (130, 4), (65, 47), (65, 48), (130, 257)])
def test_tiles_of_a_few_rows(Nq, Nk, monkeypatch):
    for form, tile in product(("blocks", "rows"), (1, 1000, 5000)):
        take(form, monkeypatch)
        for module in (blockwise, shifted):
            monkeypatch.setattr(module, "TILE", tile)
        for kept in (0, 1000):
            monkeypatch.setattr(streaming, "KEPT", kept)
            check(*inputs(Nq, Nk))


@pytest.mark.parametrize("small", [1, 130 * 77, 3 * 130 * 77])
def test_heads_alone_or_together(small, monkeypatch):
    monkeypatch.setattr(streaming, "SMALL", small)
    for heavy in (1, 1 << 40):
        monkeypatch.setattr(heads, "HEAVY", heavy)
        check(*inputs(130, 77, B=2, H=5))


@pytest.mark.parametrize("Nk", [3, 77])
def test_the_other_product(Nk, monkeypatch, tiled):
    """Which of torch's products is used depends on the processor: here the one that this machine does not use."""
    if heads._linear is None:
        pytest.skip("this torch has no oneDNN")
    other = not heads._prefers_onednn()
    monkeypatch.setattr(heads, "_prefers_onednn", lambda: other)
    check(*inputs(130, Nk))


@pytest.mark.parametrize("Nk", [3, 77])
@pytest.mark.parametrize("dv", [1, 16, 50])
def test_value_dim_of_its_own(Nk, dv, tiled):
    check(*inputs(65, Nk, dv=dv))


@pytest.mark.parametrize("scale", [1.0, 0.01, -0.3, 0.0])
def test_scale(scale):
    check(*inputs(65, 77, amplitude=0.7), scale=scale)


def test_output_is_laid_out_as_the_model_wants_it():
    out = i2am.attention(*inputs(65, 77), backend="streaming").out
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("Nk", [5, 77])
def test_strided_views(Nk, tiled):
    B, H, d = 2, 3, 40
    q = randn(B, 65, H, d).transpose(1, 2)
    k, v = randn(B, Nk, 2, H, d).permute(2, 0, 3, 1, 4)
    check(q, k, v)
    check(
        randn(B, H, 130, 2 * d)[:, :, ::2, :d],
        randn(H, B, Nk, d).transpose(0, 1),
        randn(1, 1, Nk, d).expand(B, H, -1, -1),
    )


@pytest.mark.parametrize("Nk", [5, 77])
def test_onednn_gets_dense_matrices(Nk, monkeypatch):
    """A view of one head among others sends it to a loop that takes 1000 times as long."""
    if heads._linear is None:
        pytest.skip("this torch has no oneDNN")
    seen = []

    def linear(x, y, *args, real=heads._linear):
        seen.append(y.is_contiguous() or y.T.is_contiguous())
        return real(x, y, *args)

    monkeypatch.setattr(heads, "_linear", linear)
    monkeypatch.setattr(heads, "_prefers_onednn", lambda: True)
    monkeypatch.setattr(heads, "HEAVY", 1)
    q, k, v = (randn(1, n, 2, 40).transpose(1, 2) for n in (65, Nk, Nk))
    check(q, k, v, keys=slice(1, 4))
    assert seen
    assert all(seen)


def test_inputs_are_left_alone(tiled):
    q, k, v = inputs(65, 77)
    mask = randn(65, 77)
    before = [x.clone() for x in (q, k, v, mask)]
    i2am.attention(q, k, v, attn_mask=mask, backend="streaming")
    assert all(torch.equal(x, y) for x, y in zip((q, k, v, mask), before, strict=True))


def test_same_bits_every_time(tiled):
    q, k, v = inputs(257, 300)
    first, second = (i2am.attention(q, k, v, keys=slice(0, 200), backend="streaming") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("Nk", [3, 77])
def test_autocast_of_the_model_does_not_reach_the_statistics(Nk):
    q, k, v = inputs(65, Nk)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(q, k, v)


# ------------------------------------------------------------------------------------------------- range of logits


@pytest.mark.parametrize("magnitude", [80.0, 1e4])
@pytest.mark.parametrize(("Nq", "Nk"), [(65, 5), (65, 77), (257, 300)])
def test_large_logits(Nq, Nk, magnitude, tiled):
    q, k, v = inputs(Nq, Nk)
    s = reference.logits(q, k, 1.0, None)
    check(q, k, v, scale=magnitude / s.abs().max().item(), tolerance=max(EXACT, 4 * EPS * magnitude))


@pytest.mark.parametrize("magnitude", [80.0, 1e4])
def test_whole_columns_far_below_the_others(magnitude, tiled):
    """Their sums underflow beside those of the strong columns, yet each is a softmax of its own."""
    q, k, v = inputs(130, 77)
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[..., 5:40, 0] = -2 * magnitude
    q[..., 20:30, 0] = 0.5  # and among the queries not all are equal
    check(q, k, v, scale=1.0, tolerance=4 * EPS * 2 * magnitude)


@pytest.mark.parametrize("magnitude", [80.0, 1e4])
def test_whole_rows_far_apart(magnitude, tiled):
    q, k, v = inputs(130, 77)
    q[..., 0] = torch.linspace(-magnitude, magnitude, 130)
    k[..., 0] = 1.0
    check(q, k, v, scale=1.0, tolerance=4 * EPS * magnitude)


@pytest.mark.parametrize("form", ["tiled blocks", "pieces of blocks"])
@pytest.mark.parametrize("query", [0, 64, 129])
def test_one_query_out_of_range(query, form, monkeypatch):
    """Of one tile, one piece, whichever: its logit, of a key that no sample holds, is infinite as an exponential."""
    take(form, monkeypatch)
    q, k, v = inputs(130, 77)
    q[..., 0], k[..., 0] = 0.0, 0.0
    q[..., query, 0] = k[..., 7, 0] = 20.0  # 400 nats
    monkeypatch.setattr(blockwise, "SAMPLE", 8)
    assert 7 not in range(77 // 8 // 2, 77, 77 // 8)
    check(q, k, v, scale=1.0, tolerance=4 * EPS * 400)


def test_column_log_sum_exp_at_the_edge_of_the_shortcut(tiled):
    """Columns from strong to lost: exact on both sides of WEAK."""
    q, k, v = inputs(65, 129, amplitude=0.1)
    q[..., 0] = 1.0
    k[..., 0] = torch.linspace(0.0, -120.0, 129)
    check(q, k, v, scale=1.0, tolerance=4 * EPS * 120)


def test_values_as_large_as_float32_beside_a_row_that_its_sample_says_nothing_of():
    """Exponentials of 2^60 are in range, times values of 1e25 they are not: the row is computed by its own maximum."""
    q, k, v = inputs(65, 129, amplitude=0.1)
    q[..., 0] = 1.0
    k[..., 0] = 0.0
    k[:, :, 5, 0] = 60 * math.log(2.0)  # not among the keys that a row's shift comes from
    check(q, k, v, scale=1.0, tolerance=4 * EPS * 60)
    got = i2am.attention(q, k, v * 1e25, scale=1.0, backend="streaming")
    assert_close("out", got.out / 1e25, i2am.attention(q, k, v, scale=1.0, backend="reference").out, 4 * EPS * 60)


# ------------------------------------------------------------------------------------------------------------ masks


def masks(B, H, Nq, Nk):
    """Bool masks with fully masked rows and columns, and all the axes a model may leave out."""
    full = torch.rand(B, H, Nq, Nk) > 0.3
    full[:, :, Nq // 2] = False
    full[:, 0, :, Nk // 3] = False
    padding = torch.ones(B, 1, 1, Nk, dtype=torch.bool)
    padding[0, ..., Nk // 2 :] = False
    rows = torch.ones(1, H, Nq, 1, dtype=torch.bool)
    rows[:, :, ::7] = False
    return {"full": full, "2-D": full[0, 0], "padding": padding, "rows": rows, "none": ~padding[:1, :, :, :1] | True}


@pytest.mark.parametrize("kind", ["full", "2-D", "padding", "rows", "none"])
@pytest.mark.parametrize("additive", [None, torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("Nk", [9, 77])
def test_masks(kind, additive, Nk, tiled):
    q, k, v = inputs(65, Nk, B=2, H=3)
    mask = masks(2, 3, 65, Nk)[kind]
    if additive is not None:
        mask = randn(*mask.shape, dtype=additive).masked_fill(~mask, -math.inf)
    check(q, k, v, attn_mask=mask)
    check(q, k, v, attn_mask=mask, queries=slice(3, 60), keys=slice(1, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_with_half_precision_inputs(dtype, tiled):
    q, k, v = inputs(65, 77, dtype=dtype)
    full = masks(1, 2, 65, 77)["full"]
    check(q, k, v, attn_mask=full)
    check(q, k, v, attn_mask=randn(65, 77, dtype=dtype).masked_fill(~full, -math.inf))


def test_everything_masked(tiled):
    q, k, v = inputs(65, 77)
    got = check(q, k, v, attn_mask=torch.zeros(65, 77, dtype=torch.bool))
    assert all(not x.any() for x in (got.out, got.r2g, got.g2r))
    assert got.row_lse.isneginf().all()
    assert got.col_lse.isneginf().all()


@pytest.mark.parametrize("lowest", [-1e4, torch.finfo(torch.float16).min, torch.finfo(torch.float32).min])
def test_text_padding_by_the_lowest_number(lowest, tiled):
    """Libraries mask with finfo.min instead of -inf; it must not overflow when logits change their unit."""
    q, k, v = inputs(65, 77)
    mask = torch.zeros(1, 1, 1, 77)
    mask[..., 50:] = lowest
    check(q, k, v, attn_mask=mask, keys=slice(0, 50))
    row = torch.full((65, 77), lowest)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=row)
    assert_close(
        "out", i2am.attention(q, k, v, attn_mask=row, backend="streaming").out, expected, 4 * EPS * min(-lowest, 1e5)
    )


# -------------------------------------------------------------------------------------------------- which tokens


SELECTORS = [
    (None, None),
    (slice(7, 50), slice(0, 30)),
    (slice(0, 1), slice(76, 77)),
    (slice(-9, None), slice(-50, -2)),
    (slice(None, None, 2), slice(1, 60, 3)),
    (torch.tensor([5, 2, 40, 64]), torch.tensor([70, 3])),
    (torch.arange(65) % 3 == 0, torch.arange(77) > 20),
]


@pytest.mark.parametrize(("queries", "keys"), SELECTORS, ids=lambda s: str(s)[:20].replace("\n", ""))
def test_spans_and_sets_of_tokens(queries, keys, tiled):
    q, k, v = inputs(65, 77)
    check(q, k, v, queries=queries, keys=keys)
    check(q, k, v, queries=queries, keys=keys, attn_mask=masks(1, 2, 65, 77)["full"])


def sums(B, H, Q, K, R=None, mass=True, fill=torch.zeros):
    return ops.Sums(
        fill(B, H, Q), fill(B, H, K), fill(B, H, Q) if mass else None, None if R is None else fill(B, H, R, K)
    )


def regions(B, R, Q):
    w = torch.rand(B, R, Q) * (torch.rand(B, R, Q) > 0.5) + 1e-3
    return w / w.sum(-1, keepdim=True)


def accumulate_both(q, k, v, spans, weights=None, mass=True, fill=torch.zeros, **kwargs):
    """``ops.accumulate`` by streaming and by the reference, from the same sums; returns the streaming ones."""
    B, H, Nq, _ = q.shape
    Q = len(range(Nq)[kwargs.get("queries", slice(None))])
    R = None if weights is None else weights.shape[1]
    got = [sums(B, H, Q, len(range(k.shape[2])[s]), R, mass, fill) for s in spans]
    true = [ops.Sums(*(None if x is None else x.clone() for x in s)) for s in got]
    results = [
        ops.accumulate(q, k, v, sums=s, keys=spans, regions=weights, backend=backend, **kwargs)
        for s, backend in ((got, "streaming"), (true, "reference"))
    ]
    for s, t in zip(got, true, strict=True):
        for name, x, y in zip(s._fields, s, t, strict=True):
            if y is not None:
                assert_close(name, x, y, EXACT)
    (out, row_lse, col_lse), (true_out, true_row_lse, true_col_lse) = results
    assert_close("row_lse", row_lse, true_row_lse, EXACT)
    for x, y in zip(col_lse, true_col_lse, strict=True):
        assert_close("col_lse", x, y, EXACT)
    if v is None:
        assert out is None
    else:
        assert_close("out", out, true_out, EXACT)
    return got


REFERENCES = [
    [slice(0, 77)],
    [slice(10, 30), slice(30, 70)],
    [slice(60, 77), slice(0, 1), slice(5, 20)],  # in any order, with gaps
    [slice(0, 50), slice(20, 77)],  # and shared
]


@pytest.mark.parametrize("spans", REFERENCES)
@pytest.mark.parametrize("images", [1, 2])
def test_several_references_share_the_sweeps(spans, images, tiled):
    q, k, v = inputs(65, 77, B=2, H=3)
    accumulate_both(q, k, v, spans, regions(images, 4, 65))
    accumulate_both(q, k, v, spans, regions(images, 1, 40), queries=slice(20, 60))
    accumulate_both(q, k, v, spans, mass=False, attn_mask=masks(2, 3, 65, 77)["full"])


@pytest.mark.parametrize("Nk", [9, 77])
def test_statistics_alone(Nk, tiled):
    q, k, v = inputs(65, Nk)
    alone = accumulate_both(q, k, None, [slice(0, 9)], regions(1, 2, 65))
    beside = accumulate_both(q, k, v, [slice(0, 9)], regions(1, 2, 65))
    assert torch.equal(alone[0].r2g, beside[0].r2g)


def test_sums_are_added_to(tiled):
    q, k, v = inputs(65, 77, B=2)
    accumulate_both(q, k, v, [slice(0, 30), slice(30, 77)], regions(1, 2, 65), fill=torch.rand)


def test_sums_may_be_views_of_a_larger_buffer(tiled):
    q, k, v = inputs(65, 77, B=2)

    def strided(*shape):
        return torch.zeros(*shape[:-1], 3, shape[-1])[..., 1, :]

    accumulate_both(q, k, v, [slice(0, 30)], regions(1, 2, 65), fill=strided)


# ------------------------------------------------------------------------------------------------------- properties


@settings(max_examples=60, deadline=None)
@given(
    Nq=st.integers(1, 90),
    Nk=st.integers(1, 90),
    d=st.integers(1, 70),
    amplitude=st.floats(0, 30),
    cut=st.floats(0, 1),
    form=st.sampled_from(list(FORMS)),
    seed=st.integers(0, 99),
)
def test_maps_sum_to_what_they_should(Nq, Nk, d, amplitude, cut, form, seed):
    torch.manual_seed(seed)
    q, k, v = inputs(Nq, Nk, d, amplitude=amplitude)
    edge = round(cut * (Nk - 1)) + 1
    edges = [0, edge, Nk] if edge < Nk else [0, Nk]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    with pytest.MonkeyPatch.context() as patch:
        take(form, patch)
        whole = i2am.attention(q, k, v, backend="streaming")
        shares = [i2am.attention(q, k, v, keys=part, backend="streaming") for part in parts]
    ones = torch.ones(1, 2)
    tight = {"rtol": 0.0, "atol": 2e-5 + 4 * EPS * whole.row_lse.abs().max().item()}
    torch.testing.assert_close(whole.r2g.sum(-1), ones, **tight)
    torch.testing.assert_close(whole.g2r.sum(-1), ones, **tight)
    torch.testing.assert_close(torch.cat([s.g2r for s in shares], -1), whole.g2r, **tight)
    widths = [part.stop - part.start for part in parts]
    mean = sum(s.r2g * w for s, w in zip(shares, widths, strict=True)) / Nk  # R2G of all is the mean over all keys
    torch.testing.assert_close(mean, whole.r2g, **tight)
    if len(parts) > 1:
        torch.testing.assert_close(sum(s.mass for s in shares), torch.ones(1, 2, Nq), **tight)
        for share in shares:
            torch.testing.assert_close(share.mass.mean(-1), share.g2r.sum(-1), **tight)


@settings(max_examples=30, deadline=None)
@given(Nq=st.integers(2, 80), Nk=st.integers(2, 80), seed=st.integers(0, 99))
def test_the_order_of_tokens_does_not_matter(Nq, Nk, seed):
    torch.manual_seed(seed)
    q, k, v = inputs(Nq, Nk)
    i, j = torch.randperm(Nq), torch.randperm(Nk)
    straight = i2am.attention(q, k, v, backend="streaming")
    mixed = i2am.attention(q[:, :, i], k[:, :, j], v[:, :, j], backend="streaming")
    assert_close("out", mixed.out, straight.out[:, :, i], EXACT)
    assert_close("r2g", mixed.r2g, straight.r2g[..., i], EXACT)
    assert_close("g2r", mixed.g2r, straight.g2r[..., j], EXACT)


# ----------------------------------------------------------------------------------------------------------- memory


class Allocations(TorchDispatchMode):
    """Live bytes of every storage made while active: their peak, and the largest single one."""

    def __init__(self):
        super().__init__()
        self.owners, self.live, self.peak, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._own(x, x.untyped_storage().data_ptr() in known)
        return result

    def _own(self, x, borrowed):
        key, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
        if key not in self.owners:
            if borrowed:  # an input of the call under test: not ours to count
                return
            self.owners[key] = 0
            self.live += size
            self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        self.owners[key] += 1
        weakref.finalize(x, self._disown, key, size)

    def _disown(self, key, size):
        self.owners[key] -= 1
        if self.owners[key] == 0:
            del self.owners[key]
            self.live -= size


def test_the_allocation_counter_counts():
    x = torch.ones(1000)
    with Allocations() as seen:
        y = x + 1
        z = (x + 2)[10:].mul_(2)
        del y
        x.add_(1)
    assert seen.peak == 8000
    assert seen.live == 4000
    assert seen.largest == 4000
    assert z.shape == (990,)


def call(q, k, v, mask=None, n_references=1):
    (B, H, Nq, _), Nk = q.shape, k.shape[2]
    edges = [Nk * n // n_references for n in range(n_references + 1)]
    spans = list(pairwise(edges))
    found = [sums(B, H, Nq, b - a) for a, b in spans]
    return streaming.attention(q, k, v, scale=0.3, mask=mask, regions=None, queries=(0, Nq), keys=spans, sums=found)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("Nq", "Nk", "d"),
    [(3000, 3000, 8), (512, 16384, 8), (16384, 512, 8), (200_000, 16, 8), (200_000, 1, 160), (2, 200_000, 8)],
)
def test_no_tensor_grows_with_the_attention(Nq, Nk, d, masked):
    q, k, v = inputs(Nq, Nk, d, dtype=torch.float16)
    mask = torch.randn(1, 1, 1, Nk).expand(1, 2, Nq, Nk) if masked else None
    with Allocations() as seen:
        results = call(q, k, v, mask)
    kept = [x.numel() * x.element_size() for x in results]
    inputs_of_a_head = 4 * 16 * Nk  # float32, head dims up to LANES
    assert seen.largest <= max(4 * 4 * shifted.TILE, inputs_of_a_head, *kept)
    assert seen.peak - sum(kept) <= 64 * MIB


@pytest.mark.parametrize("masked", [False, True])
def test_underflowed_columns_are_repaired_in_tiles_too(masked):
    q, k, v = inputs(3000, 3000, 8, H=1, amplitude=30.0)
    mask = torch.randn(1, 1, 1, 3000).expand(1, 1, 3000, 3000) if masked else None
    with Allocations() as seen:
        call(q, k, v, mask)
    assert seen.peak <= 64 * MIB


PEAK = """
    import sys, torch
    sys.path.insert(0, {root!r})
    from tests.ops.test_streaming import call, inputs

    def status(field):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

    call(*inputs(300, 300, 16, H={H}))  # libraries loaded, threads started
    q, k, v = inputs(16384, 16384, 16, H={H})
    before = status("VmRSS")
    results = call(q, k, v, n_references=2)
    print(status("VmHWM") - before - sum(x.numel() * x.element_size() for x in results))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("H", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_resident_memory_at_16384_by_16384(H, request):
    """The operating system's own count, in a process of its own: includes what torch's kernels allocate inside."""
    program = textwrap.dedent(PEAK).format(root=str(request.config.rootpath), H=H)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    grown = int(ran.stdout)
    assert MIB < grown <= 64 * MIB, f"{grown / MIB:.0f} MiB"
