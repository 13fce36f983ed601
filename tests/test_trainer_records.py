"""`GradientRecord` in real trainings of Lightning and transformers: what is in the file is so."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import math
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import version

if version("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)
import torch
from torch import nn

import gradclip
import gradclip.torch as gtorch
from gradclip import limits
from gradclip.cli import main
from gradclip.record import History
from host import run_script
from test_torch_trainers import (
    MAX_NORM,
    STEPS,
    TOKENS,
    _clean,
    criterion,
    load,
    loss_of,
    new_model,
    sgd,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is:FutureWarning"),
]
__all__ = ["_clean"]  # a fixture for every test here

Seen = list[tuple[float, dict[str, float]]]


def callback(trainer: str, *args: Any, **options: Any) -> Any:
    load(trainer)
    return importlib.import_module(f"gradclip.{trainer}").GradientRecord(*args, **options)


def lightning_fit(
    model: nn.Module, optimizer: Any, callbacks: Any, bad: int | None = None, **options: Any
) -> None:
    lightning = load("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def configure_optimizers(self) -> Any:
            return optimizer

        def training_step(self, batch: int, *_: Any) -> torch.Tensor:
            return loss_of(self.model, math.nan if batch == bad else 1.0)

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        enable_checkpointing=False,
        callbacks=callbacks,
        **quiet,
        **options,
    )
    trainer.fit(Module(), range(STEPS))


def transformers_fit(
    model: nn.Module, optimizer: Any, callbacks: Any, bad: int | None = None, **options: Any
) -> Any:
    transformers = load("transformers")
    batches = itertools.count()

    def loss(*args: Any, **more: Any) -> torch.Tensor:
        return criterion(math.nan if next(batches) == bad else 1.0, *args, **more)

    given = {"use_cpu": True, "max_steps": STEPS, "logging_steps": 1, "disable_tqdm": True}
    given |= {"report_to": "none", "save_strategy": "no", "lr_scheduler_type": "constant"}
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**given, **options),
        train_dataset=[TOKENS],
        optimizers=(optimizer, None),
        compute_loss_func=loss,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def by_hand(trainer: str, max_norm: Any, prefix: str = "") -> Seen:
    """The global norm, and each gradient's, of a plain loop that clips as gradclip does."""
    model = new_model(trainer)
    optimizer = sgd(model)
    seen = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        if trainer == "transformers":
            batch = {name: values[None] for name, values in TOKENS.items()}
            labels = batch.pop("labels")
            criterion(1.0, model(**batch), labels).backward()
        else:
            loss_of(model, 1.0).backward()
        named = {prefix + name: x for name, x in model.named_parameters()}
        found = gtorch.clip_grad_norm_(named, max_norm, norms=True)
        optimizer.step()
        seen.append((float(found.global_norm), dict(zip(found.paths, found.floats(), strict=True))))
    return seen


def read(path: Path) -> Seen:
    with History.open(path) as history:
        assert history.steps.tolist() == list(range(1, STEPS + 1))
        assert history.tensor_steps.tolist() == list(range(1, STEPS + 1))
        found = history.tensor_norms(0, STEPS)
        names = history.names
        return [
            (norm, dict(zip(names, each, strict=True)))
            for norm, each in zip(history.norm.tolist(), np.asarray(found.values), strict=True)
        ]


def check_columns(path: Path, limit: float | None) -> None:
    with closing(sqlite3.connect(path)) as file:
        rows = list(file.execute('SELECT norm, "limit", factor, action FROM steps'))
    assert len(rows) == STEPS
    for norm, bound, factor, action in rows:
        assert bound == limit
        if limit is not None:
            assert factor == pytest.approx(min(1, limit / norm), rel=1e-6)
        assert action == ("keep" if limit is None or norm <= limit else "clip")


FITS = {"lightning": lightning_fit, "transformers": transformers_fit}
OPTION = {"lightning": "gradient_clip_val", "transformers": "max_grad_norm"}
PREFIX = {"lightning": "model.", "transformers": ""}


@pytest.mark.parametrize("trainer", FITS)
def test_who_clips_is_gradclip(trainer: str, tmp_path: Path) -> None:
    model, path = new_model(trainer), tmp_path / "run.db"
    with gtorch.patch():
        record = callback(trainer, path, per_tensor_every=1)
        FITS[trainer](model, sgd(model), [record], **{OPTION[trainer]: MAX_NORM})
    assert read(path) == by_hand(trainer, MAX_NORM, PREFIX[trainer])
    check_columns(path, MAX_NORM)


