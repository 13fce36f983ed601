"""The directive ``{command} NAME``: what ``gradclip NAME --help`` prints, as it is now."""

from __future__ import annotations

import os
from typing import Any, ClassVar
from unittest import mock

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from gradclip import cli


class Command(SphinxDirective):
    """The description of a sub-command as paragraphs, and its usage and options as a block."""

    required_arguments: ClassVar[int] = 1

    def run(self) -> list[nodes.Node]:
        """Make the nodes.

        Raises:
            ValueError: there is no such command.
        """
        (name,) = self.arguments
        if name not in cli.COMMANDS:
            raise self.error(f"gradclip has no command {name!r}")
        (commands,) = cli.parser([name])._subparsers._group_actions
        parser = commands.choices[name]
        paragraphs = [paragraph(text) for text in parser.description.strip().split("\n\n")]
        parser.description = None
        with mock.patch.dict(os.environ, COLUMNS="80"):
            text = parser.format_help()
        return [*paragraphs, nodes.literal_block(text, text, language="text")]


def paragraph(text: str) -> nodes.paragraph:
    """A paragraph, in which what is in single backquotes is code."""
    found = nodes.paragraph()
    for place, part in enumerate(" ".join(text.split()).split("`")):
        found += nodes.literal(part, part) if place % 2 else nodes.Text(part)
    return found


def setup(app: Any) -> dict[str, Any]:
    """Register the directive with Sphinx."""
    app.add_directive("command", Command)
    return {"parallel_read_safe": True}
