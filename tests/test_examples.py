"""The example scripts, at a small size: they run, and their losses do what the page says."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


def main(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_two_lines_are_the_published_loss():
    found = main("stableviton")(["--side", "12"])
    ours, theirs = found["i2am"], found["materialised"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["loss"] > 0.01
    torch.testing.assert_close(ours["gradients"], theirs["gradients"], rtol=1e-4, atol=1e-8)


def test_leffas_flow_improves_with_training():
    history = main("leffa")(["--steps", "6"])
    assert history[-1] < 0.9 * history[0]


def test_a_lora_draws_influence_into_the_box():
    pytest.importorskip("peft")
    history = main("lora")(["--steps", "16"])
    assert history[-1] < history[0] - 0.02
