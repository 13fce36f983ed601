"""JAX: arrays, tracers, `gradclip.IndexedSlices` of them, and BCOO.

Arrays on one CPU go through the host's kernels, without a copy. Under a transformation, on other
devices and where they are sharded, the same bits come from the primitives of `kernels.xla`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.experimental.sparse import BCOO

from gradclip.core.decide import check_clip_norm, check_use_norm
from gradclip.core.exact import Scaled
from gradclip.core.protocol import Plain
from gradclip.core.sparse import IndexedSlices, check_rows, merged_rows
from gradclip.core.tree import Tree
from gradclip.jax import xla
from gradclip.jax.derivative import LOWER, pushed_forward, rows_of
from gradclip.jax.operations import Operations
from gradclip.kernels import cpu
from gradclip.kernels.cpu import leaves as host_leaves
from gradclip.kernels.cpu.leaves import Array, Held
from gradclip.kernels.traced import norms, numbers

measure, total, share = host_leaves.measure, host_leaves.total, host_leaves.share
queue, written = host_leaves.queue, host_leaves.written
check_there, everyone = host_leaves.check_there, host_leaves.everyone

_ACCEPTED = "float16, bfloat16, float8, float32, float64 and complex arrays"
_OPS = Operations()


# ---- arrays on the CPU ----


def hold(leaves: Sequence[Any], path: Callable[[int], str], *, writable: bool) -> Held:
    """Check the leaves and take hold of their memory.

    Raises:
        TypeError: a leaf is of another dtype or type than those clipped; with ``writable``, always.
        ValueError: a sparse leaf is malformed.
    """
    if writable:
        raise TypeError(
            "a JAX array cannot be written in place; clip_by_global_norm returns new arrays, and "
            "under jit with donated arguments uses their memory"
        )
    # The kernel asks for their buffers by itself: NumPy would take a microsecond or more for each.
    memory = cpu.take(list(leaves), None, writable=False)
    if memory is not None:
        return Held(leaves, [], None, memory, False, None)
    values = [_memory(leaf, partial(path, place)) for place, leaf in enumerate(leaves)]
    merged = _merged if any(isinstance(leaf, _SPARSE) for leaf in leaves) else None
    return host_leaves.hold(leaves, values, merged, path, writable=False)


def count_nonfinite(leaf: Any) -> tuple[int, int]:
    """How many elements are NaN, and how many are inf."""
    return host_leaves.nonfinite(_memory(leaf, str))


def scalar(value: Scaled, held: Held, *, wide: bool = False) -> Any:
    """The norm as an array."""
    committed = [x for x in map(_values, held.leaves[:1]) if x.committed]
    places = [next(iter(x.sharding.device_set)) for x in committed] or [None]
    return _arrays([np.asarray(host_leaves.scalar(value, held, wide=wide))], places)[0]


def copied(held: Held) -> list[Any]:
    """The leaves themselves: no array can be changed."""
    return list(held.leaves)


def filled(held: Held, value: float) -> list[Any]:
    """New leaves, every element ``value``."""
    new = _like(held)
    host_leaves.fill(new, value)
    return _rewrapped(held, new)


def scaled(held: Held, factor: Scaled) -> list[Any]:
    """New leaves, every element multiplied."""
    new = _like(held)
    if held.values:
        host_leaves.scale(held, new, factor)
    else:
        target = host_leaves.hold_plain(held.leaves, new, writable=False)
        assert target is not None, "new arrays"
        host_leaves.scale_to(held, target, factor)
    return _rewrapped(held, new)


def fill_(*_: Any) -> None:
    """Nothing comes here: `hold` refuses what is to be written."""
    raise AssertionError("a JAX array is written")


scale_ = fill_


_SPARSE = (BCOO, IndexedSlices)


def _values(leaf: Any) -> Any:
    """What holds the elements of a leaf."""
    if isinstance(leaf, BCOO):
        return leaf.data
    return leaf.values if isinstance(leaf, IndexedSlices) else leaf


def _checked(leaf: Any, path: Callable[[], str]) -> Any:
    """What holds the elements, of a dtype that is clipped."""
    values = _values(leaf)
    if not isinstance(values, jax.Array):
        raise TypeError(f"{path()} is {type(leaf).__name__}; gradclip clips {_ACCEPTED}")
    if not isinstance(values.dtype, np.dtype) or host_leaves.code_dtype(values.dtype) is None:
        raise TypeError(f"{path()} is {values.dtype}; gradclip clips {_ACCEPTED}")
    return values


def _memory(leaf: Any, path: Callable[[], str]) -> Array:
    """The elements of a leaf as an array."""
    values = np.asarray(_checked(leaf, path))
    if isinstance(leaf, IndexedSlices):
        check_rows(leaf._replace(values=values, indices=np.asarray(leaf.indices)), path)
    return values


def _merged(leaf: Any, values: Array) -> Iterator[Array] | None:
    if isinstance(leaf, IndexedSlices):
        return merged_rows(values, np.asarray(leaf.indices))
    if not isinstance(leaf, BCOO):
        return None
    places, inside = _places(leaf, np.asarray(leaf.indices))
    kept = np.broadcast_to(values, (*places.shape, *values.shape[places.ndim :]))[inside]
    sums = merged_rows(kept, places[inside])
    return iter([kept]) if sums is None and kept.shape != values.shape else sums


def _places(leaf: BCOO, indices: Any) -> tuple[Any, Any]:
    """The place of each row of a BCOO in the array it stands for, and if it is in there.

    As in `BCOO.todense` an index below 0 counts from the end, and one that is out of range is the
    way to say that a row is not used.
    """
    batch = leaf.shape[: leaf.n_batch]
    lengths = leaf.shape[leaf.n_batch : leaf.n_batch + leaf.n_sparse]
    if math.prod(batch + lengths) >= 2**63:
        raise ValueError(f"a BCOO of shape {leaf.shape} has more places than an int64 can number")
    places = np.arange(math.prod(batch)).reshape(*batch, 1).repeat(leaf.nse, -1)
    inside = places >= 0
    for axis, length in enumerate(lengths):
        index = indices[..., axis].astype("int64")
        index = index + length * (index < 0)
        inside = inside & (index >= 0) & (index < length)
        places = places * length + index
    return places, inside


# Bytes from which on a copy takes longer than to ask for none.
_LARGE = 1 << 18
_ALIGNMENT = 64  # of memory that XLA takes over


def _like(held: Held) -> list[Array]:
    return [_new(values.shape, values.dtype) for values in map(_values, held.leaves)]


def _new(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE:
        return np.empty(shape, dtype)
    room = np.empty(nbytes + _ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % _ALIGNMENT
    array: Array = room[begin : begin + nbytes].view(dtype).reshape(shape)
    return array


def _rewrapped(held: Held, new: list[Array]) -> list[Any]:
    places = (x.sharding if x.committed else None for x in map(_values, held.leaves))
    arrays = _arrays(new, places)  # which asks for them only if there is a choice
    return [_with_values(leaf, array) for leaf, array in zip(held.leaves, arrays, strict=True)]


def _arrays(new: list[Array], places: Iterable[Any]) -> list[Any]:
    """Arrays of JAX of these elements, each in its place, or if that is None where a new one is."""
    with jax.enable_x64(True):  # without it float64 would be rounded
        if _one_device():
            return [
                _identity(array) if array.nbytes < _LARGE else jax.device_put(array, may_alias=True)
                for array in new
            ]
        return list(map(jax.device_put, new, places))


@jax.jit
def _identity(array: Array) -> Any:
    """An array of JAX: by a call, which takes 8 us, against 30 by device_put.

    For each shape and dtype it is compiled once, in 14 ms.
    """
    return array


def _with_values(leaf: Any, values: Any) -> Any:
    if isinstance(leaf, BCOO):
        return BCOO(
            (values, leaf.indices),
            shape=leaf.shape,
            indices_sorted=leaf.indices_sorted,
            unique_indices=leaf.unique_indices,
        )
    return leaf._replace(values=values) if isinstance(leaf, IndexedSlices) else values


# ---- under a transformation, on other devices, on several ----


def workers(leaves: Sequence[Any], group: Any) -> None:
    """Nobody here: a group of JAX is one for its recorder."""


def recorder(values: Sequence[Any], group: Any) -> _Recorder | None:
    """Who clips under a transformation, or where the host's kernels do not reach the arrays."""
    group = _axes(group)
    if group is None and not any(issubclass(kind, Tracer) for kind in _kinds(values)):
        arrays = [x for x in map(_values, values) if isinstance(x, jax.Array)]
        if _one_device() or all(map(_on_host, arrays)):
            return None
    return _Recorder(group)


