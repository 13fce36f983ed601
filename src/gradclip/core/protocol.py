"""What a framework's room has: in its ``backend.py`` a `Backend`, in its ``tree.py`` `Nests`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from gradclip.core.held import Held
from gradclip.core.workers import Workers


class Beside(NamedTuple):
    """What is passed beside leaves that are to be clipped into new ones, or measured.

    Where the framework follows what becomes of these values or of the leaves, as a graph or a
    gradient tape does, the leaves are held so that it sees the clip.
    """

    limits: Sequence[Any] = ()
    group: Any = None


class Backend(Protocol):
    """One framework's arrays."""

    def workers(self, leaves: Sequence[Any], group: Any) -> Workers | None:
        """Who holds parts of the same gradient; None if no other process does.

        Raises:
            TypeError: the group is none that the framework knows.
        """

    def everyone(self, leaves: Sequence[Any]) -> Workers | None:
        """The workers, where some of the leaves, among anything else, leave no doubt about them."""

    def hold(
        self,
        leaves: Sequence[Any],
        path: Callable[[int], str],
        *,
        writable: bool,
        beside: Beside | None = None,
    ) -> Held:
        """Check the leaves and take hold of their memory.

        Args:
            leaves: what is to be clipped.
            path: what an error calls each.
            writable: to be written where they lie.
            beside: where what is done to the leaves may be followed; else it is not looked for.

        Raises:
            TypeError: a leaf's type or dtype is not served; the text names it by its path.
            ValueError: a leaf is malformed, or not ``writable`` where it must be.
            NotImplementedError: what is followed cannot be spread over a group.
        """


# The nodes of a nest that are no containers, the way back, what a path calls each, and the names of
# all, by a function that keeps none of them alive.
Flat = tuple[list[Any], Callable[[list[Any]], Any], Callable[[int], str], Callable[[], list[str]]]


class Nests(Protocol):
    """What a framework has beside arrays; a room needs no such file where there is nothing.

    Nobody asks before the framework is imported, and then also about what is of another.
    """

    LEAVES: tuple[str, ...]
    """Modules whose types are leaves, whatever a library for nests makes of them."""

    def is_nothing(self, leaf: Any) -> bool:
        """If it stands where there is no gradient: it keeps its place."""

    def is_nest(self, node: Any, is_leaf: Callable[[Any], bool]) -> bool:
        """If the framework knows as a container what optree does not."""

    def flatten(self, nest: Any, called: str, is_leaf: Callable[[Any], bool]) -> Flat:
        """Take a nest apart as the framework does."""
