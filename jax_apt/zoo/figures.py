"""The comparison as a picture: gradient widths and ranges over the steps, and the score of both precisions."""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def draw(entry: dict[str, Any], path: pathlib.Path) -> None:
    """Draws one network's entry of the results to a PNG file of 1800 x 1650 pixels."""
    figure, (bits, ranges, score) = plt.subplots(3, 1, figsize=(9, 8.25), layout="constrained")
    names = list(entry["history"])
    colors = plt.get_cmap("tab10")(np.arange(len(names)) % 10)
    for i, (name, color) in enumerate(zip(names, colors, strict=True)):
        history = entry["history"][name]
        n, s = np.array(history["bits"]), np.array(history["exponent"])
        bits.step(np.arange(n.size), n + 0.25 * (i - len(names) / 2), where="post", color=color, label=name)
        ranges.step(np.arange(n.size), s + n - 1, where="post", color=color, label=name)
    title = f"{entry['name']} on {entry['task']}: "
    bits.set(ylabel="bits of the gradient", title=title + "width that each layer's gradient dY chose (seed 0)")
    bits.set_yticks(sorted({b for h in entry["history"].values() for b in h["bits"]} | {8, 16}))
    bits.legend(loc="center right", fontsize="small", ncols=2)
    ranges.set(
        xlabel="training step", ylabel="log2 of the range", title="range that the format of dY can hold (seed 0)"
    )
    for precision, style in (("float32", "-"), ("apt", "--")):
        curve = entry["curves"][precision]
        score.plot(np.arange(1, len(curve) + 1), curve, style, label=precision)
    low = min(map(min, entry["curves"].values()))
    score.set(xlabel="epoch", ylabel="test score (points)", title="mean over the seeds", ylim=(max(low, 80), 100.2))
    score.legend(loc="lower right")
    for axis in (bits, ranges, score):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=200)
    plt.close(figure)
