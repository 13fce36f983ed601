"""A training loop in NumPy: fit a line, clip every step, stop at the first NaN.

Run it: python examples/numpy_loop.py
"""

import numpy as np

import gradclip

rng = np.random.default_rng(0)
x = rng.standard_normal(1000)
y = 3 * x - 2 + 0.1 * rng.standard_normal(1000)
y[0] = 1e6  # an outlier, whose gradient alone would throw the fit off

weights = {"slope": np.zeros(1), "offset": np.zeros(1)}
for step in range(200):
    batch = rng.integers(0, x.size, 32)
    error = weights["slope"] * x[batch] + weights["offset"] - y[batch]
    gradients = {"slope": np.array([error @ x[batch]]) / 32, "offset": error.mean(keepdims=True)}
    norm = gradclip.clip_by_global_norm_(gradients, clip_norm=1.0, on_nonfinite="raise")
    for name in weights:
        weights[name] -= 0.1 * gradients[name]
    if norm > 100:
        print(f"step {step}: the gradient's norm was {norm:.0f}, clipped to 1")

print(f"slope {weights['slope'][0]:.2f}, offset {weights['offset'][0]:.2f}")
