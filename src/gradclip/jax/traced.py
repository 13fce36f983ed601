"""Leaves that JAX follows: under a transformation, on other devices, sharded, or in a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import zero_from_primal
from jax.experimental.sparse import BCOO

from gradclip.core.decide import check_clip_norm, check_use_norm
from gradclip.core.held import Clip, Held
from gradclip.core.limits import Ruling
from gradclip.core.memory import Lesson
from gradclip.core.sparse import IndexedSlices
from gradclip.jax import judging, xla
from gradclip.jax.arithmetic import Steps
from gradclip.jax.derivative import (
    LOWER,
    change_of_each,
    pushed_forward,
    pushed_forward_each,
    rows_of,
)
from gradclip.jax.leaf import SPARSE, checked, places_of, values_of, with_values
from gradclip.jax.operations import Operations
from gradclip.kernels.traced import norms, numbers

_OPS = Operations()


class Traced(Held):
    """Clipped by operations that JAX can transform."""

    __slots__ = ("_axes",)

    follows = True

    def __init__(self, axes: tuple[Any, ...] | None) -> None:
        self._axes = axes  # over which other parts of the same gradient lie

    def clipped(self, clip: Clip) -> tuple[list[Any], Any]:
        """New leaves and the norm.

        Raises:
            TypeError: a leaf is of another dtype or type than those clipped, or a limit no number.
            ValueError: a sparse leaf is malformed, a limit is out of range, or the policy is to
                raise.
        """
        if clip.on_nonfinite == "raise":
            raise ValueError(
                'on_nonfinite is "raise"; what is traced, sharded, or on another device, cannot '
                'raise: choose "nan", "zero" or "keep"'
            )
        return self._recorded(clip, clip.on_nonfinite, clip.name or "clip_by_global_norm")

    def norm(self, clip: Clip) -> Any:
        """The global norm."""
        return self._measured(clip, clip.name or "global_norm", each=False)[1]

    def norms(self, clip: Clip) -> tuple[Any, Any]:
        """The norm of each leaf, and the global norm; JAX differentiates both."""
        return self._measured(clip, clip.name or "norms", each=True)

    def _measured(self, clip: Clip, name: str, *, each: bool) -> tuple[Any, Any]:
        with jax.enable_x64(True), jax.named_scope(name):
            return _measured(self._axes, each, *_elements(clip))

    def _recorded(self, clip: Clip, policy: str, name: str) -> tuple[list[Any], Any]:
        with jax.enable_x64(True), jax.named_scope(name):
            given = clip.use_norm
            if given is not None:
                given = limit_of("use_norm", given, check_use_norm)
            values, rows = _elements(clip)
            lesson, kind = clip.clip_norm, None
            if isinstance(lesson, Lesson):
                kind, limit = lesson.kind, _begun(lesson, [given, values, rows])
            else:
                limit = limit_of("clip_norm", lesson, check_clip_norm)
            norm, clip.each, ruling, against, new = _recorded(
                self._axes, policy, kind, clip.wants_each, limit, given, values, rows
            )
            if kind is not None:
                lesson.keep(ruling)
                if lesson.passed:
                    lesson.against = against
        return list(map(with_values, clip.leaves, new)), norm


# ---- if it is followed ----


def axes_of(group: Any) -> Any:
    """Names of axes, as JAX takes them."""
    axes = tuple(group) if isinstance(group, list | tuple) else (group,)
    if any(isinstance(axis, int) for axis in axes):
        raise TypeError(f"group is {group!r}; for JAX it is the name of an axis, or several")
    return None if group is None else axes


def is_followed(values: Sequence[Any]) -> bool:
    """If JAX traces one of leaves and limits, or the host's kernels do not reach an array."""
    if any(issubclass(kind, Tracer) for kind in _kinds(values)):
        return True
    if one_device():
        return False
    return not all(_on_host(x) for x in map(values_of, values) if isinstance(x, jax.Array))


def _kinds(values: Sequence[Any]) -> set[type]:
    kinds = set(map(type, values))
    return set(map(type, map(values_of, values))) if kinds & set(SPARSE) else kinds


