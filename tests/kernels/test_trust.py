"""Why the interpreter's verdict holds on hardware: single-owner writes, nothing read across programs, any order.

Programs of a launch run side by side on a GPU. If none writes what another writes or reads, their order cannot matter,
and what the interpreter computes one after the other is what the GPU computes.
"""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from i2am.kernels import tiles
from i2am.ops import Sums, accumulate
from tests.helpers.interpreter_watch import Fault, watched

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # the interpreter's log2(0) is meant
]


# ------------------------------------------------------------------------------------------------ the watch itself


@triton.jit
def shift_kernel(p_x, p_y, N, SHIFT: tl.constexpr, SPREAD: tl.constexpr):
    """Each program copies 8 elements: from SHIFT further on, to SPREAD apart."""
    o = tl.program_id(0) * 8 + tl.arange(0, 8)
    tl.store(p_y + tl.program_id(0) * SPREAD + tl.arange(0, 8), tl.load(p_x + o + SHIFT, mask=o < N))


@pytest.mark.parametrize(
    ("shift", "spread", "same", "fault"),
    [
        (0, 8, False, None),
        (0, 8, True, None),
        (1, 8, False, "outside its tensors"),
        (-8, 8, True, "outside its tensors"),
        (0, 4, False, "two programs wrote the same element"),
    ],
)
def test_the_watch_sees_faults(shift, spread, same, fault):
    x = torch.zeros(32)
    y = x if same else torch.zeros(32)
    if fault is None:
        with watched():
            shift_kernel[(4,)](x, y, 32, shift, spread)
        return
    with pytest.raises(Exception, match=fault), watched():  # the interpreter wraps what a program raises
        shift_kernel[(4,)](x, y, 32, shift, spread)


def test_the_watch_sees_reads_of_what_others_wrote():
    x = torch.zeros(40)
    with pytest.raises(Fault, match="read what another program"), watched():
        shift_kernel[(4,)](x, x[:32], 32, 8, 8)


def test_the_watch_respects_strides():
    x = torch.zeros(32, 2)
    with pytest.raises(Exception, match="outside its tensors"), watched():
        shift_kernel[(4,)](x[:, 0], torch.zeros(32), 32, 0, 8)


# --------------------------------------------------------------------------------------------------------- the kernels


@st.composite
def calls(draw):
    """Arguments of ``accumulate``: any sizes, dtypes, layouts, spans, masks and regions."""
    B, H, d = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([8, 16, 40, 64]))
    Nq, Nk = draw(st.integers(1, 150)), draw(st.integers(1, 90))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    q, k, v = (
        (torch.randn(B, H, n, d) if layout == "dense" else torch.randn(B, n, H, d + 3)[..., :d].transpose(1, 2)).to(
            dtype
        )
        if layout != "joined"
        else torch.randn(B, n, 2, H, d).to(dtype)[:, :, 1].transpose(1, 2)
        for n, layout in zip(
            (Nq, Nk, Nk), draw(st.tuples(*[st.sampled_from(["dense", "wide", "joined"])] * 3)), strict=True
        )
    )
    queries = slice(draw(st.integers(0, Nq - 1)), Nq)
    cut = draw(st.integers(1, Nk))
    keys = [slice(0, cut), *([slice(cut, Nk)] if cut < Nk and draw(st.booleans()) else [])]
    mask = draw(st.sampled_from([None, "bool", "additive", "padding"]))
    attn_mask = {
        None: None,
        "bool": torch.rand(Nq, Nk) < 0.8,
        "additive": torch.randn(1, 1, Nq, Nk),
        "padding": (torch.arange(Nk) < max(1, Nk - 5))[None, None, None],
    }[mask]
    R, Q = draw(st.sampled_from([0, 0, 1, 3])), Nq - queries.start
    regions = torch.rand(1, R, Q).softmax(-1) if R else None
    mass = draw(st.booleans())
    programs = draw(st.sampled_from([1, 3, 8, 64]))
    with_values, few_keys = draw(st.booleans()), draw(st.sampled_from([0, 320]))
    return (q, k, v if with_values else None), queries, keys, attn_mask, regions, mass, programs, few_keys


def run(tensors, queries, keys, attn_mask, regions, mass, backend="triton"):
    (q, k, v), R = tensors, 0 if regions is None else regions.shape[1]
    B, H, Nq, _ = q.shape
    Q = Nq - queries.start

    def sums(K):
        shapes = (B, H, Q), (B, H, K), (B, H, Q) if mass else None, (B, H, R, K) if R else None
        return Sums(*(None if shape is None else torch.zeros(shape) for shape in shapes))

    found = [sums(key.stop - key.start) for key in keys]
    out, row, cols = accumulate(
        q, k, v, sums=found, queries=queries, keys=keys, attn_mask=attn_mask, regions=regions, backend=backend
    )
    return [x for x in (out, row, *cols, *(y for s in found for y in s)) if x is not None]


def check(call):
    """Writes have one owner, reads stay inside and apart, any order gives the same bits, and they are right."""
    *arguments, programs, few_keys = call
    before = tiles.CPU_PROGRAMS, tiles.FEW_KEYS
    tiles.CPU_PROGRAMS, tiles.FEW_KEYS = programs, few_keys
    try:
        with watched() as launches:
            first = run(*arguments)
        with watched(order=7):
            second = run(*arguments)
    finally:
        tiles.CPU_PROGRAMS, tiles.FEW_KEYS = before
    # Few keys: two. Else pass 1 and what lies between, and two of each reference.
    assert len(launches) == (2 if few_keys else 2 + 2 * len(arguments[2]))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    truth = run(*arguments, backend="reference")
    tolerance = 5e-3 if arguments[0][0].dtype == torch.float16 else 5e-5
    for x, y in zip(first, truth, strict=True):
        assert torch.equal(x.isneginf(), y.isneginf())
        x, y = (z.double().masked_fill(z.isneginf(), 0.0) for z in (x, y))
        assert (x - y).abs().max() <= tolerance * y.abs().max().clamp(min=1e-30)


DRAWN = dict(deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


@settings(max_examples=8, **DRAWN)
@given(calls())
def test_any_call_is_sound(call):
    check(call)


@pytest.mark.slow
@settings(max_examples=60, **DRAWN)
@given(calls())
def test_many_calls_are_sound(call):
    check(call)
