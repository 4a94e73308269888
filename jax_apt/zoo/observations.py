"""The paper's observations as measurements and figures.

1. Ranges of gradients, and the widths that they need, differ by layer.
2. Ranges move fast early in the training, then settle.
3. The error measure predicts the loss of accuracy: over layers and widths, for three candidate measures.
4. What gradients of 8 bits everywhere cost, where APT goes to 16.

1, 2 and 4 are read from the results of `jax-apt compare`; 3 is a measurement of its own.
"""

import functools
import math
import pathlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullFormatter, NullLocator
from scipy import stats

import jax_apt as apt
from jax_apt.config import MEASURES
from jax_apt.qem import measure_error
from jax_apt.zoo.compare import gradient_shares
from jax_apt.zoo.figures import WIDTH_COLORS, ranges
from jax_apt.zoo.precisions import LABELS, Precision, Settings
from jax_apt.zoo.steps import make_forward, make_step
from jax_apt.zoo.trainer import Trainer

WIDTHS = (2, 3, 4, 5, 6, 8)  # of the one gradient that is quantized
EXACT = 16  # bits of that layer's other tensors

# Measurement


def correlate_errors(
    network: str, settings: Settings, progress: Callable[[str], None], widths: tuple[int, ...] = WIDTHS
) -> dict[str, Any]:
    """Does the error of a gradient, measured in float32 training, foretell the score of quantizing it?

    Trains once in float32; then once per layer and width with that layer's gradient alone at that width,
    rounded to nearest: that is whose error the measures are of.

    Returns:
      "points": "layer", "bits", the score's "loss" in points and each measure's value; "rank_correlation"
      (Spearman) of each measure with the loss.
    """
    trainer = Trainer(network, settings)
    baseline = trainer.run(0, "float32", lambda: None)["score"]
    errors = measured_errors(trainer, settings, widths)
    points = []
    for layer, by_width in errors.items():
        for bits in widths:
            progress(f"{network}: {layer} at {bits} bits")
            loss = baseline - _score_with_one_gradient(trainer, settings, layer, bits)
            points.append({"layer": layer, "bits": bits, "loss": loss, **by_width[bits]})
    losses = [point["loss"] for point in points]
    correlation = {measure: _rank_correlation([p[measure] for p in points], losses) for measure in MEASURES}
    return {"network": network, "float32": baseline, "points": points, "rank_correlation": correlation}


def _rank_correlation(x: list[float], y: list[float]) -> float:
    result: Any = stats.spearmanr(x, y)
    return float(result.statistic)


def measured_errors(
    trainer: Trainer, settings: Settings, widths: tuple[int, ...], every: int = 10
) -> dict[str, dict[int, dict[str, float]]]:
    """Mean over a float32 training of each measure of each layer's gradient: layer, bits, measure."""
    data, key = trainer.task.load(0), jax.random.key(0)
    trained, state = trainer.start(0, "float32", data)
    gradients = _layer_gradients(trainer)
    names = _layers(trainer, trained, data)
    measure = jax.jit(lambda g: jnp.stack([measure_error(g, bits, m) for bits in widths for m in MEASURES]))
    sums, count = {name: np.zeros((len(widths), len(MEASURES))) for name in names}, 0
    for epoch in range(settings.epochs):
        for i, batch in enumerate(data.batches(settings.batch_size, 0, epoch)):
            number = jnp.int32(epoch * trainer.steps_per_epoch + i)
            if int(number) % every == 0:
                for name, g in zip(names, gradients(trained, *batch), strict=True):
                    sums[name] += np.asarray(measure(g)).reshape(len(widths), len(MEASURES))
                count += 1
            trained, state, _ = trainer.steps["float32"](trained, state, key, number, *batch)
    return {
        name: {
            bits: dict(zip(MEASURES, (total[i] / count).tolist(), strict=True))
            for i, bits in enumerate(widths)
        }
        for name, total in sums.items()
    }


def _layers(trainer: Trainer, trained, data) -> list[str]:
    _, state = trainer.start(0, "apt", data)
    return list(state.layout.names())