@pytest.mark.parametrize("trainer", FITS)
def test_who_clips_is_pytorch(trainer: str, tmp_path: Path) -> None:
    """The weights are those of a training without a record, bit for bit."""
    logged: list[tuple[dict[str, float], int]] = []
    models = [new_model(trainer), new_model(trainer)]
    options = {
        "per_tensor_every": 2,
        "hard": 0,
        "log": lambda told, step: logged.append((told, step)),
    }
    for model, path in zip(models, [tmp_path / "run.db", None], strict=True):
        given = [] if path is None else [callback(trainer, path, **options)]
        FITS[trainer](model, sgd(model), given, **{OPTION[trainer]: MAX_NORM})
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    check_columns(tmp_path / "run.db", MAX_NORM)
    names = [f"grad_norm/{PREFIX[trainer]}{name}" for name, _ in models[0].named_parameters()]
    assert [step for _, step in logged] == [1, 2, 3]
    assert sorted(logged[0][0]) == ["grad_factor", "grad_limit", "grad_norm"]
    assert set(logged[1][0]) == {"grad_factor", "grad_limit", "grad_norm", *names}


@pytest.mark.parametrize("trainer", FITS)
def test_nothing_limits(trainer: str, tmp_path: Path) -> None:
    model, path = new_model(trainer), tmp_path / "run.db"
    off = {"lightning": {}, "transformers": {"max_grad_norm": 0.0}}[trainer]
    FITS[trainer](model, sgd(model), [callback(trainer, path, per_tensor_every=1)], **off)
    assert read(path) == by_hand(trainer, math.inf, PREFIX[trainer])
    check_columns(path, None)


@pytest.mark.parametrize("trainer", FITS)
def test_a_limit_that_learns(trainer: str, tmp_path: Path) -> None:
    model, path = new_model(trainer), tmp_path / "run.db"
    with gtorch.patch(limit=limits.Average(1.05, warmup=1, limit=0.5)):
        record = callback(trainer, path, per_tensor_every=1)
        FITS[trainer](model, sgd(model), [record], **{OPTION[trainer]: MAX_NORM})
    kind = limits.Average(1.05, warmup=1, limit=0.5)
    wanted = []
    model = new_model(trainer)
    assert read(path) == by_hand(trainer, kind, PREFIX[trainer])
    with History.open(path) as history:
        wanted = history.limit.tolist()
    assert wanted[0] == 0.5
    assert wanted[-1] == kind.last_limit != wanted[0]


