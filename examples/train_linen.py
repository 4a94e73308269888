"""Flax Linen on handwritten digits: BatchNorm, dropout, layers in a scan that are recomputed backwards.

python examples/train_linen.py --steps 200
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import jax_apt as apt


class Block(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
        h = nn.relu(nn.Dense(x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dropout(0.1, deterministic=not self.train)(h), None


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(8, (3, 3), strides=2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dense(32)(x.reshape(x.shape[0], -1))
        split = {"params": True, "dropout": True}
        blocks = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs=split, length=3)
        x, _ = blocks(train)(x, None)
        return nn.Dense(10)(x)


def train(steps: int, batch: int = 64):
    digits = load_digits()
    images, labels = jnp.asarray(digits.images[..., None] / 16, jnp.float32), jnp.asarray(digits.target)
    network, tx = Network(), optax.adam(3e-3)
    variables = network.init(jax.random.key(0), images[:1], train=False)
    params, batch_stats = variables["params"], variables["batch_stats"]

    training = {"train": True, "mutable": ["batch_stats"]}
    q = apt.apt_quantize(network.apply, config=apt.Config(steps_per_epoch=len(images) // batch))
    state = q.init(variables, images[:batch], rngs={"dropout": jax.random.key(1)}, **training)

    @jax.jit
    def train_step(params, batch_stats, opt_state, state, key, images, labels):
        def loss_fn(params, state):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = q.apply(variables, state, images, rngs={"dropout": key}, **training)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, updated["batch_stats"]

        (loss, batch_stats_), grads, state = apt.value_and_grad(loss_fn, q, has_aux=True)(params, state)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats_, opt_state, state, loss

    opt_state, losses = tx.init(params), []
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(2), step)
        rows = jax.random.randint(key, (batch,), 0, len(images))
        params, batch_stats, opt_state, state, loss = train_step(
            params, batch_stats, opt_state, state, key, images[rows], labels[rows]
        )
        losses.append(float(loss))
    logits = q.apply({"params": params, "batch_stats": batch_stats}, state, images, train=False)
    return losses, float(jnp.mean(logits.argmax(-1) == labels)), q.report(state)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    losses, accuracy, report = train(parser.parse_args().steps)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy on the training set {accuracy:.3f}\n{report}")
