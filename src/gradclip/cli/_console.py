"""What the sub-commands share: tables, JSON, progress bars and one-line errors."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table


class CliError(Exception):
    """An error for the user: one line on stderr, then exit with ``status``."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def need_extra(module: str) -> CliError:
    """Say which extra brings a missing module."""
    return CliError(f"{module} is not installed; pip install 'gradclip[cli]' brings it")


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


def fail(message: str, status: int) -> int:
    """Print one line on stderr and hand back the exit status."""
    print("gradclip: " + printable(" ".join(message.split())), file=sys.stderr)
    return status


def console(*, stderr: bool = False, endless: bool = False) -> Console:
    """A console that colours only terminals, honours NO_COLOR and never cuts piped tables."""
    try:
        from rich.console import Console
    except ImportError:
        raise need_extra("rich") from None
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() and not endless else 10_000
    return Console(stderr=stderr, width=width, highlight=False)


def print_json(value: Any) -> None:
    """Print a value as JSON; NaN and inf become strings, which JSON has no numbers for."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


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
    styles = [
        "red" if place in alarming else "bold" if len(row) < len(columns) else ""
        for place, row in enumerate(rows)
    ]
    out, endless = console(), console(endless=True)
    table = _table(title, columns, rows, styles, text)
    fits = not any(columns) or endless.measure(table).maximum <= out.width
    stacked = _stacked(endless, title, columns, rows, styles, text)
    print(*(_lines(out, table) if fits else stacked), sep="\n")


def _table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str],
    text: int,
) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(title) or None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        show_header=any(columns),
    )
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < text else "right", overflow="fold")
    for row, style in zip(rows, styles, strict=True):
        table.add_row(*map(escape, row), style=style)
    return table


def _stacked(
    out: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str],
    text: int,
) -> Iterator[str]:
    """The lines of a table, the first cell of each row on a line of its own above the others."""
    from rich.text import Text

    figures = _table("", columns[1:], [row[1:] for row in rows], styles, text - 1)
    above, header, rule, *lines = _lines(out, figures)
    yield from [title, above] if title else [above]
    yield from [f" {columns[0]}", f"     {header}", f"     {rule}"]
    for row, style, line in zip(rows, styles, lines, strict=False):
        yield from _lines(out, Text(f" {row[0]}", style))
        if len(row) > 1:
            yield f"     {line}"
    yield ""


def _lines(out: Console, content: RenderableType) -> list[str]:
    # Rich would end the process with status 1 where the reader of a pipe has gone.
    with out.capture() as captured:
        out.print(content)
    return [line.rstrip() for line in captured.get().removesuffix("\n").split("\n")]


@contextlib.contextmanager
def progress(label: str, total: float) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr, on a terminal only; yields ``advance(amount)``."""
    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield lambda _amount: None
        return
    out = console(stderr=True)
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
