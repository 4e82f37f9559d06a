"""Words of the prompt among a model's text tokens, as the pipeline's own tokenizers make them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from i2am.families import Family, KeySets, TextPart
from i2am.tracing.options import TraceSettings


class AskedSets:
    """Key sets that a caller asks for beside the references.

    Raises:
        ValueError: words are given by name, and there is no tokenizer to find them.
    """

    def __init__(self, settings: TraceSettings, pipe: Any, family: Family):
        self._settings = settings
        self._words: PromptWords | None = None
        words = settings.words
        if words is None or isinstance(words, Mapping):
            return
        if pipe is None:
            raise ValueError(
                f"a bare model has no tokenizer: say which text tokens words are, words={{{words[0]!r}: [4, 5]}}"
            )
        self._words = PromptWords(words, pipe, family.texts)

    def read(self, frame: FrameType | None) -> KeySets:
        """Return what is told apart in a forward that the pipeline's call, in ``frame``, makes."""
        settings, words = self._settings, self._settings.words
        found = words if isinstance(words, Mapping) else {}
        if self._words is not None and frame is not None:
            found = self._words.find(dict(frame.f_locals))
        return KeySets(found, settings.text, settings.itself, self._words is not None)


class PromptWords:
    """Finds words in the prompt of a pipeline's running call.

    Args:
        words: what to find: words, or several in a row ("red sleeve"); any case, never inside of another word.
        pipe: the pipeline.
        texts: how it makes its text tokens, in their order.
    """

    def __init__(self, words: Sequence[str], pipe: Any, texts: Sequence[TextPart]):
        missing = [part.tokenizer for part in texts if getattr(pipe, part.tokenizer, None) is None]
        if not texts or missing:
            why = f"it has no {missing[0]}" if missing else "i2am does not know its text tokens"
            raise ValueError(
                f"words can't be found in the prompts of a {type(pipe).__name__}: {why}; say which text tokens they "
                f"are, counted from the first one: words={{{words[0]!r}: [4, 5]}}"
            )
        self._words, self._pipe, self._texts = list(words), pipe, texts
        self._last: tuple[object, dict[str, list[int]]] | None = None

    def find(self, variables: Mapping[str, Any]) -> dict[str, list[int]]:
        """Return the text tokens of each word, counted from the first text token.

        Args:
            variables: the local variables of the pipeline's running call.

        Raises:
            ValueError: a word is not in the prompt, or lies beyond what the text encoder reads; there is no prompt, or
                there are several that differ in where the words are.
        """
        asked = [(self._prompts(part, variables), _length(self._pipe, part, variables)) for part in self._texts]
        if self._last is None or self._last[0] != asked:
            self._last = asked, self._find(asked)
        return self._last[1]

    def _find(self, asked: Sequence[tuple[list[str], int]]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {word: [] for word in self._words}
        start = 0
        for part, (prompts, length) in zip(self._texts, asked, strict=True):
            tokenizer = getattr(self._pipe, part.tokenizer)
            around = ("", "") if part.chat is None else part.chat(self._pipe)
            if part.from_end:
                self._check_ends(prompts, around, tokenizer, length)
            convert = getattr(self._pipe, "maybe_convert_prompt", None)  # textual inversion: several tokens a concept
            for word, tokens in found.items():
                places = [
                    word_tokens(
                        word,
                        prompt if convert is None else convert(prompt, tokenizer),
                        tokenizer,
                        length,
                        around=around,
                        from_end=part.from_end,
                    )
                    for prompt in prompts
                ]
                if any(place != places[0] for place in places):
                    raise ValueError(
                        f"{word!r} is at different tokens in the prompts of this batch: trace one prompt at a time"
                    )
                tokens += [start + i for i in places[0]]
            start += length
        return found

    def _check_ends(self, prompts: Sequence[str], around: tuple[str, str], tokenizer: Any, length: int) -> None:
        """Refuse prompts whose last token may not be the last of the text. Raises ValueError."""
        counts = {len(tokenizer(around[0] + prompt + around[1]).input_ids) for prompt in prompts}
        if len(counts) > 1:
            raise ValueError(
                "the prompts of this batch are of different lengths, and words are counted from their ends: trace one "
                "prompt at a time"
            )
        if max(counts) > length and getattr(self._pipe, "processor", None) is None:  # those with pictures are not cut
            raise ValueError(
                f"the prompt makes {max(counts)} tokens, of which {length} are read, and words are counted from its "
                "end: shorten it"
            )

    def _prompts(self, part: TextPart, variables: Mapping[str, Any]) -> list[str]:
        """Return the prompts that a tokenizer reads."""
        given = next((p for p in (variables.get(name) for name in part.prompts) if p is not None), None)
        prompts = [given] if isinstance(given, str) else list(given) if isinstance(given, (list, tuple)) else []
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(
                f"words= needs the prompt as text, and this call of {type(self._pipe).__name__} has none (embeddings "
                f"were given?): say which text tokens they are, words={{{self._words[0]!r}: [4, 5]}}"
            )
        for name in part.same:
            other = variables.get(name)
            if other is not None and other not in (given, prompts):
                raise ValueError(
                    f"{name} differs from {part.prompts[-1]}, and both share the channels of the same tokens, so that "
                    "no token is of one word: leave it out"
                )
        return prompts


def _length(pipe: Any, part: TextPart, variables: Mapping[str, Any]) -> int:
    """Return how many tokens a tokenizer makes, with padding."""
    if part.length is None:
        return int(getattr(pipe, part.tokenizer).model_max_length)
    return int(variables[part.length])


def word_tokens(
    word: str,
    prompt: str,
    tokenizer: Any,
    length: int,
    *,
    around: tuple[str, str] = ("", ""),
    from_end: bool = False,
) -> list[int]:
    """Return the tokens of every occurrence of a word in a prompt.

    Args:
        word: one or several in a row; any case.
        prompt: the text.
        tokenizer: of transformers, fast or slow.
        length: of the token sequence, to which the prompt is cut.
        around: what a chat template puts before and behind it, where words are not looked for.
        from_end: count back from the last token, which is -1, and cut nothing.

    Raises:
        ValueError: it is not there (the message lists the prompt's words), or beyond ``length``.
    """
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, word.split())) + r"(?!\w)"
    places = [match.span() for match in re.finditer(pattern, prompt, re.IGNORECASE)]
    if not places:
        words = list(dict.fromkeys(re.findall(r"\w+(?:['’-]\w+)*", prompt)))
        raise ValueError(f"{word!r} is no word of the prompt; its words: {', '.join(words) or 'none'}")
    whole, shift = around[0] + prompt + around[1], len(around[0])
    spans = _spans(whole, tokenizer, [(start + shift, end + shift) for start, end in places])
    if from_end:
        count = len(tokenizer(whole).input_ids)
        return sorted({i - count for span in spans for i in span})
    kept = _count(tokenizer, whole, length)
    found = [i for span in spans for i in span if i < kept]
    if not found:
        raise ValueError(
            f"{word!r} lies beyond the {length} tokens of the prompt that {type(tokenizer).__name__} keeps"
        )
    return sorted(set(found))


