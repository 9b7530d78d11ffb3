"""Weights and optimizer that DeepSpeed shares out among processes (ZeRO), in checkpoints that know nothing of it.

As in fsdp.py: a checkpoint is what one process would have written, where DeepSpeed's own is of its number of processes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from smoltrain.fsdp import compared, weights_in

# On processors it would compile code of its own to add up numbers, at the first run of a machine.
COMPILED = "deepspeed_shm_comm"


def settle(args: Any) -> None:
    """Has DeepSpeed compile nothing where processors share a run, and torch not say at each step what it deprecates."""
    if args.use_cpu:
        from deepspeed import ops

        ops.__compatible_ops__[COMPILED] = False
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)


def share_out(trainer: Any) -> None:
    """Shares out the model of a trainer and its optimizer, once; upstream does when training begins.

    It would take apart again what is shared out before that.
    """
    if trainer.deepspeed is None:
        trainer.create_optimizer()
        names = {weight: name for name, weight in trainer.model.named_parameters()}
        groups = trainer.optimizer.param_groups
        trainer.in_order = [group | {"params": [names[weight] for weight in group["params"]]} for group in groups]
        engine, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.deepspeed = trainer.model_wrapped = engine
        trainer.accelerator.free_memory = lambda *given: list(given)


@contextmanager
def shared_out(trainer: Any) -> Iterator[None]:
    """Within, both are shared out, and upstream, which would do it again, takes them as they are."""
    share_out(trainer)
    trainer.is_deepspeed_enabled = False
    trainer.accelerator.prepare = lambda *given: given if len(given) > 1 else given[0]
    try:
        yield
    finally:
        trainer.is_deepspeed_enabled = True
        del trainer.accelerator.prepare


def state_dict(trainer: Any) -> dict[str, Any]:
    """All weights, or those of an adapter, as the optimizer has them, in the first process; in the others, none."""
    from deepspeed.utils import safe_get_full_fp32_param
    from peft import PeftModel

    found = {}
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad or not isinstance(trainer.model, PeftModel):
            full = safe_get_full_fp32_param(weight)
            if trainer.args.should_save:
                found[name] = full.cpu()
    if trainer.args.should_save:
        kept = trainer.model.state_dict()
        found |= {name: kept[name].cpu() for name, _ in trainer.model.named_buffers() if name in kept}
    return found


@contextmanager
def whole(trainer: Any) -> Iterator[None]:
    """Within, every process has all weights, which generation would have gathered anew for each token."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from trl.models.utils import add_hooks, remove_hooks

    if stage(trainer) == 2:
        yield
        return
    trainer.deepspeed.empty_partition_cache()  # what was gathered for a batch that does not come
    with GatheredParameters([*trainer.model.parameters()]):
        remove_hooks(trainer.deepspeed)
        try:
            yield
        finally:
            add_hooks(trainer.deepspeed)


def local(weight: Any) -> torch.Tensor:
    """What this process has of a weight."""
    return getattr(weight, "ds_tensor", weight)


def save_optimizer(trainer: Any, folder: str) -> None:
    """Writes the state of optimizer and schedule as one process does, weights numbered in the optimizer's order."""
    from deepspeed.utils import safe_get_full_optimizer_state

    sharing, weights = trainer.optimizer.optimizer, dict(trainer.model.named_parameters())
    link(sharing)
    of_a_part = next(iter(sharing.optimizer.state.values()))
    state: dict[int, dict[str, Any]] = {}
    for name in names(trainer):
        of_one = {
            key: safe_get_full_optimizer_state(weights[name], key).cpu() if kept.dim() else kept.clone()
            for key, kept in of_a_part.items()
        }
        if trainer.args.should_save:
            state[len(state)] = of_one
    if trainer.args.should_save:
        numbers, groups = iter(range(len(state))), []
        for group, own in settings(trainer):
            groups.append(group | {"params": [next(numbers) for _ in own]})
        torch.save({"state": state, "param_groups": groups}, Path(folder, OPTIMIZER_NAME))
        schedule = trainer.lr_scheduler.state_dict()
        for key, own in schedule.items():
            if isinstance(own, list):  # a value a group
                left = iter(own)
                schedule[key] = [next(left) if group["params"] else own[0] for group in trainer.in_order]
        torch.save(schedule, Path(folder, SCHEDULER_NAME))


