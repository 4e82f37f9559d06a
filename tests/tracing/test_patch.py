"""Tracing leaves no trace: hooks, functions, schedulers, outputs; and it refuses what it can't see."""

import inspect
import threading

import pytest
import torch
import torch.nn.functional as F

import i2am
from tests.helpers.tiny_models import unet as pipelines

SDPA = F.scaled_dot_product_attention
REFERENCE = i2am.Reference(grid=(2, 3))


@pytest.fixture
def unet():
    return pipelines.unet()


def inputs(batch=2, tokens=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 4, 8, 8, generator=g),
        500,
        torch.randn(batch, tokens, pipelines.CONTEXT, generator=g),
    )


@torch.no_grad()
def forward(unet, *args, **kwargs):
    return unet(*(args or inputs()), **kwargs).sample


def hooks(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    return {(n, h): len(getattr(m, h)) for n, m in model.named_modules() for h in names}


class Untouched:
    """Asserts that a block leaves the model's hooks, processors, output and torch's functions as they were."""

    def __init__(self, unet, scheduler=None):
        self.unet, self.scheduler = unet, scheduler

    def state(self):
        own = {} if self.scheduler is None else {n: vars(self.scheduler).get(n) for n in ("step", "set_timesteps")}
        return hooks(self.unet), dict(self.unet.attn_processors), vars(self.unet).get("forward"), own

    def __enter__(self):
        self.before, self.out = self.state(), forward(self.unet)

    def __exit__(self, *exc):
        assert F.scaled_dot_product_attention is SDPA
        assert self.state() == self.before
        assert forward(self.unet).equal(self.out)


def test_unpatch_restores_everything(unet):
    scheduler = pipelines.ddim()
    with Untouched(unet, scheduler):
        tracer = i2am.patch_unet(unet, reference=REFERENCE, scheduler=scheduler)
        scheduler.set_timesteps(4)
        forward(unet)
        assert F.scaled_dot_product_attention is SDPA  # patched within the forward only
        tracer.unpatch()
        tracer.unpatch()
    assert tracer.maps().ulam("r2g").shape == (2, 8, 8)  # what was recorded remains
    assert set(inspect.signature(scheduler.step).parameters) >= {"eta", "generator"}


def test_scheduler_keeps_its_signature_while_traced(unet):
    """Pipelines look for `eta` and `generator` in it."""
    scheduler = pipelines.ddim()
    before = inspect.signature(scheduler.step)
    with i2am.patch_unet(unet, reference=REFERENCE, scheduler=scheduler):
        assert inspect.signature(scheduler.step) == before


def test_model_output_is_bit_identical(unet):
    plain = forward(unet)
    with i2am.patch_unet(unet, reference=REFERENCE, output="model"):
        assert forward(unet).equal(plain)
    with i2am.patch_unet(unet, reference=REFERENCE, output="i2am"):
        torch.testing.assert_close(forward(unet), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chooser", ["torch", "own"])
def test_the_sweeps_take_the_log_sum_exp_of_the_models_kernel(unet, chooser, monkeypatch):
    """``output="model"`` on the GPU kernels: the output bit for bit, the maps from its row log-sum-exp.

    A function that somebody put in torch's place keeps its log-sum-exp, and is run as it is.
    """
    beside = pytest.importorskip("i2am.ops.beside", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs where there is no GPU")
    took, real = [], beside.sweeps
    monkeypatch.setattr(beside, "sweeps", lambda q, *args, **kwargs: took.append(len(q)) or real(q, *args, **kwargs))
    if chooser == "own":
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: SDPA(*args, **kwargs) * 0.5)
    plain = forward(unet)
    options = {"reference": REFERENCE, "output": "model", "guidance": 1, "sram": {"all": torch.ones(8, 8)}}
    with i2am.patch_unet(unet, **options) as tracer:
        assert forward(unet).equal(plain)
    assert not took
    wanted = tracer.maps()
    with i2am.patch_unet(unet, backend="triton", **options) as tracer:
        assert forward(unet).equal(plain)
    assert set(took) == ({1} if chooser == "torch" else set())  # the conditional sample alone
    maps = tracer.maps()
    for direction in ("r2g", "g2r"):
        torch.testing.assert_close(maps.llam(direction), wanted.llam(direction), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(maps.sram("all"), wanted.sram("all"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_the_model(unet, error):
    def fail(*_):
        raise error("stop")

    with Untouched(unet):
        with pytest.raises(error), i2am.patch_unet(unet, reference=REFERENCE):
            handle = unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_out[0].register_forward_hook(fail)
            try:
                forward(unet)
            finally:
                handle.remove()


def test_ctrl_c_without_a_context_manager(unet):
    """An interrupted forward skips torch's hooks; its scope must not swallow the next call of another model."""

    def interrupt(*_):
        raise KeyboardInterrupt

    other = pipelines.unet(seed=5)
    plain = forward(other)
    tracer = i2am.patch_unet(unet, reference=REFERENCE)
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    handle = attn.to_v.register_forward_hook(interrupt)  # inside the layer, before its attention call
    with pytest.raises(KeyboardInterrupt):
        forward(unet)
    handle.remove()
    assert F.scaled_dot_product_attention(*torch.randn(3, 1, 1, 4, 8)).shape == (1, 1, 4, 8)
    assert F.scaled_dot_product_attention is SDPA
    assert forward(other).equal(plain)
    with pytest.raises(ValueError, match="nothing was recorded"):
        tracer.maps()
    forward(unet)
    assert tracer.maps().ulam("r2g").shape == (2, 8, 8)
    tracer.unpatch()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"Reference\(grid=\(16, 16\), skip=1\)"),
        ({"reference": REFERENCE, "layers": "nowhere.*"}, "selects no layer; there are: down_blocks"),
        ({"reference": REFERENCE, "output": "none"}, "output must be one of"),
        ({"reference": REFERENCE, "backend": "cuda"}, "backend must be one of"),
        ({"reference": REFERENCE, "time_groups": 0}, "time_groups must be a positive integer or"),
        ({"reference": REFERENCE, "guidance": "cond"}, "guidance must be"),
        ({"reference": REFERENCE, "num_steps": 0}, "num_steps must be at least 1"),
        ({"reference": REFERENCE, "num_steps": 4, "scheduler": pipelines.ddim()}, "not both"),
        ({"reference": []}, "must be an i2am.Reference"),
        ({"reference": [REFERENCE, REFERENCE]}, "different names"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_a_refused_patch_changes_nothing(unet, arguments, message):
    with Untouched(unet, arguments.get("scheduler")):
        with pytest.raises(ValueError, match=message):
            i2am.patch_unet(unet, **arguments)
    i2am.patch_unet(unet, reference=REFERENCE).unpatch()  # and the model is free


def test_a_failure_while_hooking_changes_nothing(unet, monkeypatch):
    from i2am.families.unet import CrossAttention

    def watch(self):
        yield next(iter(super(CrossAttention, self).watch()))
        raise RuntimeError("half way")

    monkeypatch.setattr(CrossAttention, "watch", watch)
    with Untouched(unet), pytest.raises(RuntimeError, match="half way"):
        i2am.patch_unet(unet, reference=REFERENCE)


def test_reference_that_does_not_fit_is_refused_before_the_model_runs(unet):
    ran = []
    unet.conv_in.register_forward_hook(lambda *_: ran.append(1))
    with i2am.patch_unet(unet, reference=i2am.Reference(grid=(2, 3), skip=1)) as tracer:
        with pytest.raises(ValueError, match=r"grid 2×3 after skip=1 makes 7 tokens, but 6 of the 6 keys"):
            forward(unet)
        assert not ran
        with pytest.raises(ValueError, match="nothing was recorded"):
            tracer.maps()


def test_tracing_twice_is_refused(unet):
    with i2am.patch_unet(unet, reference=REFERENCE) as first:
        with pytest.raises(ValueError, match="traced already"):
            i2am.patch_unet(unet, reference=REFERENCE)
        forward(unet)
        assert first.maps().ulam("r2g").shape == (2, 8, 8)
    with i2am.patch_unet(unet, reference=REFERENCE):
        forward(unet)


def test_two_tracers_in_two_threads_do_not_mix():
    models = [pipelines.unet(seed=s) for s in (0, 1)]
    args = [inputs(tokens=6, seed=s) for s in (2, 3)]
    alone = []
    for model, a in zip(models, args, strict=True):
        with i2am.patch_unet(model, reference=REFERENCE) as tracer:
            for _ in range(3):
                forward(model, *a)
        alone.append(tracer.maps())
    tracers = [i2am.patch_unet(m, reference=REFERENCE) for m in models]
    meet = threading.Barrier(2)

    def work(i):
        for _ in range(3):
            meet.wait()
            forward(models[i], *args[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for tracer, single in zip(tracers, alone, strict=True):
        assert tracer.maps().counts() == single.counts()
        torch.testing.assert_close(tracer.maps().llam("g2r"), single.llam("g2r"))
        tracer.unpatch()
    assert F.scaled_dot_product_attention is SDPA


def test_untraced_model_in_the_same_thread_passes_through(unet):
    """A model called from inside a traced one (a callback, a control branch) is none of the tracer's business."""
    other = pipelines.unet(seed=3)
    plain, inner = forward(other), []
    unet.mid_block.register_forward_hook(lambda *_: inner.append(forward(other)))
    with i2am.patch_unet(unet, reference=REFERENCE) as tracer:
        forward(unet)
    assert inner[0].equal(plain)
    assert {c for counts in tracer.maps().counts().values() for c in counts} == {0, 1}


def test_blind_layers_raise(unet):
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())
    with Untouched(unet), i2am.patch_unet(unet, reference=REFERENCE):
        with pytest.raises(i2am.BlindLayerError, match=r"down_blocks\.0.*and 4 more.*disable_attention_slicing"):
            forward(unet)
    unet.set_default_attn_processor()
    unet.set_attention_slice(1)
    with i2am.patch_unet(unet, reference=REFERENCE, layers="mid_block*"):
        with pytest.raises(i2am.BlindLayerError, match="mid_block"):
            forward(unet)


def test_compiled_models_are_refused(unet):
    unet.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled"):
        i2am.patch_unet(unet, reference=REFERENCE)


def test_models_without_reference_keys_are_refused():
    from diffusers import UNet2DModel

    plain = UNet2DModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match="no cross-attention"):
        i2am.patch_unet(plain)
    with pytest.raises(ValueError, match="Channels beside the latents never reach the keys"):
        i2am.patch_unet(pipelines.unet(in_channels=8))
    with pytest.raises(ValueError, match="looks at text; load the IP-Adapter first"):
        i2am.trace(pipelines.sd())
    with pytest.raises(ValueError, match="takes a diffusers pipeline"):
        i2am.trace(pipelines.unet())


def test_changed_sizes_are_refused_until_reset(unet):
    with i2am.patch_unet(unet, reference=REFERENCE) as tracer:
        forward(unet)
        first = tracer.maps()
        with pytest.raises(ValueError, match=r"reset\(\)"):
            forward(unet, torch.randn(2, 4, 8, 12), 500, inputs()[2])
        assert tracer.maps().ulam("r2g").equal(first.ulam("r2g"))  # nothing was added
        tracer.reset()
        forward(unet, torch.randn(2, 4, 8, 12), 500, inputs()[2])
        assert tracer.maps().ulam("r2g").shape == (2, 8, 12)


def test_guidance_by_identical_latents(unet):
    sample, t, context = inputs(batch=6)
    halves = torch.cat([sample[:3]] * 2)
    thirds = torch.cat([sample[:2]] * 3)

    def ulam(latents, c, **kwargs):
        with i2am.patch_unet(unet, reference=REFERENCE, **kwargs) as tracer:
            forward(unet, latents, t, c)
            forward(unet, 0.9 * latents, t - 1, c)  # the next step: were they pictures of one seed, it would show
        return tracer.maps().ulam("g2r")

    every = ulam(halves, context, guidance="none")
    assert every.shape[0] == 6
    torch.testing.assert_close(ulam(halves, context), every[3:])
    torch.testing.assert_close(ulam(halves, context, guidance=0), every[:3])
    # Which of three is conditional differs from one pipeline to the next.
    with pytest.raises(ValueError, match=r"guidance=\(1, 3\)"):
        ulam(thirds, context)
    torch.testing.assert_close(ulam(thirds, context, guidance=(0, 3)), ulam(thirds, context, guidance="none")[:2])
    torch.testing.assert_close(ulam(sample, context), ulam(sample, context, guidance="none"))
    with pytest.raises(ValueError, match="does not divide"):
        ulam(sample[:5], context[:5], guidance=1)


def test_gradients_flow_and_dropout_stays_the_models_own(unet):
    sample, t, context = inputs()
    context.requires_grad_()
    (want,) = torch.autograd.grad(unet(sample, t, context).sample.square().mean(), context)
    with i2am.patch_unet(unet, reference=REFERENCE) as tracer:
        (got,) = torch.autograd.grad(unet(sample, t, context).sample.square().mean(), context)
    assert got.equal(want)
    assert tracer.maps().ulam("r2g").shape == (2, 8, 8)


def test_gradient_checkpointing_does_not_count_twice(unet):
    unet.enable_gradient_checkpointing()
    unet.train()
    sample, t, context = inputs()
    with i2am.patch_unet(unet, reference=REFERENCE) as tracer:
        unet(sample, t, context).sample.sum().backward()
    assert {sum(c) for c in tracer.maps().counts().values()} == {1}


def test_autocast_sees_the_cast_tensors(unet):
    with i2am.patch_unet(unet, reference=REFERENCE) as tracer, torch.autocast("cpu", dtype=torch.bfloat16):
        out = forward(unet)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = forward(unet)
    assert out.dtype == plain.dtype
    torch.testing.assert_close(out, plain, rtol=0.05, atol=0.05)
    assert tracer.maps().ulam("r2g").isfinite().all()


def test_encoder_attention_mask(unet):
    """Padding takes part in neither softmax, though diffusers only adds -10000 to it: maps are the short context's."""
    sample, t, context = inputs()
    keep = torch.tensor([[1, 1, 1, 1, 0, 0]]).expand(2, -1).bool()
    with i2am.patch_unet(unet, reference=REFERENCE) as tracer:
        got = forward(unet, sample, t, context, encoder_attention_mask=keep)
    with i2am.patch_unet(unet, reference=i2am.Reference(grid=(2, 2))) as short:
        want = forward(unet, sample, t, context[:, :4])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    g2r = tracer.maps().llam("g2r").flatten(2)
    torch.testing.assert_close(g2r[..., :4], short.maps().llam("g2r").flatten(2), rtol=1e-4, atol=1e-6)
    assert not g2r[..., 4:].any()
    torch.testing.assert_close(tracer.maps().llam("r2g") * 6 / 4, short.maps().llam("r2g"), rtol=1e-4, atol=1e-6)


def test_several_references_on_a_bare_unet(unet):
    parts = [
        i2am.Reference(grid=(2, 2), tokens=slice(0, 4), name="left"),
        i2am.Reference(tokens=slice(4, 6), name="right"),
    ]
    with i2am.patch_unet(unet, reference=parts) as tracer:
        forward(unet)
    maps = tracer.maps()
    assert maps.references == ["left", "right"]
    total = maps.ulam("mass", reference="left") + maps.ulam("mass", reference="right")
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-4, atol=0)
