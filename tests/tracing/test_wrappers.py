"""Models inside others, and adapters that come and go while a model is traced."""

import pytest
import torch
from torch import nn

import i2am
from tests.families.test_modules import inputs
from tests.helpers.families import denoise, hooks
from tests.helpers.tiny_models import compvis as networks
from tests.helpers.tiny_models import dit
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth, assert_peak, capture

peft = pytest.importorskip("peft")
REFERENCE = i2am.Reference(grid=(3, 4), tokens=slice(5, 17))


def adapted(model, *modules):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=list(modules or ("to_q", "to_k")), init_lora_weights=False)
    return peft.get_peft_model(model, config)


def running(model):
    """Return a loop of four guided steps over ``model``, on its twelve reference tokens behind five words."""
    scheduler, latents, context = pipelines.ddim(), torch.randn(1, 4, 8, 8), torch.randn(2, 17, pipelines.CONTEXT)
    return scheduler, lambda: denoise(model, scheduler, context, latents)


def truth_of(unet, go):
    return Truth(capture(unet, go), samples=slice(1, 2), keys=slice(5, 17), groups=[0, 0, 1, 1], reference_grid=(3, 4))


def compare(maps, truth):
    for direction in ("r2g", "g2r", "mass"):
        assert_peak(maps.tlam(direction), truth.tlam(direction, 2))


def test_a_peft_model_is_traced_as_what_it_wraps():
    unet = pipelines.unet()
    model = adapted(unet)
    scheduler, go = running(model)
    truth, before, plain = truth_of(unet, go), hooks(unet), go()
    with i2am.patch_unet(model, reference=REFERENCE, scheduler=scheduler, time_groups=2, output="model") as tracer:
        assert go().equal(plain)
    assert hooks(unet) == before
    maps = tracer.maps()
    assert maps.provenance["model"] == "UNet2DConditionModel"
    compare(maps, truth)
    again = i2am.patch_unet(model, reference=REFERENCE, scheduler=scheduler)
    with pytest.raises(ValueError, match="being traced already"):  # the same model by its other name
        with again:
            i2am.patch_unet(unet, reference=REFERENCE, scheduler=scheduler)
    i2am.patch_unet(unet, reference=REFERENCE, scheduler=scheduler)
    assert i2am.unpatch(model)
    assert hooks(unet) == before


def test_a_peft_model_in_a_pipeline():
    pipe = dit.flux(num_layers=1, num_single_layers=1)
    inner, size = pipe.transformer, dict(width=24, height=16, max_area=24 * 16, _auto_resize=False)
    given = dict(image=pipelines.image((32, 16)), num_inference_steps=4, output_type="np")
    pipe.transformer = adapted(inner, "to_q", "to_k", "add_k_proj")

    def go():
        return pipe(generator=torch.Generator().manual_seed(7), **given, **size, **dit.flux_prompt()).images

    calls = capture_calls(inner, go, ("FluxAttention",))
    with i2am.trace(pipe, time_groups=2, output="model", record="qk") as tracer:
        go()
    truth = Truth(
        generated(calls, (4, 6), slice(5, 29)), keys=slice(29, 61), groups=[0, 0, 1, 1], reference_grid=(4, 8)
    )
    compare(tracer.maps(), truth)
    assert not i2am.unpatch(pipe)


def test_unpatched_and_unloaded_within_a_run():
    """The adapter is merged, then unloaded, between steps; then tracing ends: maps are of the steps before."""
    unet = pipelines.unet()
    model = adapted(unet)
    scheduler, go = running(model)
    truth, done = truth_of(unet, go), []

    class Events:
        def __init__(self, tracer):
            self.tracer = tracer

        def __call__(self, module, args, output):
            done.append(len(done))
            if len(done) == 2:
                self.tracer.unpatch()
            if len(done) == 3:
                model.unload()

    with i2am.patch_unet(model, reference=REFERENCE, scheduler=scheduler, time_groups=2, output="model") as tracer:
        handle = unet.register_forward_hook(Events(tracer))
        go()
    handle.remove()
    assert len(done) == 4
    maps = tracer.maps()
    assert {tuple(counts) for counts in maps.counts().values()} == {(2, 0)}
    for direction in ("r2g", "g2r", "mass"):
        assert_peak(maps.tlam(direction)[:, 0], truth.tlam(direction, 2)[:, 0])
    assert not any(count for (_, kind), count in hooks(unet).items() if kind == "_forward_pre_hooks")


def test_unpatched_in_the_middle_of_a_block():
    """Tracing ends inside a forward, between two attention calls of one block: the model goes on as it is."""
    unet = pipelines.unet()
    scheduler, go = running(adapted(unet))
    plain, before = go(), hooks(unet)
    tracer = i2am.patch_unet(unet, reference=REFERENCE, scheduler=scheduler, output="model")
    block = unet.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0")
    handle = block.attn1.register_forward_hook(lambda *_: tracer.unpatch())
    assert go().equal(plain)
    handle.remove()
    assert hooks(unet) == before
    assert go().equal(plain)


@pytest.mark.parametrize("change", ["add", "unload"])
def test_projections_that_are_replaced_are_refused(change):
    """Hooks would see what the layer gives without its adapter, or nothing at all."""
    model, given = networks.TryOnModel(), inputs()
    lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model.model, lora) if change == "unload" else None
    lines = dict(layers="warp_zero*attn2", reference=i2am.Reference(grid="queries"), num_steps=4)
    with i2am.patch_modules(model.model, **lines):
        if wrapped is None:
            peft.inject_adapter_in_model(lora, model.model)
        else:
            wrapped.unload()
        with pytest.raises(ValueError, match=r"attn2: its to_q was replaced after tracing began \(a LoRA"):
            model.sample(**given)
    with i2am.patch_modules(model.model, **lines) as tracer:
        model.sample(**given)
    assert len(tracer.maps().layers) == 3


def test_any_other_module_is_not_looked_into():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    with pytest.raises(ValueError, match="does not know where Wrapper keeps its reference"):
        i2am.patch_transformer(Wrapper(dit.flux_transformer()))
