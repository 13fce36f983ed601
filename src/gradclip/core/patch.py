"""Functions of a framework replaced by ours, and put back."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, TypeVar

Self = TypeVar("Self", bound="Patch")


class Patch:
    """Replaces from the call on, or within a ``with`` statement; of several, the last puts back.

    One that fails half way puts back what it has replaced.
    """

    _active: ClassVar[int]
    _undo: ClassVar[list[Callable[[], None]]]

    def __init_subclass__(cls) -> None:
        cls._active, cls._undo = 0, []

    def __init__(self) -> None:
        kind = type(self)
        self._undone = False
        if not kind._active:
            try:
                self._install()
            except BaseException:
                kind._put_back()
                raise
        kind._active += 1

    def _install(self) -> None:
        """Replace what is to be replaced, by `_put`."""
        raise NotImplementedError

    @classmethod
    def _put(cls, module: Any, name: str, function: Any) -> None:
        old = getattr(module, name)

        def put_back() -> None:
            if getattr(module, name) is function:  # else another has replaced it since
                setattr(module, name, old)

        cls._undo.append(put_back)
        setattr(module, name, function)

    def undo(self) -> None:
        """Put back what was there before; of several patches, the last one does."""
        if self._undone:
            return
        self._undone = True
        kind = type(self)
        kind._active -= 1
        if not kind._active:
            kind._put_back()

    @classmethod
    def _put_back(cls) -> None:
        while cls._undo:
            cls._undo.pop()()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()
