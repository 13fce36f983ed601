"""Time gradclip against the memory that it reads and writes, and against other libraries.

R is the time to read a list once (np.dot of each array with itself), S to read and write it once
(a multiply in place, on as many threads). The systems of a case take turns in one process, and
figures are medians. GRADCLIP_NUM_THREADS sets the threads of all.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gradclip.cli import env
from gradclip.cli._console import CliError, need_extra, print_json, print_table, progress
from gradclip.cli._regular import other
from gradclip.cli.bench.cases import CASES
from gradclip.cli.bench.measuring import Row, in_process, threads_of

EXAMPLE = "gradclip bench --case clip small-clip"

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
        for count in sorted({threads_of(name) for name in names}, reverse=True):
            group = [name for name in names if threads_of(name) == count]
            for found in in_process(group, count, quick=args.quick):
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
