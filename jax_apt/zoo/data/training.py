"""Training on real data: a published recipe, any precision, all local devices, resumable at any step."""

import json
import math
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_apt as apt
from jax_apt.zoo.data import augmentation, pascal_voc
from jax_apt.zoo.data.cifar10 import Cifar10
from jax_apt.zoo.data.image_folder import ImageFolder
from jax_apt.zoo.data.parallel_text import ParallelText
from jax_apt.zoo.data.recipes import RECIPES, PublishedRecipe
from jax_apt.zoo.data.streams import evaluation_batches, training_stream
from jax_apt.zoo.metrics import Boxes, bleu, mean_iou, top1, voc_map
from jax_apt.zoo.networks import NETWORKS
from jax_apt.zoo.precisions import VARIANTS, adaptive, float32
from jax_apt.zoo.steps import make_forward, make_predictor, make_step, start
from jax_apt.zoo.tasks import default_boxes, detection, segmentation, translation
from jax_apt.zoo.tasks.task import outputs_as_they_are

# Data sets: what is read, and how it is learnt and scored


@dataclass(frozen=True)
class _Problem:
    """What a data set asks of training, beside its reader."""

    outputs: int
    loss: Callable
    predict: Callable
    score: Callable[[Any, Any], float]


def read(dataset: str, folder) -> tuple[Any, Any]:
    """(training source, evaluation source) of a data set in its published layout.

    cifar10: the batches. imagenet: `train/CLASS/`, `val/CLASS/`. voc-detection: `VOC2007` and perhaps
    `VOC2012` (trainval of both; test of 2007). voc-segmentation: `VOC2012` (train; val). text: `train.src`,
    `train.tgt`, `test.src`, `test.tgt`, and `vocabulary.txt`, one token a line, if there is one.
    """
    folder = pathlib.Path(folder)
    if dataset == "cifar10":
        return Cifar10(folder, True), Cifar10(folder, False)
    if dataset == "imagenet":
        return ImageFolder(folder / "train"), ImageFolder(folder / "val")
    if dataset == "voc-detection":
        years = [folder / year for year in ("VOC2007", "VOC2012") if (folder / year).exists()]
        test = pascal_voc.VocDetection(folder / "VOC2007", "test")
        return pascal_voc.VocDetection(years, "trainval"), test
    if dataset == "voc-segmentation":
        year = folder / "VOC2012"
        return pascal_voc.VocSegmentation(year, "train"), pascal_voc.VocSegmentation(year, "val")
    words = folder / "vocabulary.txt"
    vocabulary = words.read_text(encoding="utf-8").split() if words.exists() else None
    train = ParallelText(folder / "train.src", folder / "train.tgt", vocabulary)
    return train, ParallelText(folder / "test.src", folder / "test.tgt", train.vocabulary)


def _problem(recipe: PublishedRecipe, source, size: str) -> _Problem:
    if recipe.dataset in ("cifar10", "imagenet"):
        outputs = 10 if recipe.dataset == "cifar10" else len(source.classes)
        loss = partial(_smoothed_cross_entropy, recipe.label_smoothing)
        return _Problem(outputs, loss, outputs_as_they_are, lambda p, y: float(top1(p, y)))
    classes = len(pascal_voc.CLASSES) + 1
    if recipe.dataset == "voc-segmentation":
        score = partial(mean_iou, classes=classes)
        return _Problem(classes, segmentation.pixel_cross_entropy, segmentation.predict_pixels, score)
    if recipe.dataset == "voc-detection":
        geometry = default_boxes.VOC300 if size == "published" else default_boxes.SMALL
        loss, predict = (partial(f, geometry) for f in (detection.multibox_loss, detection.predict_boxes))
        return _Problem(classes, loss, predict, _score_boxes)

    def score_text(predicted, target):
        return bleu([source.decode(row) for row in predicted], [source.decode(row) for row in target])

    loss = partial(_smoothed_token_cross_entropy, recipe.label_smoothing)
    return _Problem(len(source.vocabulary), loss, translation.translate, score_text)


def _smoothed_cross_entropy(smoothing: float, logits, labels):
    return jnp.mean(_smoothed(smoothing, logits, labels))


