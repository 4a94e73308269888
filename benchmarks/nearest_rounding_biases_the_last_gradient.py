"""Claim: where 8 bits cost accuracy it is by a bias of the last layer's gradient; unbiased rounding ends it.

    python benchmarks/nearest_rounding_biases_the_last_gradient.py [--network ...] [--layer REGEX]

A softmax pulls one class up and pushes the others down by as much. At 8 bits, rounded to nearest, the many
small entries become 0: classes are pulled up together, which the loss does not feel, and the layer's input
grows until its own 8 bits hold little of it. A network of the zoo trains in adaptive fixed point as it is,
with that layer's gradient at 16 bits, and with that gradient rounded at random. Minutes; rows go to
results/<cpu>/.
"""

import argparse
import sys
from typing import Any

from harness import results
from harness.machine import describe

import jax_apt as apt
from jax_apt.zoo.precisions import VARIANTS, adaptive, adaptive_config
from jax_apt.zoo.tasks import TASKS
from jax_apt.zoo.trainer import Trainer, settings_for


def variants(layer: str) -> dict[str, list[apt.Rule]]:
    """Rules before those of the comparison, by name."""
    return {
        "APT, rounded to nearest": [],
        f"{layer}: gradient at 16 bits": [apt.Rule(layer, grads=16, rounding="nearest")],
        f"{layer}: gradient rounded at random": [apt.Rule(layer, rounding="stochastic")],
    }


def train(trainer: Trainer, layer: str, seed: int, name: str, rules: list[apt.Rule]) -> dict[str, Any]:
    """A row: score, losses, and the layer's formats at the end."""
    settings = trainer.settings
    config = adaptive_config(settings, trainer.steps_per_epoch)
    trainer.add(name, adaptive(trainer.forward, VARIANTS["apt-nearest"], config, settings.backend, rules))
    result = trainer.run(seed, name, lambda: None)
    matching = [apt.Rule(layer).hits(entry["name"], "", None) for entry in result["report"]["layers"]]
    if sum(matching) != 1:
        raise SystemExit(f"--layer {layer}: matches {sum(matching)} layers of the network, must match one")
    tensors = result["report"]["layers"][matching.index(True)]["tensors"]
    print(f"{name}: {result['score']:.2f}", file=sys.stderr)
    formats = {of: {key: tensors[of][key] for key in ("bits", "exponent")} for of in tensors}
    return {"name": name, "score": result["score"], "losses": result["losses"], "formats": formats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    networks = [network for task in TASKS.values() for network in task.networks]
    parser.add_argument("--network", choices=networks, default="deeplab-largefov")
    parser.add_argument("--layer", default="^fc8$", help="regular expression of one layer's name")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task = next(task.name for task in TASKS.values() if args.network in task.networks)
    trainer = Trainer(args.network, settings_for(task))
    float32 = trainer.run(args.seed, "float32", lambda: None)
    rows = [{"name": "float32", "score": float32["score"], "losses": float32["losses"]}]
    rows += [train(trainer, args.layer, args.seed, *item) for item in variants(args.layer).items()]
    document = {"machine": describe(threads=0), **vars(args), "rows": rows}
    name = f"nearest_rounding_biases_the_last_gradient@{args.network}"
    print(results.save(name, document), file=sys.stderr)
    lines = [
        [row["name"], results.number(row["score"]), results.number(row["losses"][-1], 3), *_formats(row)]
        for row in rows
    ]
    header = [f"{args.network}, seed {args.seed}", "score", "last loss", "its gradient's bits"]
    print(results.table([*header, "its input's largest code stands for"], lines))


def _formats(row: dict[str, Any]) -> list[str]:
    if "formats" not in row:
        return ["-", "-"]
    x = row["formats"]["x"]
    return [str(row["formats"]["dy"]["bits"]), f"{2.0 ** (x['bits'] - 1 + x['exponent']):g}"]


if __name__ == "__main__":
    main()
