"""Leaf type to backend, by name: no framework is imported to find out.

A folder's name registers a backend: ``numpy/backend.py`` serves every type one of whose bases is
defined in a module below ``numpy``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

from gradclip.core.memory import Lesson
from gradclip.core.protocol import Backend
from gradclip.core.rooms import backend_names
from gradclip.core.sparse import IndexedSlices

# Types of these are arrays of NumPy, wrap them, or send them.
_SERVED_BY = {"scipy": "numpy", "ml_dtypes": "numpy", "mpi4py": "numpy"}
# With one of these behind its name a framework calls a second package of its own.
_ENDINGS = ("x", "lib")

_names: dict[type, str | None] = {}
_loaded: dict[str, ModuleType] = {}


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


def backends_of(leaves: Sequence[Any]) -> list[Backend]:
    """The backends of those leaves that are served at all."""
    names = {_name(type(leaf)) for leaf in leaves}
    return [load(name) for name in sorted(name for name in names if name is not None)]


def is_inert(value: Any) -> bool:
    """If to read a limit runs no code but Python's own or a framework's, which changes no leaf."""
    kind = type(value)
    if value is None or kind is float or kind is int or issubclass(kind, Lesson):
        return True
    root = kind.__module__.partition(".")[0]
    return _name(kind) in (root, *map(root.removesuffix, _ENDINGS))


def may_be_followed(value: Any) -> bool:
    """If a limit is inert, or of a type that somebody has derived from a framework's."""
    return is_inert(value) or _name(type(value)) is not None


def load(name: str) -> Backend:
    """Import the backend of a framework."""
    if name not in _loaded:
        _loaded[name] = importlib.import_module(f"gradclip.{name}.backend")
    return cast(Backend, _loaded[name])


def _array(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, IndexedSlices) else leaf


def _name(kind: type) -> str | None:
    # A plain dict: functools.lru_cache would break torch.compile(fullgraph=True).
    if kind not in _names:
        known = backend_names()
        roots = [base.__module__.partition(".")[0] for base in kind.__mro__]
        served = [_SERVED_BY.get(root, root) for root in roots]
        served += [root.removesuffix(ending) for root in roots for ending in _ENDINGS]
        _names[kind] = next((root for root in served if root in known), None)
    return _names[kind]
