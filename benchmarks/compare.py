"""Providers of one thing side by side: their times in turn, as ratios to the baseline of the same round, and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from statistics import median

import torch
from memory import Memory


def compare(
    benchmark,
    table: str,
    case: str,
    providers: Mapping[str, Callable[[], object]],
    *,
    around: Mapping[str, Callable] | None = None,
    rounds: int = 7,
    flops: float | None = None,
    processor: bool = False,
) -> dict[str, dict]:
    """Times every provider once a round, in turn, so that a neighbour on the machine slows them all.

    Args:
        table: which table of the report the case belongs to.
        providers: name → what to time; the first is the baseline.
        around: name → a context manager entered around a provider's call, and not timed.
        processor: whether the ratio of processor times is reported, too: what a busy machine does not change much.
        flops: of the forward alone, whoever runs it: on a GPU the rate is reported, too.

    Returns:
        Name → ``seconds`` (median), ``ratio`` (median over rounds to the same round's baseline), ``lowest`` ratio and
        ``extra_bytes`` (peak of one call beyond what was there before; of the baseline, too). Kept in the benchmark's
        ``extra_info``, which the report reads.
    """
    around = around or {}
    times: dict[str, list[float]] = {name: [] for name in providers}
    spent: dict[str, list[float]] = {name: [] for name in providers}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    memory = {}
    for name, provider in providers.items():
        with around.get(name, nullcontext)():
            provider()  # warms up
            with Memory() as meter:
                provider()
        memory[name] = meter.peak
    for _ in range(rounds):
        for name, provider in providers.items():
            with around.get(name, nullcontext)():
                start = time.process_time()
                times[name].append(seconds(provider))
                spent[name].append(time.process_time() - start)
    baseline = times[next(iter(providers))]
    found = {}
    for name, series in times.items():
        ratios = [t / b for t, b in zip(series, baseline, strict=True)]
        found[name] = {
            "seconds": median(series),
            "ratio": median(ratios),
            "lowest": min(ratios),
            "extra_bytes": memory[name],
        }
        if processor:
            pairs = zip(spent[name], spent[next(iter(providers))], strict=True)
            found[name]["processor_ratio"] = median(t / b for t, b in pairs)
        if flops is not None and torch.cuda.is_available():
            found[name]["tflops"] = flops / median(series) / 1e12
    benchmark.extra_info.update(table=table, case=case, providers=found)
    if load is not None:
        benchmark.extra_info.update(load_before=load)
    ours = "i2am" if "i2am" in providers else list(providers)[-1]
    with around.get(ours, nullcontext)():
        benchmark.pedantic(providers[ours], rounds=1)
    return found


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def show(capsys, case: str, found: Mapping[str, dict]) -> None:
    """One line a provider, past pytest's capture."""
    with capsys.disabled():
        print(f"\n{case}")
        for name, row in found.items():
            print(
                f"  {name:24s}{row['seconds'] * 1e3:10.1f} ms {row['ratio']:7.2f} ×  (lowest {row['lowest']:.2f})"
                + (f" {row['processor_ratio']:6.2f} × processor" if "processor_ratio" in row else "")
                + f" {row['extra_bytes'] / 2**20:8.0f} MiB"
                + (f" {row['tflops']:7.1f} TFLOP/s" if "tflops" in row else "")
            )
