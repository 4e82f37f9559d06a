"""Which tiles, warps, stages and how many programs: chosen from shapes, dtype and what the device says of itself.

Nothing here needs torch. A kernel's file says with :func:`configuration` how a launcher asks for it, so that
``benchmarks.aot`` compiles exactly what is launched.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import triton

KIB = 1024
WORKSPACE = 64 * KIB**2  # bytes for one kind of partials, unless a single slot per head needs more
CPU_PROGRAMS = 8  # what the interpreter is given in place of a GPU's processors
PROGRAMS_PER_PROCESSOR = 2
MAX_REGIONS = 64
MOST_SPLITS = 64  # of the queries where keys are few: each program of the second launch merges what they leave
FEW_KEYS = 320  # up to here a call takes two launches (few_forward, few_attribution): starting more costs too much
FALLBACKS = 3  # smaller tiles that are tried where the table's do not compile or fit

MaskKind = Literal["keys", "rows"] | None


class Tiles(NamedTuple):
    """``m`` queries by ``n`` keys, and how they are worked on; ``tma``: loaded by tensor descriptors."""

    m: int
    n: int
    num_warps: int
    num_stages: int
    tma: bool = False

    def fit(self, keys: int) -> Tiles:
        """Return tiles no wider than the keys there are (``tl.dot`` needs 16)."""
        return self._replace(n=min(self.n, max(16, power_of_two_above(keys))))


class Device(NamedTuple):
    """Limits of a device that the choice of tiles depends on.

    Attributes:
        shared: bytes of shared memory one program may take.
        units: what multiplies matrices: "none" (the interpreter), "fma" (NVIDIA before Ampere), "mma", "tmem" (NVIDIA's
            products that arrive in tensor memory), "cdna", "rdna".
        tma: it loads tiles by tensor descriptors, and so does the Triton at hand.
    """

    shared: int
    units: str
    tma: bool = False


def has_descriptors() -> bool:
    """Return whether this Triton takes tensor descriptors from the host (3.4 and later)."""
    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
    return version >= (3, 4)


def cdiv(a: int, b: int) -> int:
    """Return ``⌈a / b⌉``. Triton's own are for device code, and cost the host a hundred times as much."""
    return -(-a // b)


def power_of_two_above(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def split_head_dim(d: int) -> tuple[int, int]:
    """Return ``d`` as two power-of-two tile widths: 40 → 32 + 16, of which 8 are live; 64 → 64 + 0."""
    main = max(16, 2 ** (d.bit_length() - 1))
    tail = 0 if d <= main else max(16, power_of_two_above(d - main))
    return main, tail


# --------------------------------------------------------------------------------------------------------- the tables


def attention_tiles(d: int, itemsize: int, device: Device, mask: MaskKind, keys: int, level: int = 0) -> Tiles:
    """Return pass 1's tiles: a query tile and its output stay, keys and values pass by.

    The largest that spill no register up to ``d = 128`` (16-bit, no mask); a mask costs registers. ``level`` > 0:
    smaller, for where the table's do not compile.
    """
    tiles = _attention_tiles(d, itemsize, device, mask, keys)
    return _reduced(tiles, level).fit(keys)


def _attention_tiles(d: int, itemsize: int, device: Device, mask: MaskKind, keys: int) -> Tiles:
    width = sum(split_head_dim(d))
    match device.units:
        case "none":
            return Tiles(64, 32, 4, 1, device.tma)
        case "cdna":
            return Tiles(128, 64, 4, 1) if width <= 64 and itemsize == 2 else Tiles(64, 32, 4, 1)
        case "rdna":
            return Tiles(64, 32, 8, 1)
    if itemsize == 4 or device.units == "fma":  # exact fp32 products have no matrix unit on NVIDIA
        return Tiles(32, 16, 4, 1)
    if _is_hopper(device):
        return _hopper_attention_tiles(d, device, mask, keys, width)
    if width > 128:
        return Tiles(64, 32, 4, 2)
    return Tiles(128, 32 if mask == "rows" else 64, 8, 2)


def _hopper_attention_tiles(d: int, device: Device, mask: MaskKind, keys: int, width: int) -> Tiles:
    if loads_tiles(d, device) and keys > 512:
        return Tiles(128, 128 if mask is None else 64, 8, 2, tma=True)
    if width > 128:
        return Tiles(128, 64 if mask is None and width <= 192 else 32, 8, 2)
    if width <= 64 and mask is None:
        return Tiles(128, 64, 4, 2) if width == 64 else Tiles(64, 128, 4, 2)
    return Tiles(128, 64, 8, 2)


def attribution_tiles(
    d: int, itemsize: int, device: Device, mask: MaskKind = None, regions: int = 0, level: int = 0
) -> Tiles:
    """Return pass 2's tiles: a key tile stays, queries pass by. ``m`` is a multiple of 16."""
    return _reduced(_attribution_tiles(d, itemsize, device, mask, regions), level)


def _attribution_tiles(d: int, itemsize: int, device: Device, mask: MaskKind, regions: int) -> Tiles:
    match device.units:
        case "none":
            return Tiles(64, 32, 4, 1, device.tma)
        case "cdna":
            return Tiles(64, 64, 4, 1)
        case "rdna":
            return Tiles(64, 64, 8, 1)
    if itemsize == 4 or device.units == "fma":
        return Tiles(32, 32, 4, 1)
    if regions:  # on Hopper one stage has fewer instructions (2,992 clocks for 3,376 at d 160) and spills nothing
        return Tiles(64, 32, 4, 1 if _is_hopper(device) else 2)
    if mask == "rows":
        return Tiles(64, 64 if _is_hopper(device) else 32, 4, 2)
    if device.units == "tmem":
        return Tiles(64, 64, 4, 1)
    width = sum(split_head_dim(d))
    if mask == "keys" or (width > 128 and device.shared < 160 * KIB):
        return Tiles(64, 64, 4, 2)
    if loads_tiles(d, device):
        return Tiles(64, 128, 4, 3, tma=True)
    return Tiles(64, 128, 4, 3 if width <= 64 else 2)


def few_tiles(d: int, itemsize: int, device: Device, mask: MaskKind = None, regions: int = 0, level: int = 0) -> Tiles:
    """Return the tiles of both launches where keys are few. ``m`` is a multiple of 16."""
    return _reduced(_few_tiles(d, itemsize, device, mask, regions), level)


def _few_tiles(d: int, itemsize: int, device: Device, mask: MaskKind, regions: int) -> Tiles:
    match device.units:
        case "none":
            return Tiles(64, 32, 4, 1)
        case "cdna":
            return Tiles(64, 32, 4, 1)
        case "rdna":
            return Tiles(64, 32, 8, 1)
    if itemsize == 4 or device.units == "fma":
        return Tiles(32, 16, 4, 1)
    wide = sum(split_head_dim(d)) > 128
    return Tiles(64, 32, 4, 2) if wide or regions or mask == "rows" else Tiles(64, 64, 4, 2)


def sweep_tiles(
    d: int, itemsize: int, device: Device, mask: MaskKind = None, regions: int = 0, level: int = 0
) -> Tiles:
    """Return the sweep's tiles: ``n`` of the side that stays, ``m`` (a multiple of 16) of the one that passes by."""
    return _reduced(_attribution_tiles(d, itemsize, device, None if mask is None else "rows", regions), level)


def loads_tiles(d: int, device: Device) -> bool:
    """Return whether tensor descriptors pay: shared memory for whole tiles, and little of their width filled up."""
    return (
        device.tma and device.units == "mma" and device.shared >= 200 * KIB and d in (*range(33, 65), *range(97, 129))
    )


def _is_hopper(device: Device) -> bool:
    return device.units == "mma" and device.shared >= 200 * KIB


def column_tiles(attribution: Tiles) -> Tiles:
    """Return column_lse's tiles: pass 2's queries; products are the exception, so they may be slow but not large."""
    return attribution._replace(n=32, num_stages=1, tma=False)


def _reduced(tiles: Tiles, level: int) -> Tiles:
    """Return what is tried in place of ``tiles``: without descriptors, then without stages and ever smaller."""
    if level == 0:
        return tiles
    if level == 1:
        return tiles._replace(tma=False, num_stages=min(tiles.num_stages, 2))
    small = 64 if level == 2 else 32
    return Tiles(min(tiles.m, small), min(tiles.n, small // 2), 4, 1)


@functools.cache
def tiles_per_program(tiles: int, heads: int, at_once: int, slot: int) -> int:
    """Return tiles per program: minimise waves × tiles per program; on a tie, use fewer programs.

    ``at_once`` programs run side by side. ``slot`` bytes of partials come with each split of all heads; together they
    stay within ``WORKSPACE``, unless one is more.
    """
    most = max(1, min(tiles, 2 * at_once // heads, WORKSPACE // slot))
    splits = min(range(1, most + 1), key=lambda n: (cdiv(heads * n, at_once) * cdiv(tiles, n), n))
    return cdiv(tiles, splits)


# ------------------------------------------------------------------------------------------------ constants of a launch


def unit_of(itemsize: int) -> int:
    """Return elements of 16 bytes, in which strides are given where all are multiples.

    Triton knows of an integer only whether 16 divides it: 40 half-precision features are five loads of 16 bytes all the
    same.
    """
    return 16 // itemsize


def head_constants(d: int, tiles: Tiles, mask: MaskKind, unit: int, upcast: bool = False) -> dict[str, Any]:
    """Return the constants that every kernel with a product has."""
    main, tail = (power_of_two_above(max(16, d)), 0) if tiles.tma else split_head_dim(d)
    return {
        "D": d,
        "D_MAIN": main,
        "D_TAIL": tail,
        "UNIT": 0 if tiles.tma else unit,
        "BM": tiles.m,
        "BN": tiles.n,
        "ROW_MASK": mask == "rows",
        "UPCAST": upcast,
    }


def lane_rows(device: Device, tiles: Tiles, itemsize: int) -> int:
    """Return ``LANE_ROWS`` of :func:`i2am.kernels.primitives.sum_columns`."""
    if device.units == "none":
        return 8 * tiles.num_warps
    # Ampere has too little bandwidth to shared memory for it: there the compiler's butterfly is the cheaper one.
    return 8 * tiles.num_warps if _is_hopper(device) and itemsize == 2 else 0


# -------------------------------------------------------------------------------------------- ahead-of-time compilation


class Call(NamedTuple):
    """An attention call as the choice of code sees it."""

    device: Device
    dtype: str  # Triton's name: fp16, bf16, fp32
    d: int
    keys: int = 4096
    mask: str | None = None  # its dtype in memory: i1, fp16
    kind: MaskKind = None
    mass: bool = False
    regions: int = 0
    output: bool = True
    level: int = 0
    few_keys: int = FEW_KEYS

    @property
    def is_few(self) -> bool:
        """Return whether two launches serve the call."""
        return self.keys <= self.few_keys

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    @property
    def unit(self) -> int:
        """Return what a model's ``[B, N, H, d]`` views allow."""
        unit = unit_of(self.itemsize)
        return unit if self.d % unit == 0 else 1


def head_types(call: Call, tiles: Tiles, blocks: Mapping[str, int]) -> dict[str, Any]:
    """Return the types of tensors of heads and of their strides; ``blocks`` are the rows of each that a tile takes."""
    types: dict[str, Any] = {}
    for name, rows in blocks.items():
        block = f"1, 1, {rows}, {power_of_two_above(max(16, call.d))}"
        types[name] = f"tensordesc<{call.dtype}[{block}]>" if tiles.tma else f"*{call.dtype}"
        types[f"{name}_strides"] = ("i32",) * 3
    return types


def mask_types(call: Call) -> dict[str, Any]:
    """Return the types of a mask and its strides: ``[1, 1, Nq, Nk]`` expanded, or ``[B, 1, 1, Nk]``; 16 divides Nk."""
    if call.mask is None:
        return {"mask_strides": ("i32",) * 4}
    return {"mask": f"*{call.mask}", "mask_strides": ("i32:16", "i32:16", "i32:16", 1)}


def size_types(call: Call) -> dict[str, Any]:
    """Return the types of scale, sizes and spans; 16 divides a model's tokens, unless the call says otherwise."""
    keys = "i32:16" if call.keys % 16 == 0 else "i32"
    spans = {"query_span": ("i32:16",) * 2, "key_span": ("i32:16", keys)}
    return {"scale": "fp32", "sizes": ("i32", "i32:16", keys)} | spans


class Configuration(NamedTuple):
    """One kernel as a launcher would ask for it."""

    name: str
    kernel: triton.JITFunction
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    tiles: Tiles


def configuration(
    name: str, kernel: triton.JITFunction, types: Mapping[str, Any], constants: Mapping[str, Any], tiles: Tiles
) -> Configuration:
    """Describe one launch: ``types`` names every argument that is passed and no ``tl.constexpr``.

    A pointer's type starts with ``*`` and is taken to be aligned to 16 bytes, as torch's memory is; a tuple is a tuple
    of types. ``i32:16`` is a multiple of 16 and 1 is one: a launch tells Triton of both, in tuples whatever
    ``do_not_specialize`` says. What neither ``types`` nor ``constants`` holds is None.
    """
    signature: dict[str, Any] = {}
    values: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in types:
            kind = types[argument]
            signature[argument] = kind
            if str(kind).startswith("*"):
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(kind, tuple):
                signature[argument] = tuple("constexpr" if each == 1 else each.split(":")[0] for each in kind)
                attributes |= {(i, j): [["tt.divisibility", 16]] for j, each in enumerate(kind) if each == "i32:16"}
                values |= {(i, j): 1 for j, each in enumerate(kind) if each == 1}
        elif argument in constants:
            signature[argument], values[argument] = "constexpr", constants[argument]
        else:
            signature[argument], values[argument] = "constexpr", None
    return Configuration(name, kernel, signature, values, attributes, tiles)
