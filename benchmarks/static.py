"""What the GPU kernels cost, read from their code: no GPU needed.

``python -m benchmarks.static [--arch sm_80,sm_90] [--head-dims 64,128] [--json FILE]`` compiles every kernel that a
launcher would start ahead of time, and beside them, in the same run: pass 1 without attribution, flash attention in the
form of Triton's tutorial, and the column reduction of the ``flash-colreduce`` package, which gives one direction a run
(G2R; with q and k swapped R2G), in six matrix products and five exponentials where i2am has three and two.

Of each kernel's main loop it counts what one score element asks of every pipe, and how many clocks a pipe needs for
8,192 scores (a tile of 128 × 64) on one processor. The largest of these bounds a kernel; a pass that waits for its
pipes in turn is slower, none is faster. ``issue`` is the bound that instruction slots set.

``benchmarks/static.json`` holds what was last shipped: ``--update`` writes these costs, peers included, and ``--table``
registers, spills and instructions of everything (:mod:`benchmarks.static_table`). :mod:`benchmarks.static_page` writes
the parts of the pages that say it. ``tests/kernels/test_static.py`` refuses worse.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import triton

from benchmarks import aot, sass, static_table
from benchmarks.peers.flash import flash_kernel, flash_tma_kernel
from i2am.kernels import attribution, few_attribution, few_forward, forward
from i2am.kernels.tiles import FEW_KEYS, KIB, Call, Configuration, Tiles, configuration

SCORES = 8192  # the tile that clocks are given for
RECORD = Path(__file__).with_suffix(".json")
RECORDED = {"sm_90": (64, 128), "sm_80": (64, 128)}
OURS = {"attention": "i2am pass 1", "attribution": "i2am pass 2"}
FEW = {"few-forward": "i2am few keys, first launch", "few-attribution": "i2am few keys, second launch"}
FEW_LOOPS = {"few-forward": 2, "few-attribution": 1}  # the rest of them take exact columns or further references: rare
TMA_TILES = (Tiles(128, 64, 4, 2), Tiles(128, 128, 8, 2))


class Processor(NamedTuple):
    """One multiprocessor: work per clock of each pipe, and what its programs share.

    Multiply-adds of 16-bit products; results of 32-bit arithmetic; bytes of shared memory and of the second-level
    cache's share. From NVIDIA's architecture papers and CUDA's table of arithmetic throughputs.
    """

    name: str
    rates: dict[str, int]
    shared: int
    registers: int = 65536
    warps: int = 64


def _rates(tensor, exp, fma, alu, shuffle, shared, memory, issue):
    return dict(zip(sass.PIPES, (tensor, exp, fma, alu, shuffle, shared, memory, 1, issue), strict=True))


PROCESSORS = {
    "sm_80": Processor("A100", _rates(1024, 16, 64, 64, 32, 128, 64, 4), 164 * KIB),
    "sm_90": Processor("H100", _rates(2048, 16, 128, 64, 32, 128, 64, 4), 228 * KIB),
}


class Cost(NamedTuple):
    """One kernel on one architecture."""

    name: str
    registers: int
    spills: int
    shared: int
    occupancy: int = 0  # warps that run side by side on one processor
    per_score: Mapping[str, float] = MappingProxyType({})  # multiply-adds, results or bytes, over all main loops
    clocks: Mapping[str, float] = MappingProxyType({})  # of each pipe for SCORES scores, over all main loops
    bound: float = 0.0  # Σ over the main loops of the largest pipe's clocks, issue slots apart
    issue_bound: float = 0.0  # the same, with issue slots among the pipes


def baselines(d: int, arch: str) -> Iterator[Configuration]:
    """Yield the peers."""
    device = aot.TARGETS[arch]
    call = Call(device, "fp16", d)
    (ours,) = forward.configurations(call)
    without = {"column_sum", "pivots", "g2r_partial"}
    types = {name: kind for name, kind in ours.signature.items() if kind != "constexpr" and name not in without}
    values = {name: value for name, value in ours.constants.items() if value is not None}
    yield configuration("pass 1 without attribution", ours.kernel, types, values, ours.tiles)
    if d & (d - 1) == 0:
        names = ("q", "k", "v", "out")
        types = dict.fromkeys(names, "*fp16") | {"lse": "*fp32", "scale": "fp32"}
        types |= dict.fromkeys(("N", "stride_h", "stride_n"), "i32")
        for tiles in (Tiles(128, 64, 4, 2), Tiles(128, 64, 8, 2)):
            values = {"D": d, "BM": tiles.m, "BN": tiles.n}
            name = f"tutorial flash, {tiles.num_warps} warps"
            yield _aligned(configuration(name, flash_kernel, types, values, tiles))
        for tiles in TMA_TILES if device.tma else ():
            blocks = {"q": tiles.m, "k": tiles.n, "v": tiles.n, "out": tiles.m}
            types = {name: f"tensordesc<fp16[{rows}, {d}]>" for name, rows in blocks.items()}
            types |= {"lse": "*fp32", "scale": "fp32", "N": "i32"}
            values = {"D": d, "BM": tiles.m, "BN": tiles.n}
            name = f"tutorial by TMA, {tiles.m}x{tiles.n}, {tiles.num_warps} warps"
            yield configuration(name, flash_tma_kernel, types, values, tiles)
    try:
        from flash_colreduce.flash import _flash_colreduce_kernel as tuned
    except ImportError:
        return  # the table says that it is missing
    tiles = Tiles(*(tuned.configs[0].kwargs[k] for k in ("BLOCK_M", "BLOCK_N")), 4, tuned.configs[0].num_stages)
    padded = 2 ** math.ceil(math.log2(d))
    values = {"D": padded, "REDUCTION": "sum", "CAUSAL": False, "BLOCK_M": tiles.m, "BLOCK_N": tiles.n}
    values |= {"stride_qd": 1, "stride_kd": 1}
    pointers = {"q_ptr": "*fp16", "k_ptr": "*fp16", "o_ptr": "*fp32"}
    rest = {n: "fp32" if n == "scale" else "i32" for n in tuned.fn.arg_names if n not in values and n not in pointers}
    yield _aligned(configuration("flash-colreduce", tuned.fn, pointers | rest, values, tiles))


def _aligned(c: Configuration) -> Configuration:
    """Return a peer's configuration as its launcher has it where 16 divides all strides, at these head dims."""
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(c.signature) if name.startswith("stride")}
    constant = {(i,) for i, kind in enumerate(c.signature.values()) if kind == "constexpr"}
    return c._replace(attributes=c.attributes | {at: x for at, x in aligned.items() if at not in constant})


