"""What the published recipes do to images before a network sees them. Images are uint8 (H, W, 3)."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jax_apt.zoo.metrics import iou

Rng = np.random.Generator
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet's colours in 0..1
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
IGNORED = 255
MOST_OBJECTS = 64  # in one image; annotations are padded to so many


def normalize(image: np.ndarray) -> np.ndarray:
    return (image.astype(np.float32) / 255 - MEAN) / DEVIATION


def resize(image: np.ndarray, height: int, width: int, resample=Image.Resampling.BILINEAR) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), resample))


# Classification


def random_resized_crop(example: dict, rng: Rng, size: int) -> tuple[np.ndarray, np.ndarray]:
    """8 to 100 % of the area at a ratio of 3/4 to 4/3, resized, mirrored half of the time (1409.4842)."""
    image = example["image"]
    height, width = image.shape[:2]
    area = rng.uniform(0.08, 1.0) * height * width
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    h, w = min(height, round((area / ratio) ** 0.5)), min(width, round((area * ratio) ** 0.5))
    h, w = max(h, 1), max(w, 1)
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    crop = resize(image[top : top + h, left : left + w], size, size)
    return normalize(_mirrored(crop, rng)), example["label"]


def center_crop(example: dict, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The middle of the image, whose shorter side is resized to 8/7 of the crop."""
    image, shorter = example["image"], round(size * 8 / 7)
    height, width = image.shape[:2]
    scale = shorter / min(height, width)
    image = resize(image, max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return normalize(image[top : top + size, left : left + size]), example["label"]


def padded_crop(example: dict, rng: Rng, size: int, pad: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR: moved by up to `pad` pixels, mirrored half of the time (1512.03385)."""
    padded = np.pad(example["image"], ((pad, pad), (pad, pad), (0, 0)))
    top, left = rng.integers(0, 2 * pad + 1, 2)
    return normalize(_mirrored(padded[top : top + size, left : left + size], rng)), example["label"]


def whole(example: dict, size: int) -> tuple[np.ndarray, np.ndarray]:
    return normalize(example["image"]), example["label"]


def _mirrored(image: np.ndarray, rng: Rng) -> np.ndarray:
    return image[:, ::-1] if rng.random() < 0.5 else image


# Segmentation


def random_window(example: dict, rng: Rng, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A window of `size`, mirrored half of the time; outside the image nothing counts (1412.7062)."""
    image, mask = example["image"], example["mask"]
    image, mask = _pad_to(image, mask, size)
    top, left = (rng.integers(0, side - size + 1) for side in mask.shape)
    window = slice(top, top + size), slice(left, left + size)
    image, mask = image[window], mask[window]
    if rng.random() < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    return normalize(image), mask


def padded_whole(example: dict, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The image at the upper left of a square of `size`; it may be no larger than that."""
    image, mask = _pad_to(example["image"], example["mask"], size)
    return normalize(image[:size, :size]), mask[:size, :size]


def _pad_to(image: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    below, right = (max(size - side, 0) for side in mask.shape)
    mean = np.round(255 * MEAN).astype(np.uint8)
    padded = np.broadcast_to(mean, (mask.shape[0] + below, mask.shape[1] + right, 3)).copy()
    padded[: mask.shape[0], : mask.shape[1]] = image
    return padded, np.pad(mask, ((0, below), (0, right)), constant_values=IGNORED)


# Detection


class _Scene(NamedTuple):
    image: np.ndarray
    boxes: np.ndarray  # (K, 4), in parts of the sides
    classes: np.ndarray


def ssd_sample(example: dict, rng: Rng, size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Zooms out, crops around objects, mirrors, resizes (1512.02325, sections 2.2 and 3.6)."""
    scene = _Scene(example["image"], example["boxes"], example["classes"])
    if rng.random() < 0.5:
        scene = _zoom_out(scene, rng)
    scene = _crop_around_objects(scene, rng)
    image, boxes = scene.image, scene.boxes
    if rng.random() < 0.5:
        image, boxes = (
            image[:, ::-1],
            np.stack([boxes[:, 0], 1 - boxes[:, 3], boxes[:, 2], 1 - boxes[:, 1]], 1),
        )
    labels = _padded_objects(boxes, scene.classes, np.zeros(len(boxes), bool))
    return normalize(resize(np.ascontiguousarray(image), size, size)), labels


def ssd_whole(example: dict, size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    labels = _padded_objects(example["boxes"], example["classes"], example["is_difficult"])
    return normalize(resize(example["image"], size, size)), labels


def _zoom_out(scene: _Scene, rng: Rng) -> _Scene:
    """The image on a canvas of up to four times its sides."""
    factor, (height, width) = rng.uniform(1, 4), scene.image.shape[:2]
    h, w = int(factor * height), int(factor * width)
    top, left = rng.integers(0, h - height + 1), rng.integers(0, w - width + 1)
    canvas = np.broadcast_to(np.round(255 * MEAN).astype(np.uint8), (h, w, 3)).copy()
    canvas[top : top + height, left : left + width] = scene.image
    sides, corner = np.array([height, width] * 2), np.array([top, left] * 2)
    boxes = (scene.boxes * sides + corner) / np.array([h, w] * 2)
    return scene._replace(image=canvas, boxes=boxes.astype(np.float32))


def _crop_around_objects(scene: _Scene, rng: Rng) -> _Scene:
    """A crop that overlaps an object by a least amount drawn at random, or the whole image."""
    least = rng.choice([np.nan, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
    if np.isnan(least) or not len(scene.boxes):
        return scene
    for _ in range(50):
        h, w = rng.uniform(0.3, 1.0, 2)
        if not 0.5 <= h / w <= 2:
            continue
        top, left = rng.uniform(0, 1 - h), rng.uniform(0, 1 - w)
        window = np.array([top, left, top + h, left + w])
        centre = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2
        is_inside = np.all((centre > window[:2]) & (centre < window[2:]), axis=1)
        if is_inside.any() and iou(window[None], scene.boxes[is_inside]).max() >= least:
            return _cropped(scene, window, is_inside)
    return scene


def _cropped(scene: _Scene, window: np.ndarray, is_inside: Any) -> _Scene:
    sides = np.array(scene.image.shape[:2] * 2)
    top, left, bottom, right = np.round(window * sides).astype(int)
    bottom, right = max(bottom, top + 1), max(right, left + 1)
    corner, extent = np.array([top, left] * 2), np.array([bottom - top, right - left] * 2)
    boxes = np.clip((scene.boxes[is_inside] * sides - corner) / extent, 0, 1).astype(np.float32)
    return _Scene(scene.image[top:bottom, left:right], boxes, scene.classes[is_inside])


def _padded_objects(boxes, classes, is_difficult) -> dict[str, np.ndarray]:
    """Arrays of MOST_OBJECTS entries; class 0 is none."""
    kept = slice(0, MOST_OBJECTS)
    missing = (0, MOST_OBJECTS - len(classes[kept]))
    return {
        "boxes": np.pad(boxes[kept].astype(np.float32), (missing, (0, 0))),
        "classes": np.pad(classes[kept], missing),
        "is_difficult": np.pad(is_difficult[kept], missing),
    }


# By kind of task: (training: (example, rng, size), evaluation: (example, size))
IMAGES = {
    "imagenet": (random_resized_crop, center_crop),
    "cifar10": (padded_crop, whole),
    "voc-detection": (ssd_sample, ssd_whole),
    "voc-segmentation": (random_window, padded_whole),
}


def for_training(dataset: str, size: int):
    """(example, rng) to (inputs, labels)."""
    if dataset == "text":
        return lambda example, rng: _sentences(example)
    return partial(IMAGES[dataset][0], size=size)


def for_evaluation(dataset: str, size: int):
    """example to (inputs, labels)."""
    return _sentences if dataset == "text" else partial(IMAGES[dataset][1], size=size)


def _sentences(example: dict):
    return (example["source"], example["begun"]), example["target"]
