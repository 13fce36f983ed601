"""The network of `gradclip demo`, what it reads, and how it is trained."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import gradclip

HIDDEN = 128
TIME_STEPS = 128
BATCH = 16
WARM_UP_STEPS = 100
LAST_STEPS = 50
TEMPERATURE = 0.5
SAMPLE_LENGTH = 240

Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]


class Network(NamedTuple):
    """The weights of the network, or the gradient with respect to them."""

    w_input: Array
    w_hidden: Array
    b_hidden: Array
    w_output: Array
    b_output: Array


class Batch(NamedTuple):
    """Characters, each of shape (time, batch)."""

    inputs: Codes
    targets: Codes
    scale: float = 1.0  # of the inputs


@dataclass
class Run:
    """What one training run left behind, one entry per step."""

    network: Network
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    left: list[float] = field(default_factory=list)  # norms after clipping
    limits: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    clip_seconds: list[float] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """Whether the loss stayed finite, in words."""
        if math.isfinite(self.losses[-1]):
            return "finite to the end"
        return f"{'NaN' if math.isnan(self.losses[-1]) else 'inf'} from step {len(self.losses)}"


def documentation() -> str:
    """The reference pages behind ``help()``, as one line of ASCII without rulers."""
    from pydoc_data.topics import topics

    pages = " ".join(topics[name] for name in sorted(topics))
    ascii_only = pages.encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"(\W)\1{3,}", " ", ascii_only).split())


def unigram_entropy(text: str) -> float:
    """The loss, in nats, of a model that knows the frequency of each character and no more."""
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log(share) for share in shares)


def initial_network(vocabulary: int, rng: np.random.Generator, radius: float) -> Network:
    """Draw the weights; the recurrent ones are a random rotation times ``radius``."""
    rotation = np.linalg.qr(rng.standard_normal((HIDDEN, HIDDEN)))[0]
    return Network(
        w_input=(0.5 * rng.standard_normal((vocabulary, HIDDEN))).astype(np.float32),
        w_hidden=(radius * rotation).astype(np.float32),
        b_hidden=np.zeros(HIDDEN, np.float32),
        w_output=(rng.standard_normal((HIDDEN, vocabulary)) / HIDDEN**0.5).astype(np.float32),
        b_output=np.zeros(vocabulary, np.float32),
    )


def windows(codes: Codes, count: int, seed: int) -> Iterator[Batch]:
    """Batches of windows from random places of the text."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        starts = rng.integers(0, len(codes) - TIME_STEPS, BATCH)
        window = codes[starts + np.arange(TIME_STEPS + 1)[:, None]]
        yield Batch(window[:-1], window[1:])


def train(
    start: Network,
    batches: Iterable[Batch],
    learning_rate: float,
    clip_norm: Any,
    advance: Callable[[float], None],
) -> Run:
    """Train a copy of ``start`` by gradient descent, until a loss is not finite.

    With ``clip_norm`` inf the gradients are only measured; it may be a limit that learns. Where
    that has a step skipped the gradients are zeros, which here is the same.
    """
    result = Run(Network(*(weights.copy() for weights in start)))
    for step, batch in enumerate(batches, start=1):
        started = perf_counter()
        loss, gradients = loss_and_gradients(result.network, *batch)
        clip_started = perf_counter()
        norm = gradclip.clip_by_global_norm_(gradients, clip_norm, on_nonfinite="keep")
        clip_ended = perf_counter()
        rate = learning_rate * min(1.0, step / WARM_UP_STEPS)
        for weights, gradient in zip(result.network, gradients, strict=True):
            np.subtract(weights, rate * gradient, out=weights)
        result.step_seconds.append(perf_counter() - started)
        result.clip_seconds.append(clip_ended - clip_started)
        result.losses.append(loss)
        result.norms.append(float(norm))
        result.left.append(float(gradclip.global_norm(gradients)))
        result.limits.append(_in_force(clip_norm))
        advance(1)
        if not math.isfinite(loss):
            break
    return result


def _in_force(clip_norm: Any) -> float:
    """The limit of the latest step; NaN if each tensor has one of its own."""
    latest = getattr(clip_norm, "last_limit", clip_norm)
    return float(latest) if np.ndim(latest) == 0 else math.nan


def loss_and_gradients(
    network: Network, inputs: Codes, targets: Codes, scale: float = 1.0
) -> tuple[float, Network]:
    """The mean cross-entropy in nats, and its gradient by backpropagation through time."""
    hidden = hidden_states(network, inputs, scale)
    before, after = hidden[:-1], hidden[1:]
    loss, d_logits = cross_entropy(after @ network.w_output + network.b_output, targets)
    d_inputs = backward(network.w_hidden, after, d_logits @ network.w_output.T.copy())
    one_hot = (inputs[..., None] == np.arange(len(network.w_input))).astype(after.dtype)
    if scale != 1:
        one_hot *= scale
    return loss, Network(
        w_input=_sum_over_time(one_hot, d_inputs),
        w_hidden=_sum_over_time(before, d_inputs),
        b_hidden=d_inputs.sum(axis=(0, 1)),
        w_output=_sum_over_time(after, d_logits),
        b_output=d_logits.sum(axis=(0, 1)),
    )


def _sum_over_time(left: Array, right: Array) -> Array:
    # One product of all time steps is large enough for OpenBLAS to start threads, which on a busy
    # machine wait for each other: a step then took four times as long.
    total: Array = left[0].T @ right[0]
    for left_now, right_now in zip(left[1:], right[1:], strict=True):
        total += left_now.T @ right_now
    return total


def hidden_states(network: Network, inputs: Codes, scale: float = 1.0) -> Array:
    """The state before the first time step, zero, and after each: (time + 1, batch, hidden)."""
    drive = scale * network.w_input[inputs] + network.b_hidden
    hidden = np.zeros((len(inputs) + 1, *drive.shape[1:]), drive.dtype)
    for time in range(len(inputs)):
        hidden[time + 1] = np.maximum(hidden[time] @ network.w_hidden + drive[time], 0)
    return hidden


def cross_entropy(logits: Array, targets: Codes) -> tuple[float, Array]:
    """The mean loss and its gradient with respect to the logits, of shape (time, batch, code)."""
    right = targets[..., None]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    sums = exponentials.sum(axis=-1, keepdims=True)
    loss = float(np.mean(np.log(sums) - np.take_along_axis(shifted, right, axis=-1)))
    gradient = exponentials / sums
    gradient -= right == np.arange(logits.shape[-1])
    return loss, gradient / targets.size


def backward(w_hidden: Array, hidden: Array, d_hidden: Array) -> Array:
    """Carry the gradient back through time, to what enters each ReLU."""
    d_inputs = np.empty_like(d_hidden)
    d_later = np.zeros_like(d_hidden[0])
    # Laid out anew once: a product with a transposed view takes twice as long, at every step.
    w_back = w_hidden.T.copy()
    for time in reversed(range(len(hidden))):
        d_inputs[time] = (d_hidden[time] + d_later) * (hidden[time] > 0)
        d_later = d_inputs[time] @ w_back
    return d_inputs


def sample(network: Network, alphabet: list[str], rng: np.random.Generator) -> str:
    """Let the network write on from "The "."""
    codes = [alphabet.index(letter) for letter in "The "]
    for _ in range(SAMPLE_LENGTH):
        state = hidden_states(network, np.array(codes)[:, None])[-1, 0]
        logits = (state @ network.w_output + network.b_output) / TEMPERATURE
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        codes.append(int(np.argmax(logits + rng.gumbel(size=len(alphabet)))))
    return "".join(alphabet[code] for code in codes)
