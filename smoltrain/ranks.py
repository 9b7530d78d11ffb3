"""One run in several processes, its ranks: this one starts them and sees to their end, each has its share of a batch.

    the command        owns the run: its directory, its lock, how it ended
      rank 0           writes what it comes to, and to the terminal
      rank 1, 2, …     write to ranks/1.log, ranks/2.log, …

A rank reads the resolved config and composes nothing. torch's own supervisor gives a rank that is asked to stop 30
seconds, and asks those again that are saving already when the first one has; these are given the time of a trial.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from smoltrain import runs
from smoltrain.config import ConfigError
from smoltrain.endings import DiskFull, OutOfMemory

GIVEN = "given.json"
POLL = 0.05  # seconds between two looks at processes
PATIENCE = 60  # seconds that one has to save and leave
ABORTED = -signal.SIGABRT
KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl
GRACE = 30  # seconds in which the others may fail by themselves when one rank has failed
KINDS = (ConfigError, runs.Diverged, runs.Interrupted, DiskFull, OutOfMemory)


class RankFailed(RuntimeError):
    """A rank ended with an exception, which the message names, or was killed."""


class Rank(runs.Run):
    """The run as one of its processes sees it: the first one writes for all, how it ended the command writes."""

    def __init__(self, directory: Path, record: dict[str, Any], former: dict[str, Any] | None, writes: bool) -> None:
        self.directory, self.record, self.former, self.writes = directory, record, former, writes
        self.watchers: list[Any] = []

    def note(self, **facts: Any) -> None:
        """Adds facts to the record, and writes it where this is the rank that does."""
        if self.writes:
            super().note(**facts)
        else:
            self.record |= facts

    def watch(self, watchers: list[Any]) -> None:
        """Tells of the run those who write what comes of it; of the others' processes a tracker would make runs."""
        from smoltrain.callbacks import Metrics

        super().watch([one for one in watchers if self.writes or type(one) is Metrics])

    def end(self, status: str) -> None:
        """Writes how far it came, and tells all who watch it how it ended; that stands in no record yet."""
        self.note()
        self.record = self.record | {"status": status}
        for watcher in self.watchers:
            watcher.on_run_end(self)


@dataclass
class Process:
    """A process of a run; `code` is None while it runs."""

    rank: int
    process: subprocess.Popen

    @property
    def code(self) -> int | None:
        return self.process.poll()


def ends_with_its_parent(number: signal.Signals) -> None:
    """Has this process get a signal when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(KILL_WITH_PARENT, number)


def inside() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start(run: runs.Run, processes: int) -> None:
    """Trains a run in so many processes, and raises what the first of them that failed raised."""
    folder = run.directory / runs.RANKS
    folder.mkdir(exist_ok=True)
    for told in folder.glob("*.json"):
        told.unlink()
    runs.write_atomically(folder / GIVEN, json.dumps({"record": run.record, "former": run.former}))
    port = free_port()
    started: list[Process] = []
    interrupt = None
    try:
        for rank in range(processes):
            started.append(Process(rank, begun(run.directory, rank, processes, port)))
        watch(started)
    except runs.Interrupted as error:
        interrupt = error
        stop(started)
    finally:
        codes = [one.code for one in started]
        for one in started:
            if one.code is None:
                one.process.kill()
                one.process.wait()
        run.record = json.loads((run.directory / "run.json").read_text())
    refuse_failures(folder, codes, interrupt)


def begun(directory: Path, rank: int, processes: int, port: int) -> subprocess.Popen:
    """The process of a rank, in a group of its own: Ctrl+C is the command's, which passes it on."""
    threads = max((os.cpu_count() or 1) // processes, 1)
    given: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    given |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
    }
    environment = os.environ | {name: str(value) for name, value in given.items()}
    command = [sys.executable, "-m", "smoltrain.ranks", str(directory)]
    sys.stdout.flush()
    if rank == 0:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)
    with (directory / runs.RANKS / f"{rank}.log").open("a") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def watch(started: list[Process]) -> None:
    """Waits until all have ended; when one has failed, no longer than it takes the others to notice."""
    failed = 0.0
    while any(one.code is None for one in started):
        time.sleep(POLL)
        if runs.STOP.asked:  # whose exception was lost
            raise runs.Interrupted(f"interrupted by {runs.STOP.asked}")
        if not failed and any(one.code for one in started):
            failed = time.monotonic()
        if failed and time.monotonic() - failed > GRACE:
            return


