"""Claim: two trainings that differ by a millionth at the start end as far apart as two seeds do.

    python benchmarks/runs_differ_by_chance.py [--network resnet18] [--repeats 4]

A network of the zoo trains several times in float32 and in adaptive fixed point, on the same data and
batches, from initial values that differ by one part in a million. The scores say how much of a difference
between two runs is chance: pairing takes out seed and batches, not this. Minutes; rows go to results/<cpu>/.
"""

import argparse
import statistics
import sys
from typing import Any

import jax
from harness import results
from harness.machine import describe
from jax import Array

from jax_apt.zoo.precisions import ALL_PRECISIONS, PRECISIONS
from jax_apt.zoo.tasks import TASKS
from jax_apt.zoo.trainer import Trainer, settings_for

RELATIVE = 1e-6  # standard deviation of the change


def scores(network: str, precision: str, repeats: int) -> list[float]:
    """Final score of each training, in points; nothing changes at the start of the first."""
    task = next(task.name for task in TASKS.values() if network in task.networks)
    trainer = Trainer(network, settings_for(task))
    initialize, found = trainer.initialize, []
    for repeat in range(repeats):

        def perturbed(key: Array, example: Any, repeat: int = repeat):
            trained = initialize(key, example)
            return trained._replace(params=_changed(trained.params, repeat))

        trainer.initialize = perturbed
        found.append(trainer.run(0, precision, lambda: None)["score"])
        print(f"{network} {precision}: {found[-1]:.2f}", file=sys.stderr)
    return found


def _changed(params, repeat: int):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(repeat), len(leaves))
    scale = RELATIVE if repeat else 0.0
    changed = [x * (1 + scale * jax.random.normal(k, x.shape)) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    networks = [network for task in TASKS.values() for network in task.networks]
    parser.add_argument("--network", choices=networks, default="resnet18")
    parser.add_argument("--precision", choices=ALL_PRECISIONS, nargs="*", default=PRECISIONS)
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    rows = {name: scores(args.network, name, args.repeats) for name in args.precision}
    document = {"machine": describe(threads=0), "network": args.network, "relative": RELATIVE, "scores": rows}
    print(results.save(f"runs_differ_by_chance@{args.network}", document), file=sys.stderr)
    lines = [
        [name, *(results.number(of) for of in (min(values), max(values), statistics.mean(values)))]
        for name, values in rows.items()
    ]
    print(results.table([f"{args.network}, {args.repeats} trainings", "least", "most", "mean"], lines))


if __name__ == "__main__":
    main()
