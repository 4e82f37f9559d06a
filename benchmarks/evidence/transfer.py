"""What does the work: scores along a training run, levels and causal muting, faithfulness."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.evidence.localise import INPAINTING, Columns
from benchmarks.evidence.subject import (
    SEED,
    Setting,
    finest,
    interval,
    masked_change,
    masked_error,
    masked_ssim,
    muted,
    paint,
    patch_pixels,
    rank_correlation,
    tasks,
    traced,
    true_places,
)
from i2am import metrics
from i2am.zoo.storage import read

LOCAL = "local tokens"
SHARES = (0.0, 0.125, 0.25, 0.5, 1.0)
GRID = 16  # cells a side, of the picture and of the reference


# ------------------------------------------------------------------------------------------------------------- IMACS


QUALITIES = ("error", "ssim")
SCORES = {
    "IMACS of R2G": lambda maps, sample: metrics.imacs(maps.ulam("r2g"), sample.mask[:, 0]),
    "IMACS of G2R": lambda maps, sample: metrics.imacs(maps.ulam("g2r"), sample.reference_object[:, 0]),
    "IMACS of R2G, finest": lambda maps, sample: metrics.imacs(
        maps.ulam("r2g", layers=finest(maps)), sample.mask[:, 0]
    ),
    "IMACS of G2R, finest": lambda maps, sample: metrics.imacs(
        maps.ulam("g2r", layers=finest(maps)), sample.reference_object[:, 0]
    ),
    "inside / outside of R2G, finest": lambda maps, sample: metrics.contrast(
        maps.ulam("r2g", layers=finest(maps)), sample.mask[:, 0]
    ),
    "inside / outside of G2R, finest": lambda maps, sample: metrics.contrast(
        maps.ulam("g2r", layers=finest(maps)), sample.reference_object[:, 0]
    ),
}


def imacs_and_quality(setting: Setting) -> dict:
    """IMACS beside error and SSIM: over the checkpoints of training runs, and over the pictures of a finished model."""
    found = {"runs": {}, "pictures": {}}
    for name in INPAINTING:
        found["pictures"][name] = _correlations(_scores(setting.load(name), name, setting))
    folders = sorted(p for p in setting.checkpoints.glob("*") if p.is_dir()) if setting.checkpoints else []
    for folder in folders:
        files = sorted(folder.glob("snapshot-*.safetensors"))
        name = folder.name.split("-")[0]
        if name not in INPAINTING or len(files) < 3:
            continue
        points = []
        for file in files:
            pipe, facts = read(file)
            scores = _scores(pipe, name, setting, share=0.25)
            points.append(facts | {key: sum(x) / len(x) for key, x in scores.items()})
        scores = {key: [p[key] for p in points] for key in (*SCORES, *QUALITIES)}
        found["runs"][folder.name] = {"points": points, "rho": _correlations(scores)}
    return found


def _scores(pipe, name: str, setting: Setting, share: float = 1.0) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {key: [] for key in (*SCORES, *QUALITIES)}
    for sample in tasks(name, setting, share=share):
        pictures, maps = traced(pipe, sample, setting.steps)
        for key, score in SCORES.items():
            scores[key] += score(maps, sample).tolist()
        scores["error"] += masked_error(pictures, sample).tolist()
        scores["ssim"] += masked_ssim(pictures, sample).tolist()
    return scores


def _correlations(scores: dict[str, list[float]]) -> dict[str, dict[str, list[float]]]:
    return {key: {q: rank_correlation(scores[key], scores[q]) for q in QUALITIES} for key in SCORES}


# ------------------------------------------------------------------------------------------------------------ levels


def levels(setting: Setting) -> dict:
    """Time groups, layers and heads by how well they localise, and what muting them costs."""
    found = {}
    for name in INPAINTING:
        pipe = setting.load(name)
        table = Columns()
        for sample in tasks(name, setting):
            _, maps = traced(pipe, sample, setting.steps)
            truth, reference = sample.object[:, 0], sample.reference_object[:, 0]
            every = dict(layers=maps.recorded_layers)
            for level, rows in (("tlam", range(maps.time_groups)), ("llam", maps.recorded_layers)):
                options = every if level == "llam" else {}
                r2g, g2r = getattr(maps, level)("r2g", **options), getattr(maps, level)("g2r", **options)
                for i, row in enumerate(rows):
                    table.add(
                        f"time {row}" if level == "tlam" else row,
                        contrast=metrics.contrast(r2g[:, i], truth),
                        auc=metrics.ranking_auc(r2g[:, i], truth),
                        imacs=metrics.imacs(r2g[:, i], truth),
                        g2r_auc=metrics.ranking_auc(g2r[:, i], reference),
                    )
        found[name] = {"levels": table.intervals()} | _muting(pipe, name, setting)
    return found


RANKINGS = {
    "IMACS": lambda map, sample: metrics.imacs(map, sample.mask[:, 0]),
    "contrast": lambda map, sample: metrics.contrast(map, sample.mask[:, 0]),
}


def _muting(pipe, name: str, setting: Setting) -> dict:
    """Heads are ranked on training photographs, and muted on held-out ones."""
    scores = score_heads(pipe, name, setting)
    heads = sorted(scores)
    draws = torch.Generator().manual_seed(SEED)
    choices: dict[str, list[tuple[str, int]]] = {"nothing": []}
    count = len(heads) // 6
    for which in RANKINGS:
        ranked = sorted(heads, key=lambda head, which=which: scores[head][which], reverse=True)
        choices[f"top {count} heads by {which}"] = ranked[:count]
        choices[f"bottom {count} heads by {which}"] = ranked[-count:]
    for draw in range(setting.draws):
        picked = torch.randperm(len(heads), generator=draws)[:count]
        choices[f"random {count} heads, draw {draw + 1}"] = [heads[i] for i in picked]
    layers = list(dict.fromkeys(layer for layer, _ in heads))
    choices |= {f"layer {layer}": [(x, h) for x, h in heads if x == layer] for layer in layers}
    table = Columns()
    for sample in tasks(name, setting):
        for row, chosen in choices.items():
            silent = {layer: [h for x, h in chosen if x == layer] for layer, _ in chosen}
            with muted(pipe, silent):
                table.add(row, error=masked_error(paint(pipe, sample, setting.short), sample))
    damage = table.intervals()
    return {
        "heads": [[*head, scores[head]] for head in heads],
        "muting": damage,
        "layers": {layer: damage[f"layer {layer}"]["error"][0] for layer in layers},
    }


def score_heads(pipe, name: str, setting: Setting) -> dict[tuple[str, int], dict[str, float]]:
    """``(layer, head)`` → what each ranking says of its R2G, over training photographs."""
    scores: dict[tuple[str, int], dict[str, list[float]]] = {}
    for sample in tasks(name, setting, split="train", share=0.25):
        _, maps = traced(pipe, sample, setting.short)
        for layer in maps.recorded_layers:
            for head, map in enumerate(maps.hlam("r2g", layers=layer).unbind(1)):
                of_head = scores.setdefault((layer, head), {which: [] for which in RANKINGS})
                for which, score in RANKINGS.items():
                    of_head[which] += score(map, sample).tolist()
    return {head: {which: sum(x) / len(x) for which, x in of_head.items()} for head, of_head in scores.items()}


# ------------------------------------------------------------------------------------------------------ faithfulness


def faithfulness(setting: Setting, name: str = "exemplar") -> dict:
    """Occlude the reference in the order of G2R; hold back the picture's change in the order of R2G."""
    pipe = setting.load(name)
    tests = {
        "g2r deletion": ("g2r", _occlude, False),
        "g2r insertion": ("g2r", _occlude, True),
        "r2g freezing": ("r2g", _freeze, False),
    }
    curves: dict[str, dict[str, list]] = {test: {} for test in tests}
    for i, sample in enumerate(tasks(name, setting)):
        _, maps = traced(pipe, sample, setting.short)
        for test, (direction, experiment, insertion) in tests.items():
            change = experiment(pipe, sample, setting)
            orders = _orders(maps, direction)
            if insertion:
                orders = {row: orders[row] for row in ("ULAM", "opposite of ULAM", "random")}
            for row, (map, order) in orders.items():
                generator = torch.Generator().manual_seed(SEED + i)
                options = dict(shares=SHARES, order=order, insertion=insertion, generator=generator)
                curves[test].setdefault(row, []).append(metrics.removal_curve(map, change, **options))
    found = {}
    for test, rows in curves.items():
        found[test] = {}
        for row, parts in rows.items():
            curve = torch.cat(parts)
            whole = curve[:, -1:] if test == "g2r deletion" else curve[:, :1]  # everything occluded; nothing frozen
            curve = (curve / whole.clamp_min(1e-8)).clamp_max(5)
            found[test][row] = {
                "auc": interval(metrics.area(curve, SHARES)),
                "curve": [interval(x) for x in curve.unbind(1)],
            }
    return {"model": name, "shares": SHARES, "tests": found}


