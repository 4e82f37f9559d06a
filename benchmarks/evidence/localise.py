"""Where things are: the reference is used, R2G finds the object, boxes fit, SRAM finds the true source."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence.subject import (
    SEED,
    Setting,
    finest,
    interval,
    masked_error,
    masked_ssim,
    paint,
    patch_pixels,
    tasks,
    traced,
    true_places,
)
from i2am import metrics, zoo
from i2am.detect import Box, box_of, detect_box
from i2am.zoo import data

INPAINTING = ("exemplar", "tryon")


class Columns(dict):
    """Samples gathered under (row, column), as intervals at the end."""

    def add(self, row: str, **scores) -> None:
        for column, score in scores.items():
            self.setdefault(row, defaultdict(list))[column].extend(torch.as_tensor(score).double().flatten().tolist())

    def intervals(self) -> dict[str, dict[str, list[float]]]:
        return {row: {c: interval(x) for c, x in columns.items()} for row, columns in self.items()}


def model(name: str, setting: Setting) -> dict:
    """One model on its tasks: is the reference used, does R2G find the object, does SRAM find the source?"""
    pipe, rng = setting.load(name), np.random.default_rng(SEED)
    found = {"used": Columns(), "correspondence": Columns()}
    if name in INPAINTING:
        found |= {"localisation": Columns(), "detection": Columns()}
    for sample in tasks(name, setting):
        pictures, maps = traced(pipe, sample, setting.steps, record="qk")
        swapped = paint(pipe, sample, setting.steps, sample.reference.roll(1, 0))
        shown = {"right": pictures, "swapped": swapped}
        if name == "superres":
            shown["bicubic enlargement"] = F.interpolate(sample.reference, scale_factor=4, mode="bicubic")
        for row, x in shown.items():
            found["used"].add(row, error=masked_error(x, sample), ssim=masked_ssim(x, sample))
        add_correspondence(found["correspondence"], maps, sample, patch_pixels(pipe, sample))
        if name in INPAINTING:
            add_localisation(found["localisation"], maps, sample)
            add_detection(found["detection"], maps, sample, rng)
    return {part: table.intervals() for part, table in found.items()}


# ------------------------------------------------------------------------------------------------------- localisation


def r2g_maps(maps) -> dict[str, Tensor]:
    """The maps that compete for the object's place."""
    return {
        "R2G (column softmax), all layers": maps.ulam("r2g"),
        "R2G, all layers, lift": maps.ulam("r2g", normalize="lift"),
        "R2G (column softmax), finest decoder layers": maps.ulam("r2g", layers=finest(maps)),
        "row softmax, mean over every key": torch.ones_like(maps.ulam("mass")),  # a constant by definition
        "DAAM's sum (row softmax), all layers": maps.ulam("mass"),
        "DAAM's sum (row softmax), finest decoder layers": maps.ulam("mass", layers=finest(maps)),
    }


def add_localisation(table: Columns, maps, sample: zoo.Sample) -> None:
    """Column against row softmax, on the object's mask."""
    truth = sample.object[:, 0]
    for row, map in r2g_maps(maps).items():
        table.add(
            row,
            auc=metrics.ranking_auc(map, truth),
            contrast=metrics.contrast(map, truth),
            pointing=metrics.pointing_game(map, truth),
            mask_iou=metrics.mask_iou(map, truth),
            imacs=metrics.imacs(map, truth),
        )


def add_detection(table: Columns, maps, sample: zoo.Sample, rng: np.random.Generator) -> None:
    """Boxes of the same maps against the object's, and boxes that no map was needed for."""
    size = tuple(sample.object.shape[-2:])
    truth = [box_of(mask) for mask in sample.object[:, 0]]
    for row, map in r2g_maps(maps).items():
        for column, threshold in (("otsu", "otsu"), ("share", 0.4)):
            boxes = [detect_box(x, size=size, threshold=threshold) for x in map]
            table.add(row, **{column: metrics.box_iou(boxes, truth)})
    others = [moved(truth[i], rng) for i in rng.permutation(len(truth))]
    table.add("another object's box, elsewhere", otsu=metrics.box_iou(others, truth))
    told = [box_of(mask) for mask in sample.mask[:, 0]]
    table.add("the mask's own box (the model is told)", otsu=metrics.box_iou(told, truth))


def moved(box: Box, rng: np.random.Generator, size: int = data.SIZE) -> Box:
    """A box of the same size somewhere else."""
    height, width = box.bottom - box.top, box.right - box.left
    top, left = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
    return Box(top, left, top + height, left + width)


# ----------------------------------------------------------------------------------------------------- correspondences


