"""Models whose tokens are shared out over processes: every process draws the maps of one."""

import pytest
import torch

import i2am
from tests.helpers.context_parallel import one_process, processes, saved

TIGHT = 2e-5  # of the peak


def assert_alike(got: i2am.AttributionMaps, want: i2am.AttributionMaps, case: str) -> None:
    """Every sum of every layer, and what levels and points make of them."""
    assert got.layers == want.layers
    assert [s.reference for s in got._sums] == [s.reference for s in want._sums]
    for one, other in zip(got._sums, want._sums, strict=True):
        assert one.counts == other.counts
        for name in ("r2g", "g2r", "mass", "sram"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None) == (b is None), name
            if a is not None:
                off = float((a - b).abs().max() / b.abs().max())
                assert off <= TIGHT, f"{case}, {one.layer}, {one.reference}: {name} is off by {off:.1e} of the peak"
    for level in ("ulam", "tlam", "hlam", "llam"):
        for direction in ("r2g", "g2r"):
            a, b = (getattr(m, level)(direction, reference=m.references[0]) for m in (got, want))
            assert (a - b).abs().max() <= TIGHT * b.abs().max(), (case, level, direction)


def compare(count, cases, folder):
    said = processes(count, cases, folder)
    for case in cases:
        want, picture = one_process(case)
        drawn = torch.load(folder / f"{case}.picture")
        assert (drawn - picture).abs().max() <= 1e-4, case  # the parallel run itself is the same
        every = [i2am.AttributionMaps.load(saved(folder, case, r)) for r in range(count)]
        for rank, maps in enumerate(every):
            assert f"traced {case}" in said[rank]
            assert_alike(maps, want, case)
            for one, first in zip(maps._sums, every[0]._sums, strict=True):
                assert torch.equal(one.r2g, first.r2g)
                assert torch.equal(one.g2r, first.g2r)
            shared = maps.provenance["processes"]
            assert shared["ring"] * shared["ulysses"] == count
        assert want.provenance["processes"] is None
        if want._entries:
            for point in ((3, 4), (12, 20)):
                a, b = (
                    m.sram(point) if len(m.references) == 1 else m.sram(point, reference="reference")
                    for m in (every[-1], want)
                )
                assert (a - b).abs().max() <= TIGHT * b.abs().max(), (case, point)
    return said


def test_ulysses_and_a_ring(tmp_path):
    compare(2, ["ulysses", "ring"], tmp_path)


@pytest.mark.slow
def test_two_processes(tmp_path):
    compare(2, ["ulysses anything", "ring anything", "flux2", "qwen", "wan", "wan over a ring"], tmp_path)


@pytest.mark.slow
def test_ip_adapters_whose_tokens_every_process_has(tmp_path):
    compare(2, ["ip-adapters", "ip-adapters over a ring", "ip-adapters, uneven"], tmp_path)


@pytest.mark.slow
def test_four_processes_both_ways(tmp_path):
    compare(4, ["unified", "ip-adapters both ways"], tmp_path)


@pytest.mark.slow
def test_what_can_not_be_seen_is_refused(tmp_path):
    cases = ["ring of the native backend", "plan of one's own", "probe"]
    reasons = (
        "Native attention does not support return_lse",  # diffusers' own: its ring needs another backend
        "is split over processes by a cp_plan of its caller's own",
        "runs with a parallel_config that is not the traced model's",
    )
    for said in processes(2, cases, tmp_path):
        for case, reason, line in zip(cases, reasons, said.splitlines(), strict=True):
            assert line.startswith(f"refused {case}")
            assert reason in line
