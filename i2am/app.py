"""A page for those who want one: give a reference, run a pipeline, click patches (Gradio; ``i2am app``).

What is shown is the report of :meth:`AttributionMaps.report`, so the page, a report on disk and a notebook agree.
"""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from i2am.maps.provenance import summary_lines

if TYPE_CHECKING:
    import gradio
    from PIL.Image import Image

    from i2am.maps import AttributionMaps

__all__ = ["LABELS", "Answer", "Made", "MissingGradio", "Session", "answer", "build", "serve"]

LABELS = {
    "reference": "Reference",
    "image": "Image to paint in, or to start from",
    "mask": "Mask: white where to paint",
    "control_image": "ControlNet's input",
    "prompt": "Prompt",
    "negative_prompt": "Negative prompt",
    "steps": "Denoising steps",
    "guidance_scale": "Guidance scale",
}
STEPS = 100  # the slider's end
FRAME = '<iframe title="report" style="width:100%;height:85vh;border:0" srcdoc="{}"></iframe>'
EMPTY = "<p>The report appears here: point at the picture, and see where that patch came from.</p>"


class MissingGradio(ImportError):
    """Gradio is not installed."""


class Made(NamedTuple):
    """Results of a traced run, as the page takes them."""

    maps: AttributionMaps  # with recorded queries and keys, so that patches can be asked
    generated: Image
    seen: Image  # the part of the reference that its encoder saw


@dataclass(frozen=True)
class Session:
    """A pipeline behind the page.

    Attributes:
        title: what runs.
        images: which pictures it takes, by option, and whether it can do without.
        values: further options, with their defaults; None: the pipeline's own.
        run: takes pictures by option, a seed and values, and returns what was :class:`Made`.
        examples: rows of pictures, in the order of ``images``.
    """

    title: str
    images: dict[str, bool]
    values: dict[str, Any]
    run: Callable[[dict[str, Image | None], int, dict[str, Any]], Made]
    examples: Sequence[Sequence[Image | None]] = field(default_factory=tuple)


class Answer(NamedTuple):
    """Outputs of the page for a run."""

    generated: Image
    said: str  # Markdown: scores, and what the maps are a mean of
    report: str  # HTML
    files: list[str]  # to take away: maps and report


def answer(
    session: Session, images: dict[str, Image | None], seed: int, values: dict[str, Any], folder: Path
) -> Answer:
    """Run a session once and make its report.

    Args:
        images: by option; None where none was given.
        seed: of the initial noise.
        values: by option; None or "" leaves the pipeline's own.
        folder: where maps and report are written.

    Raises:
        ValueError: a picture is missing; the run was refused.
    """
    missing = [LABELS[option] for option, needed in session.images.items() if needed and images.get(option) is None]
    if missing:
        raise ValueError(f"give a picture for: {', '.join(missing)}")
    maps, generated, seen = session.run(images, seed, {k: v for k, v in values.items() if v not in (None, "")})
    mask = images.get("mask")
    report = maps.report(
        folder / "report.html", generated, seen, mask=mask, title=session.title, settings={"seed": seed, **values}
    )
    saved = maps.save(folder / "maps.safetensors")
    lines = [_score(maps, mask), *summary_lines(maps.provenance)]
    frame = FRAME.format(html.escape(report.read_text(encoding="utf-8"), quote=True))
    return Answer(generated, "\n\n".join(line for line in lines if line), frame, [str(report), str(saved)])


def _score(maps: AttributionMaps, mask: Image | None) -> str:
    if mask is None:
        return ""
    from i2am import imacs

    return (
        f"**IMACS {imacs(maps.ulam('r2g'), mask).mean().item():+.2f}** of R2G in the mask: above 0, strong values lie "
        "inside more than outside; 0 does not care, 1 is the most."
    )


def build(session: Session) -> gradio.Blocks:
    """Build the page.

    Raises:
        MissingGradio: Gradio is not installed.
    """
    from i2am import BlindLayerError

    gr = import_gradio()
    with gr.Blocks(title=f"i2am: {session.title}") as page:
        gr.Markdown(f"# What did it take from its reference?\n{session.title}")
        with gr.Row():
            with gr.Column(scale=1):
                pictures = [gr.Image(label=LABELS[o], type="pil", height=220) for o in session.images]
                values = [_field(gr, option, default) for option, default in session.values.items()]
                seed = gr.Number(label="Seed", value=0, precision=0, minimum=0)
                start = gr.Button("Run", variant="primary")
                if session.examples:
                    gr.Examples([list(row) for row in session.examples], pictures, label="Held-out examples")
            with gr.Column(scale=3):
                with gr.Row():
                    generated = gr.Image(label="Generated", type="pil", height=260, interactive=False)
                    with gr.Column():
                        said = gr.Markdown()
                        files = gr.File(label="Maps and report", file_count="multiple")
                report = gr.HTML(EMPTY)

        def run(*given: Any) -> Answer:
            images = dict(zip(session.images, given, strict=False))
            rest = given[len(session.images) :]
            texts = dict(zip(session.values, rest, strict=False))
            try:
                return answer(session, images, int(rest[-1] or 0), texts, Path(tempfile.mkdtemp(prefix="i2am-app-")))
            except (ValueError, BlindLayerError) as error:  # refusals: shown as they are
                raise gr.Error(str(error), duration=None) from error

        # One run at a time: a pipeline is traced by one.
        start.click(run, [*pictures, *values, seed], [generated, said, report, files], concurrency_limit=1)
    return page


def _field(gr: Any, option: str, default: Any) -> Any:
    label = LABELS[option]
    if option == "steps":
        return gr.Slider(1, STEPS, value=default or 10, step=1, label=label)
    if isinstance(default, (int, float)):
        return gr.Number(value=default, label=label)
    return gr.Textbox(value=default, label=label)


def serve(session: Session, host: str = "127.0.0.1", port: int | None = None, browser: bool = True) -> None:
    """Serve the page until interrupted.

    Args:
        host: address to listen on; "0.0.0.0" lets other machines in.
        port: None: the first free one from 7860.
        browser: whether to open one.

    Raises:
        MissingGradio: Gradio is not installed.
        OSError: the port is taken.
    """
    page = build(session)
    page.queue().launch(server_name=host, server_port=port, inbrowser=browser, share=False, quiet=False)


def import_gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise MissingGradio('the page needs Gradio: pip install "i2am[app]"') from error
    return gradio
