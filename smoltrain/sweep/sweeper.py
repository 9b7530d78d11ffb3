"""Hydra's sweeper: opens or continues the directory of a sweep, launches its trials, and ends with one answer."""

import copy
import dataclasses
import importlib
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper as Plugin
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig

from smoltrain import runs
from smoltrain.config import ConfigError
from smoltrain.config.overrides import quoted
from smoltrain.config.resolvers import PLUGIN, label
from smoltrain.config.validate import resolved
from smoltrain.history import Found, every, look
from smoltrain.lines import short
from smoltrain.ranks import ELSEWHERE
from smoltrain.sweep import cluster, local, record
from smoltrain.sweep.search import Proposal, Search, check, search
from smoltrain.sweep.space import Space, Trial

ENDED = ("completed", "diverged")  # which the same command does not run again
STORAGE = "optuna.log"
LEVEL = ("constant", "constant_with_warmup", "warmup_stable_decay")  # schedules whose rungs can be compared
MANY = 20  # combinations from which on their checking takes seconds; and wrong ones, after which no more are looked at


class Sweeper(Plugin):
    """Runs the trials that a search asks for, each once, wherever it has ended before.

    `space` is what the command line was taken apart to, before Hydra was started; `directory` is that of the sweep, as
    soon as there is something in it.
    """

    space: Space
    directory: Path | None = None
    config: DictConfig
    hydra_context: HydraContext
    launcher: Launcher

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader = Checked(hydra_context.config_loader)
        self.hydra_context = HydraContext(config_loader=self.loader, callbacks=hydra_context.callbacks)
        self.task, self.config = task_function, config
        self.rows: dict[str, dict[str, str]] = {}

    def sweep(self, arguments: list[str]) -> None:
        """Runs the sweep. Raises ConfigError where its directory is of another, or its trials cannot be compared."""
        self.launcher = Plugins.instance().instantiate_launcher(self.hydra_context, self.task, self.config)
        directory, known = self.place(Path(self.config.hydra.sweep.dir))
        self.book = Book(directory, self.facts() | known)
        if not known:
            self.book.note()  # it is seen while its rows are prepared
        try:
            self.prepare([self.space.trial(values) for values in begun(self.space)])
            self.refuse_incomparable()
            for entry in self.book.trials:
                self.refuse_other(self.space.trial(entry["overrides"]), entry)
            self.book.note()
            Sweeper.directory = directory
            self.run(directory)
            self.book.note(end=runs.now())
        finally:
            if Sweeper.directory is None and not known:
                (directory / record.FILE).unlink()
                runs.discard(directory)
            runs.let_go(directory)

    def facts(self) -> dict[str, Any]:
        """What sweep.json says of a sweep that has just begun."""
        space = self.space
        return {
            "name": self.config.name,
            "start": runs.now(),
            "since": runs.now(),
            "seconds": 0,
            "end": None,
            "process": runs.this_process(),
            "command": space.command,
            "from_run": space.parents,
            "search": {"method": space.settings.search} | dataclasses.asdict(space.settings),
            "objective": space.first.cfg.objective,
            "varied": [axis.key for axis in space.axes],
            "trials": [],
        }

    # ------------------------------------------------------------ where

    def place(self, folder: Path) -> tuple[Path, dict[str, Any]]:
        """The directory of this sweep, locked, and what is known of it: its own from before, or a new one."""
        earlier = [folder] if self.space.typed("hydra.sweep.dir") else record.sweeps(folder.parent)
        for one in earlier if self.space.first.cfg.resume != "never" else []:
            if (found := self.as_it_is(one)) is None:
                continue
            if not runs.gone(one, read(one)["process"]) or not runs.hold(one, wait=False):
                raise ConfigError(
                    f"{short(one)}: this sweep is running; smoltrain sweep {one.name} shows how far it is, "
                    "resume=never begins another one"
                )
            print(f"continues the sweep {short(one)}")
            Sweeper.space = found
            return one, {name: read(one)[name] for name in ("start", "seconds", "trials")}
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        inside = sorted(set(names) - {runs.LOCK, f"{record.FILE}.tmp"})
        if inside and record.FILE not in inside:
            raise ConfigError(f"hydra.sweep.dir={folder}: it holds {inside[0]}; choose one that is new or empty")
        if inside or not runs.hold(folder, wait=False) or (folder / record.FILE).exists():
            raise ConfigError(f"hydra.sweep.dir={folder}: another sweep is there; choose another directory")
        return folder, {}

    def as_it_is(self, directory: Path) -> Space | None:
        """What is asked for, where an earlier sweep is this one, or lacks only values that are new; else None.

        A search is the same for the same command, whose trials are the same; a grid, where all of its trials are asked
        for now. What `model.from_run` named when it began, it names still.
        """
        try:
            then = read(directory)
            space = self.space.started_from(then["from_run"])
            same = sorted(then["command"]) == sorted(space.command)
            if then["search"] != self.facts()["search"]:
                return None
            known = {trial["config_hash"] for trial in then["trials"]}
            if known and space.settings.search == "grid":
                same = known <= {space.trial(values).config_hash for values in begun(space)}
            elif same:
                same = known == {space.trial(trial["overrides"]).config_hash for trial in then["trials"]}
        except (OSError, ValueError, LookupError, TypeError):  # no sweep of ours, or its trials are none of now
            return None
        return space if same else None

    # ------------------------------------------------------------ what

    def run(self, directory: Path) -> None:
        """Asks for trials and runs them, until there is none left to ask for."""
        chosen = searched(self.space, directory / STORAGE, self.places())
        alone = self.space.first.cfg.resume == "never" or self.space.settings.search == "halving"
        self.others = {} if alone else self.ended_before(runs.ROOT / self.config.name)
        if self.space.settings.search == "tpe":  # which asks once: what did not get to its end is run again
            self.batch(chosen, [Proposal(entry["overrides"]) for entry in self.book.trials])
        while asked := chosen.ask():
            self.batch(chosen, asked)

    def batch(self, chosen: Search, asked: list[Proposal]) -> None:
        """Runs those of the proposals that have not been run, and tells the search what came of each."""
        todo: dict[str, tuple[Proposal, Trial, dict[str, Any]]] = {}
        for proposal in [*asked]:
            try:
                trial = self.space.trial(proposal.values)
            except ConfigError as error:  # values that do not go together, which only a search that learns still finds
                print(
                    f"{' '.join(f'{key}={value}' for key, value in proposal.values.items())}: {error}", file=sys.stderr
                )
                chosen.tell(proposal.values, None, proposal.until)
                asked.remove(proposal)
                continue
            entry = self.book.entry(trial, self.elsewhere(trial))
            reached = proposal.until is not None and self.book.objective(entry, proposal.until) is not None
            if not (self.book.status(entry) in ENDED or reached):
                todo.setdefault(trial.config_hash, (proposal, trial, entry))
        self.book.note()
        if todo:
            self.launch([*todo.values()])
        for proposal in asked:
            entry = self.book.entry(self.space.trial(proposal.values), None)
            diverged = self.book.status(entry) == "diverged"
            came_to = runs.worst(self.book.facts["objective"]) if diverged else None
            chosen.tell(proposal.values, came_to or self.book.objective(entry, proposal.until), proposal.until)

    def launch(self, todo: list[tuple[Proposal, Trial, dict[str, Any]]]) -> None:
        """Runs trials, each in the directory that it has in this sweep."""
        jobs = [self.loader.takes(trial, proposal.until, self.book.directory, entry) for proposal, trial, entry in todo]
        if isinstance(self.launcher, local.Local):
            settings = self.space.settings
            seeds = math.prod(len(axis.values or []) for axis in self.space.axes if axis.key == record.SEED)
            whole = (settings.trials or 0) * seeds if settings.search == "tpe" else 0
            self.launcher.before, self.launcher.expected = len(self.book.trials) - len(todo) if whole else 0, whole
        returns = self.launcher.launch(jobs, initial_job_idx=todo[0][2]["number"])
        for (_, _, entry), done in zip(todo, returns, strict=True):
            code = getattr(done, "code", None)
            entry["code"] = self.book.code(entry) if code is None else code
        self.book.note()

    def places(self) -> int:
        """How many trials the launcher runs at a time, as far as that is known."""
        return self.launcher.places(self.space.first.cfg) if isinstance(self.launcher, local.Local) else 1

    # ------------------------------------------------------------ shared work

    def prepare(self, trials: list[Trial]) -> None:
        """Prepares the rows of trials, each kind once, and keeps what they are called. Raises ConfigError, as they do.

        It is done before the first trial begins, and finds the rows in the cache where they are known.
        """
        kinds = {preparation(trial): trial.cfg for trial in trials}
        if new := {kind: cfg for kind, cfg in kinds.items() if kind not in self.rows}:
            self.rows |= local.elsewhere(partial(fingerprints, new))

    def same_rows(self, known: dict[str, Any], trial: Trial) -> bool:
        """Whether a run, as its record says, learned from what a trial would learn from now."""
        self.prepare([trial])
        was = known.get("fingerprints", {})  # of one that was killed as it began, not all of them
        return all(was.get(name, value) == value for name, value in self.rows[preparation(trial)].items())

    def refuse_other(self, trial: Trial, entry: dict[str, Any]) -> None:
        """Raises ConfigError where a trial of this sweep learned from what is another thing now."""
        known = self.book.read(entry)
        if known.get("fingerprints") and not self.same_rows(known, trial):
            raise ConfigError(
                f"{entry['directory']}: its rows, tokenizer or template are not what they were when it ran; "
                "resume=never starts a new sweep"
            )

    def refuse_incomparable(self) -> None:
        """Raises ConfigError where a search would compare what is another measure for each."""
        objective, method = self.book.facts["objective"], self.space.settings.search
        trials = [self.space.trial(values) for values in begun(self.space)] if method in ("tpe", "halving") else []
        known = [(resolved(trial.cfg)[0], self.rows[preparation(trial)]) for trial in trials]
        measures = {json.dumps(record.measure(config, prints, objective)): None for config, prints in known}
        if len(measures) > 1:
            raise ConfigError(
                f"sweep={method}: it compares all trials with one another, and {objective} measures another thing in "
                "some of them than in others; vary what is learned, not what is measured, or use a grid"
                f"{record.mend(objective)}"
            )

    def ended_before(self, folder: Path) -> dict[str, list[Found]]:
        """By config hash, the runs of this name that have ended, in whatever sweep or alone; the last ones first."""
        found: dict[str, list[Found]] = {}
        for run in every(folder):
            if run.status == "diverged" or (run.status == "completed" and (run.directory / "model").is_dir()):
                found.setdefault(run.record["config_hash"], []).append(run)
        return found

    def elsewhere(self, trial: Trial) -> Path | None:
        """Where a trial has been run already, on the rows of now."""
        alike = self.others.get(trial.config_hash, [])
        return next((run.directory for run in alike if self.same_rows(run.record, trial)), None)


