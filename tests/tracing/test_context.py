"""Who calls, when, which samples, which keys: observed, or refused. Ordinary situations that can be misread."""

import threading

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import i2am
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.truth import Truth, assert_peak, capture

SMALL = dict(height=32, width=32, output_type="latent")
PICTURE = pipelines.image((40, 40), 3)
pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(n=0):
    return torch.Generator().manual_seed(n)


def adapter_truth(calls, evaluations, samples, **options):
    """R2G of an IP-Adapter's calls (the second of a pass) in some evaluations, all in one group."""
    chosen = [c for c in calls if c.evaluation in evaluations]
    groups = dict.fromkeys(evaluations, 0)
    return Truth(chosen, groups=groups, samples=samples, nth=1, reference_grid=(4, 4), skip=1, **options)


def counts(maps):
    return set(map(tuple, maps.counts().values()))


# ------------------------------------------------------------------------------------------------------------ who


def test_a_sibling_pipeline_of_the_same_unet_passes_through():
    pipe = pipelines.sd("full")
    sibling = pipelines.quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe))

    def paint():
        given = dict(image=pipelines.image((32, 32)), ip_adapter_image=PICTURE, generator=seeded(1))
        return sibling("a", strength=0.5, num_inference_steps=6, output_type="latent", **given).images

    plain = paint()
    with i2am.trace(pipe) as tracer:
        assert paint().equal(plain)
        with pytest.raises(ValueError, match="3 calls of another pipeline, StableDiffusionImg2ImgPipeline"):
            tracer.maps()
        pipe("a", ip_adapter_image=PICTURE, num_inference_steps=5, generator=seeded(), **SMALL)
        paint()
    maps = tracer.maps()
    assert counts(maps) == {(1, 1, 1, 1, 1)}
    assert maps.provenance["calls"]["counted"] == 5
    assert sum(maps.provenance["calls"]["passed_by"].values()) == 6


def test_a_loop_of_ones_own_on_a_traced_pipelines_unet_passes_through():
    pipe = pipelines.sd("full")
    with i2am.trace(pipe) as tracer, torch.no_grad():
        embeds = [torch.randn(1, 1, 17, pipelines.VISION)]
        pipe.unet(
            torch.randn(1, 4, 16, 16),
            3,
            torch.randn(1, 77, pipelines.CONTEXT),
            added_cond_kwargs={"image_embeds": embeds},
        )
    with pytest.raises(ValueError, match=r"did not make itself.*patch_unet"):
        tracer.maps()


@pytest.mark.parametrize("own", [False, True], ids=["the same scheduler", "a scheduler of its own"])
def test_a_sibling_between_two_steps(own):
    """With the same scheduler it sets that anew: its steps are no longer the run's."""
    pipe = pipelines.sd("full")
    more = {"scheduler": pipelines.ddim()} if own else {}
    sibling = pipelines.quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, **more))

    def between(pipe, i, t, given):
        if i == 0:
            given = dict(image=PICTURE, ip_adapter_image=PICTURE, strength=1.0)
            sibling("a", num_inference_steps=1, output_type="latent", **given)
        return {}

    with i2am.trace(pipe) as tracer:
        given = dict(ip_adapter_image=PICTURE, num_inference_steps=2, callback_on_step_end=between, **SMALL)
        if own:
            pipe("a", **given)
            assert tracer.maps().provenance["calls"]["counted"] == 2
            return
        with pytest.raises(ValueError, match="scheduler was set anew in the middle of a run"):
            pipe("a", **given)
        with pytest.raises(ValueError, match="no maps that can be trusted"):
            tracer.maps()


