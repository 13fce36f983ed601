"""TensorFlow: the backend in eager mode, graphs and XLA, and the door `gradclip.tensorflow`."""

from __future__ import annotations

import functools
import gc
import inspect
import re
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

import cases
import gradclip
import oracle
from cases import Case, random_case
from compare import assert_leaves, assert_norm, assert_same_bits, expected_of
from conftest import some_quick, version
from host import run_python

if version("tensorflow") is None:
    pytest.skip("tensorflow is not installed", allow_module_level=True)
import tensorflow as tf
from tensorflow.python.saved_model.save_context import save_context

import gradclip.tensorflow as gtf
from gradclip.core.exact import Scaled
from gradclip.kernels.traced import derivative, norms, numbers
from gradclip.tensorflow import eager, graph

XLA = pytest.param("xla", marks=pytest.mark.slow)  # compiling takes seconds
MODES = ["eager", "graph", XLA]
RARELY_XLA = ["eager", "graph", pytest.param("xla", marks=pytest.mark.long)]
FLOATS = [
    tf.float16,
    tf.bfloat16,
    tf.float32,
    tf.float64,
    tf.complex64,
    tf.complex128,
]
FLOAT8 = [tf.dtypes.experimental.float8_e5m2, tf.dtypes.experimental.float8_e4m3fn]


def raises(error: type[Exception], text: str) -> Any:
    """The error with exactly this text."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def run(mode: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in eager mode, in a graph or compiled."""
    if mode != "eager":
        function = tf.function(function, jit_compile=mode == "xla", autograph=False)
    return function(*args)


def some_under_xla(few: list[Any], rest: list[Any]) -> list[Any]:
    """Modes and values: all of these in eager mode and in graphs, few under XLA, and at length."""
    return [
        *((mode, value) for mode in ("eager", "graph") for value in few + rest),
        *(pytest.param("xla", value, marks=pytest.mark.slow) for value in few),
        *(pytest.param("xla", value, marks=pytest.mark.long) for value in rest),
    ]


def numpy_of(leaves: list[Any]) -> list[Any]:
    return [
        None if leaf is None else np.asarray(getattr(leaf, "values", leaf).numpy())
        for leaf in leaves
    ]


def assert_as_numpy(clipped: list[Any], norm: Any, values: list[Any], clip_norm: float) -> None:
    """Every bit is that of gradclip on NumPy arrays."""
    wanted, wanted_norm = gradclip.clip_by_global_norm(values, clip_norm)
    assert_norm(norm.numpy()[()], wanted_norm)
    for new, array in zip(numpy_of(clipped), wanted, strict=True):
        assert_same_bits(new, array, nan_payload=False)


# ---- the front door: signature, containers, names ----


@pytest.mark.parametrize("name", ["clip_by_global_norm", "global_norm"])
def test_the_signature_is_that_of_tensorflow(name: str) -> None:
    theirs = getattr(tf, name, None) or getattr(tf.linalg, name)
    ours = inspect.signature(getattr(gtf, name)).parameters.values()
    assert [(p.name, p.default, p.kind) for p in ours] == [
        (p.name, p.default, p.kind) for p in inspect.signature(theirs).parameters.values()
    ]


def test_the_reference_examples_print_what_tensorflow_prints() -> None:
    t_list = [
        tf.constant([1, 2, 3, 4], dtype=tf.float64),
        tf.constant([5, 6, 7, 8], dtype=tf.float64),
    ]
    given = {"clip_norm": 0.8, "use_norm": tf.constant(1.0, tf.float64)}
    for options in (given, {"clip_norm": 0.8}):
        assert str(gtf.clip_by_global_norm(t_list, **options)) == str(
            tf.clip_by_global_norm(t_list, **options)
        )


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_any_sequence_goes_in_and_a_list_comes_out(mode: str) -> None:
    tensor = tf.constant([3.0, 4.0])
    for t_list in ([tensor, None], (tensor, None)):
        for clip in (tf.clip_by_global_norm, gtf.clip_by_global_norm):
            clipped, _ = run(mode, lambda clip=clip, t_list=t_list: clip(t_list, 1.0))
            assert isinstance(clipped, list)
            assert clipped[1] is None


def test_what_converts_to_a_tensor_is_converted() -> None:
    t_list = [3.0, [0.0, 4.0], np.float32([[12]]), tf.Variable([0.0])]
    clipped, norm = gtf.clip_by_global_norm(t_list, 6.5)
    theirs, _ = tf.clip_by_global_norm(t_list, 6.5)
    assert norm == 13
    assert [type(new) for new in clipped] == [type(new) for new in theirs]
    assert [new.numpy().tolist() for new in clipped] == [1.5, [0, 2], [[6]], [0]]


@pytest.mark.parametrize(
    "t_list", [tf.constant([3.0]), iter([]), {"a": 1}, "abc", 3.0, None, {1.0}, np.ones(2)]
)
def test_what_is_no_sequence(t_list: Any) -> None:
    text = f"t_list is {type(t_list).__name__}; it must be a sequence of tensors"
    for clip in (lambda t: gtf.clip_by_global_norm(t, 1.0), gtf.global_norm):
        with raises(TypeError, text):
            clip(t_list)
    with pytest.raises(TypeError, match="sequence"):
        tf.clip_by_global_norm(t_list, 1.0)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("t_list", [[], [None], [None, None], ()], ids=repr)
def test_an_empty_list(mode: str, t_list: Any) -> None:
    clipped, norm = run(mode, lambda: gtf.clip_by_global_norm(t_list, 1.0))
    assert clipped == list(t_list)
    assert norm.dtype == tf.float32
    assert norm == 0
    assert run(mode, lambda: gtf.global_norm(t_list)) == 0


def names(clip: Callable[..., Any], **options: Any) -> list[Any]:
    """Names and colocation of every output of two calls in a graph."""
    found = []
    with tf.Graph().as_default():
        placeholder = tf.compat.v1.placeholder
        slices = tf.IndexedSlices(
            placeholder(tf.float32, [4, 2], "values"),
            placeholder(tf.int64, [4], "indices"),
            tf.constant([9, 2]),
        )
        t_list = [
            placeholder(tf.float32, [2, 3], "a"),
            None,
            placeholder(tf.float32, [4], "b"),
            slices,
        ]
        for _ in range(2):
            clipped, norm = clip(t_list, placeholder(tf.float32, [], "c"), **options)
            assert clipped[3].indices is slices.indices
            assert clipped[3].dense_shape is slices.dense_shape
            tensors = [clipped[0], clipped[2], clipped[3].values]
            found.append([(new.name, new.op.get_attr("_class"), new.shape) for new in tensors])
            found.append(norm.name)
    return found


@pytest.mark.parametrize("options", [{}, {"name": "foo"}])
def test_names_and_colocation_in_a_graph_are_those_of_tensorflow(options: Any) -> None:
    assert names(gtf.clip_by_global_norm, **options) == names(tf.clip_by_global_norm, **options)


def norm_names(function: Callable[..., Any], **options: Any) -> list[str]:
    with tf.Graph().as_default():
        return [function([tf.constant([1.0])], **options).name for _ in range(2)]


@pytest.mark.parametrize("options", [{}, {"name": "foo"}])
def test_names_of_the_norm_in_a_graph_are_those_of_tensorflow(options: Any) -> None:
    assert norm_names(gtf.global_norm, **options) == norm_names(tf.linalg.global_norm, **options)