def _layer_gradients(trainer: Trainer) -> Callable:
    """(trained, inputs, labels) to the gradient at each convolution's and dense layer's output, in order."""

    def outputs_through(change: Callable, trained, inputs):
        def intercept(call, args, kwargs, context):
            out = call(*args, **kwargs)
            is_product = isinstance(context.module, nn.Conv | nn.Dense) and context.method_name == "__call__"
            return change(out) if is_product else out

        variables = {"params": trained.params, **trained.model_state}
        with nn.intercept_methods(intercept):
            return trainer.model.apply(variables, inputs, train=False)

    def loss_fn(added, trained, inputs, labels):
        remaining = iter(added)
        outputs = outputs_through(lambda out: out + next(remaining), trained, inputs)
        return trainer.task.loss(outputs, labels)

    @jax.jit
    def gradients(trained, inputs, labels):
        shapes = []
        outputs_through(lambda out: shapes.append(out.shape) or out, trained, inputs)
        zeros = [jnp.zeros(shape) for shape in shapes]
        return jax.grad(loss_fn)(zeros, trained, inputs, labels)

    return gradients


def _score_with_one_gradient(trainer: Trainer, settings: Settings, layer: str, bits: int) -> float:
    q, step = _step_with_one_gradient(trainer, settings, layer)
    data, key = trainer.task.load(0), jax.random.key(0)
    trained, _ = trainer.start(0, "float32", data)
    example = next(data.batches(settings.batch_size, 0, 0))[0]
    state = q.init(trained.params, trained.model_state, key, example, True)
    start = state.precision.bits.at[2].set(bits)  # of the one layer's x, w and dy
    state = replace(state, precision=state.precision._replace(bits=start))
    number = 0
    for epoch in range(settings.epochs):
        for batch in data.batches(settings.batch_size, 0, epoch):
            trained, state, _ = step(trained, state, key, jnp.int32(number), *batch)
            number += 1
    assert state.precision.bits.tolist() == [EXACT, EXACT, bits]
    return trainer.score("float32", trained, None, data)


@functools.cache
def _step_with_one_gradient(trainer: Trainer, settings: Settings, layer: str) -> tuple[Any, Callable]:
    """(the function, its training step): a gradient keeps the width that its state starts with.

    No error lies above the threshold, so that no update leaves that width, and one program serves all.
    """
    grads = apt.Adaptive(*WIDTHS, EXACT)
    rules = [
        apt.Rule(f"^{layer}$", acts=EXACT, weights=EXACT, grads=grads, rounding="nearest"),
        apt.Rule("", quantize=False),
    ]
    config = apt.Config(steps_per_epoch=trainer.steps_per_epoch, initial_fraction=1.0, threshold=1e9)
    q = apt.apt_quantize(make_forward(trainer.model), rules, config=config, backend=settings.backend)
    precision = Precision(
        q.init, q.apply, lambda loss_fn: apt.value_and_grad(loss_fn, q, has_aux=True), lambda _: None
    )
    return q, jax.jit(make_step(precision, trainer.task.loss, trainer.optimizer), donate_argnums=0)


# Figures


