"""Videos: maps of one frame and of all, whether frames lie below each other in the grid or are images of the batch."""

import numpy as np
import pytest
import torch

import i2am
from i2am import plot
from i2am.maps.frames import Video
from tests.helpers.browser import chromium

FRAMES, GRID, REFERENCE, HEADS, DIM = 3, (4, 5), (2, 3), 2, 8


def attention(q, k):
    """Sums of one call by definition, ``[1, B, H, N]``."""
    s = (q @ k.mT / DIM**0.5).double()
    row, column = s.softmax(-1), s.softmax(-2)
    return {"r2g": column.mean(-1), "g2r": row.mean(-2), "mass": row.sum(-1)}


def strip(record=True):
    """One attention over all frames: ``(frames·h, w)`` generated tokens."""
    torch.manual_seed(0)
    grid = (FRAMES * GRID[0], GRID[1])
    sums = i2am.Accumulator(2, time_groups="steps", record="qk" if record else None)
    calls = []
    for step in range(2):
        q = 3 * torch.randn(1, HEADS, grid[0] * grid[1], DIM)
        k = torch.randn(1, HEADS, REFERENCE[0] * REFERENCE[1], DIM)
        sums.attention(q, k, None, layer="a", step=step, grid=grid, keys=i2am.Reference(REFERENCE))
        calls.append((q, k))
    maps = sums.maps()
    return (
        i2am.AttributionMaps(
            maps._sums, entries=maps._entries, provenance=maps.provenance, video=Video(FRAMES, "rows"), canvas=(96, 40)
        ),
        calls,
    )


def images(videos=2):
    """Each frame an image of the batch, ``videos·frames``."""
    torch.manual_seed(1)
    sums = i2am.Accumulator(1, time_groups=1, record="qk")
    q = torch.randn(videos * FRAMES, HEADS, GRID[0] * GRID[1], DIM)
    k = torch.randn(videos * FRAMES, HEADS, REFERENCE[0] * REFERENCE[1], DIM)
    sums.attention(q, k, None, layer="a", step=0, grid=GRID, keys=i2am.Reference(REFERENCE))
    maps = sums.maps()
    return i2am.AttributionMaps(maps._sums, entries=maps._entries, video=Video(FRAMES, "images")), (q, k)


def test_a_strip_is_taken_apart():
    maps, calls = strip()
    assert (maps.frames, maps.sees_all_frames, maps.batch) == (FRAMES, True, 1)
    want = torch.stack([attention(q, k)["r2g"] for q, k in calls]).mean(0).mean(1).unflatten(-1, (FRAMES, *GRID))
    got = maps.video("r2g")
    assert got.shape == (1, FRAMES, *GRID)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-7)
    assert got.sum().item() == pytest.approx(1, abs=1e-5)  # the column softmax goes over all frames
    lifted = maps.video("r2g", normalize="lift")
    torch.testing.assert_close(lifted, got * FRAMES * GRID[0] * GRID[1])
    second = maps.frame(1)
    torch.testing.assert_close(second.tlam("r2g")[0, 1].double(), attention(*calls[1])["r2g"].mean(1)[0].unflatten(
        -1, (FRAMES, *GRID))[1], rtol=1e-4, atol=1e-7)  # fmt: skip
    assert second.frames == 1
    assert second.canvas == (32, 40)
    assert second.ulam("g2r").equal(maps.ulam("g2r"))
    with pytest.raises(ValueError, match="G2R is summed over the whole video"):
        maps.video("g2r")
    with pytest.raises(IndexError, match="frame=3, but the maps hold 3 frames"):
        maps.frame(3)


def test_patches_of_a_frame_are_those_of_the_strip():
    maps, _ = strip()
    point = (2 * 32 + 9, 17)  # on the strip's canvas of 96 rows: the last frame
    assert maps.frame(2).sram((9, 17)).equal(maps.sram(point))
    whole = maps.where_did_it_go((1, 2)).unflatten(1, (FRAMES, GRID[0]))
    torch.testing.assert_close(maps.frame(1).where_did_it_go((1, 2)), whole[:, 1])


