"""Bugs in tracing: when, whose samples, who calls, what is added, what is left behind."""

from tests.mutants import Mutant

PLACE = "i2am/tracing/"
NAMES = ("clock", "watch", "guidance", "observe", "sums")
CLOCK, WATCH, GUIDANCE, OBSERVE, SUMS = (f"{PLACE}{name}.py" for name in NAMES)
REGIONS, QK, TILES, WHO = (f"{PLACE}{name}.py" for name in ("regions", "qk", "tiles", "who"))
INTERCEPT, TRACER, ACCUMULATOR = (f"{PLACE}{name}.py" for name in ("intercept", "tracer", "accumulator"))
TESTS = ["tests/tracing/test_patch.py", "tests/tracing/test_observe.py", "tests/tracing/test_context.py"]
TESTS_OF = {
    CLOCK: ["tests/tracing/test_clock.py", "tests/tracing/test_steps.py", "tests/tracing/test_context.py"],
    WATCH: ["tests/tracing/test_clock.py", "tests/tracing/test_steps.py", "tests/tracing/test_context.py"],
    GUIDANCE: ["tests/tracing/test_guidance.py", "tests/tracing/test_context.py", "tests/tracing/test_patch.py"],
    OBSERVE: [
        "tests/tracing/test_observe.py",
        "tests/tracing/test_patch.py",
        "tests/tracing/test_accumulator.py",
        "tests/tracing/test_context.py",
        "tests/families/test_resampler.py",
    ],
    REGIONS: ["tests/maps/test_sram.py", "tests/tracing/test_tiles.py"],
    QK: ["tests/maps/test_sram.py", "tests/tracing/test_probe.py", "tests/tracing/test_life.py"],
    TILES: ["tests/tracing/test_tiles.py"],
    INTERCEPT: ["tests/tracing/test_patch.py", "tests/tracing/test_life.py", "tests/tracing/test_compatibility.py"],
    TRACER: ["tests/tracing/test_patch.py", "tests/tracing/test_life.py", "tests/tracing/test_context.py"],
    ACCUMULATOR: ["tests/tracing/test_accumulator.py"],
}
MUTANTS = [
    Mutant(CLOCK, "group = min(step * time_groups // steps, time_groups - 1)", "group = 0", "all steps in one group"),
    Mutant(CLOCK, "self._count // 4 if self._count", "self._count // 2 if self._count", "PNDM's warm-up has four"),
    Mutant(CLOCK, "done = max(self._count - max(extra, 0), 0) // order", "done = self._count // order", "PNDM's extra"),
    Mutant(CLOCK, "nearest.sort(key=lambda i: i % order != 0)", "nearest.sort()", "Heun's second evaluation"),
    Mutant(CLOCK, "return [i - self._count for i in nearest]", "return nearest", "steps taken before count twice"),
    Mutant(
        CLOCK, "if now is not self.scheduler:", "if self.scheduler is None:", "a replaced scheduler is not followed"
    ),
    Mutant(CLOCK, "max(time_groups - 1 - int(timestep", "max(int(timestep", "noisiest last"),
    Mutant(CLOCK, "if timestep in self._seen[:-1]:", "if timestep in self._seen:", "a repeat is a new run"),
    Mutant(
        WATCH, "if any(type(s) is kind for s, _ in _watched.values()):", "if False:", "another tracer's is unwatched"
    ),
    Mutant(GUIDANCE, "return Verdict(_part(batch, 2, 1), 2, how", "return Verdict(_part(batch, 2, 0), 2, how"),
    Mutant(GUIDANCE, "        if info.first:\n            self.restart()", "        pass", "the last run's layout"),
    Mutant(GUIDANCE, "if len(full) == 1:", "if False:", "the part with embeddings is not the conditional one"),
    Mutant(GUIDANCE, "if wanted is not None and self.call != wanted:", "if wanted is not None and self.call < wanted:"),
    Mutant(GUIDANCE, "if told.parts > 1 and not _repeats(latents, told.parts):", "if False:", "never checked"),
    Mutant(GUIDANCE, "least = max(2, self._index + 1)", "least = 2", "part 2 of a batch of three"),
    Mutant(GUIDANCE, "a.data_ptr() == b.data_ptr() and a.stride() == b.stride()", "a.data_ptr() == b.data_ptr()"),
    Mutant(OBSERVE, "k = k.repeat_interleave(repeats, dim=1)", "k = k.repeat(1, repeats, 1, 1)", "heads tiled"),
    Mutant(OBSERVE, "or call.dropout_p != 0 or", "or", "no dropout while traced"),
    Mutant(OBSERVE, "    padding = mask <= PADDING\n", "    padding = mask < PADDING\n", "-10000 is no padding"),
    Mutant(OBSERVE, "~padding.all(-1, keepdim=True)", "~padding.any(-1, keepdim=True)", "no padding is masked"),
    Mutant(
        OBSERVE, "call.on(after).run() if after.start < after.stop", "call.on(before).run() if after.start < after.stop"
    ),
    Mutant(OBSERVE, "roll[samples] for roll in", "roll for roll in", "the whole batch's rollout"),
    Mutant(OBSERVE, "track.count(group)", "track.count(0)", "every call in the first group"),
    Mutant(OBSERVE, "layer.awaits = None  # what the call itself calls is not asked", "pass"),
    Mutant(OBSERVE, "row_lse = None if known is None else known[context.conditional]", "row_lse = known"),
    Mutant(OBSERVE, "one.r2g * weight.to(one.r2g)[:, None]", "one.r2g", "weighted=True does nothing"),
    Mutant(SUMS, "if seen != now:", "if seen[1:] != now[1:]:", "8×4 is added to 4×8"),
    Mutant(SUMS, "mass=zeros(queries) if share else None", "mass=zeros(queries)", "mass where it is 1"),
    Mutant(REGIONS, "if grid not in self._on_grid:", "if not self._on_grid:", "all layers have the first one's grid"),
    Mutant(REGIONS, "self._on_grid: dict[Grid, Tensor] = {}", "self._on_grid = getattr(self, '_on_grid', {})", "stale"),
    Mutant(QK, "call = (layer, q.data_ptr(), q.shape)", "call = (layer, q.shape)", "the last call's queries"),
    Mutant(QK, 'if n == "k" else None) for n, x', ") for n, x", "statistics in half precision"),
    Mutant(QK, "entries, size = self._pending, self._pending_bytes()", "entries, size = self._pending, 0", "no limit"),
    Mutant(QK, "mask[..., keys] if mask.shape[3] > 1 else mask", "mask", "the mask of all keys"),
    Mutant(TILES, "cover[group] += count * placed", "cover[group] += placed", "tiles that ran more often count more"),
    Mutant(TILES, "total / cover.clamp_min(torch.finfo(cover.dtype).tiny)", "total", "overlaps are added"),
    Mutant(TILES, "Tile(top / cell[0], left / cell[1], tokens)", "Tile(top / cell[1], left / cell[0], tokens)"),
    Mutant(TILES, 'g2r = spread("g2r") if same_place else added("g2r")', 'g2r = added("g2r")'),
    Mutant(TILES, "p < 0 or p + s > c for", "p < 0 or p > c for", "a tile over the edge"),
    Mutant(WHO, "if caller is self._pipe:", "if type(caller) is type(self._pipe):", "a sibling's calls count"),
    Mutant(INTERCEPT, "mask.ndim == 4 and mask.shape[0] > 1", "mask.shape[0] > 1", "rows taken for samples"),
    Mutant(INTERCEPT, "if names[name] in _own:", "if True:", "puts back over a later patch"),
    Mutant(INTERCEPT, "del context.stack[at:]", "del context.stack[at : at + 1]", "inner contexts stay open"),
    Mutant(INTERCEPT, "attn_mask=self.attn_mask,\n            dropout_p", "attn_mask=None,\n            dropout_p"),
    Mutant(
        TRACER,
        "        self._clock.restart()\n        self._forget()",
        "        self._forget()",
        "reset keeps the clock",
    ),
    Mutant(TRACER, "        self._regions.restart()\n", "", "reset keeps the canvas"),
    Mutant(TRACER, "self._guidance: dict[Place, Guidance] = {}", "self._guidance = getattr(self, '_guidance', {})"),
    Mutant(TRACER, "        if context.blind:\n            self._record.drop()", "        if False:\n            pass"),
    Mutant(ACCUMULATOR, "step * self._groups // self.steps", "step // self.steps", "all steps in the first group"),
    Mutant(ACCUMULATOR, "if self._images is not None and count != self._images:", "if False:"),
]
