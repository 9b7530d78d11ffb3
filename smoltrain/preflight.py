"""What every run begins with, before a weight is loaded: its parts, its rows as tokens, and all that would stop it."""

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
from datasets import IterableDataset
from omegaconf import DictConfig

from smoltrain import budget, perf, ranks
from smoltrain.config import ConfigError, refusing, rules, shown, suggest
from smoltrain.config.targets import instantiate
from smoltrain.config.validate import resolved
from smoltrain.data.encode import Chat
from smoltrain.data.splits import FEW
from smoltrain.data.templates import faults
from smoltrain.evaluate import NOT_QUALITY, to_answer
from smoltrain.lines import some

LOOKED_AT = 20  # rows of each split whose training text is compared with their serving text
LONGER = 1.2  # chosen replies so many times as long as rejected ones teach length
OFTEN = 0.75  # and so do pairs of which this share has the same side longer


@dataclass
class Preflight:
    """The parts of a run before any weight is loaded, as far as they could be made, and what would stop it.

    `skeleton` is the model without weights. `compared` conversations read the same in training as in serving. Whether
    the trainer computes rows without their padding, `unpadded` says.
    """

    choices: perf.Choices
    errors: list[str] = field(default_factory=list)
    checkpoint: Any = None
    chat: Any = None
    skeleton: Any = None
    encoder: Any = None
    trainer: Any = None
    data: Any = None
    streamed: bool = False
    unpadded: bool = False
    compared: int = 0

    @property
    def fit(self) -> bool:
        return not self.errors

    @property
    def args(self) -> Any:
        return self.trainer.keywords["args"]

    @property
    def steps(self) -> int:
        """The last step of the run; of a stream, `max_steps` says it."""
        return budget.steps(max(self.data.lengths.size, 1), self.args).total

    @contextmanager
    def part(self, key: str) -> Iterator[None]:
        """Keeps what is refused, so that the other parts can tell what is wrong with them too."""
        try:
            with refusing(key):
                yield
        except ConfigError as error:
            self.errors.append(str(error))

    def refuse(self) -> None:
        """Raises one ConfigError for all that would stop the run."""
        if self.errors:
            raise ConfigError("\n".join(self.errors))


