"""Containers that are registered with JAX, and what it puts where there is no gradient.

It does without an import of JAX, of which there may be only a part while another thread imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from gradclip.core.protocol import Flat

LEAVES = ("jax.experimental.sparse",)

# Whose types need no question; the compiler of PyTorch could not follow it.
_NEVER_NESTS = ("jaxlib", "numpy", "tensorflow", "torch")


def is_nothing(leaf: Any) -> bool:
    """If it is of float0, the dtype of the gradient of an integer."""
    if _root(leaf) not in ("numpy", "jax"):
        return False
    return getattr(getattr(leaf, "dtype", None), "names", None) == ("float0",)


def is_nest(node: Any, is_leaf: Callable[[Any], bool]) -> bool:
    """If a node that optree takes for a leaf is a container that is registered with JAX."""
    plain = isinstance(node, str | bytes | int | float | complex)
    # JAX warns of an iterator.
    if _root(node) in _NEVER_NESTS or plain or is_leaf(node) or isinstance(node, Iterator):
        return False
    trees = sys.modules.get("jax.tree_util")
    return trees is not None and not trees.all_leaves([node], is_leaf=is_leaf)


def flatten(nest: Any, called: str, is_leaf: Callable[[Any], bool]) -> Flat:
    """Take a nest apart, and name its leaves, as JAX does."""
    trees = sys.modules["jax.tree_util"]
    found, spec = trees.tree_flatten_with_path(nest, is_leaf=is_leaf)

    keys = [key for key, _ in found]

    def path(place: int) -> str:
        return f"{called}{trees.keystr(keys[place])}"

    def names() -> list[str]:
        return [trees.keystr(key, simple=True, separator="/") for key in keys]

    every = [leaf for _, leaf in found]
    return every, lambda full: trees.tree_unflatten(spec, full), path, names


def _root(node: Any) -> str:
    # Without str() torch.compile would know no method of it for the types that Python has itself.
    return str(type(node).__module__).partition(".")[0]
