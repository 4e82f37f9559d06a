"""Names of the values that options take, for annotations and for checks: ``get_args(Direction)`` lists them.

Every function that takes or returns one of these is annotated with it, so that a type checker finds a misspelt one.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

Direction: TypeAlias = Literal["r2g", "g2r", "mass"]
"""A map's kind: reference to generated, generated to reference, or the share of attention on the reference."""

Level: TypeAlias = Literal["time", "head", "layer"]
"""What a map is split by; None stands for the unified one."""

Normalize: TypeAlias = Literal["raw", "lift"]
"""The paper's mean probabilities, or these times the number of tokens (1.0 is uniform)."""

Output: TypeAlias = Literal["i2am", "model"]
"""Whose attention output goes on into a traced model: the fused op's, or the model's own."""

Guidance: TypeAlias = Literal["auto", "none"] | int | tuple[int, int]
"""The conditional samples: found by themselves, all of them, or the part of the batch with this index (of so many)."""

TimeGroups: TypeAlias = Literal["steps"] | int
"""Into how many groups the steps are summed; "steps": one group a step."""

Mode: TypeAlias = Literal["reference", "self"]
"""The keys that maps are about: the reference's, or the picture's own (self-attention)."""

Record: TypeAlias = Literal["qk"]
"""What a run keeps beside its sums: queries and keys."""

Backend: TypeAlias = Literal["triton", "streaming", "reference"]
"""The op's implementation; None in its place chooses by device."""
