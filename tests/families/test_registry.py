"""What no family knows, or knows to have no reference keys, is refused with the reason."""

import re

import diffusers
import pytest

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import channels, dit
from tests.helpers.tiny_models import unet as pipelines

WITHOUT_KEYS = {
    "InstructPix2Pix": (channels.instruct_pix2pix, "channels beside the latents"),
    "x4 upscaler": (channels.upscaler, "channels beside the latents"),
    "inpainting": (pipelines.sd_inpaint, "channels beside the latents"),
    "ControlNet": (pipelines.sd_controlnet, "residuals of a ControlNet"),
    "img2img": (channels.img2img, "looks at text"),
    "SDXL": (pipelines.sdxl, "looks at text"),
    "Flux": (lambda: dit.flux(diffusers.FluxPipeline), "draws from text alone"),
    "Flux img2img": (lambda: dit.flux(diffusers.FluxImg2ImgPipeline), "what denoising starts from"),
    "Flux Fill": (lambda: dit.flux(diffusers.FluxFillPipeline), "channels beside the latents"),
    "Flux Control": (lambda: dit.flux(diffusers.FluxControlPipeline), "channels beside the latents"),
    "Qwen-Image": (lambda: dit.qwen(diffusers.QwenImagePipeline), "draws from text alone"),
}


@pytest.mark.parametrize("name", WITHOUT_KEYS)
def test_a_pipeline_without_reference_keys_is_refused_with_the_reason(name):
    build, reason = WITHOUT_KEYS[name]
    pipe = build()
    with pytest.raises(
        ValueError, match=rf"no attention keys encode a reference \(.*({reason}).*mode=\"self\""
    ) as error:
        i2am.trace(pipe)
    support.refused(name, re.search(r"encode a reference \((.*?)\)", str(error.value))[1])
    i2am.trace(pipe, mode="self").unpatch()


def test_a_reason_is_only_given_where_it_is_known():
    from i2am.families import no_reference_keys, registry

    lucy = registry.why_not(diffusers.LucyEditPipeline)
    assert lucy == "the video enters as channels beside the latents"
    said = no_reference_keys("Some", "i2am does not read its attention")  # there are such keys
    assert said.startswith("Some: i2am does not read its attention")
    assert "no attention keys" not in said

    class New(diffusers.DiffusionPipeline):
        def __call__(self, image):
            """Take a picture."""

    assert no_reference_keys("New", registry.why_not(New)).startswith("New: i2am does not know how New uses its image")
    assert "text alone" in registry.why_not(diffusers.QwenImagePipeline)


def test_unknown_transformers_and_descriptions_are_refused():
    with pytest.raises(ValueError, match=r"need no description: got Concatenated"):
        i2am.patch_transformer(dit.flux_transformer(), reference=i2am.Concatenated())
    with pytest.raises(ValueError, match=r"does not know where DiTTransformer2DModel keeps.*i2am\.patch_modules"):
        i2am.patch_transformer(
            diffusers.DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1)
        )


def test_others_classes_of_the_same_name_are_not_taken_for_diffusers():
    """PASD's pipeline is called like diffusers' for ControlNets, but its UNet looks at the small picture."""
    pipe = pipelines.sd_controlnet()

    def call(self, prompt, image):
        raise AssertionError

    name, bases = "StableDiffusionControlNetPipeline", (diffusers.DiffusionPipeline,)
    foreign = type(name, bases, {"__module__": "pasd.pipelines", "__call__": call, "__init__": lambda self: None})()
    for part in ("unet", "controlnet", "scheduler", "vae", "text_encoder"):
        object.__setattr__(foreign, part, getattr(pipe, part))
    told = r"does not know how StableDiffusionControlNetPipeline uses.*pasd\.pipelines.*patch_modules"
    with pytest.raises(ValueError, match=told):
        i2am.trace(foreign)
    own = type("Mine", (type(pipe),), {"__module__": "mine", "__call__": lambda self, **given: None})
    with pytest.raises(ValueError, match="residuals of a ControlNet"):  # made from diffusers', which is known
        i2am.trace(own(**pipe.components, requires_safety_checker=False))
