"""i2am: what did an image-to-image diffusion model take from its reference image?"""

from i2am.ops import AttentionOutput, attention

__version__ = "0.1.0"
__all__ = ["AttentionOutput", "__version__", "attention"]
