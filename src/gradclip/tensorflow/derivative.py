"""The gradient of a clip in TensorFlow, whose leaves come as tensors in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from gradclip.kernels.traced import derivative
from gradclip.tensorflow.operations import Operations

_OPS = Operations()


def grouped(tensors: Sequence[Any]) -> list[list[Any]]:
    """The tensors of each leaf: its values, which are no integers, begin it."""
    groups: list[list[Any]] = []
    for tensor in tensors:
        if tensor.dtype.is_integer:
            groups[-1].append(tensor)
        else:
            groups.append([tensor])
    return groups


def pulled_back(
    tensors: Sequence[Any],
    limit: Any,
    given: Sequence[Any],
    policy: Any,
    norm: Any,
    changes: Sequence[Any],
) -> list[Any]:
    """The gradient with respect to the inputs, from that with respect to the outputs."""
    groups = grouped(tensors)
    leaves = [(values, *(slices[:1] or [None])) for values, *slices in groups]
    bound = tf.maximum(tf.cast(limit, tf.float64), 0.0)
    at = derivative.slope(_OPS, given[0] if given else norm, bound, policy)
    # Of float8 no change is told: TensorFlow takes such tensors for what has none.
    outputs = [norm, norm, *(values for values, _ in leaves)]
    d_norm, d_wide, *d_values = (
        tf.zeros_like(output) if change is None else tf.convert_to_tensor(change)
        for output, change in zip(outputs, changes, strict=True)
    )
    d_norm = tf.cast(d_norm, tf.float64) + d_wide
    new, d_limit, d_given = derivative.pulled_back(
        _OPS, leaves, at, d_norm, d_values, given=bool(given)
    )
    results = []
    for (_, *slices), d_value in zip(groups, new, strict=True):
        results += [d_value, *(None for _ in slices)]
    results.append(tf.cast(d_limit, limit.dtype))
    return results + [tf.cast(d_given, use_norm.dtype) for use_norm in given]
