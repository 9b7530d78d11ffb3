"""Which trials of a sweep come next: all of a grid, random ones, those that TPE expects most of, or halving.

    overrides -> axes -> a search: ask() what to run, in any order or at once -> tell() what came of it -> ask() again

What `ask` returns follows from the axes and from what has been told, in whatever order: a search that is made anew and
told again what is known goes on where the other stood.
"""

import fcntl
import importlib.util
import itertools
import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from smoltrain import runs
from smoltrain.config import ConfigError
from smoltrain.config.groups import options

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

Method = Literal["grid", "random", "tpe", "halving"]
SEED = "seed"  # the axis that is not searched: every proposal is run with each of its values
STEPS = "trainer.args.max_steps"
MOST = 10_000  # values of a key, or combinations of a grid: more are a slip of the pen
FINE = 1000  # at least so many different values are drawn from an interval, each short enough for a directory's name
TRIES = 4  # how often TPE may propose what it knows already before chance does


@dataclass
class Settings:
    """The config's node `sweep`. `params` are the varied keys with their values as typed on the command line."""

    search: Method
    trials: int | None
    seed: int
    params: dict[str, Any]
    eta: int
    rungs: int | None


@dataclass
class Axis:
    """One varied key: its values, or the interval from which they are drawn. An override of it begins with `sign`."""

    key: str
    values: list[Any] | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False
    sign: str = ""


@dataclass
class Proposal:
    """A trial to run to its end, or (`until`) to run or continue to a step at which it pauses."""

    values: dict[str, Any]
    until: int | None = None


class Search(Protocol):
    def ask(self) -> list[Proposal]:
        """What is to be run now, and has not been told; empty when the search is over."""

    def tell(self, values: dict[str, Any], objective: float | None, until: int | None) -> None:
        """What came of a proposal: None where it failed, infinity where it diverged. The last word counts."""


