"""Train a network on handwritten digits with Keras, and see how often its gradient is clipped.

Run it: python examples/keras_digits.py; or on another backend: KERAS_BACKEND=jax python ...
"""

import keras
from sklearn.datasets import load_digits

import gradclip.keras

x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32")

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10, "softmax")]
)
model.compile(
    optimizer=gradclip.keras.Adam(1e-2, global_clipnorm=0.5),
    loss="sparse_categorical_crossentropy",
    metrics=["accuracy"],
)
history = model.fit(
    x, y, epochs=5, validation_split=0.2, verbose=0, callbacks=[gradclip.keras.GlobalNorm()]
).history

for epoch, (norm, share) in enumerate(zip(history["global_norm"], history["clipped"], strict=True)):
    print(
        f"epoch {epoch}: the gradient's mean norm was {norm:.2f}; clipped in {share:.0%} of steps"
    )
print(f"accuracy on digits not trained on: {history['val_accuracy'][-1]:.0%}")
