"""Ahead-of-time compilation of exactly what is shipped, for GPUs that need not be there.

``python -m i2am.kernels.compile sm_90 gfx942 --head-dims 64 128`` prints one JSON object per configuration: registers,
spills, shared memory and, on NVIDIA, how often each instruction stands in its code. Not under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from i2am.kernels.attention import attention_kernel
from i2am.kernels.attribution import attribution_kernel
from i2am.kernels.columns import columns_kernel
from i2am.kernels.configuration import (
    KIB,
    Device,
    attention_constants,
    attention_tiles,
    attribution_constants,
    attribution_tiles,
    columns_tiles,
    tile_constants,
)
from i2am.kernels.reduce import BLOCK, accumulate_kernel

TARGETS = {
    "sm_75": Device(64 * KIB, "fma"),
    "sm_80": Device(163 * KIB, "mma"),
    "sm_86": Device(99 * KIB, "mma"),
    "sm_89": Device(99 * KIB, "mma"),
    "sm_90": Device(227 * KIB, "mma"),
    "sm_100": Device(227 * KIB, "tmem"),
    "sm_120": Device(99 * KIB, "mma"),
    "gfx942": Device(64 * KIB, "cdna"),
    "gfx1100": Device(64 * KIB, "rdna"),
}
DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}
HEAD_DIMS = (40, 64, 80, 128, 160, 256)
VARIANTS = {  # what changes the code, beside head dim and dtype: keyword → how the kernel is asked for
    "plain": {},
    "edge": {"keys": 257},
    "one tile": {"keys": 49},
    "few keys": {"keys": 16},
    "bool mask": {"mask": "i1", "kind": "rows"},
    "additive mask": {"mask": "fp16", "kind": "rows"},
    "padding mask": {"mask": "i1", "kind": "keys"},
    "mass": {"mass": True},
    "regions": {"regions": 16},
    "no output": {"output": False},
}


OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.M)  # in nvdisasm's listing


class Configuration(NamedTuple):
    """One kernel as a launcher would ask for it."""

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict
    num_warps: int
    num_stages: int

    def compile(self, target: str):
        """Triton's compiled kernel, with ``asm`` and ``metadata``."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        aligned = ("stride_q", "stride_k", "stride_v", "stride_o")  # as the tensors of a model are
        attrs = {
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(self.signature.items())
            if kind.startswith("*") or name.startswith(aligned)
        }
        source = ASTSource(self.kernel, self.signature, self.constants, attrs)
        return triton.compile(source, target=gpu_target(target), options=options)


def gpu_target(target: str) -> GPUTarget:
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    return GPUTarget("hip", target, 32 if target.startswith("gfx1") else 64)


def configuration(name, kernel, pointers, constants, num_warps=4, num_stages=3) -> Configuration:
    """``pointers`` gives the types of pointers that are not to float32; None is an argument that is not passed."""
    constants = constants | {p: None for p, kind in pointers.items() if kind is None}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in pointers or argument.startswith("p_"):
            signature[argument] = f"*{pointers.get(argument, 'fp32')}"
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
    return Configuration(name, kernel, signature, constants, num_warps, num_stages)


def configurations(
    device: Device,
    dtypes: Iterable[str] = DTYPES,
    head_dims: Iterable[int] = HEAD_DIMS,
    variants: Iterable[str] = VARIANTS,
) -> Iterator[Configuration]:
    """Every kernel a launcher would start on ``device``, one after the other."""
    for dtype in dtypes:
        for d in head_dims:
            for variant in variants:
                label = f"{dtype} d={d} {variant}"
                yield from _of_call(label, device, dtype, d, **VARIANTS[variant])
    optional = {"p_mass": None, "p_mass_partial": None, "p_sram": None, "p_sram_partial": None}
    yield configuration("accumulate", accumulate_kernel, optional, {"BLOCK": BLOCK})
    yield configuration("accumulate all", accumulate_kernel, {}, {"BLOCK": BLOCK})


def _of_call(label, device, dtype, d, keys=4096, mask=None, kind=None, mass=False, regions=0, output=True):
    itemsize = DTYPES[dtype]
    tiles = attention_tiles(d, itemsize, device, kind, keys)
    one_tile = keys <= tiles.n
    pointers = {"p_q": dtype, "p_k": dtype, "p_mask": mask}
    outputs = {"p_v": dtype, "p_out": dtype} if output else {"p_v": None, "p_out": None}
    constants = attention_constants(d, keys, tiles, kind)
    g2r = {"p_g2r": "fp32" if one_tile else None}
    yield configuration(f"attention {label}", attention_kernel, pointers | outputs | g2r, constants, *tiles[2:])
    if not output:
        return
    tiles = attribution_tiles(d, itemsize, device, kind, regions).fit(keys)
    optional = {"p_mass": "fp32" if mass else None, "p_g2r": None if one_tile else "fp32"}
    optional |= dict.fromkeys(("p_regions", "p_sram"), "fp32" if regions else None)
    constants = attribution_constants(d, keys, regions, tiles, device, kind)
    yield configuration(f"attribution {label}", attribution_kernel, pointers | optional, constants, *tiles[2:])
    if not (mass or regions):
        tiles = columns_tiles(tiles)
        constants = tile_constants(d, tiles, kind)
        yield configuration(f"columns {label}", columns_kernel, pointers, constants, *tiles[2:])


# ------------------------------------------------------------------------------------------------------- inspection


def inspect(compiled, target: str) -> dict:
    """Registers, spilled bytes, shared memory and, on NVIDIA, instruction counts of a compiled kernel."""
    shared, code = compiled.metadata.shared, assembly(compiled, target)
    if target.startswith("gfx"):
        read = {field: int(re.search(rf"\.{field}:\s+(\d+)", code)[1]) for field in ("vgpr_count", "vgpr_spill_count")}
        return {"registers": read["vgpr_count"], "spills": read["vgpr_spill_count"], "shared": shared}
    usage = _tool("cuobjdump", "-res-usage", compiled.asm["cubin"])
    registers, stack, local = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK", "LOCAL"))
    opcodes = collections.Counter(OPCODE.findall(code))
    return {"registers": registers, "spills": stack + local, "shared": shared, "sass": dict(opcodes)}


def assembly(compiled, target: str) -> str:
    """The machine code as text."""
    return compiled.asm["amdgcn"] if target.startswith("gfx") else _tool("nvdisasm", "-c", compiled.asm["cubin"])


def _tool(name: str, option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        return subprocess.run([tool, option, file], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    for target in options.targets:
        device = TARGETS[target]
        for c in configurations(device, options.dtypes, options.head_dims, options.variants):
            found = {"target": target, "name": c.name, "num_warps": c.num_warps, "num_stages": c.num_stages}
            found["constants"] = c.constants
            try:
                found |= inspect(c.compile(target), target) | {"allowed": device.shared}
            except Exception as error:  # a compiler failure is a finding; the caller decides
                found["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
