"""Interleaved timing: every contender once a round, the order reversed in every other round, medians."""

import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Pace(NamedTuple):
    """How long a benchmark looks at each thing."""

    rounds: int
    block: float  # seconds of one timed block, at least one call


def interleave(run: Callable[[Key, int], float], keys: Sequence[Key], pace: Pace) -> dict[Key, float]:
    """Median seconds of each key.

    Args:
      run: `run(key, count)` gives the mean seconds of `count` calls; nothing else runs meanwhile.
      keys: what is timed.
      pace: rounds, and the length of a block.

    Drift of the clock speed meets all keys alike, so ratios within one call of this function are sound and
    absolute times are not.
    """
    counts = {key: max(1, min(10_000, int(pace.block / run(key, 1)))) for key in keys}
    seconds: dict[Key, list[float]] = {key: [] for key in keys}
    for number in range(pace.rounds):
        for key in keys if number % 2 == 0 else reversed(keys):
            seconds[key].append(run(key, counts[key]))
    return {key: statistics.median(values) for key, values in seconds.items()}


def mean_seconds(call: Callable[[], Any], count: int) -> float:
    """Of `count` calls, after a warm one."""
    call()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count
