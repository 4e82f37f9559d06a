"""Bugs in the report's contents and in figures."""

from tests.mutants import Mutant

PAGE = ["tests/report/test_report.py", "tests/maps/test_frames.py"]
DRAWN = ["tests/plot/test_plot.py", "tests/plot/test_animation.py", "tests/plot/test_budget.py"]
TESTS = PAGE
DATA, BUILD, JS = "i2am/report/data.py", "i2am/report/build.py", "i2am/report/page.js"
FIGURES, ARRAYS, FILM = "i2am/plot/figures.py", "i2am/plot/arrays.py", "i2am/plot/animation.py"
LABELS, PATCHES, RUNS, BUDGET = (f"i2am/plot/{name}.py" for name in ("labels", "patches", "runs", "budget"))
TESTS_OF = dict.fromkeys((FIGURES, ARRAYS, FILM, LABELS, PATCHES, RUNS, BUDGET), DRAWN)
MUTANTS = [
    Mutant(
        DATA, "read[level](direction, **chosen, **options)[index]", "read[level](direction, **chosen, **options)[0]"
    ),
    Mutant(DATA, "yield from ((pick, total / ran[pick])", "yield from ((pick, total / len(axes.layers))"),
    Mutant(DATA, "np.rint(scaled)", "np.floor(scaled)", "half a step too dark"),
    Mutant(DATA, "for t, h, x in found if x.isfinite().all())", "for t, h, x in found)"),
    Mutant(DATA, "if a_pick * axes.count(plan.order) <= budget", "if a_pick <= budget", "a file over its limit"),
    Mutant(
        BUILD,
        "maps.sram(region, level=level, **chosen, **options)[index]",
        "maps.sram(region, level=level, **chosen, **options)[0]",
    ),
    Mutant(
        BUILD,
        "return None if mask is None else one_mask(mask, index).numpy()",
        "return None if mask is None else one_mask(mask, 0).numpy()",
    ),
    Mutant(BUILD, "plot.as_picture(image, index) * 255", "plot.as_picture(image, 0) * 255"),
    Mutant(BUILD, '.replace("<", "\\\\u003c")', '.replace("</", "<\\\\/")', "a name opens a comment"),
    Mutant(BUILD, 'return text.encode("utf-8", "backslashreplace").decode("utf-8")', "return text"),
    Mutant(BUILD, 'r2g = maps.ulam("r2g", **options)[index]', 'r2g = maps.ulam("r2g", **options)[0]'),
    Mutant(BUILD, "box.top / height, box.left / width", "box.top / width, box.left / height"),
    Mutant(
        BUILD, "x=(np.arange(width + 2) - 0.5) / width", "x=np.arange(width + 2) / width", "outlines half a pixel off"
    ),
    Mutant(BUILD, "<li>{html.escape(line)}</li>", "<li>{line}</li>"),
    Mutant(JS, "const BICUBIC = -0.75;", "const BICUBIC = -0.5;"),
    Mutant(JS, "place.cell[0] * asked.cells[1] + place.cell[1]", "place.cell[1] * asked.cells[0] + place.cell[0]"),
    Mutant(JS, "(state.pick.time + 1) % data.axes.time.length", "state.pick.time + 1", "plays past the end"),
    Mutant(JS, "      stop();\n      choose(", "      choose(", "a hand on the slider does not stop it"),
    Mutant(JS, 'there.push("cell");', "", "a mark without a legend"),
    Mutant(
        FIGURES,
        "(resized(values, picture.shape[:2]) - low) / (high - low)",
        "(resized(values, picture.shape[:2]) - low) / high",
    ),
    Mutant(FIGURES, '{"r2g": maps.ulam("r2g", **options), "g2r"', '{"r2g": maps.ulam("r2g"), "g2r"'),
    Mutant(ARRAYS, "return smooth.clip(values.min(), values.max())", "return smooth"),
    Mutant(
        FILM,
        "frames.append(_captioned(pixels, label if ran",
        "frames.insert(0, _captioned(pixels, label if ran",
        "backwards",
    ),
    Mutant(FILM, 'common if scale == "shared" or not ran else', "limits_of([x]) if ran else", "each on its own scale"),
    Mutant(FILM, "duration = round(1000 * self.seconds)", "duration = round(self.seconds)"),
    Mutant(DATA, "counts.pop() if len(counts) == 1 else 0", "max(counts)", "heads of layers that have fewer"),
    Mutant(DATA, "max(round(n * side / longer), 1)", "round(n * side / longer)", "a thin grid without a row"),
    Mutant(DATA, "_of_layer(ask, axes, order - 1, layers=name)", "_of_layer(ask, axes, order, layers=name)"),
    Mutant(DATA, 'mode="area"', 'mode="nearest"', "every second token of a fine map"),
    Mutant(DATA, "T * H + T * L + H * L", "T * H + T * L", "head and layer at once are not counted"),
    Mutant(BUILD, "round(100 * (group + 1) / groups)", "round(100 * group / groups) + 1"),
    Mutant(BUILD, "return [grid[1], grid[0]]", "return list(grid)", "a picture's place on its side"),
    Mutant(BUILD, "most = [max(group)", "most = [min(group)", "calls of the layer that ran least"),
    Mutant(BUILD, "pictures = pictures[:1]", "pass", "one picture as often as there are frames"),
    Mutant(JS, "((best % w) + 0.5) / w", "((best % h) + 0.5) / h", "the strongest place of a map that is not square"),
    Mutant(JS, "(high * heat.values.length) / total", "high / total", "shares instead of times the mean"),
    Mutant(JS, "fixed > data.order ?", "fixed > 3 ?", "panels of picks that the file does not hold"),
    Mutant(ARRAYS, "[0.299, 0.587, 0.114]", "[0.114, 0.587, 0.299]", "blue for red"),
    Mutant(ARRAYS, "n * PANEL_PIXELS / longer", "n * PANEL_PIXELS / height", "a wide picture stays large"),
    Mutant(PATCHES, "levels=[mask.max() / 2]", "levels=[0.5]", "a faint mask has no outline"),
    Mutant(PATCHES, "canvas or maps.canvas", "maps.canvas", "a point of another canvas is marked elsewhere"),
    Mutant(LABELS, ".max(0)  #", ".min(0)  #", "calls of the layer that a cache skipped"),
    Mutant(LABELS, "math.floor(math.log10(high))", "math.ceil(math.log10(high))", "0.12 for 1.2"),
    Mutant(RUNS, "vmin=-most, vmax=most", "vmin=float((b - a).min()), vmax=float((b - a).max())", "white is a change"),
    Mutant(BUDGET, "if shares.one_group_a_step else T / 100", "if shares.one_group_a_step else T"),
]
