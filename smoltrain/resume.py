"""Which run a command goes on with: its own that was not finished, the one that it names, or a new one."""

import contextlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.prompt import Confirm

from smoltrain import checkpoints, report, runs
from smoltrain.config import ConfigError, leaves, rules, shown
from smoltrain.config.groups import naming
from smoltrain.config.overrides import read
from smoltrain.config.validate import resolved
from smoltrain.history import every, opened, resolve
from smoltrain.lines import machines, short

MENDS = "resume=never starts a new run, resume_changes=accept goes on all the same"
# What a continued run may change without a word: it is read anew, and what was learned so far does not hang on it.
FREE: tuple[str, ...] = ("evaluation.", "objective", "threads", "callbacks.", "trainer.args.dataloader_num_workers")
FREE += ("trainer.args.logging_", "trainer.args.eval_", "trainer.args.save_")
# What the saved state of the optimizer brings along, so that a new value would be passed over.
KEPT = ("trainer.args.optim", "trainer.args.weight_decay", "trainer.args.adam_")
RATE = "trainer.args.learning_rate"  # of a schedule that evaluations move; any other is applied


def continued(cfg: DictConfig, overrides: list[str]) -> Path | None:
    """The directory of the run that a checked config goes on with, claimed for this process; None for a new one.

    Raises ConfigError where `resume` names a run that cannot be continued so.
    """
    if cfg.resume not in ("auto", "never"):
        return named(cfg)
    folder = kept_in(cfg, overrides)
    if cfg.resume == "auto" and (found := unfinished(cfg, folder)):
        return found
    if folder != runs.ROOT / cfg.name:
        refuse_used(folder)
    return None


def unfinished(cfg: DictConfig, folder: Path) -> Path | None:
    """The last run of an experiment below a folder, claimed, where it is neither at its end nor running."""
    parent = pin_parent(cfg)
    for directory in alike(runs.config_hash(resolved(cfg)[0], parent), folder):
        status = runs.read(directory)["status"]
        if status in runs.UNFINISHED and runs.claim(directory):
            return directory
        if status != "running":
            return None
        print(f"{short(directory)}: this experiment is running there; another run of it begins", file=sys.stderr)
    say_nearly(cfg, folder)
    return None


def say_nearly(cfg: DictConfig, folder: Path) -> None:
    """Says of the last run of this name, where it is unfinished, that it differs in what an update sees alone."""
    last = next(iter(every(folder)), None)
    if last is None or last.record.get("status") not in runs.UNFINISHED:
        return
    machine = tuple(f"{key}." for key in runs.DIVISION)
    now = changes(last.record["config"], resolved(cfg)[0])
    differing = [key for key in now if not f"{key}.".startswith(machine)]
    then = last.record["config"].get("global_batch_size")
    if differing == ["global_batch_size"]:
        print(
            f"{short(last.directory)}: a run that is {last.record['status']} and says global_batch_size={shown(then)}; "
            "with the same here, this would go on with it",
            file=sys.stderr,
        )


def claim_own(cfg: DictConfig, directory: Path, trial: bool) -> None:
    """Goes on with an unfinished run of the same experiment where a sweep runs it again; any other stays as it is."""
    same = runs.read(directory)["config_hash"] == runs.config_hash(resolved(cfg)[0], pin_parent(cfg))
    if not (trial and same and runs.read(directory)["status"] in runs.UNFINISHED and runs.claim(directory)):
        refuse_used(directory)


def refuse_used(folder: Path) -> None:
    """Raises ConfigError for a run's directory with something in it, which a run might write over."""
    if (folder / "run.json").exists():
        status = runs.read(folder)["status"]
        raise ConfigError(f"hydra.run.dir={folder}: there is a run already, {status}; choose another directory")
    if folder.is_dir() and (inside := sorted(p.name for p in folder.iterdir() if p.name != runs.LOG)):
        raise ConfigError(f"hydra.run.dir={folder}: it holds {inside[0]}; choose a directory that is new or empty")


def kept_in(cfg: DictConfig, overrides: Iterable[str]) -> Path:
    """The folder in or below which runs of this name are kept."""
    given = [found for override in overrides if (found := read(override)) and found.key_or_group == "hydra.run.dir"]
    return Path(str(given[-1].value())) if given else runs.ROOT / cfg.name