def test_a_request_in_another_thread_is_unharmed_and_uncounted():
    a = pipelines.sd("full")
    parts = {**a.components, "scheduler": pipelines.ddim()}
    b = pipelines.quiet(diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False))

    def run(pipe, seed):
        return pipe("a", ip_adapter_image=PICTURE, num_inference_steps=4, generator=seeded(seed), **SMALL).images

    want_a, want_b = run(a, 0), run(b, 1)
    truth = adapter_truth(capture(a.unet, lambda: run(a, 0)), range(4), slice(1, 2))
    got = {}
    with i2am.trace(a, time_groups=2, output="model") as tracer:
        thread = threading.Thread(target=lambda: got.update(b=run(b, 1)))
        thread.start()
        got["a"] = run(a, 0)
        thread.join()
    assert got["a"].equal(want_a)
    assert got["b"].equal(want_b)
    maps = tracer.maps()
    assert counts(maps) == {(2, 2)}
    assert_peak(maps.ulam("r2g"), truth.ulam("r2g"))


def test_calls_of_several_threads_on_a_bare_unet_are_one_threads():
    unet = pipelines.unet()
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 6, pipelines.CONTEXT)

    def forwards():
        for t in range(12):
            with torch.no_grad():
                unet(x, t * 80, context)

    with i2am.patch_unet(unet, reference=i2am.Reference(grid=(2, 3)), time_groups=3) as tracer:
        threads = [threading.Thread(target=forwards) for _ in range(2)]
        [t.start() for t in threads]
        forwards()
        [t.join() for t in threads]
    maps = tracer.maps()
    assert counts(maps) == {(3, 4, 5)}  # of 0, 80, … 880 in thirds of [0, 1000)
    assert maps.provenance["calls"]["counted"] == 12


def test_the_models_own_forward_inside_its_forward_is_not_counted():
    unet = pipelines.unet()
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 6, pipelines.CONTEXT)
    depth = []

    def again(*_):
        if not depth:
            depth.append(1)
            unet(x + 1, 100, context)

    unet.mid_block.register_forward_hook(again)
    with i2am.patch_unet(unet, reference=i2am.Reference(grid=(2, 3)), time_groups=1) as tracer, torch.no_grad():
        unet(x, 500, context)
    assert counts(tracer.maps()) == {(1,)}
    assert "inside its own forward" in next(iter(tracer.provenance["calls"]["passed_by"]))


# ----------------------------------------------------------------------------------------------------------- when


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
def test_a_scheduler_exchanged_inside_the_trace_is_followed(name):
    pipe = pipelines.sd("full")
    with i2am.trace(pipe) as tracer:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        pipe("a", ip_adapter_image=PICTURE, num_inference_steps=10, generator=seeded(), **SMALL)
    want = (4, 4, 4, 4, 3) if name.startswith("Heun") else (2, 2, 2, 2, 2)
    assert counts(tracer.maps()) == {want}


def test_another_scheduler_than_the_one_watched_is_refused():
    unet, watched, other = pipelines.unet(), pipelines.ddim(), pipelines.ddim()
    watched.set_timesteps(4)
    other.set_timesteps(7)
    context = torch.randn(1, 6, pipelines.CONTEXT)
    with i2am.patch_unet(unet, reference=i2am.Reference(grid=(2, 3)), scheduler=watched), torch.no_grad():
        x = torch.randn(1, 4, 8, 8)
        with pytest.raises(ValueError, match=r"DDIMScheduler, which is watched, has stepped 0 times"):
            for t in other.timesteps:
                x = other.step(unet(x, t, context).sample, t, x).prev_sample


# ------------------------------------------------------------------------------------------------- which samples


