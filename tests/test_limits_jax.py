"""Limits that learn, by `gradclip.optax` and by the core's functions on arrays of JAX."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradclip
from conftest import version
from gradclip import limits
from gradclip.core.arithmetic import HOST

if version("jax") is None or version("optax") is None:
    pytest.skip("jax or optax is not installed", allow_module_level=True)
import jax
import jax.numpy as jnp
import optax

import gradclip.optax as door

# ---- the rules, as their papers have them ----


def zclip(
    norms: Sequence[float],
    *,
    z: float = 2.5,
    decay: float = 0.97,
    warmup: int = 25,
    limit: float = math.inf,
    beyond: str = "shrink",
    raw: bool = False,
) -> Iterator[float]:
    """ZClip: the limit of each norm, 0 where the step is skipped."""
    seen: list[float] = []
    mean = var = 0.0
    for norm in norms:
        usual = 0 < norm < math.inf
        if len(seen) < max(warmup, 1):
            yield limit
            if usual:
                seen.append(norm)
                mean, var = float(np.mean(seen)), float(np.var(seen))
            continue
        score = (norm - mean) / (math.sqrt(var) + min(1e-6, mean / 1000))
        stands_out = score > z and norm > np.nextafter(mean, math.inf)
        rule = {
            "shrink": mean + z * math.sqrt(var) * (z / score if stands_out else 1),
            "edge": mean + z * math.sqrt(var),
            "mean": mean,
            "skip": 0.0,
        }[beyond]
        yield min(rule, limit) if stands_out else limit
        if usual and not (stands_out and beyond == "skip"):
            learnt = min(norm, rule) if stands_out and not raw else norm
            mean = decay * mean + (1 - decay) * learnt
            var = decay * var + (1 - decay) * (learnt - mean) ** 2


def zclip_of_logarithms(norms: Sequence[float], **options: Any) -> Iterator[float]:
    """Chen et al.: the same of logarithms, for a decay, z = 4 and steps that are skipped."""
    mean = var = 0.0
    logs: list[float] = []
    for norm in norms:
        usual = 0 < norm < math.inf
        if len(logs) < options["warmup"]:
            yield math.inf
            if usual:
                logs.append(math.log(norm))
                mean, var = float(np.mean(logs)), float(np.var(logs))
            continue
        x = math.log(norm) if norm > 0 else -math.inf
        skipped = x > mean + options["z"] * (math.sqrt(var) + 1e-6)
        yield 0.0 if skipped else math.inf
        if usual and not skipped:
            mean = options["decay"] * mean + (1 - options["decay"]) * x
            var = options["decay"] * var + (1 - options["decay"]) * (x - mean) ** 2


def autoclip(
    norms: Sequence[float], *, p: float = 10, history: int = 10_000, factor: float = 1
) -> Iterator[float]:
    seen: list[float] = []
    for norm in norms:
        usual = 0 < norm < math.inf
        if usual:
            seen.append(norm)
            yield factor * float(np.percentile(seen[-history:], p))
        else:
            yield math.nan  # nothing is clipped by it


def moving_average(
    norms: Sequence[float], *, factor: float, decay: float = 0.98, warmup: int = 100, raw: bool
) -> Iterator[float]:
    seen: list[float] = []
    average = 0.0
    for norm in norms:
        usual = 0 < norm < math.inf
        if len(seen) < max(warmup, 1):
            yield 1.0
            if usual:
                seen.append(norm)
                average = float(np.mean(seen))
            continue
        yield factor * average
        if usual:
            average = decay * average + (1 - decay) * (norm if raw else min(norm, factor * average))


KINDS: dict[str, tuple[limits.ZScore | limits.Percentile | limits.Average, Any]] = {
    "zscore": (limits.ZScore(), zclip),
    "edge": (
        limits.ZScore(z=1.5, decay=0.9, warmup=3, limit=7.0, beyond="edge", learn_from="raw"),
        partial(zclip, z=1.5, decay=0.9, warmup=3, limit=7.0, beyond="edge", raw=True),
    ),
    "mean": (
        limits.ZScore(warmup=0, beyond="mean"),
        partial(zclip, warmup=0, beyond="mean"),
    ),
    "skip": (limits.ZScore(beyond="skip"), partial(zclip, beyond="skip")),
    "log": (
        limits.ZScore(z=2.0, log=True, beyond="skip"),
        partial(zclip_of_logarithms, z=2.0, decay=0.97, warmup=25),
    ),
    "percentile": (limits.Percentile(), autoclip),
    "median": (limits.Percentile(50, 100, 2.0), partial(autoclip, p=50, history=100, factor=2)),
    "average": (limits.Average(1.05), partial(moving_average, factor=1.05, raw=False)),
    "raw": (
        limits.Average(0.5, decay=0.9, warmup=2, learn_from="raw"),
        partial(moving_average, factor=0.5, decay=0.9, warmup=2, raw=True),
    ),
}
every_kind = pytest.mark.parametrize("name", KINDS)


def hostile(seed: int, count: int) -> Any:
    """Norms as training has them, with some that are far out, equal, 0, inf and NaN."""
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(size=count)) * (1 + rng.random(count))
    far = rng.random(count) < 0.03
    norms[far] = 10 ** rng.uniform(-100, 100, far.sum())
    norms[rng.random(count) < 0.03] = 1.25
    norms[count // 2 : count // 2 + 50] = norms[count // 2]
    for value in (0.0, math.inf, math.nan):
        norms[rng.random(count) < 0.01] = value
    norms[0] = 1e30
    return norms


def scanned(clip: optax.GradientTransformation, gradients: Any) -> tuple[Any, Any]:
    """The last state, and what each update gave."""

    def step(state: Any, gradient: Any) -> Any:
        clipped, state = clip.update([gradient], state)
        return state, (clipped[0], state.limit, state.factor)

    return jax.jit(partial(jax.lax.scan, step))(clip.init([gradients[0]]), gradients)


@every_kind
@pytest.mark.parametrize("count", [1500, pytest.param(10_000, marks=pytest.mark.long)])
def test_each_kind_against_its_paper(name: str, count: int) -> None:
    kind, paper = KINDS[name]
    norms = hostile(3, count)
    with jax.enable_x64(True):
        _, given = scanned(door.clip_by_global_norm(kind), norms[:, None])
    clipped, limit, factor = map(np.asarray, given)
    wanted = np.array(list(paper(norms.tolist())))
    finite = np.isfinite(norms) & (norms > 0)
    skipped = finite & (factor == 0)
    found = np.where(skipped, 0.0, limit)[finite]
    np.testing.assert_allclose(found, wanted[finite], rtol=1e-12)
    exact = np.minimum(norms, wanted)[finite]
    np.testing.assert_allclose(clipped[finite, 0], exact, rtol=1e-12)
    assert (found < norms[finite]).sum() > 5  # some were clipped


# ---- one state, however it goes on ----

PARAMS = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}


def gradients(seed: int, count: int) -> list[Any]:
    sizes = np.exp(np.random.default_rng(seed).normal(size=count)).astype("float32")
    sizes[7:8], sizes[11:12] = math.nan, 1e20
    return [jax.tree.map(lambda x, size=size: size * x, PARAMS) for size in sizes]


def assert_same(actual: Any, expected: Any) -> None:
    """Trees of the same structure, dtypes and bits, but of NaN."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert got.dtype == wanted.dtype
        pair = [np.asarray(each) for each in (got, wanted)]
        if pair[0].dtype.kind == "V" or pair[0].dtype == "bfloat16":
            pair = [each.astype("float32") for each in pair]
        np.testing.assert_array_equal(*pair)


