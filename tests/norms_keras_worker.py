"""The norm of each variable in `gradclip.keras` on one backend; `test_norms_keras.py` runs it.

A gradient is given by the data, as in `keras_worker`.
"""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from each_norm import expected
from gradclip import Record, limits
from gradclip.keras import GlobalNorm
from gradclip.record import History
from keras_worker import (
    BACKEND,
    SGD,
    array,
    bits,
    fit,
    linear,
    on_tensorflow,
    rows,
    strategy,
    tensor,
    weights,
    zeros,
)
from keras_worker import pytestmark as of_worker

pytestmark = of_worker

LIMITS = {
    "number": lambda: 1.5,
    "measures": lambda: float("inf"),
    "learns": lambda: limits.ZScore(warmup=5),
    "skips": lambda: limits.ZScore(warmup=3, beyond="skip"),
    "each": lambda: limits.PerTensor(limits.Average(1.1, warmup=5)),
}
compiled = pytest.param(True, marks=pytest.mark.long)


def paths_of(model: Any) -> list[str]:
    return [f"grad_norm/{variable.path}" for variable in model.trainable_variables]


def norms_of(row: Any) -> Any:
    return expected(list(np.split(np.float32(row), [2])))


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("jit", ["auto" if BACKEND != "torch" else False, compiled])
def test_the_logs_and_the_latest(name: str, jit: Any) -> None:
    """The bits of the latest, the mean of each epoch; and else all is as without."""
    x = rows(12, 4)
    x[7] *= 1000
    model, plain = (linear(4, SGD(1.0, global_clipnorm=LIMITS[name]()), jit=jit) for _ in range(2))
    history = fit(model, x, GlobalNorm(per_tensor=True), epochs=2)
    without = fit(plain, x, GlobalNorm(), epochs=2)
    assert history.keys() - without.keys() == set(paths_of(model))
    assert {key: history[key] for key in without} == without
    assert weights(model).tobytes() == weights(plain).tobytes()
    means = np.mean([norms_of(row) for row in x], 0, np.float64)
    for path, mean in zip(paths_of(model), means, strict=True):
        np.testing.assert_allclose(history[path], [mean] * 2, rtol=1e-6)
    latest = model.optimizer.last_norms
    assert bits(latest.values) == norms_of(x[-1]).tobytes()
    assert bits(latest.global_norm) == bits(model.optimizer.last_global_norm)
    assert ["grad_norm/" + path for path in latest.paths] == paths_of(model)
    kept = bits(latest.values)
    fit(model, [[9, 9, 9, 9]], GlobalNorm(per_tensor=True))
    assert bits(latest.values) == kept
    assert bits(model.optimizer.last_norms.values) == norms_of([9, 9, 9, 9]).tobytes()


def test_nan_and_inf_and_squares_that_overflow() -> None:
    model = linear(4, SGD(1.0, global_clipnorm=1.0))
    for row in ([np.nan, 1, 3, 4], [3, 4, np.inf, 1], [3e38, 3e38, 1e-30, 0], [1e30, 0, 0, 1e30]):
        history = fit(model, [row], GlobalNorm(per_tensor=True))
        wanted = norms_of(row)
        np.testing.assert_array_equal(array(model.optimizer.last_norms.values), wanted)
        found = [history[path][0] for path in paths_of(model)]
        np.testing.assert_array_equal(np.float32(found), wanted)
    assert model.optimizer.last_norms.nonfinite() == []


def test_a_model_that_was_fitted_without_it_before() -> None:
    x = rows(6, 4)
    model = linear(4, SGD(1.0, momentum=0.5, global_clipnorm=1.5))
    fit(model, x[:3])
    with pytest.raises(
        AttributeError, match=r"^last_norms needs a fit with GlobalNorm\(per_tensor"
    ):
        model.optimizer.last_norms  # noqa: B018
    history = fit(model, x[3:], GlobalNorm(per_tensor=True))
    means = np.mean([norms_of(row) for row in x[3:]], 0, np.float64)
    np.testing.assert_allclose([history[path][0] for path in paths_of(model)], means, rtol=1e-6)
    history = fit(model, x[:1], GlobalNorm(per_tensor=True))
    found = [history[path][0] for path in paths_of(model)]
    np.testing.assert_allclose(found, norms_of(x[0]), rtol=1e-7)
    # Without it the variable is still there, and stays the optimizer's.
    fit(model, x[1:2])
    assert bits(model.optimizer.last_norms.values) == norms_of(x[1]).tobytes()


