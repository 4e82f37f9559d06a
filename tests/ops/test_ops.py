"""The op's front door: checks, selectors, the custom op's contract with torch."""

import math

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import i2am
from i2am.ops import Sums, accumulate
from i2am.ops.checks import check_row_lse, choose_backend


def qkv(B=2, H=3, Nq=10, Nk=7, d=16, dv=None, dtype=torch.float32):
    return (
        torch.randn(B, H, Nq, d, dtype=dtype),
        torch.randn(B, H, Nk, d, dtype=dtype),
        torch.randn(B, H, Nk, dv or d, dtype=dtype),
    )


def new_sums(q, K, mass=False, regions=0):
    B, H, Nq, _ = q.shape
    z = torch.zeros
    return Sums(z(B, H, Nq), z(B, H, K), z(B, H, Nq) if mass else None, z(B, H, regions, K) if regions else None)


def test_definitions_by_hand():
    """One head, two queries, two keys: the equations with numbers."""
    q = torch.tensor([[[[1.0], [2.0]]]])
    k = torch.tensor([[[[0.0], [math.log(3)]]]])
    v = torch.tensor([[[[1.0], [5.0]]]])
    a = i2am.attention(q, k, v, scale=1.0)  # S = [[0, ln 3], [0, 2 ln 3]]
    rows = torch.tensor([[1 / 4, 3 / 4], [1 / 10, 9 / 10]])
    columns = torch.tensor([[1 / 2, 3 / 12], [1 / 2, 9 / 12]])
    torch.testing.assert_close(a.out[0, 0], rows @ v[0, 0])
    torch.testing.assert_close(a.r2g[0, 0], columns.mean(1))
    torch.testing.assert_close(a.g2r[0, 0], rows.mean(0))
    torch.testing.assert_close(a.row_lse[0, 0], torch.tensor([4.0, 10.0]).log())
    torch.testing.assert_close(a.col_lse[0, 0], torch.tensor([2.0, 12.0]).log())
    assert a.mass is None
    part = i2am.attention(q, k, v, scale=1.0, keys=slice(1, 2), queries=[1])
    torch.testing.assert_close(part.r2g, torch.ones(1, 1, 1))
    torch.testing.assert_close(part.g2r[0, 0], rows[1, 1:])
    torch.testing.assert_close(part.mass[0, 0], rows[1, 1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: dict(q=q[0]), r"q must be a \[B, H, N, d\] tensor, got torch.float32 \(3, 10, 16\)"),
        (lambda q, k, v: dict(k=k[:1]), r"k \(1, 3, 7, 16\) does not fit q"),
        (lambda q, k, v: dict(k=k[..., :8]), "head dim must agree"),
        (lambda q, k, v: dict(v=v[:, :, :6]), r"v \(2, 3, 6, 16\) does not fit k"),
        (lambda q, k, v: dict(k=k[:, :1]), r"k \(2, 1, 7, 16\) does not fit q .*heads"),
        (lambda q, k, v: dict(v=v[:, :1]), r"v \(2, 1, 7, 16\) does not fit k .*heads"),
        (lambda q, k, v: dict(v=v[:1]), r"v \(1, 3, 7, 16\) does not fit k .*batch"),
        (lambda q, k, v: dict(k=k.half()), "must share device and dtype"),
        (lambda q, k, v: dict(k=k.to("meta")), "must share device and dtype"),
        (lambda q, k, v: dict(q=q.long()), "must be floating point"),
        (lambda q, k, v: dict(q=q[:, :, :0]), "q is empty"),
        (lambda q, k, v: dict(q=q.transpose(2, 3).contiguous().transpose(2, 3)), "stride 10 along the head dim"),
        (lambda q, k, v: dict(scale=float("nan")), "scale must be finite"),
        (lambda q, k, v: dict(scale=-math.inf), "scale must be finite, got -inf"),
        (
            lambda q, k, v: dict(attn_mask=torch.ones(4, 7).bool()),
            r"does not broadcast to \[B, H, Nq, Nk\] = \(2, 3, 10, 7\)",
        ),
        (lambda q, k, v: dict(attn_mask=torch.ones(10, 7).int()), "attn_mask must be bool"),
        (lambda q, k, v: dict(attn_mask=torch.ones(10, 7, device="meta")), "attn_mask is on meta"),
        (lambda q, k, v: dict(backend="cuda"), "backend must be one of triton, streaming, reference"),
        (lambda q, k, v: dict(keys=slice(7, 9)), "keys=slice.* selects none of 7 tokens"),
        (lambda q, k, v: dict(queries=[0, 10]), "queries holds 10, outside the valid range 0…9"),
        (lambda q, k, v: dict(queries=[1, 1, 3]), "same token more than once"),
        (lambda q, k, v: dict(keys=torch.ones(5).bool()), "bool mask of 5 tokens, but there are 7"),
        (lambda q, k, v: dict(keys=torch.ones(5)), "must hold integers"),
        (lambda q, k, v: dict(keys=[]), "selects none of 7"),
        (lambda q, k, v: dict(v=torch.randn(2, 3, 7, 8), backend="triton"), "one head dim for q, k and v"),
        (
            lambda q, k, v: dict(q=q.double(), k=k.double(), v=v.double(), backend="triton"),
            "float16, bfloat16 or float32",
        ),
    ],
)
def test_refusals(change, message):
    q, k, v = qkv()
    arguments = dict(q=q, k=k, v=v) | change(q, k, v)
    with pytest.raises(ValueError, match=message):
        i2am.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        i2am.attention(*qkv(), backend="triton")
    monkeypatch.setattr("i2am.ops.checks.triton_available", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed"):
        i2am.attention(*qkv(), backend="triton")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda q, s: ([s], ()), "names no reference"),
        (lambda q, s: ([s], (None, slice(0, 2))), "2 key selectors, 1 sums"),
        (lambda q, s: ([s._replace(r2g=s.r2g[:, :, :5])], (None,)), r"sums.r2g must be float32 \(2, 3, 10\)"),
        (lambda q, s: ([s._replace(g2r=s.g2r.double())], (None,)), "sums.g2r must be float32"),
        (lambda q, s: ([s._replace(g2r=s.g2r.to("meta"))], (None,)), "sums.g2r must be float32 .* on cpu, got .* meta"),
        (lambda q, s: ([s._replace(r2g=torch.zeros(2, 3, 20)[..., ::2])], (None,)), "sums.r2g must have stride 1"),
        (lambda q, s: ([s._replace(sram=torch.zeros(2, 3, 1, 7))], (None,)), "sums.sram is kept, but no regions"),
        (lambda q, s: ([s, s._replace(mass=s.r2g)], (None, None)), "for every reference or for none"),
    ],
)
def test_sums_that_do_not_fit_are_refused_before_anything_is_added(bad, message):
    q, k, v = qkv()
    s = new_sums(q, 7)
    sums, keys = bad(q, s)
    with pytest.raises(ValueError, match=message):
        accumulate(q, k, v, sums=sums, keys=keys)
    assert not s.r2g.any()
    assert not s.g2r.any()


