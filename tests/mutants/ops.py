"""Bugs in the op's door: its token sets, checks, order of tokens, custom op, sums, threads, and the definitions."""

from tests.mutants import Mutant

TESTS = ["tests/ops/test_tokens.py", "tests/ops/test_ops.py"]
DOOR, TOKENS, CHECKS, NAIVE, WORKERS = (
    f"i2am/ops/{x}.py" for x in ("__init__", "tokens", "checks", "naive", "workers")
)
TESTS_OF = {WORKERS: ["tests/ops/test_workers.py"], NAIVE: ["tests/ops/test_ops.py", "tests/ops/test_not_finite.py"]}
MUTANTS = [
    Mutant(TOKENS, "if selector.stop > length:", "if selector.stop > length + 1:"),
    Mutant(TOKENS, "(np.diff(positions) == 1).all()", "True", "an unordered set without gaps is a span"),
    Mutant(TOKENS, "seen == [version, length]", "seen[1:] == [length]", "a changed tensor is not reread"),
    Mutant(TOKENS, "seen == [version, length]", "seen[:1] == [version]", "read for a sequence of another length"),
    Mutant(TOKENS, "positions = tokens.astype(np.int64)", "positions = tokens", "shares the user's memory"),
    Mutant(TOKENS, "if type(found) is Tensor:", "if True:", "fake index tensors are kept"),
    Mutant(TOKENS, "back[order] = np.arange(order.size)", "back = order.copy()", "an order undone by itself"),
    Mutant(
        TOKENS, "range(chosen.start, chosen.start + len(chosen))", "range(chosen.start, chosen.stop)", "one of many"
    ),
    Mutant(TOKENS, "key = (positions.tobytes(), device)", "key = (positions.size, device)", "a set of the same size"),
    Mutant(TOKENS, "zip([0, *stops[:-1]], stops, strict=True)", "zip([0] * len(stops), stops, strict=True)"),
    Mutant(TOKENS, "np.setdiff1d(np.arange(length), chosen", "np.setdiff1d(np.arange(chosen.max() + 1), chosen"),
    Mutant(CHECKS, "or x.device != device:", "or False:", "sums on another device"),
    Mutant(
        CHECKS,
        'and x.shape[-1] > 1:\n        raise ValueError(f"sums',
        'and False:\n        raise ValueError(f"sums',
    ),
    Mutant(CHECKS, "k.shape[:2] != (B, H) or k.shape[3]", "k.shape[0] != B or k.shape[3]", "other heads of k"),
    Mutant(CHECKS, "v.shape[:3] != k.shape[:3]", "v.shape[2] != k.shape[2]", "other heads of v"),
    Mutant(CHECKS, "scale = 1.0 / math.sqrt(d)", "scale = 1.0 / math.sqrt(d if v is None else v.shape[3])"),
    Mutant(CHECKS, "not math.isfinite(scale)", "math.isnan(scale)", "an infinite scale"),
    Mutant(CHECKS, "q.shape[-1] > TRITON_MAX_HEAD_DIM or", "q.shape[-1] >= TRITON_MAX_HEAD_DIM or", "256 is refused"),
    Mutant(CHECKS, "not (graded and x.requires_grad)", "not x.requires_grad", "inference of a model by the custom op"),
    Mutant(CHECKS, "regions.shape[0] not in (1, B)", "regions.shape[0] not in (1, B, 2 * B)"),
    Mutant(CHECKS, "torch.is_grad_enabled() and any(", "any(", "sums refuse trained weights under no_grad"),
    Mutant(CHECKS, "row_lse.shape != q.shape[:3]", "row_lse.shape[2] != q.shape[2]", "another head's rows"),
    Mutant(DOOR, "mask = None if mask is None else mask[:, :, order]", "pass", "a mask in the order of before"),
    Mutant(DOOR, "row_lse[:, :, back]", "row_lse", "log-sum-exp in the order of the gathered rows"),
    Mutant(DOOR, "first = min(start for start, _ in key_spans)", "first = key_spans[0][0]", "references in any order"),
    Mutant(
        DOOR,
        "[col_lse[..., a - first : b - first] for a, b in key_spans]",
        "[col_lse[..., : b - a] for a, b in key_spans]",
        "the first reference's columns for each",
    ),
    Mutant(DOOR, "max(keys[1::2]) - min(keys[::2])", "keys[-1] - keys[0]", "the shape that a compiler expects"),
    Mutant(DOOR, "q.new_empty(B, Nq, H, v.shape[-1])", "q.new_empty(B, Nq, H, q.shape[-1])", "values of another width"),
    Mutant(DOOR, "s.mass.add_(spent.sum(-1))", "s.mass.copy_(spent.sum(-1))", "the twin's mass of the last call"),
    Mutant(NAIVE, "s[:, :, queries][..., keys], -2)", "s[..., keys], -2)[..., queries, :]", "columns over all queries"),
    Mutant(NAIVE, "g2r=spent.mean(-2)", "g2r=spent.sum(-2) / q.shape[2]", "a mean over all queries"),
    Mutant(NAIVE, '~takes_part(mask), float("-inf")', 'takes_part(mask).isnan(), float("-inf")', "no mask at all"),
    Mutant(
        NAIVE, "takes_part(mask).to(v).expand(rows.shape) @", "torch.ones_like(rows) @", "masked values spoil a row"
    ),
    Mutant(
        WORKERS,
        "[self._results[i] for i in range(len(self._results))]",
        "list(self._results.values())",
        "results in the order in which tasks ended",
    ),
    Mutant(WORKERS, "torch.inference_mode(self._inference), torch.no_grad()", "torch.no_grad()"),
    Mutant(WORKERS, "args=(self._before,)", "args=(1,)", "later threads of the user's have one"),
    Mutant(WORKERS, "    _workers.clear()\n", "    pass\n", "a forked child waits for its parent's threads"),
    Mutant(WORKERS, "torch.set_num_threads(1)", "pass", "threads of threads"),
]
