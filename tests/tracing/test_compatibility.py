"""Tracing beside everything else that people switch on: it works, or says why not (docs/support.md)."""

import diffusers
import pytest
import torch
import torch.nn.functional as F

import i2am
from tests import support_table as support
from tests.families.test_qwen import qwen, small_qwen  # noqa: F401 (a fixture)
from tests.helpers.tiny_models import compvis as networks
from tests.helpers.tiny_models import dit
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth, assert_peak, capture
from tests.support_table import living

SDPA = F.scaled_dot_product_attention
PROMPT = {"prompt": "a b"}
GUIDED = slice(1, 2)


def generator():
    return torch.Generator().manual_seed(7)


def run(pipe, steps=4, **kwargs):
    common = dict(width=16, height=16) | PROMPT | kwargs
    return lambda: pipe(generator=generator(), num_inference_steps=steps, output_type="np", **common).images


def adapter_pipe(**kwargs):
    pipe = pipelines.sd("full")
    return pipe, run(pipe, ip_adapter_image=pipelines.image(seed=3), **kwargs)


def kontext_pipe(**kwargs):
    pipe = dit.flux(num_layers=1, num_single_layers=1)
    size = dict(width=24, height=16, max_area=24 * 16, _auto_resize=False)

    def go():
        return pipe(
            image=pipelines.image((32, 16)),
            generator=generator(),
            num_inference_steps=4,
            output_type="np",
            **size,
            **dit.flux_prompt(),
            **kwargs,
        ).images

    return pipe, go


def trace(pipe, go, **options):
    with i2am.trace(pipe, time_groups=2, **options) as tracer:
        go()
    return tracer.maps()


def unet_truth(calls, groups=(0, 0, 1, 1), **kwargs):
    common = dict(nth=1, samples=GUIDED, reference_grid=pipelines.PATCHES, skip=1)
    return Truth(calls, groups=list(groups), **(common | kwargs))


def kontext_truth(pipe, go, groups=(0, 0, 1, 1)):
    calls = capture_calls(pipe.transformer, go, ("FluxAttention",))
    return Truth(generated(calls, (4, 6), slice(5, 29)), keys=slice(29, 61), groups=list(groups), reference_grid=(4, 8))


def check(maps, truth, T=2, directions=("r2g", "g2r")):
    support.check(maps, truth, T, directions=directions)


# --------------------------------------------------------------------------------------------------- torch.compile


@living("torch.compile before tracing", "refuses", "hooks on a compiled module never fire: trace, then compile")
@pytest.mark.parametrize("how", ["compile()", "torch.compile()", "compile_repeated_blocks()"])
def test_compiled_before(how):
    pipe, _ = kontext_pipe()
    if how == "compile()":
        pipe.transformer.compile(backend="eager")
    elif how == "torch.compile()":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        pipe.transformer.compile_repeated_blocks(backend="eager")
    with pytest.raises(ValueError, match="compiled"):
        i2am.trace(pipe)


@pytest.mark.slow
@living("torch.compile after tracing", "works", "graphs break at each attention; `fullgraph=True` raises, naming i2am")
def test_compiled_after():
    pipe, go = kontext_pipe()
    plain, wanted = go(), trace(pipe, go)
    with i2am.trace(pipe, time_groups=2) as tracer:
        pipe.transformer.compile(backend="eager")
        assert abs(go() - plain).max() < 1e-4
        maps = tracer.maps()
    assert maps.counts() == wanted.counts()
    for direction in ("r2g", "g2r", "mass"):
        assert_peak(maps.tlam(direction), wanted.tlam(direction).double())
    tracer.reset()
    assert abs(go() - plain).max() < 1e-4  # the hooks are gone from the compiled model too
    with pytest.raises(ValueError, match="nothing was recorded"):
        tracer.maps()
    torch.compiler.reset()
    pipe, go = kontext_pipe()
    with i2am.trace(pipe):
        pipe.transformer.compile(backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="i2am traces this model"):
            go()
    assert F.scaled_dot_product_attention is SDPA


