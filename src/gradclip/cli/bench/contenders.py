"""The libraries that ``gradclip bench`` times beside gradclip, at the jobs of gradclip.

Each gets the memory of the same arrays where it can work in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from gradclip.cli._tensorflow import import_tensorflow

Arrays = list[npt.NDArray[Any]]
Call = Callable[[], object]
Limit = Callable[[], float]
Clip = Callable[..., Any]


def norms(arrays: Arrays) -> dict[str, Call]:
    """The global norm, by each that is installed and has the dtype."""
    calls: dict[str, Call] = {}
    if arrays[0].dtype in (np.float32, np.float64):
        calls["np.linalg.norm"] = lambda: np.linalg.norm([np.linalg.norm(a) for a in arrays])
    if find_spec("torch"):
        import torch

        tensors = _torch_tensors(arrays)
        calls["PyTorch"] = lambda: torch.nn.utils.get_total_norm(tensors)
    return calls


def clips(arrays: Arrays, limit: Limit) -> dict[str, Call]:
    """Clipping float32 arrays, by each that is installed: in place where it can."""
    calls = numpy_clips(arrays, limit) | torch_clips(arrays, limit)
    for module, make in (("tensorflow", _tensorflow), ("optax", _optax)):
        if find_spec(module):
            calls.update(make(arrays, limit))
    return calls


def numpy_clips(arrays: Arrays, limit: Limit) -> dict[str, Call]:
    """Clipping in place as one writes it down for NumPy."""
    return {"NumPy loop": lambda: _numpy_loop(arrays, limit())}


def _numpy_loop(arrays: Arrays, limit: float) -> None:
    norm = np.sqrt(sum(np.vdot(array, array) for array in arrays))
    if norm > limit:
        factor = limit / norm
        for array in arrays:
            array *= factor  # noqa: PLW2901


def torch_clips(arrays: Arrays, limit: Limit) -> dict[str, Call]:
    """Clipping in place by PyTorch, if it is installed."""
    if not find_spec("torch"):
        return {}
    import torch

    parameters = []
    for tensor in _torch_tensors(arrays):
        parameters.append(torch.nn.Parameter(torch.empty_like(tensor)))
        parameters[-1].grad = tensor
    return {"PyTorch": lambda: torch.nn.utils.clip_grad_norm_(parameters, limit())}


def _torch_tensors(arrays: Arrays) -> list[Any]:
    import torch

    if arrays[0].dtype.name == "bfloat16":
        return [torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) for array in arrays]
    return [torch.from_numpy(array) for array in arrays]


def _tensorflow(arrays: Arrays, limit: Limit) -> dict[str, Call]:
    tf = import_tensorflow()
    tensors = [tf.constant(array) for array in arrays]
    # Reading one number waits for what eager mode may leave to run.
    return {"TensorFlow": lambda: float(tf.clip_by_global_norm(tensors, limit())[1])}


def _optax(arrays: Arrays, limit: Limit) -> dict[str, Call]:
    import jax
    import optax

    @jax.jit
    def clip(leaves: list[Any], max_norm: float) -> list[Any]:
        clipped: list[Any] = optax.clip_by_global_norm(max_norm).update(leaves, ())[0]
        return clipped

    leaves = [jax.numpy.array(array) for array in arrays]
    wait: Callable[[Any], Any] = jax.block_until_ready
    return {"optax, jit": lambda: wait(clip(leaves, limit()))}


def torch_steps(shapes: list[tuple[int, ...]], dtype: str, *, clipping: bool) -> dict[str, Call]:
    """clip_grad_norm_ of gradclip and of PyTorch on new gradients, if PyTorch is installed."""
    if not find_spec("torch"):
        return {}
    import torch

    from gradclip.torch import clip_grad_norm_, get_total_norm

    torch.manual_seed(0)
    gradients = [torch.randn(shape).to(getattr(torch, dtype)) for shape in shapes]
    parameters = [torch.nn.Parameter(torch.empty_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    limit = float(get_total_norm(gradients))

    def call(clip: Clip) -> Call:
        def next_call() -> object:
            nonlocal limit
            limit *= 0.999
            return clip(parameters, limit)

        return next_call if clipping else lambda: clip(parameters, 1e9)

    return {"gradclip": call(clip_grad_norm_), "PyTorch": call(torch.nn.utils.clip_grad_norm_)}


def tensorflow_clips(arrays: Arrays, limit: float, *, graph: bool) -> dict[str, Call]:
    """Clipping tensors by gradclip and by TensorFlow, if it is installed."""

    def calls(tf: Any) -> Callable[[Clip], Call]:
        tensors = [tf.constant(array) for array in arrays]
        # The limit is a tensor, as TensorFlow takes it to be: it traces a number anew.
        bound = tf.constant(limit, tf.float32)

        def call(clip: Clip) -> Call:
            function = tf.function(clip, autograph=False) if graph else clip
            return lambda: float(function(tensors, bound)[1])

        return call

    return _beside_tensorflow(calls)


def tensorflow_traces(count: int) -> dict[str, Call]:
    """Tracing a tf.function that clips so many tensors, if TensorFlow is installed."""

    def calls(tf: Any) -> Callable[[Clip], Call]:
        specs = [tf.TensorSpec([10], tf.float32) for _ in range(count)]
        return lambda clip: (
            lambda: tf.function(clip, autograph=False).get_concrete_function(specs, 1.0)
        )

    return _beside_tensorflow(calls)


def _beside_tensorflow(calls: Callable[[Any], Callable[[Clip], Call]]) -> dict[str, Call]:
    """A call of gradclip's function and of TensorFlow's own."""
    if not find_spec("tensorflow"):
        return {}
    tf = import_tensorflow()
    from gradclip.tensorflow import clip_by_global_norm

    call = calls(tf)
    return {"gradclip": call(clip_by_global_norm), "TensorFlow": call(tf.clip_by_global_norm)}


def optax_updates(arrays: Arrays, limit: float, *, jit: bool) -> dict[str, Call]:
    """Updates by gradclip.optax and by optax, if it is installed."""
    if not find_spec("optax"):
        return {}
    import jax

    wait: Callable[[Any], Any] = jax.block_until_ready
    updates = [jax.numpy.array(array) for array in arrays]

    def call(clip: Any) -> Call:
        update, state = jax.jit(clip.update) if jit else clip.update, clip.init(updates)
        return lambda: wait(update(updates, state))

    return {system: call(clip) for system, clip in _transformations(limit).items()}


def optax_examples(arrays: Arrays, limit: float) -> dict[str, Call]:
    """Clipping each example by itself under jit, by gradclip and by optax, if it is installed."""
    if not find_spec("optax"):
        return {}
    import jax
    import optax

    import gradclip.optax

    wait: Callable[[Any], Any] = jax.block_until_ready
    leaves = [jax.numpy.array(array) for array in arrays]

    def call(clip: Clip) -> Call:
        compiled = jax.jit(clip)
        return lambda: wait(compiled(leaves, limit))

    return {
        "gradclip": call(gradclip.optax.per_example_global_norm_clip),
        "optax": call(optax.per_example_global_norm_clip),
    }


def optax_donations(arrays: Arrays, limit: float) -> Iterator[dict[str, float]]:
    """Seconds of each in a jitted update that may write into what it is given."""
    if not find_spec("optax"):
        return
    import jax

    wait: Callable[[Any], Any] = jax.block_until_ready
    updates = [jax.numpy.array(array) for array in arrays]
    systems = _transformations(limit)
    compiled = {name: jax.jit(clip.update, donate_argnums=0) for name, clip in systems.items()}
    while True:
        turn = {}
        for name, update in compiled.items():
            given = wait([x.copy() for x in updates])
            state = wait(systems[name].init(updates))
            started = perf_counter()
            new = wait(update(given, state))
            turn[name] = perf_counter() - started
            del new  # before the next copies are made
        yield turn


def optax_compilations(counts: Iterable[int]) -> Iterator[dict[str, float]]:
    """Seconds of each to trace and compile an update of so many leaves, a turn for each count."""
    if not find_spec("optax"):
        return
    import jax

    for count in counts:
        updates = [jax.numpy.ones(10)] * count
        turn = {}
        for name, clip in _transformations(1.0).items():
            state = clip.init(updates)
            started = perf_counter()
            jax.jit(clip.update).lower(updates, state).compile()
            turn[name] = perf_counter() - started
        yield turn


def _transformations(limit: float) -> dict[str, Any]:
    import optax

    import gradclip.optax

    return {
        "gradclip": gradclip.optax.clip_by_global_norm(limit),
        "optax": optax.clip_by_global_norm(limit),
    }
