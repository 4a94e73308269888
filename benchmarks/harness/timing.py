"""Interleaved timing: every contender once a round, the order reversed in every other round, medians."""

import statistics
from typing import NamedTuple

from harness.workers import Team

Key = tuple[str, str]  # ("kind/contender", pass)


class Pace(NamedTuple):
    """How long a benchmark looks at each thing."""

    rounds: int
    block: float  # seconds of one timed block, at least one call


def interleave(team: Team, keys: list[Key], pace: Pace) -> dict[Key, float]:
    """Median seconds of each contender's pass.

    The processes are timed one at a time; the others wait on their pipes. Drift of the clock speed meets all
    of them alike, so ratios within one call of this function are sound and absolute times are not.
    """
    counts = {key: max(1, min(10_000, int(pace.block / _run(team, key, 1)))) for key in keys}
    seconds: dict[Key, list[float]] = {key: [] for key in keys}
    for number in range(pace.rounds):
        for key in keys if number % 2 == 0 else reversed(keys):
            seconds[key].append(_run(team, key, counts[key]))
    return {key: statistics.median(values) for key, values in seconds.items()}


def _run(team: Team, key: Key, count: int) -> float:
    where, one = key
    kind, _, name = where.partition("/")
    return team.workers[kind].call("run", name, one, count)
