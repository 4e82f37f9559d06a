"""Turns ``$…$`` and ``$$…$$`` into MathML while the pages are built: browsers draw it themselves, without a script.

Markdown sees a word in the place of each equation: it would take the equation's own marks for emphasis and blocks.
"""

import re

from latex2mathml.converter import convert

CODE_OR_MATH = re.compile(r"(```.*?```|`[^`\n]*`)|\$\$(.+?)\$\$|\$([^\s$](?:[^$\n]*[^\s$])?)\$", re.S)
PLACE = re.compile(r"EQUATION(\d+)PLACE")
equations: dict[str, list[str]] = {}  # of each page


def on_page_markdown(markdown: str, page, **_) -> str:
    found = equations[page.file.src_uri] = []

    def word(match: re.Match) -> str:
        code, block, inline = match.groups()
        if code is not None:
            return code
        found.append(convert((block or inline).strip(), display="block" if block else "inline"))
        return f"EQUATION{len(found) - 1}PLACE"

    return CODE_OR_MATH.sub(word, markdown)


def on_page_content(html: str, page, **_) -> str:
    return PLACE.sub(lambda match: equations[page.file.src_uri][int(match[1])], html)
