"""What a backend must define. A backend is a module; its functions are these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gradclip._exact import Scaled, Total


class Backend(Protocol):
    """One framework's arrays. ``held`` is the backend's own; the flow only hands it on.

    ``hold`` makes every check, so nothing has been written when an error is raised, and after it
    none can come.
    """

    def hold(self, leaves: Sequence[Any], path: Callable[[int], str], *, writable: bool) -> Any:
        """Check the leaves and take hold of their memory.

        Raises:
            TypeError: a leaf's type or dtype is not served; the text names it by its path.
            ValueError: a leaf is malformed, or not ``writable`` where it must be.
        """

    def measure(self, held: Any) -> Scaled:
        """The global norm, correctly rounded; NaN if an element is, else inf if one is."""

    def total(self, held: Any) -> tuple[Total, float, bool]:
        """The exact sum of squares, the largest finite |x|, and if a leaf is float64."""

    def count_nonfinite(self, leaf: Any) -> tuple[int, int]:
        """How many elements of one leaf are NaN, and how many are inf."""

    def scalar(self, norm: Scaled, held: Any) -> Any:
        """The norm as a 0-d value of the framework: float64 if a leaf is, else float32."""

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
