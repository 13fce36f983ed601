"""Follow a run in the terminal while it goes on: Ctrl-C ends it.

FILE is the record that gradclip.Record writes; where it is not there yet, it is waited for. The
norm is drawn over the last steps, the highest of each part; below stand the tensors with the
largest norms, and what happened: spikes, NaN and inf, skipped steps.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradclip.cli._console import CliError, console, need_extra, note, print_json, printable
from gradclip.cli._files import given_path
from gradclip.cli._records import open_record
from gradclip.cli.report.words import described, figure, known, percent, span, summary
from gradclip.record import History
from gradclip.record.events import Event, find

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

EXAMPLE = "gradclip watch run.db"
RECENT = 2048  # steps that are looked at
LARGEST = 8  # tensors shown
LAST = 5  # events shown
_PAUSE = 0.5  # seconds between looks at the file

Line = tuple[str, str]  # text and style


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gradclip watch``."""
    parser.add_argument("file", type=given_path, metavar="FILE")
    parser.add_argument("--once", action="store_true", help="show the latest step and end")


def run(args: argparse.Namespace) -> int:
    """Follow the record."""
    if args.json:
        print_json(plain(_latest(args.file)))
        return 0
    if not args.once and not sys.stdout.isatty():
        raise CliError("watch draws on a terminal, and the output is none; add --once or --json")
    out = console()
    if out is None:
        raise need_extra("rich")
    if args.once:
        for line in _styled(lines(_latest(args.file), min(out.width, 100), time.time())):
            out.print(line, soft_wrap=True)
        return 0
    try:
        _follow(args.file, out)
    except KeyboardInterrupt:  # how it is ended
        return 0
    return 0


def _latest(path: Path) -> View:
    with open_record(path) as history:
        if not len(history):
            raise CliError(f"{path} has no steps yet; nothing was recorded")
        return look(path.name, recent(history, int(history.steps[-1])))


def _follow(path: Path, out: Console) -> None:
    from rich.console import Group
    from rich.live import Live

    with _awaited(path) as history, Live(console=out, auto_refresh=False) as live:
        latest = int(history.steps[-1])
        watched = _Watched(path.name)
        while True:
            now = recent(history, latest)
            latest = int(now.steps[-1])
            width = out.width
            shown = lines(watched.look(now), width, time.time())
            live.update(Group(*_styled(shown)), refresh=True)
            time.sleep(_PAUSE)


def _awaited(path: Path) -> History:
    """The record, once it has a step."""
    told = False
    while not path.exists() or not path.stat().st_size:
        told = _tell_once(told, f"waiting for {path}, which is not there yet; Ctrl-C ends")
    history = open_record(path)
    while not len(history):
        told = _tell_once(told, f"waiting for the first step in {path}; Ctrl-C ends")
        history.close()
        history = open_record(path)
    return history


def _tell_once(told: bool, message: str) -> bool:
    if not told:
        note(message)
    time.sleep(_PAUSE)
    return True


def recent(history: History, latest: int) -> History:
    """The last steps of a run as the file is now; it may have gone back behind ``latest``."""
    found = history.after(latest - RECENT)
    if not len(found):
        found = history.after(-1)
    return found if len(found) <= RECENT else history.after(int(found.steps[-RECENT - 1]))


# ---- what is seen ----


class View(NamedTuple):
    """What there is to show of the last steps."""

    name: str
    history: History
    tensor_step: int | None
    largest: list[tuple[str, float]]
    events: list[Event]


def look(name: str, history: History, events: list[Event] | None = None) -> View:
    """Look at the last steps; where ``events`` are not given, they are found."""
    found = find(history) if events is None else events
    if not len(history.tensor_steps):
        return View(name, history, None, [], found)
    norms, present = history.tensor_norms(len(history.tensor_steps) - 1)
    named = [
        (each, float(norm))
        for each, norm, there in zip(history.names, norms[0], present[0], strict=True)
        if there
    ]
    named.sort(key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1], reverse=True)
    return View(name, history, int(history.tensor_steps[-1]), named[:LARGEST], found)


class _Watched:
    """Looks again and again, and for events no more than a tenth of the time."""

    def __init__(self, name: str):
        self._name = name
        self._events: list[Event] | None = None
        self._next = 0.0

    def look(self, history: History) -> View:
        begun = time.monotonic()
        if begun >= self._next:
            self._events = find(history)
            took = time.monotonic() - begun
            self._next = time.monotonic() + max(2.0, 10 * took)
        return look(self._name, history, self._events)


