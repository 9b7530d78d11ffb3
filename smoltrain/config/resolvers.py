"""What our YAML takes for granted: its resolvers and its schema, made known to Hydra by `register`."""

import os
import re
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from smoltrain.config import leaves, plain
from smoltrain.config.schema import KEYS, NODES

PLUGIN = "hydra_plugins.smoltrain"  # where Hydra wants a launcher to be; the classes are in smoltrain.sweep
PLUGINS = ("Sweeper", "Local", "Slurm", "Ray")


@cache
def stamp() -> str:
    """Names a run directory: when this process started its run, and four letters against a twin of that second."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"


def label(overrides: str) -> str:
    """`trainer.args.beta=0.1,data.path=a/b` as a directory's name: `beta-0.1_path-a_b`, at most 120 letters.

    It holds nothing that a shell or Hydra's grammar wants quoted, so that `model.from_run=` takes it as it is.
    """
    short = "_".join(re.sub(r"^[^=]*\.(?=[^.=]+=)", "", part) for part in overrides.split(",") if part)
    return re.sub(r"[^\w.+-]", "_", short.replace("=", "-"), flags=re.ASCII)[:120].rstrip("_")


@cache
def accelerator() -> str:
    """`cuda`, `mps` or `cpu`, read off the machine without importing torch."""
    if Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists():
        return "cuda"
    machine = os.uname()
    return "mps" if (machine.sysname, machine.machine) == ("Darwin", "arm64") else "cpu"


def accelerators() -> int:
    """How many NVIDIA GPUs this process may use, counted without importing torch."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([number for number in named.split(",") if number.strip() not in ("", "-1")])
    return len([*Path("/dev").glob("nvidia[0-9]*")])


def cores() -> int:
    """How many of the machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def at_once(most: int, _root_: DictConfig) -> int | str:
    """How many rows each process takes forward: a divisor of its share of the global batch, at most so many."""
    batch, processes, nodes = _root_.global_batch_size, _root_.hardware.processes, _root_.hardware.nodes
    if not all(type(number) is int and number > 0 for number in (batch, processes, nodes)):
        return "auto"  # where it may not be that, the rules say so
    share, left = divmod(batch, processes * nodes)
    return 1 if left else max(rows for rows in range(1, most + 1) if share % rows == 0)


def several(_root_: DictConfig) -> bool:
    """Whether a run has more than one process."""
    return bool(_root_.hardware.processes != 1 or _root_.hardware.nodes != 1)


# What DeepSpeed is told besides how to share out: the rest is said by trainer.args, and its optimizer is torch's.
ZERO: dict[str, Any] = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
ZERO |= {"gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
ZERO |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}  # where it would round
ZERO |= {"zero_force_ds_cpu_optimizer": False}  # DeepSpeed's own is compiled at run time


def zero(_root_: DictConfig) -> dict | None:
    """DeepSpeed's config, where several processes share out weights as hardware.zero says."""
    how = _root_.hardware.get("zero")
    return {"zero_optimization": plain(how), **ZERO} if how is not None and several(_root_) else None


def accumulation(_parent_: DictConfig, _root_: DictConfig) -> int | str:
    """How many passes of all processes an update needs; what does not divide, the rules refuse."""
    rows, batch, processes = _parent_.per_device_train_batch_size, _root_.global_batch_size, _root_.hardware.processes
    nodes = _root_.hardware.nodes
    if not all(type(number) is int for number in (rows, batch, processes, nodes)):
        return "auto"
    return max(batch // max(rows * processes * nodes, 1), 1)


def reference_ahead(_parent_: DictConfig, _root_: DictConfig) -> bool:
    """Whether it pays to compute what a reference makes of all rows before training.

    It does where every row is learned from, by one process; it cannot be done for a stream or a reference that moves.
    """
    if several(_root_):
        return False
    data = plain(_root_.data) if OmegaConf.is_dict(_root_.data) else {}
    streamed = any(key.rpartition(".")[2] == "streaming" and value for key, value in leaves(data))
    return _parent_.max_steps == -1 and not _parent_.get("sync_ref_model") and not streamed


def register() -> None:
    """Makes what our YAML calls (`${stamp:}`, `${accelerator_is:…}` and others) known to Hydra, and the schema.

    In it every node takes any key from any side. What does not belong there is found afterwards, all of it at once
    (`validate`), where Hydra would stop at the first and advise to force it in with `+`.
    """
    node = OmegaConf.create({}, flags={"struct": False})
    ConfigStore.instance().store("schema", {key: node if key in NODES else MISSING for key in KEYS})
    OmegaConf.register_new_resolver("stamp", stamp, replace=True)
    OmegaConf.register_new_resolver("label", label, replace=True)
    OmegaConf.register_new_resolver("accelerators", lambda: max(accelerators(), 1), replace=True)
    OmegaConf.register_new_resolver("at_once", at_once, replace=True)
    OmegaConf.register_new_resolver("several", several, replace=True)
    OmegaConf.register_new_resolver("zero", zero, replace=True)
    OmegaConf.register_new_resolver("accumulation", accumulation, replace=True)
    OmegaConf.register_new_resolver("reference_ahead", reference_ahead, replace=True)
    OmegaConf.register_new_resolver("accelerator_is", lambda kind: accelerator() == kind, replace=True)
