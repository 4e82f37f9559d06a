"""Figures: what is drawn where, for every form of image and map."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from i2am import plot
from i2am.maps import AttributionMaps
from i2am.maps.aggregate import LayerSums
from i2am.plot.labels import value_range

GRID, REFERENCE_GRID = (3, 5), (2, 4)


def layer_sums(name, *, grid=GRID, heads=2, batch=2, counts=(1, 1), reference_grid=REFERENCE_GRID):
    """Random sums of a layer whose reference has a class token, and shares its attention with other keys."""
    queries, keys = grid[0] * grid[1], 1 + REFERENCE_GRID[0] * REFERENCE_GRID[1]
    calls = torch.tensor(counts, dtype=torch.float32)[:, None, None, None]
    shape = (len(counts), batch, heads)
    return LayerSums(
        layer=name,
        reference="reference",
        grid=grid,
        reference_grid=reference_grid,
        skip=1,
        keys=2 * keys,
        default=True,
        counts=tuple(counts),
        r2g=torch.rand(*shape, queries).softmax(-1) * calls,
        g2r=torch.rand(*shape, keys).softmax(-1) * calls,
        mass=torch.rand(*shape, queries) * calls,
    )


def some_maps(layers=2, **changes):
    return AttributionMaps([layer_sums(f"up_blocks.{i}.attn2", **changes) for i in range(layers)])


def photograph(height=60, width=100):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rendered(figure):
    """``[H, W, 3]`` pixels of a figure, 0…255."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(float)


def inside(figure, ax):
    """The pixels of one Axes."""
    pixels = rendered(figure)
    box = ax.get_window_extent()
    height = pixels.shape[0]
    return pixels[round(height - box.y1) : round(height - box.y0), round(box.x0) : round(box.x1)]


def brightest(pixels):
    """(y, x) of the brightest pixel, as fractions from the top left."""
    light = pixels.sum(-1)
    y, x = np.unravel_index(light.argmax(), light.shape)
    return y / light.shape[0], x / light.shape[1]


def texts(figure):
    """All that is written in a figure, unwrapped."""
    found = figure.findobj(match=Text)
    return " | ".join(" ".join(text.get_text().split()) for text in found)


# ----------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("cell", [(0, 0), (0, 4), (2, 1), (1, 3)])
def test_overlay_puts_a_cell_where_it_is(cell):
    values = np.zeros(GRID)
    values[cell] = 1
    ax = plot.overlay(np.zeros((90, 150, 3)), values, alpha=1.0, colorbar=False)
    y, x = brightest(inside(ax.figure, ax))
    assert (int(y * GRID[0]), int(x * GRID[1])) == cell


@pytest.mark.parametrize(("direction", "grid"), [("r2g", GRID), ("g2r", REFERENCE_GRID)])
@pytest.mark.parametrize("level", plot.AXES)
def test_levels_put_a_token_where_it_is(direction, grid, level):
    cell = (1, 3)
    sums = layer_sums("up_blocks.0.attn2", batch=1)
    tokens = getattr(sums, direction)
    tokens.fill_(0.001)
    skip = sums.skip if direction == "g2r" else 0
    tokens[..., 0] = 0.002  # the class token, where there is one, must not be drawn
    tokens[..., skip + cell[0] * grid[1] + cell[1]] = 0.9
    image = np.zeros((30 * grid[0], 30 * grid[1], 3))
    figure = plot.levels(AttributionMaps([sums]), direction, image, level, alpha=1.0)
    y, x = brightest(inside(figure, figure.axes[0]))
    assert (int(y * grid[0]), int(x * grid[1])) == cell


def test_map_is_smooth_and_stays_within_its_values():
    values = np.zeros(GRID)
    values[1, 2] = 1.0
    heat = plot.overlay(photograph(), values).images[-1].get_array()
    assert heat.shape == (60, 100)
    assert heat.min() == 0
    assert heat.max() == pytest.approx(1.0, abs=0.05)
    assert np.abs(np.diff(heat, axis=1)).max() < 0.2


# ----------------------------------------------------------------------------------------------------------- inputs


def test_every_form_of_image_gives_the_same_picture():
    image = photograph()
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    forms = [
        pixels,
        pixels / 255.0,
        tensor,
        tensor / 255,
        np.stack([np.zeros_like(pixels), pixels]),
        torch.stack([torch.zeros_like(tensor), tensor]),
        [image, image],
        image.convert("RGBA"),
    ]
    values = torch.rand(2, *GRID)
    expected = rendered(plot.overlay(image, values, index=1).figure)
    for form in forms:
        assert np.array_equal(rendered(plot.overlay(form, values, index=1).figure), expected)


