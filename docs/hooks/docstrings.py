"""Docstrings are written for `help()`: where they become Markdown, the marks of reStructuredText go."""

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([^`]+)`")
LITERAL = re.compile(r"^[ \t]*::[ \t]*\n", re.M)


class Markdown(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = LITERAL.sub("", ROLE.sub(r"`\1`", obj.docstring.value))
