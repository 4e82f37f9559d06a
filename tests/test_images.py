"""Pictures, masks and points: every form of one thing is read alike, and what has no known meaning is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

import i2am
from i2am import plot
from i2am._images import as_mask_image, as_rgb, one_mask, open_image, read_mask, read_picture, read_point

GREY = np.random.default_rng(3).integers(9, 229, (40, 60), dtype=np.uint8)
INSIDE = np.zeros((40, 60), np.uint8)
INSIDE[:, :20] = 1


def palette(colour):
    image = Image.fromarray(INSIDE, "P")
    image.putpalette([0, 0, 0, *colour] + [0] * 750)
    return image


def with_alpha(alpha):
    return Image.fromarray(np.dstack([np.full((40, 60, 3), 255, np.uint8), alpha]))


# --------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("8.png", GREY),
        ("16.png", GREY.astype(np.uint16) * 257),
        ("32.tiff", GREY.astype(np.int32) * 257),
        ("float.tiff", GREY.astype(np.float32) / 255),
    ],
)
def test_picture_files_are_scaled_by_their_kind(name, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / name)
    image = open_image(tmp_path / name)
    assert np.array_equal(np.asarray(as_rgb(image)), GREY[..., None].repeat(3, -1))
    drawn = plot.overlay(image, torch.rand(4, 4)).images[0].get_array()
    np.testing.assert_allclose(drawn, GREY[..., None].repeat(3, -1) / 255, atol=2e-3)


COLOUR = np.random.default_rng(4).integers(0, 256, (2, 7, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "form",
    [
        COLOUR,
        list(COLOUR),
        [Image.fromarray(x) for x in COLOUR],
        COLOUR.transpose(0, 3, 1, 2),
        COLOUR.astype(np.uint16) * 257,
        COLOUR.astype(np.int64),
        COLOUR / 255,
        (COLOUR / 255).astype(np.float32),
        torch.from_numpy(COLOUR),
        torch.from_numpy(COLOUR).permute(0, 3, 1, 2),
        torch.from_numpy(COLOUR).permute(0, 3, 1, 2).double() / 255,
        np.concatenate([COLOUR, np.full((2, 7, 9, 1), 255, np.uint8)], -1),
    ],
    ids=[
        "uint8",
        "list of arrays",
        "list of PIL images",
        "channels first",
        "uint16",
        "int64",
        "float64",
        "float32",
        "tensor",
        "tensor, channels first",
        "float64 tensor",
        "alpha",
    ],
)
def test_every_form_of_picture(form):
    for index in (0, 1, -1):
        np.testing.assert_allclose(read_picture(form, index), COLOUR[index] / np.float32(255), atol=1e-6)
    with pytest.raises(IndexError, match="index=2, but there are 2 images"):
        read_picture(form, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pictures(dtype):
    x = torch.from_numpy(COLOUR[0]).permute(2, 0, 1) / 255
    np.testing.assert_allclose(read_picture(x.to(dtype)), COLOUR[0] / 255, atol=3e-3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("picture.png", "an image must be"),
        (np.zeros((5, 5, 2)), "an image must be"),
        (np.zeros((0, 5)), "an image must be"),
        (np.full((5, 5), -1.0), r"0…1.*-1…-1.*\(x \+ 1\) / 2"),
        (np.full((5, 5), 200.0), "0…1.*200"),
        (np.full((5, 5), np.nan), "finite"),
        (np.full((5, 5), -3), "integers -3"),
        (np.full((5, 5), 70000), "integers 70000"),
        (Image.fromarray(np.full((5, 5), 200, np.int32)), "32-bit integers up to 200"),
        (Image.fromarray(np.full((5, 5), 2.5, np.float32)), "0…1"),
    ],
)
def test_pictures_without_a_known_scale_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        read_picture(image)


TENSORS = {
    "sparse": lambda: torch.eye(20).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.rand(2, 3)]),
    "without values": lambda: torch.rand(20, 20, device="meta"),
    "complex": lambda: torch.rand(20, 20, dtype=torch.complex64).conj(),
    "quantised": lambda: torch.quantize_per_tensor(torch.rand(20, 20), 0.1, 0, torch.quint8),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_without_plain_numbers_are_refused(kind):
    """By name, whichever door they come through."""
    x = TENSORS[kind]()
    for read in (read_picture, read_mask, i2am.detect_box, lambda x: i2am.imacs(x, np.ones((5, 5)))):
        with pytest.raises(ValueError, match=f"that is {kind} cannot be read"):
            read(x)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, bool, np.float16])
def test_masks_with_channels_of_any_dtype(dtype):
    """cv2 and np.asarray leave three alike, which are one mask, never 20 that are 3 pixels wide."""
    grey = np.zeros((20, 24), dtype)
    grey[4:9, 6:] = 65535 if dtype == np.uint16 else 1
    got, single = read_mask(np.stack([grey] * 3, -1))
    assert single
    assert got[0].equal(read_mask(grey)[0][0])
    differ = np.stack([grey, grey, ~grey if dtype is bool else grey * 0], -1)
    for x in (differ, np.stack([grey] * 4, -1), torch.from_numpy(np.stack([grey] * 2, -1).astype(np.float32))):
        with pytest.raises(ValueError, match=r"channels that differ.*\[B, 1, H, W\]"):
            read_mask(x)
    narrow = torch.rand(20, 1, 24, 3)
    assert read_mask(narrow)[0].shape == (20, 24, 3)
    assert read_mask(torch.rand(5, 6, 4))[0].shape == (5, 6, 4)  # five regions on a small grid


def test_files_open_upright_and_only_as_pictures(tmp_path):
    image = Image.fromarray(COLOUR[0])
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90°
    image.save(tmp_path / "turned.png", exif=exif)
    assert open_image(tmp_path / "turned.png").size == (7, 9)
    image.save(tmp_path / "a.eps")  # would start Ghostscript
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(COLOUR[0]).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name, message in (
        ("a.eps", "not an image of a known kind"),
        ("text.png", "not an image"),
        ("cut.png", "cannot"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            open_image(tmp_path / name)
        assert name in str(refused.value)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        open_image(tmp_path / "none.png")


def test_a_picture_too_large_to_be_one(tmp_path, monkeypatch):
    Image.new("L", (600, 600)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read"):
        open_image(tmp_path / "bomb.png")


# ------------------------------------------------------------------------------------------------------------ masks

SAME = {
    "bool": INSIDE.astype(bool),
    "0 and 1": INSIDE,
    "0 and 255": INSIDE * 255,
    "int64": INSIDE.astype(np.int64),
    "16 bits": INSIDE.astype(np.uint16) * 65535,
    "float": INSIDE.astype(np.float64),
    "float16": INSIDE.astype(np.float16),
    "[H, W, 1]": INSIDE[..., None],
    "[H, W, 3]": INSIDE[..., None].repeat(3, -1) * 255,
    "bool tensor": torch.from_numpy(INSIDE).bool(),
    "bfloat16": torch.from_numpy(INSIDE).bfloat16(),
    "PIL 1": Image.fromarray(INSIDE.astype(bool)),
    "PIL L of 0 and 1": Image.fromarray(INSIDE),
    "PIL L": Image.fromarray(INSIDE * 255),
    "PIL RGB": Image.fromarray(INSIDE * 255).convert("RGB"),
    "PIL F": Image.fromarray(INSIDE.astype(np.float32)),
    "PIL I;16": Image.fromarray(INSIDE.astype(np.uint16) * 65535),
    "PIL I of 0 and 1": Image.fromarray(INSIDE.astype(np.int32)),
    "PIL LA, opaque": Image.fromarray(INSIDE * 255).convert("LA"),
    "grey palette": palette([255] * 3),
}


@pytest.mark.parametrize("name", SAME)
def test_every_form_of_mask_is_one_mask(name):
    """In scores, boxes of masks, regions, reports' masks and files alike."""
    r2g = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    want = i2am.imacs(r2g, torch.from_numpy(INSIDE).double())
    assert want.ndim == 0
    assert i2am.imacs(r2g, SAME[name]).equal(want)
    assert i2am.metrics.mask_iou(r2g, SAME[name]).equal(i2am.metrics.mask_iou(r2g, INSIDE))
    assert one_mask(SAME[name]).equal(torch.from_numpy(INSIDE).float())
    weights = i2am.maps.sram.region_weights(SAME[name], (40, 60))((4, 6))
    assert weights.reshape(4, 6).gt(0).tolist() == [[True, True, False, False, False, False]] * 4
    if isinstance(SAME[name], Image.Image):
        assert np.array_equal(np.asarray(as_mask_image(SAME[name])), INSIDE * 255)