def test_grey_images():
    grey = np.asarray(photograph().convert("L"))
    expected = plot.overlay(grey[..., None].repeat(3, -1), torch.rand(*GRID)).images[0].get_array()
    for form in (grey, grey[..., None], torch.from_numpy(grey.copy()), torch.from_numpy(grey.copy())[None]):
        assert np.array_equal(plot.overlay(form, torch.rand(*GRID)).images[0].get_array(), expected)


def test_the_photograph_is_grey_as_the_eye_sees_it():
    red, green, blue = np.eye(3, dtype=np.float32)
    for colour, light in ((red, 0.299), (green, 0.587), (blue, 0.114)):
        drawn = plot.overlay(np.broadcast_to(colour, (8, 8, 3)), torch.rand(*GRID)).images[0].get_array()
        np.testing.assert_allclose(drawn, light, atol=1e-6)


@pytest.mark.parametrize("size", [(90, 900), (900, 90)])
def test_panels_hold_a_small_picture(size):
    figure = plot.levels(some_maps(), "r2g", photograph(*size))
    height, width = figure.axes[0].images[0].get_array().shape[:2]
    assert (height, width) == ((32, 320) if size[1] > size[0] else (320, 32))


@pytest.mark.parametrize(
    ("image", "map", "error", "message"),
    [
        (np.zeros((4, 4, 2)), np.zeros(GRID), ValueError, "an image must be"),
        ("picture.png", np.zeros(GRID), ValueError, "an image must be"),
        (np.full((4, 4, 3), 200.0), np.zeros(GRID), ValueError, "0…1"),
        (np.full((4, 4, 3), np.nan), np.zeros(GRID), ValueError, "0…1"),
        (np.zeros((4, 4, 3)), np.zeros(5), ValueError, "a map must be"),
        (np.zeros((4, 4, 3)), np.zeros((1, 2, 3, 4)), ValueError, "a map must be"),
        (np.zeros((4, 4, 3)), np.full(GRID, np.nan), ValueError, "not finite"),
        (np.zeros((4, 4, 3)), np.zeros((1, *GRID)), IndexError, "index=1"),
        (np.zeros((1, 4, 4, 3)), np.zeros(GRID), IndexError, "index=1"),
        ([photograph()], np.zeros(GRID), IndexError, "index=1"),
    ],
)
def test_wrong_inputs_say_what_is_expected(image, map, error, message):
    with pytest.raises(error, match=message):
        plot.overlay(image, map, index=1)


def test_index_chooses_the_sample():
    maps = some_maps()
    for index in (0, 1):
        heat = plot.levels(maps, "r2g", photograph(), "layer", index=index).axes[0].images[-1].get_array()
        alone = plot.overlay(photograph(), maps.llam("r2g")[index, 0]).images[-1].get_array()
        assert np.allclose(heat, alone)
    with pytest.raises(IndexError, match="index=2"):
        plot.levels(maps, "r2g", photograph(), index=2)
    with pytest.raises(IndexError, match="index=2"):
        plot.summary(maps, photograph(), photograph(), index=2)


@pytest.mark.parametrize(
    "wrong", [{"level": "space"}, {"scale": "log"}, {"columns": 0}, {"direction": "up"}, {"layers": "nothing"}]
)
def test_wrong_options(wrong):
    with pytest.raises(ValueError):
        plot.levels(some_maps(), **{"direction": "r2g", "image": photograph()} | wrong)


def test_vmin_and_vmax():
    heat = plot.overlay(photograph(), torch.rand(*GRID), vmin=-1, vmax=2).images[-1]
    assert heat.get_clim() == (-1, 2)
    with pytest.raises(ValueError, match="vmin must be below vmax"):
        plot.overlay(photograph(), torch.rand(*GRID), vmin=1, vmax=1)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_map(value):
    ax = plot.overlay(photograph(), torch.full(GRID, value))
    low, high = ax.images[-1].get_clim()
    assert low == pytest.approx(value)
    assert high > low
    rendered(ax.figure)


# ----------------------------------------------------------------------------------------------------------- levels


