"""Lives: processes in which everything is imported already, and which are otherwise as fresh as any.

`python lives.py` imports what a run imports, does nothing else, and forks a keeper for each life that it is asked for.
The keeper forks the life, waits for its end and tells how it came. A life ends as Python ends: its exit code, what is
printed of an exception, its threads and what is registered with `atexit` are as they would be.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMAND = "import runpy; runpy.run_module('smoltrain', run_name='__main__', alter_sys=True)"  # as `python -m smoltrain`
# What a run imports on its way. Not trackio, which reads TRACKIO_DIR when it is imported, and each test has its own.
IMPORTED = ["torch", "transformers.Trainer", "transformers.models.smollm3.modeling_smollm3", "peft", "datasets"]
IMPORTED += ["trl.SFTTrainer", "trl.SFTConfig", "trl.DPOTrainer", "trl.DPOConfig", "hydra.main", "matplotlib.figure"]
# What Python, torch, OpenMP, tqdm, matplotlib and the hub's libraries read once, when they are imported.
READ_ONCE = re.compile(
    "(PYTHON|LANG|LC_|HOME|XDG_|OMP_|MKL_|TORCH_|CUDA|MPL|TQDM|HF_(?!TOKEN$|DATASETS_CACHE$)|HUGG|TRANSF|DATASETS|ACCEL)"
)


class Life:
    """One process, while it runs and afterwards."""

    def __init__(self, channel: socket.socket, folder: Path) -> None:
        self.channel, self.folder = channel, folder
        self.pid = self._told()
        self.returncode: int | None = None

    def _told(self) -> int:
        return struct.unpack("i", self.channel.recv(4, socket.MSG_WAITALL))[0]

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def wait(self, timeout: float | None = 120) -> int:
        """Its exit code; of a signal that ended it, the negative number. Raises TimeoutError after so many seconds."""
        if self.returncode is None:
            self.channel.settimeout(timeout)
            self.returncode = self._told()
            self.channel.close()
        return self.returncode

    def until(self, text: str, timeout: float = 120) -> None:
        """Waits until it has printed a text. Raises AssertionError where it ends, or the seconds pass, without."""
        last = time.monotonic() + timeout
        waiting = True
        while waiting:
            waiting = self.running() and time.monotonic() < last  # asked first: its last words come before its end
            if text in (said := self.stdout + self.stderr):
                return
            time.sleep(0.01)
        raise AssertionError(f"{text!r} was not printed, but:\n{said}")

    def until_there(self, folder: Path, pattern: str, timeout: float = 120) -> None:
        """Waits until there is a file in a folder, by its pattern. Raises AssertionError where it ends without."""
        last = time.monotonic() + timeout
        while not any(folder.glob(pattern)):
            assert self.running() and time.monotonic() < last, self.stdout + self.stderr
            time.sleep(0.01)

    def running(self) -> bool:
        try:
            self.wait(0.001)
        except TimeoutError:
            return True
        return False

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.running():
            os.kill(self.pid, number)

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()
        self.wait()


class Lives:
    """The server of this process, as a context: it ends with it, or with the process."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair()
        self.folder = tempfile.TemporaryDirectory()
        self.began = dict(os.environ)
        self.lived = 0
        root = str(Path(__file__).parents[1])
        command = [sys.executable, __file__, str(theirs.fileno()), root]
        with theirs:
            self.server = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )

    def start(
        self,
        arguments: Sequence[str],
        code: str = COMMAND,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str = "",
        terminal: int | None = None,
    ) -> Life:
        """Runs `python -c code arguments…`, by default the command, here or in `cwd`, with `env` as its environment.

        What it prints is in `stdout` and `stderr`, or on a terminal, given as the number of its file. Libraries log to
        the stream that was there when they were imported: past `secrets.Discreet`. Raises ValueError for variables that
        are read by imports, which are done.
        """
        environment = dict(os.environ if env is None else env)
        late = {name for name, _ in environment.items() ^ self.began.items() if READ_ONCE.match(name)}
        if late:
            raise ValueError(f"{', '.join(sorted(late))}: read once, at an import; start a process of its own")
        folder = Path(self.folder.name) / str(self.lived)
        self.lived += 1
        folder.mkdir()
        (folder / "stdin").write_text(stdin)
        ours, theirs = socket.socketpair()
        files = [(folder / name).open(mode) for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))]
        printed = [file.fileno() for file in files[1:]] if terminal is None else [terminal, terminal]
        socket.send_fds(self.ours, [b"1"], [theirs.fileno(), files[0].fileno(), *printed])
        for one in (theirs, *files):
            one.close()
        request = {"arguments": [*arguments], "code": code, "cwd": str(cwd or Path.cwd()), "environment": environment}
        ours.sendall(json.dumps(request).encode() + b"\n")
        return Life(ours, folder)

    def __enter__(self) -> "Lives":
        return self

    def __exit__(self, *_: Any) -> None:
        self.ours.close()
        self.server.wait()
        self.folder.cleanup()


