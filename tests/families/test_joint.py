"""What in-context transformers share: bare models, positions of pictures among tokens."""

import pytest
import torch

import i2am
from i2am.families.joint import Positions, Segment
from tests import support_table as support
from tests.helpers.tiny_models import dit
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth
from tests.support_table import check

KINDS = ("FluxAttention",)


@support.family("any of these transformers, bare", "`i2am.patch_transformer`", "as its pipeline lays them out")
@pytest.mark.parametrize("fresh", [False, True], ids=["same tensor", "equal tensor"])
@pytest.mark.parametrize("clock", ["num_steps", "scheduler", "timestep"])
def test_bare_transformer(clock, fresh):
    """A loop of one's own; guidance is calls of its own, of which the user says which one is conditional."""
    transformer, scheduler = dit.flux_transformer(), dit.flow()
    ids = torch.cat(
        [torch.cartesian_prod(*map(torch.arange, (1, 2, 3))), torch.cartesian_prod(*map(torch.arange, (1, 4, 2)))]
    )
    ids[6:, 0] = 1
    reference, noise = torch.randn(2, 8, 16), torch.randn(2, 6, 16)

    @torch.no_grad()
    def go():
        scheduler.set_timesteps(4)
        x = noise
        for t in scheduler.timesteps:
            given = dict(
                hidden_states=torch.cat([x, reference], dim=1),
                timestep=t.expand(2) / 1000,
                guidance=torch.ones(2),
                img_ids=ids,
                pooled_projections=torch.zeros(2, 8),
            )
            noises = [
                transformer(
                    encoder_hidden_states=dit.text_tokens(n, batch=2),
                    txt_ids=torch.zeros(n, 3),
                    **(given | {"hidden_states": given["hidden_states"].clone()} if fresh else given),
                ).sample
                for n in (5, 3)  # conditional, then unconditional with a shorter prompt
            ]
            x = scheduler.step((3 * noises[0] - 2 * noises[1])[:, :6], t, x).prev_sample
        return x

    calls = capture_calls(transformer, go, KINDS)
    groups = [0] * 4 + [1] * 4
    if clock == "timestep":  # equal ranges of [0, 1000)
        scheduler.set_timesteps(4)
        groups = [int(float(t) < 500) for t in scheduler.timesteps for _ in range(2)]
    truth = Truth(
        generated(calls, (2, 3), slice(5, 11), evaluations=range(0, 8, 2)),
        keys=slice(11, 19),
        groups=groups,
        reference_grid=(4, 2),
    )
    options = {"num_steps": {"num_steps": 4}, "scheduler": {"scheduler": scheduler}, "timestep": {}}[clock]
    want = go()
    with i2am.patch_transformer(transformer, time_groups=2, output="model", guidance=0, **options) as tracer:
        assert go().equal(want)
    check(tracer.maps(), truth, 2)
    assert tracer.maps().canvas == (2, 3)
    with i2am.patch_transformer(transformer, time_groups=2, **options) as tracer:
        with pytest.raises(ValueError, match=r"2 calls at timestep 1000 on the same latents.*guidance=\(0, 1\)"):
            go()
        with pytest.raises(ValueError, match="no maps that can be trusted"):
            tracer.maps()
    assert go().equal(want)


def picture(number, height, width, top=0, left=0):
    """Position ids of a picture, row by row."""
    return torch.cartesian_prod(torch.tensor([number]), torch.arange(height) + top, torch.arange(width) + left)


