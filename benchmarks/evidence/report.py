"""From measurements to ``docs/evidence.md``: tables, and sentences that the numbers decide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.transfer import LOCAL

Interval = Sequence[float]  # mean, low, high

HEADER = """
# Evidence

What are the maps worth? Random weights can't tell, and of a large model nobody knows the true answer. So i2am ships
small image-to-image diffusion models (`i2am.zoo`), really trained, on tasks whose answer is known: which pixel of the
reference every pixel of the picture came from. `python -m benchmarks.evidence` writes this page. Numbers are means over
tasks on photographs that no model was trained on, with 95 % bootstrap intervals over tasks in brackets. Errors are mean
squared differences of colours in [-1, 1] on the inserted object. Results that speak against the paper or against us
stand as they are.
"""

FOOTER = """
---

Seeds: tasks from 20000 on, noise 20000, bootstrap 0. {steps} DDIM steps, {short} where hundreds of pictures are drawn
again. torch {torch}, diffusers {diffusers}, on a CPU, {minutes:.0f} minutes in all.
"""


def write(results: dict[str, dict], facts: dict, docs: Path) -> Path:
    """Writes evidence.md from the parts that were measured; names those that were not."""
    sections = [HEADER.format(**facts)]
    for number, (key, section) in enumerate(SECTIONS.items()):
        if results.get(key):
            counts = sorted({facts["measured"][part] for part in (key, *results[key]) if part in facts["measured"]})
            text = section(results[key]).strip() + f"\n\n*n = {' and '.join(map(str, counts))} tasks.*"
        else:
            text = MISSING.get(key, f"## {key}\n\nNot measured in this run.")
        sections.append(text.strip().replace("## ", f"## {number}. ", 1))
    sections.append(FOOTER.format(**facts))
    path = docs / "evidence.md"
    path.write_text("\n\n".join(s.strip() for s in sections) + "\n", encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------------------------- parts

USED = """
## Do the models use their reference?

The same tasks with the right reference and with another task's. A model that ignored its reference would score alike.
`exemplar` and `tryon` are given the scene. `superres` sees the small picture through attention alone, and paints the
detail that its plain enlargement lacks; another's reference is another's enlargement, too, so that it says little here
that the error grows, and an enlargement without any model is the harder rival.
"""


def _used(found: dict) -> str:
    lines = [USED]
    for name, rows in found.items():
        ratio = rows["swapped"]["error"][0] / rows["right"]["error"][0]
        lines += [
            f"**{name}**",
            table(rows, {"error": "error on the object", "ssim": "SSIM on the object"}, 4),
            f"A swapped reference multiplies the error by {ratio:.1f}." + _beside_bicubic(rows),
            f"![{name}](images/zoo-{name}.png)",
        ]
    return paragraphs(lines)


def _beside_bicubic(rows: dict) -> str:
    if "bicubic enlargement" not in rows:
        return ""
    ours, bicubic = rows["right"]["ssim"], rows["bicubic enlargement"]["ssim"]
    return f" As an enlargement it is {verdict(ours, bicubic)} the bicubic one."


ENLARGEMENT = """
## Is `superres` a good enlargement?

A sample of a diffusion model shows *a* picture that fits the small one, so a perfect one is 3 dB worse than the mean
of many, and only the mean can be compared with an enlargement that blurs. Fine detail: power at spatial frequencies
above a quarter of the sampling rate, as a share of the truth's. Tasks are resampled pieces of 64 px; photographs are
the same held-out ones, as they are, in pieces of 128 px.
"""


def _enlargement(found: dict) -> str:
    lines = [ENLARGEMENT]
    for name, rows in found.items():
        gain, one, fine = rows["mean of 8"]["gain"], rows["one sample"]["gain"], rows["one sample"]["fine"][0]
        side = verdict(gain, [0, 0, 0])
        says = f"The mean of eight is {side} bicubic ({gain[0]:+.2f} dB), one sample is {one[0]:+.2f} dB off it"
        says += f" and has {100 * fine:.0f} % of the truth's fine detail."
        columns = {"psnr": "PSNR, dB", "gain": "dB over bicubic", "fine": "fine detail"}
        lines += [f"**{name}**", table(rows, columns, 2), says]
    return paragraphs(lines)


LOCALISATION = """
## Column or row softmax?