WEIGHTS = [1.0, 2.0]
CALLS: dict[str, tuple[Any, ...]] = {
    # The arguments of a call; "x" is a tensor, "c" a scalar one.
    "a number": (["x"], 1.0),
    "an array": (["x"], np.float32(1)),
    "an integer": (["x"], np.array(1)),
    "a tensor": (["x", None], "c"),
    "a norm": (["x"], 1.0, "c"),
    "a limit and a norm": (["x"], "c", "c"),
    "a name": (["x", WEIGHTS], 1.0, None, "foo"),
    "a norm and a name": (["x", WEIGHTS], 1.0, "c", "foo"),
    "no tensors": (["x", np.float32(WEIGHTS), WEIGHTS], 1.0),
    "no tensors, a norm": (["x", WEIGHTS], 1.0, "c"),
    "a variable": (["x", tf.Variable(WEIGHTS)], 1.0),
    "a variable, a norm": (["x", tf.Variable(WEIGHTS)], "c", "c"),
}


def scopes_and_names(function: Any, arguments: Any, jit: bool = False) -> tuple[list[str], Any]:
    """Where the operations are that two calls add to a graph, and what the results are called."""
    scopes, names = set(), []

    def given(argument: Any, tensors: dict[str, Any]) -> Any:
        if isinstance(argument, list) and argument is not WEIGHTS:
            return [given(each, tensors) for each in argument]
        return tensors.get(argument, argument) if isinstance(argument, str) else argument

    def traced(x: Any, c: Any) -> None:
        graph = tf.compat.v1.get_default_graph()
        before = set(graph.get_operations())
        for _ in range(2):
            results = function(*(given(each, {"x": x, "c": c}) for each in arguments))
            tensors = [each for each in tf.nest.flatten(results) if each is not None]
            names.extend(tensor.name for tensor in tensors)
        for operation in graph.get_operations():
            if operation not in before:
                scope, slash, _ = operation.name.partition("/")
                scopes.add(scope + slash)

    tf.function(traced, jit_compile=jit, autograph=False).get_concrete_function(
        tf.TensorSpec([2]), tf.TensorSpec([])
    )
    return sorted(scopes), names


@pytest.mark.parametrize(
    ("name", "jit"),
    [
        *((name, False) for name in CALLS),
        *(
            pytest.param(name, True, marks=pytest.mark.slow)
            for name in ("a number", "a norm and a name")
        ),
    ],
)
def test_operations_are_in_the_scopes_of_tensorflows_own(name: str, jit: bool) -> None:
    ours = scopes_and_names(gtf.clip_by_global_norm, CALLS[name], jit)
    assert ours == scopes_and_names(tf.clip_by_global_norm, CALLS[name], jit)
    assert all(scope.endswith("/") for scope in ours[0])


@pytest.mark.parametrize("name", [None, "foo"])
def test_operations_of_the_norm_are_in_the_scope_of_tensorflows_own(name: str | None) -> None:
    arguments = (["x", WEIGHTS, np.float32(WEIGHTS), "c", tf.Variable(WEIGHTS)], name)
    ours = scopes_and_names(gtf.global_norm, arguments)
    assert ours == scopes_and_names(tf.linalg.global_norm, arguments)
    assert all(scope.endswith("/") for scope in ours[0])


@pytest.mark.parametrize("name", [None, "foo"])
@pytest.mark.parametrize("t_list", [[], [None]])
def test_of_no_tensors_the_norm_is_in_the_scope_too(t_list: Any, name: str | None) -> None:
    first = name or "global_norm"
    wanted = [f"{first}/", f"{first}_1/"]
    for function, limit in ((gtf.clip_by_global_norm, [1.0, None]), (gtf.global_norm, [])):
        scopes, names = scopes_and_names(function, (t_list, *limit, name))
        assert scopes == wanted
        assert names == [f"{scope}global_norm:0" for scope in wanted]


def test_a_given_norm_comes_back_itself() -> None:
    given = tf.constant(2.0)
    for clip in (tf.clip_by_global_norm, gtf.clip_by_global_norm):
        assert clip([tf.constant([3.0])], 1.0, given)[1] is given


# ---- TensorFlow's edge cases: (what, TensorFlow gives, gradclip gives) ----

NAN, INF = float("nan"), float("inf")
EDGES: dict[str, tuple[Any, Any, Any, Any]] = {
    # name: (t_list, clip_norm, outputs of TensorFlow, outputs of gradclip)
    "finite squares that overflow": ([3e30, 4e30], 1.0, [NAN, NAN], [0.59999996, 0.8]),
    "subnormal numbers": ([1e-40, 0], 1.0, [0, 0], [np.float32(1e-40), 0]),
    "an infinite limit": ([3, 4], INF, [NAN, NAN], [3, 4]),
    "inf": ([INF, 1], 1.0, [NAN, NAN], [NAN, NAN]),
    "NaN": ([NAN, 1], 1.0, [NAN, NAN], [NAN, NAN]),
    "at the limit": ([3, 4], 5.0, [3, 4], [3, 4]),
    "below the limit": ([3, 4], 8.0, [3, 4], [3, 4]),
    "zeros": ([0, 0], 1.0, [NAN, NAN], [0, 0]),
}


@functools.cache
def edge_clipped(clip: Any, clip_norm: float, mode: str) -> Callable[[Any], Any]:
    """Clip one tensor; compiled once for all edge cases of this limit."""
    if mode == "eager":
        return lambda x: clip([x], clip_norm)[0][0]
    return tf.function(
        lambda x: clip([x], clip_norm)[0][0], jit_compile=mode == "xla", autograph=False
    )


@pytest.mark.parametrize(("mode", "name"), some_under_xla([*EDGES][:3], [*EDGES][3:]))
def test_edge_cases(mode: str, name: str) -> None:
    values, clip_norm, theirs, ours = EDGES[name]

    def call(clip: Any) -> Any:
        return edge_clipped(clip, clip_norm, mode)(tf.constant(values, tf.float32))

    assert_same_bits(call(gtf.clip_by_global_norm).numpy(), np.float32(ours), nan_payload=False)
    if name == "zeros":  # TensorFlow: 0 * min(1/0, 1/1) is 0 here, and its gradient NaN
        theirs = [0, 0]
    found = call(tf.clip_by_global_norm).numpy()
    assert np.allclose(found, theirs, rtol=1e-6, atol=0, equal_nan=True)


def test_dtypes_that_differ_and_the_norms_dtype() -> None:
    mixed = [tf.constant([3.0]), tf.constant([4.0], tf.float16)]
    with pytest.raises(Exception, match="float"):
        tf.clip_by_global_norm(mixed, 1.0)
    clipped, norm = gtf.clip_by_global_norm(mixed, 2.5)
    assert [new.dtype for new in clipped] == [tf.float32, tf.float16]
    assert norm.dtype == tf.float32
    half = [tf.constant([3.0, 4.0], tf.float16)]
    assert tf.clip_by_global_norm(half, 1.0)[1].dtype == tf.float16
    assert gtf.clip_by_global_norm(half, 1.0)[1].dtype == tf.float32
    assert gtf.global_norm([tf.constant([3.0, 4.0], tf.complex128)]).dtype == tf.float64


