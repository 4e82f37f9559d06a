"""Bugs in the streaming path, the differentiable op and its read-outs."""

from tests.mutants import Mutant

TESTS = ["tests/ops/test_streaming.py"]
STREAMING, SWEEPS, BACKWARD = "i2am/ops/streaming.py", "i2am/ops/sweeps.py", "i2am/ops/backward.py"
READOUTS, FLASH = "i2am/ops/readouts.py", "i2am/ops/flash.py"
GRADIENTS = ["tests/ops/test_gradients.py"]
TESTS_OF = dict.fromkeys((SWEEPS, BACKWARD, READOUTS, FLASH), GRADIENTS)
MUTANTS = [
    Mutant(STREAMING, "col_lse[at] = lse / heads.unit", "col_lse[at] = lse", "in powers of two"),
    Mutant(STREAMING, "regions[at[0] % len(regions)]", "regions[0]", "the first image's regions"),
    Mutant(STREAMING, "self.sums *= self.heads.exp_(self.top - top)", "pass", "a stronger row does not rescale"),
    Mutant(
        STREAMING,
        "first, last = max(rows.start, heads.queries.start)",
        "first, last = max(rows.start, 0)",
        "queries before the generated ones",
    ),
    Mutant(
        STREAMING, "reference.sram.add_(total[:, 1:])", "reference.sram.add_(total[:, :-1])", "the mean as a region"
    ),
    Mutant(STREAMING, "inverse = sums.clamp_min_(TINY).reciprocal_()", "inverse = sums.reciprocal_()"),
    Mutant(STREAMING, "WEAK = 2.0**-80", "WEAK = 0.0", "underflown columns are taken as they are"),
    Mutant(STREAMING, "weak + columns.hull.start", "weak", "weak columns of the first keys"),
    Mutant(STREAMING, "lse[:, weak] = exact * heads.unit", "lse[:, weak] = exact"),
    Mutant(STREAMING, "lse = _finite(_within(lse, hull, reference))", "lse = _within(lse, hull, reference)"),
    Mutant(
        STREAMING, "if whole is None or repaired:", "if whole is None:", "repaired columns are looked at as they were"
    ),
    Mutant(
        STREAMING,
        "reference.r2g.add_(shares.mul_(whole.weights), alpha=1.0 / width)",
        "reference.r2g.add_(shares, alpha=1.0 / width)",
        "rows keep their shifts",
    ),
    Mutant(STREAMING, "step = -(-length // -(-length // most))", "step = length // -(-length // most)"),
    Mutant(STREAMING, "bias if bias.shape[2] == 1 else bias[:, :, keys]", "bias", "a mask of other keys"),
    Mutant(STREAMING, "self.bias if self.bias.shape[1] == 1 else self.bias[:, rows]", "self.bias[:, :1]"),
    Mutant(STREAMING, "if rows == slice(0, Nq):", "if rows.start == 0:", "the first tile taken for the whole"),
    Mutant(SWEEPS, "(total.log() + top / heads.unit).squeeze(2)", "(total.log() + top).squeeze(2)"),
    Mutant(
        SWEEPS,
        "(total.log() - mean).masked_fill_(total == 0, 0.0)",
        "(total.log() + mean).masked_fill_(total == 0, 0.0)",
    ),
    Mutant(SWEEPS, "s.masked_fill_(~bias, -math.inf) if", "s.masked_fill_(bias, -math.inf) if", "the mask, inverted"),
    Mutant(SWEEPS, "LOG2E if mask is None or mask.dtype == torch.bool else 1.0", "LOG2E", "a bias in another unit"),
    Mutant(SWEEPS, "heads.q[:, rows].to(lse.dtype)), alpha=scale)", "heads.q[:, rows].to(lse.dtype)))", "dk unscaled"),
    Mutant(SWEEPS, "/ p.sum(2, keepdim=True).clamp_min_(TINY)", "", "rows of a part of the keys"),
    Mutant(BACKWARD, "delta -= dlse.unsqueeze(3)", "delta += dlse.unsqueeze(3)"),
    Mutant(BACKWARD, "epsilon -= dlse", "pass", "the column log-sum-exp has no gradient"),
    Mutant(BACKWARD, "epsilon += gathered", "pass", "R2G lacks its ε"),
    Mutant(BACKWARD, "> LARGE)", "> 1e9)", "large logits in float32"),
    Mutant(BACKWARD, 'whole = d["out"] is not None or d["row_lse"] is not None', 'whole = d["out"] is not None'),
    Mutant(BACKWARD, "own += (dmass * kept.mass).sum(0)", "own += dmass.sum(0)"),
    Mutant(BACKWARD, "left.append(dlanding)", "left.append(dlanding.abs())"),
    Mutant(BACKWARD, "gathered = None if gathered is None else gathered * w", "pass"),
    Mutant(FLASH, "out[..., w] = delta", "out[..., w] = -delta"),
    Mutant(FLASH, "and mask is None and", "and", "masked calls go there, too"),
    Mutant(READOUTS, "return full / total", "return full", "regions are no mean"),
    Mutant(
        READOUTS, "got.landing[:, :, at]", "got.landing[:, :, : at.stop - at.start]", "the first reference's landing"
    ),
    Mutant(READOUTS, "s - one.col_lse.gather(2, j)", "s - one.col_lse.gather(2, i)"),
    Mutant(READOUTS, 'wanted.remove("mass")', "pass"),
    Mutant(READOUTS, "x.double() if x.dtype in (torch.float32, torch.float64) else x.float()", "x"),
    Mutant(
        READOUTS,
        "full[:, start - first : stop - first] = x",
        "full[:, : stop - start] = x",
        "the wrong keys' coordinates",
    ),
    Mutant(READOUTS, "s = _masked(s, None if mask is None else mask[..., asked.columns[n].index])", "pass"),
]
