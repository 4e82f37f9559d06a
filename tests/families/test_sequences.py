"""patch_modules(queries=…): any module that calls attention on one sequence, whatever its projections are."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import fused
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth

TEXT, GEN, REF = 5, (4, 6), (4, 2)
LAYERS = ["double_blocks.*", "single_blocks.*"]
DESCRIBED = dict(
    layers=LAYERS,
    queries=slice(-32, -8),
    reference=i2am.Reference(grid=REF, tokens=slice(-8, None)),
    grid=GEN,
    num_steps=4,
    time_groups=2,
)


def loop(model, texts=(TEXT,)):
    """Four steps; ``texts``: lengths of the prompts that are called one after the other."""
    generator = torch.Generator().manual_seed(1)
    noise, reference = torch.randn(1, 24, 8, generator=generator), torch.randn(1, 8, 8, generator=generator)

    @torch.no_grad()
    def go():
        x = noise
        for t in (1.0, 0.7, 0.5, 0.2):
            given = torch.cat([x, reference], dim=1)
            outs = [model(given, torch.ones(1, n, 8), timesteps=torch.tensor([t])) for n in texts]
            x = x - 0.2 * outs[0][:, :24]
        return x

    return go


@pytest.mark.parametrize("texts", [(TEXT,), (TEXT, 3)], ids=["plain", "guided"])
@support.family(
    "fused projections, one sequence (original Flux's shape)",
    "`i2am.patch_modules(queries=…)`",
    "tokens in context, as described",
)
def test_fused_projections(texts):
    """Norms, rotary embeddings and fused weights lie before the call; prompts of other lengths count from the end."""
    model = fused.FusedTransformer()
    go = loop(model, texts)
    calls = capture_calls(model, go, ("DoubleBlock", "SingleBlock"))
    plain = go()
    with i2am.patch_modules(model, **DESCRIBED, **({"guidance": 0} if len(texts) > 1 else {})) as tracer:
        assert go().equal(plain)
    maps = tracer.maps()
    assert maps.layers == ["double_blocks.0", "double_blocks.1", "single_blocks.0"]
    assert maps.canvas == GEN
    n = len(texts)
    chosen = generated(calls, GEN, slice(TEXT, TEXT + 24), evaluations=range(0, 4 * n, n))
    truth = Truth(chosen, keys=slice(TEXT + 24, None), groups=[0] * 2 * n + [1] * 2 * n, reference_grid=REF)
    support.check(maps, truth, 2)


def test_functions_describe_as_well():
    model = fused.FusedTransformer()
    go = loop(model)
    asked = []

    def reference(layer, keys, grid):
        asked.append((layer, keys, grid))
        return [i2am.Reference(grid=REF, tokens=slice(keys - 8, keys))]

    options = DESCRIBED | {"queries": lambda layer, n: slice(n - 32, n - 8), "reference": reference}
    with i2am.patch_modules(model, **DESCRIBED) as spans:
        go()
    with i2am.patch_modules(model, **options) as functions:
        go()
    assert asked[0] == ("double_blocks.0", TEXT + 32, GEN)
    for direction in ("r2g", "g2r", "mass"):
        assert functions.maps().ulam(direction).equal(spans.maps().ulam(direction))


def test_the_call_that_is_meant():
    model = fused.FusedTransformer(extra=True)
    go = loop(model)
    calls = capture_calls(model, go, ("DoubleBlock",))
    described = DESCRIBED | {"layers": "double_blocks.*"}
    with i2am.patch_modules(model, **described), pytest.raises(ValueError, match="queries"):
        go()  # the first call has the text alone
    second = i2am.Reference(grid=REF, tokens=slice(-8, None), call=1)
    with i2am.patch_modules(model, **described | {"reference": second}) as tracer:
        go()
    chosen = generated(calls, GEN, slice(TEXT, TEXT + 24), nth=1)
    support.check(tracer.maps(), Truth(chosen, keys=slice(TEXT + 24, None), groups=[0, 0, 1, 1], reference_grid=REF), 2)


class Twice(torch.nn.Module):
    """A block that calls attention on its sequence twice, and a model of it."""

    class Block(torch.nn.Module):
        def forward(self, x):
            for scale in (0.3, 3.0):
                x = F.scaled_dot_product_attention(x, x, x, scale=scale)
            return x

    def __init__(self):
        super().__init__()
        self.block = self.Block()

    def forward(self, x, timestep):
        return self.block(x[:, None])[:, 0]


def test_another_call_that_fits_is_refused():
    """Which of two calls is meant is never guessed; said, either is taken."""
    model, x = Twice(), torch.randn(1, 32, 16)
    described = {"layers": "block", "queries": slice(0, 24), "grid": (4, 6), "num_steps": 1}
    reference = i2am.Reference(grid=(2, 4), tokens=slice(24, 32))
    with i2am.patch_modules(model, reference=reference, **described), pytest.raises(ValueError, match=r"call=0"):
        model(x, 0.5)
    wanted, maps = [], []
    for call in (0, 1):
        said = i2am.Reference(grid=(2, 4), tokens=slice(24, 32), call=call)
        with i2am.patch_modules(model, reference=said, **described) as tracer:
            out = model(x, 0.5)
        torch.testing.assert_close(out, model(x, 0.5))
        maps.append(tracer.maps().ulam("r2g"))
    first = F.scaled_dot_product_attention(x, x, x, scale=0.3)
    for y, scale in ((x, 0.3), (first, 3.0)):
        wanted.append((scale * y[:, :24] @ y[:, 24:].mT).softmax(1).mean(-1).reshape(1, 4, 6))
    torch.testing.assert_close(torch.stack(maps), torch.stack(wanted), rtol=1e-4, atol=1e-6)


def flash_package(monkeypatch, name="flash_attn"):
    """A stand-in of the package: functions on ``[B, N, H, d]`` and on packed ``[ΣN, H, d]``; what they were given."""
    seen = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        seen.append(q.shape)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        parts = [x.split(ends.diff().tolist()) for x, ends in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))]
        return torch.cat(
            [flash_attn_func(*(x[None] for x in one), 0.0, softmax_scale)[0] for one in zip(*parts, strict=True)]
        )

    def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False):
        return flash_attn_func(*qkv.unbind(2), softmax_scale=softmax_scale)

    package = types.ModuleType(name)
    for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_qkvpacked_func):
        setattr(package, function.__name__, function)
    monkeypatch.setitem(sys.modules, name, package)
    return package, seen


def maps_of(model, texts=(TEXT,), **changed):
    """Maps of a loop, after seeing that its output is the model's own."""
    plain = loop(model, texts)()
    with i2am.patch_modules(model, **DESCRIBED | changed) as tracer:
        assert loop(model, texts)().equal(plain)
    return tracer.maps()