def draw_ranges(entry: dict[str, Any], path: pathlib.Path) -> None:
    """Observations 1 and 2 from a network's entry in results.json."""
    figure, (by_layer, over_time) = _figure(2)
    history = entry["history"]
    by_step = [ranges(kept, entry["steps"]) for kept in history.values()]
    by_layer.boxplot(by_step, whis=(5, 95), showfliers=False, medianprops={"lw": 0})
    _color_by_width(by_layer, by_step, history)
    by_layer.set(xlabel="layer, in order", ylabel="log2 of the range of dY")
    by_layer.set_title("by layer (whiskers: 5 to 95 % of steps)", size=11)
    ticks = range(1, len(by_step) + 1, math.ceil(len(by_step) / 15))
    by_layer.set_xticks(ticks, map(str, ticks))
    changes = np.abs(np.diff(np.array(by_step), axis=1)).mean(0)
    window = max(len(changes) // 50, 1)
    usable = len(changes) // window * window
    smooth = changes[:usable].reshape(-1, window).mean(1)
    over_time.step(np.arange(len(smooth)) * window, smooth, where="post")
    over_time.set(xlabel="training step", ylabel="|change of log2 range| per step", ylim=(0, None))
    over_time.set_title(f"over time (mean over {len(by_step)} layers)", size=11)
    figure.suptitle(f"{entry['name']} on {entry['task']}: ranges of gradients, seed 0")
    figure.savefig(path)


def _color_by_width(axis: Axes, by_step: list[np.ndarray], history: dict[str, Any]) -> None:
    """A point per layer at its median range, coloured by the width that it ended with."""
    final = np.array([kept["bits"][-1] for kept in history.values()])
    medians = np.array([np.median(values) for values in by_step])
    for bits, color in WIDTH_COLORS.items():
        chosen = np.flatnonzero(final == bits)
        if len(chosen):
            axis.plot(chosen + 1, medians[chosen], "o", color=color, label=f"ends at {bits} bits")
    axis.legend()


def draw_correlation(result: dict[str, Any], path: pathlib.Path) -> None:
    """Observation 3: each measure against the loss of score."""
    figure, axes = _figure(len(MEASURES))
    points = result["points"]
    layers = list(dict.fromkeys(point["layer"] for point in points))
    losses = [point["loss"] for point in points]
    for axis, measure in zip(axes, MEASURES, strict=True):
        for layer in layers:
            own = [point for point in points if point["layer"] == layer]
            axis.plot([p[measure] for p in own], [p["loss"] for p in own], "o", label=layer)
        rho = result["rank_correlation"][measure]
        axis.set_title(f"{measure.replace('_', ' ')}: rank correlation {rho:.2f}", size=11)
        axis.set(xlabel="Diff of the layer's gradient", ylabel="loss of score (points)", xscale="log")
        axis.set_yscale("symlog", linthresh=1)  # linear within a point of float32
        axis.set_ylim(min(losses) - 0.5, 1.5 * max(*losses, 1))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{result['network']}: one layer's gradient at {WIDTHS[0]} to {WIDTHS[-1]} bits")
    figure.savefig(path)


COSTS = ("apt", "int8", "apt-nearest", "int8-nearest")


def _differences(entry: dict[str, Any], precision: str) -> list[float]:
    """Of each pair; none where the precision has not been trained."""
    found = entry if precision == "apt" else entry["others"].get(precision)
    return found["difference"]["each"] if found else []


def draw_costs(entries: list[dict[str, Any]], path: pathlib.Path) -> bool:
    """Observation 4 from the entries of results.json; False if none has int8 gradients."""
    entries = [entry for entry in entries if "int8" in entry["others"]]
    if not entries:
        return False
    figure = Figure(figsize=(9.2, 6.4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    costs, shares = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    place = np.arange(len(entries))
    kinds = [p for p in COSTS if any(_differences(entry, p) for entry in entries)]
    for i, precision in enumerate(kinds):
        x = place + 0.8 * ((i + 0.5) / len(kinds) - 0.5)
        each = [_differences(entry, precision) for entry in entries]
        means = [np.mean(values) if values else np.nan for values in each]
        costs.bar(x, means, 0.7 / len(kinds), label=LABELS[precision])
        for at, values in zip(x, each, strict=True):
            costs.plot([at] * len(values), values, "k.", ms=3)
    costs.set_yscale("symlog", linthresh=1)
    costs.yaxis.set_major_locator(FixedLocator([-20, -10, -5, -2, -1, 0, 1, 2, 5, 10]))
    costs.yaxis.set_major_formatter(FormatStrFormatter("%d"))
    costs.yaxis.set_minor_locator(NullLocator())
    costs.set(ylabel="points above float32")
    costs.axhline(0, color="black", lw=0.8)
    costs.set_title("difference from float32 (bars: mean, dots: seeds; linear within 1 point)", size=11)
    figure.legend(loc="outside upper left", ncols=2)
    wide = [100 * (1 - gradient_shares(entry["bits"]).get("8", 0.0)) for entry in entries]
    shares.bar(place, wide, 0.5, color="tab:orange")
    shares.set(ylabel="share (%)", ylim=(0, 100))
    shares.set_title("share of the training that APT's gradients spend above 8 bits", size=11)
    shares.set_xticks(place, [entry["name"] for entry in entries], rotation=45, ha="right")
    for axis in (costs, shares):
        axis.grid(alpha=0.3)
    figure.savefig(path)
    return True


def _figure(columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.6 * columns, 4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for axis in np.ravel(axes):
        axis.grid(alpha=0.3)
    return figure, axes
