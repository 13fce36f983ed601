"""Arithmetic that gives the same bits as on the host, however it is compiled.

XLA makes one instruction of a product and a sum, of which only the result is rounded, and a product
of a division by a constant: what came of a norm would depend on the program that it stands in.
Here each operation is rounded by itself. Call it with float64 enabled.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax


class Number:
    """An array of float64 of which each operation is rounded by itself."""

    __slots__ = ("nothing", "x")

    def __init__(self, x: Any, nothing: Any) -> None:
        self.x = x
        self.nothing = nothing  # integers that are 0, which no compiler can know

    def _rounded(self, x: Any) -> Number:
        bits = lax.bitcast_convert_type(jnp.asarray(x, "float64"), "int64")
        return Number(lax.bitcast_convert_type(bits ^ self.nothing, "float64"), self.nothing)

    def __add__(self, other: Any) -> Number:
        return Number(self.x + bare(other), self.nothing)

    def __sub__(self, other: Any) -> Number:
        return Number(self.x - bare(other), self.nothing)

    def __rsub__(self, other: Any) -> Number:
        return Number(other - self.x, self.nothing)

    def __neg__(self) -> Number:
        return Number(-self.x, self.nothing)

    def __mul__(self, other: Any) -> Number:
        return self._rounded(self.x * bare(other))

    def __truediv__(self, other: Any) -> Number:
        return self._rounded(self.x / self._rounded(bare(other)).x)

    def __rtruediv__(self, other: Any) -> Number:
        return self._rounded(other / self.x)

    def __lt__(self, other: Any) -> Any:
        return self.x < bare(other)

    def __gt__(self, other: Any) -> Any:
        return self.x > bare(other)

    __radd__ = __add__
    __rmul__ = __mul__


def bare(x: Any) -> Any:
    """The array of a `Number`; any other as it is."""
    return x.x if isinstance(x, Number) else x


class Steps:
    """Arithmetic of `Number`; see `core.arithmetic`."""

    def __init__(self, norm: Any) -> None:
        # A norm is never below 0, but XLA does not know.
        self._nothing = None if norm is None else jnp.where(norm < 0, 1, 0).astype("int64")

    def of(self, x: Any) -> Any:
        """An array of the kind that this reckons with."""
        return Number(x, self._nothing) if x.dtype == "float64" else x

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        return self.of(jnp.where(condition, bare(x), bare(y)))

    def minimum(self, x: Any, y: Any) -> Any:
        return self.of(jnp.minimum(bare(x), bare(y)))

    def maximum(self, x: Any, y: Any) -> Any:
        return self.of(jnp.maximum(bare(x), bare(y)))

    def sqrt(self, x: Any) -> Any:
        return self.of(jnp.sqrt(x.x))

    def log(self, x: Any) -> Any:
        return self.of(jnp.log(x.x))

    def exp(self, x: Any) -> Any:
        return self.of(jnp.exp(x.x))

    def cast(self, x: Any, dtype: str) -> Any:
        return self.of(bare(x).astype(dtype))

    def full(self, shape: tuple[int, ...], value: float, dtype: str) -> Any:
        return jnp.full(shape, value, dtype)

    def constant(self, values: Any, dtype: str) -> Any:
        return jnp.asarray(values, dtype)

    def pick(self, x: Any, index: Any) -> Any:
        found = jnp.take_along_axis(x.x, index[..., None], -1, mode="promise_in_bounds")
        return self.of(found[..., 0])

    def put(self, x: Any, index: Any, value: Any) -> Any:
        at = (*jnp.indices(index.shape, sparse=True), index)
        return self.of(x.x.at[at].set(bare(value), mode="promise_in_bounds"))

    def earlier(self, x: Any, fill: float) -> Any:
        return self.of(jnp.concatenate([x.x[..., 1:], jnp.full_like(x.x[..., :1], fill)], -1))

    def later(self, x: Any, fill: float) -> Any:
        return self.of(jnp.concatenate([jnp.full_like(x.x[..., :1], fill), x.x[..., :-1]], -1))

    def column(self, x: Any) -> Any:
        return self.of(bare(x)[..., None])
