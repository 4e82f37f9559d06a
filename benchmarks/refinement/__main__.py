"""``python -m benchmarks.refinement``: trains, measures, and writes docs/refinement.md with its figure.

Finished parts and half-finished runs are kept (``--state``), so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch

from benchmarks.refinement import cost, figure, guidance, page
from benchmarks.refinement.statistics import Room
from benchmarks.refinement.training import FEW, OutOfTime, Plan, Run, stem, write

ROOT = Path(__file__).parents[2]
COMPARED = ("plain", "flow", "inside")
CONDITIONS = {
    "scratch": COMPARED,
    "coarse": ("plain", "flow"),
    "tryon": COMPARED,
    "weight": ("flow, a tenth",),
    "lasting": ("flow, 400 steps",),
    "gate": ("photometric", "photometric, gated"),
    "layers": ("flow, encoder", "flow, decoder"),
    "tuning": ("plain", "flow", "inside", "photometric, gated"),
}
PARTS = (*CONDITIONS, "guidance", "cost")
TUNING = 150  # steps
QUICK = dict(samples=16, steps=1, batch=2)


def plan(part: str, quick: bool = False) -> Plan:
    """Return what a part trains; those from scratch share their folder, so plain runs serve them all."""
    small = QUICK if quick else {}
    if part == "tuning":
        return Plan("tuning", size=64, rate=1e-4, shipped=True, **small)
    if part == "coarse":
        return Plan("coarse", size=64, fine=False, **small)
    return Plan("tryon", task="tryon", **small) if part == "tryon" else Plan("scratch", **small)


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refinement", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--steps", type=int, nargs="*", default=[400, 1600], help="from scratch; default 400 1600")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which to stop; default: never")
    parser.add_argument("--state", type=Path, help="where runs are kept (default results/refinement)")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page is written (default docs/)")
    parser.add_argument("--quick", action="store_true", help="tiny, in a minute: that it runs, not what is true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # models this small lose more to threads that wait for each other
    state = args.state or ROOT / "results" / ("refinement-quick" if args.quick else "refinement")
    until = time.time() + 60 * args.minutes
    tuning = 1 if args.quick else TUNING
    try:
        for part in args.parts:
            if part in CONDITIONS:
                counts = [tuning] if part == "tuning" else sorted(args.steps)
                train(plan(part, args.quick), CONDITIONS[part], args.seeds, counts, state, until)
            elif part == "guidance":
                guide(plan("tuning", args.quick), state, until)
            else:
                price([8] if args.quick else cost.SIDES, state, until)
    except OutOfTime:
        print(f"{args.minutes:g} minutes are over; the same command goes on")
    return write_page(state, args.docs, sorted(args.steps), args.quick)


def train(
    plan: Plan, conditions: Sequence[str], seeds: Sequence[int], counts: list[int], state: Path, until: float
) -> None:
    """Train runs, first all of them for a few steps, then on to the next number."""
    for count in counts:
        for seed in seeds:
            for condition in conditions:
                print(f"{time.strftime('%H:%M:%S')} {plan.room}: {condition}, seed {seed}, {count} steps", flush=True)
                Run(plan, condition, seed, state).train(count, until)


def guide(plan: Plan, state: Path, until: float) -> None:
    """Sample with every setting of guidance that ``state`` does not hold."""
    for setting in guidance.SETTINGS:
        file = state / "guidance" / f"{stem(setting)}.json"
        if not file.is_file():
            print(f"{time.strftime('%H:%M:%S')} guidance: {setting}", flush=True)
            write(file, json.dumps({"setting": setting} | guidance.guided(plan, setting, until)))


def price(sides: Sequence[int], state: Path, until: float) -> None:
    """Measure the losses' cost at every size that ``state`` does not hold."""
    for side in sides:
        file = state / "cost" / f"{side}.json"
        if time.time() > until:
            raise OutOfTime
        if not file.is_file():
            print(f"{time.strftime('%H:%M:%S')} cost: {side} × {side} tokens", flush=True)
            write(file, json.dumps(cost.measure(side)))


def write_page(state: Path, docs: Path, targets: list[int], quick: bool) -> Path:
    """Write docs/refinement.md of everything that ``state`` holds."""
    rooms = {
        part: Room(state / plan(part).room, {c: stem(c) for c in dict.fromkeys((*COMPARED, *conditions))})
        for part, conditions in CONDITIONS.items()
    }
    facts = {
        "compared": COMPARED,
        "conditions": CONDITIONS,
        "targets": targets,
        "tuning": 1 if quick else TUNING,
        "samples": plan("scratch", quick).samples,
        "steps": plan("scratch", quick).steps,
        "few": FEW,
        "rounds": cost.ROUNDS,
        "torch": torch.__version__.split("+")[0],
        "diffusers": diffusers.__version__,
    }
    if rooms["scratch"].runs:
        figure.draw(rooms["scratch"], COMPARED, docs / "images" / "refinement-scratch.png")
    return page.write(rooms, page.read_extra(state), facts, docs)


if __name__ == "__main__":
    print(f"written: {main()}")
