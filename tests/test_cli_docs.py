"""What the pages of commands say of --json: every field that is printed, and no other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli_files import run_main, save
from gradclip.cli import COMMANDS
from gradclip.cli.demo import network
from recorded import planted, write
from test_cli_check import only_numpy  # noqa: F401  (a fixture)

PAGES = Path(__file__).parent.parent / "docs" / "commands"


def documented(command: str) -> set[str]:
    """The fields in the tables of a command's page."""
    page = (PAGES / f"{command}.md").read_text()
    tables = re.findall(r"^\| field \|.*\n\|.*\n((?:\|.*\n)+)", page, re.M)
    return {field for table in tables for field in re.findall(r"^\| `([^`]+)` \|", table, re.M)}


def fields(value: Any, path: str = "") -> Iterator[str]:
    """The path of everything in a report that is no object or list."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from fields(item, f"{path}.{key.replace('.', '_')}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from fields(item, f"{path}[]")
    else:
        yield path


def check(command: str, *runs: tuple[Any, ...]) -> None:
    printed: set[str] = set()
    for arguments in runs:
        status, out, _ = run_main(command, *arguments, "--json")
        assert status in (0, 1)
        report = json.loads(out)
        assert next(iter(report)) == "version"
        assert report["version"] == 1
        printed |= {*fields(report)}
    said = documented(command)
    assert {each for each in printed if not any(matches(each, one) for one in said)} == set()
    assert {one for one in said if not any(matches(each, one) for each in printed)} == set()


def matches(field: str, said: str) -> bool:
    return fnmatchcase(field, said.replace("[]", "[[][]]"))


def test_every_command_has_a_page() -> None:
    assert {page.stem for page in PAGES.iterdir()} == set(COMMANDS)


def test_norm_and_clip(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npz", {"w": np.float32([[3, 4]]), "step": np.array([7])})
    check("norm", (source, source, tmp_path / "none.npy"))
    check("clip", (source, "--clip-norm", 1, "-o", tmp_path / "o.npz"))


def test_compare(tmp_path: Path) -> None:
    shared = {"w": np.ones((2, 2)), "n": np.array([1])}
    first = save(tmp_path / "a.npz", shared | {"x": np.ones(1), "s": np.ones(1)})
    second = save(tmp_path / "b.npz", shared | {"y": np.ones(1), "s": np.ones(2)})
    check("compare", (first, second))


@pytest.mark.slow
def test_report_and_watch(tmp_path: Path) -> None:
    path = write(tmp_path / "run.db", planted(6000), every=10, limit=4.0)
    check("report", (path,))
    check("watch", (path,))


def test_env() -> None:
    check("env", ())


@pytest.mark.usefixtures("only_numpy")
def test_check() -> None:
    check("check", ())


@pytest.mark.slow
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "HIDDEN", 8)
    picture = ("--steps", 2, "--out", tmp_path / "demo.png")
    check("demo", picture, (*picture, "--limits"))


@pytest.mark.long
def test_bench() -> None:
    check("bench", ("--case", "small-keep"))


@pytest.mark.parametrize(
    ("report", "found"),
    [
        ({"a": 1, "b": {"c": [1, 2]}}, {"a", "b.c[]"}),
        ({"t": [{"n": 1.5}, {"m": None}]}, {"t[].n", "t[].m"}),
        ({"l": [], "x": math.pi}, {"x"}),
    ],
)
def test_the_fields_of_a_report(report: Any, found: set[str]) -> None:
    assert {*fields(report)} == found
