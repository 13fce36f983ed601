"""What a backend must define. A backend is a module; its functions are these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gradclip.core.exact import Scaled, Total
from gradclip.core.tree import Tree
from gradclip.core.workers import Joint, Workers

# Clip leaves that nothing records: (leaves, clip_norm, use_norm, on_nonfinite) to the new leaves,
# the norm as a scalar of their framework, and as a float64.
Plain = Callable[[list[Any], float, float | None, Any], tuple[list[Any], Any, float]]


class Recorder(Protocol):
    """Clips where a graph or a gradient tape records what becomes of the leaves."""

    def clip(
        self,
        tree: Tree,
        plain: Plain,
        clip_norm: Any,
        use_norm: Any,
        on_nonfinite: Any,
        name: str | None,
    ) -> tuple[list[Any], Any]:
        """New leaves and the norm; either limit may be a traced value.

        Raises:
            TypeError, ValueError: as far as they can be known at the time of tracing.
        """

    def norm(self, tree: Tree, plain: Plain, name: str | None) -> Any:
        """The global norm."""


class Queue(Protocol):
    """Leaves in a device's memory: it decides about them there, and the host does not wait."""

    def knows(self, value: Any) -> bool:
        """If a limit need not be read by the host, since it is on the device."""

    def clip_(
        self,
        limit: Any,
        policy: str,
        *,
        given: Any = None,
        check: Callable[[Any], None] | None = None,
    ) -> Any:
        """Clip where the leaves lie; the norm, as a scalar of the framework.

        ``check`` is shown it before anything is written, and may raise.
        """

    def norm(self) -> Any:
        """The global norm, as a scalar of the framework."""


class Backend(Protocol):
    """One framework's arrays. ``held`` is the backend's own; the flow only hands it on.

    ``hold`` makes every check, so nothing has been written when an error is raised, and after it
    none can come.
    """

    def recorder(self, values: Sequence[Any], group: Any) -> Recorder | None:
        """Who clips in place of this flow, if what becomes of the values is being recorded.

        Raises:
            NotImplementedError: what is recorded cannot be spread over a ``group``.
        """

    def workers(self, leaves: Sequence[Any], group: Any) -> Workers | None:
        """Who holds parts of the same gradient; None if no other process does.

        Raises:
            TypeError: the group is none that the framework knows.
        """

    def everyone(self, leaves: Sequence[Any]) -> Workers | None:
        """The workers, where some of the leaves, among anything else, leave no doubt about them."""

    def hold(self, leaves: Sequence[Any], path: Callable[[int], str], *, writable: bool) -> Any:
        """Check the leaves and take hold of their memory.

        Raises:
            TypeError: a leaf's type or dtype is not served; the text names it by its path.
            ValueError: a leaf is malformed, or not ``writable`` where it must be.
        """

    def queue(self, held: Any) -> Queue | None:
        """Who clips in the memory of a device, if that is where the leaves are."""

    def check_there(self, held: Any) -> None:
        """Hold leaves against what the other workers of a group count on.

        Raises:
            ValueError: they have no memory.
        """

    def written(self, leaves: Sequence[Any]) -> None:
        """Have the framework know that a queue may have written to leaves."""

    def measure(self, held: Any) -> Scaled:
        """The global norm, correctly rounded; NaN if an element is, else inf if one is."""

    def total(self, held: Any) -> tuple[Total, float, bool]:
        """The exact sum of squares, the largest finite |x|, and if a leaf is float64."""

    def share(self, held: Any, joint: Joint) -> tuple[Any, bool]:
        """What this worker adds to the sum of squares of all, and if a leaf is float64.

        A total; or its words, carried, in a device's memory.
        """

    def count_nonfinite(self, leaf: Any) -> tuple[int, int]:
        """How many elements of one leaf are NaN, and how many are inf."""

    def scalar(self, norm: Scaled, held: Any, *, wide: bool = False) -> Any:
        """The norm as a 0-d value of the framework: float64 if ``wide`` or a leaf is."""

    def copied(self, held: Any) -> list[Any]:
        """New leaves, bit for bit the old ones."""

    def filled(self, held: Any, value: float) -> list[Any]:
        """New leaves, every element ``value``."""

    def scaled(self, held: Any, factor: Scaled) -> list[Any]:
        """New leaves, every element multiplied."""

    def fill_(self, held: Any, value: float) -> None:
        """Put ``value`` into every element."""

    def scale_(self, held: Any, factor: Scaled) -> None:
        """Multiply every element where it lies."""
