"""Which step is running: counted for solvers of every kind, in pipelines and on bare models."""

import copy
import pickle

import diffusers
import pytest
import torch

from i2am.tracing.clock import CountingClock, SchedulerClock, StepInfo, TimestepClock, Unexplained, read_timestep
from tests.helpers.tiny_models import unet as pipelines


@pytest.fixture(autouse=True)
def nothing_stays_watched():
    yield
    for clock in WATCHING:
        clock.close()
    WATCHING.clear()


WATCHING = []


def watching(scheduler):
    clock = SchedulerClock(scheduler)
    clock.open()
    WATCHING.append(clock)
    return clock


def groups(scheduler, steps, T, start=0):
    """Time groups of a loop's evaluations, from the evaluation ``start`` of the schedule on."""
    clock = watching(scheduler)
    scheduler.set_timesteps(steps)
    x, seen = torch.randn(1, 4, 4, 4), []
    for t in scheduler.timesteps[start:]:
        seen.append(clock.read(read_timestep(t), T).group)
        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    clock.close()
    return seen


@pytest.mark.parametrize(
    ("scheduler", "want"),
    [
        (diffusers.DDIMScheduler(), [0, 1, 2, 3, 4]),
        (diffusers.EulerDiscreteScheduler(), [0, 1, 2, 3, 4]),
        (diffusers.DPMSolverMultistepScheduler(), [0, 1, 2, 3, 4]),
        (diffusers.UniPCMultistepScheduler(), [0, 1, 2, 3, 4]),
        (diffusers.LCMScheduler(), [0, 1, 2, 3, 4]),
        (diffusers.HeunDiscreteScheduler(), [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        (diffusers.KDPM2DiscreteScheduler(), [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        (diffusers.PNDMScheduler(skip_prk_steps=True), [0, 0, 1, 2, 3, 4]),
        (diffusers.PNDMScheduler(), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4]),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, list) else "",
)
def test_five_steps_in_five_groups(scheduler, want):
    assert groups(scheduler, 5, 5) == want


def test_floor_of_i_T_over_n():
    assert groups(diffusers.DDIMScheduler(), 7, 3) == [i * 3 // 7 for i in range(7)]
    assert groups(diffusers.DDIMScheduler(), 2, 5) == [0, 2]


def test_runs_that_start_inside_the_schedule():
    """img2img: strength 0.5 of 8 steps is a run of 4."""
    assert groups(diffusers.DDIMScheduler(), 8, 4, start=4) == [0, 1, 2, 3]
    assert groups(diffusers.HeunDiscreteScheduler(), 8, 4, start=8) == [0, 0, 1, 1, 2, 2, 3]


def test_img2img_pipeline_counts_its_own_steps():
    import i2am

    pipe = pipelines.sd("full")
    pipe = pipelines.quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    pipe.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    with i2am.trace(pipe, time_groups=2) as tracer:
        pipe(
            prompt="a",
            image=pipelines.image(),
            ip_adapter_image=pipelines.image(),
            strength=0.75,
            num_inference_steps=8,
        )
    assert set(map(tuple, tracer.maps().counts().values())) == {(4, 3)}  # 6 steps; PNDM makes 7 evaluations


def test_a_new_run_starts_over():
    scheduler = diffusers.DDIMScheduler()
    clock = watching(scheduler)
    for steps in (4, 2):
        scheduler.set_timesteps(steps)
        seen = []
        for t in scheduler.timesteps:
            seen.append(clock.read(float(t), 2).group)
            scheduler.step(torch.zeros(1, 4, 2, 2), t, torch.zeros(1, 4, 2, 2))
        assert seen == [i * 2 // steps for i in range(steps)]


def test_nothing_is_written_into_a_scheduler():
    scheduler = diffusers.DDIMScheduler()
    before, own = dict(vars(scheduler)), vars(diffusers.DDIMScheduler)["step"]
    clock = watching(scheduler)
    assert vars(scheduler) == before
    assert vars(diffusers.DDIMScheduler)["step"] is not own
    clock.close()
    assert vars(diffusers.DDIMScheduler)["step"] is own


def test_a_copy_of_a_watched_scheduler_is_its_own():
    scheduler = diffusers.DDIMScheduler()
    clock = watching(scheduler)
    twin = copy.deepcopy(scheduler)
    pickled = pickle.loads(pickle.dumps(scheduler))
    scheduler.set_timesteps(50)
    for other in (twin, pickled):
        other.set_timesteps(7)
        assert len(other.timesteps) == 7
        x = torch.zeros(1, 4, 2, 2)
        other.step(x, other.timesteps[0], x)
    assert len(scheduler.timesteps) == 50
    assert clock.read(float(scheduler.timesteps[0]), 5).group == 0  # the copies' steps are not counted


def test_two_tracers_watch_two_schedulers_of_one_class():
    first, second = diffusers.DDIMScheduler(), diffusers.DDIMScheduler()
    clocks = [watching(first), watching(second)]
    for scheduler in (first, second):
        scheduler.set_timesteps(4)
    x = torch.zeros(1, 4, 2, 2)
    first.step(x, first.timesteps[0], x)
    assert clocks[0].read(float(first.timesteps[1]), 4).group == 1
    assert clocks[1].read(float(second.timesteps[0]), 4).group == 0
    clocks[0].close()
    second.step(x, second.timesteps[0], x)
    assert clocks[1].read(float(second.timesteps[1]), 4).group == 1  # still told


def test_a_call_at_another_timestep_than_the_schedulers_is_refused():
    scheduler = diffusers.DDIMScheduler()
    clock = watching(scheduler)
    scheduler.set_timesteps(4)
    clock.read(float(scheduler.timesteps[0]), 4)
    with pytest.raises(ValueError, match=r"called at timestep 251, but DDIMScheduler.*stands at"):
        clock.read(251.0, 4)


def test_bare_timesteps():
    clock = TimestepClock()
    assert [clock.read(t, 4).group for t in (999, 751, 750, 749.5, 500, 250, 1, 0)] == [0, 0, 0, 1, 1, 2, 3, 3]
    with pytest.raises(ValueError, match=r"outside \[0, 1000\)"):
        clock.read(1700, 4)


def test_counting():
    clock = CountingClock(4)
    run = [900, 900, 600, 600, 300, 0]  # two calls at one timestep are one step
    assert [clock.read(t, 4).group for t in run] == [0, 0, 1, 1, 2, 3]
    assert [clock.read(t, 2).group for t in run] == [0, 0, 0, 0, 1, 1]  # the next run
    assert [clock.read(t, 2).group for t in (900, 600)] == [0, 0]
    assert clock.read(900, 4).group == 0  # an interrupted run, started again
    for t in (600, 300, 0):
        clock.read(t, 4)
    with pytest.raises(ValueError, match="5th timestep, 950"):
        clock.read(950, 4)
    clock.restart()
    assert clock.read(950, 4).group == 0


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ([900, 600, 300, 600], "600 at step 3 of num_steps=4, which this run has passed"),
        ([900, 600, 700], "700 at step 2 .*after 900 and 600"),
        ([900, 600, 300, 0, 900, 300], "300 at step 1 .*where the run before was at 600"),
    ],
)
def test_a_call_that_is_no_step_of_the_counted_run(run, message):
    clock = CountingClock(4)
    for t in run[:-1]:
        clock.read(t, 4)
    with pytest.raises(ValueError, match=message):
        clock.read(run[-1], 4)


def test_moments_tell_how_long_a_run_is():
    scheduler = diffusers.HeunDiscreteScheduler()
    clock = watching(scheduler)
    scheduler.set_timesteps(4)
    assert clock.read(float(scheduler.timesteps[0]), 2) == StepInfo(
        0, step=0, steps=4, evaluations=7, first=True, stepped=True, taken=0
    )
    assert not clock.read(float(scheduler.timesteps[0]), 2).first
    counting = CountingClock(3)
    assert counting.read(900, 3) == StepInfo(0, step=0, steps=3, evaluations=3, first=True)
    assert counting.read(600, 3) == StepInfo(1, step=1, steps=3, evaluations=3, first=False)


def test_read_timestep():
    assert read_timestep(torch.tensor([7, 7])) == 7.0
    assert read_timestep(torch.tensor(3)) == 3.0
    assert read_timestep(5) == 5.0


def test_samples_at_different_timesteps_are_refused():
    with pytest.raises(ValueError, match=r"different timesteps \(900, 100\)"):
        read_timestep(torch.tensor([900, 100]))


def test_sigmas_are_no_timesteps():
    clock = TimestepClock()
    with pytest.raises(ValueError, match="a sigma rather than a timestep"):
        clock.read(14.6, 5)
    assert clock.read(981, 5).group == 0
    assert clock.read(14.6, 5).group == 4  # the end of a schedule that began high
    flow = TimestepClock()
    assert flow.read(1.0, 5).group == 4  # the last of a schedule, or the first sigma
    with pytest.raises(Unexplained, match=r"up to 1, now 0\.75: a sigma rather than a timestep"):
        flow.read(0.75, 5)
