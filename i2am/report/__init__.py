"""``maps.report("out.html")``: one self-contained, interactive HTML file; no server, no network.

``data.py`` decides what fits and turns it into bytes, ``build.py`` writes the page, ``page.html``, ``page.css`` and
``page.js`` are the page.
"""

from i2am.report.build import build_report

__all__ = ["build_report"]
