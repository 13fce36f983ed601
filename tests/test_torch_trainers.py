"""`gradclip.torch` under the trainers that people use: Lightning, accelerate and transformers."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from conftest import version

if version("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)
import torch
from torch import Tensor, nn
from torch.nn import utils

import gradclip.torch as gtorch
from gradclip import limits

pytestmark = [
    pytest.mark.slow,
    # Lightning uses what PyTorch is about to drop.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is:FutureWarning"),
]
TRAINERS = ["lightning", "accelerate", "transformers"]
STEPS = 3
MAX_NORM = 0.1
SCALES = [1.0, 1e25]  # of the loss: the squares of float32 gradients overflow under the second
NAMES = ("clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Keep what trainers write: files, the environment, accelerate's singletons."""
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ):
        yield
    if importlib.util.find_spec("accelerate"):
        state = importlib.import_module("accelerate.state")
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def load(name: str) -> Any:
    """Import a trainer, or skip the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name.partition(".")[0])
        return importlib.import_module(name)


# ---- what is trained ----

TOKENS = {"input_ids": torch.arange(8) * 5 % 16, "labels": torch.arange(8) * 3 % 16}


def new_model(trainer: str) -> nn.Module:
    """The same one on each call."""
    torch.manual_seed(0)
    if trainer != "transformers":
        return nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 16))
    transformers = load("transformers")
    options: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    options |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    options |= {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**options))


def criterion(scale: float, outputs: Any, labels: Tensor, **_: Any) -> Tensor:
    logits = getattr(outputs, "logits", outputs)
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) * scale


def loss_of(model: nn.Module, scale: float) -> Tensor:
    return criterion(scale, model(TOKENS["input_ids"][None]), TOKENS["labels"])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)


def adamw(model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    # Of so large an eps that steps depend on the size of gradients.
    return torch.optim.AdamW(model.parameters(), lr=0.1, eps=0.1, fused=fused)


def by_hand(
    model: nn.Module, scales: list[float], clip: Callable[..., Tensor], optimizer: Any = None
) -> list[float]:
    """Train in a plain loop; the norms."""
    optimizer = optimizer or sgd(model)
    norms = []
    for scale in scales:
        optimizer.zero_grad()
        loss_of(model, scale).backward()
        norms.append(float(clip(model.parameters(), MAX_NORM)))
        optimizer.step()
    return norms


def assert_near(
    model: nn.Module, expected: nn.Module, rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    for each, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(each.double(), other.double(), rtol=rtol, atol=atol)


assert_same = functools.partial(assert_near, rtol=0, atol=0)


# ---- the trainers ----


def lightning_fit(
    model: nn.Module, optimizer: Any, scale: float, use_pl_optimizer: Any = None, **options: Any
) -> None:
    """Train; by manual optimization if ``use_pl_optimizer`` is given."""
    lightning = load("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.automatic_optimization = use_pl_optimizer is None

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

        def training_step(self, *_: Any) -> Tensor:
            loss = loss_of(self.model, scale)
            if use_pl_optimizer is not None:
                chosen = self.optimizers(use_pl_optimizer=use_pl_optimizer)
                chosen.zero_grad()
                self.manual_backward(loss)
                chosen.step()
            return loss

    options |= {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "barebones": True}
    lightning.Trainer(**options).fit(Module(), range(STEPS))


def accelerate_fit(
    model: nn.Module, optimizer: Any, scale: float, max_norm: float | None, accumulate: int = 1
) -> list[float]:
    """Train; the norms that clipping gives."""
    accelerator = load("accelerate").Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, optimizer = accelerator.prepare(model, optimizer)
    norms = []
    for _ in range(STEPS * accumulate):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, scale))
            if max_norm is not None:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), max_norm)))
            optimizer.step()
            optimizer.zero_grad()
    return norms


def transformers_fit(
    model: nn.Module, optimizer: Any, scale: float, max_grad_norm: float
) -> list[float]:
    """Train; the norms that the trainer logs."""
    transformers = load("transformers")
    options: dict[str, Any] = {"use_cpu": True, "max_steps": STEPS, "logging_steps": 1}
    options |= {"disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
    options |= {"lr_scheduler_type": "constant", "max_grad_norm": max_grad_norm}
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**options),
        train_dataset=[TOKENS],
        optimizers=(optimizer, None),
        compute_loss_func=functools.partial(criterion, scale),
    )
    trainer.train()
    return [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]


def fit(trainer: str, model: nn.Module, scale: float) -> list[float] | None:
    """Have a trainer clip; the norms, if it tells."""
    if trainer == "lightning":
        lightning_fit(model, sgd(model), scale, gradient_clip_val=MAX_NORM)
        return None
    trained = transformers_fit if trainer == "transformers" else accelerate_fit
    return trained(model, sgd(model), scale, MAX_NORM)


# ---- patch ----


@pytest.mark.parametrize(
    ("trainer", "scale"),
    [
        pytest.param(
            trainer,
            scale,
            marks=[pytest.mark.long] * (trainer == "transformers" and scale != SCALES[0]),
        )
        for trainer in TRAINERS
        for scale in SCALES
    ],
)
def test_patch(trainer: str, scale: float) -> None:
    torchs = [getattr(utils, name) for name in NAMES]
    ours, theirs, ours_by_hand, theirs_by_hand = (new_model(trainer) for _ in range(4))
    with gtorch.patch():
        our_norms = fit(trainer, ours, scale)
    assert [getattr(utils, name) for name in NAMES] == torchs
    their_norms = fit(trainer, theirs, scale)

    norms = by_hand(ours_by_hand, [scale] * STEPS, gtorch.clip_grad_norm_)
    assert min(norms) > MAX_NORM
    assert our_norms in (norms, None)
    assert_same(ours, ours_by_hand)
    assert their_norms in (by_hand(theirs_by_hand, [scale] * STEPS, torchs[0]), None)
    assert_same(theirs, theirs_by_hand)
    with pytest.raises(AssertionError):
        assert_same(ours, theirs)
    if scale > 1:
        assert_same(theirs, new_model(trainer))  # clipped to 0
        wide = new_model(trainer).double()  # where PyTorch's squares do not overflow
        by_hand(wide, [scale] * STEPS, torchs[0])
        assert_near(ours, wide)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_limit_that_learns_in_trainers_that_know_a_number(trainer: str) -> None:
    limit, by_itself = (limits.Average(1.01, warmup=2, limit=1e-2) for _ in range(2))
    model, expected = new_model(trainer), new_model(trainer)
    with gtorch.patch(limit=limit):
        fit(trainer, model, 1.0)
    by_hand(expected, [1.0] * STEPS, lambda every, _: gtorch.clip_grad_norm_(every, by_itself))
    assert_same(model, expected)
    assert limit.state_dict() == by_itself.state_dict()
    assert limit.state_dict()["count"] == STEPS


# ---- attach ----


def attached(trainer: str, new_optimizer: Any = sgd) -> tuple[nn.Module, Any, gtorch.Clipper]:
    model = new_model(trainer)
    optimizer = new_optimizer(model)
    return model, optimizer, gtorch.attach(optimizer, MAX_NORM)


def assert_clipped(trainer: str, model: nn.Module, clipper: Any, scale: float = 1.0) -> None:
    expected = new_model(trainer)
    norms = by_hand(expected, [scale] * STEPS, gtorch.clip_grad_norm_)
    assert (float(clipper.norm), int(clipper.steps)) == (norms[-1], STEPS)
    assert_same(model, expected)


# Two halves of equal gradients are one.
@pytest.mark.parametrize(("scale", "accumulate"), [*((scale, 1) for scale in SCALES), (1.0, 2)])
def test_attach_in_accelerate(scale: float, accumulate: int) -> None:
    model, optimizer, clipper = attached("accelerate")
    accelerate_fit(model, optimizer, scale, None, accumulate)
    assert_clipped("accelerate", model, clipper, scale)


def test_attach_to_what_accelerate_has_prepared() -> None:
    model = new_model("accelerate")
    optimizer = load("accelerate").Accelerator(cpu=True).prepare(sgd(model))
    clipper = gtorch.attach(optimizer, MAX_NORM)
    for _ in range(STEPS):
        loss_of(model, 1.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_clipped("accelerate", model, clipper)


@pytest.mark.parametrize("scale", SCALES)
def test_attach_in_transformers(scale: float) -> None:
    model, optimizer, clipper = attached("transformers")
    with gtorch.patch():  # transformers measures what it does not clip
        norms = transformers_fit(model, optimizer, scale, 0.0)
    assert norms[-1] == float(clipper.norm)
    assert_clipped("transformers", model, clipper, scale)


@pytest.mark.parametrize("use_pl_optimizer", [None, True], ids=["automatic", "manual"])
def test_attach_in_lightning_that_passes_a_closure(use_pl_optimizer: bool | None) -> None:
    model, optimizer, clipper = attached("lightning")
    message = r"^optimizer\.step\(closure=\.\.\.\) under gradclip\.torch\.attach"
    with pytest.raises(RuntimeError, match=message):
        lightning_fit(model, optimizer, 1.0, use_pl_optimizer)
    assert int(clipper.steps) == 0
    assert_same(model, new_model("lightning"))


@pytest.mark.parametrize("scale", SCALES)
def test_attach_in_lightning_with_manual_optimization(scale: float) -> None:
    model, optimizer, clipper = attached("lightning")
    lightning_fit(model, optimizer, scale, use_pl_optimizer=False)
    assert_clipped("lightning", model, clipper, scale)


# ---- mixed precision ----


def with_a_scaler(scales: list[float], half: bool) -> tuple[nn.Module, gtorch.Clipper]:
    """Train in a plain loop with a GradScaler and a fused optimizer."""
    model, optimizer, clipper = attached("lightning", adamw)
    scaler = torch.amp.GradScaler("cpu")
    for scale in scales:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = loss_of(model, scale)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return model, clipper


def test_attach_with_a_scaler() -> None:
    scales = [1.0, 100.0, math.inf, 0.001, 10.0]
    model, clipper = with_a_scaler(scales, half=False)
    expected, unclipped = new_model("lightning"), new_model("lightning")
    scales.remove(math.inf)  # the scaler skips it
    norms = by_hand(expected, scales, gtorch.clip_grad_norm_, adamw(expected, fused=False))
    by_hand(unclipped, scales, lambda *_: torch.zeros(()), adamw(unclipped, fused=False))
    assert float(clipper.norm) == pytest.approx(norms[-1], rel=1e-5)
    assert (int(clipper.steps), int(clipper.clipped_steps)) == (4, 3)
    assert_near(model, expected)
    with pytest.raises(AssertionError):
        assert_near(model, unclipped)


def test_lightning_does_not_clip_for_a_fused_optimizer() -> None:
    """Lightning#21435; on the CPU it takes bfloat16 for float16, and refuses all the same."""
    model = new_model("lightning")
    options = {"precision": "16-mixed", "gradient_clip_val": MAX_NORM}
    with (
        pytest.warns(UserWarning, match="fp16 is not supported on CPU"),
        pytest.raises(RuntimeError, match="AdamW, does not allow for gradient clipping"),
    ):
        lightning_fit(model, adamw(model), 1.0, **options)


def test_attach_in_lightning_with_a_scaler() -> None:
    plugins = load("lightning.pytorch.plugins")
    precision = plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    model, optimizer, clipper = attached("lightning", adamw)
    lightning_fit(model, optimizer, 1.0, plugins=[precision])
    expected, in_a_loop = with_a_scaler([1.0] * STEPS, half=True)
    assert (clipper.norm, int(clipper.clipped_steps)) == (in_a_loop.norm, STEPS)
    assert_same(model, expected)
