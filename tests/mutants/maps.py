"""Bugs in maps: from sums to levels, regions of recorded calls, the file."""

from tests.mutants import Mutant

TESTS = ["tests/maps/test_levels.py", "tests/maps/test_maps.py", "tests/maps/test_file.py", "tests/test_images.py"]
AGGREGATE, READING, SRAM = "i2am/maps/aggregate.py", "i2am/maps/reading.py", "i2am/maps/sram.py"
FILE, HEADER, MAPS = "i2am/maps/file.py", "i2am/maps/header.py", "i2am/maps/__init__.py"
MUTANTS = [
    Mutant(AGGREGATE, "scale, x = float(s.keys), x", "scale, x = float(s.g2r.shape[-1]), x", "lift by own keys"),
    Mutant(AGGREGATE, "s.keys / s.g2r.shape[-1]", "1.0", "lift leaves mass as it is"),
    Mutant(AGGREGATE, "x[..., s.skip :]", "x[..., : x.shape[-1] - s.skip]", "drops the last tokens"),
    Mutant(AGGREGATE, 'mode="bicubic", align_corners=False', 'mode="bicubic", align_corners=True'),
    Mutant(AGGREGATE, 'mode="bicubic", align_corners=False', 'mode="bilinear", align_corners=False'),
    Mutant(AGGREGATE, "grids.clamp_min(0)", "grids", "no clamp"),
    Mutant(AGGREGATE, "return total / ran[:, None, None]", "return total / len(self.sums)", "layers that did not run"),
    Mutant(AGGREGATE, "/ len(heads))[:, :, 0]", "/ s.heads)[:, :, 0]", "mean over all heads though some were chosen"),
    Mutant(AGGREGATE, "if self._last is None or self._last[0] is not s:", "if self._last is None:", "never asks again"),
    Mutant(
        AGGREGATE,
        "if self._last is None or self._last[0] is not s:",
        "if self._last is None or self._last[0].layer != s.layer:",
        "one reference's rows given for another",
    ),
    Mutant(AGGREGATE, "return sums[times][:, :, heads], counts[times]", "return sums[times], counts[times]"),
    Mutant(AGGREGATE, "counts[t] = len(mine)", "counts[t] = 1", "a mean over groups instead of calls"),
    Mutant(AGGREGATE, "weights = F.pad(weights, (s.skip, 0))", "weights = F.pad(weights, (0, s.skip))"),
    Mutant(AGGREGATE, "return [i % length for i in chosen]", "return sorted(i % length for i in chosen)"),
    Mutant(AGGREGATE, "wrong = [i for i in chosen if not -length <= i < length]", "wrong = []"),
    Mutant(AGGREGATE, "if broken:\n", "if False:\n", "NaN goes into the mean"),
    Mutant(READING, "max((grid_of(s, direction) for s in sums), key=area)", "grid_of(sums[0], direction)"),
    Mutant(
        READING,
        "[name for name in of_reference if of_reference[name].default] or list(of_reference)",
        "list(of_reference)",
    ),
    Mutant(
        SRAM, "int(y * grid[0] / height) * grid[1]", "int(y * grid[0] / height) * grid[0]", "rows of the wrong length"
    ),
    Mutant(SRAM, "int(y * grid[0] / height)", "round(y * grid[0] / height)", "the nearest corner's token"),
    Mutant(
        SRAM,
        'torch.einsum("ay,bx->abyx", rows, columns)',
        'torch.einsum("ay,bx->bayx", rows, columns)',
        "cells by column",
    ),
    Mutant(
        SRAM,
        "mask = mask[:, heads] if mask.shape[1] > 1 else mask",
        "mask = mask[:, : len(heads)] if mask.shape[1] > 1 else mask",
    ),
    Mutant(SRAM, "mask = None if mask is None else mask.transpose(-1, -2)", "pass", "reverse keeps the mask's axes"),
    Mutant(
        SRAM, "active = weights.flatten(0, 1).any(0)", "active = weights[0].any(0)", "the first image's region alone"
    ),
    Mutant(SRAM, 'x["k"], x["q"], x["col_lse"]', 'x["k"], x["q"], x["row_lse"]', "reverse by the wrong normaliser"),
    Mutant(
        SRAM, "w.expand(B, -1, -1) for w in each", "w[:1].expand(B, -1, -1) for w in each", "one image's region for all"
    ),
    Mutant(SRAM, "1 - entropy / math.log(h * w)", "entropy / math.log(h * w)", "confidence upside down"),
    Mutant(FILE, '"skip": s.skip,', '"skip": 0,', "a class token comes back as a patch"),
    Mutant(FILE, "path.resolve().parent)).as_posix()", "path.parent)).as_posix()", "links are not followed"),
    Mutant(
        FILE, "path.resolve().is_relative_to(folder.resolve())", "path.is_relative_to(folder)", "links lead outside"
    ),
    Mutant(FILE, "if not stat.S_ISREG(status.st_mode):", "if False:", "pipes are opened"),
    Mutant(FILE, "if status.st_size != size.integer(0):", "if False:", "truncated records load"),
    Mutant(FILE, "if version > VERSION:", "if False:", "files of the future"),
    Mutant(
        HEADER,
        "if isinstance(self.value, bool) or not isinstance(self.value, int)",
        "if not isinstance(self.value, int)",
    ),
    Mutant(FILE, "return embed or e.file is None or", "return e.file is None or", "embed does nothing"),
    Mutant(FILE, 'default=f["default"].flag(),', "default=True,", "the mid block joins the mean"),
    Mutant(
        MAPS,
        'max((grid_of(s, "g2r") for s in sums), key=area)',
        'grid_of(sums[0], "g2r")',
        "points on the first layer's grid",
    ),
    Mutant(
        MAPS,
        "return self._canvas or max((s.grid for s in self._sums), key=area)",
        "return max((s.grid for s in self._sums), key=area)",
    ),
]
