"""JAX: eager arrays, jit and every other transformation, sparse leaves, registered containers."""

from __future__ import annotations

import functools
import gc
import importlib
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import gradclip
from cases import DTYPES, exact_ties, near_midpoints, random_case_of_shapes
from compare import assert_norm, assert_same_bits, expected_of
from conftest import _jax_array, version
from gradclip.core import exact
from gradclip.kernels import cpu
from host import run_python
from machines import KERNELS, machine

if version("jax") is None:
    pytest.skip("jax is not installed", allow_module_level=True)
import jax
import jax.numpy as jnp
from jax.experimental.serialize_executable import serialize
from jax.experimental.sparse import BCOO

from gradclip.jax import xla
from gradclip.kernels.traced import norms

NATIVE = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]


def raises(error: type[Exception], text: str) -> Any:
    """The error with exactly this text, and what JAX adds about its own frames."""
    return pytest.raises(error, match=f"^{re.escape(text)}(\\n-+\\nFor simplicity, JAX .*)?$")


# ---- the same bits, eager, jitted and by XLA's own operations ----


@functools.cache
def program(_: str, **options: Any) -> Any:
    """A program of its own for each way to compile it."""

    def clip(leaves: Any, clip_norm: Any, use_norm: Any) -> Any:
        return gradclip.clip_by_global_norm(leaves, clip_norm, use_norm, **options)

    return jax.jit(clip)


def jitted(leaves: Any, clip_norm: Any, use_norm: Any = None, **options: Any) -> Any:
    """Under jit; the limits are traced, as float64."""
    with jax.enable_x64(True):
        return program("jit", **options)(leaves, clip_norm, use_norm)


def by_operations(leaves: Any, clip_norm: Any, use_norm: Any = None, **options: Any) -> Any:
    """As on devices that the C kernel does not reach."""
    with pytest.MonkeyPatch.context() as patched, jax.enable_x64(True):
        patched.setattr(xla, "_one_device_sees_all", lambda _: False)
        return program("operations", **options)(leaves, clip_norm, use_norm)


WAYS: dict[str, Callable[..., Any]] = {
    "eager": gradclip.clip_by_global_norm,
    "jit": jitted,
    "operations": by_operations,
}
SHAPES = [
    (),
    (0,),
    (7,),
    (3, 5),
    (33,),
    (2, 1, 64),
    (1,),
    (3, 0, 2),
    (2,),
    (16,),
    (5,),
    (4, 4),
    (9,),
]


@pytest.fixture(autouse=True, scope="module")
def _no_programs_left() -> Iterator[None]:
    yield
    jax.clear_caches()


def check(way: str, values: list[Any], limit: float, wanted: Any, **options: Any) -> None:
    leaves = [_jax_array(array) for array in values]
    clipped, norm = WAYS[way](leaves, limit, **options)
    assert isinstance(norm, jax.Array)
    assert_norm(np.asarray(norm)[()], wanted.norm)
    for new, expected in zip(clipped, wanted.leaves, strict=True):
        assert_same_bits(np.asarray(new), expected, nan_payload=False)
    for leaf, array in zip(leaves, values, strict=True):
        assert_same_bits(np.asarray(leaf), np.asarray(array), nan_payload=False)


LISTS = [*([name] for name in DTYPES), NATIVE, list(DTYPES)]
RANDOM = [
    *(("eager", kernel, dtypes) for kernel in KERNELS for dtypes in LISTS),
    # XLA's own operations, and what calls the C kernel.
    *(("operations", KERNELS[-1], dtypes) for dtypes in LISTS),
    *(
        ("jit", kernel, dtypes)
        for kernel in KERNELS
        for dtypes in LISTS
        if kernel != "numpy" and set(dtypes) <= set(NATIVE)
    ),
]


@pytest.mark.parametrize(
    ("way", "kernel_name", "dtypes", "count"),
    [
        # What all kernels do with random lists is in `test_bits`; XLA's own operations take
        # seconds to compile for each dtype.
        *(
            pytest.param(*each, 12, marks=pytest.mark.slow)
            for each in RANDOM
            if each[1] == KERNELS[-1]
            and (each[0] != "operations" or each[2] in (["float32"], list(DTYPES)))
        ),
        *(pytest.param(*each, 40, marks=pytest.mark.long) for each in RANDOM),
    ],
)
def test_random_lists(way: str, kernel_name: str, dtypes: list[str], count: int) -> None:
    rng = np.random.default_rng(len(dtypes) + 11)
    # Each leaf, and a norm that is given, make XLA compile for longer.
    alone = way == "operations" and len(dtypes) == 1
    with machine(kernel_name):
        for _ in range(count):
            shapes = SHAPES[:8] if alone else SHAPES
            case = random_case_of_shapes(rng, [DTYPES[name] for name in dtypes], shapes)
            if way == "operations" or (way == "jit" and case.on_nonfinite == "raise"):
                case = case._replace(on_nonfinite="nan")  # each policy is a program to compile
            if alone:
                case = case._replace(use_norm=None)
            options = {"use_norm": case.use_norm, "on_nonfinite": case.on_nonfinite}
            wanted = expected_of(case)
            if wanted.leaves is None:
                with pytest.raises(FloatingPointError):
                    WAYS[way](list(map(_jax_array, case.values)), case.clip_norm, **options)
                continue
            check(way, case.values, case.clip_norm, wanted, **options)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        pytest.param(
            way,
            dtype,
            # XLA's own operations take the longest to compile.
            marks=pytest.mark.long
            if way == "operations" and dtype != "float32"
            else pytest.mark.slow,
        )
        for way in WAYS
        for dtype in ("float32", "float64", "bfloat16", "float16")
    ],
)
def test_norms_between_two_numbers(dtype: str, way: str) -> None:
    """In one program, however many squares it takes: zeros make up the length."""
    rng, count = np.random.default_rng(3), 10 if way == "operations" else 40
    cases = list(near_midpoints(rng, DTYPES[dtype], count))
    if dtype != "float16":  # whose numbers are too few
        cases += near_midpoints(rng, DTYPES[dtype], count, closeness=20)
    if dtype in ("float32", "float64"):
        cases += exact_ties(rng, DTYPES[dtype], count)
    for values in cases:
        values[0] = np.append(values[0], np.zeros(150 - values[0].size, DTYPES[dtype]))
    for values in cases:
        wanted = gradclip.clip_by_global_norm(values, 1.0)
        check(way, values, 1.0, Clipped(*wanted))


