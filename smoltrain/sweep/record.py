"""A sweep that is kept: which one a word means, and its trials, each with the record of its run.

`sweep.json` says only which trials there are. What became of them, their runs say. Nothing here imports Hydra or torch.
"""

import json
import math
import os
import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from smoltrain import runs
from smoltrain.config import ConfigError, at, shown, suggest
from smoltrain.history import NO_RECORD, Found, below, directories, listing, look
from smoltrain.lines import brief, short

FILE = "sweep.json"
SEED = "seed"  # the key over which results are averaged
# Of a run's config, what decides what is measured on its held-out rows: the method and what it sees of each row; and of
# a loss, and the rewards and margins that it is made of, the unit.
MEASURED: tuple[str, ...] = ("trainer._target_", "model.name_or_path", "encode")
MEASURED += ("trainer.args.max_length", "trainer.args.truncation_mode")
UNIT: tuple[str, ...] = ("beta", "loss_type", "loss_weights", "label_smoothing", "label_smoothing_factor", "ld_alpha")
UNIT += ("f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "desirable_weight", "undesirable_weight")
# What the fields of sweep.json are, and of each of its trials.
SHAPE: dict[str, Any] = {"name": str, "start": str, "end": str | None, "objective": str, "from_run": dict}
SHAPE |= {"process": dict, "search": dict, "command": list, "varied": list, "trials": list}
SHAPE |= {"since": str, "seconds": int | float}
TRIAL: dict[str, Any] = {"number": int, "overrides": dict, "config_hash": str, "directory": str, "code": int | None}


@dataclass(frozen=True)
class Trial:
    """One trial; `overrides` holds what is varied, `code` is None where its process has not ended or never began."""

    number: int
    overrides: dict[str, Any]
    config_hash: str
    directory: Path
    code: int | None
    run: Found

    @property
    def status(self) -> str:
        """That of its run; without a readable record `failed` where its process did, else `pending`."""
        if self.run.trouble:
            return "failed" if self.code else "pending"
        paused = self.run.record.get("paused") or {}
        return "stopped" if self.run.status == "preempted" and str(self.run.steps) in paused else self.run.status

    @cached_property
    def objective(self) -> float | None:
        """What it came to, a finite number; only a completed trial came to anything."""
        value = None if self.run.trouble else self.run.objective
        return value if value is not None and math.isfinite(value) else None

    @property
    def paused(self) -> float | None:
        """What the objective was where the search stopped it."""
        return self.run.record["paused"][str(self.run.steps)] if self.status == "stopped" else None

    @property
    def error(self) -> str | None:
        """Why it did not complete, as far as its record or its exit code tells."""
        if self.status in ("completed", "stopped"):
            return None
        if told := self.run.record.get("error"):
            return str(told)
        if self.code is not None and self.code < 0:
            known = {number.value: number.name for number in signal.Signals}
            return f"killed by {known.get(-self.code, f'signal {-self.code}')}"
        if self.run.trouble and (self.directory / "run.json").exists():
            return self.run.trouble
        if self.run.trouble and self.code is not None:
            return f"exit code {self.code}, and no record in {self.directory}"
        return None

    @property
    def metrics(self) -> dict[str, Any]:
        """Its final metrics; those of the starting model are not its own."""
        every = self.run.record.get("metrics") or {}
        return {name: value for name, value in every.items() if not name.startswith("before/")}


@dataclass(frozen=True)
class Sweep:
    """A sweep and its trials, of which no two are one and the same run."""

    directory: Path
    name: str
    start: datetime
    since: datetime  # when the last of the processes that were at it began
    seconds: float  # that they were at it, but for what the one that is alive has not noted yet
    end: datetime | None
    alive: bool  # whether its process is still at it
    command: tuple[str, ...]
    search: dict[str, Any]
    objective: str
    varied: tuple[str, ...]
    trials: tuple[Trial, ...]

    @property
    def greater(self) -> bool:
        """Whether its objective is to grow."""
        return self.objective.endswith(runs.GREATER)

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many trials there are of each status."""
        statuses = [trial.status for trial in self.trials]
        return {status: statuses.count(status) for status in sorted(set(statuses), key=statuses.index)}


def measure(config: dict[str, Any], fingerprints: dict[str, Any], objective: str) -> list[Any] | None:
    """What an objective is a measure of in a run, as data that is equal where values can be compared.

    None where that is not known yet. What is answered by generation is the same for every method and model.
    """
    if not {"asked", "test"} <= {*fingerprints}:
        return None
    if objective == "exact_match":
        return [fingerprints["asked"], at(config, "evaluation.max_new_tokens")]
    unit = [] if objective.endswith(("accuracy", "accuracies")) else [f"trainer.args.{name}" for name in UNIT]
    if at(config, "trainer.args.beta") is not None:  # it is measured against what training starts from
        unit.append("model.from_run")
    return [fingerprints["test"], *(at(config, key) for key in (*MEASURED, *unit))]


def mend(objective: str) -> str:
    """What to add where an objective cannot be compared."""
    if objective == "exact_match":
        return "; of one set of held-out rows, evaluation.max_rows may ask each a part of its own: let it ask all"
    return "; objective=exact_match compares methods" if objective == "eval_loss" else ""


def comparable(sweep: Sweep) -> list[tuple[dict[str, Any], Sweep]]:
    """The parts of a sweep in each of which the objective measures one thing, with the values that only it has.

    What never came to be measured is with those of the same values.
    """
    parts: dict[str, list[Trial]] = {}
    rest: list[Trial] = []
    for trial in sweep.trials:
        record = trial.run.record
        of = measure(record.get("config") or {}, record.get("fingerprints") or {}, sweep.objective)
        (rest if of is None else parts.setdefault(json.dumps(of), [])).append(trial)
    if len(parts) < 2:
        return [({}, sweep)]
    every = [*parts.values()]
    keys = telling(every, sweep.varied)
    owns = [{key: values(trials, key) for key in keys} for trials in every]
    for trial in rest:
        fits = [all(trial.overrides.get(key) in found for key, found in own.items()) for own in owns]
        every[fits.index(True) if True in fits else 0].append(trial)
    compared = []
    for own, trials in zip(owns, every, strict=True):
        single = [key for key, found in own.items() if len(found) == 1]
        varied = tuple(key for key in sweep.varied if key not in single)
        called = {key: found[0] if key in single else ",".join(map(brief, found)) for key, found in own.items()}
        compared.append((called, replace(sweep, trials=tuple(trials), varied=varied)))
    return compared


def telling(parts: list[list[Trial]], keys: Iterable[str]) -> list[str]:
    """The keys by which the parts of a sweep are told from one another: no value of theirs is in two of them."""
    counts = {key: [len(values(trials, key)) for trials in parts] for key in keys}
    whole = [trial for trials in parts for trial in trials]
    disjoint = [key for key in counts if sum(counts[key]) == len(values(whole, key))]
    single = [key for key in disjoint if max(counts[key]) == 1]
    return single or sorted(disjoint, key=lambda key: sum(counts[key]))[:1]


def values(trials: list[Trial], key: str) -> list[Any]:
    """The different values of a key, in the order of the trials."""
    return list({json.dumps(trial.overrides.get(key)): trial.overrides.get(key) for trial in trials}.values())


def exit_code(sweep: Sweep) -> int:
    """0 if every trial completed, or was stopped by a search that got to its end.

    1 if any failed or did not get to its end; else 143 for preempted, 3 for diverged.
    """
    statuses = {trial.status for trial in sweep.trials} - {"completed", "stopped"}
    if statuses - {"preempted", "diverged"} or not (statuses or sweep.end):
        return 1
    return 143 if "preempted" in statuses else 3 if statuses else 0


# ---------------------------------------------------------------- reading


def read(directory: Path) -> Sweep:
    """The sweep in a directory. Raises ConfigError where its sweep.json cannot be read."""
    file = directory / FILE
    try:
        kept = json.loads(file.read_text())
        check(kept, SHAPE, "")
        for trial in kept["trials"]:
            check(trial, TRIAL, "trials: ")
        alive = kept["end"] is None and not runs.gone(directory, kept["process"])
        start, since, end = (
            kept[name] and datetime.fromisoformat(kept[name]).astimezone(UTC) for name in ("start", "since", "end")
        )
    except NO_RECORD as error:
        raise ConfigError(f"{file}: unreadable, {type(error).__name__}: {error}") from error
    trials: dict[tuple[str, Path], Trial] = {}
    for facts in kept["trials"]:
        own = directory / facts["directory"]
        if ".." in own.parts:  # it ran before the sweep, and is not in it
            own = short(own.resolve())
        run = look(own, below(str(own), runs.ROOT))
        trial = Trial(facts["number"], facts["overrides"], facts["config_hash"], own, facts["code"], run)
        trials.setdefault((trial.config_hash, own.absolute()), trial)
    return Sweep(
        directory=directory,
        name=kept["name"],
        start=start,
        since=since,
        seconds=kept["seconds"],
        end=end,
        alive=alive,
        command=tuple(kept["command"]),
        search=kept["search"],
        objective=kept["objective"],
        varied=tuple(kept["varied"]),
        trials=tuple(trials.values()),
    )


def check(facts: dict[str, Any], shape: dict[str, Any], where: str) -> None:
    if wrong := [name for name, kind in shape.items() if not isinstance(facts.get(name), kind)]:
        raise TypeError(f"{where}{wrong[0]} is {shown(facts.get(wrong[0]))}")


# ---------------------------------------------------------------- which sweep a word means


def sweeps(root: Path = runs.ROOT) -> list[Path]:
    """The directories of all sweeps below a folder, the one that was begun or gone on with last first."""
    return [Path(folder) for folder in sorted(folders(str(root)), key=began, reverse=True)]


def folders(folder: str) -> Iterator[str]:
    """The folders in a folder that hold a sweep.json; in a run, and in a sweep, there is none."""
    try:
        with os.scandir(folder) as entries:
            inside = {entry.name: entry for entry in entries}
    except OSError:
        return
    if FILE in inside:
        yield folder
    elif "run.json" not in inside:
        for entry in inside.values():
            if entry.is_dir(follow_symlinks=False):
                yield from folders(entry.path)


def began(folder: str) -> tuple[str, str]:
    """When a sweep began, or went on, as far as can be told, and where it is."""
    file = Path(folder, FILE)
    try:
        return str(json.loads(file.read_text())["since"]), folder
    except NO_RECORD:
        return datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds"), folder


def resolve(reference: str, root: Path = runs.ROOT) -> Path:
    """The directory of the sweep that `reference` means: a path, `latest`, a name, a stamp, or the beginning of one.

    Of those of a name the one that started last. Raises ConfigError where there is none, or several.
    """
    if (at := there(reference)) and (at / FILE).is_file():
        return at
    found = sweeps(root)
    if reference == "latest" and found:
        return found[0]
    trails = {f"/{path.relative_to(root)}/": path for path in found}
    word = below(reference, root)
    begun = {whole for trail in trails for whole in re.findall(rf"/({re.escape(word)}[^/]*)(?=/)", trail) if word}
    exact = {word} & begun or begun
    meant = [path for trail, path in trails.items() if any(f"/{whole}/" in trail for whole in exact)]
    if len(exact) > 1:
        raise ConfigError(f"{reference}: {len(exact)} sweeps begin so, {listing(sorted(exact))}")
    if not meant:
        raise ConfigError(f"{reference}: {instead(reference, at, root, list(trails))}")
    return meant[0]


def there(reference: str) -> Path | None:
    """What is at a path."""
    path = Path(reference)
    try:
        return path if reference and path.exists() else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def instead(reference: str, at: Path | None, root: Path, trails: list[str]) -> str:
    """What a word means that names no sweep."""
    from smoltrain import history

    if "=" in reference:
        return f"a sweep is started by smoltrain -m {reference}; smoltrain sweep shows what came of one"
    if at and at.is_file():
        return f"this is a file; a sweep is named by its directory{f', {at.parent}' if at.name == FILE else ''}"
    if at and not any(at.iterdir()):
        return "this is an empty folder, no sweep"
    if at and (at / "run.json").exists():
        of = at.absolute().parent
        whole = f"a trial of the sweep {of.name}" if (of / FILE).exists() else "a single run, no sweep"
        return f"this is {whole}; smoltrain {f'sweep {of.name}' if 'trial' in whole else f'runs show {reference}'}"
    if at and at.absolute() != root.absolute() and (inside := len(list(directories(str(at))))):
        said = "1 run is in it" if inside == 1 else f"{inside} runs are in it"
        return f"no sweep.json is in this folder, so that it is no sweep; {said}, smoltrain runs compare looks at them"
    try:
        run = history.resolve(reference, root)
        return f"this is a run, no sweep ({run}); smoltrain runs show {reference}"
    except ConfigError:
        pass
    if not trails:
        return f"there is no sweep in {root.absolute()} yet; smoltrain -m trainer=sft,dpo makes one"
    words = {"latest"} | {word for trail in trails for word in trail.strip("/").split("/")}
    return f"no sweep of that name, stamp or path in {root.absolute()}{suggest(reference, words)}"
