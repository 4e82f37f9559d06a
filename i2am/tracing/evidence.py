"""Which part of a guided batch is conditional, where only the reference keys show it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from i2am.families import ForwardInputs, TokenLayout
from i2am.ops.tokens import TokenSet
from i2am.tracing.guidance import Guidance, Told, Verdict, empty_parts
from i2am.tracing.intercept import AttentionCall, ForwardContext, LayerContext


def settle_by_keys(
    guidance: Guidance,
    verdict: Verdict,
    forward: ForwardInputs,
    told: Told,
    note: Callable[[str], None],
    spoil: Callable[[str], None],
) -> Callable[[ForwardContext, LayerContext, TokenLayout, AttentionCall], None]:
    """Return what finds the conditional part in the first reference keys that come: the one whose keys are not empty.

    Args:
        guidance: is told, for the rest of the run.
        verdict: what was supposed.
        forward, told: of the call.
        note: keeps a sentence for the provenance.
        spoil: is told why nothing can be trusted, where the keys do not tell.
    """

    def settle(context: ForwardContext, layer: LayerContext, layout: TokenLayout, call: AttentionCall) -> None:
        context.settle = None
        if _alike(call, layout, verdict.parts):  # guidance by text: each part looks at the same reference
            note(f"guidance: every part holds the same reference; {verdict.how}")
            return
        indices = [TokenSet.of(r.tokens, call.key.shape[2], "keys").index for r in layout.references]
        empty = set.intersection(*(set(empty_parts(call.key[:, :, i], verdict.parts)) for i in indices))
        full = [i for i in range(verdict.parts) if i not in empty]
        if len(full) != 1:
            why = (
                f"layer {layer.name}: the batch is {verdict.parts} parts of guidance, and the reference keys of "
                f"{len(full)} of them are not empty, so nothing tells which one is conditional: pass guidance=0 for "
                "the first part or guidance=1 for the second"
            )
            spoil(why)
            raise ValueError(why)
        size = forward.latents.shape[0] // verdict.parts
        samples = slice(full[0] * size, (full[0] + 1) * size)
        how = f"the reference keys of the other parts are empty: part {full[0]} of {verdict.parts}"
        guidance.settle(forward.latents.shape[0], Verdict(samples, verdict.parts, how), told)
        context.conditional = frames_of(samples, forward.frames)
        note(f"guidance: {how}")

    return settle


def frames_of(samples: slice, frames: int) -> slice:
    """Return the images of a batch of videos that some of its samples are."""
    return slice(samples.start * frames, samples.stop * frames)


def _alike(call: AttentionCall, layout: TokenLayout, parts: int) -> bool:
    """Return whether the reference keys of every part of a batch are the same."""
    for reference in layout.references:
        first, *others = call.key[:, :, TokenSet.of(reference.tokens, call.key.shape[2], "keys").index].chunk(parts)
        if not all(torch.allclose(first, other, rtol=1e-4, atol=1e-6) for other in others):
            return False
    return True
