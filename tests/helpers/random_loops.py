"""Loops drawn at random, and what their maps are by definition: materialised in float64 from the loop's own calls.

A loop knows of each of its calls whether it is the conditional one, its time group and its place on the picture; a
recorder of this file keeps the queries and keys of each attention call with that label. Nothing is shared with the
package.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from dataclasses import dataclass, field, replace

import diffusers
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from tests.helpers.tiny_models import dit
from tests.helpers.tiny_models import unet as pipelines

ORDER_2 = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler")
SCHEDULERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "PNDMScheduler",
    *ORDER_2,
)
FOREIGN = ("other latents", "other timestep", "same latents", "other thread", "nested", "copy")
BESIDE = (
    "sibling",
    "sibling with the same scheduler",
    "itself in another thread",
    "the bare model",
)  # a pipeline's run
EARLIER = ("none", "none", "left open", "ran")  # tracers before the one that is looked at
REFERENCE = slice(3, 19)  # among the keys of the UNet, of which 3 are text
CONTEXT = 8


class Stop(Exception):
    """An interruption in the middle of a forward."""


@dataclass(frozen=True)
class Loop:
    """A drawn loop, and the options that it is traced with."""

    model: str = "unet"
    clock: str = "scheduler"  # or num_steps, timesteps
    scheduler: str = "DDIMScheduler"
    steps: int = 3
    start: int = 0  # image to image: begins inside the schedule
    time_groups: int = 2
    guide: str = "none"  # batch, calls
    parts: int = 2  # of guidance
    conditional: int = 1
    zeros: bool = False  # the other parts' embeddings are zeros
    option: object = "auto"  # guidance=
    images: int = 1
    one_seed: bool = False  # all images begin with the same latents
    tiles: tuple[tuple[int, int], ...] = ()
    placed: bool = True
    foreign: tuple[tuple[int, str], ...] = ()  # (before which evaluation, what)
    interrupt: tuple[int, int, bool] | None = None  # (which forward, which module's hook, of tracing's time)
    then: str = "restart"  # after an interruption: restart, reset, stop
    runs: int = 1
    output: str = "i2am"
    region: bool = False  # sram=
    record: bool = False
    entry: str = "patch"  # or modules
    earlier: str = "none"  # a tracer of the same model that nobody ended


def loops(model: str = "unet") -> st.SearchStrategy[Loop]:
    """Draw loops; most are ordinary in most ways, or nearly all would be refused."""

    @st.composite
    def draw(d):
        rarely = st.sampled_from([False] * 4 + [True])
        if model == "pipeline":
            return draw_pipeline(d, rarely)
        steps = d(st.integers(1, 4))
        guide = d(st.sampled_from(["none", "batch", "batch", "calls"]))
        parts = d(st.sampled_from([2, 2, 3, 4])) if guide != "none" else 1
        conditional = d(st.integers(0, parts - 1))
        index = st.sampled_from([conditional, (conditional, parts), (conditional + 1) % parts, "none"])
        option = "auto" if guide == "none" and d(st.booleans()) else d(st.one_of(st.just("auto"), index))
        if guide == "none":
            option = d(st.sampled_from(["auto", "auto", "none"]))
        tiles = ((), ((0, 0), (0, 4)), ((0, 4), (0, 0)), ((0, 0), (0, 8), (0, 4)), ((4, 0), (0, 0), (4, 8), (0, 8)))
        interrupt = None
        if d(rarely):
            interrupt = (d(st.integers(0, 3 * steps)), d(st.integers(0, 400)), d(st.booleans()))
        foreign = ()
        if d(rarely):
            foreign = ((d(st.integers(0, 2 * steps)), d(st.sampled_from(FOREIGN))),)
        return Loop(
            model=model,
            clock=d(st.sampled_from(["scheduler", "scheduler", "num_steps", "timesteps"])),
            scheduler="FlowMatchEulerDiscreteScheduler" if model == "joint" else d(st.sampled_from(SCHEDULERS)),
            steps=steps,
            start=d(st.integers(0, steps - 1)) if d(rarely) else 0,
            time_groups=d(st.integers(1, 3)),
            guide=guide,
            parts=parts,
            conditional=conditional,
            zeros=d(st.booleans()),
            option=option,
            images=d(st.sampled_from([1, 1, 2, 3])),
            one_seed=d(rarely),
            tiles=d(st.sampled_from(tiles)) if model == "unet" and d(rarely) else (),
            placed=not d(rarely),
            foreign=foreign,
            interrupt=interrupt,
            then=d(st.sampled_from(["restart", "reset", "stop"])),
            runs=d(st.sampled_from([1, 1, 2])),
            output=d(st.sampled_from(["i2am", "model"])),
            region=d(rarely),
            record=d(rarely),
            entry="modules" if model == "unet" and d(rarely) else "patch",
            earlier=d(st.sampled_from(EARLIER)) if d(rarely) else "none",
        )

    return draw()


def draw_pipeline(d, rarely) -> Loop:
    """Draw runs of a pipeline, and who else uses its model meanwhile."""
    steps, guided = d(st.integers(1, 3)), d(st.booleans())
    return Loop(
        model="pipeline",
        steps=steps,
        time_groups=d(st.integers(1, 2)),
        guide="batch" if guided else "none",
        parts=2 if guided else 1,
        images=d(st.sampled_from([1, 1, 2])),
        foreign=((d(st.integers(0, steps - 1)), d(st.sampled_from(BESIDE))),) if d(st.booleans()) else (),
        interrupt=(d(st.integers(0, steps)), d(st.integers(0, 400)), True) if d(rarely) else None,
        then=d(st.sampled_from(["restart", "reset", "stop"])),
        runs=d(st.sampled_from([1, 1, 2])),
        output=d(st.sampled_from(["i2am", "model"])),
        region=d(rarely),
        record=d(rarely),
        earlier=d(st.sampled_from(EARLIER)) if d(rarely) else "none",
    )


# ------------------------------------------------------------------------------------------------------- the models


def unet():
    """Two levels with cross-attention on the upper and in the mid block; 16 of 19 keys are the reference's."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=CONTEXT,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def joint():
    """A Kontext-like transformer of one double and one single block."""
    return dit.flux_transformer(num_layers=1, num_single_layers=1, guidance_embeds=False)