def test_limits_that_tensorflow_takes() -> None:
    x = [tf.constant([3.0, 4.0])]
    for clip_norm in (-1.0, 0.0, NAN, tf.constant(-1.0), tf.constant(0.0)):
        tf.clip_by_global_norm(x, clip_norm)
        text = f"clip_norm is {clip_norm!r}; it must be above 0 (inf: only measure)"
        with raises(ValueError, text):
            gtf.clip_by_global_norm(x, clip_norm)
    vector = tf.constant([1.0, 2.0])
    assert tf.clip_by_global_norm(x, vector)[0][0].shape == (2,)
    text = f"clip_norm is {vector!r} of shape (2,); it must be a scalar"
    with raises(ValueError, text):
        gtf.clip_by_global_norm(x, vector)
    with pytest.raises(AttributeError):
        tf.clip_by_global_norm(x, 1.0, 2.0)
    clipped, norm = gtf.clip_by_global_norm(x, 1.0, 2.0)
    assert (clipped[0].numpy().tolist(), float(norm), norm.dtype) == ([1.5, 2], 2, tf.float32)
    with raises(ValueError, "use_norm is -1; a norm is never negative"):
        gtf.clip_by_global_norm(x, 1.0, -1)


@pytest.mark.parametrize("limit", ["1", True, 1j, None, tf.constant(1j), tf.constant(True)])
def test_limits_that_are_no_numbers(limit: Any) -> None:
    with pytest.raises(TypeError, match=r"^clip_norm is .*; it must be a real number$"):
        gtf.clip_by_global_norm([tf.constant([3.0])], limit)


