"""Launchers for more than one machine: a job of Slurm (by submitit) or a task of Ray for each trial of a sweep.

When and where a trial runs is theirs to say. It runs as a process that the local launcher forks does, with its log in
its own directory; how it came out, its record says, on the disk that all machines share.
"""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.utils import setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from smoltrain import runs
from smoltrain.config import ConfigError, plain
from smoltrain.config.signatures import signature
from smoltrain.config.validate import mistyped
from smoltrain.slurm import EVERY, lacking, queued
from smoltrain.sweep.local import PATIENCE, POLL, Job, Local, outcome
from smoltrain.sweep.progress import Board

HELPERS = ".slurm"  # in a sweep's directory: what submitit writes
JOB = "slurm_job"  # in a trial's: the number of its job
STORE = 80 << 20  # bytes of Ray's object store, of which nothing here has need; the least that it takes


class Elsewhere(Local):
    """A launcher that hands the trials of a sweep to another program; `name` in its preset, `package` in Python."""

    name: str
    package: str

    def places(self, config: DictConfig) -> int:
        return self.at_once or 1

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Raises ConfigError where the preset's values, this machine or its Python do not allow for it."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        taken = signature(f"{__name__}.{type(self).__name__}")
        if wrong := [problem.text for problem in mistyped("hydra.launcher", plain(config.hydra.launcher), taken)]:
            raise ConfigError("\n".join(wrong))
        if importlib.util.find_spec(self.package) is None:
            raise ConfigError(
                f"hydra/launcher={self.name}: {self.package} is not installed; pip install 'smoltrain[{self.name}]'"
            )


class Slurm(Elsewhere):
    """Runs the trials of a sweep as one array of jobs of Slurm. What it is given, conf/hydra/launcher/slurm.yaml says.

    The jobs do not end with this process where it is killed: the same sweep, started again, waits for them.
    """

    name, package = "slurm", "submitit"

    def __init__(
        self,
        jobs: int | None,
        timeout_min: int,
        warning_s: int,
        cpus_per_task: int | None,
        gpus_per_node: int | None,
        mem_gb: float | None,
        partition: str | None,
        account: str | None,
        qos: str | None,
        constraint: str | None,
        setup: list[str],
        sbatch: dict[str, Any],
    ) -> None:
        super().__init__(jobs)
        self.environment = {} if cpus_per_task is None else {"OMP_NUM_THREADS": str(cpus_per_task)}
        own: dict[str, Any] = {
            "partition": partition,
            "account": account,
            "qos": qos,
            "constraint": constraint,
            "setup": setup,
        }
        own |= {"signal_delay_s": warning_s, "additional_parameters": sbatch, "stderr_to_stdout": True}
        if cpus_per_task is not None:  # which srun does not take over from sbatch
            own["srun_args"] = [f"--cpus-per-task={cpus_per_task}"]
        if jobs is not None:
            own["array_parallelism"] = jobs
        asked: dict[str, Any] = {"timeout_min": timeout_min, "cpus_per_task": cpus_per_task}
        asked |= {"gpus_per_node": gpus_per_node, "mem_gb": mem_gb}
        asked |= {f"slurm_{key}": value for key, value in own.items()}
        self.asked = {key: value for key, value in asked.items() if value not in (None, [], {})}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        if program := lacking():
            raise ConfigError(
                f"hydra/launcher=slurm: there is no {program} here; start the sweep where one submits jobs"
            )

    def run(self, jobs: list[Job], board: Board) -> None:
        """Submits those that are not in the queue yet, and waits until none is; a signal cancels them."""
        folder = Path(jobs[0].config.hydra.sweep.dir).absolute() / HELPERS
        queue = queued() or {}
        living = {number: job for job in jobs if (number := noted(job)) in queue}
        if living:
            board.say(f"{len(living)} of the trials are in Slurm's queue already")
        if todo := [job for job in jobs if job not in living.values()]:
            living |= zip(self.submitted(todo, folder), todo, strict=True)
            board.say(f"{len(todo)} trials are in Slurm's queue; squeue --me shows them, Ctrl+C takes them out")
        try:
            while living:
                self.look_at_queue(living, folder, board)
                pause(EVERY if living else 0, board)
        except KeyboardInterrupt:
            subprocess.run(["scancel", *living], check=False)
            last = time.monotonic() + PATIENCE
            while living and time.monotonic() < last:
                self.look_at_queue(living, folder, board)
                time.sleep(1)
            raise

    def submitted(self, jobs: list[Job], folder: Path) -> list[str]:
        """The numbers of the jobs that these trials have become. Raises ConfigError where Slurm refuses them."""
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "TERM"  # when the time is nearly up, as in every other case
        import submitit

        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=0)
        executor.update_parameters(name="smoltrain", **self.asked)
        same = [str(Path.cwd())] * len(jobs), [self.environment] * len(jobs)
        try:
            handles = executor.map_array(trial, jobs, *same)
        except submitit.core.utils.FailedJobError as error:
            raise ConfigError(f"hydra/launcher=slurm: Slurm refuses the sweep: {reason(error)}") from error
        for job, handle in zip(jobs, handles, strict=True):
            job.directory.mkdir(parents=True, exist_ok=True)
            (job.directory / JOB).write_text(handle.job_id)
        return [handle.job_id for handle in handles]

    def look_at_queue(self, living: dict[str, Job], folder: Path, board: Board) -> None:
        """Takes note of the jobs that run by now, and removes those that have left the queue."""
        queue = queued()
        if queue is None:  # its controller is busy or away, and the jobs are where they were
            return
        for number, job in [*living.items()]:
            if queue.get(number) != "PENDING" and not job.began:
                job.began = time.monotonic()
                board.started(job.number, job.directory)
            if number not in queue:
                del living[number]
                job.code = returned(number, folder)
                if job.code is None and not (job.directory / runs.LOG).exists():
                    (job.directory / runs.LOG).write_text(
                        f"job {number} of Slurm never began; its output is in {folder}\n"
                    )
                board.ended(job.number, job.directory, job.code)
        board.waiting = sum(queue.get(number) == "PENDING" for number in living)


