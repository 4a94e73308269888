"""Equinox on handwritten digits: a module split by `partition`, with BatchNorm's state and dropout's keys.

pip install equinox && python examples/train_equinox.py --steps 200
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jax_apt as apt


class Network(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        keys = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, 8, 3, stride=2, padding=1, key=keys[0])
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
        self.mlp = eqx.nn.MLP(128, 10, width_size=64, depth=1, key=keys[1])
        self.dropout = eqx.nn.Dropout(0.1)

    def __call__(self, x, moving, key):
        x, moving = self.norm(self.conv(x), moving)
        return self.mlp(self.dropout(jax.nn.relu(x).ravel(), key=key)), moving


def train(steps: int, batch: int = 64):
    digits = load_digits()
    images, labels = jnp.asarray(digits.images[:, None] / 16, jnp.float32), jnp.asarray(digits.target)
    model, moving = eqx.nn.make_with_state(Network)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(params, moving, images, key, inference):
        model = eqx.nn.inference_mode(eqx.combine(params, static), inference)
        keys = jax.random.split(key, len(images))
        return jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))(
            images, moving, keys
        )

    tx, key = optax.adam(3e-3), jax.random.key(1)
    q = apt.apt_quantize(apply, config=apt.Config(steps_per_epoch=len(images) // batch))
    state = q.init(params, moving, images[:batch], key, inference=False)

    @jax.jit
    def train_step(params, moving, opt_state, state, key, images, labels):
        def loss_fn(params, state):
            logits, updated = q.apply(params, state, moving, images, key, inference=False)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated

        (loss, moving_), grads, state = apt.value_and_grad(loss_fn, q, has_aux=True)(params, state)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), moving_, opt_state, state, loss

    opt_state, losses = tx.init(params), []
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(2), step)
        rows = jax.random.randint(key, (batch,), 0, len(images))
        params, moving, opt_state, state, loss = train_step(
            params, moving, opt_state, state, key, images[rows], labels[rows]
        )
        losses.append(float(loss))
    logits, _ = q.apply(params, state, moving, images, key, inference=True)
    return losses, float(jnp.mean(logits.argmax(-1) == labels)), q.report(state)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    losses, accuracy, report = train(parser.parse_args().steps)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy on the training set {accuracy:.3f}\n{report}")
