"""From a diffusion transformer to its family."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from i2am.families import TransformerFamily
from i2am.families.flux import Fibo, Flux, LongCat
from i2am.families.flux2 import Flux2
from i2am.families.qwen import QwenImage
from i2am.families.sd3 import StableDiffusion3
from i2am.families.wan import Wan
from i2am.references import Reference
from i2am.tracing.intercept import refuse_compiled

FAMILIES: dict[str, type[TransformerFamily]] = {
    "BriaFiboTransformer2DModel": Fibo,
    "FluxTransformer2DModel": Flux,
    "Flux2Transformer2DModel": Flux2,
    "LongCatImageTransformer2DModel": LongCat,
    "QwenImageTransformer2DModel": QwenImage,
    "SD3Transformer2DModel": StableDiffusion3,
    "WanTransformer3DModel": Wan,
}


def read_transformer(
    transformer: nn.Module, references: Sequence[Reference] | None, *, itself: bool = False, rollout: bool = False
) -> TransformerFamily:
    """The family of a transformer.

    Args:
        transformer: the model.
        references: keys among the text tokens that encode a reference, or None.
        itself: trace the generated tokens' attention to each other (``mode="self"``).
        rollout: roll SD3's resampled tokens back to its image encoder's patches.

    Raises:
        ValueError: its tokens' layout is not known.
    """
    refuse_compiled(transformer)
    name = type(transformer).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"i2am does not know where {name} keeps its reference; it knows {', '.join(FAMILIES)}. For attention "
            "modules with to_q, to_k and heads use i2am.patch_modules"
        )
    if references is not None and not isinstance(references, list):
        raise ValueError(f"{name} joins its pictures as tokens, which need no description: got {references!r}")
    if not rollout:
        return FAMILIES[name](transformer, references, itself=itself)
    if FAMILIES[name] is not StableDiffusion3:
        raise ValueError(f"rollout=True needs an adapter with a resampler, and i2am knows none of {name}")
    return StableDiffusion3(transformer, references, itself=itself, rollout=True)
