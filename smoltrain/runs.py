"""The record of a run: `run.json` and `metrics.jsonl` in the run's own directory. Everything else only reads it."""

import copy
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from smoltrain.config import ConfigError, plain
from smoltrain.secrets import redacted

if TYPE_CHECKING:  # completion reads records too, and has no time for these
    from omegaconf import DictConfig

ROOT = Path("multirun")
CLOCK = ("_runtime", "_per_second", "_time")  # endings of metrics that a clock measured, which no two runs share
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # how a file system says that it knows none
VERSIONS = ["smoltrain", "torch", "transformers", "tokenizers", "trl", "datasets", "accelerate", "peft"]
VERSIONS += ["hydra-core", "omegaconf"]
GREATER = ("exact_match", "accuracies", "accuracy", "margins", "chosen")  # endings of metrics that are to grow
UNFINISHED = ("interrupted", "preempted", "failed")
CODES = {"completed": 0, "failed": 1, "interrupted": 1, "running": 1, "diverged": 3, "preempted": 143}  # exit codes
UNFINISHED_MODEL = "unfinished-model"  # a final model that is being written, or of a run that then was interrupted
# What of a record stays when its run is continued.
STAYS = ("start", "metrics", "samples", "fingerprints", "resumed", "steps", "max_steps", "paused", "perf")
LOG = "log.txt"  # what a trial of a sweep prints
RANKS, GIVEN = "ranks", "given.json"  # logs of the processes that share a run, and what they were given
LOCK = ".lock"  # held by the process of a run, for as long as the run is its own
WRITTEN = ("run.json", "metrics.jsonl", "report.md", "curves.png", "traceback.txt", LOCK)
DIRECTORY = "${hydra:runtime.output_dir}"  # in a config, where its run is kept
# What may differ between two runs of the same experiment: where it is kept, who watches, who prepares its rows.
NOT_IDENTITY = (
    "name",
    "trainer.args.output_dir",
    "trainer.args.report_to",
    "callbacks.tracking",
    "callbacks.progress",
    "check",
    "data.workers",
    "hardware.rendezvous",
    "resume",
    "resume_changes",
    "pause_at",
)
# How a machine divides the batches of an experiment that says what an update sees (global_batch_size).
DIVISION = (
    "hardware",
    "trainer.args.per_device_train_batch_size",
    "trainer.args.gradient_accumulation_steps",
    "trainer.args.per_device_eval_batch_size",  # whose means are averaged
    "trainer.args.precompute_ref_log_probs",
    "trainer.args.fsdp",
    "trainer.args.fsdp_config",
    "trainer.args.deepspeed",
    "trainer.args.ddp_backend",
    "trainer.args.ddp_timeout",
    "trainer.args.ddp_find_unused_parameters",
    "trainer.args.ddp_bucket_cap_mb",
    "trainer.args.ddp_broadcast_buffers",
    "trainer.args.ddp_static_graph",
)


class Diverged(RuntimeError):
    """The loss or a metric is no longer a finite number; the command exits with 3."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; its message names it. Python's own class would make the exit code a matter of chance."""


class Finished(Exception):
    """The same experiment has ended already, as the record in `directory` says."""

    def __init__(self, directory: Path):
        super().__init__(str(directory))
        self.directory = directory


TWICE = 1.0  # seconds within which two signals are one


class Stop:
    """A signal that asks a run to stop: at once, but within training once its step is done and saved.

    `waits` says that training is under way, `asked` is the signal that came. A second one does not wait; one that
    comes with it is the same, for what ends a process may signal its group too.
    """

    waits = False
    asked: str | None = None
    when = 0.0

    def ask(self, name: str) -> None:
        if self.asked and self.waits and time.monotonic() - self.when < TWICE:
            return
        at_once, self.when = self.asked or not self.waits, time.monotonic()
        self.asked = name  # an exception that a destructor happens to get is lost: then the next step ends the run
        if at_once:
            raise Interrupted(f"interrupted by {name}")
        print(f"{name}: saving after this step; once more leaves at once", file=sys.stderr, flush=True)


STOP = Stop()


