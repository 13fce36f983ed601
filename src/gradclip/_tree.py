"""A nest of containers to its leaves and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, ValuesView
from typing import Any, NamedTuple

import optree

from gradclip._sparse import IndexedSlices


class Tree(NamedTuple):
    """The leaves of a nest that are not None, their types, the way back, paths and places."""

    leaves: list[Any]
    kinds: set[type]
    rebuild: Callable[[list[Any]], Any]
    path: Callable[[int], str]
    places: Sequence[int]  # of each leaf among all, with those that are None


def flatten(t_list: Any) -> Tree:
    """Take a nest apart; an iterator is read once, into a list."""
    if isinstance(t_list, Iterator | ValuesView):
        t_list = list(t_list)
    if type(t_list) is list:
        kinds = set(map(type, t_list))
        if _are_leaves(kinds, t_list):
            return Tree(t_list, kinds, list, "t_list[{}]".format, range(len(t_list)))
    every, spec = optree.tree_flatten(t_list, is_leaf=_is_slices, none_is_leaf=True)
    places = [place for place, leaf in enumerate(every) if leaf is not None]

    def rebuild(new: list[Any]) -> Any:
        full = [None] * len(every)
        for place, leaf in zip(places, new, strict=True):
            full[place] = leaf
        return optree.tree_unflatten(spec, full)

    def path(place: int) -> str:
        return str(optree.treespec_accessors(spec)[places[place]].codify("t_list"))

    leaves = [every[place] for place in places]
    return Tree(leaves, set(map(type, leaves)), rebuild, path, places)


def _are_leaves(kinds: set[type], items: list[Any]) -> bool:
    """If no item is a container or None. One look per type: a long flat list is the usual case."""
    one_of_each = items[:1] if len(kinds) == 1 else {type(item): item for item in items}.values()
    return type(None) not in kinds and all(
        optree.tree_is_leaf(item, is_leaf=_is_slices) for item in one_of_each
    )


def _is_slices(node: Any) -> bool:
    return isinstance(node, IndexedSlices)