def test_time_group_without_a_step():
    maps = some_maps(counts=(3, 0, 1))
    figure = plot.levels(maps, "r2g", photograph())
    first, empty, last = figure.axes[:3]
    assert [t.get_text() for t in empty.texts] == ["no step"]
    assert len(empty.images) == 1
    assert not first.texts
    assert not last.texts
    assert [len(ax.images) for ax in (first, last)] == [2, 2]
    assert "0–33 %" in first.get_xlabel()
    assert "3 of 4 calls" in first.get_xlabel()
    assert "0 of 4 calls" in empty.get_xlabel()
    rendered(figure)


def test_calls_are_those_of_the_layer_that_ran_most():
    """A cache may skip some layers."""
    maps = AttributionMaps([layer_sums("a", counts=(3, 1)), layer_sums("b", counts=(1, 1))])
    labels = [ax.get_xlabel() for ax in plot.levels(maps, "r2g", photograph()).axes[:2]]
    assert ["3 of 4 calls" in labels[0], "1 of 4 calls" in labels[1]] == [True, True]


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0.5, 1.25, "0.5 – 1.25"),
        (0, 0, "0 – 0"),
        (0.00078, 0.00123, r"0.78 – 1.23 $\times10^{-3}$"),
        (2e3, 9.5e3, r"2.00 – 9.50 $\times10^{3}$"),
        (0.04, 0.099, r"4.00 – 9.90 $\times10^{-2}$"),
    ],
)
def test_ends_of_a_scale_are_written_over_one_power(low, high, want):
    assert value_range(low, high) == want


def test_only_groups_without_a_step():
    figure = plot.levels(some_maps(counts=(2, 0)), "r2g", photograph(), times=[1])
    assert [ax.texts[0].get_text() for ax in figure.axes] == ["no step"]
    rendered(figure)


def test_chosen_times_heads_and_layers_keep_their_names():
    maps = some_maps(layers=3, heads=4, counts=(1, 1, 1))
    times = plot.levels(maps, "r2g", photograph(), times=[0, -1])
    assert "group 2 · 67–100 %" in texts(times)
    assert "group 1" not in texts(times)
    heads = plot.levels(maps, "g2r", photograph(), "head", heads=slice(2, None))
    assert [ax.get_xlabel() for ax in heads.axes[:2]] == ["head 2", "head 3"]
    layers = plot.levels(maps, "r2g", photograph(), "layer", layers="up_blocks.1*")
    assert layers.axes[0].get_xlabel().startswith("up_blocks.1.attn2")
    assert "3 × 5 tokens" in texts(layers)


def test_scale_is_shared_or_per_panel_and_stated():
    maps = some_maps(layers=2)
    shared = plot.levels(maps, "r2g", photograph(), "layer", scale="shared")
    limits = [ax.images[-1].get_clim() for ax in shared.axes[:2]]
    values = maps.llam("r2g")[0]
    assert limits[0] == limits[1] == pytest.approx((values.min().item(), values.max().item()))
    assert "one colour scale for all" in texts(shared)
    each = plot.levels(maps, "r2g", photograph(), "layer")
    limits = [ax.images[-1].get_clim() for ax in each.axes[:2]]
    assert limits == [pytest.approx((v.min().item(), v.max().item())) for v in values]
    assert "its own colour scale" in texts(each)
    assert len(each.axes) == 2  # no colour bar that would fit only one of them
    assert "1 = uniform" in texts(plot.levels(maps, "r2g", photograph(), normalize="lift"))


@pytest.mark.parametrize("direction", ["r2g", "g2r", "mass"])
def test_every_colour_bar_says_what_it_measures(direction):
    maps, image = some_maps(), photograph()
    name = {"r2g": "R2G: mean column", "g2r": "G2R: mean row", "mass": "mass: share of attention"}[direction]
    figures = {
        name: plot.levels(maps, direction, image, "head"),
        "times uniform": plot.levels(maps, direction, image, normalize="lift"),
        "change": plot.side_by_side(maps, maps, direction, [image, image]),
        "a unit of my own": plot.overlay(image, maps.ulam(direction), quantity="a unit of my own").figure,
    }
    for expected, figure in figures.items():
        assert any(expected in ax.get_ylabel() for ax in figure.axes), expected
    bars = [ax.get_ylabel() for ax in plot.summary(maps, image, image).axes if ax.get_ylabel()]
    assert bars == ["R2G: mean column probability", "G2R: mean row probability"]


def test_mass():
    figure = plot.levels(some_maps(), "mass", photograph(), "head")
    assert "share of attention" in texts(figure)


