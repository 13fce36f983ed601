"""What all commands share: help, version, what is not installed, and outputs that fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cli_files
import gradclip
from cli_files import run_main, run_process, save
from gradclip.cli import COMMANDS, main

VERSION = f"gradclip {gradclip.__version__}\n"


def stopped(*arguments: str) -> int:
    """The status of a command line that prints help or its version."""
    with pytest.raises(SystemExit) as found:
        main([*arguments])
    assert isinstance(found.value.code, int)
    return found.value.code


def test_bare_it_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    bare = capsys.readouterr()
    assert stopped("--help") == 0
    assert capsys.readouterr() == bare
    assert not bare.err
    for name in COMMANDS:
        assert f"\n    {name} " in bare.out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped("--version") == 0
    assert capsys.readouterr() == (VERSION, "")
    done = run_process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, VERSION, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_cannot_be_imported_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setitem(sys.modules, f"gradclip.cli.{name}", None)
    for arguments in (["--version"], ["--help"]):
        assert stopped(*arguments) == 0
    assert main([]) == 0
    assert capsys.readouterr().out.startswith(VERSION)
    with pytest.raises(ModuleNotFoundError):
        main([name])


def test_the_version_imports_no_command() -> None:
    code = (
        "import sys; from gradclip.cli import COMMANDS, main\n"
        "try: main(['--version'])\n"
        "except SystemExit: print([n for n in COMMANDS if f'gradclip.cli.{n}' in sys.modules])"
    )
    assert cli_files.run([sys.executable, "-c", code]).stdout == f"{VERSION}[]\n"


# ---- without extras ----

# Runs the command line where nothing but what gradclip requires can be imported.
BARE = """
import sys
for name in ("rich safetensors ml_dtypes bokeh matplotlib scipy torch triton tensorflow keras jax "
             "jaxlib optax cupy").split():
    sys.modules[name] = None
from gradclip.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run_bare(*arguments: object) -> subprocess.CompletedProcess[str]:
    return cli_files.run([sys.executable, "-c", BARE, *arguments])


@pytest.mark.slow
def test_tables_and_files_of_numpy_need_no_extra(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npz", {"w": np.float32([3, 4]), "step": np.array(7)})
    out = tmp_path / "o.npz"
    for arguments in (
        ("norm", source),
        ("norm", source, "--json"),
        ("clip", source, "--clip-norm", 1, "-o", out, "--force"),
    ):
        done = run_bare(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == run_main(*arguments)
        assert done.returncode == 0
    found = run_bare("env")
    assert (found.returncode, found.stderr) == (0, "")
    # In this process there is a room more, of the tests' own.
    full = [line for line in run_main("env")[1].splitlines() if "toyarrays" not in line]
    lines = found.stdout.splitlines()
    assert [line[:20] for line in lines] == [line[:20] for line in full]
    assert f" gradclip            {gradclip.__version__}" in lines
    assert " backend torch       not installed" in lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        (("norm", "a.safetensors"), "safetensors"),
        (("clip", "a.safetensors", "--clip-norm", 1, "-o", "o.safetensors"), "safetensors"),
        (("check",), "ml_dtypes"),
        (("bench",), "ml_dtypes"),
        (("demo",), "matplotlib"),
    ],
)
def test_what_needs_an_extra_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], module: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("a.safetensors"), {"w": np.float32([3, 4])})
    done = run_bare(*arguments)
    message = f"gradclip: {module} is not installed: pip install {module} (all: gradclip[cli])\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


# ---- outputs that fail ----

PRINTS = [("--help",), ("--version",), (), ("norm", "--help"), ("env",), ("env", "--json")]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", PRINTS)
def test_a_full_disk(arguments: tuple[str, ...], unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            cli_files.command(*arguments),
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (2, b"gradclip: No space left on device\n")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", PRINTS)
def test_a_closed_output(arguments: tuple[str, ...]) -> None:
    done = cli_files.run(["sh", "-c", '"$@" >&-', "sh", *cli_files.command(*arguments)])
    assert (done.returncode, done.stderr) == (2, "gradclip: standard output is closed\n")


@pytest.mark.slow
def test_where_errors_cannot_be_told_the_status_is_the_same(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npy", {"a": np.float32([3, 4])})
    for path in (source, source, tmp_path / "no.npy"):
        command = cli_files.command("norm", path, source)
        done = cli_files.run(["sh", "-c", '"$@" 2>&-', "sh", *command])
        told = run_main("norm", path, source)
        assert (done.returncode, done.stdout) == told[:2]
