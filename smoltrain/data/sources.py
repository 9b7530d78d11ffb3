"""Where rows come from: files of one's own and data sets of the hub, as train and test splits in TRL's formats."""

import csv
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from smoltrain.config import ConfigError
from smoltrain.data.formats import canonical

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def local(path: str, columns: dict[str, str] | None, test_rows: int, max_rows: int | None, seed: int) -> DatasetDict:
    """The rows of one file of the user's, `test_rows` of them held out."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"data.path={path}: there is no such file (looked in {file.parent.absolute()})")
    if file.suffix not in READERS:
        raise ConfigError(
            f"data.path={path}: cannot read {file.suffix or 'a file without ending'}; {', '.join(READERS)}"
        )
    if file.stat().st_size == 0:
        raise ConfigError(f"data.path={path}: there is no row in it")
    reader = READERS[file.suffix]
    try:
        rows = load_dataset(reader, data_files=str(file), split="train", **(as_text(file) if reader == "csv" else {}))
    except DatasetGenerationError as error:
        raise ConfigError(f"data.path={path}: cannot be read as {reader}: {error.__cause__}") from error
    return hold_out(canonical(first(rows, max_rows), columns), test_rows, seed)


def as_text(file: Path) -> dict[str, Any]:
    """How to read a csv so that every cell is a text, 007 and NA too, and only an empty one is missing."""
    with file.open(newline="") as lines:
        header = next(csv.reader(lines), [])
    features = Features({name: Value("string") for name in header})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def hub(
    path: str,
    name: str | None,
    revision: str,
    split: str,
    test_split: str | None,
    columns: dict[str, str] | None,
    drop_where: str | None,
    test_rows: int,
    max_rows: int | None,
    seed: int,
) -> DatasetDict:
    """A data set of the Hugging Face Hub; its own `test_split` is used where it has one, cut to `test_rows`."""

    def read(split: str, rows: int | None) -> Dataset:
        dataset = load_dataset(path, name, revision=revision, split=split)
        if drop_where:
            kept = dataset.filter(lambda bad: not bad, input_columns=drop_where, desc=f"Dropping {drop_where}")
            print(f"{split}: {len(dataset) - len(kept)} of {len(dataset)} rows have {drop_where} and are left out")
            dataset = kept
        return canonical(first(dataset, rows), columns)

    if test_split:
        return DatasetDict(train=read(split, max_rows), test=read(test_split, test_rows))
    return hold_out(read(split, max_rows), test_rows, seed)


def first(rows: Dataset, max_rows: int | None) -> Dataset:
    return rows if max_rows is None else rows.select(range(min(max_rows, len(rows))))


def hold_out(rows: Dataset, test_rows: int, seed: int) -> DatasetDict:
    if not 0 < test_rows < len(rows):
        raise ConfigError(
            f"data.test_rows={test_rows}: hold out at least 1 and fewer than the {len(rows)} rows there are"
        )
    return rows.train_test_split(test_size=test_rows, seed=seed)
