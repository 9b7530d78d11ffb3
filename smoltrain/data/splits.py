"""Which rows are learned from and which are held out, and what became of each: arithmetic on numbers of rows.

A row is held out by a hash of its content and the split's own seed. So more data moves no row across, and the seed of
a run never changes what it is tested on.
"""

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from smoltrain.config import ConfigError
from smoltrain.report import BEYOND, HELD_OUT_TOO, REPEATED

FEW = 10  # held-out rows, below which what is measured on them says little
TOO_LONG = "longer than max_length"
NO_TOKEN = "no token to learn"
ALL_PROMPT = "all prompt at max_length"


def shares(identities: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each row, by its content and the seed alone (the finaliser of splitmix64)."""
    x = identities.view(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) / 2.0**64


@dataclass
class Counts:
    """What became of the rows of one split.

    `dropped` counts rows by reason, `remarks` kept rows by what is odd about them; `cut` rows were cut at max_length;
    `duplicates` repeat an earlier row, `held_out_too` are in training and held out. `tokens` go through the model,
    `trained` of them are learned, and `lost` would be, had their rows not been cut or dropped for their length.
    """

    given: int = 0
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    remarks: Counter = field(default_factory=Counter)
    cut: int = 0
    duplicates: int = 0
    held_out_too: int = 0
    tokens: int = 0
    trained: int = 0
    lost: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def plain(self) -> dict[str, Any]:
        """As ordinary dicts and numbers, for the record."""
        counters = {"dropped": dict(self.dropped), "remarks": dict(self.remarks)}
        return asdict(self, dict_factory=lambda items: {k: v for k, v in items if k not in counters}) | counters


class Part:
    """One split of one source after the pass: its rows as tokens, and what was counted of each, as arrays.

    `numbers` are those of the rows in the source; `raw` are the rows before the pass, read by `worker`.
    """

    def __init__(self, rows: Dataset, numbers: np.ndarray, raw: Dataset, worker: Any) -> None:
        self.rows, self.numbers, self.raw, self.worker = rows, numbers, raw, worker
        self.whole, self.length = self.counted("whole"), self.counted("length")
        self.tokens, self.trained, self.lost = (self.counted(name) for name in ("tokens", "trained", "lost"))
        self.identity, self.question = self.counted("identity"), self.counted("question")
        self.cut = pc.fill_null(rows.data.column("cut"), False).to_numpy()
        self.reason, self.remarks = (rows.data.column(name).to_numpy() for name in ("reason", "remarks"))
        self.fit = pc.is_null(rows.data.column("reason")).to_numpy()
        self.readable = pc.is_null(rows.data.column("detail")).to_numpy()

    def counted(self, name: str) -> np.ndarray:
        return pc.fill_null(self.rows.data.column(name), 0).to_numpy()


@dataclass
class Side:
    """The rows of one source that are for training, or may be held out: a mask over `part`, and those that are kept."""

    part: Part
    mask: np.ndarray
    kept: np.ndarray
    dropped: Counter = field(default_factory=Counter)
    duplicates: int = 0
    held_out_too: int = 0

    def leave_out(self, gone: np.ndarray, reason: str) -> None:
        """Takes rows (a mask over `kept`) out, and counts them."""
        self.kept = self.kept[~gone]
        if gone.any():
            self.dropped[reason] += int(gone.sum())

    def counts(self) -> Counts:
        part, kept = self.part, self.kept
        remarks = Counter(part.remarks[kept])
        return Counts(
            given=int(self.mask.sum()),
            kept=len(kept),
            dropped=Counter(part.reason[self.mask & ~part.fit]) + self.dropped,
            remarks=sum((Counter(dict.fromkeys(r.split("; "), n)) for r, n in remarks.items() if r), Counter()),
            cut=int(part.cut[kept].sum()),
            duplicates=self.duplicates,
            held_out_too=self.held_out_too,
            tokens=int(part.tokens[kept].sum()),
            trained=int(part.trained[kept].sum()),
            lost=int(part.lost[self.mask].sum()),
        )


Sides = dict[str, dict[str, Side]]  # by source, then "train" and "test"
Row = tuple[str, int]  # a source and the number of a row in its part


def divide(parts: dict[str, Part], test_share: float, seed: int) -> dict[str, Side]:
    """Which rows are for training and which may be held out: as the source says, else by their content."""
    if "test" in parts:
        masks = {split: np.full(len(part.fit), True) for split, part in parts.items()}
        return {split: Side(part, masks[split], np.flatnonzero(part.fit)) for split, part in parts.items()}
    part = parts["train"]
    held_out = (shares(part.identity, seed) < test_share) & part.readable
    masks = {"train": ~held_out, "test": held_out}
    return {split: Side(part, mask, np.flatnonzero(mask & part.fit)) for split, mask in masks.items()}


def hold_out(sides: Sides, test_rows: int, seed: int) -> list[Row]:
    """The rows that are held out, `test_rows` of all sources' at most, in an order that is theirs alone."""
    names = list(sides)
    share = [shares(side.part.identity[side.kept], seed) for side in (sides[name]["test"] for name in names)]
    source = np.repeat(np.arange(len(names)), [len(s) for s in share])
    number = np.concatenate([sides[name]["test"].kept for name in names])
    order = np.argsort(np.concatenate(share), kind="stable")[:test_rows]
    for i, name in enumerate(names):
        side = sides[name]["test"]
        side.leave_out(~np.isin(side.kept, number[order][source[order] == i]), BEYOND)
    return [(names[s], int(n)) for s, n in zip(source[order], number[order], strict=True)]


def count(sides: Sides, held_out: list[Row], drop_repeated: bool) -> dict[str, dict[str, Counts]]:
    """What became of the rows of each source and split. Repeated training rows are counted, and dropped if asked."""
    tested = identities(sides, held_out)
    for splits in sides.values():
        side = splits["train"]
        leaked = np.isin(side.part.identity[side.kept], tested)
        side.held_out_too = int(leaked.sum())
        if drop_repeated:
            side.leave_out(leaked, HELD_OUT_TOO)
    leave_out_repeated(sides, "train", drop_repeated)
    return {name: {split: side.counts() for split, side in splits.items()} for name, splits in sides.items()}


def leave_out_repeated(sides: Sides, split: str, drop: bool) -> None:
    """Counts the rows that repeat an earlier one of whatever source, and leaves them out if asked."""
    seen = np.array([], dtype=np.int64)
    for side in (splits[split] for splits in sides.values()):
        own = side.part.identity[side.kept]
        first = np.zeros(len(own), dtype=bool)
        first[np.unique(own, return_index=True)[1]] = True
        repeated = ~first | np.isin(own, seen)
        seen = np.concatenate([seen, own])
        side.duplicates = int(repeated.sum())
        if drop:
            side.leave_out(repeated, REPEATED)


def enough(sides: Sides, seed: int) -> float:
    """The share that would hold out a few of the rows, were they all fit."""
    share = np.sort(np.concatenate([shares(s["train"].part.identity, seed) for s in sides.values()]))
    return float(np.ceil(share[:FEW][-1] * 100 + 1) / 100)


def identities(sides: Sides, rows: list[Row]) -> np.ndarray:
    return np.array([sides[name]["test"].part.identity[number] for name, number in rows], dtype=np.int64)


def repeated_questions(sides: Sides, held_out: list[Row]) -> int:
    """How many held-out rows ask what a training row asks too."""
    asked = [int(sides[name]["test"].part.question[number]) for name, number in held_out]
    trained = np.concatenate([s["train"].part.question[s["train"].kept] for s in sides.values()])
    return int(np.isin([question for question in asked if question], trained).sum())


def fingerprints(sides: Sides, held_out: list[Row]) -> dict[str, str]:
    """Hashes of the content of the rows learned from and of those held out, the same on every machine."""
    train = np.concatenate([s["train"].part.identity[s["train"].kept] for s in sides.values()])
    return {"train": fingerprint(train), "test": fingerprint(identities(sides, held_out))}


def fingerprint(numbers: np.ndarray) -> str:
    return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]


