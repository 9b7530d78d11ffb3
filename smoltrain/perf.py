"""What a config leaves to the machine (`perf=auto`): chosen before a weight is loaded, each choice with its reason.

A key whose value is `auto` gets one here, by what the machine has, what the model and its rows need, and what the
budget says of memory; a key that is set stays as it is. The global batch, which decides what is learned, is never
chosen, only how it is divided. A run that goes on, or is made again, keeps what it chose at first.
"""

import copy
import ctypes
import importlib.util
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from omegaconf import DictConfig, OmegaConf

from smoltrain import budget
from smoltrain.config import ConfigError
from smoltrain.config.schema import AUTO
from smoltrain.config.signatures import signature
from smoltrain.lines import size
from smoltrain.ranks import world
from smoltrain.reference import TOKENS

ARGS = "trainer.args."
ROWS, STEPS = f"{ARGS}per_device_train_batch_size", f"{ARGS}gradient_accumulation_steps"
DIVIDED = (ROWS, STEPS)
CHECKPOINTING, LIGER = f"{ARGS}activation_checkpointing", f"{ARGS}use_liger_kernel"
BATCHES = 200  # drawn to see how much of a batch is padding
# Tokens of one forward pass from which on more of them are not computed faster.
ENOUGH = {"cpu": 4_096, "mps": 8_192, "cuda": 32_768}
# The share of free memory that may be planned with: an allocator keeps more than it is asked for.
USABLE = {"cpu": 0.7, "mps": 0.7, "cuda": 0.9}
WIDE = 256  # hidden units from which on a processor's bf16 saves more than its conversions cost


@dataclass(frozen=True)
class Machine:
    """Where a run computes: the kind of device, whether it multiplies bf16, and whether Liger's kernels are there."""

    device: str
    bf16: bool
    liger: bool


def machine(use_cpu: bool) -> Machine:
    """This machine, or its processor alone."""
    accelerator = None if use_cpu else torch.accelerator.current_accelerator()
    device = accelerator.type if accelerator else "cpu"
    if device == "cpu":
        bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return Machine(device, bf16, importlib.util.find_spec("liger_kernel") is not None)


