"""Writing a file or folder that comes to be whole or not at all."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A path to create a file or folder at, which is renamed to ``out`` at the end.

    On an error or signal nothing is left behind. Whoever uses it calls `to_disk` on what it has
    written.
    """
    with _terminable(), tempfile.TemporaryDirectory(dir=out.parent, prefix=".gradclip-") as folder:
        new = Path(folder) / out.name
        yield new
        new.replace(out)
        to_disk(out.parent)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM clean up, as Ctrl-C does: a batch system ends a job by it."""
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def create_like(path: Path, model: Path) -> IO[bytes]:
    """Open a new file that is no more readable to others than ``model`` is."""
    mode = model.stat().st_mode & 0o777
    return open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode))


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