def with_its_own(flags: list[str], overrides: list[str]) -> tuple[list[str], list[str]]:
    """The command line of a run that `resume=` names, with what is typed now in place of what was typed then."""
    typed = {key_of(override) for override in overrides}
    given = [found.value() for o in overrides if (found := read(o)) and found.key_or_group == "resume"]
    if not given or given[-1] in ("auto", "never"):
        return flags, overrides
    record = opened(resolved_run(str(given[-1]))).record
    folders = naming(record.get("config_dirs", []))
    if len(folders) == 1:  # an override, for there are several
        overrides = [*folders, *overrides]
    elif not {"--config-dir", "-cd"} & {flag.partition("=")[0] for flag in flags}:
        flags = [*flags, *folders]
    return flags, [*(o for o in record.get("overrides", []) if key_of(o) not in typed), *overrides]


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def resolved_run(reference: str) -> Path:
    try:
        return resolve(reference)
    except ConfigError as error:
        raise ConfigError(f"resume={error}; auto and never are the other choices") from error


def alike(config_hash: str, folder: Path) -> list[Path]:
    """The directories of all runs of an experiment, the one that started last first."""
    return [run.directory for run in every(folder) if run.record.get("config_hash") == config_hash]


def named(cfg: DictConfig) -> Path:
    """The run that `resume` names, unless it has completed, is running, or was another experiment."""
    directory = resolved_run(str(cfg.resume))
    record = runs.read(directory)
    if record["status"] in ("completed", "running"):
        raise ConfigError(f"resume={cfg.resume}: this run is {record['status']}; resume=never starts a new one")
    refuse_changes(cfg, record)
    if not runs.claim(directory):
        raise ConfigError(f"resume={directory}: another process goes on with this run")
    return directory


def refuse_changes(cfg: DictConfig, record: dict[str, Any]) -> None:
    """Raises ConfigError for what a config says otherwise than the record of the run that it continues."""
    pin_parent(cfg)
    now = resolved(cfg)[0]
    changed = changes(record["config"], now)
    if cfg.resume_changes == "accept":
        by_evaluation = str(now["trainer"]["args"].get("lr_scheduler_type")) in rules.BY_EVALUATION
        stuck = (*KEPT, RATE) if by_evaluation else KEPT
        changed = {key: values for key, values in changed.items() if key.startswith(stuck)}
    mend = MENDS if cfg.resume_changes == "refuse" else "the saved optimizer brings its own; resume=never starts anew"
    if changed:
        lines = [f"{key}={shown(new)}: the continued run has {shown(old)}" for key, (old, new) in changed.items()]
        raise ConfigError("\n".join([*lines, f"resume={cfg.resume}: {mend}"]))


