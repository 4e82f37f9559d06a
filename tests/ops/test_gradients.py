"""The op's gradients against the float64 twin by plain autograd: each read-out alone, all together, no silent zero."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import i2am
from i2am.ops import READS, Sums, accumulate, backward, forward, naive, readouts, sweeps
from i2am.ops.results import Readouts

FIELDS = ("out", "row_lse", *READS)


def problem(B=2, H=2, Nq=19, Nk=17, d=8, dv=None, peak=None, dtype=torch.float32, kind="spans", mask=None, seed=0):
    """A call's tensors and keywords; ``peak`` is the largest absolute logit."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    q, k, v = normal(B, H, Nq, d), normal(B, H, Nk, d), normal(B, H, Nk, dv or d)
    if peak is not None:
        q *= peak * d**0.5 / (q @ k.transpose(-1, -2)).abs().amax()
    queries, keys = {
        "whole": (slice(None), [slice(None)]),
        "spans": (slice(2, Nq - 1), [slice(1, 4), slice(4, Nk - 2)]),
        "apart": (slice(0, Nq - 3), [slice(Nk - 5, Nk), slice(0, 3)]),
        "gaps": (torch.randperm(Nq, generator=g)[: Nq - 4], [[Nk - 1, 0, 5], [3, 9, 2, 7]]),
    }[kind]
    full = (B, H, Nq, Nk)
    if mask == "bool":
        allowed = torch.rand(full, generator=g) > 0.3
        allowed[0, 0, 3], allowed[:, -1, :, 2] = False, False  # a row and a column of which nothing is left
        mask = allowed
    elif mask == "padding":
        mask = (torch.arange(Nk) < Nk - 3).expand(B, 1, 1, Nk)
    elif mask == "additive":
        mask = 3 * normal(B, 1, Nq, Nk)
    Q = torch.arange(Nq)[queries].numel()
    counts = [torch.arange(Nk)[K].numel() for K in keys]
    return [x.to(dtype) for x in (q, k, v)], dict(
        queries=queries,
        keys=keys,
        attn_mask=mask,
        regions=torch.rand(B, 2, Q, generator=g),
        key_coordinates=[normal(n, 2) for n in counts],
        query_coordinates=normal(1, Q, 3),
        columns=[[n - 1, 0] for n in counts],
        pairs=[torch.stack([torch.arange(4), torch.arange(4) % n], 1) for n in counts],
    )


def leaves(tensors, dtype=None):
    return [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]


def error(got, want):
    """Of one gradient: the largest difference over the largest entry."""
    if want is None or not want.any():
        assert got is None or got.abs().amax() < 1e-6
        return 0.0
    return float((got.double() - want).abs().max() / want.abs().max())


def drawn(like):
    """What a loss would send back: nothing where the value is not finite."""
    g = torch.Generator().manual_seed(like.numel())
    return torch.randn(like.shape, generator=g, dtype=torch.float64)


def losses(found: list[Readouts]):
    """One number per field: a random linear function of what is finite in it."""
    sums = {}
    for name in FIELDS:
        values = [getattr(one, name) for one in found]
        if name in ("out", "row_lse", "entropy"):
            values = values[:1]
        finite = [torch.where(x.isfinite(), x, 0.0).double() for x in values if x is not None]
        sums[name] = sum((x * drawn(x)).sum() for x in finite)
    return sums


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)


def compare(tensors, keywords, backend, bound, read=READS):
    """Every field's gradients alone and all together, against the twin's."""
    ours, twin = leaves(tensors), leaves(tensors, torch.float64)
    got = losses(readouts(*ours, read=read, backend=backend, **keywords))
    want = losses(readouts(*twin, read=read, backend="reference", **keywords))
    got["all"], want["all"] = sum(got.values()), sum(want.values())
    worst = {}
    for name in want:
        if not isinstance(want[name], torch.Tensor) or not want[name].requires_grad:
            continue
        if not got[name].requires_grad:  # the mass on every key: 1
            assert name == "mass"
            assert all(x is None or x.abs().amax() < 1e-10 for x in gradients(want[name], twin))
            continue
        torch.testing.assert_close(
            got[name], want[name], rtol=bound, atol=bound * 40, msg=lambda m, n=name: f"{n}: {m}"
        )
        pairs = zip(gradients(got[name], ours), gradients(want[name], twin), strict=True)
        worst[name] = max(error(a, b) for a, b in pairs)
    assert max(worst.values()) <= bound, worst
    return worst


