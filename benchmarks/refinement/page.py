"""From stored runs to ``docs/refinement.md`` and its figure: tables, and sentences that the numbers decide."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.evidence.report import paragraphs
from benchmarks.evidence.subject import interval
from benchmarks.refinement.statistics import SCORES, Interval, Room, relative

HEADER = """
# Does it help? Attention in the loss, measured

A loss on attention ([how to](tasks/refinement.md)) is worth what the model becomes by it. The tasks of `i2am.zoo` have
a known answer: which pixel of the reference every pixel of the picture came from. `python -m benchmarks.refinement`
trains, measures and writes this page. Conditions start from the same weights and see the same tasks, noise and noise
levels; one loss differs. Errors are mean squared differences of colours in [-1, 1] on the inserted object, of pictures
painted in {steps} steps from the same noise, over {samples} held-out tasks on photographs that no model was trained on.
In brackets: 95 % of bootstrap draws of tasks, the seeds' mean for each task; differences are of the same tasks. So they
hold for these seeds, whose own results are listed. Results against us stand.

| condition | beside the model's own loss |
|---|---|
| plain | nothing |
| flow | 0.01 · `losses.flow`: the expected place against the known source, in tokens |
| inside | 0.1 · `losses.inside`: R2G inside the mask to be painted; the source is not known |
| photometric | 0.5 · `losses.photometric`: the reference warped by the expected places against the true picture |
| photometric, gated | the same where the noise level is at most 0.3 |

Weights were chosen once, before the runs, but for the tenth of the flow's, which was tried after seeing them; the
learning rate is constant, and averaged weights are measured.
"""

FOOTER = """
---

`python -m benchmarks.refinement` goes on with what is missing, and `--steps 400 1600 5000 --seeds 0 1 2 3 4` does more
of it. From scratch, unless said: 32-px tasks, batch 8, a UNet of two levels with about a million parameters; tuning
and guidance: the shipped 64-px models. One small kind of model, on a CPU, single-threaded: a trend, not a law. torch
{torch}, diffusers {diffusers}.
"""

SCRATCH = """
## From scratch

Does a young model learn better when it is told where to look, at equal steps and at equal time? Step time is CPU
time in that of a plain step; the equal-time column is the change of the error, over the {few} tasks that are measured
along the way, at the steps that a condition makes while plain makes the row's (interpolated). These tasks tell the
model in its input channels which place of the reference belongs where, so that a plain model finds it by itself.
"""

COARSE = """
## Where places are harder to find

