"""Maps of a model that calls i2am in its own attention: those of the same model when it is traced."""

import pytest
import torch
import torch.nn.functional as F

import i2am
from tests.helpers.tiny_models import compvis
from tests.helpers.tiny_models.unet import ddim

GRIDS = {2: (3, 3), 1: (6, 5), 0: (12, 9)}
SPATIAL = "warp_zero_crossattn_blks.*.attn2"
POINT = {"collar": (5.5, 4.0)}


def inputs():
    g = torch.Generator().manual_seed(3)
    shapes = {
        "latents": (2, 4, 12, 9),
        "agnostic": (2, 5, 12, 9),
        "garment": (2, 4, 12, 9),
        "text": (4, 5, 12),
    }
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()} | {"scheduler": ddim()}


class OwnAttention(torch.nn.Module):
    """CompVis' attention as an author would write it with i2am."""

    def __init__(self, theirs, sums, layer, grid, keys, clock):
        super().__init__()
        self.theirs, self.sums, self.layer, self.grid, self.keys, self.clock = theirs, sums, layer, grid, keys, clock

    def forward(self, x, context, mask=None):
        m = self.theirs
        q, k, v = (
            y.unflatten(-1, (m.heads, -1)).transpose(1, 2) for y in (m.to_q(x), m.to_k(context), m.to_v(context))
        )
        out = self.sums.attention(
            q, k, v, layer=self.layer, step=self.clock[0], grid=self.grid, keys=self.keys, samples=slice(2, 4)
        )
        return m.to_out(out.transpose(1, 2).flatten(2))


