"""`gradclip.optax`: beside optax's own functions, and within its transformations."""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradclip
import oracle
from compare import assert_same_bits
from conftest import some_quick, version
from host import run_python

if version("jax") is None or version("optax") is None:
    pytest.skip("jax or optax is not installed", allow_module_level=True)
import jax
import jax.numpy as jnp
import optax
from jax.experimental.sparse import BCOO

import gradclip.optax as door

POLICIES = ["nan", "zero", "keep"]
TRIANGLE = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}


def raises(error: type[Exception], text: str) -> Any:
    """The error with exactly this text."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def assert_same(actual: Any, expected: Any) -> None:
    """Trees of the same structure, types, dtypes, shapes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_same_bits(np.asarray(got), np.asarray(wanted), nan_payload=False)


def state_of(norm: Any, factor: Any, count: int, clipped: int) -> door.ClipByGlobalNormState:
    """A state for float32 updates."""
    counts = (jnp.int32(count), jnp.int32(clipped))
    return door.ClipByGlobalNormState(jnp.float32(norm), jnp.float32(factor), *counts)


def once(clip: optax.GradientTransformation, updates: Any) -> tuple[Any, Any]:
    """One update from the first state."""
    return clip.update(updates, clip.init(updates))


@jax.jit
def traced(updates: Any, max_norm: Any) -> tuple[Any, Any]:
    """One update with a limit that is traced."""
    return once(door.clip_by_global_norm(max_norm), updates)


@jax.jit
def optax_traced(updates: Any, max_norm: Any) -> Any:
    """What optax makes of that."""
    return once(optax.clip_by_global_norm(max_norm), updates)[0]


def random_tree(seed: int, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"w": (5, 7), "b": (3,), "s": ()}
    return {key: jnp.asarray(rng.normal(size=shape), dtype) for key, shape in shapes.items()}


# ---- the state ----


def test_the_state_records_each_update() -> None:
    clip = door.clip_by_global_norm(2.5)
    state = clip.init(TRIANGLE)
    assert_same(state, state_of(0, 1, 0, 0))
    clipped, state = clip.update(TRIANGLE, state)
    assert_same(clipped, {"a": jnp.array([1.5]), "b": jnp.array([2.0])})
    assert_same(state, state_of(5, 0.5, 1, 1))
    small = jax.tree.map(lambda x: x / 2, TRIANGLE)
    kept, state = clip.update(small, state)
    assert_same(kept, small)
    assert_same(state, state_of(2.5, 1, 2, 1))


def test_eager_jit_and_scan_give_the_same_bits() -> None:
    clip = door.clip_by_global_norm(5.0)
    trees = [random_tree(seed) for seed in range(4)]
    eager, state = [], clip.init(trees[0])
    for tree in trees:
        clipped, state = clip.update(tree, state)
        eager.append((clipped, state))
    assert {int(each.clipped_count) for _, each in eager} == {0, 1, 2, 3}
    update, state = jax.jit(clip.update), clip.init(trees[0])
    for tree, expected in zip(trees, eager, strict=True):
        clipped, state = update(tree, state)
        assert_same((clipped, state), expected)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def step(state: Any, tree: Any) -> Any:
        clipped, state = clip.update(tree, state)
        return state, (clipped, state)

    last, every = jax.lax.scan(step, clip.init(trees[0]), stacked)
    assert_same(last, eager[-1][1])
    assert_same(every, jax.tree.map(lambda *leaves: jnp.stack(leaves), *eager))


def test_the_factor_is_that_of_the_quotient_in_float64() -> None:
    for seed in range(20):
        tree, limit = random_tree(seed), 0.1 * (seed + 1)
        _, state = once(door.clip_by_global_norm(limit), tree)
        _, norm = oracle.norm([np.asarray(leaf) for leaf in tree.values()])
        assert_same_bits(np.asarray(state.global_norm), np.asarray(norm), nan_payload=False)
        expected = np.float32(limit / np.float64(norm)) if norm > limit else np.float32(1)
        assert_same_bits(np.asarray(state.factor), np.asarray(expected), nan_payload=False)


def test_a_limit_that_float32_does_not_hold_is_not_rounded() -> None:
    above = np.float32(0.1)  # a little above 0.1
    _, state = once(door.clip_by_global_norm(0.1), [jnp.array([above])])
    assert int(state.clipped_count) == 1
    _, state = once(door.clip_by_global_norm(float(above)), [jnp.array([above])])
    assert int(state.clipped_count) == 0


def test_the_state_is_float64_for_parameters_that_are() -> None:
    with jax.enable_x64(True):
        wide, narrow = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.ones(2, "float32")}
    assert wide["w"].dtype == "float64"
    clip = door.clip_by_global_norm(0.1)
    for params, updates, dtype in [
        (wide, wide, "float64"),
        (wide, narrow, "float64"),
        (narrow, wide, "float32"),
        ({"w": jnp.ones(2, "bfloat16")}, narrow, "float32"),
        ({"w": np.ones(2)}, {"w": np.ones(2)}, "float32"),  # as JAX without float64 takes it
        ({}, {}, "float32"),
    ]:
        first = clip.init(params)
        _, state = clip.update(updates, first)
        for each in (first, state):
            dtypes = [str(leaf.dtype) for leaf in each]
            assert dtypes == [dtype, dtype, "int32", "int32"]
            assert not any(leaf.weak_type for leaf in each)
    _, state = once(clip, wide)
    assert float(state.factor) == 0.1 / 5
    with jax.enable_x64(True):
        assert clip.init({"w": np.ones(2)}).global_norm.dtype == "float64"
        assert clip.init({"w": np.ones(2, "complex128")}).global_norm.dtype == "float64"


