"""Attribution rolled back through a resampler to the image encoder's patches, against its definition in float64."""

import pytest
import torch
from diffusers.models.embeddings import IPAdapterPlusImageProjection, IPAdapterTimeImageProjection

import i2am
from tests import support_table as support
from tests.families.test_sd3 import sd3_inputs
from tests.helpers.families import run
from tests.helpers.tiny_models import prompts
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth, assert_peak, capture

GUIDED = slice(1, 2)
PROMPT = dict(prompt="a b", width=24, height=16)


class Rolled(Truth):
    """G2R over what the keys were made of: ``R`` of each evaluation, ``[B, T, X]``."""

    def __init__(self, calls, matrices, **options):
        super().__init__(calls, **options)
        for layer in self.maps.values():
            for evaluation, maps in layer:
                maps["g2r"] = torch.einsum("bhk,bkx->bhx", maps["g2r"], matrices[evaluation][GUIDED])

    def layer(self, direction, name, size, groups=None, lift=False):
        return super().layer(direction, name, size, groups)


def rolled(blocks):
    """Rollout by definition, from each block's ``q [B, H, T, d]`` and ``k [B, H, X + T, d]``."""
    R = 0
    for q, k in blocks:
        A = (q.double() @ k.double().mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        X = k.shape[2] - q.shape[2]
        through = sum(A[:, :, X + j, None] * R[:, None, j] for j in range(q.shape[2])) if torch.is_tensor(R) else 0
        R = 0.5 * (A[..., :X] + through) + 0.5 * R
    return R / R.sum(-1, keepdim=True)


def plus(*kinds):
    pipe = pipelines.sd(*kinds)
    layers = pipe.unet.encoder_hid_proj.image_projection_layers
    torch.manual_seed(2)
    for i, kind in enumerate(kinds):
        if kind == "plus":  # three blocks deep
            layers[i] = IPAdapterPlusImageProjection(pipelines.VISION, pipelines.CONTEXT, 16, 3, 8, 2, 16, 2).eval()
    return pipe


@support.family("IP-Adapter plus, with `rollout=True`", "SD 1.5, SDXL, …", "rolled back to CLIP's patches")
def test_ip_adapter_plus():
    pipe = plus("plus")
    go = run(pipe, ip_adapter_image=pipelines.image(seed=3), **PROMPT)
    resampler = capture_calls(pipe.unet, go, ("attn",))
    assert [c.layer.split(".")[-2] for c in resampler[:3]] == ["0", "1", "2"]
    matrices = [rolled([(c.q, c.k) for c in resampler if c.evaluation == e]) for e in range(4)]
    calls = capture(pipe.unet, go)
    where = dict(reference_grid=pipelines.PATCHES, skip=1)
    truth = Rolled(calls, matrices, nth=1, samples=GUIDED, groups=[0, 0, 1, 1], **where)
    plain = go()
    with i2am.trace(pipe, time_groups=2, rollout=True, output="model", sram={"all": torch.ones(2, 3)}) as tracer:
        assert (go() == plain).all()
    maps = tracer.maps()
    support.check(maps, truth, 2, directions=("r2g", "g2r"))
    assert_peak(maps.sram("all"), truth.ulam("g2r"))  # the region that is the whole picture
    total = maps.ulam("g2r", normalize="lift").mean()
    assert 0.5 < total < 2  # 1, but for the class token's share


def test_two_images_and_an_adapter_without_resampler():
    pipe = plus("base", "plus")
    images = [[pipelines.image(seed=3)], [pipelines.image(seed=4), pipelines.image(seed=5)]]
    go = run(pipe, ip_adapter_image=images, **PROMPT)
    resampler = capture_calls(pipe.unet, go, ("attn",))
    calls = capture(pipe.unet, go)
    with i2am.trace(pipe, time_groups=2, rollout=True) as tracer:
        go()
    maps = tracer.maps()
    assert maps.references == ["ip_adapter_0", "ip_adapter_1.image_0", "ip_adapter_1.image_1"]
    for i, name in enumerate(maps.references[1:]):
        matrices = [rolled([(c.q, c.k) for c in resampler if c.evaluation == e])[i::2] for e in range(4)]
        truth = Rolled(
            calls,
            matrices,
            nth=2,
            keys=slice(16 * i, 16 * i + 16),
            samples=GUIDED,
            groups=[0, 0, 1, 1],
            reference_grid=pipelines.PATCHES,
            skip=1,
        )
        support.check(maps, truth, 2, directions=("r2g", "g2r", "mass"), reference=name)
    with pytest.raises(ValueError, match="no 2-D layout"):
        maps.ulam("g2r", reference="ip_adapter_0")


@support.family(
    "SD3 IP-Adapter, with `rollout=True`",
    "StableDiffusion3Pipeline",
    "rolled back to SigLIP's patches",
)
def test_sd3():
    """Its resampler sees the timestep, so every step has a rollout of its own."""
    pipe = prompts.sd3()
    torch.manual_seed(4)
    pipe.transformer.image_proj = IPAdapterTimeImageProjection(12, 20, 24, 3, 8, 2, 6, 2, 8).eval()
    go = run(pipe, **sd3_inputs(True))
    blocks, handles = [], []

    def split(x):
        return x.unflatten(-1, (2, 8)).transpose(1, 2)

    def see_query(module, args, q):
        blocks.append([split(q)])

    def see_key(module, args, kv):
        blocks[-1].append(split(kv.chunk(2, -1)[0]))

    for block in pipe.transformer.image_proj.layers:
        handles += [block.attn.to_q.register_forward_hook(see_query), block.attn.to_kv.register_forward_hook(see_key)]
    calls = capture_calls(pipe.transformer, go, ("attn",))
    for handle in handles:
        handle.remove()
    matrices = [rolled(blocks[3 * e : 3 * e + 3]) for e in range(4)]
    assert not torch.allclose(matrices[0], matrices[3])
    truth = Rolled(
        generated(calls, (8, 6), nth=1),
        matrices,
        samples=GUIDED,
        keys=slice(48, 54),
        groups=[0, 0, 1, 1],
        reference_grid=prompts.SIGLIP,
    )
    with i2am.trace(pipe, time_groups=2, rollout=True) as tracer:
        go()
    support.check(tracer.maps(), truth, 2, directions=("r2g", "g2r", "mass"))


def test_a_bare_unet_takes_a_square_of_patches_behind_a_class_token():
    """No pipeline is there to tell the image encoder's grid."""
    unet = pipelines.sd("full").unet
    given = dict(added_cond_kwargs={"image_embeds": [torch.randn(1, 1, 17, pipelines.VISION)]})
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, pipelines.CONTEXT)

    @torch.no_grad()
    def go():
        unet(latents, 500, text, **given)

    truth = Truth(capture(unet, go), nth=1, groups=[0], reference_grid=pipelines.PATCHES, skip=1)
    with i2am.patch_unet(unet, num_steps=1, time_groups=1) as tracer:
        go()
    support.check(tracer.maps(), truth, 1, directions=("r2g", "g2r"))


def test_what_cannot_be_rolled_back_is_refused():
    with pytest.raises(ValueError, match=r"needs an adapter with a resampler .*there is IPAdapterFullImageProjection"):
        i2am.trace(pipelines.sd("full"), rollout=True)
    with pytest.raises(ValueError, match="no IP-Adapter"):
        i2am.patch_unet(pipelines.unet(), reference=i2am.Reference(), rollout=True)
    with pytest.raises(ValueError, match="register patches with sram="):
        i2am.trace(plus("plus"), rollout=True, record="qk")
    with pytest.raises(ValueError, match="knows none of FluxTransformer2DModel"):
        i2am.patch_transformer(prompts.flux_ip(4).transformer, rollout=True)
