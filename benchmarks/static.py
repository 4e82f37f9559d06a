"""What the GPU kernels cost, read from their code: no GPU needed.

``python -m benchmarks.static [--arch sm_80,sm_90] [--head-dims 64,128] [--json FILE]`` compiles every kernel that a
launcher would start ahead of time, and beside them, in the same run: pass 1 without attribution, flash attention in the
form of Triton's tutorial, and the column reduction of the ``flash-colreduce`` package, which gives one direction a run
(G2R; with q and k swapped R2G), in six matrix products and five exponentials where i2am has three and two.

Of each kernel's main loop it counts what one score element asks of every pipe, and how many clocks a pipe needs for
8,192 scores (a tile of 128 × 64) on one processor. The largest of these bounds a kernel; a pass that waits for its
pipes in turn is slower, none is faster. ``issue`` is the bound that instruction slots set.

``benchmarks/static.json`` holds what was last shipped (``--update`` writes it); ``tests/kernels/test_static.py``
refuses worse.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from benchmarks import aot, sass
from benchmarks.peers.flash import flash_kernel, flash_tma_kernel
from i2am.kernels import forward
from i2am.kernels.tiles import KIB, Call, Configuration, Tiles, attention_tiles, configuration

SCORES = 8192  # the tile that clocks are given for
RECORD = Path(__file__).with_suffix(".json")
RECORDED = {"sm_90": (64, 128), "sm_80": (64, 128)}
OURS = ("i2am pass 1", "i2am pass 2")


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


def baselines(d: int, arch: str) -> Iterator[tuple[str, aot.Configuration, Tiles]]:
    """The peers, as configurations: name, configuration, tiles."""
    device = aot.TARGETS[arch]
    tiles = attention_tiles(d, 2, device, None, 4096)
    plain = {"p_q": "fp16", "p_k": "fp16", "p_v": "fp16", "p_out": "fp16"}
    constants = attention_constants(d, 4096, tiles, None)
    without = dict.fromkeys(("p_mask", "p_sum", "p_pivot", "p_g2r"))
    yield "pass 1 without attribution", _configured(attention_kernel, plain | without, constants, tiles), tiles
    if d & (d - 1) == 0:
        for tiles in (Tiles(128, 64, 4, 2), Tiles(128, 64, 8, 2)):
            constants = {"D": d, "BM": tiles.m, "BN": tiles.n}
            yield f"tutorial flash, {tiles.num_warps} warps", _configured(flash_kernel, plain, constants, tiles), tiles
    try:
        from flash_colreduce.flash import _flash_colreduce_kernel as tuned
    except ImportError:
        return  # the table says that it is missing
    tiles = Tiles(*(tuned.configs[0].kwargs[k] for k in ("BLOCK_M", "BLOCK_N")), 4, tuned.configs[0].num_stages)
    padded = 2 ** math.ceil(math.log2(d))
    constants = {"D": padded, "REDUCTION": "sum", "CAUSAL": False, "BLOCK_M": tiles.m, "BLOCK_N": tiles.n}
    pointers = {"q_ptr": "fp16", "k_ptr": "fp16", "o_ptr": "fp32"}
    yield "flash-colreduce", _configured(tuned.fn, pointers, constants | {"stride_qd": 1, "stride_kd": 1}, tiles), tiles


def _configured(kernel, pointers, constants, tiles: Tiles) -> aot.Configuration:
    return aot.configuration(kernel.__name__, kernel, pointers, constants, *tiles[2:])


def measure(name: str, configuration: aot.Configuration, tiles: Tiles, arch: str, rare: bool = False) -> Cost:
    """Compiles one kernel and reads its cost; of architectures without known rates, registers and memory only."""
    compiled = configuration.compile(arch)
    found = aot.inspect(compiled, arch)
    resources = found["registers"], found["spills"], found["shared"]
    processor = PROCESSORS.get(arch)
    if processor is None:
        return Cost(name, *resources)
    per_score, clocks, bound, issue_bound = Counter(), Counter(), 0.0, 0.0
    for loop in sass.main_loops(aot.assembly(compiled, arch), rare):
        per_warp = sass.usage(loop)
        here = {}
        for pipe in sass.PIPES:
            lanes = 1 if pipe in ("tensor", "issue") else 32
            asked = per_warp[pipe] * lanes * configuration.num_warps / (tiles.m * tiles.n)
            per_score[pipe] += asked
            here[pipe] = asked * SCORES / processor.rates[pipe]
        clocks.update(here)
        bound += max(v for pipe, v in here.items() if pipe != "issue")
        issue_bound += max(here.values())
    side_by_side = occupancy(found, configuration.num_warps, processor)
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
    """``(d, cost)`` of i2am's kernels and of the peers."""
    for d in head_dims:
        for c in aot.configurations(aot.TARGETS[arch], ["fp16"], [d], ["plain"]):
            kernel = c.name.split()[0]
            if kernel in ("attention", "attribution"):
                tiles = Tiles(c.constants["BM"], c.constants["BN"], c.num_warps, c.num_stages)
                name = OURS[kernel == "attribution"]
                yield d, measure(name, c, tiles, arch, rare=kernel == "attribution")
        for name, c, tiles in baselines(d, arch) if peers else ():
            yield d, measure(name, c, tiles, arch)


