"""Rewrites Sphinx roles in docstrings, which Markdown does not know, for the page of the Python API."""

# pyright: reportMissingImports=false
# (griffe comes with the extra docs)

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|data|mod):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Rewrites ``:func:`name``` to ```name``` while the page is built."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
