"""The metrics of the tasks, in points from 0 to 100."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

# Classification


def top1(logits: Array, labels: Array) -> Array:
    """Share of correct first guesses, in points; 0 if an output is not finite."""
    share = jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))
    return jnp.where(jnp.all(jnp.isfinite(logits)), 100 * share, 0.0)


# Segmentation


def mean_iou(predicted: np.ndarray, truth: np.ndarray, classes: int, ignored: int = 255) -> float:
    """Intersection over union of the pixels of each class, averaged over the classes that occur.

    Args:
      predicted: int (...), classes; a value outside 0..classes - 1 is a wrong guess.
      truth: int, same shape; pixels with the value `ignored` do not count.
      classes: how many there are, the background included.
    """
    counts = np.asarray(truth) != ignored
    predicted, truth = np.asarray(predicted)[counts], np.asarray(truth)[counts]
    is_class = (predicted >= 0) & (predicted < classes)
    both = classes * truth[is_class].astype(np.int64) + predicted[is_class]
    confusion = np.bincount(both, minlength=classes * classes).reshape(classes, classes)
    hits, guesses = np.diag(confusion), confusion.sum(0)
    union = np.bincount(truth, minlength=classes) + guesses - hits
    occurs = union > 0
    return float(100 * np.mean(hits[occurs] / union[occurs])) if occurs.any() else 0.0


# Translation


def bleu(predicted: Sequence[str], truth: Sequence[str]) -> float:
    """Corpus BLEU of sacrebleu over tokens that spaces separate."""
    from sacrebleu.metrics.bleu import BLEU

    return float(BLEU(tokenize="none").corpus_score(list(predicted), [list(truth)]).score)


# Detection


class Boxes(NamedTuple):
    """Boxes in an image: predicted ones with a score, true ones perhaps marked as difficult."""

    corners: np.ndarray  # float (boxes, 4): top, left, bottom, right
    classes: np.ndarray  # int (boxes,)
    scores: np.ndarray | None = None  # float (boxes,)
    is_difficult: np.ndarray | None = None  # bool (boxes,); these neither help nor hurt


def voc_map(
    predicted: Sequence[Boxes],
    truth: Sequence[Boxes],
    threshold: float = 0.5,
    use_eleven_points: bool = False,
) -> float:
    """Mean average precision of the Pascal VOC protocol.

    Per class, predictions of all images are taken by falling score. One is right if the true box that it
    overlaps most does so by at least `threshold` (intersection over union) and was not found before.
    Classes that occur in no image do not count.

    Args:
      predicted, truth: one `Boxes` per image.
      threshold: least overlap.
      use_eleven_points: average the precision at recall 0, 0.1 ... 1, as until 2009, in place of the area.

    Written here because pycocotools follows another protocol (101 recall levels, a prediction may take any
    true box that is free, crowds in place of difficult boxes), and others need a deep-learning framework.

    Source: Everingham et al., "The Pascal Visual Object Classes Challenge", 2010, and its 2012 kit.
    """
    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} images with predictions, {len(truth)} with true boxes")
    found = {int(c) for boxes in truth for c in boxes.classes}
    values = [_average_precision(predicted, truth, c, threshold, use_eleven_points) for c in sorted(found)]
    values = [value for value in values if value is not None]
    return float(100 * np.mean(values)) if values else 0.0


def _average_precision(predicted, truth, label, threshold, use_eleven_points) -> float | None:
    """Of one class; None if all its boxes are difficult."""
    images = [_TrueBoxes(boxes, label) for boxes in truth]
    total = sum(image.count for image in images)
    if total == 0:
        return None
    candidates = []
    for boxes, image in zip(predicted, images, strict=True):
        for i in np.flatnonzero(boxes.classes == label):
            candidates.append((float(boxes.scores[i]), boxes.corners[i], image))
    candidates.sort(key=lambda candidate: -candidate[0])
    verdicts = [image.judge(corners, threshold) for _, corners, image in candidates]
    hits = np.array([v for v in verdicts if v is not None], float)
    recall, precision = np.cumsum(hits) / total, np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return _eleven_points(recall, precision) if use_eleven_points else _area(recall, precision)


class _TrueBoxes:
    """The true boxes of one class in one image, and which of them were found."""

    def __init__(self, boxes: Boxes, label: int):
        of_class = boxes.classes == label
        self.corners = boxes.corners[of_class]
        difficult = np.zeros(len(boxes.classes), bool) if boxes.is_difficult is None else boxes.is_difficult
        self.is_difficult = difficult[of_class]
        self.was_found = np.zeros(len(self.corners), bool)
        self.count = int((~self.is_difficult).sum())

    def judge(self, corners: np.ndarray, threshold: float) -> bool | None:
        """Whether a prediction is right; None if it does not count."""
        if not len(self.corners):
            return False
        overlaps = iou(corners[None], self.corners)[0]
        best = int(np.argmax(overlaps))
        if overlaps[best] < threshold:
            return False
        if self.is_difficult[best]:
            return None
        is_first, self.was_found[best] = not self.was_found[best], True
        return is_first


def _area(recall: np.ndarray, precision: np.ndarray) -> float:
    """Under the curve whose precision is the best at that recall or a greater one."""
    recall, precision = np.append(recall, 1.0), np.append(precision, 0.0)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def _eleven_points(recall: np.ndarray, precision: np.ndarray) -> float:
    points = np.linspace(0, 1, 11)
    return float(np.mean([precision[recall >= p - 1e-12].max(initial=0.0) for p in points]))


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes a (A, 4) and b (B, 4), corners as in `Boxes`: (A, B)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = np.prod(np.maximum(high - low, 0), axis=-1)
    areas = [np.prod(np.maximum(x[:, 2:] - x[:, :2], 0), axis=-1) for x in (a, b)]
    union = areas[0][:, None] + areas[1][None] - intersection
    return intersection / np.maximum(union, 1e-12)


def suppress(corners: np.ndarray, scores: np.ndarray, overlap: float) -> np.ndarray:
    """Non-maximum suppression: indices, by falling score, of boxes that no better kept one overlaps more."""
    order = np.argsort(-scores, kind="stable")
    overlaps = iou(corners[order], corners[order]) > overlap
    is_kept = np.ones(len(order), bool)
    for i in range(len(order)):
        if is_kept[i]:
            is_kept[i + 1 :] &= ~overlaps[i, i + 1 :]
    return order[is_kept]
