"""Pipelines whose transformer runs over several processes, and what each of them traces.

``python -m tests.helpers.context_parallel RANK WORLD FOLDER CASE…``: joins the others through a file in FOLDER, runs
every case in turn, and saves its maps there.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import i2am
from tests.helpers.tiny_models import dit, prompts
from tests.helpers.tiny_models import unet as pipelines

SRAM = {"point": (5, 9), "area": torch.arange(48.0).reshape(4, 12)}
KONTEXT = dict(sram=SRAM, text=True, itself=True, record="qk", time_groups=2)
ADAPTERS = dict(sram=SRAM, record="qk", time_groups=2)
EVENLY, UNEVENLY = 8, 5  # text tokens, over two processes or four


def generator():
    return torch.Generator().manual_seed(7)


def kontext(text=EVENLY, **config):
    """Flux Kontext: 4×12 generated tokens, which no one process holds, 4×8 of the reference, behind ``text``."""
    pipe = dit.flux(**config)
    return pipe, lambda: pipe(
        image=pipelines.image((32, 16)),
        width=48,
        height=16,
        max_area=48 * 16,
        num_inference_steps=2,
        generator=generator(),
        output_type="np",
        _auto_resize=False,
        **dit.flux_prompt(text),
    )


def ip_adapters(text=EVENLY, **config):
    """Kontext's reference and two IP-Adapters, the second of two images, whose tokens every process has."""
    pipe, _ = kontext(**config)
    prompts.add_flux_ip_adapters(pipe.transformer, (4, 6))

    def embeds(count, seed):
        return torch.randn(1, count, 12, generator=torch.Generator().manual_seed(seed))

    return pipe, lambda: pipe(
        image=pipelines.image((32, 16)),
        width=48,
        height=16,
        max_area=48 * 16,
        num_inference_steps=2,
        generator=generator(),
        output_type="np",
        _auto_resize=False,
        ip_adapter_image_embeds=[embeds(1, 3), embeds(2, 4)],
        negative_ip_adapter_image_embeds=[embeds(1, 5), embeds(2, 6)],
        **dit.flux_prompt(text),
    )


def flux2():
    pipe = dit.flux2_klein()
    return pipe, lambda: pipe(
        image=pipelines.image((64, 64)),
        width=96,
        height=64,
        prompt_embeds=dit.text_tokens(EVENLY),
        guidance_scale=1.0,
        num_inference_steps=2,
        generator=generator(),
        output_type="np",
    )


