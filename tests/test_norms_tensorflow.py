"""`gradclip.norms` of TensorFlow, eager, in graphs, under XLA and tapes: each against integers."""

from __future__ import annotations

import contextlib
import functools
from typing import Any
from unittest import mock

import numpy as np
import pytest

import gradclip
from cases import DTYPES
from conftest import version
from each_norm import assert_norms, expected, hard_leaves, random_leaves, sparse_leaves

if version("tensorflow") is None:
    pytest.skip("tensorflow is not installed", allow_module_level=True)
import tensorflow as tf

from gradclip import _clip, limits
from gradclip.tensorflow import graph

NATIVE = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
FLOAT8 = ["float8_e5m2", "float8_e4m3fn"]
MODES = ["eager", "graph", "xla", "operations"]


@functools.cache
def program(mode: str) -> Any:
    function = tf.function(gradclip.norms, jit_compile=mode == "xla", autograph=False)
    return gradclip.norms if mode == "eager" else function


def norms(mode: str, leaves: Any) -> Any:
    """In this mode; ``operations`` are those of a graph on other devices."""
    with there(mode):
        return program(mode)(leaves)


def there(mode: str) -> Any:
    if mode != "operations":
        return contextlib.nullcontext()
    return mock.patch.object(graph, "_leaves_the_host", return_value=True)


def tensor_of(leaf: Any) -> Any:
    if isinstance(leaf, gradclip.IndexedSlices):
        return tf.IndexedSlices(tf.constant(leaf.values), tf.constant(leaf.indices))
    return tf.constant(leaf)


EACH = [
    pytest.param(
        mode,
        names,
        marks={"eager": (), "graph": ()}.get(
            mode, pytest.mark.slow if names == ["float32"] else pytest.mark.long
        ),
        id=f"{mode}-{names[0] if len(names) == 1 else 'mixed'}",
    )
    for mode in MODES
    # Of float8 TensorFlow's own operations, other than XLA's, know too few.
    for names in [*([name] for name in NATIVE), *([FLOAT8] * (mode != "operations")), NATIVE]
]


@pytest.mark.parametrize(("mode", "names"), EACH)
def test_every_leaf(mode: str, names: list[str]) -> None:
    rng = np.random.default_rng(4)
    for _ in range(10):
        leaves = random_leaves(rng, names)
        found = norms(mode, list(map(tf.constant, leaves)))
        assert tf.is_tensor(found.values)
        assert_norms(found, leaves)
    leaves = [leaf for name in names for leaf in hard_leaves(name)]
    assert_norms(norms(mode, list(map(tf.constant, leaves))), leaves)


