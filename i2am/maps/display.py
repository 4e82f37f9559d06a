"""How maps show themselves in notebooks."""

from __future__ import annotations

import html
from base64 import b64encode
from typing import TYPE_CHECKING

from i2am.maps.provenance import rows

if TYPE_CHECKING:
    from i2am.maps import AttributionMaps

ALT = "Unified attribution maps: R2G on the generated grid and, where there is one, G2R on the reference grid"


def as_html(maps: AttributionMaps, png: bytes) -> str:
    """Return a table of what was recorded and where it comes from, above a picture of the unified maps."""
    recorded = {
        "references": ", ".join(maps.references),
        "layers": f"{len(maps.layers)} of {len(maps.recorded_layers)} recorded",
        "time groups": str(maps.time_groups),
        "images": str(maps.batch),
        "any patch can be asked": "yes" if maps.recorded else 'no (trace with record="qk")',
    }
    table = _table("AttributionMaps", recorded)
    if maps.provenance:
        table += f"<details><summary>Provenance</summary>{_table('', dict(rows(maps.provenance)))}</details>"
    return f'{table}<img alt="{ALT}" src="data:image/png;base64,{b64encode(png).decode()}">'


def _table(caption: str, values: dict[str, str]) -> str:
    body = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in values.items())
    return f"<table>{f'<caption>{caption}</caption>' if caption else ''}{body}</table>"
