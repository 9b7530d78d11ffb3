"""What the proofs that runs survive share: small runs, their deaths, what they come to, and the stock stack."""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lives import COMMAND, Life, Lives

from smoltrain.runs import CLOCK

# Of 48 rows, with a save every two steps: saves and logs do not coincide, the end is in the middle of an epoch.
SMALL = (
    "data.test_rows=8",
    "evaluation.max_rows=2",
    "evaluation.max_new_tokens=2",
    "trainer.args.max_steps=14",
    "trainer.args.logging_steps=3",
    "trainer.args.per_device_train_batch_size=2",
    "tracking=none",
)
OWN = ("start", "end", "seconds", "process", "resumed", "config")  # of a record: when and where it was, and whose
HERE = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import survival\n"
STOCK = f"{HERE}survival.stock(*sys.argv[1:])"
WITNESS = f"{HERE}survival.Witness(sys.argv.pop())\n"  # before other code; the last argument is where the states go


def lived(lives: Lives, folder: Path, *arguments: str, code: str = COMMAND, after: Iterable[float] = ()) -> list[Life]:
    """Runs a command in a folder, kills it `after` so many seconds and runs it again, until it ends by itself.

    Each folder has its own cache of rows, so that a kill can hit their preparation. Returns the lives: all but the last
    one were killed.
    """
    folder.mkdir(exist_ok=True)
    lived = []
    for seconds in (*after, 900):
        given = {"code": code, "cwd": folder, "env": os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}}
        with lives.start(arguments, **given) as life, contextlib.suppress(TimeoutError):
            lived.append(life)
            life.wait(seconds)
        if life.returncode != -signal.SIGKILL:
            break
    return lived


def undisturbed(lives: Lives, folder: Path, *arguments: str, code: str = COMMAND) -> str:
    """What a command prints that runs to its end, which is to be a good one."""
    [life] = lived(lives, folder, *arguments, code=code)
    assert life.returncode == 0, life.stdout + life.stderr
    return life.stdout + life.stderr


# ---------------------------------------------------------------- what a run comes to


def came_to(folder: Path) -> dict[str, Any]:
    """All of the one run in a folder that is the same whoever disturbed it: record, metrics, last checkpoint, model."""
    [file] = folder.glob("multirun/**/run.json")
    run, record = file.parent, json.loads(file.read_text())
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    found = {f"run.json {key}": value for key, value in record.items() if key not in OWN}
    found["metrics.jsonl"] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = [path for part in (last, run / "model") for path in sorted(part.iterdir()) if path.name != "manifest.json"]
    found |= {str(path.relative_to(run)): content(path) for path in files}
    return {name: timeless(value, str(run.absolute())) for name, value in found.items()}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in one | other if one.get(name) != other.get(name)]


def content(file: Path) -> Any:
    """What is in a file; of torch's, whose bytes may differ with the history of what they hold, that itself."""
    import torch

    if file.suffix in (".pt", ".pth"):
        return plain(torch.load(file, weights_only=False))
    return json.loads(file.read_text()) if file.suffix == ".json" else digest(file)


def digest(file: Path) -> str:
    """Of its bytes, which are read once, under however many names they are."""
    if (key := identity(file)) not in DIGESTS:
        DIGESTS[key] = hashlib.sha256(file.read_bytes()).hexdigest()
    return DIGESTS[key]


def identity(file: Path) -> tuple[int, ...]:
    """What another content of a file would change: inode, size, time."""
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


DIGESTS: dict[tuple[int, ...], str] = {}


def plain(value: Any) -> Any:
    """The same of strings, numbers, lists and dicts alone; an array as the digest of its bytes."""
    if hasattr(value, "numpy"):
        value = value.numpy()
    if hasattr(value, "tobytes"):
        return f"{value.dtype}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def timeless(value: Any, directory: str) -> Any:
    """The same without times, and without the name of its directory."""
    if isinstance(value, dict):
        return {key: timeless(inner, directory) for key, inner in value.items() if not key.endswith(CLOCK)}
    if isinstance(value, list):
        return [timeless(inner, directory) for inner in value]
    return value.replace(directory, "") if isinstance(value, str) else value


# ---------------------------------------------------------------- every state of its files