def test_images_of_the_batch_are_taken_apart():
    maps, (q, k) = images()
    truth = attention(q, k)
    for direction, grid in (("r2g", GRID), ("g2r", REFERENCE)):
        want = truth[direction].mean(1).unflatten(-1, grid).unflatten(0, (2, FRAMES))
        torch.testing.assert_close(maps.video(direction).double(), want, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(maps.frame(1).sram((2, 2)), maps.sram((2, 2)).unflatten(0, (2, FRAMES))[:, 1])


def test_files_keep_frames(tmp_path):
    for maps in (strip()[0], images()[0]):
        again = i2am.AttributionMaps.load(maps.save(tmp_path / "video.safetensors"))
        assert again.frames == FRAMES
        assert again.video("r2g").equal(maps.video("r2g"))
        one = i2am.AttributionMaps.load(maps.frame(2).save(tmp_path / "frame.safetensors"))  # its record is cut
        assert one.frames == 1
        assert one.sram((1, 1)).equal(maps.frame(2).sram((1, 1)))


def test_what_does_not_divide_is_refused():
    maps, _ = strip()
    with pytest.raises(ValueError, match="layer 'a': 12 rows are not 5 frames of equal size"):
        i2am.AttributionMaps(maps._sums, video=Video(5, "rows"))
    with pytest.raises(ValueError, match="layer 'a': 1 images are not 3 frames"):
        i2am.AttributionMaps(maps._sums, video=Video(3, "images"))
    with pytest.raises(ValueError, match="along rows or images"):
        i2am.AttributionMaps(maps._sums, video=Video(3, "columns"))


# ------------------------------------------------------------------------------------------------------------- looking


def pictures(count):
    return [np.full((32, 40, 3), 40 * i, np.uint8) for i in range(count)]


def test_animation_over_frames():
    maps, _ = strip()
    animation = plot.animate(maps, pictures(5), alpha=0.0)  # latents compress time: frames 0, 2 and 4 of five
    assert animation.seconds == 0.25
    greys = [int(np.asarray(frame)[10, 10, 0]) for frame in animation.frames]
    assert greys == [0, 80, 160]
    values = maps.video("r2g")[0].numpy()
    drawn = plot.animate(maps, pictures(1)[0], alpha=1.0).frames
    for frame, x in zip(drawn, values, strict=True):
        want = plot.blend(np.zeros((205, 256, 3)), x, alpha=1.0, vmin=values.min(), vmax=values.max())
        np.testing.assert_allclose(np.asarray(frame)[:205] / 255, want, atol=0.01)
    with pytest.raises(ValueError, match="4 pictures are no video of 3 latent frames"):
        plot.animate(maps, pictures(4))
    with pytest.raises(ValueError, match="these maps are of 3 frames"):
        plot.animate(maps, pictures(3), over="steps")
    steps = plot.animate(maps.frame(0), pictures(1)[0])
    assert len(steps.frames) == 2
    with pytest.raises(ValueError, match="over must be one of steps, frames"):
        plot.animate(maps, pictures(3), over="layers")


def test_steps_are_called_steps():
    maps, _ = strip(record=False)
    assert maps.one_group_a_step
    assert plot.labels.share_of_run(maps, {}) == ["step 1 of 2", "step 2 of 2"]
    other = i2am.AttributionMaps(maps._sums, provenance={"steps": 4})
    assert plot.labels.share_of_run(other, {})[0] == "group 0 · 0–50 % of run"


def test_the_report_of_a_video_has_frames(tmp_path):
    """A slider and a button go through the frames: picture, map and patches change together."""
    maps, _ = strip()
    path = maps.report(tmp_path / "video.html", pictures(3), pictures(1)[0], progress=False)
    with pytest.raises(ValueError, match="masks are of a picture"):
        maps.report(tmp_path / "x.html", pictures(3), mask=np.ones((4, 4)), progress=False)
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        assert page.locator("#play").inner_text() == "▶ Play the steps"
        high = "() => Math.max(...mapAt('r2g', state.pick).values)"
        seen = {}
        for i in range(FRAMES):
            page.locator("#pick-frame").fill(str(i))
            drawn = "text => document.querySelector('#pick-frame + output').textContent === text"
            page.wait_for_function(drawn, arg=f"{i + 1} of 3")  # once its picture is decoded, however long that takes
            seen[i] = page.evaluate(high)
            assert seen[i] == pytest.approx(maps.frame(i).ulam("r2g").max().item(), rel=0.01)
            grey = page.evaluate(
                """() => { const c = new OffscreenCanvas(8, 8).getContext("2d");
                c.drawImage(document.querySelector("#generated .stage img"), 0, 0);
                return c.getImageData(2, 2, 1, 1).data[0]; }"""
            )
            assert grey == 40 * i
        assert len(set(seen.values())) == FRAMES
        page.evaluate("state.place = {side: 'generated', cell: [1, 2], kept: true}; draw()")
        row = page.evaluate("() => Array.from(shown('reference').heat.values)")
        want = maps.frame(2).correspondence(tuple(page.evaluate("() => frame().rows.generated.cells")))
        columns = page.evaluate("() => frame().rows.generated.cells[1]")
        np.testing.assert_allclose(row, want[0, columns + 2].flatten(), atol=0.01 * max(row))
        page.clock.install(time=0)
        page.clock.pause_at(1000)  # only run_for moves it: a busy machine plays no frame on its own
        page.locator("#play-frames").click()
        assert page.evaluate("state.frame") == 0  # after the last comes the first
        page.clock.run_for(250)
        assert page.evaluate("state.frame") == 1
        assert page.locator("#play-frames").get_attribute("aria-pressed") == "true"
        page.locator("#play-frames").click()
        assert problems == []