@pytest.mark.parametrize("shape", [(1, 2, 9), (3, 2, 10), (4, 2, 10), (2, 10)])
def test_regions_that_do_not_fit_are_refused(shape):
    q, k, v = qkv()
    s = new_sums(q, 7, regions=2)
    with pytest.raises(ValueError, match=r"regions must be \[1 or 2, R, 10\] weights over the generated queries"):
        accumulate(q, k, v, sums=[s], regions=torch.rand(shape))
    with pytest.raises(ValueError, match=r"sums.sram must be float32 \(2, 3, 2, 7\) on cpu, got None"):
        accumulate(q, k, v, sums=[s._replace(sram=None)], regions=torch.rand(1, 2, 10))
    assert not s.g2r.any()


@pytest.mark.parametrize("backend", ["streaming", "triton", "reference"])
def test_index_sets_in_any_order(backend):
    """Results come in the order of the index set; the output in the order of the queries."""
    q, k, v = qkv(Nq=9, Nk=8, dv=None if backend == "triton" else 24)
    bias = torch.randn(1, 1, 9, 8)
    queries, keys = [7, 0, 3, 8], torch.tensor([6, 1, 2])
    got = i2am.attention(q, k, v, attn_mask=bias, queries=queries, keys=keys, backend=backend)
    s = (q @ k.transpose(-1, -2) / 4 + bias).double()
    p, c = s.softmax(-1), s[:, :, queries][..., keys].softmax(-2)
    for x, y in [
        (got.out, p @ v.double()),
        (got.r2g, c.mean(-1)),
        (got.g2r, p[:, :, queries][..., keys].mean(-2)),
        (got.mass, p[:, :, queries][..., keys].sum(-1)),
        (got.row_lse, s.logsumexp(-1)),
        (got.col_lse, s[:, :, queries][..., keys].logsumexp(-2)),
    ]:
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["streaming", "triton", "reference"])
def test_references_in_any_order_are_added_to_what_is_there(backend):
    """Two, the later keys first, in two calls: each sum is its own, and the column statistics are in their order."""
    keys, queries = [slice(5, 7), slice(1, 4)], slice(2, 9)
    want = [dict(r2g=0.0, g2r=0.0, mass=0.0, sram=0.0) for _ in keys]
    weights = torch.rand(1, 2, 7).softmax(-1)
    sums = [Sums(*(torch.zeros(2, 3, *n) for n in ((7,), (K,), (7,), (2, K)))) for K in (2, 3)]
    for _ in range(2):
        q, k, v = qkv(Nq=10, Nk=7)
        s = (q @ k.transpose(-1, -2) / 4).double()
        _, row_lse, col_lse = accumulate(
            q, k, v, sums=sums, queries=queries, keys=keys, regions=weights, backend=backend
        )
        torch.testing.assert_close(row_lse.double(), s.logsumexp(-1), rtol=1e-5, atol=1e-6)
        for n, K in enumerate(keys):
            p = s.softmax(-1)[:, :, queries, K]
            want[n]["r2g"] += s[:, :, queries, K].softmax(-2).mean(-1)
            want[n]["g2r"] += p.mean(-2)
            want[n]["mass"] += p.sum(-1)
            want[n]["sram"] += weights.double() @ p
            torch.testing.assert_close(col_lse[n].double(), s[:, :, queries, K].logsumexp(-2), rtol=1e-5, atol=1e-6)
    for one, true in zip(sums, want, strict=True):
        for name, y in true.items():
            torch.testing.assert_close(getattr(one, name).double(), y, rtol=1e-5, atol=1e-6, msg=name)