LONG_NAMES = [
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2",
    "up_blocks.12.attentions.10.transformer_blocks.19.attn2",
    "mid_block.attentions.0.transformer_blocks.3.attn2",
    "some_model.with_a_very_long_module_name_indeed.pixel_attentions.2.transformer_blocks.0.attn2",
    "a.b",
    "averyveryverylongmodulenamewithoutanydotatallinside",
    "up_blocks.12.attentions.11.transformer_blocks.19.attn2",
]


@pytest.mark.parametrize("level", plot.AXES)
@pytest.mark.parametrize("size", [(60, 60), (40, 90), (90, 40)])
def test_nothing_overlaps_and_nothing_is_cut_off(level, size):
    maps = AttributionMaps([layer_sums(name, heads=8, counts=(1,) * 10) for name in LONG_NAMES])
    figure = plot.levels(maps, "r2g", photograph(*size), level, footer="A note. " * 20)
    pixels = rendered(figure)
    shown = [figure._suptitle, figure._supxlabel, *(ax.xaxis.label for ax in figure.axes if ax.get_xlabel())]
    boxes = [text.get_window_extent() for text in shown] + [ax.get_window_extent() for ax in figure.axes]
    for box in boxes:
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= pixels.shape[1]
        assert box.y1 <= pixels.shape[0]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert min(a.x1, b.x1) <= max(a.x0, b.x0) or min(a.y1, b.y1) <= max(a.y0, b.y0)


def test_layer_names():
    names = plot.short_layer_names(LONG_NAMES)
    assert names[:3] == ["down 0 · attn 1 · block 0", "up 12 · attn 10 · block 19", "mid · attn 0 · block 3"]
    assert len(set(names)) == len(names)
    assert all(len(line) <= 27 for name in names for line in name.split("\n"))
    assert plot.short_layer_names(LONG_NAMES[:1]) == ["down 0 · attn 1"]
    both = [f"down_blocks.0.attentions.0.transformer_blocks.0.attn{i}" for i in (1, 2)]
    assert plot.short_layer_names(both) == ["down 0 · attn 0 · attn1", "down 0 · attn 0"]


# ---------------------------------------------------------------------------------------------------------- summary


def test_summary_of_both_directions():
    maps = some_maps()
    figure = plot.summary(maps, photograph(), photograph(80, 80), index=1, footer="weights are random")
    drawn = [ax.images[-1].get_array() for ax in (figure.axes[1], figure.axes[3])]
    for heat, direction, image in zip(drawn, ("r2g", "g2r"), (photograph(), photograph(80, 80)), strict=True):
        expected = plot.overlay(image, maps.ulam(direction)[1]).images[-1].get_array()
        assert np.allclose(heat, expected)
    assert "weights are random" in texts(figure)


def test_summary_of_a_reference_without_a_grid_says_so():
    figure = plot.summary(some_maps(reference_grid=None), photograph(), photograph())
    assert "no 2-D layout" in texts(figure)
    assert len(figure.axes[3].images) == 0
    assert len(figure.axes[1].images) == 2


def test_summary_refuses_options_that_select_nothing():
    with pytest.raises(ValueError, match="selects no layer"):
        plot.summary(some_maps(), photograph(), photograph(), layers="nothing.*")


