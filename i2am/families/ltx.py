"""LTX and LTX-2: conditions are tokens of the video's own sequence, in place or before or behind it.

Tokens are told by their timesteps and coordinates: a condition stands lower than what is generated. Frames of a
condition at rising times are one reference (in-context references of LTX-2 come last, and may be smaller).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from i2am.families import PipelineFacts
from i2am.families.frames import Frames, Roles, VideoFrames
from i2am.references import Grid


class LTX(VideoFrames):
    """``LTXVideoTransformer3DModel`` and ``LTX2VideoTransformer3DModel``."""

    models = ("LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel")
    pipelines = (
        PipelineFacts("LTXImageToVideo*"),
        PipelineFacts("LTXCondition*"),
        PipelineFacts(
            "LTXI2VLong*",
            refused="a video is denoised in windows of time, and what one generated is given to the next: no frame is "
            "one or the other for a whole run",
        ),
        PipelineFacts("LTX2ImageToVideo*"),
        PipelineFacts("LTX2Condition*", "conditions"),
        PipelineFacts("LTX2InContext*", "reference_conditions"),
        PipelineFacts("LTX2HDR*", "reference_conditions"),
        PipelineFacts(
            "LTX2DFR*",
            refused="overlapping tiles of the tokens are denoised in turn, and keyframes that one pass generates are "
            "given to the next: no call sees one layout",
        ),
    )
    conditional_call = None
    batched_guidance = True
    latent_pixels = 1

    def __init__(self, transformer: nn.Module):
        super().__init__(transformer)
        self._roles = Roles()
        self._lead = 0

    def lead_of(self, parts: Sequence[Frames]) -> int:
        return self._lead

    def aside(self, given: dict[str, Any]) -> str | None:
        if given.get("spatio_temporal_guidance_blocks"):
            return "spatio-temporal guidance, whose blocks pass values on without attention"
        return "guidance with picture and sound kept apart" if given.get("isolate_modalities") else None

    def frames_of(self, given: dict[str, Any]) -> Sequence[Frames]:
        latents, timestep = given["hidden_states"], given["timestep"]
        batch, tokens = latents.shape[:2]
        if timestep.numel() % (batch * tokens):  # one for each sample
            roles = [False] * tokens
        else:
            roles = self._roles.read(timestep.reshape(batch, tokens))
        coordinates = self._coordinates(given)
        self._lead = _frames_in_place(coordinates[0], torch.as_tensor(roles))
        return token_frames(coordinates, roles)

    def _coordinates(self, given: dict[str, Any]) -> Tensor:
        """Return (time, row, column) of each token, ``[3, N]``."""
        coords = given.get("video_coords")
        if isinstance(coords, Tensor):
            return (coords[0, ..., 0] if coords.ndim == 4 else coords[0]).detach().double().cpu()
        axes = (torch.arange(given[name]) for name in ("num_frames", "height", "width"))
        return torch.cartesian_prod(*axes).T.double()


def _frames_in_place(time: Tensor, given: Tensor) -> int:
    """Return how many given frames come before all generated ones in time, whatever the order of the tokens."""
    generated = time[~given]
    return len(time[given & (time < generated.min())].unique()) if len(generated) else 0


def token_frames(coordinates: Tensor, given: Sequence[bool]) -> list[Frames]:
    """Return the frames of tokens by their coordinates ``[3, N]`` (time, row, column).

    Raises:
        ValueError: the tokens of a frame do not fill a grid row by row: it is given in part.
    """
    time, row, column = coordinates.contiguous()
    roles = torch.as_tensor(given)
    new = (time[1:] != time[:-1]) | (row[1:] < row[:-1]) | (roles[1:] != roles[:-1])
    starts = [0, *(new.nonzero().flatten() + 1).tolist()]
    found: list[Frames] = []
    before = float("-inf")
    for start, stop in zip(starts, [*starts[1:], len(given)], strict=True):
        frame = Frames(1, _grid(row[start:stop], column[start:stop]), given[start])
        now = float(time[start])
        if found and now > before and found[-1]._replace(frames=1) == frame:
            found[-1] = found[-1]._replace(frames=found[-1].frames + 1)
        else:
            found.append(frame)
        before = now
    return found


def _grid(row: Tensor, column: Tensor) -> Grid:
    rows, columns = row.unique(), column.unique()
    grid = len(rows), len(columns)
    order = torch.searchsorted(rows, row) * grid[1] + torch.searchsorted(columns, column)
    if not order.equal(torch.arange(len(row))) or grid[0] * grid[1] != len(row):
        raise ValueError(
            f"{len(row)} tokens of a frame do not go through {grid[0]}×{grid[1]} row by row: only a part of the frame "
            "is given, so that neither part has a grid"
        )
    return grid
