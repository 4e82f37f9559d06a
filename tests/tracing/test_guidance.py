"""Which samples and calls count: told, shown by the evidence, said by the user, or refused."""

import warnings

import pytest
import torch

from i2am.tracing.clock import StepInfo, Unexplained
from i2am.tracing.guidance import Guidance, Told
from i2am.tracing.options import TraceSettings

STEPPED, SAME_STEP, UNKNOWN = (StepInfo(0, step=0, stepped=s) for s in (True, False, None))


def latents(batch):
    return torch.randn(batch, 4, 2, 2)


def judge(mode, x, told=Told(), info=STEPPED, conditioning=(), timestep=900.0, guidance=None):  # noqa: B008
    return (guidance or Guidance(mode)).judge(x, conditioning, timestep, info, told)


def test_told_by_a_pipeline():
    x, y = latents(2), latents(1)
    assert judge("auto", torch.cat([x, x]), Told(2, 1)).samples == slice(2, 4)
    assert judge("auto", torch.cat([y, y, y]), Told(3, 0)).samples == slice(0, 1)
    assert judge("auto", latents(3), Told(1, 0)).samples == slice(0, 3)
    assert judge("auto", torch.cat([y, y]), Told(1, 0)).samples == slice(0, 2)  # two images of one seed, no guidance


def test_a_pipeline_that_the_latents_contradict():
    with pytest.raises(ValueError, match="2 parts of guidance, but they denoise different latents"):
        judge("auto", latents(4), Told(2, 1))
    with pytest.raises(ValueError, match="does not divide into the 2 parts"):
        judge("auto", latents(3), Told(2, 1))


def test_the_latents_tell():
    x = latents(2)
    assert judge("auto", torch.cat([x, x])).samples == slice(2, 4)
    for parts in (3, 5):
        with pytest.raises(Unexplained, match=rf"same latents {parts} times.*guidance=\(1, {parts}\)"):
            judge("auto", torch.cat([x] * parts))
    with pytest.raises(Unexplained, match="same latents 4 times"):  # 4 parts, or 2 parts of 2 pictures of one seed
        judge("auto", latents(1).expand(4, -1, -1, -1))
    assert judge("auto", torch.cat([x, x + 1e-6])).samples == slice(0, 4)
    assert judge("none", torch.cat([x, x])).samples == slice(0, 4)


def test_other_views_of_the_same_memory_are_other_latents():
    """A turned or cut picture begins at the same address."""
    x = latents(1)
    for other in (x.mT, x.flip(0).mT.flip(0), torch.as_strided(x, x.shape, (16, 4, 1, 2))):
        guidance = Guidance("auto")
        judge("auto", x, guidance=guidance)
        with pytest.raises(Unexplained, match="on other latents"):
            judge("auto", other, guidance=guidance, info=SAME_STEP)


@pytest.mark.parametrize("empty", [0, 1])
def test_a_half_of_zeros_is_unconditional(empty):
    x = latents(1)
    halves = [torch.randn(1, 3, 8), torch.randn(1, 3, 8)]
    halves[empty] = torch.zeros(1, 3, 8)
    got = judge("auto", torch.cat([x, x]), conditioning=(torch.cat(halves),))
    assert got.samples == slice(1 - empty, 2 - empty)


def test_the_one_part_that_is_not_of_zeros_is_conditional():
    x, full, none = latents(1), torch.randn(1, 3, 8), torch.zeros(1, 3, 8)
    for at in range(3):
        parts = [none] * 3
        parts[at] = full
        got = judge("auto", torch.cat([x, x, x]), conditioning=(torch.cat(parts),))
        assert got.samples == slice(at, at + 1)
    with pytest.raises(Unexplained, match="same latents 3 times"):
        judge("auto", torch.cat([x, x, x]), conditioning=(torch.cat([full, none, full]),))


def test_how_many_pictures_a_pipeline_denoises_tells_the_parts():
    one_seed = latents(1).expand(4, -1, -1, -1)
    assert judge("auto", one_seed, Told(images=2)).samples == slice(2, 4)
    assert judge("auto", one_seed, Told(images=4)).samples == slice(0, 4)
    assert judge(0, one_seed, Told(images=2)).samples == slice(0, 2)
    assert judge("auto", latents(4), Told(images=3)).samples == slice(0, 4)  # it says something else


