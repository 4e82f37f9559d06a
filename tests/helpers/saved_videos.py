"""Small pipelines of videos saved in folders: what the commands are tested with."""

import string

import pytest
import torch

from tests.helpers.tiny_models import prompts, videos


def t5(kind="T5EncoderModel"):
    """A text encoder and a tokenizer that spells, as the video pipelines take them."""
    import transformers

    torch.manual_seed(0)
    letters = [(letter, -1.0) for letter in "▁" + string.ascii_letters + string.digits]
    tokenizer = transformers.T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters])
    config = getattr(transformers, kind).config_class(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return {"tokenizer": tokenizer, "text_encoder": getattr(transformers, kind)(config).eval()}


@pytest.fixture(scope="session")
def saved_video(tmp_path_factory):
    """Function: "svd", "wan" or "ltx" → the folder of such a pipeline."""
    folders = {}

    def build(name):
        if name == "svd":
            return prompts.svd()
        pipe = videos.ltx("LTXImageToVideoPipeline") if name == "ltx" else prompts.wan()
        parts = t5("T5EncoderModel" if name == "ltx" else "UMT5EncoderModel")
        return type(pipe)(**{**pipe.components, **parts})

    def saved(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            build(name).save_pretrained(folders[name])
        return folders[name]

    return saved
