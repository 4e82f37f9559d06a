"""Bugs in scores and boxes."""

from tests.mutants import Mutant

TESTS = ["tests/test_metrics.py", "tests/test_images.py"]
METRICS, DETECT, IMAGES = "i2am/metrics.py", "i2am/detect.py", "i2am/_images.py"
TORCHMETRICS = "i2am/torchmetrics.py"
TESTS_OF = {TORCHMETRICS: ["tests/test_torchmetrics.py"]}
MUTANTS = [
    Mutant(
        METRICS,
        'a = F.interpolate(a[:, None], m.shape[-2:], mode="bicubic"',
        'a = F.interpolate(a[:, None], m.shape[-2:], mode="bilinear"',
    ),
    Mutant(METRICS, "a = _min_max(a * m if premultiply else a)", "a = a * m if premultiply else a", "scaled once"),
    Mutant(METRICS, "a = _min_max(-a if complement else a)", "a = _min_max(a)", "complement does nothing"),
    Mutant(METRICS, "a = torch.where(a > THRESHOLD, a, 0.0)", "a = torch.where(a > THRESHOLD, 1.0, 0.0)", "binary"),
    Mutant(METRICS, "a = torch.where(a > THRESHOLD, a, 0.0)", "a = torch.where(a >= THRESHOLD, a, 0.0)"),
    Mutant(METRICS, "/ m.sum((1, 2)) - OUTSIDE_WEIGHT", "/ m.mean((1, 2)) - OUTSIDE_WEIGHT"),
    Mutant(METRICS, "    a = a.clamp_min(0)\n", "", "contrast of a peak is negative"),
    Mutant(METRICS, "2 * tolerance + 1, 1, tolerance", "tolerance + 1, 1, tolerance // 2", "half the tolerance"),
    Mutant(METRICS, "peak = (a == a.amax((1, 2), keepdim=True))", "peak = (a == a.amax())", "the batch's maximum"),
    Mutant(METRICS, "- n * (n + 1) / 2) / (n", "- n * (n - 1) / 2) / (n"),
    Mutant(
        METRICS,
        "return _min_max(a) > threshold, m > 0.5, single",
        "return a > threshold, m > 0.5, single",
        "not scaled",
    ),
    Mutant(
        METRICS, "return _min_max(a) > threshold, m > 0.5, single", "return _min_max(a) > threshold, m >= 0.5, single"
    ),
    Mutant(METRICS, "(score + _overlap(~hot, ~inside)) / 2, score", "(score + _overlap(~hot, ~inside)) / 2, score / 2"),
    Mutant(METRICS, "inside = (m > 0.5).flatten(1)", "inside = (m > 0).flatten(1)", "soft edges are inside"),
    Mutant(
        METRICS,
        "low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)",
        "low, high = x.amin(), x.amax()",
    ),
    Mutant(METRICS, "return a, m, single_map and single_mask", "return a, m, single_map or single_mask"),
    Mutant(METRICS, "/ (x[-1] - x[0])", "", "an area that depends on the shares"),
    Mutant(
        DETECT,
        "inner[BORDER:-BORDER, BORDER:-BORDER] = hot[BORDER:-BORDER, BORDER:-BORDER]",
        "inner[1:-1, 1:-1] = hot[1:-1, 1:-1]",
    ),
    Mutant(DETECT, "    hot = ndimage.binary_opening(hot)\n", "", "whiskers stay"),
    Mutant(DETECT, "smallest * hot.size", "smallest * hot.shape[0]", "every speck counts"),
    Mutant(
        DETECT,
        "float(x.min() + float(threshold) * (x.max() - x.min()))",
        "float(float(threshold) * x.max())",
        "a share of the maximum",
    ),
    Mutant(
        DETECT,
        "x.clamp_min(max(FLOOR * x.max().item(), 1e-300)).log()",
        "x.clamp_min(1e-300).log()",
        "zeros are far away",
    ),
    Mutant(DETECT, "largest = 1 + int(np.argmax(np.bincount(labels.flat)[1:]))", "largest = 1", "the first component"),
    Mutant(DETECT, "x[None, None], size, mode", "x[None, None], size[::-1], mode", "width and height swapped"),
    Mutant(DETECT, "below * (x.size - below) * apart**2", "apart**2", "Otsu without the sizes"),
    Mutant(DETECT, "max(width, 0)", "abs(width)", "boxes apart overlap"),
    Mutant(DETECT, "shared / (sum(areas) - shared)", "shared / sum(areas)"),
    Mutant(
        DETECT,
        "return Box(rows.start, columns.start, rows.stop, columns.stop)",
        "return Box(rows.start, columns.start, rows.stop - 1, columns.stop - 1)",
    ),
    Mutant(IMAGES, "BITS = {8: 255, 16: 65535}", "BITS = {8: 255, 16: 65280}"),
    Mutant(
        IMAGES, 'if what == "mask" and high <= 1:', 'if what == "mask" and high < 1:', "masks of 0 and 1 are refused"
    ),
    Mutant(IMAGES, "if alpha.min() < 255:", "if False:", "alpha is dropped"),
    Mutant(IMAGES, "if spread.max() > 16:", "if spread.max() > 200:", "labels in colour are masks"),
    Mutant(
        IMAGES, "upright = ImageOps.exif_transpose(image)", "upright = image.copy()", "photographs lie on their side"
    ),
    Mutant(IMAGES, "formats=known", "formats=None", "EPS is opened"),
    Mutant(TORCHMETRICS, "self.count += scores.numel()", "self.count += 1", "a mean of batches' means"),
    Mutant(
        TORCHMETRICS,
        'torch.int64), dist_reduce_fx="sum")\n        self.add',
        'torch.int64), dist_reduce_fx="mean")\n        self.add',
    ),
    Mutant(
        TORCHMETRICS,
        'self.add_state("total", torch.tensor(0, dtype=torch.int64)',
        'self.add_state("total", torch.tensor(0.0)',
        "float32 sums, cast with the model",
    ),
    Mutant(TORCHMETRICS, "        return self\n", "        return super().set_dtype(dst_type)\n", "sums are cast"),
    Mutant(TORCHMETRICS, "complement=self.complement, premultiply=self.premultiply", "complement=self.complement"),
    Mutant(TORCHMETRICS, "(inside.shape[1], inside.shape[2])", "(inside.shape[2], inside.shape[1])"),
    Mutant(
        TORCHMETRICS, "size=size if inside is None else (inside.shape[1], inside.shape[2])", "size=size", "in map cells"
    ),
    Mutant(TORCHMETRICS, "            smallest=self.smallest,\n", ""),
    Mutant(TORCHMETRICS, "            threshold=self.threshold,\n", ""),
    Mutant(TORCHMETRICS, "    if others not in (1, maps):", "    if others > maps:"),
    Mutant(TORCHMETRICS, "        if not self.count:", "        if not self.total:"),
    Mutant(TORCHMETRICS, 'if error.name != "torchmetrics"', "if False", "a broken one is called missing"),
]