def test_pictures_are_the_same_every_time(tmp_path):
    maps = some_maps()
    for name in ("a", "b"):
        plot.summary(maps, photograph(), photograph()).savefig(tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_pyplot_is_left_alone():
    code = """if True:
        import io
        import sys
        import numpy as np
        from i2am import plot
        plot.overlay(np.zeros((8, 8, 3)), np.zeros((2, 2))).figure.savefig(io.BytesIO())
        assert "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------- patches, two runs


class Recorded(AttributionMaps):
    """Maps whose SRAM is one cell of the reference."""

    def sram(self, region, *, canvas=None, **options):
        values = torch.full((2, *REFERENCE_GRID), 0.001)
        values[1, 1, 3] = 0.9
        return values


def test_sram_marks_the_patch_and_outlines_its_source():
    maps = Recorded([layer_sums("up_blocks.0.attn2")], canvas=(300, 500))
    figure = plot.sram(maps, (210, 400), [photograph()] * 2, [photograph(80, 160)] * 2, index=1)
    marked, heated, outlined = figure.axes[:3]
    ring = marked.lines[-1]
    assert (ring.get_ydata()[0] + 0.5, ring.get_xdata()[0] + 0.5) == pytest.approx((42, 80))  # of 60×100 pixels
    y, x = np.unravel_index(heated.images[-1].get_array().argmax(), (80, 160))
    assert (y // 40, x // 40) == (1, 3)
    points = np.concatenate([path.vertices for c in outlined.collections for path in c.get_paths()])
    assert points[:, 0].min() > 100  # around the last column
    assert points[:, 1].min() > 30
    assert "outlined: 50 % of that attention" in texts(figure)
    with pytest.raises(ValueError, match="share"):
        plot.sram(maps, (0, 0), photograph(), photograph(), share=1)


def test_a_point_is_marked_in_the_canvas_that_it_was_given_in():
    maps = Recorded([layer_sums("up_blocks.0.attn2")], canvas=(300, 500))
    ring = plot.sram(maps, (7, 40), photograph(), photograph(), canvas=(10, 50)).axes[0].lines[-1]
    assert (ring.get_ydata()[0] + 0.5, ring.get_xdata()[0] + 0.5) == pytest.approx((42, 80))


def test_holding_is_the_smallest_part_with_that_share():
    values = np.array([[4.0, 1.0], [3.0, 2.0]])
    assert plot.holding(values, 0.39) == 4
    assert plot.holding(values, 0.41) == 3
    assert plot.holding(values, 0.99) == 1


def test_mask_and_name_are_marked():
    maps = Recorded([layer_sums("up_blocks.0.attn2")], canvas=(300, 500))
    mask = torch.zeros(60, 100)
    mask[10:30, 50:90] = 1
    for weight in (1.0, 0.3):  # a faint mask is outlined, too
        figure = plot.sram(maps, weight * mask, photograph(), photograph())
        points = np.concatenate([path.vertices for c in figure.axes[0].collections for path in c.get_paths()])
        assert 48 <= points[:, 0].min() <= 51
        assert 88 <= points[:, 0].max() <= 91
    assert "registered: logo" in texts(plot.sram(maps, "logo", photograph(), photograph()))


@pytest.mark.parametrize("scale", plot.SCALES)
def test_side_by_side(scale):
    torch.manual_seed(3)
    a, b = some_maps(), some_maps()
    figure = plot.side_by_side(a, b, "r2g", [photograph(), photograph()], names=("before", "after"), scale=scale)
    first, second, third = figure.axes[:3]
    values = [m.ulam("r2g")[0].numpy() for m in (a, b)]
    np.testing.assert_allclose(third.images[0].get_array(), values[1] - values[0], atol=1e-7)
    most = np.abs(values[1] - values[0]).max()
    assert third.images[0].get_clim() == pytest.approx((-most, most))  # white is no change
    assert third.get_title() == "after − before"
    figure.draw_without_rendering()
    shapes = [box.width / box.height for box in (ax.get_window_extent() for ax in (first, second, third))]
    assert shapes == pytest.approx([100 / 60] * 3, rel=0.02)  # the map has the picture's shape, not its grid's
    limits = [ax.images[-1].get_clim() for ax in (first, second)]
    assert (limits[0] == limits[1]) == (scale == "shared")
    assert ("one colour scale" in texts(figure)) == (scale == "shared")
    with pytest.raises(ValueError, match="one grid"):
        plot.side_by_side(a, some_maps(grid=(6, 10)), "r2g", [photograph()] * 2)


def test_blend_is_overlay_without_a_figure():
    values = np.random.default_rng(0).random(GRID)
    image = photograph()
    pixels = plot.blend(image, values)
    assert pixels.shape == (60, 100, 3)
    ax = plot.overlay(image, values, colorbar=False)
    box = inside(ax.figure, ax) / 255
    rows, columns = (np.linspace(0, n - 1, 40).astype(int) for n in box.shape[:2])
    ours = pixels[(rows * 60 // box.shape[0])][:, columns * 100 // box.shape[1]]
    assert np.abs(box[rows][:, columns] - ours).mean() < 0.05  # other pixels of one picture


def test_maps_show_themselves_in_notebooks():
    maps = some_maps()
    png = Image.open(io.BytesIO(maps._repr_png_()))
    assert np.asarray(png.convert("RGB")).std() > 10
    text = maps._repr_html_()
    assert "data:image/png;base64," in text
    assert "alt=" in text
    one = some_maps(reference_grid=None)
    assert Image.open(io.BytesIO(one._repr_png_())).width < png.width  # R2G alone
