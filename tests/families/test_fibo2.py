"""Bria Fibo 2: gist, generated picture and references; the first blocks without the gist."""

import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import context, dit
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth


def loop(model, references, lengths=(6,)):
    noise = torch.randn(len(lengths), 4, 8, 12, generator=torch.Generator().manual_seed(1))
    longest = max(lengths)
    mask = torch.stack([torch.arange(longest) < n for n in lengths]) if len(set(lengths)) > 1 else None

    @torch.no_grad()
    def go():
        for t in (0.9, 0.7, 0.4, 0.1):
            for seed in (0, 3):  # conditional, then unconditional
                text = dit.text_tokens(longest, seed=seed, batch=2 * len(lengths)).unflatten(0, (len(lengths), 2))
                out = model(
                    hidden_states=noise * t,
                    timestep=torch.full((len(lengths),), t),
                    encoder_hidden_states=text,
                    encoder_attention_mask=mask,
                    context_latents=[r.repeat(len(lengths), 1, 1, 1) for r in references],
                ).sample
        return out

    return go


@pytest.mark.parametrize("lengths", [(6,), (6, 16)], ids=["one", "padded"])
@support.family("Bria Fibo 2", "BriaFibo2Pipeline: its transformer, bare", "tokens in context, several references")
def test_fibo2(lengths):
    model = context.fibo2()
    references = [torch.randn(1, 4, 8, 4), torch.randn(1, 4, 4, 8)]
    go = loop(model, references, lengths)
    calls = capture_calls(model, go, ("attention",))
    plain = go()
    with i2am.patch_transformer(model, num_steps=4, time_groups=2, guidance=0, output="model", record="qk") as tracer:
        assert go().equal(plain)
    maps = tracer.maps()
    assert maps.layers == ["noise_refiner.0.attention", "layers.0.attention", "layers.1.attention"]
    for layers in ("noise_refiner.*", "layers.*"):
        mine = [c for c in calls if c.layer.startswith(layers[:-1]) and c.k.shape[2] >= 40]
        gist = 0 if len(lengths) > 1 else mine[0].k.shape[2] - 40  # last where it is padded
        chosen = generated(mine, (4, 6), slice(gist, gist + 24), evaluations=range(0, 8, 2))
        for name, start, grid in (("reference_0", 24, (4, 2)), ("reference_1", 32, (2, 4))):
            keys = slice(gist + start, gist + start + 8)
            truth = Truth(chosen, keys=keys, groups=[0] * 4 + [1] * 4, reference_grid=grid)
            support.check(maps, truth, 2, reference=name, layers=layers)


def test_without_a_reference_is_refused():
    model = context.fibo2()
    with i2am.patch_transformer(model, num_steps=4), pytest.raises(ValueError, match="no reference image among"):
        loop(model, [])()