@dataclass
class Choices:
    """The keys of a config that are `auto` (`left`), and what they came to (`made`): by key the value and the reason.

    What is chosen is written into the config.
    """

    cfg: DictConfig
    made: dict[str, tuple[Any, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.left = [key for key in AUTO if OmegaConf.select(self.cfg, key) == "auto"]

    def again(self, record: Mapping[str, Mapping[str, Any]]) -> None:
        """Chooses what a run has chosen before, but for how a batch is divided where there are more processes now."""
        rows, steps = (record[key]["value"] if key in record else OmegaConf.select(self.cfg, key) for key in DIVIDED)
        fits = record.keys().isdisjoint(DIVIDED) or rows * steps == share(self.cfg)
        for key, choice in record.items():
            if fits or key not in DIVIDED:
                self.settle(key, choice["value"], choice["why"])

    def settle(self, key: str, value: Any, why: str) -> None:
        """Gives a key its value, unless it has one already."""
        if key in self.left:
            self.left.remove(key)
            self.made[key] = (value, why)
            OmegaConf.update(self.cfg, key, value)

    @property
    def record(self) -> dict[str, dict[str, Any]]:
        """What was chosen, as the run's record keeps it."""
        return {key: {"value": value, "why": why} for key, (value, why) in self.made.items()}


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # see mallopt(3)


def keep_memory(device: Any) -> None:
    """Has a processor's memory that is freed stay with this process, for the next step, which asks for as much again.

    glibc hands each large tensor back, and takes a fifth of the time of a step to get cleared pages for the next one.
    What is set in the environment (MALLOC_…, GLIBC_TUNABLES) stays, and so does any other C library's way.
    """
    if (
        device.type == "cpu"
        and platform.libc_ver()[0] == "glibc"
        and not any(n.startswith(("MALLOC_", "GLIBC_TUNABLES")) for n in os.environ)
    ):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


# ---------------------------------------------------------------- what no row decides


def arithmetic(choices: Choices, checkpoint: Any) -> None:
    """Chooses how the model of a checkpoint computes; what hangs on its rows is off until they are known."""
    if not choices.left:
        return
    cfg, args = choices.cfg, choices.cfg.trainer.args
    here, config = machine(args.use_cpu), checkpoint.config().get_text_config()
    choices.settle("model.attn_implementation", *attention(config))
    checkpoint.attn_implementation = cfg.model.attn_implementation
    choices.settle(f"{ARGS}bf16", *precision(here, config.hidden_size, bool(args.get("fp16")), cfg.model.dtype))
    choices.settle(f"{ARGS}torch_compile", False, "a step would be compiled anew for each length that a batch has")
    for key, value in {ROWS: 1, STEPS: 1, CHECKPOINTING: False, LIGER: False}.items():
        if key in choices.left:
            OmegaConf.update(cfg, key, value)


def attention(config: Any) -> tuple[str, str]:
    """torch's own where a model can use it."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM._model_mapping[type(config)]
    if model._supports_sdpa:
        return "sdpa", "torch's own kernels, which see rows apart without padding"
    return "eager", f"torch's own kernels do not fit {config.model_type}"


def precision(here: Machine, hidden: int, fp16: bool, dtype: str) -> tuple[bool, str]:
    """bf16, where the machine multiplies it and it saves more than its conversions cost."""
    if fp16 or dtype == "float16":
        return False, "fp16 is asked for"
    if not here.bf16:
        return False, f"{'this processor' if here.device == 'cpu' else 'this accelerator'} does not multiply bf16"
    if here.device == "cpu" and hidden < WIDE:
        return False, f"with {hidden} hidden units a processor loses by conversions what it saves ({WIDE} or more gain)"
    return True, "multiplied faster here; weights and what the optimizer keeps stay as they are"


def liger(here: Machine, alone: bool) -> tuple[bool, str]:
    """Liger's fused kernels, on a GPU that has them."""
    if here.device != "cuda":
        return False, "its kernels are for GPUs"
    if not here.liger:
        return False, "not installed; pip install smoltrain[liger]"
    if alone:
        return False, "its loss takes padded batches, and none are computed"
    return True, "fused kernels, which are installed"


# ---------------------------------------------------------------- what rows and memory decide


def geometry(choices: Choices, found: Any) -> None:
    """Divides the global batch of a preflight that has `found` its parts, and chooses whether activations are kept.

    As many rows go forward at once as are computed fastest and fit. Raises ConfigError where not even one does.
    """
    choices.settle(LIGER, *liger(machine(choices.cfg.trainer.args.use_cpu), found.unpadded))
    if not choices.left:
        return
    cfg, device = choices.cfg, found.args.device.type
    free = available(found.args.device)
    asked = cfg.trainer.args.activation_checkpointing
    recomputed = (False, True) if CHECKPOINTING in choices.left else (asked,)
    for recomputes in recomputed:
        for rows in divisions(choices, found, ENOUGH[device]):
            steps = cfg.trainer.args.gradient_accumulation_steps
            if STEPS in choices.left:
                steps = share(cfg) // rows
            memory = needs(cfg, found, rows, recomputes, steps).total
            if memory <= USABLE[device] * free:
                said = f"{size(memory)} of {size(free)} that are free"
                why = "what is kept fits" if not recomputes else "what would be kept does not fit"
                choices.settle(CHECKPOINTING, recomputes, f"{why}, {said}")
                tokens = f"{round(rows * row_tokens(found)):,} tokens at once, about {ENOUGH[device]:,} are fastest"
                choices.settle(ROWS, rows, f"{tokens}; {said}")
                choices.settle(STEPS, steps, f"global_batch_size={cfg.global_batch_size}, {rows} at a time{among(cfg)}")
                return
    raise ConfigError(
        f"memory: {size(memory)} are needed for {rows} at a time and {size(free)} are there; lower "
        f"{ARGS}max_length={cfg.trainer.args.max_length}, set peft=lora or choose a smaller model="
    )


def share(cfg: DictConfig) -> int:
    """The rows of an update that each process sees."""
    return cfg.global_batch_size // world(cfg.hardware)  # type: ignore[no-any-return]


def among(cfg: DictConfig) -> str:
    return f" in each of {world(cfg.hardware)} processes" if world(cfg.hardware) > 1 else ""


def divisions(choices: Choices, found: Any, enough: int) -> list[int]:
    """How many rows may go forward at once: divisors of the global batch, from those with `enough` tokens down."""
    args, batch = choices.cfg.trainer.args, share(choices.cfg)
    if ROWS not in choices.left:
        return [args.per_device_train_batch_size]
    if STEPS not in choices.left:
        return [batch // args.gradient_accumulation_steps]
    divisors = [rows for rows in range(1, batch + 1) if batch % rows == 0]
    most = next((rows for rows in divisors if rows * row_tokens(found) >= enough), batch)
    return [rows for rows in reversed(divisors) if rows <= most]


def row_tokens(found: Any) -> float:
    """Tokens that a row is on average, all of its sequences together."""
    return max(float(of_a_row(found, longest(found), 1)[1]), 1) * found.encoder.rows_a_forward


def needs(cfg: DictConfig, found: Any, rows: int, recomputes: bool, steps: int) -> budget.Memory:
    """Bytes at the peak of a step, on the longest batch of so many rows at a time."""
    args = copy.copy(found.args)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = rows, steps
    args.activation_checkpointing = recomputes
    peft_config, checkpoint = found.trainer.keywords["peft_config"], found.checkpoint
    reference = (
        "ref_model" in signature(cfg.trainer._target_).parameters
        and peft_config is None
        and not args.precompute_ref_log_probs
    )
    most, _ = of_a_row(found, longest(found), rows)
    whole = budget.memory(
        checkpoint.config(),
        args,
        peft_config,
        checkpoint.dtype,
        checkpoint.quantization_config,
        found.encoder.rows_a_forward * rows,
        math.ceil(most),
        reference,
        found.unpadded,
    )
    zero = (cfg.trainer.args.get("deepspeed") or {}).get("zero_optimization")
    if zero and zero.get("offload_optimizer", {}).get("device") == "cpu" and args.device.type != "cpu":
        whole = replace(whole, optimizer=0)
    every = args.fsdp or (zero and zero["stage"] == 3)
    parts = ("weights", "gradients", "optimizer") if every else ("gradients", "optimizer")
    return shared_out(whole, parts, world(cfg.hardware)) if args.fsdp or zero else whole


def shared_out(whole: budget.Memory, parts: tuple[str, ...], processes: int) -> budget.Memory:
    """What each of several processes needs where these parts of it are shared out among them."""
    return replace(whole, **{part: math.ceil(getattr(whole, part) / processes) for part in parts})


def longest(found: Any) -> int:
    """Tokens of the longest row, where rows are packed or not known of the longest that may be."""
    known = int(found.data.lengths.max(initial=0))
    if known and not getattr(found.args, "packing", False):
        return known
    limit: int = found.args.max_length or found.skeleton.config.max_position_embeddings
    return limit


def of_a_row(found: Any, longest: int, size: int) -> tuple[float, float]:
    """Tokens that the model computes of each row of a forward pass: in the longest batch of `size`, and on average.

    Padding is counted where it is computed, from batches drawn as a trainer does; else what a pair shares counts once.
    """
    data = found.data
    if getattr(found.args, "packing", False) or not data.lengths.any():
        return longest, longest
    if not found.unpadded:
        drawn = np.random.default_rng(0).choice(data.lengths, (BATCHES, size))
        return longest, float(drawn.max(1).mean())
    columns = [name for name in ("input_ids", *TOKENS) if name in data.train.column_names]
    table = data.train.with_format("arrow")[:]
    tokens = np.sort(sum(pc.list_value_length(table[name]).to_numpy() for name in columns))
    return tokens[-size:].mean() / found.encoder.rows_a_forward, tokens.mean() / found.encoder.rows_a_forward


def available(device: Any) -> int:
    """Bytes of memory that a run can have: the accelerator's, or what the machine has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1]) * 1024  # type: ignore[index]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
