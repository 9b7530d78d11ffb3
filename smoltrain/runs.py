"""The record of a run: `run.json` and `metrics.jsonl` in the run's own directory. Everything else only reads it."""

import copy
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltrain.config import ConfigError, plain
from smoltrain.secrets import redacted

if TYPE_CHECKING:  # completion reads records too, and has no time for these
    from omegaconf import DictConfig

ROOT = Path("multirun")
VERSIONS = ["smoltrain", "torch", "transformers", "tokenizers", "trl", "datasets", "accelerate", "peft"]
VERSIONS += ["hydra-core", "omegaconf"]
WRITTEN = ("run.json", "metrics.jsonl", "report.md", "curves.png")
# What may differ between two runs of the same experiment: where it is kept, who watches, who prepares its rows.
NOT_IDENTITY = (
    "name",
    "trainer.args.output_dir",
    "trainer.args.report_to",
    "callbacks.tracking",
    "callbacks.progress",
    "check",
    "data.workers",
)


class Diverged(RuntimeError):
    """The loss or a metric is no longer a finite number; the command exits with 3."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; its message names it. Python's own class would make the exit code a matter of chance."""


class Run:
    """One run while it runs: a context that ends in exactly one status, whatever happens inside it.

    `completed` if the block ends, `diverged` on Diverged, `preempted` on an interrupt, `failed` on any other
    exception; the exception passes on, after `on_end` has read the closed record.
    """

    def __init__(
        self,
        directory: str | Path,
        cfg: "DictConfig",
        choices: dict[str, str],
        overrides: list[str],
        parent: dict[str, str] | None,
        on_end: Callable[[Path], None],
    ) -> None:
        from smoltrain.config.targets import allowed

        self.directory = Path(directory)
        self.on_end = on_end
        self.watchers: list[Any] = []
        self.began = time.monotonic()
        config = plain(cfg, resolve=True)
        self.record: dict[str, Any] = {
            "status": "running",
            "name": cfg.name,
            "trainer": cfg.trainer._target_,
            "model": cfg.model.name_or_path,
            "config_hash": config_hash(config, parent),
            "choices": choices,
            "config_dirs": own_folders(),
            "allowed": allowed(),
            "overrides": overrides,
            "seed": cfg.seed,
            "parent": parent,
            "start": now(),
            "end": None,
            "seconds": None,
            "pid": os.getpid(),
            "git": git_state(),
            "versions": {"python": platform.python_version()} | {p: metadata.version(p) for p in VERSIONS},
            "hardware": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()},
            "steps": 0,
            "max_steps": None,  # known when training begins
            "metrics": {},
            "objective": None,
            "error": None,
            "config": config,
        }

    def __enter__(self) -> "Run":
        self.note()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self.note(
            status=status_of(error),
            end=now(),
            seconds=round(time.monotonic() - self.began, 1),
            error=described(error),
        )
        self.on_end(self.directory)
        for watcher in self.watchers:
            watcher.on_run_end(self)

    def note(self, **facts: Any) -> None:
        """Adds facts to the record and writes it, whole or not at all."""
        self.record = redacted(self.record | facts)
        write_atomically(self.directory / "run.json", json.dumps(self.record, indent=1) + "\n")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **redacted(values)}) + "\n")

    def watch(self, watchers: list[Any]) -> None:
        """Tells each watcher that the run begins, and later that it ended."""
        self.watchers = watchers
        for watcher in watchers:
            watcher.on_run_begin(self)


def discard(directory: Path) -> None:
    """Removes what a run that never ran has written, and then what is empty of its directory, up to multirun."""
    for name in WRITTEN:
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / ".hydra", ignore_errors=True)
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


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def config_hash(config: dict, parent: dict[str, str] | None) -> str:
    """Names the experiment: the same for the same resolved config, wherever it is kept and whoever watches.

    A run that starts from another is named by that one's hash, not by the directory it happens to be in.
    """
    kept = copy.deepcopy(config)
    if parent is not None:
        kept["model"]["from_run"] = parent["config_hash"]
    for key in NOT_IDENTITY:
        *parents, last = key.split(".")
        functools.reduce(dict.__getitem__, parents, kept).pop(last, None)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def own_folders() -> list[str]:
    """The folders of YAML, beside ours, that the run in this process was composed from; absolute paths."""
    from hydra.core.hydra_config import HydraConfig

    sources = HydraConfig.get().runtime.config_sources
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


def read(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "run.json").read_text())


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    file = directory / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def completed(root: Path = ROOT) -> list[Path]:
    """The directories of all runs that completed, the one that started last first."""
    found = [
        (record["start"], file.stat().st_mtime, file.parent)
        for file in root.glob("**/run.json")
        if (record := read(file.parent))["status"] == "completed"
    ]
    return [directory for *_, directory in sorted(found, reverse=True)]


def find(reference: str, root: Path = ROOT) -> Path:
    """The directory of the completed run that `reference` means: a path, "latest", a name, or a stamp.

    Of several, the one that started last. Raises ConfigError where there is none, or the one named by its path
    did not complete.
    """
    if (Path(reference) / "run.json").is_file():
        if (status := read(Path(reference))["status"]) != "completed":
            raise ConfigError(f"{reference}: this run is {status}; only a completed run has a final model")
        return Path(reference)
    candidates = [d for d in completed(root) if reference == "latest" or reference in d.relative_to(root).parts]
    if not candidates:
        raise ConfigError(f"{reference}: no completed run of that name, stamp or path in {root.absolute()}")
    return candidates[0]
