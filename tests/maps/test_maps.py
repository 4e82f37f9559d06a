"""Maps: levels of synthetic sums, selection, and files."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from i2am.maps import AttributionMaps, LayerSums

T, B, H = 3, 2, 4


def sums(layer="down.0", reference="reference", grid=(4, 6), reference_grid=(3, 2), skip=1, heads=H, **changes):
    g = torch.Generator().manual_seed(len(layer) + 100 * len(reference) + grid[0])
    K = skip + (reference_grid[0] * reference_grid[1] if reference_grid else 4)
    fields = dict(
        layer=layer,
        reference=reference,
        grid=grid,
        reference_grid=reference_grid,
        skip=skip,
        keys=K,
        default=not layer.startswith("mid"),
        counts=(2, 2, 1),
        r2g=torch.rand(T, B, heads, grid[0] * grid[1], generator=g),
        g2r=torch.rand(T, B, heads, K, generator=g),
        mass=None,
    )
    return LayerSums(**(fields | changes))


@pytest.fixture
def maps():
    return AttributionMaps([sums("down.0"), sums("mid.0", grid=(2, 3)), sums("up.0", grid=(2, 3))])


def test_contents(maps):
    assert maps.layers == ["down.0", "up.0"]
    assert maps.recorded_layers == ["down.0", "mid.0", "up.0"]
    assert (maps.references, maps.time_groups, maps.batch) == (["reference"], T, B)
    assert maps.counts()["up.0"] == [2, 2, 1]
    assert maps.grids() == {"down.0": (4, 6), "mid.0": (2, 3), "up.0": (2, 3)}
    assert maps.heads() == {"down.0": H, "mid.0": H, "up.0": H}
    assert repr(maps) == "AttributionMaps(3 layers, references 'reference', batch 2, 3 time groups)"


def test_resize_before_clamp_before_mean(maps):
    """Bicubic rings below zero around a peak: clamping is per head and layer, after the resize, before any mean."""
    spiky = torch.zeros(T, B, H, 6)
    for head in range(H):
        spiky[:, :, head, head] = 5.0
    layers = [
        sums("down.0", grid=(2, 3), r2g=spiky, counts=(5, 0, 0)),
        sums("up.0", grid=(4, 6), r2g=torch.zeros(T, B, H, 24)),
    ]
    got = AttributionMaps(layers).ulam("r2g", times=0)
    want = F.interpolate(spiky[0].reshape(B, H, 2, 3) / 5, (4, 6), mode="bicubic", align_corners=False)
    assert want.min() < 0
    torch.testing.assert_close(got, want.clamp_min(0).mean(1) / 2)


def test_the_skipped_tokens_are_the_leading_ones():
    g2r = torch.arange(7.0).expand(T, B, H, 7)
    maps = AttributionMaps([sums(g2r=g2r, counts=(1, 1, 1))])
    torch.testing.assert_close(maps.ulam("g2r")[0], torch.tensor([[1.0, 2], [3, 4], [5, 6]]))


def test_time_means_weigh_by_calls():
    one = torch.ones(T, B, H, 24) * torch.tensor([2.0, 0.0, 9.0])[:, None, None, None]
    maps = AttributionMaps([sums(r2g=one, counts=(2, 0, 3))])
    assert maps.ulam("r2g").unique().tolist() == pytest.approx([11 / 5])
    tlam = maps.tlam("r2g")
    assert tlam[:, 0].unique().tolist() == [1.0]
    assert tlam[:, 1].isnan().all()  # nothing ran there
    assert tlam[:, 2].unique().tolist() == [3.0]


def test_a_layer_that_did_not_run_counts_in_no_mean():
    twos, fours = torch.full((T, B, H, 24), 2.0), torch.full((T, B, H, 24), 4.0)
    maps = AttributionMaps([sums("a", r2g=twos, counts=(1, 1, 1)), sums("b", r2g=fours * 0, counts=(0, 0, 0))])
    assert maps.ulam("r2g").unique().tolist() == pytest.approx([6 / 3])
    assert maps.hlam("r2g").shape == (B, H, 4, 6)
    assert maps.llam("r2g")[:, 1].isnan().all()


def test_several_references():
    maps = AttributionMaps(
        [sums("a", "left"), sums("a", "right", reference_grid=(2, 2)), sums("b", "right", reference_grid=(2, 2))]
    )
    assert maps.references == ["left", "right"]
    assert maps.ulam("g2r", reference="left").shape == (B, 3, 2)
    assert maps.llam("g2r", reference="right").shape == (B, 2, 2, 2)
    for wrong, message in ((None, "pass reference= one of 'left', 'right'"), ("up", "no reference 'up'")):
        with pytest.raises(ValueError, match=message):
            maps.ulam("r2g", reference=wrong)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.ulam("both"), ValueError, "direction must be one of r2g, g2r, mass"),
        (lambda m: m.ulam("r2g", normalize="max"), ValueError, "normalize must be"),
        (lambda m: m.ulam("r2g", size=(0, 4)), ValueError, "size must be"),
        (lambda m: m.ulam("r2g", times=3), IndexError, "times=3 picks 3 from 0…2"),
        (lambda m: m.ulam("r2g", heads=[0, 4]), IndexError, "heads of down.0"),
        (lambda m: m.ulam("r2g", heads=[]), IndexError, "nothing"),
        (lambda m: m.ulam("r2g", layers="x"), ValueError, "there are: down.0, mid.0, up.0"),
        (lambda m: m.ulam("mass"), ValueError, "all the keys there are"),
    ],
)
def test_refusals(maps, call, error, message):
    with pytest.raises(error, match=message):
        call(maps)


def test_references_without_a_map():
    pooled = AttributionMaps([sums(reference_grid=None, skip=0)])
    with pytest.raises(ValueError, match="no 2-D layout"):
        pooled.ulam("g2r")
    assert pooled.ulam("r2g").shape == (B, 4, 6)
    single = AttributionMaps([sums(reference_grid=(1, 1), skip=0)])
    with pytest.raises(ValueError, match="identically 1"):
        single.tlam("g2r")


def test_maps_are_a_copy():
    r2g = torch.ones(1, 1, 1, 6)
    track = LayerSums("a", "r", (2, 3), (1, 2), 0, 2, True, [1], r2g, torch.ones(1, 1, 1, 2))
    maps = AttributionMaps.of([track], {"a"})
    r2g += 1
    track.counts[0] = 2
    assert maps.ulam("r2g").unique().tolist() == [1.0]


# ----------------------------------------------------------------------------------------------------------- files


def test_save_and_load(maps, tmp_path):
    with_mass = AttributionMaps([*maps._sums, dataclasses.replace(sums("up.1"), mass=torch.rand(T, B, H, 24))])
    path = with_mass.save(tmp_path / "maps.safetensors")
    loaded = AttributionMaps.load(path)
    for a, b in zip(with_mass._sums, loaded._sums, strict=True):
        for field in dataclasses.fields(LayerSums):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert x.equal(y) if isinstance(x, torch.Tensor) else x == y, field.name
    assert [p.name for p in tmp_path.iterdir()] == ["maps.safetensors"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as readable as any other file


def test_files_that_are_no_maps(maps, tmp_path):
    path = maps.save(tmp_path / "maps.safetensors")
    whole = path.read_bytes()
    for keep in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            AttributionMaps.load(path)
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="not a maps file of i2am"):
        AttributionMaps.load(path)
    with pytest.raises(FileNotFoundError):
        AttributionMaps.load(tmp_path / "none")


def test_a_failed_save_leaves_the_old_file(maps, tmp_path, monkeypatch):
    import safetensors.torch

    path = maps.save(tmp_path / "maps.safetensors")
    before = path.read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        maps.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["maps.safetensors"]
