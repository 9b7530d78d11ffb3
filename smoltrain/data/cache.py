"""What is made of rows once and found by every later run, of this process or another: where, and by whom it is made."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock, Timeout


def folder() -> Path:
    """Where it is kept: beside what `datasets` keeps of its own."""
    made = Path(datasets.config.HF_DATASETS_CACHE) / "smoltrain"
    made.mkdir(parents=True, exist_ok=True)
    return made


@contextlib.contextmanager
def alone(name: str, doing: str) -> Iterator[None]:
    """Lets in one process at a time of those that make the same; who waits for a second says what for.

    A lock goes with the process that holds it, however that ends. Where no lock can be written, nothing else can.
    """
    lock = FileLock(folder() / f"{name}.lock")
    held: contextlib.AbstractContextManager[Any]
    try:
        held = lock.acquire(timeout=1)
    except Timeout:
        print(f"another process is {doing}: waiting for it", file=sys.stderr, flush=True)
        held = lock.acquire()
    except OSError:
        held = contextlib.nullcontext()
    with held:
        yield