class Ray(Elsewhere):
    """Runs the trials of a sweep as tasks of Ray, each in a process of its own. They end when this process does.

    What it is given, conf/hydra/launcher/ray.yaml says.
    """

    name, package = "ray", "ray"

    def __init__(
        self, address: str | None, jobs: int | None, num_cpus: float, num_gpus: float, memory_gb: float | None
    ) -> None:
        super().__init__(jobs)
        self.address = address
        self.asked: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_calls": 1, "max_retries": 0}
        if memory_gb is not None:
            self.asked["memory"] = int(memory_gb * 2**30)

    def run(self, jobs: list[Job], board: Board) -> None:
        """Hands over all trials, or as many as are to run at a time, until all have ended; a signal cancels them."""
        import ray

        self.connect()
        remote = ray.remote(**self.asked)(trial)
        environment = {**os.environ}  # as sbatch hands it over
        waiting, living = jobs[::-1], dict[Any, Job]()
        try:
            while waiting or living:
                while waiting and len(living) < (self.at_once or len(jobs)):
                    job = waiting.pop()
                    job.began = time.time()
                    living[remote.remote(job, str(Path.cwd()), environment)] = job
                pause(POLL, board)
                take(living, board)
        except KeyboardInterrupt:
            for handle in living:
                ray.cancel(handle)
            last = time.monotonic() + PATIENCE
            while living and time.monotonic() < last:
                take(living, board)
                time.sleep(POLL)
            raise

    def connect(self) -> None:
        """Starts Ray in this process, once. Raises ConfigError where there is no cluster at the address."""
        from smoltrain.__main__ import listen

        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        import ray

        if ray.is_initialized():
            return
        own = self.address is None and "RAY_ADDRESS" not in os.environ
        given: dict[str, Any] = {"object_store_memory": STORE, "include_dashboard": False} if own else {}
        try:
            ray.init(self.address, log_to_driver=False, configure_logging=False, **given)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(f"hydra.launcher.address={self.address}: {reason(error)}") from error
        listen()  # again, for Ray has taken SIGTERM


# ---------------------------------------------------------------- in the process of a trial


def trial(job: Job, folder: str, environment: dict[str, str]) -> int:
    """Runs a trial in this process, which another program started for it, and returns its exit code."""
    from smoltrain.__main__ import MANNERS, attempt, listen
    from smoltrain.config.resolvers import register
    from smoltrain.secrets import discreet_streams

    listen()  # in place of that program's own handlers, of which submitit's would run the trial anew by themselves
    os.environ |= MANNERS | environment | os.environ
    os.chdir(folder)
    setup_globals()
    register()
    with logged(job.directory):
        discreet_streams()
        return outcome(job, lambda cfg: attempt(cfg)[1])


@contextmanager
def logged(directory: Path) -> Iterator[None]:
    """Has this process write to the log in a trial's directory, and afterwards where it wrote before."""
    directory.mkdir(parents=True, exist_ok=True)
    before = os.dup(1), os.dup(2)
    log = os.open(directory / runs.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.utime(log)  # it has begun
    redirect(log, log)
    try:
        yield
    finally:
        redirect(*before)


def redirect(*streams: int) -> None:
    """Has the standard output and the standard error of this process go to these open files."""
    sys.stdout.flush()
    sys.stderr.flush()
    for number, source in zip((1, 2), streams, strict=True):
        os.dup2(source, number)


# ---------------------------------------------------------------- what has become of them


def noted(job: Job) -> str | None:
    """The number of the job that a trial was in the last time, if it was."""
    file = job.directory / JOB
    return file.read_text() if file.exists() else None


def returned(number: str, folder: Path) -> int | None:
    """The exit code of a trial whose job has ended; None where it was killed before it could tell."""
    import submitit

    job = submitit.SlurmJob[int](folder, number)
    return job.result() if job.paths.result_pickle.exists() and job.exception() is None else None


def take(living: dict[Any, Job], board: Board) -> None:
    """Takes note of the tasks of Ray that run by now, and removes those that have ended."""
    import ray

    for job in living.values():
        log = job.directory / runs.LOG
        if job.number not in board.running and log.exists() and log.stat().st_mtime >= job.began:
            board.started(job.number, job.directory)
    board.waiting = len(living) - len(board.running)
    for handle in ray.wait([*living], num_returns=len(living), timeout=0)[0] if living else []:
        job = living.pop(handle)
        try:
            job.code = ray.get(handle)
        except ray.exceptions.RayError as error:  # it was killed or cancelled: how far it came, its record says
            with (job.directory / runs.LOG).open("a") as file:
                file.write(f"{reason(error)}\n")
        board.ended(job.number, job.directory, job.code)


def reason(error: Exception) -> str:
    """The last line that an exception of another program says."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]


def pause(seconds: float, board: Board) -> None:
    """Waits, and keeps what a person sees up to date."""
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        board.look()
        time.sleep(POLL)