BATCH = np.stack([INSIDE, 1 - INSIDE])


@pytest.mark.parametrize(
    "batch",
    [
        BATCH,
        BATCH[:, None],
        BATCH[..., None] * 255,
        torch.from_numpy(BATCH).half(),
        [Image.fromarray(x * 255) for x in BATCH],
        tuple(torch.from_numpy(BATCH)),
    ],
    ids=["[B, H, W]", "[B, 1, H, W]", "[B, H, W, 1]", "tensor", "PIL", "tensors"],
)
def test_batches_of_masks(batch):
    masks, single = read_mask(batch)
    assert (masks.tolist(), single) == (BATCH.tolist(), False)
    assert one_mask(batch, 1).tolist() == BATCH[1].tolist()
    with pytest.raises(IndexError, match="index=2, but there are 2 masks"):
        one_mask(batch, 2)
    assert i2am.imacs(torch.rand(4, 4), batch).shape == (2,)


def test_soft_masks_stay_soft():
    soft = np.array([[0, 64, 128, 255]], np.uint8)
    assert read_mask(soft)[0].tolist() == [[pytest.approx([0, 64 / 255, 128 / 255, 1])]]
    assert read_mask(torch.tensor([[0.1, 0.3]]))[0].tolist() == [[pytest.approx([0.1, 0.3])]]  # weights, in floats


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (INSIDE * 5, "largest value of this mask is 5 of 255: are these labels"),
        (Image.fromarray(INSIDE * 100), "100 of 255"),
        (INSIDE.astype(np.uint16) * 255, "255 of 65535"),
        (INSIDE.astype(np.int64) * 300, "300 of 65535"),
        (-INSIDE.astype(np.int64), "integers -1"),
        (palette([128, 0, 0]), r"mode P with colours, \(128, 0, 0\)"),
        (np.dstack([INSIDE * 255, INSIDE, INSIDE]), r"array with colours, \(255, 1, 1\)"),
        (with_alpha(INSIDE * 255), "transparent pixels .*getchannel"),
        (INSIDE.astype(np.float32) * 255, r"\[0, 1\], got 0…255"),
        (-INSIDE.astype(np.float32), r"\[0, 1\]"),
        (np.full((4, 4), np.nan), "finite"),
        ("mask.png", "a mask must be"),
        (np.ones(4), r"\[H, W\]"),
        ([INSIDE, INSIDE[:3]], "masks of one size"),
        (np.zeros((4, 4)), "empty mask"),
    ],
)
def test_masks_without_a_known_meaning_are_refused_with_the_value(mask, message):
    with pytest.raises(ValueError, match=message):
        i2am.imacs(torch.rand(8, 8), mask)