# ---------------------------------------------------------------- the server


def everything() -> None:
    """Imports it. No thread is started, no random number drawn, nothing computed."""
    import smoltrain
    from smoltrain.__main__ import MANNERS

    os.environ.update({name: os.environ.get(name, value) for name, value in MANNERS.items()})  # before it is read
    del sys.modules["smoltrain.__main__"]  # a life runs it as its own main module
    for name in IMPORTED:
        pkgutil.resolve_name(name)
    pkgutil.resolve_name("transformers.conversion_mapping.get_checkpoint_conversion_mapping")("")  # 0.1 s, and kept
    for module in pkgutil.walk_packages(smoltrain.__path__, "smoltrain."):
        if not module.name.endswith((".__main__", ".warm")):  # which makes a process one that ranks are forked from
            importlib.import_module(module.name)


def serve(requests: socket.socket) -> str:
    """Forks a life for each request; returns only in a life, with the code that it is to run."""
    keepers: list[int] = []
    while True:
        _, handed, *_ = socket.recv_fds(requests, 1, 4)
        keepers = [one for one in keepers if os.waitpid(one, os.WNOHANG) == (0, 0)]
        if not handed:  # the other end is gone
            for one in keepers:
                os.waitpid(one, 0)
            os._exit(0)
        keepers.append(os.fork())
        if keepers[-1] == 0:
            requests.close()
            return keep(*handed)
        for number in handed:
            os.close(number)


def keep(channel: int, *standard: int) -> str:
    """Forks a life and tells its number, then how it ended; returns only in the life."""
    with socket.socket(fileno=channel) as told:
        with told.makefile() as lines:
            request = json.loads(lines.readline())
        life = os.fork()
        if life:
            told.sendall(struct.pack("i", life))
            ended = os.waitstatus_to_exitcode(os.waitpid(life, 0)[1])
            told.sendall(struct.pack("i", ended))
            os._exit(0)
    return born(request, standard)


def born(request: dict[str, Any], standard: Sequence[int]) -> str:
    """Makes this process what a fresh one would be: its streams, folder, environment, arguments; returns its code."""
    import datasets
    import numpy as np
    import torch

    for number, handed in enumerate(standard):
        os.dup2(handed, number)
        os.close(handed)
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])  # read once, and used from there
    sys.path[0] = request["cwd"]
    sys.argv = ["-c", *request["arguments"]]
    np.random.seed()  # from the system, as a fresh process does; Python's own generator does so after any fork
    torch.default_generator.seed()
    return request["code"]


def live(code: str) -> None:
    """Runs it as Python's main program."""
    global status
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else None
        raise


def leave() -> None:
    """Ends a life when Python has done all that it does at an end, but to take its modules apart: 0.3 s of CPU."""
    if status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


status: int | None = None  # of a life that has ended; None where Python itself is to say how
if __name__ == "__main__":
    atexit.register(leave)  # before anything else is, for the last comes first
    sys.path.insert(1, sys.argv[2])
    everything()
    gc.freeze()  # what is never collected is never copied
    live(serve(socket.socket(fileno=int(sys.argv[1]))))