MID = dict(indices=[0], fqn="mid_block.attentions.0.transformer_blocks")
SCORES = diffusers.hooks.LayerSkipConfig(**MID, skip_attention=False, skip_attention_scores=True, skip_ff=False)
GUIDERS = {
    "SLG": ("SkipLayerGuidance", dict(skip_layer_config=diffusers.hooks.LayerSkipConfig(**MID))),
    "SEG": ("SmoothedEnergyGuidance", dict(seg_guidance_config=diffusers.hooks.SmoothedEnergyGuidanceConfig(**MID))),
    "PAG": ("PerturbedAttentionGuidance", dict(perturbed_guidance_config=SCORES)),
    "AutoGuidance": ("AutoGuidance", dict(auto_guidance_config=diffusers.hooks.LayerSkipConfig(**MID))),
    "CFG": ("ClassifierFreeGuidance", dict(guidance_scale=7.5)),
    "APG": ("AdaptiveProjectedGuidance", dict(guidance_scale=7.5)),
    "CFG zero*": ("ClassifierFreeZeroStarGuidance", dict(guidance_scale=7.5)),
    "tangential": ("TangentialClassifierFreeGuidance", dict(guidance_scale=7.5)),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_guiders_of_modular_pipelines(name, caplog):
    from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks

    caplog.set_level("CRITICAL")
    kind, options = GUIDERS[name]
    base = pipelines.sdxl("full")
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.register_components(**{k: v for k, v in base.components.items() if v is not None})
    pipe.register_components(guider=getattr(diffusers, kind)(**options))
    pipe.set_progress_bar_config(disable=True)

    def go():
        given = dict(prompt="a", ip_adapter_image=PICTURE, height=32, width=32, num_inference_steps=4)
        pipe(**given, generator=seeded(), output="latents")

    latents = []
    handle = base.unet.register_forward_pre_hook(lambda m, a, k: latents.append(a[0].clone()), with_kwargs=True)
    calls = capture(base.unet, go)
    handle.remove()
    conditional = [i for i, x in enumerate(latents) if i == 0 or not x.equal(latents[i - 1])]  # first on new latents
    assert len(conditional) == 4
    truth = adapter_truth(calls, conditional, slice(0, 1))
    for guidance in ("auto", 0):
        with i2am.trace(pipe, time_groups=2, guidance=guidance) as tracer:
            go()
        assert counts(tracer.maps()) == {(2, 2)}
        assert_peak(tracer.maps().ulam("r2g"), truth.ulam("r2g"))


def denoise(unet, scheduler, contexts, steps=4):
    """A loop that saves memory: one call per context, the last is conditional."""
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, 16, 16, generator=seeded(5))
    with torch.no_grad():
        for t in scheduler.timesteps:
            noises = [unet(x, t, encoder_hidden_states=c).sample for c in contexts]
            x = scheduler.step(2 * noises[-1] - noises[0], t, x).prev_sample


@pytest.mark.parametrize("parts", [2, 3])
def test_guidance_in_calls_of_their_own_on_a_unet(parts):
    unet, scheduler = pipelines.unet(), pipelines.ddim()
    contexts = [torch.randn(1, 17, pipelines.CONTEXT, generator=seeded(i)) for i in range(parts)]
    calls = capture(unet, lambda: denoise(unet, scheduler, contexts))
    reference = i2am.Reference(grid=(4, 4), skip=1)
    for index in range(parts):
        mine = [c for c in calls if c.evaluation % parts == index]
        groups = dict.fromkeys(range(4 * parts), 0)
        truth = Truth(mine, groups=groups, reference_grid=(4, 4), skip=1)
        with i2am.patch_unet(unet, reference=reference, scheduler=scheduler, guidance=index) as tracer:
            denoise(unet, scheduler, contexts)
        assert_peak(tracer.maps().ulam("g2r"), truth.ulam("g2r"))
        assert sum(next(iter(tracer.maps().counts().values()))) == 4
    with i2am.patch_unet(unet, reference=reference, scheduler=scheduler) as tracer:
        with pytest.raises(ValueError, match=r"2 calls at timestep 751 on the same latents.*guidance=0"):
            denoise(unet, scheduler, contexts)
        with pytest.raises(ValueError, match="no maps that can be trusted"):
            tracer.maps()
        tracer.reset()
        denoise(unet, scheduler, contexts[:1])
        assert tracer.maps().batch == 1


