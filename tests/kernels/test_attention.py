"""The Triton kernels against the float64 definitions, interpreted on CPU (on the GPU where there is one)."""

import warnings

import pytest
import torch
from triton.runtime.errors import OutOfResources

import i2am
from i2am.kernels import attribution, column_lse, forward, tiles
from i2am.ops import Sums, accumulate
from i2am.ops import launch as launching
from i2am.ops import triton as host

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's log2(0) is meant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (1, 3, 63, 64, 65, 77, 257)
PAIRS = [(1, 1), (1, 257), (3, 77), (63, 64), (64, 65), (65, 3), (65, 63), (77, 257), (257, 1), (257, 77), (257, 257)]
TOLERANCE = {  # of the output, relative to its RMS and its peak; the statistics are float32 whatever the dtype
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,  # the interpreter truncates where hardware rounds
}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]


@pytest.fixture(autouse=True)
def many_keys(monkeypatch):
    """However few the keys are here: what few keys take is the subject of test_few_keys.py."""
    monkeypatch.setattr(tiles, "FEW_KEYS", 0)


def qkv(Nq, Nk, d=40, B=1, H=2, dtype=torch.float32, sharpness=1.0):
    q, k, v = (torch.randn(B, H, n, d, device=DEVICE) for n in (Nq, Nk, Nk))
    return (q * sharpness).to(dtype), k.to(dtype), v.to(dtype)


def assert_close(name, got, want, tolerance=1e-5):
    """Relative RMS and largest error over the peak; of a log-sum-exp, the error of what it is the logarithm of."""
    assert got.shape == want.shape, f"{name} is {tuple(got.shape)}, not {tuple(want.shape)}"
    got, want = got.double(), want.double()
    if name.endswith("lse"):
        dead = want.isneginf()
        assert torch.equal(got.isneginf(), dead), f"{name} is -inf where it should not be, or is not where it should"
        worst = (got - want)[~dead].abs().max().item() if not dead.all() else 0.0
        assert worst <= tolerance, f"{name}: off by {worst:.1e}"
        return
    assert got.isfinite().all(), f"{name} is not finite"
    error = got - want
    rms = error.square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30)
    worst = error.abs().max() / want.abs().max().clamp_min(1e-30)
    at = error.abs().argmax().item()
    assert max(rms, worst) <= tolerance, f"{name}: RMS {rms:.1e}, worst {worst:.1e} of the peak (flat index {at})"


