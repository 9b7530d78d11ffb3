"""Data: where rows come from (`sources`, `sums`), their shapes (`formats`), what a trainer may ask of them."""

import hashlib
from typing import TYPE_CHECKING

from smoltrain.config import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def require_columns(data: "DatasetDict", expects: list[list[str]], trainer: str) -> None:
    """Raises ConfigError unless the rows have every column of one of the sets that the trainer eats."""
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


def question(row: dict) -> list[dict]:
    """The messages that a held-out reply answers: a conversation without its last turn, or a pair's prompt."""
    return row["prompt"] if "prompt" in row else row["messages"][:-1]
