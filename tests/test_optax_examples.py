"""The bits of `gradclip.optax.per_example_global_norm_clip`, held against NumPy's arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gradclip
from compare import assert_same_bits
from conftest import version

if version("jax") is None or version("optax") is None:
    pytest.skip("jax or optax is not installed", allow_module_level=True)
import jax
import jax.numpy as jnp

from gradclip.jax import xla
from gradclip.optax import per_example_global_norm_clip

WIDE = {"complex64": "complex128", "complex128": "complex128"}
DTYPES = ["float32", "bfloat16", "float16", "float64", "complex64", "complex128"]


def summed(values: list[Any], limit: float) -> tuple[list[Any], int]:
    """The sums and the count, example after example."""
    count = len(values[0])
    totals = [np.zeros(x.shape[1:], WIDE.get(x.dtype.name, "float64")) for x in values]
    number = 0
    for place in range(count):
        example = [np.array(x[place]) for x in values]
        new, norm = gradclip.clip_by_global_norm(example, limit, on_nonfinite="zero")
        number += not float(norm) <= limit
        for i, x in enumerate(new):
            wide = np.asarray(x).astype(totals[i].dtype)
            totals[i] = wide if count == 1 else totals[i] + wide
    return [rounded_once(x, each.dtype) for x, each in zip(totals, values, strict=True)], number


def rounded_once(total: Any, dtype: Any) -> Any:
    """NumPy rounds to bfloat16 by way of float32; so first to odd there."""
    if dtype != ml_dtypes.bfloat16:
        return total.astype(dtype)
    bits = total.reshape(-1).view(np.int64)
    odd = bits & -(1 << 29) | ((bits & ((1 << 29) - 1) > 0).astype(np.int64) << 29)
    return odd.view(np.float64).astype(np.float32).astype(dtype).reshape(total.shape)


@jax.jit
def jitted(values: list[Any], limit: Any) -> Any:
    return per_example_global_norm_clip(values, limit)


def check_examples(values: list[Any], limit: float, function: Callable[..., Any] = jitted) -> None:
    with jax.enable_x64(True):
        found, number = function([jnp.asarray(x) for x in values], np.float64(limit))
    wanted, wanted_number = summed(values, limit)
    assert number == wanted_number
    for got, each in zip(found, wanted, strict=True):
        assert_same_bits(np.asarray(got), np.asarray(each), nan_payload=False)


def examples(rng: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    """Numbers of every size, subnormal ones and zeros too; an example of inf, and one of zeros."""
    if dtype.startswith("complex"):
        real = "float32" if dtype == "complex64" else "float64"
        return (examples(rng, real, shape) + 1j * np.float32(0.5)).astype(dtype)
    digits = {"float16": 5, "float64": 305}.get(dtype, 38)
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-digits - 2, digits - 2, size=shape)
    x[1 % len(x)] *= 0
    x[4 % len(x)] *= -0.0
    x[:, : shape[1] // 8] = rng.normal(size=(len(x), shape[1] // 8))
    x[3 % len(x), -1] = -math.inf
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


LIMITS = [1e-44, 1e-3, 1e4, 1e30, 1e300, math.inf]


def check_one_dtype(dtype: str) -> None:
    """Whole blocks, one column more and one by itself; eight examples at once and some more."""
    rng = np.random.default_rng(DTYPES.index(dtype))
    values = [examples(rng, dtype, (20, columns)) for columns in (4096, 4097, 1)]
    for limit in LIMITS:
        check_examples(values, limit)


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(x, marks=pytest.mark.slow) for x in DTYPES[1:])]
)
def test_sums_have_the_bits_of_numpy(dtype: str) -> None:
    check_one_dtype(dtype)


def check_the_rounding_of_halves() -> None:
    """Sums that lie beside a midpoint of their own dtype, but not of float32."""
    for dtype, parts in ((ml_dtypes.bfloat16, (1, 2.0**-8, 2.0**-40)), ("f2", (1, 2**-11, 2**-24))):
        check_examples([np.array(parts)[:, None].astype(dtype)], math.inf)


def test_the_sum_of_halves_is_rounded_once() -> None:
    check_the_rounding_of_halves()


def test_one_example_keeps_its_zeros() -> None:
    check_examples([np.float32([[-0.0, 0.0, 1.0]]), np.float32([[-0.0]])], 1.0)
    check_examples([np.float32([[-0.0, 0.0], [-0.0, 0.0]])], 1.0)


def check_many_examples() -> None:
    """Threads share the examples, or one example where there are few; and the columns."""
    rng = np.random.default_rng(9)
    for shapes in ([(70, 30_000), (70, 1001)], [(3, 1 << 20)], [(2000, 300)]):
        values = [rng.standard_normal(shape).astype("float32") for shape in shapes]
        norms = np.linalg.norm(np.concatenate(values, axis=1).astype("float64"), axis=1)
        check_examples(values, float(np.median(norms)))


def test_many_examples_and_few() -> None:
    check_many_examples()


@pytest.mark.slow
def test_the_operations_of_xla_have_the_same_bits() -> None:
    """As on devices that the C kernel does not reach; float8 too."""
    rng = np.random.default_rng(8)
    values = [examples(rng, dtype, (6, 9)) for dtype in ("float32", "bfloat16", "complex128")]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(xla, "_one_device_sees_all", lambda _: False)
        function = jax.jit(per_example_global_norm_clip)
        for limit in LIMITS:
            check_examples(values, limit, function)
        check_examples([np.float32([[-0.0, 0.0, 1.0]])], 1.0, function)
        check_examples([np.zeros((0, 3), "float32")], 1.0, function)
        small = [np.float64([[5e-324, 2.0**-1022], [5e-324, -(2.0**-1023)], [0, 3 * 2.0**-1074]])]
        check_examples(small, 1.0, function)
        eighths = np.array([[0.75, 1.5], [0.5, 3.0]], ml_dtypes.float8_e5m2)
        check_examples([eighths], math.inf, function)


@pytest.mark.slow
def test_a_batch_of_batches() -> None:
    rng = np.random.default_rng(7)
    values, limits = rng.normal(size=(3, 5, 7)).astype("float32"), np.float32([1, 2.5, 4])
    found, number = jax.vmap(per_example_global_norm_clip)([values], limits)
    for place, limit in enumerate(limits):
        wanted, wanted_number = summed([values[place]], float(limit))
        assert number[place] == wanted_number
        assert_same_bits(np.asarray(found[0][place]), wanted[0], nan_payload=False)


@pytest.mark.slow
def test_the_derivative_is_the_sum_of_those_of_the_examples() -> None:
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(2, 4, 5)).astype("float32")

    def whole(x: Any, limit: Any) -> Any:
        return per_example_global_norm_clip(x, limit)[0]

    def in_turn(x: Any, limit: Any) -> Any:
        clips = [gradclip.clip_by_global_norm([each], limit, on_nonfinite="zero") for each in x]
        return sum(new[0] for new, _ in clips)

    at, along = (x, np.float32(2)), (y, np.float32(1))
    for ours, theirs in zip(jax.jvp(whole, at, along), jax.jvp(in_turn, at, along), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    gradients = [
        jax.grad(lambda *at, f=f: jnp.sum(f(*at) ** 2), argnums=(0, 1))(*at)
        for f in (whole, in_turn)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_norm_beyond_its_dtype_is_counted_by_its_value() -> None:
    """Of 3.0e38 twice and a limit above it: not clipped, so not counted."""
    grads = jnp.array([[3e38, 3e38], [1.0, 1.0]])
    with jax.enable_x64(True):
        assert [int(jitted([grads], np.float64(limit))[1]) for limit in (4e38, 5e38)] == [1, 0]


def check_all() -> None:
    """What shows a fault of the kernel that XLA calls."""
    for dtype in DTYPES:
        check_one_dtype(dtype)
    check_the_rounding_of_halves()
    check_many_examples()
    test_one_example_keeps_its_zeros()
