"""A limit that learns in an optimizer: its configuration, and what it has learnt.

All of that is one variable, since each assignment takes its time. Its numbers have 64 bits, which
Keras has no variables for on JAX: each is two int32, so that what is saved goes on to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np

from gradclip.core.arithmetic import HOST
from gradclip.core.limits import Average, Limit, Percentile, PerTensor, ZScore
from gradclip.core.memory import Lesson

_KINDS = {kind.__name__: kind for kind in (Average, Percentile, PerTensor, ZScore)}


def config_of(limit: Any) -> Any:
    """A limit as what Keras saves of it: a dict of one that learns, without what it has learnt."""
    if not isinstance(limit, Limit):
        return limit
    config: dict[str, Any] = {"kind_of_limit": type(limit).__name__}
    for field in dataclasses.fields(limit):
        value = getattr(limit, field.name)
        if field.init and value != field.default:
            config[field.name] = config_of(value)
    return config


def limit_of(config: Any) -> Any:
    """The limit of a configuration."""
    if not isinstance(config, dict):
        return config
    arguments = {name: limit_of(value) for name, value in config.items()}
    return _KINDS[arguments.pop("kind_of_limit")](**arguments)


class Learnt:
    """The variable of an optimizer that has what its limit has learnt.

    Args:
        optimizer: whose variable it is.
        kind: the limit; what it has learnt so far is where this begins.
        tensors: how many there are.
    """

    def __init__(self, optimizer: Any, kind: Limit, tensors: int) -> None:
        shape = (tensors,) if kind.per_tensor else ()
        begun = kind.begin(HOST, shape)
        known = kind._memory.on_host()
        if known is not None and [*map(np.shape, known)] == [*map(np.shape, begun)]:
            begun = known
        self.kind_of_state = type(begun)
        # The limit in force, how many steps were skipped, and the state.
        first = [np.asarray(each) for each in (np.full(shape, math.nan), 0, *begun)]
        self._like = [(each.shape, each.dtype.name, each.size) for each in first]
        self._skipped_at = first[0].size
        bits = np.concatenate([each.reshape(-1).view(np.int32) for each in first]).reshape(-1, 2)
        self.variable = optimizer.add_variable(
            bits.shape,
            initializer=lambda shape, dtype: keras.ops.convert_to_tensor(bits, dtype),  # noqa: ARG005
            dtype="int32",
            aggregation="only_first_replica",
            name="limit",
        )

    @property
    def limit(self) -> Any:
        """The limit in force, of the host; NaN before the first step."""
        return self.read(_Host)[0][()]

    @property
    def skipped(self) -> Any:
        """How many steps were skipped, in the lower 32 bits, as a tensor."""
        # A copy: an array of torch would see what is assigned next.
        return keras.ops.copy(keras.ops.convert_to_tensor(self.variable)[self._skipped_at, 0])

    def read(self, there: Any) -> list[Any]:
        """The limit, the count and the fields of the state: arrays of what is ``there``."""
        words = there.bits(there.read(self.variable), "int64")
        found, begin = [], 0
        for shape, dtype, size in self._like:
            part = words[begin : begin + size]
            part = there.bits(part, dtype) if dtype == "float64" else part
            found.append(there.reshape(part, shape))
            begin += size
        return found

    def written(self, there: Any, values: Sequence[Any]) -> Any:
        """What the variable has, of such values."""
        words = [
            there.bits(there.reshape(there.array(value, dtype), (-1,)), "int64")
            for value, (_, dtype, _) in zip(values, self._like, strict=True)
        ]
        return there.bits(there.concatenate(words), "int32")


class OptimizersLesson(Lesson):
    """One step of a limit whose state is in an optimizer's variable."""

    __slots__ = ("_learnt", "_read", "_there", "against")

    passed = True
    against: Any  # the norm that the limit was held against, where a room tells

    def __init__(self, kind: Limit, learnt: Learnt, rows: Sequence[int]) -> None:
        super().__init__(kind, list(rows) if kind.per_tensor else None)
        self._learnt = learnt

    def begin(self, ops: Any, place: Any = None) -> Any:
        """The state, where the norms are judged."""
        del place
        self._there: Any = _Host if ops is HOST else _of_backend()
        with _float64():
            self._read = self._learnt.read(self._there)
            kind_of_state, state = self._learnt.kind_of_state, self._read[2:]
            if self.keys is not None:
                state = [self._there.take(each, self.keys) for each in state]
        if self._there is _Host:
            state = [each if each.shape else each.item() for each in state]
        self.before = kind_of_state(*state)
        return self.before

    def learn(self) -> None:
        """Nothing: the optimizer writes it, with `write`."""

    def write(self, optimizer: Any, norm: Any) -> Any:
        """Assign what has been learnt; if the norm was at most the limit."""
        there: Any = self._there
        with _float64():
            limit, skipped, *state = self._read
            if self.keys is None:
                within = there.array(norm, "float64") <= self.in_force
                values = [self.in_force, skipped + there.array(self.skip, "int64"), *self.after]
            else:
                within = None
                old, new = [limit, *state], [self.in_force, *self.after]
                limit, *state = map(self._put, old, new)
                values = [limit, skipped, *state]
            optimizer.assign(self._learnt.variable, self._learnt.written(there, values))
        return within

    def _put(self, old: Any, new: Any) -> Any:
        """An array with other rows for those that were judged."""
        keys = self.keys or ()
        index = np.arange(old.shape[0])
        index[keys] = old.shape[0] + np.arange(len(keys))
        return self._there.take(self._there.concatenate([old, new]), index)


