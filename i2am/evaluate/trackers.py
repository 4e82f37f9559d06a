"""Scores and pictures of an evaluation, shown live: TensorBoard and Weights & Biases. Both are optional packages.

A point's step is the sample's place in the manifest, so that runs of several processes, and runs that went on later,
lie on one axis. What is shown here is a copy: tables are made of the folder's own records.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from i2am.evaluate.scores import MEANING
from i2am.evaluate.store import Store
from i2am.evaluate.summary import format_table

SHOWN = (*MEANING, "seconds")


class Target(NamedTuple):
    """Place to show results at: ``--log tensorboard[:DIR]`` or ``--log wandb[:PROJECT]``."""

    kind: str
    where: str = ""  # a folder, or a project; "" is the kind's own default


class Tracker(Protocol):
    """One place where results are shown."""

    def sample(self, place: int, name: str, values: Mapping[str, float], picture: Image.Image | None) -> None:
        """Show a sample: its scores, and its strip of overlays where there is one."""

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Show the summary, where this process made it, and have everything written."""


def read_target(text: str) -> Target:
    """Read ``"tensorboard"``, ``"tensorboard:DIR"``, ``"wandb"`` or ``"wandb:PROJECT"``.

    Raises:
        ValueError: it is none of these, or the package is not installed.
    """
    kind, _, where = text.partition(":")
    if kind not in TRACKERS:
        raise ValueError(f"{text!r} is neither tensorboard[:DIR] nor wandb[:PROJECT]")
    spec = importlib.util.find_spec(kind)
    if spec is None or spec.origin is None:  # a mere folder of that name: wandb makes one where it runs
        raise ValueError(f'{kind} is not installed: pip install "i2am[{kind}]"')
    return Target(kind, where)


def open_tracker(target: Target, store: Store, alone: bool, settings: Mapping[str, Any]) -> Tracker:
    """Start to show the results of a folder.

    Args:
        target: where.
        store: the folder, open.
        alone: whether this is the folder's only process; each of several has a run of its own.
        settings: JSON values that the run is filed under.
    """
    return TRACKERS[target.kind](target.where, store, alone, settings)


class TensorBoard:
    """Event files in ``DIR/NAME-IDENTITY``: other settings are another run. Without DIR, in the folder of results."""

    def __init__(self, where: str, store: Store, alone: bool, settings: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        place = Path(where) if where else store.out / "tensorboard"
        place /= run_name(store)
        self._writer = SummaryWriter(str(place if alone else place / store.process))
        self._writer.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items() if k != "weights"))

    def sample(self, place: int, name: str, values: Mapping[str, float], picture: Image.Image | None) -> None:
        """Show a sample."""
        for title, value in values.items():
            self._writer.add_scalar(title, value, place)
        if picture is not None:
            self._writer.add_image("overlays", np.asarray(picture.convert("RGB")), place, dataformats="HWC")
            self._writer.add_text("overlays/id", name, place)

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Write the summary and close the file."""
        if summary is not None:
            lines = format_table(dict(summary)).splitlines()
            self._writer.add_text("summary", "\n".join(f"    {line}" for line in lines))
        self._writer.close()


class WeightsAndBiases:
    """A run of a project; the processes and later goes of one evaluation are a group of runs."""

    def __init__(self, where: str, store: Store, alone: bool, settings: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=where or "i2am",
            group=run_name(store),
            name=run_name(store) if alone else f"{run_name(store)}/{store.process}",
            job_type="evaluate",
            dir=str(store.out),
            config={k: v for k, v in settings.items() if k != "weights"},
        )
        self._run.define_metric("*", step_metric="sample")

    def sample(self, place: int, name: str, values: Mapping[str, float], picture: Image.Image | None) -> None:
        """Show a sample."""
        shown = {} if picture is None else {"overlays": self._wandb.Image(picture, caption=name)}
        self._run.log({"sample": place, **values, **shown})

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Keep the means as the run's summary and finish the run."""
        if summary is not None:
            counts = {name: summary[name] for name in ("samples", "ok", "failed", "missing")}
            means = {f"mean_{name}": s["mean"] for name, s in summary["scores"].items()}
            self._run.summary.update(counts | means)
        self._run.finish()


TRACKERS: dict[str, Callable[[str, Store, bool, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def run_name(store: Store) -> str:
    """Return the name of a folder's runs: the folder's own, and which settings its results are of."""
    place = hashlib.sha256(str(store.out.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:4]
    return f"{store.out.resolve().name or 'results'}-{store.identity[:8]}{place}"


class Trackers:
    """Several places at once. One that fails is given up with one sentence: an evaluation does not end for it.

    Args:
        targets: where.
        store: the folder of results, open.
        places: sample → its place in the manifest.
        settings: JSON values of the evaluation.
        tell: takes the sentence.

    Raises:
        ValueError: one cannot be started, nothing having been done; says why.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        store: Store,
        places: Mapping[str, int],
        settings: Mapping[str, Any],
        tell: Callable[[str], Any] = print,
    ):
        self._store, self._places, self._tell = store, places, tell
        self._open: dict[Target, Tracker] = {}
        alone = not store.others()
        for target in targets:
            self._start(target, alone, settings)

    def sample(self, record: Mapping[str, Any]) -> None:
        """Show a sample's record, and its preview."""
        if not self._open:
            return
        values = {name: float(record[name]) for name in SHOWN if name in record}
        values["failed"] = float(record["status"] != "ok")
        preview = self._store.path("previews", record["id"], ".jpg")
        picture = Image.open(preview) if record["status"] == "ok" else None
        place, name = self._places[record["id"]], record["id"]
        for target, tracker in list(self._open.items()):
            self._trying(target, partial(tracker.sample, place, name, values, picture))

    def end(self, summary: Mapping[str, Any] | None = None) -> None:
        """Finish everywhere; once."""
        for target, tracker in list(self._open.items()):
            self._trying(target, partial(tracker.end, summary))
        self._open = {}

    def _start(self, target: Target, alone: bool, settings: Mapping[str, Any]) -> None:
        try:
            self._open[target] = open_tracker(target, self._store, alone, settings)
        except Exception as error:
            self.end()
            raise ValueError(f"{target.kind} cannot be started: {type(error).__name__}: {error}") from error

    def _trying(self, target: Target, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:
            self._open.pop(target, None)
            self._tell(f"--log {target.kind} has stopped, results are kept as ever: {type(error).__name__}: {error}")
