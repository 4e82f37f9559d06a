"""``python -m benchmarks.gpu`` (``make gpu``): the first minutes on a machine with an NVIDIA GPU, in one command.

It needs torch, Triton and this package; neither diffusers nor a network. In order, and written down as it goes:

1. what there is: card, driver, clocks, versions; copy bandwidth and the rate of a large product;
2. correctness of every path against float64, each repeated eight times bit for bit (a moving answer is a race);
3. times: a captured CUDA graph replayed between events (the host left out) and eager calls back to back (the host
   included), inputs rotated through more than the second-level cache holds; medians; as ratios to the fastest
   ``scaled_dot_product_attention``, TFLOP/s of the forward, and clocks of one processor for 128 × 64 scores;
4. memory at 65,536 × 65,536, and how often the exact column path ran;
5. the GPU tests in several processes, ``compute-sanitizer`` on a small case, ``ncu`` where there is one.

Output: ``gpu.json`` and ``gpu.md`` (``docs/benchmarks.md`` includes it). ``--dry`` runs all of it, tiny, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import i2am
from benchmarks.gpu_page import markdown
from i2am import ops
from i2am.ops import Sums

ROOT = Path(__file__).parent.parent
CASES = [  # heads, queries, keys, head dim: joint attention, then cross-attention
    (16, 4096, 4096, 64), (16, 4096, 4096, 128), (8, 4096, 4096, 40), (4, 16384, 16384, 64), (4, 16384, 16384, 128),
    (16, 4096, 257, 40), (16, 4096, 77, 40), (16, 4096, 16, 40), (20, 1024, 257, 64),
]  # fmt: skip
CHECKED = [
    (2, 1025, 257, 40), (2, 1025, 49, 40), (2, 2048, 2048, 64), (2, 1000, 1111, 128), (2, 300, 77, 160),
    (2, 257, 300, 256), (2, 257, 600, 72), (1, 1, 1, 64), (2, 1024, 640, 40),
]  # fmt: skip
TINY = [(2, 65, 49, 40)]
TOLERANCE = {"out": 0.03, "statistics": 1e-3}  # of the peak; half precision output against float64
SCORES = 8192


class Run:
    """The findings, written to disk after every step."""

    def __init__(self, folder: Path, dry: bool):
        self.folder, self.dry, self.found = folder, dry, {}
        self.device = "cpu" if dry else "cuda"
        self.backend = "streaming" if dry else "triton"
        self.started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def note(self, key: str, value: object) -> None:
        """Keep a finding, on disk and on the screen."""
        self.found[key] = value
        self.found["seconds"] = round(time.monotonic() - self.started, 1)
        (self.folder / "gpu.json").write_text(json.dumps(self.found, indent=1, default=str) + "\n", encoding="utf-8")
        (self.folder / "gpu.md").write_text(markdown(self.found), encoding="utf-8")
        print(f"[{self.found['seconds']:6.1f} s] {key}: {json.dumps(value, default=str)[:400]}", flush=True)


def qkv(run: Run, case: tuple[int, int, int, int], dtype: torch.dtype, sets: int = 1) -> list[tuple[Tensor, ...]]:
    """Return q, k and v as a model passes them: ``[1, N, H, d]`` transposed, so that a head's stride is d."""
    H, Nq, Nk, d = case
    return [
        tuple(torch.randn(1, N, H, d, device=run.device).to(dtype).transpose(1, 2) for N in (Nq, Nk, Nk))
        for _ in range(sets)
    ]


# ------------------------------------------------------------------------------------------------------- what there is


def describe(run: Run) -> dict[str, object]:
    """Return versions, the card and its clocks."""
    found: dict[str, object] = {"python": platform.python_version(), "i2am": i2am.__version__}
    found["torch"] = str(torch.__version__)
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if run.dry:
        return found | {"card": "none: a dry run on a CPU"}
    properties = torch.cuda.get_device_properties(0)
    found |= {"card": properties.name, "processors": properties.multi_processor_count, "cuda": torch.version.cuda}
    found["capability"] = f"{properties.major}.{properties.minor}"
    fields = "driver_version,clocks.max.sm,clocks.sm,power.limit"
    said = output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    return found | dict(zip(fields.split(","), said.strip().split(", "), strict=False))