def test_the_counts_stop_at_their_largest_value() -> None:
    clip, last = door.clip_by_global_norm(1.0), 2**31 - 1
    _, state = clip.update(TRIANGLE, state_of(0, 1, last, last))
    assert_same(state, state_of(5, 0.2, last, last))


@pytest.mark.slow
def test_tree_get_finds_the_state_in_a_chain() -> None:
    chain = optax.chain(door.clip_by_global_norm(2.5), optax.adam(1e-3))
    _, state = chain.update(TRIANGLE, chain.init(TRIANGLE))
    assert float(optax.tree.get(state, "global_norm")) == 5
    assert float(optax.tree.get(state, "factor")) == 0.5
    assert int(optax.tree.get(state, "clipped_count")) == 1
    with pytest.raises(KeyError, match="Found multiple"):
        optax.tree.get(state, "count")
    ours = door.ClipByGlobalNormState.__name__
    count = optax.tree.get(state, "count", filtering=lambda path, _: path[-1].tuple_name == ours)
    assert int(count) == 1


def test_of_two_clips_in_a_chain_each_is_read() -> None:
    two = optax.chain(
        door.clip_by_global_norm(2.5), optax.scale(3.0), door.clip_by_global_norm(1.0)
    )
    _, state = two.update(TRIANGLE, two.init(TRIANGLE))
    with pytest.raises(KeyError, match="Found multiple"):
        optax.tree.get(state, "global_norm")
    found = optax.tree.get_all_with_path(state, "ClipByGlobalNormState")
    assert [jax.tree_util.keystr(path) for path, _ in found] == ["[0]", "[2]"]
    wanted = [state_of(5, 0.5, 1, 1), state_of(7.5, 1 / 7.5, 1, 1)]
    assert_same([each for _, each in found], wanted)
    named = optax.named_chain(("first", door.clip_by_global_norm(2.5)), ("then", optax.sgd(1.0)))
    _, state = named.update(TRIANGLE, named.init(TRIANGLE))
    assert_same(state["first"], state_of(5, 0.5, 1, 1))


# ---- states of optax's own ----

OWN = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0, momentum=0.5))
OURS = optax.chain(door.clip_by_global_norm(1.0), optax.sgd(1.0, momentum=0.5))


def trained(optimizer: Any) -> Any:
    return optimizer.update(TRIANGLE, optimizer.init(TRIANGLE))[1]


def with_our_states(state: Any) -> Any:
    """As the docstring of the module says."""
    return jax.tree.map(
        lambda new, old: new if isinstance(new, door.ClipByGlobalNormState) else old,
        OURS.init(TRIANGLE),
        state,
        is_leaf=lambda node: isinstance(node, door.ClipByGlobalNormState),
    )


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("first", some_quick([None], [optax.EmptyState()]))
def test_it_begins_from_a_state_of_optaxs_own(first: Any, wrap: Callable[[Any], Any]) -> None:
    clip = door.clip_by_global_norm(optax.piecewise_constant_schedule(1.0, {1: 0.5}))
    update = wrap(clip.update)
    clipped, state = update(TRIANGLE, first)
    assert_same((clipped, state), clip.update(TRIANGLE, clip.init(TRIANGLE)))
    assert_same(update(TRIANGLE, state), clip.update(TRIANGLE, state))
    assert_same(update(TRIANGLE, state)[1], state_of(5, 0.1, 2, 2))


def test_a_state_that_begins_takes_its_dtype_from_the_parameters() -> None:
    with jax.enable_x64(True):
        wide = {"w": jnp.array([3.0, 4.0])}
    narrow = {"w": jnp.ones(2, "float32")}
    clip = door.clip_by_global_norm(1.0)
    assert clip.update(narrow, None, wide)[1].global_norm.dtype == "float64"
    assert clip.update(narrow, None)[1].global_norm.dtype == "float32"
    assert clip.update(wide, None)[1].global_norm.dtype == "float64"


@pytest.mark.slow
def test_a_chain_goes_on_from_the_state_of_optaxs_own() -> None:
    theirs = pickle.loads(pickle.dumps(trained(OWN)))
    updates, state = OURS.update(TRIANGLE, theirs)
    momentum = theirs[1][0].trace
    clipped, _ = once(door.clip_by_global_norm(1.0), TRIANGLE)
    assert_same(updates, jax.tree.map(lambda x, m: -1.0 * (x + 0.5 * m), clipped, momentum))
    assert_same(state[0], state_of(5, 0.2, 1, 1))
    assert_same(with_our_states(theirs)[1], theirs[1])
    assert_same(OURS.update(TRIANGLE, with_our_states(theirs)), (updates, state))