class Clipped(NamedTuple):
    """As the oracle has it."""

    leaves: Any
    norm: Any


def test_large_arrays_on_xla_s_own_threads() -> None:
    """Cut among threads; one array and many; more than one call of scaling."""
    rng = np.random.default_rng(2)
    for shapes in (
        [(1 << 22,)],
        [(1000, 700), (3, 1 << 18)],
        [(64, i % 7 + 1) for i in range(200)],
    ):
        values = [rng.standard_normal(shape).astype("float32") for shape in shapes]
        for limit in (1.0, 1e9):
            wanted = Clipped(*gradclip.clip_by_global_norm(values, limit))
            check("eager", values, limit, wanted)
            check("jit", values, limit, wanted)


@pytest.mark.parametrize("shape", [(1 << 16,), (300, 200)])
def test_xla_adds_rows_up_before_columns(shape: tuple[int, ...]) -> None:
    """It would make one sum of the two, in an order that the certificate does not allow for."""
    with jax.enable_x64(True):
        certified = jax.jit(lambda x: norms._certified(xla._OPS, *norms._sum_of(xla._OPS, [x])))
        program = certified.lower(jnp.ones(shape, "float64")).compile().as_text()
    assert len(re.findall(r"= f64\S* reduce\(", program)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("way", ["jit", pytest.param("operations", marks=pytest.mark.long)])
def test_the_order_of_leaves_changes_nothing(way: str) -> None:
    rng = np.random.default_rng(6)
    values = [rng.standard_normal(shape).astype("float32") for shape in [(50,), (3, 4), (), (129,)]]
    found = set()
    for _ in range(4):
        leaves = [jnp.asarray(values[place]) for place in rng.permutation(len(values))]
        found.add(float(WAYS[way](leaves, 1.0)[1]))
    assert found == {float(gradclip.global_norm(values))}


@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("way", ["jit", "operations"])
def test_the_root_of_a_total_is_rounded_once(way: str, wide: bool) -> None:
    """Sums of every size, all ones, squares of numbers and of midpoints, one off them."""
    rng = np.random.default_rng(4)
    squares = [0, 1, 2, 3, (1 << 4200) - 1]
    for _ in range(60):
        bits = int(rng.integers(1, 2100))
        number = int.from_bytes(rng.bytes(bits // 8 + 1), "little") >> (7 - bits % 8)
        places = max(0, number.bit_length() - (54 if wide else 25))
        midpoint = (number >> places | 1) << places
        squares += [number, number**2, midpoint**2 - 1, midpoint**2, midpoint**2 + 1]
    totals = [words_of(square) for square in squares]
    totals[0][-1] = totals[1][-2] = 1  # a NaN, an inf
    with pytest.MonkeyPatch.context() as patched, jax.enable_x64(True):
        if way == "operations":
            patched.setattr(xla, "_one_device_sees_all", lambda _: False)
        numbers = jax.jit(functools.partial(xla._root.bind, wide=wide))(np.stack(totals))[0]
    to = exact.FLOAT64 if wide else exact.FLOAT32
    for total, (significand, exponent, inf, nan) in zip(totals, np.asarray(numbers), strict=True):
        wanted = exact.norm(total_of(total), to)
        assert (inf, nan) == (math.isinf(wanted.significand), math.isnan(wanted.significand))
        if not wanted.significand:
            assert not significand
        elif math.isfinite(wanted.significand):
            got = exact.Scaled.of(float(significand))
            assert got._replace(exponent=got.exponent + int(exponent)) == wanted


def words_of(square: int) -> Any:
    """A total of this sum of squares, in units of 2^-2176, as long as those under jit."""
    words = [square >> 32 * place & 0xFFFFFFFF for place in range(xla._TOTAL - 2)]
    return np.array([*words, 0, 0])


def total_of(words: Any) -> Any:
    """The same as totals are outside."""
    return np.concatenate([words[: exact.WORDS], words[-2:]])


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("way", ["eager", "jit"])
def test_with_and_without_x64(way: str, x64: bool) -> None:
    """What the user has set decides what arrays there are, not what norm they have."""
    with jax.enable_x64(x64):
        leaves = [jnp.full(1 << 20, 1.1, "float32"), jnp.ones(3, "bfloat16")]
        assert (jnp.ones(1, float).dtype == jnp.float64) == x64
        clip = functools.partial(gradclip.clip_by_global_norm, clip_norm=2.0)
        clipped, norm = (clip if way == "eager" else jax.jit(clip))(leaves)
        assert [x.dtype for x in [*clipped, norm]] == ["float32", "bfloat16", "float32"]
        wanted, wanted_norm = gradclip.clip_by_global_norm(list(map(np.asarray, leaves)), 2.0)
        assert norm == wanted_norm
        for new, expected in zip(clipped, wanted, strict=True):
            assert_same_bits(np.asarray(new), expected, nan_payload=True)
    if x64:  # float64 arrays stay what they are where x64 is off again
        with jax.enable_x64(True):
            wide = jnp.array([3.0, 4.0], "float64")
        clipped, norm = gradclip.clip_by_global_norm([wide], 2.5)
        assert (clipped[0].dtype, norm.dtype) == ("float64", "float64")


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16",
        "float64",
        *(pytest.param(dtype, marks=pytest.mark.long) for dtype in ("float16", "float32")),
    ],
)
def test_subnormal_numbers_in_vectors_and_in_what_is_left_over(dtype: str) -> None:
    """What compilers make of the last few numbers of an array flushes at other places."""
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    values = [np.full(size, -16 * tiny, DTYPES[dtype]) for size in (1, 2, 3, 7, 15, 33, 63)]
    norm = float(gradclip.global_norm(values))
    for limit in (norm / 2, norm * 2):
        wanted = Clipped(*gradclip.clip_by_global_norm(values, limit))
        check("jit", values, limit, wanted)
        check("operations", values, limit, wanted)


@pytest.mark.slow
def test_what_jax_leaves_undone_about_subnormal_numbers() -> None:
    """XLA's threads flush them to zero; ours do not."""
    tiny = np.full(4, 2.0**-140, "float32")
    wanted = Clipped(*gradclip.clip_by_global_norm([tiny], 2.0**-141))
    for way in WAYS:
        check(way, [tiny], 2.0**-141, wanted)
    assert float(wanted.norm) == 2.0**-139


@pytest.mark.slow
@pytest.mark.parametrize("way", ["jit", "operations"])
@pytest.mark.parametrize(
    ("values", "limit", "wanted", "norm"),
    [
        ([3, 4], math.nan, [math.nan] * 2, 5),
        ([0, 0], math.nan, [math.nan] * 2, 0),
        ([3, 4], -1.0, [0, 0], 5),
        ([3, 4], 0.0, [0, 0], 5),
        ([0, 0], -1.0, [0, 0], 0),
        ([3, 4], math.inf, [3, 4], 5),
        ([3, 4], np.int32(1), [0.6, 0.8], 5),
        ([3, 4], np.float16(2.5), [1.5, 2.0], 5),
        ([3, 4], jnp.bfloat16(2.5), [1.5, 2.0], 5),
    ],
)
def test_traced_limits(way: str, values: Any, limit: Any, wanted: Any, norm: float) -> None:
    clipped, found = WAYS[way]([jnp.array(values, "float32")], limit)
    np.testing.assert_array_equal(clipped[0], np.array(wanted, "float32"))
    assert found == norm


# ---- derivatives ----


class Point(NamedTuple):
    """Where a derivative is taken, in float64."""

    values: list[Any]
    limit: float


def clipped_flat(limit: Any, use_norm: Any, values: list[Any]) -> Any:
    """Outputs and the norm, as one vector."""
    clipped, norm = gradclip.clip_by_global_norm(values, limit, use_norm)
    return jnp.concatenate([*(x.ravel() for x in clipped), norm.reshape(1)])


def finite_differences(function: Callable[..., Any], args: Any) -> Any:
    """Central differences of a function of arrays, as `jax.jacobian` nests them."""
    leaves, spec = jax.tree.flatten(args)
    found = []
    for place, leaf in enumerate(leaves):
        columns = []
        for index in np.ndindex(leaf.shape):
            ends = []
            for step in (-1e-6, 1e-6):
                moved = np.array(leaf)
                moved[index] += step
                new = [*leaves[:place], jnp.asarray(moved), *leaves[place + 1 :]]
                ends.append(np.asarray(function(*jax.tree.unflatten(spec, new))))
            columns.append((ends[1] - ends[0]) / 2e-6)
        found.append(np.stack(columns, -1).reshape(*columns[0].shape, *leaf.shape))
    return jax.tree.unflatten(spec, found)


@pytest.fixture
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def assert_close(got: Any, wanted: Any, tolerance: float = 1e-7) -> None:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=tolerance, rtol=1e-7)


