"""What `test_jax.py` runs in a process of eight devices: the same bits, however divided."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gradclip
from gradclip.jax import xla

P = PartitionSpec
ARRAYS = [
    np.random.default_rng(0).standard_normal(shape).astype(dtype)
    for shape, dtype in [((16, 8), "float32"), ((32,), "float32"), ((8, 6), jnp.bfloat16)]
]
EXPECTED, NORM = gradclip.clip_by_global_norm(ARRAYS, 1.0)
clip = partial(gradclip.clip_by_global_norm, clip_norm=1.0)


def assert_expected(result: tuple[Any, Any]) -> None:
    """The bits of NumPy's; one norm, or the same one of each device."""
    clipped, norm = result
    assert (np.asarray(norm) == NORM).all(), norm
    for new, wanted in zip(clipped, EXPECTED, strict=True):
        assert new.dtype == wanted.dtype
        assert np.asarray(new).tobytes() == wanted.tobytes()


def assert_placed_alike(clipped: list[Any], arrays: list[Any]) -> None:
    """Outputs lie where the inputs do."""
    for new, old in zip(clipped, arrays, strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)


def divided(ways: int, axis_type: AxisType) -> Any:
    return jax.make_mesh((ways,), ("d",), devices=jax.devices()[:ways], axis_types=(axis_type,))


def loss(clip: Callable[[Any], Any], arrays: Any) -> Any:
    """A number that depends on what was clipped and on the norm."""
    clipped, norm = clip(arrays)
    return sum((x.astype("float32") ** 3).sum() for x in clipped) + norm


def named_shardings(ways: int) -> None:
    """XLA divides it by itself; outputs lie as the inputs do."""
    placed = jax.device_put(ARRAYS, NamedSharding(divided(ways, AxisType.Auto), P("d")))
    for function in (clip, jax.jit(clip)):
        result = function(placed)
        assert_expected(result)
        assert_placed_alike(result[0], placed)
    for each in ARRAYS, ARRAYS[::-1]:
        moved = jax.device_put(each, NamedSharding(divided(ways, AxisType.Auto), P("d")))
        assert jax.jit(gradclip.global_norm)(moved) == NORM


