"""One run in several processes, its ranks: this one starts them and sees to their end, each has its share of a batch.

    the command        owns the run: its directory, its lock, how it ended
      rank 0           writes what it comes to, and to the terminal
      rank 1, 2, …     write to ranks/1.log, ranks/2.log, …; on other nodes (nodes.py) the command there starts them

A rank reads the resolved config and composes nothing. All are forked from one process that has imported what they need
while the command was preparing rows. torch's own supervisor gives a rank that is asked to stop 30 seconds, and asks
those again that are saving already when the first one has; these save for as long as it takes.
"""

import ctypes
import faulthandler
import json
import multiprocessing
import os
import platform
import re
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from smoltrain import nodes, resume, runs
from smoltrain.config import ConfigError
from smoltrain.config.resolvers import cores
from smoltrain.endings import DiskFull, OutOfMemory

POLL = 0.05  # seconds between two looks at processes
PATIENCE = 60  # seconds that one has to save and leave
ABORTED = -signal.SIGABRT
SAVED = (0, 143)  # the exit codes of one that was asked to stop and did
KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl
GRACE = 30  # seconds in which the others may fail by themselves when one rank has failed
ELSEWHERE = "hardware.slurm: trials of a sweep are jobs by hydra/launcher=slurm; choose hardware=gpu with it"
# For what is imported once for all ranks: it leaves CUDA untouched, and warns of no host without a name.
WARM = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
SAYS = 1.0  # seconds in which one that is to be killed says where it is
WAITED = re.compile(r"timed? ?out", re.IGNORECASE)  # what a collective says that waited for a rank in vain
FRAME = re.compile(r'File "(.+?)", line (\d+) in (\S+)')  # the first is where a stack ends
# Elsewhere than on Linux a process of which libraries have been asked for much is not to be forked.
CONTEXT: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
KINDS = (ConfigError, runs.Diverged, runs.Interrupted, DiskFull, OutOfMemory)


class RankFailed(RuntimeError):
    """A rank ended with an exception, which the message names, or was killed."""


class Rank(runs.Run):
    """The run as one of its processes sees it: the first one writes for all, how it ended the command writes."""

    def __init__(self, directory: Path, given: dict[str, Any], writes: bool) -> None:
        self.directory, self.writes = directory, writes
        self.record, self.former = given["record"], given["former"]
        self.begins = resume.Start.heard(directory, given["begins"])
        self.fingerprints = self.record["fingerprints"]  # of what the command has prepared
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


def ends_with_its_parent(number: signal.Signals) -> None:
    """Has this process get a signal when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(KILL_WITH_PARENT, number)


def inside() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def warm_up() -> None:
    """Starts, beside what this process does until then, one that imports what all ranks need, and that they fork from.

    It has imported and computed nothing else, so that no thread and no accelerator is in the way of a fork.
    """
    if sys.platform == "linux":
        own = {name: value for name, value in WARM.items() if name not in os.environ}
        os.environ |= own
        CONTEXT.set_forkserver_preload(["smoltrain.warm"])
        forkserver.ensure_running()
        for name in own:
            del os.environ[name]


def world(hardware: DictConfig) -> int:
    """The processes of a run, on all its nodes."""
    return hardware.nodes * hardware.processes  # type: ignore[no-any-return]


def start(run: runs.Run, hardware: DictConfig, begins: resume.Start) -> None:
    """Trains a run in its processes, here and on its other nodes; raises what the first that failed of them raised.

    Where it `begins` is decided once, for a disk that nodes share may show them different folders.
    """
    folder, nonce = run.directory / runs.RANKS, os.urandom(8).hex()
    folder.mkdir(exist_ok=True)
    for told in folder.glob("*.json"):
        told.unlink()
    given = {"record": run.record, "former": run.former, "nonce": nonce, "begins": begins.told}
    runs.write_atomically(folder / runs.GIVEN, json.dumps(given))
    met = nodes.MET[0] if nodes.MET else nodes.Meeting("127.0.0.1", 1, 0, {})
    met.begin(run.directory, nonce)
    try:
        own, interrupt = trained(run.directory, met, hardware.processes)
        last = time.monotonic() + GRACE / 10
        while met.others_run and time.monotonic() < last:
            time.sleep(POLL)
            met.listen()
    finally:
        run.record = json.loads((run.directory / "run.json").read_text())
    others = [met.of_node(number, hardware.processes) for number in sorted(met.lines)]
    codes = [code for of_node in (own, *others) for code in of_node]
    try:
        refuse_failures(folder, codes, interrupt)
    except RankFailed as error:
        if not met.gone:
            raise
        raise RankFailed(f"{' and '.join(met.lines[number].name for number in sorted(met.gone))} is gone") from error
    finally:
        for stack in folder.glob("*.stack"):
            stack.unlink()


def help_out(met: nodes.Meeting, processes: int) -> int:
    """What the command does on another node than the first; its exit code is that of the run."""
    warm_up()
    directory, begins = met.come()
    if begins:
        print(f"run   {directory}", flush=True)
        trained(directory, met, processes)
        met.end()
        if met.ended is None:
            (line,) = met.lines.values()
            print(f"{line.name} is gone; the same command on all nodes goes on with {directory}", file=sys.stderr)
    return met.code


def trained(directory: Path, met: nodes.Meeting, processes: int) -> tuple[list[int | None], runs.Interrupted | None]:
    """Starts this node's ranks and waits for their end; their exit codes, None if killed, and what interrupted them."""
    started: list[BaseProcess] = []
    interrupt = None
    sys.stdout.flush()
    try:
        for local in range(processes):
            given = environment(met, local, processes)
            started.append(CONTEXT.Process(target=live, args=(directory.resolve(), Path.cwd(), given)))
            started[-1].start()
        watch(started, met)
    except runs.Interrupted as error:
        interrupt = error
        stop(started, met)
    finally:
        codes = [one.exitcode for one in started]
        if met.index:
            met.tell(codes=codes)
        left = [one for one in started if one.exitcode is None]
        for one in left:
            signalled(one, signal.SIGUSR1)  # says where it is
        time.sleep(SAYS if left else 0)
        for one in left:
            signalled(one, signal.SIGKILL)
        for one in left:
            one.join()
    return codes, interrupt


