"""`GradientRecord` in real trainings of Lightning and transformers: what is in the file is so."""

from __future__ import annotations

import importlib
import math
import sqlite3
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
from gradclip.record import History
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


def lightning_fit(model: nn.Module, optimizer: Any, callbacks: Any, **options: Any) -> None:
    lightning = load("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def configure_optimizers(self) -> Any:
            return optimizer

        def training_step(self, batch: int, *_: Any) -> torch.Tensor:
            return loss_of(self.model, math.nan if batch == options.get("bad") else 1.0)

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    known = {name: x for name, x in options.items() if name != "bad"}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        enable_checkpointing=False,
        callbacks=callbacks,
        **quiet,
        **known,
    )
    trainer.fit(Module(), range(STEPS))


def transformers_fit(model: nn.Module, optimizer: Any, callbacks: Any, **options: Any) -> Any:
    transformers = load("transformers")
    given = {"use_cpu": True, "max_steps": STEPS, "logging_steps": 1, "disable_tqdm": True}
    given |= {"report_to": "none", "save_strategy": "no", "lr_scheduler_type": "constant"}
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**given, **options),
        train_dataset=[TOKENS],
        optimizers=(optimizer, None),
        compute_loss_func=lambda *args, **more: criterion(1.0, *args, **more),
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
    rows = list(sqlite3.connect(path).execute('SELECT norm, "limit", factor, action FROM steps'))
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


def test_a_bad_batch_in_lightning_is_named(tmp_path: Path) -> None:
    model, path = new_model("lightning"), tmp_path / "run.db"
    record = callback("lightning", path)
    lightning_fit(model, sgd(model), [record], gradient_clip_val=MAX_NORM, bad=1)
    with History.open(path) as history:
        assert history.nonfinite.tolist()[:2] == [0, 2]
        assert 2 in history.tensor_steps.tolist()


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