def together(sides: Sides, split: str, columns: list[str]) -> list[Dataset]:
    """The kept rows of each source, as a trainer takes them."""
    return [s[split].part.rows.select_columns(columns).select(s[split].kept) for s in sides.values()]


def in_order(sides: Sides, held_out: list[Row]) -> list[int]:
    """Where each held-out row stands among those of all sources, one source after the other."""
    place: dict[Row, int] = {}
    for name, splits in sides.items():
        place |= {(name, int(number)): len(place) + i for i, number in enumerate(splits["test"].kept)}
    return [place[row] for row in held_out]


def raise_if_empty(
    counts: dict[str, dict[str, Counts]], test_share: float, enough: float, max_length: int | None
) -> None:
    """Raises ConfigError that says why there is no row to learn from, or to hold out, and what to do.

    `enough` is the share that would hold out some.
    """
    for split, task in (("train", "learn from"), ("test", "hold out")):
        total = sum((c[split] for c in counts.values()), Counts())
        if total.kept:
            continue
        if split == "test" and not total.given:
            rows = sum(c["train"].given for c in counts.values())
            raise ConfigError(
                f"data.test_share={test_share}: rows are held out by their content, and of these {rows:,} not one "
                f"is; data.test_share={enough:.2g} would do, or give held-out rows of your own with data.test_path"
            )
        why = ", ".join(f"{rows:,} {reason}" for reason, rows in total.dropped.most_common()) or "none was given"
        mend = f"; raise trainer.args.max_length={max_length}" if total.lost else ""
        raise ConfigError(f"data: no row is left to {task}, of {total.given:,} ({why}){mend}")
