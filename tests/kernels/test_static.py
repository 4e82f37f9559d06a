"""The kernels' cost in instructions: no shipped kernel may get worse, and the ratios that the docs state must hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from benchmarks import sass, static_model, static_page

ROOT = Path(__file__).resolve().parents[2]
RECORD = json.loads((ROOT / "benchmarks" / "static.json").read_text())


COSTS = {
    f"{where} {name}": cost
    for where, rows in RECORD["costs"]["rows"].items()
    for name, cost in rows.items()
    if name.startswith("i2am") and ("few keys" not in name or where.startswith("sm_90"))
}


def flat(cost):
    """What is held of a cost: spills, work a score, and bounds."""
    return {key: cost[key] for key in ("spills", "bound", "issue_bound")} | {
        pipe: cost["per_score"][pipe] for pipe in ("tensor", "exp", "atomic")
    }


@pytest.fixture(scope="module")
def now():
    """The costs of today's sources. A process that interprets Triton cannot compile it, hence one of its own."""
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8):
        pytest.skip(f"the record is of Triton 3.8 and later, and this is {triton.__version__}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = "import json; from benchmarks import static; print(json.dumps(static.recorded()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    return {f"{where} {name}": cost for where, rows in found.items() for name, cost in rows.items()}


@pytest.mark.parametrize("kernel", COSTS)
def test_no_kernel_gets_worse(now, kernel):
    """If this is an improvement or meant: ``python -m benchmarks.static --update``."""
    found = flat(now[kernel])
    for measure, then in flat(COSTS[kernel]).items():
        slack = 1.02 if "bound" in measure else 1.001
        assert found[measure] <= then * slack, f"{measure} was {then} and is {found[measure]}"


def test_the_record_is_of_every_kernel(now):
    assert set(now) == set(COSTS)
    assert all(cost["spills"] == cost["per_score"]["atomic"] == 0 for cost in COSTS.values())
    for d in (64, 128):
        passes = [COSTS[f"sm_90 d={d} i2am pass {n}"]["per_score"] for n in (1, 2)]
        assert sum(each["tensor"] for each in passes) == 3 * d  # 3 matrix products
        assert sum(each["exp"] for each in passes) < 2.1


@pytest.mark.parametrize("name", static_page.PARTS)
def test_the_pages_say_what_the_record_says(name):
    """If the record has changed: ``python -m benchmarks.static_page``."""
    page = static_page.PARTS[name][0].read_text(encoding="utf-8")
    assert static_page.part(name, RECORD) in page


def test_a_part_of_a_page_is_replaced_and_nothing_else():
    record = {"tables": {"3.8.0": {"sm_90": {"attention, fp16, plain": {"64": [200, 16, 900, 700]}}}}}
    page = static_page.replaced("# Before\n", "spills", record)
    assert "| pass 1 | 700, **16 B** |" in page
    assert "- Triton 3.8.0, sm_90, 1 kernels read: pass 1 d 64 16." in page
    record["tables"]["3.8.0"]["sm_90"]["attention, fp16, plain"]["64"][1] = 0
    page = static_page.replaced(page + "after\n", "spills", record)
    assert page.startswith("# Before\n")
    assert page.endswith("-->\nafter\n")
    assert page.count("| pass 1 | 700 |") == 1
    assert "1 kernels read: nothing." in page


def test_what_the_model_predicts():
    """Products and the busiest other pipe, one after the other; a forward's published rate as clocks of a tile."""
    pipes = {"tensor": 512.0, "exp": 520.0, "issue": 700.0}
    assert static_model.predict(pipes).clocks == static_model.predict(pipes, loads=1000.0).clocks == 1212
    assert static_model.predict(pipes, loads=1300.0).clocks == 1300
    assert static_model.loads(2, 64, 128) == pytest.approx(2 * 64 * 2 * 64 * 132 / 5120)
    assert static_model.floor(64) == 3 * 256 + 2 * 512
    tflops = 132 * 1.83e9 * 4 * 64 * 8192 / 1000 / 1e12  # a forward of a thousand clocks a tile
    assert static_model.clocks(tflops, 64) == pytest.approx(1000)


LISTING = """
.L_x_1:
        /*0010*/                   FFMA R1, R2, R3, R4 ;
.L_x_2:
        /*0020*/                   HGMMA.64x128x16.F32 R24, gdesc[UR12], RZ, !UPT ;
        /*0030*/              @!P3 BRA `(.L_x_3) ;
        /*0040*/                   MUFU.EX2 R100, R100 ;
        /*0050*/                   FADD R100, R101, R102 ;
.L_x_3:
        /*0060*/                   LDS.128 R104, [R172] ;
        /*0070*/              @P1 LDG.E R104, desc[UR38][R104.64] ;
        /*0080*/                   BRA.DIV UR4, `(.L_x_4) ;
        /*0090*/               @P0 BRA `(.L_x_2) ;
        /*00a0*/               @P2 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   SHFL.BFLY PT, R9, R156, 0x10, 0x1f ;
        /*00d0*/                   BRA `(.L_x_3) ;
"""


@pytest.mark.parametrize(("rare", "exponentials", "issued"), [(False, 1, 8), (True, 0, 6)])
def test_main_loop(rare, exponentials, issued):
    """The innermost loop that multiplies, by its usual way; a warp's slow way round is no part of it."""
    (loop,) = sass.main_loops(LISTING, rare)
    asked = sass.usage(loop)
    assert asked["tensor"] == 64 * 128 * 16 // 4
    assert asked["shared"] == 16
    assert asked["global"] == 4
    assert asked["exp"] == exponentials
    assert asked["issue"] == issued
    assert not asked["shuffle"]