def looped(update: Any, trees: Sequence[Any], state: Any) -> tuple[list[Any], Any]:
    found = []
    for tree in trees:
        clipped, state = update(tree, state)
        found.append(clipped)
    return found, state


@every_kind
def test_eager_jit_and_scan_give_the_same_bits(name: str) -> None:
    kind, _ = KINDS[name]
    clip, trees = door.clip_by_global_norm(kind), gradients(0, 40)
    eager, state = looped(clip.update, trees, clip.init(PARAMS))
    assert_same(looped(jax.jit(clip.update), trees, clip.init(PARAMS)), (eager, state))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def step(state: Any, tree: Any) -> Any:
        clipped, state = clip.update(tree, state)
        return state, clipped

    last, every = jax.lax.scan(step, clip.init(PARAMS), stacked)
    assert_same(last, state)
    assert_same(every, jax.tree.map(lambda *leaves: jnp.stack(leaves), *eager))
    assert int(state.count) == 40
    assert kind._memory.state is None  # the object keeps nothing


@every_kind
def test_what_is_learnt_is_what_the_host_learns(name: str) -> None:
    kind, _ = KINDS[name]
    clip, trees = door.clip_by_global_norm(kind), gradients(1, 40)
    _, state = looped(jax.jit(clip.update), trees, clip.init(PARAMS))
    host = kind.begin(HOST)
    for tree in trees:
        norm = gradclip.global_norm([np.asarray(leaf) for leaf in tree.values()])
        host = kind.judge(HOST, host, float(norm)).state
    for got, wanted in zip(state.learnt, host, strict=True):
        if name == "log":
            np.testing.assert_allclose(got, wanted, rtol=1e-14)
        else:
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", ["zscore", "log", "median", "average"])
def test_what_is_not_finite_and_zero_teach_nothing(name: str, wrap: Callable[[Any], Any]) -> None:
    clip = door.clip_by_global_norm(KINDS[name][0])
    update = wrap(clip.update)
    for trees in (gradients(0, 5), []):  # also before anything is learnt
        _, state = looped(update, trees, clip.init(PARAMS))
        for size in (0.0, math.inf, math.nan, -math.inf):
            clipped, after = update({"a": jnp.zeros(1), "b": jnp.array([size])}, state)
            assert_same(after.limit_state, state.limit_state)
            assert int(after.count) == len(trees) + 1
            wanted = 0.0 if size == 0 else math.nan
            np.testing.assert_array_equal(clipped["a"], [wanted])
            assert float(after.limit) > 0