class Checked(ConfigLoaderImpl):
    """Has a launcher run the very config of each trial that was checked, which Hydra would compose once more."""

    def __init__(self, hydras: ConfigLoader) -> None:
        super().__init__(hydras.get_search_path())
        self.configs: dict[tuple[str, ...], DictConfig] = {}

    def takes(self, trial: Trial, until: int | None, directory: Path, entry: dict[str, Any]) -> list[str]:
        """Makes a trial known, and returns the command line for which a launcher is given it."""
        own = [override for override in trial.overrides if not override.startswith("hydra.sweep.")]
        own += [f"pause_at={until}"] if until else []
        where = {"dir": str(directory), "subdir": entry["directory"]}
        job = [*own, *(f"hydra.sweep.{key}={quoted(value)}" for key, value in where.items())]
        config = copy.deepcopy(trial.whole)
        config.pause_at = until
        config.hydra.mode = RunMode.MULTIRUN
        config.hydra.overrides.task = [override for override in own if not override.startswith("hydra")]
        config.hydra.sweep.dir, config.hydra.sweep.subdir = where.values()
        self.configs[tuple(job)] = config
        return job

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        return self.configs.pop(tuple(sweep_overrides))


class Book:
    """sweep.json while the sweep runs: which trials there are, and where each is kept."""

    def __init__(self, directory: Path, facts: dict[str, Any]) -> None:
        self.directory, self.facts = directory, facts
        self.trials: list[dict[str, Any]] = facts["trials"]
        self.known = {trial["config_hash"]: trial for trial in self.trials}
        self.before, self.began = facts["seconds"], time.monotonic()

    def note(self, **facts: Any) -> None:
        self.facts |= facts | {"seconds": round(self.before + time.monotonic() - self.began)}
        runs.write_atomically(self.directory / record.FILE, json.dumps(self.facts, indent=1) + "\n")

    def entry(self, trial: Trial, elsewhere: Path | None) -> dict[str, Any]:
        """What stands in sweep.json of a trial; one that is new gets a number and a directory.

        That is one of its own, in which it will run, unless it has been run elsewhere, and is still there.
        """
        if trial.config_hash not in self.known:
            number = 1 + max((one["number"] for one in self.trials), default=-1)
            entry = {"number": number, "config_hash": trial.config_hash, "directory": "", "code": None}
            self.trials.append(entry)
            self.known[trial.config_hash] = entry
        entry = self.known[trial.config_hash]
        varied = ",".join(f"{key}={value}" for key, value in trial.values.items())
        if not self.read(entry):
            own = f"{entry['number']}_{label(varied)}".rstrip("_")
            there = elsewhere and os.path.relpath(elsewhere.resolve(), self.directory.resolve())
            entry["directory"] = there or own
        entry["overrides"] = trial.values
        return entry

    def read(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The record of a trial's run; empty where there is none that can be read."""
        return look(self.directory / entry["directory"], "").record

    def status(self, entry: dict[str, Any]) -> str:
        return str(self.read(entry).get("status", "pending"))

    def code(self, entry: dict[str, Any]) -> int:
        """The exit code of a trial that a launcher does not tell: what its record says, 1 where there is none."""
        return runs.CODES.get(self.status(entry), 1)

    def objective(self, entry: dict[str, Any], until: int | None) -> float | None:
        """What a trial came to, or (`until`) what it was at the step where it paused; None where it came to nothing."""
        found = self.read(entry)
        value = found.get("objective") if until is None else found.get("paused", {}).get(str(until))
        return value if value is not None and math.isfinite(value) else None


def read(directory: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((directory / record.FILE).read_text())
    return facts


def searched(space: Space, storage: Path, jobs: int = 1) -> Search:
    """The search that a sweep makes; TPE keeps what it knows in `storage`."""
    return search(space.settings, space.axes, space.first.cfg.objective, steps_of(space), storage, jobs)


def steps_of(space: Space) -> int | None:
    """The optimizer steps of a trial, where its config says so."""
    steps = int(space.first.cfg.trainer.args.max_steps)
    return steps if steps > 0 else None


def begun(space: Space) -> list[dict[str, Any]]:
    """The values of the trials that are known before any has run; of a search that learns, each value once."""
    if space.settings.search != "tpe":
        return [proposal.values for proposal in searched(space, Path()).ask()]
    first = space.first.values
    return [first | {axis.key: value} for axis in space.axes for value in axis.values or [axis.low, axis.high]]


def preparation(trial: Trial) -> str:
    """Names what the rows of a trial are made by, so that trials that share it are prepared once."""
    config = resolved(trial.cfg)[0]
    args = config["trainer"]["args"]
    of_rows = [{name: value for name, value in config["data"].items() if f"data.{name}" not in runs.NOT_IDENTITY}]
    of_rows += [config["encode"], config["model"], config["trainer"]["_target_"], config["evaluation"]["max_rows"]]
    return json.dumps([*of_rows, args.get("max_length"), args.get("truncation_mode")], sort_keys=True)


def fingerprints(cfgs: dict[str, DictConfig]) -> dict[str, dict[str, str]]:
    """Prepares the rows of configs, and names them. Raises ConfigError for all that would stop one."""
    from smoltrain.evaluate import to_answer
    from smoltrain.preflight import preflight
    from smoltrain.report import SAMPLES, asked, rows

    found: dict[str, dict[str, str]] = {}
    wrong: dict[str, None] = {}
    for kind, cfg in cfgs.items():
        cfg.trainer.args.output_dir = os.devnull  # which only a run has
        made = preflight(cfg)
        wrong |= dict.fromkeys(made.errors)
        if not made.errors:
            found[kind] = rows(made.data, made.chat.tokenizer)["fingerprints"]
            found[kind]["asked"] = asked(to_answer(made.data.examples(cfg.evaluation.max_rows), SAMPLES))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return found


# ---------------------------------------------------------------- for the command


def prepared(flags: list[str], overrides: list[str]) -> tuple[list[str], list[str]]:
    """Checks a sweep whole, makes it known to Hydra, and returns the command line that Hydra is to run.

    Raises ConfigError for all that is wrong with any trial that is known by now.
    """
    space = Space.of(flags, overrides)
    check(space.settings, space.axes, steps_of(space))
    trials, wrong = begun(space), list[str]()
    if len(trials) > MANY:
        print(f"checking {len(trials):,} combinations", file=sys.stderr)
    for values in trials:
        try:
            trial = space.trial(values)
            if space.settings.search == "halving":
                refuse_decay(trial)
        except ConfigError as error:
            wrong.append(str(error))
            if len(wrong) == MANY:
                break
    if wrong:
        raise ConfigError("\n".join(dict.fromkeys("\n".join(wrong).splitlines())))
    if space.first.cfg.hardware.slurm:
        raise ConfigError(ELSEWHERE)
    Sweeper.space, Sweeper.directory = space, None
    for reference, directory in space.parents.items():
        print(f"model.from_run={reference}: {short(Path(directory))}, for all trials")
    plug_in(Sweeper, local.Local, cluster.Slurm, cluster.Ray)
    return ["-m", *space.flags], space.first.overrides  # of which Hydra takes where it is kept, and what launches it


def refuse_decay(trial: Trial) -> None:
    """Raises ConfigError for a learning rate that falls all the way: a step on the way says little of the end then."""
    kind = str(trial.cfg.trainer.args.lr_scheduler_type)
    if kind not in LEVEL:
        raise ConfigError(
            f"trainer.args.lr_scheduler_type={kind}: sweep=halving compares trials on the way, where this rate has "
            f"fallen already; choose {' or '.join(LEVEL)} (which needs trainer.args.lr_scheduler_kwargs="
            "{num_decay_steps: …})"
        )


def plug_in(*plugins: type[Plugin | Launcher]) -> None:
    """Makes our classes known to Hydra, which looks for plugins in one package only; no other program sees them."""
    try:
        package = importlib.import_module(PLUGIN.partition(".")[0])
    except ModuleNotFoundError:
        package = sys.modules[PLUGIN.partition(".")[0]] = ModuleType(PLUGIN.partition(".")[0])
    module = sys.modules[PLUGIN] = ModuleType(PLUGIN)
    setattr(package, PLUGIN.partition(".")[2], module)
    for plugin in plugins:
        plugin.__module__ = PLUGIN
        setattr(module, plugin.__name__, plugin)
        Plugins.instance().register(plugin)


def answered() -> int | None:
    """Prints what came of the sweep that this process ran, and returns its exit code; None where nothing has run."""
    if Sweeper.directory is None:
        return None
    from smoltrain.sweep.answer import summary

    return summary(Sweeper.directory)
