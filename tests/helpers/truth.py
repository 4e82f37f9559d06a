"""Ground truth for tracing: an untraced run's own q, k and masks, and every level by definition in float64.

Nothing here is shared with the package: the calls are captured by a recorder of this file, and the levels are written
out from the paper's equations, one loop a sum sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

PATCH = (0.6, 0.3)  # where SRAM is asked, on a picture of 1 × 1


@dataclass
class Captured:
    evaluation: int  # which call of the UNet
    layer: str
    nth: int  # which attention call within this pass of the layer
    grid: tuple[int, int]
    q: torch.Tensor
    k: torch.Tensor
    mask: torch.Tensor | None


def capture(unet, run) -> list[Captured]:
    """Runs ``run()`` and returns every cross-attention call of ``unet``, in order."""
    calls, handles, state = [], [], {"evaluation": -1, "layer": None, "nth": 0, "grid": None}
    original = F.scaled_dot_product_attention

    def sdpa(query, key, value, attn_mask=None, **options):
        if state["layer"] is not None:
            where = state["evaluation"], state["layer"], state["nth"], state["grid"]
            calls.append(Captured(*where, query.clone(), key.clone(), attn_mask))
            state["nth"] += 1
        return original(query, key, value, attn_mask, **options)

    def on_root(module, args):
        state["evaluation"] += 1

    def on_transformer(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        state["grid"] = tuple(x.shape[-2:])

    handles.append(unet.register_forward_pre_hook(on_root))
    for name, module in unet.named_modules():
        if type(module).__name__ == "Transformer2DModel":
            handles.append(module.register_forward_pre_hook(on_transformer, with_kwargs=True))
        if name.endswith("attn2"):
            handles.append(module.register_forward_pre_hook(lambda m, a, name=name: state.update(layer=name, nth=0)))
            handles.append(module.register_forward_hook(lambda m, a, o: state.update(layer=None)))
    F.scaled_dot_product_attention = sdpa
    try:
        with torch.no_grad():
            run()
    finally:
        F.scaled_dot_product_attention = original
        for handle in handles:
            handle.remove()
    return calls


class Truth:
    """Levels of one reference from captured calls.

    Args:
        calls: from :func:`capture`.
        nth: which attention call of a layer pass carries this reference.
        samples: the conditional samples of the batch.
        keys: the reference's keys.
        groups: time group of each evaluation.
        reference_grid: ``(h, w)``; skip: tokens before it.
    """

    def __init__(self, calls, *, groups, samples=slice(None), nth=0, keys=slice(None), reference_grid=None, skip=0):
        self.maps: dict[str, list] = {}
        self.grids, self.lengths = {}, {}
        self.groups, self.reference_grid, self.skip = groups, reference_grid, skip
        for c in calls:
            if c.nth != nth:
                continue
            q, k = c.q[samples].double(), c.k[samples].double()
            s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            if c.mask is not None:
                s = s + c.mask[samples].double()
            row = torch.softmax(s, dim=-1)[..., keys]  # [B, H, Q, K]
            column = torch.softmax(s[..., keys], dim=-2)
            self.grids[c.layer] = c.grid
            self.lengths[c.layer] = (q.shape[2], k.shape[2])
            patch = int(PATCH[0] * c.grid[0]) * c.grid[1] + int(PATCH[1] * c.grid[1])
            maps = {"r2g": column.mean(-1), "g2r": row.mean(-2), "mass": row.sum(-1), "sram": row[..., patch, :]}
            self.maps.setdefault(c.layer, []).append((c.evaluation, maps))

    @property
    def layers(self):
        return [name for name in self.maps if "mid_block" not in name]

    def layer(self, direction, name, size, groups=None, lift=False):
        """``[B, H, h, w]``: the layer's mean over the evaluations of ``groups``, resized and clamped."""
        seen = [m[direction] for e, m in self.maps[name] if groups is None or self.groups[e] in groups]
        mean = torch.stack(seen).mean(0)
        h, w = self.grids[name]
        if lift:
            mean = mean * self.lengths[name][0 if direction == "r2g" else 1]
        if direction in ("g2r", "sram"):
            mean, (h, w) = mean[..., self.skip :], self.reference_grid
        grid = mean.reshape(*mean.shape[:2], h, w)
        return F.interpolate(grid, size, mode="bicubic", align_corners=False).clamp_min(0)

    def size(self, direction, names=None):
        if direction in ("g2r", "sram"):
            return self.reference_grid
        return max((self.grids[n] for n in names or self.layers), key=lambda g: g[0] * g[1])

    def ulam(self, direction, names=None, **kw):
        names, size = names or self.layers, kw.pop("size", None) or self.size(direction, names)
        return torch.stack([self.layer(direction, n, size, **kw).mean(1) for n in names]).mean(0)

    def tlam(self, direction, time_groups, **kw):
        return torch.stack([self.ulam(direction, groups=[g], **kw) for g in range(time_groups)], dim=1)

    def hlam(self, direction, names=None, **kw):
        names, size = names or self.layers, kw.pop("size", None) or self.size(direction, names)
        return torch.stack([self.layer(direction, n, size, **kw) for n in names]).mean(0)

    def llam(self, direction, names=None, **kw):
        names, size = names or self.layers, kw.pop("size", None) or self.size(direction, names)
        return torch.stack([self.layer(direction, n, size, **kw).mean(1) for n in names], dim=1)


def assert_sram(maps, truth, **options):
    """Compares the patch's SRAM, from what was recorded, with the truth."""
    assert_peak(maps.sram(PATCH, canvas=(1, 1), **options), truth.ulam("sram"))


def assert_peak(got, want, tolerance=2e-5):
    """Largest difference, relative to the peak of the truth."""
    assert tuple(got.shape) == tuple(want.shape), (tuple(got.shape), tuple(want.shape))
    worst = (got.double() - want).abs().max() / want.abs().max()
    assert worst <= tolerance, f"off by {worst:.2e} of the peak"
