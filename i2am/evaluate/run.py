"""Evaluating what is left of a dataset, sample by sample, beside any number of other processes."""

from __future__ import annotations

import errno
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from i2am._images import save_film
from i2am.evaluate.identity import pictures_identity
from i2am.evaluate.manifest import Sample
from i2am.evaluate.scores import score
from i2am.evaluate.store import Store, StoreError
from i2am.evaluate.thumbnails import keep_levels
from i2am.maps import AttributionMaps

LONGEST = 20_000  # characters of an error that a record keeps
LOOK_AGAIN = 1.0  # seconds until a process that waits looks what the others have finished


class DiskFull(OSError):
    """There is no room for the next result; all finished ones are kept."""


@dataclass
class Traced:
    """Result of one sample's run: maps of one image, and what they lie on (forms of :func:`i2am.plot.overlay`).

    Of a video: its maps, and a sequence of its frames; the frame in the middle of the latents' is scored and shown.

    Masks are ``[H, W]`` in 0…1, on the generated image and on the reference.
    """

    maps: AttributionMaps
    generated: Any
    reference: Any
    mask: np.ndarray | Tensor | None = None
    reference_mask: np.ndarray | Tensor | None = None


def evaluate(
    samples: Sequence[Sample],
    run: Callable[[Sample], Traced],
    store: Store,
    *,
    save: Sequence[str] = (),
    log: Callable[[dict[str, Any]], Any] = lambda record: None,
    done: Callable[[], Any] = lambda: None,
    wait: bool = False,
) -> None:
    """Run, score and keep samples one after another; those that another process has or does are left to it.

    One that raises is recorded and does not stop the others.

    Args:
        samples: those to do.
        run: traces one.
        store: where results go; open.
        save: "images" and "maps" keep more than scores, previews and small maps.
        log: called with every sample's record, once it is written.
        done: called after every sample.
        wait: go on until every sample is done, by whomever, and take over those of processes that die.

    Raises:
        DiskFull: a result could not be written for lack of room.
        StoreError: a result could not be written for another reason.
    """
    for sample in _claimed(samples, store, wait):
        record = _attempt(sample, run, store, save)
        try:
            store.finish(record)
        except OSError as error:
            stop_if_full(error, store)
            raise
        log(record)
        done()


def _claimed(samples: Sequence[Sample], store: Store, wait: bool) -> Iterator[Sample]:
    """Yield each sample that this process gets hold of, held until the next one is asked for."""
    store.start()
    left, rounds = samples, 0
    while left and (wait or rounds < 2):  # the second time: samples that others have given back unfinished
        missed = []
        for sample in left:
            if store.claim(sample):
                try:
                    yield sample
                finally:
                    store.release(sample)
            elif not store.attempted(sample):
                missed.append(sample)
        left, rounds = missed, rounds + 1
        if left and wait:
            time.sleep(LOOK_AGAIN)


def _attempt(sample: Sample, run: Callable[[Sample], Traced], store: Store, save: Sequence[str]) -> dict[str, Any]:
    """Run one sample and return its record: its scores, or what went wrong."""
    start = time.perf_counter()
    try:
        pictures = pictures_identity(sample)
        with torch.no_grad():
            record = {"pictures": pictures, **_scored(sample, run(sample), store, save)}
    except (Exception, SystemExit) as error:
        stop_if_full(error, store)
        if isinstance(error, StoreError):
            raise
        record = {"status": "failed", "error": _text(error), "traceback": traceback.format_exc()[-LONGEST:]}
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
    seconds = round(time.perf_counter() - start, 3)
    return record | {"id": sample.id, "seed": sample.seed, "digest": sample.digest, "seconds": seconds}


def _text(error: BaseException) -> str:
    """Return an error's kind and message; its kind alone where the message cannot be made."""
    try:
        return f"{type(error).__name__}: {error}"[:LONGEST]
    except Exception:
        return type(error).__name__


def _scored(sample: Sample, traced: Traced, store: Store, save: Sequence[str]) -> dict[str, Any]:
    """Score one sample: all but the record written."""
    from i2am.evaluate.sheet import as_image, preview  # matplotlib with it: 30 MB that a finished folder needs not

    film = list(traced.generated) if traced.maps.of_video else None
    middle = traced.maps.frames // 2  # of a video its frame in the middle is scored and shown
    maps = traced.maps.frame(middle)
    generated = traced.generated if film is None else traced.maps.pictures(film)[middle]
    r2g, g2r = maps.ulam("r2g")[0], ulam_or_none(maps, "g2r")
    scores = score(r2g, g2r, traced.mask, traced.reference_mask, sample.box)
    store.write(store.path("levels", sample.id, ".safetensors"), lambda path: keep_levels(maps, path))
    picture = preview(generated, r2g, traced.reference, g2r, traced.mask)
    store.write(store.path("previews", sample.id, ".jpg"), lambda path: picture.save(path, "jpeg", quality=90))
    if "images" in save:
        if film is None:
            store.write(store.path("images", sample.id, ".png"), lambda path: as_image(generated).save(path, "png"))
        else:
            store.write(store.path("images", sample.id, ".webp"), lambda path: save_film(map(as_image, film), path))
    if "maps" in save:
        store.path("maps", sample.id, "").parent.mkdir(exist_ok=True)
        traced.maps.save(store.path("maps", sample.id, ".safetensors"), record=False)
    return {"status": "ok", **scores}


def ulam_or_none(maps: AttributionMaps, direction: str) -> Tensor | None:
    """Return ULAM ``[h, w]`` of the first image, or None where there is no such map."""
    try:
        return maps.ulam(direction)[0]
    except ValueError:
        return None


def stop_if_full(error: BaseException | None, store: Store) -> None:
    """Raise DiskFull where an error, or what caused it, is a full disk (or quota)."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "os error 28" in _text(error):  # safetensors' own error carries the code in its text only
            raise DiskFull(errno.ENOSPC, f"no room left for results in {store.out}") from error
        error = error.__cause__ or error.__context__