def test_pictures_of_one_seed_are_found_out_in_the_second_step():
    x = latents(1)
    for info in (STEPPED, UNKNOWN, StepInfo(0)):
        guidance = Guidance("auto")
        assert judge("auto", torch.cat([x, x]), info=info, guidance=guidance).samples == slice(1, 2)
        with pytest.raises(Unexplained, match=r"began with the same latents 2 times.*pictures of one seed"):
            judge("auto", latents(2), info=info, timestep=800.0, guidance=guidance)
    guidance = Guidance("auto")
    for step in range(3):
        x = latents(1)
        assert judge("auto", torch.cat([x, x]), timestep=900.0 - step, guidance=guidance).samples == slice(1, 2)


def test_an_index_of_so_many_parts():
    x, two = latents(1), latents(2)
    assert judge((1, 4), torch.cat([x] * 4)).samples == slice(1, 2)
    assert judge((1, 2), torch.cat([x] * 4)).samples == slice(2, 4)
    assert judge(1, torch.cat([x] * 3)).samples == slice(1, 2)  # as often as the latents repeat
    assert judge(0, torch.cat([two] * 3)).samples == slice(0, 2)
    with pytest.raises(Unexplained, match=r"4 times.*one of 2 or 4 parts: pass guidance=\(1, 2\)"):
        judge(1, torch.cat([x] * 4))
    with pytest.raises(ValueError, match="does not divide into the 3 parts"):
        judge((1, 3), two)
    for wrong in ((2, 2), (1,), (0, 1, 2), (-1, 2), (0, True), "first"):
        with pytest.raises(ValueError, match=r"guidance must be"):
            TraceSettings(guidance=wrong)


def test_a_model_that_guides_by_calls_may_be_given_a_batch():
    """Flux with guidance in a batch of one's own: an index is a part's where the latents repeat."""
    x = latents(1)
    assert Guidance(0).judge(torch.cat([x, x]), (), 900.0, STEPPED, Told(), as_calls=True).samples == slice(0, 1)
    assert Guidance(0).judge(latents(2), (), 900.0, STEPPED, Told(), as_calls=True).samples == slice(0, 2)
    assert Guidance(1).judge(latents(2), (), 900.0, STEPPED, Told(), as_calls=True).samples is None


def test_a_users_index_wins():
    x, y = latents(1), latents(2)
    assert judge(0, y).samples == slice(0, 1)
    assert judge(2, latents(3)).samples == slice(2, 3)
    assert judge(1, latents(3), Told(3, 0)).samples == slice(1, 2)  # three parts, as the pipeline says
    assert judge(0, torch.cat([x, x]), Told(2, 1)).samples == slice(0, 1)


def run(mode, calls, told=Told(), *, steps=3, info=SAME_STEP, batch=1):  # noqa: B008
    """Which calls count of ``calls`` calls a step on the same latents."""
    guidance, seen = Guidance(mode), []
    for step in range(steps):
        x = latents(batch)
        for call in range(calls):
            now = STEPPED if call == 0 and info is not UNKNOWN else info
            text = (torch.full((batch, 2, 3), float(call)),)
            verdict = guidance.judge(x, text, 900.0 - step, now._replace(first=step == call == 0), told)
            seen.append(None if verdict.samples is None else call)
    return seen


@pytest.mark.parametrize("info", [SAME_STEP, UNKNOWN], ids=["a scheduler", "no scheduler"])
def test_calls_of_their_own(info):
    assert run("auto", 2, Told(1, 0, call=0), info=info) == [0, None] * 3
    assert run("auto", 3, Told(1, 0, call=1), info=info) == [None, 1, None] * 3
    assert run(1, 2, info=info) == [None, 1] * 3  # a batch of one does not divide: the index is a call's
    assert run(0, 2, info=info) == [0, None] * 3
    assert run(2, 3, batch=2, info=info) == [None, None, 2] * 3
    assert run("none", 2, info=info) == [0, 1] * 3
    with pytest.raises(Unexplained, match=r"2 calls at timestep 900 on the same latents"):
        run("auto", 2, info=info)
    with pytest.raises(Unexplained, match=r"taken for a part of the batch of 2, but 2 calls.*guidance=\(1, 1\)"):
        run(1, 2, batch=2, info=info)
    assert run((1, 1), 2, batch=2, info=info) == [None, 1] * 3