def one_device() -> bool:
    """If the only device that arrays can be on is one CPU."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def _on_host(array: jax.Array) -> bool:
    devices: set[Any] = array.sharding.device_set
    return len(devices) == 1 and all(
        device.platform == "cpu" and device.process_index == jax.process_index()
        for device in devices
    )


# ---- what it consists of ----


def _begun(lesson: Lesson, args: Any) -> Any:
    """The state of a limit that learns.

    Raises:
        TypeError: an object would keep what is traced, which means nothing after the trace.
    """
    arrays = jax.tree.leaves(args)
    if lesson.passed:
        return lesson.begin(None)
    if any(isinstance(each, Tracer) for each in arrays):
        raise TypeError(
            f"{lesson.kind!r} keeps what it learns in itself, and what is traced cannot be kept: "
            "under jit, grad or vmap use gradclip.optax.clip_by_global_norm, which has it in the "
            "optimizer's state"
        )
    devices = [frozenset(x.sharding.device_set) for x in arrays if isinstance(x, jax.Array)]
    return lesson.begin(Steps(None), ("jax", *devices[:1]))


def limit_of(name: str, value: Any, check: Callable[[Any], Any]) -> Any:
    """A limit as an array; checked, where its value is known."""
    if not isinstance(value, Tracer):
        return np.float64(check(value))
    if not (jnp.issubdtype(value.dtype, np.floating) or jnp.issubdtype(value.dtype, np.integer)):
        raise TypeError(f"{name} is traced, of {value.dtype}; it must be a real number")
    if value.shape != ():
        raise ValueError(f"{name} is traced, of shape {value.shape}; it must be a scalar")
    return value


def _elements(clip: Clip) -> tuple[list[Any], list[Any]]:
    """The elements of leaves, and of those that are sparse the `_rows`."""
    paths = [partial(clip.path, place) for place in range(len(clip.leaves))]
    return list(map(checked, clip.leaves, paths)), list(map(_rows, clip.leaves, paths))


def _rows(leaf: Any, path: Callable[[], str]) -> Any:
    """The place of each row of a sparse leaf, and if it is in the array; None of a dense one."""
    if isinstance(leaf, BCOO):
        places, inside = places_of(leaf, leaf.indices)
        return jnp.where(inside, places, -1)
    if not isinstance(leaf, IndexedSlices):
        return None
    indices = jnp.asarray(leaf.indices)
    if not jnp.issubdtype(indices.dtype, np.integer):
        raise ValueError(f"{path()}.indices is {indices.dtype}; indices are integers")
    if indices.ndim != 1 or leaf.values.shape[:1] != indices.shape:
        raise ValueError(
            f"{path()} has indices of shape {indices.shape} and values of shape "
            f"{leaf.values.shape}; each row of values needs one index"
        )
    return indices


class Found(NamedTuple):
    """What comes of the norm of leaves."""

    norm: Any  # in its dtype
    wide: Any  # as float64
    low: Any  # as float64, times `LOWER`
    each: Any  # the norms of each, where they are wanted
    each_wide: Any  # as float64
    ruling: Ruling | None  # of a limit that learns
    limit: Any  # that they are clipped by
    against: Any  # the norm, as float64, that it is held against


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _recorded(
    axes: Any,
    policy: str,
    kind: Any,
    wants_each: bool,
    limit: Any,
    given: Any,
    values: list[Any],
    rows: list[Any],
) -> tuple[Any, Any, Ruling | None, Any, list[Any]]:
    asked = axes, policy, kind, wants_each
    found, new = clip_values(*asked, limit, given, values, rows)
    return found.norm, found.each, found.ruling, found.against, new


@partial(jax.jit, static_argnums=(0, 1))
def _measured(axes: Any, wants_each: bool, values: list[Any], rows: list[Any]) -> tuple[Any, Any]:
    """The norm of each, where they are wanted, and of all; XLA leaves out the new values."""
    asked = axes, "keep", None, wants_each
    found, _ = clip_values(*asked, jnp.float64(math.inf), None, values, rows)
    return found.each, found.norm


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def clip_values(
    axes: Any,
    policy: str,
    kind: Any,
    wants_each: bool,
    limit: Any,
    given: Any,
    values: list[Any],
    rows: list[Any],
) -> tuple[Found, list[Any]]:
    """What is found, and new values; of a ``kind`` that learns, the limit is its state."""
    with jax.enable_x64(True):
        wide = norms.is_wide(_OPS, [(x, None) for x in values])
        each: Any = None
        per_tensor = kind is not None and kind.per_tensor
        if per_tensor or wants_each:
            number, each = _norms(axes, values, rows, wide=wide)
        elif given is None:
            number = _norm(axes, values, rows, wide=wide)
        else:
            number = numbers.number_of(_OPS, real(given))
        lower = number._replace(exponent=number.exponent + int(math.log2(LOWER)))
        pairs = ((number, wide), (number, True), (lower, True))
        norm, norm64, low = (numbers.rounded(_OPS, one, wide=wide) for one, wide in pairs)
        ruling, held = None, number
        if per_tensor:
            ruling = judging.judged(kind, limit, numbers.rounded(_OPS, each, wide=True), norm64)
            limit, held = ruling.limit, _held_each(ruling.learnt, each, number)
        elif kind is not None:
            ruling = judging.judged(kind, limit, norm64)
            limit = jnp.where(ruling.skip, 0.0, ruling.limit)
        new = xla.carry_out(values, *decided(held, numbers.number_of(_OPS, real(limit)), policy))
        against = numbers.rounded(_OPS, held, wide=True) if per_tensor else norm64
        vector, vector64 = (
            numbers.rounded(_OPS, each, wide=wide) if wants_each else None for wide in (wide, True)
        )
        return Found(norm, norm64, low, vector, vector64, ruling, limit, against), new


def _held_each(own: Any, each: numbers.Number, whole: numbers.Number) -> numbers.Number:
    """What the limit of each leaf is held against: its norm or that of all, if that is finite."""
    significand, exponent = (jnp.where(own, each[i], whole[i]) for i in range(2))
    inf, nan = (jnp.broadcast_to(failed, own.shape) for failed in (whole.inf, whole.nan))
    return numbers.Number(significand, exponent, inf, nan)


def decided(norm: numbers.Number, limit: numbers.Number, policy: str) -> tuple[Any, numbers.Number]:
    """What is to be done with leaves of this norm, or of each of several, and the factor."""
    above, factor = numbers.compared(_OPS, norm, limit)
    failed = {"nan": xla.NAN, "zero": xla.ZERO, "keep": xla.KEEP}[policy]
    action = jnp.where(above, jnp.where(factor.nan, xla.NAN, xla.SCALE), xla.KEEP)
    return jnp.where(norm.inf | norm.nan, failed, action), factor


def real(limit: Any) -> Any:
    """A limit of a dtype that `traced` takes apart."""
    return limit.astype("float64") if jnp.issubdtype(limit.dtype, np.integer) else limit


def _norm(axes: Any, values: list[Any], rows: list[Any], *, wide: bool) -> numbers.Number:
    xs = []
    for x, places in zip(values, rows, strict=True):
        if places is None:
            xs.append(x)
        else:
            xs += norms.addends(_OPS, [rows_of(x, places)])
    if axes is None:
        return xla.norm(xs, wide=wide)
    return xla.root(lax.psum(xla.total(xs), axes), wide=wide)


def _norms(
    axes: Any, values: list[Any], rows: list[Any], *, wide: bool
) -> tuple[numbers.Number, numbers.Number]:
    """The norm of all leaves, and those of each."""
    if axes is None and all(places is None for places in rows):
        return xla.norms_of(values, wide=wide)
    xs = []
    for x, places in zip(values, rows, strict=True):
        if places is None:
            xs.append(x)
            continue
        leaf = rows_of(x, places)
        parts = norms.addends(_OPS, [leaf]) or [leaf[0]]  # which is empty
        xs.append(jnp.concatenate([part.ravel() for part in parts]))
    words = xla.totals(xs)
    words = words if axes is None else lax.psum(words, axes)
    own = jnp.array([norms.is_wide(_OPS, [(x, None)]) for x in values], bool)
    pairs = zip(xla.root(words, wide=True), xla.root(words, wide=False), strict=True)
    each = numbers.Number(*(jnp.where(own, *pair) for pair in pairs))
    return xla.root(jnp.sum(words, 0), wide=wide), each


@clip_values.defjvp
def _clip_jvp(
    axes: Any, policy: str, kind: Any, wants_each: bool, primals: Any, tangents: Any
) -> Any:
    found, new = clip_values(axes, policy, kind, wants_each, *primals)
    with jax.enable_x64(True):
        still = jax.tree.map(zero_from_primal, found)
        # A limit that learns is a constant here, as what it has learnt is.
        d_limit = tangents[0] if kind is None else still.limit
        primals, tangents = (found.limit, *primals[1:]), (d_limit, *tangents[1:])
        _, _, values, rows = primals
        d_each = None
        if wants_each:
            d_each = change_of_each(axes, found.each_wide, values, rows, tangents[2])
            d_each = d_each.astype(found.each.dtype)
        if found.ruling is not None and kind.per_tensor:
            own = found.ruling.learnt
            held = found.wide, found.against, found.limit, own
            d_wide, d_new = pushed_forward_each(axes, policy, held, primals, tangents)
        else:
            d_wide, d_new = pushed_forward(axes, policy, found.wide, found.low, primals, tangents)
        changes = still._replace(
            norm=d_wide.astype(found.norm.dtype),
            wide=d_wide,
            low=d_wide * LOWER,
            each=d_each,
            limit=d_limit,
        )
        return (found, new), (changes, d_new)
