"""The child side of `harness.workers`: `python -m harness.worker KIND THREADS`, commands on its input."""

import gc
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from harness.machine import limit_threads
from harness.timing import mean_seconds

Calls = dict[str, Callable[[], Any]]  # pass -> what is timed; returns when its results are there

_IDLE = 0.015  # seconds until the pool of the process timed before stops spinning


class UnavailableError(Exception):
    """A contender that cannot take part in a case; the message says why."""


class _Bench:
    def __init__(self, kind: str):
        self.kind = kind
        self.calls: dict[tuple[str, str], Callable[[], Any]] = {}

    def prepare(self, case: dict, names: list[str]) -> dict[str, dict]:
        return {name: self._prepare(case, name) for name in names}

    def _prepare(self, case: dict, name: str) -> dict:
        try:
            calls, info = _builder(self.kind, case)(case, name)
        except (ImportError, UnavailableError) as error:
            return {"unavailable": f"{type(error).__name__}: {error}"}
        self.calls |= {(name, one): call for one, call in calls.items()}
        return {"passes": list(calls), **info}

    def run(self, name: str, one: str, count: int) -> float:
        """Mean seconds of `count` calls, after the idle time and one warm call."""
        time.sleep(_IDLE)
        return mean_seconds(self.calls[name, one], count)

    def clear(self) -> None:
        self.calls.clear()
        gc.collect()


def _builder(kind: str, case: dict) -> Callable[[dict, str], tuple[Calls, dict]]:
    family = "torch" if kind == "torch" else "jax"
    if case["work"] == "product":
        if family == "torch":
            from harness.torch_products import build
        else:
            from harness.jax_products import build
    elif family == "torch":
        from harness.torch_steps import build
    else:
        from harness.jax_steps import build
    return build


def _serve(kind: str, commands, answers) -> None:
    bench = _Bench(kind)
    while True:
        try:
            name, args = pickle.load(commands)
        except EOFError:
            return
        try:
            answer = True, getattr(bench, name)(*args)
        except Exception:
            answer = False, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    kind, threads = sys.argv[1], int(sys.argv[2])
    limit_threads(threads)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not reach the pipe
    if kind == "torch":
        os.environ.pop("XLA_FLAGS", None)
    _serve(kind, sys.stdin.buffer, answers)