def test_float64_norms_beyond_float64_are_clipped_and_teach_nothing() -> None:
    with jax.enable_x64(True):
        clip = door.clip_by_global_norm(limits.Average(2.0, limit=3.0))
        huge = jnp.full(4, 1.5e308)
        state = clip.init(huge)
        for update in (clip.update, jax.jit(clip.update)):
            clipped, after = update(huge, state)
            np.testing.assert_allclose(clipped, np.full(4, 1.5))
            assert_same(after.limit_state, state.limit_state)


def test_no_gradient_flows_through_what_is_learnt() -> None:
    clip = door.clip_by_global_norm(limits.Average(2.0, warmup=1, limit=10.0))
    _, state = clip.update(PARAMS, clip.init(PARAMS))

    def first(size: Any) -> Any:
        clipped, _ = clip.update({"a": size * jnp.array([3.0]), "b": jnp.array([4.0])}, state)
        return clipped["a"][0]

    # The limit is 10: of (30, 4) the norm is sqrt(916), and d(10 x / N) = 10 (1 / N - x^2 / N^3).
    norm = math.sqrt(916)
    assert first(10.0) == np.float32(30 * 10 / norm)
    wanted = 3 * 10 * (1 / norm - 900 / norm**3)
    np.testing.assert_allclose(jax.grad(first)(10.0), wanted, rtol=1e-6)
    assert jax.jit(jax.grad(first))(10.0) == jax.grad(first)(10.0)


# ---- in what optax, Orbax and others make of a state ----


def test_multi_steps_and_chains_keep_what_is_learnt() -> None:
    clip = door.clip_by_global_norm(limits.ZScore(warmup=3))
    trees = gradients(0, 6)
    pairs = zip(trees[::2], trees[1::2], strict=True)
    means = [jax.tree.map(lambda x, y: (x + y) / 2, *pair) for pair in pairs]
    _, wanted = looped(clip.update, means, clip.init(PARAMS))
    steps = optax.MultiSteps(optax.chain(clip, optax.sgd(1.0)), 2)
    _, state = looped(jax.jit(steps.update), trees, steps.init(PARAMS))
    assert_same(state.inner_opt_state[0], wanted)
    assert float(optax.tree.get(state, "limit")) == float(wanted.limit)


