"""SRAM: what registered regions add to a call, what an answer from recorded queries costs, and what a record takes."""

import pytest
import torch
from compare import compare, show
from memory import Memory

import i2am
from i2am._files import show_size
from i2am.maps import sram
from i2am.maps.entries import QKEntry
from i2am.ops import Sums, accumulate


@pytest.mark.parametrize(("Nk", "d"), [(257, 40), (4096, 40)])
def test_registered_regions(benchmark, Nk, d, capsys):
    """8 heads, 4,096 queries: a call with 1, 8, 64 regions over one with none."""
    H, Nq = 8, 4096
    q, k, v = torch.randn(1, H, Nq, d), torch.randn(1, H, Nk, d), torch.randn(1, H, Nk, d)

    def call(R):
        regions = torch.rand(1, R, Nq) if R else None
        sums = Sums(torch.zeros(1, H, Nq), torch.zeros(1, H, Nk), None, torch.zeros(1, H, R, Nk) if R else None)
        return lambda: accumulate(q, k, v, sums=[sums], regions=regions)

    calls = {f"{R} region{'s' * (R > 1)}" if R else "no region": call(R) for R in (0, 1, 8, 64)}
    case = f"8 heads, {Nq} × {Nk}, d {d}"
    show(capsys, case, compare(benchmark, "regions", case, calls))


def recorded(N, H=1, d=64):
    """An entry of ``N`` queries and keys, and its log-sum-exps."""
    q, k = torch.randn(1, H, N, d), torch.randn(1, H, N, d)
    sums = Sums(torch.zeros(1, H, N), torch.zeros(1, H, N))
    _, row_lse, (col_lse,) = accumulate(q, k, None, sums=[sums])
    tensors = {"q": q, "k": k, "row_lse": row_lse, "col_lse": col_lse}
    return QKEntry("layer", "reference", 0, d**-0.5, tensors=tensors)


@pytest.mark.parametrize("what", ["point", "mask of a quarter", "256 cells", "where a point went"])
def test_answers_at_16384(benchmark, what, capsys):
    """One head, 128×128 tokens on both sides; the extra memory of an answer stays under 64 MiB."""
    grid = (128, 128)
    entry = recorded(grid[0] * grid[1])
    quarter = torch.zeros(8, 8)
    quarter[:4, :4] = 1
    weights = {
        "point": sram.region_weights((5, 7), grid),
        "mask of a quarter": sram.region_weights(quarter, grid),
        "256 cells": sram.grid_cells((16, 16)),
        "where a point went": sram.region_weights((5, 7), grid),
    }[what](grid)

    def answer():
        return sram.region_rows(entry, weights, [0], reverse=what.startswith("where"))

    answer()
    with Memory() as memory:
        answer()
    benchmark.pedantic(answer, rounds=3)
    found = {"i2am": {"seconds": benchmark.stats.stats.median, "extra_bytes": memory.peak}}
    benchmark.extra_info.update(table="answers", case=what, providers=found)
    with capsys.disabled():
        print(f"\n{what}: {benchmark.stats.stats.median * 1e3:.0f} ms, {memory.peak / 2**20:.0f} MiB extra")


@torch.no_grad()
def test_what_a_record_takes(benchmark, capsys):
    """SD 1.5 at 512 px, 257 reference tokens, 50 steps, float16: all layers; every 5th step; one group of 5."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()
    reference = i2am.Reference(grid=(16, 16), skip=1)
    inputs = dict(sample=torch.randn(1, 4, 64, 64), timestep=500, encoder_hidden_states=torch.randn(1, 257, 768))
    settings = {"record_dtype": torch.float16, "record_limit": "100GB"}
    with i2am.patch_unet(unet, reference=reference, num_steps=50, record="qk", **settings) as tracer:
        benchmark.pedantic(lambda: unet(**inputs), rounds=1)
        step = tracer.record_bytes
    sizes = {"all 50 steps": 50 * step, "record_every=5": 10 * step, "one time group of 5": 10 * step}
    benchmark.extra_info.update(table="record", case="SD 1.5, 512 px, 257 tokens, float16", record_bytes=sizes)
    with capsys.disabled():
        print("\nSD 1.5, 512 px, float16: " + ", ".join(f"{name} {show_size(n)}" for name, n in sizes.items()))
