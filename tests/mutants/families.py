"""Bugs in what is known of model families: which layers, which keys, which grids, which samples."""

from tests.mutants import Mutant

PLACE = "i2am/families/"
JOINT, FLUX, FRAMES, UNET = (f"{PLACE}{name}.py" for name in ("joint", "flux", "frames", "unet"))
ADAPTER, RESAMPLER, TOKENS, KEYSETS = (f"{PLACE}{name}.py" for name in ("ip_adapter", "resampler", "tokens", "keysets"))
SEQUENCES, MODULES, VIDEO, ARGUMENTS = (f"{PLACE}{name}.py" for name in ("sequences", "modules", "video", "arguments"))
TESTS = ["tests/families/test_unet.py", "tests/tracing/test_patch.py"]
IN_CONTEXT = ["tests/families/test_joint.py", "tests/families/test_flux.py"]
VIDEOS = ["tests/families/test_timed_frames.py", "tests/families/test_wan.py"]
TESTS_OF = {
    JOINT: IN_CONTEXT,
    FLUX: ["tests/families/test_flux.py"],
    FRAMES: VIDEOS,
    VIDEO: ["tests/families/test_video.py"],
    ADAPTER: ["tests/families/test_ip_adapter.py"],
    RESAMPLER: ["tests/families/test_resampler.py"],
    TOKENS: ["tests/families/test_unet.py", "tests/families/test_ip_adapter.py", "tests/families/test_flux.py"],
    KEYSETS: ["tests/tracing/test_words.py"],
    SEQUENCES: ["tests/families/test_sequences.py"],
    MODULES: ["tests/families/test_modules.py"],
}
MUTANTS = [
    Mutant(JOINT, "self._last[0] is not ids:", "self._last[0].shape != ids.shape:", "8×4 is read as 4×8"),
    Mutant(JOINT, "first = offset + self.start", "first = self.start", "the text's tokens are not counted"),
    Mutant(JOINT, "[first + i for i in self.order]", "list(range(first, offset + self.stop))", "rows not put in order"),
    Mutant(JOINT, "order = place.argsort().tolist()", "order = place.tolist()", "an order undone the wrong way"),
    Mutant(JOINT, "rows, columns = rows - rows.min(), columns - columns.min()", "pass", "ids that do not start at 0"),
    Mutant(
        JOINT,
        "axis.long() for axis in ids[start : start + count, 1:3].double().T",
        "axis.long() for axis in ids[start : start + count, [2, 1]].double().T",
    ),
    Mutant(JOINT, "key=lambda i: pictures[i][0])", "key=lambda i: -pictures[i][0])", "the last picture is generated"),
    Mutant(JOINT, 'given["timestep"] * self.timestep_scale', 'given["timestep"]', "timesteps of 0 to 1"),
    Mutant(JOINT, "batched_guidance: ClassVar[bool] = False", "batched_guidance: ClassVar[bool] = True"),
    Mutant(FRAMES, "sum(part.tokens for part in parts[:i])", "sum(part.tokens for part in parts[: i + 1])"),
    Mutant(
        FRAMES, "return self.frames * self.grid[0], self.grid[1]", "return self.grid[0], self.frames * self.grid[1]"
    ),
    Mutant(FRAMES, "given = [bool(t < now) for t in rows[0]]", "given = [bool(t == 0) for t in rows[0]]"),
    Mutant(FRAMES, "again = now > self._last or len(given)", "again = len(given)", "another run keeps the roles"),
    Mutant(FRAMES, "return timestep.max() if", "return timestep.min() if", "the given frames' timestep"),
    Mutant(FRAMES, "if found and found[-1].given == one:", "if found:", "given and generated frames together"),
    Mutant(ADAPTER, "tokens=slice(start, start + T)", "tokens=slice(0, T)", "every image's keys are the first one's"),
    Mutant(
        ADAPTER, "layer.state.images[adapter] = image + 1", "layer.state.images[adapter] = image", "one masked image"
    ),
    Mutant(ADAPTER, "if self._scale(layer, adapter, image) == 0:", "if False:", "an image of scale 0 counts"),
    Mutant(ADAPTER, "scales[adapter][image if len(scales[adapter]) > 1 else 0]", "scales[adapter][0]"),
    Mutant(ADAPTER, "mask = masks[adapter][:, image]", "mask = masks[adapter][:, 0]", "the first image's mask"),
    Mutant(ADAPTER, "self.images = [e.shape[1] for e in embeds]", "pass", "one image an adapter"),
    Mutant(ADAPTER, "if e.shape[0] != forward.latents.shape[0]:", "if False:", "another sample's image"),
    Mutant(RESAMPLER, "(A[..., :X] + A[..., X:] @ R + R) / 2", "(A[..., :X] + A[..., X:] @ R) / 2", "no residual"),
    Mutant(RESAMPLER, "key = key[..., : q.shape[-1]]", "key = key[..., -q.shape[-1] :]", "values for keys"),
    Mutant(RESAMPLER, "self.matrix / self.matrix.sum(-1, keepdim=True)", "self.matrix", "rows that do not sum to 1"),
    Mutant(
        RESAMPLER,
        "    def _begin(self, *_: Any) -> None:\n        self.matrix = None",
        "    def _begin(self, *_: Any) -> None:\n        pass",
    ),
    Mutant(UNET, "sample[:, :channels]", "sample", "masks beside the latents are latents"),
    Mutant(UNET, 'part in ("mid_block", "middle_block")', "False", "the mid block is in the mean"),
    Mutant(UNET, "context.grid = tuple(hidden_states.shape[-2:])", "context.grid = tuple(hidden_states.shape[:-3:-1])"),
    Mutant(UNET, "elif keys != length:", "elif keys < length:", "a call of other keys"),
    Mutant(UNET, 'and not name.startswith("encoder_hid_proj")', "", "the resampler's layers are the UNet's"),
    Mutant(
        TOKENS,
        "    if patches > 0 and side * side == patches:\n        return Reference(grid=(side, side), skip=1)",
        "    if patches > 0 and side * side == patches:\n        return Reference(grid=(side, side), skip=0)",
    ),
    Mutant(TOKENS, "index % length + part.start", "index + part.start", "negative tokens of a part"),
    Mutant(TOKENS, "range(part.start, part.stop)[tokens]", "range(part.stop)[tokens]", "tokens of the whole"),
    Mutant(KEYSETS, "i + len(text) if i < 0 else i", "i", "words counted from the end"),
    Mutant(
        KEYSETS,
        "tokens=[text[i] for i in tokens], name=word",
        "tokens=tokens, name=word",
        "of the attention, not the text",
    ),
    Mutant(SEQUENCES, "if len(layer.seen) != numbers.pop():", "if False:", "the first call that comes"),
    Mutant(SEQUENCES, "if len(generated) != height * width:", "if False:"),
    Mutant(VIDEO, "sample[:, :, : attribute", "sample[:, : attribute", "frames cut instead of channels"),
    Mutant(VIDEO, "frames=sample.shape[1],", "frames=1,", "a video is one picture"),
]