@pytest.mark.parametrize("name", ["zscore", "median", "average"])
def test_orbax_saves_and_restores_every_bit(name: str, tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("orbax.checkpoint")
    kind, _ = KINDS[name]
    optimizer = optax.chain(door.clip_by_global_norm(kind), optax.sgd(0.1, momentum=0.9))
    trees = gradients(0, 60)
    update = jax.jit(optimizer.update)
    _, whole = looped(update, trees, optimizer.init(PARAMS))
    _, half = looped(update, trees[:30], optimizer.init(PARAMS))
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", half)
        saver.wait_until_finished()
        again = saver.restore(tmp_path / "state", optimizer.init(PARAMS))
    assert_same(again, half)
    assert_same(looped(update, trees[30:], again)[1], whole)


def test_flax_and_pickle_save_and_restore_every_bit() -> None:
    serialization = pytest.importorskip("flax.serialization")
    clip = door.clip_by_global_norm(limits.ZScore(warmup=3))
    trees = gradients(0, 30)
    update = jax.jit(clip.update)
    _, whole = looped(update, trees, clip.init(PARAMS))
    _, half = looped(update, trees[:15], clip.init(PARAMS))
    saved = serialization.to_bytes(half)
    read = [
        serialization.from_bytes(clip.init(PARAMS), saved),
        pickle.loads(pickle.dumps(half)),
        jax.tree.map(np.asarray, half),
    ]
    for again in read:
        assert_same(looped(update, trees[15:], again)[1], whole)


def test_a_batch_of_optimizers_is_judged_one_by_one() -> None:
    clip = door.clip_by_global_norm(limits.Percentile(40, 5))
    sizes = jnp.asarray(np.random.default_rng(0).random((9, 3)), "float32")
    trees = [{"a": 3 * row[:, None], "b": 4 * row[:, None]} for row in sizes]
    states = jax.tree.map(lambda x: jnp.stack([x] * 3), clip.init(PARAMS))
    _, states = looped(jax.jit(jax.vmap(clip.update)), trees, states)
    for member in range(3):
        own = [jax.tree.map(lambda x, member=member: x[member], tree) for tree in trees]
        _, state = looped(clip.update, own, clip.init(PARAMS))
        assert_same(jax.tree.map(lambda x, member=member: x[member], states), state)


def test_the_parts_of_an_axis_learn_as_the_whole_does() -> None:
    kind = limits.ZScore(warmup=3)
    trees = gradients(0, 20)
    whole = door.clip_by_global_norm(kind)
    _, wanted = looped(whole.update, trees, whole.init(PARAMS))
    parts = door.clip_by_global_norm(kind, axis_name="parts")
    stacked = [jnp.stack([tree["a"], tree["b"]]) for tree in trees]
    update = jax.jit(
        jax.vmap(parts.update, axis_name="parts", in_axes=(0, None), out_axes=(0, None))
    )
    _, state = looped(update, stacked, parts.init(PARAMS))
    assert_same(state, wanted)


# ---- states of others ----


def test_a_state_of_optaxs_own_or_of_a_number_is_taken_over() -> None:
    learns, fixed = door.clip_by_global_norm(limits.Average(2.0)), door.clip_by_global_norm(1.0)
    for first in (None, optax.EmptyState()):
        assert_same(learns.update(PARAMS, first), learns.update(PARAMS, learns.init(PARAMS)))
    _, number = fixed.update(PARAMS, fixed.init(PARAMS))
    _, state = learns.update(PARAMS, number)
    assert (int(state.count), int(state.clipped_count)) == (2, 2)
    assert state.learnt == (5.0, 1)
    _, back = fixed.update(PARAMS, state)
    assert isinstance(back, door.ClipByGlobalNormState)
    assert (int(back.count), int(back.clipped_count)) == (3, 3)


def test_what_another_kind_has_learnt_is_refused() -> None:
    clip = door.clip_by_global_norm(limits.Average(2.0))
    state = clip.init(PARAMS)
    for other, text in (
        (
            door.clip_by_global_norm(limits.Percentile()).init(PARAMS).limit_state,
            "limit_state is PercentileState; that of Average(factor=2.0) is AverageState",
        ),
        (
            state.limit_state._replace(average=jnp.float32(1.0)),
            (
                "limit_state.average is float32 of shape (); for Average(factor=2.0) it is uint32 "
                "of shape (2,)"
            ),
        ),
    ):
        with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
            clip.update(PARAMS, state._replace(limit_state=other))


# ---- steps that are skipped ----

SKIPS = limits.ZScore(z=4, warmup=3, beyond="skip")


def adam(max_norm: Any, **options: Any) -> Any:
    return door.apply_clipped(optax.adam(0.1), max_norm, **options)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_skipped_step_holds_the_optimizer_still(wrap: Callable[[Any], Any]) -> None:
    optimizer = adam(SKIPS)
    update = wrap(optimizer.update)
    trees = gradients(2, 6)
    _, state = looped(update, trees, optimizer.init(PARAMS))
    for size in (1e6, 1e-2):
        updates, after = update(jax.tree.map(lambda x, size=size: x * size, PARAMS), state)
        skipped = size > 1
        if skipped:
            assert_same(updates, jax.tree.map(jnp.zeros_like, PARAMS))
            assert_same(after.inner_state, state.inner_state)
            assert_same(after.clip_state.limit_state, state.clip_state.limit_state)
        else:
            assert all((leaf != 0).all() for leaf in jax.tree.leaves(updates))
        assert int(after.skipped_count) == int(state.skipped_count) + skipped
        assert int(after.clip_state.count) == 7


@pytest.mark.parametrize("size", [math.nan, math.inf])
@pytest.mark.parametrize("max_norm", [1.0, limits.Average(2.0)], ids=str)
def test_what_is_not_finite_can_be_skipped(max_norm: Any, size: float) -> None:
    optimizer = adam(max_norm, on_nonfinite="skip")
    update = jax.jit(optimizer.update)
    _, state = update(PARAMS, optimizer.init(PARAMS))
    updates, after = update({"a": jnp.zeros(1), "b": jnp.array([size])}, state)
    assert_same(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_same(after.inner_state, state.inner_state)
    assert int(after.skipped_count) == 1
    # Finite elements, though the norm is beyond float32.
    _, after = update({"a": jnp.array([3e38]), "b": jnp.array([3e38])}, state)
    assert int(after.skipped_count) == 0


def test_without_a_step_to_skip_it_is_the_chain() -> None:
    for max_norm in (2.5, SKIPS, optax.linear_schedule(1.0, 2.0, 3)):
        chain = optax.chain(door.clip_by_global_norm(max_norm), optax.adam(0.1))
        applied = adam(max_norm)
        trees = gradients(4, 7)
        trees = [tree for tree in trees if np.isfinite(tree["a"]).all()]
        wanted, last = looped(jax.jit(chain.update), trees, chain.init(PARAMS))
        found, state = looped(jax.jit(applied.update), trees, applied.init(PARAMS))
        assert_same(found, wanted)
        assert_same((state.clip_state, state.inner_state), last)


def test_a_skipped_step_in_multi_steps_and_under_scan() -> None:
    steps = optax.MultiSteps(adam(SKIPS), 2)
    trees = [jax.tree.map(lambda x, size=size: x * size, PARAMS) for size in (1, 1.1, 0.9, 1e9)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[t for t in trees for _ in "ab"])

    def step(state: Any, tree: Any) -> Any:
        updates, state = steps.update(tree, state)
        return state, updates

    state, updates = jax.lax.scan(step, steps.init(PARAMS), stacked)
    assert int(state.inner_opt_state.skipped_count) == 1
    assert int(optax.tree.get(state, "mu_count", state.inner_opt_state.inner_state[0].count)) == 3
    np.testing.assert_array_equal(updates["a"][-1], [0.0])


def test_a_chained_clip_makes_zeros_of_what_is_skipped() -> None:
    clip = door.clip_by_global_norm(SKIPS)
    for update in (clip.update, jax.jit(clip.update)):
        _, state = looped(update, gradients(2, 6), clip.init(PARAMS))
        for scale in (1.0, 1e-3):  # also below 1/2
            small = limits.ZScore(z=4, warmup=3, beyond="skip")
            own = door.clip_by_global_norm(small)
            trees = [jax.tree.map(lambda x, s=scale: x * s, tree) for tree in gradients(2, 6)]
            _, state = looped(own.update, trees, own.init(PARAMS))
            clipped, after = own.update(jax.tree.map(lambda x, s=scale: 90 * s * x, PARAMS), state)
            assert_same(clipped, jax.tree.map(jnp.zeros_like, PARAMS))
            assert float(after.factor) == 0
            assert_same(after.limit_state, state.limit_state)


def test_policies_of_steps_are_for_steps() -> None:
    with pytest.raises(ValueError, match="on_nonfinite is 'skip'"):
        door.clip_by_global_norm(1.0, on_nonfinite="skip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_nonfinite is 'drop'"):
        door.apply_clipped(optax.sgd(1.0), 1.0, on_nonfinite="drop")  # type: ignore[arg-type]


# ---- the core's functions ----


def test_eager_arrays_learn_into_the_object() -> None:
    for kind, _ in KINDS.values():
        here, there = (pickle.loads(pickle.dumps(kind)) for _ in "ab")
        for tree in gradients(5, 30):
            arrays = [np.asarray(leaf) for leaf in tree.values()]
            wanted = gradclip.clip_by_global_norm(arrays, here)
            found = gradclip.clip_by_global_norm(list(tree.values()), there)
            assert_same(jax.tree.map(np.asarray, found), wanted)
        assert here.state_dict() == there.state_dict()
        assert here.last_limit == there.last_limit


def test_what_is_traced_is_refused_before_anything_is_stored() -> None:
    kind = limits.Average(2.0)
    text = (
        "Average(factor=2.0) keeps what it learns in itself, and what is traced cannot be kept: "
        "under jit, grad or vmap use gradclip.optax.clip_by_global_norm, which has it in the "
        "optimizer's state"
    )

    def clip(x: Any) -> Any:
        return gradclip.clip_by_global_norm([x], kind)[0][0].sum()

    x = jnp.array([3.0, 4.0])
    for call in (jax.jit(clip), jax.grad(clip), jax.vmap(clip)):
        with pytest.raises(TypeError) as caught:
            call(x)
        assert str(caught.value) == text
        assert kind._memory.state is None
    clip(x)
    assert kind._memory.state == (5.0, 1)


# ---- each tensor by itself ----

SHAPES = {"a": (3,), "b": (50, 70), "c": (), "d": (0, 4), "e": (7,)}
PER_TENSOR = {
    "adagc": limits.PerTensor(limits.Average(1.05, warmup=3)),
    "median": limits.PerTensor(limits.Percentile(50, 5)),
    "zscore": limits.PerTensor(limits.ZScore(z=1.0, warmup=2)),
}
every_per_tensor = pytest.mark.parametrize("name", PER_TENSOR)


def forests(seed: int, count: int, dtype: Any = "float32") -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)

    def leaf(shape: Any) -> Any:
        return jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal()), dtype)

    return [{key: leaf(shape) for key, shape in SHAPES.items()} for _ in range(count)]


