"""A zoo model as one safetensors file: float16 weights, and how it was trained as metadata."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from i2am.zoo.pipelines import ZooPipeline, build

FORMAT = "i2am-zoo-1"


def save(name: str, weights: dict[str, Tensor], file: Path, facts: dict[str, object]) -> Path:
    """Write weights ("unet.…", "image_encoder.…") and facts about their training."""
    from safetensors.torch import save_file

    tensors = {n: x.detach().to(torch.float16).contiguous() for n, x in weights.items()}
    save_file(tensors, file, metadata={"format": FORMAT, "name": name, "facts": json.dumps(facts)})
    return Path(file)


def read(file: Path) -> tuple[ZooPipeline, dict[str, object]]:
    """Read ``(pipeline in float32, facts about its training)``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a zoo model's file.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no zoo model at {file}")
    try:
        with safe_open(file, framework="pt") as contents:
            metadata = contents.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{file} is not a zoo model (format {metadata.get('format')!r})")
            weights = {name: contents.get_tensor(name).float() for name in contents.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error
    try:
        name, facts = metadata["name"], json.loads(metadata["facts"])
        pipe = build(name, mixing=facts["mixing"], detail=facts.get("detail"), fine=facts.get("fine", False))
        for part in ("unet", "image_encoder"):
            of_part = {n.removeprefix(f"{part}."): x for n, x in weights.items() if n.startswith(f"{part}.")}
            getattr(pipe, part).load_state_dict(of_part)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # RecursionError is one, too
        raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}") from error
    return pipe, facts