# ---------------------------------------------------------------------------------------------------- against the twin


@pytest.mark.parametrize("mask", [None, "bool", "padding", "additive"])
@pytest.mark.parametrize("kind", ["whole", "spans", "apart", "gaps"])
def test_every_readout(kind, mask):
    compare(*problem(kind=kind, mask=mask), "streaming", 1e-5)


@pytest.mark.parametrize("read", [("log_p", "log_c"), ("col_lse", "mass"), ("expected", "landing"), ("r2g", "g2r")])
def test_two_sides_alone(read):
    """One read-out of each softmax: sides of the least width, which are one product."""
    tensors, keywords = problem()
    needs = dict(log_p=["pairs"], expected=["key_coordinates", "query_coordinates"]).get(read[0], [])
    keywords = {name: x for name, x in keywords.items() if name in ("queries", "keys", *needs)}
    compare(tensors, keywords, "streaming", 1e-5, read=read)


@pytest.mark.parametrize("peak", [20, 40, 80])
@pytest.mark.parametrize("mask", [None, "bool"])
def test_large_logits(peak, mask):
    """Column and row normalisers lie up to 160 nats apart."""
    compare(*problem(peak=peak, mask=mask, Nq=40, Nk=33), "streaming", 1e-5)


@pytest.mark.parametrize("kind", ["whole", "gaps"])
def test_between_the_sides(kind, monkeypatch):
    """Where both sides cannot be one product, or float64 has to help out, the result is the same."""
    monkeypatch.setattr(forward, "REACH", {torch.float32: -1.0, torch.float64: -1.0})
    compare(*problem(kind=kind, mask="bool"), "streaming", 1e-5)
    monkeypatch.setattr(backward, "LARGE", 0.0)
    compare(*problem(kind=kind, mask="bool"), "streaming", 1e-6)


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_several_tiles(mask, monkeypatch):
    monkeypatch.setattr(sweeps, "CPU_TILE", 150)
    compare(*problem(mask=mask, H=3), "streaming", 1e-5)


@pytest.mark.parametrize(
    "shape", [dict(d=40, dv=5), dict(d=5, dv=72), dict(Nq=1, Nk=1, kind="whole"), dict(Nk=1, kind="whole")]
)
def test_odd_shapes(shape):
    if shape.get("Nk") == 1:
        tensors, keywords = problem(**{**shape, "Nk": 1, "Nq": max(4, shape.get("Nq", 4))})
        read = [name for name in READS if name not in ("columns",)]
        keywords["columns"] = None
        compare(tensors, keywords, "streaming", 1e-5, read=read)
    else:
        compare(*problem(**shape), "streaming", 1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float16, 2e-3), (torch.bfloat16, 1.2e-2)])
def test_dtypes(dtype, bound):
    """Half precision: what the rounding of the gradient itself, and of ``out``, leaves; float64 is exact."""
    tensors, keywords = problem(dtype=dtype)
    ours, twin = leaves(tensors), leaves(tensors, torch.float64)
    got = losses(readouts(*ours, read=READS, backend="streaming", **keywords))
    want = losses(readouts(*twin, read=READS, backend="reference", **keywords))
    for name in want:
        pairs = zip(gradients(got[name], ours), gradients(want[name], twin), strict=True)
        assert max(error(a, b) for a, b in pairs) <= bound, name
    assert all(x.dtype == dtype for x in gradients(sum(got.values()), ours))