def ids(rows: int, columns: int, first: int) -> torch.Tensor:
    """Position ids ``[rows · columns, 3]`` of a picture."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.full_like(y, first), y, x], -1).reshape(-1, 3).float()


# ---------------------------------------------------------------------------------------------------- the recorder


@dataclass
class Label:
    """A call that counts: of which samples, when, where."""

    group: int
    samples: slice = field(default_factory=lambda: slice(None))
    place: tuple[int, int] = (0, 0)
    whole: bool = True  # False: the forward was interrupted


@dataclass
class Seen:
    label: Label
    layer: str
    r2g: torch.Tensor  # [B, H, h, w]
    g2r: torch.Tensor  # [B, H, K]
    rows: torch.Tensor  # [B, H, h, w, K]


class Recorder:
    """Keeps the maps of each labelled attention call of the running thread."""

    def __init__(self, model, loop):
        self.model, self.loop, self.seen, self.local = model, loop, [], threading.local()
        self.model_thread = threading.get_ident()

    def attend(self, q, k):
        label, layer = getattr(self.local, "label", None), getattr(self.local, "layer", None)
        if label is None or layer is None:
            return
        if self.loop.model == "pipeline" and k.shape[2] != 17:
            return  # the text's call: an adapter's image is a class token and 4×4 patches
        q, k = q[label.samples].double(), k[label.samples].double()
        if self.loop.model == "joint":  # [text 5 ‖ generated 16 ‖ reference 4]
            q, keys, grid = q[:, :, 5:21], slice(21, 25), (4, 4)
        else:
            side = int(q.shape[2] ** 0.5)
            keys, grid = slice(None) if self.loop.model == "pipeline" else REFERENCE, (side, side)
        logits = q @ k.mT * q.shape[-1] ** -0.5
        rows, columns = logits.softmax(-1)[..., keys], logits[..., keys].softmax(-2)
        self.seen.append(
            Seen(label, layer, columns.mean(-1).unflatten(-1, grid), rows.mean(-2), rows.unflatten(-2, grid))
        )

    @contextlib.contextmanager
    def recording(self):
        own, handles = F.scaled_dot_product_attention, []

        def sdpa(query, key, value, *args, **kwargs):
            self.attend(query, key)
            return own(query, key, value, *args, **kwargs)

        def enter(module, args, name):
            self.local.layer = name

        def leave(*_):
            self.local.layer = None

        for name, module in self.model.named_modules():
            if name.endswith("attn2") or type(module).__name__ == "FluxAttention":
                handles.append(module.register_forward_pre_hook(lambda m, a, name=name: enter(m, a, name)))
                handles.append(module.register_forward_hook(leave, always_call=True))
        F.scaled_dot_product_attention = sdpa
        try:
            yield self
        finally:
            F.scaled_dot_product_attention = own
            for handle in handles:
                handle.remove()


# -------------------------------------------------------------------------------------------------------- the loop


class Player:
    """Plays a loop on a model, traced or not, always in the same way."""

    def __init__(self, loop: Loop, model, recorder: Recorder, tracer=None, scheduler=None):
        self.loop, self.model, self.recorder, self.tracer = loop, model, recorder, tracer
        self.scheduler = scheduler or make_scheduler(loop)
        self.forwards = 0
        self.foreign = dict(loop.foreign)
        self.nested = None

    def seeded(self, seed, *shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def play(self):
        """Play every run of the loop; an interruption ends one, and what the loop says comes next."""
        try:
            for run in range(self.loop.runs):
                if not self.ends(run) and self.loop.then == "stop":
                    return
        finally:
            if self.nested is not None:  # the forward that it waited for never came
                self.nested.remove()

    def ends(self, run):
        """Play one run; return whether nothing interrupted it."""
        try:
            self.run(run)
        except Stop:
            if self.loop.then == "stop":
                return False
            if self.loop.then == "reset":
                self.recorder.seen.clear()
                if self.tracer is not None:
                    self.tracer.reset()
            self.run(run)
            return False
        return True

    def run(self, run):
        loop = self.loop
        self.scheduler.set_timesteps(loop.steps)
        order = 2 if loop.scheduler in ORDER_2 else 1
        timesteps = self.scheduler.timesteps[loop.start * order :]
        self.timesteps = [float(t) for t in timesteps]
        n = 1 if loop.one_seed else loop.images
        size = (16, 4) if loop.model == "joint" else (4, *canvas(loop))
        x = self.seeded(10 + run, n, *((16, 16) if loop.model == "joint" else size))
        x = x.expand(loop.images, *x.shape[1:]).clone()
        for i, t in enumerate(timesteps):
            self.foreign_call(i, x, t)
            noise = self.evaluate(x, t, self.group(i, float(t)))
            x = self.scheduler.step(noise, t, x).prev_sample

    def group(self, i: int, t: float) -> int:
        """Return the time group of an evaluation, by the user's steps (a bare model without steps: by timestep)."""
        loop = self.loop
        if loop.clock == "timesteps":
            return max(loop.time_groups - 1 - int(t * loop.time_groups / 1000), 0)
        steps = loop.steps - loop.start
        if loop.clock == "num_steps":  # counted by their timesteps, however often a solver evaluates one
            step = len(dict.fromkeys(self.timesteps[: i + 1])) - 1
        elif loop.scheduler in ORDER_2:
            step = i // 2
        elif loop.scheduler == "PNDMScheduler":
            step = max(i - 1, 0)
        else:
            step = i
        return min(step, steps - 1) * loop.time_groups // steps

    def evaluate(self, x, t, group):
        if not self.loop.tiles:
            return self.guided(x, t, group, (0, 0), contextlib.nullcontext)
        out, cover = torch.zeros_like(x), torch.zeros_like(x)
        for top, left in self.loop.tiles:
            window = (..., slice(top, top + 8), slice(left, left + 8))
            placed = self.tracer is not None and self.loop.placed
            place = (lambda at=(top, left): self.tracer.tile(*at)) if placed else contextlib.nullcontext
            out[window] += self.guided(x[window], t, group, (top, left), place)
            cover[window] += 1
        return out / cover.clamp_min(1)

    def guided(self, x, t, group, at, place):
        """Return the guided prediction of one place: the first image of each part differs by its context."""
        loop, n = self.loop, x.shape[0]
        which = loop.conditional if loop.option == "auto" else loop.option
        if loop.option == "auto" and loop.guide == "batch" and loop.parts == 2 and not loop.zeros:
            which = 1  # the convention that is documented: [unconditional, conditional]
        which = which[0] if isinstance(which, tuple) else which
        everything = Label(group, slice(None), at)
        if loop.guide == "none":
            return self.call(x, t, self.context(0, n), everything, place)
        contexts = [self.context(i, n) for i in range(loop.parts)]
        if loop.guide == "batch":
            counted = everything if which == "none" else Label(group, slice(which * n, (which + 1) * n), at)
            out = self.call(torch.cat([x] * loop.parts), t, torch.cat(contexts), counted, place).chunk(loop.parts)
        else:
            out = [
                self.call(x, t, c, everything if which in ("none", i) else None, place) for i, c in enumerate(contexts)
            ]
        others = [o for i, o in enumerate(out) if i != loop.conditional]
        return 2 * out[loop.conditional] - sum(others) / len(others)

    def context(self, part, n):
        loop = self.loop
        if loop.zeros and part != loop.conditional and loop.guide != "none":
            return torch.zeros(n, 19, CONTEXT)
        return self.seeded(50 + part, n, 19, CONTEXT)

    def call(self, x, t, context, label, place=contextlib.nullcontext):
        """Call the model once, as the loop labels it, with the interruption where one was drawn."""
        self.forwards += 1
        label = None if label is None else replace(label)  # a call of its own may fail half-way
        local, before = self.recorder.local, getattr(self.recorder.local, "label", None)
        local.label, handle = label, None
        if self.loop.interrupt is not None and self.forwards - 1 == self.loop.interrupt[0]:
            handle = self.interrupting(self.loop.interrupt[1])
        try:
            with place(), torch.no_grad():
                return self.forward(self.model, x, t, context)
        except Stop:
            if label is not None:
                label.whole = False
            raise
        finally:
            local.label, local.layer = before, None
            if handle is not None:
                handle.remove()

    def forward(self, model, x, t, context):
        if self.loop.model == "unet":
            return model(x, t, encoder_hidden_states=context).sample
        reference = self.seeded(99, 1, 4, 16).expand(x.shape[0], -1, -1)
        return model(
            torch.cat([x, reference], 1),
            timestep=t.expand(x.shape[0]) / 1000,
            encoder_hidden_states=dit.text_tokens(5, batch=x.shape[0]) * context[:, :5, :1],
            pooled_projections=context[:, 0, :8],
            img_ids=torch.cat([ids(4, 4, 0), ids(2, 2, 1)]),
            txt_ids=torch.zeros(5, 3),
        ).sample[:, :16]

    def interrupting(self, where):
        """Raise in one hook of a module, before or after its forward."""

        def stop(*_):
            raise Stop

        modules = list(self.model.modules())
        module = modules[where // 2 % len(modules)]
        return module.register_forward_hook(stop) if where % 2 else module.register_forward_pre_hook(stop)

    def foreign_call(self, i, x, t):
        """Make the call that is not part of the loop, if one comes before this evaluation."""
        kind, loop = self.foreign.pop(i, None), self.loop
        if kind is None:
            return
        n = min(x.shape[0], 1)
        small = x[:n] if loop.model == "joint" else x[:n, :, :8, :8]
        context = self.seeded(70, n, 19, CONTEXT)
        every = loop.option == "none" or loop.clock == "timesteps"
        if kind in ("other latents", "other timestep"):
            other = t if kind == "other latents" else t * 0 + 333
            label = Label(self.group(i, float(other))) if every else None
            self.call(small + 1, other, context, label)
        elif kind == "same latents":
            self.call(small, t, context, Label(self.group(i, float(t))) if every else None)
        elif kind == "other thread":
            thread = threading.Thread(target=lambda: self.forward_quietly(self.model, small, t, context))
            thread.start()
            thread.join()
        elif kind == "copy":
            self.forward_quietly(copy.deepcopy(self.model), small, t, context)
        else:
            self.nest(small, t, context)

    def forward_quietly(self, model, *given):
        with torch.no_grad():
            self.forward(model, *given)

    def nest(self, x, t, context):
        """Make the model call itself inside its next forward."""
        part = self.model.mid_block if self.loop.model == "unet" else self.model.single_transformer_blocks[0]

        def again(*_):
            handle.remove()
            local = self.recorder.local
            label, layer, local.label = local.label, getattr(local, "layer", None), None
            self.forward_quietly(self.model, x, t, context)
            local.label, local.layer = label, layer

        handle = self.nested = part.register_forward_hook(again)


class PipelinePlayer(Player):
    """Runs a pipeline; between its steps others use its model."""

    def __init__(self, loop, pipe, recorder, tracer=None):
        super().__init__(loop, pipe.unet, recorder, tracer, pipe.scheduler)
        self.pipe, self.away = pipe, False

    def run(self, run):
        loop, handles, self.evaluation = self.loop, [], 0
        handles.append(self.model.register_forward_pre_hook(self.enter))
        handles.append(self.model.register_forward_hook(self.leave, always_call=True))
        try:
            self.pipe(
                callback_on_step_end=self.between, generator=generator(run), **self.given(loop.steps, loop.images)
            )
        finally:
            self.leave()
            for handle in handles:
                handle.remove()

    def given(self, steps, images=1):
        guidance = 3.0 if self.loop.guide == "batch" else 1.0
        return dict(
            prompt="a b",
            ip_adapter_image=pipelines.image((24, 24)),
            num_images_per_prompt=images,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
            width=16,
            height=16,
        )

    def enter(self, module, args):
        if type(args[0]).__name__ == "FakeTensor":  # a run on shapes alone
            return
        if self.away or threading.get_ident() != self.recorder.model_thread:
            return
        loop, n = self.loop, self.loop.images
        group = self.evaluation * loop.time_groups // loop.steps
        self.recorder.local.label = Label(group, slice(n, 2 * n) if loop.guide == "batch" else slice(None))
        if loop.interrupt is not None and self.forwards == loop.interrupt[0]:
            self.interrupting_hook = self.interrupting(loop.interrupt[1])
        self.evaluation, self.forwards = self.evaluation + 1, self.forwards + 1

    interrupting_hook = None

    def leave(self, module=None, args=(), out=None):
        if args and type(args[0]).__name__ == "FakeTensor":
            return
        label = getattr(self.recorder.local, "label", None)
        if module is not None and out is None and label is not None:
            label.whole = False
        self.recorder.local.label = self.recorder.local.layer = None
        if self.interrupting_hook is not None:
            self.interrupting_hook.remove()
            self.interrupting_hook = None

    def between(self, pipe, i, t, given):
        """Let somebody else use the model, once."""
        kind = self.foreign.pop(i, None)
        if kind is None:
            return {}
        self.away = True
        try:
            if kind == "the bare model":
                self.forward_quietly(self.model, self.seeded(72, 1, 4, 8, 8), t)
            elif kind == "itself in another thread":
                other = threading.Thread(target=lambda: pipe(generator=generator(9), **self.given(1)))
                other.start()
                other.join()
            else:
                own = {} if "same scheduler" in kind else {"scheduler": pipelines.ddim()}
                sibling = pipelines.quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, **own))
                more = {k: v for k, v in self.given(2).items() if k not in ("width", "height")}
                sibling(image=pipelines.image((16, 16)), strength=1.0, generator=generator(9), **more)
        finally:
            self.away = False
        return {}

    def forward(self, model, x, t):
        image = self.seeded(70, 1, 1, 17, pipelines.VISION)
        context = self.seeded(71, 1, 5, pipelines.CONTEXT)
        return model(x, t, context, added_cond_kwargs={"image_embeds": [image]}).sample


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pipeline():
    """Text to image with an IP-Adapter of 17 tokens."""
    return pipelines.sd("full")