@pytest.mark.parametrize("trainer", FITS)
def test_the_report_names_a_bad_batch(
    trainer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is NaN in its step, and from then on, as the weights are."""
    model, path = new_model(trainer), tmp_path / "run.db"
    record = callback(trainer, path)
    FITS[trainer](model, sgd(model), [record], bad=1, **{OPTION[trainer]: MAX_NORM})
    capsys.readouterr()
    assert main(["report", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (event,) = (each for each in report["events"] if each["kind"] == "NaN")
    assert (event["first"], event["last"], event["steps"]) == (2, STEPS, STEPS - 1)
    assert report["steps"], report["nonfinite"] == (STEPS, STEPS - 1)
    names = {f"{PREFIX[trainer]}{name}" for name, _ in model.named_parameters()}
    assert set(event["nonfinite"]) == names


def test_a_step_that_lightning_does_not_see_is_an_error(tmp_path: Path) -> None:
    lightning = load("lightning")
    model = new_model("lightning")
    optimizer = sgd(model)
    clipper = gtorch.attach(optimizer, MAX_NORM, per_tensor=True)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        automatic_optimization = False
        record: Any = None

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def configure_optimizers(self) -> Any:
            return optimizer

        def training_step(self, _: Any, step: int) -> None:
            optimizer.zero_grad()
            self.manual_backward(loss_of(self.model, 1.0))
            optimizer.step()
            if self.record:
                self.record(step + 1, clipper)

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 1, **quiet}
    options["enable_checkpointing"] = False
    module = Module()
    with pytest.raises(RuntimeError, match="GradientRecord has seen no step in this training"):
        lightning.Trainer(callbacks=[callback("lightning", tmp_path / "a.db")], **options).fit(
            module, range(STEPS)
        )
    with gradclip.Record(tmp_path / "run.db", per_tensor_every=1) as module.record:
        lightning.Trainer(**options).fit(module, range(STEPS))
    check_columns(tmp_path / "run.db", MAX_NORM)


def test_an_open_record_takes_no_options(tmp_path: Path) -> None:
    with gradclip.Record(tmp_path / "run.db") as record, pytest.raises(TypeError, match="hard are"):
        callback("lightning", record, hard=0.5)


def test_a_training_in_which_nothing_was_seen_is_an_error(tmp_path: Path) -> None:
    load("transformers")
    model = new_model("transformers")
    record = callback("transformers", tmp_path / "run.db")
    own = nn.utils.clip_grad_norm_

    class Hidden(load("transformers").TrainerCallback):  # type: ignore[misc, name-defined]
        """Puts another function there, after the record has."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            nn.utils.clip_grad_norm_ = own

    with pytest.raises(RuntimeError, match="GradientRecord has seen no clip in this training"):
        transformers_fit(model, sgd(model), [record, Hidden()])
    assert nn.utils.clip_grad_norm_ is own


# ---- trainings that end early, follow each other, have several optimizers, or processes ----


def test_the_step_in_which_lightning_fails_is_told_and_the_next_training_is_whole(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.db"
    record = callback("lightning", path, per_tensor_every=1)
    model = new_model("lightning")
    with pytest.raises(FloatingPointError):
        lightning_fit(model, failing(model), [record], gradient_clip_val=MAX_NORM)
    with History.open(path) as history:
        assert history.steps.tolist() == [1, 2]
    model = new_model("lightning")
    with gtorch.patch():
        lightning_fit(model, sgd(model), [record], gradient_clip_val=MAX_NORM)
    assert read(path) == by_hand("lightning", MAX_NORM, PREFIX["lightning"])


def failing(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer whose second step fails."""

    class Failing(torch.optim.SGD):
        taken = 0

        def step(self, closure: Any = None) -> Any:
            found = super().step(closure)
            self.taken += 1
            if self.taken == 2:
                raise FloatingPointError
            return found

    return Failing(model.parameters(), 0.1)


def test_a_training_of_transformers_that_fails_leaves_pytorch_as_it_was(tmp_path: Path) -> None:
    path, own = tmp_path / "run.db", nn.utils.clip_grad_norm_
    model = new_model("transformers")
    record = callback("transformers", path, per_tensor_every=1)
    with pytest.raises(FloatingPointError):
        transformers_fit(model, failing(model), [record])
    assert nn.utils.clip_grad_norm_ is not own  # no trainer tells that it has failed
    model = new_model("transformers")
    transformers_fit(model, sgd(model), [record], max_grad_norm=MAX_NORM)
    assert nn.utils.clip_grad_norm_ is own
    with History.open(path) as history:
        assert history.steps.tolist() == list(range(1, STEPS + 1))
        assert history.limit.tolist() == [MAX_NORM] * STEPS
    with pytest.raises(FloatingPointError):
        transformers_fit(model, failing(model), [record])
    del record
    gc.collect()
    assert nn.utils.clip_grad_norm_ is own
    gradclip.Record(path).close()


def test_after_a_training_that_failed_a_patch_stays_in_force(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    model = new_model("transformers")
    record = callback("transformers", path, per_tensor_every=1)
    with pytest.raises(FloatingPointError):
        transformers_fit(model, failing(model), [record])
    model = new_model("transformers")
    with gtorch.patch():
        transformers_fit(model, sgd(model), [record], max_grad_norm=MAX_NORM)
        assert nn.utils.clip_grad_norm_ is gtorch.clip_grad_norm_
    assert read(path) == by_hand("transformers", MAX_NORM)


def test_clipping_by_value_has_no_limit_of_the_norm(tmp_path: Path) -> None:
    model, path = new_model("lightning"), tmp_path / "run.db"
    options = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    lightning_fit(model, sgd(model), [callback("lightning", path)], **options)
    check_columns(path, None)


def test_two_optimizers_step_by_hand_in_lightning(tmp_path: Path) -> None:
    lightning = load("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 1), nn.Linear(2, 1)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(each.parameters(), 0.1) for each in (self.one, self.two)]

        def training_step(self, *_: Any) -> None:
            for model, optimizer in zip((self.one, self.two), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(model(torch.ones(2)).sum())
                optimizer.step()

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    record = callback("lightning", tmp_path / "run.db", per_tensor_every=1)
    lightning.Trainer(
        accelerator="cpu", max_epochs=1, enable_checkpointing=False, callbacks=[record], **quiet
    ).fit(Module(), range(STEPS))
    with History.open(tmp_path / "run.db") as history:
        assert history.steps.tolist() == [1, 2, 3, 4, 5, 6]
        assert history.names == ("one.weight", "one.bias", "two.weight", "two.bias")
        assert history.tensor_norms().present[:, 0].tolist() == [True, False] * 3


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("ddp_spawn", marks=pytest.mark.long)])
def test_lightning_begins_other_processes(strategy: str, tmp_path: Path) -> None:
    """The callback is there before a process has its rank."""
    load("lightning")
    path = tmp_path / "run.db"
    script = tmp_path / "train.py"
    script.write_text(_SCRIPT)
    done = run_script(script, tmp_path, str(path), strategy)
    assert "Error" not in done.stderr, done.stderr
    with History.open(path) as history:
        assert history.steps.tolist() == [1, 2, 3]


_SCRIPT = """
import sys
import lightning, torch
from gradclip.lightning import GradientRecord


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Linear(2, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, _):
        return self.model(batch).sum()


if __name__ == "__main__":
    _, path, strategy = sys.argv
    options = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "max_steps": 3}
    options |= dict.fromkeys(
        ("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False
    )
    trainer = lightning.Trainer(callbacks=[GradientRecord(path)], **options)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(8, 2)))
"""
