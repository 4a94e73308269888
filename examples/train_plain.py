"""No framework on handwritten digits: a recurrent network over the rows, parameters in a dictionary.

python examples/train_plain.py --steps 200
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jax_apt as apt


def network(params, rows):
    """Logits (batch, 10) of images (batch, 8, 8), read row by row."""

    def step(h, row):
        return jnp.tanh(row @ params["input"]["w"] + h @ params["hidden"]["w"]), None

    start = jnp.zeros((rows.shape[0], params["hidden"]["w"].shape[0]))
    h, _ = jax.lax.scan(step, start, rows.swapaxes(0, 1))
    return h @ params["head"]["w"] + params["head"]["b"][None]


def initial_parameters(key, width: int = 64):
    keys = jax.random.split(key, 3)
    shapes = {"input": (8, width), "hidden": (width, width), "head": (width, 10)}
    params = {
        n: {"w": jax.random.normal(k, s) * s[0] ** -0.5}
        for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }
    params["head"]["b"] = jnp.zeros(10)
    return params


def train(steps: int, batch: int = 64):
    digits = load_digits()
    images, labels = jnp.asarray(digits.images / 16, jnp.float32), jnp.asarray(digits.target)
    params, tx = initial_parameters(jax.random.key(0)), optax.adam(3e-3)
    q = apt.apt_quantize(network, config=apt.Config(steps_per_epoch=len(images) // batch))
    state = q.init(params, images[:batch])

    @jax.jit
    def train_step(params, opt_state, state, images, labels):
        def loss_fn(params, state):
            logits = q.apply(params, state, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads, state = apt.value_and_grad(loss_fn, q)(params, state)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state, loss

    opt_state, losses = tx.init(params), []
    for step in range(steps):
        rows = jax.random.randint(jax.random.fold_in(jax.random.key(2), step), (batch,), 0, len(images))
        params, opt_state, state, loss = train_step(params, opt_state, state, images[rows], labels[rows])
        losses.append(float(loss))
    return losses, float(jnp.mean(q.apply(params, state, images).argmax(-1) == labels)), q.report(state)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    losses, accuracy, report = train(parser.parse_args().steps)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy on the training set {accuracy:.3f}\n{report}")
