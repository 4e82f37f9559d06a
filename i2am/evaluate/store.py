"""A folder of results. A sample is finished when its record is there, whole; all its other files are written before.

::

    DIR/i2am.json                settings and versions
    DIR/samples/ID.json          a sample's record: scores, or what went wrong
    DIR/levels/ID.safetensors    its maps at every level, small: what `i2am compare` reads
    DIR/previews/ID.jpg          its images with their maps
    DIR/images, DIR/maps         on request: generated images, all sums
    DIR/results.csv, summary.json, contact.png        made from the above at the end
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from i2am._files import write_atomically
from i2am.evaluate.manifest import Sample

SETTINGS = "i2am.json"
FOLDERS = ("samples", "levels", "previews", "images", "maps")


class Store:
    """The results in one folder."""

    def __init__(self, out: str | os.PathLike):
        self.out = Path(out)

    def open(self, settings: dict[str, Any]) -> None:
        """Makes the folder, or goes on with one of the same settings; forgets half-written files.

        Raises:
            ValueError: it holds something else, or results of other settings; says which.
            OSError: it cannot be written.
        """
        path = self.out / SETTINGS
        if path.exists():
            self._check(settings)
            self._tidy()
            return
        if self.out.exists():
            (self.out / f"{SETTINGS}.part").unlink(missing_ok=True)  # of a run that was killed at its very start
        if self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty and has no {SETTINGS} of an evaluation: name a new folder")
        self.out.mkdir(parents=True, exist_ok=True)
        self.write(path, lambda p: p.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8"))

    def _tidy(self) -> None:
        """Forgets what a killed run left half-written."""
        for pattern in ("*.part", "*/*.part"):
            for unfinished in self.out.glob(pattern):
                unfinished.unlink(missing_ok=True)

    def _check(self, settings: dict[str, Any]) -> None:
        before = self.settings()
        now = json.loads(json.dumps(settings))
        differing = sorted(k for k in {*before, *now} - {"versions"} if before.get(k) != now.get(k))
        if differing:
            name = differing[0]
            raise ValueError(
                f"{self.out} has results of other settings ({name}: {before.get(name)!r}, now {now.get(name)!r}): "
                "name a new folder"
            )

    def settings(self) -> dict[str, Any]:
        """Settings and versions.

        Raises:
            ValueError: this is not a folder of results.
        """
        try:
            settings = json.loads((self.out / SETTINGS).read_text(encoding="utf-8"))
            if settings["command"] != "evaluate":
                raise ValueError(f"written by i2am {settings['command']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.out} is not a folder of `i2am evaluate`: {error}") from error
        return settings

    def path(self, folder: str, sample_id: str, suffix: str) -> Path:
        return self.out / folder / (sample_id + suffix)

    def write(self, path: Path, write: Callable[[Path], Any]) -> None:
        """Writes a file at once or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write)

    def finish(self, record: dict[str, Any]) -> None:
        """Keeps a sample's record: from now on it is finished."""
        text = json.dumps(record, ensure_ascii=False)
        self.write(self.path("samples", record["id"], ".json"), lambda p: p.write_text(text, encoding="utf-8"))

    def record(self, sample: Sample) -> dict[str, Any] | None:
        """A finished sample's record; None where there is none of this very row, or none that is whole."""
        try:
            record = json.loads(self.path("samples", sample.id, ".json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # a machine that lost power may leave an empty file
            return None
        return record if record["digest"] == sample.digest else None

    def records(self, samples: Iterable[Sample]) -> list[dict[str, Any]]:
        """The records of those that are finished, in the samples' order."""
        return [record for sample in samples if (record := self.record(sample)) is not None]

    def finished_since(self, start: float) -> int:
        """How many records were written since a time (seconds since the epoch), by any process."""
        try:
            entries = list(os.scandir(self.out / "samples"))
        except FileNotFoundError:
            return 0
        return sum(e.name.endswith(".json") and e.stat().st_mtime >= start for e in entries)
