"""A LoRA of an IP-Adapter UNet with the ``inside`` loss: what the image prompt influences is kept inside a box.

``python docs/examples/lora.py`` makes a small random UNet with an IP-Adapter; with a real one, load it as usual
(``pipe.load_ip_adapter(...)``) and pass ``pipe.unet``.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from peft import LoraConfig
from torch import Tensor

import i2am
from i2am import losses

TEXT, IMAGE, TOKENS = 24, 32, 4  # width of text tokens and of image embeddings; tokens of an image prompt


def ip_adapter_unet() -> UNet2DConditionModel:
    """Return a small random UNet with an IP-Adapter, as ``load_ip_adapter`` leaves it."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT,
        attention_head_dim=4,
    )
    processors = {}
    for name, processor in unet.attn_processors.items():
        module = unet.get_submodule(name.removesuffix(".processor"))
        crosses = module.is_cross_attention
        processors[name] = IPAdapterAttnProcessor2_0(module.inner_dim, TEXT, [TOKENS]) if crosses else processor
    unet.set_attn_processor(processors)
    projection = ImageProjection(IMAGE, TEXT, num_image_text_embeds=TOKENS)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    return unet


def box_loss(probe: i2am.tracing.probe.Probe, box: Tensor) -> Tensor:
    """Return the mean over layers of ``−ln`` of the image prompt's influence that lies inside ``box [B, 1, H, W]``."""
    scores = [losses.inside(read.r2g, F.adaptive_avg_pool2d(box, read.grid).flatten(1)) for read in probe.reads]
    return torch.stack(scores).mean()


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args(argv).steps
    torch.manual_seed(0)
    unet = ip_adapter_unet().requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k"]))
    adapter = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=1e-2)
    scheduler = DDPMScheduler()
    clean, text, prompt = torch.randn(2, 4, 16, 16), torch.randn(2, 6, TEXT), torch.randn(2, 1, IMAGE)
    box = torch.zeros(2, 1, 16, 16)
    box[..., 4:12, 4:12] = 1  # where the object is to be
    history = []
    for step in range(steps):
        timestep, noise = torch.randint(0, 1000, (2,)), torch.randn_like(clean)
        noisy = scheduler.add_noise(clean, noise, timestep)
        with i2am.probe(unet, reads=("r2g",)) as probe:  # the family knows where the image prompt is
            output = unet(noisy, timestep, text, added_cond_kwargs={"image_embeds": [prompt]}).sample
            inside = box_loss(probe, box)
            optimizer.zero_grad()
            (F.mse_loss(output, noise) + 0.1 * inside).backward()
        optimizer.step()
        history.append(inside.item())
        if step % 5 == 0:
            print(f"step {step}: {100 * float(torch.tensor(-history[-1]).exp()):.0f} % of the influence inside the box")
    return history


if __name__ == "__main__":
    main()
