"""Where the digits of a scene are and which: up to three boxes among torn strokes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jax_apt.zoo.metrics import Boxes, suppress, voc_map
from jax_apt.zoo.tasks import default_boxes, scenes
from jax_apt.zoo.tasks.default_boxes import Geometry
from jax_apt.zoo.tasks.task import Dataset, Recipe, Task

STYLE = scenes.Style(size=48, digits=3, fragments=1, scale=(1.6, 3.0))
CLASSES = 11  # the background and ten digits
NEGATIVES = 3  # background boxes per matched one that the loss sees: those with the greatest loss
LEAST_SCORE, MOST_OVERLAP, MOST_BOXES = 0.01, 0.45, 200  # of predictions, as published


def load(seed: int) -> Dataset:
    return scenes.load(seed, STYLE, copies=4, as_example=_example)


def _example(drawn: scenes.Scenes, _):
    return drawn.images, {"boxes": drawn.boxes, "classes": drawn.classes}


def multibox_loss(geometry: Geometry, outputs: tuple[Array, Array], labels: dict[str, Array]) -> Array:
    """Smooth L1 of the offsets plus cross entropy with hard negatives, per matched default box."""
    offsets, logits = outputs
    defaults = jnp.asarray(geometry.centered())
    corners, classes = jax.vmap(lambda c, k: default_boxes.match(c, k, defaults))(
        labels["boxes"], labels["classes"]
    )
    is_matched = classes > 0
    wanted = default_boxes.encode(corners, defaults)
    where = jnp.sum(optax.huber_loss(offsets, jnp.where(is_matched[..., None], wanted, offsets)))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
    hard = _hardest(jax.lax.stop_gradient(losses), is_matched)
    which = jnp.sum(losses * (is_matched | hard))
    return (where + which) / jnp.maximum(jnp.sum(is_matched), 1)


def _hardest(losses: Array, is_matched: Array) -> Array:
    """The background boxes (batch, boxes) of an image that lose most, NEGATIVES per matched box."""
    losses = jnp.where(is_matched, -jnp.inf, losses)
    rank = jnp.argsort(jnp.argsort(-losses, axis=1), axis=1)
    count = jnp.minimum(NEGATIVES * jnp.sum(is_matched, axis=1), losses.shape[1])
    return (rank < count[:, None]) & ~is_matched


def predict_boxes(geometry: Geometry, apply, images: Array) -> dict[str, Array]:
    """Corners (batch, boxes, 4) and probabilities (batch, boxes, classes); 0 where they are not finite."""
    offsets, logits = apply(images)
    corners = default_boxes.decode(offsets, jnp.asarray(geometry.centered()))
    is_finite = jnp.all(jnp.isfinite(corners), -1) & jnp.all(jnp.isfinite(logits), -1)
    probabilities = jnp.where(is_finite[..., None], jax.nn.softmax(logits), 0.0)
    return {"corners": jnp.clip(corners, 0, 1), "probabilities": probabilities}


def score(predicted: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> float:
    """VOC mean average precision at an overlap of 0.5."""
    images = zip(predicted["corners"], predicted["probabilities"], strict=True)
    truth = [
        Boxes(boxes[classes > 0], classes[classes > 0])
        for boxes, classes in zip(labels["boxes"], labels["classes"], strict=True)
    ]
    return voc_map([select(*image) for image in images], truth)


def select(corners: np.ndarray, probabilities: np.ndarray) -> Boxes:
    """The predictions for an image: likely boxes, without duplicates, the best of them."""
    kept = []
    for label in range(1, probabilities.shape[1]):
        likely = np.flatnonzero(probabilities[:, label] > LEAST_SCORE)
        likely = likely[suppress(corners[likely], probabilities[likely, label], MOST_OVERLAP)]
        kept += [(i, label) for i in likely]
    indices = np.array(kept, int).reshape(-1, 2)
    scores = probabilities[indices[:, 0], indices[:, 1]]
    best = np.argsort(-scores, kind="stable")[:MOST_BOXES]
    return Boxes(corners[indices[best, 0]], indices[best, 1], scores[best])


DETECTION = Task(
    name="detection",
    kind="detection",
    metric="VOC mAP",
    networks=("ssd300",),
    recipe=Recipe(epochs=20, batch_size=32, learning_rate=1e-3, warmup=0.05),
    load=load,
    outputs=CLASSES,
    loss=partial(multibox_loss, default_boxes.SMALL),
    score=score,
    predict=partial(predict_boxes, default_boxes.SMALL),
)