@functools.cache
def jitted_jacobian(jacobian: Any, *argnums: int) -> Any:
    """Of `clipped_flat`, compiled once for every limit."""
    return jax.jit(jacobian(clipped_flat, argnums))


@pytest.mark.slow
@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("factor", [0.2, 0.999, 1.001, 5.0])
@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev], ids=["forward", "reverse"])
def test_jacobians_are_finite_differences(jacobian: Any, factor: float, given: bool) -> None:
    """Of every argument: values, the limit, the norm that is given."""
    rng = np.random.default_rng(8)
    values = [jnp.asarray(rng.standard_normal(shape)) for shape in [(3,), (2, 2), ()]]
    norm = gradclip.global_norm(values)
    args: tuple[Any, ...] = (norm * factor, norm * 1.5 if given else None, values)
    argnums = (0, 1, 2) if given else (0, 2)
    wanted = finite_differences(clipped_flat, args)
    found = jitted_jacobian(jacobian, *argnums)(*args)
    assert_close(found, [wanted[place] for place in argnums])


@pytest.mark.slow
@pytest.mark.usefixtures("_x64")
def test_at_the_boundary_the_jacobian_is_the_one_from_below() -> None:
    """Nothing is clipped there: the identity, and the direction of the norm."""
    jacobian = jax.jacobian(clipped_flat, 2)(5.0, None, [jnp.array([3.0, 4.0])])[0]
    assert_close(jacobian, np.array([[1, 0], [0, 1], [0.6, 0.8]]))


@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize("limit", [1e-300, 1.0, math.inf])
def test_at_zero_the_jacobian_is_the_identity_and_the_norm_s_is_zero(limit: float) -> None:
    jacobian = jax.jacobian(clipped_flat, 2)(limit, None, [jnp.zeros(2)])[0]
    assert_close(jacobian, np.array([[1, 0], [0, 1], [0, 0]]))


