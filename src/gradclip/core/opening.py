"""The first look at what was passed: its leaves, the backend that serves them, the workers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

from gradclip.core.dispatch import backend_of, backend_of_group, backends_of
from gradclip.core.protocol import Backend
from gradclip.core.tree import Tree, flatten
from gradclip.core.workers import Joint, Workers


def taking_part(workers: Workers | None) -> contextlib.AbstractContextManager[Joint | None]:
    """This worker's part in a measurement; none where it is alone."""
    return contextlib.nullcontext() if workers is None else Joint(workers)


class Opening:
    """The look at what was passed, until it is known who the other workers are.

    Within ``with`` an error is told to them as soon as there is a way: to those of a group from the
    start; where none is named, to the `workers` once they are known, and before to those whom the
    leaves that have been `seen` leave no doubt about.
    """

    __slots__ = ("_group", "seen", "workers")

    def __init__(self, group: Any) -> None:
        self._group = group
        self.seen: list[Any] = []
        self.workers: Workers | None = None

    def __enter__(self) -> Opening:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        workers = self._reached() if isinstance(error, Exception) else None
        if workers is not None:
            Joint(workers).fail()

    def opened(
        self,
        t_list: Any,
        called: str | Callable[[int], str] = "t_list",
        *,
        kinds_of: Callable[[list[Any]], set[type]],
    ) -> tuple[Tree, Backend]:
        """Take a nest apart, and find who serves its leaves; of no leaves, who serves the group."""
        tree = flatten(t_list, called, self.seen, kinds_of)
        self.seen = tree.leaves
        served = None if tree.leaves else backend_of_group(self._group)
        backend = served or backend_of(tree.leaves, tree.kinds, tree.path)
        self.workers = backend.workers(tree.leaves, self._group)
        return tree, backend

    def _reached(self) -> Workers | None:
        if self.workers is not None:
            return self.workers
        if self._group is not None:
            served = backend_of_group(self._group)
            return None if served is None else served.workers([], self._group)
        sure = (served.everyone(self.seen) for served in backends_of(self.seen))
        return next((workers for workers in sure if workers is not None), None)