def canvas(loop: Loop) -> tuple[int, int]:
    """Return the size of the latents: of all tiles together."""
    tops, lefts = zip(*(loop.tiles or ((0, 0),)), strict=True)
    return max(tops) + 8, max(lefts) + 8


def make_scheduler(loop: Loop):
    options = {"skip_prk_steps": True} if loop.scheduler == "PNDMScheduler" else {}
    return getattr(diffusers, loop.scheduler)(**options)


# -------------------------------------------------------------------------------------------------------- the truth


def truth(loop: Loop, seen: list[Seen], layer: str) -> dict[str, list[torch.Tensor | None]]:
    """Return what a layer's maps are, a time group each: ``r2g [B, h, w]``, ``g2r [B, K]``, ``part [B, K]``."""
    out: dict[str, list[torch.Tensor | None]] = {"r2g": [], "g2r": [], "part": []}
    if not loop.placed and len({s.label.place for s in seen}) == 1:  # one call and no more: nobody said it was a tile
        loop = replace(loop, tiles=())

    def place(s: Seen) -> tuple[int, int]:
        return s.label.place if loop.tiles else (0, 0)

    for group in range(loop.time_groups):
        mine = [s for s in seen if s.layer == layer and s.label.group == group]
        if not mine:
            for values in out.values():
                values.append(None)
            continue
        out["g2r"].append(torch.stack([s.g2r.mean(1) for s in mine]).mean(0))
        whole = canvas(loop) if loop.tiles else mine[0].r2g.shape[-2:]
        cell = 8 // mine[0].r2g.shape[-1] if loop.tiles else 1
        r2g, cover = mean_on_picture([(s.r2g.mean(1), place(s)) for s in mine], whole, cell)
        out["r2g"].append(r2g)
        rows, _ = mean_on_picture([(s.rows.mean(1), place(s)) for s in mine], whole, cell)
        quarter = (slice(None), slice(0, cover.shape[0] // 2), slice(0, cover.shape[1] // 2))
        out["part"].append(rows[quarter].sum((1, 2)) / (cover[quarter[1:]] > 0).sum())
    return out


def mean_on_picture(parts, whole, cell):
    """Return the mean ``[B, h, w, …]`` of parts over those that cover each cell, and how many do."""
    size = [n // cell for n in whole]
    total = torch.zeros(parts[0][0].shape[0], *size, *parts[0][0].shape[3:], dtype=torch.float64)
    cover = torch.zeros(*size, dtype=torch.float64)
    for values, place in parts:
        top, left = (n // cell for n in place)
        h, w = values.shape[1:3]
        total[:, top : top + h, left : left + w] += values
        cover[top : top + h, left : left + w] += 1
    return total / cover.clamp_min(1).reshape(*size, *[1] * (total.ndim - 3)), cover


def plain(loop: Loop) -> Loop:
    """Return the loop without what only the tracer sees."""
    return replace(loop, output="i2am", record=False)