# ------------------------------------------------------------------------------------------- weights and attention


@living("gradient checkpointing", "works", "what is recomputed in the backward pass does not count again")
def test_gradient_checkpointing():
    transformer = dit.flux_transformer(num_layers=1, num_single_layers=1)
    transformer.train()
    ids = torch.zeros(8, 3)
    ids[:, 2] = torch.arange(8) % 4
    ids[4:, 0] = 1
    given = dict(
        hidden_states=torch.randn(1, 8, 16, requires_grad=True),
        encoder_hidden_states=dit.text_tokens(3),
        pooled_projections=torch.randn(1, 8),
        timestep=torch.tensor([0.5]),
        guidance=torch.ones(1),
        img_ids=ids,
        txt_ids=torch.zeros(3, 3),
    )

    def gradient():
        (found,) = torch.autograd.grad(transformer(**given).sample.square().mean(), given["hidden_states"])
        return found

    want = gradient()
    transformer.enable_gradient_checkpointing()
    with i2am.patch_transformer(transformer, num_steps=1) as tracer:
        torch.testing.assert_close(gradient(), want)
    assert {sum(c) for c in tracer.maps().counts().values()} == {1}
    assert tracer.maps().ulam("g2r").shape == (1, 1, 4)


@living("LoRA, loaded or fused", "works", "q and k are those after the adapter")
@pytest.mark.parametrize("fused", [False, True])
def test_lora(fused):
    peft = pytest.importorskip("peft")
    pipe, go = kontext_pipe()
    without = trace(pipe, go)
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "add_k_proj"], init_lora_weights=False)
    )
    if fused:
        pipe.transformer.fuse_lora()
    maps = trace(pipe, go)
    check(maps, kontext_truth(pipe, go), directions=("r2g", "g2r", "mass"))
    assert not torch.allclose(maps.ulam("g2r"), without.ulam("g2r"), rtol=1e-2)


@living("fuse_qkv_projections", "works", "not beside an IP-Adapter, where diffusers itself fails")
def test_fused_projections():
    pipe, go = kontext_pipe()
    pipe.transformer.fuse_qkv_projections()
    check(trace(pipe, go), kontext_truth(pipe, go), directions=("r2g", "g2r", "mass"))
    pipe, go = adapter_pipe()
    pipe.fuse_qkv_projections()
    with pytest.raises(AttributeError, match="tuple"):
        go()


@living("perturbed-attention guidance (PAG)", "works", '[uncond, cond, perturbed]: cond counts; not with `mode="self"`')
def test_perturbed_attention_guidance():
    build = diffusers.StableDiffusionPAGPipeline
    pipe = pipelines.quiet(build(**pipelines._sd_parts(4, ("full",)), pag_applied_layers=["mid"]))
    go = run(pipe, ip_adapter_image=pipelines.image(seed=3), pag_scale=2.0)
    calls = capture(pipe.unet, go)
    assert calls[0].q.shape[0] == 3
    check(trace(pipe, go), unet_truth(calls))
    with pytest.raises(ValueError, match=r"expected .* the model's batch of 3"):
        trace(pipe, go, mode="self")


@living("attention slicing", "refuses", "`BlindLayerError`: its products can't be seen; disable_attention_slicing()")
def test_attention_slicing():
    pipe = pipelines.paint_by_example()
    pipe.enable_attention_slicing(1)
    inputs = dict(image=pipelines.image((16, 16)), mask_image=pipelines.mask((16, 16)))

    def go():
        return pipe(
            example_image=pipelines.image(), width=16, height=16, num_inference_steps=1, generator=generator(), **inputs
        )

    with i2am.trace(pipe), pytest.raises(i2am.BlindLayerError, match="disable_attention_slicing"):
        go()
    pipe.disable_attention_slicing()
    with i2am.trace(pipe) as tracer:
        go()
    assert tracer.maps().ulam("r2g").shape == (1, 8, 8)