class Run:
    """One run while it runs: a context that ends in exactly one status, whatever happens inside it.

    `completed` if the block ends, `diverged` on Diverged, `preempted` on an interrupt, `failed` on any other
    exception; the exception passes on, after `on_end` has read the closed record. A run that this process has claimed
    is continued: `former` is its record, of which STAYS stays. Of one that several processes share, one `writes`.
    """

    writes = True
    begins: Any = None  # where, if that was decided by another process

    def __init__(
        self,
        directory: str | Path,
        cfg: "DictConfig",
        choices: dict[str, str],
        overrides: list[str],
        parent: dict[str, str] | None,
        on_end: Callable[[Path], None],
    ) -> None:
        from hydra.core.hydra_config import HydraConfig

        from smoltrain.config.targets import allowed

        self.directory = Path(directory)
        self.on_end = on_end
        self.watchers: list[Any] = []
        self.began = time.monotonic()
        self.former = CLAIMED.pop(self.directory.resolve(), None)
        config = plain(cfg, resolve=True)
        self.record: dict[str, Any] = {
            "status": "running",
            "name": cfg.name,
            "trainer": cfg.trainer._target_,
            "model": cfg.model.name_or_path,
            "config_hash": config_hash(config, parent, self.directory),
            "choices": choices,
            "config_dirs": own_folders(HydraConfig.get()),
            "allowed": allowed(),
            "overrides": overrides,
            "seed": cfg.seed,
            "parent": parent,
            "start": now(),
            "end": None,
            "seconds": None,
            "process": this_process(),
            "resumed": [],
            "git": git_state(),
            "versions": versions(),
            "hardware": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()},
            "steps": 0,
            "max_steps": None,  # known when training begins
            "metrics": {},
            "paused": {},  # by step at which it paused, what its objective was
            "objective": None,
            "error": None,
            "config": config,
            "perf": {},  # what the config leaves to the machine, chosen before training begins
        }
        if self.former:
            self.record |= {key: self.former[key] for key in STAYS if key in self.former}

    @property
    def args(self) -> dict[str, Any]:
        """The trainer's arguments, as far as the config sets them, or what was chosen where it leaves that open."""
        chosen = {key.rpartition(".")[2]: choice["value"] for key, choice in self.record["perf"].items()}
        return self.record["config"]["trainer"]["args"] | chosen

    def __enter__(self) -> "Run":
        hold(self.directory)
        self.note()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ConfigError) and self.former:  # refused before it went on: it is what it was
            write_record(self.directory, self.former)
        elif not isinstance(error, Finished):
            try:
                self.close(error)
            except OSError as full:  # the record says running, and of a process that is gone: interrupted
                if error is None:
                    raise
                print(f"{self.directory}: its end cannot be written, {full}", file=sys.stderr)
        let_go(self.directory)

    def close(self, error: BaseException | None) -> None:
        """Writes how the run ended, and tells all who watch it."""
        status = status_of(error)
        before = (self.former or {}).get("seconds") or 0
        if status != "completed" and (self.directory / "model").is_dir():  # written, and then it was interrupted
            (self.directory / "model").rename(self.directory / UNFINISHED_MODEL)
        self.note(
            status=status,
            end=now(),
            seconds=round(before + time.monotonic() - self.began, 1),
            error=described(error),
            objective=self.record["objective"] if status == "completed" else None,
        )
        if error is not None and status == "failed":
            text = "".join(traceback.format_exception(error))
            (self.directory / "traceback.txt").write_text(redacted(text))
        self.on_end(self.directory)
        for watcher in self.watchers:
            watcher.on_run_end(self)

    def rewind(self, manifest: dict[str, Any] | None, changed: dict[str, list[Any]]) -> None:
        """Goes back to a checkpoint, or to the start: what was logged after it will be logged again.

        `changed` is what its config says otherwise from now on, by key the old value and the new one.
        """
        manifest = manifest or {"step": 0, "metrics_bytes": 0, "config_hash": self.record["config_hash"]}
        file = self.directory / "metrics.jsonl"
        if file.exists():
            os.truncate(file, manifest["metrics_bytes"])
        if manifest["step"] == 0:
            self.record["metrics"] = {}
        again = {"step": manifest["step"], "at": now(), "config_hash": manifest["config_hash"], "changed": changed}
        self.note(steps=manifest["step"], resumed=[*self.record["resumed"], again])

    def note(self, **facts: Any) -> None:
        """Adds facts to the record and writes it, whole or not at all."""
        self.record = redacted(self.record | facts)
        write_record(self.directory, self.record)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **redacted(values)}) + "\n")

    def watch(self, watchers: list[Any]) -> None:
        """Tells each watcher that the run begins, and later that it ended."""
        self.watchers = watchers
        for watcher in watchers:
            watcher.on_run_begin(self)


def worst(objective: str) -> float:
    """What a run that came to nothing returns to a sweeper: worse than any value of its objective."""
    return -math.inf if objective.endswith(GREATER) else math.inf


def called(directory: Path) -> str:
    """What a run is called where all runs of a project lie side by side, in a tracker."""
    return "/".join(directory.absolute().parts[-2:])