def once(transformer, *pictures):
    """One call on pictures of 2×3 tokens and what is given."""
    ids = torch.cat([picture(0, 2, 3), *pictures])
    hidden = torch.randn(1, len(ids), 16, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def go():
        transformer(
            hidden_states=hidden,
            encoder_hidden_states=dit.text_tokens(3),
            pooled_projections=torch.zeros(1, 8),
            timestep=torch.tensor([0.5]),
            guidance=torch.ones(1),
            img_ids=ids.bfloat16(),
            txt_ids=torch.zeros(3, 3),
        )

    return go


BESIDE = [9, 10, 13, 14, 11, 12, 15, 16]  # two pictures of 2×2 side by side, row by row: tokens 9…12 and 13…16
FIRST, SQUARE = (slice(9, 13), (2, 2)), picture(1, 2, 2)
STITCHED = {
    "below": ((SQUARE, picture(1, 2, 2, top=2)), [(slice(9, 17), (4, 2))]),
    "beside": ((SQUARE, picture(1, 2, 2, left=2)), [(BESIDE, (2, 4))]),
    "numbers": ((SQUARE, picture(2, 2, 2)), [FIRST, (slice(13, 17), (2, 2))]),
    "below, wider": ((SQUARE, picture(1, 2, 3, top=2)), [FIRST, (slice(13, 19), (2, 3))]),
    "beside, taller": ((SQUARE, picture(1, 3, 2, left=2)), [FIRST, (slice(13, 19), (3, 2))]),
}


@pytest.mark.parametrize("case", STITCHED)
def test_stitched_references(case):
    """Pictures of one number make one reference where they fill a grid, below or beside each other; else their own."""
    pictures, parts = STITCHED[case]
    transformer = dit.flux_transformer(num_layers=1, num_single_layers=1)
    go = once(transformer, *pictures)
    calls = capture_calls(transformer, go, KINDS)
    with i2am.patch_transformer(transformer, num_steps=1, time_groups=1) as tracer:
        go()
    maps = tracer.maps()
    assert len(maps.references) == len(parts)
    for name, (keys, grid) in zip(maps.references, parts, strict=True):
        chosen = generated(calls, (2, 3), slice(3, 9))
        check(maps, Truth(chosen, keys=keys, groups=[0], reference_grid=grid), 1, reference=name)


UNCLEAR = {
    "in part": (
        (picture(1, 2, 2), picture(1, 2, 2, left=2)[:3]),
        r"picture 1 .* 7 tokens, which neither fill \(2, 4\)",
    ),
    "over each other": ((picture(1, 2, 2), picture(1, 2, 2, left=1)), "places of their own"),
    "the generated one's": ((picture(0, 2, 2, left=3),), "picture 0 .* the generated one, does not go"),
    "the generated one's, apart": ((picture(0, 3, 2, left=3),), "picture 0 .* the generated one, does not go"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_pictures_that_share_a_number_without_a_grid_are_refused(case):
    pictures, said = UNCLEAR[case]
    transformer = dit.flux_transformer(num_layers=1, num_single_layers=0)
    with i2am.patch_transformer(transformer, num_steps=1), pytest.raises(ValueError, match=said):
        once(transformer, *pictures)()


def test_a_reference_before_the_generated_picture():
    """The generated picture's number is the smallest; where its tokens stand does not matter."""
    transformer = dit.flux_transformer(num_layers=1, num_single_layers=1)
    ids = torch.cat([torch.cartesian_prod(*map(torch.arange, n)) for n in ((1, 4, 2), (1, 2, 3))])
    ids[:8, 0] = 1
    given = dict(
        hidden_states=torch.randn(1, 14, 16),
        encoder_hidden_states=dit.text_tokens(3),
        pooled_projections=torch.zeros(1, 8),
        timestep=torch.tensor([0.5]),
        guidance=torch.ones(1),
        img_ids=ids,
        txt_ids=torch.zeros(3, 3),
    )

    @torch.no_grad()
    def go():
        transformer(**given)

    calls = capture_calls(transformer, go, KINDS)
    with i2am.patch_transformer(transformer, num_steps=1, time_groups=1) as tracer:
        go()
    truth = Truth(generated(calls, (2, 3), slice(11, 17)), keys=slice(3, 11), groups=[0], reference_grid=(4, 2))
    check(tracer.maps(), truth, 1)
    with i2am.patch_transformer(transformer, num_steps=2, time_groups=2) as tracer:
        go()
        given["timestep"] = torch.tensor([0.25])  # the same latents again, and no second half of guidance
        go()
    assert set(map(tuple, tracer.maps().counts().values())) == {(1, 1)}


def test_long_pictures_in_bfloat16():
    """It counts to 256 only; so do the position ids of a pipeline that runs in it."""
    ids = torch.cartesian_prod(*map(torch.arange, (1, 40, 30))).bfloat16()
    assert Positions().segments(ids) == [(0, Segment(0, (40, 30)))]


def test_position_ids_of_one_shape_and_another_picture():
    """4×8 tokens, then 8×4: what was read of the ids before is not what these say."""
    read = Positions()
    for grid in ((4, 8), (8, 4), (2, 16), (4, 8)):
        ids = torch.cartesian_prod(torch.arange(1), *map(torch.arange, grid)).float()
        assert read.segments(ids) == [(0, Segment(0, grid))]
        assert read.segments(ids) == [(0, Segment(0, grid))]
