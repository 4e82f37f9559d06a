"""Parts of Stable Diffusion pipelines that need no download."""

import json
import string
import tempfile
from pathlib import Path

import torch
from torch import nn

SHARPNESS = 3.0  # of an adapter's attention: untrained, it is nearly uniform


def build_tokenizer():
    """A CLIP tokenizer that spells: its vocabulary is ASCII. Needs no download."""
    from transformers import CLIPTokenizer

    letters = sorted(set(string.printable) - set(string.whitespace))
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def ip_adapter_weights(unet: nn.Module, image_dim: int) -> dict[str, dict[str, torch.Tensor]]:
    """A random "full" IP-Adapter for ``unet``, in the layout of the published files (``load_ip_adapter`` reads it).

    Args:
        unet: a UNet2DConditionModel; its text cross-attentions give the shapes.
        image_dim: width of the image encoder's tokens.
    """
    cross_dim = unet.config.cross_attention_dim
    projection = nn.Sequential(
        nn.Linear(image_dim, image_dim), nn.GELU(), nn.Linear(image_dim, cross_dim), nn.LayerNorm(cross_dim)
    )
    adapter = {}
    cross_attentions = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    for i, name in enumerate(cross_attentions):
        for part in ("to_k", "to_v"):
            linear = nn.Linear(cross_dim, unet.get_submodule(f"{name}.{part}").out_features, bias=False)
            adapter[f"{2 * i + 1}.{part}_ip.weight"] = SHARPNESS * linear.weight.detach()
    return {"image_proj": projection.state_dict(prefix="proj."), "ip_adapter": adapter}