# ---- arrays of 64 bits, on the host and of each backend ----


class _Host:
    read = staticmethod(keras.ops.convert_to_numpy)
    array, reshape = staticmethod(np.asarray), staticmethod(np.reshape)
    concatenate = staticmethod(np.concatenate)
    take = staticmethod(partial(np.take, axis=0))

    @staticmethod
    def bits(x: Any, dtype: str) -> Any:
        wide = np.ascontiguousarray(x[:, None] if dtype == "int32" else x)
        found: Any = wide.view(np.dtype(dtype))
        return found[:, 0] if wide.dtype == np.int32 else found


def _of_tensorflow() -> Any:
    import tensorflow as tf

    return SimpleNamespace(
        read=keras.ops.convert_to_tensor,
        array=tf.cast,
        bits=tf.bitcast,
        reshape=tf.reshape,
        concatenate=partial(tf.concat, axis=0),
        take=tf.gather,
    )


def _of_jax() -> Any:
    import jax
    import jax.numpy as jnp

    return SimpleNamespace(
        read=keras.ops.convert_to_tensor,
        array=jnp.asarray,
        bits=jax.lax.bitcast_convert_type,
        reshape=jnp.reshape,
        concatenate=jnp.concatenate,
        take=lambda x, index: jnp.take(x, np.asarray(index), axis=0),
    )


def _of_torch() -> Any:
    import torch

    def bits(x: Any, dtype: str) -> Any:
        x = x[:, None] if dtype == "int32" else x.contiguous()
        found = x.view(getattr(torch, dtype))
        return found[:, 0] if x.dtype == torch.int32 else found

    return SimpleNamespace(
        read=lambda variable: variable.value.detach(),
        array=lambda x, dtype: x.to(getattr(torch, dtype)),
        bits=bits,
        reshape=torch.reshape,
        concatenate=torch.cat,
        take=lambda x, index: x[list(index)],
    )


@functools.cache
def _of_backend() -> Any:
    """The same, of the arrays that Keras has."""
    kinds = {"tensorflow": _of_tensorflow, "jax": _of_jax, "torch": _of_torch}
    return kinds[keras.backend.backend()]()


def _float64() -> contextlib.AbstractContextManager[Any]:
    """Where arrays have 64 bits, which those of JAX do not have elsewhere."""
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    enabled: contextlib.AbstractContextManager[Any] = jax.enable_x64(True)
    return enabled
