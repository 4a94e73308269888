"""Data-parallel training in many processes: each runs this program and holds its part of every batch.

    python train.py --process 0 --processes 2 --coordinator 127.0.0.1:9876 --run /tmp/run &
    python train.py --process 1 --processes 2 --coordinator 127.0.0.1:9876 --run /tmp/run

`launch.py` beside it starts the processes of one machine, and starts them again after one has died. The run
goes on from its last checkpoint, with as many processes as there are then. Process 0 writes `log.jsonl` (a
line per step: loss and bit-widths) and `checkpoint.npz` into the folder of the run.
"""

import argparse
import itertools
import json
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_apt as apt

SIZES = (32, 64, 10)
RATE, DECAY = 0.1, 0.9


def main() -> None:
    args = parse()
    if args.processes > 1:
        # Gloo carries collectives between CPUs; on accelerators leave this line out.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    q = apt.apt_quantize(network, config=apt.Config(steps_per_epoch=20, threshold=args.threshold))
    params = initial_parameters()
    carried = (
        params,
        jax.tree.map(jnp.zeros_like, params),
        q.init(params, jnp.zeros((args.batch, SIZES[0]))),
    )
    start, carried = restore(args.run / "checkpoint.npz", carried)
    carried = jax.device_put(carried, everywhere)  # every process holds the same values
    step = jax.jit(make_step(q), out_shardings=everywhere, donate_argnums=0)
    for i in range(start, args.steps):
        if i == args.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = [own_rows(rows, x) for x in make_batch(i, args.batch)]
        carried, loss = step(carried, *batch)
        loss.block_until_ready()  # no process runs ahead of the others' checkpoints
        if args.process == 0:
            log(args.run / "log.jsonl", i, args.processes, loss, carried[2])
            if (i + 1) % args.save_every == 0:
                save(args.run / "checkpoint.npz", i + 1, carried)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--process", type=int, default=0, help="number of this process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--coordinator", help="host:port where process 0 listens")
    parser.add_argument("--run", type=pathlib.Path, required=True, help="an existing folder that all see")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64, help="rows in all; a multiple of all devices")
    parser.add_argument("--save-every", type=int, default=10, help="steps")
    parser.add_argument("--threshold", type=float, default=0.03, help="largest error of a width that is kept")
    parser.add_argument("--kill-at", type=int, help="step at which this process kills itself")
    return parser.parse_args()


# The training step


def network(params, x):
    return jnp.tanh(x @ params["hidden"]["kernel"]) @ params["head"]["kernel"]


def initial_parameters():
    keys = jax.random.split(jax.random.key(0))
    kernels = [
        jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, shape in zip(keys, itertools.pairwise(SIZES), strict=True)
    ]
    return {"hidden": {"kernel": kernels[0]}, "head": {"kernel": kernels[1]}}


def make_step(q):
    """Gradient descent with momentum; nothing in it knows of devices: XLA adds the all-reduces."""

    def loss_fn(params, state, x, labels):
        logits = jax.nn.log_softmax(q.apply(params, state, x))
        return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], axis=1))

    def step(carried, x, labels):
        params, velocity, state = carried
        loss, gradients, state = apt.value_and_grad(loss_fn, q)(params, state, x, labels)
        velocity = jax.tree.map(lambda v, g: DECAY * v + g, velocity, gradients)
        params = jax.tree.map(lambda p, v: p - RATE * v, params, velocity)
        return (params, velocity, state), loss

    return step


# Data: a batch follows from its number, so a run that starts again sees what it would have seen


def make_batch(step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 (size, 32) and the labels (size,) that a fixed random network gives them."""
    teacher = np.random.default_rng(0).normal(size=(SIZES[0], SIZES[-1]))
    x = np.random.default_rng([1, step]).standard_t(3, (size, SIZES[0])).astype(np.float32)
    return x, np.argmax(x @ teacher, axis=1).astype(np.int32)


def own_rows(sharding: NamedSharding, whole: np.ndarray) -> jax.Array:
    """The global array of a batch; a process hands over the rows of its own devices alone."""
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


# Checkpoints: everything is the same on all processes, so one of them writes plain arrays


def save(path: pathlib.Path, step: int, carried) -> None:
    """Written aside and renamed: a run killed while it saves keeps the checkpoint before."""
    params, velocity, state = carried
    whole = {"params": params, "velocity": velocity, "precision": apt.to_state_dict(state)}
    aside = path.with_suffix(".new.npz")
    np.savez(aside, step=step, **{name: np.asarray(x) for name, x in by_name(whole).items()})
    os.replace(aside, path)


def restore(path: pathlib.Path, carried):
    """(next step, what was saved), or (0, `carried`) if nothing was."""
    if not path.exists():
        return 0, carried
    saved = np.load(path)
    *trained, state = carried
    like = {"params": trained[0], "velocity": trained[1], "precision": apt.to_state_dict(state)}
    whole = jax.tree.unflatten(jax.tree.structure(like), [saved[name] for name in by_name(like)])
    state = apt.from_state_dict(state, whole["precision"])  # finds layers by name, and refuses other ones
    return int(saved["step"]), (whole["params"], whole["velocity"], state)


def by_name(tree) -> dict:
    """Leaves by their paths, such as "params/head/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def log(path: pathlib.Path, step: int, processes: int, loss, state: apt.AptState) -> None:
    line = {
        "step": step,
        "processes": processes,
        "loss": float(loss),
        "bits": np.asarray(state.precision.bits).tolist(),
    }
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
