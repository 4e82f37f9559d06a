"""Which tiles, warps, stages and how many programs: chosen from shapes, dtype and what the device says of itself."""

from __future__ import annotations

import functools
import os
from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor

KIB = 1024
WORKSPACE = 64 * KIB**2  # bytes for one kind of partials, unless a single slot per head needs more
CPU_PROGRAMS = 8  # what the interpreter is given in place of a GPU's processors
PROGRAMS_PER_PROCESSOR = 2
MAX_REGIONS = 64

MaskKind = Literal["keys", "rows"] | None


class Tiles(NamedTuple):
    """``m`` queries by ``n`` keys, and how they are worked on."""

    m: int
    n: int
    num_warps: int
    num_stages: int

    def fit(self, keys: int) -> Tiles:
        """No wider than the keys there are (``tl.dot`` needs 16)."""
        return self._replace(n=min(self.n, max(16, triton.next_power_of_2(keys))))


class Device(NamedTuple):
    """What the choice of tiles depends on.

    Attributes:
        shared: bytes of shared memory one program may take.
        units: what multiplies matrices: "none" (the interpreter), "fma" (NVIDIA before Ampere), "mma", "tmem" (NVIDIA's
            products that arrive in tensor memory), "cdna", "rdna".
    """

    shared: int
    units: str

    @classmethod
    @functools.cache
    def of(cls, device: torch.device) -> Device:
        if device.type != "cuda":
            return cls(64 * KIB, "none")
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            return cls(properties.shared_memory_per_block, "cdna" if properties.warp_size == 64 else "rdna")
        units = "fma" if properties.major < 8 else "tmem" if properties.major == 10 else "mma"
        return cls(properties.shared_memory_per_block_optin, units)


def programs(device: torch.device) -> int:
    """How many programs the device works on at once."""
    if device.type != "cuda":
        return CPU_PROGRAMS
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def head_chunks(d: int) -> tuple[int, int]:
    """``d`` as two power-of-two tile widths: 40 → 32 + 16, of which 8 are live; 64 → 64 + 0."""
    main = max(16, 2 ** (d.bit_length() - 1))
    tail = 0 if d <= main else max(16, triton.next_power_of_2(d - main))
    return main, tail


def attention_tiles(d: int, itemsize: int, device: Device, mask: MaskKind, keys: int) -> Tiles:
    """Pass 1: a query tile and its output stay, keys and values pass by.

    The largest tiles that spill no register up to ``d = 128`` (16-bit, no mask); a mask costs registers. So
    does G2R, which joins where the keys are one tile.
    """
    return _attention_tiles(d, itemsize, device, mask, keys).fit(keys)


def _attention_tiles(d: int, itemsize: int, device: Device, mask: MaskKind, keys: int) -> Tiles:
    width = sum(head_chunks(d))
    match device.units:
        case "none":
            return Tiles(64, 32, 4, 1)
        case "cdna":
            return Tiles(128, 64, 4, 1) if width <= 64 and itemsize == 2 else Tiles(64, 32, 4, 1)
        case "rdna":
            return Tiles(64, 32, 8, 1)
    if itemsize == 4 or device.units == "fma":  # exact fp32 products have no matrix unit on NVIDIA
        return Tiles(32, 16, 4, 1)
    if width > 128:
        return Tiles(64, 32, 4, 2)
    if mask == "rows":
        return Tiles(128, 32, 8, 2)
    if keys <= 64 and mask is None:
        return Tiles(64, 64, 4, 1)
    if device.shared >= 200 * KIB and device.units == "mma" and width <= 64 and mask is None:
        return Tiles(128, 64, 4, 2) if width == 64 else Tiles(64, 128, 4, 2)
    return Tiles(128, 64, 8, 2)


def attribution_tiles(d: int, itemsize: int, device: Device, mask: MaskKind = None, regions: int = 0) -> Tiles:
    """Pass 2: a key tile stays, queries pass by. ``m`` is a multiple of 16."""
    match device.units:
        case "none":
            return Tiles(64, 32, 4, 1)
        case "cdna":
            return Tiles(64, 64, 4, 1)
        case "rdna":
            return Tiles(64, 64, 8, 1)
    if itemsize == 4 or device.units == "fma":
        return Tiles(32, 32, 4, 1)
    if mask == "rows" or regions:
        return Tiles(64, 32, 4, 2)
    if device.units == "tmem":
        return Tiles(64, 64, 4, 1)
    width = sum(head_chunks(d))
    if mask == "keys" or (width > 128 and device.shared < 160 * KIB):
        return Tiles(64, 64, 4, 2)
    return Tiles(64, 128, 4, 3 if width <= 64 else 2)


def columns_tiles(attribution: Tiles) -> Tiles:
    """Between the passes: pass 2's query tiles; its products are the exception, so they may be slow but not large."""
    return attribution._replace(n=32, num_stages=1)


@functools.cache
def per_program(tiles: int, heads: int, at_once: int, slot: int) -> int:
    """How many of a head's tiles one program walks, so that all are done soonest; then, with the fewest programs.

    ``at_once`` programs run side by side. ``slot`` bytes of partials come with each split of all heads; together they
    stay within ``WORKSPACE``, unless one is more.
    """
    most = max(1, min(tiles, 2 * at_once // heads, WORKSPACE // slot))
    splits = min(range(1, most + 1), key=lambda n: (triton.cdiv(heads * n, at_once) * triton.cdiv(tiles, n), n))
    return triton.cdiv(tiles, splits)


def tile_constants(d: int, tiles: Tiles, mask: MaskKind, upcast: bool = False) -> dict:
    """The constants every kernel has, and all of the columns' one."""
    main, tail = head_chunks(d)
    return {
        "D": d,
        "D_MAIN": main,
        "D_TAIL": tail,
        "BM": tiles.m,
        "BN": tiles.n,
        "ROW_MASK": mask == "rows",
        "UPCAST": upcast,
    }


def attention_constants(d: int, keys: int, tiles: Tiles, mask: MaskKind, upcast: bool = False) -> dict:
    return tile_constants(d, tiles, mask, upcast) | {"EVEN_N": keys % tiles.n == 0}


def attribution_constants(
    d: int, keys: int, regions: int, tiles: Tiles, device: Device, mask: MaskKind, upcast: bool = False
) -> dict:
    return tile_constants(d, tiles, mask, upcast) | {
        "EVEN_N": keys % tiles.n == 0,
        "BR": max(16, triton.next_power_of_2(regions)),
        "PRECISION": "tf32x3" if device.units in ("mma", "tmem") else "ieee",
    }


def upcast(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"


def mask_kind(mask: Tensor | None) -> MaskKind:
    """A padding mask is the same in all rows: it is read by keys."""
    return None if mask is None else "keys" if mask.stride(2) == 0 else "rows"


def mask_strides(mask: Tensor | None) -> tuple[int, int, int, int]:
    return (0, 0, 0, 0) if mask is None else mask.stride()
