"""README, pasted literally: its code runs as written, it is short, and its pictures and links exist.

Only what needs the network is stood in for: a small inpainting pipeline with an IP-Adapter comes for the weights.
"""

import re
from pathlib import Path

import pytest
from diffusers import AutoPipelineForInpainting

from tests.helpers.tiny_models import unet as pipelines

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RAW = "https://raw.githubusercontent.com/i2am-dev/i2am/main/"
SCREENS = 2 * 52  # lines


@pytest.fixture
def downloaded(monkeypatch, tmp_path):
    """The files that a reader has, in the folder at hand, and the pipeline that would come from the hub."""
    pipe = pipelines.sd_inpaint("full")
    monkeypatch.setattr(AutoPipelineForInpainting, "from_pretrained", lambda name: pipe)
    monkeypatch.setattr(pipe, "to", lambda device: pipe, raising=False)
    monkeypatch.setattr(pipe, "load_ip_adapter", lambda name, subfolder, weight_name: None, raising=False)
    monkeypatch.chdir(tmp_path)
    pipelines.image(seed=1).save("photo.png")
    pipelines.image(seed=2).save("reference.png")
    pipelines.mask().save("mask.png")


def test_code_runs_as_written(downloaded, tmp_path, one_thread):
    code = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code) >= 2
    namespace = {"__name__": "__main__"}
    for number, text in enumerate(code, 1):
        exec(compile(text, f"README.md, block {number}", "exec"), namespace)
    assert namespace["maps"].recorded
    assert (tmp_path / "summary.png").stat().st_size > 10_000
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_two_screens_come_first():
    """What it is, a picture, two commands, a block of code, the models: before any equation."""
    first = README[: README.index("## What it computes")]
    assert len(first.splitlines()) <= SCREENS
    assert first.count("![") == 1
    assert first.count("```python") == 1
    assert "make demo" in first
    assert "make test" in first
    assert "| | reference keys |" in first


def test_pictures_and_links_exist():
    """Pictures are absolute, since the package index shows README too; each is a file of the repository."""
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert all(url.startswith(RAW) and (ROOT / url.removeprefix(RAW)).is_file() for url in pictures)
    links = re.findall(r"(?<!!)\[[^\]]+\]\(([^)#]+)[^)]*\)", README)
    missing = [url for url in links if not url.startswith("https://") and not (ROOT / url).is_file()]
    assert len(links) > 10
    assert missing == []
