"""Two runs compared: what moved, where, and what is written."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import wilcoxon

from i2am import cli, plot
from i2am.cli import results
from i2am.compare import compare, moved_shares, movers, total_variation
from i2am.evaluate import Store
from i2am.evaluate.compare import _left_out
from i2am.evaluate.summary import interval
from i2am.evaluate.thumbnails import as_distribution, read_levels
from tests.evaluate.test_evaluate import arguments

pytest_plugins = ("tests.helpers.saved_pipelines",)  # the fixtures inpaint and images
pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = ["down.0", "up.0", "up.1"]


def spot(y, x, shape=(4, 6)):
    """A map with all its attention on one token."""
    values = torch.zeros(shape)
    values[y, x] = 1.0
    return values


# ------------------------------------------------------------------------------------------------- single decisions


def test_total_variation_is_the_share_that_moved():
    whole, half = spot(0, 0), (spot(0, 0) + spot(3, 5)) / 2
    assert total_variation(whole, whole) == 0
    assert total_variation(whole, spot(1, 1)) == 1
    assert total_variation(whole, 7 * half) == pytest.approx(0.5)
    flat = torch.ones(8, 12)
    assert total_variation(torch.ones(4, 6), flat) == pytest.approx(0, abs=1e-6)  # another grid
    assert total_variation(whole, whole * torch.nan).isnan()


def test_layers_are_matched_by_name_and_other_levels_by_number():
    x = {"r2g.llam": torch.stack([spot(0, 0), spot(1, 1), spot(2, 2)]), "r2g.tlam": torch.rand(5, 4, 6)}
    y = {"r2g.llam": torch.stack([spot(2, 2), spot(0, 1), spot(3, 3)]), "r2g.tlam": torch.rand(4, 4, 6)}
    shares = moved_shares(x, y, LAYERS, ["up.1", "down.0", "other"])
    assert shares == {"r2g.llam": [1.0, 0.0]}  # down.0 moved, up.1 did not; up.0 is in one run only


def test_a_time_group_without_a_step_is_left_out():
    x = {"r2g.tlam": torch.stack([spot(0, 0), torch.full((4, 6), torch.nan)])}
    shares = moved_shares(x, x, [], [])["r2g.tlam"]
    assert shares[0] == 0
    assert np.isnan(shares[1])


def test_what_one_run_lacks_is_said():
    maps = torch.stack([spot(0, 0), spot(1, 1)])
    empty = torch.stack([spot(0, 0), torch.full((4, 6), torch.nan)])
    x = {"r2g.tlam": empty, "r2g.hlam": maps, "r2g.llam": maps}
    y = {"r2g.tlam": maps, "r2g.hlam": maps[:1], "r2g.llam": maps}
    layers, others = ["down.0", "up.0"], ["up.0", "other"]
    said = list(_left_out(x, y, layers, others, moved_shares(x, y, layers, others)))
    assert said == [
        "layers in one run only are left out: down.0, other",
        "time groups in which no step ran, in one run or both, are left out: 1",
        "the runs have 2 and 1 heads: heads are not compared",
    ]
    del x["r2g.hlam"]
    assert "one run has no maps by head: heads are not compared" in _left_out(x, y, layers, others, {})
    assert not _left_out(y, y, layers, layers, moved_shares(y, y, layers, layers))


# ------------------------------------------------------------------------------------------------------ runs by hand


def written(folder, samples, digest=""):
    """A run's folder: ``{id: (seed, score, R2G, G2R)}``."""
    store = Store(folder)
    store.open({"command": "evaluate"})
    for i, (seed, value, r2g, g2r) in samples.items():
        levels = {"r2g.ulam": r2g[None].half(), "g2r.ulam": g2r[None].half()}
        store.write(store.path("levels", i, ".safetensors"), lambda p, x=levels: save_file(x, p, {"layers": "[]"}))
        store.write(store.path("previews", i, ".jpg"), lambda p: Image.new("RGB", (80, 20)).save(p, "jpeg"))
        store.finish({"id": i, "seed": seed, "digest": digest, "status": "ok", "seconds": 1.0, "imacs_r2g": value})
    return folder


