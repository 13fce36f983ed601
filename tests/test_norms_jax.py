"""`gradclip.norms` of JAX, and norms in the state of `gradclip.optax`: each against integers."""

from __future__ import annotations

import functools
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradclip
from cases import DTYPES
from conftest import _jax_array, _jax_bcoo, version
from each_norm import assert_norms, expected, hard_leaves, random_leaves, sparse_leaves
from host import run_python

if version("jax") is None or version("optax") is None:
    pytest.skip("jax or optax is not installed", allow_module_level=True)
import jax
import jax.numpy as jnp
import optax

import gradclip.optax as door
from gradclip import limits
from gradclip.jax import xla
from gradclip.record import History


@pytest.fixture(autouse=True, scope="module")
def _no_programs_left() -> Iterator[None]:
    yield
    jax.clear_caches()


@functools.cache
def program(_: str) -> Any:
    """A program of its own for each way to compile it."""

    def norms(leaves: Any) -> Any:
        return gradclip.norms(leaves)

    return jax.jit(norms)


def jitted(leaves: Any) -> Any:
    with jax.enable_x64(True):
        return program("jit")(leaves)


def by_operations(leaves: Any) -> Any:
    """As on devices that the C kernel does not reach."""
    with pytest.MonkeyPatch.context() as patched, jax.enable_x64(True):
        patched.setattr(xla, "_one_device_sees_all", lambda _: False)
        return program("operations")(leaves)


WAYS: dict[str, Callable[[Any], Any]] = {
    "eager": gradclip.norms,
    "jit": jitted,
    "operations": by_operations,
}
# Each dtype is a program of its own, which XLA compiles for seconds where it is of its operations.
SOME = [["float32"], list(DTYPES)]
LISTS = [*([name] for name in DTYPES), list(DTYPES)]
EACH = [
    pytest.param(
        way,
        names,
        marks=() if way == "eager" else pytest.mark.slow if names in SOME else pytest.mark.long,
        id=f"{way}-{names[0] if len(names) == 1 else 'mixed'}",
    )
    for way in WAYS
    for names in LISTS
]


def jax_of(leaf: Any) -> Any:
    if isinstance(leaf, gradclip.IndexedSlices):
        return leaf._replace(values=_jax_array(leaf.values), indices=jnp.asarray(leaf.indices))
    return _jax_array(leaf)


@pytest.mark.parametrize(("way", "names"), EACH)
def test_every_leaf(way: str, names: list[str]) -> None:
    rng = np.random.default_rng(4)
    for _ in range(6 if way == "operations" else 20):
        leaves = random_leaves(rng, names)
        found = WAYS[way](list(map(_jax_array, leaves)))
        assert isinstance(found.values, jax.Array)
        assert_norms(found, leaves)
    leaves = [leaf for name in names for leaf in hard_leaves(name)]
    assert_norms(WAYS[way](list(map(_jax_array, leaves))), leaves)


@pytest.mark.parametrize(
    "way", ["eager", *(pytest.param(x, marks=pytest.mark.slow) for x in list(WAYS)[1:])]
)
@pytest.mark.parametrize("name", ["float32", pytest.param("complex128", marks=pytest.mark.slow)])
def test_sparse_leaves(way: str, name: str) -> None:
    """Beside dense ones, as slices and as BCOO."""
    rng = np.random.default_rng(5)
    leaves = [np.float32([3, 4]), *sparse_leaves(rng, name)]
    assert_norms(WAYS[way](list(map(jax_of, leaves))), leaves)
    dense = [np.float32([[1, 2], [2, 4]]), np.float32([12, 0])]
    found = WAYS[way]([_jax_bcoo(dense[0]), jnp.asarray(dense[1])])
    assert_norms(found, dense)


def test_the_limit_of_a_sparse_leaf_without_rows_under_jit() -> None:
    empty = gradclip.IndexedSlices(jnp.zeros((0, 2)), jnp.zeros(0, int))
    clip = door.clip_by_global_norm(limits.PerTensor(limits.Percentile(50)), per_leaf=True)
    updates = [empty, jnp.array([3.0, 4.0])]
    _, state = jax.jit(clip.update)(updates, clip.init(updates))
    assert state.norms.tolist() == [0, 5]


