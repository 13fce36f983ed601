"""A framework that is too old is refused in one line, by the floor that the metadata has."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import matrix
from gradclip.core.versions import require
from gradclip.kernels.gpu.launch import TRITON
from host import run_python

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
ASKED = sorted(
    {
        floor
        for file in (ROOT / "src").rglob("*.py")
        for floor in re.findall(r'^ *require\("([^"]+)"', file.read_text(), re.MULTILINE)
    }
)


@pytest.mark.parametrize("found", ["2.6", "2.6.0+cpu", "2.6.0a0+git12ab", "2.13.1", "3.0"])
def test_a_floor_is_met(found: str) -> None:
    require("torch>=2.6", found)


@pytest.mark.parametrize("found", ["2.5.1", "2.5.1+cu124", "1.13.1", "2"])
def test_below_the_floor_one_line_says_what_is_needed(found: str) -> None:
    with pytest.raises(
        ImportError, match=f"^{re.escape(f'gradclip needs torch>=2.6, this is torch {found}')}$"
    ):
        require("torch>=2.6", found)


def test_every_framework_that_is_asked_for_is_an_extra_with_this_floor() -> None:
    assert ASKED
    for floor in [*ASKED, TRITON]:
        name = floor.partition(">=")[0]
        # TensorFlow's builds for the CPU alone are a package too.
        every = {each.replace("-cpu", "") for extra in EXTRAS.values() for each in extra}
        floors = {each for each in every if re.split(r"[^\w.-]", each)[0] == name}
        # The tests may have one version alone.
        assert {each for each in floors if "==" not in each} == {floor}


@pytest.mark.parametrize("framework", matrix.PARTS)
def test_the_page_has_a_run_without_failures_with_the_lowest_version(framework: str) -> None:
    lowest = matrix.numbers(matrix.floor(framework))
    rows = [row for row in matrix.rows_of(matrix.PAGE.read_text()) if row.framework == framework]
    assert min(matrix.numbers(row.version) for row in rows) == lowest
    assert {row.failed for row in rows if matrix.numbers(row.version) == lowest} == {"0"}


def test_one_python_runs_the_lowest_and_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "pythons", lambda: {"3.12": Path("python3.12")})
    assert list(map(str, matrix.cells(["jax"]))) == [
        f"jax-{matrix.floor('jax')}@3.12",
        "jax-newest@3.12",
    ]


def test_a_row_takes_the_place_of_an_older_run_alone() -> None:
    page = "before\n<!-- matrix -->\n<!-- /matrix -->\nafter\n"
    rows = [
        matrix.Row("torch", version, python, "9", "1", failed, "2026-01-01", "a processor")
        for version, python, failed in (
            ("2.10.0", "3.13.0", "0"),
            ("2.6.0+cpu", "3.11.7", "2"),
            ("2.6.0+cpu", "3.12.1", "0"),
            ("2.6.0+cpu", "3.11.7", "0"),
        )
    ]
    for row in rows:
        page = matrix.with_row(page, row)
    assert matrix.rows_of(page) == [rows[3], rows[2], rows[0]]
    assert page.startswith("before\n<!-- matrix -->\n| framework | version |")
    assert page.endswith(f"{rows[0]}\n<!-- /matrix -->\nafter\n")


@pytest.mark.slow
@pytest.mark.parametrize("floor", ASKED)
def test_a_framework_below_the_floor_is_refused_by_its_door_and_at_its_first_array(
    floor: str,
) -> None:
    name = floor.partition(">=")[0]
    framework = pytest.importorskip(name)
    del framework
    code = f"""
        import {name}
        {name}.__version__ = "0.1"
        from gradclip.core import dispatch
        try:
            import gradclip.{name}
        except ImportError as error:
            print(error)
        if "{name}" in dispatch.backend_names():
            try:
                dispatch.load("{name}")
            except ImportError as error:
                print(error)
    """
    lines = set(run_python(code).stdout.splitlines())
    assert lines == {f"gradclip needs {floor}, this is {name} 0.1"}
