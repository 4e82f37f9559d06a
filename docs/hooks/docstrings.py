"""Docstrings are written for `help()`: where they become Markdown, the marks of reStructuredText go."""

import re

ROLE = re.compile(r":(?:class|func|meth|mod|attr):(?=<code>)")
LITERAL = re.compile(r"<p>::</p>\s*")


def on_page_content(html: str, page, **_) -> str:
    if page.file.src_uri != "api.md":
        return html
    return LITERAL.sub("", ROLE.sub("", html))
