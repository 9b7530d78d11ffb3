"""What a run will take: memory by part, disk, steps and time, before it takes them."""

import contextlib
import math
import shutil
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# ---------------------------------------------------------------- memory


PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "reference", "other")


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of one training step, by what they are for.

    No part of the peak, but of what is written: `saved`, the bytes of the weights that a checkpoint holds (an adapter's
    where there is one), and `tensors`, how many of them are trained.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    reference: int
    other: int  # buffers, the batch, what the optimizer's step computes on the way
    saved: int
    tensors: int

    @property
    def parts(self) -> dict[str, int]:
        return {part: getattr(self, part) for part in PARTS}

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Ledger(TorchDispatchMode):
    """Books the storage of every tensor that is made under it to a part, and keeps the books of the fullest moment."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "activations"
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.booked: dict[int, tuple[str, int, weakref.ref]] = {}

    def book(self, tensor: torch.Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.booked:
            old, size, reference = self.booked[key]
            self.live[old] -= size
        else:
            size, reference = storage.nbytes(), weakref.ref(storage, partial(self.free, key))
        self.booked[key] = (part, size, reference)
        self.live[part] += size
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def free(self, key: int, _: weakref.ref) -> None:
        part, size, _ = self.booked.pop(key)
        self.live[part] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.booked:
                self.book(leaf, self.part)
        return result


def memory(
    config: Any,
    args: Any,
    peft_config: Any,
    dtype: str,
    quantization_config: Any,
    rows: int,
    length: int,
    reference: bool,
    unpadded: bool = False,
) -> Memory:
    """Bytes at the peak of one optimizer step of a TRL trainer, found by running that step on tensors without data.

    The model that `config` describes is built, run forward through TRL's own LM head, backward, and updated by the
    optimizer that `args` name, all under torch's FakeTensorMode: every kernel's inputs and outputs are accounted for,
    none is computed, nothing is allocated, and no random number is drawn. `rows` are what one forward sees, padded to
    `length` tokens: for preferences twice `per_device_train_batch_size`. With `reference` a second, frozen model
    stands beside it. Where rows stand `unpadded`, their head is that of head.py. The step is not the first one: the
    optimizer has its state, and with gradient accumulation there are gradients from the batch before.

    It counts what the allocator is asked for. A process takes more: libraries, an accelerator's context, and what the
    allocator keeps for later, on the CPU with glibc 4 to 40 percent more (see benchmarks/memory.py).
    All positions are taken as trained; on an accelerator the logits are fewer where they are not.
    """
    with torch.device("meta"):
        model = build(config, dtype)
        twin = build(config, dtype) if reference else None
        shrunk = compressed(model, quantization_config)
        if peft_config is not None:
            model = adapted(model, peft_config, quantization_config, args)
    with FakeTensorMode(allow_non_fake_inputs=True), head_of(args.device.type, config.vocab_size, unpadded):
        for module in filter(None, (model, twin)):
            module.to_empty(device="cpu")
            base_of(module).tie_weights()
        if args.activation_checkpointing:
            model.activation_checkpointing_enable(**checkpointing(args))
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, state_size = optimizer_of(args, model, trained)

        ledger = Ledger()
        for part, module in (("weights", model), ("reference", twin)):
            for tensor in module.parameters() if module else ():
                ledger.book(tensor, part)
            for tensor in module.buffers() if module else ():
                ledger.book(tensor, "other")
        for tensor in tree_leaves([list(s.values()) for s in optimizer.state.values()] if optimizer else []):
            if isinstance(tensor, torch.Tensor):
                ledger.book(tensor, "optimizer")
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.book(p.grad, "gradients"))
            if args.gradient_accumulation_steps > 1:
                parameter.grad = torch.zeros_like(parameter)
                ledger.book(parameter.grad, "gradients")
        watch_head(model, ledger)

        run_step(model, twin, optimizer, trained, ledger, args, rows, length)
        sizes = ledger.peak + Counter(optimizer=state_size) - Counter(weights=shrunk)
        saved = trained if peft_config is not None else model.parameters()
        return Memory(
            **{part: sizes[part] for part in PARTS},
            saved=sum(p.numel() * p.element_size() for p in saved),
            tensors=len(trained),
        )


def run_step(model, twin, optimizer, trained, ledger, args, rows: int, length: int) -> None:
    """Forward, the reference's forward, backward, clip, update, in the order and with the autocast of the trainers."""
    precision = torch.bfloat16 if args.bf16 else torch.float16
    autocast = partial(torch.autocast, "cpu", dtype=precision, enabled=args.bf16 or args.fp16)
    ids = torch.zeros(rows, length, dtype=torch.long)
    # A row alone has no padding, and kernels that are neither sdpa nor eager take lengths: neither needs a mask.
    masked = rows > 1 and attention(model.config) == model.config._attn_implementation
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids) if masked else None}
    with ledger:
        for tensor in batch.values():
            if tensor is not None:
                ledger.book(tensor, "other")
        with autocast():
            loss = model(**batch, use_cache=False, fused_lm_head=True).loss
        ledger.part = "activations"
        if twin is not None:
            with torch.no_grad(), autocast():
                twin(**batch, use_cache=False, fused_lm_head=True)
        ledger.part = "logits"
        loss.backward()
        ledger.part = "other"
        torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        if optimizer is not None:
            optimizer.step()


