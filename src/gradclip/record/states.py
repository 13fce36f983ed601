"""What the states of `gradclip.optax` tell, wherever in a state of optax they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from gradclip.core import tree
from gradclip.core.norms import Norms
from gradclip.core.reading import Reading
from gradclip.record.values import copied

_MODULE = "gradclip.optax"
_CLIPS = ("ClipByGlobalNormState", "ClipByLimitState")
_CONTAINERS = (tuple, list, dict)


class _Found(NamedTuple):
    """A state of a clip, and what the states around it know of it."""

    clip: Any
    skipped_count: Any = None
    norms: Any = None


def reading_of(state: Any, names: Any) -> Reading:
    """The numbers of the one clip in a state, copied.

    Raises:
        TypeError, ValueError: see `gradclip.Record.of_state`.
    """
    every = list(_clips_in(state)) if isinstance(state, _CONTAINERS) else []
    if len(every) != 1:
        raise ValueError(
            f"there are {len(every)} states of gradclip.optax in the {type(state).__name__}; give "
            "the state of an optimizer that clips with gradclip.optax, or the part of it that has "
            "one clip"
        )
    (found,) = every
    clip = found.clip
    count = None if found.skipped_count is None else clip.count
    told = (clip.global_norm, clip.factor, count, getattr(clip, "limit", None), *found[1:])
    copies = iter(copied([each for each in told if each is not None]))
    norm, factor, count, limit, skipped, values = (
        None if each is None else next(copies) for each in told
    )
    return Reading(
        norm,
        limit,
        factor,
        [] if values is None else [Norms(values, norm, _names(names, values.shape[0]))],
        skipped_of=None if skipped is None else [skipped, count],
    )


def _clips_in(node: Any) -> Iterator[_Found]:
    """Each state of a clip."""
    kind = type(node).__name__ if type(node).__module__ == _MODULE else ""
    if kind in _CLIPS:
        yield _Found(node)
    elif kind == "ClipPerLeafState":
        yield _Found(node.clip_state, norms=node.norms)
    elif kind == "ApplyClippedState":
        for found in _clips_in(node.clip_state):
            yield found._replace(skipped_count=node.skipped_count)
        yield from _clips_in(node.inner_state)
    else:
        yield from _clips_among(node.values() if isinstance(node, dict) else node)


def _clips_among(nodes: Collection[Any]) -> Iterator[_Found]:
    # One look per type: an optimizer has an array or two for each parameter.
    kinds = {kind for kind in set(map(type, nodes)) if issubclass(kind, _CONTAINERS)}
    for each in nodes if kinds else ():
        if type(each) in kinds:
            yield from _clips_in(each)


def _names(names: Any, count: int) -> Any:
    """The names of so many tensors."""
    if names is None:
        return range(count)
    is_told = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
    found = names if is_told else tree.flatten(names, "updates").names()
    if len(found) != count:
        raise TypeError(f"names has {len(found)} names; the state has norms of {count} tensors")
    return found
