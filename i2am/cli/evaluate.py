"""``i2am evaluate``: alone, beside others in one folder, or under ``accelerate launch … -m i2am evaluate …``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2am.cli.arguments import EXIT_CODES, OPTIONS, SOME_FAILED, StoppedEarly, UserError, add_options
from i2am.cli.images import IMAGE_OPTIONS, open_image
from i2am.cli.processes import Process
from i2am.cli.results import quiet_libraries
from i2am.cli.streams import complain, say
from i2am.versions import versions

if TYPE_CHECKING:
    from i2am.cli.job import Job
    from i2am.evaluate import Manifest, Sample, Store, Traced
    from i2am.evaluate.trackers import Target, Trackers

RESTART = "do anew what was done with other settings, weights or pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Traces and scores every sample of a manifest with the columns reference, image, mask, control_image,\n"
        "prompt, negative_prompt (as the pipeline needs them), reference_mask, box, seed, id.\n"
        "Run it again to go on where it stopped; samples that failed are tried again. Several processes may share\n"
        "DIR: start the command several times, as a SLURM array, or with\n"
        "accelerate launch --multi_gpu --num_processes N -m i2am evaluate ..."
    )
    parser.epilog = EXIT_CODES
    parser.add_argument(
        "manifest",
        type=Path,
        metavar="MANIFEST",
        help=".csv, .jsonl or .parquet (paths relative to its folder), WebDataset shards, or a folder of `datasets`",
    )
    parser.add_argument("--pipeline", required=True, metavar="PIPELINE", help="folder of a pipeline, or its hub name")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write, or to go on")
    parser.add_argument("--restart", action="store_true", help=RESTART)
    parser.add_argument("--save-images", action="store_true", help="keep every generated image")
    parser.add_argument("--save-maps", action="store_true", help="keep every sample's maps, at full resolution")
    parser.add_argument(
        "--log",
        type=_target,
        action="append",
        default=[],
        metavar="WHERE",
        help="also show scores and overlays live: tensorboard[:DIR] (default: DIR/tensorboard of --out) or "
        "wandb[:PROJECT] (default: i2am); may be repeated",
    )
    add_options(parser)


def _target(text: str) -> Target:
    """Read where to log."""
    from i2am.evaluate.trackers import read_target

    try:
        return read_target(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from i2am.evaluate import DiskFull, Store, StoreError, read_manifest
    from i2am.evaluate.run import stop_if_full

    process = Process.of_environment()
    try:
        samples = read_manifest(args.manifest, args.seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    args.device = process.own_device(args.device)
    store = Store(args.out, process.name)
    trackers, job = None, None
    try:
        settings = _settings_of_before(store, args)
        pending = None if settings is None else _open(store, samples, settings, args, process)
        if pending is None or pending:
            quiet_libraries()
            from i2am.cli.job import Job

            job = Job.of(_options(args, samples.columns), unneeded=("mask",))
        if pending is None:
            assert job is not None
            pending = _open(store, samples, _settings(args, job.name, job.args), args, process)
        trackers = _trackers(store, samples, args if pending else None)
        if job is not None and pending:
            job.load()
            job.pipe.set_progress_bar_config(disable=True)
        return _do(store, samples, pending, job, args, process, trackers)
    except OSError as error:
        try:
            stop_if_full(error, store)
        except DiskFull as full:
            raise _stopped(full, store, samples) from error
        if isinstance(error, StoreError):
            raise StoppedEarly(f"--out: cannot write to {error.filename}: {error.strerror}") from error
        raise
    finally:
        if trackers is not None:
            trackers.end()
        store.close()


def _trackers(store: Store, samples: Manifest, args: argparse.Namespace | None) -> Trackers:
    """Start to log where it was asked for; nowhere if there is nothing to do."""
    from i2am.evaluate.trackers import Trackers

    targets = [] if args is None else list(dict.fromkeys(args.log))
    places = {sample.id: place for place, sample in enumerate(samples)} if targets else {}
    try:
        return Trackers(targets, store, places, store.settings(), complain)
    except ValueError as error:
        raise UserError(f"--log: {error}") from error


def _settings_of_before(store: Store, args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the settings of a run in a folder that has results; None where the pipeline's class is to be asked first.

    Found without diffusers, which takes seconds and 300 MB: only for a sample that is left its classes are needed.
    """
    from i2am.cli.pipelines import check_adapter, class_name_in

    name = class_name_in(args.pipeline)
    if name is None or args.part is not None or args.pipeline_class is not None:
        return None
    if args.restart or args.revision is not None or args.offload is not None:
        return None  # what these can be refused for, the class tells
    try:
        store.settings()
    except ValueError:
        return None
    checked = argparse.Namespace(**vars(args))
    check_adapter(checked)
    return _settings(args, name, checked)