@pytest.mark.parametrize("kind", ["spans", "gaps"])
def test_strides_are_the_callers(kind):
    """q, k, v as views of ``[B, N, H, d]``, with gaps in memory."""
    tensors, keywords = problem(kind=kind)
    views = [torch.stack([x, x], 4).transpose(1, 2).contiguous()[..., 0].transpose(1, 2) for x in tensors]
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    compare(views, keywords, "streaming", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "spans", "gaps"])
def test_triton(kind):
    """The kernels' forward, interpreted; the same backward."""
    compare(*problem(kind=kind, d=16, B=1), "triton", 1e-5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        dict(
            B=st.integers(1, 2),
            H=st.integers(1, 3),
            Nq=st.integers(9, 70),
            Nk=st.integers(11, 60),
            d=st.integers(1, 24),
            peak=st.sampled_from([0.1, 3.0, 15.0, 60.0]),
            kind=st.sampled_from(["whole", "spans", "apart", "gaps"]),
            mask=st.sampled_from([None, "bool", "padding", "additive"]),
            seed=st.integers(0, 1 << 16),
        )
    ),
    st.sets(st.sampled_from(READS), min_size=1),
)
@example(dict(B=1, H=1, Nq=9, Nk=11, d=5, peak=0.1, kind="spans", mask=None, seed=0), {"entropy"})  # nearly uniform
@example(dict(B=1, H=1, Nq=9, Nk=11, d=1, peak=15.0, kind="whole", mask="bool", seed=2), {"r2g"})  # near one-hot
@example(dict(B=1, H=2, Nq=18, Nk=38, d=1, peak=18.0, kind="spans", mask="padding", seed=50350), {"mass"})
@example(
    dict(B=1, H=1, Nq=9, Nk=11, d=22, peak=60.0, kind="whole", mask=None, seed=1), {"columns", "g2r", "log_p", "log_c"}
)
def test_drawn(shape, read):
    tensors, keywords = problem(**shape)
    needs = dict(sram="regions", expected="key_coordinates", landing="query_coordinates", columns="columns")
    wanted = {needs[name] for name in read if name in needs} | ({"pairs"} if {"log_p", "log_c"} & read else set())
    optional = {"regions", "key_coordinates", "query_coordinates", "columns", "pairs"}
    keywords = {name: x for name, x in keywords.items() if name in wanted or name not in optional}
    compare(tensors, keywords, "streaming", 1e-5, read=sorted(read))


def test_gradcheck():
    tensors, keywords = problem(B=1, H=1, Nq=6, Nk=5, d=3, dtype=torch.float64, kind="whole")
    keywords["columns"], keywords["pairs"] = [[2, 0]], [torch.tensor([[0, 1], [3, 2]])]

    def everything(q, k, v):
        (one,) = readouts(q, k, v, read=READS, backend="streaming", **keywords)
        return tuple(x for name, x in one._asdict().items() if name != "mass")

    assert torch.autograd.gradcheck(everything, leaves(tensors))


# ------------------------------------------------------------------------------------------------------ the front door


@pytest.mark.parametrize("keys", [None, slice(2, 9)])
def test_attention_itself_differentiates(keys):
    tensors, _ = problem()
    ours, twin = leaves(tensors), leaves(tensors, torch.float64)
    got = i2am.attention(*ours, keys=keys)
    want = i2am.attention(*twin, keys=keys, backend="reference")
    for name in got._fields:
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        if a is not None:
            pairs = zip(gradients((a * drawn(a)).sum(), ours), gradients((b * drawn(b)).sum(), twin), strict=True)
            assert max(error(x, y) for x, y in pairs) < 1e-5, name


def test_values_are_those_of_the_fast_path():
    """Bit for bit, whether autograd records or not."""
    tensors, _ = problem(Nq=70, Nk=90)
    plain = i2am.attention(*tensors, keys=slice(3, 60))
    tracked = i2am.attention(*leaves(tensors), keys=slice(3, 60))
    for a, b in zip(plain, tracked, strict=True):
        assert torch.equal(a, b.detach())
        assert b.requires_grad
        assert not a.requires_grad
    with torch.no_grad():
        assert not any(x.requires_grad for x in i2am.attention(*leaves(tensors), keys=slice(3, 60)))


def test_only_what_requires_a_gradient_gets_one():
    (q, k, v), _ = problem()
    (q,) = leaves([q])
    i2am.attention(q, k, v).r2g.amax().backward()
    assert q.grad.any()
    assert k.grad is None