def test_a_variable_without_a_gradient() -> None:
    variables = [zeros(1), zeros(1), zeros(1)]
    optimizer = SGD(1.0, global_clipnorm=2.0)
    optimizer.build(variables)
    assert optimizer.watch_each()
    assert not optimizer.watch_each()
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([tensor([3.0]), None, tensor([4.0])], variables)
    assert array(optimizer.last_norms.values).tolist() == [3, 0, 4]
    assert float(optimizer.last_norms.global_norm) == 5


def test_what_is_left_out_does_not_count() -> None:
    inner = SGD(1.0, global_clipnorm=1.0)
    model = linear(4, keras.optimizers.LossScaleOptimizer(inner, 2.0**10))
    history = fit(model, [[3, 0, 0, 4], [3e38, 0, 0, 0]], GlobalNorm(per_tensor=True))
    assert [history[path] for path in paths_of(model)] == [[3], [4]]
    model = linear(4, SGD(1.0, global_clipnorm=1.0, gradient_accumulation_steps=2))
    history = fit(model, [[3, 0, 0, 4], [6, 0, 0, 8]], GlobalNorm(per_tensor=True))
    assert [history[path] for path in paths_of(model)] == [[4.5], [6]]


@pytest.mark.parametrize("name", ["number", "learns"])
def test_what_is_saved_has_no_more_than_without(name: str, tmp_path: Path) -> None:
    x = rows(8, 4)
    whole, model = (
        linear(4, SGD(1.0, momentum=0.5, global_clipnorm=LIMITS[name]())) for _ in range(2)
    )
    fit(whole, x)
    fit(model, x[:5], GlobalNorm(per_tensor=True))
    model.save_weights(tmp_path / "a.weights.h5")
    model.compile(model.optimizer, "mse")
    model.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    assert loaded.optimizer._each is None
    filled = linear(4, SGD(1.0, momentum=0.5, global_clipnorm=LIMITS[name]()))
    filled.optimizer.build(filled.trainable_variables)
    filled.load_weights(tmp_path / "a.weights.h5")
    again = linear(4, SGD(1.0, momentum=0.5, global_clipnorm=LIMITS[name]()))
    fit(again, x[:1], GlobalNorm(per_tensor=True))
    again.load_weights(tmp_path / "a.weights.h5")
    for rest in (loaded, filled, again):
        rest.compile(rest.optimizer, lambda _, y: y)
        fit(rest, x[5:], GlobalNorm(per_tensor=True))
        assert weights(rest).tobytes() == weights(whole).tobytes()


def test_variables_of_one_path_are_told_apart() -> None:
    variables = [keras.Variable(np.zeros(1), name="w", dtype="float32") for _ in range(2)]
    optimizer = SGD(1.0, global_clipnorm=1.0)
    optimizer.watch_each()
    optimizer.apply([tensor([3.0]), tensor([4.0])], variables)
    paths = [variable.path for variable in variables]
    if paths[0] == paths[1]:
        paths = [f"{path} ({place})" for place, path in enumerate(paths)]
    assert list(optimizer.last_norms.paths) == paths
    assert len(optimizer.last_norms.as_dict()) == 3


def test_another_optimizer_is_refused_at_once() -> None:
    model = linear(4, keras.optimizers.SGD(1.0))
    with pytest.raises(
        TypeError, match=re.escape("GlobalNorm needs an optimizer of gradclip.keras")
    ):
        fit(model, rows(1, 4), GlobalNorm(per_tensor=True))


def test_models_that_are_not_fitted_need_no_such_optimizer() -> None:
    x = np.float32(rows(2, 4))
    callback = GlobalNorm(per_tensor=True)
    plain = linear(4, keras.optimizers.SGD(1.0))
    plain.evaluate(x, np.zeros((2, 1)), verbose=0, callbacks=[callback])
    model = keras.Model(plain.inputs, plain.outputs)  # not compiled
    assert model.predict(x, verbose=0, callbacks=[callback]).shape == (2, 1)