def summary(found: dict[str, Cost]) -> dict[str, dict[str, float]]:
    """What the two passes cost, of one head dim, as ratios: baseline → measure → ratio.

    ``predicted`` is the ratio of the largest pipes' clocks, ``with issue`` the same with issue slots among the pipes.
    """
    ours = [found[name] for name in OURS]
    forward = min((c for name, c in found.items() if name.startswith("tutorial")), key=lambda c: c.issue_bound)
    against = {"tutorial flash": [forward], "pass 1 without attribution": [found["pass 1 without attribution"]]}
    if "flash-colreduce" in found:
        against["tutorial flash and flash-colreduce twice"] = [forward, *[found["flash-colreduce"]] * 2]
    measures = {
        "tensor": lambda c: c.per_score["tensor"],
        "exponentials": lambda c: c.per_score["exp"],
        "predicted": lambda c: c.bound,
        "with issue": lambda c: c.issue_bound,
    }
    return {
        baseline: {name: sum(map(of, ours)) / sum(map(of, theirs)) for name, of in measures.items()}
        for baseline, theirs in against.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_80,sm_90", help=f"of {', '.join(aot.TARGETS)}; separated by commas")
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--json", metavar="FILE", help="also write everything there")
    parser.add_argument("--update", action="store_true", help=f"write {RECORD.name}, the costs that tests hold to")
    options = parser.parse_args()
    everything = {}
    for arch in options.arch.split(","):
        if arch not in aot.TARGETS:
            parser.error(f"unknown architecture {arch!r}; known are {', '.join(aot.TARGETS)}")
        tables: dict[int, dict[str, Cost]] = {}
        for d, cost in costs(arch, [int(d) for d in options.head_dims.split(",")]):
            tables.setdefault(d, {})[cost.name] = cost
        for d, found in tables.items():
            show(arch, d, found)
            everything[f"{arch} d={d}"] = {
                name: c._asdict() | {"per_score": dict(c.per_score), "clocks": dict(c.clocks)}
                for name, c in found.items()
            }
            if arch in PROCESSORS:
                everything[f"{arch} d={d}"]["ratios"] = summary(found)
    if options.json:
        Path(options.json).write_text(json.dumps(everything, indent=1))
    if options.update:
        RECORD.write_text(json.dumps(recorded(), indent=1) + "\n")


def recorded() -> dict[str, dict[str, float]]:
    """What the record keeps of every shipped kernel: ``"arch d=… kernel"`` → measure → value."""
    kept = {}
    for arch, head_dims in RECORDED.items():
        for d, c in costs(arch, head_dims, peers=False):
            per_score = {pipe: round(c.per_score[pipe], 4) for pipe in ("tensor", "exp", "atomic")}
            bounds = {"bound": round(c.bound, 1), "issue_bound": round(c.issue_bound, 1)}
            kept[f"{arch} d={d} {c.name}"] = {"spills": c.spills, **per_score, **bounds}
    return kept


def show(arch: str, d: int, found: dict[str, Cost]) -> None:
    pipes = [p for p in sass.PIPES if any(c.clocks.get(p) for c in found.values())]
    about = f" ({PROCESSORS[arch].name}): clocks of each pipe for 128 × 64 scores" if pipes else ""
    print(f"\nfp16, d = {d}, {arch}{about}")
    print(f"{'':28s}{'regs':>5s}{'spill':>6s}{'shared':>8s}{'warps':>6s}" + "".join(f"{p:>9s}" for p in pipes))
    for c in found.values():
        print(
            f"{c.name:28s}{c.registers:5d}{c.spills:6d}{c.shared:8d}{c.occupancy or '–':>6}"
            + "".join(f"{c.clocks[p]:9.0f}" for p in pipes)
        )
    if "flash-colreduce" not in found:
        print("flash-colreduce is not installed: pip install flash-colreduce==0.2.2")
    for baseline, ratios in summary(found).items() if pipes else ():
        print(f"i2am / {baseline}: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    main()
