"""The local launcher: imports once, then forks a process for each trial, as many at a time as the machine carries."""

import gc
import os
import pickle
import pkgutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from smoltrain import runs
from smoltrain.config.compose import run_job
from smoltrain.config.groups import naming
from smoltrain.config.overrides import quoted
from smoltrain.config.resolvers import cores
from smoltrain.history import look
from smoltrain.lines import some
from smoltrain.ranks import PATIENCE, POLL, ends_with_its_parent
from smoltrain.sweep.progress import Board

# What a trial imports on its way; the classes that its config names come with it.
IMPORTED: tuple[str, ...] = (
    "torch",
    "transformers.Trainer",
    "datasets",
    "peft",
    "smoltrain.sft.SFTTrainer",
    "trl.SFTConfig",
    "pandas",
)
IMPORTED += ("matplotlib.figure", "matplotlib.backends.backend_agg", "smoltrain.train", "smoltrain.evaluate")
IMPORTED += ("smoltrain.preflight", "smoltrain.callbacks", "smoltrain.trainers", "smoltrain.data.streams")


@dataclass
class Job:
    """One trial, from its config to how it ended."""

    number: int
    config: DictConfig
    directory: Path
    overrides: list[str] = field(default_factory=list)
    slot: int = 0
    pid: int = 0
    code: int | None = None
    began: float = 0.0
    ended: float = 0.0


@dataclass
class Done(JobReturn):
    """What a sweeper is told, with the exit code of the process."""

    code: int | None = None


class Local(Launcher):
    """Runs the trials of a sweep on this machine, each in a process of its own.

    `jobs` of them at a time: by default one for each accelerator, and on the CPU as many as there are cores for the
    `threads` of each. Of a sweep that asks for a few trials at a time, `before` have been run, of those `expected`.
    """

    before, expected = 0, 0

    def __init__(self, jobs: int | None = None) -> None:
        self.at_once = jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Runs a batch of trials and returns how each came out, in their order; a failed one stops no other."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        jobs = [self.job(initial_job_idx + i, [*overrides]) for i, overrides in enumerate(job_overrides)]
        with Board(max(self.expected, len(jobs)), self.before) as board:
            self.run(jobs, board)
        return [returned(job) for job in jobs]

    def places(self, config: DictConfig) -> int:
        """How many trials run at a time."""
        return self.at_once or room(config)

    def job(self, number: int, overrides: list[str]) -> Job:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        directory = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir).absolute()
        return Job(number, config, directory, overrides)

    def run(self, jobs: list[Job], board: Board) -> None:
        """Keeps as many trials running as there is room for, until all have ended; a signal is passed on to them."""
        places = min(self.places(jobs[0].config), len(jobs))
        board.say(f"{some(len(jobs), 'trial')} to run{f', {places} at a time' if places > 1 else ''}")
        imported(jobs[0].config)
        waiting, living = jobs[::-1], list[Job]()
        free = list(range(places))[::-1]
        try:
            while waiting or living:
                while waiting and free:
                    job = waiting.pop()
                    job.slot = free.pop()
                    self.start(job)
                    living.append(job)
                    board.started(job.number, job.directory)
                living = self.look(living, free, board)
        except BaseException:  # whatever ends this process, none of them outlives it
            stop(living, board)
            raise

    def look(self, living: list[Job], free: list[int], board: Board) -> list[Job]:
        """Waits a moment; returns those that are still running, and gives back the places of the others."""
        time.sleep(POLL)
        if runs.STOP.asked:  # whose exception was lost, as it is where a destructor happens to get it
            raise runs.Interrupted(f"interrupted by {runs.STOP.asked}")
        for job in living:
            if ended(job):
                free.append(job.slot)
                board.ended(job.number, job.directory, job.code)
        board.look()
        return [job for job in living if job.code is None]

    def start(self, job: Job) -> None:
        job.began = time.monotonic()
        job.directory.mkdir(parents=True, exist_ok=True)
        environment = own_devices(job.slot, job.config.hardware.processes)
        if unsafe_to_fork():
            job.pid = spawned(job, environment)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        job.pid = os.fork()
        if job.pid == 0:
            os.environ |= environment
            live(job, self.task)


# ---------------------------------------------------------------- before


def imported_all() -> None:
    """Imports what every trial needs. Nothing is computed and no thread begun: what is forked would miss it."""
    for name in IMPORTED:
        with suppress(ModuleNotFoundError):  # matplotlib is an extra
            pkgutil.resolve_name(name)


def imported(config: DictConfig) -> None:
    """Imports what the trials will need, with the classes that a config names."""
    imported_all()
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from smoltrain.config import leaves, plain
    from smoltrain.config.targets import get_object
    from smoltrain.preflight import source

    for key, value in leaves({key: node for key, node in plain(config).items() if key != "hydra"}):
        if key.endswith("_target_"):
            found = get_object(value)
            if key == "trainer._target_":
                source(found)
    # What each trial would work out for itself, the same for all, and is kept: 0.2 s of CPU in the first of them.
    get_checkpoint_conversion_mapping("")
    runs.versions()
    gc.collect()
    gc.freeze()  # what is never collected is never copied


