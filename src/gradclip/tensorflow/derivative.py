"""The gradient of a clip, by TensorFlow's own operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf


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
    """The gradient with respect to the inputs, from that with respect to the outputs.

    With factor c = clip_norm / N where it clips, else 1, and y = c x::

        dx = c dy + x / N (dN - c <x, dy> / N where it clips),   dclip_norm = <x, dy> / N
    """
    d_norm, d_wide, *d_values = (
        None if change is None else tf.convert_to_tensor(change) for change in changes
    )
    parts = grouped(tensors)
    norm = tf.cast(given[0], tf.float64) if given else norm
    bound = tf.maximum(tf.cast(limit, tf.float64), 0.0)
    finite = tf.math.is_finite(norm)
    clips = tf.logical_and(finite, tf.logical_not(norm <= bound))
    zero, one = tf.zeros_like(norm), tf.ones_like(norm)
    bound = tf.where(clips, bound, one)  # the derivative of inf / x is NaN also where it is unused
    safe = tf.where(tf.logical_and(finite, norm > 0.0), norm, one)
    otherwise = {"nan": np.nan, "raise": np.nan, "zero": 0.0, "keep": 1.0}[policy] * one
    factor = tf.where(clips, bound / safe, tf.where(finite, one, otherwise))
    inner = tf.add_n(
        [zero]
        + [
            _inner(values, change)
            for (values, *_), change in zip(parts, d_values, strict=True)
            if change is not None
        ]
    )
    d_limit = tf.where(clips, inner / safe, zero)
    d_measured = tf.add_n(
        [-tf.where(clips, factor * inner / safe, zero)]
        + [tf.cast(change, tf.float64) for change in (d_norm, d_wide) if change is not None]
    )
    along = tf.where(tf.logical_and(finite, norm > 0.0), d_measured / safe, zero)
    results = []
    for (values, *slices), change in zip(parts, d_values, strict=True):
        wide = _widened(_summed_rows(values, slices[0]) if slices else values)
        d_value = tf.zeros_like(wide)
        if not given:  # where an element is NaN or inf, its share of 0 is 0
            d_value += tf.where(finite, wide, d_value) * tf.cast(along, wide.dtype)
        if change is not None:
            d_value += _widened(change) * tf.cast(factor, wide.dtype)
        results += [tf.cast(d_value, values.dtype), *(None for _ in slices)]
    results.append(tf.cast(d_limit, limit.dtype))
    return results + [tf.cast(d_measured, use_norm.dtype) for use_norm in given]


def _widened(tensor: Any) -> Any:
    return tf.cast(tensor, tf.complex128 if tensor.dtype.is_complex else tf.float64)


def _inner(x: Any, y: Any) -> Any:
    return tf.reduce_sum(tf.math.real(tf.math.conj(_widened(x)) * _widened(y)))


def _summed_rows(values: Any, indices: Any) -> Any:
    """Each row replaced by the sum of all rows of its index."""
    order = tf.argsort(indices, stable=True)
    in_order = tf.gather(indices, order)
    begins = tf.concat(
        [tf.zeros([1], tf.int32), tf.cast(in_order[1:] != in_order[:-1], tf.int32)], 0
    )
    group = tf.cumsum(begins)[: tf.size(indices)]
    rows = tf.gather(_widened(values), order)
    sums = tf.math.unsorted_segment_sum(rows, group, tf.size(indices))
    return tf.gather(tf.gather(sums, group), tf.argsort(order))
