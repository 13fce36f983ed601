"""What the sub-commands share: tables, JSON, progress bars and one-line errors."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


class CliError(Exception):
    """An error for the user: one line on stderr, then exit with ``status``."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def need_extra(module: str) -> CliError:
    """Say how to get a missing module; its package has the same name."""
    return CliError(f"{module} is not installed: pip install {module} (all: gradclip[cli])")


def printable(text: str) -> str:
    """The text with control characters and lone surrogates written as escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def size(nbytes: float) -> str:
    """A number of bytes to three digits."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def note(message: str) -> None:
    """Print one line on stderr."""
    print("gradclip: " + printable(" ".join(message.split())), file=sys.stderr)


def fail(message: str, status: int) -> int:
    """Print one line on stderr and hand back the exit status."""
    note(message)
    return status


# Of what --json prints: it rises where a field goes or has another meaning; fields may come.
JSON_VERSION = 1


def print_json(value: dict[str, Any]) -> None:
    """Print a report as JSON; NaN and inf become strings, which JSON has no numbers for."""
    print(json.dumps(_plain({"version": JSON_VERSION, **value}), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def console(*, stderr: bool = False) -> Console | None:
    """A console that colours only terminals, honours NO_COLOR and never cuts what is piped.

    None where rich is not installed: what is printed then is the same text, plain.
    """
    try:
        from rich.console import Console
    except ImportError:
        return None
    if (sys.stderr if stderr else sys.stdout).isatty():
        return Console(stderr=stderr, highlight=False)
    return Console(stderr=stderr, highlight=False, force_terminal=False, width=_PIPED)


_PIPED = 10_000


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text: int = 1,
    alarming: Container[int] = (),
) -> None:
    """Print a table; the first ``text`` columns are words, the others figures.

    A row of a single cell is a heading of the rows below it; the ``alarming`` rows are red.
    """
    out = console()
    room = _PIPED if out is None else out.width
    header, *lines = _laid_out([columns, *rows], text, room)
    width = max(len(part) for line in (header, *lines) for part in line.split("\n"))
    unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    rule = (min(width, room) - 1) * ("\u2500" if unicode else "-")
    heads = [(header, "bold"), (f" {rule}", "")] if any(columns) else []
    styled = [(title, "italic"), *heads]
    for place, (row, line) in enumerate(zip(rows, lines, strict=True)):
        heading = "bold" if len(row) < len(columns) else ""
        styled.append((line, "red" if place in alarming else heading))
    if out is None:
        print(*(line for line, _ in styled), "", sep="\n")
        return
    from rich.text import Text

    # Rich would end the process with status 1 where the reader of a pipe has gone.
    with out.capture() as captured:
        for line, style in styled:
            out.print(Text(line, style), soft_wrap=True)
    print(captured.get())


def _laid_out(rows: Sequence[Sequence[str]], text: int, room: int) -> list[str]:
    """Each row as a line, or as two if the first cells leave too little room for the others."""
    columns_of: Callable[[str], int] = len
    with contextlib.suppress(ImportError):
        from rich.cells import cell_len as columns_of
    full = [row for row in rows if len(row) == len(rows[0])]
    first, *widths = (max(map(columns_of, column)) for column in zip(*full, strict=True))

    def padded(cell: str, width: int, *, left: bool) -> str:
        space = " " * (width - columns_of(cell))
        return cell + space if left else space + cell

    others = [
        "  ".join(
            padded(cell, width, left=place < text)
            for place, (cell, width) in enumerate(zip(row[1:], widths, strict=False), 1)
        ).rstrip()
        for row in rows
    ]
    stacked = any(rows[0]) and 1 + first + sum(width + 2 for width in widths) > room
    lines = []
    for row, other in zip(rows, others, strict=True):
        if len(row) == 1:
            lines.append(f" {row[0]}")
        elif stacked:
            lines.append(f" {row[0]}\n      {other}")
        else:
            lines.append(f" {padded(row[0], first, left=True)}  {other}")
    return lines


@contextlib.contextmanager
def progress(label: str, total: float) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr, on a terminal only; yields ``advance(amount)``."""
    out = console(stderr=True) if sys.stderr.isatty() else None
    if out is None:
        yield lambda _amount: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)