def adagc(
    trees: Sequence[Any], *, factor: float, decay: float, warmup: int, limit: float
) -> Iterator[dict[str, Any]]:
    """AdaGC: in the warm-up the global norm clips, and averages are the smallest clipped norms."""
    averages: dict[str, float] = {}
    for step, tree in enumerate(trees):
        arrays = {key: np.asarray(leaf, "float64") for key, leaf in tree.items()}
        norms = {key: float(np.sqrt((x**2).sum())) for key, x in arrays.items()}
        if step < warmup:
            scale = min(1.0, limit / math.sqrt(sum(norm**2 for norm in norms.values())))
            for key, norm in norms.items():
                averages[key] = min(averages.get(key, math.inf), scale * norm)
            yield {key: scale * x for key, x in arrays.items()}
            continue
        new = {}
        for key, x in arrays.items():
            scale = min(1.0, factor * averages[key] / norms[key]) if norms[key] else 1.0
            averages[key] = decay * averages[key] + (1 - decay) * scale * norms[key]
            new[key] = scale * x
        yield new


def test_each_tensor_against_a_loop_over_them() -> None:
    with jax.enable_x64(True):
        trees = forests(0, 40, "float64")
        clip = door.clip_by_global_norm(limits.PerTensor(limits.Average(1.05, warmup=5)))
        found, state = looped(jax.jit(clip.update), trees, clip.init(trees[0]))
    wanted = adagc(trees, factor=1.05, decay=0.98, warmup=5, limit=1.0)
    for got, exact in zip(found, wanted, strict=True):
        for key, leaf in exact.items():
            np.testing.assert_allclose(np.asarray(got[key]), leaf, rtol=1e-12)
    assert state.factor.shape == state.limit.shape == (5,)
    assert int(state.clipped_count) > 20


