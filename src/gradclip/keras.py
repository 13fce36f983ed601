"""Keras 3 optimizers whose ``global_clipnorm`` clips by the exact norm of the whole gradient.

They are Keras's own classes, on its TensorFlow, JAX and torch backends; their names are Keras's:

>>> import gradclip.keras
>>> optimizer = gradclip.keras.Adam(1e-3, global_clipnorm=1.0)

What differs from ``keras.optimizers``, with ``global_clipnorm`` alone:

- the norm is correctly rounded, and no finite gradient overflows on the way to it;
- under ``tf.distribute`` gradients are summed over the replicas first and clipped then. Keras
  clips the part of each replica, so that its update can be as many times the limit as there are
  replicas;
- ``tf.IndexedSlices`` stay sparse, and rows with the same index count as their sum;
- 0, negative numbers and NaN are errors, ``inf`` only measures;
- the norm is kept: `GlobalNorm` logs it, and ``optimizer.last_global_norm`` is the latest.

With ``global_clipnorm=None`` they are Keras's to the bit, and so they are with a ``clipnorm`` that
has been set beside it, by which Keras clips instead. What they save and copy is what Keras's do,
and the norms; the state that Keras's own optimizer has saved is taken over.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import keras
import numpy as np

from gradclip._clip import clipped
from gradclip.core.decide import check_clip_norm
from gradclip.core.patch import Patch

__all__ = ["GlobalNorm", "exact"]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Adam, SGD, ...: every optimizer that the installed Keras has."""


# ---- clipping within an optimizer ----

_BACKENDS = "jax", "tensorflow", "torch"
_keras_all_reduce = getattr(keras.Optimizer, "_all_reduce_sum_gradients", None)  # TensorFlow's


def _by_global_norm(optimizer: Any) -> bool:
    """If Keras clips by the global norm: ``clipnorm`` comes before it, ``clipvalue`` after."""
    if optimizer.clipnorm and optimizer.clipnorm > 0:
        return False
    return bool(optimizer.global_clipnorm and optimizer.global_clipnorm > 0)


def _clip(optimizer: Any, grads: Sequence[Any]) -> tuple[list[Any], Any]:
    """Sum gradients over the replicas, if there are any, and clip the sums."""
    backend = keras.backend.backend()
    if backend not in _BACKENDS:
        raise NotImplementedError(f"Keras's backend is {backend}; gradclip has {list(_BACKENDS)}")
    if _keras_all_reduce is not None:
        # Keras would warn of None by its variable.
        some = [(grad, None) for grad in grads if grad is not None]
        reduced = iter(_keras_all_reduce(optimizer, some))
        grads = [None if grad is None else next(reduced)[0] for grad in grads]
    clip = clipped
    if backend == "torch":
        import torch

        # Dynamo would retrace what is in Python as torch operations, which round otherwise.
        disabled: Any = torch.compiler.disable
        clip = disabled(clipped)
    grads = [grad if _is_gradient(grad) else keras.ops.convert_to_tensor(grad) for grad in grads]
    return clip(grads, optimizer.global_clipnorm, called=partial(_called, _variables.get()))


def _is_gradient(grad: Any) -> bool:
    """If it is clipped as it is; a NumPy array, which Keras takes too, becomes a tensor."""
    return grad is None or keras.ops.is_tensor(grad) or type(grad).__name__ == "IndexedSlices"


# Those whose gradients are being applied: `_clip_gradients` is not told.
_variables: ContextVar[Sequence[Any]] = ContextVar("_variables", default=())


@contextlib.contextmanager
def _applying(variables: Sequence[Any]) -> Iterator[None]:
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


def _at_most(limit: float, dtype: str) -> float:
    """The largest number of a dtype that is at most ``limit``: ``norm <= it`` is then exact."""
    kind = np.dtype(dtype).type
    with np.errstate(over="ignore"):
        rounded = kind(limit)
    return float(rounded if float(rounded) <= limit else np.nextafter(rounded, kind(0)))


_NORMS = 4  # the latest norm, their mean, how many were clipped, how many there were


