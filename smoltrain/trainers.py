"""What TRL's trainers lack: taking rows that are tokens already, telling how a step went, weighing what is learned."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import optimizer as accelerated
from accelerate.utils import other
from transformers.trainer_pt_utils import LengthGroupedSampler

from smoltrain import fsdp, zero
from smoltrain.config import ConfigError
from smoltrain.data.cache import alone

# It looks through all folders of packages for an optimizer that few have, twice in each step.
accelerated.is_lomo_available = cache(accelerated.is_lomo_available)
# To know whether a model is one of DeepSpeed's it would import DeepSpeed, which takes 3 seconds, in every run.
other.is_deepspeed_available = lambda: "deepspeed" in sys.modules


def given_tokens(trainer: partial) -> partial:
    """The same trainer without the step that turns rows into tokens, which is done, counted and cached by then.

    TRL offers no such switch for DPO; its SFTTrainer has one, and would go twice more through all rows. Raises
    ConfigError where rows are to be cut at their beginning, for they have been cut at their end.
    """
    if trainer.keywords["args"].truncation_mode != "keep_start":
        raise ConfigError(
            f"trainer.args.truncation_mode={trainer.keywords['args'].truncation_mode}: rows are cut at their end "
            "(keep_start); data.on_too_long=drop leaves those that are too long out"
        )

    class Given(trainer.func):  # type: ignore[name-defined]
        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any) -> Any:
            if rest[0] is True:  # `packing`, which only SFTTrainer passes: TRL packs rows that are tokens too
                if args.world_size > 1:  # TRL lets one of them pack for all, and the others wait within
                    return super()._prepare_dataset(dataset, processing_class, args, *rest)
                with alone(f"packed-{dataset._fingerprint}-{args.max_length}", "packing the same rows"):
                    return super()._prepare_dataset(dataset, processing_class, args, *rest)
            return dataset.shuffle(seed=args.seed) if getattr(args, "shuffle_dataset", False) else dataset

        def _get_train_sampler(self, *dataset: Any) -> Any:
            sampler = super()._get_train_sampler(*dataset)
            return Grouped(sampler, self.args) if isinstance(sampler, LengthGroupedSampler) else sampler

    Given.__name__ = Given.__qualname__ = trainer.func.__name__
    return partial(Given, *trainer.args, **trainer.keywords)


def watched(trainer: partial) -> partial:
    """The same trainer, which tells what the step under way has come to, and resumes no further than it should.

    Upstream hands `step_loss` and `step_grad_norm` to no callback, and logs them only every `logging_steps`; to look at
    them then would let a run that has diverged go on until there. Resumed from the last step of a run, or from the one
    that early stopping chose (`ended`), it would take one more step.
    """

    class Watched(trainer.func):  # type: ignore[name-defined]
        step_loss: Any = None
        step_grad_norm: Any = None
        ended = False
        flops_a_token: int | None = None
        before_best: Callable[[Path], None]
        sharing: Any = None  # what shares out weights among processes; None: each has them all

        @property
        def together(self) -> bool:
            """Whether no process has all weights when it answers, so that each token takes all of them."""
            return self.sharing is fsdp

        def answering(self) -> AbstractContextManager[None]:
            """Makes ready for answering rows, within."""
            return zero.whole(self) if self.sharing is zero else nullcontext()

        def _prepare_input(self, data: Any) -> Any:
            # For DeepSpeed upstream rounds a reference's scores and the weights of tokens as it does weights.
            if self.sharing is zero and isinstance(data, torch.Tensor):
                return data.to(self.args.device)
            return super()._prepare_input(data)

        def create_accelerator_and_postprocess(self) -> None:
            if self.args.ddp_find_unused_parameters is None:
                # Only of a mixture of experts a step leaves weights out; upstream looks for them at each step of any.
                experts = hasattr(self.model.config.get_text_config(), "output_router_logits")
                self.args.ddp_find_unused_parameters = experts
            self.sharing = fsdp if self.args.fsdp else zero if self.args.deepspeed else None
            if self.sharing:
                self.sharing.settle(self.args)
            super().create_accelerator_and_postprocess()
            found = fsdp if self.is_fsdp_enabled else zero if self.is_deepspeed_enabled else None
            assert found is self.sharing, "weights are not shared out"
            if self.sharing is zero:  # else accelerate says that it does not know of them
                self.accelerator.gradient_accumulation_steps = self.args.gradient_accumulation_steps

        def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
            if self.ended or self.state.global_step >= self.state.max_steps:
                self.control.should_training_stop = True
            else:
                super()._run_epoch(*args, **kwargs)

        def _wrap_model(self, model: Any, training: bool = True, **kwargs: Any) -> Any:
            if training and self.accelerator.num_processes > 1:
                # An evaluation before training marks it as prepared: accelerate would leave it as it is, and each
                # process would learn for itself.
                model._is_accelerate_prepared = False
            return super()._wrap_model(model, training=training, **kwargs)

        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            if not self.sharing:
                return super().evaluation_loop(*args, **kwargs)
            with self.sharing.shared_out(self):
                return super().evaluation_loop(*args, **kwargs)

        def _prepare_for_training(self, max_steps: int, rows: Any, checkpoint: str | None) -> Any:
            if not self.sharing:
                return super()._prepare_for_training(max_steps, rows, checkpoint)
            with self.sharing.shared_out(self):
                prepared = super()._prepare_for_training(max_steps, rows, None)
            if checkpoint is not None:
                self._load_from_checkpoint(checkpoint)
                self._load_optimizer_and_scheduler(checkpoint)
                self._load_scaler(checkpoint)
            return prepared

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            if self.sharing is not zero:
                super().save_model(output_dir, _internal_call)
            else:  # upstream saves an adapter as it was rounded, and nothing where something is wrong
                state_dict = zero.state_dict(self)
                if self.args.should_save:
                    self._save(output_dir, state_dict=state_dict)

        def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            if state_dict is not None:  # gathered from where it is shared out: what is tied is in it twice
                tied = self.model.all_tied_weights_keys
                state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
            super()._save(output_dir, state_dict)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            if self.sharing:
                self.sharing.save_optimizer(self, output_dir)
            else:
                super()._save_optimizer_and_scheduler(output_dir)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if self.sharing and checkpoint is not None:
                self.sharing.load_optimizer(self, checkpoint)
            else:
                super()._load_optimizer_and_scheduler(checkpoint)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            if self.sharing:
                self._issue_warnings_after_load(self.sharing.load_weights(self, Path(resume_from_checkpoint)))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

        def _issue_warnings_after_load(self, loaded: Any) -> None:
            tied = set(self.model.all_tied_weights_keys)  # which one file holds once
            if wrong := (set(loaded.missing_keys) - tied) | set(loaded.unexpected_keys):
                raise RuntimeError(
                    f"the weights of the checkpoint are not those of the model: {', '.join(sorted(wrong))}"
                )

        def _load_best_model(self) -> None:
            self.before_best(Path(self.state.best_model_checkpoint))
            if self.sharing:
                self._issue_warnings_after_load(self.sharing.load_weights(self, Path(self.state.best_model_checkpoint)))
            else:
                super()._load_best_model()

        def floating_point_ops(self, inputs: Any) -> int:
            if self.flops_a_token is None:  # upstream counts all weights again at each step
                self.flops_a_token = super().floating_point_ops({"input_ids": torch.empty(1)})
            return self.flops_a_token * inputs["input_ids"].numel() if "input_ids" in inputs else 0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.step_loss = loss if self.step_loss is None else self.step_loss + loss
            return loss

        def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
            self.step_grad_norm = super()._get_grad_norm(*args, **kwargs)
            return self.step_grad_norm

    Watched.__name__ = Watched.__qualname__ = trainer.func.__name__
    return partial(Watched, *trainer.args, **trainer.keywords)


class Grouped(LengthGroupedSampler):
    """Rows grouped by length, with a generator of their own that each epoch seeds anew, as accelerate's random rows.

    From torch's own generator an epoch that is resumed would draw another order: some rows twice, others never.
    """

    def __init__(self, sampler: LengthGroupedSampler, args: Any) -> None:
        super().__init__(sampler.batch_size, lengths=sampler.lengths, generator=torch.Generator())
        self.seed = args.seed if args.data_seed is None else args.data_seed

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


def weighing(trainer: partial) -> partial:
    """An SFTTrainer that multiplies the log-probability of each token by its `loss_weights`.

    What leaves none to weigh, or puts tokens of other rows beside it, is refused by `config.rules`.
    """
    given = given_tokens(trainer)

    class Weighing(given.func):  # type: ignore[name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.data_collator = partial(with_weights, self.data_collator)  # type: ignore[has-type]

        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*dict.fromkeys([*self._signature_columns, "loss_weights"])]  # type: ignore[has-type]

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            weights = inputs.pop("loss_weights")

            def weighed(**given: Any) -> Any:
                outputs = model(**given)
                if given.get("fused_lm_head"):  # else TRL wants the logits, after the loss
                    outputs.log_probs = outputs.log_probs * weights[:, 1:]  # nothing predicts the first token
                return outputs

            return super().compute_loss(weighed, inputs, *args, **kwargs)

    Weighing.__name__ = Weighing.__qualname__ = trainer.func.__name__
    return partial(Weighing, *given.args, **given.keywords)


def with_weights(collate: Callable[[list[dict]], dict], rows: list[dict]) -> dict:
    """A batch with the weights of its tokens, 0 where it is padded."""
    batch = collate(rows)
    weights = torch.zeros(batch["labels"].shape)
    for padded, row in zip(weights, rows, strict=True):
        padded[: len(row["loss_weights"])] = torch.tensor(row["loss_weights"])
    return batch | {"loss_weights": weights}
