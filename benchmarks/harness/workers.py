"""Worker processes: one for each setting of XLA's flags, one for PyTorch; alive and idle between timings.

A worker waits on a pipe, so it takes no time from the one that is measured. Commands and answers are pickles.
"""

import os
import pathlib
import pickle
import subprocess
import sys
from typing import Any

Key = tuple[str, str]  # ("kind/contender", pass)

_YNN_OFF = "--xla_cpu_experimental_ynn_fusion_type="  # empty: XLA's own convolutions and reductions

ENVIRONMENTS: dict[str, dict[str, str]] = {
    "jax": {"XLA_FLAGS": ""},
    "jax_ynn_off": {"XLA_FLAGS": _YNN_OFF},
    "torch": {},
}

# What makes XLA and PyTorch use AVX2 and FMA at most, as on a CPU that has no more; JAX_APT_ISA is inherited.
_AVX2_FLAG = "--xla_cpu_max_isa=AVX2"
_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


class WorkerError(RuntimeError):
    """A worker's own exception, with its traceback."""


class Worker:
    """A process that prepares the contenders of a case and times them on command."""

    def __init__(self, kind: str, threads: int, is_avx2: bool):
        environment = dict(os.environ) | ENVIRONMENTS[kind]
        if is_avx2:
            environment |= _AVX2 | {"XLA_FLAGS": f"{_AVX2_FLAG} {environment.get('XLA_FLAGS', '')}".strip()}
        environment |= {"JAX_PLATFORMS": "cpu"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        environment["PYTHONPATH"] = str(pathlib.Path(__file__).parents[1])
        command = [sys.executable, "-m", "harness.worker", kind, str(threads)]
        self.kind = kind
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def send(self, name: str, *args: Any) -> None:
        """Starts a command; `receive` waits for its answer."""
        assert self._process.stdin is not None
        pickle.dump((name, args), self._process.stdin)
        self._process.stdin.flush()

    def receive(self) -> Any:
        assert self._process.stdout is not None
        try:
            is_good, answer = pickle.load(self._process.stdout)
        except EOFError:
            raise WorkerError(f"worker {self.kind} died with status {self._process.wait()}") from None
        if not is_good:
            raise WorkerError(f"in worker {self.kind}:\n{answer}")
        return answer

    def call(self, name: str, *args: Any) -> Any:
        self.send(name, *args)
        return self.receive()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Team:
    """The workers of a benchmark; `with Team([...], threads) as team`.

    Args:
      kinds: keys of `ENVIRONMENTS`.
      threads: cores for every contender.
      is_avx2: whether all contenders use AVX2 and FMA at most.
    """

    def __init__(self, kinds: list[str], threads: int, is_avx2: bool = False):
        self.workers = {kind: Worker(kind, threads, is_avx2) for kind in kinds}

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_) -> None:
        for worker in self.workers.values():
            worker.close()

    def prepare(self, case: dict, contenders: dict[str, list[str]]) -> dict[str, dict]:
        """Builds a case in all workers at once.

        Args:
          case: what `harness.worker` builds, a JSON-serializable dictionary.
          contenders: names by worker kind.

        Returns:
          By "kind/contender": {"passes": names, ...} or {"unavailable": reason}.
        """
        active = {kind: names for kind, names in contenders.items() if names}
        for kind, names in active.items():
            self.workers[kind].send("prepare", case, names)
        answers = {kind: self.workers[kind].receive() for kind in active}
        return {f"{kind}/{name}": info for kind, infos in answers.items() for name, info in infos.items()}

    def run(self, key: Key, count: int) -> float:
        """Mean seconds of a contender's pass in its process; the others wait on their pipes."""
        where, one = key
        kind, _, name = where.partition("/")
        return self.workers[kind].call("run", name, one, count)

    def clear(self) -> None:
        for worker in self.workers.values():
            worker.call("clear")