class _ExactGlobalNorm:
    """Goes before a Keras optimizer class; see `exact`."""

    built: bool
    clipnorm: float | None
    _global_clipnorm: float | None
    _norms: Any
    _waiting: list[float] | None = None
    variables: list[Any]
    add_variable: Callable[..., Any]
    assign: Callable[[Any, Any], None]

    @property
    def global_clipnorm(self) -> float | None:
        """The limit, or None for Keras's own behaviour."""
        return self._global_clipnorm

    @global_clipnorm.setter
    def global_clipnorm(self, limit: Any) -> None:
        limit = None if limit is None else _checked(limit)
        if limit is not None and getattr(self, "built", False) and not hasattr(self, "_norms"):
            raise ValueError(
                f"global_clipnorm is set to {limit!r} on an optimizer that was built without one; "
                "build it with one (inf: only measure)"
            )
        self._global_clipnorm = limit

    @property
    def last_global_norm(self) -> Any:
        """The global norm of the latest update's gradient before clipping, a float32 scalar.

        Raises:
            AttributeError: the optimizer is not built yet, or without a ``global_clipnorm``.
        """
        if not hasattr(self, "_norms"):
            raise AttributeError("last_global_norm needs a global_clipnorm, and a first step")
        return self._norms[0]

    def build(self, variables: Any) -> None:
        """Make the optimizer's variables, one for the norms among them."""
        first = not self.built
        super().build(variables)  # type: ignore[misc]
        if first and self.global_clipnorm is not None:
            # One variable: each assignment takes its time, and under JAX all state is variables.
            self._norms = self.add_variable(
                (_NORMS,), dtype="float32", aggregation="only_first_replica", name="global_norm"
            )
            if self._waiting is not None:
                self.assign(self._norms, np.array(self._waiting, np.float32))

    def load_own_variables(self, store: Any) -> None:
        """Take over what was saved, also from Keras's own optimizer, which keeps no norms.

        An optimizer without other variables has nowhere to put the norms before it is built; they
        wait until it is.
        """
        norms = getattr(self, "_norms", None)
        others = [each for each in self.variables if each is not norms]
        more = len(store.keys()) - len(others)
        waits = norms is None and more == 1 and np.shape(store[str(len(others))]) == (_NORMS,)
        if more and not waits:
            super().load_own_variables(store)  # type: ignore[misc]
            return
        for place, variable in enumerate(others):
            variable.assign(store[str(place)])
        if waits:
            self._waiting = np.asarray(store[str(len(others))]).tolist()

    def __reduce__(self) -> Any:
        """As Keras does; of a class that only `exact` has, by the class that it was made of."""
        named: Any = sys.modules.get(type(self).__module__)
        for part in type(self).__qualname__.split("."):
            named = getattr(named, part, None)
        restore, state = cast(tuple[Any, tuple[Any, ...]], super().__reduce__())
        if named is None or named is type(self) or exact(named) is not type(self):
            return restore, state
        return _restored, (named, *state)

    def _backend_apply_gradients(self, grads: list[Any], trainable_variables: Any) -> None:
        with _applying(trainable_variables):
            super()._backend_apply_gradients(grads, trainable_variables)  # type: ignore[misc]

    def _clip_gradients(self, grads: list[Any]) -> Any:
        if not _by_global_norm(self):
            return super()._clip_gradients(grads)  # type: ignore[misc]
        new, norm = _clip(self, grads)
        if hasattr(self, "_norms"):
            self._record(norm)
        return new

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        if not _by_global_norm(self):
            return super()._all_reduce_sum_gradients(grads_and_vars)  # type: ignore[misc]
        return grads_and_vars  # `_clip` has summed them

    def _record(self, norm: Any) -> None:
        limit = self._global_clipnorm
        assert limit is not None, "it was clipped"
        largest = _at_most(limit, keras.backend.standardize_dtype(norm.dtype))
        within = keras.ops.cast(norm <= largest, "float32")
        norm = keras.ops.cast(norm, "float32")
        _, mean, clipped, count = keras.ops.unstack(
            keras.ops.convert_to_tensor(self._norms), _NORMS
        )
        # A running mean: a sum of a million float32 would stop growing.
        mean = mean + (norm - mean) / (count + 1)
        self.assign(self._norms, keras.ops.stack([norm, mean, clipped + 1 - within, count + 1]))


