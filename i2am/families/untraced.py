"""Pipelines whose picture never becomes keys, or which cannot be run, and why.

A reason says what the picture does instead. What is known of the pipelines of a family's own model stands in the
family's file.
"""

from __future__ import annotations

from i2am.families import CHANNELS, RESIDUAL, START, Family, PipelineFacts

INPAINTING = f"{START}, or it enters as channels beside the latents"
VIDEO_START = "the video is only what denoising starts from"
FIRST_AS_CHANNELS = "the first frame enters as channels beside the latents, so that every token mixes both"
UPSAMPLES = "it enlarges latents without a denoiser"
FEATURES = "the image embedding enters as a feature map beside the latents"
PARTS = "it runs two pipelines, of which the prior draws from pictures: trace its prior_pipe"

REASONS = {
    START: (
        "AltDiffusionImg2Img*",
        "AmusedI*",
        "CycleDiffusion*",
        "IFImg2ImgPipeline",
        "IFInpaintingPipeline",
        "Kandinsky3Img2Img*",
        "LEditsPP*",
        "LatentConsistencyModelImg2Img*",
        "RePaint*",
        "SanaSprintImg2Img*",
        "StableDiffusionDiffEdit*",
        "StableDiffusionGLIGENPipeline",
        "StableDiffusionInpaintPipelineLegacy",
        "StableDiffusionPix2PixZero*",
    ),
    INPAINTING: (
        "StableDiffusionInpaintPipeline",
        "StableDiffusionPAGInpaint*",
        "StableDiffusionXLInpaint*",
        "StableDiffusionXLPAGInpaint*",
    ),
    VIDEO_START: ("CogVideoXVideoToVideo*", "Kandinsky6SR*", "VideoToVideoSD*"),
    CHANNELS: (
        "CogVideoXFunControl*",
        "CogVideoXImageToVideo*",
        "CogView4Control*",
        "EasyAnimateControl*",
        "EasyAnimateInpaint*",
        "HunyuanImageRefiner*",
        "IF*SuperResolution*",
        "LDMSuperResolution*",
        "Marigold*",
        "StableDiffusionDepth2Img*",
    ),
    FIRST_AS_CHANNELS: ("Kandinsky5I2V*",),
    "the image enters as channels beside the latents, and through a language model among the words": (
        "Kandinsky5I2I*",
    ),
    RESIDUAL: ("HunyuanDiTControlNet*", "SanaControlNet*"),
    UPSAMPLES: ("LTXLatentUpsample*", "LTX2LatentUpsample*"),
    "its self-attention is linear: sums over keys without a softmax, so that no key has a share of a query's "
    "attention; its cross-attention looks at text": ("SanaImageToVideo*",),
    "its self-attention is a linear recurrence (gated delta networks) in all but a few layers, without a softmax over "
    "keys": ("SanaWM*",),
    "diffusers' own UNet fails in it: its dual transformers do not take the encoder_attention_mask that its blocks "
    "give them": ("VersatileDiffusionDualGuided*",),
    PARTS: ("StableCascadeCombined*",),
    FEATURES: ("StableCascadeDecoder*", "WuerstchenCombined*", "WuerstchenDecoder*"),
    "it makes an image embedding and runs no attention of a denoiser of pictures": (
        "KandinskyPrior*",
        "KandinskyV22Prior*",
        "WuerstchenPrior*",
    ),
    "it draws a 3-D shape, on no grid of pixels": ("ShapEImg2Img*",),
    "it describes the picture in words, and draws none from it": ("UniDiffuser*",),
    "the picture is part of the prompt of a language model, which writes words": ("DiffusionGemma*",),
}


class Untraced(Family):
    """No model: pipelines that are refused by name, and Kolors, whose reference comes by IP-Adapter."""

    pipelines = (
        *(PipelineFacts(pattern, refused=reason) for reason, patterns in REASONS.items() for pattern in patterns),
        PipelineFacts("Kolors*", adapter=True),
        PipelineFacts("KolorsImg2Img*", adapter=True, refused=START),
    )
