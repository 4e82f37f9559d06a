"""What superres is worth as an enlargement: one sample, the mean of eight, and no model at all."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence.localise import Columns
from benchmarks.evidence.subject import Setting, paint, tasks
from i2am import zoo
from i2am.zoo import data
from i2am.zoo.pipelines import bicubic

DRAWN = 8  # samples of the mean
STEPS = 10  # the pipeline's own default
SHARE = 0.25  # of the tasks: each is drawn eight times
PIECE = 128  # pixels a side of a photograph's piece
QUARTER = 0.25  # cycles per pixel: a bicubic enlargement has hardly anything above it


def enlargement(setting: Setting) -> dict:
    """The tasks (64 px, resampled) and pieces of the held-out photographs as they are (128 px)."""
    pipe, photographs = setting.load("superres"), pieces(max(min(setting.samples // 52, 4), 1))
    some = list(tasks("superres", setting, share=SHARE))
    counts = sum(len(x.picture) for x in some), len(photographs.picture)
    scores = _scores(pipe, some), _scores(pipe, [photographs])
    return {f"{counts[0]} tasks": scores[0], f"{counts[1]} pieces of photographs": scores[1], "n": sum(counts)}


def pieces(each: int) -> zoo.Sample:
    """``each`` pieces of every held-out photograph, spread over it, at its own resolution; a superres task of them."""
    found = []
    for name in data.PHOTOGRAPHS["held-out"]:
        photo = data.photograph(name)
        room = np.array(photo.shape[1:]) - PIECE
        for i in range(each):
            top, left = (room * ((i + 0.5) / each, (0.5 + 0.382 * i) % 1)).astype(int)
            found.append(photo[:, top : top + PIECE, left : left + PIECE])
    picture = torch.stack(found)
    reference = F.avg_pool2d(picture, data.FACTOR)
    everywhere = torch.ones_like(picture[:, :1])
    source = torch.zeros(len(picture), PIECE, PIECE, 2)
    return zoo.Sample(picture, everywhere, reference, everywhere, torch.ones_like(reference[:, :1]), source, None)


def _scores(pipe: zoo.SuperResolutionPipeline, batches) -> dict[str, dict[str, list[float]]]:
    table, power = Columns(), []
    for sample in batches:
        drawn = []
        for i in range(DRAWN):
            generator = torch.Generator().manual_seed(i)
            drawn.append(paint(pipe, sample, STEPS, generator=generator))
        plain = bicubic(sample.reference, sample.picture.shape[-2:]).clamp(-1, 1)
        rows = {"one sample": drawn[0], f"mean of {DRAWN}": torch.stack(drawn).mean(0), "bicubic": plain}
        base = psnr(plain, sample.picture)
        power.append(fine_power(sample.picture))
        for row, x in rows.items():
            score = psnr(x, sample.picture)
            table.add(row, psnr=score, gain=score - base, fine=fine_power(x))
    truth = torch.cat(power).mean().item()
    for columns in table.values():  # shares of the truth's power, so that their mean is the ratio of totals
        columns["fine"] = [x / truth for x in columns["fine"]]
    return table.intervals()


def psnr(pictures: Tensor, truth: Tensor) -> Tensor:
    """``[B]`` in dB, of colours in [-1, 1]."""
    return 10 * torch.log10(4 / (pictures - truth).square().mean((1, 2, 3)).clamp_min(1e-9))


def fine_power(pictures: Tensor) -> Tensor:
    """``[B]`` mean squared amplitude at spatial frequencies above a quarter of the sampling rate."""
    spectrum = torch.fft.fft2(pictures.double(), norm="ortho").abs().square().mean(1)  # [B, H, W]
    y, x = (torch.fft.fftfreq(n) for n in pictures.shape[-2:])
    fine = torch.hypot(*torch.meshgrid(y, x, indexing="ij")) > QUARTER
    return spectrum[:, fine].sum(1) / fine.numel()
