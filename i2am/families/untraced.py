"""Pipelines of models that are no family's, and why: their picture never becomes keys, or i2am cannot tell which.

A reason says what the picture does instead. One that begins with "i2am" is a limit of ours: there are such keys.
"""

from __future__ import annotations

from i2am.families import CHANNELS, RESIDUAL, START, Family, PipelineFacts

MIXED = "i2am does not take apart what is generated from what is given: both are parts of one sequence of tokens"
VIDEO_START = "the video is only what denoising starts from"
FIRST_CHANNELS = "the frames given enter as channels beside the latents, so that every token mixes both"
LANGUAGE = "the picture is part of the prompt of a language model, whose tokens are words"
PRIOR = "it makes an image embedding and runs no attention of a denoiser of pictures"
CLASS = "the image enters as a class embedding"

REASONS = {
    START: (
        "AltDiffusionImg2Img*",
        "AmusedI*",
        "CycleDiffusion*",
        "IFImg2ImgPipeline",
        "IFInpaintingPipeline",
        "Kandinsky3Img2Img*",
        "KolorsImg2Img*",
        "LEditsPP*",
        "LatentConsistencyModelImg2Img*",
        "RePaint*",
        "SanaSprintImg2Img*",
        "StableDiffusionDiffEdit*",
        "StableDiffusionInpaintPipelineLegacy",
        "StableDiffusionPix2PixZero*",
    ),
    VIDEO_START: (
        "CogVideoXVideoToVideo*",
        "VideoToVideoSD*",
    ),
    CHANNELS: (
        "CogVideoXFunControl*",
        "CogVideoXImageToVideo*",
        "CogView4Control*",
        "EasyAnimateControl*",
        "EasyAnimateInpaint*",
        "HunyuanImageRefiner*",
        "HunyuanSkyreelsImageToVideo*",
        "IF*SuperResolution*",
        "Kandinsky6SR*",
        "LDMSuperResolution*",
        "Marigold*",
        "StableDiffusionDepth2Img*",
    ),
    RESIDUAL: (
        "HunyuanDiTControlNet*",
        "SanaControlNet*",
    ),
    FIRST_CHANNELS: (
        "Kandinsky5I2V*",
    ),
    LANGUAGE: (
        "DiffusionGemma*",
    ),
    PRIOR: (
        "KandinskyPrior*",
        "KandinskyV22Prior*",
        "WuerstchenPrior*",
    ),
}


class Untraced(Family):
    """No model: pipelines that are refused by name."""

    pipelines = tuple(
        PipelineFacts(pattern, refused=reason) for reason, patterns in REASONS.items() for pattern in patterns
    )
