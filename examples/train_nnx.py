"""Flax NNX on handwritten digits, in graph or tree mode, with BatchNorm's statistics and dropout's keys.

python examples/train_nnx.py --steps 200 [--tree]
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jax_apt as apt
from jax_apt import nnx as apt_nnx


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.hidden = nnx.Linear(128, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.head(self.dropout(x))


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, grads = apt_nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def train(steps: int, batch: int = 64):
    digits = load_digits()
    images, labels = jnp.asarray(digits.images[..., None] / 16, jnp.float32), jnp.asarray(digits.target)
    config = apt.Config(steps_per_epoch=len(images) // batch)
    model = apt_nnx.Quantized(Network(nnx.Rngs(0)), images[:batch], config=config)
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    losses = []
    for step in range(steps):
        rows = jax.random.randint(jax.random.fold_in(jax.random.key(2), step), (batch,), 0, len(images))
        losses.append(float(train_step(model, optimizer, images[rows], labels[rows])))
    model.eval()
    return losses, float(jnp.mean(model(images).argmax(-1) == labels)), model.report()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tree", action="store_true", help="modules are plain pytrees")
    options = parser.parse_args()
    with nnx.set_graph_mode(not options.tree):
        losses, accuracy, report = train(options.steps)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy on the training set {accuracy:.3f}\n{report}")