@every_per_tensor
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "complex64"])
def test_each_tensor_has_the_same_bits_eager_under_jit_and_in_numpy(name: str, dtype: str) -> None:
    kind = PER_TENSOR[name]
    here, there = (pickle.loads(pickle.dumps(kind)) for _ in "ab")
    with jax.enable_x64(dtype == "float64"):
        trees = forests(1, 9, dtype)
        clip = door.clip_by_global_norm(kind)
        eager, state = looped(clip.update, trees, clip.init(trees[0]))
        assert_same(looped(jax.jit(clip.update), trees, clip.init(trees[0])), (eager, state))
        for tree, wanted in zip(trees, eager, strict=True):
            arrays = {key: np.asarray(leaf) for key, leaf in tree.items()}
            clipped, norm = gradclip.clip_by_global_norm(arrays, here)
            assert_same(jax.tree.map(np.asarray, wanted), clipped)
            own, own_norm = gradclip.clip_by_global_norm(tree, there)
            assert_same(own, wanted)
            assert own_norm == norm
    assert here.state_dict() == there.state_dict()
    for got, learnt in zip(state.learnt, here._memory.state, strict=True):
        np.testing.assert_array_equal(got, learnt)
    assert 0 < int((np.asarray(state.factor) < 1).sum()) < 5 or name == "adagc"


def test_where_one_tensor_is_not_finite_none_learns() -> None:
    for kind in PER_TENSOR.values():
        clip, trees = door.clip_by_global_norm(kind), forests(2, 6)
        for update in (clip.update, jax.jit(clip.update)):
            _, state = looped(update, trees, clip.init(trees[0]))
            for bad in (math.nan, math.inf):
                clipped, after = update({**trees[0], "a": jnp.array([bad, 0, 0])}, state)
                assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(clipped))
                assert_same(after.limit_state, state.limit_state)
            still = {**trees[0], "a": jnp.zeros(3)}
            _, after = update(still, state)
            for old, new in zip(state.learnt, after.learnt, strict=True):
                np.testing.assert_array_equal(old[0], new[0])  # at 0 nothing is learnt
                assert not np.array_equal(old[1], new[1]) or old.ndim > 1


@every_per_tensor
def test_of_parts_along_an_axis_each_tensor_is_judged_whole(name: str) -> None:
    kind, trees = PER_TENSOR[name], []
    for tree in forests(3, 8):
        trees.append({"a": tree["b"], "b": tree["e"].repeat(2)})
    whole, parts = door.clip_by_global_norm(kind), door.clip_by_global_norm(kind, axis_name="x")
    _, wanted = looped(whole.update, trees, whole.init(trees[0]))
    update = jax.jit(jax.vmap(parts.update, axis_name="x", in_axes=(0, None), out_axes=(0, None)))
    cut = [jax.tree.map(lambda x: x.reshape(2, -1), tree) for tree in trees]
    _, state = looped(update, cut, parts.init(trees[0]))
    assert_same(state, wanted)


def numbers_in(rows: Any) -> Any:
    """Norms as XLA's graphs have them: where it is 0, or none, no exponent is looked at."""
    rows = np.array(rows)
    rows[..., :2] *= ((rows[..., :1] > 0) & (rows[..., 2:].max(-1, keepdims=True) == 0)).astype(int)
    return rows


