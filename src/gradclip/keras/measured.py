"""What an optimizer keeps of the norms of its gradients, in variables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from gradclip.core.norms import Norms
from gradclip.keras.clipping import is_slices, path_of

NORMS = 4  # the latest norm, their mean, how many were clipped, how many there were


class EachNorm:
    """The variable of an optimizer that has the norms of each gradient: the latest, their mean.

    Args:
        optimizer: whose variable it is.
        variables: those that the gradients are of.
    """

    def __init__(self, optimizer: Any, variables: Sequence[Any]) -> None:
        self.names = _names_of(variables)
        self.variable = optimizer.add_variable(
            (2, len(self.names)),
            dtype="float32",
            aggregation="only_first_replica",
            name="norms",
        )

    def record(self, optimizer: Any, rows: Sequence[int], norms: Any, count: Any) -> None:
        """Take the norms of gradients of the variables in these rows, ``count`` steps being before.

        A variable without a gradient has a norm of 0.
        """
        if not rows:
            latest = keras.ops.zeros((len(self.names),))
        else:
            index = np.full(len(self.names), len(rows))
            index[list(rows)] = np.arange(len(rows))
            some = [keras.ops.cast(norms, "float32"), keras.ops.zeros((1,))]
            latest = keras.ops.take(keras.ops.concatenate(some), index)
        mean = keras.ops.convert_to_tensor(self.variable)[1]
        mean = mean + (latest - mean) / (count + 1)
        optimizer.assign(self.variable, keras.ops.stack([latest, mean]))

    def norms(self, whole: Any) -> Norms:
        """Those of the latest step, as they are now."""
        latest = keras.ops.copy(keras.ops.convert_to_tensor(self.variable)[0])
        return Norms(latest, keras.ops.copy(whole), self.names)

    def means(self) -> dict[str, float]:
        """The mean of each since it was last set to 0, by name; it is waited for."""
        found: list[float] = np.asarray(keras.ops.convert_to_numpy(self.variable))[1].tolist()
        return dict(zip(self.names, found, strict=True))


def _names_of(variables: Sequence[Any]) -> tuple[str, ...]:
    """The paths of variables; where several have one, their places too."""
    paths = list(map(path_of, variables))
    times = Counter(paths)
    return tuple(
        f"{path} ({place})" if times[path] > 1 else path for place, path in enumerate(paths)
    )


def are_same(old: list[Any], new: list[Any]) -> Any:
    """If gradients were not changed."""
    pairs = [
        (each.values for each in pair) if is_slices(pair[0]) else pair
        for pair in zip(old, new, strict=True)
        if pair[0] is not None
    ]
    same = [keras.ops.all(keras.ops.equal(*pair)) for pair in pairs]
    return keras.ops.all(keras.ops.stack(same))


def at_most(limit: float, dtype: str) -> float:
    """The largest number of a dtype that is at most ``limit``: ``norm <= it`` is then exact."""
    kind = np.dtype(dtype).type
    with np.errstate(over="ignore"):
        rounded = kind(limit)
    return float(rounded if float(rounded) <= limit else np.nextafter(rounded, kind(0)))