def load_optimizer(trainer: Any, folder: str) -> None:
    """Takes up the state that `save_optimizer`, or one process, has written."""
    saved = torch.load(Path(folder, OPTIMIZER_NAME), map_location="cpu", weights_only=True, mmap=True)
    sharing, weights = trainer.optimizer.optimizer, dict(trainer.model.named_parameters())
    order = [number for group in saved["param_groups"] for number in group["params"]]
    kept = {name: saved["state"][number] for name, number in zip(names(trainer), order, strict=True)}
    first = next(iter(kept.values()))
    together = any(sharing.optimizer.defaults.get(how) for how in ("fused", "capturable"))  # with the weights: the step
    for part in parts(sharing):
        sharing.optimizer.state[part] = {
            key: torch.zeros_like(part) if value.dim() else value.clone().to(part.device if together else "cpu")
            for key, value in first.items()
        }
    link(sharing)
    for name, state in kept.items():
        for key, value in state.items():
            if value.dim():
                put(weights[name], value, key)
    for (group, _), former in zip(settings(trainer), saved["param_groups"], strict=True):
        group |= {key: value for key, value in former.items() if key != "params"}
    schedule = torch.load(Path(folder, SCHEDULER_NAME), weights_only=True)
    for key, every in schedule.items():
        if isinstance(every, list):
            schedule[key] = [value for value, group in zip(every, trainer.in_order, strict=True) if group["params"]]
    trainer.lr_scheduler.load_state_dict(schedule)


def names(trainer: Any) -> list[str]:
    """The weights that are trained, in the optimizer's order."""
    return [name for group in trainer.in_order for name in group["params"]]


def settings(trainer: Any) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The optimizer's groups, and their weights; DeepSpeed leaves out those that have none."""
    live = iter(trainer.optimizer.param_groups)
    for group in trainer.in_order:
        yield next(live) if group["params"] else group, group["params"]


def link(sharing: Any) -> None:
    """Has stage 2 know where each weight's share of the optimizer's state is.

    DeepSpeed looks once, after the first step of the first of two groups of weights, and finds nothing of the second.
    """
    if hasattr(sharing, "_hp_optimizer_states_linked"):
        sharing._hp_optimizer_states_linked = False
        sharing._lazy_init_hp_params_optimizer_state()


def parts(sharing: Any) -> list[torch.Tensor]:
    """What this process has of the weights in float32, as DeepSpeed's optimizers of stage 2 or 3 keep it."""
    stage2 = hasattr(sharing, "single_partition_of_fp32_groups")
    return list(sharing.single_partition_of_fp32_groups if stage2 else sharing.fp32_partitioned_groups_flat)


def put(weight: Any, value: torch.Tensor, key: str | None = None) -> None:
    """Sets a weight in float32, or what the optimizer has under a key of it.

    DeepSpeed's own way to it fails in stage 3 where a weight is no multiple of the processes: shares are padded.
    """
    from deepspeed import utils

    if hasattr(weight, "ds_id"):
        size = weight.ds_tensor.numel()
        known = value.flatten()[size * torch.distributed.get_rank() :][:size]
        of, own = "local", torch.zeros(size, dtype=value.dtype)
        own[: known.numel()] = known
    else:
        of, own = "full", value.to(weight.device)
    if key:
        getattr(utils, f"safe_set_{of}_optimizer_state")(weight, own, key)
    else:
        getattr(utils, f"safe_set_{of}_fp32_param")(weight, own)


def stage(trainer: Any) -> int:
    """What is shared out: gradients and optimizer (2), or weights too (3)."""
    return int(trainer.accelerator.state.deepspeed_plugin.zero_stage)


def load_weights(trainer: Any, folder: Path) -> Any:
    """Takes up the weights, or those of an adapter, that are in a folder; returns which were missing or too many."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    found, other = compared(trainer.model, weights_in(trainer.model, folder))
    weights = dict(trainer.model.named_parameters(remove_duplicate=False))
    if stage(trainer) == 3:
        trainer.deepspeed.empty_partition_cache()  # what was gathered for a step that does not come
    for name, value in found.items():
        weight, value = weights.get(name), value.to(trainer.args.device)
        with GatheredParameters([weight] if name in weights else [], modifier_rank=0), torch.no_grad():
            (trainer.model.get_buffer(name) if weight is None else weight).copy_(value)
        if weight is not None:
            put(weight, value.float())  # which it is rounded from
    return other