def assert_same(one, other):
    for direction in ("r2g", "g2r", "mass"):
        torch.testing.assert_close(one.ulam(direction), other.ulam(direction))


def test_flash_attention_is_intercepted(monkeypatch):
    """By its module, and by the name that a ``from flash_attn import flash_attn_func`` has bound."""
    package, seen = flash_package(monkeypatch)
    wanted = maps_of(fused.FusedTransformer())
    assert_same(maps_of(fused.FusedTransformer(fused.flash)), wanted)
    assert len(seen) == 2 * 4 * 3
    importer = types.ModuleType("importer")
    importer.flash_attn_func = own = package.flash_attn_func  # from flash_attn import flash_attn_func
    monkeypatch.setitem(sys.modules, "importer", importer)

    def imported(q, k, v):
        return importer.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    assert_same(maps_of(fused.FusedTransformer(imported)), wanted)
    assert importer.flash_attn_func is package.flash_attn_func is own


def packed(q, k, v, lengths=None):
    """Attention by ``flash_attn_varlen_func``; ``lengths``: of each sample, from the first token."""
    batch, longest = q.shape[0], q.shape[2]
    lengths = lengths or [longest] * batch
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (torch.cat([x[i, :, :n].transpose(0, 1) for i, n in enumerate(lengths)]) for x in (q, k, v))
    out = sys.modules["flash_attn"].flash_attn_varlen_func(q, k, v, ends, ends, max(lengths), max(lengths))
    rows = torch.nn.utils.rnn.pad_sequence(list(out.split(lengths)), batch_first=True)
    return F.pad(rows, (0, 0, 0, 0, 0, longest - rows.shape[1])).transpose(1, 2)


def test_packed_flash_attention_is_intercepted(monkeypatch):
    flash_package(monkeypatch)
    assert_same(maps_of(fused.FusedTransformer(packed)), maps_of(fused.FusedTransformer()))


class Packed(torch.nn.Module):
    """A model of one block on samples of two lengths; what is behind a sample's end is no key of it."""

    class Block(torch.nn.Module):
        lengths = (40, 30)

        def forward(self, x):
            x = x[:, None]
            return packed(x, x, x, list(self.lengths))[:, 0]

    def __init__(self):
        super().__init__()
        self.block = self.Block()

    def forward(self, x, timestep):
        return self.block(x)


def test_samples_of_several_lengths(monkeypatch):
    """The longer one's maps are those of it alone; the shorter one's tokens are not where they are described."""
    flash_package(monkeypatch)
    model, x = Packed(), torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(2))
    described = dict(layers="block", queries=slice(-32, -8), grid=GEN, num_steps=1, time_groups=1)
    described["reference"] = i2am.Reference(grid=REF, tokens=slice(-8, None))
    plain = model(x, 0.5)
    with i2am.patch_modules(model, guidance=0, **described) as tracer:
        assert model(x, 0.5).equal(plain)
    s = (x[:1] @ x[:1].mT / 4).double()
    wanted = {"r2g": s[0, 8:32, 32:].softmax(0).mean(-1), "g2r": s[0, 8:32].softmax(-1)[:, 32:].mean(0)}
    for direction, want in wanted.items():
        got = tracer.maps().ulam(direction)[0].double().flatten()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    with i2am.patch_modules(model, guidance=1, **described), pytest.raises(ValueError, match="is not the longest"):
        model(x, 0.5)


