"""`gradclip.Record` and `gradclip.record.History`: what is written of each source, and read."""

from __future__ import annotations

import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradclip
from conftest import lacks, version
from gradclip import limits
from gradclip.record import History
from host import run_python
from record_files import norms, query, raises, rows, tensor_steps

INF, NAN = math.inf, math.nan
EACH = np.array([3.0, 4.0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


# ---- the file ----


def test_the_tables(path: Path) -> None:
    before = time.time()
    with gradclip.Record(path) as record:
        record(100, norms(3.0, 4.0), limit=2.5)
    found = query(path, "SELECT name, sql FROM sqlite_master WHERE type = 'table' ORDER BY name")
    assert [name for name, _ in found] == ["norms", "runs", "steps", "tensors"]
    assert query(path, "PRAGMA user_version") == [(1,)]
    ((run, begun),) = query(path, "SELECT * FROM runs")
    ((of, step, at, *rest),) = query(path, "SELECT * FROM steps")
    assert (run, of, step, rest) == (0, 0, 100, [5.0, 2.5, 0.5, "clip", 0, 0])
    assert before <= begun <= at <= time.time()
    assert query(path, "SELECT * FROM tensors") == [(0, 0, "w0"), (0, 1, "w1")]
    assert query(path, "SELECT * FROM norms") == [(0, 100, 0, np.array([3, 4], "<f8").tobytes())]


def test_while_it_is_written_it_can_be_read_and_after_it_is_one_file(path: Path) -> None:
    with gradclip.Record(path) as record:
        assert query(path, "PRAGMA journal_mode") == [("wal",)]
        record(0, 1.0)
        record.flush()
        assert rows(path, "step") == [(0,)]
        record(1, 1.0)
        time.sleep(1.5)
        assert rows(path, "step") == [(0,), (1,)]
    assert [each.name for each in path.parent.iterdir()] == ["run.db"]
    with History.open(path) as history:
        assert len(history) == 2
    assert [each.name for each in path.parent.iterdir()] == ["run.db"]


def test_it_closes_though_somebody_reads(path: Path) -> None:
    record = gradclip.Record(path)
    record(0, 1.0)
    record.flush()
    with History.open(path) as history:
        record(1, 1.0)
        record.close()
        assert history.after(0).steps.tolist() == [1]
    assert rows(path, "step") == [(0,), (1,)]


@pytest.mark.parametrize("end", ["", "record.close()", "del record", "sys.exit(3)", "1 / 0"])
@pytest.mark.slow
def test_the_last_steps_are_written_however_the_process_ends(end: str, path: Path) -> None:
    code = f"""
    import gradclip, sys
    record = gradclip.Record({str(path)!r})
    for step in range(10):
        record(step, 1.0)
    {end}
    """
    done = run_python(code)
    assert done.returncode == {"sys.exit(3)": 3, "1 / 0": 1}.get(end, 0), done.stderr
    assert len(rows(path)) == 10
    assert [each.name for each in path.parent.iterdir()] == ["run.db"]


# ---- numbers and norms ----


@pytest.mark.parametrize(
    ("norm", "given", "row"),
    [
        (2.0, {}, (2.0, None, None, "keep", 0, 0)),
        (2, {"limit": 2}, (2.0, 2.0, 1.0, "keep", 0, 0)),
        (np.float32(4.0), {"limit": np.float64(1.0)}, (4.0, 1.0, 0.25, "clip", 0, 0)),
        (4.0, {"limit": 1.0, "factor": 0.5}, (4.0, 1.0, 0.5, "clip", 0, 0)),
        (4.0, {"limit": INF}, (4.0, INF, 1.0, "keep", 0, 0)),
        (4.0, {"limit": EACH, "factor": 1 / EACH}, (4.0, 5.0, 0.25, "clip", 0, 0)),
        (4.0, {"skipped": True}, (4.0, None, None, "skip", 1, 0)),
        (4.0, {"skipped": False}, (4.0, None, None, "keep", 0, 0)),
        (INF, {"limit": 1.0}, (INF, 1.0, 0.0, "nonfinite", 0, 1)),
        (NAN, {"limit": 1.0}, (None, 1.0, None, "nonfinite", 0, 2)),
        (NAN, {"skipped": True}, (None, None, None, "skip", 1, 2)),
    ],
)  # fmt: skip
def test_numbers(norm: Any, given: dict[str, Any], row: Any, path: Path) -> None:
    with gradclip.Record(path) as record:
        record(np.int64(7), norm, **given)
    assert rows(path) == [(7, *row)]


@pytest.mark.parametrize("name", ["torch", "jax", "tensorflow", "keras"])
def test_scalars_of_frameworks_may_change_afterwards(name: str, path: Path) -> None:
    pytest.importorskip(name)
    with gradclip.Record(path) as record:
        for step in range(3):
            scalar = 1.5 + step
            if name == "torch":
                import torch

                tensor = torch.tensor(scalar)
                record(step, tensor, limit=torch.tensor(2.0))
                tensor.zero_()
            elif name == "jax":
                import jax

                array = jax.numpy.float32(scalar)
                record(step, array, limit=jax.numpy.float32(2.0))
                array.delete()
            elif name == "tensorflow":
                import tensorflow as tf

                variable = tf.Variable(scalar)
                record(step, variable, limit=tf.constant(2.0))
                variable.assign(0.0)
            else:
                import keras

                own = keras.Variable(scalar)
                record(step, own, limit=2.0)
                own.assign(0.0)
    assert rows(path, "norm, action") == [(1.5, "keep"), (2.5, "clip"), (3.5, "clip")]


def test_norms_are_written_every_so_many_steps(path: Path) -> None:
    with gradclip.Record(path, per_tensor_every=10) as record:
        for step in range(25):
            record(step, norms(3.0 + step, 4.0), limit=100.0)
    assert tensor_steps(path) == [0, 10, 20]
    with History.open(path) as history:
        assert history.names == ("w0", "w1")
        assert history.tensor_norms().values.tolist() == [[3, 4], [13, 4], [23, 4]]


@pytest.mark.parametrize("event", ["hard", "skip", "nan", "inf"])
def test_the_steps_before_an_event_are_written_too(event: str, path: Path) -> None:
    with gradclip.Record(path, per_tensor_every=0) as record:
        for step in range(100):
            at = step in (50, 60)
            size = {"nan": NAN, "inf": INF}.get(event, 1.0) if at else 1.0
            record(
                step,
                norms(size, step),
                factor=0.09 if at and event == "hard" else 0.1,
                skipped=at and event == "skip",
            )
            if step in (20, 55):
                record.flush()
    assert tensor_steps(path) == list(range(18, 61))
    with History.open(path) as history:
        assert history.tensor_norms().values[:, 1].tolist() == list(range(18, 61))


def test_tensors_that_come_and_go(path: Path) -> None:
    with gradclip.Record(path, per_tensor_every=1) as record:
        record(0, gradclip.norms({"a": np.array([1.0]), "b": np.array([2.0])}))
        record(1, gradclip.norms({"c": np.array([3.0]), "b": np.array([4.0])}))
    with gradclip.Record(path, per_tensor_every=1) as record:
        record(2, gradclip.norms({"a": np.array([5.0]), "b": np.array([6.0])}))
    assert query(path, "SELECT count(DISTINCT layout) FROM tensors") == [(2,)]
    with History.open(path) as history:
        assert history.names == ("a", "b", "c")
        values, present = history.tensor_norms()
        assert present.tolist() == [[True, True, False], [False, True, True], [True, True, False]]
        assert values[present].tolist() == [1, 2, 4, 3, 5, 6]
        assert np.isnan(values[~present]).all()
        assert history.tensor_norms(1, 2).values.shape == (1, 3)
        assert history.tensor_norms(-1).values[0, 0] == 5


# ---- going on ----


def test_a_resumed_run_goes_on_in_the_same_file(path: Path) -> None:
    for start, stop, norm in ((0, 10, 1.0), (6, 12, 2.0), (9, 11, 3.0)):
        with gradclip.Record(path, per_tensor_every=1) as record:
            for step in range(start, stop):
                record(step, norms(norm))
    assert len(query(path, "SELECT * FROM runs")) == 3
    with History.open(path) as history:
        assert history.steps.tolist() == list(range(11))
        assert history.norm.tolist() == [1.0] * 6 + [2.0] * 3 + [3.0] * 2
        assert history.tensor_steps.tolist() == list(range(11))
        assert history.tensor_norms().values[:, 0].tolist() == history.norm.tolist()
        assert history.begun_at() == 9


def test_a_run_that_has_not_told_a_step_replaces_none(path: Path) -> None:
    with gradclip.Record(path) as record:
        record(5, 1.0)
    with gradclip.Record(path):
        pass
    with History.open(path) as history:
        assert history.steps.tolist() == [5]


def test_going_back_to_a_checkpoint_within_a_process_is_another_run(path: Path) -> None:
    with gradclip.Record(path) as record:
        for step, norm in [(0, 1.0), (1, 1.0), (2, 1.0), (1, 2.0), (2, 2.0), (2, 3.0)]:
            record(step, norm)
    assert query(path, "SELECT run FROM runs") == [(0,), (1,)]
    with History.open(path) as history:
        assert history.steps.tolist() == [0, 1, 2]
        assert history.norm.tolist() == [1, 2, 3]


def test_a_step_that_is_told_again_has_the_later_norms(path: Path) -> None:
    with gradclip.Record(path, per_tensor_every=0) as record:
        record(0, norms(1.0))
        record(0, norms(2.0))
        record(1, norms(NAN))
        record(1, norms(3.0))
    with History.open(path) as history:
        assert history.tensor_steps.tolist() == [0]
        assert history.tensor_norms().values.tolist() == [[2]]


def test_norms_that_a_step_no_longer_has_are_not_written_with_an_event(path: Path) -> None:
    with gradclip.Record(path, per_tensor_every=0) as record:
        record(4, norms(1.0))
        record(5, norms(3.0))
        record(5, 1.0)
        record(6, norms(30.0), limit=1.0)
    assert tensor_steps(path) == [4, 6]


def test_norms_may_change_afterwards(path: Path) -> None:
    every: list[Any] = [np.array]
    if version("torch"):
        import torch

        every.append(torch.tensor)
    with gradclip.Record(path, per_tensor_every=1) as record:
        for step, make in enumerate(every):
            found = gradclip.norms([make([3.0]), make([4.0])])
            record(step, found)
            found.values[:] = 7
    with History.open(path) as history:
        assert history.tensor_norms().values.tolist() == [[3.0, 4.0]] * len(every)


def test_the_largest_step(path: Path) -> None:
    with gradclip.Record(path) as record:
        record(2**63 - 1, 1.0)
    with History.open(path) as history:
        assert history.steps.tolist() == [2**63 - 1]


# ---- clippers of PyTorch ----


class Trained:
    """Two parameters that an optimizer steps, with gradients of these norms."""

    def __init__(self, max_norm: Any, groups: bool = False, **options: Any) -> None:
        import torch

        import gradclip.torch

        self.parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
        given: Any = [{"params": [each]} for each in self.parameters] if groups else self.parameters
        self.optimizer = torch.optim.SGD(given, lr=0.0)
        self.clipper = gradclip.torch.attach(self.optimizer, max_norm, **options)

    def step(self, first: float, second: float) -> None:
        import torch

        for parameter, x in zip(self.parameters, (first, second), strict=True):
            parameter.grad = torch.tensor([x, 0.0])
        self.optimizer.step()


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.mark.usefixtures("torch")
def test_a_clipper_tells_all(path: Path) -> None:
    trained = Trained(2.5)
    with gradclip.Record(path) as record:
        for step, size in enumerate([0.1, 1.0, NAN, INF]):
            trained.step(3 * size, 4 * size)
            record(step, trained.clipper)
    assert rows(path) == [
        (0, 0.5, 2.5, 1.0, "keep", 0, 0),
        (1, 5.0, 2.5, 0.5, "clip", 0, 0),
        (2, None, 2.5, None, "nonfinite", 0, 2),
        (3, INF, 2.5, rows(path)[3][3], "nonfinite", 0, 1),
    ]


@pytest.mark.usefixtures("torch")
def test_a_clipper_tells_steps_that_it_has_skipped(path: Path) -> None:
    trained = Trained(2.5, on_nonfinite="skip")
    with gradclip.Record(path) as record:
        for step, size in enumerate([NAN, 1.0, INF, INF, 1.0]):
            trained.step(3 * size, 4 * size)
            record(step, trained.clipper)
    assert rows(path, "step, action, skipped, nonfinite") == [
        (0, "skip", 1, 2),
        (1, "clip", 0, 0),
        (2, "skip", 1, 1),
        (3, "skip", 1, 1),
        (4, "clip", 0, 0),
    ]


@pytest.mark.usefixtures("torch")
def test_a_limit_that_learns_and_skips(path: Path) -> None:
    trained = Trained(limits.ZScore(z=4, warmup=2, beyond="skip"))
    with gradclip.Record(path) as record:
        for step, size in enumerate([1.0, 1.1, 100.0, 1.05]):
            trained.step(3 * size, 4 * size)
            record(step, trained.clipper)
    found = rows(path)
    assert [each[4] for each in found] == ["keep", "keep", "skip", "keep"]
    assert [each[2] for each in found] == [INF, INF, float(found[2][2]), INF]
    assert found[2][1] == 500.0
    assert 5 < found[2][2] < 10


@pytest.mark.usefixtures("torch")
def test_groups_that_have_limits_make_one_row(path: Path) -> None:
    trained = Trained([3.0, 1.0], groups=True)
    with gradclip.Record(path) as record:
        trained.step(3.0, 4.0)
        record(0, trained.clipper)
    assert rows(path) == [(0, 5.0, math.sqrt(10), 0.25, "clip", 0, 0)]


@pytest.mark.usefixtures("torch")
def test_tensors_that_have_limits_make_one_row(path: Path) -> None:
    trained = Trained(limits.PerTensor(limits.ZScore(warmup=1, beyond="edge")))
    with gradclip.Record(path) as record:
        for step, (first, second) in enumerate([(3.0, 4.0), (3.0, 40.0)]):
            trained.step(first, second)
            record(step, trained.clipper)
    first, second = rows(path)
    assert first == (0, 5.0, INF, 1.0, "keep", 0, 0)
    assert second[4] == "clip"
    assert second[3] == pytest.approx(float(trained.clipper.factor))
    assert second[2] == pytest.approx(math.hypot(*trained.clipper.limit.tolist()))


@pytest.mark.usefixtures("torch")
def test_a_clipper_tells_the_norms_of_tensors(path: Path) -> None:
    for groups in (False, True):
        trained = Trained([9.0, 9.0] if groups else 9.0, groups, per_tensor=True)
        with gradclip.Record(path, per_tensor_every=0) as record:
            for step in range(5):
                trained.step(1.0 + step, 2.0 + step)
                record(step, trained.clipper)
            trained.step(NAN, 1.0)
            record(5, trained.clipper)
        with History.open(path) as history:
            assert len(history.names) == 2
            found = history.tensor_norms().values
        assert found[:5].tolist() == [[1.0 + step, 2.0 + step] for step in range(5)]
        assert np.isnan(found[5, 0])
        assert found[5, 1] == 1.0
        path.unlink()


@pytest.mark.usefixtures("torch")
def test_steps_that_grad_scaler_skips(path: Path) -> None:
    import torch

    trained = Trained(2.5, per_tensor=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with gradclip.Record(path) as record:
        record(0, trained.clipper)  # before the first
        for step, size in enumerate([1.0, INF, 1.0], 1):
            loss = sum(
                (p * torch.tensor([x * size, 0.0])).nan_to_num(nan=0.0, posinf=INF).sum()
                for p, x in zip(trained.parameters, (3.0, 4.0), strict=True)
            )
            trained.optimizer.zero_grad()
            scaler.scale(loss).backward()
            if size == INF:
                trained.parameters[0].grad.fill_(INF)
            scaler.step(trained.optimizer)
            scaler.update()
            record(step, trained.clipper)
            record(step, trained.clipper)  # tells nothing new
    assert rows(path, "step, norm, factor, action, skipped, nonfinite") == [
        (0, None, None, "skip", 1, 0),
        (1, 5.0, 0.5, "clip", 0, 0),
        (2, None, None, "skip", 1, 0),
        (3, 5.0, 0.5, "clip", 0, 0),
    ]
    assert tensor_steps(path) == [1]


@pytest.mark.usefixtures("torch")
def test_books_of_a_device(path: Path) -> None:
    if reason := lacks("triton"):
        pytest.skip(reason)
    from host_torch import torch_there

    with torch_there(), gradclip.Record(path, per_tensor_every=1) as record:
        trained = Trained(2.5, on_nonfinite="zero", per_tensor=True)
        for step, size in enumerate([0.1, 1.0, NAN, 1.0]):
            trained.step(3 * size, 4 * size)
            assert trained.clipper._books.device is not None
            record(step, trained.clipper)
    assert [(row[0], row[1], row[4]) for row in rows(path)] == [
        (0, 0.5, "keep"),
        (1, 5.0, "clip"),
        (2, None, "nonfinite"),
        (3, 5.0, "clip"),
    ]
    with History.open(path) as history:
        found = history.tensor_norms().values[[0, 1, 3]]
    np.testing.assert_array_equal(found, np.float32([[0.3, 0.4], [3, 4], [3, 4]]))


@pytest.mark.usefixtures("torch")
def test_a_clipper_is_given_nothing_beside(path: Path) -> None:
    trained = Trained(1.0)
    text = (
        "limit, factor and skipped are (1.0, None, None); they are for norms and numbers: Clipper "
        "tells its own"
    )
    with gradclip.Record(path) as record, raises(TypeError, text):
        record(0, trained.clipper, limit=1.0)


# ---- states of optax ----


@pytest.fixture
def optax() -> Any:
    pytest.importorskip("jax")
    return pytest.importorskip("optax")


def test_a_state_of_optax_that_is_donated(optax: Any, path: Path) -> None:
    import jax

    import gradclip.optax as door

    optimizer = optax.chain(door.clip_by_global_norm(2.5), optax.adam(1e-3))
    params = {"a": jax.numpy.array([3.0]), "b": jax.numpy.array([4.0])}
    state = optimizer.init(params)
    update = jax.jit(
        lambda updates, state: optimizer.update(updates, state)[1],
        donate_argnums=1,
        keep_unused=True,
    )
    with gradclip.Record(path) as record:
        for step, size in enumerate([0.1, 1.0, NAN]):
            before, state = state, update(jax.tree.map(lambda x, n=size: x * n, params), state)
            assert before[0].global_norm.is_deleted()
            record(step, gradclip.Record.of_state(state), limit=2.5)
    assert rows(path) == [
        (0, 0.5, 2.5, 1.0, "keep", 0, 0),
        (1, 5.0, 2.5, 0.5, "clip", 0, 0),
        (2, None, 2.5, None, "nonfinite", 0, 2),
    ]


def test_states_tell_steps_that_were_skipped(optax: Any, path: Path) -> None:
    import jax

    import gradclip.optax as door

    limit = limits.ZScore(z=4, warmup=2, beyond="skip")
    clipped = door.apply_clipped(optax.sgd(1.0), limit, on_nonfinite="skip")
    optimizer = optax.inject_hyperparams(lambda rate: optax.chain(clipped, optax.scale(rate)))(1.0)
    params = jax.numpy.array([3.0, 4.0])
    state = optimizer.init(params)
    with gradclip.Record(path) as record:
        for step, size in enumerate([NAN, 1.0, 1.1, 100.0, NAN, 1.0]):
            _, state = optimizer.update(params * size, state)
            record(step, gradclip.Record.of_state(state))
    assert [(row[0], row[1], row[4]) for row in rows(path)] == [
        (0, None, "skip"),
        (1, 5.0, "keep"),
        (2, 5.5, "keep"),
        (3, 500.0, "skip"),
        (4, None, "skip"),
        (5, 5.0, "keep"),
    ]


@pytest.mark.parametrize("max_norm", [2.5, limits.ZScore(), limits.PerTensor(limits.ZScore())])
def test_a_state_with_the_norm_of_each_leaf(max_norm: Any, optax: Any, path: Path) -> None:
    import jax

    import gradclip.optax as door

    optimizer = optax.chain(door.clip_by_global_norm(max_norm, per_leaf=True), optax.sgd(1.0))
    params = {"layer": {"w": jax.numpy.array([3.0]), "b": jax.numpy.array([4.0])}}
    state = optimizer.init(params)
    with gradclip.Record(path, per_tensor_every=1) as record:
        for step, names in enumerate([None, params, gradclip.norms(params).paths]):
            updates = jax.tree.map(lambda x, step=step: x * (step + 1), params)
            _, state = optimizer.update(updates, state)
            record(step, gradclip.Record.of_state(state, names))
    with pytest.raises(TypeError, match="names has 1 names; the state has norms of 2 tensors"):
        gradclip.Record.of_state(state, ["w"])
    with History.open(path) as history:
        assert history.names == ("0", "1", "layer/b", "layer/w")
        values, present = history.tensor_norms()
        assert values[present].tolist() == [4, 3, 8, 6, 12, 9]
        assert history.norm.tolist() == [5, 10, 15]


def test_states_that_are_none(optax: Any, path: Path) -> None:
    import jax

    import gradclip.optax as door

    params = jax.numpy.array([3.0, 4.0])
    clip = door.clip_by_global_norm(1.0)
    for state, count in [
        (optax.adam(1.0).init(params), 0),
        (None, 0),
        (optax.chain(clip, clip).init(params), 2),
    ]:
        text = (
            f"there are {count} states of gradclip.optax in the {type(state).__name__}; give the "
            "state of an optimizer that clips with gradclip.optax, or the part of it that has one "
            "clip"
        )
        with raises(ValueError, text):
            gradclip.Record.of_state(state)
    with gradclip.Record(path) as record:
        with pytest.raises(TypeError, match=r"record was called under jax\.jit"):
            jax.jit(lambda x: record(0, x))(1.0)
        with pytest.raises(TypeError, match="a state tells its own"):
            record(0, gradclip.Record.of_state(clip.init(params)), factor=1.0)


# ---- loggers ----


def test_a_logger_is_told_of_each_step(path: Path) -> None:
    told: list[tuple[int, dict[str, float]]] = []
    threads = set()

    def log(values: dict[str, float], step: int) -> None:
        threads.add(threading.current_thread())
        told.append((step, values))

    with gradclip.Record(path, per_tensor_every=2, log=log) as record:
        record(0, norms(3.0, 4.0), limit=10.0)
        record(1, norms(3.0, 4.0), limit=10.0)
        record(2, 1.0)
        record(3, norms(NAN, 4.0), limit=10.0)
    flat = {"grad_norm": 5.0, "grad_limit": 10.0, "grad_factor": 1.0}
    assert told[0] == (0, {**flat, "grad_norm/w0": 3.0, "grad_norm/w1": 4.0})
    assert told[1:3] == [(1, flat), (2, {"grad_norm": 1.0})]
    step, values = told[3]  # without those of the ring, whose steps are over
    assert step == 3
    assert set(values) == {"grad_norm", "grad_limit", "grad_norm/w0", "grad_norm/w1"}
    assert threading.main_thread() not in threads


def test_a_logger_that_fails_is_told_once(path: Path) -> None:
    def log(_: dict[str, float], step: int) -> None:
        raise KeyError(f"step {step}")

    with gradclip.Record(path, log=log) as record:
        record(0, 1.0)
        with pytest.warns(RuntimeWarning, match=r"log failed in step 0: KeyError\('step 0'\)"):
            record.flush()
        record(1, 1.0)
    assert len(rows(path)) == 2


def test_a_logger_that_ends_its_thread_ends_no_record(path: Path) -> None:
    record = gradclip.Record(path, log=lambda *_: sys.exit(1))
    record(0, 1.0)
    record(1, 2.0)
    with pytest.warns(RuntimeWarning, match="log failed in step 0: SystemExit"):
        record.close()
    assert rows(path, "step") == [(0,), (1,)]


def test_a_step_whose_call_warns_is_recorded(path: Path) -> None:
    def log(*_: Any) -> None:
        raise ValueError

    with gradclip.Record(path, log=log) as record:
        record(0, 1.0)
        with pytest.raises(RuntimeWarning, match="log failed in step 0"):
            record.flush()
        record._writer._report("another", "trouble")  # type: ignore[union-attr]
        with pytest.raises(RuntimeWarning, match="trouble"):
            record(1, 2.0)
    assert rows(path, "step") == [(0,), (1,)]


@pytest.mark.parametrize("wrong", [{"limit": -1.0}, {"factor": -0.5}, {"source": -3.0}])
def test_numbers_below_zero_are_refused(wrong: dict[str, float], tmp_path: Path) -> None:
    given = {"source": 3.0, **wrong}
    (name,) = wrong
    called = "norm" if name == "source" else name
    with gradclip.Record(tmp_path / "run.db") as record:
        with pytest.raises(ValueError, match=f"^{called} is -"):
            record(0, **given)
        record(0, 3.0, limit=1.0)
    with History.open(tmp_path / "run.db") as history:
        assert history.steps.tolist() == [0]
