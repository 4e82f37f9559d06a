"""VisualCloze: a grid of pictures, of which some in the last row are generated; a row is one sequence of token columns.

A channel of every token says whether it is to be generated. What is given of a row is one reference, its pictures
beside each other: ``row_0``, ``row_1``, …; regions of it ask for one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from i2am.families.joint import Segment
from i2am.references import Grid, Reference


def is_cloze(ids: Tensor, channels: int, own: int) -> bool:
    """Return whether image tokens are a grid of pictures to be filled in: its rows are numbered from 1 (Flux Fill's one
    picture is 0), and each token has ``channels``, more than the ``own`` of what is denoised.
    """
    return channels > 2 * own and float(ids.reshape(-1, ids.shape[-1])[0, 0]) >= 1


def cloze(rows: Sequence[Segment], generate: Tensor) -> tuple[Grid, Tensor, list[Reference]]:
    """Return the generated tokens' grid and places, and what is given of each row.

    Args:
        rows: of the grid of pictures.
        generate: ``[N]`` of every image token, whether it is to be generated.

    Raises:
        ValueError: a picture is to be generated in part, in several rows, or not at all.
    """
    grid, queries, references = (0, 0), None, []
    for number, row in enumerate(rows):
        here = generate[row.start : row.stop].reshape(row.grid)
        columns = here.any(0)
        if not here.all(0).equal(columns):
            raise ValueError("a part of a picture is to be generated: its tokens and those given have no grids")
        tokens = torch.arange(row.start, row.stop).reshape(row.grid)
        if columns.any():
            if queries is not None:
                raise ValueError("pictures of several rows are to be generated, which make no one grid")
            grid, queries = (row.grid[0], int(columns.sum())), tokens[:, columns].flatten()
        if not columns.all():
            given = tokens[:, ~columns]
            references.append(Reference((row.grid[0], given.shape[1]), given.flatten(), name=f"row_{number}"))
    if queries is None:
        raise ValueError("no picture of the grid is to be generated")
    return grid, queries, references
