"""Regular files and nothing else: to open a FIFO or a device may wait for ever, or set it off."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

_OTHERS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link to itself",  # what is left where links have been followed
}


class State(NamedTuple):
    """Which file it is, whatever its names, and what tells that somebody has written to it."""

    device: int
    inode: int
    size: int
    modified: int


def state(file: Path | int) -> State:
    """The state of what has this path or descriptor."""
    found = os.stat(file)
    return State(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read, without a wait.

    Raises:
        ValueError: it is no regular file.
    """
    _check(path.stat().st_mode)
    with open(path, "rb", opener=_at_once) as stream:
        _check(os.fstat(stream.fileno()).st_mode)  # another may have come in between
        yield stream


if sys.platform == "win32":  # which has no FIFO among its files
    _NONBLOCK = 0
else:
    _NONBLOCK = os.O_NONBLOCK


def _at_once(name: str, flags: int) -> int:
    return os.open(name, flags | _NONBLOCK)


def _check(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"is {_OTHERS.get(stat.S_IFMT(mode))}, no regular file")


def other(path: Path) -> str | None:
    """What a path leads to; None for a regular file, and for nothing."""
    try:
        return _OTHERS.get(stat.S_IFMT(os.lstat(os.path.realpath(path)).st_mode))
    except FileNotFoundError:
        return None
