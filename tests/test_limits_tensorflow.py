"""Limits that learn, with TensorFlow: eager mode, graphs, XLA, tapes, saving."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from conftest import version
from host import run_python

if version("tensorflow") is None:
    pytest.skip("tensorflow is not installed", allow_module_level=True)
import tensorflow as tf

import gradclip
import gradclip.tensorflow as gtf
from gradclip import limits

XLA = pytest.param("xla", marks=pytest.mark.long)  # compiling takes seconds
GRAPHS = ["graph", XLA]


def raises(error: type[Exception], text: str) -> Any:
    """The error with exactly this text."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


KINDS: dict[str, Callable[[], Any]] = {
    "shrink": lambda: limits.ZScore(warmup=5),
    "edge": lambda: limits.ZScore(1.5, 0.9, warmup=0, limit=3.0, beyond="edge"),
    "mean": lambda: limits.ZScore(1.0, warmup=3, beyond="mean", learn_from="raw"),
    "skip": lambda: limits.ZScore(warmup=5, beyond="skip"),
    "log": lambda: limits.ZScore(2.0, warmup=10, log=True, beyond="skip"),
    "percentile": lambda: limits.Percentile(50, 20, 2.0),
    "average": lambda: limits.Average(1.25, warmup=5, limit=2.0),
}

# ---- the papers' formulas, of the norms that teach ----


def zscore(kind: Any, norms: Any) -> Iterator[float]:
    """ZClip, Algorithm 1; the moments of the warm-up's norms."""
    seen: list[float] = []
    mean = var = 0.0
    for norm in norms:
        if not 0 < norm < math.inf:
            yield math.nan
            continue
        x = math.log(norm) if kind.log else norm
        if len(seen) < max(kind.warmup, 1):
            seen.append(x)
            mean, var = float(np.mean(seen)), float(np.var(seen))
            yield kind.limit
            continue
        more = 1e-6 if kind.log else min(1e-6, mean / 1000)
        score = (x - mean) / (math.sqrt(var) + more)
        if score <= kind.z or x <= mean * (1 + 2.0**-52):
            limit, m = math.inf, x
        else:
            if kind.beyond == "mean":
                m = mean
            elif kind.beyond == "shrink":
                m = mean + kind.z**2 / score * math.sqrt(var)
            else:
                m = mean + kind.z * math.sqrt(var)
            limit = math.exp(m) if kind.log else m
            if kind.beyond == "skip":
                yield 0.0
                continue
        m = x if kind.learn_from == "raw" else m
        mean = kind.decay * mean + (1 - kind.decay) * m
        var = kind.decay * var + (1 - kind.decay) * (m - mean) ** 2
        yield min(limit, kind.limit)


def percentile(kind: Any, norms: Any) -> Iterator[float]:
    """AutoClip: the percentile of the history, this norm included."""
    history: list[float] = []
    for norm in norms:
        if not 0 < norm < math.inf:
            yield math.nan
            continue
        history.append(norm)
        yield kind.factor * float(np.percentile(history[-kind.history :], kind.p))


def average(kind: Any, norms: Any) -> Iterator[float]:
    """A multiple of the moving average, which begins with the mean of the warm-up."""
    seen: list[float] = []
    mean = 0.0
    for norm in norms:
        if not 0 < norm < math.inf:
            yield math.nan
        elif len(seen) < kind.warmup:
            seen.append(norm)
            mean = float(np.mean(seen))
            yield kind.limit
        else:
            limit = kind.factor * mean
            mean = kind.decay * mean + (1 - kind.decay) * min(norm, limit)
            yield limit


FORMULAS = {limits.ZScore: zscore, limits.Percentile: percentile, limits.Average: average}