class Listed(torch.nn.Module):
    """Latents as a list of videos ``[C, F, H, W]``, as Wan's own code takes them."""

    class Block(torch.nn.Module):
        def forward(self, x, context):
            return F.scaled_dot_product_attention(x[:, None], context[:, None], context[:, None])[:, 0]

    def __init__(self):
        super().__init__()
        self.block = self.Block()

    def forward(self, x, t, context):
        return self.block(torch.stack([video.flatten(1).T for video in x]), context)


def test_latents_in_a_list():
    model, x = Listed(), torch.randn(8, 1, 4, 6, generator=torch.Generator().manual_seed(3))
    context = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(4))
    reference = i2am.Reference(grid=(4, 2), skip=1)
    with i2am.patch_modules(
        model, layers="block", queries=slice(None), reference=reference, grid=GEN, num_steps=1, time_groups=1
    ) as tracer:
        model([x], 0.5, context)
    s = (x.flatten(1).T @ context[0].T / 8**0.5).double()
    got = tracer.maps()
    torch.testing.assert_close(got.ulam("r2g").double().flatten(), s.softmax(0).mean(-1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(got.ulam("g2r").double().flatten(), s.softmax(-1).mean(0)[1:], rtol=1e-4, atol=1e-7)
    with (
        i2am.patch_modules(
            model, layers="block", queries=slice(None), reference=reference, grid=GEN, num_steps=1
        ) as tracer,
        pytest.raises(ValueError, match="no latents"),
    ):
        model([x, x[:, :, :2]], 0.5, context)


def test_other_functions_of_flash_attention_are_refused(monkeypatch):
    flash_package(monkeypatch)
    flash_package(monkeypatch, "flash_attn_interface")

    def qkv(q, k, v):
        stacked = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)
        return sys.modules["flash_attn"].flash_attn_qkvpacked_func(stacked).transpose(1, 2)

    def third(q, k, v):
        home = sys.modules["flash_attn_interface"]
        return home.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def window(q, k, v):
        home = sys.modules["flash_attn"]
        return home.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), window_size=(4, 4)).transpose(1, 2)

    for function, said in ((qkv, "qkvpacked_func, which"), (third, "flash_attn_func, which"), (window, "window_size")):
        model = fused.FusedTransformer(function)
        with i2am.patch_modules(model, **DESCRIBED), pytest.raises(ValueError, match=said):
            loop(model)()
        loop(model)()


def test_einsums_of_fused_projections_are_blind():
    model = fused.FusedTransformer(fused.einsum)
    with i2am.patch_modules(model, **DESCRIBED), pytest.raises(i2am.BlindLayerError, match=r"i2am\.attention inside"):
        loop(model)()


WRONG = {
    "layers": ({"layers": None}, "needs layers="),
    "grid": ({"grid": None}, "needs layers="),
    "mask": ({"mask": lambda *_: None}, "without mask="),
    "names": ({"layers": "blocks.*"}, "selects no layer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case):
    changed, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        i2am.patch_modules(fused.FusedTransformer(), **(DESCRIBED | changed))


def test_spans_that_do_not_fit_are_refused():
    model = fused.FusedTransformer()
    said = r"chooses 22 of 37 queries, which do not fill the grid of 4×6"
    with i2am.patch_modules(model, **DESCRIBED | {"queries": slice(-30, -8)}), pytest.raises(ValueError, match=said):
        loop(model)()
    said = r"pass grid=\(height, width\)"
    with i2am.patch_modules(model, **DESCRIBED | {"grid": lambda *_: GEN}), pytest.raises(ValueError, match=said):
        loop(model)()
    with pytest.raises(ValueError, match=r"or with queries= \(height, width\)"):
        i2am.patch_modules(model, reference=i2am.Reference(), grid=GEN)


def test_another_call_that_fits_is_refused_before_anything_ran():
    """By the run on shapes alone that says what a record will take."""
    model, real = Twice(), []
    model.block.register_forward_pre_hook(lambda m, args: real.append(type(args[0]).__name__))
    fits = dict(layers="block", queries=slice(0, 4), reference=i2am.Reference(grid=(2, 2), tokens=slice(4, 8)))
    with i2am.patch_modules(model, **fits, grid=(2, 2), num_steps=1, record="qk"):
        with pytest.raises(ValueError, match="several attention calls that the description fits"):
            model(torch.randn(1, 8, 16), 500)
    assert real == ["FakeTensor"]