def discard(directory: Path) -> None:
    """Removes what a run that never ran has written, and then what is empty of its directory, up to multirun."""
    for name in WRITTEN:
        (directory / name).unlink(missing_ok=True)
    for name in (".hydra", RANKS):
        shutil.rmtree(directory / name, ignore_errors=True)
    for folder in (directory, *directory.parents):
        if any(folder.iterdir()) or not (folder == directory or folder.is_relative_to(ROOT.absolute())):
            break
        folder.rmdir()


def status_of(error: BaseException | None) -> str:
    if error is None:
        return "completed"
    if isinstance(error, Diverged):
        return "diverged"
    return "preempted" if isinstance(error, KeyboardInterrupt) else "failed"


def described(error: BaseException | None) -> str | None:
    """An exception as the record says it: with its class, but for an interrupt, which is no error."""
    if error is None:
        return None
    return str(error) if isinstance(error, Interrupted) else "".join(traceback.format_exception_only(error)).strip()


def write_record(directory: Path, record: dict[str, Any]) -> None:
    write_atomically(directory / "run.json", json.dumps(record, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def config_hash(config: dict, parent: dict[str, str] | None, directory: Path | None = None) -> str:
    """Names the experiment: the same for the same resolved config, wherever it is kept and whoever watches.

    Where the config says what an update sees, the machine that divides it is not the experiment. A run that starts from
    another is named by that one's hash, not by the directory it happens to be in. `directory` is the run's own, where
    the config knows it already.
    """
    kept = copy.deepcopy(config)
    if parent is not None:
        kept["model"]["from_run"] = parent["config_hash"]
    for key in NOT_IDENTITY if kept.get("global_batch_size") is None else NOT_IDENTITY + DIVISION:
        *parents, last = key.split(".")
        functools.reduce(dict.__getitem__, parents, kept).pop(last, None)
    text = json.dumps(kept, sort_keys=True)
    if directory is not None:
        text = text.replace(json.dumps(str(directory))[1:-1], DIRECTORY)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def versions() -> dict[str, str]:
    """What is installed, of all that a result hangs on."""
    return {"python": platform.python_version()} | {package: metadata.version(package) for package in VERSIONS}


def own_folders(hydra: Any) -> list[str]:
    """The folders of YAML, beside ours, that a config with this node of Hydra's was composed from; absolute paths."""
    sources = hydra.runtime.config_sources
    return [str(Path(s.path).absolute()) for s in sources if s.schema == "file" and s.provider != "main"]


def git_state() -> dict[str, Any] | None:
    """Commit and dirty flag of the working directory; None where it is no git checkout."""
    if not shutil.which("git"):
        return None
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False)
    return {"commit": head.stdout.strip(), "dirty": bool(changes.stdout.strip())}


# ---------------------------------------------------------------- whose a run is

CLAIMED: dict[Path, dict[str, Any]] = {}  # runs that this process goes on with, and what their records were
HELD: dict[Path, IO[bytes]] = {}  # the locks of the runs that are this process's own


def this_process() -> dict[str, Any]:
    """Where a run is running, for people to read."""
    return {"host": platform.node(), "pid": os.getpid()}


def hold(directory: Path, wait: bool = True) -> bool:
    """Takes the lock of a run. Whatever this process dies of, the system gives it back; its children never have it.

    False where another process has it, and this one is not to wait.
    """
    if directory.resolve() in HELD:
        return True
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / LOCK).open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    HELD[directory.resolve()] = file
    return True


def let_go(directory: Path) -> None:
    HELD.pop(directory.resolve()).close()


def gone(directory: Path, process: dict[str, Any]) -> bool:
    """Whether the process of a run has ended: nobody holds the run's lock.

    Where a file system has no locks, it is the process's number that tells, on its own machine.
    """
    if directory.resolve() in HELD:  # to open and close the file once more would give the lock back
        return False
    try:
        with (directory / LOCK).open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except FileNotFoundError:
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return process["host"] == platform.node() and not there(process["pid"])


def there(pid: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def give_back() -> None:
    """Leaves the runs that were claimed, and then not gone on with, as they were."""
    for directory, record in CLAIMED.items():
        write_record(directory, record)
        let_go(directory)
    CLAIMED.clear()


def claim(directory: Path) -> bool:
    """Makes an unfinished run this process's own, unless another was quicker."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        record = read(directory)
        if record["status"] == "running":
            return False
        hold(directory)
        write_record(directory, record | {"status": "running", "process": this_process()})
        CLAIMED[directory.resolve()] = record
        return True
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- reading


def read(directory: Path) -> dict[str, Any]:
    """The record of a run; `interrupted` where it says running and its process is gone."""
    record = json.loads((directory / "run.json").read_text())
    if record["status"] == "running" and gone(directory, record["process"]):
        record["status"] = "interrupted"
    return record


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; not the last one where its writing was cut off."""
    file = directory / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