def _orders(maps, direction: str) -> dict[str, tuple[Tensor, str]]:
    def ulam(**options) -> Tensor:
        return maps.ulam(direction, size=(GRID, GRID), **options)

    orders = {
        "ULAM": (ulam(), "map"),
        "ULAM, lift": (ulam(normalize="lift"), "map"),
        "finest decoder layers": (ulam(layers=finest(maps)), "map"),
        "first encoder layer": (ulam(layers=maps.layers[0]), "map"),
        "opposite of ULAM": (ulam(), "opposite"),
        "random": (ulam(), "random"),
    }
    if direction == "g2r":  # every layer has the same keys, so this would be the same order
        del orders["ULAM, lift"]
    return orders


def _remembered(change):
    """Asked again about the same cells (all, or none), the answer is the same: drawn once."""
    seen: dict[bytes, Tensor] = {}

    def ask(removed: Tensor) -> Tensor:
        if 0 < removed.float().mean() < 1:
            return change(removed)
        key = removed.numpy().tobytes()
        if key not in seen:
            seen[key] = change(removed)
        return seen[key]

    return ask


def _occlude(pipe, sample, setting: Setting):
    """Change of the object when patches of the reference are grey."""
    whole = paint(pipe, sample, setting.short)

    def change(removed: Tensor) -> Tensor:
        covered = removed[:, None].float().repeat_interleave(4, -1).repeat_interleave(4, -2)
        without = paint(pipe, sample, setting.short, sample.reference * (1 - covered))
        return masked_change(without, whole, sample.mask)

    return _remembered(change)


