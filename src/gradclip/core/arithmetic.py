"""The operations by which limits judge norms, and those of the host."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np


class Arithmetic(Protocol):
    """What a framework must offer for its norms to be judged; names and meanings are NumPy's."""

    def where(self, condition: Any, x: Any, y: Any) -> Any: ...

    def minimum(self, x: Any, y: Any) -> Any: ...

    def maximum(self, x: Any, y: Any) -> Any: ...

    def sqrt(self, x: Any) -> Any: ...

    def log(self, x: Any) -> Any: ...

    def exp(self, x: Any) -> Any: ...

    def cast(self, x: Any, dtype: str) -> Any:
        """Convert the values; to an integer towards 0."""

    def full(self, shape: tuple[int, ...], value: float, dtype: str) -> Any: ...

    def pick(self, x: Any, index: Any) -> Any:
        """The element at an index of the last axis."""

    def put(self, x: Any, index: Any, value: Any) -> Any:
        """A copy in which the element at an index of the last axis is another."""

    def earlier(self, x: Any, fill: float) -> Any:
        """All elements of the last axis moved to the place before; ``fill`` comes last."""

    def later(self, x: Any, fill: float) -> Any:
        """All elements of the last axis moved to the place after; ``fill`` comes first."""

    def column(self, x: Any) -> Any:
        """With one more axis, the last, of length 1; a number of no axes may stay what it is."""


class Host:
    """Arithmetic on the host: Python's numbers, or NumPy's arrays; see `Arithmetic`.

    For a number NumPy would take ten times as long.
    """

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        if isinstance(condition, bool):
            return x if condition else y
        return np.where(condition, x, y)

    @staticmethod
    def minimum(x: Any, y: Any) -> Any:
        if isinstance(x, np.ndarray) or isinstance(y, np.ndarray):
            return np.minimum(x, y)
        return x if x < y else y

    @staticmethod
    def maximum(x: Any, y: Any) -> Any:
        if isinstance(x, np.ndarray) or isinstance(y, np.ndarray):
            return np.maximum(x, y)
        return x if x > y else y

    @staticmethod
    def sqrt(x: Any) -> Any:
        return np.sqrt(x) if isinstance(x, np.ndarray) else math.sqrt(x)

    @staticmethod
    def log(x: Any) -> Any:
        return np.log(x) if isinstance(x, np.ndarray) else math.log(x)

    @staticmethod
    def exp(x: Any) -> Any:
        return np.exp(x) if isinstance(x, np.ndarray) else _exp(x)

    @staticmethod
    def cast(x: Any, dtype: str) -> Any:
        if isinstance(x, np.ndarray):
            return x.astype(dtype)
        return int(x) if dtype == "int64" else float(x)

    @staticmethod
    def full(shape: tuple[int, ...], value: float, dtype: str) -> Any:
        return np.full(shape, value, dtype) if shape else np.dtype(dtype).type(value).item()

    @staticmethod
    def pick(x: Any, index: Any) -> Any:
        if isinstance(index, int):
            return float(x[index])
        return np.take_along_axis(x, index[..., None], -1)[..., 0]

    @staticmethod
    def put(x: Any, index: Any, value: Any) -> Any:
        new = x.copy()
        if isinstance(index, int):
            new[index] = value
        else:
            np.put_along_axis(new, index[..., None], value[..., None], -1)
        return new

    @staticmethod
    def earlier(x: Any, fill: float) -> Any:
        new = np.empty_like(x)
        new[..., :-1] = x[..., 1:]
        new[..., -1] = fill
        return new

    @staticmethod
    def later(x: Any, fill: float) -> Any:
        new = np.empty_like(x)
        new[..., 1:] = x[..., :-1]
        new[..., 0] = fill
        return new

    @staticmethod
    def column(x: Any) -> Any:
        return x[..., None] if isinstance(x, np.ndarray) else x


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


HOST = Host()
