"""What can be said of a few seeds: Student's intervals, tests seed by seed, Holm's correction, main effects.

Only a configuration of which every seed completed is ranked. The mean of the seeds that survived says how good a
configuration is when it does not diverge, which is another question.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from typing import Any

from smoltrain.sweep.record import SEED, Sweep, Trial

LEVEL = 0.95  # of the intervals; what is left is the share of false differences
# In this order what is not ranked follows what is, and the first that one of its seeds is names a configuration.
UNRANKED = ("diverged", "failed", "interrupted", "preempted", "running", "pending", "stopped", "completed")


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval, `mean` ± `half`; `half` is None where one value is all there is."""

    mean: float
    half: float | None
    count: int


@dataclass(frozen=True)
class Comparison:
    """How much more one configuration came to than the best, over the seeds that both have.

    `p` is of the paired t-test, corrected for all pairs of the sweep; without two seeds in common there is none.
    """

    difference: Estimate | None
    p: float | None

    @property
    def distinguishable(self) -> bool:
        return self.p is not None and self.p <= 1 - LEVEL


@dataclass(frozen=True)
class Effect:
    """The mean objective by the values of a key, over the combinations of the other keys that completed for each value.

    `combinations` of `of` are such; a value of which nothing completed has no mean and stands in no one's way.
    """

    key: str
    means: list[tuple[Any, float | None]]
    combinations: int
    of: int


@dataclass(frozen=True)
class Configuration:
    """Trials that differ in nothing but their seed; `overrides` is what else is varied."""

    overrides: dict[str, Any]
    trials: tuple[Trial, ...]

    @cached_property
    def values(self) -> dict[str, float]:
        """The objective by seed, of the trials that completed."""
        return {
            frozen(t.overrides.get(SEED, t.run.record.get("seed"))): t.objective
            for t in self.trials
            if t.objective is not None
        }

    @cached_property
    def ranked(self) -> bool:
        return all(trial.objective is not None for trial in self.trials)

    @cached_property
    def estimate(self) -> Estimate | None:
        return estimate(list(self.values.values())) if self.values else None

    @property
    def status(self) -> str:
        """`completed`, or the worst of what else became of a seed."""
        return next(status for status in UNRANKED if any(trial.status == status for trial in self.trials))

    def best(self, greater: bool) -> Trial | None:
        """The trial that came to most, of those that completed."""
        completed = [trial for trial in self.trials if trial.objective is not None]
        sign = -1 if greater else 1
        return min(completed, key=lambda trial: sign * (trial.objective or 0.0), default=None)


def frozen(value: Any) -> str:
    """A value as a text that only it has."""
    return json.dumps(value, sort_keys=True)


# ---------------------------------------------------------------- configurations


def seeded(sweep: Sweep) -> bool:
    """Whether some configuration was run with several seeds, and another was not the same."""
    return SEED in sweep.varied and len(sweep.varied) > 1 and len(grouped(sweep)) < len(sweep.trials)


def grouped(sweep: Sweep) -> list[Configuration]:
    groups: dict[str, list[Trial]] = {}
    for trial in sweep.trials:
        groups.setdefault(frozen([trial.overrides.get(key) for key in sweep.varied if key != SEED]), []).append(trial)
    others = [{k: v for k, v in group[0].overrides.items() if k != SEED} for group in groups.values()]
    return [Configuration(one, tuple(group)) for one, group in zip(others, groups.values(), strict=True)]


def standings(sweep: Sweep) -> list[Configuration]:
    """The configurations that are ranked, the best first, and then the others; without several seeds, the trials."""
    found = grouped(sweep) if seeded(sweep) else [Configuration(t.overrides, (t,)) for t in sweep.trials]
    sign = -1 if sweep.greater else 1

    def place(one: Configuration) -> tuple[int, float, int]:
        mean = one.estimate.mean if one.estimate else sign * math.inf
        after = 0 if one.ranked else 1 + len(UNRANKED) - UNRANKED.index(one.status)
        return after, sign * mean, one.trials[0].number

    return sorted(found, key=place)