class Witness:
    """Copies every state of the files below ./multirun in which a kill -9 would leave them, while a process lives.

    A kill leaves on the disk what another process sees at that moment. So each time this process is about to write,
    rename, sync or remove something, what is there then is copied to a numbered folder in `states`, unless nothing has
    changed. Before the state in which a file is new or has grown come those in which nothing, or half, was written.
    """

    EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "shutil.rmtree")

    def __init__(self, states: str):
        import safetensors.torch
        import torch

        self.tree, self.states, self.copies = Path("multirun").absolute(), Path(states), Path(states, "copies")
        self.copies.mkdir(parents=True)
        self.seen = self.files()
        self.lock = threading.RLock()  # one thread seals while another trains
        self.looking = False
        self.numbers = itertools.count()
        os.fsync = self.before(os.fsync)
        torch.save = self.before(torch.save)  # these two write without Python's knowledge
        safetensors.torch.serialize_file = self.before(safetensors.torch.serialize_file)
        sys.addaudithook(self.hear)
        atexit.register(self.look)

    def before(self, function: Callable) -> Callable:
        def looked_at(*args: Any, **kwargs: Any) -> Any:
            self.look()
            return function(*args, **kwargs)

        return looked_at

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in self.EVENTS:
            self.look()

    def look(self) -> None:
        with self.lock:
            if self.looking:  # its own copies are written too
                return
            self.looking = True
            while (files := self.files()) != self.seen:
                if self.copied(files) and self.files() == files:  # else another thread has changed them meanwhile
                    self.keep(files)
                    self.seen = files
            self.looking = False

    def files(self) -> dict[Path, tuple[int, ...]]:
        """Each path below the tree with the identity of its content; a folder with nothing."""
        found: dict[Path, tuple[int, ...]] = {}
        for folder, _, names in os.walk(self.tree):
            found[Path(folder)] = ()
            for file in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    found[file] = identity(file)
        return found

    def copied(self, files: dict[Path, tuple[int, ...]]) -> bool:
        """Whether there is a copy of each; what an earlier state had is there already."""
        for path, key in files.items():
            try:
                if key and not self.copy_of(key).exists():
                    shutil.copyfile(path, self.copy_of(key))
            except FileNotFoundError:
                return False
        return True

    def copy_of(self, key: tuple[int, ...]) -> Path:
        return self.copies / "-".join(map(str, key))

    def keep(self, files: dict[Path, tuple[int, ...]]) -> None:
        for path, key in files.items():
            if key and key not in self.seen.values():
                inode, size, _ = self.seen.get(path) or (0, 0, 0)
                old = min(size, key[1]) if inode == key[0] else 0  # a file may also have been cut, or touched
                for length in sorted({old, (old + key[1]) // 2} - {key[1]}):
                    self.state(files, path, length)
        self.state(files)

    def state(self, files: dict[Path, tuple[int, ...]], cut: Path | None = None, length: int = 0) -> None:
        folder = self.states / f"{next(self.numbers):04}"
        for path, key in files.items():
            target = folder / "multirun" / path.relative_to(self.tree)
            if not key:
                target.mkdir(parents=True)
            elif path == cut:
                target.write_bytes(self.copy_of(key).read_bytes()[:length])
            else:
                os.link(self.copy_of(key), target)


# ---------------------------------------------------------------- the stock stack


def stock(method: str, settings: str = "{}") -> None:
    """A run of the same kind as TRL alone makes it, which goes on from a checkpoint where there is one."""
    import trl
    from datasets import Dataset

    sums = [(a, random.Random(a).randint(2, 50)) for a in range(2, 50)]
    prompts = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in sums]
    right, wrong = ([[{"role": "assistant", "content": f"It is {a + b + by}."}] for a, b in sums] for by in (0, 1))
    rows = {"prompt": prompts, "chosen": right, "rejected": wrong}
    if method == "SFT":
        rows = {"messages": [asked + replied for asked, replied in zip(prompts, right, strict=True)]}
    output = Path("multirun/default/stock")
    given = {"max_steps": 14, "save_steps": 2, "save_total_limit": 2, "learning_rate": 1e-3} | json.loads(settings)
    args = {"per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    trainer = getattr(trl, f"{method}Trainer")(
        model=str(Path(__file__).parents[1] / "smoltrain" / "tiny"),
        args=getattr(trl, f"{method}Config")(output_dir=str(output), **args, **given),
        train_dataset=Dataset.from_dict(rows),
    )
    trainer.train(resume_from_checkpoint=any(output.glob("checkpoint-*")))
    trainer.save_model(str(output / "model"))
    print(f"ended at step {trainer.state.global_step}")


def weights(folder: Path) -> str:
    """A digest of the final weights of the one run in a folder."""
    [file] = folder.glob("multirun/*/*/model/model.safetensors")
    return digest(file)