def measure(name: str, c: Configuration, arch: str, rare: bool = False, loops: int | None = None) -> Cost:
    """Compile one kernel and read its cost; of architectures without known rates, registers and memory only.

    ``loops``: of the main loops the first so many.
    """
    compiled, tiles = aot.compile_for(c, arch), c.tiles
    found = aot.inspect(compiled, arch)
    resources = found["registers"], found["spills"], found["shared"]
    processor = PROCESSORS.get(arch)
    if processor is None:
        return Cost(name, *resources)
    per_score, clocks, bound, issue_bound = Counter(), Counter(), 0.0, 0.0
    for loop in itertools.islice(sass.main_loops(aot.assembly(compiled, arch), rare), loops):
        per_warp = sass.usage(loop)
        here = {}
        for pipe in sass.PIPES:
            lanes = 1 if pipe in ("tensor", "issue") else 32
            asked = per_warp[pipe] * lanes * tiles.num_warps / (tiles.m * tiles.n)
            per_score[pipe] += asked
            here[pipe] = asked * SCORES / processor.rates[pipe]
        clocks.update(here)
        bound += max(v for pipe, v in here.items() if pipe != "issue")
        issue_bound += max(here.values())
    side_by_side = occupancy(found, tiles.num_warps, processor)
    return Cost(name, *resources, side_by_side, dict(per_score), dict(clocks), bound, issue_bound)


def occupancy(found: dict, num_warps: int, processor: Processor) -> int:
    """Warps side by side on one processor, as registers and shared memory allow."""
    registers = math.ceil(found["registers"] * 32 / 256) * 256 * num_warps
    programs = min(
        processor.registers // registers,
        processor.warps // num_warps,
        processor.shared // (found["shared"] + KIB),
    )
    return programs * num_warps


def costs(arch: str, head_dims: Iterable[int], peers: bool = True) -> Iterator[tuple[int, Cost]]:
    """Yield ``(d, cost)`` of i2am's kernels and of the peers."""
    for d in head_dims:
        for c in aot.configurations(aot.TARGETS[arch], ["fp16"], [d], ["plain"]):
            kernel = c.name.split()[0]
            if kernel in OURS:
                yield d, measure(OURS[kernel], c, arch, rare=kernel == "attribution")
        for c in aot.configurations(aot.TARGETS[arch], ["fp16"], [d], ["image tokens"]):
            kernel = c.name.split()[0]
            if kernel in FEW and (peers or arch == "sm_90"):  # 257 keys, one reference; the record is of Hopper alone
                yield d, measure(FEW[kernel], c, arch, loops=FEW_LOOPS[kernel])
        for c in baselines(d, arch) if peers else ():
            yield d, measure(c.name, c, arch)


