"""TensorFlow: eager tensors, variables, tensors of a graph, and tf.IndexedSlices of them.

Eager tensors on the CPU go through the host's kernels, without a copy. So does a graph on the CPU,
by a callback. Under XLA and on other devices the same bits come from TensorFlow's own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from gradclip.core.decide import check_no_group
from gradclip.core.held import Held
from gradclip.core.norms import Norms
from gradclip.core.protocol import Beside
from gradclip.core.workers import nobody
from gradclip.tensorflow import eager
from gradclip.tensorflow.graph import Followed, is_followed
from gradclip.tensorflow.limits import check_replicas


def workers(leaves: Sequence[Any], group: Any) -> None:
    """Nobody: there is no group for tensors of TensorFlow.

    Raises:
        NotImplementedError: one is given for some.
    """
    if leaves:  # else it is asked who is to hear of an error
        check_no_group(group)


everyone = nobody


def hold(
    leaves: Sequence[Any],
    path: Callable[[int], str],
    *,
    writable: bool,
    beside: Beside | None = None,
) -> Held:
    """Check the leaves and take hold of their memory; what is followed is checked as it is clipped.

    Raises:
        TypeError: a leaf is of another dtype or type than those clipped; with ``writable``, it is
            no variable, or this is a graph.
        ValueError: slices are malformed, or there are more elements than an int64 counts.
    """
    if beside is not None:
        check_no_group(beside.group)
        check_replicas(beside.limits)
        if is_followed([*leaves, *beside.limits]):
            return Followed()
    return eager.hold(_distinct_variables(leaves, path) if writable else leaves, path)


def _distinct_variables(leaves: Sequence[Any], path: Callable[[int], str]) -> list[Any]:
    """The leaves, each once.

    Raises:
        TypeError: one is no variable, or this is a graph.
    """
    if not tf.executing_eagerly():
        raise TypeError(
            "in a graph nothing is written in place; clip_by_global_norm returns new tensors"
        )
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, tf.Variable):
            raise TypeError(
                f"{path(place)} is {type(leaf).__name__}, which cannot be written in place, as a "
                "tf.Variable can; clip_by_global_norm returns new tensors"
            )
    return list({id(leaf): leaf for leaf in leaves}.values())


def _flattened(norms: Norms) -> tuple[Any, tuple[Any, Any]]:
    return norms.paths, (norms.values, norms.global_norm)


def _norms(_: type[Norms], paths: Any, parts: tuple[Any, Any]) -> Norms:
    return Norms(*parts, paths)


# By these TensorFlow knows a nest, which a tf.function can then return.
Norms.__tf_flatten__ = _flattened  # type: ignore[attr-defined]
Norms.__tf_unflatten__ = classmethod(_norms)  # type: ignore[attr-defined]