def test_a_norm_above_float32_in_a_vector_of_float64() -> None:
    leaves = [np.full(4, 3e38, np.float32), np.ones(1)]
    for way in ("eager", "jit"):
        found = WAYS[way](list(map(_jax_array, leaves)))
        assert_norms(found, leaves)
        assert 5e38 < found.floats()[0] < 7e38


# ---- a pytree, which is transformed ----

TREE = {"w": jnp.array([3.0, 0.0]), "b": {"c": jnp.array([4.0]), "none": None}}


def test_jit_takes_and_returns_it_with_its_names() -> None:
    found = jax.jit(gradclip.norms)(TREE)
    assert found.paths == ("b/c", "w") == gradclip.norms(TREE).paths
    assert found.as_dict() == {"grad_norm/b/c": 4, "grad_norm/w": 3, "grad_norm": 5}
    twice = jax.jit(lambda norms: jax.tree.map(lambda x: 2 * x, norms))(found)
    assert twice.as_dict("x/") == {"x/b/c": 8, "x/w": 6, "x": 10}
    keys = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(found)]
    assert keys == [".values", ".global_norm"]
    assert pickle.loads(pickle.dumps(found)).as_dict() == found.as_dict()
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.jit(lambda tree: gradclip.norms(tree).largest(1))(TREE)


def test_no_leaves() -> None:
    for tree in ([], {"a": None}):
        found = jax.jit(gradclip.norms)(tree)
        assert (found.values.shape, float(found.global_norm), found.paths) == ((0,), 0, ())


def test_members_of_a_batch() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 2)), "float32")
    found = jax.vmap(lambda x: gradclip.norms([x[0], x[1:]]))(x)
    for row, norm, member in zip(found.values, found.global_norm, np.asarray(x), strict=True):
        assert_norms(gradclip.Norms(row, norm, ["0", "1"]), [member[0], member[1:]])