@pytest.mark.slow
@pytest.mark.usefixtures("_x64")
def test_under_vmap_each_member_has_its_own_norm_and_jacobian() -> None:
    rng = np.random.default_rng(9)
    batch = [jnp.asarray(rng.standard_normal((4, *shape))) for shape in [(3,), (2, 2)]]
    limits = jnp.array([0.1, 1.0, 2.0, 100.0])
    singles = [[x[i] for x in batch] for i in range(4)]
    both = jax.vmap(clipped_flat, (0, None, 0))(limits, None, batch)
    for i, single in enumerate(singles):
        assert_same_bits(
            np.asarray(both[i]), np.asarray(clipped_flat(limits[i], None, single)), nan_payload=True
        )
    jacobians = jax.vmap(jax.jacobian(clipped_flat, 2), (0, None, 0))(limits, None, batch)
    for i, single in enumerate(singles):
        wanted = finite_differences(clipped_flat, (limits[i], None, single))[2]
        assert_close([x[i] for x in jacobians], wanted)
    # A batch of one leaf only; a batch along another axis; a batch of batches.
    first, second = batch
    alone = jax.vmap(clipped_flat, (None, None, (0, None)))(1.0, None, (first, second[0]))
    assert_same_bits(
        np.asarray(alone[3]),
        np.asarray(clipped_flat(1.0, None, [first[3], second[0]])),
        nan_payload=True,
    )
    clip = functools.partial(clipped_flat, 1.0, None)
    last = jax.vmap(lambda x: clip([x]), -1)(first.T)
    np.testing.assert_array_equal(last, jax.vmap(lambda x: clip([x]))(first))
    twice = jax.vmap(jax.vmap(lambda x: clip([x])))(second)
    for i, j in np.ndindex(4, 2):
        np.testing.assert_array_equal(twice[i, j], clip([second[i, j]]))


