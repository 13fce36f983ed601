"""The frameworks that have a room: a folder with a file ``backend.py``, in any of the package's.

Its name is that of the framework's root module. Nothing of a framework is imported to find it.

``trees`` is an attribute of this module that is looked up when it is asked for: the `Nests` of the
frameworks that somebody has imported. A compiler that looks into `flatten` takes an attribute of a
module as it finds it, where it would follow a function into `sys.modules`.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

_rooms: list[str] = []
_with_tree: list[str] = []


def backend_names() -> list[str]:
    """Every framework that has a room; they are looked for once."""
    if not _rooms:
        package = sys.modules[__name__.partition(".")[0]]
        folders = [folder for path in package.__path__ for folder in os.scandir(path)]
        rooms = [folder for folder in folders if _has(folder, "backend.py")]
        _with_tree[:] = [room.name for room in rooms if _has(room, "tree.py")]
        _rooms[:] = sorted(room.name for room in rooms)
    return _rooms


def _has(folder: os.DirEntry[str], name: str) -> bool:
    return os.path.exists(os.path.join(folder, name))


def __getattr__(name: str) -> Any:
    if name != "trees":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _rooms:
        backend_names()
    loaded = [room for room in _with_tree if room in sys.modules]
    if not loaded:
        return ()
    trees = tuple(importlib.import_module(f"gradclip.{room}.tree") for room in loaded)
    if len(loaded) == len(_with_tree):  # no other can come
        globals()["trees"] = trees
    return trees