@pytest.mark.parametrize("dtype", [tf.int32, tf.bool, tf.string, tf.uint8, tf.int64])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_tensors_that_are_not_clipped(dtype: Any, mode: str) -> None:
    leaf = tf.cast(tf.constant([1]), dtype) if dtype != tf.string else tf.constant(["a"])
    text = (
        f"t_list[2] is {dtype.name}; gradclip clips float16, bfloat16, float8, float32, float64 "
        "and complex tensors"
    )
    with raises(TypeError, text):
        run(mode, lambda: gtf.clip_by_global_norm([tf.constant([1.0]), None, leaf], 1.0))


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_tensors_of_other_kinds(mode: str) -> None:
    accepted = "gradclip clips float16, bfloat16, float8, float32, float64 and complex tensors"
    ragged = tf.ragged.constant([[1.0], [2.0, 3.0]])
    for leaf in (ragged, tf.sparse.from_dense([[0.0, 1.0]])):
        with raises(TypeError, f"t_list[0] is {type(leaf).__name__}; {accepted}"):
            run(mode, lambda leaf=leaf: gtf.clip_by_global_norm([leaf], 1.0))
    slices = tf.IndexedSlices(tf.ones([2, 3]), tf.constant([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"t_list\[0\]\.indices is float32; i.* integers$"):
        run(mode, lambda: gtf.clip_by_global_norm([slices], 1.0))


@pytest.mark.parametrize("mode", RARELY_XLA)
def test_random_lists_are_clipped_as_by_tensorflow(mode: str) -> None:
    """Where no edge case is, the two agree to TensorFlow's rounding."""
    rng = np.random.default_rng(1)

    def both(t_list: Any, clip_norm: Any) -> Any:
        return [
            clip(t_list, clip_norm) for clip in (tf.clip_by_global_norm, gtf.clip_by_global_norm)
        ]

    both_in_mode = both
    if mode != "eager":
        both_in_mode = tf.function(both, jit_compile=mode == "xla", autograph=False)
    for factor in (0.3, 0.9, 1.1, 3):
        t_list: list[Any] = [tf.constant(rng.standard_normal((5, 7)), tf.float32), None]
        t_list.append(tf.constant(rng.standard_normal(())))
        t_list[2] = tf.cast(t_list[2], tf.float32)
        rows = tf.constant(rng.standard_normal((4, 3)), tf.float32)
        t_list.append(tf.IndexedSlices(rows, tf.constant([7, 1, 0, 5]), tf.constant([9, 3])))
        limit = tf.constant(factor * float(tf.linalg.global_norm(t_list)), tf.float32)
        theirs, ours = both_in_mode(t_list, limit)
        for a, b in zip(
            numpy_of([*theirs[0], theirs[1]]), numpy_of([*ours[0], ours[1]]), strict=True
        ):
            if a is None:
                assert b is None
            else:
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                np.testing.assert_allclose(a, b, rtol=1e-6)
        assert isinstance(ours[0][3], tf.IndexedSlices)
        assert ours[0][3].dense_shape.numpy().tolist() == [9, 3]


# ---- bits ----

SHAPES = [(3, 5), (), (7,), (0,), (130, 64), (4096,)]


@functools.cache
def clip_in(mode: str) -> Callable[..., Any]:
    if mode == "eager":
        return gradclip.clip_by_global_norm
    compiled = tf.function(gradclip.clip_by_global_norm, jit_compile=mode == "xla", autograph=False)
    return lambda t_list, clip_norm: compiled(t_list, tf.constant(clip_norm, tf.float64))


def bit_lists(dtypes: list[Any]) -> Iterator[tuple[list[Any], float]]:
    """Lists of fixed shapes: numbers of every size, and those that break something.

    Of many dtypes each has two of the shapes, as XLA compiles for each leaf.
    """
    rng = np.random.default_rng(len(dtypes))
    of_each = [
        SHAPES[place % 3 :: 3] if len(dtypes) > 2 else SHAPES for place in range(len(dtypes))
    ]
    for scale in (1.0, 1e-40, 1e30, 1e-20, 1e200, 1e-310, 2.0**-24):
        values = []
        for dtype, shapes in zip(dtypes, of_each, strict=True):
            for shape in shapes:
                with np.errstate(all="ignore"):
                    x = rng.standard_normal(shape) * scale
                    if dtype.is_complex:
                        x = x + 1j * rng.standard_normal(shape) * scale
                    x = np.asarray(x).astype(dtype.as_numpy_dtype)
                x[~np.isfinite(x)] = 1
                values.append(x)
        norm = float(np.float64(gradclip.global_norm(values)))
        limit = norm if 0 < norm < INF else 1.0
        for factor in (0.37, 1e-30, 1.0, 2.0):
            if 0 < limit * factor < INF:
                yield values, limit * factor


@pytest.mark.parametrize(
    ("mode", "dtypes"),
    some_under_xla([FLOATS], [*([dtype] for dtype in FLOATS), [tf.float32, tf.float16]]),
    ids=str,
)
def test_bits_are_those_of_numpy(mode: str, dtypes: list[Any]) -> None:
    for values, clip_norm in bit_lists(dtypes):
        clipped, norm = clip_in(mode)([tf.constant(x) for x in values], clip_norm)
        assert_as_numpy(clipped, norm, values, clip_norm)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(
    "dtype", some_quick([tf.bfloat16, tf.float32], [*FLOATS[:1], *FLOATS[3:], *FLOAT8]), ids=str
)
def test_random_cases_against_the_oracle(dtype: Any, mode: str) -> None:
    rng = np.random.default_rng(7)
    for _ in range(60 if mode == "eager" else 15):
        case = random_case(rng, [np.dtype(dtype.as_numpy_dtype)])
        if case.on_nonfinite == "raise":
            case = case._replace(on_nonfinite="nan")
        expected = expected_of(case)
        leaves = [tf.constant(values) for values in case.values]

        def clip(leaves: list[Any], case: Case = case) -> Any:
            return gradclip.clip_by_global_norm(
                leaves, case.clip_norm, case.use_norm, on_nonfinite=case.on_nonfinite
            )

        clipped, norm = run(mode, clip, leaves)
        assert_norm(np.asarray(norm)[()], expected.norm)
        assert_leaves(numpy_of(clipped), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype",
    [
        tf.float32,
        tf.float64,
        *(pytest.param(dtype, marks=pytest.mark.long) for dtype in (tf.float16, tf.bfloat16)),
    ],
    ids=str,
)
def test_norms_beside_a_midpoint_under_xla(dtype: Any) -> None:
    """The certificate of float64 sums fails, and the exact sum decides."""
    measure = tf.function(gradclip.global_norm, jit_compile=True, autograph=False)
    rng = np.random.default_rng(3)
    name = np.dtype(dtype.as_numpy_dtype)
    lists = list(cases.near_midpoints(rng, name, 12))
    if dtype in (tf.float32, tf.float64):
        lists += cases.exact_ties(rng, name, 12)
    for leaves in lists:
        flat = np.concatenate(leaves)
        padded = np.concatenate([flat, np.zeros(64 - flat.size, flat.dtype)])
        assert_norm(measure([tf.constant(padded)]).numpy()[()], oracle.norm(leaves)[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [tf.float32, pytest.param(tf.float64, marks=pytest.mark.long)], ids=str
)
def test_long_lists_under_xla(dtype: Any) -> None:
    rng = np.random.default_rng(4)
    values = [
        rng.standard_normal(shape).astype(dtype.as_numpy_dtype)
        for shape in ((1_000_003,), (700, 300), (3, 5, 7, 11), (2, 1 << 17))
    ]
    values.append(np.full(300_000, 1.1, dtype.as_numpy_dtype))
    clipped, norm = clip_in("xla")([tf.constant(x) for x in values], 0.5)
    assert_as_numpy(clipped, norm, values, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [tf.float16, pytest.param(tf.bfloat16, marks=pytest.mark.long)], ids=str
)
def test_every_value_is_scaled_to_the_nearest_under_xla(name: Any) -> None:
    every = cases.every_code(np.dtype(name.as_numpy_dtype))
    scale = tf.function(
        lambda x, c: gradclip.clip_by_global_norm([x], c, tf.constant(1.0))[0][0],
        jit_compile=True,
        autograph=False,
    )
    for factor in (0.7, 0.75, 1 / 3, 2.0**-9, 1 - 2.0**-24, 2.0**-130, 1e-310):
        wanted = gradclip.clip_by_global_norm([every], factor, 1.0)[0][0]
        found = scale(tf.constant(every), tf.constant(factor, tf.float64)).numpy()
        assert_same_bits(found, wanted, nan_payload=False)


@pytest.mark.parametrize("mode", RARELY_XLA)  # each one under XLA: in `test_spec`
def test_policies(mode: str) -> None:
    values = [np.float32([1, NAN]), np.float64([INF, 2]), np.complex64([complex(1, INF)])]
    policies: list[Any] = ["nan", "zero", "keep"]

    def clip(*leaves: Any) -> Any:
        return [
            gradclip.clip_by_global_norm(list(leaves), 1.0, on_nonfinite=policy)
            for policy in policies
        ]

    found = run(mode, clip, *map(tf.constant, values))
    for policy, (clipped, norm) in zip(policies, found, strict=True):
        wanted = oracle.clip(values, 1.0, None, policy)
        assert_norm(norm.numpy()[()], wanted.norm)
        assert_leaves(numpy_of(clipped), wanted)


def test_raise_names_the_leaf_in_eager_mode_and_is_refused_in_a_graph() -> None:
    leaves = [tf.constant([1.0]), tf.constant([NAN, INF])]
    text = "the global norm is nan: t_list[1] holds 1 NaN and 1 inf"
    with raises(FloatingPointError, text):
        gradclip.clip_by_global_norm(leaves, 1.0, on_nonfinite="raise")
    with tf.GradientTape() as tape, raises(FloatingPointError, text):
        tape.watch(leaves)
        gradclip.clip_by_global_norm(leaves, 1.0, on_nonfinite="raise")
    text = (
        'on_nonfinite is "raise"; what is traced, or on another device, cannot raise: '
        'choose "nan", "zero" or "keep"'
    )
    for mode in ("graph", "xla"):
        with raises(ValueError, text):
            run(mode, lambda: gradclip.clip_by_global_norm(leaves, 1.0, on_nonfinite="raise"))


@pytest.mark.parametrize("mode", ["graph", pytest.param("xla", marks=pytest.mark.long)])
def test_traced_limits_that_cannot_be_refused(mode: str) -> None:
    clip = tf.function(
        lambda x, c, n: (gtf.clip_by_global_norm([x], c)[0][0], gtf.clip_by_global_norm([x], c, n)),
        jit_compile=mode == "xla",
        autograph=False,
    )
    x = tf.constant([3.0, -4.0])
    for limit, wanted in ((NAN, [NAN, NAN]), (-1, [0, -0.0]), (0, [0, -0.0]), (INF, [3, -4])):
        found = clip(x, tf.constant(limit, tf.float32), tf.constant(10.0))[0].numpy()
        assert_same_bits(found, np.float32(wanted), nan_payload=False)
    found = clip(x, tf.constant(5.0), tf.constant(10.0))[1]
    assert (found[0][0].numpy().tolist(), float(found[1])) == ([1.5, -2], 10)
    found = clip(x, tf.constant(5.0), tf.constant(-10.0))[1]
    assert found[0][0].numpy().tolist() == [3, -4]
    with pytest.raises(ValueError, match=r"^clip_norm is a tensor of shape \(2,\); it must be a"):
        clip(x, tf.constant([1.0, 2.0]), tf.constant(1.0))
    with raises(TypeError, "clip_norm is a tensor of bool; it must be a real number"):
        clip(x, tf.constant(True), tf.constant(1.0))
    assert clip(x, tf.constant(5), tf.constant(10))[1][0][0].numpy().tolist() == [1.5, -2]


@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        *(("graph", shape) for shape in ([None], [None, 3], None)),
        pytest.param("xla", [None, 3], marks=pytest.mark.slow),
        *(pytest.param("xla", shape, marks=pytest.mark.long) for shape in ([None], None)),
    ],
    ids=str,
)
def test_shapes_that_are_not_known_when_traced(mode: str, shape: Any) -> None:
    clip = tf.function(
        lambda x: gtf.clip_by_global_norm([x], 0.5),
        jit_compile=mode == "xla",
        autograph=False,
        input_signature=[tf.TensorSpec(shape, tf.float32)],
    )
    rng = np.random.default_rng(0)
    for rows in (1, 70):
        values = rng.standard_normal((rows, 3) if shape != [None] else rows).astype(np.float32)
        clipped, norm = clip(tf.constant(values))
        assert_as_numpy(clipped, norm, [values], 0.5)


def test_operations_in_eager_mode_as_on_a_device_that_the_host_cannot_reach() -> None:
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((4, 5)).astype(t) for t in (np.float32, ml_dtypes.bfloat16)]
    with mock.patch.object(graph, "_on_host", return_value=False):
        clipped, norm = gradclip.clip_by_global_norm([tf.constant(x) for x in values], 0.5)
        assert_as_numpy(clipped, norm, values, 0.5)
        assert_norm(
            gradclip.global_norm([tf.constant(x) for x in values]).numpy()[()],
            gradclip.global_norm(values),
        )


SUBNORMAL: list[tuple[Any, ...]] = [
    (np.float32, 5e-41, 1e-40, [3, 4]),
    (np.float64, 1e-310, None, [3e20, 4e20]),
    (np.float64, 5e-311, 1e-310, [3, 4]),
    (np.float32, 1e-40, None, [3e20, 4e20]),
]


