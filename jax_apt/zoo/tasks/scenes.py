"""Scenes drawn from real pen strokes: scikit-learn's digits, turned, sheared, scaled, among coloured clutter.

All scenes of a batch are drawn at once. A training epoch draws one scene around each training digit; test
scenes use test digits alone. Digits are light and the background dark: with strokes of any colour a narrow
network guesses for hundreds of steps before it learns, and the score of a short training says when that was.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jax_apt.zoo.tasks.digits import split
from jax_apt.zoo.tasks.task import Dataset

Rng = np.random.Generator
STROKE = 8  # pixels along a side of a stored digit
DARK, LIGHT = 0.2, 0.8  # brightest background, darkest digit
OPAQUE = 0.3  # share of ink at which a pixel belongs to the digit


@dataclass(frozen=True)
class Style:
    """How scenes of a task look."""

    size: int  # pixels along a side
    digits: int  # at most, at least 1
    fragments: int  # torn strokes in the background
    scale: tuple[float, float]  # pixels of the scene per pixel of the stroke
    turn: float = 0.3  # radians, either way
    shear: float = 0.2
    noise: float = 0.07  # standard deviation; colours lie in 0..1


class Scenes(NamedTuple):
    """N scenes with up to K digits each; class 0 is "no digit", class d + 1 the digit d."""

    images: np.ndarray  # float32 (N, size, size, 3); colours of 0..1 as -2..2
    classes: np.ndarray  # int32 (N, K)
    boxes: np.ndarray  # float32 (N, K, 4): top, left, bottom, right, as parts of the side
    masks: np.ndarray  # int32 (N, size, size): class of each pixel


def draw(strokes: np.ndarray, labels: np.ndarray, style: Style, rng: Rng) -> Scenes:
    """One scene around each stroke; further digits and fragments come from the same strokes.

    Args:
      strokes: float32 (N, 8, 8, 1), ink in 0..1.
      labels: int32 (N,), digits.
      style: of the scenes.
      rng: all chance in the scenes.
    """
    count, ink = len(strokes), strokes[..., 0]
    canvas = _background(count, style.size, rng)
    centers = _centers(count, style, rng)
    for k in range(style.fragments):
        torn = _tear(ink[rng.integers(0, count, count)], rng)
        alpha = _place(torn, centers[:, style.digits + k], style, rng)
        canvas = _paint(canvas, alpha, rng.uniform(0.2, 1, (count, 1, 1, 3)))
    masks = np.zeros((count, style.size, style.size), np.int32)
    classes, boxes = [], []
    for k in range(style.digits):
        which = np.arange(count) if k == 0 else rng.integers(0, count, count)
        is_there = rng.random(count) < (1.0 if k == 0 else 0.6)
        alpha = _place(ink[which], centers[:, k], style, rng) * is_there[:, None, None]
        canvas = _paint(canvas, alpha, rng.uniform(LIGHT, 1, (count, 1, 1, 1)))
        classes.append(np.where(is_there, labels[which] + 1, 0))
        boxes.append(_bounds(alpha > OPAQUE))
        masks = np.where(alpha > OPAQUE, classes[-1][:, None, None], masks)
    noisy = (canvas + style.noise * rng.standard_normal(canvas.shape) - 0.5) / 0.25
    classes, boxes = np.stack(classes, 1), np.stack(boxes, 1)
    return Scenes(noisy.astype(np.float32), classes.astype(np.int32), boxes, masks.astype(np.int32))


def load(seed: int, style: Style, copies: int, as_example: Callable) -> Dataset:
    """Scenes around the digits of a seed's split; `as_example(scenes, labels)` gives (inputs, labels)."""
    train, train_labels, test, test_labels = split(seed)

    def augment(strokes, labels, rng):
        return as_example(draw(strokes, labels, style, rng), labels)

    test, test_labels = (np.concatenate([array] * copies) for array in (test, test_labels))
    inputs, labels = augment(test, test_labels, np.random.default_rng(0))
    return Dataset(train, train_labels, inputs, labels, augment, is_augmented_by_batch=True)


# Layers of a scene


def _background(count: int, size: int, rng: Rng) -> np.ndarray:
    """A colour that changes slowly along one direction."""
    color = rng.uniform(0, DARK, (count, 1, 1, 3))
    slope = rng.uniform(-0.3, 0.3, (2, count, 1, 1, 3))
    ramp = np.linspace(-0.5, 0.5, size)
    return color + slope[0] * ramp[:, None, None] + slope[1] * ramp[None, :, None]


