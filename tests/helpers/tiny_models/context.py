"""Small pipelines of the newer in-context models; what their language models would say is given."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor

from tests.helpers.tiny_models.dit import TEXT, Device, flow, flux_vae, text_tokens, wan_vae
from tests.helpers.tiny_models.unet import quiet


def stand_in(pipeline, **methods):
    """Return a subclass of ``pipeline`` of the same name, with methods of its own."""
    return type(pipeline.__name__, (pipeline,), {"__module__": pipeline.__module__} | methods)


def z_image(captions=(7, 7), siglip=(3, 2)):
    """``captions``: words of the conditional and the unconditional prompt; ``siglip``: its grid."""
    from diffusers import ZImageOmniPipeline, ZImageTransformer2DModel

    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT,
        siglip_feat_dim=8,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    ).eval()
    for name, parameter in transformer.named_parameters():
        if name.endswith("pad_token"):
            torch.nn.init.normal_(parameter)
    # X_PAD_DIM of the model is that of the published weights: pictures are always given here

    def prepare_siglip_embeds(self, images, batch_size, device, dtype):
        generator = torch.Generator().manual_seed(5)
        return [[torch.randn(*siglip, 8, generator=generator) for _ in images] for _ in range(batch_size)]

    def encode_prompt(self, prompt=None, num_condition_images=0, do_classifier_free_guidance=True, **options):
        def words(count, seed):
            lengths = [count, *[3] * num_condition_images, 2][: num_condition_images + 1 + bool(num_condition_images)]
            return [[text_tokens(n, seed=seed + i)[0] for i, n in enumerate(lengths)]]

        return words(captions[0], 0), words(captions[1], 9) if do_classifier_free_guidance else []

    kind = stand_in(ZImageOmniPipeline, prepare_siglip_embeds=prepare_siglip_embeds, encode_prompt=encode_prompt)
    pipe = kind(
        scheduler=flow(),
        vae=flux_vae().bfloat16(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        siglip=None,
        siglip_processor=None,
    )
    pipe.image_processor.check_image_input = lambda image: None  # the published one takes 64 pixels and more
    return quiet(pipe)


def qwen21(sizes=((32, 64), (32, 32)), *, causal: bool = True):
    """Prompts of three words, a reference, two words, a reference …, one word. ``sizes``: (height, width) in pixels."""
    from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel

    torch.manual_seed(0)
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
        causal_condition=causal,
    ).eval()

    def init(self, scheduler, vae, text_encoder, processor, transformer, sample_sigmas=None):
        super(QwenImage21Pipeline, self).__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, processor=processor, transformer=transformer, scheduler=scheduler
        )
        self.register_to_config(sample_sigmas=None)
        self.vae_scale_factor, self.latent_channels = 16, 4
        self.image_processor = VaeImageProcessor(vae_scale_factor=16, vae_latent_channels=4)

    def encode_prompt(self, image=None, prompt=None, num_images_per_prompt=1, **options):
        words = [3, *[2] * (len(image) - 1), 1 + (prompt == "no")]
        slots: list[bool] = []
        for count, picture in zip(words, [*image, None], strict=True):
            slots += [False] * count
            if picture is not None:
                slots += [True] * (picture.height // 16 * (picture.width // 16) // 4)
        embeds = text_tokens(len(slots), seed=len(prompt)).repeat(num_images_per_prompt, 1, 1)
        return embeds, None, torch.tensor([slots])

    def encode_image(self, image, generator):
        height, width = (n // 16 for n in image.shape[-2:])
        seed = torch.Generator().manual_seed(height * 100 + width)
        return torch.randn(1, 4, 1, height, width, generator=seed)

    kind = stand_in(QwenImage21Pipeline, __init__=init, encode_prompt=encode_prompt, _encode_vae_image=encode_image)
    parts = dict(vae=None, text_encoder=Device(), processor=None)
    return quiet(kind(scheduler=flow(), transformer=transformer, **parts))


def omnigen():
    """Letters as tokens; the pipeline's own processor lays out the prompt."""
    from diffusers import OmniGenPipeline, OmniGenTransformer2DModel
    from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen

    torch.manual_seed(0)
    transformer = OmniGenTransformer2DModel(
        in_channels=4,
        patch_size=2,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=2,
        pad_token_id=0,
        vocab_size=128,
        max_position_embeddings=512,
        original_max_position_embeddings=64,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        pos_embed_max_size=32,
        time_step_dim=16,
    ).eval()
    processor_omnigen.transforms = _Transforms
    pipeline_omnigen.OmniGenMultiModalProcessor = processor_omnigen.OmniGenMultiModalProcessor

    def init(self, transformer, scheduler, vae, tokenizer):
        super(OmniGenPipeline, self).__init__()
        self.register_modules(vae=vae, tokenizer=None, transformer=transformer, scheduler=scheduler)
        self.vae_scale_factor = 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=16)
        self.multimodal_processor = processor_omnigen.OmniGenMultiModalProcessor(tokenizer, max_image_size=64)
        self.default_sample_size = 16

    return quiet(stand_in(OmniGenPipeline, __init__=init)(transformer, flow(), flux_vae(4), _Letters()))


