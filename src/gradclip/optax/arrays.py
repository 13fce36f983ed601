"""Updates and gradients as arrays of JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.sparse import JAXSparse

from gradclip.core.sparse import IndexedSlices
from gradclip.jax.leaf import values_of


def arrays_of(tree: Any, called: str) -> Any:
    """The tree with every leaf an array of JAX, but those that the core has to see as they are.

    Raises:
        TypeError: a leaf is none, and cannot become one.
    """
    try:
        return jax.tree.map(_array, tree, is_leaf=is_leaf)
    except TypeError:
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_leaf):
            try:
                _array(leaf)
            except TypeError as error:
                where = f"{called}{jax.tree_util.keystr(path)}"
                raise TypeError(f"{where} is {type(leaf).__name__}: {error}") from None
        raise


def _array(leaf: Any) -> Any:
    if isinstance(leaf, IndexedSlices):
        return leaf._replace(values=jnp.asarray(leaf.values))
    return leaf if is_leaf(leaf) else jnp.asarray(leaf)


def is_leaf(node: Any) -> bool:
    """What is an array, sparse ones, which are no container here, and float0."""
    return (
        isinstance(node, jax.Array | IndexedSlices | JAXSparse)
        or getattr(node, "dtype", None) == jax.dtypes.float0
    )


def norm_dtype(params: Any) -> str:
    """The dtype of the norm of updates for these parameters."""
    wide = "float64", "complex128"
    may_be = [
        leaf
        for leaf in jax.tree.leaves(params)  # of which some may be functions or names
        if isinstance(leaf, float | complex) or str(getattr(leaf, "dtype", None)) in wide
    ]
    return "float64" if any(str(jnp.result_type(leaf)) in wide for leaf in may_be) else "float32"


def number_of_leaves(tree: Any) -> int:
    """How many leaves of updates are clipped; of parameters, of their updates."""
    return sum(map(is_clipped, jax.tree.leaves(tree, is_leaf=is_leaf)))


def is_clipped(leaf: Any) -> bool:
    """If it is a number, or an array of those that have a gradient."""
    dtype = getattr(values_of(leaf), "dtype", None)
    return (
        isinstance(leaf, float | complex) if dtype is None else jnp.issubdtype(dtype, jnp.inexact)
    )
