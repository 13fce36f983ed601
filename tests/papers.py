"""The rules of the papers, written from their formulas and apart from gradclip's own code.

Each is told a norm and gives the limit that its paper scales to; inf where it does not clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np


class ZClip:
    """arXiv:2504.02507, algorithm 1, with the constants and names of the paper's own code."""

    def __init__(
        self,
        alpha: float = 0.97,
        z_thresh: float = 2.5,
        warmup_steps: int = 25,
        clip_option: str = "adaptive_scaling",
        max_grad_norm: float = math.inf,
        eps: float = 1e-6,
    ) -> None:
        self.alpha, self.z_thresh, self.warmup_steps = alpha, z_thresh, warmup_steps
        self.clip_option, self.max_grad_norm, self.eps = clip_option, max_grad_norm, eps
        self.buffer: list[float] = []
        self.mean = self.var = math.nan

    def __call__(self, norm: float) -> float:
        if len(self.buffer) < self.warmup_steps:
            self.buffer.append(norm)
            self.mean = math.fsum(self.buffer) / len(self.buffer)
            squares = [(x - self.mean) ** 2 for x in self.buffer]
            self.var = math.fsum(squares) / len(self.buffer)
            return self.max_grad_norm
        std = math.sqrt(self.var)
        z = (norm - self.mean) / (std + self.eps)
        clipped = norm
        if z > self.z_thresh:
            clipped = {
                "adaptive_scaling": self.mean + self.z_thresh * std / (z / self.z_thresh),
                "edge": self.mean + self.z_thresh * std,
                "mean": self.mean,
            }[self.clip_option]
        self.mean = self.alpha * self.mean + (1 - self.alpha) * clipped
        self.var = self.alpha * self.var + (1 - self.alpha) * (clipped - self.mean) ** 2
        return min(clipped if z > self.z_thresh else math.inf, self.max_grad_norm)


class AutoClip:
    """arXiv:2007.14469, algorithm 1: the p-th percentile of all norms so far."""

    def __init__(self, p: float = 10.0, history: int | None = None, factor: float = 1.0) -> None:
        self.p, self.history, self.factor = p, history, factor
        self.norms: list[float] = []

    def __call__(self, norm: float) -> float:
        self.norms.append(norm)
        latest = self.norms if self.history is None else self.norms[-self.history :]
        return self.factor * float(np.percentile(latest, self.p))


class ScaledAdam:
    """icefall's optimizer: twice the median of the latest 100 norms."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def __call__(self, norm: float) -> float:
        self.norms.append(norm)
        return 2.0 * float(np.median(self.norms[-100:]))


class MeanOfNorms:
    """arXiv:1211.5063, section 3.2: a multiple of the average norm; here a moving one."""

    def __init__(self, factor: float, decay: float = 0.98, warmup: int = 100) -> None:
        self.factor, self.decay, self.warmup = factor, decay, warmup
        self.begun: list[float] = []
        self.average = math.nan

    def __call__(self, norm: float) -> float:
        if len(self.begun) < self.warmup:
            self.begun.append(norm)
            self.average = math.fsum(self.begun) / len(self.begun)
            return 1.0
        limit = self.factor * self.average
        self.average = self.decay * self.average + (1 - self.decay) * min(norm, limit)
        return limit


class LogDeviations:
    """arXiv:1804.09849, section 3.1: of the logarithm; above four deviations a step is skipped."""

    def __init__(self, deviations: float = 4.0, alpha: float = 0.97, warmup: int = 25) -> None:
        self.deviations, self.alpha, self.warmup = deviations, alpha, warmup
        self.begun: list[float] = []
        self.mean = self.var = math.nan

    def __call__(self, norm: float) -> float:
        log = math.log(norm)
        if len(self.begun) < self.warmup:
            self.begun.append(log)
            self.mean = math.fsum(self.begun) / len(self.begun)
            self.var = math.fsum((x - self.mean) ** 2 for x in self.begun) / len(self.begun)
            return math.inf
        std = math.sqrt(self.var)
        if (log - self.mean) / (std + 1e-6) > self.deviations:
            return math.exp(self.mean + self.deviations * std)  # and nothing is learnt
        self.mean = self.alpha * self.mean + (1 - self.alpha) * log
        self.var = self.alpha * self.var + (1 - self.alpha) * (log - self.mean) ** 2
        return math.inf


class AdaGC:
    """arXiv:2502.11034, algorithm 1, of the norms of all tensors; gives what each is scaled by."""

    def __init__(
        self, relative: float = 1.05, beta: float = 0.98, start: int = 100, absolute: float = 1.0
    ) -> None:
        self.relative, self.beta, self.start, self.absolute = relative, beta, start, absolute
        self.steps = 0
        self.gamma: list[float] = []

    def __call__(self, norms: list[float]) -> list[float]:
        if self.steps < self.start:
            h = min(self.absolute / math.sqrt(math.fsum(x * x for x in norms)), 1.0)
            clipped = [h * x for x in norms]
            self.gamma = list(map(min, self.gamma, clipped)) if self.gamma else clipped
            self.steps += 1
            return [h] * len(norms)
        factors = [min(self.relative * g / x, 1.0) for g, x in zip(self.gamma, norms, strict=True)]
        self.gamma = [
            self.beta * g + (1 - self.beta) * h * x
            for g, h, x in zip(self.gamma, factors, norms, strict=True)
        ]
        return factors


Rule = Callable[[float], float]


def norms_of(seed: int, count: int) -> list[float]:
    """Norms as of a training, with outbursts, drifts, plateaus, leaps over powers of ten."""
    rng = np.random.default_rng(seed)
    level = 10.0 ** rng.uniform(-1, 2)
    found: list[float] = []
    while len(found) < count:
        length = int(rng.integers(1, 80))
        way: Any = rng.integers(0, 6)
        if way == 0:  # a plateau
            found += [level] * length
        elif way == 1:  # an outburst
            found += (level * 10.0 ** rng.uniform(0, 12, 1 + length // 20)).tolist()
        elif way == 2:  # a lull
            found += (level * 10.0 ** -rng.uniform(0, 6, 1 + length // 20)).tolist()
        else:
            found += (level * rng.lognormal(0, rng.choice([0.01, 0.3, 1.0]), length)).tolist()
        level *= float(rng.lognormal(0, 0.2))
    return found[:count]