def preflight(
    cfg: DictConfig, sample: int | None = None, chosen: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> Preflight:
    """Makes what a run needs before its model, and looks for what would stop it; of a stream, in its first rows.

    Of data that is streamed, the first `sample` rows are then all there is. What the config leaves to the machine
    (perf.py) is `chosen` already, or is chosen now, and the config says it then.
    """
    # TRL and PEFT still call activation checkpointing in transformers by its old names.
    warnings.filterwarnings(
        "ignore", message=r"`(is_)?gradient_checkpointing\w*` is deprecated", category=FutureWarning
    )
    found = Preflight(perf.Choices(cfg))
    found.choices.again(chosen)
    with found.part("model"):
        found.checkpoint = instantiate(cfg.model)
        perf.arithmetic(found.choices, found.checkpoint)
        found.chat = Chat(found.checkpoint.tokenizer(), found.checkpoint.chat_template_kwargs or {})
        found.errors += unread_variables(found.chat)
        found.skeleton = found.checkpoint.skeleton(found.chat.tokenizer)
    with found.part("encode"):
        found.encoder = instantiate(cfg.encode)
    with found.part("trainer"):
        found.errors += without_device(cfg.trainer.args.use_cpu, bool(cfg.hardware.slurm))
        if not any(error.startswith("trainer.args.") for error in found.errors):
            found.trainer = instantiate(single(cfg.trainer))
            if found.encoder is not None:
                found.encoder.feed(found.trainer)
            plan_for_all(found.args, ranks.world(cfg.hardware))
    if found.skeleton is not None and found.trainer is not None:
        with found.part("trainer.peft_config"):
            found.errors += without_layer(found.skeleton, found.trainer.keywords["peft_config"])
        found.errors += without_experts(found.skeleton, getattr(found.args, "router_aux_loss_coef", None))
        with found.part("trainer"):
            found.unpadded = without_padding(found.skeleton, found.trainer)
        with found.part("trainer.args.optim"):
            found.trainer.func.get_optimizer_cls_and_kwargs(found.args, found.skeleton)
    with found.part("data"):
        data = instantiate(cfg.data)
        found.streamed = any(isinstance(origin.source.train, IterableDataset) for origin in data.origins.values())
        if found.chat is not None and found.encoder is not None:
            try:
                found.data = data.prepare(found.encoder, found.chat, cfg.trainer.args.max_length, sample)
            except ConfigError as error:
                named = str(error).replace("the trainer eats", f"{cfg.trainer._target_} eats", 1)
                raise ConfigError(named) from None
            compare_with_serving(found)
    if found.data is not None and found.skeleton is not None:
        longest = found.data.lengths.max(initial=0)
        found.errors += without_position(found.skeleton, longest, cfg.trainer.args.max_length)
    if found.fit:
        with found.part("perf"):
            perf.geometry(found.choices, found)
            if found.choices.made:
                found.trainer = instantiate(single(cfg.trainer))
                plan_for_all(found.args, ranks.world(cfg.hardware))
    if found.data is not None and found.trainer is not None:
        rows = found.data.lengths.size
        found.errors += unmeasured(cfg, found) + ([] if found.streamed else without_batch(found.args, rows))
        with found.part("trainer.args.lr_scheduler_type"):
            schedule(found.args, budget.steps(max(rows, 1), found.args).total)
    return found


def single(trainer: DictConfig) -> DictConfig:
    """A trainer that one process can build: without DeepSpeed, which looks for all of a run as soon as it is named.

    Raises ConfigError where it is not installed.
    """
    if trainer.args.get("deepspeed") is not None:
        if find_spec("deepspeed") is None:
            raise ConfigError(
                "trainer.args.deepspeed: DeepSpeed is not installed; pip install 'smoltrain[deepspeed]', or choose "
                "hardware=fsdp, which shares out the same"
            )
        trainer = copy.deepcopy(trainer)
        trainer.args.deepspeed = None
    return trainer


def unread_variables(chat: Chat) -> list[str]:
    """Variables that the chat template never reads: a typo in one would otherwise train another text than was asked."""
    return [
        f"model.chat_template_kwargs: the chat template reads no variable {name}"
        for name in chat.variables
        if not re.search(rf"\b{re.escape(name)}\b", chat.template)
    ]


def without_device(use_cpu: bool, slurm: bool) -> list[str]:
    if use_cpu or torch.accelerator.is_available():
        return []
    if slurm:
        return ["hardware.slurm: this machine has no accelerator; check it where the job runs, by srun --gpus=1"]
    return ["trainer.args.use_cpu=false, and this machine has no accelerator: choose hardware=cpu or auto"]


@cache
def source(trainer: type) -> str:
    """The text of a trainer's class and of TRL's classes that it extends."""
    return "".join(inspect.getsource(kind) for kind in trainer.__mro__ if kind.__module__.startswith("trl."))


def without_layer(skeleton: Any, peft_config: Any) -> list[str]:
    """Layers that a PEFT config names and this model does not have; PEFT passes over most of them.

    Matched as PEFT matches them: a text as a pattern of the whole name, a list by the ends of names, the keys of
    `rank_pattern` and `alpha_pattern` as patterns of those ends, among the layers that get an adapter.
    """
    layers, head = dict(skeleton.named_modules()), skeleton.get_output_embeddings()
    linear = {name for name, layer in layers.items() if isinstance(layer, torch.nn.Linear)}
    targets = getattr(peft_config, "target_modules", None)
    if targets == "all-linear":
        adapted = {name for name in linear if layers[name] is not head}
    else:
        adapted = {name for name in layers if any(matches(name) for _, matches in matchers(targets))}
    fields: dict[str, tuple[Any, Iterable[str]]] = {
        "target_modules": (None if targets == "all-linear" else targets, layers),
        "exclude_modules": (getattr(peft_config, "exclude_modules", None), layers),
        "modules_to_save": (getattr(peft_config, "modules_to_save", None), layers),
        "rank_pattern": (getattr(peft_config, "rank_pattern", None), adapted),
        "alpha_pattern": (getattr(peft_config, "alpha_pattern", None), adapted),
    }
    beside = ", ".join(sorted({name.split(".")[-1] for name in linear}))
    return [
        f"trainer.peft_config.{field}: {named} matches no layer of this model"
        + (" that gets an adapter" if among is adapted else "")
        + f"; its linear layers are {beside}, and all-linear means all of them but the head"
        for field, (given, among) in fields.items()
        for named, matches in matchers(given)
        if not any(map(matches, among))
    ]


def matchers(given: Any) -> Iterator[tuple[str, Callable[[str], Any]]]:
    """What a field of a PEFT config names, each with the test of a layer's name."""
    if isinstance(given, str):
        yield given, pattern(given).fullmatch
    elif isinstance(given, Mapping):
        yield from ((key, pattern(rf"(.*\.)?({key})$").match) for key in given)
    else:
        yield from ((end, pattern(rf"(.*\.)?{re.escape(end)}").fullmatch) for end in sorted(given or ()))


def pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"trainer.peft_config: {text} is no regular expression, {error}") from error


