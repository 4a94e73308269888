"""CIFAR-10 from either of its published archives: Python pickles or fixed-length binary records.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import io
import pathlib
import pickle

import numpy as np

RECORD = 1 + 3 * 32 * 32  # bytes: a label, then the red, green and blue planes
TRAIN = [f"data_batch_{i}" for i in range(1, 6)]


class Cifar10:
    """`source[i]`: "image" uint8 (32, 32, 3), "label" int32.

    Args:
      folder: with `data_batch_1` ... `test_batch`, with or without `.bin`.
      is_train: the five training batches, or the test batch.

    Raises:
      FileNotFoundError: a batch is missing in both formats.
      ValueError: a file is not in its format.
    """

    def __init__(self, folder, is_train: bool):
        names = TRAIN if is_train else ["test_batch"]
        parts = [_read(pathlib.Path(folder) / name) for name in names]
        self.images, self.labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {"image": self.images[i], "label": self.labels[i]}


def _read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    binary = path.with_name(f"{path.name}.bin")
    if binary.exists():
        return _read_binary(binary)
    if path.exists():
        return _read_pickle(path)
    raise FileNotFoundError(f"neither {path} nor {binary} is there")


def _read_binary(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    data = np.fromfile(path, np.uint8)
    if len(data) == 0 or len(data) % RECORD:
        raise ValueError(f"{path} has {len(data)} bytes, which is no multiple of {RECORD}")
    records = data.reshape(-1, RECORD)
    return _to_images(records[:, 1:]), _checked_labels(records[:, 0], path)


def _read_pickle(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        return _to_images(np.asarray(batch[b"data"])), _checked_labels(batch[b"labels"], path)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no CIFAR-10 batch: {error}") from None


class _ArrayUnpickler(pickle.Unpickler):
    """Makes NumPy arrays and nothing else: an archive from anywhere cannot run code."""

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _to_images(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _checked_labels(labels, path: pathlib.Path) -> np.ndarray:
    labels = np.asarray(labels, np.int32)
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{path} has labels outside 0..9: {labels.min()}..{labels.max()}")
    return labels
