"""Hydra's sweeper: opens or continues the directory of a sweep, launches its trials, and ends with one answer."""

import copy
import dataclasses
import importlib
import json
import math
import os
import sys
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
from smoltrain.history import every
from smoltrain.lines import short
from smoltrain.sweep import cluster, local, record
from smoltrain.sweep.search import Proposal, Search, search
from smoltrain.sweep.space import Space, Trial

ENDED = ("completed", "diverged")  # which the same command does not run again
STORAGE = "optuna.log"
LEVEL = ("constant", "constant_with_warmup", "warmup_stable_decay")  # schedules whose rungs can be compared
NAMING = ("name", "experiment")  # what the directory of a sweep hangs on


class Sweeper(Plugin):
    """Runs the trials that a search asks for, each once, wherever it has ended before.

    `space` is what the command line was taken apart to, before Hydra was started.
    """

    space: Space
    directory: Path
    config: DictConfig
    hydra_context: HydraContext
    launcher: Launcher

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader = Checked(hydra_context.config_loader)
        self.hydra_context = HydraContext(config_loader=self.loader, callbacks=hydra_context.callbacks)
        self.task, self.config = task_function, config

    def sweep(self, arguments: list[str]) -> Path:
        """Runs the sweep and returns its directory. Raises ConfigError where the directory is of another."""
        self.launcher = Plugins.instance().instantiate_launcher(self.hydra_context, self.task, self.config)
        directory, trials = self.place(Path(self.config.hydra.sweep.dir))
        Sweeper.directory = directory
        self.fingerprints = local.elsewhere(partial(fingerprints, self.space))
        runs.hold(directory)
        self.book = Book(directory, self.facts(trials))
        try:
            self.run(directory)
        finally:
            self.book.note(end=runs.now())
            runs.let_go(directory)
        return directory

    def facts(self, trials: list[dict[str, Any]]) -> dict[str, Any]:
        """What sweep.json says."""
        space = self.space
        return {
            "name": self.config.name,
            "start": runs.now(),
            "end": None,
            "process": runs.this_process(),
            "command": space.overrides,
            "search": {"method": space.settings.search} | dataclasses.asdict(space.settings),
            "objective": space.first.cfg.objective,
            "varied": [axis.key for axis in space.axes],
            "trials": trials,
        }

    # ------------------------------------------------------------ where

    def place(self, folder: Path) -> tuple[Path, list[dict[str, Any]]]:
        """The directory of this sweep, and the trials that it has already: its own from before, or a new one."""
        never = self.space.first.cfg.resume == "never"
        if (folder / record.FILE).exists():  # which only a typed hydra.sweep.dir can have
            if never or not self.continues(folder):
                raise ConfigError(f"hydra.sweep.dir={folder}: another sweep is there; choose another directory")
            return folder, trials_of(folder)
        if folder.is_dir() and (inside := sorted(path.name for path in folder.iterdir())):
            raise ConfigError(f"hydra.sweep.dir={folder}: it holds {inside[0]}; choose one that is new or empty")
        for earlier in [] if never else record.sweeps(folder.parent):
            if self.continues(earlier):
                print(f"continues the sweep {short(earlier)}")
                return earlier, trials_of(earlier)
        return folder, []

    def continues(self, directory: Path) -> bool:
        """Whether an earlier sweep, whose process is gone, is this one, or lacks only values that are new.

        A search is the same for the same command; a grid, where all of its trials are asked for now.
        """
        try:
            then = json.loads((directory / record.FILE).read_text())
            same = then["search"] == self.facts([])["search"]
            if not same or not runs.gone(directory, then["process"]):
                return False
            if self.space.settings.search != "grid":
                return sorted(then["command"]) == sorted(self.space.overrides)
            known = {trial["config_hash"] for trial in then["trials"]}
        except (OSError, ValueError, LookupError, TypeError):  # no sweep of ours
            return False
        return known <= {self.space.trial(values).config_hash for values in begun(self.space)}

    # ------------------------------------------------------------ what

    def run(self, directory: Path) -> None:
        """Asks for trials and runs them, until there is none left to ask for."""
        chosen = searched(self.space, directory / STORAGE, at_once(self.config))
        alone = self.space.first.cfg.resume == "never" or self.space.settings.search == "halving"
        self.elsewhere = {} if alone else self.ended_before(directory.parent)
        while asked := chosen.ask():
            todo: dict[str, tuple[Proposal, Trial, dict[str, Any]]] = {}
            for proposal in asked:
                trial = self.space.trial(proposal.values)
                entry = self.book.entry(trial, self.elsewhere)
                self.refuse_other(trial, entry)
                known = self.book.objective(entry, proposal.until)
                if self.book.status(entry) in ENDED or (proposal.until and known is not None):
                    chosen.tell(proposal.values, known, proposal.until)
                else:
                    todo.setdefault(trial.config_hash, (proposal, trial, entry))
            self.book.note()
            self.launch([*todo.values()])
            for proposal in asked:
                entry = self.book.entry(self.space.trial(proposal.values), self.elsewhere)
                chosen.tell(proposal.values, self.book.objective(entry, proposal.until), proposal.until)

    def ended_before(self, folder: Path) -> dict[str, Path]:
        """By config hash, the runs of this name that have ended, in whatever sweep or alone; the last one of each."""
        found: dict[str, Path] = {}
        for run in reversed(every(folder)):
            whole = run.status == "diverged" or (run.status == "completed" and (run.directory / "model").is_dir())
            if whole and self.same_rows(run.record):
                found[run.record["config_hash"]] = run.directory.absolute()
        return found

    def same_rows(self, record: dict[str, Any]) -> bool:
        """Whether a run learned from what it would learn from now."""
        now = self.fingerprints.get(preparation(record["config"]))
        return now is None or record.get("fingerprints", {}).items() >= now.items()

    def refuse_other(self, trial: Trial, entry: dict[str, Any]) -> None:
        """Raises ConfigError where a trial of this sweep learned from what is another thing now."""
        known = self.book.read(entry)
        if known.get("status") in ENDED and not self.same_rows(known):
            raise ConfigError(
                f"{entry['directory']}: its rows, tokenizer or template are not what they were when it ran; "
                "resume=never starts a new sweep"
            )

    def launch(self, todo: list[tuple[Proposal, Trial, dict[str, Any]]]) -> None:
        """Runs trials, each in the directory that it has in this sweep."""
        if not todo:
            return
        jobs = [self.loader.takes(trial, proposal.until, self.directory, entry) for proposal, trial, entry in todo]
        returns = self.launcher.launch(jobs, initial_job_idx=todo[0][2]["number"])
        for (_, _, entry), done in zip(todo, returns, strict=True):
            code = getattr(done, "code", None)
            entry["code"] = self.book.code(entry) if code is None else code
        self.book.note()


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
        self.known = {trial["config_hash"]: trial for trial in facts["trials"]}
        self.note()

    def note(self, **facts: Any) -> None:
        self.facts |= facts
        runs.write_atomically(self.directory / record.FILE, json.dumps(self.facts, indent=1) + "\n")

    def entry(self, trial: Trial, elsewhere: dict[str, Path]) -> dict[str, Any]:
        """What stands in sweep.json of a trial; one that is new gets a number and a directory."""
        if trial.config_hash not in self.known:
            number = 1 + max((one["number"] for one in self.facts["trials"]), default=-1)
            varied = ",".join(f"{key}={value}" for key, value in trial.values.items())
            own = f"{number}_{label(varied)}".rstrip("_")
            entry = {"number": number, "overrides": trial.values, "config_hash": trial.config_hash}
            entry |= {"directory": str(elsewhere.get(trial.config_hash, own)), "code": None}
            self.facts["trials"].append(entry)
            self.known[trial.config_hash] = entry
        return self.known[trial.config_hash]

    def read(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The record of a trial's run; empty where there is none."""
        folder = record.located(self.directory, entry["directory"])
        return runs.read(folder) if (folder / "run.json").is_file() else {}

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


def trials_of(directory: Path) -> list[dict[str, Any]]:
    trials: list[dict[str, Any]] = json.loads((directory / record.FILE).read_text())["trials"]
    return trials


def at_once(config: DictConfig) -> int:
    """How many trials the launcher runs at a time, where it says so."""
    return int(config.hydra.launcher.get("jobs") or 1)


def searched(space: Space, storage: Path, jobs: int = 1) -> Search:
    """The search that a sweep makes; TPE keeps what it knows in `storage`."""
    steps = int(space.first.cfg.trainer.args.max_steps)
    return search(space.settings, space.axes, space.first.cfg.objective, steps if steps > 0 else None, storage, jobs)


def begun(space: Space) -> list[dict[str, Any]]:
    """The values of the trials that are known before any has run; of a search that learns, those at both ends."""
    if space.settings.search != "tpe":
        return [proposal.values for proposal in searched(space, Path()).ask()]
    return [space.first.values, {axis.key: axis.values[-1] if axis.values else axis.high for axis in space.axes}]


# ---------------------------------------------------------------- shared work

PREPARED = ("data", "encode", "model")  # nodes of a config that decide what its rows are as tokens, and
ALIKE = ("max_length", "truncation_mode")  # the trainer's arguments that do


def preparation(config: dict[str, Any]) -> str:
    """Names what the rows of a run are made by, so that trials that share it are prepared once."""
    args = config["trainer"]["args"]
    of_rows = [{node: config[node] for node in PREPARED}, [args.get(name) for name in ALIKE]]
    return json.dumps([*of_rows, config["trainer"]["_target_"]], sort_keys=True)


def fingerprints(space: Space) -> dict[str, dict[str, str]]:
    """Prepares the rows of all trials, each kind once, and names them. Raises ConfigError for what would stop a trial.

    It is done before the first trial begins, and finds the rows in the cache where they are known.
    """
    from smoltrain.preflight import preflight
    from smoltrain.report import rows

    found: dict[str, dict[str, str]] = {}
    wrong: dict[str, None] = {}
    for values in begun(space):
        cfg = space.trial(values).cfg
        kind = preparation(resolved(cfg)[0])
        if kind not in found:
            cfg = copy.deepcopy(cfg)
            cfg.trainer.args.output_dir = os.devnull  # which only a run has
            made = preflight(cfg)
            wrong |= dict.fromkeys(made.errors)
            found[kind] = {} if made.errors else rows(made.data, made.chat.tokenizer)["fingerprints"]
    if wrong:
        raise ConfigError("\n".join(wrong))
    return found


# ---------------------------------------------------------------- for the command


def prepared(flags: list[str], overrides: list[str]) -> tuple[list[str], list[str]]:
    """Checks a sweep whole, makes it known to Hydra, and returns the command line that Hydra is to run.

    Raises ConfigError for all that is wrong with any trial that is known by now.
    """
    space = Space.of(flags, overrides)
    for values in begun(space):
        trial = space.trial(values)
        if space.settings.search == "halving":
            refuse_decay(trial)
    Sweeper.space = space
    plug_in(Sweeper, local.Local, cluster.Slurm, cluster.Ray)
    kept = [o for o in overrides if o.partition("=")[0].lstrip("+~").split(".")[0].split("/")[0] in ("hydra", *NAMING)]
    return ["-m", *space.flags], kept


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


def answered() -> int:
    """Prints what came of the sweep that this process ran, and returns its exit code."""
    from smoltrain.sweep.answer import summary

    return summary(Sweeper.directory)