@living("xformers", "works", "its `memory_efficient_attention` is intercepted like torch's; tested with a stand-in")
def test_xformers(monkeypatch):
    from diffusers.models import attention_processor

    networks.install(stand_in := networks.stand_in_for_xformers(), monkeypatch)
    monkeypatch.setattr(attention_processor, "xformers", stand_in["xformers"], raising=False)
    unet = pipelines.unet()
    latents, context = torch.randn(2, 4, 8, 8), torch.randn(2, 6, pipelines.CONTEXT)

    @torch.no_grad()
    def go():
        return unet(latents, 500, context).sample

    def ask(**options):
        with i2am.patch_unet(unet, reference=i2am.Reference(grid=(2, 3)), num_steps=1, **options) as tracer:
            out = go()
        return tracer.maps(), out

    wanted, plain = ask(output="model")
    unet.set_attn_processor(attention_processor.XFormersAttnProcessor())
    own = go()
    for output in ("model", "i2am"):
        maps, out = ask(output=output)
        torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-5)
        for direction in ("r2g", "g2r"):
            assert_peak(maps.llam(direction), wanted.llam(direction).double())
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)


@living(
    "attention backends",
    "works",
    "any of diffusers' registry; `output='model'` keeps its own output",
)
@pytest.mark.parametrize("backend", ["native", "_native_math", "flash"])
def test_attention_backends(backend, monkeypatch):
    from diffusers.models import attention_dispatch as dispatch

    registry, name = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName(backend)
    pipe, go = kontext_pipe()
    truth, plain = kontext_truth(pipe, go), go()
    ran = []
    if backend == "flash":  # not installed here: a stand-in of its name that does not go through torch's function

        def flash(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, _parallel_config=None):
            ran.append(1)
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)

        monkeypatch.setitem(registry._backends, name, flash)
    monkeypatch.setattr(registry, "_active_backend", name)
    before = dict(registry._backends)
    for output in ("i2am", "model"):
        ran.clear()
        with i2am.trace(pipe, time_groups=2, output=output) as tracer:
            assert abs(go() - plain).max() < 1e-4
        check(tracer.maps(), truth, directions=("r2g", "g2r", "mass"))
        assert bool(ran) == (output == "model" and backend == "flash")
    assert registry._backends == before


# --------------------------------------------------------------------------------------------------------- offload


@living("sequential CPU offload", "works", "weights are meta tensors between calls; hooks do not read them")
def test_sequential_offload():
    accelerate = pytest.importorskip("accelerate")
    pipe, go = adapter_pipe()
    wanted = trace(pipe, go)
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert next(pipe.unet.parameters()).is_meta
    maps = trace(pipe, go)
    for direction in ("r2g", "g2r"):
        assert maps.llam(direction).equal(wanted.llam(direction))


@living("model and group offload", "works", 'also with `record="qk"`, whose size is then not known beforehand')
@pytest.mark.parametrize("kind", ["model", "block_level", "leaf_level"])
def test_model_and_group_offload(kind):
    pipe, go = kontext_pipe()
    wanted = trace(pipe, go)
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        cpu = torch.device("cpu")
        pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    maps = trace(pipe, go, record="qk")
    for direction in ("r2g", "g2r", "mass"):
        assert maps.llam(direction).equal(wanted.llam(direction))
    assert maps.sram((5, 7)).shape == (1, 4, 8)


# ------------------------------------------------------------------------------------------------------ schedulers


# scheduler → time group of each model evaluation, for four steps in two groups
SCHEDULERS = {
    "EulerDiscreteScheduler": (0, 0, 1, 1),
    "EulerAncestralDiscreteScheduler": (0, 0, 1, 1),
    "DPMSolverMultistepScheduler": (0, 0, 1, 1),
    "UniPCMultistepScheduler": (0, 0, 1, 1),
    "LCMScheduler": (0, 0, 1, 1),
    "HeunDiscreteScheduler": (0, 0, 0, 0, 1, 1, 1),
    "PNDMScheduler": (0, 0, 0, 1, 1),
}