def test_pictures_of_one_seed_in_a_run_of_one_step_are_not_taken_for_guidance():
    """Nothing tells them from guidance then: a user does. Embeddings of zeros do."""
    unet, x = pipelines.unet(), torch.randn(1, 4, 16, 16).expand(2, -1, -1, -1)
    given = dict(reference=i2am.Reference(grid=(4, 4), skip=1), num_steps=1)
    context = torch.randn(2, 17, pipelines.CONTEXT)
    with i2am.patch_unet(unet, **given) as tracer, torch.no_grad():
        unet(x, 500, context)
        with pytest.raises(ValueError, match="held the same latents twice in the only evaluation of a run"):
            tracer.maps()
        unet(x, 500, context)  # a second run of it says no more
        with pytest.raises(ValueError, match="held the same latents twice in the only evaluation of a run"):
            tracer.maps()
    for guidance, images in ((1, 1), ("none", 2)):
        with i2am.patch_unet(unet, **given, guidance=guidance) as tracer, torch.no_grad():
            unet(x, 500, context)
        assert tracer.maps().ulam("r2g").shape == (images, 16, 16)
    with i2am.patch_unet(unet, **given) as tracer, torch.no_grad():
        unet(x, 500, torch.cat([torch.zeros_like(context[:1]), context[1:]]))
    assert tracer.maps().ulam("r2g").shape == (1, 16, 16)


def test_a_pipeline_that_is_given_another_model_is_told_so():
    pipe = pipelines.sd("full")
    with i2am.trace(pipe) as tracer:
        pipe.unet = pipelines.sd("full").unet
        pipe("a", ip_adapter_image=pipelines.image(), num_inference_steps=1, output_type="latent", width=16, height=16)
    with pytest.raises(ValueError, match="no longer has the UNet2DConditionModel that is traced"):
        tracer.maps()


def test_self_attention_guidance_calls_on_degraded_latents_do_not_count():
    module = pytest.importorskip("diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag")
    pipe = pipelines.quiet(module.StableDiffusionSAGPipeline(**pipelines._sd_parts(4, ("full",))))

    def go():
        pipe(
            "a",
            ip_adapter_image=PICTURE,
            num_inference_steps=4,
            guidance_scale=1.0,
            sag_scale=0.75,
            generator=seeded(),
            **SMALL,
        )

    truth = adapter_truth(capture(pipe.unet, go), range(0, 8, 2), slice(0, 1))
    with i2am.trace(pipe, time_groups=2) as tracer:
        go()
    assert counts(tracer.maps()) == {(2, 2)}
    assert_peak(tracer.maps().ulam("r2g"), truth.ulam("r2g"))
    assert list(tracer.provenance["calls"]["passed_by"].values()) == [4]


@pytest.mark.parametrize("safe", [1000, 0], ids=["three parts", "two parts"])
def test_safety_guidance_is_a_third_part_of_the_batch(safe):
    module = pytest.importorskip("diffusers.pipelines.deprecated.stable_diffusion_safe")
    pipe = pipelines.quiet(module.StableDiffusionPipelineSafe(**pipelines._sd_parts(4, ("full",))))

    def go():
        given = dict(ip_adapter_image=PICTURE, num_inference_steps=2, generator=seeded(), sld_guidance_scale=safe)
        pipe("a", **given, **SMALL)

    with i2am.trace(pipe, time_groups=1) as tracer:
        go()
    parts = 3 if safe else 2
    assert tracer.provenance["guidance"] == {f"the pipeline's safety guidance: part 1 of {parts}": 2}


def test_another_number_of_images_in_a_second_run_is_refused():
    pipe = pipelines.paint_by_example()
    given = dict(image=pipelines.image((32, 32)), mask_image=pipelines.mask((32, 32)), example_image=PICTURE)
    given |= dict(num_inference_steps=2, **SMALL)
    with i2am.trace(pipe) as tracer:
        pipe(guidance_scale=5.0, generator=seeded(1), **given)
        first = tracer.maps()
        with pytest.raises(ValueError, match=r"maps\(\) then reset\(\)"):
            pipe(guidance_scale=1.0, num_images_per_prompt=2, generator=[seeded(1), seeded(2)], **given)
        assert tracer.maps().ulam("r2g").equal(first.ulam("r2g"))
        tracer.reset()
        pipe(guidance_scale=1.0, num_images_per_prompt=2, generator=[seeded(1), seeded(2)], **given)
    assert tracer.maps().batch == 2  # both are looked at