@pytest.mark.slow
@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_second_derivatives(factor: float) -> None:
    rng = np.random.default_rng(10)
    values = [jnp.asarray(rng.standard_normal(3)), jnp.asarray(rng.standard_normal(2))]
    weights = jnp.asarray(rng.standard_normal(6))

    def loss(values: list[Any]) -> Any:
        return weights @ clipped_flat(factor * 2.0, None, values) ** 3

    gradient = lambda *flat: jnp.concatenate(jax.grad(loss)(list(flat)))  # noqa: E731
    wanted = finite_differences(gradient, tuple(values))
    for outer in (jax.jacfwd, jax.jacrev):
        for inner in (jax.jacfwd, jax.jacrev):
            rows = outer(inner(loss))(values)
            got = [jnp.concatenate([rows[i][j] for i in range(2)]) for j in range(2)]
            assert_close(got, wanted, 1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("_x64")
def test_complex_derivatives() -> None:
    """With respect to the real and imaginary parts."""
    rng = np.random.default_rng(12)
    parts = jnp.asarray(rng.standard_normal((2, 3)))

    def flat(parts: Any) -> Any:
        (new,), norm = gradclip.clip_by_global_norm([jax.lax.complex(parts[0], parts[1])], 1.0)
        return jnp.concatenate([new.real, new.imag, norm.reshape(1)])

    assert_close(jax.jacobian(flat)(parts), finite_differences(flat, (parts,))[0])


def test_complex_gradients_without_x64() -> None:
    """JAX transposes them outside of where float64 is enabled."""
    z = jnp.array([3 + 1j, 4])
    gradient = jax.jit(jax.grad(lambda z: gradclip.global_norm([z])))(z)
    np.testing.assert_allclose(gradient, z.conj() / gradclip.global_norm([z]), rtol=1e-6)
    clip = lambda z: gradclip.clip_by_global_norm([z], 1.0)[0][0].real.sum()  # noqa: E731
    assert np.isfinite(jax.grad(clip)(z)).all()


@pytest.mark.slow
@pytest.mark.usefixtures("_x64")
def test_jacobians_where_the_norm_is_beyond_float64() -> None:
    for policy in ("nan", "zero", "keep"):
        clip = lambda x, p=policy: gradclip.clip_by_global_norm(  # noqa: E731
            [x], 1e308, on_nonfinite=p
        )[0][0]
        jacobian = jax.jacobian(clip)(jnp.full(4, 1.5e308))
        assert_close(jacobian, (np.eye(4) - 0.25) / 3)


@pytest.mark.usefixtures("_x64")
def test_narrow_leaves_beside_a_norm_beyond_float64() -> None:
    wide, narrow = jnp.full(2, 1.5e308), jnp.array([1e38, 2.0], "float32")
    both = functools.partial(gradclip.clip_by_global_norm, [wide, narrow])
    new, slope = jax.jvp(lambda limit: both(limit)[0][1], (1e308,), (1e300,))
    assert new.dtype == slope.dtype == "float32"
    np.testing.assert_allclose(slope, narrow / 1.5e8 / math.sqrt(2), rtol=1e-6)
    pulled = jax.grad(lambda limit: both(limit)[0][1][0])(1e308)
    np.testing.assert_allclose(pulled / 1e-271, 10 / 1.5 / math.sqrt(2), rtol=1e-6)


@pytest.mark.slow
def test_the_gradient_of_half_precision_has_its_dtype_and_neither_overflows() -> None:
    for dtype in ("float16", "bfloat16", "float32"):
        x = jnp.array([3e4, 4e4], dtype)
        (new,), pull = jax.vjp(lambda x: gradclip.clip_by_global_norm([x], 1.0)[0], x)
        (gradient,) = pull([jnp.array([1.0, 0.0], dtype)])
        assert (new.dtype, gradient.dtype) == (dtype, dtype)
        np.testing.assert_allclose(
            gradient.astype("float32"), [0.64 / 5e4, -0.48 / 5e4], rtol=2e-2, atol=6e-8
        )


@pytest.mark.parametrize(("policy", "slope"), [("nan", math.nan), ("zero", 0.0), ("keep", 1.0)])
def test_derivatives_where_an_element_is_inf(policy: Any, slope: float) -> None:
    x = jnp.array([1.0, math.inf])
    clip = lambda x: gradclip.clip_by_global_norm([x], 1.0, on_nonfinite=policy)[0][0]  # noqa: E731
    _, tangent = jax.jvp(clip, (x,), (jnp.array([1.0, 0.0]),))
    np.testing.assert_array_equal(tangent, [slope, slope * 0])


@pytest.mark.slow
@pytest.mark.usefixtures("_x64")
def test_scan_checkpoint_and_linearize() -> None:
    rng = np.random.default_rng(13)
    weights, rows = (
        jnp.asarray(rng.standard_normal((3, 3))),
        jnp.asarray(rng.standard_normal((5, 3))),
    )

    def loss(weights: Any, clip: Any) -> Any:
        def step(state: Any, row: Any) -> Any:
            (state,), norm = clip([jnp.tanh(weights @ state + row)])
            return state, norm

        state, norms = jax.lax.scan(step, jnp.ones(3), rows)
        return state @ state + norms.sum()

    clip = functools.partial(gradclip.clip_by_global_norm, clip_norm=0.7)
    plain = jax.grad(loss)(weights, clip)
    again = jax.jit(jax.grad(loss), static_argnums=1)(weights, jax.checkpoint(clip))
    assert_close(again, plain, 1e-12)
    assert_close(plain, finite_differences(lambda w: loss(w, clip), (weights,))[0])
    _, push = jax.linearize(lambda w: loss(w, clip), weights)
    assert_close(push(jnp.ones((3, 3))), jnp.sum(plain))


def test_the_gradient_through_a_loop_body_is_that_of_its_branch() -> None:
    def loss(x: Any, flag: Any) -> Any:
        clip = lambda x: gradclip.clip_by_global_norm([x], 1.0)[0][0]  # noqa: E731
        return jax.lax.cond(flag, clip, lambda x: x, x).sum()

    x = jnp.array([3.0, 4.0])
    gradient = jax.jit(jax.grad(loss))
    np.testing.assert_array_equal(gradient(x, False), [1, 1])
    np.testing.assert_allclose(gradient(x, True), [0.2 - 0.6 * 0.28, 0.2 - 0.8 * 0.28], rtol=1e-6)


# ---- groups of an axis name; shards ----


@pytest.mark.slow
def test_over_an_axis_of_vmap() -> None:
    """The norm of all members, also of one axis of two, and its derivative."""
    whole = jnp.asarray(np.random.default_rng(14).standard_normal((4, 6)), "float32")
    wanted, wanted_norm = gradclip.clip_by_global_norm(list(whole), 1.0)
    over = functools.partial(gradclip.clip_by_global_norm, clip_norm=1.0, group="i")
    clipped, norms = jax.vmap(over, axis_name="i")([whole])
    np.testing.assert_array_equal(clipped[0], np.stack(wanted))
    assert set(map(float, norms)) == {float(wanted_norm)}
    assert (
        jax.vmap(functools.partial(gradclip.global_norm, group="i"), axis_name="i")(
            [whole]
        ).tolist()
        == [wanted_norm] * 4
    )
    blocks = whole.reshape(4, 2, 3)
    inner = jax.vmap(jax.vmap(over, axis_name="i"), axis_name="j")([blocks])[1]
    outer = jax.vmap(
        jax.vmap(functools.partial(over, group=("i", "j")), axis_name="i"), axis_name="j"
    )([blocks])[1]
    assert [float(n) for n in inner[:, 0]] == [float(gradclip.global_norm([row])) for row in whole]
    assert set(np.asarray(outer).ravel().tolist()) == {float(wanted_norm)}

    def loss(clip: Any, x: Any) -> Any:
        clipped, norm = clip(x)
        return (clipped[0] ** 3).sum() + norm.mean()

    gradients = jax.grad(lambda x: loss(lambda x: jax.vmap(over, axis_name="i")([x]), x))(whole)
    alone = jax.grad(lambda x: loss(lambda x: gradclip.clip_by_global_norm([x], 1.0), x))(whole)
    np.testing.assert_allclose(gradients, alone, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("compiled", [lambda f: f, jax.jit])
def test_a_group_of_no_axis(compiled: Callable[..., Any]) -> None:
    with pytest.raises(NameError, match="nowhere"):
        compiled(lambda x: gradclip.clip_by_global_norm([x], 1.0, group="nowhere"))(jnp.ones(2))


@pytest.mark.parametrize("group", [0, (0,), ["i", 1], True])
def test_a_group_by_number(group: Any) -> None:
    """JAX would take it for an axis of the array that is summed."""
    text = f"group is {group!r}; for JAX it is the name of an axis, or several"
    measure = functools.partial(gradclip.global_norm, group=group)
    for function in (measure, jax.jit(measure)):
        with raises(TypeError, text):
            function([jnp.ones(2)])


@pytest.mark.parametrize(
    "call",
    [
        pytest.param("run(2)", marks=pytest.mark.slow),
        pytest.param("run_at_length()", marks=pytest.mark.long),
    ],
)
def test_over_eight_devices(call: str) -> None:
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    ended = run_python(f"import jax_worker; jax_worker.{call}", env=environment)
    assert (ended.stdout, ended.returncode) == ("ok\n", 0), ended.stderr


# ---- modes of JAX ----


@pytest.mark.slow
def test_without_jit_and_looking_for_nan() -> None:
    x = jnp.array([3.0, 4.0])
    clip = lambda x: gradclip.clip_by_global_norm([x], 1.0)[0][0]  # noqa: E731
    with jax.disable_jit():
        np.testing.assert_array_equal(jax.vmap(clip)(x[None])[0], clip(x))
        np.testing.assert_allclose(jax.grad(lambda x: clip(x)[0])(x), [0.128, -0.096], rtol=1e-6)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.grad(lambda x: clip(x).sum())(x * jnp.inf)


@pytest.mark.slow
def test_a_program_saved_in_one_process_runs_in_another(tmp_path: Path) -> None:
    clip = jax.jit(lambda x: gradclip.clip_by_global_norm([x], 1.0))
    compiled = clip.lower(jnp.array([3.0, 4.0])).compile()
    (tmp_path / "program").write_bytes(pickle.dumps(serialize(compiled)))
    code = """
        import pathlib, pickle, sys
        import jax.numpy as jnp
        import gradclip
        from jax.experimental.serialize_executable import deserialize_and_load
        x = jnp.array([3.0, 4.0])
        gradclip.global_norm([x])
        program = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
        print(deserialize_and_load(*program)(x)[1])
    """
    ended = run_python(code, str(tmp_path / "program"))
    assert (ended.stdout, ended.returncode) == ("5.0\n", 0), ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        ("eager", "float8_e4m3"),
        ("jit", "float32"),
        ("operations", "float16"),
        *(
            pytest.param(way, dtype, marks=pytest.mark.long)
            for way, rest in (
                ("eager", ["float8_e5m2", "float16", "float32"]),
                ("jit", ["float8_e5m2", "float8_e4m3", "float16"]),
                ("operations", ["float8_e5m2", "float8_e4m3", "float32"]),
            )
            for dtype in rest
        ),
    ],
)
def test_what_is_kept_is_kept_to_the_bit(way: str, dtype: str) -> None:
    """NaN with a sign and a payload, beside a dtype of which XLA's operations take care."""
    bits = 8 * DTYPES[dtype].itemsize
    codes = np.array([2 ** (bits - 1) - 1, -1, -2, 56]).astype(f"u{bits // 8}")
    leaves = [jnp.asarray(codes.view(DTYPES[dtype])), jnp.ones(1, "float8_e5m2")]
    clipped, norm = WAYS[way](leaves, 1.0, on_nonfinite="keep")
    assert np.isnan(norm)
    np.testing.assert_array_equal(np.asarray(clipped[0]).view(codes.dtype), codes)