def test_what_is_counted_and_who_moved_most(tmp_path):
    stay, half, away = spot(0, 0), (spot(0, 0) + spot(3, 5)) / 2, spot(3, 5)
    a = written(tmp_path / "a", dict.fromkeys("xyz", (0, 0.5, stay, stay)))
    b = written(tmp_path / "b", {"x": (0, 0.7, stay, half), "y": (0, 0.5, half, away), "z": (0, 0.1, stay, stay)})
    found = compare(a, b)
    assert found.moved == {"x": {"r2g": 0, "g2r": 0.5}, "y": {"r2g": 0.5, "g2r": 1}, "z": {"r2g": 0, "g2r": 0}}
    assert found.movers == ["y", "x", "z"]
    score = found.scores["imacs_r2g"]
    assert (score["better"], score["worse"]) == (1, 1)  # and one as before
    moved = found.summary()["moved"]
    assert (moved["r2g"]["mean"], moved["g2r"]["mean"]) == pytest.approx((0.5 / 3, 0.5))
    assert found.notes == []

    axes = {ax.get_title(): ax for ax in reversed(movers(found).axes) if ax.get_title()}  # the first of each name
    np.testing.assert_allclose(axes["G2R difference"].images[0].get_array(), away - stay)  # B − A, of y
    other = compare(a, written(tmp_path / "c", dict.fromkeys("xyz", (1, 0.5, stay, stay))))
    assert any("other seeds" in note for note in other.notes)
    other = compare(a, written(tmp_path / "d", dict.fromkeys("xy", (0, 0.5, stay, stay)), digest="another row"))
    assert any("rows differ" in note and "x, y" in note for note in other.notes)


# --------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def manifest(inpaint, images):
    path = images / "compare.csv"
    rows = ["id,reference,image,mask,reference_mask"]
    Image.new("L", (60, 40), 255).save(images / "all.png")
    rows += [f"{i},reference.png,image.png,mask.png,all.png" for i in "abc"]
    path.write_text("\n".join([*rows, "d,reference.png,broken.png,mask.png,all.png"]))
    return path


