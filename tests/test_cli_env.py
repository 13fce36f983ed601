"""``gradclip env``: what it says of versions, kernels, threads and backends."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from typing import Any

import numpy as np
import pytest

import cli_files
import gradclip
from cli_files import run_main
from gradclip.cli import env
from gradclip.core.rooms import backend_names
from gradclip.kernels import cpu
from gradclip.kernels.cpu import threads as team


def report() -> dict[str, Any]:
    status, out, err = run_main("env", "--json")
    assert (status, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_versions() -> None:
    found = report()["versions"]
    assert found["gradclip"] == gradclip.__version__
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__
    assert found["optree"] == importlib.metadata.version("optree")


def test_the_kernel_and_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCLIP_NUM_THREADS", "3")
    found = report()
    assert found["kernel"] == cpu.kernel()
    assert found["kernel"] in found["kernels"]
    assert found["xla_calls_kernel"] is (cpu.kernel() != "numpy")
    assert (found["threads"], found["threads_from"]) == (3, "GRADCLIP_NUM_THREADS")
    monkeypatch.delenv("GRADCLIP_NUM_THREADS")
    found = report()
    assert found["threads"] == team.number()
    assert found["threads_from"] == "the processors this process may use"


def test_without_the_c_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report()["why_numpy"] is None
    monkeypatch.setattr(cpu, "_cpu", None)
    monkeypatch.setattr(cpu, "_why_numpy", "was not built")
    found = report()
    assert (found["kernel"], found["kernels"]) == ("numpy", ["numpy"])
    assert found["why_numpy"] == "was not built"
    assert found["xla_calls_kernel"] is False
    table = run_main("env")[1]
    assert "the C kernel was not built: NumPy does its work" in table
    assert "XLA does the work by its own operations" in table


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(report()["backends"]) == backend_names()
    monkeypatch.setattr("gradclip.cli.env.backend_names", lambda: ["numpy", "no_such_framework"])
    assert report()["backends"] == {"numpy": True, "no_such_framework": False}
    assert "backend no_such_framework  not installed" in run_main("env")[1]


def test_no_framework_is_imported() -> None:
    code = (
        "import sys; from gradclip.cli import main; main(['env']); "
        "assert not {'torch', 'jax', 'tensorflow', 'keras', 'optax'} & set(sys.modules)"
    )
    assert cli_files.run([sys.executable, "-c", code]).returncode == 0


def test_the_table_names_everything() -> None:
    status, out, err = run_main("env")
    assert (status, err) == (0, "")
    for name in (
        *report()["versions"],
        "system",
        "processor",
        "kernel",
        "under jax.jit",
        "threads",
    ):
        assert f"\n {name} " in out


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (
            "cpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n\nmodel\t\t: 2",
            "AMD EPYC (family 25, model 1)",
        ),
        ("model name\t: ARMv7 Processor rev 3", "ARMv7 Processor rev 3"),
        ("CPU part\t: 0xd0c", "aarch64"),
        (None, "aarch64"),
    ],
)
def test_the_processor(monkeypatch: pytest.MonkeyPatch, lines: str | None, name: str) -> None:
    def read(_: object) -> str:
        if lines is None:
            raise FileNotFoundError
        return lines

    monkeypatch.setattr("gradclip.cli.env.Path.read_text", read)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert env._processor() == name


def test_a_wrong_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCLIP_NUM_THREADS", "0")
    message = "gradclip: GRADCLIP_NUM_THREADS is '0'; it must be a number above 0\n"
    assert run_main("env") == (2, "", message)