@living("schedulers", "works", ", ".join(name.removesuffix("Scheduler") for name in SCHEDULERS))
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    pipe, go = adapter_pipe()
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    calls = capture(pipe.unet, go)
    assert calls[-1].evaluation + 1 == len(SCHEDULERS[name])
    check(trace(pipe, go), unet_truth(calls, SCHEDULERS[name]))


@living("img2img strength", "works", "the steps that run are the run")
def test_img2img_strength():
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**pipelines._sd_parts(4, ("full",)))
    pipelines.quiet(pipe)

    def go():
        return pipe(
            image=pipelines.image((16, 16)),
            strength=0.5,
            num_inference_steps=8,
            ip_adapter_image=pipelines.image(seed=3),
            generator=generator(),
            output_type="np",
            **PROMPT,
        ).images

    calls = capture(pipe.unet, go)
    assert calls[-1].evaluation + 1 == 4
    check(trace(pipe, go), unet_truth(calls))


# ---------------------------------------------------------------------------------------------------------- caches


@living("PyramidAttentionBroadcast", "works", "calls that the cache answers do not count; maps are means of the others")
def test_pyramid_attention_broadcast():
    pipe, go = kontext_pipe()
    pipe.transformer.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )
    truth, maps = kontext_truth(pipe, go), trace(pipe, go)
    assert set(map(tuple, maps.counts().values())) == {(1, 1)}
    check(maps, truth, directions=("r2g", "g2r", "mass"))


@living("FirstBlockCache", "works", "calls that the cache answers do not count")
def test_first_block_cache(small_qwen):  # noqa: F811
    pipe = dit.qwen()
    go = qwen(pipe, pipelines.image((64, 32)))
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
    calls = capture_calls(pipe.transformer, go, ("attn",))
    maps = trace(pipe, go, record="qk")  # whose size is not measured: the cache would keep what a run on shapes gave
    assert list(map(tuple, maps.counts().values())) == [(2, 2), (1, 0)]
    first = [c for c in calls if c.layer == "transformer_blocks.0.attn"]
    chosen = generated(first, (4, 6), slice(7, 31))
    truth = Truth(chosen, keys=slice(31, 97), groups=[0, 0, 1, 1], reference_grid=(6, 11))
    for direction in ("r2g", "g2r", "mass"):
        assert_peak(maps.tlam(direction, layers="transformer_blocks.0.attn"), truth.tlam(direction, 2))
    assert maps.llam("g2r", times=1).shape[1] == 2
    assert maps.tlam("g2r", layers="transformer_blocks.1.attn")[:, 1].isnan().all()  # nothing ran there