@pytest.mark.long
def test_norms_and_factors_of_each_by_operations_of_xla_have_the_same_bits() -> None:
    from gradclip.jax import xla

    def both(name: str, *xs: Any, **params: Any) -> Iterator[Any]:
        yield jax.jit(partial(getattr(xla, f"_{name}").bind, **params))(*xs)
        yield jax.jit(partial(getattr(xla, f"_{name}_by_operations"), **params))(*xs)

    with jax.enable_x64(True):
        narrow = [jnp.full((2, 3), 1e30, "float32"), jnp.ones((2, 9), "complex64")]
        narrow += [jnp.asarray(forests(4, 1)[0]["b"][:4].reshape(2, -1), "bfloat16")]
        narrow += [jnp.zeros((2, 0)), jnp.array([[math.inf, 1.0], [1e-45, 1e-44]], "float32")]
        wide = [*narrow, jnp.array([[5e-324, 1e-310], [math.nan, 1e300]])]
        for xs, is_wide in ((narrow[:3], False), (wide, True)):
            for batch, some in ((2, xs), (None, [x[0] for x in xs])):
                (kernel,), (traced,) = both("norms", *some, wide=is_wide, batch=batch)
                assert_same(numbers_in(kernel), numbers_in(traced))
                (kernel,), (traced,) = both("totals", *some, batch=batch)
                assert_same(kernel, traced)
        decisions = [[place % 4, (1 << 52) + 12345 * place, -52 - place] for place in range(12)]
        decision = jnp.array(decisions).reshape(2, 6, 3)
        params = {"batch": 2, "each": True}
        kernel = jax.jit(partial(xla._carry_out.bind, **params))(decision, *wide)
        assert_same(
            kernel, jax.jit(partial(xla._carried_out_by_operations, **params))(decision, *wide)
        )
        row = [x[0] for x in wide]
        alone = [
            xla._carry_out.bind(own, x, batch=None, each=False)[0]
            for own, x in zip(decision[0], row, strict=True)
        ]
        assert_same(xla._carry_out.bind(decision[0], *row, batch=None, each=True), alone)


def test_each_tensor_has_a_derivative_of_its_own() -> None:
    kind = limits.PerTensor(limits.Percentile(0))
    clip = door.clip_by_global_norm(kind)
    _, state = clip.update({"a": jnp.array([3.0, 4.0]), "b": jnp.ones(1)}, clip.init(PARAMS))

    def first(a: Any, b: Any) -> Any:
        clipped, _ = clip.update({"a": a, "b": b}, state)
        return clipped["a"][0] + clipped["b"][0]

    # The limit of a is 5: of (6, 8) the norm is 10, and d(5 x / N) = 5 (1 / N - x^2 / N^3).
    d_a, d_b = jax.grad(first, argnums=(0, 1))(jnp.array([6.0, 8.0]), jnp.array([0.5]))
    wanted = [5 * (1 / 10 - 36 / 1000), -5 * 48 / 1000]
    np.testing.assert_allclose(d_a, wanted, rtol=1e-6)
    np.testing.assert_array_equal(d_b, [1.0])


def test_a_state_of_other_tensors_is_refused() -> None:
    clip = door.clip_by_global_norm(PER_TENSOR["adagc"])
    state = clip.init(PARAMS)
    text = (
        "limit_state.average is uint32 of shape (2, 2); for "
        "PerTensor(kind=Average(factor=1.05, warmup=3)) it is uint32 of shape (1, 2)"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        clip.update({"a": jnp.ones(1)}, state)


def test_integers_and_places_without_a_gradient_have_no_limit() -> None:
    clip = door.clip_by_global_norm(PER_TENSOR["adagc"])
    params = {"a": jnp.ones(2), "b": jnp.arange(3), "c": None, "d": optax.MaskedNode(), "e": 1.0}
    state = clip.init(params)
    assert state.limit.shape == (2,)
    nothing = np.zeros(3, jax.dtypes.float0)
    clipped, state = clip.update({**params, "b": nothing}, state)
    assert state.limit.shape == (2,)
    assert clipped["c"] is None


# ---- units ----


def exact_units(x: Any, weights: Any, clipping: float, eps: float, axes: Any) -> Any:
    """Unit by unit, each clipped as a gradient of its own."""
    new = np.array(x)
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    for place in np.ndindex(*(x.shape[axis] for axis in kept)):
        at: list[Any] = [slice(None)] * x.ndim
        for axis, index in zip(kept, place, strict=True):
            at[axis] = index
        unit = (*at, ...)
        norm = float(gradclip.global_norm([np.array(weights[unit])]))
        (new[unit],), _ = gradclip.clip_by_global_norm(
            [np.array(x[unit])], clipping * max(norm, eps)
        )
    return new


UNITS = {
    (): (),
    (6,): (0,),
    (1, 5, 1): (0, 1, 2),
    (4, 6): (0,),
    (3, 2, 4): (0,),
    (2, 3, 2, 5): (0, 1, 2),
    (2, 1, 2, 2, 3): (0, 1, 2, 3),
}


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        *(pytest.param(x, marks=pytest.mark.long) for x in ("bfloat16", "float64", "complex64")),
    ],
)
def test_units_are_clipped_one_by_one(dtype: str) -> None:
    rng = np.random.default_rng(0)

    def leaf(shape: Any) -> Any:
        spread = np.exp(3 * rng.normal(size=shape[-1:]))
        return jnp.asarray(rng.normal(size=shape) * spread, dtype)

    with jax.enable_x64(dtype == "float64"):
        updates, params = ([leaf(shape) for shape in UNITS] for _ in "ab")
        clip = door.adaptive_grad_clip(0.5)
        found, state = clip.update(updates, clip.init(params), params)
        assert state == optax.EmptyState()
        assert_same(jax.jit(clip.update)(updates, state, params)[0], found)
        theirs = optax.adaptive_grad_clip(0.5)
        changed = 0
        for x, weights, got, axes in zip(updates, params, found, UNITS.values(), strict=True):
            old = np.asarray(x)
            assert_same(np.asarray(got), exact_units(old, np.asarray(weights), 0.5, 1e-3, axes))
            changed += not np.array_equal(got, old)
            if x.ndim < 5:  # of more dimensions optax 0.2.5 takes none
                other, _ = theirs.update(x, theirs.init(weights), weights)
                wide = "complex128" if dtype == "complex64" else "float64"
                pair = (np.asarray(each).astype(wide) for each in (got, other))
                np.testing.assert_allclose(*pair, rtol=3e-2 if dtype == "bfloat16" else 1e-5)
        assert changed > 3