def without_experts(skeleton: Any, coefficient: float | None) -> list[str]:
    """The weight of a loss that only mixtures of experts have, which TRL says once the model is loaded."""
    if coefficient and not hasattr(skeleton.config.get_text_config(), "output_router_logits"):
        return [f"trainer.args.router_aux_loss_coef={coefficient}: this model has no experts to balance; leave it out"]
    return []


def without_padding(skeleton: Any, trainer: Any) -> bool:
    """Whether a trainer computes no padding. Raises ConfigError where it is told to, and that would not be exact."""
    given, layout = trainer.keywords, getattr(trainer.func, "layout", None)
    if layout is None or given.get(layout) is False:
        return False
    why = trainer.func.inexact(skeleton, given["args"], [*filter(None, [given["peft_config"]])])
    if why and given.get(layout):
        raise ConfigError(f"trainer.{layout}=true: {why}")
    return not why


def without_position(skeleton: Any, longest: int, max_length: int | None) -> list[str]:
    """Rows that are longer than what the model was made for; one without positions, as Mamba, knows no limit."""
    known = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    if known and longest > known:
        return [
            f"trainer.args.max_length={shown(max_length)}: rows have up to {longest:,} tokens, and the model was made "
            f"for {known:,}; set it to that at most"
        ]
    return []


def plan_for_all(args: Any, processes: int) -> None:
    """Has what is planned in one process hold for several: what these do side by side are passes of that one."""
    if not ranks.inside():
        args.gradient_accumulation_steps *= processes


def without_batch(args: Any, rows: int) -> list[str]:
    """Rows that do not make a single batch, where only whole ones are trained on."""
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch and not getattr(args, "packing", False):
        return [
            f"trainer.args.dataloader_drop_last=true: {some(rows, 'row')} to learn from make no batch of {batch}; set "
            "it to false, or lower trainer.args.per_device_train_batch_size"
        ]
    return []


def unmeasured(cfg: DictConfig, found: Preflight) -> list[str]:
    """Metrics that the config names and nothing measures; what is measured is read off TRL's own code."""
    logged = set(re.findall(r'_metrics\[mode\]\["([\w/]+)"\]', source(found.trainer.func)))
    if not logged:
        return []
    measured = {"eval_loss"} | {name for name in (f"eval_{n}" for n in logged) if not name.endswith(NOT_QUALITY)}
    answered = any("answer" in row for row in to_answer(found.data.examples(cfg.evaluation.max_rows), 0))
    best = str(found.args.metric_for_best_model or "eval_loss")
    named = {"objective": (cfg.objective, measured | ({"exact_match"} if answered else set()))}
    named["trainer.args.metric_for_best_model"] = (best if best.startswith("eval_") else f"eval_{best}", measured)
    return [
        f"{key}={value}: not measured here; choose one of {', '.join(sorted(known))}{suggest(value, known)}"
        for key, (value, known) in named.items()
        if value not in known
    ]


