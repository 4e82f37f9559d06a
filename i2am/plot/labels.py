"""What is written in figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np

from i2am.maps import AttributionMaps
from i2am.maps.aggregate import pick
from i2am.references import SELF

MEANING = {
    "r2g": "R2G: which regions of the generated image the reference influenced",
    "g2r": "G2R: which parts of the reference contributed",
    "mass": "Mass: share of attention spent on the reference",
}
OF_ITSELF = {  # of maps traced with mode="self"
    "r2g": "Self-attention, no reference: which positions look at the picture most",
    "g2r": "Self-attention, no reference: which positions are looked at most",
    "mass": "Share of attention that the picture's positions spend on each other",
}


def meaning(maps: AttributionMaps, direction: str) -> str:
    """Say what a direction means for these maps: of self-attention (``mode="self"``) nothing about a reference."""
    return OF_ITSELF[direction] if maps.references == [SELF] else MEANING[direction]


def panel_labels(maps: AttributionMaps, direction: str, level: str, options: dict) -> list[str]:
    """Write one label a panel, in the order of the level's maps."""
    if level == "time":
        return [
            f"{share}\n{calls}" for share, calls in zip(share_of_run(maps, options), _calls(maps, options), strict=True)
        ]
    if level == "head":
        heads = maps.hlam(direction, **{**options, "heads": None}).shape[1]
        return [f"head {head}" for head in pick(options.get("heads"), heads, "heads")]
    grids = maps.grids(options.get("reference"))
    names = maps.chosen_layers(options.get("layers"), options.get("reference"))
    sizes = "" if direction == "g2r" else "\n{} × {} tokens"
    return [short + sizes.format(*grids[name]) for name, short in zip(names, short_layer_names(names), strict=True)]


def share_of_run(maps: AttributionMaps, options: dict) -> list[str]:
    """Return which part of the run each chosen time group covers: "group 0 · 0–20 % of run", or "step 1 of 20"."""
    if maps.one_group_a_step:
        return [f"step {t + 1} of {maps.time_groups}" for t in pick(options.get("times"), maps.time_groups, "times")]
    edges = [round(100 * edge / maps.time_groups) for edge in range(maps.time_groups + 1)]
    chosen = pick(options.get("times"), maps.time_groups, "times")
    return [f"group {t} · {edges[t]}–{edges[t + 1]} % of run" for t in chosen]


def _calls(maps: AttributionMaps, options: dict) -> list[str]:
    """Return how many of the model's calls fell into each chosen time group."""
    counts = np.array(list(maps.counts(options.get("reference")).values())).max(0)  # a cache may skip some layers
    chosen = pick(options.get("times"), maps.time_groups, "times")
    return [f"{counts[t]} of {counts.sum()} calls" for t in chosen]


def short_layer_names(names: Sequence[str], width: int = 20) -> list[str]:
    """Return names for under a panel: diffusers' block names abbreviated, anything longer wrapped at its dots.

    ``up_blocks.3.attentions.2.transformer_blocks.0.attn2`` becomes ``up 3 · attn 2``, with `` · block 0`` where a
    transformer of that model has several blocks, and `` · attn1`` where it is the first of a block's two attentions.
    """
    parts = [_block_parts(name) for name in names]
    several = any(p is not None and p[2] != "0" for p in parts)
    return [
        _wrap_dots(name, width)
        if p is None
        else f"{p[0]} · attn {p[1]}" + (f" · block {p[2]}" if several else "") + (" · attn1" if p[3] == "attn1" else "")
        for name, p in zip(names, parts, strict=True)
    ]


def _block_parts(name: str) -> tuple[str, str, str, str] | None:
    """Return (block, attention, transformer block, which of its two attentions) of a diffusers UNet layer name."""
    words = name.split(".")
    if words[-1] not in ("attn1", "attn2") or words[-3:-2] != ["transformer_blocks"] or words[-5:-4] != ["attentions"]:
        return None
    block = words[:-5]
    if not block or not block[0].endswith(("_blocks", "_block")):
        return None
    return " ".join([block[0].split("_")[0], *block[1:]]), words[-4], words[-2], words[-1]


def _wrap_dots(name: str, width: int) -> str:
    """Break ``name`` after dots into lines of about ``width``, of which the last three are kept."""
    lines = [""]
    for word in name.replace(".", ". ").split():
        if len(lines[-1]) + len(word) > width and lines[-1]:
            lines.append("")
        lines[-1] += word if len(word) <= width else word[: width - 1] + "…"
    return "\n".join(lines if len(lines) <= 3 else ["…" + lines[-3], *lines[-2:]])


def value_range(low: float, high: float) -> str:
    """Return both ends with three digits of the larger, over one power of ten: ``0.78 – 1.23 ×10⁻³``."""
    exponent = math.floor(math.log10(high)) if high > 0 else 0
    if -2 < exponent < 3:
        return f"{low:.3g} – {high:.3g}"
    return f"{low / 10**exponent:.2f} – {high / 10**exponent:.2f} $\\times10^{{{exponent}}}$"


def signed(value: float, form: str = ".3f") -> str:
    """Write a number with a real minus sign, as the ticks of an axis have it."""
    return format(value, form).replace("-", "\N{MINUS SIGN}")


def quantity(direction: str, options: dict) -> str:
    """Return what a colour bar measures."""
    lift = options.get("normalize", "raw") == "lift"
    names = {
        "r2g": "R2G: mean column probability",
        "g2r": "G2R: mean row probability",
        "mass": "mass: share of attention",
    }
    return f"{names[direction].split(':')[0]}, times uniform" if lift else names[direction]


def units(direction: str, options: dict) -> str:
    if direction == "mass":
        return "0…1 of a token's attention"
    if options.get("normalize", "raw") == "lift":
        return "values × number of tokens (1 = uniform)"
    return "raw values (sum over a layer's tokens ≤ 1)"


def wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))