def own(model, sums, keys):
    """``model`` with attentions of its own, and a clock that its forwards move."""
    clock = [-1]
    for level, grid in GRIDS.items():
        block = model.model.warp_zero_crossattn_blks[level]
        name = f"warp_zero_crossattn_blks.{level}.attn2"
        block.attn2 = OwnAttention(block.attn2, sums, name, grid, keys, clock)
    model.model.register_forward_pre_hook(lambda *_: clock.__setitem__(0, (clock[0] + 1) % 4))
    return model


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(maps of the tracer, maps of the accumulator, output of both) of one model."""
    model, given, keys = compvis.TryOnModel(), inputs(), i2am.Reference(grid="queries", name="garment")
    options = {"time_groups": 2, "record": "qk", "sram": POINT}
    with i2am.patch_modules(model.model, layers=SPATIAL, reference=keys, num_steps=4, **options) as tracer:
        want = model.sample(**given)
    sums = i2am.Accumulator(4, **options, canvas=(12, 9))
    got = own(model, sums, keys).sample(**given)
    return tracer.maps(), sums.maps(), want, got, sums


@pytest.mark.parametrize("direction", ["r2g", "g2r"])
@pytest.mark.parametrize("level", ["ulam", "tlam", "llam"])
def test_levels_equal_a_tracers(both, direction, level):
    traced, ours, want, got, _ = both
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()  # four steps of float32, by two kernels
    a, b = (getattr(maps, level)(direction) for maps in (traced, ours))
    assert (a - b).abs().max() <= 2e-5 * a.abs().max()
    assert ours.layers == traced.layers
    assert ours.grids() == traced.grids()
    assert ours.counts() == traced.counts() == {name: [2, 2] for name in ours.layers}


def test_patches_reports_and_files(both, tmp_path):
    traced, ours, *_ = both
    for ask in (lambda m: m.sram("collar"), lambda m: m.sram((2, 7)), lambda m: m.where_did_it_go((2, 3))):
        a, b = ask(traced), ask(ours)
        assert (a - b).abs().max() <= 2e-5 * a.abs().max()
    again = i2am.AttributionMaps.load(ours.save(tmp_path / "maps.safetensors"))
    assert again.sram((2, 7)).equal(ours.sram((2, 7)))
    assert ours.report(tmp_path / "report.html", progress=False).stat().st_size > 10_000
    said = ours.provenance
    assert (said["steps"], said["runs"]) == (4, 1)
    assert said["calls"]["counted"] == 12
    assert said["references"] == {"garment": "all 9"}


def call(sums, layer="a", step=0, **changes):
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(changes.pop("batch", 1), changes.pop("heads", 2), n, 8, generator=g) for n in (12, 9))
    given = {"grid": (3, 4), "keys": i2am.Reference(grid=(2, 2), tokens=slice(5, None))} | changes
    return sums.attention(q, k, k, layer=layer, step=step, **given)


def test_a_share_of_the_keys_and_of_the_queries():
    """Text, generated and reference tokens in one attention: what counts is told with the call."""
    sums = i2am.Accumulator(2, time_groups=2)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12 + 4, 8) for _ in range(3))
    keys = [i2am.Reference((2, 2), slice(12, None), name="hat"), i2am.Reference((2, 1), [3, 1], name="tie")]
    out = sums.attention(q, k, v, layer="joint", step=1, grid=(2, 4), queries=range(4, 12), keys=keys)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    maps = sums.maps()
    p = (q @ k.mT / 8**0.5).softmax(-1)[:, :, 4:12].double()
    c = (q[:, :, 4:12] @ k.mT / 8**0.5).softmax(-2).double()
    for name, index in (("hat", [12, 13, 14, 15]), ("tie", [3, 1])):
        torch.testing.assert_close(maps.ulam("mass", reference=name).double().flatten(1), p[..., index].sum(-1).mean(1))
        torch.testing.assert_close(
            maps.tlam("r2g", reference=name)[:, 1].double().flatten(1), c[..., index].mean(-1).mean(1)
        )
    assert maps.tlam("r2g", reference="hat")[:, 0].isnan().all()
    assert maps.counts("hat") == {"joint": [0, 1]}


def test_gradients_go_on_into_the_model():
    """An author may train: the output is differentiable, and the sums are those of a call without gradients."""
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    sums = i2am.Accumulator(1)
    given = {"layer": "a", "step": 0, "grid": (2, 2), "keys": i2am.Reference((2, 2))}
    sums.attention(q, k, v, **given).sum().backward()
    assert v.grad is not None
    plain = i2am.Accumulator(1)
    with torch.no_grad():
        plain.attention(q, k, v, **given)
    torch.testing.assert_close(sums.maps().ulam("r2g"), plain.maps().ulam("r2g"))


def test_default_layers_and_runs():
    sums = i2am.Accumulator(2, default_layers="up.*")
    for step in (0, 1, 0, 1):
        call(sums, "mid", step)
        call(sums, "up.0", step)
    maps = sums.maps()
    assert maps.layers == ["up.0"]
    assert maps.recorded_layers == ["mid", "up.0"]
    assert maps.provenance["runs"] == 2
    sums.reset()
    with pytest.raises(ValueError, match="nothing was added"):
        sums.maps()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 4}, r"layer a: step must be one of 0…3 \(steps=4\), got 4"),
        ({"grid": (3, 5)}, r"layer a: 12 generated queries do not fill its grid \(3, 5\)"),
        ({"grid": 12}, r"layer a: grid must be \(height, width\) in tokens"),
        ({"keys": i2am.Reference(grid=(2, 3), tokens=slice(5, None))}, "layer a: reference 'reference': grid 2×3"),
        ({"keys": i2am.Reference(tokens=slice(5, None))}, r"reference grid.*were.*\(2, 2\).*are now.*None"),
        ({"keys": []}, "layer a: keys must be an i2am.Reference"),
        ({"keys": [i2am.Reference((3, 3))] * 2}, "layer a: references need different names"),
        ({"heads": 4}, r"layer a: .*were .*\(1, 2, 12\).* are now .*\(1, 4, 12\)"),
        ({"batch": 3}, "layer a: 3 samples count, earlier calls had 1"),
        ({"samples": slice(1, 1)}, "layer a: samples must be a slice"),
        ({"queries": slice(0, 11)}, "layer a: 11 generated queries do not fill"),
        ({"layer": ""}, "layer must be a name, got ''"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, message):
    sums = i2am.Accumulator(4)
    call(sums)
    before = sums.maps().ulam("r2g")
    with pytest.raises(ValueError, match=message):
        call(sums, **changes)
    assert sums.maps().ulam("r2g").equal(before)
    assert sums.maps().counts() == {"a": [1, 0, 0, 0, 0]}


def test_options_are_checked_before_anything():
    with pytest.raises(ValueError, match="steps must be a positive number"):
        i2am.Accumulator(0)
    with pytest.raises(ValueError, match=r"the point 'p' needs canvas=\(height, width\)"):
        i2am.Accumulator(4, sram={"p": [2, 3]})
    with pytest.raises(TypeError, match=r"Accumulator\(\) takes no time_group=; did you mean time_groups=\?"):
        i2am.Accumulator(4, time_group=2)
    with pytest.raises(ValueError, match="must be a"):
        i2am.Accumulator(4).attention(None, None, None, layer="a", step=0, grid=(1, 1), keys=i2am.Reference())
