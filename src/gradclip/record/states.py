"""What the states of `gradclip.optax` tell, wherever in a state of optax they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gradclip.core import tree
from gradclip.core.norms import Norms
from gradclip.core.reading import Reading
from gradclip.record.values import copied

_MODULE = "gradclip.optax"
_CLIPS = ("ClipByGlobalNormState", "ClipByLimitState")
_STEPS = "ApplyClippedState"


def reading_of(state: Any, names: Any) -> Reading:
    """The numbers of the one clip in a state, copied.

    Raises:
        TypeError, ValueError: see `gradclip.Record.of_state`.
    """
    found = list(_clips_in(state, None)) if isinstance(state, _CONTAINERS) else []
    if len(found) != 1:
        raise ValueError(
            f"there are {len(found)} states of gradclip.optax in the {type(state).__name__}; give "
            "the state of an optimizer that clips with gradclip.optax, or the part of it that has "
            "one clip"
        )
    ((clip, skipped_count),) = found
    told = {"norm": clip.global_norm, "factor": clip.factor, "count": clip.count}
    told |= {"limit": getattr(clip, "limit", None), "values": getattr(clip, "norms", None)}
    told |= {"skipped": skipped_count}
    told = {name: each for name, each in told.items() if each is not None}
    copies = dict(zip(told, copied(list(told.values())), strict=True))
    values = copies.get("values")
    return Reading(
        copies["norm"],
        copies.get("limit"),
        copies["factor"],
        [] if values is None else [Norms(values, copies["norm"], _names(names, values.shape[0]))],
        skipped_of=[copies["skipped"], copies["count"]] if "skipped" in copies else None,
    )


def _clips_in(node: Any, skipped_count: Any) -> Iterator[tuple[Any, Any]]:
    """Each state of a clip, and how many steps were skipped by it."""
    kind = type(node)
    if kind.__module__ == _MODULE and kind.__name__ in _CLIPS:
        yield node, skipped_count
    elif kind.__module__ == _MODULE and kind.__name__ == _STEPS:
        yield from _clips_in(node.clip_state, node.skipped_count)
        yield from _clips_in(node.inner_state, None)
    else:
        nodes = node.values() if isinstance(node, dict) else node
        # One look per type: an optimizer has an array or two for each parameter.
        kinds = {kind for kind in set(map(type, nodes)) if issubclass(kind, _CONTAINERS)}
        for each in nodes if kinds else ():
            if type(each) in kinds:
                yield from _clips_in(each, None)


_CONTAINERS = (tuple, list, dict)


def _names(names: Any, count: int) -> Any:
    """The names of so many tensors."""
    if names is None:
        return range(count)
    is_told = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
    found = names if is_told else tree.flatten(names, "updates").names()
    if len(found) != count:
        raise TypeError(f"names has {len(found)} names; the state has norms of {count} tensors")
    return found