def build(config: Any, dtype: str) -> Any:
    """The model of a config with TRL's LM head, its weights never initialised."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from trl.trainer.utils import add_fused_lm_head

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention(config)
        )
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model


def attention(config: Any) -> str:
    """The attention that stands for a config's own: flash kernels keep what sdpa keeps, and need no mask."""
    return "eager" if config._attn_implementation == "eager" else "sdpa"


def base_of(model: Any) -> Any:
    """The language model itself, without its adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapted(model: Any, peft_config: Any, quantization_config: Any, args: Any) -> Any:
    """A model with its adapter, as TRL's trainers make it."""
    from peft import get_peft_model

    model = get_peft_model(model, peft_config)
    if args.activation_checkpointing:
        model.enable_input_require_grads()
    if quantization_config is not None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def compressed(model: Any, quantization_config: Any) -> int:
    """The bytes that bitsandbytes saves: linear layers but the head in 4 or 8 bits, and a scale for each 64 weights."""
    if quantization_config is None:
        return 0
    if quantization_config.load_in_4bit:
        bits = 4 + (8 + 32 / 256 if quantization_config.bnb_4bit_use_double_quant else 32) / 64
    else:
        bits = 8
    head = model.get_output_embeddings()
    layers = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return sum(w.numel() * w.element_size() - math.ceil(w.numel() * bits / 8) for w in layers)


def checkpointing(args: Any) -> dict[str, Any]:
    """The arguments with which transformers' Trainer turns on activation checkpointing."""
    kwargs = dict(args.activation_checkpointing_kwargs or {})
    return {key: kwargs.pop(key) for key in ("every_n_layers", "offload") if key in kwargs} | {
        "activation_checkpointing_kwargs": kwargs or None
    }


# bitsandbytes computes on the accelerator only. Bytes it keeps for a trained weight: moments x bytes of each.
MOMENTS = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1}


def optimizer_of(args: Any, model: Any, trained: list[Any]) -> tuple[torch.optim.Optimizer | None, int]:
    """The optimizer that the arguments name, with its state made; or None and the bytes that state takes."""
    from transformers import Trainer
    from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS

    if args.optim in _BITSANDBYTES_OPTIMIZERS:
        name = str(args.optim.value)
        width = 1 if "8bit" in name else 4
        moments = next(count for family, count in MOMENTS.items() if family in name)
        paged = "paged" in name  # lies in the host's memory until it is needed
        return None, 0 if paged else sum(p.numel() * moments * (width if p.numel() >= 4096 else 4) for p in trained)
    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer = kind(trained, **kwargs)
    if args.device.type != "cpu" and "foreach" in optimizer.defaults and not optimizer.defaults.get("fused"):
        for group in optimizer.param_groups:
            group["foreach"] = True  # torch's default on an accelerator: all weights at once, with their temporaries
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer, 0


def watch_head(model: Any, ledger: Ledger) -> None:
    """Books to `logits` what is made after the last layer, forward, and before its gradient arrives, backward."""

    def after(module: Any, inputs: Any, output: Any) -> None:
        ledger.part = "logits"
        hidden = output.last_hidden_state
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: setattr(ledger, "part", "activations"))

    base_of(model).base_model.register_forward_hook(after)


