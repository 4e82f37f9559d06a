"""FLUX.2: several references in context, and Klein's cache of their keys.

Tokens are ``[text ‖ generated ‖ reference 0 ‖ …]``; the position ids' first axis is 0 for the generated picture and 10,
20, … for the references. With the KV cache the first step runs ``[text ‖ references ‖ generated]`` and the references
attend to themselves alone, in a second call; later steps have only their keys, inserted behind the text's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from i2am.families import PipelineFacts, TextPart, TokenLayout
from i2am.families.joint import JointTransformer, Positions, Segment, apart
from i2am.references import Reference

PROMPT = "\N{SNOWMAN}i2am\N{SNOWMAN}"  # stands for the prompt where a chat template is looked at


def _chat(pipe: Any) -> tuple[str, str]:
    """Return what Klein's chat template puts before and behind the prompt.

    Raises:
        ValueError: the tokenizer is a processor's (FLUX.2 [dev]), which pads on the left and adds tokens of its own.
    """
    if getattr(pipe.tokenizer, "tokenizer", None) is not None:
        raise ValueError(
            f"i2am does not find words among the tokens of a {type(pipe.tokenizer).__name__}: say which text tokens "
            "they are, counted from the first one, words={…: [4, 5]}"
        )
    messages = [{"role": "user", "content": PROMPT}]
    whole = pipe.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    before, _, behind = whole.partition(PROMPT)
    return before, behind


class Flux2(JointTransformer):
    """``Flux2Transformer2DModel``."""

    texts = (TextPart("tokenizer", length="max_sequence_length", chat=_chat),)

    attentions = ("Flux2Attention", "Flux2ParallelSelfAttention")
    shards = True

    models = ("Flux2Transformer2DModel",)
    pipelines = (PipelineFacts("Flux2*", several=True), PipelineFacts("Flux2KleinInpaint*", "image_reference"))

    def __init__(
        self, transformer: nn.Module, references: Sequence[Reference] | None = None, *, self_attention: bool = False
    ):
        super().__init__(transformer, references, self_attention=self_attention)
        self._positions = Positions()
        self._cached: list[Segment] = []  # the references whose keys the model has cached

    def layout(self, given: dict[str, Any]) -> TokenLayout:
        text = given["encoder_hidden_states"].shape[1]
        generated, references = apart(self._positions.segments(given["img_ids"]))
        mode, cache = given.get("kv_cache_mode"), given.get("kv_cache")
        if mode == "extract" and given.get("num_ref_tokens"):
            self._cached = references
            return self._with_cache(generated, text)
        if mode == "cached" and cache is not None:
            if not self._cached or self._cached[-1].stop != cache.num_ref_tokens:
                raise ValueError(
                    f"the KV cache holds {cache.num_ref_tokens} reference tokens that were put there before tracing "
                    "began, so their grids are unknown: trace from the first step"
                )
            return self._with_cache(Segment(cache.num_ref_tokens, generated.grid), text)
        return self.in_context(generated, references, text, slice(0, text), text + given["hidden_states"].shape[1])

    def _with_cache(self, generated: Segment, text: int) -> TokenLayout:
        """Return keys ``[text ‖ references ‖ generated]``, as ``generated`` says; queries ``[text ‖ generated]``."""
        carried = self.in_context(generated, self._cached, text, slice(0, text), text + generated.stop)
        return carried._replace(queries=slice(text, text + generated.stop - generated.start), parts=None)
