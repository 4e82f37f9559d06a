"""Words, text and the picture itself beside references: where each acted, how much, and the budget of attention."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

import i2am
from i2am.families import KeySets, flux2, qwen
from i2am.families.keysets import key_sets
from i2am.maps.budget import OTHER_WORDS, REST
from i2am.tracing.words import PromptWords, word_tokens
from tests.helpers.tiny_models import dit, prompts
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth, assert_peak, capture

SMALL = dict(num_inference_steps=2, width=16, height=16, output_type="latent")
PROMPT = "a red sleeve on a Red cat"


def seeded():
    return torch.Generator().manual_seed(7)


def t5_tokenizer(length=12):
    """Unigram pieces with a word mark, as T5's: "sleeve" is two pieces."""
    pieces = ["<pad>", "</s>", "<unk>", "▁a", "▁red", "▁sle", "eve", "▁on", "▁cat", ",", "▁", "s"]
    inner = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=length
    )


# ------------------------------------------------------------------------------------------------------------- tokens


class Slow:
    """The same tokenizer without offsets."""

    is_fast = False

    def __init__(self, fast):
        self.fast, self.eos_token_id = fast, fast.eos_token_id

    def __call__(self, text, **options):
        return self.fast(text, **options)


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
@pytest.mark.parametrize(
    ("word", "clip", "t5"),
    [
        ("red", [2, 3, 4, 14, 15, 16], [1]),  # CLIP's test tokenizer spells: a, r e d, …
        ("sleeve", [5, 6, 7, 8, 9, 10], [2, 3]),
        ("red sleeve", [2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 3]),
        ("a", [1, 13], [0, 6]),
    ],
)
def test_words_are_tokens(word, clip, t5, slow):
    wrap = Slow if slow else lambda tokenizer: tokenizer
    assert word_tokens(word, PROMPT, wrap(pipelines.tokenizer()), 77) == clip
    assert word_tokens(word, "a red sleeve, on a cat", wrap(t5_tokenizer()), 12) == t5


def test_words_that_are_not_there():
    tokenizer = pipelines.tokenizer()
    with pytest.raises(ValueError, match="'sleeves' is no word of the prompt; its words: a, red, sleeve, on, Red, cat"):
        word_tokens("sleeves", PROMPT, tokenizer, 77)
    with pytest.raises(ValueError, match="'lee' is no word"):  # inside of another
        word_tokens("lee", PROMPT, tokenizer, 77)
    with pytest.raises(ValueError, match="'cat' lies beyond the 12 tokens"):
        word_tokens("cat", PROMPT, tokenizer, 12)
    assert word_tokens("a", PROMPT, tokenizer, 12) == [1]  # what is cut off does not count


# -------------------------------------------------------------------------------------- a text's own cross-attention


def test_words_beside_an_ip_adapter():
    """The text's call and the adapter's are apart; the reference's maps are what they were."""
    pipe = pipelines.sd("full")

    def go():
        pipe(PROMPT, ip_adapter_image=pipelines.image(), generator=seeded(), **SMALL)

    calls = capture(pipe.unet, go)
    with i2am.trace(pipe, time_groups=2, output="model") as tracer:
        go()
    plain = tracer.maps()
    with i2am.trace(pipe, time_groups=2, words=["red", "sleeve"], text=True, output="model") as tracer:
        go()
    maps = tracer.maps()
    assert (maps.references, maps.words) == (["ip_adapter"], ["red", "sleeve"])
    assert maps.sources == ["red", "sleeve", "text", "ip_adapter"]
    assert maps.ulam("r2g").equal(plain.ulam("r2g"))
    for word, keys in (("red", [2, 3, 4, 14, 15, 16]), ("sleeve", list(range(5, 11)))):
        truth = Truth(calls, groups=[0, 1], samples=slice(1, 2), keys=keys)
        for direction in ("r2g", "mass"):
            assert_peak(maps.tlam(direction, reference=word), truth.tlam(direction, 2))
            assert_peak(maps.hlam(direction, reference=word), truth.hlam(direction))
    torch.testing.assert_close(maps.ulam("mass", reference="text"), torch.ones(1, 8, 8) * 1.0)
    with pytest.raises(ValueError, match="words have no rows and columns"):
        maps.ulam("g2r", reference="red")
    with pytest.raises(ValueError, match="not among the keys of one attention call"):
        maps.budget()
    budget = maps.budget(sources=["red", "sleeve", "text"])
    assert budget.sources == ["red", "sleeve", OTHER_WORDS]
    torch.testing.assert_close(budget.shares.sum(-1), torch.ones(budget.shares.shape[:-1]))
    want = torch.stack([m["mass"].mean() for _, m in truth.maps[budget.layers[0]]])
    torch.testing.assert_close(budget.shares[0, :, 0, 1].double(), want, rtol=1e-4, atol=1e-6)