def schedule(args: Any, steps: int) -> None:
    """Makes the learning rate's schedule, which refuses here what it would refuse when training begins."""
    from transformers import get_scheduler

    get_scheduler(
        args.lr_scheduler_type,
        optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate),
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )


def compare_with_serving(found: Preflight) -> None:
    """Counts the conversations that read the same in training as in serving, among the first; or adds an error."""
    chat, encoder, data = found.chat, found.encoder, found.data
    rows = [encoder.conversation(row) for split in ("train", "test") for row in data.examples(LOOKED_AT, split)]
    told = [row for row in rows if row and not chat.spelled(row["messages"])]
    wrong = faults(chat.tokenizer, chat.template, told, last_turn_only=encoder.last_turn_only, **chat.variables)
    if wrong:
        raise ConfigError("\n  ".join(["model.chat_template: the chat template is not fit to train with", *wrong]))
    found.compared = len(told)


def remarks(cfg: DictConfig, found: Preflight) -> list[str]:
    """What is odd about a run but does not stop it, besides what becomes of single rows (`report.losses`)."""
    odd, data, args = rules.remarks(resolved(cfg)[0]), found.data, found.args
    if data.repeated_questions:
        many = data.repeated_questions
        odd.append(f"test: {some(many, 'held-out row')} {'asks' if many == 1 else 'ask'} what a training row asks too")
    bias = found.encoder.balance(data.train) if not isinstance(data.train, IterableDataset) else None
    if bias and lopsided(bias):
        odd.append(
            f"train: chosen replies have {bias['chosen_tokens']:.0f} tokens on average, rejected ones "
            f"{bias['rejected_tokens']:.0f}, and {bias['chosen_longer']:.0%} of chosen ones are longer: length alone "
            "tells them apart, and is learned first"
        )
    rows, known = data.lengths.size, budget.steps(max(data.lengths.size, 1), args)
    odd += repeated(cfg, args, rows, known.total * known.effective_batch)
    if 0 < rows < known.effective_batch:
        odd.append(
            f"train: {some(rows, 'row')} to learn from, and a step would see {known.effective_batch}: each epoch is "
            "one step"
        )
    warm_up = args.get_warmup_steps(known.total)
    if warm_up >= known.total and args.lr_scheduler_type != "constant":
        odd.append(
            f"trainer.args.warmup_steps={shown(args.warmup_steps)}: the run ends at step {known.total}, before the "
            "learning rate has risen to what was asked for"
        )
    held_out = data.total("test").kept
    if held_out < FEW:
        odd.append(f"test: {some(held_out, 'row')} held out: what is measured there says little; raise data.test_share")
    return odd


def repeated(cfg: DictConfig, args: Any, rows: int, seen: int) -> list[str]:
    """Whether several processes see rows twice, which accelerate gives them for a last pass that is whole."""
    processes, size = ranks.world(cfg.hardware), args.per_device_train_batch_size
    twice = -rows % (size * processes)
    if processes == 1 or not twice or args.dataloader_drop_last or getattr(args, "packing", False):
        return []
    if seen <= rows - rows % (size * processes):
        return []
    return [
        f"train: {some(rows, 'row')} to learn from, {size} at once in each of {processes} processes: the last pass of "
        f"an epoch sees {some(twice, 'row')} twice; trainer.args.dataloader_drop_last=true leaves "
        f"{rows % (size * processes)} out instead"
    ]


def lopsided(bias: dict[str, float]) -> bool:
    """Whether one side of the pairs is so much longer, or so often, that length alone tells them apart."""
    ratio = bias["chosen_tokens"] / max(bias["rejected_tokens"], 1)
    return not 1 / LONGER < ratio < LONGER or max(bias["chosen_longer"], bias["rejected_longer"]) > OFTEN
