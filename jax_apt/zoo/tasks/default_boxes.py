"""SSD's default boxes: their shapes, their match with true boxes, offsets between the two.

Source: Liu et al., arXiv 1512.02325, sections 2.2 and 3; the variances are those of its released code.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array

VARIANCES = np.array([0.1, 0.1, 0.2, 0.2], np.float32)  # of centre and log size
MATCH = 0.5  # least overlap of a default box that stands for a true one


@dataclass(frozen=True)
class Geometry:
    """Default boxes of a network's feature maps; lengths are parts of the image's side."""

    maps: tuple[int, ...]  # pixels along a side of each map
    sizes: tuple[float, ...]  # of the square box of each map, and one more
    ratios: tuple[tuple[int, ...], ...]  # width : height beside 1, each also turned

    def centered(self) -> np.ndarray:
        """float32 (boxes, 4): centre row, centre column, height, width; by map, row, column, shape."""
        boxes = []
        for i, (side, ratios) in enumerate(zip(self.maps, self.ratios, strict=True)):
            size, between = self.sizes[i], (self.sizes[i] * self.sizes[i + 1]) ** 0.5
            shapes = [(size, size), (between, between)]
            for ratio in ratios:
                long, short = size * ratio**0.5, size / ratio**0.5
                shapes += [(short, long), (long, short)]
            middle = (np.arange(side) + 0.5) / side
            rows, columns, shape = np.meshgrid(middle, middle, np.arange(len(shapes)), indexing="ij")
            boxes.append(np.concatenate([np.stack([rows, columns], -1), np.array(shapes)[shape]], -1))
        return np.concatenate([b.reshape(-1, 4) for b in boxes]).astype(np.float32)


# sizes of the 300-pixel network trained on Pascal VOC
VOC300 = Geometry(
    (38, 19, 10, 5, 3, 1),
    tuple(pixels / 300 for pixels in (30, 60, 111, 162, 213, 264, 315)),
    ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
)
SMALL = Geometry((12, 6, 3), (0.25, 0.4, 0.55, 0.75), ((2,), (2,), (2,)))


def to_corners(boxes):
    """Centre, height and width to top, left, bottom, right."""
    return jnp.concatenate(
        [boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], axis=-1
    )


def to_centered(boxes):
    """Top, left, bottom, right to centre, height and width."""
    return jnp.concatenate([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], axis=-1)


def encode(corners: Array, defaults: Array) -> Array:
    """Offsets of true boxes from default ones (centered), both (boxes, 4)."""
    boxes = to_centered(corners)
    centre = (boxes[..., :2] - defaults[:, :2]) / defaults[:, 2:]
    size = jnp.log(jnp.maximum(boxes[..., 2:], 1e-6) / defaults[:, 2:])
    return jnp.concatenate([centre, size], axis=-1) / VARIANCES


def decode(offsets: Array, defaults: Array) -> Array:
    """Corners of the boxes that offsets (..., boxes, 4) stand for; the inverse of `encode`."""
    offsets = offsets * VARIANCES
    centre = offsets[..., :2] * defaults[:, 2:] + defaults[:, :2]
    return to_corners(jnp.concatenate([centre, jnp.exp(offsets[..., 2:]) * defaults[:, 2:]], axis=-1))


def overlap(a: Array, b: Array) -> Array:
    """Intersection over union of corners a (A, 4) and b (B, 4): (A, B)."""
    low = jnp.maximum(a[:, None, :2], b[None, :, :2])
    high = jnp.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    area_a, area_b = (jnp.prod(x[:, 2:] - x[:, :2], axis=-1) for x in (a, b))
    return intersection / jnp.maximum(area_a[:, None] + area_b[None] - intersection, 1e-9)


def match(corners: Array, classes: Array, defaults: Array) -> tuple[Array, Array]:
    """Which true box each default box stands for.

    Args:
      corners: (K, 4) true boxes of an image.
      classes: int32 (K,); 0 marks an entry without a box.
      defaults: (boxes, 4), centered.

    Returns:
      (corners (boxes, 4), classes (boxes,)): of the true box; class 0 where it is none. A true box takes
      the default box that it overlaps most, and all that it overlaps by at least MATCH.
    """
    overlaps = jnp.where(classes[:, None] > 0, overlap(corners, to_corners(defaults)), -1.0)
    best_default = jnp.argmax(overlaps, axis=1)  # (K,)
    owner, amount = jnp.argmax(overlaps, axis=0), jnp.max(overlaps, axis=0)
    for k in range(len(corners)):  # an owner taken later may not displace an earlier one's only box
        at = best_default[k]
        is_true = classes[k] > 0
        owner = owner.at[at].set(jnp.where(is_true, k, owner[at]))
        amount = amount.at[at].set(jnp.where(is_true, 2.0, amount[at]))
    return corners[owner], jnp.where(amount >= MATCH, classes[owner], 0)
