"""``make gpu`` must not fail on its own account in the first minutes with a GPU."""

import json

from benchmarks import gpu


def test_dry_run(tmp_path, monkeypatch, capsys):
    """Every step runs, tiny, on a CPU, and what it finds is on disk."""
    monkeypatch.setattr(gpu, "tests", lambda run, processes: "not here")
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == [
        "there",
        "seconds",
        "rates",
        "correctness",
        "times",
        "memory",
        "exact columns",
        "tools",
        "tests",
    ]
    assert not found["correctness"]["failures"]
    assert max(found["correctness"]["largest errors, of the peak"].values()) < 1e-4
    ((case, row),) = found["times"].items()
    assert case == "float32 2 × 65 × 49 × 40"
    assert all(each["eager"] > 0 for each in row.values())
    assert abs(found["memory"]["r2g sums to"] - 1) < 1e-4
    assert all(0 <= share <= 1 for share in found["exact columns"].values())
    page = (tmp_path / "gpu.md").read_text()
    assert "| heads × queries × keys × d | sdpa | i2am | i2am, maps only |" in page
    assert "Failures: 0." in page


def test_wrong_answers_are_named(monkeypatch, tmp_path):
    """A path that is off, or moves, is a failure with its shape, not a number in a table."""
    run = gpu.Run(tmp_path, dry=True)
    real, calls = gpu.i2am.attention, []

    def attention(*tensors, backend=None, **arguments):
        found = real(*tensors, backend=backend, **arguments)
        calls.append(backend)
        return found if backend == "reference" else found._replace(r2g=found.r2g * (1 + len(calls) / 10))

    monkeypatch.setattr(gpu.i2am, "attention", attention)
    failures = gpu.verify(run)["failures"]
    assert any("MOVES" in failure and "2×65×49×40" in failure for failure in failures)
    assert any("r2g is off by" in failure for failure in failures)
