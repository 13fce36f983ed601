"""Time gradclip against the memory that it reads and writes, and against other libraries.

R is the time to read a list once (np.dot of each array with itself), S to read and write it once
(a multiply in place, on as many threads). The systems of a case take turns in one process, and
figures are medians. GRADCLIP_NUM_THREADS sets the threads of all.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from gradclip.cli import env
from gradclip.cli._cases import CASES, Bar, Case, Fresh, Turns
from gradclip.cli._console import CliError, need_extra, print_json, print_table, progress
from gradclip.cli._contenders import Call
from gradclip.cli._regular import other
from gradclip.kernels.cpu import threads

EXAMPLE = "gradclip bench --case clip small-clip"

REPEATS, QUICK_REPEATS, QUICK_SHRINK = 21, 3, 20
# A call this short, in seconds, is repeated in a row.
BATCH = 0.01
# The helper threads of a system spin for some time before they sleep, at the cost of the next
# system: so wait, in pauses of so many seconds, until this process takes no processor time.
PAUSE, PAUSES = 0.02, 50

Row = dict[str, Any]
PACKAGES = ("gradclip", "python", "numpy", "torch", "tensorflow", "jax", "optax")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gradclip bench``."""
    parser.add_argument("--case", nargs="+", choices=CASES, metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append the figures to a file")
    parser.add_argument(
        "--quick", action="store_true", help="a twentieth of the sizes, and no bars: a trial run"
    )


def run(args: argparse.Namespace) -> int:
    """Run the cases, each number of threads in a process of its own."""
    if args.quick and args.csv:
        raise CliError("--quick measures nothing to keep; leave out --csv")
    if find_spec("ml_dtypes") is None:
        raise need_extra("ml_dtypes")
    if args.csv:  # what cannot be written in the end is found out now
        if what := other(args.csv):
            raise CliError(f"{args.csv} is {what}; --csv appends to regular files")
        args.csv.open("a").close()
    names = [name for name in CASES if not args.case or name in args.case]
    about = machine()
    rows: list[Row] = []
    with progress("measuring", len(names)) as advance:
        for count in sorted({_threads(name) for name in names}, reverse=True):
            group = [name for name in names if _threads(name) == count]
            for found in _in_process(group, count, quick=args.quick):
                rows += found
                advance(1)
    rows.sort(key=lambda row: names.index(row["case"]))
    if args.csv:
        _append(args.csv, about, rows)
    if args.json:
        print_json({"machine": about, "rows": rows})
    else:
        _print(about, rows, "a twentieth of these sizes" if args.quick else "")
    return 0


# ---- the harness ----


def _threads(name: str) -> int:
    case = CASES[name]
    return (case.threads if isinstance(case, Case) else None) or threads()


def _in_process(names: Sequence[str], count: int, *, quick: bool) -> Iterator[list[Row]]:
    """The rows of each case, measured in one new process where all take ``count`` threads."""
    variables = ("GRADCLIP", "OPENBLAS", "OMP", "MKL")
    environment = {**os.environ, **{f"{name}_NUM_THREADS": str(count) for name in variables}}
    environment["TF_NUM_INTRAOP_THREADS"] = str(count)
    code = f"from gradclip.cli.bench import measure_all; measure_all({names!r}, quick={quick})"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise CliError(f"the measuring process ended with status {process.returncode}", 1)


def measure_all(names: Sequence[str], *, quick: bool) -> None:
    """Print the rows of each case as a line of JSON."""
    with contextlib.suppress(KeyboardInterrupt):  # the parent says so
        for name in names:
            print(json.dumps(_measure(name, quick)), flush=True)


def _measure(name: str, quick: bool) -> list[Row]:
    case = CASES[name]
    if isinstance(case, Fresh):
        return [_fresh(name, case, quick)]
    shrink, repeats = (QUICK_SHRINK, QUICK_REPEATS) if quick else (1, REPEATS)
    if isinstance(case, Turns):
        turns = list(islice(case.turns(shrink), 1, 1 + repeats))  # the first warms up
        seconds = {system: [turn[system] for turn in turns] for system in (turns or [{}])[0]}
    else:
        systems = case.systems(shrink)
        seconds = timings(systems, repeats) if systems else {}
    if not seconds:  # the framework of the case is not installed, as the report says
        return []
    medians = {system: median(each) for system, each in seconds.items()}
    both = medians.get("R", 0.0) + medians.get("S", 0.0)
    yardsticks = {**medians, "R + S": both, "ms": 1e-3}
    return [
        _row(name, system, medians[system] / yardsticks[bar.of], bar, quick)
        | {"median_s": medians[system], "min_s": min(seconds[system])}
        for system in seconds
        for bar in (case.bars if system == "gradclip" else case.bars[:1])
    ]


def _fresh(name: str, case: Fresh, quick: bool) -> Row:
    if "/proc" in case.code and not Path("/proc/self/smaps").exists():
        return _row(name, "gradclip", math.nan, case.bar, quick=True)
    command = [sys.executable, "-c", case.code]
    figures = [
        float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        for _ in range(1 if quick else case.processes)
    ]
    return _row(name, "gradclip", median(figures), case.bar, quick)


def _row(name: str, system: str, value: float, bar: Bar, quick: bool) -> Row:
    limit = bar.limit if system == "gradclip" and not quick else None
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


def timings(systems: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
    """The seconds that a call of each system takes, ``repeats`` times, in turns."""
    batches = {}
    for system, call in systems.items():
        call()  # may compile
        batches[system] = max(1, int(BATCH / _seconds(call, 1)))
    seconds: dict[str, list[float]] = {system: [] for system in systems}
    gc.collect()
    gc.freeze()
    for repeat in range(repeats):
        start = repeat % len(systems)
        for system in [*systems][start:] + [*systems][:start]:
            gc.collect()
            _wait_until_idle()
            seconds[system].append(_seconds(systems[system], batches[system]))
    gc.unfreeze()
    return seconds


def _wait_until_idle() -> None:
    for _ in range(PAUSES):
        before = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - before < PAUSE / 10:
            return


def _seconds(call: Call, times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times


# ---- the report ----


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    facts = env.facts()
    versions = {name: facts["versions"][name] for name in PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds"),
        "processor": facts["processor"],
        "processors": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "threads": facts["threads"],
        "kernel": facts["kernel"],
        "versions": ", ".join(f"{name} {found}" for name, found in versions.items() if found),
        "not_installed": ", ".join(name for name, found in versions.items() if not found),
    }


def _append(path: Path, about: Mapping[str, Any], rows: Sequence[Row]) -> None:
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*about, *rows[0]])
        if not file.tell():
            writer.writeheader()
        writer.writerows({**about, **row} for row in rows)


def _print(about: Mapping[str, Any], rows: Sequence[Row], title: str) -> None:
    for key, value in about.items():
        if value:
            print(f"{key.replace('_', ' ')}: {value}")
    lines: list[list[str]] = []
    for row, last in zip(rows, [None, *rows], strict=False):
        if last is None or last["case"] != row["case"]:
            lines.append([CASES[row["case"]].what])
        lines.append(_line(row))
    columns = ["", "median ms", "least ms", "measured", "at most", ""]
    print_table(title, columns, lines)


def _line(row: Row) -> list[str]:
    verdict = {True: "met", False: "MISSED", None: ""}[row["met"]]
    return [
        row["system"],
        *("" if row[key] is None else f"{1e3 * row[key]:.3f}" for key in ("median_s", "min_s")),
        "needs /proc" if math.isnan(row["value"]) else f"{row['value']:.3g} {row['unit']}",
        "" if row["bar"] is None else f"{row['bar']:g} {row['unit']}",
        verdict,
    ]
