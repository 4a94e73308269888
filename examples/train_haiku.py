"""Haiku on handwritten digits: `transform_with_state`, BatchNorm's state and dropout's keys included.

pip install dm-haiku && python examples/train_haiku.py --steps 200
"""

import argparse

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jax_apt as apt


def network(x, train: bool):
    x = hk.Conv2D(8, 3, stride=2, with_bias=False)(x)
    x = hk.BatchNorm(True, True, decay_rate=0.9)(x, is_training=train)
    x = hk.Flatten()(jax.nn.relu(x))
    dropout = {"dropout_rate": 0.1, "rng": hk.next_rng_key()} if train else {}
    return hk.nets.MLP([64, 10])(x, **dropout)


def train(steps: int, batch: int = 64):
    digits = load_digits()
    images, labels = jnp.asarray(digits.images[..., None] / 16, jnp.float32), jnp.asarray(digits.target)
    transformed, tx, key = hk.transform_with_state(network), optax.adam(3e-3), jax.random.key(0)
    params, moving = transformed.init(key, images[:1], train=True)

    q = apt.apt_quantize(transformed.apply, config=apt.Config(steps_per_epoch=len(images) // batch))
    state = q.init(params, moving, key, images[:batch], train=True)

    @jax.jit
    def train_step(params, moving, opt_state, state, key, images, labels):
        def loss_fn(params, state):
            logits, updated = q.apply(params, state, moving, key, images, train=True)
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
    logits, _ = q.apply(params, state, moving, key, images, train=False)
    return losses, float(jnp.mean(logits.argmax(-1) == labels)), q.report(state)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    losses, accuracy, report = train(parser.parse_args().steps)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy on the training set {accuracy:.3f}\n{report}")
