"""A nest of containers to its leaves and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, ValuesView
from typing import Any, NamedTuple

import optree

from gradclip.core import rooms
from gradclip.core.norms import told_apart
from gradclip.core.protocol import Flat, Nests
from gradclip.core.sparse import IndexedSlices


class Tree(NamedTuple):
    """The leaves of a nest, their types, the way back, paths, places and names."""

    leaves: list[Any]
    kinds: set[type]
    rebuild: Callable[[list[Any]], Any]
    path: Callable[[int], str]
    places: Sequence[int]  # of each leaf among all, with what is none
    names: Callable[[], Sequence[str]]  # by which a log tells leaves apart; holds no leaf


def flatten(
    t_list: Any,
    called: str | Callable[[int], str] = "t_list",
    read: list[Any] | None = None,
    kinds_of: Callable[[list[Any]], set[type]] = lambda items: set(map(type, items)),
    apart: Callable[[Any, str], Flat] | None = None,
) -> Tree:
    """Take a nest apart; an iterator is read once, into a list. One that has been stays so.

    None, and what a framework puts where there is no gradient, keeps its place and is no leaf.

    Args:
        t_list: the nest.
        called: what paths call it; or for a flat list, a function that names each place.
        read: where to put what an iterator gives, also where it raises half way.
        kinds_of: what finds the types of what is in a list, each once; a kernel is faster.
        apart: what takes a nest apart in the place of optree, and calls paths as it is told.
    """
    if isinstance(t_list, Tree):
        return t_list
    if type(t_list) is not list and isinstance(t_list, (Iterator, ValuesView)):
        read = [] if read is None else read
        read.extend(t_list)
        t_list = list(read)
    trees: tuple[Nests, ...] = rooms.trees
    if apart is None and type(t_list) is list:
        kinds = kinds_of(t_list)
        if _are_leaves(kinds, t_list, trees):
            names = f"{called}[{{}}]".format if isinstance(called, str) else called
            named = str if isinstance(called, str) else called
            count = range(len(t_list))
            return Tree(t_list, kinds, list, names, count, lambda: list(map(named, count)))
    root = called if isinstance(called, str) else ""
    every, unflatten, path_of, names_of = (
        _flatten(t_list, root, trees) if apart is None else apart(t_list, root)
    )
    if not isinstance(called, str):
        path_of = called
    places = [place for place, leaf in enumerate(every) if not _is_nothing(leaf, trees)]

    def rebuild(new: list[Any]) -> Any:
        full = list(every)
        for place, leaf in zip(places, new, strict=True):
            full[place] = leaf
        return unflatten(full)

    def path(place: int) -> str:
        return path_of(places[place])

    leaves = [every[place] for place in places]
    by_caller = None if isinstance(called, str) else called
    return Tree(
        leaves, kinds_of(leaves), rebuild, path, places, _named(names_of, by_caller, places)
    )


def _named(
    names_of: Callable[[], list[str]],
    called: Callable[[int], str] | None,
    places: Sequence[int],
) -> Callable[[], Sequence[str]]:
    """What names the leaves at some places; it keeps none of them alive."""

    def names() -> Sequence[str]:
        every = names_of()
        found = [every[place] if called is None else called(place) for place in places]
        return told_apart(found, places)  # keys that hold a "/" can make two names one

    return names


def _flatten(t_list: Any, called: str, trees: tuple[Nests, ...]) -> Flat:
    """As optree does, or where there is a container of a framework, as that does."""
    is_leaf = _leaf_test(trees)
    every, spec = optree.tree_flatten(t_list, is_leaf=is_leaf, none_is_leaf=True)
    for node in {type(node): node for node in every}.values():
        tree = _nest_of(node, trees, is_leaf)
        if tree is not None:
            return tree.flatten(t_list, called, is_leaf)

    def path(place: int) -> str:
        return str(optree.treespec_accessors(spec)[place].codify(called))

    def names() -> list[str]:
        return ["/".join(map(_key, each)) or called for each in optree.treespec_accessors(spec)]

    return every, lambda full: optree.tree_unflatten(spec, full), path, names


def _key(entry: Any) -> str:
    """A step on the way to a leaf: a key, a place, or the name of an attribute."""
    return str(getattr(entry, "field", None) or getattr(entry, "name", None) or entry.entry)


def _are_leaves(kinds: set[type], items: list[Any], trees: tuple[Nests, ...]) -> bool:
    """If no item is a container or None. One look per type: a long flat list is the usual case."""
    one_of_each = items[:1] if len(kinds) == 1 else {type(item): item for item in items}.values()
    is_leaf = _leaf_test(trees)
    for item in one_of_each:
        if _is_nothing(item, trees) or not optree.tree_is_leaf(item, is_leaf=is_leaf):
            return False
        if _nest_of(item, trees, is_leaf) is not None:
            return False
    return True


def _leaf_test(trees: tuple[Nests, ...]) -> Callable[[Any], bool]:
    """What tells if a node is a leaf, whatever a library for nests makes of it."""
    modules: tuple[str, ...] = ()
    for tree in trees:
        modules += tree.LEAVES

    def is_leaf(node: Any) -> bool:
        if node is None or isinstance(node, IndexedSlices):
            return True
        # Without str() a compiler would know no method of it for the types that Python has itself.
        return str(type(node).__module__).startswith(modules)

    return is_leaf


def _nest_of(node: Any, trees: tuple[Nests, ...], is_leaf: Callable[[Any], bool]) -> Nests | None:
    """The framework of which a node is a container, though optree takes it for a leaf."""
    for tree in trees:
        if tree.is_nest(node, is_leaf):
            return tree
    return None


def _is_nothing(leaf: Any, trees: tuple[Nests, ...]) -> bool:
    if leaf is None:
        return True
    for tree in trees:  # noqa: SIM110  (any() takes several times as long, for every leaf)
        if tree.is_nothing(leaf):
            return True
    return False