# ---------------------------------------------------------------- seeds


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which is 0 where values differ only as rounding makes them."""
    mean = math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    return mean, error if error > 1e-12 * max(map(abs, values)) else 0.0


def estimate(values: Sequence[float]) -> Estimate:
    """Student's interval for the mean; it holds for values that are normally distributed, which few are exactly."""
    if len(values) == 1:
        return Estimate(values[0], None, 1)
    mean, error = spread(values)
    return Estimate(mean, error * quantile(len(values) - 1), len(values))


def inside(t: float, freedom: int) -> float:
    """How likely Student's t, of so many degrees of freedom, is between -t and t.

    The finite sum that there is for whole degrees (Abramowitz and Stegun 26.7.3-4): scipy takes half as long to import
    as a whole answer may take.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    odd = freedom % 2
    term = 0.0 if freedom == 1 else math.cos(angle) if odd else 1.0
    total = term
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


@cache
def quantile(freedom: int) -> float:
    """The t that is exceeded, to either side, as seldom as LEVEL says; by bisection."""
    low, high = 0.0, 16.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle, freedom) < LEVEL else (low, middle)
    return middle


def differences(one: Mapping[str, float], other: Mapping[str, float]) -> list[float]:
    """By how much one came to more than the other, for each seed that both have."""
    return [value - other[seed] for seed, value in one.items() if seed in other]


def p_value(values: Sequence[float]) -> float:
    """How likely differences as large as these are if there is none: the paired t-test.

    Where all of them are the same it would be certain of two rows of a test set; the sign test is not.
    """
    mean, error = spread(values)
    if error == 0:
        return 1.0 if mean == 0 else 2.0 ** (1 - len(values))
    return 1 - inside(abs(mean / error), len(values) - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected for their number, so that any false one among them is as unlikely as one alone (Holm 1979)."""
    corrected, least = [0.0] * len(p_values), 0.0
    for passed, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - passed) * p_values[i]))
        corrected[i] = least
    return corrected


def against_the_best(ranked: Sequence[Configuration]) -> list[Comparison]:
    """Each but the first compared with the first, which is the best.

    The correction is for all pairs and not only for these: which one is the best was read off the same results.
    """
    pairs = {}
    for i, j in combinations(range(len(ranked)), 2):
        values = differences(ranked[j].values, ranked[i].values)
        if len(values) > 1:
            pairs[i, j] = p_value(values)
    corrected = dict(zip(pairs, holm(list(pairs.values())), strict=True))
    found = []
    for j, other in enumerate(ranked[1:], 1):
        values = differences(other.values, ranked[0].values)
        found.append(Comparison(estimate(values) if values else None, corrected.get((0, j))))
    return found


# ---------------------------------------------------------------- keys


def effects(sweep: Sweep) -> list[Effect]:
    """The main effect of each key but the seed, where more than one is varied."""
    keys = [key for key in sweep.varied if key != SEED]
    return [effect(sweep, key) for key in keys] if len(keys) > 1 else []


def effect(sweep: Sweep, key: str) -> Effect:
    others = [name for name in sweep.varied if name != key]
    values = {frozen(trial.overrides.get(key)): trial.overrides.get(key) for trial in sweep.trials}
    rest: dict[str, dict[str, float]] = {}
    for trial in sweep.trials:
        came = rest.setdefault(frozen([trial.overrides.get(name) for name in others]), {})
        if trial.objective is not None:
            came[frozen(trial.overrides.get(key))] = trial.objective
    completed = {value for came in rest.values() for value in came}
    balanced = [came for came in rest.values() if completed and completed <= came.keys()]

    def mean(value: str) -> float | None:
        return mean_of(came[value] for came in balanced) if balanced and value in completed else None

    return Effect(key, [(typed, mean(value)) for value, typed in values.items()], len(balanced), len(rest))


def mean_of(values: Iterable[float]) -> float:
    known = list(values)
    return math.fsum(known) / len(known)
