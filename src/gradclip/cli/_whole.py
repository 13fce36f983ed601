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

if sys.platform == "win32":  # which has no terminal that hangs up
    _ENDING = (signal.SIGTERM,)
else:
    _ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A path to create a file or folder at, which is renamed to ``out`` at the end.

    On an error or signal nothing is left behind. Whoever uses it sees to it that what it has
    written is on the disk: by `created`, or by `to_disk`.
    """
    with _terminable(), tempfile.TemporaryDirectory(dir=out.parent, prefix=".gradclip-") as folder:
        new = Path(folder) / out.name
        yield new
        new.replace(out)
        to_disk(out.parent)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let signals that end a job (a batch system's, a lost terminal's) clean up, as Ctrl-C does."""
    # Under nohup a signal is ignored, and stays so.
    ending = [n for n in _ENDING if signal.getsignal(n) is signal.SIG_DFL]
    for number in ending:
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def created(path: Path, like: Path, replaced: Path | None = None) -> Iterator[IO[bytes]]:
    """Write a new file, which is on the disk at the end.

    It is no more readable to others than ``like`` is; or, exactly, as ``replaced`` is.
    """
    mode = like.stat().st_mode & 0o777
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        if replaced:
            os.chmod(path, replaced.stat().st_mode & 0o777)
        yield file
        file.flush()
        os.fsync(file.fileno())


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, has reached the disk."""
    if sys.platform == "win32":
        if path.is_dir():  # of which only an administrator's process has a handle to flush
            return
        handle = os.open(path, os.O_RDWR)  # it flushes only what may be written
    else:
        handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
