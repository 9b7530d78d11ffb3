"""What a run died of, where the machine ran out of something: what was needed, and what to change."""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smoltrain.config import DISK_FULL, out_of_memory
from smoltrain.lines import size

# How torch and safetensors say that a file could not be written whole; neither keeps the system's number.
UNWRITTEN: tuple[str, ...] = ("No space left on device", "File too large", "inline_container.cc")
UNWRITTEN += tuple(f"(os error {number})" for number in DISK_FULL)


class DiskFull(OSError):
    """A disk has no room for what a run has to write."""


class OutOfMemory(RuntimeError):
    """A model, its optimizer and its activations do not fit into the memory of the machine."""


@contextmanager
def explained(directory: Path, args: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Says of what ran out in the block what it was, in numbers, and what to change, in the order of its effect.

    `args` tells those of the trainer, once they are known. Raises DiskFull or OutOfMemory for what libraries raise.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        if isinstance(error, DiskFull):
            raise
        if out_of_memory(error):
            raise OutOfMemory(smaller(args())) from error
        if disk_full(error):
            named = getattr(error, "filename", None)  # which may lie on another disk than the run
            place = Path(named).absolute().parent if named else directory
            raise DiskFull(errno.ENOSPC, no_room(place, 0)) from error
        raise


def disk_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in DISK_FULL or any(text in str(error) for text in UNWRITTEN)


def no_room(directory: Path, need: int) -> str:
    """What a full disk is told as: the path, what is needed and what is free."""
    wanted = f"a checkpoint needs {size(need)}, and " if need else ""
    free = size(shutil.disk_usage(directory).free)
    return f"{directory}: {wanted}{free} are free on this disk; once there is room, the same command goes on"


def smaller(args: dict[str, Any]) -> str:
    """What to set when memory ran out, what helps most first, each with its value now."""
    batch, steps = args.get("per_device_train_batch_size", 8), args.get("gradient_accumulation_steps", 1)
    length = args.get("max_length")
    knobs = []
    if batch > 1:
        halved = f"trainer.args.per_device_train_batch_size={batch // 2}"
        doubled = f"trainer.args.gradient_accumulation_steps={steps * 2}"
        knobs.append(f"{halved} {doubled} (now {batch} and {steps}; as many rows a step)")
    if not args.get("activation_checkpointing"):
        knobs.append("trainer.args.activation_checkpointing=true (slower by about a third)")
    if length and length > 256:
        knobs.append(f"trainer.args.max_length={length // 2} (now {length}; longer rows are cut)")
    knobs.append("peft=lora (no gradients and no optimizer for the model's own weights), or a smaller model=")
    return "out of memory; what helps, most first:\n" + "\n".join(f"  {knob}" for knob in knobs)