The same on 64-px tasks, in a UNet of three levels that attends to 4-px patches (the zoo's of version 0.1): four times
as many pixels, and attention only where the picture is coarse.
"""

TRYON = """
## Another task: `tryon`

The same from scratch, for garments that are turned and bent.
"""

WEIGHT = """
## Is the weight to blame?

The flow loss at a tenth of its weight.
"""

LASTING = """
## Does the lead last?

Flow supervision for the first 400 steps only, and none after.
"""

GATE = """
## When nobody knows the source: the photometric loss

It needs no correspondences, but from noise a warped reference says little: with and without a gate on the noise level.
"""

LAYERS = """
## Which layers?

The flow loss in the encoder's layers alone, and in the decoder's.
"""

TUNING = """
## Tuning a trained model

The shipped `exemplar`, {steps} steps of 8 tasks at a learning rate of 1e-4 (plain is tuned as well). Against plain, and
against the shipped weights.
"""

GUIDANCE = """
## Guidance by the gradient

The `exemplar` of version 0.1 samples, and before each step its latents move against the gradient of a loss on its own
attention, by a share of their length. `inside` knows the mask; `flow` is told the truth, which no user has: a bound.
"""

COST = """
## What the losses cost

One attention of {heads} head, d {dim}: forward and backward with the loss, beside autograd through materialised
softmaxes. CPU time (median of {rounds}) and growth of the resident memory at its peak. `—`: not enough memory here.
"""


def write(rooms: dict[str, Room], extra: dict[str, dict], facts: dict, docs: Path) -> Path:
    """Write the page of everything that was measured; what was not is named with its command."""
    sections = [HEADER.format(**facts)]
    sections.append(_trained("scratch", SCRATCH.format(**facts), rooms["scratch"], facts, facts["compared"]))
    if rooms["scratch"].runs:
        sections[-1] += "\n\n![Along training](images/refinement-scratch.png)"
    more = dict(coarse=COARSE, weight=WEIGHT, tryon=TRYON, lasting=LASTING, gate=GATE, layers=LAYERS)
    for part, text in more.items():
        conditions = ("plain", *(() if part == "tryon" else ("flow",)), *facts["conditions"][part])
        sections.append(_trained(part, text, rooms[part], facts, tuple(dict.fromkeys(conditions))))
    sections.append(_tuned(TUNING.format(steps=facts["tuning"]), rooms["tuning"], facts))
    sections.append(_guided(GUIDANCE, extra.get("guidance", {})))
    sections.append(_cost(COST, extra.get("cost", {}), facts))
    sections.append(FOOTER.format(**facts))
    path = docs / "refinement.md"
    path.write_text("\n\n".join(s.strip() for s in sections) + "\n", encoding="utf-8")
    return path


def _missing(part: str, what: str = "Not measured in this run") -> str:
    return f"{what}: `python -m benchmarks.refinement --parts {part}`."


def _trained(part: str, text: str, room: Room, facts: dict, conditions: tuple[str, ...]) -> str:
    parts, own, missing = [text], facts["conditions"].get(part, conditions), []
    for steps in sorted(facts["targets"]):
        rows = {}
        for condition in conditions:
            seeds = _common(room, ("plain", condition), steps, facts["samples"])
            if seeds:
                rows[condition] = _row(room, condition, seeds, steps)
        if not set(rows) & (set(own) - {"plain"}):
            missing.append(steps)
            continue
        parts += [f"**After {steps:,} steps**", _markdown(rows), _verdicts(rows)]
    if missing:
        counts = ", ".join(f"{steps:,}" for steps in missing)
        command = f"{part} --steps {' '.join(map(str, missing))}"
        parts.append(_missing(command, f"Not measured in this run after {counts} steps"))
    return paragraphs(parts)


def _common(room: Room, conditions: tuple[str, ...], steps: int, samples: int) -> list[int]:
    """Return seeds that all of the conditions have, measured in full."""
    each = [set(room.seeds(c, steps, samples)) for c in conditions]
    return sorted(set.intersection(*each))


def _row(room: Room, condition: str, seeds: list[int], steps: int) -> dict[str, str]:
    row = {"seeds": ", ".join(map(str, seeds))}
    for key, title in SCORES.items():
        mean, *around = room.score(condition, seeds, steps, key)
        row[title] = show([mean, *around], 3) if key == "error" else f"{mean:.{1 if 'px' in title else 2}f}"
    if condition == "plain":
        return row | {"change of the error": "", "seed by seed": "", "step time": "1.00", "at equal time": ""}
    each = [room.change(condition, [seed], steps)[0] for seed in seeds]
    equal = room.equal_time(condition, seeds, steps)
    return row | {
        "change of the error": percent(room.change(condition, seeds, steps)),
        "seed by seed": ", ".join(f"{x:+.0f}" for x in each) + " %",
        "step time": f"{room.price(condition, seeds, steps):.2f}",
        "at equal time": "–" if equal is None else percent(equal[1]),
    }


def show(x: Interval, digits: int) -> str:
    mean, low, high = (f"{v:.{digits}f}" for v in x)
    return f"{mean} [{low}, {high}]"


def percent(x: Interval) -> str:
    return f"{x[0]:+.1f} % [{x[1]:+.1f}, {x[2]:+.1f}]"


def _markdown(rows: dict[str, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(row.get(c, "") or " " for c in columns) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def _verdicts(rows: dict[str, dict[str, str]]) -> str:
    """Say what each condition does to the error: a direction only where the interval leaves out 0 and seeds agree."""
    said = []
    for name, row in rows.items():
        signs = {x.strip()[0] for x in row.get("seed by seed", "").split(",")} if row.get("seed by seed") else set()
        for column, when in (("change of the error", "at equal steps"), ("at equal time", "at equal time")):
            text = row.get(column, "")
            if "[" not in text:
                continue
            low, high = (float(x) for x in text.split("[")[1].rstrip("]").split(", "))
            verdict = "lowers" if high < 0 else "raises" if low > 0 else "does not distinguishably change"
            if len(signs) > 1 and column == "change of the error":
                verdict = "has seeds that disagree about"
            said.append(f"`{name}` {verdict} the error {when}")
    return "; ".join(said) + "." if said else ""


def _tuned(text: str, room: Room, facts: dict) -> str:
    steps, rows = facts["tuning"], {}
    start = _common(room, ("plain",), 0, facts["samples"])
    if start:
        rows["shipped"] = _row(room, "plain", start[:1], 0) | {"seeds": "", "step time": ""}
    for condition in facts["conditions"]["tuning"]:
        seeds = _common(room, ("plain", condition), steps, facts["samples"])
        if seeds:
            row = _row(room, condition, seeds, steps)
            del row["at equal time"]
            if start:
                then, now = room.tasks("plain", start[:1], 0, "error"), room.tasks(condition, seeds, steps, "error")
                row["against shipped"] = percent(relative(now, then))
            rows[condition] = row
    rows.get("shipped", {}).pop("at equal time", None)
    if len(rows) < 3:
        return paragraphs([text, _missing("tuning")])
    return paragraphs([text, _markdown(rows), _verdicts(rows)])


def _guided(text: str, found: dict[str, dict]) -> str:
    if "none" not in found or len(found) < 2:
        return paragraphs([text, _missing("guidance")])
    base, rows = np.array(found["none"]["error"]), {}
    for name in sorted(found, key=lambda name: (name != "none", name)):
        error = np.array(found[name]["error"])
        rows[name] = {SCORES["error"]: show(interval(error), 4)}
        rows[name]["change of the error"] = "" if name == "none" else percent(relative(error, base))
    better = [name for name, row in rows.items() if _high(row["change of the error"]) < 0]
    verdict = (
        f"Better than no guidance: {', '.join(better)}."
        if better
        else "No setting is better than no guidance, so no `guide()` ships. Gradients do reach the latents."
    )
    return paragraphs([text, _markdown(rows), verdict, f"*n = {len(base)} tasks.*"])


def _high(text: str) -> float:
    return float(text.split(", ")[1].rstrip("]")) if text else np.inf


def _cost(text: str, found: dict[str, dict], facts: dict) -> str:
    if not found:
        return paragraphs([text.format(heads=1, dim=40, rounds=3), _missing("cost")])
    measured = sorted(found.values(), key=lambda x: x["tokens"])
    names = list(dict.fromkeys(name for one in measured for name in one["rows"]))
    rows = {}
    for name in names:
        cells = {}
        for one in measured:
            cell = one["rows"].get(name)
            cells[f"{one['tokens']:,} tokens"] = (
                "—" if cell is None else f"{cell['ms']:,.0f} ms, {cell['MiB']:,.0f} MiB"
            )
        rows[name] = cells
    shape = dict(heads=measured[0]["heads"], dim=measured[0]["dim"], rounds=facts["rounds"])
    return paragraphs([text.format(**shape), _markdown(rows)])


def read_extra(state: Path) -> dict[str, dict]:
    """Return stored guidance and cost measurements: part → name → what was found."""
    return {
        part: {x.get("setting", name): x for name, x in _stored(state / part).items()} for part in ("guidance", "cost")
    }


def _stored(folder: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
