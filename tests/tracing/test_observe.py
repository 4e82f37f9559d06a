"""Options of an observed attention call: grouped keys, dropout; and pictures of as many tokens in another shape."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import i2am
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.truth import Truth, assert_peak, capture

HEADS, REFERENCE = 4, i2am.Reference(grid=(3, 2))
OPTIONS = dict(reference=REFERENCE, guidance="none", num_steps=1, time_groups=1)


def by_diffusers(q, k, v, **options):
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return dispatch_attention_fn(q, k, v, backend="native", **options).transpose(1, 2)


ATTENTION = {
    "torch": lambda *args, **kwargs: F.scaled_dot_product_attention(*args, **kwargs),
    "diffusers": by_diffusers,
}


class Processor:
    """Attention with options of the call; ``key_heads`` of the layer's heads are all the keys and values there are."""

    def __init__(self, attention, key_heads=HEADS, **options):
        self.attention, self.key_heads, self.options = attention, key_heads, options

    def __call__(self, attn, x, encoder_hidden_states=None, **_):
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            y.unflatten(-1, (HEADS, -1)).transpose(1, 2)[:, :n]
            for y, n in (
                (attn.to_q(x), HEADS),
                (attn.to_k(context), self.key_heads),
                (attn.to_v(context), self.key_heads),
            )
        )
        return attn.to_out[0](self.attention(q, k, v, **self.options).transpose(1, 2).flatten(2))


def forward(processor):
    """Return a UNet whose cross-attention goes through ``processor``, and its forward on always the same numbers."""
    unet = pipelines.unet()
    unet.set_attn_processor({n: processor if ".attn2." in n else p for n, p in unet.attn_processors.items()})
    g = torch.Generator().manual_seed(3)
    given = torch.randn(2, 4, 8, 8, generator=g), 500, torch.randn(2, 6, pipelines.CONTEXT, generator=g)

    @torch.no_grad()
    def run():
        torch.manual_seed(7)
        return unet(*given).sample

    return unet, run


@pytest.mark.parametrize("output", ["i2am", "model"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_query_heads_that_share_keys(attention, output):
    """Heads 0 and 1 read key head 0, heads 2 and 3 key head 1, as torch has it; maps a head are its own."""
    unet, run = forward(Processor(ATTENTION[attention], 2, enable_gqa=True))
    calls, plain = capture(unet, run), run()
    assert {c.k.shape[1] for c in calls} == {2}
    key_head = torch.tensor([0, 0, 1, 1])
    truth = Truth([replace(c, k=c.k[:, key_head]) for c in calls], groups=[0], reference_grid=(3, 2))
    with i2am.patch_unet(unet, output=output, record="qk", **OPTIONS) as tracer:
        torch.testing.assert_close(run(), plain, rtol=1e-4, atol=1e-5)
    maps = tracer.maps()
    for direction in ("r2g", "g2r"):
        assert_peak(maps.hlam(direction), truth.hlam(direction))
    assert set(map(tuple, maps.counts().values())) == {(1,)}  # though one function of attention calls another
    layer = calls[0].layer
    q, k = calls[0].q.double(), calls[0].k[:, key_head].double()
    fed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[:, :, 1 * calls[0].grid[1] + 2].mean(1)
    assert_peak(maps.sram((1, 2), layers=layer).flatten(1), fed, 1e-3)


@pytest.mark.parametrize("output", ["i2am", "model"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_dropout_stays_the_models_own(attention, output):
    """The output is the model's bit for bit, drops and all; maps are of the probabilities before any is dropped."""
    unet, run = forward(Processor(ATTENTION[attention], dropout_p=0.5))
    calls, plain = capture(unet, run), run()
    with i2am.patch_unet(unet, output=output, **OPTIONS) as tracer:
        assert run().equal(plain)
    assert not torch.allclose(forward(Processor(ATTENTION[attention]))[1](), plain, atol=1e-3)  # some were dropped
    truth = Truth(calls, groups=[0], reference_grid=(3, 2))
    for direction in ("r2g", "g2r"):
        assert_peak(tracer.maps().llam(direction), truth.llam(direction))


def test_portrait_after_landscape():
    """As many tokens on another grid are not more of the same: refused; after ``reset()`` maps are the new run's."""
    unet, context = pipelines.unet(), torch.randn(1, 6, pipelines.CONTEXT)
    wide, tall = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 8, 4)
    with torch.no_grad(), i2am.patch_unet(unet, **OPTIONS) as tracer:
        unet(wide, 500, context)
        with pytest.raises(ValueError, match=r"were \(\(4, 8\).*are now \(\(8, 4\)"):
            unet(tall, 500, context)
        tracer.reset()
        unet(tall, 500, context)
    with torch.no_grad(), i2am.patch_unet(unet, **OPTIONS) as alone:
        unet(tall, 500, context)
    assert tracer.maps().canvas == (8, 4)
    for direction in ("r2g", "g2r"):
        assert tracer.maps().ulam(direction).equal(alone.maps().ulam(direction))