class Bank(nn.Module):
    """Self-attention whose keys go on with a bank, ``[parts, n, 1]`` per number of tokens."""

    def __init__(self, *parts):
        super().__init__()
        noise = {m * m: [torch.randn(1, m * m, 1, generator=seeded(m + 9 * i)) for i in range(2)] for m in (16, 8, 4)}
        self.bank = {n: torch.cat([p * x for p, x in zip(parts, xs, strict=True)]) for n, xs in noise.items()}

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **options):
        bank = self.bank[hidden_states.shape[1]].expand(-1, -1, hidden_states.shape[-1])
        kv = torch.cat([hidden_states, bank], 1)
        q, k, v = (
            p(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for p, x in ((attn.to_q, hidden_states), (attn.to_k, kv), (attn.to_v, kv))
        )
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def banked(parts, guidance):
    unet, scheduler = pipelines.unet(), pipelines.ddim()
    bank = Bank(*parts)
    unet.set_attn_processor({n: bank if n.endswith("attn1.processor") else p for n, p in unet.attn_processors.items()})
    context = torch.randn(1, 7, pipelines.CONTEXT, generator=seeded(2))
    with i2am.patch_unet(unet, reference=i2am.Banked(), scheduler=scheduler, guidance=guidance) as tracer:
        scheduler.set_timesteps(2)
        x = torch.randn(1, 4, 16, 16, generator=seeded(5))
        with torch.no_grad():
            for t in scheduler.timesteps:
                a, b = unet(torch.cat([x] * 2), t, encoder_hidden_states=torch.cat([context] * 2)).sample.chunk(2)
                x = scheduler.step(a + b, t, x).prev_sample
    return tracer.maps().ulam("g2r")


@pytest.mark.parametrize("parts", [(1, 0), (0, 1)], ids=["garment, zeros", "zeros, garment"])
def test_the_half_with_an_empty_bank_is_unconditional(parts):
    assert banked(parts, "auto").equal(banked(parts, parts.index(1)))
    assert not banked(parts, "auto").equal(banked(parts, parts.index(0)))


def test_two_halves_with_different_banks_are_refused():
    with pytest.raises(ValueError, match="nothing tells which one is conditional: pass guidance=0"):
        banked((1, 1), "auto")
    assert banked((1, 1), 0).isfinite().all()


# ----------------------------------------------------------------------------------------------------- which keys


def test_embeddings_that_do_not_fit_the_batch_are_refused():
    pipe = pipelines.sd("full")
    encode = lambda i: [e[:, None] for e in pipe.encode_image(pipelines.image((40, 40), i), "cpu", 1, True)]  # noqa: E731
    (a, no_a), (b, no_b) = encode(3), encode(4)
    given = dict(num_inference_steps=2, generator=[seeded(0), seeded(1)], **SMALL)
    with i2am.trace(pipe) as tracer:
        with pytest.raises(ValueError, match=r"adapter 0 are a batch of 8, the latents one of 4.*9813"):
            pipe(["a", "b"], ip_adapter_image_embeds=[torch.cat([no_a, no_b, a, b])], **given)
        with pytest.raises(ValueError, match="nothing was recorded"):
            tracer.maps()


def test_an_adapter_loaded_after_tracing_began_is_named():
    pipe = pipelines.sd("full")
    with i2am.trace(pipe):
        pipelines.add_ip_adapters(pipe.unet, "full")
        with pytest.raises(ValueError, match="were replaced after tracing began"):
            pipe("a", ip_adapter_image=PICTURE, num_inference_steps=1, **SMALL)


class Split(nn.Module):
    """IP-Adapter as its authors ship it: image tokens ride behind the text and are cut off inside."""

    def __init__(self, width, context, tokens=4):
        super().__init__()
        self.tokens = tokens
        self.to_k_ip, self.to_v_ip = (nn.Linear(context, width, bias=False) for _ in range(2))

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **options):
        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        text, image = encoder_hidden_states[:, : -self.tokens], encoder_hidden_states[:, -self.tokens :]
        q = heads(attn.to_q(hidden_states))
        out = F.scaled_dot_product_attention(q, heads(attn.to_k(text)), heads(attn.to_v(text)))
        out = out + F.scaled_dot_product_attention(q, heads(self.to_k_ip(image)), heads(self.to_v_ip(image)))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def test_a_context_that_is_split_inside_needs_the_number_of_the_call():
    unet = pipelines.unet()
    torch.manual_seed(5)
    processors = {
        n: Split(unet.get_submodule(n.removesuffix(".processor")).inner_dim, pipelines.CONTEXT)
        if n.endswith("attn2.processor")
        else p
        for n, p in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 81, pipelines.CONTEXT)

    @torch.no_grad()
    def go():
        unet(x, 500, context)

    truth = Truth(capture(unet, go), groups=[0], nth=1)
    with i2am.patch_unet(unet, reference=i2am.Reference(tokens=slice(-4, None))):
        with pytest.raises(i2am.BlindLayerError, match=r"among 81 keys.*77 keys.*4 keys.*call="):
            go()
    with i2am.patch_unet(unet, reference=i2am.Reference(call=1), time_groups=1) as tracer:
        go()
    assert_peak(tracer.maps().ulam("r2g"), truth.ulam("r2g"))
    with i2am.patch_modules(unet, reference=i2am.Reference(tokens=slice(-4, None)), layers="*attn2"):
        with pytest.raises(ValueError, match="a context of 81 tokens, but its to_k sees 77"):
            go()


