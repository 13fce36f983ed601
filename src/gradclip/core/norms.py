"""The norm of each leaf beside the global one: what `gradclip.norms` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # which says what a plain `Norms` is of

    Vector = TypeVar("Vector", default=Any)
    Number = TypeVar("Number", default=Any)
else:
    from typing import TypeVar

    Vector, Number = TypeVar("Vector"), TypeVar("Number")

Names = Sequence[Any] | Callable[[], Sequence[Any]]


class Norms(Generic[Vector, Number]):
    """Each leaf's norm and the global one, from one pass, where the leaves are.

    ::

        values[i]   = sqrt(sum of |x|^2 over every element x of leaf i)
        global_norm = sqrt(sum of |x|^2 over every element x of every leaf)

    Each is correctly rounded: that of a leaf to float64 if the leaf is float64 or complex128, else
    to float32. Of a sparse leaf it is that of the tensor it stands for, of a sharded one that of
    the whole.

    Attributes:
        values: the norms in the order of leaves, a vector of the leaves' framework on their device:
            float64 if a leaf is float64 or complex128, else float32. A norm that does not fit it is
            inf.
        global_norm: as `gradclip.global_norm` returns it.

    What returns Python numbers reads the vector, for which it waits, as ``tolist()`` does.

    >>> import numpy as np, gradclip
    >>> norms = gradclip.norms({"w": np.float32([3.0, 0.0]), "b": np.float32([4.0])})
    >>> print(norms.paths, norms.values, norms.global_norm)
    ('b', 'w') [4. 3.] 5.0
    >>> norms.as_dict()
    {'grad_norm/b': 4.0, 'grad_norm/w': 3.0, 'grad_norm': 5.0}
    """

    __slots__ = ("_names", "global_norm", "values")

    def __init__(self, values: Vector, global_norm: Number, names: Names) -> None:
        self.values: Vector = values
        self.global_norm: Number = global_norm
        self._names = names

    @property
    def paths(self) -> tuple[str, ...]:
        """A name for each leaf, a parameter's own, or the keys that lead to it, joined by "/"."""
        if callable(self._names):
            self._names = self._names()
        if type(self._names) is not tuple:
            self._names = tuple(map(str, self._names))
        return self._names

    def floats(self) -> npt.NDArray[np.float64]:
        """The norms on the host."""
        return np.array(listed(self.values), np.float64)

    def as_dict(self, prefix: str = "grad_norm/") -> dict[str, float]:
        """Each norm under its path, and the global one, for a logger.

        Args:
            prefix: what goes before each path; without its last "/" it is the global norm's key,
                which is ``"global_norm"`` if nothing is left.

        Raises:
            ValueError: two leaves would be under one key.
        """
        found = dict(zip((prefix + path for path in self.paths), listed(self.values), strict=True))
        whole = prefix.removesuffix("/") or "global_norm"
        if len(found) < len(self.paths) or whole in found:
            raise ValueError(f"two of these have one key under prefix {prefix!r}: {self.paths}")
        return {**found, whole: listed(self.global_norm)}

    def largest(self, k: int = 10) -> list[tuple[str, float]]:
        """The ``k`` leaves of the largest norms, NaN before all, and their norms."""
        values = self.floats()
        order = np.lexsort((-values, ~np.isnan(values)))
        return [(self.paths[place], float(values[place])) for place in order[:k]]

    def nonfinite(self) -> list[str]:
        """The paths of leaves whose norm is NaN or inf."""
        (places,) = np.nonzero(~np.isfinite(self.floats()))
        return [self.paths[place] for place in places]

    def __len__(self) -> int:
        values: Any = self.values
        return int(values.shape[0])

    def __repr__(self) -> str:
        return f"Norms(global_norm={self.global_norm!r}, values={self.values!r})"

    def __reduce__(self) -> Any:
        return type(self), (self.values, self.global_norm, self.paths)


def listed(array: Any) -> Any:
    """Numbers of any framework as Python's; those of TensorFlow go through NumPy."""
    return array.tolist() if hasattr(array, "tolist") else array.numpy().tolist()


def told_apart(names: Sequence[str], places: Iterable[int]) -> Sequence[str]:
    """The names; with their places behind them where two are the same."""
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({place})" for name, place in zip(names, places, strict=True)]