def _smoothed_token_cross_entropy(smoothing: float, logits, target):
    counts = target != translation.PAD
    return jnp.sum(_smoothed(smoothing, logits, target) * counts) / jnp.maximum(jnp.sum(counts), 1)


def _smoothed(smoothing: float, logits, labels):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def _score_boxes(predicted, labels) -> float:
    images = zip(predicted["corners"], predicted["probabilities"], strict=True)
    fields = zip(labels["boxes"], labels["classes"], labels["is_difficult"], strict=True)
    truth = [Boxes(b[c > 0], c[c > 0], is_difficult=d[c > 0]) for b, c, d in fields]
    return voc_map([detection.select(*image) for image in images], truth, use_eleven_points=True)


# Training


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is chosen for one training; None takes the recipe's."""

    recipe: str
    data: pathlib.Path
    out: pathlib.Path
    precision: str = "apt"
    size: str = "published"  # of the network; "small" for a trial
    epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0
    backend: apt.Backend = "auto"
    save_every: int = 1000  # steps

    def chosen_recipe(self) -> PublishedRecipe:
        given = {"epochs": self.epochs, "batch_size": self.batch_size}
        return replace(RECIPES[self.recipe], **{k: v for k, v in given.items() if v is not None})


def train(options: Options, report: Callable[[str], None]) -> dict[str, Any]:
    """Trains to the end, going on from the last checkpoint in `options.out` if there is one.

    Args:
      options: what to train; the same options go on with the same training.
      report: called with a line after each epoch.

    Returns:
      "score" in points, "losses" by epoch trained here, "steps", and in fixed point the "report".
    """
    run = _Run(options)
    losses, recent = [], []
    while run.step < run.total:
        recent.append(run.advance())
        is_epoch = run.step % run.steps_per_epoch == 0
        if is_epoch:
            losses.append(float(np.mean(jax.device_get(recent))))
            report(f"epoch {run.step // run.steps_per_epoch}: mean loss {losses[-1]:.4f}")
            recent = []
        if run.step % options.save_every == 0 or run.step == run.total:
            run.save()
    run.close()
    result = {"score": run.score(), "losses": losses, "steps": run.step}
    described = run.precision.report(run.state)
    return result if described is None else result | {"report": described}