def test_nothing_is_computed_that_was_not_asked_for(monkeypatch):
    """An own-side read-out takes one attention, no second sweep, no fused op."""
    calls = []
    attend = sweeps.attend
    monkeypatch.setattr(sweeps, "attend", lambda *a, **k: calls.append("attend") or attend(*a, **k))
    monkeypatch.setattr(sweeps, "weigh", lambda *a, **k: calls.append("weigh"))
    tensors, keywords = problem(kind="whole")
    ours = leaves(tensors)
    one = i2am.attention(*ours, read=("expected",), key_coordinates=keywords["key_coordinates"][0])
    one.expected.sum().backward()
    assert calls == ["attend"]
    assert one.r2g is None
    assert one.col_lse is None


def test_memory_is_linear():
    """Backward of everything at 3,000 × 3,000: an Nq × Nk tensor would be 34 MiB."""
    tensors, keywords = problem(B=1, H=1, Nq=3000, Nk=3000, d=8, kind="whole")
    ours = leaves(tensors)
    found = losses(readouts(*ours, read=READS, **keywords))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        found = losses(readouts(*ours, read=READS, **keywords))
    assert max(kept) < 3000 * 64
    sum(found.values()).backward()


def test_inside_autocast():
    """The statistics stay in float32 whatever autocast is on, forwards and backwards."""
    tensors, keywords = problem()
    plain, cast = leaves(tensors), leaves(tensors)
    want = sum(losses(readouts(*plain, read=READS, backend="streaming", **keywords)).values())
    with torch.autocast("cpu", torch.bfloat16):
        got = sum(losses(readouts(*cast, read=READS, backend="streaming", **keywords)).values())
        got.backward()
    want.backward()
    for a, b in zip(cast, plain, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("kind", ["spans", pytest.param("whole", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(kind):
    tensors, keywords = problem(kind=kind)
    keywords["columns"] = [slice(0, 2) for _ in keywords["keys"]]  # index lists break the graph
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss(q, k, v):
        found = readouts(q, k, v, read=READS, backend="streaming", **keywords)
        return sum(x.nan_to_num(0, 0, 0).sum() for one in found for x in one if x is not None)

    eager, compiled = leaves(tensors), leaves(tensors)
    loss(*eager).backward()
    torch.compile(loss, backend=keep, fullgraph=True)(*compiled).backward()
    assert len(graphs) == 1
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.slow
def test_compiles_with_its_backward():
    """AOTAutograd traces the backward on shapes: the fakes fit."""
    tensors, keywords = problem()
    keywords["columns"] = [slice(0, 2) for _ in keywords["keys"]]

    def loss(q, k, v):
        found = readouts(q, k, v, read=READS, backend="streaming", **keywords)
        return sum(x.nan_to_num(0, 0, 0).sum() for one in found for x in one if x is not None)

    eager, compiled = leaves(tensors), leaves(tensors)
    loss(*eager).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(*compiled).backward()
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_checkpointing():
    tensors, keywords = problem()
    plain, again = leaves(tensors), leaves(tensors)

    def loss(q, k, v):
        return sum(losses(readouts(q, k, v, read=READS, backend="streaming", **keywords)).values())

    loss(*plain).backward()
    checkpoint(loss, *again, use_reentrant=False).backward()
    for a, b in zip(again, plain, strict=True):
        assert torch.equal(a.grad, b.grad)


# ------------------------------------------------------------------------------------------ rather an error than a zero


def one_field(name, q, k, v, **keywords):
    keywords = {**problem(kind="whole")[1], **keywords}
    return getattr(readouts(q, k, v, read=READS, backend="streaming", **keywords)[0], name)


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_is_silently_constant(name):
    """Each either carries a gradient or is a constant by definition: the mass on every key."""
    tensors, _ = problem(kind="whole")
    x = one_field(name, *leaves(tensors))
    assert x.requires_grad == (name != "mass")
    assert i2am.attention(*leaves(tensors), keys=slice(0, 9), read=("mass",)).mass.requires_grad


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "mass"])
def test_second_derivatives_are_refused(name):
    tensors, _ = problem(kind="whole")
    ours = leaves(tensors)
    x = one_field(name, *ours)
    (dq,) = torch.autograd.grad((x * drawn(x)).sum(), ours[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.square().sum().backward()


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("read", [None, ("r2g",)])
def test_forward_mode_is_refused(which, read):
    tensors, _ = problem(kind="whole")

    def out(x):
        inputs = [x if n == which else y for n, y in enumerate(tensors)]
        return i2am.attention(*inputs, read=read).row_lse

    with pytest.raises(NotImplementedError, match=r"[qkv] carries a forward-mode tangent.*backward"):
        torch.func.jvp(out, (tensors[which],), (torch.ones_like(tensors[which]),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode tangent"):
        out(forward_ad.make_dual(tensors[which], torch.ones_like(tensors[which])))
    with forward_ad.dual_level():
        out(tensors[which])  # nothing here has a tangent


@pytest.mark.parametrize("argument", ["attn_mask", "regions", "key_coordinates", "query_coordinates"])
def test_other_gradients_are_refused(argument):
    tensors, keywords = problem(kind="whole", mask="additive")
    x = keywords[argument][0] if argument == "key_coordinates" else keywords[argument]
    x.requires_grad_()
    with pytest.raises(NotImplementedError, match=rf"{argument} requires a gradient.*detach"):
        readouts(*tensors, read=READS, backend="streaming", **keywords)
    with torch.no_grad():
        readouts(*tensors, read=READS, backend="streaming", **keywords)
    if argument == "attn_mask":
        with pytest.raises(NotImplementedError, match="attn_mask requires a gradient"):
            i2am.attention(*tensors, attn_mask=x)


def test_running_sums_refuse_a_gradient():
    tensors, _ = problem(kind="whole")
    (q, k, v), zeros = leaves(tensors), torch.zeros
    sums = Sums(zeros(2, 2, 19), zeros(2, 2, 17))
    with pytest.raises(NotImplementedError, match=r"running sums carry no gradient.*torch.no_grad"):
        accumulate(q, k, v, sums=[sums])
    assert not sums.r2g.any()
    with torch.no_grad():
        accumulate(q, k, v, sums=[sums])
    assert sums.r2g.any()


def test_func_transforms_are_refused():
    """torch.func.grad, vjp and vmap have no rule for custom ops."""
    (q, k, v), _ = problem(kind="whole")
    for transform in (torch.func.grad, torch.func.hessian):
        with pytest.raises(NotImplementedError, match=r"torch\.func"):
            transform(lambda x: i2am.attention(x, k, v).r2g.square().sum())(q)


@pytest.mark.parametrize("reads", ["r2g,g2r,sram,expected,landing,entropy,col_lse,mass", "landing", "mass,entropy"])
def test_custom_op_contract(reads):
    """What torch itself checks of a functional op: schema, fake tensors, autograd registration."""
    (q, k, v), keywords = problem(B=1, kind="whole")
    arguments = (*leaves((q, k, v)), None, keywords["regions"][:1] / keywords["regions"][:1].sum(2, keepdim=True))
    arguments += (keywords["key_coordinates"][0][None], keywords["query_coordinates"], 0.3, [0, 19], [0, 17])
    torch.library.opcheck(
        torch.ops.i2am.attention_maps.default,
        (*arguments, reads, "streaming"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(read="r2g"), "read must be a sequence of names"),
        (dict(read=()), "read must be a sequence of names"),
        (dict(read=("r2g", "ulam")), r"read must be .* among r2g.*got \('r2g', 'ulam'\)"),
        (dict(read=("sram",)), "read 'sram' needs regions="),
        (dict(read=("expected",)), "read 'expected' needs key_coordinates="),
        (dict(read=("landing",)), "read 'landing' needs query_coordinates="),
        (dict(read=("columns",)), "read 'columns' needs columns="),
        (dict(read=("log_p",)), "read 'log_p' needs pairs="),
        (dict(read=("r2g",), regions=torch.ones(1, 19)), "regions= is given, but .* does not ask for sram"),
        (dict(regions=torch.ones(1, 19)), "regions= is given, but read= names nothing"),
        (dict(read=("sram",), regions=torch.ones(1, 18)), r"regions must be \[R, 19\]"),
        (dict(read=("sram",), regions=torch.zeros(1, 19)), "positive sum"),
        (dict(read=("expected",), key_coordinates=torch.ones(16, 2)), r"key_coordinates must be \[17, c\]"),
        (dict(read=("landing",), query_coordinates=torch.ones(19)), r"query_coordinates must be \[19, c\]"),
        (dict(read=("columns",), columns=[17]), "columns holds 17"),
        (dict(read=("log_p",), pairs=torch.tensor([[0, 17]])), r"up to \(0, 17\), of 19 generated queries and 17"),
        (dict(read=("log_p",), pairs=torch.tensor([[-1, 0]])), "the least is -1"),
        (dict(read=("log_c",), pairs=torch.tensor([[0.0, 1.0]])), "pairs must hold integers"),
        (dict(read=("log_c",), pairs=torch.tensor([0, 1])), r"pairs must be \[M, 2\]"),
    ],
)
def test_refusals(change, message):
    tensors, _ = problem()
    with pytest.raises(ValueError, match=message):
        i2am.attention(*tensors, **change)


def test_values_are_needed_without_read():
    (q, k, _), _ = problem()
    with pytest.raises(ValueError, match="v is None"):
        i2am.attention(q, k, None)
    assert i2am.attention(q, k, None, read=("r2g",)).out is None


def test_references_must_fit():
    tensors, keywords = problem()
    for name, message in (("key_coordinates", "one entry per reference"), ("pairs", "one entry per reference")):
        with pytest.raises(ValueError, match=message):
            readouts(*tensors, read=READS, **{**keywords, name: keywords[name][:1]})


def test_the_twin_is_the_definition():
    """The twin's read-outs from the twin's own probabilities, so that both cannot be wrong together."""
    (q, k, v), keywords = problem(kind="spans", mask="bool", dtype=torch.float64)
    found = readouts(q, k, v, read=READS, backend="reference", **keywords)
    p = naive.probabilities(q, k, scale=8**-0.5, mask=keywords["attn_mask"], queries=keywords["queries"])
    for one, K, x in zip(found, keywords["keys"], keywords["key_coordinates"], strict=True):
        rows, columns = p.rows[:, :, keywords["queries"]][..., K], p.columns[..., K]
        torch.testing.assert_close(one.expected, torch.einsum("bhij,jc->bhic", rows, x.double()))
        y = keywords["query_coordinates"][0].double()
        torch.testing.assert_close(one.landing, torch.einsum("bhij,ic->bhjc", columns, y))
        torch.testing.assert_close(one.log_p[..., 1].exp(), rows[:, :, 1, 1])
        torch.testing.assert_close(one.log_c[..., 2].exp(), columns[:, :, 2, 2])
        torch.testing.assert_close(one.columns[..., 1], rows[..., 0])
        weights = keywords["regions"].double() / keywords["regions"].double().sum(2, keepdim=True)
        torch.testing.assert_close(one.sram, torch.einsum("bri,bhij->bhrj", weights, rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pairs_and_columns_of_large_logits_in_half_precision(dtype):
    """A few logits are as exact as the log-sum-exp that is taken from them."""
    q, k = (4 * torch.randn(1, 2, n, 16).to(dtype) for n in (30, 20))
    asked = dict(read=("log_p", "log_c", "columns"), columns=[3, 17], pairs=torch.tensor([[0, 3], [29, 19], [7, 0]]))
    got, true = (i2am.attention(q, k, None, backend=name, **asked) for name in ("streaming", "reference"))
    for name in asked["read"]:
        torch.testing.assert_close(getattr(got, name).double(), getattr(true, name).double(), rtol=1e-4, atol=1e-4)


def test_a_fully_masked_row_has_no_mass_and_no_gradient():
    q, k, v = (torch.randn(1, 2, n, 16).requires_grad_() for n in (30, 20, 20))
    mask = torch.ones(30, 20, dtype=torch.bool)
    mask[4] = False
    one = i2am.attention(q, k, v, attn_mask=mask, read=("mass", "entropy", "g2r"))
    assert one.mass[:, :, 4].eq(0).all()
    assert one.mass.sum() == 2 * 29
    (one.entropy.sum() + one.g2r.square().sum() + one.out.square().sum()).backward()
    assert q.grad[:, :, 4].eq(0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
