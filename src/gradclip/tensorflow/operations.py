"""TensorFlow's names for what `kernels.traced` asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tensorflow as tf


class Operations:
    """See `kernels.traced.operations`, and `core.arithmetic`."""

    sqrt, round = staticmethod(tf.sqrt), staticmethod(tf.round)
    log, exp = staticmethod(tf.math.log), staticmethod(tf.exp)
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

    def full(self, shape: tuple[int, ...], value: float, dtype: str) -> Any:
        return tf.fill(shape, tf.constant(value, dtype))

    def pick(self, x: Any, index: Any) -> Any:
        return tf.gather(x, index, axis=-1, batch_dims=x.shape.rank - 1)

    def put(self, x: Any, index: Any, value: Any) -> Any:
        place = tf.range(x.shape[-1], dtype=tf.int64)
        return tf.where(place == self.column(index), self.column(value), x)

    def earlier(self, x: Any, fill: float) -> Any:
        return tf.concat([x[..., 1:], tf.fill([*x.shape[:-1], 1], tf.constant(fill, x.dtype))], -1)

    def later(self, x: Any, fill: float) -> Any:
        return tf.concat([tf.fill([*x.shape[:-1], 1], tf.constant(fill, x.dtype)), x[..., :-1]], -1)

    def column(self, x: Any) -> Any:
        return x[..., None]

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