def stop(started: list[Process]) -> None:
    """Passes a signal on, and waits until what was learned is saved; a second one waits no longer."""
    for one in started:
        with suppress(ProcessLookupError):
            one.process.send_signal(signal.SIGTERM)
    last = time.monotonic() + PATIENCE - 10  # a sweep gives as long to a trial, which has to say how it ended
    with suppress(KeyboardInterrupt):
        while any(one.code is None for one in started) and time.monotonic() < last:
            time.sleep(POLL)


def refuse_failures(folder: Path, codes: list[int | None], interrupt: runs.Interrupted | None) -> None:
    """Raises what the rank that failed first has raised, as the same exception where a run knows it.

    A rank that was killed says nothing, and those that miss it say so later; of several that leave in silence, it was
    the `interrupt` that this process got.
    """
    told = {
        rank: json.loads(file.read_text()) for rank in range(len(codes)) if (file := folder / f"{rank}.json").exists()
    }
    # What loses its peers may abort; that is no cause where another one tells one.
    silent = [rank for rank, code in enumerate(codes) if code and rank not in told and not (told and code == ABORTED)]
    if silent and interrupt is None:
        rank, code = silent[0], codes[silent[0]] or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with {code}"
        log = f"; its log is {folder / f'{rank}.log'}" if rank else ""
        raise RankFailed(f"rank {rank} of {len(codes)} {how}{log}")
    if told:
        first = min(told.values(), key=lambda error: error["at"])
        kind = next((kind for kind in KINDS if kind.__name__ == first["kind"]), None)
        if kind is not None:
            raise kind(first["message"])
        error = RankFailed(f"rank {first['rank']} of {len(codes)}: {first['said']}")
        error.add_note(first["trace"])
        raise error
    if interrupt is not None and any(code != 0 for code in codes):  # None: it had to be killed
        raise interrupt


# ---------------------------------------------------------------- in the process of a rank


def literal(config: Any) -> Any:
    """A resolved config in which no text is taken for an interpolation again."""
    if isinstance(config, dict):
        return {key: literal(value) for key, value in config.items()}
    if isinstance(config, list):
        return [literal(value) for value in config]
    return config.replace("${", r"\${") if isinstance(config, str) else config


def main(directory: Path) -> int:
    """All that the process of a rank does; its exit code is that of a command."""
    from smoltrain.__main__ import listen
    from smoltrain.endings import explained
    from smoltrain.secrets import discreet_streams
    from smoltrain.train import train

    listen()
    ends_with_its_parent(signal.SIGKILL)
    discreet_streams()
    rank = int(os.environ["RANK"])
    given = json.loads((directory / runs.RANKS / GIVEN).read_text())
    run = Rank(directory, given["record"], given["former"], writes=rank == 0)
    try:
        with explained(directory, lambda: run.args):
            train(OmegaConf.create(literal(given["record"]["config"])), run, fresh=True)
        run.end("completed")
        return 0
    except BaseException as error:  # noqa: BLE001 - it is raised again, where the run is owned
        said = {"rank": rank, "kind": type(error).__name__, "message": str(error), "said": runs.described(error)}
        said |= {"trace": "".join(traceback.format_exception(error)), "at": time.time()}
        runs.write_atomically(directory / runs.RANKS / f"{rank}.json", json.dumps(runs.redacted(said)))
        run.end(runs.status_of(error))
        return runs.CODES.get(runs.status_of(error), 1)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what a process group of torch does at the end may wait for ranks that are gone
