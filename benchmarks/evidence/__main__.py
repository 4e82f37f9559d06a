"""``python -m benchmarks.evidence``: measures, and writes docs/evidence.md with its figures.

Finished parts are kept (``--state``), so a run that was stopped goes on where it was; ``--fresh`` measures anew.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import diffusers
import torch
from tqdm import tqdm

from benchmarks.evidence import enlarge, figures, localise, report, transfer
from benchmarks.evidence.subject import Setting
from i2am import zoo

PARTS = {name: partial(localise.model, name) for name in zoo.NAMES} | {
    "enlargement": enlarge.enlargement,
    "faithfulness": transfer.faithfulness,
    "levels": transfer.levels,
    "stereo": localise.stereo,
    "imacs": transfer.imacs_and_quality,
    "ablation": transfer.ablation,
}
QUICK = dict(samples=8, steps=2, short=1, batch=8, draws=1)
ROOT = Path(__file__).parents[2]


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 tasks, in 3 minutes: that it runs, not what is true")
    parser.add_argument("--samples", type=int, default=208, help="held-out tasks (default 208)")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="default: all")
    runs = "folder of training runs (`python -m i2am.zoo.train`): IMACS along training, and the ablation, need it"
    parser.add_argument("--checkpoints", type=Path, help=runs)
    parser.add_argument("--weights", type=Path, help="folder of NAME.safetensors instead of the shipped models")
    parser.add_argument("--state", type=Path, help="where finished parts are kept (default results/evidence)")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page is written (default docs/)")
    parser.add_argument("--fresh", action="store_true", help="measure finished parts anew")
    args = parser.parse_args(argv)
    given = dict(checkpoints=args.checkpoints, weights=args.weights)
    setting = Setting(**QUICK, **given) if args.quick else Setting(samples=args.samples, **given)
    state = args.state or ROOT / "results" / ("evidence-quick" if args.quick else "evidence")
    return measure(setting, args.parts, state, args.docs, fresh=args.fresh)


def measure(setting: Setting, parts: list[str], state: Path, docs: Path, fresh: bool = False) -> Path:
    """Measures the parts that ``state`` does not hold yet, and writes the page."""
    state.mkdir(parents=True, exist_ok=True)
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    with tqdm(parts, unit="part") as bar:
        for part in bar:
            bar.set_description(part)
            file = state / f"{part}.json"
            if fresh or not file.is_file():
                start = time.perf_counter()
                found = PARTS[part](setting)
                seconds = time.perf_counter() - start
                count = found.pop("n", setting.batches * setting.batch)
                part_of = {"found": found, "seconds": seconds, "samples": count}
                file.write_text(json.dumps(part_of, indent=1), encoding="utf-8")
    stored = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in state.glob("*.json")}
    results = gathered({part: x["found"] for part, x in stored.items()})
    draw(setting, results, images)
    facts = asdict(setting) | {
        "minutes": sum(x["seconds"] for x in stored.values()) / 60,
        "torch": torch.__version__.split("+")[0],
        "diffusers": diffusers.__version__,
        "measured": {part: x["samples"] for part, x in stored.items()},
    }
    return report.write(results, facts, docs)


def gathered(results: dict[str, dict]) -> dict[str, dict]:
    """What was measured model by model, section by section."""
    sections = {part: found for part, found in results.items() if part not in zoo.NAMES}
    for name in zoo.NAMES:
        for section, table in results.get(name, {}).items():
            sections.setdefault(section, {})[name] = table
    return sections


def draw(setting: Setting, results: dict, images: Path) -> None:
    """Every figure whose part was measured."""
    figures.samples(setting, images, results.get("used", ()))
    for part, figure in {"localisation": figures.localisation, "correspondence": figures.correspondence}.items():
        if part in results:
            figure(setting, images)
    of_numbers = {"imacs": figures.imacs, "levels": figures.levels, "faithfulness": figures.faithfulness}
    for part, figure in of_numbers.items():
        if results.get(part):
            figure(results[part], images)


if __name__ == "__main__":
    print(f"written: {main()}")
