"""Pascal VOC as its kit lays it out: JPEGImages, Annotations, SegmentationClass, ImageSets.

Source: Everingham et al., "The Pascal Visual Object Classes Challenge", 2010, development kit.
"""

import pathlib
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from jax_apt.zoo.data.image_folder import read_image

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)


def read_image_set(folder, kind: str, name: str) -> list[str]:
    """Identifiers in `ImageSets/<kind>/<name>.txt`, for example ("Main", "trainval")."""
    path = pathlib.Path(folder) / "ImageSets" / kind / f"{name}.txt"
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]


class VocDetection:
    """`source[i]`: "image" uint8 (H, W, 3), "boxes" float32 (K, 4) in parts of the sides (top, left, bottom,
    right), "classes" int32 (K,) from 1 on, "is_difficult" bool (K,).

    Args:
      folders: one or several years, for example VOC2007 and VOC2012.
      name: of the image set, for example "trainval".
    """

    def __init__(self, folders, name: str):
        folders = [
            pathlib.Path(f) for f in ([folders] if isinstance(folders, str | pathlib.Path) else folders)
        ]
        self.images = [(f, i) for f in folders for i in read_image_set(f, "Main", name)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        folder, name = self.images[i]
        image = read_image(folder / "JPEGImages" / f"{name}.jpg")
        return {"image": image, **read_annotation(folder / "Annotations" / f"{name}.xml")}


def read_annotation(path) -> dict[str, np.ndarray]:
    """Boxes, classes and marks of difficulty in an annotation file.

    Raises:
      ValueError: the file is no annotation, or names a class that VOC does not have.
    """
    try:
        root = ElementTree.parse(path).getroot()
        height, width = (float(_text(root, f"size/{side}")) for side in ("height", "width"))
        objects = [_read_object(node) for node in root.iter("object")]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    pixels = np.array([box for _, box, _ in objects], np.float32).reshape(-1, 4)
    pixels[:, :2] -= 1  # the kit counts pixels from 1 and includes the last one
    return {
        "boxes": pixels / np.array([height, width, height, width], np.float32),
        "classes": np.array([label for label, _, _ in objects], np.int32),
        "is_difficult": np.array([difficult for _, _, difficult in objects], bool),
    }


def _read_object(node) -> tuple[int, list[float], bool]:
    name = _text(node, "name").strip()
    if name not in CLASSES:
        raise ValueError(f"class {name!r} is none of {', '.join(CLASSES)}")
    box = [float(_text(node, f"bndbox/{edge}")) for edge in ("ymin", "xmin", "ymax", "xmax")]
    return 1 + CLASSES.index(name), box, (node.findtext("difficult") or "0").strip() == "1"


def _text(node, path: str) -> str:
    text = node.findtext(path)
    if text is None:
        raise ValueError(f"<{node.tag}> has no {path}")
    return text


class VocSegmentation:
    """`source[i]`: "image" uint8 (H, W, 3), "mask" int32 (H, W): 0 background, 255 does not count."""

    def __init__(self, folder, name: str):
        self.folder = pathlib.Path(folder)
        self.names = read_image_set(folder, "Segmentation", name)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        name = self.names[i]
        image = read_image(self.folder / "JPEGImages" / f"{name}.jpg")
        return {"image": image, "mask": read_mask(self.folder / "SegmentationClass" / f"{name}.png")}


def read_mask(path) -> np.ndarray:
    """int32 (height, width) class numbers of a palette image.

    Raises:
      ValueError: the image has no palette, so that its values are colours and not classes.
    """
    with Image.open(path) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"{path} is an image of mode {image.mode}; a mask has mode P or L")
        return np.asarray(image).astype(np.int32)