class _Letters:
    """A tokenizer."""

    eos_token_id = 0

    def __call__(self, text):
        return SimpleNamespace(input_ids=[1, *(ord(letter) % 127 + 1 for letter in text)])


class _Transforms:
    """What OmniGen's processor takes from torchvision."""

    @staticmethod
    def Compose(steps):
        return lambda x: [x := step(x) for step in steps][-1]

    @staticmethod
    def Lambda(function):
        return function

    @staticmethod
    def ToTensor():
        return lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255

    @staticmethod
    def Normalize(mean, std, inplace):
        return lambda x: (x - mean[0]) / std[0]


def joyimage(plus: bool = False):
    """Sizes are the pictures' own, not the nearest of the published ones."""
    import diffusers

    torch.manual_seed(0)
    kind = "JoyImageEditPlus" if plus else "JoyImageEdit"
    transformer = getattr(diffusers, f"{kind}Transformer3DModel")(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=TEXT,
        mlp_width_ratio=2.0,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    ).eval()

    def encode(self, prompt, images=None, prompt_embeds=None, **options):
        negative = "" in prompt or any(" <|im_end|>" in p for p in prompt)
        count = 4 if negative else 6
        return text_tokens(count, seed=count), torch.ones(1, count)

    parts = dict(scheduler=flow(), vae=wan_vae(), text_encoder=None, tokenizer=None, processor=None)
    pipe = stand_in(getattr(diffusers, f"{kind}Pipeline"), encode_prompt_multiple_images=encode)(
        transformer=transformer, **parts
    )
    pipe.vae_scale_factor_spatial = 2
    for processor in (pipe.image_processor, getattr(pipe, "vae_image_processor", None)):
        if processor is not None:
            processor.register_to_config(vae_scale_factor=2)
            processor.get_default_height_width = lambda image, h=None, w=None: (h or image.height, w or image.width)
    return quiet(pipe)


def fibo2():
    from diffusers import BriaFibo2Transformer2DModel

    torch.manual_seed(0)
    return BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=TEXT,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 64, 64),
    ).eval()


def glm_image():
    """Prior tokens, which a language model makes, are given."""
    from diffusers import GlmImagePipeline, GlmImageTransformer2DModel

    torch.manual_seed(0)
    transformer = GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=TEXT,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=32,
    ).eval()
    vae = flux_vae()
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    parts = dict(tokenizer=None, processor=None, text_encoder=Device(), vision_language_encoder=None)

    def encode_prompt(self, prompt, do_classifier_free_guidance=True, **options):
        negative = text_tokens(2, seed=8) if do_classifier_free_guidance else None
        return text_tokens(5), negative

    def prior(self, prompt, image, height, width, **options):
        generator = torch.Generator().manual_seed(3)

        def ids(h, w):
            return torch.randint(0, 32, (h // 4 * (w // 4),), generator=generator)

        pictures = [] if image is None else image[0]
        each = [ids(picture.height, picture.width) for picture in pictures]
        grids = torch.tensor([[1, picture.height // 4, picture.width // 4] for picture in pictures])
        own = ids(height, width)[None]
        return (own, None, None) if image is None else (own, [torch.cat(each)], [grids])

    kind = stand_in(GlmImagePipeline, encode_prompt=encode_prompt, generate_prior_tokens=prior)
    return quiet(kind(scheduler=flow(), vae=vae, transformer=transformer, **parts))
