"""Gradients clipped within a Keras optimizer, in place of its own `_clip_gradients`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import keras

from gradclip._clip import clipped

_BACKENDS = "jax", "tensorflow", "torch"
keras_all_reduce = getattr(keras.Optimizer, "_all_reduce_sum_gradients", None)  # TensorFlow's


def by_global_norm(optimizer: Any) -> bool:
    """If Keras clips by the global norm: ``clipnorm`` comes before it, ``clipvalue`` after."""
    if optimizer.clipnorm and optimizer.clipnorm > 0:
        return False
    return bool(optimizer.global_clipnorm and optimizer.global_clipnorm > 0)


def clip(optimizer: Any, grads: Sequence[Any]) -> tuple[list[Any], Any]:
    """Sum gradients over the replicas, if there are any, and clip the sums."""
    backend = keras.backend.backend()
    if backend not in _BACKENDS:
        raise NotImplementedError(f"Keras's backend is {backend}; gradclip has {list(_BACKENDS)}")
    if keras_all_reduce is not None:
        # Keras would warn of None by its variable.
        some = [(grad, None) for grad in grads if grad is not None]
        reduced = iter(keras_all_reduce(optimizer, some))
        grads = [None if grad is None else next(reduced)[0] for grad in grads]
    ours = clipped
    if backend == "torch":
        import torch

        # Dynamo would retrace what is in Python as torch operations, which round otherwise.
        disabled: Any = torch.compiler.disable
        ours = disabled(clipped)
    grads = [grad if _is_gradient(grad) else keras.ops.convert_to_tensor(grad) for grad in grads]
    return ours(grads, optimizer.global_clipnorm, called=partial(_called, _variables.get()))


def _is_gradient(grad: Any) -> bool:
    """If it is clipped as it is; a NumPy array, which Keras takes too, becomes a tensor."""
    return grad is None or keras.ops.is_tensor(grad) or type(grad).__name__ == "IndexedSlices"


# Those whose gradients are being applied: `_clip_gradients` is not told.
_variables: ContextVar[Sequence[Any]] = ContextVar("_variables", default=())


@contextlib.contextmanager
def applying(variables: Sequence[Any]) -> Iterator[None]:
    """Have errors name the gradients by their variables."""
    token = _variables.set(variables)
    try:
        yield
    finally:
        _variables.reset(token)


def _called(variables: Sequence[Any], place: int) -> str:
    """What errors call the gradient at this place."""
    if place >= len(variables):
        return f"grads[{place}]"
    variable = variables[place]
    return f"grads[{getattr(variable, 'path', variable.name)!r}]"
