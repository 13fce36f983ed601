"""Keras optimizers that clip by the exact global norm, and keep it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, cast

import keras
import numpy as np

from gradclip.core.decide import check_clip_norm
from gradclip.keras.clipping import applying, by_global_norm, clip

# Where users import from: what is saved or pickled is looked for there.
DOOR = "gradclip.keras"

NORMS = 4  # the latest norm, their mean, how many were clipped, how many there were


class ExactGlobalNorm:
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
        limit = None if limit is None else check_clip_norm(limit, "global_clipnorm")
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
                (NORMS,), dtype="float32", aggregation="only_first_replica", name="global_norm"
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
        waits = norms is None and more == 1 and np.shape(store[str(len(others))]) == (NORMS,)
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
        with applying(trainable_variables):
            super()._backend_apply_gradients(grads, trainable_variables)  # type: ignore[misc]

    def _clip_gradients(self, grads: list[Any]) -> Any:
        if not by_global_norm(self):
            return super()._clip_gradients(grads)  # type: ignore[misc]
        new, norm = clip(self, grads)
        if hasattr(self, "_norms"):
            self._record(norm)
        return new

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        if not by_global_norm(self):
            return super()._all_reduce_sum_gradients(grads_and_vars)  # type: ignore[misc]
        return grads_and_vars  # `clip` has summed them

    def _record(self, norm: Any) -> None:
        limit = self._global_clipnorm
        assert limit is not None, "it was clipped"
        largest = _at_most(limit, keras.backend.standardize_dtype(norm.dtype))
        within = keras.ops.cast(norm <= largest, "float32")
        norm = keras.ops.cast(norm, "float32")
        _, mean, clipped, count = keras.ops.unstack(keras.ops.convert_to_tensor(self._norms), NORMS)
        # A running mean: a sum of a million float32 would stop growing.
        mean = mean + (norm - mean) / (count + 1)
        self.assign(self._norms, keras.ops.stack([norm, mean, clipped + 1 - within, count + 1]))


def _at_most(limit: float, dtype: str) -> float:
    """The largest number of a dtype that is at most ``limit``: ``norm <= it`` is then exact."""
    kind = np.dtype(dtype).type
    with np.errstate(over="ignore"):
        rounded = kind(limit)
    return float(rounded if float(rounded) <= limit else np.nextafter(rounded, kind(0)))


def _restored(optimizer_class: Any, *state: Any) -> Any:
    return exact(optimizer_class)._unpickle_model(*state)


COMPOSITES = tuple(
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
    if issubclass(optimizer_class, COMPOSITES):
        raise TypeError(
            f"{optimizer_class.__name__} hands its gradients to other optimizers; "
            "make those exact instead"
        )
    if issubclass(optimizer_class, ExactGlobalNorm):
        return optimizer_class
    name, module = optimizer_class.__name__, optimizer_class.__module__
    registered = f"{module}.{optimizer_class.__qualname__}"
    if vars(keras.optimizers).get(name) is optimizer_class:
        module, registered = DOOR, name
    body = {
        "__doc__": f"{name} with the exact global norm; see `gradclip.keras.exact`.",
        "__module__": module,
        "__qualname__": optimizer_class.__qualname__,
    }
    # Under torch, __new__ of Keras's own classes returns a faster subclass, but of no subclass.
    faster = type(optimizer_class.__new__(optimizer_class))
    subclass = type(name, (ExactGlobalNorm, faster), body)
    return keras.saving.register_keras_serializable("gradclip", registered)(subclass)


for _function in (exact, _restored):
    _function.__module__ = DOOR
