"""The kernels' cost in instructions: no shipped kernel may get worse, and the ratios that the docs state must hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from benchmarks import sass

ROOT = Path(__file__).resolve().parents[2]
RECORD = json.loads((ROOT / "benchmarks" / "static.json").read_text())


@pytest.fixture(scope="module")
def now():
    """The costs of today's sources. A process that interprets Triton cannot compile it, hence one of its own."""
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8):
        pytest.skip(f"the record is of Triton 3.8 and later, and this is {triton.__version__}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = "import json; from benchmarks import static; print(json.dumps(static.recorded()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", RECORD)
def test_no_kernel_gets_worse(now, kernel):
    """If this is an improvement or meant: ``python -m benchmarks.static --update``."""
    for measure, then in RECORD[kernel].items():
        slack = 1.02 if "bound" in measure else 1.001
        assert now[kernel][measure] <= then * slack, f"{measure} was {then} and is {now[kernel][measure]}"


def test_the_record_is_of_every_kernel(now):
    assert set(now) == set(RECORD)
    assert all(kernel["spills"] == kernel["atomic"] == 0 for kernel in RECORD.values())
    for d in (64, 128):
        assert sum(RECORD[f"sm_90 d={d} i2am pass {n}"]["tensor"] for n in (1, 2)) == 3 * d  # 3 matrix products
        assert sum(RECORD[f"sm_90 d={d} i2am pass {n}"]["exp"] for n in (1, 2)) < 2.1


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
