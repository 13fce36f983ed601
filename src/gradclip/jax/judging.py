"""Limits that learn, under JAX, and their states. Call it with float64 enabled."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradclip.core.limits import Limit, Ruling
from gradclip.core.memory import Lesson
from gradclip.jax.arithmetic import Steps, bare


def begun(kind: Limit, shape: tuple[int, ...] = ()) -> Any:
    """The state of a limit before the first norm; of tensors, of so many."""
    return kind.begin(Steps(None), shape)


def judged(kind: Limit, state: Any, norm: Any, whole: Any = None) -> Ruling:
    """What a kind makes of a norm, as `Limit.judge`."""
    ops = Steps(norm)
    ruling = kind.judge(ops, _map(ops.of, state), ops.of(norm), whole)
    limit, skip, learnt, after = ruling
    return Ruling(bare(limit), bare(skip), bare(learnt), _map(bare, after))


def _map(function: Any, state: Any) -> Any:
    return type(state)(*map(function, state))


# ---- states that are passed ----

# They are of uint32, two for each number, the lower half first: what is float64 or int64 is made
# float32 or int32 by much that copies and restores states where JAX has not enabled them.


def begun_bits(kind: Limit, shape: tuple[int, ...] = ()) -> Any:
    """As `begun`, to be passed."""
    return _bits_of(begun(kind, shape))


def check_bits(kind: Limit, bits: Any, shape: tuple[int, ...] = ()) -> None:
    """Hold a state that is passed against a kind.

    Raises:
        TypeError: it is none of this kind's.
    """
    wanted = _blank(begun_bits, kind, shape)
    if type(bits) is not type(wanted):
        raise TypeError(
            f"limit_state is {type(bits).__name__}; that of {kind!r} is {type(wanted).__name__}"
        )
    for name, found, each in zip(wanted._fields, bits, wanted, strict=True):
        dtype, shape = jnp.result_type(found), jnp.shape(found)
        if (dtype, shape) != (each.dtype, each.shape):
            raise TypeError(
                f"limit_state.{name} is {dtype} of shape {shape}; for {kind!r} it is {each.dtype} "
                f"of shape {each.shape}"
            )


@cache
def _blank(begin: Any, kind: Limit, shape: tuple[int, ...] = ()) -> Any:
    """What begins, without its values."""
    with jax.enable_x64(True):
        return jax.eval_shape(partial(begin, kind, shape))


def numbers_of(bits: Any) -> Any:
    """What is passed, as numbers and arrays of the host."""
    dtypes = ["int64" if name == "count" else "float64" for name in bits._fields]
    pairs = zip(bits, dtypes, strict=True)
    arrays = [np.asarray(each).view(dtype)[..., 0] for each, dtype in pairs]
    return type(bits)(*(each if each.shape else each.item() for each in arrays))


def _bits_of(state: Any) -> Any:
    return _map(partial(lax.bitcast_convert_type, new_dtype="uint32"), state)


def _state_of(kind: Limit, bits: Any) -> Any:
    pairs = zip(bits, _blank(begun, kind), strict=True)
    return type(bits)(*(lax.bitcast_convert_type(each, like.dtype) for each, like in pairs))


@partial(jax.jit, static_argnums=0)
def _judged_bits(kind: Limit, bits: Any, norm: Any, whole: Any = None) -> Ruling:
    ruling = judged(kind, _state_of(kind, bits), norm, whole)
    return ruling._replace(state=_bits_of(ruling.state))


class PassedLesson(Lesson):
    """One step of a limit whose state is passed in and out; no object keeps it."""

    passed = True

    def __init__(self, kind: Limit, bits: Any) -> None:
        super().__init__(kind)
        self.before = bits
        self.against: Any = None  # the norm that the limit is held against; of tensors, a vector

    def begin(self, ops: Any, place: Any = None) -> Any:
        """The state that was passed."""
        del ops, place
        return _state_of(self.kind, self.before)

    def keep(self, ruling: Any) -> None:
        """Take what has come of the norm, the state to be passed on."""
        super().keep(ruling)
        self.after = _bits_of(ruling.state)

    def judge(self, ops: Any, norm: Any, place: Any = None) -> Any:
        """As of any lesson, by the program that judges under jit too."""
        del ops, place
        with jax.enable_x64(True):
            super().keep(_judged_bits(self.kind, self.before, np.float64(norm)))
        self.against = np.float64(norm)
        return 0.0 if self.skip else float(self.in_force)

    def judge_each(self, ops: Any, norms: Any, whole: Any, place: Any = None) -> tuple[Any, Any]:
        """As of any lesson, by the program that judges under jit too."""
        del ops, place
        whole = np.float64(whole)
        with jax.enable_x64(True):
            ruling = _judged_bits(self.kind, self.before, norms, whole)
            super().keep(ruling)
        own = np.asarray(ruling.learnt)
        self.against = np.where(own & np.isfinite(whole), norms, whole)
        return np.asarray(ruling.limit), own

    def learn(self) -> None:
        """Nothing: who has passed the state takes ``after``."""
