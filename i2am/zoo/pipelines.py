"""Diffusion pipelines in pixel space, small enough to be trained on a laptop; the reference enters by attention only.

No autoencoder: 2×2 pixels become 12 channels and back, without loss, so latents are half as large as pictures.
"""

# Annotations stay objects here: up to 0.36 diffusers loads a pipeline by the types that its signature holds.
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from i2am.zoo.encoder import PatchEncoder, centres, fourier

FOLD = 2  # pixels a side that one latent cell holds
COLOURS = 3 * FOLD * FOLD
WAVELENGTHS = (128.0, 64.0, 32.0, 16.0, 8.0)  # pixels; of places on a 64-px reference
# All of these tell neighbours apart, and within 1024 px no two places on an 8-px lattice agree in all of them, so no
# far place passes for the right one. Powers of two do not work: a model trained on them saw the same every 32 px.
FAR_WAVELENGTHS = (61.0, 53.0, 43.0, 37.0, 31.0, 17.0)  # pixels; of places in a picture of up to 1024 px
# UNets: three levels with attention from 4-px and 8-px cells; and two, which copy single pixels.
COARSE = dict(
    block_out_channels=(48, 96, 96),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=96,
    attention_head_dim=4,  # this is the number of heads
)
SUPERRES = COARSE | dict(mid_block_type="UNetMidBlock2D", only_cross_attention=True)
FINE = dict(
    block_out_channels=(48, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    mid_block_type="UNetMidBlock2D",
    only_cross_attention=(True, False),
    cross_attention_dim=64,
    attention_head_dim=2,
)
Pictures = Image.Image | list[Image.Image] | Tensor


class Prepared(NamedTuple):
    """Inputs that the UNet is given beside the noisy latents."""

    tokens: Tensor  # [B, 1 + N, width] of the reference
    channels: Tensor  # [B, C, h, w] at the latents' resolution


class ZooPipeline(DiffusionPipeline):
    """Base of the zoo's pipelines: DDIM in folded pixel space. Unguided, so batches need no repetition."""

    model_cpu_offload_seq = "image_encoder->unet"
    vae_scale_factor = FOLD  # pixels of a picture per latent cell, as other pipelines call it
    do_classifier_free_guidance = False

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDIMScheduler, image_encoder: PatchEncoder):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, image_encoder=image_encoder)

    def predict(self, latents: Tensor, timestep: Tensor, prepared: Prepared) -> Tensor:
        """Predict the UNet's velocity ``[B, 12, h, w]`` at a noise level."""
        return self.unet(torch.cat([latents, prepared.channels], 1), timestep, prepared.tokens).sample

    @torch.no_grad()
    def denoise(self, prepared: Prepared, steps: int, generator=None, callback_on_step_end=None) -> Tensor:
        """Turn noise into ``[B, 3, H, W]`` of what is diffused: pictures in about [-1, 1], or their details."""
        channels = prepared.channels
        shape = (len(channels), COLOURS, *channels.shape[-2:])
        latents = randn_tensor(shape, generator=generator, device=channels.device, dtype=channels.dtype)
        self.scheduler.set_timesteps(steps, device=channels.device)
        self._num_timesteps = steps
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            velocity = self.predict(latents, timestep, prepared)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, step, timestep, {"latents": latents}).get("latents", latents)
        return F.pixel_shuffle(latents, FOLD)

    def _output(self, pictures: Tensor, output_type: str, return_dict: bool):
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be pil, np or pt, got {output_type!r}")
        images = (pictures.clamp(-1, 1) + 1) / 2
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = [Image.fromarray((x * 255).round().astype(np.uint8)) for x in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _read(self, pictures: Pictures, name: str) -> Tensor:
        """Read ``[B, 3, H, W]`` in [-1, 1] of PIL images, or of a tensor that is so already."""
        if isinstance(pictures, Tensor):
            x = pictures if pictures.ndim == 4 else pictures[None]
            if x.ndim != 4 or x.shape[1] != 3:
                raise ValueError(f"{name} must be [B, 3, H, W] in [-1, 1], got shape {tuple(pictures.shape)}")
        else:
            images = pictures if isinstance(pictures, list) else [pictures]
            x = torch.stack([torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1) for i in images]) / 127.5 - 1
        return x.to(self.unet.device, self.unet.dtype)


