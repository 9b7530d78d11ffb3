"""From sources to what a trainer is given: the pass over each of them (`tokens`), then splits and mixtures."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from smoltrain.config import ConfigError, suggest
from smoltrain.data.encode import Chat, Encoder
from smoltrain.data.formats import Shape, recognise
from smoltrain.data.messages import RowError
from smoltrain.data.sources import Source
from smoltrain.data.splits import (
    TOO_LONG,
    Counts,
    Part,
    Row,
    Side,
    Sides,
    count,
    divide,
    enough,
    fingerprint,
    fingerprints,
    hold_out,
    identities,
    in_order,
    leave_out_repeated,
    raise_if_empty,
    repeated_questions,
    together,
)
from smoltrain.data.streams import Flow, by_share, first_rows, held_out_rows, nothing
from smoltrain.data.tokens import Pass, cache_key, passed

LOOKED_AT = 100  # rows read to recognise a shape, and to find the commonest faults before the long pass
SHOWN = 3  # examples in a message


class Handling(TypedDict):
    """What becomes of the rows, whatever source they come from."""

    test_share: float
    on_too_long: Literal["truncate", "drop", "error"]
    on_bad_row: Literal["error", "drop"]
    on_duplicate: Literal["keep", "drop"]
    system_prompt: str | None
    workers: int | None


class Preparation(Handling):
    """The keys that conf/config.yaml gives to `data`; a source of a mixture has none of its own."""

    test_rows: int
    seed: int


@dataclass
class Origin:
    """A source, which of its rows are taken, and how its columns are to be read."""

    source: Source
    format: str | None = None
    columns: dict[str, str] | None = None
    keep_where: dict[str, Any] | None = None
    drop_where: str | None = None
    max_rows: int | None = None

    def chosen(self, rows: Dataset) -> tuple[Dataset, np.ndarray]:
        """The rows that the filters and the cap leave, and their numbers in the source."""
        keep = np.full(len(rows), True)
        for column, value in (self.keep_where or {}).items():
            cells = self.column(rows, column)
            try:
                wanted = pa.array(value if isinstance(value, list) else [value], cells.type)
                keep &= pc.is_in(cells, wanted).to_numpy()
            except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
                raise ConfigError(f"data.keep_where: {column}={value}, and the column is {cells.type}") from error
        if self.drop_where:
            cells = self.column(rows, self.drop_where)
            try:
                keep &= ~pc.fill_null(pc.cast(cells, pa.bool_()), False).to_numpy()
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise ConfigError(f"data.drop_where={self.drop_where}: the column has to be true or false") from error
        numbers = np.flatnonzero(keep)[: self.max_rows]
        if not len(numbers):
            raise ConfigError(f"data: keep_where, drop_where and max_rows leave no row of {self.source.name}")
        return (rows if len(numbers) == len(rows) else rows.select(numbers)), numbers

    def column(self, rows: Dataset, name: str) -> pa.ChunkedArray:
        if name not in rows.column_names:
            close, there = suggest(name, rows.column_names), ", ".join(rows.column_names)
            raise ConfigError(f"data: {self.source.name} has no column {name} to choose rows by{close}; it has {there}")
        return rows.select_columns(name).with_format("arrow")[:][name]


@dataclass
class Prepared:
    """Rows as a trainer takes them, training and held out, and all that is to be said of them.

    `lengths` are the tokens of each training row. `counts` and `sides` are by source, then "train" and "test";
    `repeated_questions` of the held-out rows ask what a training row asks too. Of each source an epoch draws `drawn`
    rows, those of a stream nobody knows: with weights more or fewer than are kept. `order` has the number of each
    training row among those that are kept, one source after the other, and `where` what `Source.where` says of them.
    """

    train: Dataset
    test: Dataset
    lengths: np.ndarray
    sides: Sides
    counts: dict[str, dict[str, Counts]]
    held_out: list[Row]
    fingerprints: dict[str, str]
    repeated_questions: int
    drawn: dict[str, int]
    order: np.ndarray
    where: dict[str, Callable[[str, int], str]]

    def total(self, split: str) -> Counts:
        return sum((counts[split] for counts in self.counts.values()), Counts())

    def origin(self, row: int) -> tuple[str, str]:
        """The source of a training row, and where it stands there: ("my", "my.jsonl line 18")."""
        kept = {name: splits["train"].kept for name, splits in self.sides.items()}
        ends = np.cumsum([len(numbers) for numbers in kept.values()])
        source = int(np.searchsorted(ends, self.order[row], "right"))
        name = list(kept)[source]
        number = kept[name][self.order[row] - ends[source]]  # from the end
        return name, self.where[name]("train", int(self.sides[name]["train"].part.numbers[number]))

    def shape(self, source: str) -> Shape:
        return self.sides[source]["test"].part.worker.shape

    def unread(self, source: str) -> list[str]:
        """The columns of a source that its shape does not use."""
        part = self.sides[source]["test"].part
        return part.worker.shape.unread(part.raw.column_names)

    def examples(self, rows: int, split: str = "test") -> list[dict]:
        """The first rows of a split in canonical form, held-out ones in the order of `test`."""
        chosen = self.held_out[:rows]
        if split == "train":
            read = {name: sides["train"].kept[:rows] for name, sides in self.sides.items() if "train" in sides}
            chosen = [(name, int(i)) for name, numbers in read.items() for i in numbers]
        parts = {name: sides[split].part for name, sides in self.sides.items() if split in sides}
        return [parts[name].worker.read(parts[name].raw[number]) for name, number in chosen]


@dataclass
class Data:
    """Sources of rows, and what becomes of them: the object that `cfg.data` describes."""

    origins: dict[str, Origin]
    preparation: Preparation
    weights: dict[str, float] | None = None
    stopping_strategy: str = "all_exhausted"

    def prepare(self, encoder: Encoder, chat: Chat, max_length: int | None, sample: int | None = None) -> Prepared:
        """Reads, renders and tokenises every row once (or finds that done in the cache), splits, mixes and counts.

        A stream is prepared while it is read; with `sample`, its first rows stand for it. Raises ConfigError for rows
        that cannot be read, that are too long where this is an error, or where no row is left.
        """
        how = self.preparation
        self.refuse_unfit_mixture()
        streamed = [isinstance(origin.source.train, IterableDataset) for origin in self.origins.values()]
        if any(streamed):
            self.refuse_unfit_stream(how)
        for origin in self.origins.values():
            source = origin.source
            if sample is not None and isinstance(source.train, IterableDataset):
                source.train = first_rows(source.train, min(sample, origin.max_rows or sample))
                source.test = source.test and first_rows(source.test, how["test_rows"])
        if any(streamed) and sample is None:
            return self.flowing(encoder, chat, max_length, how)
        sides = {
            name: divide(self.parts(origin, encoder, chat, max_length, how), how["test_share"], how["seed"])
            for name, origin in self.origins.items()
        }
        columns = same_columns(encoder, {name: splits["train"].part.worker.shape for name, splits in sides.items()})
        leave_out_repeated(sides, "test", how["on_duplicate"] == "drop")
        held_out = hold_out(sides, how["test_rows"], how["seed"])
        counts = count(sides, held_out, how["on_duplicate"] == "drop")
        raise_if_empty(counts, how["test_share"], enough(sides, how["seed"]), max_length)
        train = concatenate_datasets(together(sides, "train", [*columns, "length"]))
        kept = [len(splits["train"].kept) for splits in sides.values()]
        drawn, order = kept, np.arange(sum(kept))
        if self.weights is not None:
            order = self.order(kept, how["seed"])
            train, drawn = train.select(order), np.histogram(order, np.cumsum([0, *kept]))[0].tolist()
        return Prepared(
            train=train.select_columns(columns),
            lengths=train.select_columns("length").with_format("arrow")[:]["length"].to_numpy().astype(int),
            test=concatenate_datasets(together(sides, "test", columns)).select(in_order(sides, held_out)),
            sides=sides,
            counts=counts,
            held_out=held_out,
            fingerprints=fingerprints(sides, held_out),
            repeated_questions=repeated_questions(sides, held_out),
            drawn=dict(zip(sides, drawn, strict=True)),
            order=order,
            where=self.where(),
        )

    def parts(
        self, origin: Origin, encoder: Encoder, chat: Chat, max_length: int | None, how: Preparation
    ) -> dict[str, Part]:
        """Each split of a source after the pass."""
        parts = {}
        for split, rows in {"train": origin.source.train, "test": origin.source.test}.items():
            if rows is None:
                continue
            raw, numbers = origin.chosen(rows)
            first = raw.select(range(min(LOOKED_AT, len(raw)))).to_list()
            shape = recognise(raw.column_names, first, encoder.kinds, origin.format, origin.columns)
            worker = Pass(shape, encoder, chat, max_length, how["on_too_long"], how["system_prompt"])
            if how["on_bad_row"] == "error":
                raise_if_first_unreadable(origin.source, split, numbers, first, worker)
            done = passed(raw, worker, cache_key(origin.source.fingerprint, split, numbers, worker), how["workers"])
            parts[split] = Part(done, numbers, raw, worker)
            raise_if_unfit(origin.source, split, parts[split], how)
        return parts

    def flowing(self, encoder: Encoder, chat: Chat, max_length: int | None, how: Preparation) -> Prepared:
        """Streams: what is held out is read ahead, the rest is prepared and counted while it is trained on."""
        streams, sides, counts = [], {}, {}
        for name, origin in self.origins.items():
            rows, source = origin.source.train, origin.source
            rows = rows if origin.max_rows is None else rows.take(origin.max_rows)
            head = list(rows.take(LOOKED_AT))
            columns = rows.column_names or list(dict.fromkeys(column for row in head for column in row))
            shape = recognise(columns, head, encoder.kinds, origin.format, origin.columns)
            worker = Pass(shape, encoder, chat, max_length, how["on_too_long"], how["system_prompt"])
            strict = how["on_bad_row"] == "error"
            if strict:
                raise_if_first_unreadable(source, "train", np.arange(len(head)), head, worker)
            is_held_out = by_share(how["test_share"], how["seed"]) if source.test is None else nothing
            if source.test is None:
                split, (tested, numbers) = "train", held_out_rows(rows, worker, is_held_out, how["test_rows"])
            else:
                split, tested = "test", first_rows(source.test, how["test_rows"])
                numbers = np.arange(len(tested))
            part = Part(
                passed(tested, worker, cache_key(origin.source.fingerprint, split, numbers, worker), 1),
                numbers,
                tested,
                worker,
            )
            raise_if_unfit(source, split, part, how)
            flow = Flow(worker, is_held_out, part.identity[part.fit], strict, partial(source.where, "train"))
            streams.append(flow.over(rows))
            sides[name] = {"test": Side(part, np.full(len(tested), True), np.flatnonzero(part.fit))}
            counts[name] = {"train": flow.counts}
        names = same_columns(encoder, {name: splits["test"].part.worker.shape for name, splits in sides.items()})
        leave_out_repeated(sides, "test", drop=False)
        held_out = hold_out(sides, how["test_rows"], how["seed"])
        for name in sides:
            counts[name]["test"] = sides[name]["test"].counts()
        return Prepared(
            train=self.mixed(streams, how["seed"]),
            test=concatenate_datasets(together(sides, "test", names)).select(in_order(sides, held_out)),
            lengths=np.zeros(0, dtype=int),
            sides=sides,
            counts=counts,
            held_out=held_out,
            fingerprints={"train": " ".join(origin.source.fingerprint for origin in self.origins.values())}
            | {"test": fingerprint(identities(sides, held_out))},
            repeated_questions=0,
            drawn={},
            order=np.zeros(0, dtype=int),
            where=self.where(),
        )

    def where(self) -> dict[str, Callable[[str, int], str]]:
        return {name: origin.source.where for name, origin in self.origins.items()}

    def refuse_unfit_stream(self, how: Preparation) -> None:
        """Raises ConfigError for what cannot be done with rows that are seen one after the other."""
        if how["on_duplicate"] == "drop":
            raise ConfigError("data.on_duplicate=drop: in a stream nothing is remembered; set it to keep")
        for name, origin in self.origins.items():
            if not isinstance(origin.source.train, IterableDataset) or origin.keep_where or origin.drop_where:
                raise ConfigError(f"data: {name} cannot be streamed: every source has to be, and none can be filtered")

    def refuse_unfit_mixture(self) -> None:
        """Raises ConfigError for weights and a rule that no mixture of these sources can have."""
        weights = [] if self.weights is None else [*self.weights.values()]
        fit = all(isinstance(weight, int | float) and weight > 0 for weight in weights)
        if self.weights is not None and (set(self.weights) != set(self.origins) or not fit):
            raise ConfigError(
                f"data.weights={self.weights}: give each of {', '.join(self.origins)} a weight above 0, and no other"
            )

    def order(self, kept: list[int], seed: int) -> np.ndarray:
        """The rows that the weights draw for an epoch, numbered from the first of the first source on.

        Raises ConfigError where there is nothing to draw from.
        """
        if empty := [name for name, n in zip(self.origins, kept, strict=True) if not n]:
            raise ConfigError(f"data.weights: no row of {empty[0]} is left to learn from; leave this source out")
        ends = np.cumsum(kept)
        numbers = [Dataset(pa.table({"row": np.arange(end - n, end)})) for n, end in zip(kept, ends, strict=True)]
        return self.mixed(numbers, seed).with_format("arrow")[:]["row"].to_numpy()

    def mixed(self, rows: list[Any], seed: int) -> Any:
        """All training rows, or those that the weights draw."""
        if self.weights is None:
            return concatenate_datasets(rows)
        weights = np.array([self.weights[name] for name in self.origins])
        return interleave_datasets(
            rows, list(weights / weights.sum()), seed=seed, stopping_strategy=self.stopping_strategy
        )


def same_columns(encoder: Encoder, shapes: dict[str, Shape]) -> list[str]:
    """The columns that a trainer takes. Raises ConfigError where sources would give it different ones."""
    columns = {name: list(encoder.columns(shape.kind)) for name, shape in shapes.items()}
    first = next(iter(columns.values()))
    if any(others != first for others in columns.values()):
        found = ", ".join(f"{name} has {shape.kind} rows ({shape.name})" for name, shape in shapes.items())
        raise ConfigError(f"data.sources: this trainer takes one kind of rows at a time, and {found}")
    return first


def raise_if_first_unreadable(source: Source, split: str, numbers: np.ndarray, first: list[dict], worker: Pass) -> None:
    """Raises ConfigError where one of the first rows cannot be read, before the long pass over all of them."""
    errors = [(i, row) for i, row in enumerate(map(worker.read, first)) if isinstance(row, RowError)]
    raise_if_unreadable(source, split, numbers, errors, f"the first {len(first)}")


def raise_if_unfit(source: Source, split: str, part: Part, how: Preparation) -> None:
    """Raises ConfigError for rows that cannot be read, or are too long, where this is to be an error."""
    if how["on_bad_row"] == "error":
        unreadable = np.flatnonzero(~part.readable)
        details = part.rows.data.column("detail").take(unreadable[:SHOWN]).to_pylist()
        said = zip_longest(unreadable, details, part.reason[unreadable], fillvalue="")
        errors = [(int(i), RowError(detail, reason=reason)) for i, detail, reason in said]
        raise_if_unreadable(source, split, part.numbers, errors, f"{len(part.fit):,}")
    if how["on_too_long"] == "error":
        raise_if_too_long(source, split, part)


def raise_if_unreadable(
    source: Source, split: str, numbers: np.ndarray, errors: list[tuple[int, RowError]], looked_at: str
) -> None:
    """Raises ConfigError that shows the first few rows that cannot be read, and how many there are of each kind."""
    if errors:
        kinds = Counter(error.reason for _, error in errors)
        said = ", ".join(f"{reason} {rows:,}" for reason, rows in kinds.most_common())
        lines = [f"data: {len(errors):,} of {looked_at} rows of {source.name} cannot be learned from ({said})"]
        lines += [f"{source.where(split, int(numbers[i]))}: {error}" for i, error in errors[:SHOWN]]
        lines += [f"and {len(errors) - SHOWN:,} more"] if len(errors) > SHOWN else []
        mend = "Mend them, or leave them out with data.on_bad_row=drop: the run counts them."
        raise ConfigError("\n  ".join(lines) + f"\n{mend}")


def raise_if_too_long(source: Source, split: str, part: Part) -> None:
    long = np.flatnonzero(part.reason == TOO_LONG)
    if len(long):
        longest = long[part.length[long].argmax()]
        raise ConfigError(
            f"data: {len(long):,} of {len(part.fit):,} rows of {source.name} are longer than "
            f"trainer.args.max_length={part.worker.max_length} tokens; the longest has {part.length[longest]:,} "
            f"({source.where(split, int(part.numbers[longest]))}). Raise it, or set data.on_too_long=truncate or drop"
        )