@on_tensorflow
@pytest.mark.parametrize("first", [False, True])
def test_replicas(first: bool) -> None:
    """Of the sums over them."""
    x = np.repeat(rows(6, 4), 2, axis=0)
    with strategy(2).scope():
        model = linear(4, SGD(1.0, global_clipnorm=1.5))
    if first:
        fit(model, x, batch_size=2)
    history = fit(model, x, GlobalNorm(per_tensor=True), batch_size=2)
    means = np.mean([norms_of(row) for row in x], 0, np.float64)
    np.testing.assert_allclose([history[path][0] for path in paths_of(model)], means, rtol=1e-6)


@on_tensorflow
def test_slices() -> None:
    import tensorflow as tf

    table, other = keras.Variable(np.zeros((5, 2)), dtype="float32"), zeros(1)
    optimizer = SGD(1.0, global_clipnorm=1.0)
    optimizer.watch_each()
    grads = [
        tf.IndexedSlices(tf.ones((2, 2)), tf.constant([3, 3]), tf.constant([5, 2])),
        tf.constant([4.0]),
    ]

    def apply(grads: Any) -> None:
        optimizer.apply(grads, [table, other])

    for step in (apply, tf.function(apply, autograph=False)):
        step(grads)
        assert array(optimizer.last_norms.values).tolist() == [np.float32(8**0.5), 4]


@pytest.mark.parametrize("name", LIMITS)
def test_a_record_is_told_of_each_update(name: str, tmp_path: Path) -> None:
    x = rows(12, 4)
    x[7] *= 1000
    x[9, 2] = np.nan
    model = linear(4, SGD(1.0, global_clipnorm=LIMITS[name]()))
    told: list[int] = []
    with Record(
        tmp_path / "run.db", per_tensor_every=1, log=lambda _, step: told.append(step)
    ) as record:
        fit(model, x, GlobalNorm(per_tensor=True, record=record))
        fit(model, x[:3], GlobalNorm(per_tensor=True, record=record))
    assert told == list(range(1, 16))
    with History.open(tmp_path / "run.db") as history:
        assert history.steps.tolist() == told
        assert ["grad_norm/" + each for each in history.names] == paths_of(model)
        wanted = np.stack([norms_of(row) for row in (*x, *x[:3])])
        np.testing.assert_array_equal(history.tensor_norms(0, 15).values, wanted)
        assert np.isnan(history.norm[9])
        assert history.nonfinite.tolist() == [0] * 9 + [2] + [0] * 5
        assert bool(history.skipped[7]) == (name == "skips")
        if name == "number":
            assert history.limit.tolist() == [1.5] * 15
            factor = np.minimum(1, 1.5 / history.norm)
            np.testing.assert_allclose(history.factor[factor < 1], factor[factor < 1], rtol=1e-6)
        assert np.isnan(history.limit).all() == (name == "measures")


def test_a_record_of_what_is_accumulated_and_of_the_global_norm_alone(tmp_path: Path) -> None:
    x = rows(8, 4)
    optimizer = SGD(1.0, global_clipnorm=1.5, gradient_accumulation_steps=2)
    callback = GlobalNorm(record=tmp_path / "run.db")
    fit(linear(4, optimizer), x, callback)
    with History.open(tmp_path / "run.db") as history:
        assert history.steps.tolist() == [1, 2, 3, 4]
        assert len(history.tensor_steps) == 0
        assert history.norm[-1] == float(optimizer.last_global_norm)


def test_a_callback_goes_from_one_model_to_the_next(tmp_path: Path) -> None:
    """Also where that is built by its first batch, whose gradient waits for the second one's."""
    with Record(tmp_path / "run.db") as record:
        callback = GlobalNorm(record=record)
        for _ in range(2):
            model = keras.Sequential([keras.layers.Dense(1, use_bias=False)])
            optimizer = SGD(1.0, global_clipnorm=1.5, gradient_accumulation_steps=2)
            model.compile(optimizer, "mse")
            fit(model, rows(4, 4), callback)
    file = sqlite3.connect(tmp_path / "run.db")
    told = file.execute("SELECT run, step FROM steps ORDER BY run, step").fetchall()
    file.close()
    assert told == [(0, 1), (0, 2), (1, 1), (1, 2)]
