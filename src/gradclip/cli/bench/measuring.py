"""Cases measured: in processes of their own, the systems of each in turns."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from gradclip.cli._console import CliError
from gradclip.cli.bench.builders import Bar, Case, Cases, Fresh, Turns
from gradclip.cli.bench.busy import spinning
from gradclip.cli.bench.cases import cases_of
from gradclip.cli.bench.timing import timings
from gradclip.kernels.cpu import threads as team

# Of a case that is shrunk.
REPEATS = 3
Row = dict[str, Any]


def measured(chosen: Cases, *, quick: bool, shrink: int = 1) -> Iterator[list[Row]]:
    """The rows of each case, each number of threads in a process of its own.

    With ``shrink`` they are so many times smaller, and have no bars: only to see that they run.
    """
    counts = {name: _threads(case) for name, case in chosen.items()}
    for count in sorted(set(counts.values()), reverse=True):
        names = [name for name in chosen if counts[name] == count]
        yield from _in_process(names, count, quick=quick, shrink=shrink)


def _threads(case: Case | Turns | Fresh) -> int:
    return (case.threads if isinstance(case, Case) else None) or team.number()


def _in_process(names: Sequence[str], count: int, **how: Any) -> Iterator[list[Row]]:
    """The rows of each case, measured in one new process where all take ``count`` threads."""
    variables = ("GRADCLIP", "OPENBLAS", "OMP", "MKL")
    environment = {**os.environ, **{f"{name}_NUM_THREADS": str(count) for name in variables}}
    environment["TF_NUM_INTRAOP_THREADS"] = str(count)
    code = f"from gradclip.cli.bench.measuring import measure_all; measure_all({names!r}, **{how})"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise CliError(f"the measuring process ended with status {process.returncode}", 1)


def measure_all(names: Sequence[str], *, quick: bool, shrink: int) -> None:
    """Print the rows of each case as a line of JSON."""
    found = cases_of(quick=quick)
    with contextlib.suppress(KeyboardInterrupt):  # the parent says so
        for name in names:
            print(json.dumps(measure(name, found[name], shrink)), flush=True)


def measure(name: str, case: Case | Turns | Fresh, shrink: int = 1) -> list[Row]:
    """The rows of one case, measured in this process."""
    if isinstance(case, Fresh):
        return [_fresh(name, case, shrink)]
    repeats = case.repeats if shrink == 1 else REPEATS
    if isinstance(case, Turns):
        turns = list(islice(case.turns(shrink), 1, 1 + repeats))  # the first warms up
        seconds = {system: [turn[system] for turn in turns] for system in (turns or [{}])[0]}
    else:
        systems = case.systems(shrink)
        others = spinning(team.number()) if case.busy else None
        seconds = timings(systems, repeats, others) if systems else {}
    if not seconds:  # the framework of the case is not installed, as the report says
        return []
    medians = {system: median(each) for system, each in seconds.items()}
    both = medians.get("R", 0.0) + medians.get("S", 0.0)
    yardsticks = {**medians, "R + S": both, "ms": 1e-3}
    return [
        _row(name, system, medians[system] / yardsticks[case.bar.of], case.bar, shrink)
        | {"median_s": medians[system], "min_s": min(seconds[system])}
        for system in seconds
    ]


def _fresh(name: str, case: Fresh, shrink: int) -> Row:
    if "/proc" in case.code and not Path("/proc/self/smaps").exists():
        return _row(name, "gradclip", math.nan, Bar(None, case.bar.of))
    command = [sys.executable, "-c", case.code]
    figures = [
        float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        for _ in range(1 if shrink > 1 else case.processes)
    ]
    return _row(name, "gradclip", median(figures), case.bar, shrink)


def _row(name: str, system: str, value: float, bar: Bar, shrink: int = 1) -> Row:
    limit = bar.limit if system == "gradclip" and shrink == 1 else None
    return {
        "case": name,
        "system": system,
        "median_s": None,
        "min_s": None,
        "value": value,
        "unit": bar.of,
        "bar": limit,
        "met": None if limit is None else value <= limit,
    }
