"""Run each framework's part of the suite with its lowest version and with its newest.

    python tests/matrix.py                    # both, of every framework
    python tests/matrix.py torch jax-newest   # both of one, the newest of another
    python tests/matrix.py torch-2.8@3.12     # one version, on one Python

Each is a virtual environment in `.matrix/`, into which gradclip is installed as its users do. The
lowest versions are those of `pyproject.toml`, on the oldest Python that is on this machine; the
newest are what pip finds, on the newest. The table of docs/versions.md takes each result.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import builds

ROOT = Path(__file__).parent.parent
PLACE = ROOT / ".matrix"
PAGE = ROOT / "docs/versions.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Part(NamedTuple):
    """What a framework's cells consist of."""

    tests: Sequence[str]  # files in tests/
    beside: Sequence[str] = ()  # what these tests need besides the framework
    package: str | None = None  # where it has another name than the framework
    first: Sequence[str] = ()  # of what is beside, installed as the framework is, each alone


PARTS = {
    "numpy": Part(
        tests=(
            *("test_arrays.py", "test_bits.py", "test_each.py", "test_oracle.py"),
            *("test_overlap.py", "test_rooms.py", "test_spec.py", "test_process.py"),
            *("test_limits.py", "test_norms.py", "test_record.py", "test_report.py"),
            *("test_watch.py", "test_cli_[cemn]*.py", "test_interpreters.py"),
        ),
    ),
    "jax": Part(tests=("test_jax.py", "test_limits_jax.py", "test_norms_jax.py")),
    "optax": Part(tests=("test_optax*.py", "test_limits_jax.py", "test_norms_jax.py")),
    "tensorflow": Part(tests=("test_*tensorflow.py",), package="tensorflow-cpu"),
    "keras": Part(
        tests=("test_*keras.py",),
        beside=("jax", "tensorflow-cpu", "torch"),
        first=("torch",),
    ),
    "torch": Part(
        tests=(
            *("test_torch*.py", "test_limits_torch.py", "test_norms.py", "test_trainer_records.py"),
            *("test_cuda.py", "test_limits_cuda.py", "test_overlap.py", "test_spec.py"),
            *("test_distributed.py", "test_limits_distributed.py", "test_cli_checkpoints.py"),
        ),
        beside=("accelerate", "lightning", "transformers"),
    ),
}
# What the suite itself needs.
BESIDE = ("hypothesis", "pytest", "pytest-xdist", "scipy")


class Cell(NamedTuple):
    """One run."""

    framework: str
    version: str  # or "newest"
    python: str

    def __str__(self) -> str:
        return f"{self.framework}-{self.version}@{self.python}"


class Row(NamedTuple):
    """A line of the table."""

    framework: str
    version: str
    python: str
    passed: str
    skipped: str
    failed: str
    date: str
    processor: str

    def __str__(self) -> str:
        return f"| {' | '.join(self)} |"


# ---- which ----


def requirement(name: str) -> str:
    """What `pyproject.toml` asks of a package, in the first of its lists that does."""
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    every = itertools.chain.from_iterable(lists)
    return next(each for each in every if re.split(r"[^\w.-]", each)[0] == name)


def floor(framework: str) -> str:
    """The lowest version."""
    return requirement(framework).partition(">=")[2]


def pythons() -> dict[str, Path]:
    """The interpreters that gradclip runs on, from the oldest: of pyenv, or on the path."""
    found = {}
    folder = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    lowest = int(PROJECT["requires-python"].rpartition(".")[2])
    for minor in range(lowest, lowest + 10):
        name = f"python3.{minor}"
        of_pyenv = [*folder.glob(f"3.{minor}.*/bin/{name}")]
        on_path = shutil.which(name)
        if of_pyenv or on_path:
            found[f"3.{minor}"] = of_pyenv[-1] if of_pyenv else Path(on_path or "")
    return found


def cells(wishes: Sequence[str]) -> Iterator[Cell]:
    """The cells that are wished for; of every framework two, if none is."""
    there = [*pythons()]
    oldest, newest = there[0], there[-1]
    for wish in wishes or PARTS:
        name, _, python = wish.partition("@")
        framework, _, version = name.partition("-")
        if framework not in PARTS:
            sys.exit(f"{wish!r} is none of {', '.join(PARTS)}, as in {framework}-newest@{newest}")
        for each in [version] if version else [floor(framework), "newest"]:
            yield Cell(framework, each, python or (newest if each == "newest" else oldest))


