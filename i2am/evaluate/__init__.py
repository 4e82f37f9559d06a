"""Evaluation over a dataset: every sample traced and scored, resumable, over one process or several.

``manifest.py`` says what the samples are (``sources.py``: where they come from), ``store.py`` keeps each finished one
(``journal.py``: its record, ``leases.py``: who works on what, ``identity.py``: what it was made from), ``run.py`` does
those that are left (``trackers.py`` shows them live), ``summary.py``, ``contact.py`` and ``parquet.py`` say what came
out, ``compare.py`` what moved between two runs.
"""

from i2am.evaluate.manifest import Manifest, Sample, read_manifest
from i2am.evaluate.run import DiskFull, Traced, evaluate
from i2am.evaluate.scores import score
from i2am.evaluate.store import Store, StoreError
from i2am.evaluate.summary import summarise

__all__ = [
    "DiskFull",
    "Manifest",
    "Sample",
    "Store",
    "StoreError",
    "Traced",
    "evaluate",
    "read_manifest",
    "score",
    "summarise",
]
