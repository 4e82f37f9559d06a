"""Evaluating what is left of a dataset, sample by sample."""

from __future__ import annotations

import errno
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from i2am.evaluate.levels import keep_levels
from i2am.evaluate.manifest import Sample
from i2am.evaluate.scores import score
from i2am.evaluate.sheet import as_image, preview
from i2am.evaluate.store import Store
from i2am.maps import AttributionMaps


class DiskFull(OSError):
    """There is no room for the next result; all finished ones are kept."""


@dataclass
class Traced:
    """What running one sample gave: maps of one image, and what they lie on (forms of :func:`i2am.plot.overlay`).

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
    done: Callable[[], Any] = lambda: None,
) -> None:
    """Runs, scores and keeps samples one after another. One that raises is recorded and does not stop the others.

    Args:
        samples: those to do.
        run: traces one.
        store: where results go.
        save: "images" and "maps" keep more than scores, previews and small maps.
        done: called after every sample.

    Raises:
        DiskFull: a result could not be written for lack of room.
    """
    for sample in samples:
        start = time.perf_counter()
        try:
            with torch.no_grad():
                record = _record(sample, run(sample), store, save)
        except Exception as error:
            stop_if_full(error, store)
            record = {
                "status": "failed",
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            }
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
        record |= {"id": sample.id, "seed": sample.seed, "digest": sample.digest}
        try:
            store.finish(record | {"seconds": round(time.perf_counter() - start, 3)})
        except OSError as error:
            stop_if_full(error, store)
            raise
        done()


def _record(sample: Sample, traced: Traced, store: Store, save: Sequence[str]) -> dict[str, Any]:
    """Scores of one sample, all but the record written."""
    maps = traced.maps
    r2g, g2r = maps.ulam("r2g")[0], ulam_or_none(maps, "g2r")
    scores = score(r2g, g2r, traced.mask, traced.reference_mask, sample.box)
    store.write(store.path("levels", sample.id, ".safetensors"), lambda path: keep_levels(maps, path))
    picture = preview(traced.generated, r2g, traced.reference, g2r, traced.mask)
    store.write(store.path("previews", sample.id, ".jpg"), lambda path: picture.save(path, "jpeg", quality=90))
    if "images" in save:
        image = as_image(traced.generated)
        store.write(store.path("images", sample.id, ".png"), lambda path: image.save(path, "png"))
    if "maps" in save:
        store.path("maps", sample.id, "").parent.mkdir(exist_ok=True)
        maps.save(store.path("maps", sample.id, ".safetensors"), record=False)
    return {"status": "ok", **scores}


def ulam_or_none(maps: AttributionMaps, direction: str) -> Tensor | None:
    """``[h, w]`` of the first image, or None where there is no such map."""
    try:
        return maps.ulam(direction)[0]
    except ValueError:
        return None


def stop_if_full(error: BaseException | None, store: Store) -> None:
    """Raises DiskFull where an error, or what caused it, is a full disk (or quota)."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "os error 28" in str(error):  # safetensors' own error carries the code in its text only
            raise DiskFull(errno.ENOSPC, f"no room left for results in {store.out}") from error
        error = error.__cause__ or error.__context__