# ---- buffers ----


def test_donated_buffers_are_scaled_where_they_lie() -> None:
    """Also those that an eager call has read."""
    clip = jax.jit(lambda x: gradclip.clip_by_global_norm(x, 1.0)[0], donate_argnums=0)
    for size in (100, 1 << 20):
        leaves = [jnp.full(size, 0.5) + 1, jnp.ones(size, "bfloat16") + 1]
        gradclip.clip_by_global_norm(leaves, 0.75)
        addresses = [leaf.unsafe_buffer_pointer() for leaf in leaves]
        clipped = clip(leaves)
        assert all(leaf.is_deleted() for leaf in leaves)
        assert [new.unsafe_buffer_pointer() for new in clipped] == addresses


def test_what_is_not_donated_stays() -> None:
    x = jnp.array([3.0, 4.0])
    clipped = jax.jit(lambda x: (gradclip.clip_by_global_norm([x], 1.0)[0], x * 2))(x)
    assert x.tolist() == [3, 4]
    assert clipped[1].tolist() == [6, 8]


def test_with_nothing_to_clip_an_array_comes_back_itself() -> None:
    leaves = [jnp.ones(3), jnp.ones((2, 2), "bfloat16")]
    clipped, _ = gradclip.clip_by_global_norm(leaves, 10.0)
    assert all(new is old for new, old in zip(clipped, leaves, strict=True))


def test_outputs_do_not_share_memory_with_anything_that_changes() -> None:
    """New memory each time, though JAX is given NumPy's."""
    x = jnp.ones(1 << 18)
    first, _ = gradclip.clip_by_global_norm([x], 1.0)
    before = np.array(first[0])
    for limit in (2.0, 3.0, 4.0):
        gradclip.clip_by_global_norm([x], limit)
    gc.collect()
    np.testing.assert_array_equal(first[0], before)


def test_the_computation_that_makes_an_array_is_waited_for() -> None:
    """JAX computes behind the caller's back."""
    make = jax.jit(lambda key: jax.random.normal(key, (1 << 20,)))
    for seed in range(5):
        x = make(jax.random.key(seed))
        norm = gradclip.global_norm([x])
        assert norm == gradclip.global_norm([np.asarray(x)])


def test_a_donated_array_is_refused_by_name() -> None:
    x = jnp.ones(3)
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    with pytest.raises(RuntimeError, match="deleted"):
        gradclip.clip_by_global_norm([x], 1.0)


def test_a_program_of_many_leaves_compiles_soon() -> None:
    """A fixed number of operations, however many leaves; each call writes 64 at most."""
    leaves = [jnp.ones(2)] * 1000
    clip = jax.jit(lambda x: gradclip.clip_by_global_norm(x, 1.0))
    text = clip.lower(leaves).as_text()
    assert text.count("gradclip_norm") == 1
    assert text.count("gradclip_scale") == math.ceil(1000 / 64)
    assert text.count("output_operand_alias<") == 1000  # in place, where XLA may
    assert "stablehlo.reduce" not in text


@pytest.mark.parametrize("way", ["eager", "jit"])
def test_the_name_is_that_of_the_operations(way: str) -> None:
    clip = lambda x: gradclip.clip_by_global_norm([x], 1.0, name="my_clip")  # noqa: E731
    if way == "eager":
        assert clip(jnp.ones(2))[1] == np.float32(math.sqrt(2))
    else:
        assert "my_clip" in jax.jit(clip).lower(jnp.ones(2)).as_text(debug_info=True)


# ---- sparse leaves ----


