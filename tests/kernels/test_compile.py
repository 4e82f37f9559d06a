"""What is shipped, compiled ahead of time for GPUs that need not be there: does it fit, spill, and cost what it should?

A process that interprets Triton cannot compile it, so each target is compiled in a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_90", "gfx942")
RECORDED = json.loads((ROOT / "benchmarks" / "static.json").read_text())["tables"]
EVERY_TARGET = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")


def version(name):
    return tuple(int(part) for part in name.split(".")[:2])


def start(*arguments, triton=None):
    """Compile in a process of its own; ``triton``: a folder with another version of it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if triton is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(triton), os.getcwd()])
    command = [sys.executable, "-m", "benchmarks.aot", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr[-2000:]
    return [json.loads(line) for line in stdout.splitlines()]


@pytest.fixture(scope="module")
def reports():
    """Target → what became of each configuration; on sm_90, whose code is read, of more head dims."""
    code, others = TARGETS[1], (TARGETS[0], TARGETS[2])
    small = ("--dtypes", "fp16", "--variants", "plain", "few keys", "--head-dims")
    running = [
        start(code, *small, 40, 64, 72, 80, 128),
        start(*others, *small, 40, 72, 128),
        start(*TARGETS, "--dtypes", "bf16", "fp32", "--head-dims", 64, "--variants", "plain"),
    ]
    found = [line for process in running for line in finish(process)]
    return {target: [line for line in found if line["target"] == target] for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_and_fits(reports, target):
    assert {f["name"].split()[0] for f in reports[target]} >= {
        "attention", "attribution", "columns", "accumulate", "few-forward", "few-attribution",
    }  # fmt: skip
    assert len(reports[target]) >= (30 if target == "sm_90" else 20)
    for found in reports[target]:
        if target.startswith("gfx") and version(found["triton"]) < (3, 4) and "lld" in found.get("error", ""):
            pytest.skip(f"Triton {found['triton']} links for AMD with ROCm's ld.lld, which is not here")
        assert "error" not in found, found
        assert found["shared"] <= found["allowed"], found
        if version(found["triton"]) >= (3, 8):  # what is claimed is claimed of this compiler and later ones
            assert found["spills"] == 0, found


def stale(found):
    """Kernels whose registers, spills or instructions are not those that the record has of their Triton."""
    differing = []
    for f in found:
        target, triton = f["target"], f["triton"]
        kernel, dtype, d, variant = re.fullmatch(r"(.+) (fp16|bf16|fp32) d=(\d+) (.+)", f["name"]).groups()
        row = RECORDED.get(triton, {}).get(target, {}).get(f"{kernel}, {dtype}, {variant}", {}).get(d)
        read = [f["registers"], f["spills"], sum(f["sass"].values())]
        if row is not None and row[:3] != read:
            differing.append(f"{triton} {target} {f['name']}: {row[:3]} recorded, {read} read")
    return differing


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_record_is_of_this_code(reports, target):
    """After a change of a kernel: ``python -m benchmarks.static --table``, and ``python -m benchmarks.static_page``."""
    assert not stale(reports[target])


def tiles(reports, kernel):
    """Constants and instruction counts on sm_90 of one kernel's 16-bit configurations."""
    wanted = rf"{kernel} (fp16|bf16) .* plain"
    chosen = [f for f in reports["sm_90"] if re.fullmatch(wanted, f["name"])]
    assert len(chosen) == 6
    for found in chosen:
        constants = found["constants"]
        scores = constants["BM"] * constants["BN"] / (32 * found["num_warps"])  # a thread's, of one tile
        yield constants, scores, found["num_warps"], found["sass"]


@pytest.mark.parametrize(("kernel", "products"), [("attention", 3), ("attribution", 1)])
def test_matrix_products(reports, kernel, products):
    """Three in all, O included: two in pass 1's loop (and one before it, for the pivot), one in pass 2."""
    for constants, _, warps, sass in tiles(reports, kernel):
        macs = 0
        for opcode, count in sass.items():
            if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
                m, n, k = map(int, shape.groups())
                macs += count * m * n * k * warps // 4
        padded = constants["D_MAIN"] + constants["D_TAIL"]
        assert macs == products * constants["BM"] * constants["BN"] * padded, constants


def test_vector_loads_at_every_head_dim(reports):
    """40 and 72 are no multiples of 16, but their rows are whole numbers of 16 bytes: no element is loaded alone."""
    assert {f["constants"]["D"] for f in reports["sm_90"] if f["constants"].get("D")} >= {40, 72}
    wide = ("LDGSTS.E.BYPASS.LTC128B.128", "LDGSTS.E.BYPASS.128", "UTMALDG", "LDG.E.128")
    for target in ("sm_80", "sm_90"):
        for found in reports[target]:
            name = found["name"]
            if name.split()[0] in ("attention", "attribution") and " fp32 " not in name:
                assert not [o for o in found["sass"] if o.startswith("LDG.E.U16")], name
                assert "few" in name or any(o.startswith(wide) for o in found["sass"]), name


def test_pass_1_takes_one_exponential_a_score(reports):
    """And a few per row: rescaling, and the rows' factors of the column sums, which take none of their own."""
    for constants, scores, _, sass in tiles(reports, "attention"):
        assert scores <= sass["MUFU.EX2"] <= 1.15 * scores, constants


def test_pass_2_takes_one_exponential_a_score(reports):
    """The code holds two, the second on the way that only tiles of extreme range take."""
    for constants, scores, _, sass in tiles(reports, "attribution"):
        assert 2 * scores <= sass["MUFU.EX2"] <= 2.1 * scores, constants


def test_no_atomics(reports):
    for found in reports["sm_90"]:
        assert not [opcode for opcode in found["sass"] if re.match(r"ATOM|RED(G|\.|$)", opcode)], found["name"]


@pytest.mark.slow
@pytest.mark.parametrize("target", EVERY_TARGET)
def test_every_target(target):
    """Every dtype and head dim, and every variant; none may ask for more shared memory than there is."""
    plain = start(target, "--variants", "plain")
    variants = start(target, "--dtypes", "fp16", "--head-dims", 64, 160)
    found = finish(plain) + finish(variants)
    broken = [f for f in found if "error" in f or f["shared"] > f["allowed"]]
    assert not broken, broken[:3]


@pytest.mark.slow
def test_the_lowest_promised_triton(tmp_path):
    """Installed in a folder of its own. It may spill; it must compile and fit, and load by 16 bytes."""
    (lowest,) = re.findall(r'"triton>=([0-9.]+);', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "triton"]
    done = subprocess.run([*map(str, pip), f"triton=={lowest}.0"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"triton {lowest} cannot be installed here: {done.stderr.strip()[-200:]}")
    arguments = ("sm_80", "sm_90", "--dtypes", "fp16", "fp32", "--head-dims", 40, 64, 128)
    process = start(*arguments, "--variants", "plain", "few keys", "no output", "regions", triton=tmp_path / "triton")
    found = finish(process)
    assert {version(f["triton"]) for f in found} == {version(lowest)}
    broken = [f for f in found if "error" in f or f["shared"] > f["allowed"]]
    assert not broken, broken[:3]
    assert not stale(found)
    assert not [
        f["name"] for f in found if any(o.startswith("LDG.E.U16") for o in f["sass"]) and "mask" not in f["name"]
    ]
