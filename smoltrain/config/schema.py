"""The keys of a run and their types. Groups keep their own keys in their own YAML, and what those build takes them."""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal


@dataclass
class Evaluation:
    max_rows: int
    max_new_tokens: int


@dataclass
class Check:
    step: bool | None


@dataclass
class Hardware:
    processes: int
    nodes: int
    rendezvous: str | None
    slurm: dict[str, Any] | None
    zero: dict[str, Any] | None = None


@dataclass
class Config:
    """One run. Nobody makes one of these: the config is held against it, as it is against every `_target_`."""

    name: str
    seed: int
    threads: int | None
    objective: str
    resume: str
    pause_at: int | None
    global_batch_size: int | None
    resume_changes: Literal["refuse", "accept"]
    data: dict[str, Any]
    encode: dict[str, Any]
    trainer: dict[str, Any]
    model: dict[str, Any]
    hardware: Hardware
    evaluation: Evaluation
    check: Check
    callbacks: dict[str, Any]


KEYS = [f.name for f in fields(Config)]
NODES = [f.name for f in fields(Config) if is_dataclass(f.type) or f.type == dict[str, Any]]
SCHEMA = {  # what takes the keys of a node that has no `_target_`, as a target
    key: f"{kind.__module__}.{kind.__name__}"
    for key, kind in {"": Config, "hardware": Hardware, "evaluation": Evaluation, "check": Check}.items()
}
# Keys that may be `auto`: what they come to is chosen for the machine (smoltrain/perf.py), and the record says it.
AUTO: tuple[str, ...] = ("model.attn_implementation", "trainer.args.bf16", "trainer.args.activation_checkpointing")
AUTO += ("trainer.args.per_device_train_batch_size", "trainer.args.gradient_accumulation_steps")
AUTO += ("trainer.args.torch_compile", "trainer.args.use_liger_kernel")
PREPARATION = "smoltrain.data.prepare.Preparation"  # which a source takes, and a source of a mixture does not
