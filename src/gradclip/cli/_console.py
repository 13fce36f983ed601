"""What the sub-commands share: tables, JSON, progress bars and one-line errors."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, TextIO

_ITALIC, _BOLD, _RED = "\x1b[3m", "\x1b[1m", "\x1b[31m"
_BAR = 30


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


def note(message: str) -> None:
    """Print one line on stderr."""
    print("gradclip: " + printable(" ".join(message.split())), file=sys.stderr)


def fail(message: str, status: int) -> int:
    """Print one line on stderr and hand back the exit status."""
    note(message)
    return status


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

    A row of a single cell is a heading of the rows below it; the ``alarming`` rows are red on a
    terminal. What is piped is never cut.
    """
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    header, *lines = _laid_out([columns, *rows], text, room)
    width = max(_width(part) for line in (header, *lines) for part in line.split("\n"))
    unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    print(_styled(title, _ITALIC))
    if any(columns):
        print(_styled(header, _BOLD))
        print(" " + (min(width, room) - 1) * ("\u2500" if unicode else "-"))
    for place, (row, line) in enumerate(zip(rows, lines, strict=True)):
        heading = _BOLD if len(row) < len(columns) else ""
        print(_styled(line, _RED if place in alarming else heading))
    print()


def _styled(text: str, style: str) -> str:
    shown = style and text and _moves(sys.stdout) and not os.environ.get("NO_COLOR")
    return f"{style}{text}\x1b[0m" if shown else text


def _moves(stream: TextIO) -> bool:
    """If it is a terminal that can do more than print line after line."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _laid_out(rows: Sequence[Sequence[str]], text: int, room: int) -> list[str]:
    """Each row as a line, or as two if the first cells leave too little room for the others."""
    full = [row for row in rows if len(row) == len(rows[0])]
    first, *widths = (max(map(_width, column)) for column in zip(*full, strict=True))
    others = [
        "  ".join(
            _padded(cell, width, left=place < text)
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
            lines.append(f" {_padded(row[0], first, left=True)}  {other}")
    return lines


def _padded(cell: str, width: int, *, left: bool) -> str:
    room = (width - _width(cell)) * " "
    return cell + room if left else room + cell


def _width(text: str) -> int:
    """The columns of a terminal that it takes: two for a Chinese sign, none for an accent."""
    if text.isascii():
        return len(text)
    signs = (sign for sign in text if unicodedata.category(sign) not in ("Mn", "Me"))
    return sum(1 + (unicodedata.east_asian_width(sign) in "WF") for sign in signs)


@contextlib.contextmanager
def progress(label: str, total: float) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr, on a terminal only; yields ``advance(amount)``."""
    if not _moves(sys.stderr):
        yield lambda _amount: None
        return
    started = drawn = time.monotonic()
    done = 0.0

    def draw() -> None:
        share = min(done / total, 1.0) if total else 1.0
        bar = (round(_BAR * share) * "#").ljust(_BAR, ".")
        spent = drawn - started
        left = datetime.timedelta(seconds=round(spent / share - spent)) if share else "-:--:--"
        print(f"\r{label} {bar} {share:4.0%} {left}\x1b[K", end="", file=sys.stderr, flush=True)

    def advance(amount: float) -> None:
        nonlocal done, drawn
        done += amount
        if time.monotonic() - drawn > 0.1:  # writing takes longer than measuring a piece
            drawn = time.monotonic()
            draw()

    try:
        draw()
        yield advance
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
