"""The directive ``{command} NAME``: what ``gradclip NAME --help`` prints, as it is now."""

from __future__ import annotations

import os
from typing import Any, ClassVar
from unittest import mock

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from gradclip import cli


class Command(SphinxDirective):
    """A literal block of the help of a sub-command."""

    required_arguments: ClassVar[int] = 1

    def run(self) -> list[nodes.Node]:
        """Make the block.

        Raises:
            ValueError: there is no such command.
        """
        (name,) = self.arguments
        if name not in cli.COMMANDS:
            raise self.error(f"gradclip has no command {name!r}")
        with mock.patch.dict(os.environ, COLUMNS="80"):
            (commands,) = cli.parser([name])._subparsers._group_actions
            text = commands.choices[name].format_help()
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Any) -> dict[str, Any]:
    """Register the directive with Sphinx."""
    app.add_directive("command", Command)
    return {"parallel_read_safe": True}