def check(q, k, v, tolerance=1e-5, queries=None, keys=None, attn_mask=None, **arguments):
    """``i2am.attention`` against its twin; returns what the kernels gave."""
    selected = {"queries": queries, "keys": keys, "attn_mask": attn_mask}
    got = i2am.attention(q, k, v, backend="triton", **selected, **arguments)
    want = i2am.attention(q, k, v, backend="reference", **selected, **arguments)
    out = max(tolerance, TOLERANCE[q.dtype])
    for name, x, y in zip(got._fields, got, want, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            assert_close(name, x, y, out if name == "out" else tolerance)
    return got


# ------------------------------------------------------------------------------------------------ shapes and dtypes


@pytest.mark.parametrize(("Nq", "Nk"), PAIRS)
def test_sizes(Nq, Nk):
    check(*qkv(Nq, Nk))


@pytest.mark.slow
@pytest.mark.parametrize("Nq", SIZES)
@pytest.mark.parametrize("Nk", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_sizes(Nq, Nk, dtype):
    check(*qkv(Nq, Nk, d=64, dtype=dtype))


def test_larger():
    check(*qkv(1025, 257, d=64))
    check(*qkv(257, 1025, d=40, dtype=torch.float16), keys=slice(500, 900))


@pytest.mark.parametrize("Nk", [16, 17, 32, 33])
def test_keys_of_one_tile(Nk, monkeypatch):
    """Whichever queries are generated, and however the queries are split."""
    for programs in (1, 64):
        monkeypatch.setattr(tiles, "CPU_PROGRAMS", programs)
        check(*qkv(200, Nk), queries=slice(70, 190), keys=slice(2, Nk - 1))
        check_accumulate(*qkv(200, Nk), [slice(3, 9), slice(0, 3), slice(5, Nk)], queries=slice(70, 190))


@pytest.mark.parametrize("d", [1, 8, 16, 40, 64, 72, 80, 96, 128, 160, 256])
def test_head_dims(d):
    check(*qkv(65, 77, d=d, H=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [40, 64, 80, 128, 160])
def test_dtypes(dtype, d):
    check(*qkv(130, 77, d=d, H=1, dtype=dtype), queries=slice(1, None), keys=slice(2, 70))


def test_layouts():
    """Transposed views as a model passes them, halves of one projection, and an expanded batch: never copied."""
    x = torch.randn(2, 65, 3 * 2 * 40, device=DEVICE)
    q, k, v = (t.reshape(2, 65, 2, 40).transpose(1, 2) for t in x.chunk(3, -1))
    assert not q.is_contiguous()
    got = check(q, k, v, keys=slice(3, 64))
    assert got.out.transpose(1, 2).is_contiguous()
    check(q, k[:1, :1, ::2].expand(2, 2, -1, -1), v[:1, :1, ::2].expand(2, 2, -1, -1))


@pytest.mark.parametrize("scale", [None, 0.01, 1.0, 0.0, -0.3])
def test_scale(scale):
    check(*qkv(65, 77), scale=scale)


# --------------------------------------------------------------------------------------------------- masks and range

MASKS = {
    "bool": lambda B, H, Nq, Nk: torch.rand(B, H, Nq, Nk) < 0.7,
    "bool, same for all heads": lambda B, H, Nq, Nk: torch.rand(B, 1, Nq, Nk) < 0.7,
    "padding": lambda B, H, Nq, Nk: (torch.arange(Nk) < torch.tensor([Nk - 9, 50])[:, None])[:, None, None],
    "causal": lambda B, H, Nq, Nk: torch.arange(Nq)[:, None] >= torch.arange(Nk),
    "additive": lambda B, H, Nq, Nk: torch.randn(B, H, Nq, Nk) * 3,
    "additive, half, -inf": lambda B, H, Nq, Nk: (
        torch.zeros(Nq, Nk).masked_fill(torch.rand(Nq, Nk) < 0.3, -torch.inf).half()
    ),
    "additive, bfloat16, by key": lambda B, H, Nq, Nk: torch.randn(1, 1, 1, Nk).bfloat16(),
    "additive, double, by query": lambda B, H, Nq, Nk: torch.randn(B, 1, Nq, 1).double(),
    "additive, -10000": lambda B, H, Nq, Nk: torch.where(torch.rand(B, 1, 1, Nk) < 0.5, -1e4, 0.0),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask):
    B, H, Nq, Nk = 2, 2, 65, 77
    mask = MASKS[mask](B, H, Nq, Nk).to(DEVICE)
    tolerance = 2e-3 if mask.double().abs().max() == 1e4 else 1e-5  # float32 logits near 1e4 have three decimals
    check(*qkv(Nq, Nk, B=B, H=H), attn_mask=mask, keys=slice(5, 75), queries=slice(0, 60), tolerance=tolerance)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_fully_masked(kind):
    """A masked query attends to nothing; a masked key is seen by nobody; neither is anywhere not-a-number."""
    allowed = torch.rand(130, 77, device=DEVICE) < 0.8
    allowed[[0, 64, 65, 66, 129]] = False
    allowed[:, [0, 31, 32, 33, 76]] = False
    allowed[:, 40:] = False
    mask = (
        allowed if kind == "bool" else torch.zeros_like(allowed, dtype=torch.float32).masked_fill(~allowed, -torch.inf)
    )
    got = check(*qkv(130, 77), attn_mask=mask)
    assert not got.out[:, :, 64].any()
    assert not got.g2r[:, :, 40:].any()
    for Nk in (20, 40):
        nothing = check(*qkv(65, Nk), attn_mask=torch.zeros(65, Nk, dtype=torch.bool, device=DEVICE))
        assert not nothing.out.any()
        assert not nothing.r2g.any()


@pytest.mark.parametrize("Nk", [20, 40])
def test_a_finite_mask_is_no_infinity(Nk):
    """``finfo.min`` in every entry of a row leaves the model's output what it is: the mean of the values."""
    q, k, v = qkv(65, Nk)
    mask = torch.zeros(65, Nk, device=DEVICE)
    mask[7] = torch.finfo(torch.float32).min
    got = i2am.attention(q, k, v, attn_mask=mask, backend="triton")
    assert_close("out", got.out[:, :, 7], v.mean(2))
    assert got.r2g.isfinite().all()
    torch.testing.assert_close(got.g2r.sum(-1), torch.full_like(got.g2r[..., 0], 64 / 65))  # that row spent nothing


@pytest.mark.parametrize("reach", [80, 1e4])
def test_logits_of_any_size(reach):
    q, k, v = qkv(130, 77)
    s = (q @ k.transpose(-1, -2)).abs().max()
    check(q * (reach / s), k, v, scale=1.0, tolerance=1e-5 + 4e-7 * reach)


def leveled(Nq, Nk, row_levels, key_levels):
    """Queries and keys whose logits are ``row_level_i + key_level_j`` and noise; both exact in float32."""
    q, k, v = qkv(Nq, Nk, d=16)
    q[..., 0], q[..., 1] = row_levels, 1.0
    k[..., 0], k[..., 1] = 1.0, key_levels
    return q, k, v


def test_columns_far_below_their_rows():
    """Keys that every query spurns still have a column softmax; its sums cannot be had from the row softmax."""
    levels = torch.zeros(77)
    levels[::2] = -60.0
    levels[5] = -200.0
    check(*leveled(130, 77, 0.0, levels), scale=1.0, tolerance=5e-5)


@pytest.mark.parametrize("programs", [1, 64])
def test_queries_far_above_the_first(programs, monkeypatch):
    """Rows beyond the pivot's headroom: 2^32 above the first tile's, and 2^300."""
    monkeypatch.setattr(tiles, "CPU_PROGRAMS", programs)
    for top in (30.0, 200.0):
        check(*leveled(257, 77, torch.linspace(0, top, 257), 0.0), scale=1.0, tolerance=5e-5)


def test_every_logit_far_below_zero():
    """What lies past the last key must not look like a logit of zero: beside these that is infinitely much."""
    check(*leveled(65, 77, -150.0, 0.0), scale=1.0, tolerance=5e-5)


def test_one_column_takes_the_rows():
    """A sink: every row's sum lies 2^144 above what the other columns amount to."""
    levels = torch.zeros(77)
    levels[40] = 100.0
    got = check(*leveled(130, 77, 0.0, levels), scale=1.0, tolerance=5e-5)
    assert got.g2r[..., 40].min() > 0.999


# ------------------------------------------------------------------------------------------------- spans, references


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (slice(0, 64), slice(0, 32)),
        (slice(64, 128), slice(32, 64)),
        (slice(63, 65), slice(31, 33)),
        (slice(129, 130), slice(76, 77)),
        (slice(5, 120), slice(33, 77)),
        ([3, 1, 120, 64], [70, 0, 33]),
        (slice(None, None, 2), torch.arange(77) % 3 == 0),
    ],
)
def test_spans(queries, keys):
    check(*qkv(130, 77), queries=queries, keys=keys)


@pytest.mark.parametrize("programs", [1, 5, 64])
def test_splits(programs, monkeypatch):
    """However many programs share the work, with several tiles each or one."""
    monkeypatch.setattr(tiles, "CPU_PROGRAMS", programs)
    check(*qkv(257, 257), queries=slice(60, 200), keys=slice(20, 250))


def strided(*shape):
    """A running sum as a recorder may keep it: one time group of a larger buffer, not empty any more."""
    B, H, *rest, N = shape
    return torch.rand(B, 3, H, *rest, N + 5, device=DEVICE)[:, 1, ..., :N] / N


def check_accumulate(q, k, v, references, regions=None, mass=True, tolerance=2e-5, **arguments):
    """``accumulate`` adds to sums that are not empty what the twin adds to empty ones."""
    B, H, Nq, _ = q.shape
    Q = len(range(Nq)[arguments.get("queries") or slice(None)])
    sums, truth = [], []
    for keys in references:
        K, R = len(range(k.shape[2])[keys]), 0 if regions is None else regions.shape[1]
        shapes = [(B, H, Q), (B, H, K), (B, H, Q) if mass else None, (B, H, R, K) if R else None]
        sums.append(Sums(*(None if shape is None else strided(*shape) for shape in shapes)))
        truth.append(Sums(*(None if shape is None else torch.zeros(shape, device=DEVICE) for shape in shapes)))
    start = [[None if x is None else x.clone() for x in s] for s in sums]
    arguments |= {"keys": references, "regions": regions}
    out, row, cols = accumulate(q, k, v, sums=sums, backend="triton", **arguments)
    want_out, want_row, want_cols = accumulate(q, k, v, sums=truth, backend="reference", **arguments)
    assert (out is None) == (v is None)
    if v is not None:
        assert_close("out", out, want_out, max(tolerance, TOLERANCE[q.dtype]))
    assert_close("row_lse", row, want_row)
    for got, want, before, col, want_col in zip(sums, truth, start, cols, want_cols, strict=True):
        assert_close("col_lse", col, want_col)
        for name, x, y, z in zip(got._fields, got, want, before, strict=True):
            if x is not None:
                assert_close(name, x - z, y, tolerance)


def regions(n, R, Q):
    w = torch.rand(n, R, Q, device=DEVICE)
    w[:, 0] = torch.arange(Q, device=DEVICE) == Q // 2  # a single patch
    return w / w.sum(-1, keepdim=True)


@pytest.mark.parametrize("mass", [False, True])
def test_accumulate_several_references(mass):
    """Spans apart, adjacent and overlapping, in any order."""
    references = [slice(40, 77), slice(0, 33), slice(33, 40), slice(10, 50)]
    check_accumulate(*qkv(130, 77, B=2), references, mass=mass, queries=slice(3, 128))


def test_accumulate_index_sets():
    q, k, v = qkv(65, 77)
    sums = [Sums(*(torch.zeros(1, 2, n, device=DEVICE) for n in (65, K, 65))) for K in (3, 26)]
    truth = [Sums(*(x if x is None else x.clone() for x in s)) for s in sums]
    keys = [[72, 0, 33], torch.arange(77) % 3 == 1]
    accumulate(q, k, v, sums=sums, keys=keys, backend="triton")
    accumulate(q, k, v, sums=truth, keys=keys, backend="reference")
    for got, want in zip(sums, truth, strict=True):
        for name in ("r2g", "g2r", "mass"):
            assert_close(name, getattr(got, name), getattr(want, name))


@pytest.mark.parametrize(("n", "R"), [(1, 1), (2, 3), (1, 17), (2, 64)])
def test_regions(n, R):
    check_accumulate(*qkv(130, 77, B=2), [slice(0, 40), slice(40, 77)], regions(n, R, 128), queries=slice(1, 129))


def test_too_many_regions_add_nothing():
    q, k, v = qkv(65, 77)
    sums = [Sums(*(torch.zeros(1, 2, *n, device=DEVICE) for n in ((65,), (77,))), sram=torch.zeros(1, 2, 65, 77))]
    with pytest.raises(ValueError, match="at most 64 regions at a time, got 65"):
        accumulate(q, k, v, sums=sums, keys=[None], regions=regions(1, 65, 65), backend="triton")
    assert not sums[0].g2r.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_regions_and_masks_in_every_dtype(dtype):
    q, k, v = qkv(65, 77, d=80, dtype=dtype)
    mask = torch.randn(65, 77, device=DEVICE).to(dtype)
    check_accumulate(q, k, v, [slice(7, 77)], regions(1, 2, 65), attn_mask=mask)


@pytest.mark.parametrize("Nk", [1, 77])
def test_without_values(Nk):
    """``v=None``: the model's own kernel makes the output, this one only the statistics."""
    q, k, _ = qkv(65, Nk)
    check_accumulate(q, k, None, [slice(0, Nk)])


@pytest.mark.parametrize("programs", [1, 64])
def test_splits_of_everything(programs, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_PROGRAMS", programs)
    q, k, v = qkv(257, 257, dtype=torch.float16)
    check_accumulate(q, k, v, [slice(9, 200), slice(100, 257)], regions(1, 3, 257))


def test_run_again_bit_for_bit():
    q, k, v = qkv(257, 130, dtype=torch.float16)
    first, second = (i2am.attention(q, k, v, keys=slice(5, 99), backend="triton") for _ in range(2))
    for name, x, y in zip(first._fields, first, second, strict=True):
        assert torch.equal(x, y), name


def test_small_heads_add_up():
    """What the definitions promise: R2G sums to 1, G2R to 1, and G2R's total is the mean mass."""
    got = i2am.attention(*qkv(130, 77), keys=slice(0, 40), backend="triton")
    torch.testing.assert_close(got.r2g.sum(-1), torch.ones_like(got.r2g[..., 0]))
    torch.testing.assert_close(got.g2r.sum(-1), got.mass.mean(-1))


# ------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("d", "chunks"),
    [(1, (16, 0)), (16, (16, 0)), (24, (16, 16)), (40, (32, 16)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)),
     (100, (64, 64)), (128, (128, 0)), (160, (128, 32)), (256, (256, 0))],
)  # fmt: skip
def test_split_head_dim(d, chunks):
    assert tiles.split_head_dim(d) == chunks
    assert sum(chunks) >= d


