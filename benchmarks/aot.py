"""Ahead-of-time compilation of exactly what is shipped, for GPUs that need not be there.

``python -m benchmarks.aot sm_90 gfx942 --head-dims 64 128`` prints one JSON object per configuration: registers,
spills, shared memory and, on NVIDIA, how often each instruction stands in its code. Not under ``TRITON_INTERPRET=1``.

Every file of ``kernels/`` that has a ``configurations(call)`` takes part: it says how a launcher asks for its kernels.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from i2am.kernels.tiles import KIB, Call, Configuration, Device, has_descriptors

TMA = has_descriptors()
TARGETS = {
    "sm_75": Device(64 * KIB, "fma"),
    "sm_80": Device(163 * KIB, "mma"),
    "sm_86": Device(99 * KIB, "mma"),
    "sm_89": Device(99 * KIB, "mma"),
    "sm_90": Device(227 * KIB, "mma", TMA),
    "sm_100": Device(227 * KIB, "tmem", TMA),
    "sm_120": Device(99 * KIB, "mma", TMA),
    "gfx942": Device(64 * KIB, "cdna"),
    "gfx1100": Device(64 * KIB, "rdna"),
}
DTYPES = ("fp16", "bf16", "fp32")
HEAD_DIMS = (40, 64, 72, 80, 128, 160, 256)
VARIANTS = {  # what changes the code, beside head dim and dtype: keyword → how the kernels are asked for
    "plain": {},
    "edge": {"keys": 1025},
    "image tokens": {"keys": 257},
    "one tile": {"keys": 49},
    "few keys": {"keys": 16},
    "bool mask": {"mask": "i1", "kind": "rows"},
    "additive mask": {"mask": "fp16", "kind": "rows"},
    "padding mask": {"mask": "i1", "kind": "keys"},
    "mass": {"mass": True},
    "regions": {"regions": 16},
    "64 regions": {"regions": 64},
    "no output": {"output": False},
    "no output with mass": {"output": False, "mass": True},
    "padded text": {"keys": 77, "mask": "i1", "kind": "keys"},
    "image tokens with regions": {"keys": 257, "regions": 16},
}

OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.M)  # in nvdisasm's listing


def kernel_files() -> list[str]:
    """Return the names of the modules of ``kernels/``, in order."""
    import i2am.kernels

    return sorted(file.stem for folder in i2am.kernels.__path__ for file in Path(folder).glob("[a-z]*.py"))


def configurations(
    device: Device,
    dtypes: Iterable[str] = DTYPES,
    head_dims: Iterable[int] = HEAD_DIMS,
    variants: Iterable[str] = tuple(VARIANTS),
) -> Iterator[Configuration]:
    """Yield every kernel that a launcher would start on ``device``, named ``kernel dtype d=… variant``; none twice."""
    modules = [importlib.import_module(f"i2am.kernels.{name}") for name in kernel_files()]
    seen = set()
    for dtype in dtypes:
        for d in head_dims:
            for variant in variants:
                call = Call(device, dtype, d, **VARIANTS[variant])
                for module in modules:
                    for c in getattr(module, "configurations", lambda call: ())(call):
                        key = repr((c.kernel, c.signature, c.constants, c.tiles))
                        if key not in seen:
                            seen.add(key)
                            yield c._replace(name=f"{c.name} {dtype} d={d} {variant}")


def compile_for(c: Configuration, target: str):
    """Return Triton's compiled kernel, with ``asm`` and ``metadata``."""
    source = ASTSource(c.kernel, c.signature, c.constants, c.attributes)
    options = {"num_warps": c.tiles.num_warps, "num_stages": c.tiles.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=gpu_target(target), options=options)


def gpu_target(target: str) -> GPUTarget:
    """Return what Triton calls ``sm_90`` or ``gfx942``."""
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    return GPUTarget("hip", target, 32 if target.startswith("gfx1") else 64)


# ------------------------------------------------------------------------------------------------------- inspection


def inspect(compiled, target: str) -> dict:
    """Return registers, spilled bytes, shared memory and, on NVIDIA, instruction counts of a compiled kernel."""
    shared, code = compiled.metadata.shared, assembly(compiled, target)
    if target.startswith("gfx"):
        read = {field: int(re.search(rf"\.{field}:\s+(\d+)", code)[1]) for field in ("vgpr_count", "vgpr_spill_count")}
        return {"registers": read["vgpr_count"], "spills": read["vgpr_spill_count"], "shared": shared}
    usage = _tool("cuobjdump", "-res-usage", compiled.asm["cubin"])
    registers, stack, local = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK", "LOCAL"))
    opcodes = collections.Counter(OPCODE.findall(code))
    return {"registers": registers, "spills": stack + local, "shared": shared, "sass": dict(opcodes)}


def assembly(compiled, target: str) -> str:
    """Return the machine code as text."""
    return compiled.asm["amdgcn"] if target.startswith("gfx") else _tool("nvdisasm", "-c", compiled.asm["cubin"])


def _tool(name: str, option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        return subprocess.run([tool, option, file], check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Print one JSON object per configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    for target in options.targets:
        device = TARGETS[target]
        for c in configurations(device, options.dtypes, options.head_dims, options.variants):
            found = {"target": target, "name": c.name, "triton": triton.__version__, **c.tiles._asdict()}
            found["constants"] = {str(name): value for name, value in c.constants.items()}
            try:
                found |= inspect(compile_for(c, target), target) | {"allowed": device.shared}
            except Exception as error:  # a compiler failure is a finding; the caller decides
                found["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
