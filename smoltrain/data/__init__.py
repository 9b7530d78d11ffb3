"""Data: where rows come from (`sources`, `sums`), their shapes (`formats`), what a trainer may ask of them."""

import hashlib
from typing import TYPE_CHECKING

from smoltrain.config import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def require_columns(data: "DatasetDict", expects: list[list[str]], trainer: str) -> None:
    """Raises ConfigError unless the rows have every column of one of the sets that the trainer eats."""
    for split, rows in data.items():
        if len(rows) == 0:
            raise ConfigError(f"data: there is no row to {split}")
    found = data["train"].column_names
    if not any(set(columns) <= set(found) for columns in expects):
        wanted = " or ".join(", ".join(columns) for columns in expects)
        missing = ", ".join(column for column in expects[0] if column not in found)
        raise ConfigError(
            f"{trainer} eats rows with {wanted}; data has {', '.join(found)} and lacks {missing}. "
            "Choose other data= or another trainer="
        )


def fingerprint(rows: "Dataset") -> str:
    """A hash of the rows' content, the same on every machine and however the rows came to be here."""
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()[:16]


def counts(given: "Dataset", prepared: "Dataset", max_length: int | None) -> dict[str, int | None]:
    """How many rows a trainer was given, how many it dropped, how many of the rest reach `max_length`, and tokens.

    TRL cuts longer rows, and drops those of which nothing is left to train on, without a word. Packed by
    `wrapped`, rows cannot be told apart any more: dropped and cut are then None.
    """
    import pyarrow.compute as pc

    table = prepared.with_format("arrow")[:]
    if "seq_lengths" in table.column_names:  # packed: several rows in one
        lengths = pc.list_flatten(table["seq_lengths"])
    else:
        ids = {name: pc.list_value_length(table[name]) for name in table.column_names if name.endswith("_ids")}
        prompt = ids.pop("prompt_ids", None)
        longest = pc.max_element_wise(*ids.values())
        lengths = longest if prompt is None else pc.add(prompt, longest)
    tokens = pc.sum(lengths).as_py() or 0
    if "seq_lengths" not in table.column_names and not set(given.column_names) & set(prepared.column_names):
        return {"given": len(given), "dropped": None, "cut": None, "tokens": tokens}
    cut = 0 if max_length is None else pc.sum(pc.greater_equal(lengths, max_length)).as_py() or 0
    return {"given": len(given), "dropped": len(given) - len(lengths), "cut": cut, "tokens": tokens}


def question(row: dict) -> list[dict]:
    """The messages that a held-out reply answers: a conversation without its last turn, or a pair's prompt."""
    return row["prompt"] if "prompt" in row else row["messages"][:-1]
