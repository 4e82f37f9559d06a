"""Leffa's flow loss on a diffusers UNet with a second network, whose tokens join the keys of its self-attention.

The garment runs through the second UNet first; every self-attention of the generating one then attends to
``[own tokens ‖ garment tokens]``. The expected place among the garment's tokens is a flow field, with which the garment
is warped and compared with the true picture. ``python docs/examples/leffa.py`` trains random weights for a few steps.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

import i2am
from i2am import losses


class Joined(nn.Module):
    """A self-attention that attends to banked tokens as well, if there are any."""

    def __init__(self, attention: nn.Module, bank: dict[str, Tensor], name: str):
        super().__init__()
        self.attention, self.bank, self.name = attention, bank, name

    def forward(self, x: Tensor, encoder_hidden_states: None = None, **kwargs: object) -> Tensor:
        keys = torch.cat([x, self.bank[self.name]], dim=1)
        return self.attention(x, encoder_hidden_states=keys)


def connect(garment_unet: nn.Module, unet: nn.Module) -> dict[str, Tensor]:
    """Let the first network write what enters its self-attention, and the second one read it; return the bank."""
    bank: dict[str, Tensor] = {}
    for name, block in garment_unet.named_modules():
        if isinstance(block, BasicTransformerBlock):

            def write(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                bank[name] = args[0]

            block.attn1.register_forward_pre_hook(write)
    for name, block in list(unet.named_modules()):
        if isinstance(block, BasicTransformerBlock):
            block.attn1 = Joined(block.attn1, bank, name)
    return bank


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    )


def flow_loss(probe: i2am.tracing.probe.Probe, garment: Tensor, picture: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over layers of the warped garment's distance from the picture, where the mask is."""
    total = []
    for read in probe.reads:
        target, weight = (F.adaptive_avg_pool2d(x, read.grid) for x in (picture, mask))
        total.append(
            losses.photometric(
                read.expected,
                F.adaptive_avg_pool2d(garment, read.key_grid),
                target,
                size=read.key_grid,
                mass=read.mass,
                weight=weight.flatten(1),
            )
        )
    return torch.stack(total).mean()


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args(argv).steps
    torch.manual_seed(0)
    garment_unet, unet = tiny_unet(), tiny_unet()
    connect(garment_unet, unet)
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW([*unet.parameters(), *garment_unet.parameters()], lr=1e-3)
    text = torch.randn(2, 4, 24)
    garment = F.interpolate(torch.rand(2, 3, 4, 4), (16, 16), mode="bicubic")  # stands for a garment's picture
    picture = garment.roll((3, 2), (2, 3))  # worn: moved
    mask = torch.ones(2, 1, 16, 16)
    encode = nn.Conv2d(3, 4, 1).requires_grad_(False)  # stands for the autoencoder
    history = []
    for step in range(steps):
        timestep = torch.randint(0, 500, (2,))  # where there is something to be seen
        noise = torch.randn(2, 4, 16, 16)
        noisy = scheduler.add_noise(encode(picture), noise, timestep)
        garment_unet(encode(garment), 0, text)  # fills the bank
        with i2am.probe(unet, reference=i2am.Banked(), reads=("expected", "mass")) as probe:
            loss = F.mse_loss(unet(noisy, timestep, text).sample, noise)
            warped = flow_loss(probe, garment, picture, mask)
            optimizer.zero_grad()
            (loss + 10 * warped).backward()
        optimizer.step()
        history.append(warped.item())
        if step % 5 == 0:
            print(f"step {step}: denoising {loss.item():.3f}, flow {warped.item():.4f} in {len(probe.reads)} layers")
    return history


if __name__ == "__main__":
    main()