def test_parts_along_an_axis_are_one_leaf() -> None:
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    found = jax.vmap(lambda x: gradclip.norms([x[:2], x[2:]], group="i"), axis_name="i")(x)
    for row, norm in zip(found.values, found.global_norm, strict=True):
        assert_norms(gradclip.Norms(row, norm, ["0", "1"]), [x[:, :2], x[:, 2:]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients(dtype: str) -> None:
    with jax.enable_x64(True):
        slices = gradclip.IndexedSlices(jnp.array([[1.0], [2.0]], dtype), jnp.array([2, 2]))
        leaves = [jnp.array([3.0, 4.0], dtype), jnp.zeros(2, dtype), slices]

        def weighed(norms: Any) -> Any:
            return norms.values @ jnp.array([2.0, 3.0, 5.0], dtype) + norms.global_norm

        (x, none, (values, *_)) = jax.grad(lambda x: weighed(gradclip.norms(x)), allow_int=True)(
            leaves
        )
        whole = 34**0.5
        np.testing.assert_allclose(x, [1.2 + 3 / whole, 1.6 + 4 / whole], rtol=1e-6)
        assert none.tolist() == [0, 0]
        np.testing.assert_allclose(values, [[5 + 3 / whole]] * 2, rtol=1e-6)
        dense = leaves[:2]
        tangents = [jnp.array([1.0, 0.0], dtype), jnp.ones(2, dtype)]
        _, moved = jax.jvp(lambda x: gradclip.norms(x).values, (dense,), (tangents,))
        np.testing.assert_allclose(moved, [0.6, 0], rtol=1e-6)


def test_the_gradient_of_a_norm_that_its_dtype_does_not_hold() -> None:
    x = jnp.array([3e38, -3e38])
    assert jnp.isinf(gradclip.norms([x]).values)
    for name in ("values", "global_norm"):
        gradient = jax.grad(lambda x, name=name: jnp.sum(getattr(gradclip.norms([x]), name)))(x)
        np.testing.assert_allclose(gradient, [0.5**0.5, -(0.5**0.5)], rtol=1e-6)


def test_the_new_values_are_not_computed() -> None:
    """What only measures is no second pass: XLA drops it."""
    text = jax.jit(gradclip.norms).lower([jnp.ones(5)]).compile().as_text()
    assert "gradclip_norms" in text
    assert "gradclip_scale" not in text


# ---- in the state of an optimizer ----

PARAMS = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
LIMITS: dict[str, Callable[[], Any]] = {
    "number": lambda: 2.5,
    "schedule": lambda: lambda count: 2.5 + count,
    "learns": lambda: limits.ZScore(warmup=2),
    "each": lambda: limits.PerTensor(limits.Percentile(50, 5)),
}


def trees(count: int = 4) -> list[Any]:
    rng = np.random.default_rng(1)
    return [
        jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4"), PARAMS) for _ in range(count)
    ]


def same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("name", LIMITS)
def test_the_state_has_the_norms_and_is_else_what_it_is_without(name: str) -> None:
    clip, plain = (door.clip_by_global_norm(LIMITS[name](), per_leaf=x) for x in (True, False))
    eager, jit, without = clip.init(PARAMS), clip.init(PARAMS), plain.init(PARAMS)
    assert eager.norms.tolist() == [0, 0]
    update = jax.jit(clip.update)
    for tree in trees():
        new, eager = clip.update(tree, eager)
        wanted, without = plain.update(tree, without)
        same((new, eager.clip_state), (wanted, without))
        new, jit = update(tree, jit)
        same((new, jit), (wanted, eager))
        np.testing.assert_array_equal(eager.norms, expected([tree["b"], tree["w"]]))
    last, _ = jax.lax.scan(
        lambda state, tree: clip.update(tree, state)[::-1],
        clip.init(PARAMS),
        jax.tree.map(lambda *xs: np.stack(xs), *trees()),
    )
    same(last, eager)


@pytest.mark.slow
def test_under_multi_steps_vmap_and_in_an_optimizer_that_skips() -> None:
    steps = optax.MultiSteps(door.clip_by_global_norm(1.0, per_leaf=True), 2)
    state = steps.init(PARAMS)
    for factor in (1.0, 3.0):
        _, state = jax.jit(steps.update)(jax.tree.map(lambda x, f=factor: f * x, PARAMS), state)
    assert door.norms_of(state, PARAMS).as_dict("") == {"b": 8, "w": 6, "global_norm": 10}
    clip = door.clip_by_global_norm(1.0, per_leaf=True)
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    _, state = jax.vmap(clip.update)(two, jax.vmap(clip.init)(two))
    assert door.norms_of(state, PARAMS).values.tolist() == [[4, 3], [8, 6]]
    optimizer = door.apply_clipped(optax.sgd(1.0), 1.0, on_nonfinite="skip", per_leaf=True)
    bad = PARAMS | {"b": jnp.array([jnp.nan])}
    _, state = jax.jit(optimizer.update)(bad, optimizer.init(PARAMS))
    assert int(state.skipped_count) == 1
    assert door.norms_of(state, PARAMS).nonfinite() == ["b"]


def test_what_has_no_gradient_has_no_norm() -> None:
    params = {"a": jnp.array([3.0]), "n": jnp.array(1), "o": None, "z": 4.0}
    updates = params | {"n": np.zeros((), jax.dtypes.float0)}
    clip = door.clip_by_global_norm(1.0, per_leaf=True)
    _, state = clip.update(updates, clip.init(params))
    assert door.norms_of(state, params).as_dict() == {
        "grad_norm/a": 3,
        "grad_norm/z": 4,
        "grad_norm": 5,
    }
    state = clip.init({"o": None})
    assert clip.update({"o": None}, state)[1].norms.shape == (0,)


def test_the_dtype_is_that_of_the_parameters() -> None:
    with jax.enable_x64(True):
        wide = {"w": jnp.array([3.0, 4.0]), "n": jnp.ones(1, "float32")}
    clip = door.clip_by_global_norm(1.0, per_leaf=True)
    for params, dtype in ((wide, "float64"), (PARAMS, "float32")):
        state = clip.init(params)
        assert state.norms.dtype == dtype
        _, state = clip.update(params, state)
        assert state.norms.dtype == dtype


@pytest.mark.parametrize("name", ["number", "learns"])
def test_a_state_that_was_saved_without_goes_on_with_and_back(name: str, tmp_path: Path) -> None:
    """Checkpoints: of pickle, flax and Orbax, into the structure that was saved."""
    plain, clip = (door.clip_by_global_norm(LIMITS[name](), per_leaf=x) for x in (False, True))
    first, second, third, _ = trees()
    _, saved = plain.update(first, plain.init(PARAMS))
    _, wanted = plain.update(second, saved)
    flax, orbax = (pytest.importorskip(x) for x in ("flax.serialization", "orbax.checkpoint"))
    with orbax.StandardCheckpointer() as files:
        files.save(tmp_path / "state", saved)
        files.wait_until_finished()
        restored = files.restore(tmp_path / "state", plain.init(PARAMS))
    for before in (
        saved,
        restored,
        pickle.loads(pickle.dumps(saved)),
        flax.from_bytes(plain.init(PARAMS), flax.to_bytes(saved)),
    ):
        _, state = clip.update(second, before)
        same(state.clip_state, wanted)
        np.testing.assert_array_equal(state.norms, expected([second["b"], second["w"]]))
    again = flax.from_bytes(clip.init(PARAMS), flax.to_bytes(state))
    same(pickle.loads(pickle.dumps(again)), state)
    same(plain.update(third, again)[1], plain.update(third, wanted)[1])


@pytest.mark.parametrize("steps", [False, True])
def test_a_record_has_them(steps: bool, tmp_path: Path) -> None:
    if steps:
        optimizer: Any = door.apply_clipped(optax.adam(1.0), 2.5, per_leaf=True)
    else:
        optimizer = optax.chain(door.clip_by_global_norm(2.5, per_leaf=True), optax.adam(1.0))
    _, state = optimizer.update(PARAMS, optimizer.init(PARAMS))
    names = door.norms_of(state, PARAMS).paths
    with gradclip.Record(tmp_path / "run.db", per_tensor_every=1) as record:
        record(0, gradclip.Record.of_state(state, names), limit=2.5)
    with History.open(tmp_path / "run.db") as history:
        assert tuple(history.names) == ("b", "w")
        assert history.tensor_norms(0, 1).values.tolist() == [[4, 3]]


def test_no_other_gradient_flows_than_through_the_norms() -> None:
    clip = door.clip_by_global_norm(1.0, per_leaf=True)
    first = clip.init(PARAMS)
    d = jax.grad(lambda x: clip.update(x, first)[1].norms @ jnp.array([2.0, 3.0]))(PARAMS)
    np.testing.assert_allclose(d["b"], [2.0])
    np.testing.assert_allclose(d["w"], [3.0, 0])


def test_errors() -> None:
    clip, plain = (door.clip_by_global_norm(1.0, per_leaf=x) for x in (True, False))
    one = clip.init(PARAMS)

    def raises(text: str) -> Any:
        return pytest.raises(ValueError, match=f"^{re.escape(text)}$")

    with raises(
        "the updates have 1 leaves, and the state was made for parameters of 2: with per_leaf=True "
        "they have to be as many"
    ):
        clip.update({"w": PARAMS["w"]}, one)
    for count, state in ((0, plain.init(PARAMS)), (2, (one, one))):
        with raises(
            f"the state holds {count} of ClipPerLeafState; pass the part of it that holds the one "
            "of a clip_by_global_norm with per_leaf=True"
        ):
            door.norms_of(state, PARAMS)
    with raises(
        "the state has norms of shape (2,), and params 1 leaves that have a gradient; pass the "
        "parameters that the clip is given"
    ):
        door.norms_of(one, [PARAMS["w"]])


@pytest.mark.parametrize(
    "ways",
    [pytest.param("2", marks=pytest.mark.slow), pytest.param("1, 4", marks=pytest.mark.long)],
)
def test_over_some_of_four_devices(ways: str) -> None:
    flags = "--xla_force_host_platform_device_count=4"
    done = run_python(
        f"import norms_jax_worker; norms_jax_worker.run({ways})",
        env=os.environ | {"XLA_FLAGS": flags},
    )
    assert done.stdout == "ok\n", done.stdout + done.stderr
