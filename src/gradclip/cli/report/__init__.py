"""Write what happened in a run as one HTML page that needs no network.

FILE is a record that gradclip.Record wrote; the training may still go on. The page has the norm,
the limit and the factor over all steps, the share of clipped steps, a heat map of each tensor's
norms, and the events: spikes, NaN and inf, skipped steps and slow drifts, each with the tensors
whose norm jumped most against its own past.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from gradclip.cli._console import (
    CliError,
    print_json,
    print_table,
    printable,
    progress,
    size,
)
from gradclip.cli._files import given_path
from gradclip.cli._records import open_record
from gradclip.cli.report.facts import Facts, gather
from gradclip.cli.report.heat import Heat
from gradclip.cli.report.page import page
from gradclip.cli.report.words import counted, deed, described, percent, span, summary
from gradclip.record import History
from gradclip.record.events import Event, find
from gradclip.record.series import Bools, Floats

EXAMPLE = "gradclip report run.db -o report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gradclip report``."""
    parser.add_argument("file", type=given_path, metavar="FILE")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PAGE",
        help="the page to write (default: FILE with the ending .html, none with --json)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Read the record, write the page."""
    with open_record(args.file) as history:
        output = args.output or (None if args.json else args.file.with_suffix(".html"))
        if output is not None:
            _check_output(output, args.file)
        if not len(history.steps):
            raise CliError(f"{args.file} has no steps yet; nothing was recorded")
        facts = gather(args.file.name, history)
        heat = Heat(history.tensor_steps, history.names)
        events = _read(history, heat)
        if output is not None:
            _write(output, page(facts, history, events, heat))
    if args.json:
        print_json({**facts.plain(), "events": list(map(described, events))})
    else:
        _print(facts, events, output)
    return 0


def _check_output(output: Path, record: Path) -> None:
    if output.resolve() == record.resolve():
        raise CliError(f"{output} is the record itself; name another file with -o")
    if output.is_dir() or not output.absolute().parent.is_dir():
        what = "a folder" if output.is_dir() else "in a folder that is not there"
        raise CliError(f"{output} is {what}; name a file with -o")


def _read(history: History, heat: Heat) -> list[Event]:
    with progress("reading norms", len(history.tensor_steps)) as advance:

        def seen(start: int, stop: int, norms: Floats, present: Bools) -> None:
            heat.add(start, stop, norms, present)
            advance(stop - start)

        return find(history, seen)


def _write(output: Path, text: str) -> None:
    """Write the page whole or not at all: a browser may have the last one open."""
    beside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(output)
    finally:
        beside.unlink(missing_ok=True)


def _print(facts: Facts, events: Sequence[Event], output: Path | None) -> None:
    rows = [
        [event.kind, span(event), printable(summary(event)), printable(deed(event))]
        for event in events
    ]
    if rows:
        print_table("", ("event", "when", "what happened", "what the limit did"), rows, text=4)
    clipped = percent(facts.clipped, facts.steps)
    steps, found = counted(facts.steps, "step"), counted(len(events), "event")
    print(f"{steps}, {clipped} clipped, {facts.skipped:,} skipped, {found}")
    if output is not None:
        print(f"{printable(str(output))}: {size(output.stat().st_size)}")
