"""Levels by the definition, written out in numpy: other grids, keys beside the reference's, chosen times and heads."""

import dataclasses

import numpy as np
import pytest
import torch

from i2am.maps import AXES, DIRECTIONS, LEVELS, AttributionMaps, LayerSums, aggregate, sram
from i2am.maps.entries import QKEntry
from i2am.maps.sram import grid_cells, region_rows, region_weights, stack_regions
from tests.helpers.resize import bicubic

T, B, H = 3, 2, 4
CASES = [("a", (4, 6), (3, 2), (2, 2, 1)), ("b", (2, 3), (6, 4), (2, 0, 1)), ("c", (8, 3), (3, 2), (1, 1, 1))]


def layer(name, grid, reference_grid, counts, reference="r", skip=1, others=5, seed=0, **changes):
    g = torch.Generator().manual_seed(seed + ord(name[0]) + 10 * len(reference))
    Q, K = grid[0] * grid[1], skip + reference_grid[0] * reference_grid[1]
    calls = torch.tensor(counts)[:, None, None, None]
    fields = dict(
        layer=name,
        reference=reference,
        grid=grid,
        reference_grid=reference_grid,
        skip=skip,
        keys=K + others,
        default=True,
        counts=counts,
        r2g=torch.rand(T, B, H, Q, generator=g) ** 4 * calls,  # spiky: bicubic rings below zero
        g2r=torch.rand(T, B, H, K, generator=g) ** 4 * calls,
        mass=torch.rand(T, B, H, Q, generator=g) ** 4 * calls,
        sram=torch.rand(T, B, H, 2, K, generator=g) ** 4 * calls[..., None],
    )
    return LayerSums(**(fields | changes))


@pytest.fixture(scope="module")
def maps():
    return AttributionMaps([layer(*case) for case in CASES], regions=["p", "q"])


def by_definition(sums, direction, *, axis=None, times=(0, 1, 2), heads=(0, 1, 2, 3), size, lift=False, values=None):
    """Mean over time → bicubic → clamp at 0 → mean over heads → mean over layers; one axis kept."""
    layers = []
    for s in sums:
        x = (getattr(s, direction) if values is None else values(s)).double().numpy()
        grid = s.reference_grid if direction == "g2r" else s.grid
        x = x[..., s.skip :] if direction == "g2r" else x
        K = s.g2r.shape[-1]
        scale = {"r2g": s.grid[0] * s.grid[1], "g2r": s.keys, "mass": s.keys / K}[direction] if lift else 1

        def on_grid(groups, x=x, s=s, grid=grid, scale=scale):
            calls = sum(s.counts[t] for t in groups)
            with np.errstate(invalid="ignore", divide="ignore"):
                mean = sum(x[t] for t in groups) / calls * scale  # [B, H, N]
            return np.stack(
                [[np.clip(bicubic(mean[b, h].reshape(grid), size), 0, None) for h in heads] for b in range(B)]
            )

        if axis == "time":
            layers.append(np.stack([on_grid([t]).mean(1) for t in times], 1))
        elif axis == "head":
            layers.append(on_grid(times))
        else:
            layers.append(on_grid(times).mean(1)[:, None])
    if axis == "layer":
        return np.concatenate(layers, 1)
    mean = np.nanmean(np.stack(layers), 0)
    return mean if axis else mean[:, 0]