def test_regions_take_weights_of_any_scale():
    weights = i2am.maps.sram.region_weights(torch.tensor([[0.0, 30.0], [0.0, 10.0]]), (1, 1))((2, 2))
    assert weights.flatten().tolist() == [0, 0.75, 0, 0.25]
    with pytest.raises(ValueError, match="labels"):
        i2am.maps.sram.region_weights(INSIDE * 5, (1, 1))


# ----------------------------------------------------------------------------------------------------------- points


@pytest.mark.parametrize(
    "pair",
    [
        (3, 5),
        [3, 5],
        (3.0, 5.0),
        (np.int64(3), np.float32(5)),
        np.array([3, 5]),
        np.array([3, 5], np.uint8),
        torch.tensor([3, 5]),
        (torch.tensor(3), np.array(5)),
        range(3, 6, 2),
    ],
    ids=repr,
)
def test_any_pair_of_numbers_is_a_point(pair):
    assert read_point(pair) == (3.0, 5.0)
    weights = i2am.maps.sram.region_weights(pair, (8, 8))((8, 8))
    assert weights.flatten().nonzero().tolist() == [[3 * 8 + 5]]


@pytest.mark.parametrize(
    "other", ["ab", (1, 2, 3), (True, False), [[1, 2], [3, 4]], (None, 1), np.ones((2, 2)), "name"]
)
def test_what_is_no_pair(other):
    assert read_point(other) is None


def test_a_point_must_be_finite():
    with pytest.raises(ValueError, match="finite"):
        read_point((float("nan"), 1))


# ----------------------------------------------------------------------------------------------- maps, boxes, swapped


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_maps_of_any_dtype_and_batch(dtype):
    x = torch.zeros(2, 40, 60)
    x[0, 10:20, 25:45], x[1, 5:25, 5:15] = 1, 1
    boxes = i2am.detect_box(x.to(dtype))
    assert boxes == [i2am.Box(10, 25, 20, 45), i2am.Box(5, 5, 25, 15)]
    assert i2am.detect_box(x[1].to(dtype)) == i2am.detect_box(x[1].numpy()) == boxes[1]
    assert i2am.detect_box(torch.ones(1, 5, 5)) == [None]
    assert i2am.imacs(x.to(dtype), INSIDE).tolist() == i2am.imacs(x, INSIDE).tolist()
    for wrong in (torch.ones(3), Image.new("L", (4, 4)), torch.full((4, 4), torch.nan)):
        with pytest.raises(ValueError, match="finite maps"):
            i2am.detect_box(wrong)


MAP = np.random.default_rng(0).random((4, 6), dtype=np.float32)


@pytest.mark.parametrize(
    ("image", "map"),
    [
        (MAP, Image.fromarray(COLOUR[0])),
        (torch.from_numpy(MAP), COLOUR[0]),
        (torch.from_numpy(MAP)[None], COLOUR),
        (torch.from_numpy(MAP), torch.rand(3, 7, 9)),
        (MAP, GREY),
        (Image.fromarray(COLOUR[0]), Image.fromarray(COLOUR[0])),
        (COLOUR[0], COLOUR[0]),
    ],
)
def test_a_swapped_overlay_is_refused(image, map):
    for draw in (plot.overlay, plot.blend):
        with pytest.raises(ValueError, match="swapped"):
            draw(image, map)


@pytest.mark.parametrize(
    ("image", "map"),
    [
        (GREY / 255, MAP),
        (torch.rand(1, 40, 60), torch.rand(3, 4, 6)),
        (torch.rand(40, 60), INSIDE.astype(bool)),
        (torch.rand(4, 6), torch.rand(8, 8)),
    ],
)
def test_what_is_not_swapped(image, map):
    plot.blend(image, map)
