"""The reference as spatial tokens: one per patch, and each knows only its own patch and where it lies.

Tokens stay local on purpose: attention to a token is then attention to its patch, by construction. With a transformer
over them a token may carry what any patch showed, and maps need not mean places (``docs/evidence.md`` compares both).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


def fourier(positions: Tensor, wavelengths: Sequence[float]) -> Tensor:
    """Return sines and cosines of positions: what lets a query find the key of a given place.

    Args:
        positions: ``[..., 2]`` as ``(y, x)``, in the unit of the wavelengths.
        wavelengths: ``W`` of them.

    Returns: ``[..., 4·W]``.
    """
    angles = positions[..., None] * (2 * math.pi / torch.tensor(wavelengths, device=positions.device))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def centres(grid: tuple[int, int], pixels: float) -> Tensor:
    """Return ``[h, w, 2]``: the ``(y, x)`` centres of a grid's cells, ``pixels`` wide each."""
    axes = [(torch.arange(n) + 0.5) * pixels for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


class PatchEncoder(ModelMixin, ConfigMixin):
    """Reference image → tokens: a patch embedding plus its position, normalised, after one token that means "nothing".

    Args:
        patch_size: pixels of the reference a token covers, each way.
        width: of a token.
        wavelengths: of the position's sines, in pixels of the *picture* (see ``stride``).
        stride: pixels of the picture per pixel of the reference: 1, or the factor of a super-resolution.
        image_size: of references, where all have the same; tells tracers the grid.
        mixing: transformer layers over the tokens; 0, but for the ablation.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 4,
        width: int = 96,
        wavelengths: Sequence[float] = (128, 64, 32, 16, 8),
        stride: int = 1,
        image_size: int | None = 64,
        mixing: int = 0,
    ):
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.place = nn.Linear(4 * len(wavelengths), width)
        self.norm = nn.LayerNorm(width)
        self.nothing = nn.Parameter(torch.zeros(width))
        layer = (width, 4, 2 * width, 0.0, "gelu", 1e-5, True, True)
        self.mix = nn.Sequential(*(nn.TransformerEncoderLayer(*layer) for _ in range(mixing)))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the token grid of a reference of that size. Raises ValueError where patches do not fill it."""
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"a reference of {height}×{width} px is not made of whole {patch}×{patch} patches")
        return height // patch, width // patch

    def forward(self, reference: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return tokens of ``reference [B, 3, H, W]`` in [-1, 1]: ``[B, 1 + h·w, width]``, "nothing" first.

        Args:
            reference: the images.
            positions: ``[B | 1, h·w, 2]`` places of the patches' centres; None: where they lie.
        """
        grid = self.grid(*reference.shape[-2:])
        if positions is None:
            pixels = self.config.patch_size * self.config.stride
            positions = centres(grid, pixels).reshape(1, -1, 2)
        patches = self.embed(reference).flatten(2).transpose(1, 2)
        places = self.place(fourier(positions.to(patches.device), self.config.wavelengths).to(patches.dtype))
        tokens = self.mix(self.norm(patches + places))
        return torch.cat([self.nothing.expand(len(tokens), 1, -1).to(tokens.dtype), tokens], dim=1)