@pytest.mark.parametrize(("count", "heads"), [(512, 10), (32, 20), (32, 160), (1, 2), (3, 1000)])
def test_programs_are_bounded(count, heads):
    """The workspace stays O(N) a program: at 65,536 tokens × 10 heads far below what one partial a tile would take."""
    slot = 4 * heads * 65536
    each = tiles.tiles_per_program(count, heads, 264, slot)
    splits = -(-count // each)
    assert 1 <= splits <= count
    assert splits == 1 or (splits * heads <= 2 * 264 and splits * slot <= 64 * 2**20)


# ------------------------------------------------------------------------------------------------- tensor descriptors


@pytest.fixture
def descriptors(monkeypatch):
    """The tables as on hardware that loads tiles by itself; the count of launches that got descriptors."""
    seen = []
    real = host.head

    def head(x, what, *rows):
        seen.append(what.tiles.tma)
        return real(x, what, *rows)

    monkeypatch.setattr(host, "device_of", lambda device: tiles.Device(1 << 16, "none", True))
    monkeypatch.setattr(host, "head", head)
    return seen


@pytest.mark.parametrize(("Nq", "Nk", "d"), [(130, 77, 40), (65, 257, 64), (33, 20, 72)])
def test_tiles_loaded_by_descriptors(Nq, Nk, d, descriptors):
    pytest.importorskip("triton.tools.tensor_descriptor", reason="Triton before 3.4 makes no descriptors on the host")
    x, y = torch.randn(1, Nq, 2, d, device=DEVICE), torch.randn(2, 1, Nk, 2, d, device=DEVICE)
    q, k, v = x.transpose(1, 2), *(t.transpose(1, 2) for t in y)  # as a model passes them
    check_accumulate(q, k, v, [slice(3, Nk - 2), slice(0, 9)], queries=slice(5, Nq - 3))
    mask = torch.rand(Nq, Nk, device=DEVICE) < 0.8
    check(q.half(), k.half(), v.half(), attn_mask=mask, keys=slice(1, Nk - 1), tolerance=2e-4)
    assert descriptors
    assert all(descriptors)


def test_no_descriptors_where_strides_forbid(descriptors):
    """An odd stride, a pointer in between, an expanded axis: loaded by pointers, and right."""
    wide = torch.randn(1, 65, 2, 42, device=DEVICE)
    for q in (wide[..., :40].transpose(1, 2), torch.randn(1, 1, 65, 40, device=DEVICE).expand(1, 2, -1, -1)):
        check(q, *qkv(65, 77)[1:])
    assert not any(descriptors)


# ------------------------------------------------------------------------------------------------ what does not build


@pytest.fixture
def broken(monkeypatch):
    """Has chosen launches fail as a compiler does; says which tiles were tried. Nothing is remembered afterwards."""
    monkeypatch.setattr(host, "_broken", {})
    monkeypatch.setattr(launching, "_warned", set())
    tried = []

    def breaks(kernel, most, error):
        real = host.launch

        def launch(given, what, *arguments):
            if given is kernel:
                tried.append(what.tiles)
                if what.tiles.m * what.tiles.n > most:
                    raise error
            real(given, what, *arguments)

        monkeypatch.setattr(host, "launch", launch)
        return tried

    return breaks


ERRORS = [OutOfResources(300000, 232448, "shared memory"), RuntimeError("PassManager::run failed")]


@pytest.mark.parametrize("error", ERRORS, ids=["too large", "compiler"])
def test_smaller_tiles_where_a_kernel_does_not_build(broken, error):
    """Nobody's model crashes, the answer is right, one warning says what and where."""
    q, k, v = qkv(65, 77)
    tried = broken(forward.attention_fwd_kernel, 1024, error)
    with pytest.warns(RuntimeWarning, match=r"does not build on cpu with Triton 3.* 65 × 77 tokens, d 40, fp32.*small"):
        check_accumulate(q, k, v, [slice(0, 40), slice(40, 77)])
    assert tried[0].m * tried[0].n > 1024 >= tried[-1].m * tried[-1].n
    count = len(tried)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        check_accumulate(q, k, v, [slice(0, 40), slice(40, 77)])  # remembered: no second attempt, no second warning
    assert len(tried) == count + 1


@pytest.mark.parametrize("kernel", [forward.attention_fwd_kernel, column_lse.column_lse_kernel])
def test_torch_ops_where_nothing_builds(broken, kernel):
    broken(kernel, 0, ERRORS[1])
    with pytest.warns(RuntimeWarning, match="does not build") as warned:
        check_accumulate(*qkv(65, 77), [slice(0, 40), slice(40, 77)], regions(1, 2, 65))
    said = [str(w.message) for w in warned if "i2am" in str(w.message)]
    assert ["in torch ops" in text for text in said] == [True]


def test_nothing_is_added_twice(broken, monkeypatch):
    """The second reference's pass 2 fails when the first one's sums are already there."""
    q, k, v = qkv(65, 77)
    real, calls = host.launch, []

    def launch(kernel, what, *arguments):
        calls.append(kernel)
        if kernel is attribution.attribution_kernel and calls.count(kernel) > 1:
            raise ERRORS[0]
        real(kernel, what, *arguments)

    monkeypatch.setattr(host, "_broken", {})
    monkeypatch.setattr(launching, "_warned", set())
    monkeypatch.setattr(host, "launch", launch)
    with pytest.warns(RuntimeWarning, match="in torch ops"):
        check_accumulate(q, k, v, [slice(0, 40), slice(40, 77)])


def test_a_kernels_own_failure_is_not_hidden(broken):
    broken(forward.attention_fwd_kernel, 0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        check(*qkv(65, 77))