def test_daams_heat_map_is_the_mass_of_a_word():
    """DAAM (Tang et al., 2023): row probabilities of a word's token, upsampled and averaged; there is no reference."""
    pipe = pipelines.sd()

    def go():
        pipe("x cat", generator=seeded(), **SMALL)

    calls = capture(pipe.unet, go)
    with i2am.trace(pipe, words=["x"]) as tracer:
        go()
    maps = tracer.maps()
    assert maps.references == ["x"]
    heats = []
    for c in calls:
        if "mid_block" not in c.layer:
            p = torch.softmax(c.q[1:].double() @ c.k[1:].double().mT / c.q.shape[-1] ** 0.5, -1)[..., 1]  # [1, H, Q]
            heat = F.interpolate(p.unflatten(-1, c.grid), maps.ulam("mass").shape[-2:], mode="bicubic").clamp_min(0)
            heats.append(heat.mean(1))
    assert_peak(maps.ulam("mass"), torch.stack(heats).mean(0), 1e-5)


def test_sdxl_has_two_encoders_of_the_same_tokens():
    pipe = pipelines.sdxl()
    go = lambda **given: pipe(PROMPT, generator=seeded(), **SMALL, **given)  # noqa: E731
    with i2am.trace(pipe, words=["cat"]) as tracer:
        go(prompt_2=PROMPT)
        with pytest.raises(ValueError, match="prompt_2 differs from prompt, and both share"):
            go(prompt_2="another")
    assert tracer.maps().provenance["references"] == {"cat": "3 of 77"}


# ---------------------------------------------------------------------------------------------------- joint attention


