"""Flow supervision: while a young model learns where to look, its cross-attention is told the true source.

The tasks know which reference pixel every picture pixel came from. For some cells of the object, each layer's attention
over the reference's tokens is compared with a small bell around that pixel (cross entropy, as correspondence
supervision of try-on models does it). Logits of the chosen cells alone are computed again, so that it costs little.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2am.zoo.data import Sample
from i2am.zoo.encoder import centres
from i2am.zoo.pipelines import ZooPipeline

CELLS = 48  # supervised queries per picture and layer
BELL = 0.7  # standard deviation of the target, in patches
INSIDE = 0.6  # share of a cell that must lie on the object
COARSEST = 4  # pixels of the picture a side of a query's cell: coarser layers are left alone


class FlowSupervision:
    """Watches the cross-attention of a pipeline's UNet and scores where it looks."""

    def __init__(self, pipe: ZooPipeline, generator: torch.Generator):
        self.encoder = pipe.image_encoder
        self.generator = generator
        self.watching = False
        self.seen: list[tuple[nn.Module, Tensor, Tensor]] = []
        for module in pipe.unet.modules():
            if hasattr(module, "to_k") and hasattr(module, "heads"):
                module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tokens = kwargs.get("encoder_hidden_states")
        if self.watching and tokens is not None:
            self.seen.append((module, args[0] if args else kwargs["hidden_states"], tokens))

    def __enter__(self) -> FlowSupervision:
        self.watching, self.seen = True, []
        return self

    def __exit__(self, *_: object) -> None:
        self.watching, self.seen = False, []

    def loss(self, sample: Sample) -> Tensor:
        """Return mean divergence in nats from the true source, over fine layers, heads and cells of the object."""
        size = sample.picture.shape[-1]
        losses = []
        for attention, hidden, tokens in self.seen:
            cell = size // round(hidden.shape[1] ** 0.5)
            if cell <= COARSEST:
                losses.append(self._of_layer(attention, hidden, tokens, sample, cell))
        return torch.stack(losses).mean()

    def _of_layer(self, attention: nn.Module, hidden: Tensor, tokens: Tensor, sample: Sample, cell: int) -> Tensor:
        places, inside = true_places(sample, cell)  # [B, N, 2], [B, N]
        chosen = torch.multinomial(inside + 1e-6, min(CELLS, inside.shape[1]), generator=self.generator)  # [B, n]
        target = self._target(places.gather(1, chosen[..., None].expand(-1, -1, 2)), sample.reference)  # [B, n, K]
        queries = attention.to_q(hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1])))
        q, k = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (queries, attention.to_k(tokens)))
        logp = (q @ k.transpose(-1, -2) * attention.scale).log_softmax(-1)[..., 1 : 1 + target.shape[-1]]
        entropy = -(target * target.clamp_min(1e-9).log()).sum(-1)
        divergence = -(target[:, None] * logp).sum(-1).mean(1) - entropy  # [B, n]
        counts = inside.gather(1, chosen)
        return (divergence * counts).sum() / counts.sum().clamp_min(1)

    def _target(self, places: Tensor, reference: Tensor) -> Tensor:
        """Return bells ``[B, n, K]`` over the patches of ``reference`` around ``places [B, n, 2]``, its pixels."""
        patch = self.encoder.config.patch_size
        patches = centres(self.encoder.grid(*reference.shape[-2:]), patch).reshape(-1, 2)
        distance = (places[:, :, None] - patches).square().sum(-1)
        return (-distance / (2 * (BELL * patch) ** 2)).softmax(-1)


def true_places(sample: Sample, cell: int) -> tuple[Tensor, Tensor]:
    """Return mean sources ``[B, N, 2]`` of cells of ``cell`` pixels, and which of them lie on the object ``[B, N]``."""
    known = (~sample.source.isnan().any(-1)).float()[:, None]
    share = F.avg_pool2d(known, cell)
    total = F.avg_pool2d(sample.source.nan_to_num(0).permute(0, 3, 1, 2) * known, cell)
    places = (total / share.clamp_min(1e-6)).flatten(2).transpose(1, 2)
    return places, (share.flatten(1) > INSIDE).float()
