"""Starting a kernel: the device, strides and descriptors of its arguments, a workspace, what a failure to build is."""

from __future__ import annotations

import functools
import os
import subprocess
import warnings
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from i2am.kernels import accumulate, tiles
from i2am.kernels.tiles import Call, Device, MaskKind, Tiles, cdiv
from i2am.ops.results import Sums
from i2am.ops.tokens import Span

LOG2E = 1.4426950408889634
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NONE3, NONE4 = (0, 0, 0), (0, 0, 0, 0)


# ------------------------------------------------------------------------------------------------------------- device


@functools.cache
def device_of(device: torch.device) -> Device:
    """Return what the choice of tiles depends on."""
    if device.type != "cuda":
        return Device(64 * tiles.KIB, "none")
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks shared_memory_per_block_optin
    if torch.version.hip is not None:
        return Device(properties.shared_memory_per_block, "cdna" if properties.warp_size == 64 else "rdna")
    units = "fma" if properties.major < 8 else "tmem" if properties.major == 10 else "mma"
    descriptors = properties.major >= 9 and tiles.has_descriptors()
    return Device(properties.shared_memory_per_block_optin, units, descriptors)


def programs(device: torch.device) -> int:
    """Return how many programs the device works on at once."""
    count: int = _processors(device) * tiles.PROGRAMS_PER_PROCESSOR if device.type == "cuda" else tiles.CPU_PROGRAMS
    return count


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# ------------------------------------------------------------------------------------------------------------- launch


class Launch(NamedTuple):
    """One kernel's grid and constants."""

    grid: tuple[int, ...]
    constants: dict[str, Any]
    tiles: Tiles


class Shape(NamedTuple):
    """Shapes and kinds that a plan depends on."""

    call: Call  # keys: all of the call; regions, mass, output
    B: int
    H: int
    Nq: int
    queries: Span
    keys: tuple[Span, ...]
    at_once: int
    unit: int
    out_unit: int


class Workspace:
    """Hands out places; a place may be given back all at once to what comes later."""

    def __init__(self, start: int = 0) -> None:
        self.at = self.size = start

    def place(self, floats: int) -> Span:
        start = self.at
        self.at = start + floats
        end, self.at = self.at, -(-self.at // 64) * 64  # every place is aligned to 256 bytes
        self.size = max(self.size, self.at)
        return start, end


def launch(kernel: Any, what: Launch, *arguments: Any) -> None:
    """Start a kernel. Contraction of multiply-adds is asked for, since not every Triton does it unasked."""
    kernel[what.grid](
        *arguments,
        **what.constants,
        num_warps=what.tiles.num_warps,
        num_stages=what.tiles.num_stages,
        enable_fp_fusion=True,
    )


def start_accumulate(
    total: Sums,
    partials: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    sizes: tuple[int, int, int, int],
    counts: tuple[int, int],
    heads: int,
) -> None:
    """Add partials of R2G, G2R, mass and SRAM to one reference's running sums.

    Args:
        sizes: (H, Q, K, R).
        counts: of key groups and query splits.
    """
    r2g, g2r, mass, sram = partials
    _, Q, K, R = sizes
    grid = heads, cdiv(Q, accumulate.BLOCK) + cdiv(K, accumulate.BLOCK) * (1 + R)
    launch(
        accumulate.accumulate_kernel, Launch(grid, {"BLOCK": accumulate.BLOCK}, accumulate.TILES),
        total.r2g, total.r2g.stride()[:2], total.g2r, total.g2r.stride()[:2],
        None if mass is None else total.mass, (0, 0) if mass is None or total.mass is None else total.mass.stride()[:2],
        None if sram is None else total.sram, NONE3 if sram is None or total.sram is None else total.sram.stride()[:3],
        r2g, g2r, mass, sram, sizes, counts,
    )  # fmt: skip


def head(x: Tensor, what: Launch, rows: int, stop: int | None = None) -> Any:
    """Return what loads tiles of ``x [B, H, N, d]``: its pointer, or a descriptor that gives zeros from ``stop`` on."""
    if not what.tiles.tma:
        return x
    x = x[:, :, :stop]
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, x.shape, x.stride(), [1, 1, rows, what.constants["D_MAIN"]])


def unit_of(*tensors: Tensor | None) -> int:
    """Return the elements of 16 bytes if every tensor and its strides are whole multiples of these, else 1."""
    unit = 1
    for x in tensors:
        if x is None:
            continue
        unit = tiles.unit_of(x.element_size())
        b, h, n, _ = x.stride()
        if x.data_ptr() % 16 or b % unit or h % unit or n % unit:
            return 1
    return unit


def may_describe(unit: int, *tensors: Tensor | None) -> bool:
    """Return whether tensor descriptors may load these: as loads of 16 bytes, and no axis was only expanded."""
    return unit > 1 and all(x is None or 0 not in x.stride() for x in tensors)


def mask_kind(mask: Tensor | None) -> MaskKind:
    """Return "keys" for a mask that is the same in all rows, as a padding mask is."""
    return None if mask is None else "keys" if mask.stride(2) == 0 else "rows"


def strides(x: Tensor, unit: int) -> tuple[int, int, int]:
    """Return the strides of batch, head and token, in units."""
    b, h, n, _ = x.stride()
    return b // unit, h // unit, n // unit


def upcast(call: Call) -> bool:
    return INTERPRETED and call.dtype == "bf16"


def is_compilers(error: Exception) -> bool:
    """Return whether a kernel could not be built or does not fit the device; not whether it went wrong there."""
    if isinstance(error, (OutOfResources, CompilationError, subprocess.CalledProcessError)):
        return True
    text = f"{type(error).__name__}: {error}"
    return any(said in text for said in ("PTXAS", "PassManager::run failed", "C compiler", "LLVM ERROR"))


_warned: set[tuple[str, str]] = set()


def warn_once(device: torch.device, call: Call, heads: int, queries: int, instead: str, error: Exception) -> None:
    """Warn of a configuration that cannot be built, once a head dim, dtype and what it is replaced by."""
    key = f"{call.dtype} {call.d}", instead
    if key in _warned:
        return
    _warned.add(key)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    said = str(error).strip().splitlines() or [""]
    warnings.warn(
        f"i2am: an attention kernel does not build on {name} with Triton {triton.__version__} for {heads} heads, "
        f"{queries} × {call.keys} tokens, d {call.d}, {call.dtype}; such calls run {instead} from now on. "
        f"{type(error).__name__}: {said[0]}",
        RuntimeWarning,
        stacklevel=4,
    )
