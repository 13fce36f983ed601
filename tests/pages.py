"""The pages in Markdown, and the code in them.

What stands between two headings is one script: its blocks of ``python`` in their order, and before
or between them what is in comments ``<!-- python ... -->``, which readers do not see. A block of
``diff`` makes two scripts of it, one with the lines that go and one with those that come. A comment
right behind or below a ``print`` is what it prints. Then the blocks of ``console`` run in the same
folder, command by command, and print what is shown; "..." stands for anything. Blocks of ``sh``, or
of no language, install or make something and are not run, and ``text`` is no code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>.*)$")
_HIDDEN = "<!-- python"


@dataclass
class Section:
    """What stands under a heading."""

    page: Path
    heading: str
    line: int
    blocks: list[tuple[str, str]] = field(default_factory=list)  # languages and texts

    @property
    def name(self) -> str:
        """For a test."""
        return f"{self.page.relative_to(ROOT)}:{self.line} {self.heading}"

    @property
    def scripts(self) -> list[str]:
        """The scripts that it makes: none, one, or with a diff two."""
        languages = {language for language, _ in self.blocks}
        if "diff" in languages:
            return [self._script("-"), self._script("+")]
        return [self._script("")] if "python" in languages else []

    def _script(self, side: str) -> str:
        parts = []
        for language, text in self.blocks:
            if language == "python":
                parts.append(text)
            elif language == "diff":
                lines = [line for line in text.split("\n") if line[:1] in (side, " ", "")]
                parts.append("\n".join(line[1:] for line in lines))
        return "\n".join(parts)

    @property
    def commands(self) -> list[tuple[str, str]]:
        """The commands, and what each prints."""
        found: list[tuple[str, str]] = []
        for language, text in self.blocks:
            if language == "console":
                for each in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                    command, _, output = each.partition("\n")
                    found.append((command, output.strip("\n")))
        return found


def sections() -> list[Section]:
    """Those of all pages."""
    return [section for page in PAGES if "_build" not in page.parts for section in _sections(page)]


def _sections(page: Path) -> list[Section]:
    found = [Section(page, "", 1)]
    lines = iter(enumerate(page.read_text().split("\n"), 1))
    for number, line in lines:
        fence = _FENCE.match(line)
        if line.startswith("#"):
            found.append(Section(page, line.strip("# "), number))
        elif line.startswith(_HIDDEN):
            found[-1].blocks.append(("python", _until("-->", lines)))
        elif fence:
            text = _until(fence["fence"], lines)
            found[-1].blocks.append((fence["language"].strip(), text))
        elif line.lstrip().startswith(("```", "~~~")):
            raise ValueError(f"{page}:{number}: a block has to begin with ``` at the left")
    return found


def _until(end: str, lines: Iterator[tuple[int, str]]) -> str:
    text = []
    for _, line in lines:
        if line.rstrip() == end:
            return "\n".join(text)
        text.append(line)
    raise ValueError(f"a block is not closed by {end}")