@pytest.fixture(scope="module")
def kontext():
    """Flux Kontext with encoders of its own, so that a prompt can be given as text."""
    pipe = dit.flux()
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, bos_token_id=62,
        eos_token_id=63,
    )  # fmt: skip
    t5 = T5Config(vocab_size=12, d_model=dit.TEXT, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe.register_modules(
        tokenizer=pipelines.tokenizer(),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer_2=t5_tokenizer(),
        text_encoder_2=T5EncoderModel(t5).eval(),
    )
    return pipe


def edit(pipe, prompt="a red sleeve, on a cat", **given):
    options = dict(
        image=pipelines.image((32, 16), seed=2),
        width=24,
        height=16,
        max_area=24 * 16,
        _auto_resize=False,
        max_sequence_length=12,
        num_inference_steps=2,
        generator=seeded(),
        output_type="latent",
    )
    return pipe(prompt=prompt, **options | given)


def test_every_source_of_a_joint_attention(kontext):
    calls = capture_calls(kontext.transformer, lambda: edit(kontext), ("FluxAttention",))
    keys = calls[0].k.shape[2]
    with i2am.trace(
        kontext, words=["sleeve", "a"], text=True, itself=True, time_groups="steps", sram={"p": (8, 12)}, record="qk"
    ) as tracer:
        edit(kontext)
    maps = tracer.maps()
    assert maps.sources == ["reference", "sleeve", "a", "text", "self"]
    own = slice(12, 12 + 24)
    where = {"sleeve": [2, 3], "a": [0, 6], "text": slice(0, 12), "self": own, "reference": slice(36, keys)}
    shares = {}
    for name, tokens in where.items():
        truth = Truth(generated(calls, (4, 6), own), keys=tokens, groups=[0, 1])
        for direction in ("r2g", "mass"):
            assert_peak(maps.tlam(direction, reference=name), truth.tlam(direction, 2))
            assert_peak(maps.llam(direction, reference=name), truth.llam(direction))
        shares[name] = truth.tlam("mass", 2)
    assert maps.ulam("g2r", reference="self").shape == (1, 4, 6)
    with pytest.raises(ValueError, match="patches are kept of references only, and 'self' is none"):
        maps.sram((3, 3), reference="self")
    assert maps.sram("p").shape == maps.ulam("g2r").shape
    budget = maps.budget()
    assert budget.sources == ["reference", "sleeve", "a", OTHER_WORDS, "self"]  # nothing is left over
    total = budget.over_time()
    torch.testing.assert_close(total.sum(-1), torch.ones(1, 2))
    want = torch.stack([shares[name].mean((-1, -2)) for name in ("reference", "sleeve", "a", "text", "self")], -1)
    want[..., 3] -= want[..., 1] + want[..., 2]
    torch.testing.assert_close(total.double(), want, rtol=1e-4, atol=1e-6)
    corner = torch.zeros(16, 24)
    corner[:8, :8] = 1  # four tokens
    place = maps.budget(corner, sources=["reference", "sleeve"])
    assert place.sources == ["reference", "sleeve", REST]
    torch.testing.assert_close(
        place.over_time()[..., 1].double(), shares["sleeve"][..., :2, :2].mean((-1, -2)), rtol=1e-4, atol=1e-6
    )
    assert place.one_group_a_step
    assert set(place.total()) == {"reference", "sleeve", REST}
    with pytest.raises(ValueError, match="sources must be among 'reference', 'sleeve'"):
        maps.budget(sources=["hat"])


def test_files_keep_what_a_key_set_is(kontext, tmp_path):
    with i2am.trace(kontext, words=["sleeve"], text=True) as tracer:
        edit(kontext)
    maps = tracer.maps()
    again = i2am.AttributionMaps.load(maps.save(tmp_path / "maps.safetensors"))
    assert (again.references, again.words, again.sources) == (maps.references, maps.words, maps.sources)
    torch.testing.assert_close(again.budget().shares, maps.budget().shares, equal_nan=True)


def test_the_reference_is_as_it_was(kontext):
    with i2am.trace(kontext, output="model") as tracer:
        plain = edit(kontext).images
    with i2am.trace(kontext, words=["red"], itself=True, output="model") as beside:
        assert edit(kontext).images.equal(plain)
    for direction in ("r2g", "g2r", "mass"):
        assert_peak(beside.maps().ulam(direction), tracer.maps().ulam(direction).double(), 1e-6)


def test_text_to_image_has_words_alone():
    pipe = prompts.sd3(adapter=False)
    given = dict(
        hidden_states=torch.randn(1, 4, 8, 12),
        encoder_hidden_states=torch.randn(1, 9, dit.TEXT),
        pooled_projections=torch.randn(1, 8),
        timestep=torch.tensor([500.0]),
    )
    go = lambda: pipe.transformer(**given)  # noqa: E731
    calls = [c for c in capture_calls(pipe.transformer, go, ("Attention",)) if c.k.shape[2] == 24 + 9]
    with i2am.patch_transformer(pipe.transformer, words={"hat": [4, 1]}, text=True, num_steps=1) as tracer:
        with torch.no_grad():
            go()
    maps = tracer.maps()
    truth = Truth(generated(calls, (4, 6), slice(0, 24)), keys=[24 + 4, 24 + 1], groups=[0])
    assert_peak(maps.ulam("mass", reference="hat"), truth.ulam("mass"))
    assert_peak(maps.ulam("r2g", reference="hat"), truth.ulam("r2g"))
    assert maps.budget().sources == ["hat", OTHER_WORDS, REST]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": "red"}, "words must be a sequence of words"),
        ({"words": []}, "words must be a sequence of words"),
        ({"words": ["text"]}, "words need names of their own"),
        ({"words": ["red", "red"]}, "words need names of their own"),
        ({"text": True, "mode": "self"}, 'text= goes with mode="reference"'),
        ({"itself": True}, "itself= can't be told apart here: the picture's own tokens are the keys of attention of"),
    ],
)
def test_options_are_checked(options, message):
    pipe = pipelines.sd("full")
    with pytest.raises(ValueError, match=message):
        i2am.trace(pipe, **options)
    assert not pipe.unet._forward_pre_hooks


