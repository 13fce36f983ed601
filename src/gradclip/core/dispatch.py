"""Leaf type to backend, by name: no framework is imported to find out.

A folder's name registers a backend: ``torch/backend.py`` serves every type one of whose bases is
defined in a module below ``torch``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from gradclip import _loaded
from gradclip.core.protocol import Backend
from gradclip.core.sparse import IndexedSlices
from gradclip.core.tree import Tree

# Types of these are arrays of another framework, wrap them, or send them.
_SERVED_BY = {"scipy": "numpy", "ml_dtypes": "numpy", "mpi4py": "numpy", "cupyx": "cupy"}

_names: dict[type, str | None] = {}


def backend_names() -> list[str]:
    """Every framework that has a room: a folder with a file ``backend.py``."""
    return sorted(
        entry.name
        for folder in sys.modules[__name__.partition(".")[0]].__path__
        for entry in os.scandir(folder)
        if os.path.exists(os.path.join(entry.path, "backend.py"))
    )


def backend_of(leaves: Sequence[Any], kinds: set[type], path: Callable[[int], str]) -> Backend:
    """The one backend that serves all leaves, of these types; NumPy's for no leaves at all.

    Raises:
        TypeError: a leaf is no array of a known framework, or leaves are of two frameworks.
    """
    if IndexedSlices in kinds:
        kinds = {type(_array(leaf)) for leaf in leaves}
    names = {_name(kind) for kind in kinds}
    if None in names:
        place = next(i for i, leaf in enumerate(leaves) if _name(type(_array(leaf))) is None)
        raise TypeError(
            f"{path(place)} is {type(_array(leaves[place])).__name__}; "
            f"every leaf must be an array of {' or '.join(backend_names())}"
        )
    if len(names) > 1:
        every = [_name(type(_array(leaf))) for leaf in leaves]
        place = next(place for place, name in enumerate(every) if name != every[0])
        raise TypeError(
            f"{path(0)} is of {every[0]} and {path(place)} is of {every[place]}; "
            "one call clips leaves of one framework"
        )
    return load(names.pop() or "numpy" if names else "numpy")


def backend_of_group(group: Any) -> Backend | None:
    """The backend for a worker of a group that has no leaves; None if the type does not tell."""
    name = _name(type(group))
    return None if name is None else load(name)


def is_compiled(t_list: Any) -> bool:
    """If the compiler of PyTorch looks into a call, and no operation of ours has made it."""
    # While another thread imports PyTorch not all of it is there; its compiler comes last.
    if _loaded.dynamo is None or type(t_list) is Tree:
        return False
    import torch

    # Where it has broken a graph it looks into each function that is called next.
    looks = torch._C._dynamo.eval_frame.get_eval_frame_callback
    return torch.compiler.is_compiling() or looks() is not None


def backends_of(leaves: Sequence[Any]) -> list[Backend]:
    """The backends of those leaves that are served at all."""
    names = {_name(type(leaf)) for leaf in leaves}
    return [load(name) for name in sorted(name for name in names if name is not None)]


def is_defined_by_framework(kind: type) -> bool:
    """If a type is one of a framework's own, and none that is derived from it elsewhere."""
    return _name(kind) == kind.__module__.partition(".")[0]


def load(name: str) -> Backend:
    """Import the backend of a framework."""
    return cast(Backend, importlib.import_module(f"gradclip.{name}.backend"))


def _array(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, IndexedSlices) else leaf


def _name(kind: type) -> str | None:
    # A plain dict: functools.lru_cache would break torch.compile(fullgraph=True).
    if kind not in _names:
        known = backend_names()
        roots = (base.__module__.partition(".")[0] for base in kind.__mro__)
        served = (_SERVED_BY.get(root, root) for root in roots)
        _names[kind] = next((root for root in served if root in known), None)
    return _names[kind]
