"""A run as a job of Slurm (`hardware=slurm_ddp`): the same command, on each node of a job that is queued until it ends.

Of a sweep each trial is a job by `hydra/launcher=slurm` (sweep/cluster.py), by submitit, which pickles what a job
calls. Here the job's script is the command itself: a dry run shows all that there is, and `| sbatch` submits it.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from smoltrain import runs
from smoltrain.config import ConfigError
from smoltrain.config.targets import allowed
from smoltrain.ranks import PATIENCE

EVERY = 3  # seconds between two looks at Slurm's queue, which others ask too
LOST = 1  # the exit code of a job that left none: it was cancelled, or its node died
SCRIPT = """\
#!/bin/bash
{options}
{setup}
{rendezvous}srun --kill-on-bad-exit=0 --cpu-bind=none ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} \\
    {command}
code=$?
# Saved before its end, with the job running: its time is nearly up. The same command goes on. A job that is preempted
# Slurm queues again itself, and one that is cancelled stays so.
if [ $code -eq 143 ] && [ "$(squeue --noheader --job=$SLURM_JOB_ID --format=%T)" = RUNNING ]; then
    scontrol requeue $SLURM_JOB_ID && exit
fi
echo $code > {folder}/slurm-$SLURM_JOB_ID.code
exit $code
"""
# Where nodes meet: the first one, at a port that two jobs of a machine do not share.
MEET = "node=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1):$((20000 + SLURM_JOB_ID % 10000))\n"


class Job:
    """How Slurm runs a run, as conf/hardware/slurm.yaml says; `dry_run` shows its script and submits nothing."""

    def __init__(
        self,
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
        dry_run: bool,
    ) -> None:
        self.setup, self.dry_run = setup, dry_run
        asked: dict[str, Any] = {"time": timeout_min, "signal": f"TERM@{warning_s}", "cpus-per-task": cpus_per_task}
        asked |= {"gpus-per-node": gpus_per_node, "mem": mem_gb and f"{round(mem_gb * 1024)}M", "account": account}
        asked |= {"partition": partition, "qos": qos, "constraint": constraint, **sbatch}
        self.asked = {name: value for name, value in asked.items() if value is not None}

    def script(self, name: str, nodes: int, arguments: Sequence[str]) -> str:
        """The job's script for a command line, of a run with this name on so many nodes."""
        folder = runs.ROOT / name
        own = {"job-name": f"smoltrain-{name}", "nodes": nodes, "ntasks-per-node": 1, "requeue": True}
        own |= {"output": folder / "slurm-%j.log", "open-mode": "append"}
        options = [f"#SBATCH --{n}" + ("" if value is True else f"={value}") for n, value in (own | self.asked).items()]
        typed = [argument for argument in arguments if not argument.startswith("hardware.slurm.")]
        typed = [*(word for module in allowed() for word in ("--allow", module)), *typed, "hardware.slurm=null"]
        command = shlex.join([sys.executable, "-m", "smoltrain", *typed])
        again = " ${SLURM_RESTART_COUNT:+resume=auto}" if "resume=never" in typed else ""
        return SCRIPT.format(
            options="\n".join(options),
            setup="\n".join(self.setup),
            rendezvous=MEET if nodes > 1 else "",
            command=command + (" hardware.rendezvous=$node" if nodes > 1 else "") + again,
            folder=shlex.quote(str(folder)),
        )

    def run(self, name: str, nodes: int, arguments: Sequence[str]) -> int:
        """Submits a command line and waits for the job's end; its exit code is the run's.

        What the job prints is printed here. A signal cancels it, once it has saved. Raises ConfigError where Slurm is
        not here, or refuses it.
        """
        script, folder = self.script(name, nodes, arguments), runs.ROOT / name
        folder.mkdir(parents=True, exist_ok=True)  # without it, Slurm runs the job and keeps no log
        if self.dry_run:
            print(script, end="")
            return 0
        if program := lacking():
            raise ConfigError(
                f"hardware.slurm: there is no {program} here; start it where one submits jobs, or see its script with "
                "hardware.slurm.dry_run=true"
            )
        told = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
        if told.returncode:
            for left in (folder, runs.ROOT):
                with suppress(OSError):  # it holds runs
                    left.rmdir()
            raise ConfigError(f"hardware.slurm: Slurm refuses the job: {told.stderr.strip()}")
        number = told.stdout.strip().partition(";")[0]
        log = folder / f"slurm-{number}.log"
        print(f"job {number} of Slurm; squeue --me shows it, Ctrl+C cancels it, its log is {log}", flush=True)
        return followed(number, log)


def followed(number: str, log: Path) -> int:
    """Prints what a job prints until it has left the queue; its exit code. A signal cancels it."""
    printed = 0
    try:
        while waits(number):
            printed = show(log, printed)
            time.sleep(EVERY)
    except runs.Interrupted:
        subprocess.run(["scancel", number], check=False)
        last = time.monotonic() + PATIENCE
        while waits(number) and time.monotonic() < last:
            printed = show(log, printed)
            time.sleep(EVERY)
        show(log, printed)
        raise
    show(log, printed)
    code = log.with_suffix(".code")
    return int(code.read_text()) if code.exists() else LOST


def waits(number: str) -> bool:
    """Whether a job waits or runs; where Slurm does not answer, it is where it was."""
    queue = queued()
    return queue is None or number in queue


def queued() -> dict[str, str] | None:
    """The jobs of this user that wait or run, by their numbers; None where Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i %T"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if told.returncode else dict(line.split() for line in told.stdout.splitlines())


def lacking() -> str | None:
    """A program of Slurm that is not on this machine."""
    return next((name for name in ("sbatch", "srun", "squeue", "scancel") if shutil.which(name) is None), None)


def show(log: Path, printed: int) -> int:
    """Prints what has come to a log since so many bytes of it; how many there are now."""
    if not log.exists():
        return printed
    with log.open("rb") as file:
        file.seek(printed)
        sys.stdout.write(file.read().decode(errors="replace"))
        sys.stdout.flush()
        return file.tell()
