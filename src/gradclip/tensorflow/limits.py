"""What a limit has learnt, in variables that graphs read and write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from gradclip.core.arithmetic import HOST
from gradclip.core.memory import Lesson

PLACE = "tensorflow"  # of a state of tensors


class Variables(tf.Module):  # type: ignore[misc]
    """The state of a limit as `core.memory.Home` has it, which tf.train.Checkpoint saves too."""

    def __init__(self, state: Any, shape: tuple[int, ...], begin: Callable[[], Any]) -> None:
        super().__init__(name="limit")
        self._kind, self._blank = type(state), begin
        names = state._fields
        self.state = [_variable(value, name) for value, name in zip(state, names, strict=True)]
        self.in_force = _variable(np.full(shape, np.nan), "limit")

    def is_at(self, place: Any) -> bool:
        """If it is with tensors."""
        return bool(place == PLACE)

    def here(self) -> Any:
        """The state as tensors."""
        return self._kind(*(variable.read_value() for variable in self.state))

    def put(self, state: Any) -> None:
        """Assign another."""
        for variable, value in zip(self.state, state, strict=True):
            variable.assign(value)

    def read(self) -> Any:
        """The state of the host."""
        with tf.init_scope():
            arrays = [variable.numpy() for variable in self.state]
        return self._kind(*(each if each.shape else each.item() for each in arrays))

    def write(self, state: Any) -> None:
        """Assign one of the host."""
        with tf.init_scope():
            self.put(self._blank() if state is None else state)

    @property
    def limit(self) -> Any:
        """A tensor, of what is in force now."""
        return self.in_force.read_value()

    @limit.setter
    def limit(self, limit: Any) -> None:
        self.in_force.assign(limit)


def _variable(value: Any, name: str) -> Any:
    with tf.name_scope(""):  # not that of the call which happens to be the first
        return tf.Variable(np.asarray(value), trainable=False, name=name)


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
            state = memory.on_host()
            memory.home = Variables(begin() if state is None else state, shape, begin)
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