def _centers(count: int, style: Style, rng: Rng) -> np.ndarray:
    """(N, objects, 2): row and column; a lone digit near the middle, several in quarters of their own."""
    objects = style.digits + style.fragments
    middle = style.size / 2
    if style.digits == 1:
        main = rng.uniform(-0.15, 0.15, (count, 1, 2)) * style.size + middle
        others = rng.uniform(0, style.size, (count, objects - 1, 2))
        return np.concatenate([main, others], axis=1)
    quarters = rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)[:, np.arange(objects) % 4]
    corner = np.stack([quarters // 2, quarters % 2], axis=-1)
    jitter = rng.uniform(-0.08, 0.08, corner.shape)
    return style.size * ((corner + 0.5) / 2 + jitter)


def _tear(ink: np.ndarray, rng: Rng) -> np.ndarray:
    """Keeps the ink on one side of a line near the middle."""
    angle = rng.uniform(0, 2 * np.pi, (len(ink), 1, 1))
    axis = np.arange(STROKE) - (STROKE - 1) / 2
    side = np.cos(angle) * axis[:, None] + np.sin(angle) * axis[None]
    return ink * (side > rng.uniform(-0.5, 1.5, (len(ink), 1, 1)))


def _place(ink: np.ndarray, centers: np.ndarray, style: Style, rng: Rng) -> np.ndarray:
    """Ink (N, 8, 8) turned, sheared and scaled about its centre: opacity (N, size, size)."""
    count = len(ink)
    angle = rng.uniform(-style.turn, style.turn, count)
    shear = rng.uniform(-style.shear, style.shear, count)
    scale = np.exp(rng.uniform(np.log(style.scale[0]), np.log(style.scale[1]), count))
    stretch = np.exp(rng.uniform(-0.15, 0.15, count))
    cos, sin, one, zero = np.cos(angle), np.sin(angle), np.ones(count), np.zeros(count)
    matrix = _matrices(cos, -sin, sin, cos) @ _matrices(one, shear, zero, one)
    matrix = matrix @ _matrices(scale * stretch, zero, zero, scale / stretch)
    inverse = np.linalg.inv(matrix)
    pixels = np.indices((style.size, style.size)).reshape(2, -1).T[None]
    source = (pixels - centers[:, None]) @ inverse.transpose(0, 2, 1) + (STROKE - 1) / 2
    return _sample(ink, source.astype(np.float32)).reshape(count, style.size, style.size)


def _matrices(a: Any, b: Any, c: Any, d: Any) -> np.ndarray:
    return np.stack([np.stack([a, b], -1), np.stack([c, d], -1)], -2)


def _sample(images: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Bilinear values of images (N, 8, 8) at points (N, P, 2); 0 outside."""
    padded = np.pad(images, ((0, 0), (1, 2), (1, 2)))
    points = np.clip(points + 1, 0, STROKE + 1)
    low = np.floor(points).astype(int)
    part, rows = points - low, np.arange(len(images))[:, None]
    value = np.zeros((), points.dtype)
    for down in (0, 1):
        for right in (0, 1):
            weight = np.abs(1 - down - part[..., 0]) * np.abs(1 - right - part[..., 1])
            value = value + weight * padded[rows, low[..., 0] + down, low[..., 1] + right]
    return value


def _paint(canvas: np.ndarray, alpha: np.ndarray, color: np.ndarray) -> np.ndarray:
    opacity = np.minimum(1.5 * alpha, 1)[..., None]
    return canvas * (1 - opacity) + color * opacity


def _bounds(is_inside: Any) -> np.ndarray:
    """Tight boxes (N, 4) around masks (N, size, size), as parts of the side; zeros around nothing."""
    size = is_inside.shape[1]
    edges = []
    for axis in (2, 1):
        line = is_inside.any(axis=axis)
        edges.append((line.argmax(1), size - line[:, ::-1].argmax(1)))
    (top, bottom), (left, right) = edges
    boxes = np.stack([top, left, bottom, right], axis=1) / size
    return np.where(is_inside.any((1, 2))[:, None], boxes, 0).astype(np.float32)