def hostile(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Norms, of which some are no numbers, zero, huge or repeated."""
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(size=count))
    norms[rng.random(count) < 0.05] *= 30
    norms[rng.random(count) < 0.02] = 0
    norms[rng.random(count) < 0.02] = np.nan
    norms[rng.random(count) < 0.02] = np.inf
    norms[count // 2 : count // 2 + 30] = 2.0
    return norms


def judged(mode: str, kind: Any, norms: Any) -> np.ndarray[Any, Any]:
    """What becomes of one element each: the factor times the norm."""
    if mode == "eager":
        tensors = [tf.constant([norm], tf.float64) for norm in norms]
        return np.array([gtf.clip_by_global_norm([each], kind)[0][0][0] for each in tensors])

    @tf.function(jit_compile=mode == "xla")
    def clipped(norms: Any) -> Any:
        results = tf.TensorArray(tf.float64, len(norms))
        for place in tf.range(len(norms)):
            (new,), _ = gtf.clip_by_global_norm([norms[place][None]], kind)
            results = results.write(place, new[0])
        return results.stack()

    return np.asarray(clipped(tf.constant(norms, tf.float64)))


@pytest.mark.parametrize("mode", ["eager", *GRAPHS])
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_that_of_its_paper(name: str, mode: str) -> None:
    norms, kind = hostile(10_000 if mode == "xla" else 1000), KINDS[name]()
    found = judged(mode, kind, norms)
    allowed = list(FORMULAS[type(kind)](kind, norms.tolist()))
    finite = np.isfinite(norms)
    assert np.isnan(found[~finite]).all()
    wanted = np.where(norms > 0, np.minimum(norms, allowed), 0)
    np.testing.assert_allclose(found[finite], wanted[finite], rtol=1e-12)
    assert 0 < sum(found[finite] < norms[finite]) < len(norms)


@pytest.mark.parametrize("name", KINDS)
def test_eager_and_graphs_on_the_host_are_numpy_to_the_bit(name: str) -> None:
    norms = hostile(300, 1)
    kinds = [KINDS[name]() for _ in range(4)]

    @tf.function
    def clipped(gradient: Any) -> Any:
        return gradclip.clip_by_global_norm([gradient], kinds[3])

    for norm in norms:
        gradient = np.array([norm, 0.0])
        (wanted,), whole = gradclip.clip_by_global_norm([gradient], kinds[0])
        variable = tf.Variable(gradient)
        before = gradclip.clip_by_global_norm_([variable], kinds[1])
        assert before.numpy().tobytes() == whole.tobytes()
        new = [variable, gtf.clip_by_global_norm([tf.constant(gradient)], kinds[2])[0][0]]
        new.append(clipped(tf.constant(gradient))[0][0])
        assert {each.numpy().tobytes() for each in new} == {wanted.tobytes()}
        assert len({np.float64(kind.last_limit).tobytes() for kind in kinds}) == 1
    states = [kind.state_dict() for kind in kinds]
    assert all(state == states[0] for state in states)


@pytest.mark.parametrize("mode", GRAPHS)
@pytest.mark.parametrize("first", [1e30, 1e-30, 3.0])
@pytest.mark.parametrize("name", KINDS)
def test_hostile_beginnings(name: str, first: float, mode: str) -> None:
    if mode == "xla" and first != 1e30:
        pytest.skip("compiled for one")
    norms = [math.nan, 0.0, math.inf, first, *[3.0] * 60, 3.1, 0.0, 3.0]
    kinds = [KINDS[name](), KINDS[name]()]
    found, wanted = (judged(*pair, norms) for pair in zip([mode, "eager"], kinds, strict=True))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert np.isfinite(found[3:]).all()
    for state in (kind.state_dict() for kind in kinds):
        assert np.isfinite([x for x in state.values() if isinstance(x, float | int)]).all()


# ---- one state ----


def test_traces_and_eager_calls_share_one_state() -> None:
    kinds = [limits.Average(1.5, warmup=2), limits.Average(1.5, warmup=2)]

    def clip(*gradients: Any) -> Any:
        return gtf.clip_by_global_norm(gradients, kinds[0])

    traced, compiled = tf.function(clip), tf.function(clip, jit_compile=True)
    for step, norm in enumerate(hostile(60, 2)):
        gradient = np.array([norm] if step % 3 else [norm, 0.0])
        wanted, _ = gradclip.clip_by_global_norm([gradient], kinds[1])
        call = [clip, traced, compiled][step // 2 % 3]
        found, _ = call(tf.constant(gradient))
        np.testing.assert_allclose(found[0], wanted[0], rtol=1e-12)
        np.testing.assert_allclose(kinds[0].last_limit, kinds[1].last_limit, rtol=1e-12)
    state, expected = (kind.state_dict() for kind in kinds)
    assert state["count"] == expected["count"] > 40
    assert state["average"] == pytest.approx(expected["average"], rel=1e-12)


@pytest.mark.parametrize("mode", ["graph", pytest.param("xla", marks=pytest.mark.slow)])
def test_each_executed_step_teaches_once(mode: str) -> None:
    kind = limits.Percentile(50)
    weights = tf.Variable([1.0, 2.0])

    @tf.function(jit_compile=mode == "xla")
    def step(scale: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(scale * weights**2)
        gradients = tape.gradient(loss, [weights])
        if scale > 0:  # AutoGraph's
            gtf.clip_by_global_norm(gradients, kind)  # nobody looks at the result

    for _ in range(3):
        step(tf.constant(1.0))
        step(tf.constant(-1.0))
    assert kind.state_dict()["count"] == 3
    assert len(kind.state_dict()["ring"]) == 10_000
    assert kind.last_limit.numpy() == pytest.approx(20**0.5)


def test_a_state_is_saved_and_loaded_before_and_after_a_trace() -> None:
    kinds = [limits.ZScore(warmup=3) for _ in range(3)]
    functions = [
        tf.function(lambda gradient, kind=kind: gtf.clip_by_global_norm([gradient], kind)[0][0])
        for kind in kinds
    ]
    norms = hostile(80, 3)
    for norm in norms[:40]:
        functions[0](tf.constant([norm]))
    state = kinds[0].state_dict()
    kinds[1].load_state_dict(state)  # before its first trace
    functions[2](tf.constant([7.0]))
    kinds[2].load_state_dict(pickle.loads(pickle.dumps(state)))
    kinds += [copy.deepcopy(kinds[0]), pickle.loads(pickle.dumps(kinds[0]))]
    functions += [lambda x, k=k: gtf.clip_by_global_norm([x], k)[0][0] for k in kinds[3:]]
    for norm in norms[40:]:
        assert len({function(tf.constant([norm])).numpy().tobytes() for function in functions}) == 1
    assert all(kind.state_dict() == kinds[0].state_dict() != state for kind in kinds)
    kinds[2].load_state_dict({"kind": "ZScore"})
    assert kinds[2].state_dict()["count"] == 0


def printed(code: str, *arguments: str) -> str:
    """What a process prints; TensorFlow's threads of replicas are never closed."""
    done = run_python(code, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


RESUMED = """
import sys, json, tensorflow as tf, gradclip.tensorflow as gtf
from gradclip import limits
path, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
kind = limits.{kind}
@tf.function
def clip(x):
    return gtf.clip_by_global_norm([x, 2 * x], kind)[0][0]
clip.get_concrete_function(tf.TensorSpec([1]))
checkpoint = tf.train.Checkpoint(limit=gtf.variables_of(kind))
if first:
    checkpoint.read(path).assert_consumed()
for step in range(first, last):
    print(clip(tf.constant([1.5 + (step * 7 % 11) / 3])).numpy().tobytes().hex())
checkpoint.write(path)
"""


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ZScore(warmup=3)", "PerTensor(limits.Percentile(40))"])
def test_a_checkpoint_goes_on_to_the_bit_in_a_new_process(kind: str, tmp_path: Any) -> None:
    code = RESUMED.replace("{kind}", kind)
    whole, *parts = (
        printed(code, str(tmp_path / name), first, last)
        for name, first, last in (("a", "0", "30"), ("b", "0", "17"), ("b", "17", "30"))
    )
    assert parts[0] + parts[1] == whole
    assert len(set(whole.split())) > 5


# ---- tapes ----


@pytest.mark.parametrize("mode", ["eager", *GRAPHS])
def test_a_gradient_takes_the_limit_for_a_constant(mode: str) -> None:
    def gradients(kind: Any) -> Any:
        def function(x: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                (new,), norm = gtf.clip_by_global_norm([x], kind)
                loss = tf.reduce_sum(new * tf.constant([1.0, 3.0])) + norm
            return tape.gradient(loss, x)

        return function if mode == "eager" else tf.function(function, jit_compile=mode == "xla")

    kind = limits.Average(1.5, warmup=2, limit=10.0)
    function = gradients(kind)
    for size in (1.0, 2.0):
        assert function(size * tf.constant([0.6, 0.8])).numpy().tolist() == pytest.approx(
            [1.6, 3.8]
        )
    x = tf.constant([3.0, 4.0])
    found = function(x)
    assert float(kind.last_limit) == 2.25
    np.testing.assert_allclose(found, gradients(2.25)(x), rtol=1e-6)
    assert kind.state_dict()["count"] == 3


def test_tf_gradients_in_a_graph() -> None:
    kind = limits.Average(1.5, warmup=0, limit=2.25)

    @tf.function
    def function(x: Any) -> Any:
        (new,), _ = gtf.clip_by_global_norm([x], kind)
        (plain,), _ = gtf.clip_by_global_norm([x], 2.25)
        return tf.gradients(new[0], x)[0], tf.gradients(plain[0], x)[0]

    found, wanted = function(tf.constant([3.0, 4.0]))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("mode", ["eager", *GRAPHS])
def test_a_limit_of_each_tensor_has_no_gradient(mode: str) -> None:
    kind = limits.PerTensor(limits.Average(1.5))

    def function(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            (new,), _ = gtf.clip_by_global_norm([x], kind)
        return tape.gradient(new, x)

    with pytest.raises(NotImplementedError, match="by a limit of its own has no gradient: clip"):
        (function if mode == "eager" else tf.function(function, jit_compile=mode == "xla"))(
            tf.constant([3.0, 4.0])
        )


# ---- each tensor by itself ----


def adagc(kind: Any, steps: Any) -> Iterator[list[float]]:
    """AdaGC, Algorithm 1, of the norms of tensors that all teach: those after clipping."""
    averages: list[float] = []
    for step, norms in enumerate(steps):
        if step < kind.warmup:
            factor = min(1.0, kind.limit / math.hypot(*norms))
            clipped = [norm * factor for norm in norms]
            averages = [min(pair) for pair in zip(averages or clipped, clipped, strict=True)]
        else:
            bounds = [kind.factor * average for average in averages]
            clipped = [min(pair) for pair in zip(norms, bounds, strict=True)]
            pairs = zip(averages, clipped, strict=True)
            averages = [kind.decay * old + (1 - kind.decay) * new for old, new in pairs]
        yield clipped


@pytest.mark.parametrize("mode", ["eager", *GRAPHS])
def test_adagc(mode: str) -> None:
    kind = limits.PerTensor(limits.Average(1.05, warmup=10))
    steps = np.exp(np.random.default_rng(0).normal(size=(300, 3)))

    def clip(gradients: Any) -> Any:
        clipped, _ = gtf.clip_by_global_norm(tf.unstack(gradients[:, None]), kind)
        return tf.concat(clipped, 0)

    if mode != "eager":
        clip = tf.function(clip, jit_compile=mode == "xla")
    found = [clip(tf.constant(norms)).numpy() for norms in steps]
    wanted = list(adagc(kind.kind, steps.tolist()))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert kind.last_limit.shape == (3,)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("skip", "log")])
@pytest.mark.parametrize("mode", GRAPHS)
def test_each_tensor_in_graphs_is_that_of_numpy(name: str, mode: str) -> None:
    kinds = [limits.PerTensor(KINDS[name]()) for _ in range(3)]
    rng = np.random.default_rng(4)

    @tf.function(jit_compile=mode == "xla")
    def clip(*gradients: Any) -> Any:
        return gtf.clip_by_global_norm(gradients, kinds[0])

    for _ in range(60):
        scales = np.exp(rng.normal(size=3)) * (rng.random(3) > 0.1)
        gradients = [
            (rng.standard_normal(n) * scale).astype(dtype)
            for n, dtype, scale in zip((3, 40, 5), ("f4", "f8", "f2"), scales, strict=True)
        ]
        gradients[1][0] = rng.choice([1.0, 1.0, 1.0, 1.0, np.nan, np.inf])
        wanted, _ = gradclip.clip_by_global_norm(gradients, kinds[1])
        tensors = list(map(tf.constant, gradients))
        eager, _ = gtf.clip_by_global_norm(tensors, kinds[2])
        found, _ = clip(*tensors)
        for one, two, three in zip(found, wanted, eager, strict=True):
            assert two.tobytes() == three.numpy().tobytes()
            np.testing.assert_allclose(one, two, rtol=1e-12 if two.dtype == np.float64 else 1e-3)
    state = kinds[0].state_dict()
    assert kinds[1].state_dict() == kinds[2].state_dict()
    assert mode == "xla" or state == kinds[1].state_dict()
    for (key, mine), (other, theirs) in zip(
        state["tensors"], kinds[1].state_dict()["tensors"], strict=True
    ):
        assert key == other
        for field in mine:
            np.testing.assert_allclose(mine[field], theirs[field], rtol=1e-12)


def test_variables_each_by_itself() -> None:
    kinds = [limits.PerTensor(limits.Percentile(30)) for _ in range(2)]
    for scale in (1.0, 5.0, 0.5, 3.0):
        arrays = [np.float32([3, 4]) * np.float32(scale), np.float32([1])]
        variables = list(map(tf.Variable, arrays))
        gradclip.clip_by_global_norm_(arrays, kinds[0])
        gradclip.clip_by_global_norm_(variables, kinds[1])
        assert [v.numpy().tolist() for v in variables] == [a.tolist() for a in arrays]
    kind, variable = limits.PerTensor(limits.Percentile(30)), tf.Variable([3.0])
    with raises(
        ValueError,
        f"clip_norm is {kind!r}, and a variable is listed twice; list it once",
    ):
        gradclip.clip_by_global_norm_([variable, variable], kind)
    assert kind.state_dict() == {"kind": "PerTensor"}


def test_a_traced_limit_of_each_tensor_stays_with_its_tensors() -> None:
    kind = limits.PerTensor(limits.Percentile(30))

    def measure(tensors: Any) -> Any:
        return gtf.clip_by_global_norm(tensors, kind)[1]

    clip = tf.function(measure, autograph=False)
    clip([tf.constant([1.0]), tf.constant([2.0])])
    with raises(
        ValueError,
        f"clip_norm is {kind!r} of the tensors [0, 1]; in a tf.function of the tensors "
        "[0] it has to be another",
    ):
        clip([tf.constant([1.0])])
    other = limits.PerTensor(limits.Percentile(30))
    gradclip.clip_by_global_norm([np.ones(1)], other)
    with raises(
        ValueError,
        "the state is of the tensors [0]; a tf.function was made for those of [0, 1]: load it "
        "into a new limit",
    ):
        kind.load_state_dict(other.state_dict())
    state = kind.state_dict()
    kind.load_state_dict({**state, "tensors": state["tensors"][::-1]})
    assert kind.state_dict() == state


# ---- where it cannot be ----


def test_a_graph_of_the_first_tensorflow() -> None:
    kind = limits.ZScore()
    with (
        tf.Graph().as_default(),
        raises(
            NotImplementedError,
            "clip_norm is ZScore(), which learns in a tf.function and in eager mode; this is a "
            "graph of tf.compat.v1, which has a number",
        ),
    ):
        gtf.clip_by_global_norm([tf.constant([1.0])], kind)


def test_a_norm_that_is_given_in_a_graph() -> None:
    clip = tf.function(lambda x: gtf.clip_by_global_norm([x], limits.ZScore(), use_norm=1.0))
    with pytest.raises(ValueError, match="it learns from the norm that it measures"):
        clip(tf.constant([1.0]))


@pytest.mark.slow
def test_replicas() -> None:
    code = """
    import tensorflow as tf, gradclip, gradclip.tensorflow as gtf
    from gradclip import limits
    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    step = lambda: gtf.clip_by_global_norm([tf.constant([1.0])], limits.ZScore())
    def variables():
        gradclip.clip_by_global_norm_([tf.Variable([1.0])], limits.ZScore())
    for run in (step, tf.function(step), variables):
        try:
            strategy.run(run)
        except NotImplementedError as error:
            print(error)
    """
    text = (
        "clip_norm is ZScore(), which learns from one norm in each step; here each of 2 replicas "
        "has one. The optimizers of gradclip.keras sum over the replicas first"
    )
    lines = printed(code).splitlines()
    assert [line.strip().removeprefix("NotImplementedError: ") for line in lines].count(text) == 3