def search(
    settings: Settings, axes: list[Axis], objective: str, steps: int | None, storage: Path, jobs: int = 1
) -> Search:
    """The search that the settings describe, over axes of different keys.

    `steps` are a full run's optimizer steps, `storage` is the file in which TPE keeps what it knows, `jobs` are the
    trials that run at once. Raises ConfigError for settings that do not go together.
    """
    check(settings, axes, steps)
    if settings.search == "grid":
        return Grid(grid(axes))
    seeds = next((axis for axis in axes if axis.key == SEED), None)
    searched = [axis for axis in axes if axis is not seeds]
    sign = -1 if runs.worst(objective) < 0 else 1
    found: Search
    if settings.search == "tpe":
        at_once = jobs if seeds is None else max(1, jobs // len(seeds.values or []))
        found = Tpe(searched, settings.trials or 0, settings.seed, objective, storage, at_once)
    elif settings.search == "random":
        found = Grid(drawn(searched, settings))
    else:
        configs = drawn(searched, settings) if settings.trials else grid(searched)
        found = Halving(configs, stops(len(configs), steps or 0, settings.eta, settings.rungs), settings.eta, sign)
    return found if seeds is None else Seeds(found, seeds.values or [], [axis.key for axis in axes])


def check(settings: Settings, axes: list[Axis], steps: int | None) -> None:
    """Raises ConfigError for what no search of this kind can do."""
    method, trials = settings.search, settings.trials
    unbounded = [axis.key for axis in axes if axis.values is None]
    if method not in get_args(Method):
        raise ConfigError(
            f"sweep.search={method}: there is no such search; choose one of {', '.join(get_args(Method))}"
        )
    if trials is not None and trials < 1:
        raise ConfigError(f"sweep.trials={trials}: a sweep has at least one trial")
    if method == "grid" and trials is not None:
        raise ConfigError(
            f"sweep.trials={trials}: a grid runs all combinations; sweep.search=random runs so many of them"
        )
    if unbounded and method == "grid":
        raise ConfigError(
            f"{unbounded[0]}: a grid has no end in an interval; name its values, or sweep.search=random or tpe"
        )
    if trials is None and not unbounded and (count := math.prod(map(size, axes))) > MOST:
        raise ConfigError(
            f"sweep.search={method}: {count:,} combinations; sweep.search=random sweep.trials=20 draws some"
        )
    if unbounded and SEED in unbounded:
        raise ConfigError("seed: every trial is run with each seed; name them, seed=1,2,3")
    if trials is None and (method in ("random", "tpe") or (unbounded and method == "halving")):
        of = f", for {unbounded[0]} is an interval" if method == "halving" else ""
        raise ConfigError(f"sweep.trials=null: sweep.search={method} wants the number of trials{of}; sweep.trials=20")
    if method == "halving":
        check_halving(settings, axes, steps)
    if method == "tpe" and importlib.util.find_spec("optuna") is None:
        raise ConfigError("sweep.search=tpe: Optuna does it, and is not installed; pip install 'smoltrain[sweep]'")


def check_halving(settings: Settings, axes: list[Axis], steps: int | None) -> None:
    if settings.eta < 2:
        raise ConfigError(f"sweep.eta={settings.eta}: one in so many trials goes on at each rung; 2 or more")
    if steps is None or any(axis.key == STEPS for axis in axes):
        raise ConfigError(f"{STEPS}: sweep.search=halving pauses trials at shares of one number of steps; set {STEPS}")
    if settings.rungs is not None and not 1 <= settings.rungs <= most_rungs(steps, settings.eta):
        raise ConfigError(
            f"sweep.rungs={settings.rungs}: {steps} steps divided by sweep.eta={settings.eta} at each rung allow 1 to "
            f"{most_rungs(steps, settings.eta)}"
        )


# ---------------------------------------------------------------- what is varied


def axis(override: "Override", arguments: Sequence[str] = ()) -> Axis:
    """What a parsed override varies; `arguments` are the command line's, which say where else there are options.

    Raises ConfigError where there is nothing to choose from.
    """
    from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, RangeSweep, ValueType

    element, given = override.get_key_element(), override._value
    key = element.lstrip("+")
    sign = element.removesuffix(key)
    other: set[str] = getattr(given, "tags", set()) - {"log"}
    if other:
        raise ConfigError(f"{override.input_line}: tag({min(other)}, …) says nothing here; the tag that does is log")
    if isinstance(given, IntervalSweep):
        return interval(key, given, override, sign)
    found: list[Any] = [given]
    if isinstance(given, Glob):
        found = given.filter(list(options(override.key_or_group, list(arguments))))
    elif isinstance(given, ChoiceSweep):
        found = given.list
    elif isinstance(given, RangeSweep):
        if given.step == 0:
            raise ConfigError(f"{override.input_line}: a range of step 0 has no end; name another step")
        found = list(itertools.islice(given.range(), MOST + 1))
        if len(found) > MOST:
            raise ConfigError(f"{override.input_line}: more than {MOST:,} values; draw from an interval(from,to)")
    if not found:
        mend = (
            "no option is called so" if isinstance(given, Glob) else "write range(from,to), to excluded, from below to"
        )
        raise ConfigError(f"{override.input_line}: there is no value in it; {mend}")
    values = [replace(override, value_type=ValueType.ELEMENT, _value=value).value() for value in found]
    values = list({repr(value): value for value in values}.values())
    if getattr(given, "shuffle", False):
        random.Random(override.input_line).shuffle(values)  # the same order when the sweep is continued
    return Axis(key, values=values, sign=sign)


def interval(key: str, given: Any, override: "Override", sign: str) -> Axis:
    low, high, log = given.start, given.end, "log" in given.tags
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{override.input_line}: an interval goes from a number to a greater one")
    if log and low <= 0:
        raise ConfigError(f"{override.input_line}: a logarithm wants an interval above 0; it begins at {low:g}")
    return Axis(key, low=low, high=high, log=log, integer=isinstance(low, int) and isinstance(high, int), sign=sign)


def size(axis: Axis) -> int:
    """How many different values are drawn from an axis, at least."""
    if axis.values is not None:
        return len(axis.values)
    assert axis.low is not None and axis.high is not None
    return int(axis.high - axis.low) + 1 if axis.integer else FINE


def holds(axis: Axis, value: Any) -> bool:
    """Whether an axis can have a value."""
    if axis.values is not None:
        return named(value) in map(named, axis.values)
    assert axis.low is not None and axis.high is not None
    return numeric(value) and axis.low <= value <= axis.high


def numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def grid(axes: list[Axis]) -> list[dict[str, Any]]:
    """All combinations, the last axis fastest, as Hydra has them."""
    keys = [axis.key for axis in axes]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(axis.values or [] for axis in axes))]