def test_other_latents_without_a_step():
    guidance = Guidance("auto")
    guidance.judge(latents(1), (), 900.0, STEPPED, Told())
    with pytest.raises(Unexplained, match=r"on other latents.*tracer\.tile"):
        guidance.judge(latents(1), (), 900.0, SAME_STEP, Told())
    guidance = Guidance("auto")
    guidance.judge(latents(1), (), 900.0, STEPPED, Told(extra="degraded"))
    beside = guidance.judge(latents(1), (), 900.0, SAME_STEP, Told(extra="degraded"))
    assert beside.samples is None
    assert beside.how == "degraded"


def test_other_latents_where_every_sample_counts():
    """In a run of num_steps= nobody tells the picture's size: refused. Without steps (training) it is told."""
    guidance = Guidance("none")
    guidance.judge(latents(1), (), 900.0, UNKNOWN, Told())
    with pytest.raises(Unexplained, match=r"on other latents, and no scheduler is known.*pictures$"):
        guidance.judge(latents(1), (), 900.0, UNKNOWN, Told())
    guidance = Guidance("none")
    alone = guidance.judge(latents(1), (), 900.0, UNKNOWN._replace(step=None), Told())
    again = guidance.judge(latents(1), (), 900.0, UNKNOWN._replace(step=None), Told())
    assert alone.samples == again.samples == slice(0, 1)
    assert "is it tiles?" in again.how
    assert "is it tiles?" not in alone.how


def test_the_very_same_call_again_is_no_guidance():
    x, text = latents(1), torch.randn(1, 2, 3)
    guidance = Guidance("auto")
    for _ in range(3):
        assert guidance.judge(x.clone(), (text.clone(),), 500.0, UNKNOWN, Told()).samples == slice(0, 1)


def test_what_is_given_beside_the_latents_tells_another_call():
    """Two calls at one timestep on the same latents, of which nothing says that they are the same in all else."""
    x, text, bank = latents(1), torch.randn(1, 2, 3), torch.randn(1, 4)
    for given in ([(text, bank), (text, bank + 1)], [(), ()]):
        guidance = Guidance("auto")
        guidance.judge(x, (text,), 500.0, UNKNOWN, Told(), given=given[0])
        with pytest.raises(Unexplained, match="2 calls at timestep 500 on the same latents"):
            guidance.judge(x.clone(), (text,), 500.0, UNKNOWN, Told(), given=given[1])
    guidance = Guidance("auto")
    guidance.judge(x, (text,), 500.0, UNKNOWN, Told(), given=(x, text))
    text.mul_(2)  # the buffer of the prompt, written into
    with pytest.raises(Unexplained, match="2 calls at timestep 500 on the same latents"):
        guidance.judge(x, (text,), 500.0, UNKNOWN, Told(), given=(x, text))


def test_each_run_is_looked_at_anew():
    x = latents(1)
    guidance = Guidance("auto")
    first = StepInfo(0, step=0, first=True, stepped=True)
    assert guidance.judge(torch.cat([x, x]), (), 900.0, first, Told()).samples == slice(1, 2)
    assert guidance.judge(latents(2), (), 900.0, first, Told()).samples == slice(0, 2)


def test_an_assumed_order_is_said():
    """Of two halves with the same latents and other embeddings nothing tells which is conditional."""
    x, text = latents(1), torch.randn(2, 2, 3)
    twice = torch.cat([x, x])
    with pytest.warns(UserWarning, match=r"nothing tells which half is conditional.*guidance=0"):
        verdict = Guidance("auto").judge(twice, (text,), 900.0, STEPPED, Told())
    assert verdict.samples == slice(1, 2)
    assert verdict.how.endswith("assumed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode, told, given in (
            (1, Told(), text),
            ("auto", Told(2, 1, how="a pipeline"), text),
            ("auto", Told(images=1, how="a pipeline"), text),
            ("auto", Told(), torch.cat([torch.zeros(1, 2, 3), text[:1]])),
        ):
            verdict = Guidance(mode).judge(twice, (given,), 900.0, STEPPED, told)
            assert verdict.samples == slice(1, 2)
            assert "assumed" not in verdict.how


def test_a_call_beside_the_denoising_does_not_turn_parts_into_calls():
    guidance = Guidance(1)
    twice = torch.cat([latents(1)] * 2)
    assert guidance.judge(twice, (), 900.0, UNKNOWN, Told()).samples == slice(1, 2)
    with pytest.raises(Unexplained, match=r"guidance=1 has named a part.*batch of 1 .*timestep 333 .*into 2"):
        guidance.judge(latents(1), (), 333.0, UNKNOWN, Told())