def output(command: list[str], timeout: float = 60) -> str:
    """Return what a command says, or that it is missing or failed."""
    if shutil.which(command[0]) is None and not Path(command[0]).exists():
        return f"{command[0]}: not installed"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return f"{command[0]}: no answer in {timeout:.0f} s"
    return done.stdout if done.returncode == 0 else f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


def rates(run: Run) -> dict[str, float]:
    """Return copy bandwidth and the rate of a large bfloat16 product: what this card does on this day."""
    n, m = (1 << 12, 64) if run.dry else (1 << 30, 8192)
    x = torch.randn(n, device=run.device).half()
    y = torch.empty_like(x)
    a, b = (torch.randn(m, m, device=run.device).bfloat16() for _ in range(2))
    copy, product = (milliseconds(run, call, 5) for call in (lambda: y.copy_(x), lambda: a @ b))
    return {"copy TB/s": round(4 * n / copy / 1e9, 3), "bf16 product TFLOP/s": round(2 * m**3 / product / 1e9, 1)}


# --------------------------------------------------------------------------------------------------------- correctness


def beside(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Return the model's own output and both maps by the sweeps behind it."""
    from i2am.ops.stock import forward_with_lse

    found = forward_with_lse(q, k, v)
    assert found is not None, "PyTorch's choice here does not tell its log-sum-exp"
    sums = Sums(*(torch.zeros(*q.shape[:2], N, device=q.device) for N in (q.shape[2], k.shape[2])))
    ops.accumulate(q, k, None, sums=[sums], row_lse=found[1])
    return {"out": found[0], "r2g": sums.r2g, "g2r": sums.g2r}


def verify(run: Run) -> dict[str, object]:
    """Return the largest errors; raises nothing: what fails is named."""
    worst: dict[str, float] = {}
    failures: list[str] = []
    repeats = 1 if run.dry else 8
    for dtype in (torch.float32,) if run.dry else (torch.float16, torch.bfloat16, torch.float32):
        for case in TINY if run.dry else CHECKED:
            ((q, k, v),) = qkv(run, case, dtype)
            Nq, Nk = case[1:3]
            variants: dict[str, dict] = {"all": {}}
            if Nk > 3:
                variants["spans"] = {"queries": slice(Nq // 3, None), "keys": slice(2, Nk - 1)}
                variants["mask"] = {"attn_mask": torch.rand(Nq, Nk, device=run.device) < 0.7}
            for name, arguments in variants.items():
                where = f"{name} {'×'.join(map(str, case))} {dtype}".replace("torch.", "")
                try:
                    first = i2am.attention(q, k, v, backend=run.backend, **arguments)
                    for _ in range(repeats):
                        again = i2am.attention(q, k, v, backend=run.backend, **arguments)
                        if not all(x is None or torch.equal(x, y) for x, y in zip(first, again, strict=True)):
                            failures.append(f"{where}: the answer MOVES (a race)")
                            break
                    want = i2am.attention(q, k, v, backend="reference", **arguments)
                    compare_outputs(first._asdict(), want._asdict(), where, worst, failures)
                    if name == "all" and not run.dry and case[3] % 8 == 0 and dtype != torch.float32:
                        compare_outputs(beside(q, k, v), want._asdict(), f"sweeps {where}", worst, failures)
                except Exception as error:
                    failures.append(f"{where}: {type(error).__name__}: {str(error)[:200]}")
    return {"largest errors, of the peak": {k: float(f"{v:.2g}") for k, v in worst.items()}, "failures": failures}


def compare_outputs(got: dict, want: dict, where: str, worst: dict[str, float], failures: list[str]) -> None:
    """Note the error of every output that both have, relative to its peak (log-sum-exps: absolute)."""
    for name, y in want.items():
        x = got.get(name)
        if x is None or y is None:
            continue
        finite = ~y.isneginf()
        peak = 1.0 if name.endswith("lse") else y[finite].abs().max().clamp(min=1e-30)
        error = float((x.double() - y)[finite].abs().max() / peak) if finite.any() else 0.0
        key = f"{'sweeps ' * where.startswith('sweeps')}{name} {where.split()[-1]}"
        worst[key] = max(worst.get(key, 0.0), error)
        if not error < TOLERANCE["out" if name == "out" else "statistics"]:
            failures.append(f"{where}: {name} is off by {error:.1e}")


# -------------------------------------------------------------------------------------------------------------- times


def milliseconds(run: Run, call: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call, between events on a GPU."""
    call()
    if run.dry:
        start = time.perf_counter()
        call()
        return max((time.perf_counter() - start) * 1e3, 1e-6)
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / repeats)
    return statistics.median(times)


def timed(run: Run, provider: Callable[..., object], sets: list[tuple[Tensor, ...]]) -> dict[str, float | str | None]:
    """Return ``graph`` and ``eager`` milliseconds of one call, over all sets of inputs in turn."""

    def turn() -> None:
        for each in sets:
            provider(*each)

    eager = milliseconds(run, turn, 3) / len(sets)
    if run.dry:
        return {"graph": None, "eager": eager}
    try:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            turn()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            turn()
        for _ in range(5):
            graph.replay()
        repeats = max(1, min(50, int(30 / max(milliseconds(run, graph.replay, 1), 1e-3))))
        return {"graph": milliseconds(run, graph.replay, repeats) / len(sets), "eager": eager}
    except RuntimeError as error:
        return {"graph": None, "eager": eager, "not captured": str(error)[:200]}


def attempted(run: Run, provider: Callable[..., object], sets: list[tuple[Tensor, ...]]) -> dict:
    """Return :func:`timed`, or what went wrong: one provider's failure is a finding and not the end."""
    try:
        return timed(run, provider, sets)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:200]}"}


def sdpa(name: str) -> Callable[..., Tensor]:
    """Return ``scaled_dot_product_attention`` by one of its backends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def maps_only(q: Tensor, k: Tensor, v: Tensor) -> None:
    """The maps beside an output that somebody else makes, without its log-sum-exp."""
    (B, H, Nq, _), Nk = q.shape, k.shape[2]
    sums = [Sums(*(torch.zeros(B, H, N, device=q.device) for N in (Nq, Nk)))]
    ops.accumulate(q, k, None, sums=sums)


def providers(run: Run) -> dict[str, Callable[..., object]]:
    """Return what is timed: PyTorch's kernels first."""
    ours = {"i2am": lambda q, k, v: i2am.attention(q, k, v), "i2am, maps only": maps_only}
    if run.dry:
        return {"sdpa": F.scaled_dot_product_attention} | ours
    theirs = {f"sdpa {n.split('_')[0].lower()}": sdpa(n) for n in ("FLASH_ATTENTION", "CUDNN_ATTENTION")}
    return {"sdpa": F.scaled_dot_product_attention} | theirs | ours | {"sdpa + sweeps": beside}


def times(run: Run, clock: float, processors: int) -> None:
    """Time every case, and note each as it is done."""
    rows: dict[str, dict] = {}
    for dtype in (torch.float32,) if run.dry else (torch.bfloat16, torch.float16):
        for case in TINY if run.dry else CASES if dtype == torch.bfloat16 else CASES[:3]:
            H, Nq, Nk, d = case
            sets = qkv(run, case, dtype, 1 if run.dry else min(16, 1 + (100 << 20) // (2 * H * d * (Nq + 2 * Nk))))
            row: dict[str, dict] = {}
            for name, provider in providers(run).items():
                row[name] = attempted(run, provider, sets)
            theirs = [t["graph"] for n, t in row.items() if n.startswith("sdpa") and "+" not in n and t.get("graph")]
            fastest = min(theirs, default=None)
            for found in row.values():
                if found.get("graph") and fastest:
                    found["ratio"] = found["graph"] / fastest
                    found["TFLOP/s"] = 4e-9 * H * Nq * Nk * d / found["graph"]
                    found["clocks a tile"] = found["graph"] * 1e3 * clock * processors / (H * Nq * Nk / SCORES)
            rows[f"{dtype} {H} × {Nq} × {Nk} × {d}".removeprefix("torch.")] = row
            run.note("times", rows)


# ---------------------------------------------------------------------------------------------------- memory and range


def memory(run: Run) -> dict[str, object]:
    """Return what one call takes beyond inputs and results at 65,536 tokens a side, and that its sums are right."""
    n = 256 if run.dry else 65536
    ((q, k, v),) = qkv(run, (1, n, n, 64), torch.float32 if run.dry else torch.float16)
    if not run.dry:
        i2am.attention(q, k, v)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    found = i2am.attention(q, k, v)
    peak = None if run.dry else (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"tokens": n, "MiB": peak, "r2g sums to": float(found.r2g.sum()), "g2r sums to": float(found.g2r.sum())}


def exact_columns(run: Run) -> dict[str, float]:
    """Return the share of columns whose running sums were unusable, by the logits' standard deviation."""
    from i2am.ops import triton as host

    shares: dict[str, float] = {}
    shape = (1, 64, 384, 40) if run.dry else (8, 4096, 4096, 64)  # more keys than those that take two launches
    if run.dry and os.environ.get("TRITON_INTERPRET") != "1":
        return shares
    for spread in (1.0, 3.0, 10.0):
        ((q, k, v),) = qkv(run, shape, torch.float32 if run.dry else torch.float16)
        kept: list[Tensor] = []
        real = host.launch

        def launch(kernel, what, *arguments, real=real, kept=kept):
            real(kernel, what, *arguments)
            if kernel is host.forward.attention_fwd_kernel:
                kept.append(arguments[11].clone())

        host.launch = launch
        try:
            i2am.attention(q * spread, k, v, backend="triton")
        finally:
            host.launch = real
        sums = kept[0]
        shares[f"logits' std {spread:g}"] = float((~(sums >= 2.0**-56)).float().mean())
    return shares


# ------------------------------------------------------------------------------------------------------------ and then


def tests(run: Run, processes: int) -> str:
    """Run the GPU tests in several processes, each its share of them; return their last lines."""
    listed = output([sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/test_gpu.py"], 120)
    names = [line for line in listed.splitlines() if "::" in line]
    if run.dry or not names:
        return f"{len(names)} tests collected"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    shares = [names[i::processes] for i in range(processes)]
    running = [
        subprocess.Popen([*command, *share], stdout=subprocess.PIPE, text=True, cwd=ROOT) for share in shares if share
    ]
    return "\n".join(process.communicate()[0][-1500:] for process in running)


SMALL = """
import torch, i2am
q, k, v = (torch.randn(1, 2, 130, 64, device="cuda").half() for _ in range(3))
i2am.attention(q, k, v)
torch.cuda.synchronize()
"""
COUNTERS = ",".join(
    f"{name}.avg.pct_of_peak_sustained_active"
    for name in ("sm__inst_issued", "sm__warps_active", "sm__pipe_tensor_cycles")
)


def tools(run: Run) -> dict[str, str]:
    """Run compute-sanitizer on a small case, and ncu's counters of each kernel, where they are installed."""
    if run.dry:
        return {}
    sanitizer = output(["compute-sanitizer", "--tool", "memcheck", sys.executable, "-c", SMALL], 120)
    counters = output(["ncu", "--metrics", COUNTERS, sys.executable, "-c", SMALL], 120)
    return {"compute-sanitizer": sanitizer[-1500:], "ncu": counters[-3000:]}


def main(argv: list[str] | None = None) -> int:
    """Run everything; return 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU: only that the program itself runs")
    parser.add_argument("--processes", type=int, default=6, help="for the GPU tests (default 6)")
    options = parser.parse_args(argv)
    if not options.dry and not torch.cuda.is_available():
        parser.error("no NVIDIA GPU here; --dry runs the program itself, tiny, on a CPU")
    run = Run(options.out, options.dry)
    there = describe(run)
    run.note("there", there)
    with torch.no_grad():
        run.note("rates", rates(run))
        run.note("correctness", verify(run))
        clock = float(str(there.get("clocks.max.sm", "1755")).split()[0]) * 1e6 if not run.dry else 1e9
        times(run, clock, int(str(there.get("processors", 1))))
        run.note("memory", memory(run))
        run.note("exact columns", exact_columns(run))
    run.note("tools", tools(run))
    run.note("tests", tests(run, options.processes))
    return 1 if run.found["correctness"]["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