def test_units_far_out_and_their_edges() -> None:
    clip = door.adaptive_grad_clip(1.0, axis=1)
    params = jnp.array([[3.0, 4.0], [0.0, 0.0], [3e30, 4e30], [3e-30, 4e-30], [3.0, 4.0], [1, 0]])
    rows = [[3.0, 4.0], [3.0, 4.0], [6e30, 8e30], [3e-20, 4e-20], [math.inf, 1.0], [0.0, 0.0]]
    updates = jnp.array(rows)
    wanted = [[3.0, 4.0], [6e-4, 8e-4], [3e30, 4e30], [3e-20, 4e-20], [math.nan] * 2, [0.0, 0.0]]
    for update in (clip.update, jax.jit(clip.update)):
        found, _ = update(updates, optax.EmptyState(), params)
        np.testing.assert_allclose(found, np.array(wanted, "float32"), rtol=1e-7)


def test_units_have_a_derivative_and_a_batch() -> None:
    clip = door.adaptive_grad_clip(0.5)

    def first(x: Any, weights: Any) -> Any:
        return clip.update({"w": x}, optax.EmptyState(), {"w": weights})[0]["w"][0, 0]

    x, weights = jnp.array([[6.0, 0.1], [8.0, 0.1]]), jnp.array([[3.0, 1.0], [4.0, 1.0]])
    d_x, d_weights = jax.grad(first, argnums=(0, 1))(x, weights)
    # The limit L is 2.5, half of the norm 5 of (3, 4): L x / N = 1.5, and N is 10.
    np.testing.assert_allclose(d_x, [[2.5 / 10 - 1.5 * 0.06, 0], [-1.5 * 0.08, 0]], rtol=1e-6)
    np.testing.assert_allclose(d_weights, [[0.5 * 0.6 * 0.6, 0], [0.5 * 0.8 * 0.6, 0]], rtol=1e-6)
    many = jax.vmap(lambda x: clip.update(x, optax.EmptyState(), weights)[0])(jnp.stack([x, 2 * x]))
    assert_same(many[0], clip.update(x, optax.EmptyState(), weights)[0])


def test_what_units_are_refused() -> None:
    clip = door.adaptive_grad_clip(0.1)
    for updates, params, text in (
        ([jnp.ones(2)], None, "params is None; each update is clipped by the norm of its weights"),
        (
            {"a": jnp.ones(2)},
            {"a": jnp.ones(3)},
            "updates['a'] has the shape (2,), and params['a'] (3,); they must be the same",
        ),
        (
            [jnp.ones((2,) * 6)],
            [jnp.ones((2,) * 6)],
            "updates[0] has the shape (2, 2, 2, 2, 2, 2); of over 5 axes, give axis",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            clip.update(updates, optax.EmptyState(), params)
    for options in ({"clipping": 0.0}, {"clipping": math.nan}, {"clipping": 1.0, "eps": -1.0}):
        with pytest.raises(ValueError, match=" is "):
            door.adaptive_grad_clip(**options)
    with pytest.raises(TypeError, match=r"^updates\[0\] is int32"):
        clip.update([jnp.arange(3)], optax.EmptyState(), [jnp.ones(3)])


def test_apply_clipped_by_tensors_skips_what_is_not_finite() -> None:
    """One truth for the step, and none for each tensor, whatever their shapes."""
    for shapes in ([(3,)], [(2,), (3,)], [(2,), (2,)], [(3, 2), (4, 2)]):
        params = {str(i): jnp.zeros(shape) for i, shape in enumerate(shapes)}
        limit = limits.PerTensor(limits.Average(1.05))
        optimizer = door.apply_clipped(optax.adam(0.1), limit, on_nonfinite="skip")
        first = state = optimizer.init(params)
        ones = jax.tree.map(jnp.ones_like, params)
        _, state = optimizer.update(ones, state, params)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, first)
        nans = {**ones, "0": ones["0"] * jnp.nan}
        updates, after = optimizer.update(nans, state, params)
        assert not any(np.any(each) for each in jax.tree.leaves(updates))
        assert (after.skipped_count, state.skipped_count) == (1, 0)
        same = jax.tree.map(np.array_equal, after.inner_state, state.inner_state)
        assert all(jax.tree.leaves(same))
