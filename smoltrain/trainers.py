"""What TRL's trainers lack: taking rows that are tokens already, and weighing what is learned."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from smoltrain.config import ConfigError


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
                return super()._prepare_dataset(dataset, processing_class, args, *rest)
            return dataset.shuffle(seed=args.seed) if getattr(args, "shuffle_dataset", False) else dataset

    Given.__name__ = Given.__qualname__ = trainer.func.__name__
    return partial(Given, *trainer.args, **trainer.keywords)


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