def plain(view: View) -> dict[str, Any]:
    """The view for JSON; null is what is not known."""
    run = view.history
    return {
        "name": view.name,
        "step": int(run.steps[-1]),
        "time": float(run.time[-1]),
        "norm": float(run.norm[-1]),
        "limit": known(float(run.limit[-1])),
        "factor": known(float(run.factor[-1])),
        "action": str(run.action[-1]),
        "steps": len(run),
        "clipped": _clipped(run),
        "skipped": int(run.skipped.sum()),
        "nonfinite": int((run.nonfinite > 0).sum()),
        "tensor_step": view.tensor_step,
        "largest": [{"name": name, "norm": norm} for name, norm in view.largest],
        "events": [described(event) for event in view.events],
    }


def _clipped(run: History) -> int:
    return int(((run.factor < 1) & ~run.skipped).sum())


# ---- how it is shown ----


def lines(view: View, width: int, now: float) -> list[Line]:
    """The view as lines of text no wider than ``width``."""
    run = view.history
    since = max(0.0, now - float(run.time[-1]))
    begun = float(run.time[-1] - run.time[0])
    pace = f", {figure((len(run) - 1) / begun)} steps a second" if begun > 0 else ""
    counts = [f"{percent(_clipped(run), len(run))} clipped", f"{int(run.skipped.sum()):,} skipped"]
    broken = int((run.nonfinite > 0).sum())
    counts.append(f"{broken:,} NaN or inf")
    shown = [
        (f"{printable(view.name)}: step {int(run.steps[-1]):,}, {_ago(since)}{pace}", "bold"),
        (f"norm    {sparkline(run, width - 8)}", "cyan"),
        (f"        {figure(float(run.norm[-1]))} {_range(run)}", ""),
        (f"limit   {_known(float(run.limit[-1]))}", ""),
        (f"factor  {_known(float(run.factor[-1]))}  ({run.action[-1]})", ""),
        (f"last {len(run):,} steps: {', '.join(counts)}", "red" if broken else ""),
        *_tensor_lines(view, width),
        *_event_lines(view.events),
    ]
    return [(_cut(text, width), style) for text, style in shown]


def _known(value: float) -> str:
    return "none known" if math.isnan(value) else figure(value)


def _ago(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return f"{seconds:.0f} s ago"


def _range(run: History) -> str:
    finite = run.norm[np.isfinite(run.norm)]
    if not len(finite):
        return ""
    low, middle, high = (figure(float(value)) for value in np.quantile(finite, (0, 0.5, 1)))
    return f" (lowest {low}, median {middle}, highest {high})"


def sparkline(run: History, width: int) -> str:
    """The norm over the steps as a line of blocks, on a logarithmic scale; ``x`` is NaN or inf."""
    size = max(1, -(-len(run) // max(1, width)))
    starts = np.arange(0, len(run), size)
    known = np.where(np.isfinite(run.norm) & (run.norm > 0), run.norm, np.nan)
    highest = np.fmax.reduceat(known, starts)
    logs = np.log(highest)
    low, high = np.fmin.reduce(logs), np.fmax.reduce(logs)
    blocks = _BLOCKS if (sys.stdout.encoding or "utf-8").lower().startswith("utf") else _PLAIN
    height = (logs - low) / max(high - low, 1e-9) * (len(blocks) - 1)
    broken = np.add.reduceat(run.nonfinite > 0, starts, dtype=np.int64)
    return "".join(
        "x" if bad else " " if math.isnan(level) else blocks[round(level)]
        for bad, level in zip(broken, height.tolist(), strict=True)
    )


_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_PLAIN = "_.-=+*#"


def _tensor_lines(view: View, width: int) -> list[Line]:
    if view.tensor_step is None:
        return [("", ""), ("no norms of tensors in these steps", "dim")]
    room = max(8, width - 12)
    longest = min(room, max(len(printable(name)) for name, _ in view.largest))
    rows = [
        (f"  {_cut(printable(name), longest):<{longest}}  {figure(norm):>8}", _alarm(norm))
        for name, norm in view.largest
    ]
    return [("", ""), (f"largest norms, step {view.tensor_step:,}", "bold"), *rows]


def _alarm(norm: float) -> str:
    return "" if math.isfinite(norm) else "red"


def _event_lines(events: Sequence[Event]) -> list[Line]:
    if not events:
        return [("", ""), ("no events in these steps", "dim")]
    color = {"NaN": "red", "inf": "red", "spike": "yellow", "skip": "magenta", "drift": "blue"}
    rows = [
        (f"  {event.kind:<5}  {span(event)}: {printable(summary(event))}", color[event.kind])
        for event in events[-LAST:]
    ]
    more = len(events) - len(rows)
    return [("", ""), ("events" + (f", {more:,} more before" if more else ""), "bold"), *rows]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


def _styled(shown: Sequence[Line]) -> list[Text]:
    from rich.text import Text

    return [Text(text, style, no_wrap=True) for text, style in shown]
