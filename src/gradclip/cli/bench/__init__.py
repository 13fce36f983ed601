"""Time gradclip against the memory that it reads and writes, and against other libraries.

The systems of a case take turns in one process, and figures are medians; what their units are is
printed below them. GRADCLIP_NUM_THREADS sets the threads of all. --quick shows in half a minute
what to expect of this machine, from a few cases of 128 MB.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gradclip.cli import env
from gradclip.cli._console import CliError, need_extra, print_json, print_table, progress
from gradclip.cli._regular import other
from gradclip.cli.bench.builders import Cases
from gradclip.cli.bench.cases import CASES, cases_of
from gradclip.cli.bench.measuring import Row, measured

EXAMPLE = "gradclip bench --case clip small-clip"

COLUMNS = {
    "median ms": "what one call takes in the median turn",
    "least ms": "what one call takes in the fastest turn",
    "measured": "the median, divided by that of what is named behind it; or ms, MB, kB",
    "at most": "what gradclip is held to; MISSED where it takes more",
}
# Those that are not the name of another library.
UNITS = {
    "R": "reading the memory once, as float64 by np.dot on all threads; fair if nothing else runs",
    "S": "reading and writing it once, as float64 by np.multiply in place, on as many threads",
    "NumPy loop": "np.vdot of each array, and array *= factor where there is something to clip",
    "a number": "the same clip by a number that nothing is above, of the same tensors",
    "20 us": "what a limit that learns may add",
    "100 us": "what one that looks back over 10,000 norms may add",
    "the global clip": "clip_grad_norm_ of gradclip by a number, of the same tensors",
    "PyTorch, each": "a loop of torch.nn.utils.clip_grad_norm_ over the tensors",
    "global_norm": "gradclip.global_norm of the same tensors",
    "norm() of each": "a loop of PyTorch's Tensor.norm over the tensors",
    "_foreach_norm": "torch._foreach_norm of the same tensors",
    "one thread": "the same call of gradclip with GRADCLIP_NUM_THREADS=1, or under XLA NPROC=1",
    "allowed": "1.2 times the all-reduce of what gradclip sends, 0.1 ms and 1 us a tensor",
}

PACKAGES = ("gradclip", "python", "numpy", "torch", "tensorflow", "jax", "optax")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gradclip bench``."""
    parser.add_argument("--case", nargs="+", choices=CASES, metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append the figures to a file")
    parser.add_argument("--quick", action="store_true", help="five smaller cases, in half a minute")


def run(args: argparse.Namespace) -> int:
    """Run the cases, each number of threads in a process of its own."""
    if sys.platform != "linux":
        raise CliError("gradclip bench reads memory in /proc, which Linux alone has; run it there")
    if args.quick and (args.case or args.csv):
        raise CliError("--quick has cases of its own, to look at; leave out --case and --csv")
    if find_spec("ml_dtypes") is None:
        raise need_extra("ml_dtypes")
    if args.csv:  # what cannot be written in the end is found out now
        if what := other(args.csv):
            raise CliError(f"{args.csv} is {what}; --csv appends to regular files")
        args.csv.open("a").close()
    every = cases_of(quick=args.quick)
    chosen = {name: every[name] for name in every if not args.case or name in args.case}
    about = machine()
    rows: list[Row] = []
    with progress("measuring", len(chosen)) as advance:
        for found in measured(chosen, quick=args.quick):
            rows += found
            advance(1)
    names = [*chosen]
    rows.sort(key=lambda row: names.index(row["case"]))
    if args.csv:
        _append(args.csv, about, rows)
    if args.json:
        print_json({"machine": about, "rows": rows})
    else:
        _print(about, chosen, rows)
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


def _print(about: Mapping[str, Any], chosen: Cases, rows: Sequence[Row]) -> None:
    for key, value in about.items():
        if value:
            print(f"{key.replace('_', ' ')}: {value}")
    lines: list[list[str]] = []
    for row, last in zip(rows, [None, *rows], strict=False):
        if last is None or last["case"] != row["case"]:
            lines.append([chosen[row["case"]].what])
        lines.append(_line(row))
    print_table("", ["", *COLUMNS, ""], lines)
    units = {part for row in rows for part in row["unit"].split(" + ")}
    for word, meaning in (COLUMNS | {unit: UNITS[unit] for unit in UNITS if unit in units}).items():
        print(f"{word}: {meaning}")


def _line(row: Row) -> list[str]:
    verdict = {True: "met", False: "MISSED", None: ""}[row["met"]]
    return [
        row["system"],
        *("" if row[key] is None else f"{1e3 * row[key]:.3f}" for key in ("median_s", "min_s")),
        "needs /proc" if math.isnan(row["value"]) else f"{row['value']:.3g} {row['unit']}",
        "" if row["bar"] is None else f"{row['bar']:g} {row['unit']}",
        verdict,
    ]
