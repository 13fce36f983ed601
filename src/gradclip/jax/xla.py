"""Primitives of JAX: norms, exact totals, their roots, scaling, sums of clipped examples.

On the CPU XLA calls the C kernel for them: one operation for many leaves, since what XLA needs to
compile grows with the number of operations. Where XLA itself divides arrays among devices, and on
other devices, each becomes the operations of `traced`, which XLA can divide and compile anywhere.

All are called with float64 enabled. With a ``batch``, each array has so many members along its
first axis, and each member is a list of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.interpreters.xla import apply_primitive
from jax.sharding import NamedSharding, PartitionSpec

from gradclip.jax.operations import Operations
from gradclip.kernels import cpu
from gradclip.kernels.traced import norms, scaling, squares, sums
from gradclip.kernels.traced.numbers import Number, is_inf, is_nan

# As in xla.h.
KEEP, SCALE, NAN, ZERO = range(4)
_TOTAL, _NUMBER = 146, 4

# XLA needs time that grows with the third power of how many arrays one call writes in place: 15 s
# for 2000, nothing to speak of for so many.
_SCALED_AT_ONCE = 64

_NATIVE = {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
_OPS = Operations()

Arrays = Sequence[Any]


def norm(xs: Arrays, *, wide: bool) -> Number:
    """The norm of arrays, rounded to float64 if it is ``wide``, else to float32."""
    if not xs:
        return norms.norm_of(_OPS, [], wide=wide)
    (number,) = _norm.bind(*varying_alike(xs), wide=wide, batch=None, in_turn=False)
    return _number(number)


def norms_of_examples(xs: Arrays, count: int, *, wide: bool) -> Number:
    """The norm of each of so many examples, which lie along the first axis of arrays."""
    (numbers,) = _norm.bind(*varying_alike(xs), wide=wide, batch=count, in_turn=True)
    return _number(numbers)


def total(xs: Arrays) -> Any:
    """The exact sum of squares of arrays, as words that add up."""
    if not xs:
        return jnp.zeros(_TOTAL, "int64")
    (words,) = _total.bind(*varying_alike(xs), batch=None)
    return words


def norms_of(xs: Arrays, *, wide: bool) -> tuple[Number, Number]:
    """The norm of arrays, as `norm` has it, and the norms of each, rounded as that alone."""
    if not xs:
        return norms.norm_of(_OPS, [], wide=wide), _number(jnp.zeros((0, _NUMBER), "int64"))
    (numbers,) = _norms.bind(*varying_alike(xs), wide=wide, batch=None)
    return _number(numbers[0]), _number(numbers[1:])


def totals(xs: Arrays) -> Any:
    """The exact sum of squares of each array, as `total` has one: a row for each."""
    if not xs:
        return jnp.zeros((0, _TOTAL), "int64")
    (words,) = _totals.bind(*varying_alike(xs), batch=None)
    return words


def root(words: Any, *, wide: bool) -> Number:
    """The norm of a sum of totals; of rows of them, of each."""
    (number,) = _root.bind(words, wide=wide)
    return _number(number)


def carry_out(xs: Arrays, action: Any, factor: Number) -> list[Any]:
    """New arrays: as the action says, the old ones, scaled, all NaN or all zero.

    With a vector of actions, and one of factors, each is of its own.
    """
    decision, each = _decision(action, factor), jnp.ndim(action) == 1
    # Those that vary alike go together: what is the same on all devices is to stay so.
    alike: dict[Any, list[int]] = {}
    for place, x in enumerate(xs):
        alike.setdefault(_varying(x), []).append(place)
    new = list(xs)
    for places in alike.values():
        for begin in range(0, len(places), _SCALED_AT_ONCE):
            chunk = places[begin : begin + _SCALED_AT_ONCE]
            own = decision[np.array(chunk)] if each else decision
            operands = varying_alike([own, *(xs[place] for place in chunk)])
            found = _carry_out.bind(*operands, batch=None, each=each)
            for place, x in zip(chunk, found, strict=True):
                new[place] = x
    return new


def clipped_sum(xs: Arrays, action: Any, factor: Number) -> list[Any]:
    """The sums over the first axis of arrays of what `carry_out` makes of each example there.

    In float64 in the order of the examples, and rounded once.
    """
    return list(_clipped_sum.bind(*varying_alike([_decision(action, factor), *xs]), batch=None))


def _number(words: Any) -> Number:
    significand, exponent, inf, nan = (words[..., place] for place in range(_NUMBER))
    return Number(significand, exponent, inf > 0, nan > 0)


def _decision(action: Any, factor: Number) -> Any:
    parts = [jnp.asarray(part, "int64") for part in (action, *factor[:2])]
    return jnp.stack(jnp.broadcast_arrays(*parts), axis=-1)


def varying_alike(xs: Arrays) -> list[Any]:
    """Arrays that all vary along the same axes of a mesh, as shard_map wants it said."""
    axes = [_varying(x) for x in xs]
    every = frozenset().union(*axes)
    if all(each == every for each in axes):
        return list(xs)
    return [
        lax.pcast(x, tuple(every - each), to="varying") if every - each else x
        for x, each in zip(xs, axes, strict=True)
    ]


def _varying(x: Any) -> frozenset[Any]:
    """The axes of a mesh along which an array varies, in shard_map."""
    aval = jax.typeof(x)
    # Before JAX 0.10 it stood there by itself.
    axes: frozenset[Any] = aval.mat.varying if hasattr(aval, "mat") else aval.vma
    return axes


# ---- by the operations of XLA ----


def _real(xs: Arrays) -> list[Any]:
    return norms.addends(_OPS, [(x, None) for x in xs])


def _packed(number: Number) -> Any:
    return jnp.stack([jnp.asarray(part, "int64") for part in number], axis=-1)


def _members(function: Callable[..., Any], batch: int | None) -> Callable[..., Any]:
    return function if batch is None else jax.vmap(function)


def _norm_by_operations(*xs: Any, wide: bool, batch: int | None, in_turn: bool) -> list[Any]:
    """With ``in_turn`` one member after the other, in the memory that one needs."""

    def one(parts: Arrays) -> Any:
        return _packed(norms.norm_of(_OPS, parts, wide=wide))

    with jax.enable_x64(True):
        # Taken apart here: of complex numbers in a loop XLA flushes subnormal parts.
        parts = _real(xs)
        if batch is not None and len(xs) == 1 and parts:
            rows = jnp.concatenate([x.reshape(batch, -1) for x in parts], 1)
            return [_packed(norms.norms_of_rows(_OPS, rows, wide=wide))]
        if not in_turn:
            return [_members(lambda *xs: one(_real(xs)), batch)(*xs)]
        return [lax.map(one, parts) if parts else jnp.zeros((batch, _NUMBER), "int64")]


def _norms_by_operations(*xs: Any, wide: bool, batch: int | None) -> list[Any]:
    def each(lists: list[Any], wide: bool) -> Any:
        return _packed(norms.norms_of_lists(_OPS, lists, wide=wide))

    def of_all(*xs: Any) -> Any:
        whole = _packed(norms.norm_of(_OPS, _real(xs), wide=wide))
        return jnp.concatenate([whole[None], _rows_by_width(each, xs)])

    with jax.enable_x64(True):
        return [_members(of_all, batch)(*xs)]


def _totals_by_operations(*xs: Any, batch: int | None) -> list[Any]:
    def each(lists: list[Any], wide: bool) -> Any:
        del wide
        words = squares.totals_of(_OPS, *norms.stretches(_OPS, lists))
        counts = [
            [norms.any_of(_OPS, [each(x) for x in xs]) for each in (is_inf, is_nan)] for xs in lists
        ]
        return jnp.concatenate([words, jnp.array(counts, "int64")], 1)

    with jax.enable_x64(True):
        return [_members(lambda *xs: _rows_by_width(each, xs), batch)(*xs)]


def _rows_by_width(function: Callable[[list[Any], bool], Any], xs: Arrays) -> Any:
    """A row for each array, those of float64 and the others taken apart."""
    is_wide = np.array([norms.is_wide(_OPS, [(x, None)]) for x in xs])
    places = [np.flatnonzero(is_wide == wide).tolist() for wide in (False, True)]
    rows = [
        function([_real([xs[place]]) for place in some], wide)
        for some, wide in zip(places, (False, True), strict=True)
        if some
    ]
    return jnp.concatenate(rows)[np.argsort([*places[0], *places[1]])]


def _total_by_operations(*xs: Any, batch: int | None) -> list[Any]:
    with jax.enable_x64(True):
        members = _members(lambda *xs: squares.total(_OPS, _real(xs)), batch)
        return [members(*xs)]


def _root_by_operations(words: Any, *, wide: bool) -> list[Any]:
    with jax.enable_x64(True):
        function = lambda words: _packed(squares.root(_OPS, words, wide=wide))  # noqa: E731
        for _ in range(words.ndim - 1):
            function = jax.vmap(function)
        return [function(words)]


def _carried_out(decision: Any, *xs: Any, each: bool = False) -> list[Any]:
    if each:
        return [_carried_out(own, x)[0] for own, x in zip(decision, xs, strict=True)]
    action, *factor = decision
    number = Number(factor[0], factor[1], False, False)

    def new(x: Any) -> Any:
        if jnp.iscomplexobj(x):
            return lax.complex(new(x.real), new(x.imag))
        # Among bits, since XLA makes one NaN of all; but not of bfloat16, whose last subnormal
        # numbers it would then flush on the CPU.
        to = x.dtype if x.dtype == "bfloat16" else np.dtype(f"uint{8 * x.dtype.itemsize}")
        nan, zero = np.array([math.nan, 0.0]).astype(x.dtype).view(to)
        filled = jnp.where(action == NAN, nan, zero)
        found = jnp.where(action == KEEP, lax.bitcast_convert_type(x, to), filled)
        scaled = lax.bitcast_convert_type(scaling.scaled(_OPS, x, number), to)
        return lax.bitcast_convert_type(jnp.where(action == SCALE, scaled, found), x.dtype)

    return [new(x) for x in xs]


def _carried_out_by_operations(decision: Any, *xs: Any, batch: int | None, each: bool) -> list[Any]:
    with jax.enable_x64(True):
        return _members(partial(_carried_out, each=each), batch)(decision, *xs)


def _clipped_sum_by_operations(decisions: Any, *xs: Any, batch: int | None) -> list[Any]:
    """One example after the other, in the memory that one needs."""

    def add(totals: list[Any], example: tuple[Any, ...]) -> tuple[list[Any], None]:
        pairs = zip(totals, _carried_out(*example), strict=True)
        return [sums.added(_OPS, total, x) for total, x in pairs], None

    def one(decisions: Any, *xs: Any) -> list[Any]:
        if len(decisions) == 1:  # which keeps its zeros of either sign
            return _carried_out(decisions[0], *(x[0] for x in xs))
        wide = ["complex128" if jnp.iscomplexobj(x) else "float64" for x in xs]
        zero = [jnp.zeros(x.shape[1:], dtype) for x, dtype in zip(xs, wide, strict=True)]
        totals, _ = lax.scan(add, zero, (decisions, *xs))
        pairs = zip(totals, xs, strict=True)
        return [sums.rounded(_OPS, total, str(x.dtype)) for total, x in pairs]

    with jax.enable_x64(True):
        return _members(one, batch)(decisions, *xs)


# ---- by the C kernel ----

# At once, so that programs compiled elsewhere and saved find them.
for _name, _handler in cpu.xla_handlers().items():
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu")


def _one_device_sees_all(context: Any) -> bool:
    """If the code is that of one device, and not to be divided among several by XLA."""
    axes = context.module_context.axis_context
    if hasattr(axes, "manual_axes"):
        return set(axes.manual_axes) == set(axes.mesh.axis_names) or axes.mesh.size == 1
    return getattr(axes, "num_devices", 1) == 1


def _lowered(by_operations: Callable[..., list[Any]]) -> Callable[..., Any]:
    """The operations, with it left to XLA how they are sharded, also where the caller's are not."""
    rule = mlir.lower_fun(by_operations, multiple_results=True)

    def lower(context: Any, *operands: Any, **params: Any) -> Any:
        avals = [
            [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in avals]
            for avals in (context.avals_in, context.avals_out)
        ]
        return rule(context.replace(avals_in=avals[0], avals_out=avals[1]), *operands, **params)

    return lower