def _restored(optimizer_class: Any, *state: Any) -> Any:
    return exact(optimizer_class)._unpickle_model(*state)


def _checked(limit: Any) -> float:
    try:
        return check_clip_norm(limit)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("clip_norm", "global_clipnorm", 1)) from None


# ---- the classes ----

_COMPOSITES = tuple(
    vars(keras.optimizers)[name]
    for name in ("LossScaleOptimizer", "MultiOptimizer")
    if name in vars(keras.optimizers)
)


@functools.cache
def exact(optimizer_class: Any) -> Any:
    """The subclass of a Keras 3 optimizer that clips by the exact global norm.

    ::

        gradient         = the mean over accumulated steps, summed over replicas
        last_global_norm = sqrt(sum of |x|^2 over every element x of every variable's gradient)
        gradient         = gradient * min(1, global_clipnorm / last_global_norm)

    A function or a decorator. The subclass has the same name and arguments, and is registered
    with Keras: where this module (and for an optimizer of your own, its module) is imported,
    ``keras.saving.load_model`` finds it. A gradient with NaN or inf becomes NaN throughout.

    Args:
        optimizer_class: a class derived from ``keras.optimizers.Optimizer``. Its gradients are
            float16, bfloat16, float32 or float64, of any shape, and under TensorFlow dense or
            ``tf.IndexedSlices``.

    Returns:
        The subclass, the same one each time; ``optimizer_class`` itself if it is one already.
        Its instances raise TypeError for a ``global_clipnorm`` that is no real number and
        ValueError for one that is not above 0.

    Raises:
        TypeError: it is no optimizer class, or one that hands its gradients to other optimizers;
            those are what to make exact.

    Follows ``keras.optimizers`` and Pascanu et al., 2012 (arXiv:1211.5063).

    >>> import keras
    >>> weights = keras.Variable([0.0, 0.0], trainable=False)
    >>> optimizer = exact(keras.optimizers.SGD)(1.0, global_clipnorm=2.5)
    >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, 4.0])], [weights])
    >>> print(float(optimizer.last_global_norm), float(weights[0]), float(weights[1]))
    5.0 -1.5 -2.0
    """
    if not isinstance(optimizer_class, type) or not issubclass(optimizer_class, keras.Optimizer):
        raise TypeError(f"{optimizer_class!r} is no subclass of keras.optimizers.Optimizer")
    if issubclass(optimizer_class, _COMPOSITES):
        raise TypeError(
            f"{optimizer_class.__name__} hands its gradients to other optimizers; "
            "make those exact instead"
        )
    if issubclass(optimizer_class, _ExactGlobalNorm):
        return optimizer_class
    name, module = optimizer_class.__name__, optimizer_class.__module__
    registered = f"{module}.{optimizer_class.__qualname__}"
    if vars(keras.optimizers).get(name) is optimizer_class:
        module, registered = __name__, name
    body = {
        "__doc__": f"{name} with the exact global norm; see `gradclip.keras.exact`.",
        "__module__": module,
        "__qualname__": optimizer_class.__qualname__,
    }
    # Under torch, __new__ of Keras's own classes returns a faster subclass, but of no subclass.
    faster = type(optimizer_class.__new__(optimizer_class))
    subclass = type(name, (_ExactGlobalNorm, faster), body)
    return keras.saving.register_keras_serializable("gradclip", registered)(subclass)


for _name, _class in list(vars(keras.optimizers).items()):
    if (
        isinstance(_class, type)
        and issubclass(_class, keras.Optimizer)
        and _class is not keras.Optimizer
        and not issubclass(_class, _COMPOSITES)
    ):
        globals()[_name] = exact(_class)
        __all__ += [_name]  # noqa: PLE0604


# ---- the log ----


