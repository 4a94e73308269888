"""The comparison as a picture: widths and ranges of gradients, losses and scores over the steps."""

import pathlib
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from jax_apt.zoo.history import Changes, per_step

COLORS = {"float32": "tab:gray", "apt": "tab:red"}
LABELS = {"float32": "float32", "apt": "APT"}
WIDTH_COLORS = {8: "#56b4e9", 14: "#009e73", 16: "#e69f00", 24: "#d55e00"}
OTHER_WIDTH = "#cc79a7"
COLUMNS = 600  # of a band at most: more steps than that are shown by their greatest value in turn
NAMED = 12  # layers at most whose name is written


def draw(entry: dict[str, Any], path: pathlib.Path) -> None:
    """Draws a network's entry of the results to a PNG file of 1800 x 1700 pixels."""
    figure = Figure(figsize=(9, 8.5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic(
        [["bits", "bits"], ["range", "range"], ["loss", "score"]], height_ratios=(3, 3, 3)
    )
    figure.suptitle(f"{entry['name']} on {entry['task']}: float32 and adaptive fixed point (APT)")
    _draw_bits(axes["bits"], entry["history"], entry["steps"])
    _draw_ranges(figure, axes["range"], entry["history"], entry["steps"])
    _draw_curves(axes["loss"], entry["curves"], "losses", "training loss (nats)")
    _draw_curves(axes["score"], entry["curves"], "scores", f"test score ({_unit(entry['metric'])})")
    _use_log_scale(axes["loss"])
    for name in ("loss", "score"):
        axes[name].grid(alpha=0.3)
    figure.savefig(path)


def ranges(kept: Changes, steps: int) -> np.ndarray:
    """log2 of the largest magnitude that a layer's gradient could hold at each step."""
    bits, exponents = per_step(kept, steps)
    return exponents + bits - 1


def _unit(metric: str) -> str:
    return "%" if metric == "top-1" else f"{metric}, points"


def _draw_bits(axis: Axes, history: dict[str, Changes], steps: int) -> None:
    """A band per layer, coloured by its width."""
    bits = np.stack([per_step(kept, steps)[0] for kept in history.values()])
    widths = sorted({8, 16}.union(bits.ravel().tolist()))
    colors = [WIDTH_COLORS.get(width, OTHER_WIDTH) for width in widths]
    options = {"cmap": ListedColormap(colors), "vmin": -0.5, "vmax": len(widths) - 0.5}
    _draw_bands(axis, np.searchsorted(widths, bits), list(history), steps, **options)
    axis.set_title("width of each layer's gradient dY, seed 0", size=11)
    handles = [Patch(color=color, label=f"int{width}") for width, color in zip(widths, colors, strict=True)]
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.005, 1.02), handlelength=1, fontsize=9)


def _draw_ranges(figure: Figure, axis: Axes, history: dict[str, Changes], steps: int) -> None:
    values = np.stack([ranges(kept, steps) for kept in history.values()])
    image = _draw_bands(axis, values, list(history), steps, cmap="viridis")
    axis.set_title("range of dY (log2 of the largest value it can hold), seed 0", size=11)
    axis.set(xlabel="training step")
    figure.colorbar(image, ax=axis, pad=0.01, fraction=0.05, label="log2")


def _draw_bands(axis: Axes, values: np.ndarray, names: list[str], steps: int, **options):
    """An image of a row per layer, the first on top; `values` is (layers, steps)."""
    window = -(-steps // COLUMNS)
    padded = np.pad(values, ((0, 0), (0, -steps % window)), mode="edge")
    columns = padded.reshape(len(names), -1, window).max(2)
    extent = (0, columns.shape[1] * window, len(names) - 0.5, -0.5)
    image = axis.imshow(columns, aspect="auto", interpolation="nearest", extent=extent, **options)
    axis.set_xlim(0, steps)
    shown = np.unique(np.linspace(0, len(names) - 1, min(len(names), NAMED)).round().astype(int))
    axis.set_yticks(shown, [names[i] for i in shown], size=7)
    for row in range(1, len(names) if len(names) <= 2 * NAMED else 0):
        axis.axhline(row - 0.5, color="white", lw=0.8)
    return image


def _draw_curves(axis: Axes, curves: dict[str, Any], curve: str, label: str) -> None:
    """Mean over the seeds, and the seeds' least and greatest value as a band."""
    for precision, style in (("float32", "-"), ("apt", "--")):
        values = np.array(curves[precision][curve], float)  # (seeds, epochs); None reads as NaN
        found, color = curves[precision], COLORS[precision]
        epochs = found["scored_epochs"] if curve == "scores" else np.arange(1, values.shape[1] + 1)
        axis.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.18, lw=0)
        line = {"color": color, "marker": "o" if len(epochs) == 1 else None}
        axis.plot(epochs, values.mean(0), style, label=LABELS[precision], **line)
    axis.set(xlabel="epoch", ylabel=label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    name = label.partition(" (")[0]
    axis.set_title(f"{name}: mean and span of {len(values)} seeds", size=11)
    axis.legend()


def _use_log_scale(axis: Axes) -> None:
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    ticks = [m * 10.0**e for e in range(-6, 4) for m in (1, 2, 5)]
    axis.set_yticks([tick for tick in ticks if low <= tick <= high])
    axis.set_yticks([], minor=True)
    axis.yaxis.set_major_formatter("{x:g}")
