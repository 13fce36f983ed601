"""What the sub-commands share: tables, JSON, progress bars and one-line errors."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


class CliError(Exception):
    """An error for the user: one line on stderr, then exit with ``status``."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def need_extra(module: str) -> CliError:
    """Say which extra brings a missing module."""
    return CliError(f"{module} is not installed; pip install 'gradclip[cli]' brings it")


def fail(message: str, status: int) -> int:
    """Print one line on stderr and hand back the exit status."""
    print("gradclip: " + " ".join(message.split()), file=sys.stderr)
    return status


def console(*, stderr: bool = False) -> Console:
    """A console that colours only terminals, honours NO_COLOR and never cuts piped tables."""
    try:
        from rich.console import Console
    except ImportError:
        raise need_extra("rich") from None
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 200, highlight=False)


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
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1
) -> None:
    """Print a table; the first ``text`` columns are words, the others figures."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    out = console()
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < text else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table)


@contextlib.contextmanager
def progress(label: str, total: float) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr, on a terminal only; yields ``advance(amount)``."""
    out = console(stderr=True)
    if not out.is_terminal:
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