@contextlib.contextmanager
def head_of(device: str, vocabulary: int, unpadded: bool) -> Iterator[None]:
    """TRL's LM head as it takes memory on a device.

    Triton's kernels fold the logits in place, without the temporaries of the code for other devices. That code asks for
    tiles wider than a small vocabulary, but touches whole pages of 1024 floats only where there are logits. What stands
    `unpadded` has a head of its own there.
    """
    if device in ("cuda", "xpu"):

        def fold(*args: Any, **kwargs: Any) -> None: ...

        patch: Any = mock.patch.multiple(
            "trl.kernels.chunked_logprob", _forward_tile=fold, _backward_tile=fold, _addmm_fp32=fold
        )
    elif unpadded:
        from smoltrain import head

        patch = head.once()
    else:
        from trl.trainer import utils

        width = min(utils._CHUNKED_LOGPROB_CHUNK_SIZE, 1024 * math.ceil(vocabulary / 1024))
        patch = mock.patch.object(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", width)
    with patch:
        yield


# ---------------------------------------------------------------- one real step


@dataclass(frozen=True)
class Step:
    """What one optimizer step on one batch took: wall seconds, and bytes at its peak, weights included.

    `peak` is None where neither CUDA nor Linux can tell.
    """

    seconds: float
    peak: int | None


def step(trainer: Any, batch: dict[str, torch.Tensor]) -> Step:
    """Forward, backward and update on a batch as the trainer's collator makes it, without learning from it.

    The learning rate is zero: weights, random numbers and gradients are afterwards what they were before. The
    trainer's own counters are not, so throw it away. The first eight tokens of the rows go through first, so that
    what is loaded, compiled or allocated once is not timed.
    """
    model, args, device = trainer.model, trainer.args, trainer.args.device
    before = held(model) + held(getattr(trainer, "ref_model", None))
    kind, kwargs = trainer.get_optimizer_cls_and_kwargs(args, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind(trained, **kwargs | {"lr": 0.0})
    was_training, was_checkpointing = model.training, model.is_activation_checkpointing
    if args.activation_checkpointing:
        model.activation_checkpointing_enable(**checkpointing(args))
    model.train()
    with torch.random.fork_rng(), watched(device) as peak:
        for columns in (8, None):
            inputs = trainer._prepare_inputs({k: v[:, :columns] if v.ndim == 2 else v for k, v in batch.items()})
            settle(device)
            began = time.perf_counter()
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(model, inputs)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            optimizer.step()
            settle(device)
            seconds = time.perf_counter() - began
            del loss
            optimizer.zero_grad()
    if args.activation_checkpointing and not was_checkpointing:
        model.activation_checkpointing_disable()
    model.train(was_training)
    return Step(seconds, None if not peak else peak[0] + before)


def held(model: Any) -> int:
    """The bytes of a model's weights."""
    return 0 if model is None else sum(p.numel() * p.element_size() for p in model.parameters())


def settle(device: torch.device) -> None:
    """Waits until an accelerator has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[list[int]]:
    """A list that holds, once the block is left, the bytes that its peak lay above its start; empty if unknown.

    On CUDA as torch's allocator counts them, on Linux as the process's resident memory.
    """
    added: list[int] = []
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield added
        added.append(torch.cuda.max_memory_allocated(device) - start)
    elif device.type == "cpu" and reset.exists():
        reset.write_text("5")  # the high-water mark of resident memory, see proc(5)
        start = resident(status, "VmRSS")
        yield added
        added.append(resident(status, "VmHWM") - start)
    else:
        yield added


def resident(status: Path, field: str) -> int:
    """One field of /proc/…/status, in bytes."""
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


# ---------------------------------------------------------------- steps


@dataclass(frozen=True)
class Steps:
    """How often a run updates its weights (`total`, `per_epoch`), how often it sees its rows, and rows an update."""

    total: int
    per_epoch: int
    epochs: float
    effective_batch: int


def steps(rows: int, args: Any) -> Steps:
    """The steps of a run on so many rows, counted as transformers' Trainer counts them."""
    whole = math.floor if args.dataloader_drop_last else math.ceil
    batches = whole(whole(rows / args.per_device_train_batch_size) / args.world_size)
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    effective = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return Steps(total, per_epoch, total / per_epoch, effective)


# ---------------------------------------------------------------- disk


@dataclass(frozen=True)
class Disk:
    """Bytes of one checkpoint and of the final model; how many checkpoints stand at once; all of it, and what is free.

    `checkpoints` is one more than `save_total_limit` where that is reached: the oldest goes when the newest is there.
    """

    checkpoint: int
    model: int
    checkpoints: int
    free: int

    @property
    def total(self) -> int:
        return self.checkpoint * self.checkpoints + self.model


SMALL = 16 * 1024  # beside weights: headers, arguments, the card; beside the optimizer: random states, scheduler, log
ENTRIES = 1024  # headers of one weight, in its own file and, for each of its moments, in the optimizer's


def disk(memory: Memory, args: Any, steps: Steps, tokenizer: int) -> Disk:
    """What a run writes: weights, the optimizer's state, and `tokenizer` bytes of files that lie beside each model.

    Free is what the file system of `args.output_dir` has left, whether that folder is there already or not.
    """
    every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps.total)
    if args.save_strategy == "best":
        every = args.eval_steps or every
    periods = {"no": math.inf, "epoch": steps.per_epoch}
    saves = math.ceil(steps.total / periods.get(args.save_strategy, every))
    limit = args.save_total_limit or saves
    model = memory.saved + tokenizer + SMALL
    checkpoint = model + SMALL + memory.tensors * ENTRIES + (0 if args.save_only_model else memory.optimizer)
    where = Path(args.output_dir).absolute()
    while not where.exists():
        where = where.parent
    return Disk(checkpoint, model, min(saves, limit + 1), shutil.disk_usage(where).free)