@pytest.mark.slow
def test_where_the_structure_has_to_stay_the_states_are_put_in_first() -> None:
    def step(state: Any, _: Any) -> Any:
        updates, state = OURS.update(TRIANGLE, state)
        return state, updates

    theirs = trained(OWN)
    with pytest.raises(TypeError, match="carry"):
        jax.lax.scan(step, theirs, length=2)
    state, _ = jax.lax.scan(step, with_our_states(theirs), length=2)
    assert_same(state[0], state_of(5, 0.2, 2, 2))
    for wrapped in (optax.MultiSteps(OURS, 2), optax.apply_if_finite(OURS, 2)):
        first = wrapped.init(TRIANGLE)
        name = "inner_opt_state" if isinstance(wrapped, optax.MultiSteps) else "inner_state"
        with pytest.raises((TypeError, ValueError)):
            wrapped.update(TRIANGLE, first._replace(**{name: theirs}))
        wrapped.update(TRIANGLE, first._replace(**{name: with_our_states(theirs)}))


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ({"global_norm": 1.0}, "dict"),
        ([], "list"),
        ((optax.EmptyState(),), "tuple"),
        (optax.TraceState({}), "TraceState"),
        (jnp.zeros(()), "ArrayImpl"),
    ],
    ids=str,
)
def test_a_state_of_another(state: Any, kind: str) -> None:
    clip = door.clip_by_global_norm(1.0)
    text = (
        f"the state is {kind}; gradclip.optax.clip_by_global_norm goes on from a "
        "ClipByGlobalNormState and begins from None or optax.EmptyState(): restore a checkpoint "
        "into the state that init returns"
    )
    with raises(TypeError, text):
        clip.update(TRIANGLE, state)


def test_flax_restores_into_what_was_saved() -> None:
    serialization = pytest.importorskip("flax.serialization")
    theirs, ours = trained(OWN), trained(OURS)
    saved = serialization.to_bytes(theirs)
    again = serialization.from_bytes(OWN.init(TRIANGLE), saved)
    assert_same(OURS.update(TRIANGLE, again), OURS.update(TRIANGLE, theirs))
    with pytest.raises(ValueError, match="field names of the state dict"):
        serialization.from_bytes(OURS.init(TRIANGLE), saved)
    assert_same(serialization.from_bytes(OURS.init(TRIANGLE), serialization.to_bytes(ours)), ours)


