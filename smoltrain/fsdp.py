"""Weights and optimizer that are shared out among processes (FSDP2), in checkpoints that know nothing of it.

Upstream writes another format for each way of sharing, which only the same way can read. Here a checkpoint is what one
process would have written: any number of processes goes on from it, with their weights shared out or not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def settle(args: Any) -> None:
    """Has accelerate compute as it does with DDP, before it begins.

    It would round to 16 bits what comes out of a model, too, and add up gradients so: a reply's log-probability of -200
    would be known to 1. Among processors it would not share out anything, in silence.
    """
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if args.mixed_precision in kinds:
        policy = MixedPrecisionPolicy(param_dtype=kinds[args.mixed_precision], reduce_dtype=torch.float32)
        args.fsdp_plugin_args["mixed_precision_policy"] = policy
    if args.use_cpu:
        state = Accelerator(mixed_precision=args.mixed_precision, cpu=True).state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def share_out(trainer: Any) -> None:
    """Shares out the model of a trainer and its optimizer, once; upstream does when training begins.

    Accelerate shares out both together or none, so that a model could not be evaluated before it is trained.
    """
    if not isinstance(trainer.model, FSDPModule):
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = trainer.model
        register_fsdp_forward_method(trainer.model, "generate")


@contextmanager
def shared_out(trainer: Any) -> Iterator[None]:
    """Within, both are shared out, and accelerate, which would fail to do it again, leaves them as they are."""
    share_out(trainer)
    for known, one in (
        (trainer.accelerator._models, trainer.model),
        (trainer.accelerator._optimizers, trainer.optimizer),
    ):
        if not known:  # it forgets them when training begins
            known.append(one)
    trainer.accelerator.prepare = lambda *given: given if len(given) > 1 else given[0]
    try:
        yield
    finally:
        del trainer.accelerator.prepare


def local(weight: torch.Tensor) -> torch.Tensor:
    """What this process has of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def save_optimizer(trainer: Any, folder: str) -> None:
    """Writes the state of optimizer and schedule as one process does, weights numbered in the optimizer's order."""
    state: dict[str, Any] = get_optimizer_state_dict(trainer.model, trainer.optimizer, options=WHOLE)
    if trainer.args.should_save:
        numbers = {name: n for n, name in enumerate(n for group in state["param_groups"] for n in group["params"])}
        groups = [group | {"params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
        plain = {"state": {numbers[name]: kept for name, kept in state["state"].items()}, "param_groups": groups}
        torch.save(plain, Path(folder, OPTIMIZER_NAME))
        torch.save(trainer.lr_scheduler.state_dict(), Path(folder, SCHEDULER_NAME))


def load_optimizer(trainer: Any, folder: str) -> None:
    """Takes up the state that `save_optimizer`, or one process, has written."""
    saved = torch.load(Path(folder, OPTIMIZER_NAME), map_location="cpu", weights_only=True, mmap=True)
    names = {weight: name for name, weight in trainer.model.named_parameters()}
    order = [names[weight] for group in trainer.optimizer.param_groups for weight in group["params"]]
    groups = [group | {"params": [order[number] for number in group["params"]]} for group in saved["param_groups"]]
    named: dict[str, Any] = {
        "state": {order[number]: kept for number, kept in saved["state"].items()},
        "param_groups": groups,
    }
    set_optimizer_state_dict(trainer.model, trainer.optimizer, named, options=WHOLE)
    trainer.lr_scheduler.load_state_dict(torch.load(Path(folder, SCHEDULER_NAME), weights_only=True))


def load_weights(trainer: Any, folder: Path) -> Any:
    """Takes up the weights, or those of an adapter, that are in a folder; returns which were missing or too many."""
    found, other = compared(trainer.model, weights_in(trainer.model, folder))
    set_model_state_dict(trainer.model, found, options=StateDictOptions(full_state_dict=True, strict=False))
    return other


def weights_in(model: Any, folder: Path) -> dict[str, Any]:
    """The weights, or those of an adapter, that are in a folder, by their names there."""
    from peft import PeftModel
    from safetensors.torch import load_file

    weights: dict[str, Any] = {}
    adapter = folder / "adapter_model.safetensors"
    for file in [adapter] if isinstance(model, PeftModel) else sorted(folder.glob("model*.safetensors")):
        weights |= load_file(file)
    return weights


def compared(model: Any, weights: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Saved weights by their names in a model, and which were missing or too many."""
    from peft import PeftModel, get_peft_model_state_dict

    wanted = {name: name for name in model.state_dict()}  # by the name in the file that in the model
    if isinstance(model, PeftModel):
        wanted = get_peft_model_state_dict(model, wanted, model.active_adapter, save_embedding_layers=False)
    missing = [ours for name, ours in wanted.items() if name not in weights]
    unknown = [name for name in weights if name not in wanted]
    found = {wanted[name]: weight for name, weight in weights.items() if name in wanted}
    return found, _IncompatibleKeys(missing, unknown)
