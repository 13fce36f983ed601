"""What ``gradclip bench`` measures: the cases, and what gradclip is held to in each."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

from gradclip._clip import survey
from gradclip.cli.bench import contenders, each, fresh, jobs, learning, recording, training
from gradclip.cli.bench.builders import (
    Bar,
    Case,
    Cases,
    Fresh,
    Turns,
    beside_optax,
    beside_tensorflow,
    beside_torch,
    donated_to_optax,
    in_place,
    in_training,
    norm,
    of_dtensors,
    of_examples,
    on_busy_machine,
    on_busy_machine_under_xla,
    optax_compilation,
    tensorflow_trace,
)
from gradclip.cli.bench.jobs import Shapes

LARGE, HALF, QUICK = jobs.LARGE, 200_000_000, 128_000_000

_LARGE_SHAPES: Shapes = [(5_000_000,)] * 10
_SMALL_SHAPES: Shapes = [(1000,)] * 1000
_BUSY_SHAPES: Shapes = [(2_500_000,)] * 4
_BF16_SHAPES: Shapes = [(256,)] * 500
_NORM, _WIDE = (768,), 4 * 768
_ATTENTION: Shapes = [(768, 3 * 768), (3 * 768,), (768, 768), _NORM]
_PERCEPTRON: Shapes = [(768, _WIDE), (_WIDE,), (_WIDE, 768), _NORM]
_BLOCK: Shapes = [_NORM, _NORM, *_ATTENTION, _NORM, _NORM, *_PERCEPTRON]
_GPT2_SHAPES: Shapes = [(50257, 768), (1024, 768), *(_BLOCK * 12), _NORM, _NORM]
_10000_SHAPES: Shapes = [(16,)] * 10000
_EACH, _ALL = learning.tensor_by_tensor, "the global clip"
_NORMS = each.norms_of
_STEP, _INSIDE = training.steps_that_clip, training.steps_that_clip_inside

CASES: Cases = {
    "norm-fp32": norm("float32", LARGE, 1.1),
    "norm-fp64": norm("float64", LARGE, 1.1),
    "norm-bf16": norm("bfloat16", HALF, 1.1),
    "norm-fp16": norm("float16", HALF, 1.2),
    "keep": Case(
        "in place, nothing to clip, 400 MB fp32",
        Bar(1.1, "R"),
        partial(jobs.keep, jobs.large, [jobs.reading, contenders.clips]),
    ),
    "clip": in_place("float32", LARGE, 1.1, contenders.clips),
    "clip-fp64": in_place("float64", LARGE, 1.15, contenders.torch_clips),
    "clip-bf16": in_place("bfloat16", HALF, 1.2, contenders.torch_clips),
    "exact": Case(
        "exact accumulator, 400 MB fp32", Bar(1.1, "R"), partial(jobs.measured, survey, jobs.large)
    ),
    "exact-1-thread": Case(
        "exact accumulator, 1 thread, 400 MB fp32",
        Bar(1.1, "R"),
        partial(jobs.measured, survey, jobs.large),
        threads=1,
    ),
    "small-keep": Case(
        "in place, nothing to clip, 1000 x 1000",
        Bar(0.15, "NumPy loop"),
        partial(jobs.keep, jobs.small, [contenders.clips]),
    ),
    "small-clip": Case(
        "in place, clipping, 1000 x 1000",
        Bar(0.2, "NumPy loop"),
        partial(jobs.clip, jobs.small, [contenders.clips]),
    ),
    "busy-small": on_busy_machine("in place, clipping, 1000 x 1000", _SMALL_SHAPES),
    "busy-large": on_busy_machine("in place, clipping, 4 x 10 MB", _BUSY_SHAPES),
    "busy-torch-small": on_busy_machine(
        "PyTorch, clipping, 1000 x 1000", _SMALL_SHAPES, torch=True
    ),
    "busy-torch-large": on_busy_machine("PyTorch, clipping, 4 x 10 MB", _BUSY_SHAPES, torch=True),
    "busy-jit-small": on_busy_machine_under_xla(
        "optax under jit, clipping, 1000 x 1000", _SMALL_SHAPES
    ),
    "busy-jit-large": on_busy_machine_under_xla(
        "optax under jit, clipping, 4 x 10 MB", _BUSY_SHAPES
    ),
    "tf-eager-keep": beside_tensorflow(
        "TensorFlow eager, nothing to clip, 200 MB", 0.35, _LARGE_SHAPES
    ),
    "tf-eager-clip": beside_tensorflow(
        "TensorFlow eager, clipping, 200 MB", 0.9, _LARGE_SHAPES, clipping=True
    ),
    "tf-small-keep": beside_tensorflow(
        "TensorFlow eager, nothing to clip, 1000 x 1000", 0.1, _SMALL_SHAPES
    ),
    "tf-small-clip": beside_tensorflow(
        "TensorFlow eager, clipping, 1000 x 1000", 0.35, _SMALL_SHAPES, clipping=True
    ),
    "tf-graph-keep": beside_tensorflow(
        "tf.function, nothing to clip, 200 MB", 1.1, _LARGE_SHAPES, graph=True
    ),
    "tf-graph-clip": beside_tensorflow(
        "tf.function, clipping, 200 MB", 1.05, _LARGE_SHAPES, graph=True, clipping=True
    ),
    "tf-gpt2-keep": beside_tensorflow(
        "tf.function, nothing to clip, GPT-2: 148 tensors", 1.1, _GPT2_SHAPES, graph=True
    ),
    "tf-gpt2-clip": beside_tensorflow(
        "tf.function, clipping, GPT-2: 148 tensors", 1.1, _GPT2_SHAPES, graph=True, clipping=True
    ),
    "tf-trace": Case("tf.function, tracing 3000 tensors", Bar(0.5, "TensorFlow"), tensorflow_trace),
    "torch-keep": beside_torch("PyTorch, nothing to clip, 400 MB fp32", 0.5, [(10_000_000,)] * 10),
    "torch-clip": beside_torch(
        "PyTorch, clipping, 400 MB fp32", 1.0, [(10_000_000,)] * 10, clipping=True
    ),
    "torch-bf16": beside_torch(
        "PyTorch, nothing to clip, 160 MB bf16", 0.4, [(8_000_000,)] * 10, dtype="bfloat16"
    ),
    "torch-fp16": beside_torch(
        "PyTorch, nothing to clip, 160 MB fp16", 0.2, [(8_000_000,)] * 10, dtype="float16"
    ),
    "torch-gpt2": beside_torch("PyTorch, nothing to clip, GPT-2: 148 tensors", 0.5, _GPT2_SHAPES),
    "torch-small-keep": beside_torch("PyTorch, nothing to clip, 1000 x 1000", 0.1, _SMALL_SHAPES),
    "torch-small-clip": beside_torch(
        "PyTorch, clipping, 1000 x 1000", 0.1, _SMALL_SHAPES, clipping=True
    ),
    "torch-many-keep": beside_torch("PyTorch, nothing to clip, 10000 x 16", 0.12, _10000_SHAPES),
    "torch-many-clip": beside_torch(
        "PyTorch, clipping, 10000 x 16", 0.12, _10000_SHAPES, clipping=True
    ),
    "torch-step-keep": in_training(
        "clip_grad_norm_ in training, nothing to clip", 0.5, _STEP, clipping=False
    ),
    "torch-step-clip": in_training("clip_grad_norm_ in training", 0.6, _STEP, clipping=True),
    "torch-attach-keep": in_training(
        "attach in training, nothing to clip", 0.3, _INSIDE, clipping=False
    ),
    "torch-attach-clip": in_training("attach in training", 0.45, _INSIDE, clipping=True),
    **learning.at_every_door(),
    "each-gpt2-keep": _EACH("GPT-2: 148 tensors", 1.1, _ALL, _GPT2_SHAPES, clipping=False),
    "each-gpt2-clip": _EACH("GPT-2: 148 tensors", 1.2, _ALL, _GPT2_SHAPES, clipping=True),
    "each-small-keep": _EACH("1000 x 1000", 1.5, _ALL, _SMALL_SHAPES, clipping=False),
    "each-small-clip": _EACH("1000 x 1000", 1.5, _ALL, _SMALL_SHAPES, clipping=True),
    "each-small-loop": _EACH("1000 x 1000", 0.2, "PyTorch, each", _SMALL_SHAPES, clipping=False),
    "norms-gpt2": _NORMS("GPT-2: 148 tensors", 1.05, "global_norm", _GPT2_SHAPES),
    "norms-gpt2-loop": _NORMS("GPT-2: 148 tensors", 0.2, each.LOOP, _GPT2_SHAPES),
    "norms-gpt2-foreach": _NORMS("GPT-2: 148 tensors", 0.67, each.FOREACH, _GPT2_SHAPES),
    "norms-small": _NORMS("1000 x 1000", 1.3, "global_norm", _SMALL_SHAPES),
    "norms-small-loop": _NORMS("1000 x 1000", 0.2, each.LOOP, _SMALL_SHAPES),
    "norms-small-foreach": _NORMS("1000 x 1000", 0.67, each.FOREACH, _SMALL_SHAPES),
    "dtensor-100": of_dtensors(100),
    "dtensor-1000": of_dtensors(1000),
    "optax-donated-keep": donated_to_optax(
        "optax under jit, donated, nothing to clip, 400 MB fp32", 0.8, clipping=False
    ),
    "optax-donated-clip": donated_to_optax(
        "optax under jit, donated, clipping, 400 MB fp32", 1.3, clipping=True
    ),
    "optax-small-keep": beside_optax("optax, nothing to clip, 1000 x 1000", 0.2, _SMALL_SHAPES),
    "optax-small-clip": beside_optax(
        "optax, clipping, 1000 x 1000", 0.2, _SMALL_SHAPES, clipping=True
    ),
    "optax-bf16-keep": beside_optax(
        "optax under jit, nothing to clip, bf16, 500 x 256",
        1.5,
        _BF16_SHAPES,
        dtype="bfloat16",
        jit=True,
    ),
    "optax-bf16-clip": beside_optax(
        "optax under jit, clipping, bf16, 500 x 256",
        1.5,
        _BF16_SHAPES,
        dtype="bfloat16",
        jit=True,
        clipping=True,
    ),
    "optax-examples": of_examples("optax under jit, 256 examples of 100,000, one leaf", [100_000]),
    "optax-examples-3": of_examples(
        "optax under jit, 256 examples of 100,000, three leaves", [50_000, 40_000, 10_000]
    ),
    "optax-compile": Turns(
        "optax under jit, compiling 3000 leaves", Bar(0.2, "optax"), optax_compilation
    ),
    "record": recording.in_a_step(),
    "merge": Case("adding the totals of 100,000 workers", Bar(None, "ms"), jobs.merging),
    "import": Fresh("import, beyond NumPy's own", Bar(50, "ms"), fresh.IMPORT, 21),
    "first-call": Fresh("first call", Bar(10, "ms"), fresh.FIRST_CALL, 21),
    "memory-in-place": Fresh(
        "memory, in place, 400 MB fp32",
        Bar(1, "MB"),
        fresh.memory("clip_by_global_norm_", LARGE, 0),
    ),
    "memory-new": Fresh(
        "memory beyond the outputs, 400 MB fp32",
        Bar(1, "MB"),
        fresh.memory("clip_by_global_norm", LARGE, LARGE),
    ),
    "pages-written": Fresh(
        "written in place, nothing to clip", Bar(0, "kB"), fresh.written(LARGE, limit=1e9)
    ),
}


def cases_of(*, quick: bool) -> Cases:
    """All cases, or the few that show a user what to expect: beyond caches, in seconds."""
    return _quick() if quick else CASES


def _quick() -> Cases:
    found = {
        "norm-fp32": norm("float32", QUICK, 1.1),
        "norm-bf16": norm("bfloat16", QUICK, 1.1),
        "clip": in_place("float32", QUICK, 1.1),
        "small-clip": Case(
            "in place, clipping, 1000 x 1000",
            Bar(0.2, "NumPy loop"),
            partial(jobs.clip, jobs.small, [contenders.numpy_clips]),
        ),
        "framework": _beside_some_framework(),
    }
    return {name: case._replace(repeats=9) for name, case in found.items() if case}


def _beside_some_framework() -> Case | None:
    """Beside the first of these that is installed."""
    shapes: Shapes = [(3_200_000,)] * 10
    if find_spec("torch"):
        return beside_torch("PyTorch, nothing to clip, 128 MB fp32", 0.5, shapes)
    if find_spec("tensorflow"):
        return beside_tensorflow("TensorFlow eager, nothing to clip, 128 MB", 0.35, shapes)
    if find_spec("optax"):
        return beside_optax("optax, nothing to clip, 1000 x 1000", 0.2, _SMALL_SHAPES)
    return None