def embedding(dtype: str = "float32") -> tuple[Any, Any]:
    """Rows of which two are the same: values, indices."""
    return jnp.array([[1, 2], [2, 0], [2, 4]], dtype), jnp.array([3, 1, 3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        *((way, dtype) for way in ("eager", "jit") for dtype in ("bfloat16", "complex64")),
        ("operations", "float32"),
        *(pytest.param(way, "float32", marks=pytest.mark.long) for way in ("eager", "jit")),
        *(
            pytest.param("operations", dtype, marks=pytest.mark.long)
            for dtype in ("bfloat16", "complex64")
        ),
    ],
)
@pytest.mark.parametrize("kind", ["slices", "bcoo"])
def test_rows_of_the_same_place_are_added_before_they_are_squared(
    way: str, kind: str, dtype: str
) -> None:
    values, rows = embedding(dtype)
    leaf: Any = gradclip.IndexedSlices(values, rows)
    if kind == "bcoo":
        leaf = BCOO((values, rows[:, None]), shape=(5, 2))
    clipped, norm = WAYS[way]([leaf], 3.5)  # of (2, 0) and (3, 6): 7
    assert norm == 7
    assert type(clipped[0]) is type(leaf)
    new = clipped[0].values if kind == "slices" else clipped[0].data
    np.testing.assert_array_equal(new, values / 2)
    np.testing.assert_array_equal(clipped[0].indices.ravel(), rows)
    if kind == "bcoo":
        np.testing.assert_array_equal(clipped[0].todense(), leaf.todense() / 2)


SOME_KINDS = [(0, 0), (1, 1), (0, 4), (4, 0)]
ALL_KINDS = [*SOME_KINDS, (1, 0), (2, 0), (0, 1), (0, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "kinds"),
    [
        ("eager", SOME_KINDS[:2]),
        ("jit", ALL_KINDS),
        pytest.param("eager", ALL_KINDS, marks=pytest.mark.long),
        # Slow to compile, and given the same rows as under jit.
        pytest.param("operations", SOME_KINDS, marks=pytest.mark.long),
    ],
    ids=["eager, some", "jit", "eager", "operations"],
)
def test_bcoo_of_every_shape(way: str, kinds: list[tuple[int, int]]) -> None:
    """Against the dense array: batch, sparse and dense dimensions, and rows that are padding."""
    rng = np.random.default_rng(15)
    dense = (rng.standard_normal((3, 4, 5, 2)) * (rng.random((3, 4, 5, 1)) < 0.4)).astype("f4")
    for n_batch, n_dense in kinds:
        leaf = BCOO.fromdense(jnp.asarray(dense), n_batch=n_batch, n_dense=n_dense)
        wanted = gradclip.global_norm([dense])
        clipped, norm = WAYS[way]([leaf], 1.0)
        assert norm == wanted
        assert clipped[0].shape == leaf.shape
        expected = gradclip.clip_by_global_norm([dense], 1.0)[0][0]
        np.testing.assert_array_equal(clipped[0].todense(), expected)
    padded = BCOO((jnp.array([3.0, 100.0, 4.0]), jnp.array([[0], [9], [2]])), shape=(9,))
    assert WAYS[way]([padded], 1.0)[1] == 5
    broadcast = BCOO((jnp.array([[3.0, 4.0]]), jnp.array([[[0], [2]]] * 2)), shape=(2, 3))
    assert float(WAYS[way]([broadcast], 1.0)[1]) == float(np.float32(math.sqrt(50)))
    wrapped = BCOO((jnp.array([3.0, 100.0, 4.0]), jnp.array([[8], [-10], [-1]])), shape=(9,))
    assert WAYS[way]([wrapped], 1.0)[1] == 7
    empty = BCOO((jnp.zeros((0,)), jnp.zeros((0, 1), "int32")), shape=(4,))
    assert WAYS[way]([empty, jnp.array([3.0])], 1.0)[1] == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float16", "complex64"])
def test_bcoo_of_every_dtype_with_a_row_that_is_not_used(dtype: str) -> None:
    values = jnp.array([3.0, 100.0, 4.0]).astype(dtype)
    padded = BCOO((values, jnp.array([[0], [9], [2]])), shape=(9,))
    clipped, norm = gradclip.clip_by_global_norm([padded], 2.5)
    assert norm == gradclip.global_norm([padded]) == 5
    assert clipped[0].data.tolist() == (values * 0.5).tolist()


@pytest.mark.slow
@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize("kind", ["slices", "bcoo"])
def test_derivatives_of_sparse_leaves(kind: str) -> None:
    values, rows = embedding("float64")

    def flat(values: Any) -> Any:
        leaf: Any = gradclip.IndexedSlices(values, rows)
        if kind == "bcoo":
            leaf = BCOO((values, rows[:, None]), shape=(5, 2))
        (new,), norm = gradclip.clip_by_global_norm([leaf], 3.5)
        new = new.values if kind == "slices" else new.data
        return jnp.concatenate([new.ravel(), norm.reshape(1)])

    assert_close(jax.jacobian(flat)(values), finite_differences(flat, (values,))[0])


ACCEPTED = "gradclip clips float16, bfloat16, float8, float32, float64 and complex arrays"
BAD = [
    (lambda: jnp.ones(2, "int32"), TypeError, f"t_list[1] is int32; {ACCEPTED}"),
    (lambda: jax.random.key(0), TypeError, f"t_list[1] is key<fry>; {ACCEPTED}"),
    (lambda: BCOO.fromdense(jnp.ones(2, "int32")), TypeError, f"t_list[1] is int32; {ACCEPTED}"),
    (
        lambda: gradclip.IndexedSlices(jnp.ones((2, 3)), jnp.array([0.0, 1.0])),
        ValueError,
        "t_list[1].indices is float32; indices are integers",
    ),
    (
        lambda: gradclip.IndexedSlices(jnp.ones((2, 3)), jnp.array([0])),
        ValueError,
        (
            "t_list[1] has indices of shape (1,) and values of shape (2, 3); each row of values "
            "needs one index"
        ),
    ),
]


@pytest.mark.parametrize("way", ["eager", "jit"])
@pytest.mark.parametrize(("make", "error", "text"), BAD)
def test_bad_leaves_are_named(way: str, make: Any, error: Any, text: str) -> None:
    with raises(error, text):
        WAYS[way]([jnp.ones(2), make()], 1.0)