def test_prompts_that_do_not_tell(kontext):
    embeds = dit.flux_prompt(12)
    with i2am.trace(kontext, words=["sleeve"]) as tracer:
        with pytest.raises(ValueError, match="words= needs the prompt as text"):
            edit(kontext, prompt=None, **embeds)
        with pytest.raises(ValueError, match="'sleeve' is no word of the prompt; its words: a, cat"):
            edit(kontext, prompt="a cat")
        with pytest.raises(ValueError, match="nothing was recorded"):
            tracer.maps()
    with i2am.trace(kontext, words={"sleeve": [2, 3]}) as tracer:  # by number, embeddings will do
        edit(kontext, prompt=None, **embeds)
    assert tracer.maps().words == ["sleeve"]
    with (
        i2am.trace(kontext, words=["red", "red sleeve"]),
        pytest.raises(ValueError, match="'red' and 'red sleeve' share"),
    ):
        edit(kontext)
    with (
        i2am.trace(kontext, words={"x": [12]}),
        pytest.raises(ValueError, match=r"text tokens \[12\] are not among 0…11"),
    ):
        edit(kontext)


def test_where_words_are_not_known():
    with pytest.raises(ValueError, match="a bare model has no tokenizer"):
        i2am.patch_transformer(prompts.sd3().transformer, words=["a"], num_steps=1)
    with pytest.raises(ValueError, match="words can't be found in the prompts of a Flux2Pipeline"):
        i2am.trace(dit.flux2(), words=["a"])
    with pytest.raises(ValueError, match="words= can't be told apart here: i2am does not know which keys"):
        i2am.trace(prompts.wan(), words={"a": [0]})
    with pytest.raises(TypeError, match="patch_modules"):
        i2am.patch_modules(pipelines.unet(), reference=i2am.Reference(), words=["a"])


# ------------------------------------------------------------------------------------------------------ chat templates


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(folder, length=64):
    """Byte-level pieces as Qwen's, where a space belongs to the word behind it; saved, and loaded as people load it."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "re", "red", "Ġred", "le", "eve", "sleeve", "Ġsleeve", "Ġs"]
    merges = [("r", "e"), ("re", "d"), ("Ġ", "red"), ("l", "e"), ("e", "ve"), ("Ġ", "s")]
    pieces += ["ve"]
    merges.insert(4, ("v", "e"))
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|endoftext|>"]
    inner.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, model_max_length=length)


def tokens_of(tokenizer, text, places):
    """The text that tokens stand for."""
    ids = tokenizer(text).input_ids
    return "".join(tokenizer.decode([ids[i]]) for i in places)


def test_words_behind_pictures(tmp_path):
    """Counted from the end: what a picture before the prompt becomes does not matter."""
    tokenizer = chat_tokenizer(tmp_path)
    around = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n"
    prompt = "a red sleeve on a Red user"
    for word, seen in (("red", " redRed"), ("sleeve", " sleeve"), ("user", "user"), ("red sleeve", " red sleeve")):
        places = word_tokens(word, prompt, tokenizer, 64, around=around, from_end=True)
        for pictures in (1, 7):
            text = around[0].replace("<|image_pad|>", "<|image_pad|>" * pictures) + prompt + around[1]
            assert tokens_of(tokenizer, text, places) == seen
    with pytest.raises(ValueError, match="'assistant' is no word of the prompt"):
        word_tokens("assistant", prompt, tokenizer, 64, around=around)


def qwen_edit(tmp_path, several=False):
    """Its language model is given: for each token of the text, with four of the picture, one vector."""
    pipe = dit.qwen(*([dit.QwenImageEditPlusPipeline] if several else []))
    pipe.tokenizer = chat_tokenizer(tmp_path)

    def embed(self, prompt=None, image=None, device=None, dtype=None):
        count = len(image) if isinstance(image, list) else 1
        given = [f"Picture {i + 1}: <|vision_start|><|image_pad|><|vision_end|>" for i in range(count)] * several
        text = self.prompt_template_encode.format("".join(given) + prompt[0])
        text = text.replace("<|image_pad|>", "<|image_pad|>" * 4)
        seen.append(text)
        count = len(self.tokenizer(text).input_ids)
        return dit.text_tokens(count, seed=len(prompt[0]))[:, 3:], torch.ones(1, count - 3, dtype=torch.long)

    seen = []
    pipe.prompt_template_encode_start_idx = 3
    kind = type(
        type(pipe).__name__, (type(pipe),), {"_get_qwen_prompt_embeds": embed, "__module__": type(pipe).__module__}
    )
    pipe.__class__ = kind
    pipe.text_encoder, pipe.image_processor.check = None, None
    return pipe, seen


@pytest.mark.parametrize("several", [False, True], ids=["edit", "plus"])
def test_words_of_qwen_image_edit(tmp_path, monkeypatch, several):
    """Several places and sub-words, beside references, under guidance with a shorter negative prompt."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    monkeypatch.setattr(edit, "calculate_dimensions", lambda area, ratio: (32, 32, None))
    monkeypatch.setattr(plus, "calculate_dimensions", lambda area, ratio: (32, 32))
    pipe, seen = qwen_edit(tmp_path, several)
    prompt = "a red sleeve on a Red cat"

    def go():
        image = pipelines.image((32, 32))
        pipe(
            image=[image, image] if several else image,
            prompt=prompt,
            negative_prompt="no",
            true_cfg_scale=3.0,
            width=24,
            height=16,
            num_inference_steps=2,
            generator=seeded(),
            output_type="latent",
        )

    calls = [c for c in capture_calls(pipe.transformer, go, ("Attention",)) if c.evaluation % 2 == 0]
    with i2am.trace(pipe, time_groups=2, words=["red", "sleeve"], output="model") as tracer:
        go()
    maps = tracer.maps()
    assert maps.words == ["red", "sleeve"]
    text, dropped = next(t for t in seen if prompt in t), 3
    pieces = [pipe.tokenizer.decode([i]) for i in pipe.tokenizer(text).input_ids]
    own = len(pieces) - dropped
    start = text.index(prompt)
    for word in ("red", "sleeve"):
        spans = [m.span() for m in re.finditer(word, prompt, re.IGNORECASE)]
        wanted, at = [], 0
        for i, piece in enumerate(pieces):
            if any(at < start + b and at + len(piece) > start + a for a, b in spans):
                wanted.append(i - dropped)
            at += len(piece)
        truth = Truth(generated(calls, (4, 6), slice(own, own + 24)), groups=[0, 0, 1, 1], keys=wanted)
        for direction in ("r2g", "mass"):
            assert_peak(maps.tlam(direction, reference=word), truth.tlam(direction, 2))