@pytest.mark.parametrize(
    ("mode", "dtype", "clip_norm", "use_norm", "x"),
    [
        *(("graph", *each) for each in SUBNORMAL),
        pytest.param("xla", *SUBNORMAL[0], marks=pytest.mark.slow),
        *(pytest.param("xla", *each, marks=pytest.mark.long) for each in SUBNORMAL[1:]),
    ],
)
def test_limits_that_are_subnormal(
    mode: str, dtype: Any, clip_norm: float, use_norm: float | None, x: Any
) -> None:
    limits = [dtype(clip_norm)] + ([] if use_norm is None else [dtype(use_norm)])
    clipped, negative = run(
        mode,
        lambda x, below, *limits: (
            gtf.clip_by_global_norm([x], *limits)[0][0],
            gtf.clip_by_global_norm([x], below)[0][0],
        ),
        tf.constant(x, dtype),
        *map(tf.constant, [-limits[0], *limits]),
    )
    wanted, _ = gradclip.clip_by_global_norm([np.array(x, dtype)], *limits)
    assert_same_bits(clipped.numpy(), wanted[0], nan_payload=False)
    assert not negative.numpy().any()


# ---- memory ----


def test_with_nothing_to_clip_the_inputs_come_back() -> None:
    tensors = [tf.constant([3.0]), tf.constant([4.0], tf.bfloat16)]
    clipped, _ = gtf.clip_by_global_norm(tensors, 5.0)
    assert all(new is old for new, old in zip(clipped, tensors, strict=True))


@pytest.mark.parametrize("shared", [True, False])
def test_large_tensors_where_buffers_are_memory_and_where_not(shared: bool) -> None:
    assert eager._buffers_are_memory()
    values = [
        np.random.default_rng(0).standard_normal((300, 1000)).astype(dtype)
        for dtype in (np.float32, ml_dtypes.bfloat16, np.float64, ml_dtypes.float8_e5m2)
    ]
    with mock.patch.object(eager, "_buffers_are_memory", return_value=shared):
        clipped, norm = gradclip.clip_by_global_norm([tf.constant(x) for x in values], 3.0)
    assert_as_numpy(clipped, norm, values, 3.0)
    with mock.patch.object(eager, "_buffers_are_memory", return_value=shared):
        t_list = [tf.constant(np.full_like(values[0], np.nan)), tf.constant(values[1])]
        filled, _ = gradclip.clip_by_global_norm(t_list, 3.0, on_nonfinite="zero")
    assert not any(new.astype(float).any() for new in numpy_of(filled))


@pytest.mark.parametrize("mode", RARELY_XLA)
def test_inputs_are_never_written(mode: str) -> None:
    """Not even by later operations, which may reuse the memory of what they are given."""
    values = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32)
    tensor = tf.constant(values)
    for clip_norm in (1.0, 1e9):
        run(mode, lambda x, c=clip_norm: tf.nn.relu(gtf.clip_by_global_norm([x], c)[0][0]), tensor)
        assert_same_bits(tensor.numpy(), values, nan_payload=False)


def test_nothing_is_kept_after_the_call() -> None:
    from tensorflow.python.ops import script_ops

    clip = tf.function(lambda x: gtf.clip_by_global_norm([x], 1.0), autograph=False)
    kept = len(script_ops.tape_cache)
    tensor = tf.constant([3.0, 4.0])
    with tf.GradientTape() as tape:
        tape.watch(tensor)
        clipped, norm = clip(tensor)
    assert tape.gradient(clipped, tensor) is not None
    references = [weakref.ref(x) for x in (tensor, clipped[0], norm)]
    del tensor, clipped, norm, tape
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert len(script_ops.tape_cache) == kept


def test_variables() -> None:
    one, other = tf.Variable([3.0, 0.0]), tf.Variable([4.0], dtype=tf.bfloat16)
    clipped, norm = gradclip.clip_by_global_norm([one, other], 2.5)
    assert [new.numpy().tolist() for new in clipped] == [[1.5, 0], [2]]
    assert one.numpy().tolist() == [3, 0]
    assert gradclip.clip_by_global_norm_({"a": one, "b": [other, one]}, 2.5) == norm == 5
    assert one.numpy().tolist() == [1.5, 0]
    assert other.numpy().tolist() == [2]
    assert gradclip.clip_by_global_norm_([one], NAN_POLICY_LIMIT, on_nonfinite="zero") == 1.5


NAN_POLICY_LIMIT = 9.0


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_group_is_refused(mode: str) -> None:
    variable = tf.Variable([3.0])
    clip, clip_ = gradclip.clip_by_global_norm, gradclip.clip_by_global_norm_
    for function, *limit in ((clip, 1.0), (clip_, 1.0), (gradclip.global_norm,)):
        with raises(NotImplementedError, "group is 'x'; there is none for these leaves"):
            run(mode, lambda f=function, x=limit: f([variable], *x, group="x"))
    assert variable.numpy().tolist() == [3]


def test_a_tensor_in_place() -> None:
    variable = tf.Variable([3.0])
    text = (
        "t_list[1] is EagerTensor, which cannot be written in place, as a tf.Variable can; "
        "clip_by_global_norm returns new tensors"
    )
    with raises(TypeError, text):
        gradclip.clip_by_global_norm_([variable, tf.constant([4.0])], 1.0)
    assert variable.numpy().tolist() == [3]
    text = "in a graph nothing is written in place; clip_by_global_norm returns new tensors"
    with raises(TypeError, text):
        run("graph", lambda: gradclip.clip_by_global_norm_([variable], 1.0))


@pytest.mark.slow
def test_outputs_are_on_the_device_of_the_inputs() -> None:
    done = run_python(
        textwrap.dedent("""
        import tensorflow as tf
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        import gradclip.tensorflow as gtf
        with tf.device("CPU:1"):
            one = tf.constant([3.0])
        other = tf.constant([4.0])
        for clip_norm in (2.5, 9.0):
            clipped, norm = gtf.clip_by_global_norm([one, other], clip_norm)
            assert clipped[0].device == norm.device == one.device
            assert clipped[1].device == other.device
            assert float(norm) == 5
        """)
    )
    assert done.returncode == 0, done.stderr


# ---- sparse ----


def zipf_slices() -> tuple[Any, Any]:
    """An embedding's gradient for 8192 ids as frequent as words are, and it as a dense tensor."""
    rng = np.random.default_rng(0)
    ids = (rng.zipf(1.3, 8192) - 1) % 1000
    rows = rng.standard_normal((8192, 16)).astype(np.float32) + 1
    dense = np.zeros((1000, 16))
    np.add.at(dense, ids, rows)
    return tf.IndexedSlices(tf.constant(rows), tf.constant(ids), tf.constant([1000, 16])), dense


@pytest.mark.parametrize("mode", MODES)
def test_the_norm_of_an_embeddings_gradient_is_that_of_the_dense_tensor(mode: str) -> None:
    slices, dense = zipf_slices()
    true = float(np.sqrt(np.sum(dense**2)))
    clipped, norm = run(mode, lambda s: gtf.clip_by_global_norm([s], 1.0), slices)
    assert norm.numpy() == gradclip.global_norm(
        [gradclip.IndexedSlices(slices.values.numpy(), slices.indices.numpy(), (1000, 16))]
    )
    assert abs(float(norm) / true - 1) < 2.0**-24
    assert true / float(tf.linalg.global_norm([slices])) > 10  # TensorFlow's is that far off
    assert isinstance(clipped[0], tf.IndexedSlices)
    after = np.zeros((1000, 16))
    np.add.at(after, clipped[0].indices.numpy(), clipped[0].values.numpy())
    assert abs(np.sqrt(np.sum(after**2)) - 1) < 1e-6
    assert clipped[0].indices.numpy().tolist() == slices.indices.numpy().tolist()


