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


def test_flash_attention_is_intercepted_by_its_module(monkeypatch):
    """A stand-in of the package: the same function, ``[B, N, H, d]``."""
    seen = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        seen.append(q.shape)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    model = fused.FusedTransformer(fused.flash)
    with i2am.patch_modules(twin := fused.FusedTransformer(), **DESCRIBED) as wanted:
        loop(twin)()
    plain = loop(model)()
    with i2am.patch_modules(model, **DESCRIBED) as tracer:
        assert loop(model)().equal(plain)
    assert len(seen) == 2 * 4 * 3
    assert package.flash_attn_func is flash_attn_func
    for direction in ("r2g", "g2r", "mass"):
        torch.testing.assert_close(tracer.maps().ulam(direction), wanted.maps().ulam(direction))


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
