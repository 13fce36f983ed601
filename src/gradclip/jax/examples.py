"""Examples along the first axis of arrays, each clipped by its own norm, added up."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradclip.jax import xla
from gradclip.jax.operations import Operations
from gradclip.jax.traced import clip_values, decided, real
from gradclip.kernels.traced import norms, numbers

_OPS = Operations()


def clipped_sum(values: list[Any], limit: Any, count: int) -> tuple[list[Any], Any]:
    """The sum of so many examples, zeros for those not finite; how many were not at most the limit.

    All norms come first, in one pass, and then all sums in another. A limit below 0 or NaN acts as
    0. Call it with float64 enabled.
    """
    if not values:
        return [], jnp.zeros((), "int32")
    return _clipped_sum(count, values, real(limit))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _clipped_sum(count: int, values: list[Any], limit: Any) -> tuple[list[Any], Any]:
    with jax.enable_x64(True):
        wide = norms.is_wide(_OPS, [(x, None) for x in values])
        norm = xla.norms_of_examples(values, count, wide=wide)
        bound = numbers.number_of(_OPS, limit)._replace(nan=False)
        action, factor = decided(norm, bound, "zero")
        clipped = (action == xla.SCALE) | norm.nan | (norm.inf & ~bound.inf)
        return xla.clipped_sum(values, action, factor), jnp.sum(clipped, dtype="int32")


@_clipped_sum.defjvp
def _clipped_sum_jvp(count: int, primals: Any, tangents: Any) -> Any:
    """Example after example: a tangent needs more than the norm and the decision."""
    values, limit = primals

    def clipped(example: list[Any], limit: Any) -> list[Any]:
        limit = jnp.where(limit > 0, limit, 0).astype("float64")
        return clip_values(None, "zero", None, False, limit, None, example, [None] * len(example))[
            -1
        ]

    def zeros(x: Any) -> Any:
        return jnp.zeros(x.shape[1:], "complex128" if jnp.iscomplexobj(x) else "float64")

    # The loop itself is differentiated: JAX before 0.10 has no transpose of one over tangents.
    def summed(values: list[Any], limit: Any) -> list[Any]:
        def add(sums: list[Any], example: list[Any]) -> tuple[list[Any], None]:
            new = clipped(example, limit)
            return [s + x.astype(s.dtype) for s, x in zip(sums, new, strict=True)], None

        # The sum varies, among the shards of shard_map, as the examples and the limit do.
        every = jax.tree.leaves((primals, tangents))
        start = xla.varying_alike([*map(zeros, values), *every])[: len(values)]
        sums, _ = lax.scan(add, start, values, length=count)
        return [s.astype(x.dtype) for s, x in zip(sums, values, strict=True)]

    with jax.enable_x64(True):
        found = _clipped_sum(count, values, limit)
        _, changes = jax.jvp(summed, primals, tangents)
        return found, (changes, np.zeros((), jax.dtypes.float0))
