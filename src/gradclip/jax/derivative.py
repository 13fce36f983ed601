"""The derivative of a clip, by JAX's own operations. Call them with float64 enabled."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LOWER = 2.0**-64


def pushed_forward(
    axes: Any, policy: str, norm: Any, lowered: Any, primals: Any, tangents: Any
) -> tuple[Any, list[Any]]:
    """The change of the norm and of the outputs, from that of the inputs.

    With factor c = limit / N where it clips, else 1, and y = c x::

        dN = <x, dx> / N,   dy = c dx + x (dlimit - c dN) / N where it clips

    JAX transposes it for reverse mode. Inputs are (limit, given norm or None, values, rows);
    ``lowered`` is the norm times `LOWER`, finite where the norm itself is beyond float64.
    """
    limit, given, values, rows = primals
    d_limit, d_given, d_values, _ = tangents
    d_limit = jnp.where(limit > 0, _float64(d_limit), 0.0)
    beyond = jnp.isinf(norm) & jnp.isfinite(lowered)
    by = jnp.where(beyond, LOWER, 1.0)  # of norm, limit and x alike
    norm = jnp.where(beyond, lowered, norm)
    limit = jnp.maximum(limit.astype("float64"), 0.0) * by
    finite = jnp.isfinite(norm)
    rises, clips = finite & (norm > 0), finite & ~(norm <= limit)
    # Where a branch is not taken its derivative is to be 0, not 0 times inf.
    safe = jnp.where(rises, norm, 1.0)
    otherwise = {"nan": math.nan, "zero": 0.0, "keep": 1.0}[policy]
    factor = jnp.where(
        clips, jnp.where(clips, limit, 1.0) / safe, jnp.where(finite, 1.0, otherwise)
    )
    if given is None:
        d_norm = jnp.zeros_like(norm)
        for x, dx, places in zip(values, d_values, rows, strict=True):
            for part, d_part in zip(_parts(x), _parts(dx), strict=True):
                unit = jnp.where(rises, part.astype("float64") * by / safe, 0.0)
                d_norm += _inner(unit, d_part.astype("float64"), places)
        d_norm = d_norm if axes is None else lax.psum(d_norm, axes)
    else:
        d_norm = _float64(d_given)
    d_factor = jnp.where(clips, (d_limit - factor * d_norm) / safe, 0.0)

    def pushed(x: Any, dx: Any) -> Any:
        along = jnp.where(clips, _widened(x) * by, 0.0) * d_factor
        return (_widened(dx) * factor + along).astype(x.dtype)

    return d_norm, [pushed(x, dx) for x, dx in zip(values, d_values, strict=True)]


def rows_of(x: Any, places: Any) -> tuple[Any, Any]:
    """The rows of a sparse leaf as a matrix, those without a place zero, and their places."""
    inner = x.shape[places.ndim :]
    rows = jnp.broadcast_to(x, (*places.shape, *inner)).reshape(places.size, math.prod(inner))
    places = places.reshape(-1)
    return jnp.where(places[:, None] >= 0, rows, 0), places


def _inner(x: Any, dx: Any, places: Any) -> Any:
    """<x, dx>, of sparse leaves with rows of the same place added."""
    if places is not None:
        dx, _ = rows_of(dx, places)
        x, flat = rows_of(x, places)
        _, group = jnp.unique(flat, size=flat.size, return_inverse=True)
        x = jnp.zeros_like(x).at[group].add(x)[group]
    return jnp.sum(x * dx)


def _parts(x: Any) -> list[Any]:
    """Before they are widened: JAX's transpose of a real part does not know of float64."""
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def _widened(x: Any) -> Any:
    return x.astype("complex128" if jnp.iscomplexobj(x) else "float64")


def _float64(tangent: Any) -> Any:
    """The tangent of a scalar; that of an integer is none."""
    return 0.0 if tangent.dtype == jax.dtypes.float0 else tangent.astype("float64")
