"""What a limit has learnt, in variables that graphs read and write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from gradclip.core.arithmetic import HOST
from gradclip.core.memory import Lesson

PLACE = "tensorflow"  # of a state of tensors


# The places of these in what is packed; behind them comes the state.
LIMIT, SKIP = 0, 1


class Packed(NamedTuple):
    """What is known of a limit after a step."""

    limit: Any  # that was in force
    skip: Any
    state: Any


class Packing(NamedTuple):
    """How the limit, if a step is to be skipped, and the state go into one array of float64.

    It is one variable, and one thing that goes into a callback and comes out: each takes its time.
    """

    kind: Any  # of states
    widths: tuple[int, ...]  # how many numbers each part of a state has, of each tensor
    dtypes: tuple[str, ...]
    are_vectors: tuple[bool, ...]

    @classmethod
    def of(cls, lesson: Lesson) -> Packing:
        """That of a limit's state."""
        blank = lesson.kind.State(*map(np.asarray, lesson.kind.begin(HOST)))
        return cls(
            type(blank),
            tuple(each.size for each in blank),
            tuple(each.dtype.name for each in blank),
            tuple(each.ndim > 0 for each in blank),
        )

    def array(self, limit: Any, skip: Any, state: Any) -> Any:
        """Packed, of the host."""
        parts = [np.asarray(each)[..., None] for each in (limit, skip)]
        for each, is_vector in zip(state, self.are_vectors, strict=True):
            parts.append(np.asarray(each) if is_vector else np.asarray(each)[..., None])
        return np.concatenate(parts, -1, dtype=np.float64)

    def of_array(self, packed: Any) -> Any:
        """The state, of the host."""
        found, place = [], 2
        for width, dtype, is_vector in zip(self.widths, self.dtypes, self.are_vectors, strict=True):
            part = packed[..., place : place + width] if is_vector else packed[..., place]
            array = part.astype(dtype)
            found.append(array if array.ndim else array.item())
            place += width
        return self.kind(*found)

    def tensor(self, limit: Any, skip: Any, state: Any) -> Any:
        """Packed, by TensorFlow's operations."""
        singles = (False, False, *self.are_vectors)
        wide = [tf.cast(each, tf.float64) for each in (limit, skip, *state)]
        pairs = zip(wide, singles, strict=True)
        return tf.concat([x if is_vector else x[..., None] for x, is_vector in pairs], -1)

    def of_tensor(self, packed: Any) -> Packed:
        """Unpacked, by TensorFlow's operations."""
        found, place = [], 2
        for width, dtype, is_vector in zip(self.widths, self.dtypes, self.are_vectors, strict=True):
            part = packed[..., place : place + width] if is_vector else packed[..., place]
            found.append(tf.cast(part, dtype))
            place += width
        return Packed(packed[..., LIMIT], packed[..., SKIP] > 0, self.kind(*found))


class Variables(tf.Module):  # type: ignore[misc]
    """The state of a limit as `core.memory.Home` has it, which tf.train.Checkpoint saves too."""

    def __init__(self, packing: Packing, state: Any, begin: Callable[[], Any]) -> None:
        super().__init__(name="limit")
        self.packing, self._blank = packing, begin
        with tf.name_scope(""):  # not that of the call which happens to be the first
            first = self._begun(begin() if state is None else state)
            self.packed = tf.Variable(first, trainable=False, name="learnt")

    def _begun(self, state: Any) -> Any:
        limit = np.full(np.shape(state.count), np.nan)
        return self.packing.array(limit, np.zeros_like(limit), state)

    def is_at(self, place: Any) -> bool:
        """If it is with tensors."""
        return bool(place == PLACE)

    def here(self) -> Any:
        """The state as tensors."""
        return self.packing.of_tensor(self.packed.read_value()).state

    def put(self, state: Any) -> None:
        """Assign another, of the same limit."""
        known = self.packing.of_tensor(self.packed.read_value())
        self.packed.assign(self.packing.tensor(known.limit, known.skip, state))

    def read(self) -> Any:
        """The state of the host."""
        with tf.init_scope():
            return self.packing.of_array(self.packed.numpy())

    def write(self, state: Any) -> None:
        """Assign one of the host."""
        with tf.init_scope():
            self.packed.assign(self._begun(self._blank() if state is None else state))

    @property
    def limit(self) -> Any:
        """A tensor, of what is in force now."""
        return self.packed.read_value()[..., LIMIT]

    @limit.setter
    def limit(self, limit: Any) -> None:
        self.packed[..., LIMIT].assign(limit)


def home_of(lesson: Lesson) -> Variables:
    """The state of a limit in variables, which graphs and eager calls share.

    Raises:
        NotImplementedError: nobody would run what assigns them.
        ValueError: it is of other tensors.
    """
    memory, shape = lesson.memory, () if lesson.keys is None else (len(lesson.keys),)
    with tf.init_scope():
        if not tf.executing_eagerly():
            raise NotImplementedError(
                f"clip_norm is {lesson!r}, which learns in a tf.function and in eager mode; this "
                "is a graph of tf.compat.v1, which has a number"
            )
        known, asked = (None if keys is None else list(keys) for keys in (memory.keys, lesson.keys))
        if known not in (None, asked):
            raise ValueError(
                f"clip_norm is {lesson!r} of the tensors {known}; in a tf.function of the tensors "
                f"{asked} it has to be another"
            )
        if not isinstance(memory.home, Variables):
            begin = partial(lesson.kind.begin, HOST, shape)
            memory.home = Variables(Packing.of(lesson), memory.on_host(), begin)
            memory.state, memory.keys = None, lesson.keys
    return memory.home


def check_replicas(limits: Sequence[Any]) -> None:
    """Hold limits against what runs here.

    Raises:
        NotImplementedError: each of several replicas would have its limit learn.
    """
    for limit in limits:
        if isinstance(limit, Lesson) and not limit.passed:
            replicas = tf.distribute.get_strategy().num_replicas_in_sync
            if replicas > 1:
                raise NotImplementedError(
                    f"clip_norm is {limit!r}, which learns from one norm in each step; here each "
                    f"of {replicas} replicas has one. The optimizers of gradclip.keras sum over "
                    "the replicas first"
                )