class _Run:
    """A training in progress: its arrays, its place in the data, its checkpoints."""

    def __init__(self, options: Options):
        recipe = options.chosen_recipe()
        source, self.evaluation = read(recipe.dataset, options.data)
        self.recipe, self.problem = recipe, _problem(recipe, source, options.size)
        transform = augmentation.for_training(recipe.dataset, recipe.image_size)
        self.stream = training_stream(source, transform, recipe.batch_size, options.seed)
        self.steps_per_epoch = len(source) // recipe.batch_size
        self.total = recipe.epochs * self.steps_per_epoch
        self.sharding = _data_sharding(recipe.batch_size)
        model = _model(options, recipe, self.problem.outputs)
        self.precision = _precision(options, make_forward(model), self.steps_per_epoch)
        optimizer = recipe.optimizer(self.steps_per_epoch)
        self.key, self.step = jax.random.key(options.seed), 0
        example = self._evaluation_example()
        self.trained, self.state = start(model, self.precision, optimizer, self.key, example)
        self.compiled = jax.jit(
            make_step(self.precision, self.problem.loss, optimizer), donate_argnums=(0, 1)
        )
        self.predict = jax.jit(make_predictor(self.precision, self.problem.predict))
        self.manager = ocp.CheckpointManager(
            options.out.absolute() / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )
        self._restore()

    def advance(self):
        """Trains one step; returns its loss, still on the device."""
        inputs, labels = jax.tree.map(self._on_devices, next(self.stream))
        number = jnp.int32(self.step)
        self.trained, self.state, loss = self.compiled(
            self.trained, self.state, self.key, number, inputs, labels
        )
        self.step += 1
        return loss

    def score(self) -> float:
        """The data set's metric over its evaluation part, in points."""
        predicted, truth = [], []
        transform = augmentation.for_evaluation(self.recipe.dataset, self._evaluation_size())
        size = min(self.recipe.batch_size, len(self.evaluation))
        for (inputs, labels), count in evaluation_batches(self.evaluation, transform, size):
            outputs = self.predict(self.trained.params, self.trained.model_state, self.state, inputs)
            predicted.append(jax.tree.map(lambda a, n=count: np.asarray(a)[:n], outputs))
            truth.append(jax.tree.map(lambda a, n=count: a[:n], labels))
        together = (jax.tree.map(lambda *a: np.concatenate(a), *parts) for parts in (predicted, truth))
        return float(self.problem.score(*together))

    def save(self) -> None:
        """Weights and optimizer by the names of their leaves, the precision state by those of its layers."""
        place = json.loads(json.dumps(self.stream.get_state()))
        items = {"trained": ocp.args.StandardSave(_by_name(self.trained)), "data": ocp.args.JsonSave(place)}
        if self.state is not None:
            items["precision"] = ocp.args.StandardSave(apt.to_state_dict(self.state))
        self.manager.save(self.step, args=ocp.args.Composite(**items))

    def close(self) -> None:
        self.manager.wait_until_finished()
        self.manager.close()

    def _restore(self) -> None:
        latest = self.manager.latest_step()
        if latest is None:
            return
        self._check_items(latest)
        named = _by_name(self.trained)
        items = {"trained": ocp.args.StandardRestore(named), "data": ocp.args.JsonRestore()}
        if self.state is not None:
            items["precision"] = ocp.args.StandardRestore()  # as it was saved, to be compared by layer name
        kept = self.manager.restore(latest, args=ocp.args.Composite(**items))
        restored = [kept["trained"][name] for name in named]
        self.trained = jax.tree.unflatten(jax.tree.structure(self.trained), restored)
        if self.state is not None:
            self.state = apt.from_state_dict(self.state, kept["precision"])
        self.stream.set_state(kept["data"])
        self.step = latest

    def _check_items(self, step: int) -> None:
        """Refuses a checkpoint of another precision, and one of before the layers were saved by name."""
        folder = pathlib.Path(self.manager.directory) / str(step)
        found = {path.name for path in folder.iterdir()}
        instead = "give another folder to write to"
        if "trained" not in found:
            raise ValueError(
                f"the checkpoint {folder} was written by an earlier jax_apt, which saved arrays by position: "
                f"go on with that version, or {instead}"
            )
        if ("precision" in found) != (self.state is not None):
            trained, asked = (
                ("fixed point", "float32") if "precision" in found else ("float32", "fixed point")
            )
            raise ValueError(f"the checkpoint {folder} was trained in {trained}, not in {asked}: {instead}")

    def _on_devices(self, array: np.ndarray):
        return jax.make_array_from_process_local_data(self.sharding, array)

    def _evaluation_size(self) -> int:
        """VOC images have up to 500 pixels a side; a mask is scored whole."""
        is_voc = self.recipe.dataset == "voc-segmentation"
        return max(self.recipe.image_size, 513) if is_voc else self.recipe.image_size

    def _evaluation_example(self):
        transform = augmentation.for_evaluation(self.recipe.dataset, self.recipe.image_size)
        inputs, _ = transform(self.evaluation[0])
        return jax.tree.map(lambda a: np.stack([a] * self.recipe.batch_size), inputs)


def _by_name(tree) -> dict[str, Any]:
    """Leaves of a pytree by their paths, such as "params.head.kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _data_sharding(batch_size: int) -> NamedSharding:
    """The batch spread over all devices; parameters and precision state are on each of them."""
    devices = jax.devices()
    if batch_size % len(devices):
        raise ValueError(f"batch_size must be a multiple of the {len(devices)} devices, got {batch_size}")
    return NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))


def _model(options: Options, recipe: PublishedRecipe, outputs: int):
    network = NETWORKS[recipe.network]
    if options.size == "small":
        return network.small(outputs)
    assert network.published is not None
    return network.published(outputs, **recipe.network_options)


def _precision(options: Options, forward: Callable, steps_per_epoch: int):
    if options.precision == "float32":
        return float32(forward)
    short = math.ceil(0.1 * steps_per_epoch) < 100  # formats would freeze after a handful of steps
    config = apt.Config(steps_per_epoch=max(steps_per_epoch, 1), initial_fraction=1.0 if short else 0.1)
    return adaptive(forward, VARIANTS[options.precision], config, options.backend)