@pytest.mark.parametrize(
    ("limit", "error", "text"),
    [
        (np.complex64(1), TypeError, "clip_norm is traced, of complex64; it must be a real number"),
        (np.bool_(True), TypeError, "clip_norm is traced, of bool; it must be a real number"),
        (np.ones(1), ValueError, "clip_norm is traced, of shape (1,); it must be a scalar"),
    ],
)
def test_bad_traced_limits(limit: Any, error: Any, text: str) -> None:
    with raises(error, text):
        jitted([jnp.ones(2)], limit)
    with raises(error, text.replace("clip_norm", "use_norm")):
        jitted([jnp.ones(2)], 1.0, limit)


def test_in_place_is_refused_with_what_to_do() -> None:
    text = (
        "a JAX array cannot be written in place; clip_by_global_norm returns new arrays, and "
        "under jit with donated arguments uses their memory"
    )
    x = jnp.array([3.0, 4.0])
    with raises(TypeError, text):
        gradclip.clip_by_global_norm_([x], 1.0)
    assert x.tolist() == [3, 4]


def test_raise_names_the_leaf_and_cannot_be_traced() -> None:
    bad = {"w": jnp.ones(2), "b": jnp.array([1.0, math.nan])}
    with raises(FloatingPointError, "the global norm is nan: t_list['b'] holds 1 NaN and 0 inf"):
        gradclip.clip_by_global_norm(bad, 1.0, on_nonfinite="raise")
    text = (
        'on_nonfinite is "raise"; what is traced, sharded, or on another device, cannot raise: '
        'choose "nan", "zero" or "keep"'
    )
    with raises(ValueError, text):
        jitted([jnp.ones(2)], 1.0, on_nonfinite="raise")


def test_arrays_of_jax_and_of_others_do_not_mix() -> None:
    text = "t_list[0] is of jax and t_list[1] is of numpy; one call clips leaves of one framework"
    with raises(TypeError, text):
        gradclip.clip_by_global_norm([jnp.ones(2), np.ones(2)], 1.0)


# ---- containers ----


@pytest.mark.slow
@pytest.mark.parametrize("way", ["eager", "jit"])
def test_models_of_equinox_and_flax(way: str, framework: Callable[[str], Any]) -> None:
    """Whole modules go in and come out, what is no array of theirs as it was."""
    equinox, flax = framework("equinox"), framework("flax")
    model = equinox.nn.MLP(2, 3, 4, 2, key=jax.random.key(0))
    gradient = equinox.filter_grad(lambda m: (m(jnp.ones(2)) ** 2).sum() * 100)(model)
    clip = functools.partial(gradclip.clip_by_global_norm, clip_norm=1.0)
    clip = clip if way == "eager" else jax.jit(clip)
    clipped, norm = clip(gradient)
    assert type(clipped) is type(gradient)
    assert norm == gradclip.global_norm(jax.tree.leaves(gradient))
    assert jax.tree.structure(clipped) == jax.tree.structure(gradient)

    module = flax.linen.Dense(3)
    frozen = flax.core.freeze(module.init(jax.random.key(0), jnp.ones((1, 2))))
    clipped, _ = clip(frozen)
    assert type(clipped) is type(frozen)
    nnx = importlib.import_module("flax.nnx")
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    clipped, norm = clip(state)
    assert type(clipped) is type(state)
    assert norm == gradclip.global_norm(jax.tree.leaves(state))


@jax.tree_util.register_pytree_node_class
class Box:
    """A container that only JAX knows of."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def tree_flatten(self) -> Any:
        return self.items, None

    @classmethod
    def tree_unflatten(cls, _: Any, items: Any) -> Box:
        return cls(*items)


@pytest.mark.parametrize("box", [Box, lambda *items: {"a": [Box(*items)]}])
def test_containers_registered_with_jax(box: Callable[..., Any]) -> None:
    clipped, norm = gradclip.clip_by_global_norm(
        box(jnp.array([3.0]), None, (jnp.array([4.0]),)), 2.5
    )
    inner = clipped if isinstance(clipped, Box) else clipped["a"][0]
    assert [x if x is None else float(jax.tree.leaves(x)[0][0]) for x in inner.items] == [
        1.5,
        None,
        2.0,
    ]
    assert norm == 5
    with pytest.raises(TypeError, match=r"^t_list.*\[<flat index 1>\] is int32; "):
        gradclip.clip_by_global_norm(box(jnp.ones(1), jnp.ones(1, "int32")), 1.0)
    # Of NumPy arrays and nothing else, too.
    assert gradclip.global_norm(box(np.array([3.0]), np.array([4.0]))) == 5


def test_what_jax_has_for_the_gradient_of_integers_keeps_its_place() -> None:
    tree = {"w": jnp.array([3.0, 4.0]), "n": jnp.arange(3)}
    gradient = jax.grad(lambda t: (t["w"] ** 2).sum() / 2, allow_int=True)(tree)
    clipped, norm = gradclip.clip_by_global_norm(gradient, 2.5)
    assert norm == 5
    assert clipped["n"] is gradient["n"]
    assert clipped["n"].dtype == jax.dtypes.float0
    assert clipped["w"].tolist() == [1.5, 2]


@pytest.mark.slow
def test_without_the_c_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA is then not told of handlers there are not, and its own operations are warned of."""
    with machine("numpy"):
        assert cpu.xla_handlers() == {}
        monkeypatch.setattr(cpu, "_warned", False)
        clip = jax.jit(lambda x: gradclip.clip_by_global_norm([x], 2.5))
        with pytest.warns(RuntimeWarning, match="^gradclip's C kernel .* so NumPy or XLA does its"):
            assert clip(jnp.array([3.0, 4.0]))[1] == 5


@pytest.mark.slow
def test_importing_gradclip_imports_no_jax() -> None:
    ended = run_python("import gradclip, sys; print('jax' in sys.modules)")
    assert (ended.stdout, ended.returncode) == ("False\n", 0), ended.stderr
