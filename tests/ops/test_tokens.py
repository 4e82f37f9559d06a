"""TokenSet: every way to say which tokens, read into one form."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import i2am
from i2am.ops import tokens
from i2am.ops.tokens import TokenSet, gather, inverse, on_device


def of(selector, length=8):
    positions = TokenSet.of(selector, length, "keys").positions
    return (positions.start, positions.stop) if isinstance(positions, range) else positions.tolist()


@pytest.mark.parametrize(
    ("selector", "want"),
    [
        (None, (0, 8)),
        (slice(-3, None), (5, 8)),
        (slice(0, 8, 3), [0, 3, 6]),
        (slice(3, 0, -1), [3, 2, 1]),
        (slice(3, 8, 5), (3, 4)),
        ([2, 3, 4], (2, 5)),
        ([4, 3, 2], [4, 3, 2]),
        ([2, 4, 3], [2, 4, 3]),
        (torch.tensor([4, 2]), [4, 2]),
        (torch.tensor([4, 2], dtype=torch.uint8), [4, 2]),
        (torch.arange(8) % 2 == 0, [0, 2, 4, 6]),
        (torch.arange(8) > 5, (6, 8)),
        (np.array([7, 0]), [7, 0]),
        (np.arange(8) < 3, (0, 3)),
        (range(1, 3), (1, 3)),
        ((5,), (5, 6)),
    ],
)
def test_every_form_is_read(selector, want):
    assert of(selector) == want


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (slice(8, None), "selects none of 8"),
        ([], "selects none of 8"),
        (torch.zeros(8, dtype=torch.bool), "selects none of 8"),
        ([0, 8], "holds 8, outside the valid range 0…7"),
        ([-1, 2], "holds -1, outside"),
        ([1, 3, 1], "same token more than once"),
        (torch.ones(7, dtype=torch.bool), "bool mask of 7 tokens, but there are 8"),
        ([0.5, 1], "must hold integers, got float64"),
        ([[1, 2]], r"one-dimensional, got shape \(1, 2\)"),
        ([1, [2]], "a slice, a bool mask or indices"),
        (object(), "a slice, a bool mask or indices"),
        ("keys", "one-dimensional"),
        (TokenSet(range(4, 9)), "holds 8, outside the valid range 0…7"),
    ],
)
def test_what_is_no_set_of_tokens_is_refused(selector, message):
    with pytest.raises(ValueError, match=message):
        TokenSet.of(selector, 8, "keys")


def test_a_set_is_read_once_and_kept():
    gaps = TokenSet.of([5, 1], 8, "keys")
    assert TokenSet.of(gaps, 6, "keys") is gaps
    assert (gaps.start, gaps.stop, gaps.count) == (1, 6, 2)
    assert gaps.index.tolist() == [5, 1]
    assert TokenSet.of(slice(2, 4), 8, "keys").index == slice(2, 4)
    with pytest.raises(ValueError, match="read-only"):
        gaps.positions[0] = 3


def test_a_set_does_not_follow_the_tensor_it_was_read_from():
    given = torch.tensor([5, 1])
    chosen = TokenSet.of(given, 8, "keys")
    given[0] = 7
    chosen.index[1] = 0
    assert chosen.positions.tolist() == [5, 1]


def test_sets_are_equal_by_what_they_hold():
    one, other = TokenSet.of([5, 1], 8, "keys"), TokenSet.of(torch.tensor([5, 1]), 9, "keys")
    assert one == other
    assert hash(one) == hash(other)
    assert one != TokenSet.of([1, 5], 8, "keys")
    assert TokenSet(range(3)) == TokenSet.of([0, 1, 2], 8, "keys")
    assert TokenSet(range(3)) != TokenSet(range(4))
    assert one != [5, 1]
    assert repr(one) == "TokenSet(2 tokens within 1…5)"
    assert repr(TokenSet(range(3))) == "TokenSet(0…2)"


@given(st.data())
def test_gathered_sets_lie_in_their_spans(data):
    length = data.draw(st.integers(2, 30))
    order = data.draw(st.permutations(range(length)))
    cuts = sorted(data.draw(st.sets(st.integers(1, length), min_size=1, max_size=4)))
    sets = [TokenSet.of(order[a:b], length, "keys") for a, b in zip([0, *cuts], cuts, strict=False)]
    spans, found = gather(sets, length)
    everything = np.arange(length) if found is None else found
    assert sorted(everything.tolist()) == list(range(length))
    for (start, stop), tokens_ in zip(spans, sets, strict=True):
        assert everything[start:stop].tolist() == list(tokens_.positions)
    if found is not None:
        assert np.array_equal(found[inverse(found)], np.arange(length))


def test_spans_may_overlap_and_sets_with_gaps_may_not():
    first, second, gaps = TokenSet(range(5)), TokenSet(range(3, 8)), TokenSet.of([2, 7], 8, "keys")
    assert gather([first, second], 8) == ([(0, 5), (3, 8)], None)
    with pytest.raises(ValueError, match="must not share tokens"):
        gather([first, gaps], 8)


class Counted(torch.Tensor):
    """A tensor that counts how often it is copied to the host, and says that it lies elsewhere."""

    reads = 0
    is_cpu = False

    def cpu(self):
        type(self).reads += 1
        return self.as_subclass(torch.Tensor)


def test_a_tensor_on_a_device_is_read_once_until_it_changes(monkeypatch):
    monkeypatch.setattr(Counted, "reads", 0)
    given = torch.tensor([5, 1, 3]).as_subclass(Counted)
    for _ in range(3):
        assert of(given) == [5, 1, 3]
    assert Counted.reads == 1
    given[0] = 6
    assert of(given) == [6, 1, 3]
    assert Counted.reads == 2
    with pytest.raises(ValueError, match="outside the valid range 0…5"):
        of(given, 6)
    flags = (torch.arange(8) > 5).as_subclass(Counted)
    assert of(flags) == (6, 8)
    with pytest.raises(ValueError, match="bool mask of 8 tokens, but there are 9"):
        of(flags, 9)


def test_positions_are_copied_to_a_device_once():
    positions = np.array([5, 1, 3])
    assert on_device(positions, torch.device("cpu")) is on_device(positions.copy(), torch.device("cpu"))
    assert on_device(np.array([1, 5, 3]), torch.device("cpu")).tolist() == [1, 5, 3]  # of the same size
    with torch._subclasses.FakeTensorMode():
        on_device(np.array([8, 9]), torch.device("cpu"))
    assert on_device(np.array([8, 9]), torch.device("cpu")).tolist() == [8, 9]


def test_few_copies_are_kept(monkeypatch):
    monkeypatch.setattr(tokens, "COPIES", 2)
    monkeypatch.setattr(tokens, "_copies", {})
    for n in range(5):
        on_device(np.array([n]), torch.device("cpu"))
    assert len(tokens._copies) <= 2


def test_positions_copied_in_inference_mode_serve_training():
    positions = [4, 0, 2]
    q = torch.randn(1, 1, 5, 4)
    with torch.inference_mode():
        i2am.attention(q, q, q, queries=positions)
    x = torch.ones(5, requires_grad=True)
    x[on_device(np.array([*positions, 1, 3]), torch.device("cpu"))].sum().backward()
    assert x.grad.tolist() == [1.0] * 5