@pytest.mark.parametrize(
    "mode", ["eager", "graph", *(pytest.param(x, marks=pytest.mark.slow) for x in MODES[2:])]
)
@pytest.mark.parametrize("name", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_sparse_leaves(mode: str, name: str) -> None:
    leaves = [np.float32([3, 4]), *sparse_leaves(np.random.default_rng(5), name)]
    if mode in ("xla", "operations"):  # whose sums of rows flush subnormal numbers of float64
        leaves = [x for x in leaves if np.abs(getattr(x, "values", x)).max(initial=0) > 1e-300]
    assert_norms(norms(mode, list(map(tensor_of, leaves))), leaves)


def test_variables_and_float8_of_any_kind() -> None:
    leaves = [
        leaf
        for name in DTYPES
        if name.startswith("float8") and hasattr(tf.dtypes.experimental, name)
        for leaf in hard_leaves(name)
    ]
    assert_norms(gradclip.norms([*map(tf.constant, leaves)]), leaves)
    found = gradclip.norms({"v": tf.Variable([3.0, 4.0]), "none": None})
    assert found.as_dict() == {"grad_norm/v": 5, "grad_norm": 5}


# ---- what it is in a graph ----


def test_a_function_takes_and_returns_it_with_its_names() -> None:
    found = program("graph")({"w": tf.constant([3.0]), "b": [tf.constant([4.0]), None]})
    assert found.paths == ("b/0", "w")
    assert found.as_dict() == {"grad_norm/b/0": 4, "grad_norm/w": 3, "grad_norm": 5}
    assert found.largest(1) == [("b/0", 4.0)]
    twice = tf.nest.map_structure(lambda x: 2 * x, found)
    assert twice.as_dict("") == {"b/0": 8, "w": 6, "global_norm": 10}


def test_of_a_shape_that_is_not_known() -> None:
    specs = [tf.TensorSpec([None, 2]), tf.TensorSpec(None)]
    function = tf.function(lambda *leaves: gradclip.norms(list(leaves)), input_signature=specs)
    assert function.get_concrete_function().structured_outputs.values.shape == (2,)
    for rows in (1, 3, 0):
        leaves = [np.ones((rows, 2), np.float32), np.float32([[2.0] * rows])]
        assert_norms(function(*map(tf.constant, leaves)), leaves)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_tape_sees_the_global_norm_alone(mode: str) -> None:
    x = tf.constant([3.0, 4.0])

    def gradients(x: Any) -> Any:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            found = gradclip.norms([x])
            both = found.global_norm + tf.reduce_sum(found.values)
        return tape.gradient(both, x), tape.gradient(found.values, x), found.values

    function = gradients if mode == "eager" else tf.function(gradients, autograph=False)
    whole, each, values = function(x)
    np.testing.assert_allclose(whole, [0.6, 0.8], rtol=1e-6)
    assert each is None
    assert values.numpy().tolist() == [5]


def test_tf_gradients_in_a_graph() -> None:
    @tf.function(autograph=False)
    def gradients(x: Any) -> Any:
        found = gradclip.norms([x])
        return tf.gradients(found.global_norm + tf.reduce_sum(found.values), x)

    np.testing.assert_allclose(gradients(tf.constant([3.0, 4.0]))[0], [0.6, 0.8], rtol=1e-6)


def test_saved_it_is_made_of_tensorflow_s_own_operations(tmp_path: Any) -> None:
    module = tf.Module()
    module.norms = tf.function(
        lambda x: gradclip.norms([x, 2 * x]).values, input_signature=[tf.TensorSpec([2])]
    )
    tf.saved_model.save(module, str(tmp_path))
    found = tf.saved_model.load(str(tmp_path)).norms(tf.constant([3.0, 4.0]))
    assert found.numpy().tolist() == [5, 10]


# ---- beside a clip, as a door asks for them ----

LIMITS = {
    "number": lambda: 2.5,
    "learns": lambda: limits.Average(1.1, warmup=1),
    "each": lambda: limits.PerTensor(limits.Percentile(50)),
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize(
    "mode",
    [
        "eager",
        "tape",
        "graph",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("xla", "operations")),
    ],
)
def test_beside_a_clip(mode: str, name: str) -> None:
    kind, twin = LIMITS[name](), LIMITS[name]()

    def clipped(x: Any, y: Any) -> Any:
        return _clip.clipped([x, y], kind, wants_each=True)

    function = (
        clipped
        if mode in ("eager", "tape")
        else tf.function(clipped, jit_compile=mode == "xla", autograph=False)
    )
    rng = np.random.default_rng(2)
    with there(mode):
        for _ in range(4):
            leaves = [rng.normal(size=3).astype("f4"), rng.normal(size=(2, 2)).astype("f4")]
            tensors = list(map(tf.constant, leaves))
            with tf.GradientTape() as tape:
                if mode == "tape":
                    tape.watch(tensors)
                new, norm, each = function(*tensors)
            wanted, wanted_norm = gradclip.clip_by_global_norm(leaves, twin)
            for one, other in zip([*new, norm], [*wanted, wanted_norm], strict=True):
                (
                    np.testing.assert_array_equal
                    if name == "number"
                    else functools.partial(np.testing.assert_allclose, rtol=1e-6)
                )(one, other)
            np.testing.assert_array_equal(each, expected(leaves))


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_clip_beside_which_they_are_has_its_gradient(mode: str) -> None:
    kinds = {each: limits.Average(1.5, warmup=0, limit=2.5) for each in (True, False)}

    def gradients(x: Any, wants_each: bool) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            (new,), norm, _ = _clip.clipped([x], kinds[wants_each], wants_each=wants_each)
            y = tf.reduce_sum(new**2) + norm
        return tape.gradient(y, x)

    x = tf.constant([3.0, 4.0])
    found = []
    for each in (True, False):  # each makes the variables of its limit
        function = gradients if mode == "eager" else tf.function(gradients, autograph=False)
        found.append(function(x, each).numpy().tolist())
    assert found[0] == found[1]