def assert_close(got, want):
    np.testing.assert_allclose(got.numpy(), want, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("lift", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_level(maps, level, direction, lift):
    """Where the reference is some of the keys, and the largest grid is one layer's alone."""
    size = (6, 4) if direction == "g2r" else (4, 6)
    want = by_definition(maps._sums, direction, axis=LEVELS[level].axis, size=size, lift=lift)
    got = getattr(maps, level)(direction, normalize="lift" if lift else "raw")
    assert_close(got, want)


@pytest.mark.parametrize("axis", [None, *AXES])
def test_chosen_times_heads_layers_and_size(maps, axis):
    level = next(name for name, x in LEVELS.items() if x.axis == axis)
    options = dict(times=[2, 0], heads=[-1, 1], layers=["c", "a"], size=(5, 7))
    chosen = [maps._sums[0], maps._sums[2]]
    want = by_definition(chosen, "r2g", axis=axis, times=(2, 0), heads=(3, 1), size=(5, 7))
    assert_close(getattr(maps, level)("r2g", **options), want)
    want = by_definition(
        chosen, "g2r", axis=axis, times=(2, 0), heads=(3, 1), size=(5, 7), values=lambda s: s.sram[..., 1, :]
    )
    assert_close(maps.sram("q", level=axis, **options), want)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_uniform_attention_lifts_to_one(direction):
    """Wherever the reference is among other keys: 1.0 is what attention without any preference gives."""
    s = layer("a", (4, 6), (3, 2), (1, 1, 1))
    Q, K, keys = 24, 7, s.keys
    uniform = {"r2g": 1 / Q, "g2r": 1 / keys, "mass": K / keys}
    s = layer("a", (4, 6), (3, 2), (1, 1, 1), **{d: torch.full_like(getattr(s, d), v) for d, v in uniform.items()})
    found = AttributionMaps([s], regions=["p", "q"]).ulam(direction, normalize="lift")
    torch.testing.assert_close(found, torch.ones_like(found))


def test_the_sum_of_a_raw_map():
    s = layer("a", (4, 6), (3, 2), (1, 1, 1), r2g=torch.rand(T, B, H, 24).softmax(-1))
    total = AttributionMaps([s], regions=["p", "q"]).ulam("r2g").sum((1, 2))
    torch.testing.assert_close(total, torch.ones(B))


def test_a_slice_and_one_number(maps):
    assert maps.tlam("r2g", times=slice(1, None)).equal(maps.tlam("r2g", times=[1, 2]))
    assert maps.hlam("r2g", heads=2).equal(maps.hlam("r2g")[:, 2:3])
    assert maps.tlam("r2g", times=-1).equal(maps.tlam("r2g")[:, 2:])
    for wrong in (-4, 3, [], slice(5, 9)):
        with pytest.raises(IndexError, match="0…2"):
            maps.ulam("r2g", times=wrong)
    for wrong in ((4,), (4, 0), (4.0, 6), "46"):
        with pytest.raises(ValueError, match="size must be"):
            maps.ulam("r2g", size=wrong)
    with pytest.raises(ValueError, match="level must be None or one of time, head, layer, got 'tlam'"):
        maps.sram("p", level="tlam")


def test_layers_of_other_head_counts_have_no_head_maps(maps):
    wide = layer("d", (4, 6), (3, 2), (1, 1, 1))
    wide = layer(
        "d", (4, 6), (3, 2), (1, 1, 1), **{n: getattr(wide, n)[:, :, :2] for n in ("r2g", "g2r", "mass", "sram")}
    )
    mixed = AttributionMaps([*maps._sums, wide], regions=["p", "q"])
    with pytest.raises(ValueError, match=r"equal head count.* a: 4, b: 4, c: 4, d: 2"):
        mixed.hlam("r2g")
    assert mixed.hlam("r2g", layers="d").shape == (B, 2, 4, 6)
    assert mixed.ulam("r2g").shape == (B, 4, 6)
    with pytest.raises(IndexError, match="heads of d=3 picks 3"):
        mixed.ulam("r2g", heads=3)


def test_one_layer_without_a_grid_refuses_the_direction(maps):
    """Also where it is not the first."""
    blind = AttributionMaps(
        [maps._sums[0], dataclasses.replace(maps._sums[2], layer="z", reference_grid=None)], regions=["p", "q"]
    )
    with pytest.raises(ValueError, match="no 2-D layout"):
        blind.ulam("g2r")
    with pytest.raises(ValueError, match="no SRAM"):
        blind.sram("p")
    assert blind.ulam("g2r", layers="a").shape == (B, 3, 2)


# --------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_are_named(maps, value, caplog):
    broken = maps._sums[1].r2g.clone()
    broken[2, 1, 3, 4] = value
    bad = AttributionMaps([maps._sums[0], layer(*CASES[1], r2g=broken), maps._sums[2]], regions=["p", "q"])
    assert bad.not_finite() == {"b": [2]}
    assert maps.not_finite() == {}
    for read in (bad.ulam, bad.tlam, bad.hlam, bad.llam):
        with pytest.raises(
            ValueError, match=r"R2G sums of reference 'r' are not finite .* in b \(time groups 2\).*float16"
        ):
            read("r2g")
    assert bad.ulam("r2g", times=[0, 1]).isfinite().all()
    assert bad.ulam("r2g", layers=["a", "c"]).equal(maps.ulam("r2g", layers=["a", "c"]))
    assert bad.ulam("r2g", heads=[0, 1, 2]).isfinite().all()
    assert bad.ulam("g2r").equal(maps.ulam("g2r"))


def test_maps_of_a_run_warn_of_sums_that_are_not_finite(caplog):
    broken = torch.full((1, 1, 1, 6), torch.nan)
    track = LayerSums("a", "r", (2, 3), (1, 2), 0, 2, True, [1], broken, torch.ones(1, 1, 1, 2))
    with caplog.at_level("WARNING", logger="i2am"):
        AttributionMaps.of([track], {"a"})
    assert "not finite" in caplog.text


# ------------------------------------------------------------------------------------------------- recorded regions


def recorded(reference, names=("a", "b"), groups=(0, 0, 1, 2), mask=None, seed=0):
    """Recorded calls of two layers and the sums that they make, of a reference of 1 + 6 among 12 keys."""
    g = torch.Generator().manual_seed(seed)
    sums, entries, truth = [], [], []
    for name, grid in zip(names, ((4, 6), (2, 3)), strict=True):
        Q, K, d = grid[0] * grid[1], 7, 5
        r2g, g2r = torch.zeros(T, B, H, Q), torch.zeros(T, B, H, K)
        for group in groups:
            q, k = (2 * torch.randn(B, H, n, d, generator=g) for n in (Q, 12))
            s = 0.5 * q @ k.mT
            if mask is not None:
                s = s + mask
            row, column = s.softmax(-1)[..., :K], s[..., :K].softmax(-2)
            r2g[group] += column.mean(-1)
            g2r[group] += row.mean(-2)
            tensors = {"q": q, "k": k[:, :, :K], "row_lse": s.logsumexp(-1), "col_lse": s[..., :K].logsumexp(-2)}
            if mask is not None:
                tensors["mask"] = mask[..., :K].expand(1, H, 1, K)
            entries.append(QKEntry(name, reference, group, 0.5, tensors=tensors))
            truth.append((name, group, row.double(), column.double()))
        counts = tuple(groups.count(t) for t in range(T))
        sums.append(
            LayerSums(
                layer=name, reference=reference, grid=grid, reference_grid=(3, 2), skip=1, keys=12, default=True,
                counts=counts, r2g=r2g, g2r=g2r,
            )
        )  # fmt: skip
    return sums, entries, truth


def rows_of(truth, name, weights, groups, heads, reverse=False):
    """``[B, N]`` of one layer: the mean over calls and heads of the region's rows."""
    calls = [(row, column) for n, t, row, column in truth if n == name and t in groups]
    w = weights.double()
    if reverse:
        found = [torch.einsum("k,bhqk->bhq", w / w.sum(), column[..., 1:]) for _, column in calls]
    else:
        found = [torch.einsum("q,bhqk->bhk", w / w.sum(), row[..., 1:]) for row, _ in calls]
    return torch.stack(found).mean(0)[:, heads].mean(1)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_regions_in_chunks_of_heads_and_tiles_of_rows(small, reverse, monkeypatch):
    if small:
        monkeypatch.setattr(sram, "CHUNK", 1)  # one head at a time
        monkeypatch.setattr(sram, "TILE", 1)  # one row at a time
    sums, entries, truth = recorded("r")
    maps = AttributionMaps(sums, entries=entries)
    grid = (3, 2) if reverse else (4, 6)
    weights = torch.zeros(grid)
    weights[1, 1], weights[2, 0] = 3, 1
    ask = maps.where_did_it_go if reverse else maps.sram
    want = rows_of(truth, "a", weights.flatten(), (0, 2), [1, 3], reverse).reshape(B, *((4, 6) if reverse else (3, 2)))
    assert_close(ask(weights, layers="a", times=[0, 2], heads=[1, 3]), want)
    by_head = torch.stack([rows_of(truth, "a", weights.flatten(), (1,), [h], reverse) for h in range(H)], 1)
    assert_close(ask(weights, layers="a", times=1, level="head"), by_head.unflatten(-1, want.shape[-2:]))
    by_time = torch.stack([rows_of(truth, "a", weights.flatten(), (t,), [0, 1, 2, 3], reverse) for t in range(T)], 1)
    assert_close(ask(weights, layers="a", level="time"), by_time.unflatten(-1, want.shape[-2:]))


def test_correspondences_of_two_references_go_together():
    """Asked layer by layer, now of one reference and then of the other: each gets its own rows, at every level."""
    left, right = recorded("left", seed=1), recorded("right", seed=2)
    maps = AttributionMaps([*left[0], *right[0]], entries=[*left[1], *right[1]])
    for reverse in (False, True):
        ask = maps.correspondences((2, 3), reverse=reverse)
        for name in ("a", "b"):
            for _, (reference, (*_, truth)) in enumerate([("left", left), ("right", right)] * 2):
                for level, axis in ((None, 0), ("time", T), ("head", H)):
                    got = ask(level=level, layers=name, reference=reference)
                    want = maps.correspondence((2, 3), level=level, reverse=reverse, layers=name, reference=reference)
                    assert got.equal(want)
                    assert got.shape[:2] == (B, 6)
                    assert got.ndim == (5 if axis else 4)
                if not reverse:
                    cell = grid_cells((2, 3))({"a": (4, 6), "b": (2, 3)}[name])[0, 4]
                    want = rows_of(truth, name, cell, (0, 1, 2), [0, 1, 2, 3]).reshape(B, 3, 2)
                    assert_close(ask(layers=name, reference=reference)[:, 4], want)
                    got = ask(layers=name, reference=reference, times=1, heads=2)[:, 4]
                    assert_close(got, rows_of(truth, name, cell, (1,), [2]).reshape(B, 3, 2))


def test_unified_rows_are_the_mean_of_both_layers():
    sums, entries, truth = recorded("r")
    maps = AttributionMaps(sums, entries=entries)
    whole = [torch.ones(24), torch.ones(6)]
    want = sum(rows_of(truth, n, w, (0, 1, 2), [0, 1, 2, 3]) for n, w in zip("ab", whole, strict=True)) / 2
    assert_close(maps.sram(torch.ones(4, 6)), want.reshape(B, 3, 2))
    assert_close(maps.ulam("g2r"), want.reshape(B, 3, 2))
    assert maps.canvas == (4, 6)  # the largest grid: in it points are given
    assert maps.sram((3.9, 5.9)).equal(maps.sram((7.5, 11), canvas=(8, 12)))
    assert maps.where_did_it_go((2, 1)).equal(maps.where_did_it_go((5.9, 3.9), canvas=(6, 4)))


@pytest.mark.parametrize("kind", ["additive", "bool"])
def test_rows_keep_a_mask_of_each_head(kind):
    """A mask ``[1, H, 1, K]`` that differs from head to head, for heads that were picked out of order."""
    hidden = torch.rand(1, H, 1, 12, generator=torch.Generator().manual_seed(1)) < 0.3
    _, entries, truth = recorded("r", mask=torch.where(hidden, -torch.inf, 0.0))
    if kind == "bool":
        for e in entries:
            e.tensors["mask"] = ~hidden[..., :7]
    for reverse in (False, True):
        weights = torch.rand(7 if reverse else 24)
        got = region_rows(entries[0], (weights / weights.sum())[None, None], [3, 1], reverse=reverse)
        row, column = truth[0][2:]
        w = weights.double() / weights.double().sum()
        column = column.nan_to_num(0)
        want = torch.einsum("k,bhqk->bhq", w, column) if reverse else torch.einsum("q,bhqk->bhk", w, row)
        assert_close(got[:, 0], want[:, [3, 1]])


def test_stacked_regions_of_one_and_of_each_image():
    point = region_weights((0, 0), (2, 2))
    each = region_weights(torch.stack([torch.eye(2), torch.ones(2, 2)]), (2, 2))
    got = stack_regions([point, each])((2, 2))
    assert got.tolist() == [[[1, 0, 0, 0], [0.5, 0, 0, 0.5]], [[1, 0, 0, 0], [0.25] * 4]]


def test_match_in_tiles_of_regions(monkeypatch):
    sums, entries, truth = recorded("r")
    maps = AttributionMaps(sums, entries=entries)
    whole = maps.match(layers="a")
    monkeypatch.setattr("i2am.maps.MAX_REGIONS", 5)
    for tiled, at_once in zip(maps.match(layers="a"), whole, strict=True):
        torch.testing.assert_close(tiled, at_once)
    one = torch.zeros(24)
    one[2 * 6 + 5] = 1
    p = rows_of(truth, "a", one, (0, 1, 2), [0, 1, 2, 3])
    best = p.argmax(-1)
    assert whole.best[:, 2, 5].tolist() == [[b // 2 + 0.5, b % 2 + 0.5] for b in best.tolist()]
    p = p / p.sum(-1, keepdim=True)
    assert_close(whole.confidence[:, 2, 5], 1 + (p * p.log()).sum(-1) / np.log(6))
    assert_close(whole.expected[:, 2, 5, 0], (p.reshape(B, 3, 2).sum(2) * (torch.arange(3) + 0.5)).sum(1))
    assert_close(whole.expected[:, 2, 5, 1], (p.reshape(B, 3, 2).sum(1) * (torch.arange(2) + 0.5)).sum(1))


def test_more_calls_in_a_group_weigh_more():
    """Two of four recorded calls lie in group 0: a mean over calls, not over groups."""
    sums, entries, truth = recorded("r")
    maps = AttributionMaps(sums, entries=entries)
    one = torch.zeros(4, 6)
    one[1, 2] = 1
    calls = [row[:, :, 8, 1:].mean(1) for n, _, row, _ in truth if n == "a"]
    assert_close(maps.sram((1, 2), layers="a"), torch.stack(calls).mean(0).reshape(B, 3, 2))
    groups = torch.stack([torch.stack(calls[:2]).mean(0), *calls[2:]]).mean(0).reshape(B, 3, 2)
    assert (maps.sram((1, 2), layers="a") - groups).abs().max() > 1e-3


def test_nothing_recorded_in_a_group_is_nan_there_only():
    sums, entries, _ = recorded("r")
    maps = AttributionMaps(sums, entries=[e for e in entries if e.group != 1])
    assert maps.sram((0, 0), level="time").isnan().flatten(2).all(2).tolist() == [[False, True, False]] * B
    assert maps.sram((0, 0)).isfinite().all()


# -------------------------------------------------------------------------------------------- xarray and pandas


@pytest.mark.parametrize("level", LEVELS)
def test_labelled_arrays(maps, level):
    pytest.importorskip("xarray", reason="xarray is not installed")
    axis = LEVELS[level].axis
    options = {"layers": ["c", "a"], "times": [2, 0], "heads": [1, 3]}
    x = maps.to_xarray("r2g", level, **options)
    assert x.dims == ("image", *([axis] if axis else []), "y", "x")
    np.testing.assert_array_equal(x.values, getattr(maps, level)("r2g", **options).numpy())
    places = {"time": [2, 0], "head": [1, 3], "layer": ["a", "c"]}
    assert axis is None or x[axis].values.tolist() == places[axis]
    assert x["y"].values.tolist() == pytest.approx([0.125, 0.375, 0.625, 0.875])
    assert x.attrs == {"direction": "r2g", "level": level, "units": "probability (column softmax)", "reference": "r"}
    assert maps.to_xarray("mass", level, normalize="lift").attrs["units"] == "times uniform"


@pytest.mark.parametrize("level", LEVELS)
def test_tables(maps, level):
    pytest.importorskip("pandas", reason="pandas is not installed")
    axis = LEVELS[level].axis
    table = maps.to_pandas("g2r", level, size=(3, 2), times=[1, 2])
    assert list(table.columns) == ["image", *([axis] if axis else []), "y", "x", "value"]
    values = getattr(maps, level)("g2r", size=(3, 2), times=[1, 2]).numpy()
    assert len(table) == values.size
    place = {"time": ("time", 2, 1), "head": ("head", 3, 3), "layer": ("layer", "b", 1)}.get(axis)
    row = table[(table.image == 1) & (table.y == 2) & (table.x == 1)]
    at = (1, 2, 1) if place is None else (1, place[2], 2, 1)
    row = row if place is None else row[row[place[0]] == place[1]]
    assert row.value.tolist() == [pytest.approx(values[at], nan_ok=True)]
    with pytest.raises(ValueError, match="level must be one of ulam, tlam, hlam, llam, got 'time'"):
        maps.to_pandas("g2r", "time")


def test_aggregation_reads_each_layer_once(maps, monkeypatch):
    """A generator that is read layer by layer: a report goes through a run's layers once."""
    asked = []
    original = aggregate.RunningSums.values
    monkeypatch.setattr(
        aggregate.RunningSums, "values", lambda self, s, *a: asked.append(s.layer) or original(self, s, *a)
    )
    maps.tlam("r2g")
    assert asked == ["a", "b", "c"]


def test_cells_go_row_by_row():
    """Cell 1 of 2 × 3 is the top row's middle; a cell that cuts tokens takes its share of them."""
    cell = grid_cells((2, 3))((4, 6))[0, 1].reshape(4, 6)
    want = torch.zeros(4, 6)
    want[:2, 2:4] = 0.25
    torch.testing.assert_close(cell, want)
    cut = grid_cells((1, 2))((1, 3))[0]
    torch.testing.assert_close(cut, torch.tensor([[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]))


def test_a_region_of_each_image():
    """Masks that share no token: every image is asked about its own."""
    sums, entries, truth = recorded("r")
    maps = AttributionMaps(sums, entries=entries)
    masks = torch.zeros(2, 4, 6)
    masks[0, 0, 1], masks[1, 3, 4] = 1, 1
    got = maps.sram(masks, layers="a")
    for i, mask in enumerate(masks):
        want = rows_of(truth, "a", mask.flatten(), (0, 1, 2), [0, 1, 2, 3])[i].reshape(3, 2)
        assert_close(got[i], want)
    with pytest.raises(ValueError, match="a mask for each of 3 images, but the maps hold 2"):
        maps.sram(torch.ones(3, 4, 6))


def test_points_on_the_reference_are_given_on_its_largest_grid(maps):
    """Layers may see the reference at two resolutions; (5, 3) is a token of the finer one."""
    asked = AttributionMaps(maps._sums, regions=["p", "q"], entries=[QKEntry("elsewhere", "r", 0, 1.0)])
    assert asked.where_did_it_go((5, 3)).isnan().all()  # nothing is recorded, but the point is one
    for outside in ((6, 3), (5, 4)):
        with pytest.raises(IndexError, match="valid are 0 ≤ y < 6 and 0 ≤ x < 4"):
            asked.where_did_it_go(outside)
    with pytest.raises(IndexError, match="valid are 0 ≤ y < 3 and 0 ≤ x < 2"):
        asked.where_did_it_go((5, 3), layers=["a", "c"])


def test_a_layer_that_did_not_run_leaves_head_maps_to_the_others(maps):
    assert maps.hlam("r2g", times=1).equal(maps.hlam("r2g", times=1, layers=["a", "c"]))  # b ran in groups 0 and 2
    assert maps.ulam("r2g", times=1).isfinite().all()


def test_head_counts_differ_where_only_the_middle_layer_does(maps):
    narrow = {n: getattr(maps._sums[1], n)[:, :, :2] for n in ("r2g", "g2r", "mass", "sram")}
    middle = dataclasses.replace(maps._sums[1], **narrow)
    with pytest.raises(ValueError, match="a: 4, b: 2, c: 4"):
        AttributionMaps([maps._sums[0], middle, maps._sums[2]], regions=["p", "q"]).hlam("r2g")


def test_as_many_masks_as_images(maps):
    """Two masks for three images are refused, not cut to fit; and there are no maps of no image."""
    three = [
        dataclasses.replace(s, **{n: getattr(s, n)[:, [0, 1, 0]] for n in ("r2g", "g2r", "mass", "sram")})
        for s in maps._sums
    ]
    asked = AttributionMaps(three, regions=["p", "q"], entries=[QKEntry("elsewhere", "r", 0, 1.0)])
    with pytest.raises(ValueError, match="a mask for each of 2 images, but the maps hold 3"):
        asked.sram(torch.ones(2, 4, 6))
    none = [
        dataclasses.replace(s, **{n: getattr(s, n)[:, :0] for n in ("r2g", "g2r", "mass", "sram")}) for s in maps._sums
    ]
    with pytest.raises(ValueError, match="0 images"):
        AttributionMaps(none, regions=["p", "q"])