def room(config: DictConfig) -> int:
    """How many trials there is room for at a time."""
    processes = config.hardware.processes
    if not config.trainer.args.use_cpu and devices():
        return max(len(devices()) // processes, 1)
    threads = config.threads or int(os.environ.get("OMP_NUM_THREADS") or cores())
    return max(cores() // (threads * processes), 1)


def devices() -> list[str]:
    """The CUDA devices of this process as CUDA_VISIBLE_DEVICES names them, counted without touching them."""
    import torch

    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]


def own_devices(slot: int, processes: int) -> dict[str, str]:
    """The accelerators of the trial at a place, one for each of its processes."""
    gpus = devices()
    own = [gpus[(slot * processes + process) % len(gpus)] for process in range(processes)] if gpus else []
    return {"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(own))} if own else {}


def unsafe_to_fork() -> bool:
    """Whether CUDA has been touched in this process, which it does not survive."""
    import torch

    return torch.cuda.is_initialized()


Result = TypeVar("Result")


def elsewhere(function: Callable[[], Result]) -> Result:
    """What a function returns, or the exception that it raises, in a process of its own: this one computes nothing.

    What computes may start threads, and what has threads cannot be forked. It ends when this process does, with the
    processes that it has started itself.
    """
    from smoltrain.__main__ import listen

    imported_all()
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                listen()
                ends_with_its_parent(signal.SIGTERM)
                answer: Any = function()
            except BaseException as error:  # noqa: BLE001 - it is raised again, where it belongs
                answer = error
            with open(write, "wb") as pipe:  # noqa: PTH123 - a number of an open file
                pickle.dump(answer, pipe)
            sys.stdout.flush()
        finally:
            os._exit(0)
    os.close(write)
    try:
        with open(read, "rb") as pipe:  # noqa: PTH123
            told = pipe.read()
    except BaseException:
        end(pid)
        raise
    os.waitpid(pid, 0)
    answer = pickle.loads(told) if told else RuntimeError("the process that prepared the rows was killed")
    if isinstance(answer, BaseException):
        raise answer
    return answer


def end(pid: int) -> None:
    """Ends a process of ours, at once or within PATIENCE."""
    os.kill(pid, signal.SIGTERM)
    last = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < last:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
            time.sleep(POLL)
    except KeyboardInterrupt:
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# ---------------------------------------------------------------- in the process of a trial


def live(job: Job, task: TaskFunction) -> None:
    """All that the process of a trial does; it never returns."""
    code = 1
    try:
        alone(job.directory)
        code = outcome(job, task)
    finally:
        with suppress(OSError):  # a disk that is full: what it says is lost, how it ended is not
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def outcome(job: Job, task: TaskFunction) -> int:
    """Runs a trial in this process, as Hydra runs a job, and returns its exit code, whatever happens."""
    from smoltrain.__main__ import listen

    try:
        listen()
        return came_to(run_job(job.config, task, "hydra.sweep.dir", "hydra.sweep.subdir"), job.directory)
    except KeyboardInterrupt:
        return 143
    except BaseException:  # noqa: BLE001 - there is nobody above who could tell of it
        traceback.print_exc()
        return 1


def alone(directory: Path) -> None:
    """Makes this process one of its own: its log, its group, and an end when its parent ends."""
    os.setpgid(0, 0)  # Ctrl+C is its parent's, which passes it on
    ends_with_its_parent(signal.SIGKILL)
    log = os.open(directory / runs.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(source, number)


def came_to(done: JobReturn, directory: Path) -> int:
    """The exit code of a trial, as that of a command: what the record says, and 2 where it was refused."""
    if done.status == JobStatus.FAILED:
        error = done._return_value
        traceback.print_exception(error)
        return runs.CODES.get(runs.status_of(error), 1)
    return runs.CODES.get(look(directory, "").record.get("status", "refused"), 2)


def spawned(job: Job, environment: dict[str, str]) -> int:
    """Starts a trial as a command of its own, which imports everything again."""
    ours = [o for o in job.overrides if not o.startswith(("hydra.sweep.", "hydra.searchpath="))]
    own = naming(runs.own_folders(job.config.hydra))
    command = [sys.executable, "-m", "smoltrain", *own, *ours, f"hydra.run.dir={quoted(str(job.directory))}"]
    with (job.directory / runs.LOG).open("a") as log:
        given = {**os.environ, **environment}
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        return subprocess.Popen(command, env=given, process_group=0, **streams).pid


# ---------------------------------------------------------------- after


def ended(job: Job) -> bool:
    pid, status = os.waitpid(job.pid, os.WNOHANG)
    if pid:
        job.code, job.ended = os.waitstatus_to_exitcode(status), time.monotonic()
    return bool(pid)


def stop(living: list[Job], board: Board) -> None:
    """Passes a signal on to the trials that are running, and waits until they have saved; a second one is passed on."""
    for _ in range(2):
        living = [job for job in living if job.code is None]
        for job in living:
            os.kill(job.pid, signal.SIGTERM)
        last = time.monotonic() + PATIENCE
        with suppress(KeyboardInterrupt):
            while living and time.monotonic() < last:
                time.sleep(POLL)
                for job in living:
                    if ended(job):
                        board.ended(job.number, job.directory, job.code)
                living = [job for job in living if job.code is None]
            break
    for job in living:
        os.kill(job.pid, signal.SIGKILL)
        os.waitpid(job.pid, 0)


def returned(job: Job) -> JobReturn:
    """What a sweeper is told of a trial: the objective, and of one that came to nothing, the worst value of it."""
    value = look(job.directory, "").record.get("objective") if job.code == 0 else None
    worst = runs.worst(job.config.objective)
    done = Done(overrides=job.overrides, cfg=job.config, working_dir=str(job.directory))
    done.return_value, done.status = worst if value is None else value, JobStatus.COMPLETED
    done.code = job.code
    return done