# ---- one of them ----


def run(cell: Cell) -> Row:
    """Install, test, and say what came of it."""
    part = PARTS[cell.framework]
    python = environment(cell, part)
    facts = json.loads(output(python, "-m", "gradclip", "env", "--json"))
    if facts["kernel"] == "numpy":
        sys.exit(f"{cell}: the C kernel {facts['why_numpy']}")
    report = PLACE / f"{cell}.xml"
    files = sorted({str(file) for name in part.tests for file in (ROOT / "tests").glob(name)})
    command = [python, "-m", "pytest", "-n", "auto", "--dist", "worksteal", "-m", "not long"]
    done = subprocess.run([*command, f"--junitxml={report}", *files], cwd=ROOT, check=False)
    if done.returncode not in (0, 1):  # of which 1 is that a test has failed
        sys.exit(f"{cell}: pytest has ended with {done.returncode}")
    counts = next(ET.parse(report).iter("testsuite")).attrib
    failed = int(counts["failures"]) + int(counts["errors"])
    skipped = int(counts["skipped"])
    return Row(
        cell.framework,
        facts["versions"][cell.framework],
        facts["versions"]["python"],
        str(int(counts["tests"]) - failed - skipped),
        str(skipped),
        str(failed),
        datetime.date.today().isoformat(),
        facts["processor"],
    )


def environment(cell: Cell, part: Part) -> str:
    """The interpreter of a new virtual environment with all that a cell needs."""
    place = PLACE / str(cell)
    subprocess.run([pythons()[cell.python], "-m", "venv", "--clear", place], check=True)
    python = str(place / "bin/python")
    package = part.package or cell.framework
    pinned = package if cell.version == "newest" else f"{package}=={cell.version}"
    install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    # First and alone: so pip prefers a build for the CPU, where an index has one.
    for alone in (*map(requirement, part.first), pinned):
        subprocess.run([*install, alone], check=True)
    version = output(python, "-c", f"from importlib.metadata import *; print(version({package!r}))")
    with tempfile.TemporaryDirectory() as folder:
        builds.copy_tree(Path(folder))
        beside = map(requirement, (*BESIDE, *part.beside))
        subprocess.run([*install, f"{package}=={version}", f"{folder}[cli]", *beside], check=True)
    return python


def output(*command: str) -> str:
    """What a program prints."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


# ---- the table ----

TABLE = re.compile(r"(?<=<!-- matrix -->\n)(.*?)(?=<!-- /matrix -->)", re.DOTALL)


def rows_of(page: str) -> list[Row]:
    """The rows that a page has."""
    found = TABLE.search(page)
    assert found, f"{PAGE.name} has no <!-- matrix --> and <!-- /matrix -->"
    lines = found.group().splitlines()[2:]
    return [Row(*line.strip("| ").split(" | ")) for line in lines]


def with_row(page: str, row: Row) -> str:
    """A page with one more row, in the place of an older one of the same versions."""
    kept = [each for each in rows_of(page) if each[:3] != row[:3]]
    return TABLE.sub(table([*kept, row]), page)


def table(rows: list[Row]) -> str:
    """Rows as Markdown, in the order of frameworks and versions."""
    head: Any = (" | ".join(Row._fields), " | ".join("-" * len(name) for name in Row._fields))
    lines = [*(f"| {line} |" for line in head), *map(str, sorted(rows, key=order))]
    return "".join(f"{line}\n" for line in lines)


def order(row: Row) -> tuple[Any, ...]:
    """By framework, then by the numbers of the versions."""
    return row.framework, numbers(row.version), numbers(row.python)


def numbers(version: str) -> tuple[int, ...]:
    """What a version counts, without zeros at its end: 2.6 and 2.6.0 are one."""
    found = re.match(r"[\d.]+", version)
    return tuple(map(int, re.sub(r"(\.0)*\.?$", "", found[0] if found else "0").split(".")))


def main() -> None:
    """Run the cells that the command line names; exit with 1 where a test failed."""
    print(f"Pythons: {', '.join(map(str, pythons().values()))}", flush=True)
    ran = []
    for cell in list(cells(sys.argv[1:])):
        print(f"{cell}: installing", flush=True)
        row = run(cell)
        print(row, flush=True)
        ran.append(row)
        PAGE.write_text(with_row(PAGE.read_text(), row))
    print(table(ran))
    sys.exit(any(row.failed != "0" for row in ran))


if __name__ == "__main__":
    main()