@pytest.mark.slow
def test_orbax_restores_into_what_was_saved(tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("orbax.checkpoint")
    theirs = trained(OWN)
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", theirs)
        saver.wait_until_finished()
        again = saver.restore(tmp_path / "state", OWN.init(TRIANGLE))
        assert_same(OURS.update(TRIANGLE, again), OURS.update(TRIANGLE, theirs))
        with pytest.raises(ValueError, match="tree structures do not match"):
            saver.restore(tmp_path / "state", OURS.init(TRIANGLE))


# ---- what errors call it ----


def test_errors_say_updates_or_grads() -> None:
    accepted = "gradclip clips float16, bfloat16, float8, float32, float64 and complex arrays"
    bad = {"a": jnp.ones((2, 3)), "b": [jnp.arange(2)]}
    clip = door.clip_by_global_norm(1.0)
    with raises(TypeError, f"updates['b'][0] is int32; {accepted}"):
        once(clip, bad)
    with pytest.raises(TypeError) as caught:  # JAX adds a note to it
        door.per_example_global_norm_clip(bad, 1.0)
    assert str(caught.value) == f"grads['b'][0] is int32; {accepted}"
    with raises(TypeError, f"updates is int32; {accepted}"):
        once(clip, jnp.arange(2))
    with raises(TypeError, f"updates[1] is int32; {accepted}"):
        once(clip, [jnp.ones(2), jnp.arange(2)])
    raising = door.clip_by_global_norm(1.0, on_nonfinite="raise")
    text = "the global norm is nan: updates['a'] holds 1 NaN and 0 inf"
    with raises(FloatingPointError, text):
        once(raising, {"a": jnp.array([math.nan])})
    rows = gradclip.IndexedSlices(jnp.ones((1, 2)), jnp.array([7]), (5, 2))
    with raises(ValueError, "updates['w'].indices holds 7; dense_shape has 5 rows"):
        once(clip, {"w": rows})


@pytest.mark.parametrize("leaf", ["abc", object(), np.array(["a"])], ids=["str", "object", "text"])
def test_a_leaf_that_is_no_array_is_named(leaf: Any) -> None:
    for tree, place in (({"a": jnp.ones(2), "b": leaf}, "['b']"), ([leaf], "[0]")):
        with pytest.raises(TypeError) as caught:
            door.clip_by_global_norm(1.0).update(tree, None)
        assert str(caught.value).startswith(f"updates{place} is {type(leaf).__name__}: ")


# ---- beside optax ----


@pytest.mark.parametrize("seed", range(12))
def test_where_both_are_defined_optax_decides_alike_and_errs_within_its_rounding(seed: int) -> None:
    tree = random_tree(seed)
    limit = [0.25, 1.0, 5.0, 100.0][seed % 4]
    clipped, state = traced(tree, limit)
    leaves = [np.asarray(leaf) for leaf in tree.values()]
    expected = oracle.clip(leaves, np.float32(limit).item())
    for key, leaf in zip(tree, expected.leaves, strict=True):
        assert_same_bits(np.asarray(clipped[key]), leaf, nan_payload=False)
    theirs = optax_traced(tree, limit)
    norm = math.sqrt(sum(float((leaf.astype("float64") ** 2).sum()) for leaf in leaves))
    is_clipped = norm > limit
    assert bool(state.clipped_count) == is_clipped
    for key, leaf in tree.items():
        assert np.array_equal(theirs[key], leaf) is not is_clipped
        exact = np.asarray(leaf, "float64") * min(1.0, limit / norm)
        # n squares and sums, a root, a quotient and a product, each rounded to 24 bits.
        allowed = np.abs(exact) * (sum(leaf.size for leaf in leaves) + 4) * 2.0**-24
        assert (np.abs(np.asarray(theirs[key], "float64") - exact) <= allowed).all()


def test_the_norm_of_many_bfloat16_leaves_is_not_low() -> None:
    leaves = [jnp.ones(256, jnp.bfloat16)] * 500
    exact = math.sqrt(500 * 256)
    _, state = once(door.clip_by_global_norm(1.0), leaves)
    assert float(state.global_norm) == np.float32(exact)
    assert round(float(optax.tree.norm(leaves)) / exact, 2) == 0.72


@pytest.mark.parametrize("limit", [1.0, 3e-31])
@pytest.mark.parametrize("x", [1e20, 1e-30])
def test_finite_updates_whose_squares_overflow_or_underflow(x: float, limit: float) -> None:
    updates = jnp.array([x, x])
    clipped, state = traced(updates, limit)
    expected = oracle.clip([np.asarray(updates)], np.float32(limit).item())
    assert_same_bits(np.asarray(clipped), expected.leaves[0], nan_payload=False)
    assert float(state.global_norm) == expected.norm
    assert np.array_equal(optax_traced(updates, limit), [0, 0] if x > 1 else updates)


def test_a_norm_beyond_float32_is_inf_and_the_updates_are_clipped_nevertheless() -> None:
    updates = jnp.full(4, 2e38)
    clipped, state = once(door.clip_by_global_norm(1e30), updates)
    assert_same(clipped, jnp.asarray(oracle.clip([np.asarray(updates)], 1e30).leaves[0]))
    assert_same(state, state_of(math.inf, 0, 1, 1))


@pytest.mark.slow
def test_a_norm_equal_to_the_limit_changes_nothing() -> None:
    changed = 0
    for seed in range(5):
        tree = random_tree(seed)
        norm = gradclip.global_norm(tree)
        clipped, state = traced(tree, norm)
        assert_same(clipped, tree)
        assert_same(state, state_of(norm, 1, 1, 0))
        theirs = optax_traced(tree, optax.tree.norm(tree))
        changed += any(not np.array_equal(theirs[key], tree[key]) for key in tree)
    assert changed > 0


def test_a_zero_gradient() -> None:
    zeros = jnp.array([0.0, -0.0])
    for limit in (1.0, 0.0, -1.0):
        clipped, state = traced(zeros, limit)
        assert_same(clipped, zeros)
        assert_same(state, state_of(0, 1, 1, 0))
        assert bool(jnp.isnan(optax_traced(zeros, limit)).all()) == (limit <= 0)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf(bad: float) -> None:
    updates = [jnp.array([3.0, bad]), jnp.array([4.0])]
    norm = abs(bad)
    expected: dict[Any, list[float]] = {
        "nan": [math.nan] * 3,
        "zero": [0.0] * 3,
        "keep": [3.0, bad, 4.0],
    }
    for policy, values in expected.items():
        clip = door.clip_by_global_norm(1.0, on_nonfinite=policy)
        for update in (clip.update, jax.jit(clip.update)):
            clipped, state = update(updates, clip.init(updates))
            assert_same(clipped, [jnp.array(values[:2]), jnp.array(values[2:])])
            assert_same(state, state_of(norm, 1.0 / norm, 1, 1))
    theirs = np.concatenate(once(optax.clip_by_global_norm(1.0), updates)[0])
    assert np.array_equal(np.isnan(theirs), [math.isnan(bad), True, math.isnan(bad)])


def test_raise_names_the_leaf_and_is_an_error_under_jit() -> None:
    clip = door.clip_by_global_norm(1.0, on_nonfinite="raise")
    assert_same(once(clip, TRIANGLE)[1], state_of(5, 0.2, 1, 1))
    updates = {**TRIANGLE, "c": jnp.array([math.nan, math.inf])}
    text = "the global norm is nan: updates['c'] holds 1 NaN and 1 inf"
    with raises(FloatingPointError, text):
        once(clip, updates)
    with pytest.raises(ValueError, match=r'^on_nonfinite is "raise"; what is traced'):
        jax.jit(partial(once, clip))(updates)


def test_a_limit_below_zero() -> None:
    updates = jnp.array([0.3, -0.4])
    for limit in (0.0, -1.0):
        clipped, state = traced(updates, limit)
        assert_same(clipped, jnp.array([0.0, -0.0]))
        assert_same(state, state_of(0.5, 0, 1, 1))
    theirs = once(optax.clip_by_global_norm(-1.0), updates)[0]
    assert float(theirs[0]) < 0 < float(theirs[1])


def test_an_array_as_limit_does_not_change_the_dtype() -> None:
    updates = {"w": jnp.array([3.0, 4.0], jnp.bfloat16)}
    limit = jnp.float32(2.5)
    clipped, _ = once(door.clip_by_global_norm(limit), updates)
    assert_same(clipped, {"w": jnp.array([1.5, 2.0], jnp.bfloat16)})
    with pytest.raises(TypeError, match="same dtypes"):
        once(optax.clip_by_global_norm(limit), updates)


def test_what_is_no_gradient_keeps_its_place() -> None:
    float0 = np.zeros(2, jax.dtypes.float0)
    updates = {"w": jnp.array([3.0, 4.0]), "n": None, "m": optax.MaskedNode(), "i": float0}
    clip = door.clip_by_global_norm(2.5)
    clipped, _ = once(clip, updates)
    assert_same(clipped["w"], jnp.array([1.5, 2.0]))
    assert clipped["n"] is None
    assert clipped["m"] == optax.MaskedNode()
    assert clipped["i"] is float0
    with pytest.raises(TypeError, match=r"float0|non-numeric"):
        once(optax.clip_by_global_norm(2.5), updates)
    del updates["i"]
    for clipped in (jax.jit(clip.update)(updates, clip.init(updates))[0], once(clip, updates)[0]):
        assert_same(clipped, {**updates, "w": jnp.array([1.5, 2.0])})


def test_numpy_arrays_and_numbers_become_arrays_of_jax() -> None:
    updates = {"w": jnp.array([2.0]), "x": np.array([1.0]), "y": 2.0, "z": np.float32(4)}
    for clipped, state in (once(door.clip_by_global_norm(2.5), updates), traced(updates, 2.5)):
        assert all(isinstance(leaf, jax.Array) for leaf in clipped.values())
        wanted = {"w": [1.0], "x": [0.5], "y": 1.0, "z": 2.0}
        assert_same(clipped, {key: jnp.float32(value) for key, value in wanted.items()})
        assert float(state.global_norm) == 5
    with pytest.raises(TypeError, match=r"\['w'\] is int32"):
        once(door.clip_by_global_norm(1.0), {"w": np.array([1])})


def test_slices_of_numpy_arrays_are_clipped() -> None:
    slices = gradclip.IndexedSlices(np.float32([[3, 4]]), np.array([1]), (5, 2))
    for updates in ([slices], [slices, jnp.zeros(2)]):
        clipped, state = once(door.clip_by_global_norm(2.5), updates)
        assert state.global_norm == 5
        assert isinstance(clipped[0].values, jax.Array)
        assert clipped[0].values.tolist() == [[1.5, 2]]


def test_the_state_begins_whatever_the_parameters_hold() -> None:
    params = {"w": jnp.ones(2), "activation": jax.nn.relu, "name": "mlp"}
    assert door.clip_by_global_norm(1.0).init(params).global_norm.dtype == "float32"


def test_slices_stay_slices() -> None:
    rows = gradclip.IndexedSlices(jnp.array([[1.5], [1.5], [4.0]]), jnp.array([0, 0, 1]), (9, 1))
    clipped, state = once(door.clip_by_global_norm(2.5), [rows])
    assert float(state.global_norm) == 5
    assert clipped[0].dense_shape is rows.dense_shape
    assert_same(clipped[0].values, jnp.array([[0.75], [0.75], [2.0]]))


@pytest.mark.parametrize("updates", [{}, {"n": None, "m": optax.MaskedNode()}])
def test_no_leaves(updates: Any) -> None:
    clip = door.clip_by_global_norm(1.0, axis_name="no such axis")
    for clipped, state in (once(clip, updates), traced(updates, 1.0)):
        assert clipped == updates
        assert_same(state, state_of(0, 1, 1, 0))


# ---- arguments ----


@pytest.mark.parametrize(
    ("max_norm", "error", "text"),
    [
        (0, ValueError, "max_norm is 0; it must be above 0 (inf: only measure)"),
        (-1.0, ValueError, "max_norm is -1.0; it must be above 0 (inf: only measure)"),
        (math.nan, ValueError, "max_norm is nan; it must be above 0 (inf: only measure)"),
        ("1", TypeError, "max_norm is '1'; it must be a real number"),
        (None, TypeError, "max_norm is None; it must be a real number"),
        (True, TypeError, "max_norm is True; it must be a real number"),
        (1j, TypeError, "max_norm is 1j; it must be a real number"),
        (
            np.ones(1),
            ValueError,
            "max_norm is array([1.]) of shape (1,); it must be a scalar",
        ),
    ],
)
def test_a_bad_limit_is_refused(max_norm: Any, error: type[Exception], text: str) -> None:
    with raises(error, text):
        door.clip_by_global_norm(max_norm)
    with raises(error, text):
        once(door.clip_by_global_norm(lambda _: max_norm), TRIANGLE)


def test_a_bad_policy_is_refused_at_once() -> None:
    text = "on_nonfinite is 'never'; it must be one of 'nan', 'raise', 'zero', 'keep'"
    with raises(ValueError, text):
        door.clip_by_global_norm(1.0, on_nonfinite="never")  # type: ignore[arg-type]


def test_inf_only_measures() -> None:
    clipped, state = once(door.clip_by_global_norm(math.inf), TRIANGLE)
    assert_same(clipped, TRIANGLE)
    assert_same(state, state_of(5, 1, 1, 0))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_schedule_is_given_the_count_before(wrap: Callable[[Any], Any]) -> None:
    clip = door.clip_by_global_norm(optax.piecewise_constant_schedule(1.0, {1: 0.5, 2: 8.0}))
    update, state = wrap(clip.update), clip.init(TRIANGLE)
    factors = []
    for _ in range(4):
        _, state = update(TRIANGLE, state)
        factors.append(float(state.factor))
    _, plain = once(door.clip_by_global_norm(0.5), TRIANGLE)
    assert factors == [float(np.float32(x)) for x in (0.2, 0.1, 0.8, 0.8)]
    assert float(plain.factor) == factors[1]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_inject_hyperparams(wrap: Callable[[Any], Any]) -> None:
    make = optax.inject_hyperparams(door.clip_by_global_norm)
    clip = make(max_norm=2.5, on_nonfinite="zero")
    update, state = wrap(clip.update), clip.init(TRIANGLE)
    clipped, state = update(TRIANGLE, state, TRIANGLE)
    assert_same(clipped, once(door.clip_by_global_norm(2.5), TRIANGLE)[0])
    state.hyperparams["max_norm"] = jnp.float32(0.1)
    clipped, state = update(TRIANGLE, state, TRIANGLE)
    assert_same(clipped, once(door.clip_by_global_norm(np.float32(0.1)), TRIANGLE)[0])
    assert_same(state.inner_state, state_of(5, np.float32(0.1) / 5, 2, 2))
    scheduled = make(max_norm=lambda count: 1.0 + count)
    update, state = wrap(scheduled.update), scheduled.init(TRIANGLE)
    for expected in (0.2, 0.4):
        _, state = update(TRIANGLE, state, TRIANGLE)
        assert float(state.inner_state.factor) == np.float32(expected)


@pytest.mark.parametrize("limit", [jnp.bfloat16(2.5), jnp.float16(2.5), jnp.int32(2)])
def test_a_traced_limit_of_any_real_dtype(limit: Any) -> None:
    clipped, state = traced(TRIANGLE, limit)
    assert_same((clipped, state), once(door.clip_by_global_norm(float(limit)), TRIANGLE))


# ---- within optax's transformations ----


def test_under_multi_transform_each_group_has_its_norm() -> None:
    groups = {
        "small": door.clip_by_global_norm(1.0),
        "large": door.clip_by_global_norm(10.0),
    }
    both = optax.multi_transform(groups, {"a": "small", "b": "large"})
    for update in (both.update, jax.jit(both.update)):
        clipped, state = update(TRIANGLE, both.init(TRIANGLE))
        assert_same(clipped, {"a": jnp.array([1.0]), "b": jnp.array([4.0])})
        states = state.inner_states
        assert_same(states["small"].inner_state, state_of(3, 1 / 3, 1, 1))
        assert_same(states["large"].inner_state, state_of(4, 1, 1, 0))


def test_under_masked_the_rest_is_left() -> None:
    masked = optax.masked(door.clip_by_global_norm(1.0), {"a": True, "b": False})
    clipped, state = once(masked, TRIANGLE)
    assert_same(clipped, {"a": jnp.array([1.0]), "b": jnp.array([4.0])})
    assert_same(state.inner_state, state_of(3, 1 / 3, 1, 1))


def test_under_multi_steps_the_mean_is_clipped() -> None:
    steps = optax.MultiSteps(door.clip_by_global_norm(1.0), 2)
    update, state = jax.jit(steps.update), steps.init(TRIANGLE)
    scaled = jax.tree.map(lambda x: 3 * x, TRIANGLE)
    first, state = update(TRIANGLE, state)
    assert_same(first, jax.tree.map(jnp.zeros_like, TRIANGLE))
    assert int(state.inner_opt_state.count) == 0
    second, state = update(scaled, state)
    mean = jax.tree.map(lambda x: 2 * x, TRIANGLE)
    assert_same(second, once(door.clip_by_global_norm(1.0), mean)[0])
    assert_same(state.inner_opt_state, state_of(10, 0.1, 1, 1))


def test_under_apply_if_finite_a_bad_update_is_not_counted() -> None:
    guarded = optax.apply_if_finite(door.clip_by_global_norm(1.0), 5)
    update, state = jax.jit(guarded.update), guarded.init(TRIANGLE)
    bad = {**TRIANGLE, "b": jnp.array([math.inf])}
    clipped, state = update(bad, state)
    assert_same(clipped, jax.tree.map(jnp.zeros_like, TRIANGLE))
    assert_same(state.inner_state, state_of(0, 1, 0, 0))
    clipped, state = update(TRIANGLE, state)
    assert_same(clipped, once(door.clip_by_global_norm(1.0), TRIANGLE)[0])
    assert_same(state.inner_state, state_of(5, 0.2, 1, 1))


def test_no_part_of_the_state_is_taken_for_parameters() -> None:
    clip = door.clip_by_global_norm(1.0)
    state = clip.init(TRIANGLE)
    assert_same(optax.tree.map_params(clip, lambda _: 1 / 0, state), state)


@pytest.mark.slow
def test_a_checkpoint_is_the_same_bits_and_goes_on(tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("orbax.checkpoint")
    optimizer = optax.chain(door.clip_by_global_norm(lambda count: 1.0 + count), optax.adam(0.1))
    update = jax.jit(optimizer.update)
    params = random_tree(0)
    state = optimizer.init(params)
    for seed in range(1, 3):
        _, state = update(random_tree(seed), state)
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        again = saver.restore(tmp_path / "state", jax.eval_shape(optimizer.init, params))
    assert_same(again, state)
    assert_same(update(random_tree(3), again), update(random_tree(3), state))


@pytest.mark.slow
def test_a_gradient_through_an_update_is_finite() -> None:
    clip = door.clip_by_global_norm(1.0)

    def loss(start: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            x, state = carry
            clipped, state = clip.update(x, state)
            return (x + clipped, state), (state.global_norm, 100 * state.factor)

        (x, _), measured = jax.lax.scan(step, (start, clip.init(start)), length=2)
        return x.sum() + sum(each.sum() for each in measured)

    gradient = jax.grad(loss)
    # x doubles twice; the norm's gradient is 0 there, the factor has none.
    assert np.array_equal(gradient(jnp.zeros(2)), [4, 4])
    assert np.isfinite(gradient(jnp.array([3.0, 4.0]))).all()
    factor = jax.grad(lambda x: once(clip, x)[1].factor)
    assert np.array_equal(factor(jnp.array([3.0, 4.0])), [0, 0])


# ---- shards ----


@pytest.mark.slow
def test_along_an_axis_of_vmap_the_norm_is_that_of_all() -> None:
    whole = random_tree(7)["w"]
    wanted, state = once(door.clip_by_global_norm(1.0), whole)
    clip = door.clip_by_global_norm(1.0, axis_name="shard")
    clipped, states = jax.vmap(partial(once, clip), axis_name="shard")(whole)
    assert_same(clipped, wanted)
    assert_same(states, jax.tree.map(lambda x: jnp.stack([x] * len(whole)), state))
    alone, _ = jax.vmap(partial(once, door.clip_by_global_norm(1.0)))(whole)
    assert_same(alone, jnp.stack([once(door.clip_by_global_norm(1.0), row)[0] for row in whole]))


@pytest.mark.slow
def test_over_eight_devices() -> None:
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    ended = run_python("import optax_worker; optax_worker.run()", env=environment)
    assert (ended.stdout, ended.returncode) == ("ok\n", 0), ended.stderr


# ---- per example ----


def per_example(grads: Any, limit: Any) -> tuple[Any, Any]:
    """Eagerly; the limit traced gives the same bits."""
    found = door.per_example_global_norm_clip(grads, limit)
    jitted = jax.jit(door.per_example_global_norm_clip)
    with jax.enable_x64(True):
        assert_same(jitted(grads, np.float64(limit)), found)
    return found


NEEDED = "each needs a first axis, of the examples, of the same length"
BIG, SMALL = 1e20, 1e-30

# The rows that jax_privacy.clipping lists for clip_pytree, and what its nan_safe adds.
EDGES = [
    ("below the limit", [[0.3, 0.4]], 1.0, [0.3, 0.4], 0),
    ("above the limit", [[3.0, 4.0]], 2.5, [1.5, 2.0], 1),
    ("at the limit", [[3.0, 4.0]], 5.0, [3.0, 4.0], 0),
    ("norm 0", [[0.0, 0.0]], 1.0, [0.0, 0.0], 0),
    ("norm 0, limit 0", [[0.0, 0.0]], 0.0, [0.0, 0.0], 0),
    ("limit 0", [[3.0, 4.0], [0.3, -0.4]], 0.0, [0.0, 0.0], 2),
    ("limit inf", [[3.0, 4.0], [1.0, 1.0]], math.inf, [4.0, 5.0], 0),
    ("NaN", [[math.nan, 4.0], [0.3, 0.4]], 1.0, [0.3, 0.4], 1),
    ("inf", [[math.inf, 4.0], [0.3, 0.4]], 1.0, [0.3, 0.4], 1),
    ("-inf", [[3.0, -math.inf], [0.3, 0.4]], 1.0, [0.3, 0.4], 1),
    ("inf at limit inf", [[math.inf, 4.0], [3.0, 4.0]], math.inf, [3.0, 4.0], 0),
    ("NaN at limit 0", [[math.nan, 4.0], [3.0, 4.0]], 0.0, [0.0, 0.0], 2),
    # Where the peers err: their squares leave the dtype.
    ("squares overflow", [[BIG, 0.0], [0.0, 0.5]], 1.0, [1.0, 0.5], 1),
    ("squares underflow", [[SMALL, 0.0], [0.0, 0.0]], 1e-31, [1e-31, 0.0], 1),
    ("no examples", np.zeros((0, 2)), 1.0, [0.0, 0.0], 0),
]


@pytest.mark.parametrize(
    ("grads", "limit", "total", "number"), [row[1:] for row in EDGES], ids=[row[0] for row in EDGES]
)
def test_edges_of_an_example(grads: Any, limit: float, total: list[float], number: int) -> None:
    tree = {"w": jnp.array(grads, "float32"), "n": None}
    expected = ({"w": jnp.array(total, "float32"), "n": None}, jnp.int32(number))
    assert_same(per_example(tree, limit), expected)


@pytest.mark.slow
def test_each_example_is_clipped_as_one_tree_is() -> None:
    rng = np.random.default_rng(3)
    shapes = {"w": ((6, 4, 3), "float32"), "b": ((6,), "bfloat16"), "c": ((6, 2), "complex64")}
    grads = {
        key: jnp.asarray(rng.normal(size=shape), dtype) for key, (shape, dtype) in shapes.items()
    }
    limit, total, number = 4.5, dict.fromkeys(grads, 0.0), 0
    for place in range(6):
        example = jax.tree.map(lambda x, place=place: x[place], grads)
        clipped, norm = gradclip.clip_by_global_norm(example, limit)
        number += int(norm > limit)
        for key, leaf in clipped.items():
            wide = "complex128" if key == "c" else "float64"
            total[key] = total[key] + np.asarray(leaf).astype(wide)
    assert 0 < number < 6
    wanted = {key: jnp.asarray(np.asarray(total[key]), x.dtype) for key, x in grads.items()}
    assert_same(per_example(grads, limit), (wanted, jnp.int32(number)))


@pytest.mark.slow
def test_the_sum_is_rounded_once() -> None:
    grads = jnp.array([1.0] + [2.0**-24] * 4)
    assert_same(per_example(grads, 1.0)[0], jnp.float32(1 + 2.0**-22))
    halves = jnp.array([1.0] + [2.0**-8] * 4, jnp.bfloat16)
    assert_same(per_example(halves, 1.0)[0], jnp.bfloat16(1 + 2.0**-6))


@pytest.mark.slow
def test_optax_per_example_agrees_where_both_are_defined() -> None:
    rng = np.random.default_rng(4)
    grads = [jnp.asarray(rng.normal(size=shape), "float32") for shape in ((8, 3, 2), (8, 5))]
    for limit in (0.0, 1.0, 3.0, math.inf):
        ours, number = per_example(grads, limit)
        theirs, their_number = optax.per_example_global_norm_clip(grads, limit)
        assert_same(number, their_number)
        for a, b in zip(ours, theirs, strict=True):
            assert np.allclose(a, b, rtol=0, atol=8 * 11 * 3 * 2.0**-24)


@pytest.mark.slow
def test_where_optax_per_example_differs() -> None:
    theirs = lambda grads, limit: np.asarray(  # noqa: E731
        optax.per_example_global_norm_clip([jnp.asarray(grads)], limit)[0][0]
    )
    for bad in (math.nan, math.inf):
        grads = [jnp.array([[bad, 4.0], [0.3, 0.4]])]
        assert np.isnan(theirs(grads[0], 1.0)[0])
        number = optax.per_example_global_norm_clip(grads, 1.0)[1]
        assert int(number) == (not math.isnan(bad))
    assert np.array_equal(theirs([[3.0, 4.0]], math.nan), [3, 4])
    mixed = [jnp.ones((1, 1), "bfloat16"), jnp.ones((1, 1))]
    assert optax.per_example_global_norm_clip(mixed, 1.0)[0][0].dtype == "float32"
    ones = jnp.ones((1, 11), "bfloat16")
    assert (
        float(per_example([ones], 1.0)[0][0][0]) == jnp.bfloat16(11**-0.5) != theirs(ones, 1.0)[0]
    )
    assert np.array_equal(theirs([[3.0, 4.0]], -5.0), [-3, -4])
    assert np.array_equal(theirs([[BIG, 0.0]], 1.0), [0, 0])
    assert theirs([[SMALL, 0.0]], 1e-31)[0] == np.float32(SMALL)
    assert theirs([[3, 4]], 5.0).dtype == "float32"
    with pytest.raises(IndexError):
        optax.per_example_global_norm_clip([], 1.0)


def test_a_traced_limit_below_zero_or_nan_lets_nothing_through() -> None:
    clip = jax.jit(door.per_example_global_norm_clip)
    grads = jnp.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    for limit in (-1.0, math.nan):
        assert_same(clip(grads, limit), (jnp.zeros(2), jnp.int32(2)))


@pytest.mark.parametrize("grads", [[], {"n": None}])
def test_per_example_without_leaves(grads: Any) -> None:
    assert_same(per_example(grads, 1.0), (grads, jnp.int32(0)))


def test_numpy_examples() -> None:
    grads = [np.array([[3.0, 4.0]]), jnp.zeros((1, 1))]
    found, _ = door.per_example_global_norm_clip(grads, 2.5)
    assert_same(found, [jnp.array([1.5, 2.0]), jnp.zeros(1)])


@pytest.mark.parametrize(
    ("grads", "limit", "error", "text"),
    [
        (
            {"a": jnp.ones((2, 3)), "b": jnp.ones(3)},
            1.0,
            ValueError,
            f"the shapes of grads are {{\"['a']\": (2, 3), \"['b']\": (3,)}}; {NEEDED}",
        ),
        (
            [jnp.float32(1)],
            1.0,
            ValueError,
            f"the shapes of grads are {{'[0]': ()}}; {NEEDED}",
        ),
        ([jnp.ones(1)], -1.0, ValueError, "l2_norm_clip is -1.0; a norm is never negative"),
        ([jnp.ones(1)], math.nan, ValueError, "l2_norm_clip is nan; it must be 0 or above"),
        ([jnp.ones(1)], None, TypeError, "l2_norm_clip is None; it must be a real number"),
    ],
)
def test_bad_examples(grads: Any, limit: Any, error: type[Exception], text: str) -> None:
    with raises(error, text):
        door.per_example_global_norm_clip(grads, limit)


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (jax.random.split(jax.random.key(0)), "key<fry>"),
        (BCOO.fromdense(jnp.ones((2, 2))), "BCOO"),
        (gradclip.IndexedSlices(jnp.ones((2, 2)), jnp.arange(2)), "IndexedSlices"),
        (np.zeros(2, jax.dtypes.float0), "ndarray"),
    ],
)
def test_examples_that_are_no_dense_numbers(leaf: Any, kind: str) -> None:
    with raises(TypeError, f"grads['w'] is {kind}; each leaf is to be a dense array of numbers"):
        door.per_example_global_norm_clip({"w": leaf}, 1.0)


@pytest.mark.slow
def test_under_strict_promotion_of_dtypes() -> None:
    with jax.numpy_dtype_promotion("strict"):
        grads = [jnp.ones((2, 3)), jnp.ones((2, 1), "bfloat16"), jnp.ones((2, 1), "complex64")]
        assert door.per_example_global_norm_clip(grads, 1.0)[1] == 2
        assert once(door.clip_by_global_norm(1.0), grads)[1].clipped_count == 1


def test_integer_examples_are_refused() -> None:
    with pytest.raises(TypeError, match=r"\['w'\] is int32; gradclip clips float16"):
        door.per_example_global_norm_clip({"w": jnp.array([[3, 4]])}, 1.0)


@pytest.mark.slow
def test_examples_are_not_copied() -> None:
    grads = [jnp.ones((200, 1000))]
    compiled = jax.jit(door.per_example_global_norm_clip).lower(grads, 1.0).compile()
    room = compiled.memory_analysis().temp_size_in_bytes
    assert room < 10 * grads[0][0].nbytes < grads[0].nbytes
