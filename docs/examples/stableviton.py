"""StableVITON's attention total variation in an attention of one's own: the materialised loss, and its two lines.

``python docs/examples/stableviton.py --side 64`` compares values, gradients and memory on one attention layer.
"""

from __future__ import annotations

import argparse
import threading
import time

import psutil
import torch
from torch import Tensor, nn

import i2am
from i2am import losses


class CrossAttention(nn.Module):
    """Queries of the person, keys and values of the garment; returns the output and the total variation loss."""

    def __init__(self, width: int, heads: int, side: int):
        super().__init__()
        self.heads, self.side = heads, side
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, garment: Tensor, mask: Tensor, *, materialised: bool = False) -> tuple[Tensor, Tensor]:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(garment)), self.split(self.to_v(garment))
        if materialised:
            out, loss = materialised_loss(q, k, v, self.side, mask)
        else:
            att = i2am.attention(q, k, v, read=("expected",), key_coordinates=losses.grid((self.side, self.side)))
            out, loss = att.out, losses.variation(att.expected, size=(self.side, self.side), weight=mask)
        return self.to_out(out.transpose(1, 2).flatten(2)), loss


def materialised_loss(q: Tensor, k: Tensor, v: Tensor, side: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the loss as it is written where the attention map is at hand: ``[B, H, N, N]`` and more."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    maps = scores.softmax(-1)
    out = maps @ v
    mean = maps.mean(1)  # [B, N, N] over heads
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()]).float()  # [2, N]
    weighted = mean[:, :, None] * places  # [B, N, 2, N]: each key's place, weighted by the attention to it
    centre = weighted.sum(-1).reshape(-1, side, side, 2)  # where each query looks
    inside = mask.reshape(-1, side, side)
    down = (centre[:, 1:] - centre[:, :-1]).abs().sum(-1)
    right = (centre[:, :, 1:] - centre[:, :, :-1]).abs().sum(-1)
    both_down, both_right = inside[:, 1:] * inside[:, :-1], inside[:, :, 1:] * inside[:, :, :-1]
    loss = (down * both_down).sum() / (both_down.sum() * len(centre))
    return out, loss + (right * both_right).sum() / (both_right.sum() * len(centre))


def measured(layer: CrossAttention, inputs: tuple[Tensor, ...], *, materialised: bool) -> dict:
    """Run forward and backward; return the loss, the gradients, seconds and the resident memory's growth in MiB."""
    layer.zero_grad()
    process, done, peak = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    out, loss = layer(*inputs, materialised=materialised)
    (out.square().mean() + 0.001 * loss).backward()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    gradients = torch.cat([p.grad.flatten() for p in layer.parameters()])
    return {"loss": loss.item(), "gradients": gradients, "seconds": seconds, "MiB": peak[0] / 2**20}


def main(argv: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=64, help="tokens a side (default 64: 4096 queries and keys)")
    side = parser.parse_args(argv).side
    torch.manual_seed(0)
    layer = CrossAttention(80, 2, side)
    person, garment = torch.randn(1, side * side, 80), torch.randn(1, side * side, 80)
    mask = (torch.rand(side * side) > 0.3).float()
    found = {}
    for name, materialised in (("i2am", False), ("materialised", True)):
        found[name] = measured(layer, (person, garment, mask), materialised=materialised)
        print("{:>13}: loss {loss:.5f}, {seconds:.2f} s, +{MiB:.0f} MiB".format(name, **found[name]))
    a, b = (found[name]["gradients"] for name in ("i2am", "materialised"))
    print(f"gradients differ by {float((a - b).abs().max() / b.abs().max()):.1e} of the largest")
    return found


if __name__ == "__main__":
    main()
