"""Two runs over the same samples: what moved, where, and by how much. See ``i2am.evaluate.compare``."""

from i2am.evaluate.compare import Comparison, Run, compare, moved_shares, read_run, total_variation
from i2am.evaluate.compare_figures import format_table, movers, overview, write

__all__ = [
    "Comparison",
    "Run",
    "compare",
    "format_table",
    "moved_shares",
    "movers",
    "overview",
    "read_run",
    "total_variation",
    "write",
]