R2G's claim: normalised over the *picture's* tokens, attention says where the reference went. A row softmax sums to 1
over the keys, so its mean over every key is a constant: no map. DAAM's sum over *some* keys is a map where other keys
can take the rest; the zoo's encoder has one such key, a learned token that means “nothing”. Truth: the inserted object,
which is smaller than the mask that the model is given.
"""
COLUMN, ROW = "R2G (column softmax), finest decoder layers", "DAAM's sum (row softmax), finest decoder layers"


def _localisation(found: dict) -> str:
    columns = {
        "auc": "ROC AUC",
        "contrast": "inside / outside",
        "pointing": "pointing game",
        "mask_iou": "mask IoU",
        "imacs": "IMACS",
    }
    lines = [LOCALISATION]
    for name, rows in found.items():
        sides = {columns[key]: verdict(rows[COLUMN][key], rows[ROW][key], *"><=") for key in columns}
        says = ", ".join(f"{column} {side}" for column, side in sides.items())
        lines += [f"**{name}**", table(rows, columns, 2)]
        lines.append(f"Finest decoder layers, R2G against DAAM's sum (= where the intervals overlap): {says}.")
    legend = "Colours are square roots of maps; boxes are true (white) and found (dashed)."
    return paragraphs([*lines, "![maps of two tasks each](images/evidence-localisation.png)", legend])


DETECTION = """
## Detection

`detect_box` on the same maps, against the box of the inserted object, at its default (Otsu's threshold of the map's
logarithms, chosen on tasks of *training* photographs) and at 0.4 of the maximum. The last rows are no maps: another
object's box at a random place, and the box of the mask, which the model is told and which is larger than the object.
"""


def _detection(found: dict) -> str:
    columns = {"otsu": "box IoU", "share": "box IoU at 0.4 of the maximum"}
    lines = [DETECTION]
    for name, rows in found.items():
        says = verdict(rows[COLUMN]["otsu"], rows[ROW]["otsu"])
        lines += [f"**{name}**", table(rows, columns, 2), f"Finest decoder layers: R2G's box is {says} DAAM's."]
    return paragraphs(lines)


CORRESPONDENCE = """
## SRAM against true correspondences

For every cell of the picture that lies on the object: distance of SRAM's strongest patch (*best*), and of its mean
place (*mean*), from the true source, in pixels of the reference (64 px; superres 16 px); medians per task. PCK: share
of cells whose best patch is within an eighth of the reference's side.

In the first part of their training `exemplar` and `tryon` were told where cells of the object should look; `superres`
was told all along. So their tables do not show that attention finds its sources untaught; they show that SRAM reads
where a model looks, that it keeps looking there, and which layers do.
"""


def _correspondence(found: dict) -> str:
    lines = [CORRESPONDENCE]
    for name, errors in found.items():
        rows = {shorten(row): x for row, x in errors.items()}
        lines += [f"**{name}**", table(rows, {"best": "best", "mean": "mean", "pck": "PCK"}, 2)]
    return paragraphs([*lines, "![sources found and true](images/evidence-sram.png)"])


STEREO = """
## A real stereo pair

The motorcycle of scikit-image, at half size: `tryon` fills a hole in the left view from the right view. It is told a
rigid pose (the hole's median disparity); the truth is each pixel's own disparity. Does attention find more than it is
told? (The left view is held out; the model never saw a square hole.)
"""


def _stereo(found: dict) -> str:
    rows = {row: {"best": x["best"], "pck": x["pck"]} for row, x in found.items() if "best" in x}
    ours, told = rows["finest decoder layers"]["best"], rows["what the pose says"]["best"]
    right, swapped = found["right"]["error"], found["swapped"]["error"]
    return paragraphs(
        [
            STEREO,
            table(rows, {"best": "error of the best patch (px)", "pck": "PCK (8 px)"}, 2),
            f"Error on the hole: {_cell(right, 3)}; with a swapped reference {_cell(swapped, 3)}.",
            f"SRAM's best patch is {verdict(told, ours)} the pose that the model is told. Patches are 2 px wide, so "
            "even a perfect choice of patch is about 0.8 px off.",
        ]
    )


IMACS = """
## IMACS against quality

The paper reports that IMACS follows the quality of pictures. Spearman's ρ over the checkpoints of a training run (48
tasks each), and over the pictures of the finished model; beside IMACS, the plain ratio of a map's means inside and
outside. A score that follows quality has ρ < 0 with the error and ρ > 0 with SSIM. IMACS normalises by the maximum and
drops what is below 0.4 of it, so a few peaks decide; with a growing ratio it can fall.
"""


def _imacs(found: dict) -> str:
    columns = {"error": "ρ with the error", "ssim": "ρ with SSIM"}
    lines = [IMACS]
    for run, part in found["runs"].items():
        lines += [f"**{run}**, {len(part['points'])} checkpoints of one run", table(part["rho"], columns, 2)]
    for name, rho in found["pictures"].items():
        lines += [f"**{name}**, pictures of the finished model", table(rho, columns, 2)]
    if found["runs"]:
        lines.append("![IMACS along training](images/evidence-imacs.png)")
    return paragraphs(lines)


LEVELS = """
## Times, layers and heads

