"""A nest of containers to its leaves and back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence, ValuesView
from typing import Any, NamedTuple

import optree

from gradclip.core.sparse import IndexedSlices


class Tree(NamedTuple):
    """The leaves of a nest, their types, the way back, paths and places."""

    leaves: list[Any]
    kinds: set[type]
    rebuild: Callable[[list[Any]], Any]
    path: Callable[[int], str]
    places: Sequence[int]  # of each leaf among all, with what is none


def flatten(
    t_list: Any,
    called: str | Callable[[int], str] = "t_list",
    read: list[Any] | None = None,
) -> Tree:
    """Take a nest apart; an iterator is read once, into a list. One that has been stays so.

    None, and what JAX puts where there is no gradient, keeps its place and is no leaf.

    Args:
        t_list: the nest.
        called: what paths call it; or for a flat list, a function that names each place.
        read: where to put what an iterator gives, also where it raises half way.
    """
    if isinstance(t_list, Tree):
        return t_list
    if isinstance(t_list, Iterator | ValuesView):
        read = [] if read is None else read
        read.extend(t_list)
        t_list = list(read)
    if type(t_list) is list:
        kinds = set(map(type, t_list))
        if _are_leaves(kinds, t_list):
            names = f"{called}[{{}}]".format if isinstance(called, str) else called
            return Tree(t_list, kinds, list, names, range(len(t_list)))
    name = called if isinstance(called, str) else ""
    every, unflatten, path_of = _flatten_by_optree(t_list, name)
    one_of_each = {type(node): node for node in every}
    if any(map(_is_nest_of_jax, one_of_each.values())):
        every, unflatten, path_of = _flatten_by_jax(t_list, name)
    if not isinstance(called, str):
        path_of = called
    places = [place for place, leaf in enumerate(every) if not _is_nothing(leaf)]

    def rebuild(new: list[Any]) -> Any:
        full = list(every)
        for place, leaf in zip(places, new, strict=True):
            full[place] = leaf
        return unflatten(full)

    def path(place: int) -> str:
        return path_of(places[place])

    leaves = [every[place] for place in places]
    return Tree(leaves, set(map(type, leaves)), rebuild, path, places)


Flat = tuple[list[Any], Callable[[list[Any]], Any], Callable[[int], str]]


def _flatten_by_optree(t_list: Any, called: str) -> Flat:
    every, spec = optree.tree_flatten(t_list, is_leaf=_is_leaf, none_is_leaf=True)

    def path(place: int) -> str:
        return str(optree.treespec_accessors(spec)[place].codify(called))

    return every, lambda full: optree.tree_unflatten(spec, full), path


def _flatten_by_jax(t_list: Any, called: str) -> Flat:
    """The same for containers that are registered with JAX."""
    trees = sys.modules["jax.tree_util"]
    found, spec = trees.tree_flatten_with_path(t_list, is_leaf=_is_leaf)

    def path(place: int) -> str:
        return f"{called}{trees.keystr(found[place][0])}"

    every = [leaf for _, leaf in found]
    return every, lambda full: trees.tree_unflatten(spec, full), path


def _are_leaves(kinds: set[type], items: list[Any]) -> bool:
    """If no item is a container or None. One look per type: a long flat list is the usual case."""
    one_of_each = items[:1] if len(kinds) == 1 else {type(item): item for item in items}.values()
    return not any(map(_is_nothing, one_of_each)) and all(
        optree.tree_is_leaf(item, is_leaf=_is_leaf) and not _is_nest_of_jax(item)
        for item in one_of_each
    )


def _is_leaf(node: Any) -> bool:
    """If a node is a leaf, whatever a tree library makes of it."""
    return (
        node is None
        or isinstance(node, IndexedSlices)
        or _module(node).startswith("jax.experimental.sparse")
    )


# Whose types need no question; the compiler of PyTorch could not follow it.
_NEVER_NESTS = ("jaxlib", "numpy", "tensorflow", "torch")


def _is_nest_of_jax(node: Any) -> bool:
    """If a node that optree takes for a leaf is a container that is registered with JAX."""
    known = _module(node).partition(".")[0] in _NEVER_NESTS
    plain = isinstance(node, str | bytes | int | float | complex)
    # JAX warns of an iterator.
    if known or plain or _is_leaf(node) or isinstance(node, Iterator):
        return False
    trees = sys.modules.get("jax.tree_util")
    return trees is not None and not trees.all_leaves([node], is_leaf=_is_leaf)


def _is_nothing(leaf: Any) -> bool:
    """None, or JAX's float0, the dtype of the gradient of an integer."""
    if leaf is None or _module(leaf).partition(".")[0] not in ("numpy", "jax"):
        return leaf is None
    return getattr(getattr(leaf, "dtype", None), "names", None) == ("float0",)


def _module(node: Any) -> str:
    """Where a node's type is from."""
    # Without str() torch.compile would know no method of it for the types that Python has itself.
    return str(type(node).__module__)