def _count(tokenizer: Any, prompt: str, length: int) -> int:
    """Return how many tokens the prompt itself has after it was cut, with what stands before it."""
    ids = tokenizer(prompt, truncation=True, max_length=length).input_ids
    end = getattr(tokenizer, "eos_token_id", None)
    return len(ids) - (len(ids) > 0 and ids[-1] == end)


def _spans(prompt: str, tokenizer: Any, places: Sequence[tuple[int, int]]) -> list[range]:
    """Return the tokens of parts of a prompt, ``(first, last + 1)`` characters each, as if it were not cut."""
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(prompt, return_offsets_mapping=True).offset_mapping
        covers = [[i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > start] for start, end in places]
        return [range(c[0], c[-1] + 1) if c else range(0) for c in covers]
    whole = tokenizer(prompt, add_special_tokens=False).input_ids
    before = tokenizer(prompt).input_ids.index(whole[0])  # a start token
    found = []
    for start, end in places:
        left, right = (tokenizer(prompt[:at].rstrip(), add_special_tokens=False).input_ids for at in (start, end))
        if whole[: len(left)] != left or whole[: len(right)] != right:
            raise ValueError(
                f"a {type(tokenizer).__name__} does not tell where {prompt[start:end]!r} is among its tokens: use a "
                "fast tokenizer, or say which text tokens they are"
            )
        found.append(range(before + len(left), before + len(right)))
    return found
