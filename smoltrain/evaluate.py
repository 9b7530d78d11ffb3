"""How good a model is on rows it has not seen: TRL's held-out loss, and exact match by generation."""

from collections.abc import Callable

from smoltrain.data.tokens import question
from smoltrain.runs import CLOCK

NOT_QUALITY = (*CLOCK, "_num_tokens", "epoch")  # endings of what Trainer reports besides


def evaluate(trainer, chat, rows: list[dict], max_new_tokens: int) -> tuple[dict[str, float], list[str]]:
    """Metrics of the model as it stands, in TRL's names, and its greedy replies to held-out rows.

    `exact_match` is there where the rows have an `answer`: the share of replies equal to it. Both kinds are also
    logged, so that every tracker shows them at the step they were measured.
    """
    metrics = {k: v for k, v in trainer.evaluate().items() if not k.endswith(NOT_QUALITY)}
    size = trainer.args.per_device_eval_batch_size
    together = trainer.together
    with trainer.answering():
        said = of_all(trainer, rows, lambda own: replies(trainer.model, chat, own, max_new_tokens, size, together))
    if rows and "answer" in rows[0]:
        metrics["exact_match"] = sum(reply == row["answer"] for reply, row in zip(said, rows, strict=True)) / len(rows)
        trainer.log({"eval_exact_match": metrics["exact_match"]})
    return metrics, said


def of_all(trainer, rows: list[dict], answer: Callable[[list[dict]], list[str]]) -> list[str]:
    """The replies to all rows, of which each process of a run answers a share, where it has all weights."""
    from accelerate.utils import gather_object

    if trainer.together or trainer.accelerator.num_processes == 1:
        return answer(rows)
    own = -(-len(rows) // trainer.accelerator.num_processes)
    start = own * trainer.accelerator.process_index
    gathered: list[str] = gather_object(answer(rows[start : start + own]))
    return gathered


def to_answer(rows: list[dict], samples: int) -> list[dict]:
    """The rows that are answered by generation: all that have an `answer` to compare with, else a few to look at."""
    asked = [row for row in rows if question(row)]
    return [row for row in asked if "answer" in row] or asked[:samples]


def replies(model, chat, rows: list[dict], max_new_tokens: int, batch_size: int, together: bool = False) -> list[str]:
    """The model's greedy reply to what each row asks, its tools on offer, up to the end of turn and stripped."""
    import torch

    said, tokenizer = [], chat.tokenizer
    texts = chat.prompts([row | {"prompt": question(row)} for row in rows])
    model.eval()
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(
            texts[start : start + batch_size],
            add_special_tokens=False,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        ).to(model.device)
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, synced_gpus=together)
        said += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    tokenizer.backend_tokenizer.no_padding()  # it keeps what it was last told, and is written beside the weights
    return [reply.strip() for reply in said]
