"""TensorFlow's own operations: the gradient of a clip, and its names for what `traced` asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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


class Operations:
    """TensorFlow's names for what `kernels.traced` asks for; see there."""

    sqrt, round = staticmethod(tf.sqrt), staticmethod(tf.round)
    sum, any, max = map(staticmethod, (tf.reduce_sum, tf.reduce_any, tf.reduce_max))
    left = staticmethod(tf.bitwise.left_shift)
    right = staticmethod(tf.bitwise.right_shift)
    reshape, cumsum = staticmethod(tf.reshape), staticmethod(tf.cumsum)
    take, cond = staticmethod(tf.gather), staticmethod(tf.cond)
    segment_sum = staticmethod(tf.math.unsorted_segment_sum)
    argsort = staticmethod(partial(tf.argsort, stable=True))
    concat = staticmethod(partial(tf.concat, axis=0))
    stack = staticmethod(partial(tf.stack, axis=-1))

    def dtype(self, x: Any) -> str:
        return str(x.dtype.name)

    def shape(self, x: Any) -> Any:
        return None if x.shape.rank is None else x.shape.as_list()

    def size(self, x: Any) -> Any:
        known = x.shape.num_elements()
        return tf.size(x, tf.int64) if known is None else known

    def cast(self, x: Any, dtype: str) -> Any:
        return tf.cast(x, dtype)

    def bitcast(self, x: Any, dtype: str) -> Any:
        return tf.bitcast(x, dtype)

    def constant(self, values: Any, dtype: str) -> Any:
        return tf.constant(values, dtype)

    def zeros(self, length: Any, dtype: str) -> Any:
        return tf.zeros([length], dtype)

    def parts(self, x: Any) -> list[Any]:
        return [tf.math.real(x), tf.math.imag(x)]

    def joined(self, parts: list[Any]) -> Any:
        return tf.complex(*parts)

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        return tf.where(condition, *_of_one_dtype(x, y))

    def maximum(self, x: Any, y: Any) -> Any:
        return tf.maximum(*_of_one_dtype(x, y))

    def minimum(self, x: Any, y: Any) -> Any:
        return tf.minimum(*_of_one_dtype(x, y))

    def loop(self, count: Any, body: Callable[[Any, Any], Any], start: Any) -> Any:
        count = tf.cast(count, tf.int64)
        return tf.while_loop(
            lambda place, _: place < count,
            lambda place, state: (place + 1, body(place, state)),
            (tf.constant(0, tf.int64), start),
        )[1]


def _of_one_dtype(x: Any, y: Any) -> tuple[Any, Any]:
    """A Python number takes the dtype of the other operand."""
    dtype = x.dtype if tf.is_tensor(x) else y.dtype
    return tf.convert_to_tensor(x, dtype), tf.convert_to_tensor(y, dtype)
