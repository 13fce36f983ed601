"""What type checkers say of the public names, and running of the same: the files of `typing/`.

In each, what has to be accepted stands as it is, and what has to be refused has a comment for mypy
and one for pyright, of which both say when there is nothing to ignore.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import runpy
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ROOT / "tests/typing"
NEEDED = {
    "groups": ("torch", "mpi4py"),
    "jax": ("jax",),
    "keras": ("keras",),
    "limits": (),
    "numpy": (),
    "optax": ("optax",),
    "record": (),
    "tensorflow": ("tensorflow",),
    "torch": ("torch",),
    "trainers": ("lightning", "transformers"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
@pytest.mark.parametrize("name", NEEDED)
def test_values_are_of_the_types_that_are_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without(*NEEDED[name])
    monkeypatch.syspath_prepend(FILES)
    runpy.run_path(str(FILES / f"of_{name}.py"))


def test_every_file_is_run() -> None:
    assert {f"of_{name}.py" for name in NEEDED} == {path.name for path in FILES.glob("of_*.py")}


@pytest.mark.long
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_find_what_is_told(checker: str) -> None:
    skip_without(*itertools.chain(*NEEDED.values()))
    arguments = ["tests/typing"] if checker == "mypy" else ["--pythonpath", sys.executable]
    check(ROOT, checker, *arguments)


@pytest.mark.long
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
@pytest.mark.parametrize("name", ["numpy", "jax", "torch"])
def test_a_framework_that_is_not_installed_hides_no_other(
    checker: str, name: str, tmp_path: Path
) -> None:
    skip_without(name)
    venv.create(tmp_path / "env", symlinks=True)
    (packages,) = tmp_path.glob("env/lib/python*/site-packages")
    (packages / "gradclip").symlink_to(ROOT / "src/gradclip")
    for each in {name, "numpy", "optree", "pytest", "_pytest"}:
        spec = importlib.util.find_spec(each)
        assert spec is not None
        assert spec.origin is not None
        (packages / each).symlink_to(Path(spec.origin).parent)
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    if checker == "mypy":
        python = str(tmp_path / "env/bin/python")
        check(tmp_path, "mypy", "--strict", "--python-executable", python, f"of_{name}.py")
        return
    settings = {
        "enableTypeIgnoreComments": False,
        "include": [f"of_{name}.py"],
        "reportUnnecessaryTypeIgnoreComment": "error",
        "venv": "env",
        "venvPath": ".",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    check(tmp_path, "pyright")


def skip_without(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


def check(folder: Path, checker: str, *arguments: str) -> None:
    command = [sys.executable, "-m", checker, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout + done.stderr
