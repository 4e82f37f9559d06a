"""Key sets beside the references: words, the whole text, the picture itself; where they are among a call's keys."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from i2am.families import Family, KeySets, Request
from i2am.references import SELF, TEXT, Grid, KeySet


def key_sets(
    sets: KeySets, text: Sequence[int], own: slice | Tensor | None = None, grid: Grid | None = None
) -> tuple[KeySet, ...]:
    """Return what is told apart among the keys of one attention.

    Args:
        sets: what is asked for.
        text: keys that are the prompt's tokens, in their order.
        own: keys that are the generated tokens, which lie on ``grid``.

    Raises:
        ValueError: a word's tokens are not among the text's, or are another's.
    """
    found: list[KeySet] = []
    owner: dict[int, str] = {}
    for word, places in sets.words.items():
        tokens = [i + len(text) if i < 0 else i for i in places]
        if sets.found and any(i < 0 for i in tokens):
            continue  # of a shorter prompt, which does not count
        wrong = [i for i in tokens if not 0 <= i < len(text)]
        if wrong or not tokens:
            raise ValueError(f"word {word!r}: text tokens {list(places)} are not among 0…{len(text) - 1}")
        shared = next((owner[i] for i in tokens if i in owner), None)
        if shared is not None:
            raise ValueError(f"words {shared!r} and {word!r} share tokens of the prompt: trace them apart")
        owner |= dict.fromkeys(tokens, word)
        found.append(KeySet(tokens=[text[i] for i in tokens], name=word, kind="word"))
    if sets.text:
        found.append(KeySet(tokens=list(text), name=TEXT, kind="text"))
    if sets.itself and own is not None:
        found.append(KeySet(grid, own, name=SELF, kind="self"))
    return tuple(found)


def check_key_sets(family: Family, request: Request) -> None:
    """Refuse key sets that a family does not know.

    Raises:
        ValueError: names the option, and why.
    """
    for name in request.sets:
        if name not in family.known_sets():
            reason = family.why_not_itself if name == "itself" else ""
            reason = reason or f"i2am does not know which keys these are in a {type(family).__name__}"
            raise ValueError(f"{name}= can't be told apart here: {reason}")