def _lowering(
    target: str, by_operations: Callable[..., list[Any]], *, in_place: bool
) -> Callable[..., Any]:
    otherwise = _lowered(by_operations)

    def lower(context: Any, *operands: Any, **params: Any) -> Any:
        avals = context.avals_in
        native = all(str(aval.dtype) in _NATIVE for aval in avals if aval.dtype != "int64")
        if not (native and _one_device_sees_all(context)):
            return otherwise(context, *operands, **params)
        if target not in cpu.xla_handlers():
            cpu.warn_once()
            return otherwise(context, *operands, **params)
        # What is not needed any more is scaled where it lies; the rest XLA copies first.
        aliases = {i + 1: i for i in range(len(operands) - 1)} if in_place else {}
        rule = jax.ffi.ffi_lowering(target, operand_output_aliases=aliases)
        values = {name: 1 if value is None else value for name, value in params.items()}
        return rule(context, *operands, **{name: np.int64(x) for name, x in values.items()})

    return lower


# ---- the primitives ----


def _like(aval: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """What is known of an array of a shape and dtype, wherever another is."""
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return aval.update(shape=shape, dtype=np.dtype(dtype), weak_type=False, sharding=sharding)


def _small_result(length: int) -> Callable[..., list[Any]]:
    def evaluate(*avals: Any, batch: int | None, **_: Any) -> list[Any]:
        lead = () if batch is None else (batch,)
        return [_like(avals[0], (*lead, length), "int64")]

    return evaluate


def _rows_of(length: int, *, more: int) -> Callable[..., list[Any]]:
    """A row for each array, and so many more."""

    def evaluate(*avals: Any, batch: int | None, **_: Any) -> list[Any]:
        lead = () if batch is None else (batch,)
        return [_like(avals[0], (*lead, len(avals) + more, length), "int64")]

    return evaluate


def _root_result(words: Any, **_: Any) -> list[Any]:
    return [_like(words, (*words.shape[:-1], _NUMBER), "int64")]


def _carried_out_results(_: Any, *avals: Any, **__: Any) -> list[Any]:
    return list(avals)


def _clipped_sum_results(_: Any, *avals: Any, batch: int | None) -> list[Any]:
    lead = 0 if batch is None else 1
    return [_like(x, x.shape[:lead] + x.shape[lead + 1 :], x.dtype) for x in avals]


def _primitive(
    name: str,
    result: Callable[..., list[Any]],
    by_operations: Callable[..., list[Any]],
    *,
    in_place: bool = False,
) -> Primitive:
    primitive = Primitive(f"gradclip_{name}")
    primitive.multiple_results = True
    primitive.def_abstract_eval(result)

    primitive.def_impl(partial(apply_primitive, primitive))
    mlir.register_lowering(primitive, _lowered(by_operations))
    on_cpu = _lowering(f"gradclip_{name}", by_operations, in_place=in_place)
    mlir.register_lowering(primitive, on_cpu, platform="cpu")
    return primitive


def _batched(primitive: Primitive, xs: Arrays, dims: Sequence[Any], **params: Any) -> Any:
    """Members of a batch of lists; a batch of batches is one larger batch."""
    size = next(x.shape[d] for x, d in zip(xs, dims, strict=True) if d is not None)
    xs = [batching.bdim_at_front(x, d, size) for x, d in zip(xs, dims, strict=True)]
    inner = params.pop("batch")
    if inner is None:
        return primitive.bind(*xs, batch=size, **params), [0] * _count(primitive, xs)
    flat = [x.reshape(size * inner, *x.shape[2:]) for x in xs]
    new = primitive.bind(*flat, batch=size * inner, **params)
    return [x.reshape(size, inner, *x.shape[1:]) for x in new], [0] * len(new)


def _count(primitive: Primitive, xs: Arrays) -> int:
    return len(xs) - 1 if primitive in (_carry_out, _clipped_sum) else 1


def _root_batched(xs: Arrays, dims: Sequence[Any], **params: Any) -> Any:
    return _root.bind(jnp.moveaxis(xs[0], dims[0], 0), **params), [0]


_norm = _primitive("norm", _small_result(_NUMBER), _norm_by_operations)
_norms = _primitive("norms", _rows_of(_NUMBER, more=1), _norms_by_operations)
_totals = _primitive("totals", _rows_of(_TOTAL, more=0), _totals_by_operations)
_total = _primitive("total", _small_result(_TOTAL), _total_by_operations)
_root = _primitive("root", _root_result, _root_by_operations)
_carry_out = _primitive("scale", _carried_out_results, _carried_out_by_operations, in_place=True)
_clipped_sum = _primitive("clipped_sum", _clipped_sum_results, _clipped_sum_by_operations)
for _each in (_norm, _norms, _total, _totals, _carry_out, _clipped_sum):
    batching.primitive_batchers[_each] = partial(_batched, _each)
batching.primitive_batchers[_root] = _root_batched
