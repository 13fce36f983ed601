"""JAX's names for what `kernels.traced` asks for. Call them with float64 enabled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax


class Operations:
    """See `kernels.traced.operations`."""

    sqrt, round = staticmethod(jnp.sqrt), staticmethod(jnp.round)
    maximum, minimum = staticmethod(jnp.maximum), staticmethod(jnp.minimum)
    sum, any, max = staticmethod(jnp.sum), staticmethod(jnp.any), staticmethod(jnp.max)
    left, right = staticmethod(jnp.left_shift), staticmethod(jnp.right_shift)
    reshape, cumsum = staticmethod(jnp.reshape), staticmethod(jnp.cumsum)
    take, cond = staticmethod(partial(jnp.take, axis=0)), staticmethod(lax.cond)
    constant, zeros = staticmethod(jnp.asarray), staticmethod(jnp.zeros)
    bitcast = staticmethod(lax.bitcast_convert_type)
    argsort = staticmethod(partial(jnp.argsort, stable=True))
    concat = staticmethod(jnp.concatenate)
    stack = staticmethod(partial(jnp.stack, axis=-1))

    def dtype(self, x: Any) -> str:
        return str(x.dtype)

    def shape(self, x: Any) -> Any:
        return x.shape

    def size(self, x: Any) -> Any:
        return x.size

    def cast(self, x: Any, dtype: str) -> Any:
        return jnp.asarray(x).astype(dtype)

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        return jnp.where(condition, x, y)

    def parts(self, x: Any) -> list[Any]:
        return [x.real, x.imag]

    def joined(self, parts: list[Any]) -> Any:
        return lax.complex(*parts)

    def segment_sum(self, rows: Any, segments: Any, count: int) -> Any:
        return jnp.zeros((count, *rows.shape[1:]), rows.dtype).at[segments].add(rows)

    def loop(self, count: Any, body: Callable[[Any, Any], Any], start: Any) -> Any:
        return lax.fori_loop(0, count, body, start)
