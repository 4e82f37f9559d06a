"""FLUX.2 and Klein, with and without the cache of keys, against a materialised recomputation from the untraced run."""

import diffusers
import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.families import check_parts, generator, traced
from tests.helpers.tiny_models import dit
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth, assert_peak
from tests.support_table import check

FLUX2 = (
    "FLUX.2, Klein",
    "Flux2Pipeline, Flux2KleinPipeline, Flux2KleinInpaintPipeline",
    "tokens in context, several references",
)
CACHED = "FLUX.2 Klein with KV cache", "Flux2KleinKVPipeline", "in context, then in the KV cache"
KINDS = ("Flux2Attention", "Flux2ParallelSelfAttention")
REFERENCES = {"reference_0": (slice(29, 61), (4, 8)), "reference_1": (slice(61, 85), (6, 4))}
IN_CACHE = {"reference_0": (slice(5, 37), (4, 8)), "reference_1": (slice(37, 61), (6, 4))}


def flux2(pipe, sizes=((128, 64), (64, 96)), steps=4, **options):
    images = [pipelines.image(size, seed=i) for i, size in enumerate(sizes)]
    common = dict(prompt_embeds=dit.text_tokens(5)) | options
    return lambda: (
        pipe(
            image=images or None,
            width=96,
            height=64,
            num_inference_steps=steps,
            generator=generator(),
            output_type="np",
            **common,
        ).images
    )


@pytest.mark.parametrize("build", [dit.flux2, dit.flux2_klein], ids=["flux2", "klein"])
@support.family(*FLUX2)
def test_flux2_keeps_its_references_apart(build):
    pipe = build()
    guided = build is dit.flux2_klein
    images = 1 + guided
    given = dict(negative_prompt_embeds=dit.text_tokens(5, seed=3), num_images_per_prompt=images) if guided else {}
    go = flux2(pipe, **given)
    calls = capture_calls(pipe.transformer, go, KINDS)
    evaluations = range(0, 8, 2) if guided else range(4)
    assert {c.evaluation for c in calls} == set(range(8 if guided else 4))
    maps = traced(pipe, go)
    chosen = generated(calls, (4, 6), slice(5, 29), evaluations=evaluations)
    check_parts(maps, REFERENCES, chosen, groups=[0] * 4 + [1] * 4 if guided else [0, 0, 1, 1])
    for name, (_, grid) in REFERENCES.items():
        assert maps.ulam("g2r", reference=name).shape == (images, *grid)
    with pytest.raises(ValueError, match="several references"):
        maps.ulam("r2g")


@support.family(*FLUX2)
def test_klein_inpainting():
    """The picture to be inpainted is a reference too: the first one."""
    pipe = dit.flux2(diffusers.Flux2KleinInpaintPipeline)

    def go():
        return pipe(
            image=pipelines.image((96, 64)),
            mask_image=pipelines.mask((96, 64)),
            image_reference=pipelines.image((64, 96), seed=1),
            prompt_embeds=dit.text_tokens(5),
            negative_prompt_embeds=dit.text_tokens(5, seed=3),
            width=96,
            height=64,
            strength=0.5,
            num_inference_steps=8,
            generator=generator(),
            output_type="np",
        ).images

    calls = capture_calls(pipe.transformer, go, KINDS)
    assert calls[-1].evaluation + 1 == 8
    chosen = generated(calls, (4, 6), slice(5, 29), evaluations=range(0, 8, 2))
    maps = traced(pipe, go)
    parts = {"reference_0": (slice(29, 53), (4, 6)), "reference_1": (slice(53, 77), (6, 4))}
    check_parts(maps, parts, chosen, groups=[0] * 4 + [1] * 4)


@support.family(*CACHED)
def test_klein_kv_looks_at_itself_too():
    """``mode="self"``: the generated tokens' keys stand behind the references', cached or not."""
    pipe = dit.flux2_klein_kv()
    go = flux2(pipe)
    calls = capture_calls(pipe.transformer, go, KINDS)
    truth = Truth(
        generated(calls, (4, 6), slice(5, 29)), keys=slice(61, 85), groups=[0, 0, 1, 1], reference_grid=(4, 6)
    )
    maps = traced(pipe, go, mode="self")
    assert maps.references == ["self"]
    check(maps, truth, 2)


@pytest.mark.parametrize("images", [1, 2])
@support.family(*CACHED)
def test_klein_kv_reads_references_from_the_cache(images):
    pipe = dit.flux2_klein_kv()
    go = flux2(pipe, num_images_per_prompt=images)
    calls = capture_calls(pipe.transformer, go, KINDS)
    lengths = {(c.evaluation, c.nth): (c.q.shape[2], c.k.shape[2]) for c in calls}
    assert lengths[0, 0] == (29, 85)  # [text, generated] → [text, references, generated]
    assert lengths[0, 1] == (56, 56)  # the references among themselves
    assert lengths[1, 0] == (29, 85)  # their keys from the cache
    maps = traced(pipe, go)
    check_parts(maps, IN_CACHE, generated(calls, (4, 6), slice(5, 29)), groups=[0, 0, 1, 1])
    assert set(map(tuple, maps.counts("reference_1").values())) == {(2, 2)}


def test_patches_through_the_cache():
    pipe = dit.flux2_klein_kv()
    go = flux2(pipe)
    calls = [c for c in capture_calls(pipe.transformer, go, KINDS) if c.nth == 0]
    rows = torch.stack([(c.q.double() @ c.k.double().mT / 4).softmax(-1)[:, :, 5 + 1 * 6 + 2] for c in calls])
    with i2am.trace(pipe, record="qk", sram={"eye": (20, 40)}) as tracer:  # pixels, of tokens of 16
        go()
    for name, (keys, grid) in IN_CACHE.items():
        truth = rows[..., keys].mean((0, 2)).reshape(1, *grid)
        assert_peak(tracer.maps().sram("eye", reference=name), truth)
        assert_peak(tracer.maps().sram((20, 40), reference=name), truth)


def test_klein_kv_cache_from_before_tracing_is_refused():
    pipe = dit.flux2_klein_kv()
    tracers = []

    def begin(pipe, step, timestep, given):
        if not tracers:
            tracers.append(i2am.trace(pipe))
        return given

    with pytest.raises(ValueError, match="56 reference tokens that were put there before tracing"):
        flux2(pipe, callback_on_step_end=begin)()
    tracers[0].unpatch()


def test_flux2_without_references_is_refused():
    with i2am.trace(pipe := dit.flux2()), pytest.raises(ValueError, match="no reference image among its tokens"):
        flux2(pipe, sizes=())()