def drawn(axes: list[Axis], settings: Settings) -> list[dict[str, Any]]:
    """`trials` different random combinations, or all there are; more trials begin with the same ones."""
    count = min(settings.trials or 0, math.prod(map(size, axes)))
    return list(itertools.islice(draws(axes, random.Random(settings.seed)), count))


def draws(axes: list[Axis], chance: random.Random) -> Iterator[dict[str, Any]]:
    """Different random combinations; asked for more than there are, it never ends."""
    known: set[str] = set()
    while True:
        values = {axis.key: draw(axis, chance) for axis in axes}
        if named(values) not in known:
            known.add(named(values))
            yield values


def draw(axis: Axis, chance: random.Random) -> Any:
    if axis.values is not None:
        return chance.choice(axis.values)
    assert axis.low is not None and axis.high is not None
    half = 0.5 if axis.integer else 0.0  # so that the ends are as likely as what is between
    low, high = axis.low - half, axis.high + half
    value = math.exp(chance.uniform(math.log(low), math.log(high))) if axis.log else chance.uniform(low, high)
    return short(axis, value)


def short(axis: Axis, value: float) -> Any:
    """A value within an interval with no more digits than it needs to be one of a thousand."""
    assert axis.low is not None and axis.high is not None
    if not axis.integer:
        width = axis.high - axis.low
        unit = min(value, width) if axis.log else width
        value = round(value, 3 - math.floor(math.log10(unit)))
    return min(max(round(value) if axis.integer else value, axis.low), axis.high)


def named(values: Any, until: int | None = None) -> str:
    """One name for the same values in whatever order."""
    return json.dumps([values, until], sort_keys=True)


def finite(objective: float | None) -> float | None:
    return objective if objective is not None and math.isfinite(objective) else None


# ---------------------------------------------------------------- searches


class Grid:
    """All of the given trials, in one batch."""

    def __init__(self, configs: list[dict[str, Any]]) -> None:
        self.configs = configs
        self.told: set[str] = set()

    def ask(self) -> list[Proposal]:
        return [Proposal(values) for values in self.configs if named(values) not in self.told]

    def tell(self, values: dict[str, Any], objective: float | None, until: int | None) -> None:
        self.told.add(named(values))


