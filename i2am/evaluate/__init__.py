"""Evaluation over a dataset: every sample traced and scored, resumable, over one process or several.

``manifest.py`` says what the samples are, ``store.py`` keeps each finished one, ``run.py`` does those that are left,
``summary.py`` and ``sheet.py`` say what came out.
"""

from i2am.evaluate.manifest import Sample, read_manifest
from i2am.evaluate.run import DiskFull, Traced, evaluate
from i2am.evaluate.scores import score
from i2am.evaluate.store import Store
from i2am.evaluate.summary import summarise

__all__ = ["DiskFull", "Sample", "Store", "Traced", "evaluate", "read_manifest", "score", "summarise"]
