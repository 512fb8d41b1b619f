"""PRM in JAX: a Flax network on digits of which 40% have a wrong label, beside AdamW.

pip install "popriskmin[jax]" flax scikit-learn
python examples/with_jax.py
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

from popriskmin.optax import mask_stats, prm

TRAINING, BATCH = 1000, 50


def digits(wrong: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and their labels in random order, the first ones spoilt with this probability."""
    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    x, y = images[order].astype(np.float32) / 16, labels[order]
    spoilt = rng.random(TRAINING) < wrong
    y[:TRAINING][spoilt] = rng.integers(10, size=spoilt.sum())
    return x, y


class Network(nn.Module):
    """One hidden layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ten logits for each image."""
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


def train(solver: optax.GradientTransformationExtraArgs, epochs: int) -> tuple[float, optax.OptState]:
    """Return the accuracy on clean test images, and the optimizer's state."""
    x, y = digits()
    network = Network()
    params = network.init(jax.random.key(0), x[:1])
    state = solver.init(params)

    def loss(params: optax.Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = network.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params: optax.Params, state: optax.OptState, images: jax.Array, labels: jax.Array):  # type: ignore[no-untyped-def]
        grads = jax.grad(loss)(params, images, labels)
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(1)
    for _ in range(epochs):
        for rows in rng.permutation(TRAINING).reshape(-1, BATCH):
            params, state = step(params, state, x[rows], y[rows])
    right = jnp.argmax(network.apply(params, x[TRAINING:]), axis=1) == y[TRAINING:]
    return float(right.mean()), state


def main() -> None:
    """Train with both and print a line for each."""
    parser = argparse.ArgumentParser(description="PRM in JAX, beside AdamW.")
    parser.add_argument("--epochs", type=int, default=30)
    epochs = parser.parse_args().epochs
    schedule = optax.cosine_decay_schedule(1e-2, epochs * TRAINING // BATCH)
    accuracy, _ = train(optax.adamw(schedule, weight_decay=0.01), epochs)
    print(f"adamw test accuracy {accuracy:.3f}")
    accuracy, state = train(prm(schedule, weight_decay=0.01), epochs)
    stats = mask_stats(state)
    print(f"prm   test accuracy {accuracy:.3f}, mean q {stats['mean_q']:.3f}")


if __name__ == "__main__":
    main()
