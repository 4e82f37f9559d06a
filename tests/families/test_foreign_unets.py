"""UNets as other code bases write them: traced all the same, or the line that does is said."""

import diffusers
import pytest
import torch

import i2am
from tests.helpers.families import check_levels
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.truth import Truth, capture


class ReorderedUNet(diffusers.UNet2DConditionModel):
    """A UNet whose forward takes the second network's features before the timestep, as OOTDiffusion's does."""

    def forward(self, sample, features, timestep, encoder_hidden_states, **options):
        self.features = features
        return super().forward(sample, timestep, encoder_hidden_states, **options)


class Behind:
    """Self-attention over its own tokens and a second network's, as queries and as keys."""

    def __init__(self, unet):
        self.unet = unet

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        own = hidden_states.shape[1]
        both = torch.cat([hidden_states, self.unet.features[own].expand(-1, -1, hidden_states.shape[-1])], 1)
        q, k, v = (p(both).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))[:, :own]


def test_a_unet_with_another_order_of_arguments_and_older_attention():
    plain = pipelines.unet()
    unet = ReorderedUNet.from_config(plain.config).eval()
    unet.load_state_dict(plain.state_dict())
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.set_processor(Behind(unet))
    features = {n: torch.randn(2, n, 1) for n in (256, 64, 16)}
    scheduler, x = pipelines.ddim(), torch.randn(1, 4, 16, 16)

    def go():
        scheduler.set_timesteps(2)
        with torch.no_grad():
            for t in scheduler.timesteps:
                unet(x.repeat(2, 1, 1, 1), features, t, torch.ones(2, 3, pipelines.CONTEXT))
                scheduler.step(x, t, x)

    def traced():
        with i2am.patch_unet(unet, reference=i2am.Banked(), scheduler=scheduler, guidance=0, time_groups=1) as tracer:
            go()
        return tracer.maps()

    want = traced()
    assert set(map(tuple, want.counts().values())) == {(2,)}
    assert all(".attn1" in layer for layer in want.recorded_layers)
    for module in unet.modules():
        if hasattr(module, "is_cross_attention"):
            del module.is_cross_attention  # diffusers before 0.27, and every copy of it
    assert traced().ulam("g2r").equal(want.ulam("g2r"))
    assert traced().recorded_layers == want.recorded_layers


class TwoContexts(diffusers.UNet2DConditionModel):
    """A UNet whose mid block attends to a context of its own, as SeeSR's image attentions do."""

    def forward(self, sample, timestep, encoder_hidden_states, image_encoder_hidden_states=None):
        def other(module, args, kwargs):
            return args, kwargs | {"encoder_hidden_states": image_encoder_hidden_states}

        handle = self.mid_block.attentions[0].register_forward_pre_hook(other, with_kwargs=True)
        try:
            return super().forward(sample, timestep, encoder_hidden_states)
        finally:
            handle.remove()


def test_a_unet_of_two_contexts_is_described_layer_by_layer():
    unet = TwoContexts.from_config(pipelines.unet().config).eval()
    given = torch.randn(1, 4, 16, 16), 5, torch.randn(1, 7, pipelines.CONTEXT), torch.randn(1, 12, pipelines.CONTEXT)
    reference = i2am.Reference(grid=(3, 4))
    with i2am.patch_unet(unet, reference=reference, layers="mid_block*") as tracer, torch.no_grad():
        unet(*given)
    assert tracer.maps().ulam("g2r").shape == (1, 3, 4)
    with i2am.patch_unet(unet, reference=reference), torch.no_grad():
        with pytest.raises(ValueError, match=r"layer down_blocks\.0.*7 of the 7 keys.*layers of another context"):
            unet(*given)


class GarmentFirst(diffusers.DiffusionPipeline):
    """A pipeline whose guidance is called like diffusers', and is [garment, zeros], as OOTDiffusion's is."""

    do_classifier_free_guidance, image_guidance_scale = True, 2.0

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, latents, garment):
        context = torch.cat([garment, torch.zeros_like(garment)])
        self.scheduler.set_timesteps(2)
        for t in self.scheduler.timesteps:
            cond, uncond = self.unet(torch.cat([latents] * 2), t, context).sample.chunk(2)
            latents = self.scheduler.step(uncond + 2 * (cond - uncond), t, latents).prev_sample
        return latents


@pytest.mark.parametrize("guidance", ["auto", 0, (0, 2)])
def test_attributes_of_others_pipelines_are_not_taken_for_diffusers(guidance):
    unet, scheduler = pipelines.unet(), pipelines.ddim()
    pipe, reference = GarmentFirst(unet, scheduler), i2am.Reference(grid=(3, 4))
    given = torch.randn(1, 4, 8, 8), torch.randn(1, 12, pipelines.CONTEXT)
    calls = capture(unet, lambda: pipe(*given))
    truth = Truth(calls, samples=slice(0, 1), groups=[0, 1], reference_grid=(3, 4))
    line = dict(reference=reference, scheduler=scheduler, time_groups=2, guidance=guidance)
    with i2am.patch_unet(unet, **line) as tracer:
        pipe(*given)
    check_levels(tracer.maps(), truth, 2)
