"""Bugs in the op's door, its token sets and its checks."""

from tests.mutants import Mutant

TESTS = ["tests/ops/test_tokens.py", "tests/ops/test_ops.py"]
MUTANTS = [
    Mutant("i2am/ops/tokens.py", "if selector.stop > length:", "if selector.stop > length + 1:"),
    Mutant("i2am/ops/tokens.py", "(np.diff(positions) == 1).all()", "True", "an unordered set without gaps is a span"),
    Mutant("i2am/ops/tokens.py", "seen == [version, length]", "seen[1:] == [length]", "a changed tensor is not reread"),
    Mutant(
        "i2am/ops/tokens.py", "positions = tokens.astype(np.int64)", "positions = tokens", "shares the user's memory"
    ),
    Mutant("i2am/ops/tokens.py", "if type(found) is Tensor:", "if True:", "fake index tensors are kept"),
    Mutant(
        "i2am/ops/tokens.py", "back[order] = np.arange(order.size)", "back = order.copy()", "an order undone by itself"
    ),
    Mutant("i2am/ops/checks.py", "or x.device != device:", "or False:", "sums on another device"),
    Mutant(
        "i2am/ops/checks.py",
        'and x.shape[-1] > 1:\n        raise ValueError(f"sums',
        'and False:\n        raise ValueError(f"sums',
    ),
]
