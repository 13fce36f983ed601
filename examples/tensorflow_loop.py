"""A training loop of TensorFlow that clips, and says how large the gradient was.

Run it: python examples/tensorflow_loop.py
"""

import tensorflow as tf

from gradclip.tensorflow import clip_by_global_norm

tf.random.set_seed(0)
x = tf.random.normal([256, 8])
y = tf.reduce_sum(x, axis=1, keepdims=True) ** 2
weights = [tf.Variable(tf.random.normal(shape) / 4) for shape in ([8, 32], [32, 1])]


@tf.function
def step() -> tuple[tf.Tensor, tf.Tensor]:
    """One step of gradient descent."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((tf.nn.relu(x @ weights[0]) @ weights[1] - y) ** 2)
    gradients, norm = clip_by_global_norm(tape.gradient(loss, weights), 10.0)
    for variable, gradient in zip(weights, gradients, strict=True):
        variable.assign_sub(0.01 * gradient)
    return loss, norm


for count in range(101):
    loss, norm = step()
    if count % 20 == 0:
        print(f"step {count:3}: loss {loss:8.3f}, the gradient's norm was {norm:7.2f}")
