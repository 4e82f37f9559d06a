"""Levels as labelled arrays and as tables: xarray and pandas, where they are installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from i2am.maps.aggregate import pick
from i2am.maps.names import LEVELS, Direction
from i2am.references import choose_layers

if TYPE_CHECKING:
    import pandas
    import xarray

    from i2am.maps import AttributionMaps

UNITS = {"r2g": "probability (column softmax)", "g2r": "probability (row softmax)", "mass": "share of attention"}


def read_level(maps: AttributionMaps, level: str, direction: Direction, options: dict[str, Any]) -> Tensor:
    """Return a level by its name, ``[B, (T | H | L,) h, w]``.

    Raises:
        ValueError: there is no such level or map.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    found: Tensor = getattr(maps, level)(direction, **options)
    return found


def as_xarray(maps: AttributionMaps, direction: Direction, level: str, options: dict[str, Any]) -> xarray.DataArray:
    """Return a level with named axes: ``image, (time | head | layer,) y, x``."""
    import xarray

    values = read_level(maps, level, direction, options)
    axis, h, w = LEVELS[level].axis, *values.shape[-2:]
    coordinates: dict[str, list[Any]] = {
        "image": list(range(maps.batch)),
        **({axis: _places(maps, axis, values.shape[1], options)} if axis else {}),
        "y": [(i + 0.5) / h for i in range(h)],  # of the picture's height: grids of any size lie on each other
        "x": [(i + 0.5) / w for i in range(w)],
    }
    lift = options.get("normalize") == "lift"
    attributes = {
        "direction": direction,
        "level": level,
        "units": "times uniform" if lift else UNITS[direction],
        "reference": options.get("reference") or maps.references[0],
    }
    return xarray.DataArray(
        values.numpy(), coords=coordinates, dims=list(coordinates), name=f"{direction}_{level}", attrs=attributes
    )


def as_pandas(maps: AttributionMaps, direction: Direction, level: str, options: dict[str, Any]) -> pandas.DataFrame:
    """Return a level as a long table: a row a token of a map, ``image, (time | head | layer,) y, x, value``."""
    import pandas

    values = read_level(maps, level, direction, options)
    axis, h, w = LEVELS[level].axis, *values.shape[-2:]
    names: dict[str, list[Any]] = {
        "image": list(range(maps.batch)),
        **({axis: _places(maps, axis, values.shape[1], options)} if axis else {}),
        "y": list(range(h)),
        "x": list(range(w)),
    }
    index = pandas.MultiIndex.from_product(list(names.values()), names=list(names))
    return pandas.DataFrame({"value": values.flatten().numpy()}, index=index).reset_index()


def _places(maps: AttributionMaps, axis: str, count: int, options: dict[str, Any]) -> list[Any]:
    """Return what the places on a level's axis are called: numbers of groups and heads, names of layers."""
    if axis == "time":
        return list(pick(options.get("times"), maps.time_groups, "times"))
    if axis == "layer":
        return maps.chosen_layers(options.get("layers"), options.get("reference"))
    heads = maps.heads(options.get("reference"))
    first = next(iter(choose_layers(heads, options.get("layers") or maps.layers)))
    return list(pick(options.get("heads"), heads[first], "heads"))[:count]