def qwen():
    """With two tokens of padding, which a mask hides, and guidance as calls."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit

    edit.calculate_dimensions = lambda area, ratio: (32, 32, None)
    pipe = dit.qwen()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    return pipe, lambda: pipe(
        image=pipelines.image((40, 40)),
        width=24,
        height=16,
        prompt_embeds=dit.text_tokens(EVENLY),
        prompt_embeds_mask=mask,
        negative_prompt_embeds=dit.text_tokens(EVENLY, seed=3),
        negative_prompt_embeds_mask=mask,
        true_cfg_scale=3.0,
        num_inference_steps=2,
        generator=generator(),
        output_type="np",
    )


def wan():
    """Three latent frames of 2×4 tokens; CLIP's tokens of the first frame are every process's."""
    pipe = prompts.wan()
    return pipe, lambda: pipe(
        pipelines.image((64, 32)),
        prompt_embeds=dit.text_tokens(512),
        negative_prompt_embeds=dit.text_tokens(512, seed=3),
        width=64,
        height=32,
        num_frames=9,
        num_inference_steps=2,
        generator=generator(),
        output_type="np",
    )


# name → (pipeline and its run, options of ContextParallelConfig, options of trace, backend)
CASES = {
    "ulysses": (kontext, dict(ulysses_degree=2), KONTEXT, "native"),
    "ring": (kontext, dict(ring_degree=2), KONTEXT, "_native_flash"),
    "unified": (
        lambda: kontext(num_attention_heads=4, attention_head_dim=16),
        dict(ring_degree=2, ulysses_degree=2),
        KONTEXT,
        "_native_flash",
    ),
    "ulysses anything": (
        lambda: kontext(UNEVENLY, num_attention_heads=3, attention_head_dim=16),
        dict(ulysses_degree=2, ulysses_anything=True),
        KONTEXT,
        "native",
    ),
    "ring anything": (lambda: kontext(UNEVENLY), dict(ring_degree=2, ring_anything=True), KONTEXT, "_native_flash"),
    "ip-adapters": (ip_adapters, dict(ulysses_degree=2), ADAPTERS, "native"),
    "ip-adapters over a ring": (ip_adapters, dict(ring_degree=2), ADAPTERS, "_native_flash"),
    "ip-adapters, uneven": (
        lambda: ip_adapters(UNEVENLY, num_attention_heads=3, attention_head_dim=16),
        dict(ulysses_degree=2, ulysses_anything=True),
        ADAPTERS,
        "native",
    ),
    "ip-adapters both ways": (
        lambda: ip_adapters(num_attention_heads=4, attention_head_dim=16),
        dict(ring_degree=2, ulysses_degree=2),
        ADAPTERS,
        "_native_flash",
    ),
    "flux2": (flux2, dict(ulysses_degree=2), dict(time_groups=2), "native"),
    "qwen": (qwen, dict(ulysses_degree=2), dict(time_groups=2, record="qk"), "native"),
    "wan": (
        wan,
        dict(ulysses_degree=2),
        dict(time_groups=2, sram={"area": torch.arange(48.0).reshape(6, 8)}),
        "native",
    ),
    "wan over a ring": (wan, dict(ring_degree=2), dict(time_groups=2), "_native_flash"),
    "ring of the native backend": (kontext, dict(ring_degree=2), dict(time_groups=2), "native"),
    "plan of one's own": (kontext, dict(ulysses_degree=2), dict(time_groups=2), "native"),
    "probe": (kontext, dict(ulysses_degree=2), dict(), "native"),
}


def one_process(case: str):
    """Return the maps of a case without parallelism."""
    build, _, options, _ = CASES[case]
    pipe, go = build()
    with i2am.trace(pipe, **options) as tracer:
        pictures = go()
    return tracer.maps(), torch.as_tensor(pictures[0])


def processes(count: int, cases: list[str], folder: Path) -> list[str]:
    """Run cases in so many processes; return what each has printed."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.context_parallel"]
    ranks = [
        subprocess.Popen(
            [*command, str(r), str(count), str(folder), *cases],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(count)
    ]
    outputs = [p.communicate(timeout=400) for p in ranks]
    assert [p.returncode for p in ranks] == [0] * count, outputs
    return [out for out, _ in outputs]


def saved(folder: Path, case: str, rank: int) -> Path:
    return folder / f"{case}.{rank}.safetensors"


def _flash_on_cpu(library: torch.library.Library) -> None:
    """Give the CPU the kernel that diffusers' ring calls, whose own CPU kernel has another name."""

    def flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, scale=None):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout_p, is_causal, scale=scale
        )
        none = q.new_empty(0)
        return out, lse, none, none, q.shape[2], k.shape[2], none, none, none

    library.impl("_scaled_dot_product_flash_attention", flash, "CPU")


def _run(case: str, rank: int, folder: Path) -> None:
    from diffusers import ContextParallelConfig

    build, config, options, backend = CASES[case]
    pipe, go = build()
    model = pipe.transformer
    model.set_attention_backend(backend)
    plan = dict(list(model._cp_plan.items())) if case != "plan of one's own" else _other_plan(model)
    model.enable_parallelism(config=ContextParallelConfig(**config), cp_plan=plan)
    if case == "probe":
        with i2am.probe(pipe):
            go()
        return
    with i2am.trace(pipe, **options) as tracer:
        pictures = go()
    tracer.maps().save(saved(folder, case, rank))
    if rank == 0:
        torch.save(torch.as_tensor(pictures[0]), folder / f"{case}.picture")


def _other_plan(model) -> dict:
    """Leave the text whole: a split that is not the class's own."""
    plan = {name: dict(part) if isinstance(part, dict) else part for name, part in model._cp_plan.items()}
    del plan[""]["encoder_hidden_states"], plan[""]["txt_ids"]
    return plan


def main() -> None:
    rank, world, folder, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers takes the remainder by it
    library = torch.library.Library("aten", "IMPL")
    _flash_on_cpu(library)
    meet = f"file://{Path(folder) / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=int(rank), world_size=int(world))
    for case in cases:
        try:
            _run(case, int(rank), Path(folder))
            print("traced", case)
        except ValueError as error:
            print("refused", case, error)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
