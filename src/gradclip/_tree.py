"""A nest of containers to its leaves and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, ValuesView
from typing import Any, NamedTuple

import optree

from gradclip._sparse import IndexedSlices


class Tree(NamedTuple):
    """The leaves of a nest that are not None, the way back, and the path of each leaf."""

    leaves: list[Any]
    rebuild: Callable[[list[Any]], Any]
    path: Callable[[int], str]


def flatten(t_list: Any) -> Tree:
    """Take a nest apart; an iterator is read once, into a list."""
    if isinstance(t_list, Iterator | ValuesView):
        t_list = list(t_list)
    if type(t_list) is list and _holds_only_leaves(t_list):
        return Tree(t_list, list, "t_list[{}]".format)
    every, spec = optree.tree_flatten(t_list, is_leaf=_is_slices, none_is_leaf=True)
    places = [place for place, leaf in enumerate(every) if leaf is not None]

    def rebuild(new: list[Any]) -> Any:
        full = [None] * len(every)
        for place, leaf in zip(places, new, strict=True):
            full[place] = leaf
        return optree.tree_unflatten(spec, full)

    def path(index: int) -> str:
        return str(optree.treespec_accessors(spec)[places[index]].codify("t_list"))

    return Tree([every[place] for place in places], rebuild, path)


def _holds_only_leaves(t_list: list[Any]) -> bool:
    """If no item is a container or None. One look per type: a long flat list is the usual case."""
    one_of_each = {type(item): item for item in t_list}
    return type(None) not in one_of_each and all(
        optree.tree_is_leaf(item, is_leaf=_is_slices) for item in one_of_each.values()
    )


def _is_slices(node: Any) -> bool:
    return isinstance(node, IndexedSlices)