def summary(found: dict[str, Cost]) -> dict[str, dict[str, float]]:
    """Return what the two passes cost, of one head dim, as ratios: baseline → measure → ratio.

    ``largest pipe`` is the ratio of the largest pipes' clocks, ``with issue`` the same with issue slots among them.
    """
    ours = [found[name] for name in OURS.values()]
    forward = min((c for name, c in found.items() if name.startswith("tutorial")), key=lambda c: c.issue_bound)
    against = {forward.name: [forward], "pass 1 without attribution": [found["pass 1 without attribution"]]}
    if "flash-colreduce" in found:
        against[f"{forward.name} and flash-colreduce twice"] = [forward, *[found["flash-colreduce"]] * 2]
    measures = {
        "tensor": lambda c: c.per_score["tensor"],
        "exponentials": lambda c: c.per_score["exp"],
        "largest pipe": lambda c: c.bound,
        "with issue": lambda c: c.issue_bound,
    }
    return {
        baseline: {name: sum(map(of, ours)) / sum(map(of, theirs)) for name, of in measures.items()}
        for baseline, theirs in against.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_80,sm_90", help=f"of {', '.join(aot.TARGETS)}; separated by commas")
    parser.add_argument("--head-dims", help="default 64,128; of a table all")
    parser.add_argument("--dtypes", default="fp16,bf16,fp32", help="of a table")
    parser.add_argument("--variants", help=f"of a table, default all; of {', '.join(aot.VARIANTS)}")
    parser.add_argument("--update", action="store_true", help=f"write these costs to {RECORD.name}; tests hold to them")
    parser.add_argument("--table", action="store_true", help=f"write what everything spills to {RECORD.name} instead")
    options = parser.parse_args()
    if unknown := [arch for arch in options.arch.split(",") if arch not in aot.TARGETS]:
        parser.error(f"unknown architecture {unknown[0]!r}; known are {', '.join(aot.TARGETS)}")
    if options.table:
        head_dims = static_table.HEAD_DIMS if options.head_dims is None else [*map(int, options.head_dims.split(","))]
        variants = None if options.variants is None else options.variants.split(",")
        static_table.update(RECORD, options.arch.split(","), options.dtypes.split(","), head_dims, variants)
    elif options.update:
        kept = json.loads(RECORD.read_text(encoding="utf-8"))
        kept["costs"] = {"triton": triton.__version__, "rows": recorded(peers=True), "few": few_keys()}
        static_table.write(RECORD, kept)
    else:
        for arch in options.arch.split(","):
            for d in map(int, (options.head_dims or "64,128").split(",")):
                print("\n" + "\n".join(show(arch, d, {cost.name: cost for _, cost in costs(arch, [d])})))


def recorded(peers: bool = False) -> dict[str, dict[str, dict]]:
    """Return what the record keeps: ``"arch d=…"`` → kernel → the fields of its :class:`Cost`, rounded."""
    kept: dict[str, dict[str, dict]] = {}
    for arch, head_dims in RECORDED.items():
        for d, c in costs(arch, head_dims, peers=peers):
            per_score = {pipe: round(value, 4) for pipe, value in c.per_score.items()}
            pipes = {pipe: round(value, 1) for pipe, value in c.clocks.items()}
            bounds = {"bound": round(c.bound, 1), "issue_bound": round(c.issue_bound, 1)}
            fields = c._asdict() | {"per_score": per_score, "clocks": pipes} | bounds
            kept.setdefault(f"{arch} d={d}", {})[c.name] = {k: v for k, v in fields.items() if k != "name"}
    return kept


def few_keys(arch: str = "sm_90", d: int = 40) -> dict[str, dict[str, dict]]:
    """Return issue clocks where keys are few: keys → "two launches", "four launches" → tiles, padded keys, clocks."""
    found: dict[str, dict[str, dict]] = {}
    for keys in (257, 77, 49, 16):
        for way, few in (("two launches", FEW_KEYS), ("four launches", 0)):
            call = Call(aot.TARGETS[arch], "fp16", d, keys, few_keys=few)
            clocks = {}
            for module in (few_forward, few_attribution) if few else (forward, attribution):
                c = next(iter(module.configurations(call)))
                cost = measure(c.name, c, arch, rare=c.name == "attribution", loops=FEW_LOOPS.get(c.name, 1))
                clocks[c.name] = round(cost.clocks["issue"])
            found.setdefault(str(keys), {})[way] = {
                "m": c.tiles.m, "n": c.tiles.n, "padded": -(-keys // c.tiles.n) * c.tiles.n, "clocks": clocks,
            }  # fmt: skip
    return found


def read(rows: Mapping[str, dict]) -> dict[str, Cost]:
    """Return the costs of one architecture and head dim as the record has them."""
    return {name: Cost(name=name, **fields) for name, fields in rows.items()}


def show(arch: str, d: int, found: dict[str, Cost]) -> list[str]:
    """Return the lines of a table of costs, and below it their ratios."""
    pipes = [p for p in sass.PIPES if any(c.clocks.get(p) for c in found.values())]
    about = f" ({PROCESSORS[arch].name}): clocks of each pipe for 128 × 64 scores" if pipes else ""
    lines = [f"fp16, d = {d}, {arch}{about}"]
    lines.append(f"{'':34s}{'regs':>5s}{'spill':>6s}{'shared':>8s}{'warps':>6s}" + "".join(f"{p:>9s}" for p in pipes))
    lines += [
        f"{c.name:34s}{c.registers:5d}{c.spills:6d}{c.shared:8d}{c.occupancy or '–':>6}"
        + "".join(f"{c.clocks[p]:9.0f}" for p in pipes)
        for c in found.values()
    ]
    if "flash-colreduce" not in found:
        lines.append("flash-colreduce is not installed: pip install flash-colreduce==0.2.2")
    for baseline, ratios in summary(found).items() if pipes else ():
        lines.append(f"i2am / {baseline}: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    return lines


if __name__ == "__main__":
    main()
