"""Keras optimizers that clip by the exact global norm, and keep it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat, cast

import keras

from gradclip.core.decide import check_clip_norm
from gradclip.core.limits import Limit
from gradclip.core.norms import Norms
from gradclip.keras.clipping import (
    applying,
    as_it_is,
    by_global_norm,
    clip,
    clip_sums,
    replicas,
    rows,
    sums,
)
from gradclip.keras.learning import Learnt, OptimizersLesson, config_of, limit_of
from gradclip.keras.measured import NORMS, EachNorm, are_same, at_most
from gradclip.keras.saving import load, saved_variables, take

# Where users import from: what is saved or pickled is looked for there.
DOOR = "gradclip.keras"


class ExactGlobalNorm:
    """Goes before a Keras optimizer class; see `exact`."""

    built: bool
    clipnorm: float | None
    _global_clipnorm: Any  # a number, a limit that learns, or None
    _norms: Any
    _learnt: Any
    _each: EachNorm | None = None
    _watches = False
    _waiting: Sequence[Any] = ()
    _seen: Any = None
    variables: list[Any]
    name: str
    gradient_accumulation_steps: int | None
    add_variable: Callable[..., Any]
    _iterations: Any
    _trainable_variables: list[Any]
    assign: Callable[[Any, Any], None]

    @property
    def global_clipnorm(self) -> float | Any:
        """The limit, a number or one that learns, or None for Keras's own behaviour."""
        return self._global_clipnorm

    @global_clipnorm.setter
    def global_clipnorm(self, limit: SupportsFloat | Limit | None) -> None:
        if isinstance(limit, Limit):
            self._check(limit)
        elif limit is not None:
            limit = check_clip_norm(limit, "global_clipnorm")
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

    @property
    def last_limit(self) -> Any:
        """The limit that was in force in the latest update, float64; of ``PerTensor`` one each.

        NaN before the first. It is read from the device.

        Raises:
            AttributeError: the optimizer is not built yet, or its limit is none that learns.
        """
        return self._what_is_learnt("last_limit").limit

    @property
    def skipped_steps(self) -> int:
        """How many updates a limit with ``beyond="skip"`` left out; read from the device.

        Raises:
            AttributeError: the optimizer is not built yet, or its limit is none that learns.
        """
        return int(self._what_is_learnt("skipped_steps").skipped)

    def _what_is_learnt(self, name: str) -> Learnt:
        if not hasattr(self, "_learnt"):
            raise AttributeError(f"{name} needs a limit that learns, and a first step")
        learnt: Learnt = self._learnt
        return learnt

    def _check(self, limit: Limit) -> None:
        """Hold a limit that learns against the optimizer.

        Raises:
            NotImplementedError: it skips, which replicas cannot do.
            ValueError: the optimizer was built for another.
        """
        if getattr(self, "built", False) and limit != self._global_clipnorm:
            raise ValueError(
                f"global_clipnorm is set to {limit!r} on an optimizer that was built for "
                f"{self._global_clipnorm!r}; build it with it"
            )
        if limit.skips and replicas() > 1:
            raise NotImplementedError(
                f"global_clipnorm is {limit!r}; several replicas of TensorFlow cannot skip a step: "
                'beyond is "shrink", "edge" or "mean", or there is one replica'
            )

    def build(self, variables: Any) -> None:
        """Make the optimizer's variables, one for the norms among them."""
        first = not self.built
        super().build(variables)  # type: ignore[misc]
        if first and self.global_clipnorm is not None:
            # One variable: each assignment takes its time, and under JAX all state is variables.
            self._norms = self.add_variable(
                (NORMS,), dtype="float32", aggregation="only_first_replica", name="global_norm"
            )
            if isinstance(self.global_clipnorm, Limit):
                self._learnt = Learnt(self, self.global_clipnorm, len(variables))
            if self._watches:
                self._each = EachNorm(self, variables)
            if self._waiting:
                take(self, self._waiting)

    def watch_each(self) -> bool:
        """Keep the norm of each gradient too, from the next step on.

        Returns:
            If that takes a variable more in an optimizer that is built, so that a step which has
            been compiled before has to be compiled anew.
        """
        first, self._watches = not self._watches, True
        if first and self.built:
            self._each = EachNorm(self, self._trainable_variables)
        return first and self.built

    @property
    def last_norms(self) -> Norms:
        """The norm of each variable's gradient in the latest update, and the global one, float32.

        A variable without a gradient has a norm of 0. Nothing is read from the device.

        Raises:
            AttributeError: no `GlobalNorm` with ``per_tensor=True`` has asked for it in a ``fit``.
        """
        if self._each is None:
            raise AttributeError("last_norms needs a fit with GlobalNorm(per_tensor=True)")
        return self._each.norms(self.last_global_norm)

    @property
    def _ours(self) -> list[Any]:
        """The variables that Keras's own optimizer has not, and that are saved."""
        learnt = [self._learnt.variable] if hasattr(self, "_learnt") else []
        return [self._norms, *learnt] if hasattr(self, "_norms") else []

    def get_config(self) -> dict[str, Any]:
        """As Keras does, with a limit that learns as a dict."""
        config: dict[str, Any] = super().get_config()  # type: ignore[misc]
        return {**config, "global_clipnorm": config_of(config["global_clipnorm"])}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """The optimizer of a `get_config`."""
        limit = limit_of(config.get("global_clipnorm"))
        new = {**config, "global_clipnorm": limit}
        return super().from_config(new, custom_objects)  # type: ignore[misc]

    def save_own_variables(self, store: Any) -> None:
        """As Keras does, without the norms of each gradient."""
        for place, variable in enumerate(saved_variables(self)):
            store[str(place)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Take over what was saved, also from Keras's own optimizer, which keeps no norms.

        An optimizer without other variables has nowhere to put the norms before it is built; they
        wait until it is.
        """
        if not load(self, store):
            super().load_own_variables(store)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        """As Keras does; of a class that only `exact` has, by the class that it was made of."""
        named: Any = sys.modules.get(type(self).__module__)
        for part in type(self).__qualname__.split("."):
            named = getattr(named, part, None)
        restore, state = cast(tuple[Any, tuple[Any, ...]], super().__reduce__())
        if named is None or named is type(self) or exact(named) is not type(self):
            return restore, state
        return _restored, (named, *state)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """As Keras does; but of a step that is skipped nothing stays."""
        if not self._may_skip:
            super().apply(grads, trainable_variables)  # type: ignore[misc]
            return
        if not self.built and trainable_variables is not None:
            with keras.name_scope(self.name):
                self.build(list(trainable_variables))
        before = [(variable, keras.ops.copy(variable)) for variable in self._put_back_after_skip()]
        count, seen = self.gradient_accumulation_steps or 1, self._learnt.skipped
        iterations = keras.ops.copy(self._iterations)
        super().apply(grads, trainable_variables)  # type: ignore[misc]
        skipped = self._learnt.skipped != seen
        before.append((self._iterations, iterations - (count - 1)))
        for variable, value in before:
            now = keras.ops.convert_to_tensor(variable)
            self.assign(variable, keras.ops.where(skipped, value, now))

    @property
    def _may_skip(self) -> bool:
        limit = self._global_clipnorm
        return isinstance(limit, Limit) and limit.skips and by_global_norm(self)

    def _put_back_after_skip(self) -> list[Any]:
        """What a step changes that is not left out: under JAX all, since there is no branch."""
        weights = self._trainable_variables
        if keras.backend.backend() != "jax":
            return [each for each in weights if each.constraint is not None]
        counts = [self._iterations, *self._ours, *getattr(self, "_accumulated_gradients", ())]
        counts += [] if self._each is None else [self._each.variable]
        state = [each for each in self.variables if all(each is not one for one in counts)]
        return [*weights, *state]

    def _unless_skipped(self, act: Callable[[], None]) -> None:
        """Do what changes weights or state, where there are branches."""
        if not self._may_skip or keras.backend.backend() == "jax":
            act()
            return
        taken = self._learnt.skipped == self._seen
        keras.ops.cond(taken, act, lambda: None)

    def _backend_apply_gradients(self, grads: list[Any], trainable_variables: Any) -> None:
        if self._may_skip:
            self._seen = self._learnt.skipped
        with applying(trainable_variables):
            super()._backend_apply_gradients(grads, trainable_variables)  # type: ignore[misc]
        self._seen = None

    def _apply_weight_decay(self, variables: Any) -> None:
        self._unless_skipped(lambda: super(ExactGlobalNorm, self)._apply_weight_decay(variables))  # type: ignore[misc]

    def _backend_update_step(self, *args: Any) -> None:
        self._unless_skipped(lambda: super(ExactGlobalNorm, self)._backend_update_step(*args))  # type: ignore[misc]

    def _update_model_variables_moving_average(self, variables: Any) -> None:
        own = super()._update_model_variables_moving_average  # type: ignore[misc]
        self._unless_skipped(lambda: own(variables))

    def _overwrite_model_variables_with_average_value(self, variables: Any) -> None:
        own = super()._overwrite_model_variables_with_average_value  # type: ignore[misc]
        self._unless_skipped(lambda: own(variables))

    def _clip_gradients(self, grads: list[Any]) -> Any:
        if not by_global_norm(self):
            return super()._clip_gradients(grads)  # type: ignore[misc]
        if hasattr(self, "_learnt") and isinstance(self._global_clipnorm, Limit):
            return as_it_is(self._clip_and_learn)(grads)
        if self._each is not None:
            return as_it_is(self._clip_and_watch)(grads)
        new, norm, _ = clip(self, grads)
        self._note(norm)
        return new

    def _clip_and_watch(self, grads: list[Any]) -> list[Any]:
        new, norm, each = clip(self, grads, wants_each=True)
        self._note(norm, rows(self, grads), each)
        return new

    def _note(self, norm: Any, rows: Sequence[int] = (), each: Any = None) -> None:
        """Record a norm that was held against a number."""
        if hasattr(self, "_norms"):
            limit = self._global_clipnorm
            assert limit is not None, "it was clipped"
            largest = at_most(limit, keras.backend.standardize_dtype(norm.dtype))
            self._record(norm, norm <= largest, rows, each)

    def _clip_and_learn(self, grads: list[Any]) -> list[Any]:
        places = rows(self, grads)
        lesson = OptimizersLesson(self._global_clipnorm, self._learnt, places)
        summed = sums(self, grads)
        new, norm, each = clip_sums(summed, lesson, wants_each=self._each is not None)
        within = lesson.write(self, norm)
        if within is None:  # each had a limit of its own
            within = are_same(summed, new)
        self._record(norm, within, places, each)
        return new

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        if not by_global_norm(self):
            return super()._all_reduce_sum_gradients(grads_and_vars)  # type: ignore[misc]
        return grads_and_vars  # `clip` has summed them

    def _record(self, norm: Any, is_within: Any, rows: Sequence[int], each: Any) -> None:
        within = keras.ops.cast(is_within, "float32")
        norm = keras.ops.cast(norm, "float32")
        _, mean, clipped, count = keras.ops.unstack(keras.ops.convert_to_tensor(self._norms), NORMS)
        # A running mean: a sum of a million float32 would stop growing.
        mean = mean + (norm - mean) / (count + 1)
        if self._each is not None and each is not None:
            self._each.record(self, rows, each, count)
        self.assign(self._norms, keras.ops.stack([norm, mean, clipped + 1 - within, count + 1]))


def _restored(optimizer_class: Any, *state: Any) -> Any:
    return exact(optimizer_class)._unpickle_model(*state)


COMPOSITES = tuple(
    vars(keras.optimizers)[name]
    for name in ("LossScaleOptimizer", "MultiOptimizer")
    if name in vars(keras.optimizers)
)


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
        Its instances raise TypeError for a ``global_clipnorm`` that is no real number or limit of
        `gradclip.limits`, and ValueError for one that is not above 0.

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
    return _exact(optimizer_class)


@functools.cache
def _exact(optimizer_class: Any) -> Any:
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
