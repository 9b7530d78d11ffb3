"""How good a model is on rows it has not seen: TRL's held-out loss, and exact match by generation."""

from typing import TYPE_CHECKING

from smoltrain.data import question

if TYPE_CHECKING:
    from datasets import Dataset

NOT_QUALITY = ("_per_second", "_runtime", "_time", "_num_tokens", "epoch")  # endings of what Trainer reports besides


def evaluate(trainer, rows: "Dataset", max_rows: int, max_new_tokens: int) -> tuple[dict[str, float], list[str]]:
    """Metrics of the model as it stands, in TRL's names, and its replies to the first `max_rows` rows.

    `exact_match` is there where the rows have an `answer`: the share of greedy replies equal to it. Both kinds are
    also logged, so that every tracker shows them at the step they were measured.
    """
    metrics = {k: v for k, v in trainer.evaluate().items() if not k.endswith(NOT_QUALITY)}
    if "answer" not in rows.column_names or max_rows == 0:
        return metrics, []
    size = trainer.args.per_device_eval_batch_size
    rows = rows.select(range(min(max_rows, len(rows))))
    said = replies(trainer.model, trainer.processing_class, [question(row) for row in rows], max_new_tokens, size)
    right = sum(reply == answer for reply, answer in zip(said, rows["answer"], strict=True))
    metrics["exact_match"] = right / len(rows)
    trainer.log({"eval_exact_match": metrics["exact_match"]})
    return metrics, said


def replies(model, tokenizer, conversations: list[list[dict]], max_new_tokens: int, batch_size: int) -> list[str]:
    """The model's greedy reply to each conversation, decoded up to its end of turn, without surrounding space."""
    import torch

    said = []
    model.eval()
    for start in range(0, len(conversations), batch_size):
        inputs = tokenizer.apply_chat_template(
            conversations[start : start + batch_size],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            tokenizer_kwargs={"padding_side": "left"},
        ).to(model.device)
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        said += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in said]