def test_words_of_klein(tmp_path):
    """Behind a chat template, in front of padding."""
    pipe = dit.flux2_klein()
    pipe.tokenizer = tokenizer = chat_tokenizer(tmp_path)
    before, behind = flux2._chat(pipe)
    assert (before, behind) == ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    found = PromptWords(["red", "cat"], pipe, flux2.Flux2.texts).find({"prompt": PROMPT, "max_sequence_length": 64})
    text = before + PROMPT + behind
    assert tokens_of(tokenizer, text, found["red"]) == " redRed"  # the space before "Red" is a piece of its own
    assert tokens_of(tokenizer, text, found["cat"]) == "cat"
    pipe.tokenizer = SimpleNamespace(tokenizer=tokenizer)
    with pytest.raises(ValueError, match="does not find words among the tokens of a SimpleNamespace"):
        PromptWords(["red"], pipe, flux2.Flux2.texts).find({"prompt": PROMPT, "max_sequence_length": 64})


def test_prompts_whose_ends_are_not_known_are_refused(tmp_path):
    pipe = dit.qwen(dit.QwenImagePipeline)
    pipe.tokenizer = chat_tokenizer(tmp_path)
    words = PromptWords(["red"], pipe, qwen.QwenImage.texts)
    with pytest.raises(ValueError, match="of different lengths, and words are counted from their ends"):
        words.find({"prompt": ["a red cat", "a red cat on red"], "max_sequence_length": 512})
    with pytest.raises(ValueError, match=r"of which 20 are read, and words are counted from its end"):
        words.find({"prompt": "a red cat", "max_sequence_length": 20})


def test_a_shorter_negative_prompt_lacks_the_words():
    """Its call does not count; of numbers that a caller gives, none may be missing."""
    words = {"red": [-9, -8], "cat": [-2]}
    assert [s.name for s in key_sets(KeySets(words, found=True), range(5))] == ["cat"]
    assert [s.tokens for s in key_sets(KeySets(words, found=True), range(10, 20))] == [[11, 12], [18]]
    with pytest.raises(ValueError, match=r"'red': text tokens \[-9, -8\] are not among 0…4"):
        key_sets(KeySets(words), range(5))
