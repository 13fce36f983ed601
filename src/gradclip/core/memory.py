"""What a limit has learnt: where it is kept between steps, saved, and found again."""

from __future__ import annotations

import copy
import math
import sys
import warnings
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from gradclip.core.arithmetic import HOST


class Home(Protocol):
    """Where a framework keeps a state that its graphs read and write."""

    limit: Any  # that was in force in the latest step

    def is_at(self, place: Any) -> bool:
        """If it is where norms are judged, a place that is not the host's."""

    def here(self) -> Any:
        """The state there."""

    def put(self, state: Any) -> None:
        """Put another in its place, that is there too."""

    def read(self) -> Any:
        """The state, as numbers and arrays of the host."""

    def write(self, state: Any) -> None:
        """Put another in its place, of the host; None: that before the first norm."""


class Memory:
    """The state of a limit between steps; of tensors, and whose each is.

    It lies where the norms are: with the host, or on a device that is not waited for.
    """

    __slots__ = ("__weakref__", "_limit", "home", "keys", "place", "seen", "state", "user")

    def __init__(self) -> None:
        self.state: Any = None  # none yet
        self.keys: Sequence[Any] | None = None  # of tensors
        self.place: Any = None  # of the state, as `Lesson.judge` is told; None: of the host
        self.home: Home | None = None
        self._limit: Any = math.nan
        self.seen: int = 0  # how many norms were looked at
        self.user: Any = None  # a weak reference to what alone it is for, if something says so

    def __getstate__(self) -> dict[str, Any]:
        return {"state": self.on_host(), "keys": self.keys, "limit": _read(self.limit)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def limit(self) -> Any:
        """That was in force in the latest step."""
        return self._limit if self.home is None else self.home.limit

    @limit.setter
    def limit(self, limit: Any) -> None:
        if self.home is None:
            self._limit = limit
        else:
            self.home.limit = limit

    def on_host(self) -> Any:
        """The state as numbers and arrays of the host, for which a device is waited for."""
        if self.home is not None:
            return self.home.read()
        if self.state is None or self.place is None:
            return self.state
        return _host_state(self.state)

    def on(self, ops: Any, place: Any) -> Any:
        """The state, where norms are to be judged; None if there is none yet."""
        if self.home is None and self.place == place:
            return self.state
        if self.home is not None and self.home.is_at(place):
            return self.home.here()
        state = self.on_host()
        if state is None or place is None:
            return state
        return type(state)(*(ops.constant(each, _dtype(each)) for each in state))

    def is_at(self, place: Any) -> bool:
        """If there is a state, and it lies there."""
        return self.home is None and self.state is not None and self.place == place

    def keep(self, state: Any, place: Any) -> None:
        """Keep the state after a step."""
        if self.home is not None and self.home.is_at(place):
            self.home.put(state)
        elif self.home is not None:
            self.home.write(state if place is None else _host_state(state))
        else:
            self.state, self.place = state, place

    def replace(self, state: Any, keys: Sequence[Any] | None) -> None:
        """Go on from another state, of the host.

        Raises:
            ValueError: it is of other tensors than those that a graph knows by their places.
        """
        if keys is not None and list(keys) == list(range(len(keys))):
            keys = range(len(keys))  # which others like it are soon compared with
        if self.home is not None:
            self.home.write(self._in_order(state, keys))
        else:
            self.keys, self.state, self.place = keys, state, None

    def _in_order(self, state: Any, keys: Sequence[Any] | None) -> Any:
        """A state of tensors, in the order of those whose state is here."""
        if state is None or keys is None or keys == self.keys:
            return state
        place_of = {key: place for place, key in enumerate(keys)}
        if self.keys is None or set(place_of) != set(self.keys):
            raise ValueError(
                f"the state is of the tensors {list(keys)}; a tf.function was made for those of "
                f"{list(self.keys or ())}: load it into a new limit"
            )
        rows = [place_of[key] for key in self.keys]
        return type(state)(*(each[rows] for each in state))


def _host_state(state: Any) -> Any:
    return type(state)(*map(_read, state))


def _read(value: Any) -> Any:
    """A number, or array, of whatever framework."""
    if isinstance(value, float | int | np.ndarray):
        return value
    array = np.asarray(value.tolist() if hasattr(value, "tolist") else value)
    return array if array.shape else array.item()


def _dtype(value: Any) -> str:
    return str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__ + "64"


class Lesson:
    """One step of a limit that learns: what a clip is given in the place of a number.

    The clip has the norm judged; what has been learnt counts once `learn` says so.
    """

    __slots__ = ("after", "before", "in_force", "keys", "kind", "memory", "place", "skip")

    passed: ClassVar[bool] = False  # if a call brings the state, and takes it away again

    def __init__(
        self, kind: Any, keys: Sequence[Any] | None = None, memory: Memory | None = None
    ) -> None:
        self.kind: Any = kind
        self.keys: Sequence[Any] | None = keys  # of the tensors that are clipped
        self.memory: Memory = kind._memory if memory is None else memory
        self.in_force: Any = None  # the limit; of tensors, a vector
        self.skip: Any = False  # if the step is not to be taken
        self.before: Any = None
        self.after: Any = None
        self.place: Any = None

    def __repr__(self) -> str:
        return repr(self.kind)

    @property
    def per_tensor(self) -> bool:
        """If each tensor is judged by itself."""
        return bool(self.kind.per_tensor)

    def judge(self, ops: Any, norm: Any, place: Any = None) -> Any:
        """The limit to clip by: 0 where the step is to be skipped.

        Args:
            ops: arithmetic of the framework.
            norm: the global norm, float64.
            place: what tells one memory from others, None for the host's.
        """
        ruling = self.kind.judge(ops, self.begin(ops, place), norm)
        self.keep(ruling)
        return ops.where(ruling.skip, 0.0, ruling.limit) if self.kind.skips else ruling.limit

    def judge_each(self, ops: Any, norms: Any, whole: Any, place: Any = None) -> tuple[Any, Any]:
        """The limit of each tensor, and if it is of its own norm; else of the global one.

        Args:
            ops: arithmetic of the framework.
            norms: a vector, float64.
            whole: the global norm.
            place: as in `judge`.
        """
        state = self.begin(ops, place)
        with np.errstate(all="ignore"):  # as for numbers of Python
            ruling = self.kind.judge(ops, state, norms, whole)
        self.keep(ruling)
        return ruling.limit, ruling.learnt

    def begin(self, ops: Any, place: Any = None) -> Any:
        """The state to judge by, where the norms are."""
        self.place = place
        state = self._memory().on(ops, place)
        self.before = self.kind.begin(ops, self._shape) if state is None else state
        return self.before

    def on_device(self, place: Any, send: Callable[[Any], Any]) -> Any:
        """The state where a device judges by itself; sent there if it is not there yet.

        Whoever has it judge sets `in_force` and `after`, and the device writes them.
        """
        self.place = place
        memory = self._memory()
        if memory.is_at(place):
            self.before = memory.state
        else:
            state = memory.on_host()
            self.before = send(self.kind.begin(HOST, self._shape) if state is None else state)
        return self.before

    @property
    def _shape(self) -> tuple[int, ...]:
        return () if self.keys is None else (len(self.keys),)

    def _memory(self) -> Memory:
        """That of these tensors, if they are judged by themselves."""
        return self.memory if self.keys is None else _of_tensors(self.kind, self.memory, self.keys)

    def keep(self, ruling: Any) -> None:
        """Take what has come of the norm."""
        self.in_force, self.skip, self.after = ruling.limit, ruling.skip, ruling.state

    def learn(self) -> None:
        """Keep what has been learnt."""
        self.kind._learn(self)

    def show(self) -> None:
        """Have the object tell the limit, of a step that is not taken."""
        self.memory.limit = self.in_force

    def told(self) -> str:
        """What has to be the same on all workers; of tensors `told_of` has more."""
        if self.per_tensor:
            return repr(self.kind)
        return f"{self.kind!r} that has learnt {_digest(self.memory.on_host())}"

    def told_of(self, numbers: Sequence[int]) -> str:
        """What has been learnt of some of the tensors."""
        rows = list(numbers)
        state = _of_tensors(self.kind, self.memory, self.keys or ()).on_host()
        return _digest(None if state is None else [each[rows] for each in state])


def told(limit: Any) -> Any:
    """What of a limit, a number or a lesson, has to be the same on all workers."""
    return limit.told() if isinstance(limit, Lesson) else limit


def _digest(state: Any) -> str:
    """The same of equal states, and hardly ever of two others."""
    if state is None:
        return "nothing"
    found = 0
    for each in state:
        found = zlib.crc32(np.asarray(each).tobytes(), found)
    return f"{found:08x}"


def _of_tensors(kind: Any, whole: Memory, keys: Sequence[Any]) -> Memory:
    """The memory of a kind, for just these tensors: the known ones with what they have learnt."""
    if whole.keys == keys:
        return whole
    _check_apart(kind, keys)
    if whole.keys is None and whole.state is None:
        return whole
    state, known = whole.on_host(), list(whole.keys or ())
    place_of = {key: place for place, key in enumerate(known)}
    new = [key for key in keys if key not in place_of]
    if new:
        begun = kind.begin(HOST, (len(new),))
        state = type(state)(*map(np.concatenate, zip(state, begun, strict=True)))
        place_of |= {key: len(known) + place for place, key in enumerate(new)}
        whole.replace(state, [*known, *new])
    rows = [place_of[key] for key in keys]
    part = Memory()
    part.keys = keys
    part.state = type(state)(*(each[rows] for each in state))
    return part


def _check_apart(kind: Any, keys: Sequence[Any]) -> None:
    """Refuse tensors that nothing tells apart.

    Raises:
        ValueError: two have one name.
    """
    if not isinstance(keys, range) and len(set(keys)) < len(keys):
        twice = next(key for key in keys if list(keys).count(key) > 1)
        raise ValueError(f"two tensors are called {twice!r}, by which {kind!r} tells them apart")


def _put_back(lesson: Lesson) -> None:
    """Keep what some of the tensors have learnt."""
    whole = lesson.memory
    if whole.keys is None:
        whole.keys = lesson.keys
    if whole.keys == lesson.keys:
        whole.keep(lesson.after, lesson.place)
        return
    place_of = {key: place for place, key in enumerate(whole.keys or ())}
    rows = [place_of[key] for key in lesson.keys or ()]
    state = type(lesson.after)(*(each.copy() for each in whole.on_host()))
    for old, new in zip(state, map(_read, lesson.after), strict=True):
        old[rows] = new
    whole.replace(state, whole.keys)


R = TypeVar("R", bound="Remembers")


class Remembers:
    """What keeps the state of a limit for those who have no place of their own for it."""

    _memory: Memory
    per_tensor: ClassVar[bool]

    @property
    def last_limit(self) -> Any:
        """The limit that was in force in the latest step; NaN before the first.

        Of `PerTensor` that of each tensor, in their order. It lies where the gradients do.
        """
        limit = self._memory.limit
        return limit.copy() if isinstance(limit, np.ndarray) else limit

    def __copy__(self: R) -> R:
        """A copy learns by itself."""
        return copy.deepcopy(self)

    def state_dict(self) -> dict[str, Any]:
        """What has been learnt, to be saved: numbers, words, lists and dicts of them."""
        memory, name = self._memory, type(self).__name__
        state = memory.on_host()
        if state is None:
            return self.blank()
        if memory.keys is None:
            return {"kind": name, **self._saved(state)}
        rows = [type(state)(*row) for row in zip(*state, strict=True)]
        of = [[key, self._saved(row)] for key, row in zip(memory.keys, rows, strict=True)]
        return {"kind": name, "tensors": of}

    def blank(self) -> dict[str, Any]:
        """The `state_dict` of one that has learnt nothing."""
        return {"kind": type(self).__name__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, to the bit.

        Raises:
            ValueError: it is none, or of another kind.
        """
        name = type(self).__name__
        if not isinstance(state, dict) or state.get("kind") != name:
            raise ValueError(f"the state is {state!r}; it must be of {name}.state_dict()")
        rest = {key: value for key, value in state.items() if key != "kind"}
        if not rest:
            self._memory.replace(None, None)
        elif self.per_tensor:
            pairs = rest.get("tensors", ())
            keys, rows = [key for key, _ in pairs], [self._loaded(saved) for _, saved in pairs]
            _check_apart(self, keys)
            stacked = type(rows[0])(*map(np.array, zip(*rows, strict=True))) if rows else None
            self._memory.replace(stacked, keys if rows else None)
        else:
            self._memory.replace(self._loaded(rest), None)

    def _saved(self, state: Any) -> dict[str, Any]:
        """The state of one norm, in Python's numbers."""
        kept = self.kept(state)  # type: ignore[attr-defined]
        return {name: np.asarray(x).tolist() for name, x in kept.items()}

    def _loaded(self, saved: Any) -> Any:
        """The state that was saved.

        Raises:
            ValueError: it is none of this kind.
        """
        blank = self.kept(self.begin(HOST))  # type: ignore[attr-defined]
        if not isinstance(saved, dict) or set(saved) != set(blank):
            raise ValueError(f"the state has {saved!r}; it must have {', '.join(blank)}")
        found = {name: _number(saved[name], old) for name, old in blank.items()}
        are_all = all(each is not None for each in found.values())
        state = self.restored(**found) if are_all else None  # type: ignore[attr-defined]
        if state is None:
            raise ValueError(f"the state has {saved!r}, which no {type(self).__name__} has learnt")
        return state

    def lesson(self, keys: Sequence[Any] | None = None) -> Lesson:
        """One step of it, as a clip wants it; ``keys`` tells its tensors apart."""
        return Lesson(self, keys if self.per_tensor else None)

    def _learn(self, lesson: Lesson) -> None:
        memory = lesson.memory
        if lesson.after is None or (lesson.keys is not None and not len(lesson.keys)):
            return  # nothing was judged
        if lesson.keys is None:
            memory.keep(lesson.after, lesson.place)
        else:
            _put_back(lesson)
        memory.limit = lesson.in_force
        memory.seen += 1
        if memory is self._memory and memory.seen <= 2:
            _look_out(self)


def _number(value: Any, like: Any) -> Any:
    """A number or a list of them, as one of a state; None if it is none."""
    if isinstance(like, int):
        return value if type(value) is int and 0 <= value < 2**63 else None
    if not isinstance(like, np.ndarray):
        return float(value) if type(value) in (float, int) and math.isfinite(value) else None
    are_numbers = isinstance(value, list) and all(type(x) in (float, int) for x in value)
    if not are_numbers or len(value) != len(like):
        return None
    array = np.array(value, np.float64)
    return None if np.isnan(array).any() else array


# Of the latest limits that had seen one norm, one after the other and all alike: how they are
# shown, the memory of the last one, and how many there were.
_latest: list[Any] = [None, None, 0]


def _look_out(limit: Remembers) -> None:
    """Say so where a limit is made anew in every step: it would never know more than one norm."""
    if limit._memory.seen > 1:
        _latest[:] = [None, None, 0]
        return
    known, before, count = _latest
    gone = known == repr(limit) and before is not None and before() is None
    count = count + 1 if gone else 1
    _latest[:] = [repr(limit), weakref.ref(limit._memory), count]
    if count == 4:
        depth, frame, ours = 1, sys._getframe(), __name__.partition(".")[0]
        while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == ours:
            frame, depth = frame.f_back, depth + 1
        warnings.warn(
            f"{limit!r} was made anew for each of the last {count} steps, and has seen one norm "
            "each time: make it once, before the loop, so that it can learn",
            RuntimeWarning,
            stacklevel=depth,
        )