def _freeze(pipe, sample, setting: Setting):
    """Change of the picture under another reference, when these cells are kept as they were at every step."""
    before: list[Tensor] = []

    def keep(pipe, step, timestep, state):
        before.append(state["latents"].clone())
        return state

    whole = paint(pipe, sample, setting.short, callback_on_step_end=keep)

    def change(removed: Tensor) -> Tensor:
        frozen = removed[:, None].repeat_interleave(2, -1).repeat_interleave(2, -2)

        def hold(pipe, step, timestep, state):
            return {"latents": torch.where(frozen, before[step], state["latents"])}

        other = paint(pipe, sample, setting.short, sample.reference.roll(1, 0), callback_on_step_end=hold)
        return masked_change(other, whole, torch.ones_like(sample.mask))

    return _remembered(change)


# ---------------------------------------------------------------------------------------------------------- ablation


def ablation(setting: Setting) -> dict:
    """Reference tokens that a transformer has mixed: the picture is copied, and do the maps still mean something?"""
    folders = sorted(setting.checkpoints.glob("exemplar-mixing*")) if setting.checkpoints else []
    files = [file for folder in folders if (file := folder / "exemplar.safetensors").is_file()]
    if not files:
        return {}
    found, models = {}, {LOCAL: setting.load("exemplar")}
    for file in files:
        pipe, facts = read(file)
        models[f"mixed by a transformer, layers: {facts['mixing']}"] = pipe
    for row, pipe in models.items():
        table = Columns()
        for sample in tasks("exemplar", setting):
            pictures, maps = traced(pipe, sample, setting.steps, record="qk")
            swapped = paint(pipe, sample, setting.steps, sample.reference.roll(1, 0))
            table.add(row, error=masked_error(pictures, sample), swapped=masked_error(swapped, sample))
            r2g, g2r = (maps.ulam(direction, layers=finest(maps)) for direction in ("r2g", "g2r"))
            table.add(row, r2g_auc=metrics.ranking_auc(r2g, sample.object[:, 0]))
            table.add(row, g2r_auc=metrics.ranking_auc(g2r, sample.reference_object[:, 0]))
            match = maps.match(layers=finest(maps))
            truth = true_places(sample, tuple(match.best.shape[1:3]))
            error = metrics.correspondence_error(match.best, truth, patch_pixels(pipe, sample))
            table.add(row, sram=[e[e.isfinite()].median() for e in error])
        found |= table.intervals()
    return found
