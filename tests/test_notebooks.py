"""The notebooks: they run in a kernel of their own, show every figure they draw, and are stored with what they show."""

import ast
import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DRAWS = re.compile(r"^plot\.\w+\(.*\)$", re.S)  # the last expression of a cell


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def draws(cell) -> bool:
    """Whether a code cell ends with a figure."""
    if cell["cell_type"] != "code" or "%pip" in source(cell):
        return False
    last = ast.parse(source(cell)).body[-1]
    return bool(DRAWS.match(ast.unparse(last)))


def pictures(cell):
    """The pictures among a cell's outputs, as arrays."""
    found = [output.get("data", {}).get("image/png") for output in cell["outputs"]]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(x))).convert("RGB")) for x in found if x]


def test_there_are_notebooks_for_every_way_in():
    ways = {"quickstart", "ip_adapter", "flux_kontext", "tryon_patch_modules", "superres_tiles", "refinement"}
    assert {p.stem for p in NOTEBOOKS} >= ways


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_starts_with_a_badge_and_an_install_cell(path):
    first, install, *_ = cells_of(path)
    (link,) = re.findall(
        r"\]\(https://colab\.research\.google\.com/github/[\w-]+/[\w-]+/blob/main/(\S+)\)", source(first)
    )
    assert ROOT / link == path
    assert source(first).startswith("# ")
    assert "%pip install" in source(install)
    assert '"i2am[demo] @ git+https://github.com/' in source(install)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_stored_with_its_outputs(path):
    """Every figure is there, is no blank page, and nothing failed or warned."""
    for cell in cells_of(path):
        if cell["cell_type"] != "code":
            continue
        assert cell["execution_count"] is not None, source(cell)
        assert all(o["output_type"] in ("execute_result", "display_data") for o in cell["outputs"]), source(cell)
        if draws(cell):
            shown = pictures(cell)
            assert len(shown) == 1, f"{len(shown)} pictures from {source(cell)!r}"
            assert shown[0].std() > 10
    assert sum(map(draws, cells_of(path))) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_in_a_kernel_of_its_own(path, tmp_path):
    """And shows what is stored, as far as text goes."""
    pytest.importorskip("nbclient", reason="nbclient is not installed: pip install i2am[docs]")
    from notebooks.run import execute

    for stored, cell in zip(cells_of(path), execute(path, tmp_path).cells, strict=True):
        if cell.cell_type == "code":
            assert [o.output_type for o in cell.outputs if o.get("name") != "stderr"] == [
                o["output_type"] for o in stored["outputs"]
            ]
            assert len(pictures(cell)) == len(pictures(stored))