@pytest.fixture(scope="module")
def runs(inpaint, manifest, tmp_path_factory):
    """Two runs of other guidance, and one of three samples."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in {"a": [], "b": ["--guidance-scale", 3], "again": []}.items():
        assert cli.main(arguments(inpaint, manifest, folder / name, *options)) == 1
    return folder


def test_runs_of_the_same_settings_do_not_differ(runs):
    found = compare(runs / "a", runs / "again")
    assert found.samples == ["a", "b", "c"]
    assert found.settings == {}
    assert found.notes == ["time groups in which no step ran, in one run or both, are left out: 1, 3, 4"]
    assert all(share == 0 for moved in found.moved.values() for share in moved.values())
    assert found.scores["imacs_r2g"]["difference"]["mean"] == 0
    assert found.scores["imacs_r2g"]["p"] is None


def test_what_moved_and_where(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["compare", str(runs / "a"), str(runs / "b"), "--out", str(out)]) == 0
    summary = json.loads((out / "compare.json").read_text())
    assert summary["settings"] == {"guidance_scale": [None, 3.0]}
    assert summary["samples"] == 3

    stores = [Store(runs / name) for name in "ab"]
    records = [{r["id"]: r for r in s.all_records()} for s in stores]
    levels = [{i: read_levels(s.path("levels", i, ".safetensors"))[0] for i in "abc"} for s in stores]
    for name in ("imacs_r2g", "imacs_g2r", "box_iou"):
        difference = [records[1][i][name] - records[0][i][name] for i in "abc"]
        assert summary["scores"][name]["difference"]["mean"] == pytest.approx(np.mean(difference))
        assert summary["scores"][name]["difference"] == pytest.approx(interval(difference))
        if any(difference):
            assert summary["scores"][name]["p"] == pytest.approx(wilcoxon(difference).pvalue)
        assert summary["scores"][name]["better"] == sum(d > 0 for d in difference)
        for which, run in zip("ab", records, strict=True):
            assert summary["scores"][name][which] == pytest.approx(np.mean([run[i][name] for i in "abc"]))
    layers = read_levels(stores[0].path("levels", "a", ".safetensors"))[1]
    for direction in ("r2g", "g2r"):
        pairs = [[as_distribution(level[i][f"{direction}.llam"]) for level in levels] for i in "abc"]
        want = np.mean([(x - y).abs().sum((1, 2)).numpy() / 2 for x, y in pairs], axis=0)
        assert list(summary["where"][f"{direction}.llam"]) == layers
        np.testing.assert_allclose(list(summary["where"][f"{direction}.llam"].values()), want, rtol=1e-4)
        assert want.max() > 0
    with open(out / "compare.csv", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert float(rows["b"]["imacs_r2g_b"]) == records[1]["b"]["imacs_r2g"]
    for name in ("compare.png", "movers.png"):
        assert np.asarray(Image.open(out / name).convert("RGB")).std() > 10
    printed = capsys.readouterr().out
    assert "guidance_scale: None → 3.0" in printed
    assert "% of the attention moved" in printed


def forget(folder, samples):
    """Remove samples' lines from a run's journals."""
    for path in (folder / "samples").glob("*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line).get("id") not in [*samples]))


def test_missing_samples_are_noted(runs, tmp_path):
    import shutil

    shutil.copytree(runs / "b", tmp_path / "b")
    forget(tmp_path / "b", "b")
    whole, found = compare(runs / "a", runs / "b"), compare(runs / "a", tmp_path / "b")
    assert found.samples == ["a", "c"]
    assert any("1 samples are not finished" in note for note in found.notes)
    assert found.moved == {i: whole.moved[i] for i in "ac"}  # paired by id: c with c, not with what stands second
    for name, score in found.scores.items():
        pairs = [[run.scores[i][name] for run in (whole.a, whole.b)] for i in "ac"]
        assert score["difference"]["mean"] == pytest.approx(np.mean([b - a for a, b in pairs])), name
    forget(tmp_path / "b", "ac")
    with pytest.raises(ValueError, match="no finished sample in common"):
        compare(runs / "a", tmp_path / "b")


def test_two_traced_runs(inpaint, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "_figures", lambda *_: {})  # test_cli looks at those
    pipeline, adapter = inpaint
    for name, steps in (("a", 2), ("b", 3)):
        argv = ["trace", pipeline, "--reference", images / "reference.png", "--image", images / "image.png", "--mask"]
        argv += [images / "mask.png", "--ip-adapter", adapter, "--ip-adapter-subfolder", "models", "--steps", steps]
        assert cli.main([str(w) for w in [*argv, "--device", "cpu", "--out", tmp_path / name]]) == 0
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert summary["settings"] == {"steps": [2, 3]}
    assert 0 < summary["moved"]["r2g"]["mean"] < 1
    assert (tmp_path / "out" / "movers.png").exists()


def test_two_pipelines_on_one_manifest(inpaint, manifest, tmp_path, capsys):
    pipeline, adapter = inpaint
    argv = ["compare", pipeline, pipeline, "--manifest", manifest, "--out", tmp_path / "out", "--steps", 2]
    argv += ["--ip-adapter", adapter, "--ip-adapter-subfolder", "models", "--device", "cpu"]
    assert cli.main([str(w) for w in argv]) == 1  # one sample is broken
    summary = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert summary["samples"] == 3
    assert summary["moved"]["g2r"]["mean"] == 0


def test_folders_that_are_no_runs(runs, tmp_path, capsys):
    assert cli.main(["compare", str(tmp_path), str(runs / "a"), "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_difference_map():
    ax = plot.difference(spot(0, 0), spot(3, 5))
    heat = ax.images[0]
    np.testing.assert_allclose(heat.get_array(), spot(3, 5) - spot(0, 0))
    assert heat.get_clim() == (-1, 1)
    assert plot.difference(spot(0, 0), spot(0, 0)).images[0].get_clim() == (-1, 1)
    with pytest.raises(ValueError, match="one grid"):
        plot.difference(spot(0, 0), torch.ones(3, 3))
