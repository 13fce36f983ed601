"""Show what gradclip runs on: versions, processor, kernel, threads, and which backends can be used.

Nothing is imported to find out: "importable" says that Python finds the framework.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradclip
from gradclip.cli._console import CliError, print_json, print_table
from gradclip.core.rooms import backend_names
from gradclip.kernels import cpu
from gradclip.kernels.cpu import threads

EXAMPLE = "gradclip env --json"

_PACKAGES = (
    "numpy",
    "optree",
    "ml_dtypes",
    "scipy",
    "torch",
    "triton",
    "tensorflow",
    "jax",
    "optax",
    "keras",
)


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """``gradclip env`` has no options of its own."""


def run(args: argparse.Namespace) -> int:
    """Show the environment."""
    found = facts()
    if args.json:
        print_json(found)
    else:
        print_table("", ("", ""), list(_rows(found)), text=2)
    return 0


def facts() -> dict[str, Any]:
    """Versions, processor, kernel, threads and backends."""
    try:
        number = threads.number()
    except ValueError as error:
        raise CliError(str(error)) from None
    return {
        "versions": {
            "gradclip": gradclip.__version__,
            "python": platform.python_version(),
            **_versions(),
        },
        "system": platform.platform(),
        "processor": _processor(),
        "kernel": cpu.kernel(),
        "why_numpy": cpu.why_numpy(),
        "kernels": _kernels(),
        "xla_calls_kernel": bool(cpu.xla_handlers()),
        "threads": number,
        "threads_from": _threads_from(),
        "backends": {name: find_spec(name) is not None for name in backend_names()},
    }


def _versions() -> dict[str, str | None]:
    # A module's distribution may have another name: tensorflow comes from tensorflow_cpu too.
    distributions = packages_distributions()
    return {
        name: version(distributions[name][0]) if name in distributions else None
        for name in _PACKAGES
    }


def _processor() -> str:
    """The name of the processor, as far as the system tells it.

    Some virtual machines name no more than a brand: the family and model of x86 tell which it is.
    """
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= {*found}:
        return f"{name} (family {found['cpu family']}, model {found['model']})"
    return name


def _kernels() -> list[str]:
    if cpu.kernel() == "numpy":
        return ["numpy"]
    import gradclip.kernels.cpu._cpu as _cpu  # noqa: PLR0402

    return [*_cpu.kernels()]


def _threads_from() -> str:
    if "GRADCLIP_NUM_THREADS" in os.environ:
        return "GRADCLIP_NUM_THREADS"
    return "the processors this process may use"


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, found in facts["versions"].items():
        yield name, found or "not installed"
    yield "system", facts["system"]
    yield "processor", facts["processor"]
    if facts["kernel"] == "numpy":
        why = facts["why_numpy"]
        yield "kernel", f"the C kernel {why}: NumPy does its work, with the same bits"
    else:
        yield "kernel", f"{facts['kernel']} (of {', '.join(facts['kernels'])})"
    if facts["xla_calls_kernel"]:
        yield "under jax.jit", "XLA calls the kernel on the CPU; elsewhere its own operations"
    else:
        yield "under jax.jit", "XLA does the work by its own operations, with the same bits"
    yield "threads", f"{facts['threads']} ({facts['threads_from']})"
    for name, found in facts["backends"].items():
        yield f"backend {name}", "importable" if found else "not installed"