def test_trained_weights_without_gradients_are_added_up():
    q, k, v = (torch.nn.Parameter(x) for x in qkv())
    sums = new_sums(q, 7)
    with pytest.raises(NotImplementedError, match="running sums carry no gradient"):
        accumulate(q, k, v, sums=[sums])
    with torch.no_grad():
        accumulate(q, k, v, sums=[sums])
    torch.testing.assert_close(sums.r2g.sum(-1), torch.ones(2, 3))


def test_the_widest_head_of_the_kernels():
    wide = torch.randn(1, 1, 2, 256)
    assert choose_backend(wide, wide, "triton") == "triton"
    with pytest.raises(ValueError, match="at most 256; got q 257, v 257"):
        choose_backend(torch.randn(1, 1, 2, 257), torch.randn(1, 1, 2, 257), "triton")


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 1, 10), (1, 3, 10)])
def test_rows_that_are_not_the_calls_are_refused(shape):
    q, _, v = qkv()
    with pytest.raises(ValueError, match=r"row_lse must be \[B, H, Nq\] = \(2, 3, 10\)"):
        check_row_lse(q, None, torch.zeros(shape))
    with pytest.raises(ValueError, match="give v=None"):
        check_row_lse(q, v, torch.zeros(2, 3, 10))
    check_row_lse(q, None, torch.zeros(2, 3, 10))


def op_arguments(backend="streaming", v=True, regions=True):
    q, k, value = qkv(Nq=10, Nk=7, dv=None if backend == "triton" else 24)
    sums = [new_sums(q, K, mass=True, regions=2 if regions else 0) for K in (2, 3)]  # the later keys first
    weights = torch.rand(1, 2, 10) if regions else None
    return (
        q,
        k,
        value if v else None,
        None,
        weights,
        0.25,
        [0, 10],
        [5, 7, 1, 4],
        [s.r2g for s in sums],
        [s.g2r for s in sums],
        [s.mass for s in sums],
        [s.sram for s in sums] if regions else [],
        backend,
    )


@pytest.mark.parametrize("backend", ["streaming", "triton"])
def test_opcheck(backend):
    torch.manual_seed(0)
    for v in (True, False):
        opcheck(torch.ops.i2am.attention.default, op_arguments(backend, v=v, regions=v))


@pytest.mark.parametrize("backend", ["streaming", "triton"])
def test_compile_keeps_one_graph(backend):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_k = torch.nn.Linear(16, 32), torch.nn.Linear(16, 32)

        def forward(self, x, y):
            q, k = (f(z).unflatten(-1, (2, 16)).transpose(1, 2) for f, z in ((self.to_q, x), (self.to_k, y)))
            a = i2am.attention(q, k, k, backend=backend)
            return a.out.transpose(1, 2).flatten(2).relu(), a.r2g, a.g2r

    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    module, x, y = Module(), torch.randn(1, 12, 16), torch.randn(1, 5, 16)
    with torch.no_grad():
        want = module(x, y)
        got = torch.compile(module, backend=count, fullgraph=True)(x, y)
    assert len(graphs) == 1
    assert "i2am.attention" in graphs[0].code
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_eager_calls_pass_the_custom_op_by(monkeypatch):
    """It costs more than cross-attention does on a GPU; who compiles, fakes or watches needs it."""
    called = []

    def custom_op(*args):
        called.append(args)
        return torch.zeros(2, 3, 10, 16), torch.zeros(2, 3, 10), torch.zeros(2, 3, 7)

    monkeypatch.setattr("i2am.ops._custom_op", custom_op)
    q, k, v = qkv()

    def by_op(*args, **kwargs):
        called.clear()
        i2am.attention(*args, **kwargs)
        return len(called) == 1

    assert not by_op(q, k, v)
    trained = torch.nn.Parameter(k)
    assert not by_op(q, trained, v)  # the differentiable op, which has tests of its own
    with torch.no_grad():
        assert not by_op(q, trained, v)
    with FlopCounterMode(display=False):
        assert by_op(q, k, v)
    with torch.autograd.forward_ad.dual_level():
        assert by_op(q, k, v)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, k, v)]
    assert by_op(*fake)