TAYLOR = dict(cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32)
BLOCKS = {  # caches that answer in place of whole blocks
    "taylorseer": ("TaylorSeerCacheConfig", TAYLOR),
    "taylorseer, lite": ("TaylorSeerCacheConfig", TAYLOR | {"use_lite_mode": True}),
    "magcache": (
        "MagCacheConfig",
        dict(mag_ratios=[1.0] * 4, num_inference_steps=4, threshold=1.0, max_skip_steps=1, retention_ratio=0.25),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
@living("TaylorSeer, MagCache", "works", "calls that the cache answers do not count")
def test_caches_that_answer_for_blocks(name, small_qwen):  # noqa: F811
    kind, options = BLOCKS[name]
    if not hasattr(diffusers, kind):
        pytest.skip(f"diffusers {diffusers.__version__} has no {kind}")
    pipe = dit.qwen()
    go = qwen(pipe, pipelines.image((64, 32)))
    pipe.transformer.enable_cache(getattr(diffusers, kind)(**options))
    calls = [c for c in capture_calls(pipe.transformer, go, ("attn",)) if c.evaluation % 2 == 0]  # conditional
    assert len(calls) < 8
    plain = go()
    maps = trace(pipe, go, output="model", record="qk")
    assert (go() == plain).all()
    for layer in sorted({c.layer for c in calls}):
        mine = [c for c in calls if c.layer == layer]
        truth = Truth(
            generated(mine, (4, 6), slice(7, 31)),
            keys=slice(31, 97),
            groups=[0] * 4 + [1] * 4,
            reference_grid=(6, 11),
        )
        assert sum(maps.counts()[layer]) == len(mine)
        for direction in ("r2g", "g2r", "mass"):
            assert_peak(maps.ulam(direction, layers=layer), truth.ulam(direction))
        assert_peak(maps.sram((0.6, 0.3), canvas=(1, 1), layers=layer), truth.ulam("sram"))


@living("FasterCache", "refuses", "it drops the unconditional half of the batch in some calls; disable_cache()")
def test_faster_cache():
    pipe, go = kontext_pipe()
    config = diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        current_timestep_callback=lambda: pipe.current_timestep,
        attention_weight_callback=lambda _: 0.5,
        is_guidance_distilled=True,
    )
    with i2am.trace(pipe) as tracer:
        go()
        once = tracer.maps().counts()
        pipe.transformer.enable_cache(config)
        with pytest.raises(ValueError, match=r"FasterCache changes the batch.*disable_cache\(\)"):
            go()
        assert tracer.maps().counts() == once
        pipe.transformer.disable_cache()
        go()
        assert tracer.maps().counts() != once


# ----------------------------------------------------------------------------------------------------------- calls


@living("several calls under one tracer", "works", "they add up; `reset()` between calls of other sizes")
def test_several_calls():
    pipe, go = kontext_pipe()
    size = dict(width=16, height=16, max_area=256, _auto_resize=False)
    other = lambda: pipe(image=pipelines.image(), num_inference_steps=1, **size, **dit.flux_prompt())  # noqa: E731
    with i2am.trace(pipe, time_groups=2) as tracer:
        go()
        once = tracer.maps()
        go()
        twice = tracer.maps()
        with pytest.raises(ValueError, match=r"reset\(\)"):
            other()
        tracer.reset()
        go()
        again = tracer.maps()
    assert set(map(tuple, twice.counts().values())) == {(4, 4)}
    torch.testing.assert_close(once.ulam("g2r"), twice.ulam("g2r"))
    assert once.ulam("g2r").equal(again.ulam("g2r"))


@living("num_images_per_prompt", "works", "one map an image")
def test_images_per_prompt():
    pipe, go = kontext_pipe(num_images_per_prompt=3)
    maps = trace(pipe, go)
    assert maps.batch == 3
    check(maps, kontext_truth(pipe, go), directions=("r2g", "g2r", "mass"))


@living("user callbacks", "works", "`callback_on_step_end` is not ours; it may change latents and prompts")
def test_callbacks():
    steps = []

    def callback(pipe, step, timestep, given):
        steps.append(step)
        return given | {"latents": given["latents"] * 0.9}

    pipe, go = kontext_pipe(callback_on_step_end=callback)
    truth = kontext_truth(pipe, go)
    plain = go()
    steps.clear()
    with i2am.trace(pipe, time_groups=2, output="model") as tracer:
        assert (go() == plain).all()
    assert steps == [0, 1, 2, 3]
    check(tracer.maps(), truth, directions=("r2g", "g2r", "mass"))


@living("pipe.interrupt", "works", "steps that did not run leave their time groups empty (NaN)")
def test_interrupted_run():
    def stop(pipe, step, timestep, given):
        pipe._interrupt = step == 1
        return given

    pipe, go = kontext_pipe(callback_on_step_end=stop)
    maps = trace(pipe, go)
    assert set(map(tuple, maps.counts().values())) == {(2, 0)}
    assert maps.tlam("r2g")[:, 1].isnan().all()
    assert maps.ulam("r2g").isfinite().all()
