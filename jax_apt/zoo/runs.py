"""Finished runs on disk, found again by everything that they depend on.

One JSON file per run, written whole or not at all. A file that is damaged, or that belongs to other
settings, another version or another machine, does not count as a run.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any


class Runs:
    """The finished runs in a folder that share some settings.

    Args:
      folder: where they are; made when the first is saved.
      common: JSON-serializable dictionary of all that the runs share.
    """

    def __init__(self, folder: pathlib.Path, common: dict[str, Any]):
        self.folder, self.common = folder, common
        self.damaged: list[pathlib.Path] = []  # files that were there and could not be used

    def path(self, **which) -> pathlib.Path:
        """The file of one run, for example `path(network="mlp", seed=0, precision="apt")`."""
        name = "-".join(str(value) for value in which.values())
        return self.folder / f"{name}-{_digest(self._key(which))[:12]}.json"

    def load(self, **which) -> Any | None:
        """The result of a finished run, or None if there is none or its file is damaged."""
        path = self.path(**which)
        try:
            record = json.loads(path.read_bytes())
            if record["key"] == self._key(which) and record["digest"] == _digest(record["result"]):
                return record["result"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            pass
        self.damaged.append(path)
        return None

    def save(self, result: Any, **which) -> None:
        """Keeps a JSON-serializable result."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"key": self._key(which), "digest": _digest(result), "result": result}
        write_whole(self.path(**which), json.dumps(record, allow_nan=False))

    def _key(self, which: dict[str, Any]) -> dict[str, Any]:
        return which | {"common": self.common}


def read_runs(folder: pathlib.Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """(key, result) of every undamaged run in a folder, whatever it depends on."""
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_bytes())
            if record["digest"] == _digest(record["result"]):
                yield record["key"], record["result"]
        except (ValueError, KeyError, TypeError):
            continue


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file so that an interruption leaves the old one or the new one, never a part."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