def _axes(group: Any) -> Any:
    """Names of axes, as JAX takes them."""
    axes = tuple(group) if isinstance(group, list | tuple) else (group,)
    if any(isinstance(axis, int) for axis in axes):
        raise TypeError(f"group is {group!r}; for JAX it is the name of an axis, or several")
    return None if group is None else axes


def _kinds(values: Sequence[Any]) -> set[type]:
    kinds = set(map(type, values))
    return set(map(type, map(_values, values))) if kinds & set(_SPARSE) else kinds


def _one_device() -> bool:
    """If the only device that arrays can be on is one CPU."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def _on_host(array: jax.Array) -> bool:
    devices: set[Any] = array.sharding.device_set
    return len(devices) == 1 and all(
        device.platform == "cpu" and device.process_index == jax.process_index()
        for device in devices
    )


class _Recorder(NamedTuple):
    """Clips by operations that JAX can transform."""

    group: Any

    def clip(
        self,
        tree: Tree,
        plain: Plain,  # noqa: ARG002  (on the host)
        clip_norm: Any,
        use_norm: Any,
        on_nonfinite: Any,
        name: str | None,
    ) -> tuple[list[Any], Any]:
        """New leaves and the norm."""
        if on_nonfinite == "raise":
            raise ValueError(
                'on_nonfinite is "raise"; what is traced, sharded, or on another device, cannot '
                'raise: choose "nan", "zero" or "keep"'
            )
        with jax.enable_x64(True), jax.named_scope(name or "clip_by_global_norm"):
            limit = _limit("clip_norm", clip_norm, check_clip_norm)
            given = None if use_norm is None else _limit("use_norm", use_norm, check_use_norm)
            values = [_checked(leaf, partial(tree.path, i)) for i, leaf in enumerate(tree.leaves)]
            rows = [_rows(leaf, partial(tree.path, i)) for i, leaf in enumerate(tree.leaves)]
            norm, new = _recorded(self.group, on_nonfinite, limit, given, values, rows)
        return list(map(_with_values, tree.leaves, new)), norm

    def norm(self, tree: Tree, plain: Plain, name: str | None) -> Any:
        """The global norm."""
        return self.clip(tree, plain, math.inf, None, "keep", name or "global_norm")[1]


def _limit(name: str, value: Any, check: Callable[[Any], Any]) -> Any:
    """A limit as an array; checked, where its value is known."""
    if not isinstance(value, Tracer):
        return np.float64(check(value))
    if not (jnp.issubdtype(value.dtype, np.floating) or jnp.issubdtype(value.dtype, np.integer)):
        raise TypeError(f"{name} is traced, of {value.dtype}; it must be a real number")
    if value.shape != ():
        raise ValueError(f"{name} is traced, of shape {value.shape}; it must be a scalar")
    return value


def _rows(leaf: Any, path: Callable[[], str]) -> Any:
    """The place of each row of a sparse leaf, and if it is in the array; None of a dense one."""
    if isinstance(leaf, BCOO):
        places, inside = _places(leaf, leaf.indices)
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


@partial(jax.jit, static_argnums=(0, 1))
def _recorded(
    axes: Any, policy: str, limit: Any, given: Any, values: list[Any], rows: list[Any]
) -> tuple[Any, list[Any]]:
    norm, _, _, new = _clip(axes, policy, limit, given, values, rows)
    return norm, new


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _clip(
    axes: Any, policy: str, limit: Any, given: Any, values: list[Any], rows: list[Any]
) -> tuple[Any, Any, Any, list[Any]]:
    """The norm in its dtype, as float64, as float64 times `LOWER`, and new values."""
    with jax.enable_x64(True):
        wide = norms.is_wide(_OPS, [(x, None) for x in values])
        if given is None:
            number = _norm(axes, values, rows, wide=wide)
        else:
            number = numbers.number_of(_OPS, _real(given))
        above, factor = numbers.compared(_OPS, number, numbers.number_of(_OPS, _real(limit)))
        failed = {"nan": xla.NAN, "zero": xla.ZERO, "keep": xla.KEEP}[policy]
        action = jnp.where(above, jnp.where(factor.nan, xla.NAN, xla.SCALE), xla.KEEP)
        action = jnp.where(number.inf | number.nan, failed, action)
        new = xla.carry_out(values, action, factor)
        low = number._replace(exponent=number.exponent + int(math.log2(LOWER)))
        pairs = ((number, wide), (number, True), (low, True))
        rounded = [numbers.rounded(_OPS, each, wide=wide) for each, wide in pairs]
        return (*rounded, new)


def _real(limit: Any) -> Any:
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


@_clip.defjvp
def _clip_jvp(axes: Any, policy: str, primals: Any, tangents: Any) -> Any:
    norm, wide, low, new = _clip(axes, policy, *primals)
    with jax.enable_x64(True):
        d_wide, d_new = pushed_forward(axes, policy, wide, low, primals, tangents)
        d_norm = d_wide.astype(norm.dtype)
        return (norm, wide, low, new), (d_norm, d_wide, d_wide * LOWER, d_new)
