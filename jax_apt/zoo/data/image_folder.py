"""Images in one folder per class, as ImageNet is kept: `train/n01440764/x.JPEG`."""

import pathlib

import numpy as np
from PIL import Image

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


class ImageFolder:
    """`source[i]`: "image" uint8 (height, width, 3), "label" int32, the place of its folder in the order.

    Args:
      folder: holds one folder per class.

    Raises:
      FileNotFoundError: no folder in it holds an image.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.classes = sorted(p.name for p in self.folder.iterdir() if p.is_dir())
        self.files = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((self.folder / name).iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise FileNotFoundError(f"{self.folder} has no folders with images ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        path, label = self.files[i]
        return {"image": read_image(path), "label": np.array(label, np.int32)}


def read_image(path) -> np.ndarray:
    """uint8 (height, width, 3), whatever the file's own mode."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