@pytest.mark.parametrize(
    ("mode", "dtype"),
    some_under_xla(
        [tf.bfloat16], [tf.float16, tf.float32, tf.float64, tf.complex64, tf.complex128]
    ),
    ids=str,
)
def test_rows_that_share_an_index_under_every_dtype(mode: str, dtype: Any) -> None:
    rng = np.random.default_rng(2)
    rows = np.asarray(rng.standard_normal((6, 2, 3)) * 3).astype(dtype.as_numpy_dtype)
    indices = np.array([4, 0, 4, 4, 2, 0])

    def clip(rows: Any, indices: Any) -> Any:
        slices = tf.IndexedSlices(rows, indices, tf.constant([5, 2, 3]))
        return gtf.clip_by_global_norm([slices, rows[0]], 0.5)

    clipped, norm = run(mode, clip, tf.constant(rows), tf.constant(indices))
    wanted, wanted_norm = gradclip.clip_by_global_norm(
        [gradclip.IndexedSlices(rows, indices, (5, 2, 3)), rows[0]], 0.5
    )
    assert_norm(norm.numpy()[()], wanted_norm)
    assert_same_bits(clipped[0].values.numpy(), wanted[0].values, nan_payload=False)
    assert_same_bits(clipped[1].numpy(), wanted[1], nan_payload=False)


def test_slices_that_are_malformed() -> None:
    rows = tf.ones([2, 3])
    text = "t_list[1].indices holds 9; dense_shape has 5 rows"
    bad = tf.IndexedSlices(rows, tf.constant([1, 9]), tf.constant([5, 3]))
    with raises(ValueError, text):
        gtf.clip_by_global_norm([rows, bad], 1.0)
    with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(text)):
        run("graph", lambda: gtf.clip_by_global_norm([rows, bad], 1.0))
    with raises(ValueError, "t_list[0].indices holds -1; no row has a negative index"):
        gtf.global_norm([tf.IndexedSlices(rows, tf.constant([1, -1]))])


def test_slices_of_gradclip_that_hold_tensors() -> None:
    slices = gradclip.IndexedSlices(tf.constant([[1.5], [4], [1.5]]), tf.constant([7, 2, 7]))
    clipped, norm = gradclip.clip_by_global_norm([slices], 2.5)
    assert norm == 5
    assert isinstance(clipped[0], gradclip.IndexedSlices)
    assert clipped[0].values.numpy().tolist() == [[0.75], [2], [0.75]]


# ---- gradients ----


def plainly(xs: list[Any], clip_norm: Any, use_norm: Any) -> Any:
    """Clipping by operations that TensorFlow differentiates itself."""
    dense = [tf.convert_to_tensor(x) for x in xs]
    squares = [tf.reduce_sum(tf.math.real(x * tf.math.conj(x))) for x in dense]
    norm = tf.sqrt(tf.add_n(squares)) if use_norm is None else use_norm
    factor = tf.where(norm > clip_norm, clip_norm / norm, tf.ones_like(norm))
    return [x * tf.cast(factor, x.dtype) for x in dense], norm


def derivatives(clip: Any, xs: list[Any], clip_norm: Any, use_norm: Any) -> Any:
    """First and second derivatives of a function of the outputs, in every input."""
    inputs = [*xs, clip_norm] + ([] if use_norm is None else [use_norm])
    with tf.GradientTape() as outer:
        outer.watch(inputs)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            clipped, norm = clip(xs, clip_norm, use_norm)
            loss = 0.7 * norm * norm
            for place, x in enumerate(clipped):
                weight = tf.cast(tf.reshape(tf.range(tf.size(x)) + place, x.shape), x.dtype)
                loss += tf.math.real(tf.reduce_sum(weight * x + x * tf.math.conj(x) * x))
        first = tape.gradient(loss, inputs, unconnected_gradients="zero")
        again = tf.add_n([tf.math.real(tf.reduce_sum(g * g)) for g in first])
    return first, outer.gradient(again, inputs, unconnected_gradients="zero")


