"""Rows that are read while they are trained on: the same pass and the same rule for what is held out, nothing kept."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset

from smoltrain.config import ConfigError
from smoltrain.data.splits import TOO_LONG, Counts, shares

BUFFER = 10_000  # rows that are shuffled at a time
BATCH = 1000  # rows that go through the pass at a time
AHEAD = 1000  # rows read at a time in search of those that are held out
SCANNED = 200_000  # and at most
ONE_AT_A_TIME = threading.Lock()  # streams that are mixed are read in threads, a compiled template prints one row


class UnfitRow(RuntimeError):
    """A row that stops a run which is training already: the run has failed, whatever it learned before."""


@dataclass
class Flow:
    """What `IterableDataset.map` calls on batches of raw rows: returns those to learn from, and counts all of them.

    Each is counted when it is first read, however often the stream is. `is_held_out` is a mask over the passed rows,
    `tested` has the identities of rows that are held out: those given beside a stream may stand in it too.
    Raises UnfitRow at a row that cannot be read, where `refuse`, and at one too long, where this is to be an error.
    """

    worker: Any
    is_held_out: Callable[[pa.Table], np.ndarray]
    tested: np.ndarray
    refuse: bool
    where: Callable[[int], str]
    counts: Counts = field(default_factory=Counts)
    read: int = 0

    def __deepcopy__(self, memo: dict) -> "Flow":
        return self  # `datasets` copies the streams that it mixes, and the counts are kept here

    def __call__(self, batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        with ONE_AT_A_TIME:
            rows = self.worker.over(as_rows(batch))
        rows = rows.append_column("number", pa.array(numbers))
        rows = rows.filter(pa.array(~self.is_held_out(rows)))
        for row in rows.select(["number", "reason", "detail", "whole"]).to_pylist():
            self.raise_if_unfit(**row)
        self.count(rows.filter(pc.greater_equal(rows["number"], self.read)))
        self.read = max(self.read, numbers[-1] + 1)
        kept = rows.filter(pc.is_null(rows["reason"])).select(self.names).to_pydict()
        # What the raw rows bring is not left out by name: a later row may bring more.
        return dict.fromkeys(batch, [None] * len(kept[self.names[0]])) | kept

    def raise_if_unfit(self, number: int, reason: str | None, detail: str | None, whole: int | None) -> None:
        if detail and self.refuse:
            raise UnfitRow(f"{self.where(number)}: {detail}; mend it, or set data.on_bad_row=drop")
        if reason == TOO_LONG and self.worker.on_too_long == "error":
            raise UnfitRow(
                f"{self.where(number)}: {whole:,} tokens, longer than trainer.args.max_length="
                f"{self.worker.max_length}; raise it, or set data.on_too_long=truncate or drop"
            )

    def count(self, rows: pa.Table) -> None:
        kept = rows.filter(pc.is_null(rows["reason"]))
        self.counts.given += len(rows)
        self.counts.kept += len(kept)
        self.counts.dropped.update(rows["reason"].drop_null().to_pylist())
        self.counts.remarks.update(r for said in kept["remarks"].drop_null().to_pylist() for r in said.split("; "))
        self.counts.cut += total(kept["cut"])
        self.counts.tokens += total(kept["tokens"])
        self.counts.trained += total(kept["trained"])
        self.counts.lost += total(rows["lost"])
        self.counts.held_out_too += int(np.isin(kept["identity"].to_numpy(), self.tested).sum())

    @property
    def names(self) -> list[str]:
        return list(self.worker.encoder.columns(self.worker.shape.kind))

    def over(self, rows: IterableDataset) -> IterableDataset:
        """The stream of rows to learn from, in their own order."""
        types = pa.schema(list(self.worker.encoder.columns(self.worker.shape.kind).items()))
        flowing = rows.map(self, batched=True, with_indices=True, batch_size=BATCH).select_columns(self.names)
        return flowing.cast(Features.from_arrow_schema(types))


def as_rows(batch: dict[str, list]) -> list[dict]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def total(column: pa.ChunkedArray) -> int:
    return pc.sum(column).as_py() or 0


def by_share(test_share: float, seed: int) -> Callable[[pa.Table], np.ndarray]:
    """Which rows are held out, by their content; one that cannot be read is none of them."""

    def is_held_out(rows: pa.Table) -> np.ndarray:
        identities = pc.fill_null(rows["identity"], 0).to_numpy()
        return (shares(identities, seed) < test_share) & pc.is_null(rows["detail"]).to_numpy()

    return is_held_out


def nothing(rows: pa.Table) -> np.ndarray:
    return np.zeros(len(rows), dtype=bool)


def first_rows(rows: IterableDataset, count: int) -> Dataset:
    """The beginning of a stream, in memory."""
    return in_memory(list(rows.take(count)), rows)


def in_memory(read: list[dict], rows: IterableDataset) -> Dataset:
    return Dataset.from_list(read, features=rows.features, on_mixed_types="use_json")


def held_out_rows(
    rows: IterableDataset, worker: Any, is_held_out: Callable[[pa.Table], np.ndarray], wanted: int
) -> tuple[Dataset, np.ndarray]:
    """The raw rows at the beginning of a stream that are held out, and their numbers: `wanted` of them that fit."""
    found: list[dict] = []
    numbers: list[int] = []
    fit = 0
    for start, batch in enumerate(rows.iter(AHEAD)):
        raw = as_rows(batch)
        passed = worker.over(raw)
        whole = pc.is_null(passed["reason"]).to_numpy()
        for i in np.flatnonzero(is_held_out(passed)):
            if fit < wanted:
                found.append(raw[i])
                numbers.append(start * AHEAD + int(i))
                fit += whole[i]
        if fit >= wanted or (start + 1) * AHEAD >= SCANNED:
            break
    if not fit:
        raise ConfigError("data.test_share: no row at the beginning of the stream is held out; raise the share")
    return in_memory(found, rows), np.array(numbers)