class Attention(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Denoiser(nn.Module):
    """Self- and cross-attention side by side, as a block of PASD's or SeeSR's pixel attention holds them."""

    def __init__(self, width=8):
        super().__init__()
        self.conv_in, self.features = nn.Conv2d(4, width, 1), nn.Conv2d(3, width, 1)
        self.attn1, self.attn2 = Attention(width), Attention(width)
        self.conv_out = nn.Conv2d(width, 4, 1)

    def forward(self, sample, timestep, picture):
        x = self.conv_in(sample)
        tokens = x.flatten(2).mT
        tokens = tokens + self.attn1(tokens)
        tokens = tokens + self.attn2(tokens, self.features(picture).flatten(2).mT)
        return self.conv_out(tokens.mT.reshape(x.shape))


@pytest.mark.parametrize(("layers", "want"), [("attn*", ["attn2"]), (None, ["attn2"]), (["attn1"], ["attn1"])])
def test_a_pattern_takes_no_self_attention(layers, want):
    net = Denoiser().eval()
    with i2am.patch_modules(net, layers=layers, reference=i2am.Reference(grid="queries")) as tracer, torch.no_grad():
        net(torch.randn(1, 4, 8, 6), 500, torch.randn(1, 3, 8, 6))
    assert tracer.maps().recorded_layers == want


def test_masks_and_scales_of_an_adapter_weigh_r2g_when_asked():
    from diffusers.image_processor import IPAdapterMaskProcessor

    pipe = pipelines.sd("full")
    left = torch.zeros(32, 32)
    left[:, :16] = 1
    masks = IPAdapterMaskProcessor().preprocess([left.numpy(), 1 - left.numpy()], height=32, width=32)
    options = dict(ip_adapter_masks=[masks.reshape(1, 2, 32, 32)])
    pictures = [[pipelines.image(seed=4), pipelines.image(seed=5)]]

    def maps(scale, **more):
        pipe.set_ip_adapter_scale([scale])
        with i2am.trace(pipe, **more) as tracer:
            pipe(
                "a",
                ip_adapter_image=pictures,
                cross_attention_kwargs=options,
                num_inference_steps=1,
                generator=seeded(),
                **SMALL,
            )
        return tracer.maps()

    plain, weighted = maps([1.0, 0.5]), maps([1.0, 0.5], weighted=True)
    assert any("before the IP-Adapter's masks and scales" in note for note in plain.provenance["notes"])
    finest = dict(layers="up_blocks.2.*", reference="ip_adapter.image_1")
    r2g, half = (m.ulam("r2g", **finest)[0] for m in (plain, weighted))
    assert not half[:, :7].any()
    torch.testing.assert_close(half[:, 9:], 0.5 * r2g[:, 9:], rtol=0.05, atol=1e-5)
    assert maps([1.0, 0.0]).references == ["ip_adapter.image_0"]  # an image of scale 0 has no map


def test_not_finite_is_said_where_it_is_first_seen():
    pipe = pipelines.sd("full")
    pipe.unet.down_blocks[1].resnets[0].register_forward_hook(lambda m, a, out: out * float("nan"))
    with i2am.trace(pipe) as tracer:
        with pytest.warns(
            RuntimeWarning, match=r"layer down_blocks\.1.*q is not finite at step 0: did float32 overflow"
        ):
            pipe("a", ip_adapter_image=PICTURE, num_inference_steps=2, **SMALL)
    assert any("not finite" in note for note in tracer.maps().provenance["notes"])


def animated(kind, conv_in=None):
    """A video pipeline around a small UNet with an IP-Adapter; ``conv_in``: channels that its latents come with."""
    source = pipelines.sd("full")
    adapter = diffusers.MotionAdapter(
        block_out_channels=(32, 64, 64),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        use_motion_mid_block=False,
        conv_in_channels=conv_in,
    )
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "feature_extractor", "image_encoder")
    return pipelines.quiet(kind(**{n: source.components[n] for n in names}, motion_adapter=adapter))


