"""Clipping per example."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, SupportsFloat, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from gradclip.core.decide import check_use_norm
from gradclip.jax.examples import clipped_sum
from gradclip.jax.leaf import checked
from gradclip.jax.traced import limit_of
from gradclip.optax.arrays import arrays_of, is_leaf

Tree = TypeVar("Tree")


def per_example_global_norm_clip(
    grads: Tree, l2_norm_clip: SupportsFloat
) -> tuple[Tree, jax.Array]:
    """Clip the gradient of each example by its own global norm, and add them up.

    ::

        sum over i of g_i * min(1, l2_norm_clip / norm(g_i)),   g_i = example i of every leaf

    No example adds more than ``l2_norm_clip`` to the sum, up to the rounding of its elements, as
    differential privacy needs. ``grads`` are read twice, for all norms and for all sums, and no
    clipped example is written: beside ``grads`` there is memory for the sum. Where the C kernel
    does not reach, examples are clipped one after the other, in memory for one of them.

    ======================================  =======================================
    an example or limit                     what it adds
    ======================================  =======================================
    norm 0                                  zeros, not counted as clipped
    norm equal to the limit                 itself to the bit, not counted
    finite, its squares over- or underflow  what the formula says
    an element NaN or inf                   zeros, counted
    limit 0                                 zeros, counted if its norm is above 0
    limit inf                               itself; zeros, not counted, of norm inf
    limit below 0 or NaN                    ValueError; traced: as limit 0
    ======================================  =======================================

    Args:
        grads: a tree of arrays, the examples along the first axis of each; None keeps its place.
        l2_norm_clip: a real scalar, 0 or above; or a traced one.

    Returns:
        ``(clipped_sum, num_clipped)``: the tree without the first axis, in its dtypes, summed in
        float64 in the order of the examples and rounded once; and how many norms were not at most
        the limit, int32. With no leaves or no examples the sum is empty or 0.

    Raises:
        TypeError: a leaf is not of a dtype that `clip_by_global_norm` clips, or the limit no
            number.
        ValueError: the leaves are not of one length along a first axis, or the limit is out of
            range.

    Follows ``optax.per_example_global_norm_clip`` (Abadi et al., 2016, arXiv:1607.00133) and the
    edge cases of ``jax_privacy.clipping.clipped_fun`` with its ``nan_safe=True``. What differs:

    - Both square in the dtype of the leaves, so that large finite examples become 0, and small
      ones are not clipped.
    - In optax an element that is NaN or inf makes NaN of its place in the sum, and is not counted
      if NaN. A limit below 0 turns examples around; one of NaN clips nothing.
    - Optax rounds the factors to the dtype of the leaves, or widens the sum to that of the norm.
    - Optax fails on a tree without leaves, and makes float32 of integers. jax_privacy cuts their
      fractions off.
    - jax_privacy takes a limit of NaN for 0. It also takes a tree of limits, scales to a norm of
      1, and can leave out examples that pad a batch.

    >>> import jax.numpy as jnp
    >>> grads = [jnp.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])]
    >>> clipped_sum, num_clipped = per_example_global_norm_clip(grads, 2.5)
    >>> print(clipped_sum[0], num_clipped)
    [1.8 2.4] 1
    """
    if isinstance(l2_norm_clip, Tracer):
        limit_of("l2_norm_clip", l2_norm_clip, check_use_norm)
    else:
        given = l2_norm_clip
        l2_norm_clip = np.float64(float(check_use_norm(given, "l2_norm_clip")))
        if math.isnan(l2_norm_clip):
            raise ValueError(f"l2_norm_clip is {given!r}; it must be 0 or above")
    grads = arrays_of(grads, "grads")
    count = _examples(grads)
    with jax.enable_x64(True):
        clipped_sum, num_clipped = _clipped_sum(grads, l2_norm_clip, count)
    return clipped_sum, num_clipped


def _examples(grads: Any) -> int:
    """How many examples there are."""
    shapes = {}
    found = jax.tree.leaves_with_path(grads, is_leaf=is_leaf)
    for path, leaf in found:
        if not isinstance(leaf, jax.Array) or not isinstance(leaf.dtype, np.dtype):
            kind = getattr(leaf, "dtype", None) if isinstance(leaf, jax.Array) else type(leaf)
            raise TypeError(
                f"grads{jax.tree_util.keystr(path)} is {getattr(kind, '__name__', kind)}; each "
                "leaf is to be a dense array of numbers"
            )
        shapes[jax.tree_util.keystr(path)] = leaf.shape
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) > 1 or () in lengths:
        raise ValueError(
            f"the shapes of grads are {shapes}; each needs a first axis, of the examples, "
            "of the same length"
        )
    for path, leaf in found:
        checked(leaf, partial("grads{}".format, jax.tree_util.keystr(path)))
    return lengths.pop()[0] if lengths else 0


@partial(jax.jit, static_argnums=2)
def _clipped_sum(grads: Any, limit: Any, count: int) -> tuple[Any, Any]:
    """The sum of the clipped examples, and how many were clipped. Call it with float64 enabled."""
    leaves, spec = jax.tree.flatten(grads)
    with jax.named_scope("per_example_global_norm_clip"):
        sums, number = clipped_sum(leaves, limit, count)
    return jax.tree.unflatten(spec, sums), number