class GlobalNorm(keras.callbacks.Callback):  # type: ignore[misc]
    """Adds the global norm to the logs of each epoch of ``fit``.

    - ``global_norm``: the mean over the epoch's updates of the norm before clipping;
    - ``clipped``: the share of the epoch's updates that were clipped, from 0 to 1. An update counts
      as clipped if its norm was not at most the limit: above it, as inf is above every finite
      limit, or NaN. Where the backend flushes subnormal numbers, such a norm counts as 0.

    An update that a loss scale or gradient accumulation leaves out does not count; both are NaN
    in an epoch without any. The place in ``callbacks=`` does not matter: it moves to the front,
    so that CSVLogger, TensorBoard and all others find its numbers.

    Raises:
        TypeError: at the start of ``fit``, if the model's optimizer is none of `exact`, has no
            ``global_clipnorm``, or a ``clipnorm`` beside it, by which Keras clips instead.

    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.layers.Dense(1, "linear", False, "zeros")])
    >>> model.compile(exact(keras.optimizers.SGD)(1.0, global_clipnorm=1.0), "mse")
    >>> x, y = np.array([[3.0, 4.0]]), np.array([[0.5]])
    >>> history = model.fit(x, y, callbacks=[GlobalNorm()], verbose=0).history
    >>> print(history["global_norm"], history["clipped"])
    [5.0] [1.0]
    """

    def set_model(self, model: Any) -> None:
        """Take the model, and the first place among the callbacks."""
        super().set_model(model)
        # Callbacks share one dict of logs, one after the other, and are not shown their list.
        caller = sys._getframe(1).f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            caller.callbacks.remove(self)
            caller.callbacks.insert(0, self)

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """Find the optimizer."""
        found = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if not isinstance(found, _ExactGlobalNorm) or found.global_clipnorm is None:
            raise TypeError(
                f"GlobalNorm needs an optimizer of gradclip.keras with a global_clipnorm (inf: "
                f"only measure), but the model has {found!r}"
            )
        if not _by_global_norm(found):
            raise TypeError(
                f"GlobalNorm finds clipnorm {found.clipnorm!r} beside global_clipnorm "
                f"{found.global_clipnorm!r}: Keras clips by clipnorm then, and measures no global "
                "norm; set clipnorm to None"
            )
        self._optimizer = found

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Start to count anew."""
        # Where the model's input shape is not known, it is not built before its first step.
        if self._optimizer.built:
            self._optimizer.assign(self._optimizer._norms, np.zeros(_NORMS, np.float32))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Write the epoch's mean and share into the logs."""
        _, mean, clipped, count = np.asarray(self._optimizer._norms.value).tolist()
        logs["global_norm"] = mean if count else math.nan
        logs["clipped"] = clipped / count if count else math.nan


# ---- every optimizer, without naming any ----


class _Installed(Patch):
    """Makes ``global_clipnorm`` of every Keras optimizer exact.

    A ``tf.function`` that has been traced before keeps what it was traced with.
    """

    def _install(self) -> None:
        self._replace("_clip_gradients", lambda self, grads: _clip(self, grads)[0])
        if _keras_all_reduce is not None:
            self._replace("_all_reduce_sum_gradients", lambda _, grads_and_vars: grads_and_vars)
        owner, keras_own = _own("_backend_apply_gradients")

        @functools.wraps(keras_own)
        def apply(self: Any, grads: Any, trainable_variables: Any) -> None:
            with _applying(trainable_variables):
                keras_own(self, grads, trainable_variables)

        self._put(owner, "_backend_apply_gradients", apply)

    def _replace(self, name: str, ours: Callable[[Any, Any], Any]) -> None:
        """Have Keras's base class call ``ours`` where it clips by the global norm."""
        owner, keras_own = _own(name)

        @functools.wraps(keras_own)
        def method(self: Any, argument: Any) -> Any:
            return (ours if _by_global_norm(self) else keras_own)(self, argument)

        self._put(owner, name, method)


def _own(name: str) -> tuple[type, Any]:
    """The method of Keras's base class, and the class that has it."""
    owner = next(base for base in keras.Optimizer.__mro__ if name in vars(base))
    return owner, vars(owner)[name]
