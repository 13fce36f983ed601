"""Cases measured: in processes of their own, the systems of each in turns."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from gradclip.cli._console import CliError
from gradclip.cli.bench.cases import CASES, Bar, Case, Fresh, Turns
from gradclip.cli.bench.contenders import Call
from gradclip.kernels.cpu import threads as team

REPEATS, QUICK_REPEATS, QUICK_SHRINK = 21, 3, 20
# A call this short, in seconds, is repeated in a row.
BATCH = 0.01
# The helper threads of a system spin for some time before they sleep, at the cost of the next
# system: so wait, in pauses of so many seconds, until this process takes no processor time.
PAUSE, PAUSES = 0.02, 50

Row = dict[str, Any]


def threads_of(name: str) -> int:
    """The number of threads that a case is measured with."""
    case = CASES[name]
    return (case.threads if isinstance(case, Case) else None) or team.number()


def in_process(names: Sequence[str], count: int, *, quick: bool) -> Iterator[list[Row]]:
    """The rows of each case, measured in one new process where all take ``count`` threads."""
    variables = ("GRADCLIP", "OPENBLAS", "OMP", "MKL")
    environment = {**os.environ, **{f"{name}_NUM_THREADS": str(count) for name in variables}}
    environment["TF_NUM_INTRAOP_THREADS"] = str(count)
    code = (
        "from gradclip.cli.bench.measuring import measure_all; "
        f"measure_all({names!r}, quick={quick})"
    )
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
