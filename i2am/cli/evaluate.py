"""``i2am evaluate``: alone, or under ``accelerate launch --num_processes N -m i2am evaluate …``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2am.cli.arguments import UserError, add_adapter_options, add_map_options, add_run_options
from i2am.cli.images import IMAGE_OPTIONS, open_image
from i2am.cli.job import Job
from i2am.cli.results import hush
from i2am.versions import versions

if TYPE_CHECKING:
    from i2am.evaluate import Sample, Store, Traced

FAILED, DISK_FULL = 1, 3  # exit codes
NOT_SETTINGS = ("run", "out", "manifest", "device", "save_images", "save_maps")  # of the machine, or of what is kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Traces and scores every sample of a manifest: .csv or .jsonl with the columns reference, image, mask,\n"
        "control_image, prompt, negative_prompt (as the pipeline needs them), reference_mask, box, seed, id.\n"
        "Run it again to go on where it stopped; samples that failed are tried again.\n"
        "Over several devices: accelerate launch --num_processes N -m i2am evaluate ..."
    )
    parser.epilog = (
        "exit codes: 0 all samples done; 1 some failed (results.csv says why); 2 wrong input; 3 the disk is full "
        "(what is finished is kept); 130 interrupted"
    )
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help=".csv or .jsonl; paths relative to its folder")
    parser.add_argument("--pipeline", required=True, metavar="PIPELINE", help="folder of a pipeline, or its hub name")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write, or to go on")
    parser.add_argument("--save-images", action="store_true", help="keep every generated image")
    parser.add_argument("--save-maps", action="store_true", help="keep every sample's maps, at full resolution")
    add_adapter_options(parser)
    add_run_options(parser)
    add_map_options(parser)


def run(args: argparse.Namespace) -> int:
    from i2am.evaluate import DiskFull, Store, evaluate, read_manifest, summarise
    from i2am.evaluate.manifest import columns_of
    from i2am.evaluate.run import stop_if_full
    from i2am.evaluate.summary import said

    hush()
    try:
        samples = read_manifest(args.manifest, args.seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    processes, store = Processes(args), Store(args.out)
    job = Job.of(_options(args, columns_of(samples)), unneeded=("mask",))
    try:
        pending = processes.of_main(lambda: _pending(store, samples, _settings(args, job.name)))
        if pending:
            job.load()
            job.pipe.set_progress_bar_config(disable=True)
            with processes.bar(store, len(samples), len(pending)) as done:
                save = [name for name in ("images", "maps") if getattr(args, f"save_{name}")]
                share = pending[processes.index :: processes.count]
                evaluate(share, lambda sample: _traced(job, sample), store, save=save, done=done)
        processes.wait()
        if processes.index:
            return 0
        summary = summarise(samples, store)
    except DiskFull as error:
        return _stopped(error, store, samples)
    except OSError as error:
        try:
            stop_if_full(error, store)
        except DiskFull as full:
            return _stopped(full, store, samples)
        raise UserError(f"--out: cannot write to {args.out}: {error.strerror}") from error
    print(said(summary))
    print(f"wrote results.csv, summary.json and previews to {args.out}")
    return FAILED if summary["failed"] else 0


def _stopped(error: Exception, store: Store, samples: list[Sample]) -> int:
    finished = sum(r["status"] == "ok" for r in store.records(samples))
    text = f"{error.args[-1]}; {finished} of {len(samples)} samples are finished: make room and run this again to go on"
    print(f"i2am: error: {text}", file=sys.stderr)
    return DISK_FULL


def _pending(store: Store, samples: list[Sample], settings: dict[str, Any]) -> list[Sample]:
    """Samples without a good record."""
    try:
        store.open(settings)
    except ValueError as error:
        raise UserError(f"--out: {error}") from error
    records = {r["id"]: r for r in store.records(samples)}
    return [s for s in samples if records.get(s.id, {}).get("status") != "ok"]


def _options(args: argparse.Namespace, columns: set[str]) -> argparse.Namespace:
    """The options of a single run: what a column gives counts as given."""
    given = {name: "" if name in columns else None for name in IMAGE_OPTIONS}
    texts = {name: "" for name in ("prompt", "negative_prompt") if name in columns and getattr(args, name) is None}
    return argparse.Namespace(**{**vars(args), **given, **texts})


def _settings(args: argparse.Namespace, pipeline_class: str) -> dict[str, Any]:
    given = {k: v for k, v in vars(args).items() if v is not None and k not in NOT_SETTINGS}
    return {
        "command": "evaluate",
        "manifest": args.manifest.name,
        "pipeline_class": pipeline_class,
        **{k: v if isinstance(v, (int, float, str)) else str(v) for k, v in given.items()},
        "versions": versions(),
    }


def _traced(job: Job, sample: Sample) -> Traced:
    """Runs one sample."""
    import numpy as np

    from i2am.evaluate import Traced

    needed = [option for option in job.routes.values() if option in IMAGE_OPTIONS]
    missing = [option for option in needed if option not in sample.files]
    if missing:
        raise UserError(f"no {missing[0]} is given")
    images = {o: open_image(o, sample.files.get(o), mode) for o, mode in IMAGE_OPTIONS.items() if o in needed}
    mask = open_image("mask", sample.files.get("mask"), "L")
    reference_mask = open_image("reference_mask", sample.files.get("reference_mask"), "L")
    maps, generated, seen = job.run(images, sample.seed, sample.texts)
    if mask is not None:
        mask = np.asarray(mask.resize(generated.size, 0), dtype=np.float32) / 255
    if reference_mask is not None:
        reference_mask = np.asarray(job.as_seen(reference_mask, images["reference"]), dtype=np.float32) / 255
    return Traced(maps, generated, seen, mask, reference_mask)


class Processes:
    """This process and its fellows: one, or those that ``accelerate launch`` started."""

    def __init__(self, args: argparse.Namespace):
        self.state, self.index, self.count = None, 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return
        try:
            from accelerate import PartialState
        except ImportError:
            raise UserError('several processes need accelerate: pip install "i2am[evaluate]"') from None
        cpu = args.device is not None and args.device.type == "cpu"
        self.state = PartialState(cpu=cpu, timeout=timedelta(days=30))  # the slowest share may take long
        self.index, self.count = self.state.process_index, self.state.num_processes
        args.device = self.state.device

    def of_main(self, find: Any) -> Any:
        """What the main process finds, in every process; its UserError too."""
        if self.state is None:
            return find()
        from accelerate.utils import broadcast_object_list

        found = [None]
        if self.index == 0:
            try:
                found = [find()]
            except UserError as error:
                found = [error]
        (found,) = broadcast_object_list(found)
        if isinstance(found, UserError):
            raise found
        return found

    def wait(self) -> None:
        if self.state is not None:
            self.state.wait_for_everyone()

    @contextmanager
    def bar(self, store: Store, total: int, pending: int) -> Iterator[Callable[[], None]]:
        """A bar over all processes' samples, shown by the main one; what it gives is to be called after each sample."""
        from tqdm import tqdm

        start, before = time.time(), total - pending
        with tqdm(total=total, initial=before, desc="evaluate", unit="sample", disable=self.index > 0) as bar:

            def done() -> None:
                if not bar.disable:
                    bar.update(before + store.finished_since(start) - bar.n)

            yield done