class Halving:
    """Successive halving: all start, and at each rung the best 1/eta go on, from where they paused.

    Jamieson and Talwalkar 2016 (arXiv 1502.07943), with the rungs of Li et al. 2018 (arXiv 1603.06560), synchronous:
    a rung is ranked when all of it is told. Of equals the earlier one goes on; for one that came to nothing the next
    best does.
    """

    def __init__(self, configs: list[dict[str, Any]], stops: list[int | None], eta: int, sign: int) -> None:
        self.configs, self.stops, self.eta, self.sign = configs, stops, eta, sign
        self.told: dict[str, float | None] = {}

    def ask(self) -> list[Proposal]:
        alive = self.configs
        for rung, until in enumerate(self.stops):
            alive = [values for values in alive if self.result(values, until) is not None]
            alive = alive[: max(1, len(self.configs) // self.eta**rung)]
            left = [Proposal(values, until) for values in alive if named(values, until) not in self.told]
            if left:
                return left
            alive.sort(key=lambda values: self.result(values, until))
        return []

    def result(self, values: dict[str, Any], until: int | None) -> Any:
        """The smaller the better; None of what came to nothing. What is not known yet, may come to something."""
        value = self.told.get(named(values, until), 0.0)
        return None if value is None else self.sign * value

    def tell(self, values: dict[str, Any], objective: float | None, until: int | None) -> None:
        self.told[named(values, until)] = finite(objective)


def stops(configs: int, steps: int, eta: int, rungs: int | None) -> list[int | None]:
    """The steps at which trials pause: each eta times the one before, None for the full run.

    As many as it takes until one trial is left, where the steps allow so many.
    """
    enough = next(n for n in itertools.count(1) if configs // eta ** (n - 1) <= 1)
    count = min(rungs or enough, most_rungs(steps, eta))
    return [round(steps / eta**n) for n in range(count - 1, 0, -1)] + [None]


def most_rungs(steps: int, eta: int) -> int:
    """How many rungs there are if the first is one step."""
    return next(n for n in itertools.count(1) if eta**n > steps)


class Seeds:
    """Another search, each of whose proposals is run with every seed and told the mean."""

    def __init__(self, inner: Search, seeds: list[Any], keys: list[str]) -> None:
        self.inner, self.seeds, self.keys = inner, seeds, keys
        self.told: dict[str, float | None] = {}

    def ask(self) -> list[Proposal]:
        every = [Proposal(v, p.until) for p in self.inner.ask() for v in self.sown(p.values)]
        return [p for p in every if named(p.values, p.until) not in self.told]

    def sown(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        return [{key: seed if key == SEED else values[key] for key in self.keys} for seed in self.seeds]

    def tell(self, values: dict[str, Any], objective: float | None, until: int | None) -> None:
        self.told[named(values, until)] = objective
        names = [named(each, until) for each in self.sown(values)]
        if all(name in self.told for name in names):
            searched = {key: value for key, value in values.items() if key != SEED}
            self.inner.tell(searched, mean([self.told[name] for name in names]), until)


def mean(values: list[float | None]) -> float | None:
    """Of several seeds: none where one failed, infinity where one diverged."""
    known = [value for value in values if value is not None]
    return None if len(known) < len(values) else math.fsum(known) / len(known)


class Tpe:
    """The tree-structured Parzen estimator of Optuna, in batches; in its file, it outlives the process.

    Bergstra et al. 2011; trials under way count as bad ones, so that a batch is spread (Optuna's constant liar). What
    diverged is told as the worst there is, and what failed as nothing: told again, it may have come to something. A
    trial that another command began and nobody told of comes first.
    """

    def __init__(self, axes: list[Axis], trials: int, seed: int, objective: str, storage: Path, jobs: int) -> None:
        self.axes, self.seed, self.jobs, self.worst = axes, seed, jobs, runs.worst(objective)
        self.trials = min(trials, math.prod(map(size, axes)))
        self.choices = {axis.key: by_size(axis.values) for axis in axes if axis.values is not None}
        self.study = study(storage, f"{objective} of {axes}", "minimize" if self.worst > 0 else "maximize")
        self.running: dict[str, tuple[int, dict[str, Any]]] = {}  # by name: the number in the study, the values
        self.told: dict[str, float | None] = {}
        self.remember()

    def remember(self) -> None:
        """Takes up what the file says, but for a trial whose writing was cut off."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(deepcopy=False):
            if trial.state == TrialState.COMPLETE:
                self.told[named(self.values(trial.params))] = trial.value
            elif trial.state == TrialState.RUNNING and len(trial.params) == len(self.axes):
                values = self.values(trial.params)
                self.running[named(values)] = trial.number, values

    def ask(self) -> list[Proposal]:
        wanted = min(self.jobs - len(self.running), self.trials - len(self.told) - len(self.running))
        for _ in range(wanted):
            self.propose()
        return [Proposal(values) for _, values in self.running.values()]

    def propose(self) -> None:
        """Begins one more trial, unlike all others; by chance where TPE has nothing new."""
        from optuna.trial import TrialState

        for _ in range(TRIES):
            trial = self.begun()
            values = self.values(trial.params)
            if self.new(values):
                self.running[named(values)] = trial.number, values
                return
            self.study.tell(trial, state=TrialState.FAIL)
        values = next(filter(self.new, draws(self.axes, random.Random(f"{self.seed} {trial.number}"))))
        self.study.enqueue_trial(self.params(values))
        self.running[named(values)] = self.begun().number, values

    def new(self, values: dict[str, Any]) -> bool:
        return named(values) not in self.told and named(values) not in self.running

    def begun(self) -> Any:
        """Optuna's next trial, drawn with a seed of its own: one seed for all would begin anew in each process."""
        from optuna.samplers import TPESampler

        number = len(self.study.get_trials(deepcopy=False))
        seed = random.Random(f"{self.seed} {number}").getrandbits(32)
        self.study.sampler = TPESampler(seed=seed, constant_liar=True)
        return self.study.ask({axis.key: self.distribution(axis) for axis in self.axes})

    def tell(self, values: dict[str, Any], objective: float | None, until: int | None) -> None:
        from optuna.trial import TrialState, create_trial

        name = named(values)
        value = None if objective is None else self.worst if not math.isfinite(objective) else objective
        if name in self.running:
            number, _ = self.running.pop(name)
            self.study.tell(number, value, TrialState.FAIL if value is None else None)
        elif not all(holds(axis, values[axis.key]) for axis in self.axes):
            return  # of a sweep whose values were others
        elif value is not None and self.told.get(name) != value:
            kinds = {axis.key: self.distribution(axis) for axis in self.axes}
            self.study.add_trial(create_trial(params=self.params(values), distributions=kinds, value=value))
        self.told[name] = value

    def distribution(self, axis: Axis) -> Any:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if axis.values is not None:
            last = len(axis.values) - 1
            ordered = all(map(numeric, axis.values))
            return IntDistribution(0, last) if ordered else CategoricalDistribution(range(last + 1))
        assert axis.low is not None and axis.high is not None
        if axis.integer:
            return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        return FloatDistribution(axis.low, axis.high, log=axis.log)

    def values(self, params: dict[str, Any]) -> dict[str, Any]:
        """The values of a trial, of what Optuna knows: numbers, and places in lists of choices."""
        return {
            axis.key: short(axis, params[axis.key]) if axis.values is None else self.choices[axis.key][params[axis.key]]
            for axis in self.axes
        }

    def params(self, values: dict[str, Any]) -> dict[str, Any]:
        """What Optuna knows, of the values of a trial."""
        places = {key: [named(v) for v in values] for key, values in self.choices.items()}
        return {key: places[key].index(named(v)) if key in places else v for key, v in values.items()}


def by_size(values: list[Any]) -> list[Any]:
    """Numbers by their size, so that what is near is near; anything else as it is."""
    return sorted(values) if all(map(numeric, values)) else values


def study(storage: Path, name: str, direction: Literal["minimize", "maximize"]) -> Any:
    """Optuna's study of this name in a file, made or continued."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lock: Any = Lock(storage)
    repair(storage, lock)
    kept = JournalStorage(JournalFileBackend(str(storage), lock_obj=lock))
    return optuna.create_study(storage=kept, study_name=name, direction=direction, load_if_exists=True)


class Lock:
    """Optuna's lock of a journal, which ends with the process that holds it; Optuna's own outlives it by 30 s."""

    def __init__(self, file: Path) -> None:
        self.file, self.descriptor = file, -1

    def acquire(self) -> bool:
        self.descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        os.close(self.descriptor)


def repair(journal: Path, lock: Lock) -> None:
    """Cuts off a last line of which the writing was: what came after it would be unreadable."""
    lock.acquire()
    written = journal.read_bytes()
    os.truncate(journal, written.rfind(b"\n") + 1)
    lock.release()