@pytest.mark.parametrize("kind", ["AnimateDiff", "PIA"])
def test_frames_of_a_video_are_images_of_the_batch(kind):
    """PIA's own image enters as channels beside the latents; its IP-Adapter's is looked at."""
    pia = kind == "PIA"
    pipe = animated(getattr(diffusers, f"{kind}Pipeline"), 9 if pia else None)
    if pia:
        assert pipe.unet.config.in_channels == 9
    own = {"image": PICTURE} if pia else {}

    def go():
        given = dict(num_frames=3, width=16, height=16, num_inference_steps=2, output_type="latent")
        return pipe(prompt="a b", ip_adapter_image=PICTURE, generator=seeded(7), **given, **own).frames

    calls = [c for c in capture(pipe.unet, go) if "motion_modules" not in c.layer]
    truth = Truth(calls, groups=[0, 1], samples=slice(3, 6), nth=1, reference_grid=(4, 4), skip=1)
    plain = go()
    with i2am.trace(pipe, time_groups=2, output="model", sram={"eye": (5, 7)}) as tracer:
        assert go().equal(plain)
    maps = tracer.maps()
    assert maps.batch == maps.frames == 3
    assert not any("motion_modules" in layer for layer in maps.recorded_layers)
    for direction in ("r2g", "g2r"):
        assert_peak(maps.ulam(direction), truth.ulam(direction))
        assert_peak(maps.tlam(direction), truth.tlam(direction, 2))
    assert maps.video("r2g")[0].equal(maps.ulam("r2g"))
    assert maps.frame(1).ulam("r2g").equal(maps.ulam("r2g")[1:2])
    assert maps.frame(1).sram("eye").equal(maps.sram("eye")[1:2])


def test_pia_without_an_adapter_is_refused():
    pipe = animated(diffusers.PIAPipeline, 9)
    pipe.unload_ip_adapter()
    with pytest.raises(ValueError, match=r"PIAPipeline.*channels beside the latents"):
        i2am.trace(pipe)
