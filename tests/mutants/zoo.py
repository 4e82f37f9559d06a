"""Bugs in the zoo: the truth of its tasks, its pipelines, its training and files."""

from tests.mutants import Mutant

TESTS = ["tests/zoo/test_zoo.py"]
PLACE = "i2am/zoo/"
DATA, ENCODER, FLOW, PIPELINES, TRAIN, STORAGE = (
    f"{PLACE}{name}.py" for name in ("data", "encoder", "flow", "pipelines", "train", "storage")
)
MUTANTS = [
    Mutant(
        DATA, "source = size / 2 * (1 + FILL * points)", "source = size / 2 * (1 + points)", "objects fill references"
    ),
    Mutant(DATA, "grid = (positions / size * 2 - 1).flip(-1)", "grid = positions / size * 2 - 1", "rows for columns"),
    Mutant(DATA, "align_corners=False)\n\n\n# ---", "align_corners=True)\n\n\n# ---", "half a pixel off"),
    Mutant(
        DATA, 'source=source.masked_fill(mask[0, ..., None] == 0, float("nan"))', "source=source", "known everywhere"
    ),
    Mutant(DATA, "F.max_pool2d(mask, 2 * margin + 1, 1, margin)", "mask", "the mask shows the outline"),
    Mutant(DATA, "self._cut(size, self._name(other_than=first))", "self._cut(size, first)", "one photograph for both"),
    Mutant(
        DATA,
        "centres((size, size), 1 / FACTOR)",
        "centres((size, size), 1.0) / FACTOR + 0.5",
        "off by a part of a pixel",
    ),
    Mutant(DATA, "return self.picture * (1 - self.mask)", "return self.picture", "the scene shows the answer"),
    Mutant(DATA, '"held-out": ("chelsea.png",', '"held-out": ("camera.png", "chelsea.png",', "trained and held out"),
    Mutant(
        DATA, "np.random.default_rng(seed), recolour)", "np.random.default_rng(), recolour)", "never the same twice"
    ),
    Mutant(DATA, 'recolour = split == "train" if recolour', 'recolour = split != "train" if recolour'),
    Mutant(ENCODER, "(torch.arange(n) + 0.5) * pixels", "torch.arange(n) * pixels", "corners for centres"),
    Mutant(ENCODER, 'indexing="ij"', 'indexing="xy"', "columns first"),
    Mutant(
        ENCODER,
        "pixels = self.config.patch_size * self.config.stride\n            positions",
        "pixels = self.config.patch_size\n            positions",
        "places of the small picture",
    ),
    Mutant(ENCODER, "if height % patch or width % patch:", "if height % patch:", "widths are not checked"),
    Mutant(
        ENCODER,
        "torch.cat([self.nothing.expand(len(tokens), 1, -1).to(tokens.dtype), tokens], dim=1)",
        "torch.cat([tokens, self.nothing.expand(len(tokens), 1, -1).to(tokens.dtype)], dim=1)",
        "nothing comes last",
    ),
    Mutant(FLOW, "places = (total / share.clamp_min(1e-6))", "places = (total / cell**2)", "places pulled to 0"),
    Mutant(FLOW, "(share.flatten(1) > INSIDE)", "(share.flatten(1) > 0)", "cells that the object only touches"),
    Mutant(FLOW, "(-distance / (2 * (BELL * patch) ** 2)).softmax(-1)", "(-distance / (2 * BELL**2)).softmax(-1)"),
    Mutant(PIPELINES, "torch.where(mask > 0, pictures, scene)", "pictures", "the scene is painted over"),
    Mutant(
        PIPELINES,
        "F.pixel_unshuffle(scene * (1 - mask), FOLD)",
        "F.pixel_unshuffle(scene, FOLD)",
        "the mask hides nothing",
    ),
    Mutant(PIPELINES, "places = places.permute(0, 3, 1, 2) * inside", "places = places.permute(0, 3, 1, 2)"),
    Mutant(
        PIPELINES,
        "extent = torch.stack([ys.max(), xs.max()]) + 1 - low",
        "extent = torch.stack([ys.max(), xs.max()]) - low",
    ),
    Mutant(PIPELINES, "(pixels - low) / extent * size", "(pixels - low) / extent.flip(0) * size", "height for width"),
    Mutant(PIPELINES, '.get("latents", latents)', '.get("latents")', "callbacks that return nothing"),
    Mutant(
        PIPELINES,
        "+ diffused / self.config.detail, reference)",
        "+ diffused, reference)",
        "details 1/gain times as strong",
    ),
    Mutant(PIPELINES, "pictures + bicubic(reference - F.adaptive", "pictures - bicubic(reference - F.adaptive"),
    Mutant(PIPELINES, "if (mask.flatten(1).sum(1) == 0).any():", "if not mask.any():", "one empty mask in a batch"),
    Mutant(PIPELINES, "(x * 255).round()", "(x * 255)", "pictures half a level darker"),
    Mutant(PIPELINES, "pose = pose + origin[:, None, None]", "pass", "a part has places of its own"),
    Mutant(
        PIPELINES,
        "fourier(origin + centres((height // FOLD, width // FOLD), FOLD), FAR_WAVELENGTHS)",
        "fourier(centres((height // FOLD, width // FOLD), FOLD), FAR_WAVELENGTHS)",
    ),
    Mutant(STORAGE, 'if metadata.get("format") != FORMAT:', "if False:", "any file's weights"),
    Mutant(STORAGE, 'mixing=facts["mixing"], detail=facts.get("detail")', 'mixing=facts["mixing"], detail=None'),
    Mutant(TRAIN, "        self._load(trained)\n", "", "training goes on from the average"),
    Mutant(TRAIN, 'self.noise.set_state(state["noise"])', "pass", "resumed with other noise"),
    Mutant(
        TRAIN,
        "return save(name or self.name, self.average, file, facts)",
        "return save(name or self.name, {n: p for n, p in self.model.named_parameters()}, file, facts)",
        "the last weights",
    ),
    Mutant(TRAIN, "timestep = (level * steps).long().clamp_max(steps - 1)", "timestep = (level * steps / 2).long()"),
    Mutant(TRAIN, "task = self.tasks[len(self.losses) % len(self.tasks)]", "task = self.tasks[0]"),
    Mutant(
        TRAIN, "squares / (3 * task.object.sum((1, 2, 3)))", "squares / squares[0].numel()", "a mean over the picture"
    ),
]