def environment(met: nodes.Meeting, local: int, processes: int) -> dict[str, str]:
    """What torch wants to read of a rank in its environment, beside all that is in this one's."""
    given: dict[str, Any] = {"OMP_NUM_THREADS": max(cores() // processes, 1), **os.environ}
    given |= {"RANK": met.index * processes + local, "WORLD_SIZE": met.nodes * processes, "GROUP_RANK": met.index}
    given |= {"LOCAL_RANK": local, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": met.address, "MASTER_PORT": met.port}
    given |= nodes.interface(met.address) if met.nodes > 1 else {}
    return {name: str(value) for name, value in given.items()}


def signalled(one: BaseProcess, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(one.pid or 0, number)


def running(started: list[BaseProcess], met: nodes.Meeting) -> bool:
    met.listen()
    return any(one.exitcode is None for one in started) or met.others_run


def watch(started: list[BaseProcess], met: nodes.Meeting) -> None:
    """Waits until all have ended; when one has failed, no longer than it takes the others to notice."""
    failed = 0.0
    while running(started, met):
        time.sleep(POLL)
        if runs.STOP.asked:  # whose exception was lost
            raise runs.Interrupted(f"interrupted by {runs.STOP.asked}")
        if not failed and (met.failed or any(one.exitcode for one in started)):
            failed = time.monotonic()
            met.tell(failed=True)
        if failed and time.monotonic() - failed > GRACE:
            return


def stop(started: list[BaseProcess], met: nodes.Meeting) -> None:
    """Passes a signal on, and waits until what was learned is saved; a second one waits no longer."""
    for one in started:
        signalled(one, signal.Signals[runs.STOP.asked or "SIGTERM"])
    failed = 0.0
    with suppress(KeyboardInterrupt):
        while running(started, met) and not (failed and time.monotonic() - failed > GRACE):
            time.sleep(POLL)
            if not failed and any(one.exitcode not in (None, *SAVED) for one in started):
                failed = time.monotonic()


def refuse_failures(folder: Path, codes: list[int | None], interrupt: runs.Interrupted | None) -> None:
    """Raises what the rank that failed first has raised, as the same exception where a run knows it.

    A rank that was killed says nothing, and those that miss it say so later; of several that leave in silence, it was
    the `interrupt` that this process got. Where others have waited for a rank in vain, it is the one that hangs.
    """
    told = {
        rank: json.loads(file.read_text()) for rank in range(len(codes)) if (file := folder / f"{rank}.json").exists()
    }
    # What loses its peers may abort; that is no cause where another one tells one.
    silent = [rank for rank, code in enumerate(codes) if code and rank not in told and not (told and code == ABORTED)]
    known = {kind.__name__ for kind in KINDS}
    # Clocks of several machines differ by more than a cause and its effect: who lost a peer is no cause.
    first = min(told.values(), key=lambda error: (error["kind"] not in known, error["at"])) if told else None
    in_vain = WAITED.search(first["message"]) if first else all(codes[rank] == ABORTED for rank in silent)
    if in_vain and None in codes and interrupt is None:
        raise hanging(folder, codes)
    if silent and interrupt is None:
        rank, code = silent[0], codes[silent[0]] or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with {code}"
        log = f"; its log is {folder / f'{rank}.log'}" if rank else ""
        raise RankFailed(f"rank {rank} of {len(codes)} {how}{log}")
    if first:
        kind = next((kind for kind in KINDS if kind.__name__ == first["kind"]), None)
        if kind is not None:
            raise kind(first["message"])
        error = RankFailed(f"rank {first['rank']} of {len(codes)}: {first['said']}")
        error.add_note(first["trace"])
        raise error
    if interrupt is not None and any(code != 0 for code in codes):  # None: it had to be killed
        raise interrupt


def hanging(folder: Path, codes: list[int | None]) -> RankFailed:
    """Names the ranks for which all others have waited in vain, and says where they are."""
    files = {rank: folder / f"{rank}.stack" for rank, code in enumerate(codes) if code is None}
    stacks = {rank: file.read_text() if file.exists() else "" for rank, file in files.items()}  # none before it began
    lines = []
    for rank, stack in stacks.items():
        at = FRAME.search(stack)
        lines.append(f"rank {rank} of {len(codes)} hangs" + (f" in {at[3]}, {at[1]}:{at[2]}" if at else ""))
    error = RankFailed("; ".join(lines) + ": the others have waited for it as long as trainer.args.ddp_timeout says")
    error.add_note("\n".join(stacks.values()))
    return error


def refuse_elsewhere(hardware: DictConfig) -> None:
    """Raises ConfigError for a trial of a sweep that would be a job of its own, or on nodes that have not met."""
    if hardware.slurm:
        raise ConfigError(ELSEWHERE)
    if hardware.nodes > 1 and not nodes.MET:
        raise ConfigError(f"hardware.nodes={hardware.nodes}: a trial of a sweep runs on one machine; set it to 1")


def refuse_other_rows(run: runs.Run, fingerprints: Mapping[str, Any]) -> None:
    """Raises ConfigError where a rank, on a machine of its own, has read other rows than the command has prepared."""
    if isinstance(run, Rank) and run.fingerprints != fingerprints:
        other = ", ".join(name for name in fingerprints if run.fingerprints.get(name) != fingerprints[name])
        raise ConfigError(f"{other}: not the same on {platform.node()} as on node 0; both read what is on their disks")


def refuse_other_model(fingerprint: Any) -> None:
    """Raises ConfigError where the ranks of a run have loaded different weights."""
    from accelerate.utils import gather_object

    if inside() and len({*map(str, gather_object([fingerprint]))}) > 1:
        raise ConfigError("model: not the same weights on all nodes; all read what is on their own disks")


def refuse_another_size(found: int, hardware: DictConfig) -> None:
    """Raises RankFailed where training has another number of processes than was asked for."""
    if found != world(hardware):
        raise RankFailed(f"{world(hardware)} processes were asked for, and {found} train together")


# ---------------------------------------------------------------- in the process of a rank


def literal(config: Any) -> Any:
    """A resolved config in which no text is taken for an interpolation again."""
    if isinstance(config, dict):
        return {key: literal(value) for key, value in config.items()}
    if isinstance(config, list):
        return [literal(value) for value in config]
    return config.replace("${", r"\${") if isinstance(config, str) else config


def live(directory: Path, folder: Path, environment: dict[str, str]) -> None:
    """All that the process of a rank does, from the folder of its command; it never returns."""
    os.setpgid(0, 0)  # Ctrl+C is the command's, which passes it on
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # which the process it is forked from ignores
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.set_start_method("fork" if sys.platform == "linux" else "spawn", force=True)  # as Python has it
    rank = int(environment["RANK"])
    if rank:
        log = os.open(directory / runs.RANKS / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
    code = 1
    try:
        code = came_to(directory, rank)
    finally:
        with suppress(OSError):  # a disk that is full: what it says is lost, how it ended is not
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # what a process group of torch does at the end may wait for ranks that are gone


def find_each_other(args: Mapping[str, Any]) -> None:
    """Joins the processes of a run on processors, where transformers would pass over `ddp_timeout`."""
    from accelerate import PartialState

    if args["use_cpu"]:
        waits = timedelta(seconds=args.get("ddp_timeout", 1800))
        PartialState(cpu=True, backend=args.get("ddp_backend"), timeout=waits)
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed takes what it finds, whatever is asked for


def came_to(directory: Path, rank: int) -> int:
    """Trains as one rank; its exit code is that of a command."""
    from smoltrain.__main__ import listen
    from smoltrain.endings import explained
    from smoltrain.secrets import discreet_streams
    from smoltrain.train import train

    listen()
    ends_with_its_parent(signal.SIGKILL)
    discreet_streams(outlive=True)
    stack = (directory / runs.RANKS / f"{rank}.stack").open("w")
    faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
    given = json.loads((directory / runs.RANKS / runs.GIVEN).read_text())
    run = Rank(directory, given, writes=rank == 0)
    try:
        with explained(directory, lambda: run.args):
            find_each_other(run.args)
            train(OmegaConf.create(literal(given["record"]["config"])), run, fresh=True)
        run.end("completed")
        return 0
    except BaseException as error:  # noqa: BLE001 - it is raised again, where the run is owned
        said = {"rank": rank, "kind": type(error).__name__, "message": str(error), "said": runs.described(error)}
        said |= {"trace": "".join(traceback.format_exception(error)), "at": time.time()}
        runs.write_atomically(directory / runs.RANKS / f"{rank}.json", json.dumps(runs.redacted(said)))
        run.end(runs.status_of(error))
        return runs.CODES.get(runs.status_of(error), 1)