def add_correspondence(table: Columns, maps, sample: zoo.Sample, scale: float) -> None:
    """SRAM's best and mean place against the true source, by layer and time."""
    choices = {"default layers": {}, "finest decoder layers": dict(layers=finest(maps))}
    choices |= {layer: dict(layers=layer) for layer in maps.recorded_layers}
    choices |= {f"finest decoder layers, time {t}": dict(layers=finest(maps), times=t) for t in range(maps.time_groups)}
    for row, options in choices.items():
        add_errors(table, row, maps.match(**options), sample, scale)
    add_chance(table, sample)


def add_errors(table: Columns, row: str, match, sample: zoo.Sample, scale: float) -> None:
    truth = true_places(sample, tuple(match.best.shape[1:3]))
    best = metrics.correspondence_error(match.best, truth, scale)
    mean = metrics.correspondence_error(match.expected, truth, scale)
    known = [e[e.isfinite()] for e in best]
    near = sample.reference.shape[-1] / 8
    table.add(
        row,
        best=[e.median() if len(e) else torch.nan for e in known],
        mean=[e[e.isfinite()].median() if e.isfinite().any() else torch.nan for e in mean],
        pck=[metrics.pck(e, near) if len(e) else torch.nan for e in known],
    )


def add_chance(table: Columns, sample: zoo.Sample) -> None:
    """A random place of the object on the reference for each cell."""
    truth = true_places(sample, (16, 16))
    generator = torch.Generator().manual_seed(SEED)
    for places, mask in zip(truth, sample.reference_object[:, 0], strict=True):
        inside = (mask > 0.5).nonzero().double() + 0.5
        draw = inside[torch.randint(len(inside), places.shape[:2], generator=generator)]
        error = metrics.correspondence_error(draw, places.double())
        if error.isfinite().any():
            table.add("a random place of the object", best=error.nanmedian(), pck=metrics.pck(error, len(mask) / 8))


# -------------------------------------------------------------------------------------------------------------- stereo


def stereo(setting: Setting) -> dict:
    """Two photographs of a motorcycle, and the true disparity: does SRAM find more than the pose that it was told?"""
    pipe, table = setting.load("tryon"), Columns()
    for sample in stereo_tasks(setting):
        picture, maps = traced(pipe, sample, setting.steps, record="qk")
        swapped = paint(pipe, sample, setting.steps, sample.reference.roll(1, 0))
        table.add("right", error=masked_error(picture, sample))
        table.add("swapped", error=masked_error(swapped, sample))
        for row, options in {"default layers": {}, "finest decoder layers": dict(layers=finest(maps))}.items():
            add_errors(table, row, maps.match(**options), sample, patch_pixels(pipe, sample))
        told = true_places(sample._replace(source=sample.pose.masked_fill(sample.source.isnan(), torch.nan)), (16, 16))
        truth = true_places(sample, (16, 16))
        error = metrics.correspondence_error(told.nan_to_num(0), truth)
        known = [e[e.isfinite()] for e in error]
        table.add("what the pose says", best=[e.median() for e in known], pck=[metrics.pck(e, 8) for e in known])
    return table.intervals()


def stereo_tasks(setting: Setting, halvings: int = 1):
    """Left view with a hole, right view as the reference, shifted by the piece's median disparity: that is the pose."""
    left, right = (data.photograph(f"motorcycle_{side}.png", halvings) for side in ("left", "right"))
    disparity = torch.from_numpy(np.load(data.photograph_file("motorcycle_disp.npz"))["arr_0"]).float()
    disparity = disparity[:: 2**halvings, :: 2**halvings][: left.shape[1], : left.shape[2]] / 2**halvings
    rng, size, made = np.random.default_rng(SEED), data.SIZE, []
    pixels = data.centres((size, size), 1.0)
    hole = ((pixels - size / 2).abs().amax(-1) < 18).float()
    while len(made) < setting.batches * setting.batch:
        top, column = int(rng.integers(left.shape[1] - size)), int(rng.integers(left.shape[2] - size))
        piece = disparity[top : top + size, column : column + size]
        known = piece.isfinite() & (piece > 0) & (hole > 0)
        if known.sum() < 0.9 * hole.sum():
            continue
        shift = round(float(piece[known].median()))
        if column - shift < 0:
            continue
        source = pixels.clone()
        source[..., 1] += shift - piece
        made.append(
            zoo.Sample(
                picture=left[:, top : top + size, column : column + size],
                mask=hole[None],
                reference=right[:, top : top + size, column - shift : column - shift + size],
                object=known[None].float(),
                reference_object=hole[None],
                source=source.masked_fill(~known[..., None], torch.nan),
                pose=pixels,
            )
        )
        if len(made) % setting.batch == 0:
            yield zoo.Sample(*(torch.stack(x) for x in zip(*made[-setting.batch :], strict=True)))
