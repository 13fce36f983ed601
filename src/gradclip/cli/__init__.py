"""The command line: one file per sub-command, each with ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import gradclip
from gradclip.cli._console import CliError, fail

COMMANDS = {
    "norm": "print the norm of each tensor in a file, and the global norm of all",
    "clip": "write a copy of a file whose tensors have at most a given global norm",
    "compare": "print the norm of the difference of each tensor in two files, and of all",
    "demo": "train a small network with and without clipping, and draw both",
    "check": "compare the norms of gradclip and of other libraries with exact arithmetic",
    "bench": "time gradclip against other libraries, side by side",
    "report": "write what happened in a run as one HTML page",
    "watch": "follow a run in the terminal while it goes on",
    "env": "show versions, processor, kernel, threads and backends",
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        raise CliError(f"{message}; see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own says nothing where help or version cannot be written
        print(message, end="", file=file or sys.stdout, flush=True)


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Build the argument parser of the command line; only the sub-command in it is imported."""
    top = _Parser(
        prog="gradclip",
        description="Clip tensors by their global norm, correctly rounded.",
        epilog="example: gradclip norm gradients.safetensors",
    )
    top.add_argument("--version", action="version", version=f"gradclip {gradclip.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in argv:
            _declare(sub, importlib.import_module(f"gradclip.cli.{name}"))
    return top


def _declare(sub: argparse.ArgumentParser, module: ModuleType) -> None:
    sub.description = module.__doc__
    sub.epilog = f"example: {module.EXAMPLE}"
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
    module.add_arguments(sub)
    sub.set_defaults(run=module.run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 for a failed check, 2 for bad usage."""
    if sys.stderr is None:  # it was closed, and a file opened now would take its place
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        return fail("standard output is closed", 2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the encoding is not UTF-8
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except CliError as error:
        return fail(str(error), error.status)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:
        _drop_output()  # the reader (head, less) has gone
        return 0
    except OSError as error:
        if error.filename is None:
            _drop_output()  # it may be the output that cannot be written
        where = "" if error.filename is None else f"{error.filename}: "
        return fail(f"{where}{error.strerror or error}", 2)
    return status


def _run(argv: Sequence[str]) -> int:
    top = parser(argv)
    if not argv:  # no mistake, but somebody who wants to know what there is
        top.print_help()
        return 0
    args = top.parse_args(argv)
    status: int = args.run(args)
    return status


def _drop_output() -> None:
    """Have what is still buffered go nowhere: Python would fail again to write it at its end."""
    with contextlib.suppress(io.UnsupportedOperation):  # standard output is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