def changes(then: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """What of a run's config decides what it learns and is another now: by key the old value and the new one."""
    one, other = dict(leaves(then)), dict(leaves(now))
    divided = runs.DIVISION if then.get("global_batch_size") and now["global_batch_size"] else ()
    ignored = (*(f"{key}." for key in (*runs.NOT_IDENTITY, *divided)), *FREE)
    differing = [key for key in sorted(one | other) if one.get(key) != other.get(key)]
    return {key: [one.get(key), other.get(key)] for key in differing if not f"{key}.".startswith(ignored)}


@dataclass
class Start:
    """Where a run begins: at a checkpoint of its own, or (None) at its first step.

    `unfit` are the newer checkpoints that it does not go on from, each with the reason.
    """

    checkpoint: Path | None
    unfit: dict[Path, str]

    @classmethod
    def of(cls, run: runs.Run, accepts: str, fingerprints: dict[str, Any], last: int) -> "Start":
        """Looks for the checkpoint that a continued run goes on from, and touches nothing. `last` is its last step.

        Raises ConfigError where its rows are others now (`fingerprints`), or each checkpoint that was saved whole is
        damaged, unless it `accepts` that; where the best one is; and where the run would be over, by a change, before
        it goes on.
        """
        refuse_other(run, accepts, fingerprints)
        if not run.former:
            return cls(None, {})
        hashes = {run.former["config_hash"], run.record["config_hash"]}
        hashes |= {again["config_hash"] for again in run.former["resumed"]}
        found, unfit = checkpoints.newest(run.directory, hashes)
        ended = {folder: why for folder, why in unfit.items() if (folder / checkpoints.MANIFEST).exists()}
        whole = {folder: why for folder, why in ended.items() if why != checkpoints.NO_OPTIMIZER}
        if found is None and whole and accepts == "refuse":
            lines = [f"{folder}: {why}" for folder, why in whole.items()]
            raise ConfigError("\n".join([*lines, f"no checkpoint of this run is sound; {MENDS}"]))
        if found and run.args.get("load_best_model_at_end") and (wrong := best_damaged(found)):
            raise ConfigError(f"{wrong}; it is the best so far, and would be the final model; resume=never starts anew")
        if found:
            state = json.loads((found / "trainer_state.json").read_text())
            if state["global_step"] >= last != state["max_steps"]:
                raise ConfigError(
                    f"resume={run.directory}: it is at step {state['global_step']} of {state['max_steps']}, and with "
                    f"what has changed its last step would be {last}; raise trainer.args.max_steps or num_train_epochs"
                )
        return cls(found, unfit)

    @property
    def told(self) -> dict[str, Any]:
        """What another process has to know of it."""
        names = {folder.name: why for folder, why in self.unfit.items()}
        return {"checkpoint": self.checkpoint and self.checkpoint.name, "unfit": names}

    @classmethod
    def heard(cls, directory: Path, told: dict[str, Any]) -> "Start":
        """What another process has told of where a run in a directory begins."""
        unfit = {directory / name: why for name, why in told["unfit"].items()}
        return cls(told["checkpoint"] and directory / told["checkpoint"], unfit)

    def go_back(self, run: runs.Run) -> None:
        """Brings the record and the directory of a continued run to where it begins."""
        if not (run.former and run.writes):
            return
        checkpoints.tidy(run.directory, self.unfit, print)
        changed = changes(run.former["config"], run.record["config"])
        for key, (old, new) in changed.items():
            print(f"{key}={shown(new)}: the continued run had {shown(old)} (resume_changes=accept)")
        run.rewind(checkpoints.read(self.checkpoint) if self.checkpoint else None, changed)
        where = f"from {self.checkpoint.name}" if self.checkpoint else "from its start, for it has no checkpoint"
        then, now = (machines(record["config"]) for record in (run.former, run.record))
        among = "" if then == now else f", in {now} where it had {then}"
        print(f"continues the {run.former['status']} run {short(run.directory)} {where}{among}")


def best_damaged(checkpoint: Path) -> str:
    """What is wrong with the best checkpoint of a run that goes on from a later one; empty where nothing is."""
    named = json.loads((checkpoint / "trainer_state.json").read_text())["best_model_checkpoint"]
    best = checkpoint.parent / Path(named or checkpoint).name
    manifest = checkpoints.read(best)
    wrong = "it is not there as it was written" if manifest is None else checkpoints.damage(best, manifest)
    return wrong and f"{best}: {wrong}"


def refuse_other(run: runs.Run, accepts: str, fingerprints: dict[str, Any]) -> None:
    """Raises ConfigError where what a continued run learns from, or begins with, is no longer what it was."""
    then = (run.former or {}).get("fingerprints", {})
    changed = sorted(name for name in then if name in fingerprints and then[name] != fingerprints[name])
    sources = ", ".join((run.former or {}).get("sources", {}))
    names = {"train": f"the training rows ({sources})", "test": f"the held-out rows ({sources})", "model": "the model"}
    names |= {"tokenizer": "the tokenizer", "chat_template": "the chat template"}
    lines = [f"{names.get(name, name)}: not what it was when this run began" for name in changed]
    if changed and accepts == "refuse":
        raise ConfigError("\n".join([*lines, MENDS]))
    print("".join(f"{line} (resume_changes=accept)\n" for line in lines), end="")


def stop_if_finished(run: runs.Run) -> None:
    """Raises Finished where the same experiment on the same rows has ended already, unless somebody wants it again."""
    for directory in alike(run.record["config_hash"], runs.ROOT / run.record["name"]):
        record = runs.read(directory)
        equal = record.get("fingerprints", {}).items() >= run.record["fingerprints"].items()
        equal = equal and (record["status"] != "completed" or (directory / "model").is_dir())
        if directory.resolve() != run.directory.resolve() and record["status"] in ("completed", "diverged") and equal:
            if not again(directory, record):
                raise runs.Finished(directory)
            return


def again(directory: Path, record: dict[str, Any]) -> bool:
    """Says how an experiment has ended; on a terminal, asks whether it is to run once more."""
    how = report.outcome(record) if record["status"] == "completed" else f"at step {report.progress(record)}"
    print(f"this experiment has {record['status']} already: {report.short(directory)} ({how})")
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(EOFError):
            return Confirm.ask("run it once more?", default=False)
    print("resume=never runs it once more")
    return False


def pin_parent(cfg: DictConfig) -> dict[str, str] | None:
    """Replaces `model.from_run` by the directory it means today, and returns what the record keeps of that run."""
    if cfg.model.from_run is None:
        return None
    directory = resolve(str(cfg.model.from_run), completed=True).resolve()
    if not (directory / "model").is_dir():
        raise ConfigError(
            f"model.from_run={cfg.model.from_run}: the final model of this run, {directory}/model, is gone"
        )
    parent = runs.read(directory)
    if parent["model"] != cfg.model.name_or_path:
        raise ConfigError(
            f"model.from_run={cfg.model.from_run}: {directory} trained {parent['model']}, but model= says "
            f"{cfg.model.name_or_path}; choose the model that the run trained"
        )
    cfg.model.from_run = str(directory)
    return {"directory": str(directory), "config_hash": parent["config_hash"], "trainer": parent["trainer"]}
