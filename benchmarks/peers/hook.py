"""The authors' manner, written afresh: forward hooks recompute q and k, materialise both softmaxes, keep the maps.

What I2AM's published code does to a UNet: after each cross-attention module has run, its inputs are projected once
more, the full attention is formed, and its means are kept per layer, head and step.
"""

from __future__ import annotations

import torch
from torch import nn


class HookTracer:
    """Attribution of a UNet's cross-attention by forward hooks; a context manager.

    After a run, ``r2g[layer]`` and ``g2r[layer]`` hold one ``[B, H, N]`` tensor per call, of the last ``keep`` samples
    of the batch (the conditional half).
    """

    def __init__(self, unet: nn.Module, keep: int):
        self.unet, self.keep = unet, keep
        self.r2g: dict[str, list[torch.Tensor]] = {}
        self.g2r: dict[str, list[torch.Tensor]] = {}

    def __enter__(self) -> HookTracer:
        self._handles = [
            module.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, module in self.unet.named_modules()
            if name.endswith("attn2")
        ]
        return self

    def __exit__(self, *exc) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str):
        def hook(module, args, kwargs, output):
            hidden, context = args[0], kwargs["encoder_hidden_states"]
            q, k = (
                self._heads(project(x), module.heads) for project, x in ((module.to_q, hidden), (module.to_k, context))
            )
            s = q @ k.transpose(-1, -2) * module.scale  # [b, H, Nq, Nk]
            self.r2g.setdefault(name, []).append(s.softmax(-2).mean(-1))
            self.g2r.setdefault(name, []).append(s.softmax(-1).mean(-2))

        return hook

    def _heads(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x[-self.keep :].unflatten(-1, (heads, -1)).transpose(1, 2)