class ReferenceInpaintingPipeline(ZooPipeline):
    """Paints a reference into the masked part of a scene: ``exemplar`` and ``tryon``.

    ::

        pipe = i2am.zoo.load("exemplar")
        picture = pipe(image=scene, mask_image=mask, reference=photo).images[0]
    """

    def __call__(
        self,
        image: Pictures,
        mask_image: Image.Image | list[Image.Image] | Tensor,
        reference: Pictures,
        pose: Tensor | None = None,
        num_inference_steps: int = 10,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
    ):
        """Paint.

        Args:
            image: the scene, 64×64 px: PIL, or ``[B, 3, H, W]`` in [-1, 1]. What the mask hides is not looked at.
            mask_image: the part to paint, white (1): PIL, or ``[B, 1, H, W]`` in [0, 1].
            reference: what to paint there, 64×64 px.
            pose: ``[B, H, W, 2]``: which place ``(y, x)`` of the reference, in pixels, belongs where; as try-on models
                get a body's pose. None: the mask's box is the reference's frame.
            num_inference_steps, generator, output_type, return_dict, callback_on_step_end: as in diffusers' own.

        Raises:
            ValueError: sizes that don't fit, an empty mask, or an unknown output_type.
        """
        scene, reference = self._read(image, "image"), self._read(reference, "reference")
        size = self.image_encoder.config.image_size
        if tuple(reference.shape[-2:]) != (size, size):
            raise ValueError(f"the reference must be {size}×{size} px, got {tuple(reference.shape[-2:])}")
        mask = self._read_mask(mask_image, scene)
        prepared = self.prepare(scene, mask, reference, pose)
        pictures = self.denoise(prepared, num_inference_steps, generator, callback_on_step_end)
        return self._output(torch.where(mask > 0, pictures, scene), output_type, return_dict)

    def prepare(
        self,
        scene: Tensor,
        mask: Tensor,
        reference: Tensor,
        pose: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> Prepared:
        """Return tokens and channels for ``scene, reference [B, 3, H, W]`` and ``mask [B, 1, H, W]``.

        Args:
            origin: ``[B, 2]`` where ``(y, x)`` the references lie in larger ones, in pixels. None: they are all of it.
        """
        pose = frame_of_mask(mask, reference.shape[-1]) if pose is None else pose.to(scene)
        patches = None
        if origin is not None:
            pose = pose + origin[:, None, None]
            grid = self.image_encoder.grid(*reference.shape[-2:])
            patches = (origin[:, None, None] + centres(grid, self.image_encoder.config.patch_size)).flatten(1, 2)
        places = fourier(pose.unfold(1, FOLD, FOLD).unfold(2, FOLD, FOLD).mean((-2, -1)), WAVELENGTHS)
        inside = F.avg_pool2d(mask, FOLD)
        places = places.permute(0, 3, 1, 2) * inside
        channels = [F.pixel_unshuffle(scene * (1 - mask), FOLD), F.pixel_unshuffle(mask, FOLD), places]
        return Prepared(self.image_encoder(reference, patches), torch.cat(channels, 1))

    def _read_mask(self, mask: Image.Image | list[Image.Image] | Tensor, scene: Tensor) -> Tensor:
        if not isinstance(mask, Tensor):
            images = mask if isinstance(mask, list) else [mask]
            mask = torch.stack([torch.from_numpy(np.array(i.convert("L")))[None] for i in images]) / 255
        mask = (mask.to(scene) > 0.5).to(scene)
        if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[-2:] != scene.shape[-2:]:
            raise ValueError(f"mask_image {tuple(mask.shape)} does not fit an image {tuple(scene.shape)}: one channel")
        if (mask.flatten(1).sum(1) == 0).any():
            raise ValueError("empty mask_image: there is nothing to paint")
        return mask


class SuperResolutionPipeline(ZooPipeline):
    """Four times as many pixels each way; the small picture is seen through attention alone: ``superres``.

    Runs at any size up to 1024 px, though trained on 128: every place has its own sines.

    Args:
        detail: of weights that diffuse what a plain enlargement lacks: its gain. None: they diffuse the picture.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        image_encoder: PatchEncoder,
        detail: float | None = None,
    ):
        super().__init__(unet, scheduler, image_encoder)
        self.register_to_config(detail=detail)

    def __call__(
        self,
        image: Pictures,
        num_inference_steps: int = 10,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
    ):
        """Enlarge ``image``: PIL, or ``[B, 3, H, W]`` in [-1, 1], of even height and width.

        Args:
            num_inference_steps, generator, output_type, return_dict, callback_on_step_end: as in diffusers' own.
        """
        reference = self._read(image, "image")
        diffused = self.denoise(self.prepare(reference), num_inference_steps, generator, callback_on_step_end)
        return self._output(self.picture(diffused, reference), output_type, return_dict)

    def picture(self, diffused: Tensor, reference: Tensor) -> Tensor:
        """Return pictures ``[B, 3, H, W]`` of what was diffused: details go onto the plain enlargement."""
        if self.config.detail is None:
            return diffused
        return consistent(plain(reference, diffused.shape[-2:]) + diffused / self.config.detail, reference)

    def diffused(self, picture: Tensor, reference: Tensor) -> Tensor:
        """Return what is to be diffused so that ``picture [B, 3, H, W]`` comes out: the inverse of :meth:`picture`."""
        if self.config.detail is None:
            return picture
        return (picture - plain(reference, picture.shape[-2:])) * self.config.detail

    def prepare(self, reference: Tensor, origin: Tensor | None = None) -> Prepared:
        """Return tokens and channels for small pictures ``[B, 3, H, W]``.

        Args:
            origin: ``[B, 2]`` where ``(y, x)`` they lie in a larger picture, in its pixels. None: they are all of it.
        """
        encoder = self.image_encoder.config
        height, width = (n * encoder.stride for n in reference.shape[-2:])
        origin = torch.zeros(1, 2) if origin is None else origin
        origin = origin[:, None, None]
        places = fourier(origin + centres((height // FOLD, width // FOLD), FOLD), FAR_WAVELENGTHS)
        pixels = encoder.patch_size * encoder.stride
        patches = (origin + centres(self.image_encoder.grid(*reference.shape[-2:]), pixels)).flatten(1, 2)
        channels = places.permute(0, 3, 1, 2).to(reference).expand(len(reference), -1, -1, -1)
        return Prepared(self.image_encoder(reference, patches), channels)


def as_images(pictures: Tensor) -> list[Image.Image]:
    """Return ``[B, 3, H, W]`` in [-1, 1] as PIL images."""
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)
    return [Image.fromarray(x) for x in pixels]


def bicubic(reference: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge ``reference [B, 3, h, w]`` to ``size``, without any model."""
    return F.interpolate(reference, tuple(size), mode="bicubic", align_corners=False)


def plain(reference: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge ``reference [B, 3, h, w]`` to ``size`` without a model: bicubic, then :func:`consistent` (+0.3 dB)."""
    return consistent(bicubic(reference, size), reference)


def consistent(pictures: Tensor, reference: Tensor, times: int = 10) -> Tensor:
    """Return ``pictures [B, 3, H, W]`` changed smoothly until their small pictures are ``reference [B, 3, h, w]``.

    Iterative back-projection (Irani and Peleg, 1991): what the means of the blocks lack is enlarged and added. A
    picture whose means are right stays as it is.
    """
    size = tuple(pictures.shape[-2:])
    for _ in range(times):
        pictures = pictures + bicubic(reference - F.adaptive_avg_pool2d(pictures, tuple(reference.shape[-2:])), size)
    return pictures


def frame_of_mask(mask: Tensor, size: int) -> Tensor:
    """Return ``[B, H, W, 2]``: places of a reference of ``size`` px, where each mask's box is its frame."""
    pixels = centres(tuple(mask.shape[-2:]), 1.0).to(mask)
    frames = []
    for inside in mask[:, 0] > 0.5:
        ys, xs = inside.nonzero(as_tuple=True)
        low = torch.stack([ys.min(), xs.min()])
        extent = torch.stack([ys.max(), xs.max()]) + 1 - low
        frames.append((pixels - low) / extent * size)
    return torch.stack(frames)


def build(name: str, seed: int = 0, mixing: int = 0, detail: float | None = None, fine: bool = False) -> ZooPipeline:
    """Build an untrained pipeline of the zoo.

    Args:
        name: exemplar, tryon or superres.
        seed: of the weights.
        mixing: transformer layers over the reference tokens, for the ablation.
        detail: see :class:`SuperResolutionPipeline`.
        fine: of exemplar and tryon: attention to 2-px patches from 2-px cells, in a UNet of two levels.
    """
    superres = name == "superres"
    places = 4 * len(FAR_WAVELENGTHS if superres else WAVELENGTHS)
    shape = FINE if fine else SUPERRES if superres else COARSE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=32,
            in_channels=COLOURS + places + (0 if superres else COLOURS + FOLD * FOLD),
            out_channels=COLOURS,
            layers_per_block=1,
            norm_num_groups=16,
            **shape,
        )
        if superres:
            encoder = PatchEncoder(patch_size=2, wavelengths=FAR_WAVELENGTHS, stride=4, image_size=None, mixing=mixing)
        else:
            patch, width = (2, 64) if fine else (4, 96)
            encoder = PatchEncoder(patch, width, WAVELENGTHS, mixing=mixing)
    scheduler = DDIMScheduler(
        beta_schedule="linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        steps_offset=0,
    )
    parts = (unet.eval(), scheduler, encoder.eval())
    pipe = SuperResolutionPipeline(*parts, detail=detail) if superres else ReferenceInpaintingPipeline(*parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
