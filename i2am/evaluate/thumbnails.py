"""A sample's maps at every level, small enough to keep for each of thousands."""

from __future__ import annotations

import json
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from i2am.maps import AttributionMaps
from i2am.maps.names import DIRECTIONS, LEVELS

SIDE = 32  # tokens on the longer side, at most
SHARES = tuple(d for d in DIRECTIONS if d != "mass")  # maps that are distributions, of which a share can move


def keep_levels(maps: AttributionMaps, path: Path) -> None:
    """Write the first image's maps as float16 safetensors: ``"r2g.tlam" [T, h, w]``, each scaled to a mean of 1."""
    from safetensors.torch import save_file

    save_file(small_levels(maps), path, metadata={"layers": json.dumps(maps.layers)})


def read_levels(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read ``({"r2g.tlam": [T, h, w], …} float32, names of the layers)``.

    Raises:
        ValueError: the file is damaged, or another one.
        FileNotFoundError: there is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
            layers = json.loads((file.metadata() or {})["layers"])
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no file of an evaluation's levels: {error}") from error
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise ValueError(f"{path} is damaged: its layers are {layers!r:.80}")
    return found, layers


def small_levels(maps: AttributionMaps) -> dict[str, Tensor]:
    """Return the first image's maps, as :func:`keep_levels` keeps them."""
    small = {}
    for direction in SHARES:
        for level in LEVELS:
            try:
                found = getattr(maps, level)(direction)[0]
            except ValueError:  # no G2R, or head counts that differ
                continue
            x = shrunk(found[None] if level == "ulam" else found)
            small[f"{direction}.{level}"] = (x / x.mean((-2, -1), keepdim=True)).half()
    return small


def shrunk(x: Tensor, side: int = SIDE) -> Tensor:
    """Average ``[G, h, w]`` to at most ``side`` on the longer side."""
    longer = max(x.shape[-2:])
    if longer <= side:
        return x
    size = [max(round(n * side / longer), 1) for n in x.shape[-2:]]
    return F.interpolate(x[None], size, mode="area")[0]


def as_distribution(x: Tensor) -> Tensor:
    """Scale ``[..., h, w]`` to sum 1 over the map; NaN where it is not finite (a time group without a step)."""
    x = x.float()
    return x / x.sum((-2, -1), keepdim=True)
