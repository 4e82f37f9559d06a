"""Ground truth for models whose tokens are text, generated picture and references in one attention.

Captures every attention call of an untraced run; a test says which queries are the generated ones, on which grid, and
hands the rest to :class:`truth.Truth`, which knows nothing of the package either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tests.helpers.truth import Captured, Truth


@dataclass
class RawCall:
    evaluation: int  # which forward of the model
    layer: str
    nth: int  # which attention call within this pass of the layer
    q: torch.Tensor
    k: torch.Tensor
    mask: torch.Tensor | None  # additive


def capture_calls(model, run, kinds) -> list[RawCall]:
    """Runs ``run()`` and returns every attention call of the modules whose class or name's end is among ``kinds``."""
    calls, handles, state = [], [], {"evaluation": -1, "layer": None, "nth": 0}
    original = F.scaled_dot_product_attention

    def sdpa(query, key, value, attn_mask=None, *args, **kwargs):
        if state["layer"] is not None:
            mask = attn_mask
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
            where = state["evaluation"], state["layer"], state["nth"]
            calls.append(RawCall(*where, query.clone(), key.clone(), mask))
            state["nth"] += 1
        return original(query, key, value, attn_mask, *args, **kwargs)

    handles.append(model.register_forward_pre_hook(lambda *_: state.update(evaluation=state["evaluation"] + 1)))
    for name, module in model.named_modules():
        if type(module).__name__ in kinds or name.endswith(tuple(f".{kind}" for kind in kinds)):
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: state.update(layer=name, nth=0)))
            handles.append(module.register_forward_hook(lambda *_: state.update(layer=None)))
    F.scaled_dot_product_attention = sdpa
    try:
        with torch.no_grad():
            run()
    finally:
        F.scaled_dot_product_attention = original
        for handle in handles:
            handle.remove()
    return calls


def generated(calls, grid, queries=slice(None), *, nth=0, evaluations=None) -> list[Captured]:
    """The calls with only their generated queries, for :class:`truth.Truth`.

    Args:
        calls: from :func:`capture_calls`.
        grid: of the generated tokens, or a function of the call.
        queries: which queries are generated, or a function of the call.
        nth: which call of a layer's pass.
        evaluations: which forwards count; None: all.
    """
    found = []
    for c in calls:
        if c.nth != nth or (evaluations is not None and c.evaluation not in evaluations):
            continue
        chosen = queries(c) if callable(queries) else queries
        on = grid(c) if callable(grid) else grid
        mask = c.mask
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., chosen, :]
        found.append(Captured(c.evaluation, c.layer, 0, on, c.q[:, :, chosen], c.k, mask))
    return found


class PerLayerGrid(Truth):
    """Each layer's reference lies on the grid of its own queries."""

    def layer(self, direction, name, size, **options):
        self.reference_grid = self.grids[name]
        return super().layer(direction, name, size, **options)

    def size(self, direction, names=None):
        return super().size("r2g", names)
