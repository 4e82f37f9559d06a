"""What a call costs the host before any GPU works: one ``accumulate`` whose launches do nothing.

A cross-attention of SD 1.5 is a few microseconds of tensor work, and a step has 16 to 70 of them, so what Python does
around the launches decides. Measured on the CPU of any machine, in CPU time of one thread.
"""

import time
from statistics import median

import pytest
import torch

from i2am import ops
from i2am.kernels.tiles import KIB, Device
from i2am.ops import checks, few, launch
from i2am.ops import triton as host

H100 = Device(227 * KIB, "mma", True)


class Nothing:
    """A kernel whose launch does nothing."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.fixture
def idle(monkeypatch):
    """The host side as on an H100, with kernels that do nothing."""
    monkeypatch.setattr(host, "device_of", lambda device: H100)
    monkeypatch.setattr(host, "programs", lambda device: 264)
    monkeypatch.setattr(checks, "_check_triton", lambda q, v: None)
    for module, name in (
        (host.forward, "attention_fwd_kernel"),
        (host.column_lse, "column_lse_kernel"),
        (host.attribution, "attribution_kernel"),
        (launch.accumulate, "accumulate_kernel"),
        (few.few_forward, "few_forward_kernel"),
        (few.few_attribution, "few_attribution_kernel"),
    ):
        monkeypatch.setattr(module, name, Nothing())


@pytest.mark.parametrize("keys", [257, 4096])
@torch.no_grad()
def test_host_cost_of_a_call(benchmark, capsys, idle, keys):
    """Goal: at most 120 µs (an H100's own work for 8 heads of 4096 × 257, d 40, is about 2 µs)."""
    q = torch.randn(2, 64, 8, 40).half().transpose(1, 2)
    k = torch.randn(2, keys, 8, 40).half().transpose(1, 2)
    sums = [ops.Sums(torch.zeros(2, 8, 64), torch.zeros(2, 8, keys))]

    def call():
        ops.accumulate(q, k, k, sums=sums, backend="triton")

    for _ in range(50):
        call()
    turns = []
    for _ in range(7):
        start = time.thread_time()
        for _ in range(500):
            call()
        turns.append((time.thread_time() - start) / 500)
    benchmark.pedantic(call, rounds=3)
    found = {"i2am": {"seconds": median(turns), "extra_bytes": 0}}
    benchmark.extra_info.update(table="host", case=f"64 × {keys}, no launch", providers=found)
    with capsys.disabled():
        low, middle = min(turns) * 1e6, median(turns) * 1e6
        print(f"\n64 × {keys}: {middle:.0f} µs a call on the host, launches apart (lowest {low:.0f})")