How well each level's maps find the object, and the causal test of a debugging tool: heads are ranked by their R2G on
*training* photographs (its IMACS, or inside over outside), then muted (their output set to zero) on held-out ones.
"""


def _levels(found: dict) -> str:
    columns = {"contrast": "R2G inside / outside", "auc": "R2G ROC AUC", "imacs": "R2G IMACS", "g2r_auc": "G2R ROC AUC"}
    lines = [LEVELS]
    for name, part in found.items():
        levels = {shorten(row): x for row, x in part["levels"].items()}
        damage = {shorten(row): x for row, x in part["muting"].items()}
        lines += [f"**{name}**", table(levels, columns, 2), table(damage, {"error": "error when muted"}, 4)]
        for top in (row for row in damage if row.startswith("top")):
            bottom = top.replace("top", "bottom")
            a, b = damage[top]["error"], damage[bottom]["error"]
            costs = verdict(a, b, "costs more than", "costs less than", "can't be told apart from")
            lines.append(f"Muting the {top} {costs} muting the bottom ones ({a[0]:.3f}, {b[0]:.3f}).")
    return paragraphs([*lines, "![layers](images/evidence-layers.png)"])


FAITHFULNESS = """
## Faithfulness

On `{model}`, changes in units of the complete one (all patches grey; nothing frozen). *Deletion*: patches of the
reference turn grey, highest G2R first; larger is better. *Insertion*: they come back; smaller is better. *Freezing*:
the model gets another reference, but cells of the picture are kept, at every step, as they were, highest R2G first;
smaller is better.
"""


def _faithfulness(found: dict) -> str:
    lines = [FAITHFULNESS.format(**found)]
    for test, rows in found["tests"].items():
        lines += [f"**{test}**", table({row: {"auc": x["auc"]} for row, x in rows.items()}, {"auc": "AUC"}, 3)]
        ulam, random = rows["ULAM"]["auc"], rows["random"]["auc"]
        if test != "g2r deletion":  # smaller is better
            ulam, random = random, ulam
        lines.append(f"ULAM's order is {verdict(ulam, random)} a random one.")
    return paragraphs([*lines, "![curves](images/evidence-faithfulness.png)"])


ABLATION = """
## Mixed reference tokens

The same task and recipe, but a transformer over the reference tokens: any token may then carry what any patch showed,
and attention to a token need not mean its patch. Finest decoder layers. The models were not trained for equally long:
compare their maps, not their errors.
"""


def _ablation(found: dict) -> str:
    columns = {
        "error": "error",
        "swapped": "error, swapped",
        "r2g_auc": "R2G ROC AUC",
        "g2r_auc": "G2R ROC AUC",
        "sram": "SRAM, median error (px)",
    }
    local, lines = found[LOCAL], [ABLATION, table(found, columns, 3)]
    for row, scores in found.items():
        if row != LOCAL:
            says = verdict(local["sram"], scores["sram"], "finer than", "coarser than", "as fine as")
            lines.append(f"*{row}*: its SRAM is {says} that of local tokens.")
    return paragraphs(lines)


MISSING = {
    "ablation": """
## Mixed reference tokens

Not measured with these models. With version 0.1's (4-px patches, 208 tasks) a transformer over the reference tokens,
after which any token may carry what any patch showed, did not blur SRAM: 1.97 px off against 2.83 px of local tokens;
G2R's ROC AUC was 0.93 against 0.84, R2G's 0.84 against 0.97.
"""
}
SECTIONS = {
    "used": _used,
    "localisation": _localisation,
    "detection": _detection,
    "correspondence": _correspondence,
    "stereo": _stereo,
    "imacs": _imacs,
    "levels": _levels,
    "faithfulness": _faithfulness,
    "ablation": _ablation,
    "enlargement": _enlargement,
}

# ------------------------------------------------------------------------------------------------------------ helpers


def paragraphs(parts: list[str]) -> str:
    return "\n\n".join(part.strip() for part in parts)


def table(rows: dict[str, dict[str, Interval]], columns: dict[str, str], digits: int) -> str:
    """A Markdown table of intervals; what was not measured is a dash."""
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---|" + "---|" * len(columns)]
    for row, scores in rows.items():
        cells = [_cell(scores.get(column), digits) for column in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(x: Interval | None, digits: int) -> str:
    if x is None:
        return "–"
    mean, low, high = (f"{v:.{digits}f}" for v in x)
    return mean if low == high else f"{mean} [{low}, {high}]"


def verdict(a: Interval, b: Interval, more="better than", less="worse than", same="not distinguishable from") -> str:
    """What two intervals say, larger being better: apart, or not."""
    if a[1] > b[2]:
        return more
    return less if a[2] < b[1] else same


def shorten(layer: str) -> str:
    return layer.replace(".transformer_blocks.0", "").replace("attentions", "attn")
