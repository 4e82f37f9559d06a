"""Guidance of one's own: a loss on attention has a gradient in the latents through every family, while it samples."""

import diffusers
import pytest
import torch

import i2am
from i2am import losses
from tests.families.test_flux import FLUX, embeds, kontext
from tests.families.test_flux2 import flux2
from tests.families.test_kandinsky import KANDINSKY
from tests.families.test_qwen import qwen, small_qwen
from tests.families.test_sd3 import sd3_inputs
from tests.helpers.families import run
from tests.helpers.tiny_models import dit, prompts
from tests.helpers.tiny_models import unet as pipelines

__all__ = ["small_qwen"]  # a fixture of the tests below


def ip_adapter():
    pipe = pipelines.sd("base", "full")
    inputs = dict(prompt="a b", ip_adapter_image=[pipelines.image(), pipelines.image(seed=1)], width=32, height=32)
    return pipe, run(pipe, **inputs), {}


def paint_by_example():
    pipe = pipelines.paint_by_example()
    pictures = dict(image=pipelines.image(), mask_image=pipelines.mask(), example_image=pipelines.image(seed=1))
    return pipe, run(pipe, width=32, height=32, **pictures), {}


def flux_kontext():
    pipe = dit.flux()
    return pipe, kontext(pipe), {}


def flux_ip_adapter():
    pipe = prompts.flux_ip(4)
    both = dict(ip_adapter_image_embeds=[embeds()], negative_ip_adapter_image_embeds=[embeds(seed=5)])
    return pipe, run(pipe, **both, **FLUX, **dit.flux_prompt()), {}


def flux_2():
    pipe = dit.flux2()
    return pipe, flux2(pipe), {}


def qwen_edit():
    pipe = dit.qwen()
    return pipe, qwen(pipe, pipelines.image((64, 32))), {}


def sd3_ip_adapter():
    pipe = prompts.sd3()
    return pipe, run(pipe, **sd3_inputs(guided=True)), {}


def kandinsky():
    pipe = prompts.kandinsky(*KANDINSKY["text2img"][:2])
    given = dict(image_embeds=torch.ones(1, 12), negative_image_embeds=torch.zeros(1, 12), width=24, height=32)
    return pipe, run(pipe, **given), {}


def video():
    pipe = prompts.svd()
    generator = torch.Generator().manual_seed(7)
    inputs = dict(width=24, height=32, num_frames=3, num_inference_steps=4, output_type="np", generator=generator)
    return pipe, lambda: pipe(pipelines.image((32, 32)), **inputs).frames, {}


def wan():
    pipe = prompts.wan()
    inputs = dict(width=48, height=32, num_frames=9, guidance_scale=1.0, num_inference_steps=2, output_type="np")
    text = dict(prompt_embeds=dit.text_tokens(512), negative_prompt_embeds=dit.text_tokens(512, seed=3))
    generator = torch.Generator().manual_seed(7)
    return pipe, lambda: pipe(pipelines.image((48, 32)), **inputs, **text, generator=generator).frames, {}


def itself():
    pipe = dit.flux(diffusers.FluxFillPipeline, in_channels=16 + 16 + 16)
    inputs = dict(image=pipelines.image((24, 16)), mask_image=pipelines.mask((24, 16)), width=24, height=16)
    return pipe, run(pipe, **inputs, **dit.flux_prompt()), {"mode": "self"}


FAMILIES = (
    ip_adapter,
    paint_by_example,
    flux_kontext,
    flux_ip_adapter,
    flux_2,
    qwen_edit,
    sd3_ip_adapter,
    kandinsky,
    video,
    wan,
    itself,
)


class Guided:
    """Before each step of a pipeline's scheduler: the slope of a loss over the latents, at the model's last call."""

    def __init__(self, pipe, monkeypatch, options):
        self.pipe, self.options = pipe, options
        self.model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        self.last, self.found, self.own = None, [], pipe.scheduler.step
        self.model.register_forward_pre_hook(self._note, with_kwargs=True)
        monkeypatch.setattr(pipe.scheduler, "step", self._step)

    def _note(self, model, args, kwargs):
        self.last = args, kwargs

    def _step(self, *args, **kwargs):
        if len(self.found) < 2:
            self.found.append(self._slope(*self.last))
        return self.own(*args, **kwargs)

    def _latents(self, args, kwargs):
        name = None if args else "hidden_states" if "hidden_states" in kwargs else "sample"
        return args[0] if name is None else kwargs[name], name

    def _loss(self, latents, args, kwargs, backend=None):
        name = self._latents(args, kwargs)[1]
        args, kwargs = ((latents, *args[1:]), kwargs) if name is None else (args, kwargs | {name: latents})
        with i2am.probe(self.pipe, reads=("r2g",), backend=backend, **self.options) as probe:
            self.model(*args, **kwargs)
        assert probe.reads
        half = [(torch.arange(read.r2g.shape[2]) < read.r2g.shape[2] // 2).float() for read in probe.reads]
        return sum(losses.inside(read.r2g, mask) for read, mask in zip(probe.reads, half, strict=True))

    def _slope(self, args, kwargs):
        latents = self._latents(args, kwargs)[0].detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = self._loss(latents, args, kwargs)
            (slope,) = torch.autograd.grad(loss, latents)
            (twin,) = torch.autograd.grad(self._loss(latents, args, kwargs, "reference"), latents)
        moved = latents.detach() - 0.01 * latents.detach().norm() * slope / slope.norm()
        return loss.item(), slope, twin, self._loss(moved, args, kwargs).item()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_gradients_reach_the_latents(family, monkeypatch, small_qwen):
    pipe, go, options = family()
    plain = go()
    pipe, go, options = family()
    guided = Guided(pipe, monkeypatch, options)
    got = go()
    assert (plain == got).all()  # asking alone changes nothing
    assert len(guided.found) == 2
    for loss, slope, twin, after in guided.found:
        assert slope.any()
        assert float((slope - twin).abs().max()) < 1e-3 * float(twin.abs().max())
        assert after < loss
