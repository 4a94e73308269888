"""The comparison as a picture: widths and ranges of gradients, losses and scores over the steps."""

import pathlib
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = {"float32": "tab:gray", "apt": "tab:red"}
LABELS = {"float32": "float32", "apt": "APT"}
LAYER_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")


def draw(entry: dict[str, Any], path: pathlib.Path) -> None:
    """Draws a network's entry of the results to a PNG file of 1800 x 1700 pixels."""
    figure = Figure(figsize=(9, 8.5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic(
        [["bits", "bits"], ["range", "range"], ["loss", "score"]], height_ratios=(2.4, 3, 3)
    )
    figure.suptitle(f"{entry['name']} on {entry['task']}: float32 and adaptive fixed point (APT)")
    _draw_bits(axes["bits"], entry["history"])
    _draw_ranges(axes["range"], entry["history"])
    _draw_curves(axes["loss"], entry["curves"], "losses", "training loss (nats)")
    _draw_curves(axes["score"], entry["curves"], "scores", f"test score ({_unit(entry['metric'])})")
    _use_log_scale(axes["loss"])
    for axis in axes.values():
        axis.grid(alpha=0.3)
    _name_layers(figure, *axes["bits"].get_legend_handles_labels())
    figure.savefig(path)


def _name_layers(figure: Figure, handles: list, labels: list[str]) -> None:
    """A legend; of many layers it names some, whose colours run from the first to the last."""
    title = "layers (upper two pictures)"
    if len(labels) > len(LAYER_COLORS):
        title = f"some of the {len(labels)} layers (upper two pictures), in order of depth"
        some = np.linspace(0, len(labels) - 1, len(LAYER_COLORS) - 1).round().astype(int)
        handles, labels = [handles[i] for i in some], [labels[i] for i in some]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, title=title)


def _unit(metric: str) -> str:
    return "%" if metric == "top-1" else f"{metric}, points"


def _draw_bits(axis: Axes, history: dict[str, Any]) -> None:
    """Widths over the steps; the lines are shifted a little apart so that none hides another."""
    seen = (np.ravel(layer["bits"]).tolist() for layer in history.values())
    widths = sorted({8, 16}.union(*seen))
    for i, (name, layer) in enumerate(history.items()):
        shift = min(0.35, 5 / len(history)) * (i - (len(history) - 1) / 2)
        color = _color(i, len(history))
        axis.plot(_per_step(layer["bits"]) + shift, color=color, label=name, lw=1.6)
    axis.set(ylabel="width (bits)", yticks=widths, ylim=(min(widths) - 3, max(widths) + 3))
    axis.set_title("width of each layer's gradient dY, seed 0 (lines shifted apart)", size=11)


def _draw_ranges(axis: Axes, history: dict[str, Any]) -> None:
    for i, layer in enumerate(history.values()):
        largest = _per_step(layer["exponent"]) + _per_step(layer["bits"]) - 1
        axis.plot(largest, color=_color(i, len(history)), lw=1)
    axis.set(xlabel="training step", ylabel="log2 of the range")
    axis.set_title("range of dY: exponent + bits - 1, seed 0", size=11)


def _draw_curves(axis: Axes, curves: dict[str, Any], curve: str, label: str) -> None:
    """Mean over the seeds, and the seeds' least and greatest value as a band."""
    for precision, style in (("float32", "-"), ("apt", "--")):
        values = np.array(curves[precision][curve], float)  # (seeds, epochs); None reads as NaN
        epochs, color = np.arange(1, values.shape[1] + 1), COLORS[precision]
        axis.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.18, lw=0)
        line = {"color": color, "marker": "o" if len(epochs) == 1 else None}
        axis.plot(epochs, values.mean(0), style, label=LABELS[precision], **line)
    axis.set(xlabel="epoch", ylabel=label)
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


def _per_step(values: list) -> np.ndarray:
    """(steps,); a layer that holds a precision per slice shows the greatest."""
    return np.array(values).reshape(len(values), -1).max(1)


def _color(i: int, count: int):
    """Distinct colours for a few layers, a scale from the first to the last for many."""
    return LAYER_COLORS[i] if count <= len(LAYER_COLORS) else colormaps["viridis"](i / (count - 1))