def explicit_shardings(ways: int) -> None:
    """Shardings that are a part of the types."""
    mesh = divided(ways, AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = jax.device_put(ARRAYS, NamedSharding(mesh, P("d")))
        result = jax.jit(clip)(placed)
        assert_expected(result)
        assert_placed_alike(result[0], placed)


def shard_map(ways: int, check_vma: bool) -> Callable[[Any], Any]:
    """Each device clips its shards by the norm of all of them."""
    sharded: Callable[[Any], Any] = jax.shard_map(
        partial(clip, group="d"),
        mesh=divided(ways, AxisType.Auto),
        in_specs=P("d"),
        out_specs=(P("d"), P()),
        check_vma=check_vma,
    )
    assert_expected(sharded(ARRAYS))
    assert_expected(jax.jit(sharded)(ARRAYS))
    return sharded


def gradients(ways: int, check_vma: bool) -> None:
    """Those of the whole."""
    sharded = shard_map(ways, check_vma)
    whole = jax.grad(partial(loss, clip))(list(map(jnp.asarray, ARRAYS)))
    gradient = jax.grad(partial(loss, sharded))
    if ways < 8 or not check_vma:
        gradient = jax.jit(gradient)  # quicker than to compile each operation by itself
    parts = gradient(list(map(jnp.asarray, ARRAYS)))
    for got, wanted in zip(parts, whole, strict=True):
        tolerance = 1e-2 if wanted.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(
            np.asarray(got, "f8"), np.asarray(wanted, "f8"), rtol=tolerance, atol=tolerance
        )


def of_two_kinds() -> None:
    """A leaf that is divided and one that each device has whole: lists of their own."""
    mesh = divided(2, AxisType.Auto)
    alone = jax.shard_map(
        lambda x, y: clip([x, y])[0], mesh=mesh, in_specs=(P("d"), P()), out_specs=[P("d"), P("d")]
    )
    for function in (alone, jax.jit(alone)):
        first, second = function(*ARRAYS[:2])
        for shard, new, other in zip(
            np.split(ARRAYS[0], 2), np.split(first, 2), np.split(second, 2), strict=True
        ):
            wanted, _ = gradclip.clip_by_global_norm([shard, ARRAYS[1]], 1.0)
            assert (new == wanted[0]).all()
            assert (other == wanted[1]).all()


def what_each_device_has() -> None:
    """A leaf that each device has whole is the same on all of them after clipping, too."""
    sharded = jax.shard_map(
        partial(clip, group="d"),
        mesh=divided(4, AxisType.Auto),
        in_specs=([P("d"), P()],),
        out_specs=([P("d"), P()], P()),
    )
    clipped, norm = sharded(ARRAYS[:2])
    wanted, wanted_norm = gradclip.clip_by_global_norm([ARRAYS[0], *[ARRAYS[1]] * 4], 1.0)
    assert norm == wanted_norm
    for new, array in zip(clipped, wanted, strict=False):
        assert (new == array).all()


def where_no_place_was_asked_for() -> None:
    """What is not bound to a device is not bound by clipping."""
    array = jnp.asarray(ARRAYS[1])
    (new,), norm = clip([array])
    assert [x.committed for x in (array, new, norm)] == [False] * 3
    placed = jax.device_put(array, NamedSharding(divided(4, AxisType.Auto), P("d")))
    assert (placed + new).shape == (placed * norm).shape == array.shape


def two_axes() -> None:
    """A norm over both axes of a mesh; over the one that is manual; divided along two."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    both = P(("x", "y"))
    by_both = jax.shard_map(
        partial(clip, group=("x", "y")), mesh=mesh, in_specs=both, out_specs=(both, P())
    )
    assert_expected(by_both(ARRAYS))
    by_one = jax.shard_map(
        partial(clip, group="x"),
        mesh=mesh,
        in_specs=P("x"),
        out_specs=(P("x"), P()),
        axis_names={"x"},
    )
    assert_expected(jax.jit(by_one)(ARRAYS))
    placed = jax.device_put(ARRAYS[:1], NamedSharding(mesh, P("x", "y")))
    rest = jax.device_put(ARRAYS[1:], NamedSharding(mesh, P("y")))
    assert_expected(jax.jit(clip)(placed + rest))


def other_ways() -> None:
    """`pmap`; a list on a device that is not the first; one leaf only that is divided."""
    shards = [array.reshape(8, -1) for array in ARRAYS]
    clipped, norms = jax.pmap(partial(clip, group="d"), axis_name="d")(shards)
    assert_expected(
        (
            [np.asarray(x).reshape(e.shape) for x, e in zip(clipped, EXPECTED, strict=True)],
            norms,
        )
    )
    device = jax.devices()[3]
    there = jax.device_put(ARRAYS, device)
    for function in (clip, jax.jit(clip)):
        clipped, norm = function(there)
        assert_expected((clipped, norm))
        assert {x.device for x in [*clipped, norm]} == {device}


@contextmanager
def by_operations() -> Iterator[None]:
    jax.clear_caches()
    with mock.patch.object(xla, "_one_device_sees_all", return_value=False):
        yield


def run(*each: int) -> None:
    """Every way to divide, among so many devices, and what else there is of several."""
    for ways in each:
        named_shardings(ways)
        explicit_shardings(ways)
        for check_vma in (True, False):
            gradients(ways, check_vma)
    of_two_kinds()
    what_each_device_has()
    where_no_place_was_asked_for()
    two_axes()
    other_ways()
    with by_operations():
        shard_map(2, check_vma=True)
        of_two_kinds()
    print("ok")


def run_at_length() -> None:
    """As many as `run` is not quick with, and derivatives by operations."""
    with by_operations():
        gradients(2, check_vma=True)
    jax.clear_caches()
    run(1, 8)
