"""Optax loops: clipping, an optimizer per group of parameters, gradient accumulation, an average of weights.

    python examples/optax_loops.py --steps 200 --accumulate multisteps      # one microbatch a step
    python examples/optax_loops.py --steps 200 --accumulate taps            # all microbatches in one step

None of the optimizers sees the precision state: it is one more value that the step takes and returns.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jax_apt as apt

MICROBATCHES = 4


def network(params, x):
    for name in ("first", "second"):
        x = jax.nn.relu(x @ params[name]["w"] + params[name]["b"][None])
    return x @ params["head"]["w"] + params["head"]["b"][None]


def initial_parameters(key):
    sizes = {"first": (64, 64), "second": (64, 64), "head": (64, 10)}
    return {
        name: {"w": jax.random.normal(k, size) * (2 / size[0]) ** 0.5, "b": jnp.zeros(size[1])}
        for k, (name, size) in zip(jax.random.split(key, 3), sizes.items(), strict=True)
    }


def optimizer() -> optax.GradientTransformation:
    """The whole gradient is clipped; the head learns by momentum, its bias not at all, all else by Adam."""
    groups = {
        "adam": optax.adam(2e-3),
        "momentum": optax.sgd(0.05, momentum=0.9),
        "fixed": optax.set_to_zero(),
    }
    head = {"w": "momentum", "b": "fixed"}
    labels = {"first": "adam", "second": "adam", "head": head}
    return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(groups, labels))


def one_microbatch(q, loss_of):
    """A step of `optax.MultiSteps`: each microbatch is a step of the precision state too."""
    tx = optax.MultiSteps(optimizer(), every_k_schedule=MICROBATCHES)

    def step(params, opt_state, state, images, labels):
        value_and_grad = apt.value_and_grad(lambda p, s: loss_of(p, s, images, labels), q)
        loss, grads, state = value_and_grad(params, state)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state, loss

    return step, tx.init


def all_microbatches(q, loss_of):
    """Gradients and statistics add up in a scan; the precision state takes one step for all."""
    tx = optimizer()

    def step(params, opt_state, state, images, labels):
        def tapped(params, taps, images, labels):
            return loss_of(params, q.with_taps(state, taps), images, labels)

        def add(sums, microbatch):
            loss, more = jax.value_and_grad(tapped, argnums=(0, 1))(params, q.taps(state), *microbatch)
            return jax.tree.map(jnp.add, sums, more), loss

        nothing = jax.tree.map(jnp.zeros_like, params), q.taps(state)
        parts = [x.reshape(MICROBATCHES, -1, *x.shape[1:]) for x in (images, labels)]
        (grads, statistics), losses = jax.lax.scan(add, nothing, parts)
        grads = jax.tree.map(lambda g: g / MICROBATCHES, grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, q.update(state, statistics), losses.mean()

    return step, tx.init


ACCUMULATE = {"multisteps": one_microbatch, "taps": all_microbatches}


def train(steps: int, accumulate: str, batch: int = 128):
    digits = load_digits()
    images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
    params = average = initial_parameters(jax.random.key(0))
    batch = batch // MICROBATCHES if accumulate == "multisteps" else batch
    q = apt.apt_quantize(network, config=apt.Config(steps_per_epoch=len(images) // batch))
    state = q.init(params, images[:batch])

    def loss_of(params, state, images, labels):
        logits = q.apply(params, state, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    step, init = ACCUMULATE[accumulate](q, loss_of)
    train_step, opt_state, losses = jax.jit(step, donate_argnums=(1, 2)), init(params), []
    for i in range(steps):
        rows = jax.random.randint(jax.random.fold_in(jax.random.key(2), i), (batch,), 0, len(images))
        params, opt_state, state, loss = train_step(params, opt_state, state, images[rows], labels[rows])
        average = optax.incremental_update(params, average, step_size=0.1)
        losses.append(float(loss))
    accuracy = jnp.mean(q.apply(average, state, images).argmax(-1) == labels)
    return losses, float(accuracy), q.report(state)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--accumulate", choices=ACCUMULATE, default="multisteps")
    options = parser.parse_args()
    losses, accuracy, report = train(options.steps, options.accumulate)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy on the training set {accuracy:.3f}\n{report}")
