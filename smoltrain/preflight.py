"""What every run begins with, before a weight is loaded: its parts, its rows as tokens, and all that would stop it."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from datasets import IterableDataset
from hydra.utils import instantiate
from omegaconf import DictConfig

from smoltrain import budget
from smoltrain.config import ConfigError, plain, refusing, suggest
from smoltrain.data.encode import Chat
from smoltrain.data.splits import FEW
from smoltrain.data.templates import faults
from smoltrain.evaluate import NOT_QUALITY, to_answer
from smoltrain.report import some

LOOKED_AT = 20  # rows of each split whose training text is compared with their serving text
LONGER = 1.2  # chosen replies so many times as long as rejected ones teach length
OFTEN = 0.75  # and so do pairs of which this share has the same side longer


@dataclass
class Preflight:
    """The parts of a run before any weight is loaded, as far as they could be made, and what would stop it.

    `skeleton` is the model without weights. `compared` conversations read the same in training as in serving.
    """

    errors: list[str] = field(default_factory=list)
    checkpoint: Any = None
    chat: Any = None
    skeleton: Any = None
    encoder: Any = None
    trainer: Any = None
    data: Any = None
    streamed: bool = False
    compared: int = 0

    @property
    def fit(self) -> bool:
        return not self.errors

    @property
    def args(self) -> Any:
        return self.trainer.keywords["args"]

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


def preflight(cfg: DictConfig, sample: int | None = None) -> Preflight:
    """Makes what a run needs before its model, and looks for what would stop it; of a stream, in its first rows.

    Of data that is streamed, the first `sample` rows are then all there is.
    """
    found = Preflight()
    with found.part("model"):
        found.checkpoint = instantiate(cfg.model)
        found.chat = Chat(found.checkpoint.tokenizer(), found.checkpoint.chat_template_kwargs or {})
        found.errors += unread_variables(found.chat)
        found.skeleton = found.checkpoint.skeleton(found.chat.tokenizer)
    with found.part("encode"):
        found.encoder = instantiate(cfg.encode)
    with found.part("trainer"):
        found.errors += misnamed(plain(cfg.trainer.args)) + without_device(cfg.trainer.args.use_cpu)
        if not any(error.startswith("trainer.args.") for error in found.errors):
            found.trainer = instantiate(cfg.trainer)
            found.errors += unknown_loss(found.trainer.func, found.args)
            found.errors += without_metric(found.args) + without_limit(found.args)
            if found.encoder is not None:
                found.encoder.feed(found.trainer)
    if found.skeleton is not None and found.trainer is not None:
        found.errors += without_target(found.skeleton, found.trainer.keywords["peft_config"])
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
    if found.data is not None and found.trainer is not None:
        rows = found.data.lengths.size
        found.errors += unmeasured(cfg, found) + ([] if found.streamed else without_batch(found.args, rows))
        with found.part("trainer.args.lr_scheduler_type"):
            schedule(found.args, budget.steps(max(rows, 1), found.args).total)
    return found


def misnamed(args: dict[str, Any]) -> list[str]:
    """The fields of `trainer.args` that name something which transformers does not have."""
    from transformers import TrainingArguments
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    kinds: dict[str, Any] = {
        "lr_scheduler_type": SchedulerType,
        "optim": OptimizerNames,
        "eval_strategy": IntervalStrategy,
    }
    kinds |= {"logging_strategy": IntervalStrategy, "save_strategy": SaveStrategy}
    problems = []
    choices = {key: [str(name.value) for name in kind] for key, kind in kinds.items()}
    choices |= {f.name: f.metadata["choices"] for f in fields(TrainingArguments) if f.metadata.get("choices")}
    for key, known in choices.items():
        if isinstance(given := args.get(key), str) and given not in known:
            problems.append(f"trainer.args.{key}={given}: choose one of {', '.join(known)}{suggest(given, known)}")
    return problems


def unread_variables(chat: Chat) -> list[str]:
    """Variables that the chat template never reads: a typo in one would otherwise train another text than was asked."""
    return [
        f"model.chat_template_kwargs: the chat template reads no variable {name}"
        for name in chat.variables
        if not re.search(rf"\b{re.escape(name)}\b", chat.template)
    ]


def without_device(use_cpu: bool) -> list[str]:
    if use_cpu or torch.accelerator.is_available():
        return []
    return ["trainer.args.use_cpu=false, and this machine has no accelerator: choose hardware=cpu or auto"]


def source(trainer: type) -> str:
    """The text of a trainer's class and of TRL's classes that it extends."""
    return "".join(inspect.getsource(kind) for kind in trainer.__mro__ if kind.__module__.startswith("trl."))


def unknown_loss(trainer: type, args: Any) -> list[str]:
    """A loss that TRL would only miss once the model is loaded; the names are those that its own code compares with."""
    losses = getattr(args, "loss_type", None) or []
    text = source(trainer)
    known = set(re.findall(r'loss_type == "(\w+)"', text))
    for group in re.findall(r"loss_type (?:not )?in [\[({]([^\])}]*)[\])}]", text):
        known |= set(re.findall(r'"(\w+)"', group))
    unknown = [loss for loss in ([losses] if isinstance(losses, str) else losses) if known and loss not in known]
    return [
        f"trainer.args.loss_type={loss}: {trainer.__name__} knows {', '.join(sorted(known))}{suggest(loss, known)}"
        for loss in unknown
    ]


def without_metric(args: Any) -> list[str]:
    """What transformers refuses once the model is loaded: to keep the best of what is never compared."""
    if args.save_strategy == "best" and args.metric_for_best_model is None:
        return ["trainer.args.save_strategy=best: set trainer.args.metric_for_best_model too, e.g. to eval_loss"]
    return []


def without_limit(args: Any) -> list[str]:
    """What TRL refuses once the model is loaded: to pack rows into nothing."""
    if getattr(args, "packing", False) and args.max_length is None:
        return ["trainer.args.max_length=null: packing fills rows up to it; set it, or trainer.args.packing=false"]
    return []


def without_target(skeleton: Any, peft_config: Any) -> list[str]:
    """LoRA targets that match no layer of the model. PEFT itself says so only where none of them matches one."""
    targets = getattr(peft_config, "target_modules", None)
    if targets is None or targets == "all-linear":
        return []
    layers = [name for name, _ in skeleton.named_modules()]
    if isinstance(targets, str):
        lacking = [] if any(re.fullmatch(targets, name) for name in layers) else [targets]
    else:
        lacking = sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in layers))
    linear = {name.split(".")[-1] for name, layer in skeleton.named_modules() if isinstance(layer, torch.nn.Linear)}
    return [
        f"trainer.peft_config.target_modules: {target} matches no layer of this model; its linear layers are "
        f"{', '.join(sorted(linear))}, and all-linear means all of them but the head"
        for target in lacking
    ]


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


def remarks(found: Preflight) -> list[str]:
    """What is odd about a run but does not stop it, besides what becomes of single rows (`report.losses`)."""
    odd, data, args = [], found.data, found.args
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
    rows, batch = data.lengths.size, budget.steps(1, args).effective_batch
    if 0 < rows < batch:
        odd.append(f"train: {some(rows, 'row')} to learn from, and a step would see {batch}: each epoch is one step")
    held_out = data.total("test").kept
    if held_out < FEW:
        odd.append(f"test: {some(held_out, 'row')} held out: what is measured there says little; raise data.test_share")
    longest = data.lengths.max(initial=0)
    # Models without positions, as Mamba, know no limit.
    known = getattr(found.skeleton.config.get_text_config(), "max_position_embeddings", None)
    if known and longest > known:
        odd.append(
            f"train: rows have up to {longest:,} tokens, and the model was made for {known:,}; lower "
            f"trainer.args.max_length={args.max_length}"
        )
    return odd


def lopsided(bias: dict[str, float]) -> bool:
    """Whether one side of the pairs is so much longer, or so often, that length alone tells them apart."""
    ratio = bias["chosen_tokens"] / max(bias["rejected_tokens"], 1)
    return not 1 / LONGER < ratio < LONGER or max(bias["chosen_longer"], bias["rejected_longer"]) > OFTEN
