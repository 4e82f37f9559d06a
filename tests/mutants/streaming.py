"""Bugs in the streaming path, the differentiable op and its read-outs."""

from tests.mutants import Mutant

TESTS = ["tests/ops/test_streaming.py"]
SHIFTED, BLOCKWISE, HEADS = "i2am/ops/shifted.py", "i2am/ops/blockwise.py", "i2am/ops/heads.py"
STREAMING, SWEEPS, BACKWARD = "i2am/ops/streaming.py", "i2am/ops/sweeps.py", "i2am/ops/backward.py"
READOUTS, FLASH = "i2am/ops/readouts.py", "i2am/ops/flash.py"
GRADIENTS = ["tests/ops/test_gradients.py"]
TESTS_OF = dict.fromkeys((SWEEPS, BACKWARD, READOUTS, FLASH), GRADIENTS)
MUTANTS = [
    Mutant(STREAMING, "regions[at[0] % len(regions)]", "regions[0]", "the first image's regions"),
    Mutant(
        STREAMING,
        "if found is None:\n        sweeps = Shifted(heads)\n        found = sweeps.columns([",
        "if False:\n        sweeps = Shifted(heads)\n        found = sweeps.columns([",
    ),
    Mutant(HEADS, "self.sram.add_(spent[:, 1:])", "self.sram.add_(spent[:, :-1])", "the mean as a region"),
    Mutant(HEADS, "1.0 / Q, dtype=dtype)", "1.0, dtype=dtype)", "G2R is a sum"),
    Mutant(HEADS, "bias if bias.shape[2] == 1 else bias[:, :, keys]", "bias", "a mask of other keys"),
    Mutant(HEADS, "self.bias if self.bias.shape[1] == 1 else self.bias[:, rows]", "self.bias[:, :1]", "one row's mask"),
    Mutant(HEADS, "slice(span.start - outer.start, span.stop - outer.start)", "slice(0, span.stop - span.start)"),
    Mutant(
        HEADS, "return slice(start, max(start, min(one.stop, other.stop)))", "return slice(start, max(start, one.stop))"
    ),
    Mutant(
        SHIFTED, "inverse = sums.clamp_min_(TINY).reciprocal_()", "inverse = sums.reciprocal_()", "masked rows: inf"
    ),
    Mutant(
        SHIFTED,
        "part.sums.mul_(self._exp_(part.top - top)).add_(",
        "part.sums.add_(",
        "a stronger row rescales nothing",
    ),
    Mutant(SHIFTED, "WEAK = 2.0**-80", "WEAK = 0.0", "underflown columns are taken as they are"),
    Mutant(SHIFTED, "columns + self._heads.hull.start)", "columns)", "weak columns of the first keys"),
    Mutant(SHIFTED, "return exact * self._unit", "return exact", "in another unit"),
    Mutant(SHIFTED, "            self._kept = None\n", "", "repaired columns are looked at as they were"),
    Mutant(
        SHIFTED,
        "reference.r2g.add_(shares.mul_(kept.undo), alpha",
        "reference.r2g.add_(shares, alpha",
        "rows keep shifts",
    ),
    Mutant(
        SHIFTED, "if rows == slice(0, heads.q.shape[1]):", "if rows.start == 0:", "the first tile taken for the whole"
    ),
    Mutant(SHIFTED, "return self._lse / self._unit", "return self._lse", "in powers of two"),
    Mutant(BLOCKWISE, "if not all(part.good for part in parts):", "if not parts[0].good:", "one piece out of range"),
    Mutant(BLOCKWISE, "min(LIMIT, ROOM / max(largest(heads.v), 1.0))", "LIMIT", "values of 1e25"),
    Mutant(BLOCKWISE, "return root.mul(2.0**LIFT).mul_(root)", "return root", "weights of columns are square roots"),
    Mutant(BLOCKWISE, "return bool((sums < self._limit).all())", "return True", "rows out of range are taken"),
    Mutant(BLOCKWISE, "part.sums[:, 0] * (part.top - self._top).exp2_()", "part.sums[:, 0]", "pieces are not rescaled"),
    Mutant(BLOCKWISE, "self._columns[:, weak] = 0.0", "pass", "weak columns are added twice"),
    Mutant(BLOCKWISE, "columns + self._heads.hull.start, :d]", "columns, :d]", "weak columns of the first keys"),
    Mutant(BLOCKWISE, "counts = both(tile, heads.queries) == tile", "counts = True", "all queries count"),
    Mutant(BLOCKWISE, "is not None]) and good", "is not None])", "the last tile decides for all"),
    Mutant(BLOCKWISE, ".to(lse) / r.size for r in", ".to(lse) for r in", "a sum over weak columns"),
    Mutant(
        BLOCKWISE,
        "heads.weights[:, there] * self._rows[:, tile].unsqueeze(1)",
        "heads.weights[:, there]",
        "rows not normalised",
    ),
    Mutant(SWEEPS, "(total.log() + top / heads.unit).squeeze(2)", "(total.log() + top).squeeze(2)"),
    Mutant(
        SWEEPS,
        "(total.log() - mean).masked_fill_(total == 0, 0.0)",
        "(total.log() + mean).masked_fill_(total == 0, 0.0)",
    ),
    Mutant(SWEEPS, "s.masked_fill_(~bias, -math.inf) if", "s.masked_fill_(bias, -math.inf) if", "the mask, inverted"),
    Mutant(SWEEPS, "LOG2E if mask is None or mask.dtype == torch.bool else 1.0", "LOG2E", "a bias in another unit"),
    Mutant(SWEEPS, "heads.q[:, rows].to(lse.dtype), alpha=scale)", "heads.q[:, rows].to(lse.dtype))", "dk unscaled"),
    Mutant(SWEEPS, "p.sum(2, keepdim=True).clamp_min_(TINY)", "p.sum(2, keepdim=True)", "0 / 0 of a masked row"),
    Mutant(BACKWARD, "delta -= dlse.unsqueeze(3)", "delta += dlse.unsqueeze(3)"),
    Mutant(BACKWARD, "epsilon -= dlse", "pass", "the column log-sum-exp has no gradient"),
    Mutant(BACKWARD, "epsilon += gathered", "pass", "R2G lacks its ε"),
    Mutant(BACKWARD, "NOTABLE if sweeps.costs_little(q, k) else LARGE", "1e9", "large logits in float32"),
    Mutant(BACKWARD, 'whole = d["out"] is not None or d["row_lse"] is not None', 'whole = d["out"] is not None'),
    Mutant(BACKWARD, "own += (dmass * kept.mass).sum(0)", "own += dmass.sum(0)"),
    Mutant(BACKWARD, "left.append(dlanding)", "left.append(dlanding.abs())"),
    Mutant(
        BACKWARD,
        "gathered[..., :-1] / gathered[..., -1:].clamp_min(TINY)",
        "gathered[..., :-1]",
        "sums, not means, of C",
    ),
    Mutant(FLASH, "out[..., w] = delta", "out[..., w] = -delta"),
    Mutant(FLASH, "and mask is None and", "and", "masked calls go there, too"),
    Mutant(READOUTS, "return full / total", "return full", "regions are no mean"),
    Mutant(
        READOUTS, "got.landing[:, :, at]", "got.landing[:, :, : at.stop - at.start]", "the first reference's landing"
    ),
    Mutant(READOUTS, "s - col_lse.gather(2, j)", "s - col_lse.gather(2, i)"),
    Mutant(
        READOUTS,
        "(~got.row_lse.detach()[:, :, generated].isneginf()).to(got.row_lse.dtype)",
        "torch.ones_like(got.row_lse[:, :, generated])",
        "a fully masked row has a mass",
    ),
    Mutant(READOUTS, "x.double() if x.dtype in (torch.float32, torch.float64) else x.float()", "x"),
    Mutant(
        READOUTS,
        "full[:, start - first : stop - first] = x",
        "full[:, : stop - start] = x",
        "the wrong keys' coordinates",
    ),
    Mutant(READOUTS, "s = _masked(s, None if mask is None else mask[..., asked.columns[n].index])", "pass"),
]
