"""Limits that learn in `gradclip.keras` on one backend; `test_limits_keras.py` runs it on each.

A gradient is given by the data, as in `keras_worker`.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import gradclip
import gradclip.keras
from gradclip import limits
from keras_worker import (
    BACKEND,
    SGD,
    array,
    bits,
    fit,
    linear,
    loss,
    on_jax,
    on_tensorflow,
    rows,
    strategy,
    tensor,
    weights,
    zeros,
)
from keras_worker import pytestmark as of_worker

pytestmark = of_worker

KINDS: dict[str, Callable[[], Any]] = {
    "shrink": lambda: limits.ZScore(warmup=5),
    "edge": lambda: limits.ZScore(1.5, 0.9, warmup=0, limit=3.0, beyond="edge"),
    "skip": lambda: limits.ZScore(warmup=5, log=True, beyond="skip"),
    "percentile": lambda: limits.Percentile(50, 20, 2.0),
    "average": lambda: limits.Average(1.25, warmup=5, limit=2.0),
    "each": lambda: limits.PerTensor(limits.Average(1.1, warmup=5)),
    "percentile of each": lambda: limits.PerTensor(limits.Percentile(40, 10)),
}


def steps(count: int = 60, seed: int = 0) -> np.ndarray[Any, Any]:
    """Rows of the norms of a training, of which two stand out."""
    x = rows(count, 4, seed)
    x[count // 3] *= 100
    x[-count // 3] *= 1000
    return x


def in_numpy(kind: Any, x: Any) -> np.ndarray[Any, Any]:
    """The weights after these steps."""
    weight = np.zeros(4, np.float32)
    for row in x:
        parts, _ = gradclip.clip_by_global_norm(list(np.split(np.float32(row), [2])), kind)
        weight = weight - np.concatenate(parts)
    return weight


def same_limit(found: Any, wanted: Any, *, exact: bool) -> None:
    if exact:
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()
    else:
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_fit_is_numpy_to_the_bit(name: str) -> None:
    model, kind, x = linear(4, SGD(1.0, global_clipnorm=KINDS[name]())), KINDS[name](), steps()
    history = fit(model, x, gradclip.keras.GlobalNorm())
    wanted = in_numpy(kind, x)
    assert weights(model).tobytes() == wanted.tobytes()
    same_limit(model.optimizer.last_limit, kind.last_limit, exact=True)
    assert 0 < history["clipped"][0] < 1
    assert (model.optimizer.skipped_steps > 0) is (name == "skip")
    assert int(array(model.optimizer.iterations)) == len(x) - model.optimizer.skipped_steps


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "jit", [False, pytest.param(True, marks=pytest.mark.long)], ids=["plain", "jit"]
)
def test_hostile_norms(name: str, jit: bool) -> None:
    x = np.zeros((60, 4), np.float32)
    x[:, [0, 3]] = 3.0
    x[0] = np.nan
    x[1] = 0
    x[2, 1] = np.inf
    x[3, 0] = 1e30
    x[[10, 40]] = 0
    x[20:, 2] = np.linspace(0, 1, 40)
    model, kind = linear(4, SGD(1.0, global_clipnorm=KINDS[name]()), jit=jit), KINDS[name]()
    for begin, end in ((0, 3), (3, 4), (4, 60)):
        fit(model, x[begin:end])
        in_numpy(kind, x[begin:end])
        found = model.optimizer.last_limit
        same_limit(found, kind.last_limit, exact=not jit or BACKEND != "tensorflow")
        assert not np.isnan(found).any()
        assert (np.asarray(found) > 0).all()


@pytest.mark.parametrize("jit", [pytest.param(True, marks=pytest.mark.slow)])
def test_compiled(jit: bool) -> None:
    kind, x = KINDS["shrink"](), steps(20)
    model = linear(4, SGD(1.0, global_clipnorm=KINDS["shrink"]()), jit=jit)
    fit(model, x)
    np.testing.assert_allclose(weights(model), in_numpy(kind, x), rtol=1e-6)
    same_limit(model.optimizer.last_limit, kind.last_limit, exact=BACKEND != "tensorflow")


# ---- a step that is skipped ----


def everything(optimizer: Any, variables: Any) -> list[bytes]:
    """Weights and state, but for our own two variables."""
    ours = optimizer._ours
    state = [each for each in optimizer.variables if all(each is not one for one in ours)]
    return [bits(each) for each in (*variables, *state)]


def skipping() -> Any:
    return limits.ZScore(warmup=3, beyond="skip")


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "averages": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("how", OPTIONS)
def test_a_skipped_step_leaves_no_trace(how: str) -> None:
    def trained(x: Any) -> tuple[Any, Any]:
        variables = [keras.Variable(np.ones(2), dtype="float32"), zeros(2)]
        if how != "accumulation":  # where Keras constrains in between, too
            variables[0].constraint = keras.constraints.MaxNorm(0.7)
        optimizer = gradclip.keras.Adam(0.1, global_clipnorm=skipping(), **OPTIONS[how])
        for row in x:
            optimizer.apply([tensor(part) for part in np.split(row, [2])], variables)
        return optimizer, everything(optimizer, variables)

    x = np.float32([[1, 2, 3, 4], [1, 2, 2, 4], [1, 2, 3, 3], [4, 3, 2, 1], [2, 2, 3, 4]])
    if how == "accumulation":
        x = np.repeat(x, 2, axis=0)
    place = 8 if how == "accumulation" else 4
    outliers = np.float32([[100, 200, 300, 400]] * (place // 4))
    optimizer, skipped = trained(np.concatenate([x[:place], outliers, x[place:]]))
    assert optimizer.skipped_steps == 1
    optimizer, never = trained(x)
    assert optimizer.skipped_steps == 0
    assert skipped == never


@pytest.mark.slow
def test_a_skipped_step_in_fit() -> None:
    x = steps()
    optimizers = [gradclip.keras.Adam(0.1, global_clipnorm=skipping()) for _ in range(2)]
    models = [linear(4, optimizer) for optimizer in optimizers]
    history = fit(models[0], x, gradclip.keras.GlobalNorm())
    kind, taken = skipping(), []
    for row in x:
        gradclip.clip_by_global_norm([row], kind)
        stands_out = np.linalg.norm(row.astype(float)) > kind.last_limit
        taken += [] if stands_out else [row]
    assert optimizers[0].skipped_steps == len(x) - len(taken) > 1
    assert history["clipped"] == [pytest.approx(optimizers[0].skipped_steps / len(x))]
    fit(models[1], taken)
    states = [
        everything(optimizer, model.trainable_variables)
        for optimizer, model in zip(optimizers, models, strict=True)
    ]
    assert states[0] == states[1]


# ---- what Keras puts around it ----


def test_accumulation_is_one_norm_for_each_update() -> None:
    kind = KINDS["percentile"]()
    model = linear(4, SGD(1.0, global_clipnorm=kind, gradient_accumulation_steps=2))
    x = steps(20)
    fit(model, x)
    twin = KINDS["percentile"]()
    wanted = in_numpy(twin, [(a + b) / 2 for a, b in zip(x[::2], x[1::2], strict=True)])
    np.testing.assert_allclose(weights(model), wanted, rtol=1e-6)
    assert learnt(model.optimizer)["count"] == twin.state_dict()["count"] == 10


def learnt(optimizer: Any) -> dict[str, Any]:
    """The fields of the state, of the host."""
    from gradclip.keras import learning

    variable = optimizer._learnt
    state = variable.kind_of_state(*variable.read(learning._Host)[2:])
    return {name: np.asarray(value).tolist() for name, value in state._asdict().items()}


def test_a_step_that_a_loss_scale_skips_teaches_nothing() -> None:
    inner = SGD(1.0, global_clipnorm=limits.Percentile(50, 10))
    model = linear(4, keras.optimizers.LossScaleOptimizer(inner, 2.0**10))
    x = np.float32([[3, 0, 0, 4], [3e38, 0, 0, 0], [6, 0, 0, 8]])  # 3e38 times the scale is inf
    fit(model, x)
    assert learnt(inner)["count"] == 2
    assert inner.last_limit == 7.5
    assert sorted(learnt(inner)["ring"])[:2] == [5, 10]


def test_a_variable_without_a_gradient_keeps_its_own() -> None:
    variables = [zeros(1), zeros(1), zeros(1)]
    optimizer = SGD(1.0, global_clipnorm=limits.PerTensor(limits.Percentile(0, 3)))
    for step in ([3.0, 4.0, 5.0], [2.0, None, 1.0], [9.0, 9.0, 9.0]):
        grads = [None if each is None else tensor([each]) for each in step]
        if None in step:
            with pytest.warns(UserWarning, match="Gradients do not exist"):
                optimizer.apply(grads, variables)
        else:
            optimizer.apply(grads, variables)
    assert [float(array(each)[0]) for each in variables] == [-7, -8, -7]
    assert optimizer.last_limit.tolist() == [2, 4, 1]
    assert learnt(optimizer)["count"] == [3, 2, 3]


@pytest.mark.parametrize("name", ["shrink", "percentile of each"])
def test_the_host_and_the_backend_read_and_write_the_same_bits(name: str) -> None:
    from gradclip.keras import learning

    variables = [zeros(1), zeros(1), zeros(1)]
    optimizer = SGD(1.0, global_clipnorm=KINDS[name]())
    for row in steps(20)[:, :3]:
        optimizer.apply([tensor([each]) for each in row], variables)
    kept = optimizer._learnt
    with learning._float64():
        here, there = (kept.read(where) for where in (learning._Host, learning._of_backend()))
        for one, other in zip(here, there, strict=True):
            assert one.dtype.name in str(other.dtype)
            assert one.tobytes() == bits(other)
        for where, values in ((learning._Host, here), (learning._of_backend(), there)):
            assert bits(kept.written(where, values)) == bits(kept.variable)
        old, new = np.arange(8.0).reshape(4, 2), -np.ones((2, 2))
        for where in (learning._Host, learning._of_backend()):
            lesson = learning.OptimizersLesson(limits.PerTensor(limits.Percentile()), kept, [2, 0])
            lesson._there = where
            made = np.asarray if where is learning._Host else keras.ops.convert_to_tensor
            pair = (made(each) for each in (old, new))
            assert array(lesson._put(*pair)).tolist() == [[-1, -1], [2, 3], [-1, -1], [6, 7]]


@on_jax
def test_stateless_apply() -> None:
    import jax

    optimizer = SGD(1.0, global_clipnorm=skipping())
    variable = zeros(2)
    optimizer.build([variable])
    state, value = [v.value for v in optimizer.variables], variable.value
    step = jax.jit(optimizer.stateless_apply)
    for scale in (1.0, 1.1, 0.9, 50.0, 1.0):
        (value,), state = step(state, [scale * tensor([3, 4])], [value])
    np.testing.assert_allclose(value, [-12, -16], rtol=1e-6)
    for ours, each in zip(optimizer.variables, state, strict=True):
        ours.assign(each)
    assert optimizer.skipped_steps == 1


@on_tensorflow
@pytest.mark.parametrize("name", ["average", "each"])
def test_replicas_learn_from_their_sum(name: str) -> None:
    kind, x = KINDS[name](), np.repeat(steps(20), 2, axis=0)
    with strategy(2).scope():
        model = linear(4, SGD(1.0, global_clipnorm=KINDS[name]()))
    history = fit(model, x, gradclip.keras.GlobalNorm(), batch_size=2)
    wanted = in_numpy(kind, x[::2])
    np.testing.assert_allclose(weights(model), wanted, rtol=1e-6)
    np.testing.assert_allclose(model.optimizer.last_limit, kind.last_limit, rtol=1e-12)
    assert 0 < history["clipped"][0] < 1


@on_tensorflow
def test_replicas_cannot_skip() -> None:
    with strategy(2).scope(), pytest.raises(NotImplementedError) as caught:
        SGD(1.0, global_clipnorm=skipping())
    assert str(caught.value) == (
        "global_clipnorm is ZScore(warmup=3, beyond='skip'); several replicas of TensorFlow cannot "
        'skip a step: beyond is "shrink", "edge" or "mean", or there is one replica'
    )


# ---- saved ----


@pytest.mark.parametrize("name", KINDS)
def test_a_config_makes_the_same_limit(name: str) -> None:
    optimizer = gradclip.keras.AdamW(0.25, global_clipnorm=KINDS[name]())
    config = optimizer.get_config()
    for again in (
        gradclip.keras.AdamW.from_config(json.loads(json.dumps(config))),
        keras.optimizers.deserialize(keras.optimizers.serialize(optimizer)),
    ):
        assert again.global_clipnorm == KINDS[name]()
        assert again.get_config() == config


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_go_on(how: str) -> None:
    def one() -> Any:
        return keras.Variable(np.zeros(2), dtype="float32")

    optimizer = SGD(1.0, global_clipnorm=KINDS["shrink"]())
    x = steps(40)[:, :2]
    variable = one()
    for row in x[:20]:
        optimizer.apply([tensor(row)], [variable])
    again = {
        "pickle": lambda: pickle.loads(pickle.dumps(optimizer)),
        "deepcopy": lambda: copy.deepcopy(optimizer),
    }[how]()
    other = one()
    for row in x[20:]:
        optimizer.apply([tensor(row)], [variable])
        again.apply([tensor(row)], [other])
        assert optimizer.last_limit == again.last_limit
    assert bits(optimizer._learnt.variable) == bits(again._learnt.variable)
    assert bits(optimizer._norms) == bits(again._norms)


@pytest.mark.parametrize("name", ["shrink", "percentile of each"])
def test_a_model_saved_and_continued(name: str, tmp_path: Path) -> None:
    x = steps(40)

    def compiled() -> Any:
        return linear(4, SGD(1.0, momentum=0.5, global_clipnorm=KINDS[name]()))

    whole, half = compiled(), compiled()
    fit(whole, x)
    fit(half, x[:17])
    half.compile(half.optimizer, "mse")  # which a file may have
    half.save(tmp_path / "half.keras")
    half.save_weights(tmp_path / "half.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "half.keras")
    filled = compiled()
    filled.optimizer.build(filled.trainable_variables)
    filled.load_weights(tmp_path / "half.weights.h5")
    for rest in (loaded, filled):
        assert rest.optimizer.global_clipnorm == KINDS[name]()
        rest.compile(rest.optimizer, loss)
        fit(rest, x[17:])
        assert weights(rest).tobytes() == weights(whole).tobytes()
        assert bits(rest.optimizer._learnt.variable) == bits(whole.optimizer._learnt.variable)


@pytest.mark.parametrize("module", [gradclip.keras, keras.optimizers], ids=["a number", "Keras"])
def test_what_another_limit_has_saved_is_taken_over(module: Any, tmp_path: Path) -> None:
    theirs = linear(4, module.SGD(1.0, momentum=0.5, global_clipnorm=2.5))
    fit(theirs, steps(5))
    theirs.save_weights(tmp_path / "their.weights.h5")
    ours = linear(4, SGD(1.0, momentum=0.5, global_clipnorm=KINDS["average"]()))
    ours.optimizer.build(ours.trainable_variables)
    ours.load_weights(tmp_path / "their.weights.h5")
    others = [
        each for each in ours.optimizer.variables if each is not ours.optimizer._learnt.variable
    ]
    for one, other in zip(others, theirs.optimizer.variables, strict=False):
        assert bits(one) == bits(other)
    assert learnt(ours.optimizer) == {"average": 0, "count": 0}


# ---- words ----


def test_what_is_shown_and_refused() -> None:
    kind = KINDS["average"]()
    optimizer = SGD(1.0, global_clipnorm=kind)
    assert optimizer.global_clipnorm is kind
    text = "needs a limit that learns, and a first step"
    for name in ("last_limit", "skipped_steps"):
        with pytest.raises(AttributeError, match=f"^{name} {text}$"):
            getattr(optimizer, name)
    optimizer.build([zeros(2)])
    assert math.isnan(optimizer.last_limit)
    assert optimizer.skipped_steps == 0
    other = limits.ZScore()
    text = (
        f"global_clipnorm is set to {other!r} on an optimizer that was built for {kind!r}; build "
        "it with it"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        optimizer.global_clipnorm = other
    optimizer.global_clipnorm = 2.5
    variable = zeros(2)
    optimizer = SGD(1.0, global_clipnorm=2.5)
    optimizer.apply([tensor([3, 4])], [variable])
    with pytest.raises(ValueError, match=r"that was built for 2\.5; build it with it$"):
        optimizer.global_clipnorm = kind


def test_an_optimizer_begins_where_the_limit_is() -> None:
    kind = limits.Percentile(50, 3)
    for size in (1.0, 2.0, 3.0):
        gradclip.clip_by_global_norm([np.array([size])], kind)
    variable = zeros(1)
    SGD(1.0, global_clipnorm=kind).apply([tensor([9.0])], [variable])
    assert array(variable).tolist() == [-3]