def _open(
    store: Store, samples: Manifest, settings: dict[str, Any], args: argparse.Namespace, process: Process
) -> list[int]:
    """Open the folder, and find the samples that are left, in this process's order."""
    from i2am.evaluate import Store

    try:
        if args.restart and not process.speaks:
            process.wait_for_first(store)
        elif args.restart:  # done and left before the others of a launch may come in
            first = Store(args.out)
            try:
                first.open(settings, restart=True)
                first.pending(samples, restart=True)
            finally:
                first.close()
        store.open(settings)
        return process.order(store.pending(samples))
    except (ValueError, TimeoutError) as error:
        raise UserError(f"--out: {error}") from error
    except OSError as error:
        raise UserError(f"--out: cannot write to {args.out}: {error.strerror or error}") from error


def _do(
    store: Store,
    samples: Manifest,
    pending: list[int],
    job: Job | None,
    args: argparse.Namespace,
    process: Process,
    trackers: Trackers,
) -> int:
    """Do what is left, and say how it went."""
    from i2am.evaluate import evaluate, summarise
    from i2am.evaluate.summary import format_table

    save = [name for name in ("images", "maps") if getattr(args, f"save_{name}")]
    with _bar(store, len(samples), len(pending), shown=process.speaks) as done:
        evaluate(
            samples.part(pending),
            lambda sample: _traced(job, sample),
            store,
            save=save,
            log=trackers.sample,
            done=done,
            wait=bool(process.launch) and process.speaks,
        )
    if not process.speaks:
        return 0  # a launcher would end the others if this one failed
    summary, seen = {}, -1
    while (now := store.refresh()) > seen:  # what others have finished meanwhile is in the last one's, too
        seen, summary = now, summarise(samples, store)
    trackers.end(summary)
    say(format_table(summary))
    say(f"wrote results.csv, summary.json and previews to {args.out}")
    if summary["missing"]:
        others = store.others()
        if not others:
            raise StoppedEarly(f"{summary['missing']} samples are not done: run this again to go on")
        say(f"{len(others)} more processes are at the other {summary['missing']}; the last one writes the whole table")
    return SOME_FAILED if summary["failed"] else 0


def _stopped(error: Exception, store: Store, samples: Manifest) -> StoppedEarly:
    finished = sum(r["status"] == "ok" for r in store.records(samples))
    return StoppedEarly(
        f"{error.args[-1]}; {finished} of {len(samples)} samples are finished: make room and run this again to go on"
    )


def _options(args: argparse.Namespace, columns: set[str]) -> argparse.Namespace:
    """Return the options of a single run: what a column gives counts as given."""
    given = {name: "" if name in columns else None for name in IMAGE_OPTIONS}
    texts = {name: "" for name in ("prompt", "negative_prompt") if name in columns and getattr(args, name) is None}
    return argparse.Namespace(**{**vars(args), **given, **texts})


def _settings(args: argparse.Namespace, class_name: str, checked: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that results depend on and, for people, where they came from.

    Args:
        args: as given.
        class_name: of the pipeline.
        checked: ``args`` with the adapter's weight file found.
    """
    from i2am.cli.job import placement
    from i2am.cli.weights import weights_of

    device, dtype = placement(args)
    given = {o.name: getattr(args, o.name) for o in OPTIONS if o.setting and getattr(args, o.name) is not None}
    paths = {name: getattr(args, name) for name in ("ip_adapter", "lora") if getattr(args, name) is not None}
    return {
        "command": "evaluate",
        "manifest": args.manifest.name,
        "pipeline": args.pipeline,
        "pipeline_class": class_name,
        **given,
        **paths,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": weights_of(checked),  # in which the adapter's weight file is named
        "versions": versions(),
    }


def _traced(job: Job | None, sample: Sample) -> Traced:
    """Run one sample."""
    import numpy as np

    from i2am.evaluate import Traced

    assert job is not None, "a sample is left, so the pipeline was looked at"
    needed = [option for option in job.routes.values() if option in IMAGE_OPTIONS]
    missing = [option for option in needed if option not in sample.files]
    if missing:
        raise UserError(f"no {missing[0]} is given")
    images = {o: open_image(o, sample.files.get(o), mode) for o, mode in IMAGE_OPTIONS.items() if o in needed}
    mask = open_image("mask", sample.files.get("mask"), "L")
    reference_mask = open_image("reference_mask", sample.files.get("reference_mask"), "L")
    if job.makes_videos and (mask is not None or sample.box is not None):
        raise UserError(f"a mask or box scores a picture, and {job.name} makes videos")
    maps, generated, seen = job.run(images, sample.seed, sample.texts)
    if mask is not None:
        mask = np.asarray(mask.resize(generated.size, 0), dtype=np.float32) / 255
    if reference_mask is not None:
        reference_mask = np.asarray(job.as_seen(reference_mask, images["reference"], generated), dtype=np.float32) / 255
    return Traced(maps, generated, seen, mask, reference_mask)  # of a video: scored and shown by its middle frame


@contextmanager
def _bar(store: Store, total: int, pending: int, shown: bool) -> Iterator[Callable[[], None]]:
    """Show a bar over all processes' samples; what it gives is to be called after each sample."""
    from tqdm import tqdm

    before = store.refresh()
    with tqdm(total=total, initial=total - pending, desc="evaluate", unit="sample", disable=not shown) as bar:

        def done() -> None:
            try:
                bar.update(total - pending + store.refresh() - before - bar.n)
            except OSError:  # nobody reads it any more
                bar.disable = True

        yield done
