"""Moving pictures: a frame a time group, on one scale, in every format."""

import os
import stat

import numpy as np
import pytest
import torch
from PIL import Image

from i2am import plot
from tests.plot.test_plot import photograph, some_maps


def moving(counts=(1, 2, 1), **changes):
    return some_maps(counts=counts, **changes)


def test_a_frame_a_time_group_on_one_scale():
    maps, image = moving(), photograph(60, 100)
    animation = plot.animate(maps, image, index=1, alpha=1.0)
    assert [frame.size for frame in animation.frames] == [(256, 154 + 22)] * 3
    values = maps.tlam("r2g")[1].numpy()
    for frame, x in zip(animation.frames, values, strict=True):
        want = plot.blend(np.zeros((154, 256, 3)), x, alpha=1.0, vmin=values.min(), vmax=values.max())
        np.testing.assert_allclose(np.asarray(frame)[:154] / 255, want, atol=0.01)
    each = plot.animate(maps, image, index=1, alpha=1.0, scale="each").frames[0]
    np.testing.assert_allclose(
        np.asarray(each)[:154] / 255, plot.blend(np.zeros((154, 256, 3)), values[0], alpha=1.0), atol=0.01
    )
    bars = [np.asarray(frame)[155].sum(-1) < 600 for frame in animation.frames]
    assert [int(bar.sum()) for bar in bars] == [85, 171, 256]  # how far the run is


def test_the_other_direction_and_options():
    maps = moving()
    frame = plot.animate(maps, np.zeros((300, 600, 3)), "g2r", alpha=1.0, times=[2], layers="up_blocks.0*").frames[0]
    assert frame.size == (512, 256 + 22)
    x = maps.tlam("g2r", times=[2], layers="up_blocks.0*")[0, 0].numpy()
    np.testing.assert_allclose(
        np.asarray(frame)[:256] / 255, plot.blend(np.zeros((256, 512, 3)), x, alpha=1.0), atol=0.01
    )


def test_a_group_without_a_step_shows_the_picture():
    animation = plot.animate(moving(counts=(1, 0)), photograph(256, 256))
    first, second = (np.asarray(frame)[:256].astype(int) for frame in animation.frames)
    assert np.ptp(second, axis=-1).max() == 0  # grey
    assert np.ptp(first, axis=-1).max() > 50


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_files(kind, tmp_path):
    animation = plot.animate(moving(), photograph(), seconds=0.5)
    path = animation.save(tmp_path / f"a.{kind}")
    with Image.open(path) as image:
        assert (image.format.lower(), image.n_frames, image.size) == (kind, 3, animation.frames[0].size)
        image.seek(1)
        image.load()
        assert image.info["duration"] == 500
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert "data:image/gif;base64," in animation._repr_html_()


def test_mp4_by_ffmpeg(tmp_path, monkeypatch):
    """With a stand-in that notes what it was given: ffmpeg itself is not on every machine."""
    animation = plot.animate(moving(), photograph())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"needs the program ffmpeg .*\.gif and \.webp"):
        animation.save(tmp_path / "a.mp4")
    program = tmp_path / "ffmpeg"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n/usr/bin/wc -c\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    written = int(animation.save(tmp_path / "a.mp4").read_bytes())
    width, height = animation.frames[0].size
    assert written == 3 * width * height * 3
    assert f"-s {width}x{height}" in (tmp_path / "arguments").read_text()
    program.write_text("#!/bin/sh\necho no encoder >&2\nexit 1\n")
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(ValueError, match="could not write the MP4: no encoder"):
        animation.save(tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert "a.mp4.part" not in os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "log"}, "scale must be"),
        ({"seconds": 0}, "seconds"),
        ({"direction": "up"}, "direction"),
        ({"layers": "nothing"}, "selects no layer"),
    ],
)
def test_refusals(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot.animate(moving(), photograph(), **options)
    with pytest.raises(ValueError, match=r"a file of \.gif, \.webp, \.mp4"):
        plot.animate(moving(), photograph()).save(tmp_path / "a.avi")
    with pytest.raises(ValueError, match="no step ran"):
        plot.animate(moving(counts=(1, 0)), photograph(), times=1)
    with pytest.raises(ValueError, match=r"up_blocks\.0\.attn2 \(time groups 1\).*float16"):
        maps = moving()
        maps._sums[0].r2g[1, 0, 0, 0] = torch.inf
        plot.animate(maps, photograph())