def check_gradients(mode: str, given: bool, dtype: Any, clip_norm: float) -> None:
    values = [np.array([3.0, 1.0]), np.array([[4.0, -2.0]])]
    if dtype.is_complex:
        values = [x + 1j * x[..., ::-1] for x in values]
    xs = [tf.constant(x, dtype) for x in values]
    use_norm = tf.constant(7.0, tf.float64) if given else None
    limit = tf.constant(clip_norm, tf.float64)
    wanted = derivatives(plainly, xs, limit, use_norm)
    found = run(
        mode, lambda *args: derivatives(gtf.clip_by_global_norm, *args), xs, limit, use_norm
    )
    for a, b in zip(tf.nest.flatten(wanted), tf.nest.flatten(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("given", [False, True], ids=["measured", "given"])
@pytest.mark.parametrize("dtype", some_quick([tf.float64], [tf.complex128]), ids=str)
@pytest.mark.parametrize("clip_norm", [2.5, 50.0])
def test_gradients(mode: str, given: bool, dtype: Any, clip_norm: float) -> None:
    check_gradients(mode, given, dtype, clip_norm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "dtype", "clip_norm"),
    [
        (False, tf.float64, 2.5),
        pytest.param(False, tf.complex128, 2.5, marks=pytest.mark.long),
        pytest.param(True, tf.float64, 50.0, marks=pytest.mark.long),
    ],
)
def test_gradients_under_xla(given: bool, dtype: Any, clip_norm: float) -> None:
    check_gradients("xla", given, dtype, clip_norm)


@pytest.mark.parametrize("mode", RARELY_XLA)
@pytest.mark.parametrize("clip_norm", [2.5, 100.0, INF, None])
def test_second_derivatives_of_the_norm(mode: str, clip_norm: float | None) -> None:
    def second(x: Any) -> Any:
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                if clip_norm is None:
                    norm = gtf.global_norm([x])
                else:
                    norm = gtf.clip_by_global_norm([x], clip_norm)[1]
            first = tape.gradient(norm, x)
        return outer.gradient(first, x, output_gradients=tf.constant([1.0, 0.0]))

    assert np.allclose(run(mode, second, tf.constant([3.0, 4.0])), [0.128, -0.096])


@pytest.mark.parametrize("mode", RARELY_XLA)
def test_gradients_through_slices(mode: str) -> None:
    rows, indices = tf.constant([[1.0, 2], [3, -1], [0.5, 4]], tf.float64), tf.constant([2, 0, 2])

    def gradients(clip: Any) -> Any:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(rows)
            slices = tf.IndexedSlices(rows, indices, tf.constant([4, 2]))
            clipped, norm = clip([slices], tf.constant(1.5, tf.float64), None)
            dense = tf.convert_to_tensor(clipped[0])
            loss = tf.reduce_sum(dense * tf.reshape(tf.range(8, dtype=tf.float64), (4, 2))) + norm
        return tape.gradient(loss, rows)

    found = run(mode, lambda: gradients(gtf.clip_by_global_norm))
    np.testing.assert_allclose(found, gradients(plainly), rtol=1e-12)


def test_gradients_in_a_graph_with_a_float8_of_which_none_is_asked() -> None:
    x, eighth = tf.constant([3.0, 4.0]), tf.cast(tf.constant([0.0, 0.0]), FLOAT8[1])

    @tf.function(autograph=False)
    def gradient(x: Any) -> Any:
        clipped, norm = gradclip.clip_by_global_norm([x, eighth], 2.5)
        return tf.gradients(clipped[0][0] + norm, x)[0]

    np.testing.assert_allclose(gradient(x), [0.32 + 0.6, -0.24 + 0.8], rtol=1e-6)


@pytest.mark.parametrize("mode", RARELY_XLA)
def test_the_gradient_at_a_norm_of_zero_is_the_identity(mode: str) -> None:
    def gradient(x: Any, clip_norm: float) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            clipped, norm = gtf.clip_by_global_norm([x], tf.constant(clip_norm))
            loss = tf.reduce_sum(clipped[0] * [1.0, 2.0]) + norm
        return tape.gradient(loss, x)

    found = run(mode, lambda x: [gradient(x, limit) for limit in (1.0, INF)], tf.constant([0.0, 0]))
    assert [each.numpy().tolist() for each in found] == [[1, 2]] * 2


@pytest.mark.parametrize("mode", RARELY_XLA)
def test_gradients_where_the_norm_is_not_finite(mode: str) -> None:
    policies: dict[Any, Any] = {"nan": [NAN, NAN], "zero": [0, 0], "keep": [1, 2]}

    def gradient(x: Any, policy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            clipped, _ = gradclip.clip_by_global_norm([x], 1.0, on_nonfinite=policy)
            loss = tf.reduce_sum(clipped[0] * [1.0, 2.0])
        return tape.gradient(loss, x)

    found = run(mode, lambda x: [gradient(x, each) for each in policies], tf.constant([INF, 1.0]))
    for each, wanted in zip(found, policies.values(), strict=True):
        assert_same_bits(each.numpy(), np.float32(wanted), nan_payload=False)


def test_gradients_of_a_graph_by_tf_gradients() -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x, limit = tf.constant([3.0, 4.0]), tf.constant(1.0)
        clipped, norm = gtf.clip_by_global_norm([x], limit)
        first = tf.gradients(clipped[0][0], [x, limit])
        second = tf.gradients(first[0][0], x)
        found = session.run([first, second, tf.gradients(norm, x)])
    assert np.allclose(found[0][0], [0.128, -0.096])
    assert np.allclose(found[0][1], 0.6)
    assert np.allclose(found[1], [-0.04608, 0.00256], atol=1e-6)
    assert np.allclose(found[2], [0.6, 0.8])


@pytest.mark.parametrize("mode", RARELY_XLA)
def test_forward_mode(mode: str) -> None:
    def products(x: Any) -> Any:
        with tf.autodiff.ForwardAccumulator(x, tf.constant([1.0, 0.0])) as accumulator:
            clipped, norm = gtf.clip_by_global_norm([x], 1.0)
        return accumulator.jvp(clipped[0]), accumulator.jvp(norm)

    along, of_norm = run(mode, products, tf.constant([3.0, 4.0]))
    assert np.allclose(along, [0.128, -0.096])
    assert np.allclose(of_norm, 0.6)


@pytest.mark.slow
@pytest.mark.parametrize("outer_compiles", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_compiled_function_is_differentiated_from_outside(outer_compiles: bool) -> None:
    inner = tf.function(
        lambda x: gtf.clip_by_global_norm([x], 2.5)[0][0], jit_compile=True, autograph=False
    )

    def gradient(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(inner(x) * [1.0, 3.0])
        return tape.gradient(loss, x)

    mode = "xla" if outer_compiles else "graph"
    assert np.allclose(run(mode, gradient, tf.constant([3.0, 4.0])), [-0.4, 0.3])


class Saved(tf.Module):  # type: ignore[misc]
    """Functions that clip, in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = tf.Variable([3.0, 4.0])
        self.compiled = tf.function(
            lambda x: gtf.clip_by_global_norm([x], 2.5)[0][0], jit_compile=True, autograph=False
        )

    @tf.function(input_signature=[])  # type: ignore[untyped-decorator]
    def train(self) -> Any:
        self.weights.assign(gtf.clip_by_global_norm([self.weights], 1.0)[0][0])
        return self.weights.read_value()

    @tf.function(input_signature=[tf.TensorSpec([None])])  # type: ignore[untyped-decorator]
    def clip(self, x: Any) -> Any:
        (x,), norm = gtf.clip_by_global_norm([x], 2.5)
        return tf.concat([x, [norm]], 0)

    @tf.function  # type: ignore[untyped-decorator]
    def by_compiled(self, x: Any) -> Any:
        return self.compiled(x)

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def in_a_loop(self, x: Any) -> Any:
        inner = tf.function(lambda y: gtf.clip_by_global_norm([y], 2.5)[0][0], autograph=False)
        body = lambda i, y: (i + 1, tf.cond(i > 0, lambda: inner(y), lambda: 2 * y))  # noqa: E731
        return tf.while_loop(lambda i, _: i < 3, body, (0, x))[1]


LOADED = """
import sys, numpy as np, tensorflow as tf
module = tf.saved_model.load(sys.argv[1])
x = tf.constant([3.0, 4.0])
with tf.GradientTape() as tape:
    tape.watch(x)
    loss = tf.reduce_sum(module.by_compiled(x) * [1.0, 3.0])
    loss += tf.reduce_sum(module.in_a_loop(x) * [1.0, 3.0])
results = [
    module.train(), module.clip(x), module.clip([3e30, 4e30]), module.clip([1e-40, 0.0]),
    module.by_compiled(x), module.in_a_loop(x), np.round(np.float64(tape.gradient(loss, x)), 5),
]
print([np.asarray(each, float).tolist() for each in results], "gradclip" in sys.modules)
"""


@pytest.mark.slow
def test_what_is_saved_runs_in_a_process_without_gradclip(tmp_path: Any) -> None:
    module, x = Saved(), tf.constant([3.0, 4.0])
    module.weights.assign([30.0, 40.0])
    called = [module.train(), module.clip(x), module.by_compiled(x), module.in_a_loop(x)]
    tf.saved_model.save(module, str(tmp_path))
    assert [each.numpy().tolist() for each in called[1:]] == [[1.5, 2, 5], [1.5, 2], [1.5, 2]]
    assert module.clip(x).numpy().tolist() == [1.5, 2, 5]
    huge, small = (np.float32(each) for each in ([3e30, 4e30], [1e-40, 0]))
    wanted = [
        gradclip.clip_by_global_norm([called[0]], 1.0)[0][0].numpy().tolist(),
        [1.5, 2.0, 5.0],
        [1.5, 2.0, float(gradclip.global_norm([huge]))],
        [*small.tolist(), float(small[0])],
        [1.5, 2.0],
        [1.5, 2.0],
        [-0.8, 0.6],
    ]
    done = run_python(LOADED, str(tmp_path))
    assert done.stdout == f"{wanted} False\n", done.stderr


WHY_NOT = (
    "it calls gradclip and was traced before it is saved: on the CPU it calls back into this "
    "process, which no other can. Save the tf.function itself and no concrete function of it, or "
    "give it jit_compile=True; then it is made of TensorFlow's own operations"
)


@pytest.mark.parametrize("custom_gradients", [False, True])
@pytest.mark.parametrize("name", ["clip", "in_a_loop"])
def test_what_cannot_be_saved_says_why(name: str, custom_gradients: bool, tmp_path: Any) -> None:
    traced = getattr(Saved(), name).get_concrete_function(tf.TensorSpec([2]))
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=custom_gradients)
    with pytest.raises(ValueError, match=r"^Unable to save function") as caught:
        tf.saved_model.save(tf.Module(), str(tmp_path), traced, options)
    assert str(caught.value).partition("\n")[2] == WHY_NOT


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", [[tf.float32], [tf.float64, tf.bfloat16]], ids=str)
def test_bits_of_what_is_traced_while_it_is_saved(dtypes: list[Any]) -> None:
    clip = tf.function(gradclip.clip_by_global_norm, autograph=False)
    for values, clip_norm in bit_lists(dtypes):
        with save_context(tf.saved_model.SaveOptions()):
            clipped, norm = clip([tf.constant(x) for x in values], tf.constant(clip_norm, "double"))
        assert_as_numpy(clipped, norm, values, clip_norm)
    (traced,) = clip._list_all_concrete_functions()
    assert "EagerPyFunc" not in str(traced.graph.as_graph_def())


def test_a_data_set_clips() -> None:
    batch = tf.data.Dataset.from_tensor_slices([[3.0, 4.0], [0.3, 0.4]])
    each = batch.map(lambda x: gtf.clip_by_global_norm([x], 2.5)[0][0], num_parallel_calls=2)
    assert [x.tolist() for x in each.as_numpy_iterator()] == [
        [1.5, 2],
        np.float32([0.3, 0.4]).tolist(),
    ]


@pytest.mark.slow
def test_autograph_leaves_our_functions_alone() -> None:
    done = run_python(
        textwrap.dedent("""
        import tensorflow as tf, gradclip, gradclip.tensorflow
        @tf.function
        def step(x):
            clipped, norm = gradclip.tensorflow.clip_by_global_norm([x], 1.0)
            more, _ = gradclip.clip_by_global_norm({"x": clipped}, 0.5)
            return tf.map_fn(lambda y: gradclip.tensorflow.clip_by_global_norm([y], 1.0)[0][0],
                             tf.stack(more["x"])), gradclip.tensorflow.global_norm(clipped)
        step(tf.constant([3.0, 4.0]))
        """)
    )
    assert done.returncode == 0, done.stderr
    assert "AutoGraph" not in done.stderr + done.stdout


def test_within_control_flow_and_a_vectorized_map() -> None:
    @tf.function(autograph=False)
    def loop(x: Any) -> Any:
        return tf.while_loop(
            lambda i, _: i < 3,
            lambda i, y: (i + 1, gtf.clip_by_global_norm([y * 2], 4.0)[0][0]),
            (0, x),
        )[1]

    assert loop(tf.constant([3.0, 4.0])).numpy().tolist() == pytest.approx([2.4, 3.2])
    batch = tf.constant([[3.0, 4.0], [0.3, 0.4], [30.0, 40.0]])
    each = tf.vectorized_map(lambda x: gtf.clip_by_global_norm([x], 1.0)[0][0], batch)
    assert np.allclose(each, [[0.6, 0.8], [0.3, 0.4], [0.6, 0.8]])


# ---- patch ----


def test_patch_puts_ours_in_place_and_takes_it_back() -> None:
    huge = [tf.constant([3e30, 4e30])]
    theirs = tf.clip_by_global_norm
    places = [
        (tf, "clip_by_global_norm"),
        (tf.linalg, "global_norm"),
        (tf.compat.v1, "clip_by_global_norm"),
        (tf.compat.v1, "global_norm"),
        (tf.compat.v1.linalg, "global_norm"),
        (tf.compat.v2, "clip_by_global_norm"),
    ]
    before = [getattr(module, name) for module, name in places]
    with gtf.patch():
        for module, name in places:
            assert getattr(module, name) is getattr(gtf, name)
        assert np.isfinite(tf.clip_by_global_norm(huge, 1.0)[0][0]).all()
        with gtf.patch():
            pass
        assert tf.clip_by_global_norm is gtf.clip_by_global_norm
    assert [getattr(module, name) for module, name in places] == before
    assert np.isnan(tf.clip_by_global_norm(huge, 1.0)[0][0]).all()
    patched = gtf.patch()
    assert tf.clip_by_global_norm is gtf.clip_by_global_norm
    patched.undo()
    patched.undo()
    assert tf.clip_by_global_norm is theirs
    first, second = gtf.patch(), gtf.patch()
    first.undo()
    assert tf.clip_by_global_norm is gtf.clip_by_global_norm
    second.undo()
    assert tf.clip_by_global_norm is theirs


def places_of(function: Any) -> list[tuple[str, str]]:
    """Where TensorFlow's modules have a function."""
    modules = [each for each in sys.modules.items() if each[0].partition(".")[0] == "tensorflow"]
    return sorted(
        (name, key)
        for name, module in modules
        for key, value in list(vars(module).items())
        if value is function
    )


def test_patch_reaches_every_module_of_tensorflow() -> None:
    import tensorflow.compat.v2 as tf2

    gtf.patch().undo()  # which imports what it replaces
    ours, theirs = gtf.clip_by_global_norm, tf.clip_by_global_norm
    before = places_of(theirs)
    assert len(before) > 5
    assert tf2.clip_by_global_norm is tf.compat.v2.compat.v2.clip_by_global_norm is theirs
    with gtf.patch():
        assert tf2.clip_by_global_norm is tf.compat.v2.compat.v2.clip_by_global_norm is ours
        assert places_of(theirs) == []
        assert places_of(tf.linalg.global_norm) == places_of(gtf.global_norm) != []
    assert places_of(theirs) == before
    assert places_of(ours) == []


def no_door_of_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradclip.keras.patch", None)


def no_second_method_of_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = sys.modules["gradclip.keras.patch"].Installed
    put = kind._put

    def fails(owner: Any, name: str, function: Any) -> None:
        if name != "_clip_gradients":
            raise OSError(name)
        put(owner, name, function)

    monkeypatch.setattr(kind, "_put", staticmethod(fails))


@pytest.mark.slow
@pytest.mark.parametrize("breaks", [no_door_of_keras, no_second_method_of_keras])
def test_a_patch_that_fails_half_way_leaves_nothing_behind(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    keras = pytest.importorskip("keras")
    gtf.patch().undo()  # which imports what it replaces

    def found() -> list[Any]:
        functions = tf.clip_by_global_norm, tf.linalg.global_norm
        return [*functions, *map(places_of, functions), keras.Optimizer._clip_gradients]

    before = found()
    with monkeypatch.context() as broken:
        breaks(broken)
        with pytest.raises((ImportError, OSError)):
            gtf.patch()
    assert found() == before
    with gtf.patch():
        assert tf.clip_by_global_norm is gtf.clip_by_global_norm
        assert keras.Optimizer._clip_gradients is not before[-1]
    assert found() == before


# ---- breaking it is seen ----

true_certified = norms._certified


def certified_without_a_bound(ops: Any, *sums: Any) -> Any:
    total, *ends = true_certified(ops, *sums)
    return [total, *ends[:2], *ends[:2]]


@pytest.mark.parametrize(
    ("module", "name", "broken", "noticing"),
    [
        (
            eager,
            "merged_rows",
            lambda *_: None,
            functools.partial(
                test_the_norm_of_an_embeddings_gradient_is_that_of_the_dense_tensor, "eager"
            ),
        ),
        (
            derivative,
            "merged",
            lambda _, values, __: values,
            functools.partial(test_gradients_through_slices, "graph"),
        ),
        (
            eager.Leaves,
            "copied",
            lambda held: held.scaled(Scaled(0.5, 1)),
            test_with_nothing_to_clip_the_inputs_come_back,
        ),
        pytest.param(
            norms,
            "_certified",
            certified_without_a_bound,
            functools.partial(test_norms_beside_a_midpoint_under_xla, tf.float32),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            numbers,
            "float64_of",
            lambda ops, codes: ops.cast(ops.bitcast(codes, "float32"), "float64"),
            functools.partial(
                test_limits_that_are_subnormal, "xla", np.float32, 5e-41, 1e-40, [3, 4]
            ),
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_mutation_is_seen(module: Any, name: str, broken: Any, noticing: Any) -> None:
    noticing()
    with mock.patch.object(module, name, broken), pytest.raises((AssertionError, ValueError)):
        noticing()
