"""What a framework must offer, for `kernels.traced` to clip by its own operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Operations(Protocol):
    """What a framework must offer; names and meanings are NumPy's unless described."""

    def dtype(self, x: Any) -> str:
        """The name of the dtype."""

    def shape(self, x: Any) -> Sequence[int | None] | None:
        """The lengths that are known; None if not even their number is."""

    def size(self, x: Any) -> Any:
        """The number of elements."""

    def cast(self, x: Any, dtype: str) -> Any:
        """Convert the values."""

    def bitcast(self, x: Any, dtype: str) -> Any:
        """Take the bits for another dtype of the same width."""

    def constant(self, values: Any, dtype: str) -> Any:
        """An array of known values."""

    def parts(self, x: Any) -> list[Any]:
        """The real and imaginary part of a complex array."""

    def joined(self, parts: list[Any]) -> Any:
        """A complex array from its parts."""

    def where(self, condition: Any, x: Any, y: Any) -> Any: ...

    def sum(self, x: Any, axis: int | None) -> Any: ...

    def any(self, x: Any) -> Any: ...

    def max(self, x: Any) -> Any: ...

    def maximum(self, x: Any, y: Any) -> Any: ...

    def minimum(self, x: Any, y: Any) -> Any: ...

    def sqrt(self, x: Any) -> Any: ...

    def round(self, x: Any) -> Any:
        """To the nearest integer, ties to even."""

    def left(self, x: Any, places: Any) -> Any:
        """Shift bits to the left."""

    def right(self, x: Any, places: Any) -> Any:
        """Shift bits to the right, keeping the sign."""

    def reshape(self, x: Any, shape: Sequence[int]) -> Any: ...

    def concat(self, xs: Sequence[Any]) -> Any:
        """Vectors, one after the other."""

    def stack(self, xs: Sequence[Any]) -> Any:
        """Along a new last axis."""

    def zeros(self, length: Any, dtype: str) -> Any:
        """A vector of zeros; the length may be traced."""

    def take(self, x: Any, indices: Any) -> Any:
        """Rows by their indices."""

    def argsort(self, x: Any) -> Any:
        """Stable."""

    def cumsum(self, x: Any) -> Any: ...

    def segment_sum(self, rows: Any, segments: Any, count: Any) -> Any:
        """Rows of the same segment added up, in their order."""

    def loop(self, count: Any, body: Callable[[Any, Any], Any], start: Any) -> Any:
        """``state = body(i, state)`` for i from 0 up to count."""

    def cond(
        self, condition: Any, yes: Callable[[], list[Any]], no: Callable[[], list[Any]]
    ) -> Any:
        """Only one of the two."""


def real_parts(ops: Operations, x: Any) -> list[Any]:
    """The array, or the real and imaginary part of a complex one."""
    return ops.parts(x) if ops.dtype(x).startswith("complex") else [x]


def by_parts(ops: Operations, function: Callable[..., Any], *xs: Any) -> Any:
    """What a function of real arrays makes of arrays, of complex ones part by part."""
    parts = [function(*each) for each in zip(*(real_parts(ops, x) for x in xs), strict=True)]
    return parts[0] if len(parts) == 1 else ops.joined(parts)
