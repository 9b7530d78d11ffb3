"""Where rows come from: files of one's own and data sets of the hub, as they stand there, with their splits."""

import difflib
import glob
import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetBuilder, IterableDataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub import constants
from huggingface_hub.utils import httpx

from smoltrain.config import ConfigError, exhausted
from smoltrain.data import readers
from smoltrain.hub import commit_of

Rows: TypeAlias = Dataset | IterableDataset


@dataclass
class Source:
    """Rows of one origin as they stand there, and how to say where one of them is.

    `train` and `test` have the columns of the origin. `fingerprint` is a hash of its content. `where("train", 17)` is
    where row 17, counted from 0, of a split stands: "my.jsonl line 18".
    """

    name: str
    train: Rows
    test: Rows | None
    fingerprint: str
    where: Callable[[str, int], str]


# ---------------------------------------------------------------- files

# How folders and files name their splits, as a word of the name; the first one of these wins.
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
# What lies beside rows without being some: descriptions that datasets and the hub write.
ASIDE = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "package.json"}


def files(path: str | list[str], test_path: str | None = None, streaming: bool = False) -> Source:
    """Rows of json, jsonl, csv, tsv (each also as .gz), parquet or arrow files.

    `path` is a file, a list of them, a glob, a folder with files of one kind anywhere in it, or a folder that
    `datasets.save_to_disk` wrote. In a folder or a glob, the names tell the splits: a name with the word train, test or
    eval, validation or dev; a test split is taken rather than a validation split where there are both, the other
    one is left alone. `test_path` wins over both. With `streaming` nothing is cached, and rows are read when asked for.

    Raises ConfigError for what is not there or cannot be read, with file, line and mend.
    """
    paths = [path] if isinstance(path, str) else list(path)
    if not paths:
        raise ConfigError("data.path=[]: name at least one file")
    found: dict[str, list[Path]] = {}
    for given in paths:
        for split, listed in resolve(given, "data.path").items():
            found.setdefault(split, []).extend(listed)
    if "train" not in found:
        if len(found) > 1:
            raise ConfigError(
                f"data.path={path}: there is no training split, only {', '.join(found)}. Name one of them"
            )
        found = {"train": next(iter(found.values()))}
    test = found.get("test") or found.get("validation")
    if test_path:
        test = list(chain.from_iterable(resolve(test_path, "data.test_path").values()))
    chosen = {"train": found["train"]} | ({"test": test} if test else {})
    for first, *others in chosen.values():
        if other := next((file for file in others if readers.kind(file) != readers.kind(first)), None):
            raise ConfigError(
                f"data.path={path}: files of different kinds, {first} and {other}. "
                f"Name those of one kind, as in '{first.parent}/*{readers.ending(first)}'"
            )
    keys = {split: content(listed) for split, listed in chosen.items()}
    read = {
        split: stream(listed) if streaming else readers.load(listed, keys[split]) for split, listed in chosen.items()
    }

    def where(split: str, index: int) -> str:
        return place(chosen[split], index)

    refuse_tokens(read, where)
    fingerprint = hashlib.sha256(repr(keys).encode()).hexdigest()
    return Source("+".join(map(called, paths)), read["train"], read.get("test"), fingerprint, where)


def called(path: str) -> str:
    """A short name: `a` of `data/a.jsonl.gz`, `data` of a folder or of `data/*.jsonl`."""
    given = Path(path).expanduser().absolute()
    while glob.has_magic(given.name):
        given = given.parent
    return given.name.removesuffix(".gz").removesuffix(readers.ending(given) if readers.kind(given) else "")


def resolve(path: str, key: str) -> dict[str, list[Path]]:
    """The files that a path stands for, by split; those of no split in particular are rows to train on."""
    given = Path(path).expanduser()
    if len(str(given)) > 4096 or any(len(part.encode()) > 255 for part in given.parts):
        raise ConfigError(f"{key}={readers.short(path)}: no file has so long a name")
    if given.is_file():
        if readers.kind(given) is None:
            raise ConfigError(f"{key}={path}: cannot read {given.suffix or 'a file without ending'}; {ENDINGS}")
        return {"train": [given]}
    if given.is_dir():
        return folder(given, key)
    if glob.has_magic(path):
        matches = sorted(glob.glob(str(given), recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
        listed = [Path(match) for match in matches if Path(match).is_file()]
        if not listed:
            raise ConfigError(f"{key}={path}: no file is named like this (looked from {Path.cwd()})")
        # What is the same in all names, as the folder's own, says nothing about a split.
        base = Path(os.path.commonpath([file.parent for file in listed]))
        return by_split(listed, base)
    hub = f". A data set of the hub is data=hub data.path={path}" if re.fullmatch(r"[\w.-]+/[\w.-]+", path) else ""
    raise ConfigError(f"{key}={path}: there is no such file or folder{near(given)}{hub}")


ENDINGS = f"{', '.join(readers.KINDS)} can be read, texts among them also as .gz"


def near(path: Path) -> str:
    """Where a path was looked for, and what is named like it there."""
    parent = path.absolute().parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    close = difflib.get_close_matches(path.name, sorted(child.name for child in parent.iterdir()), n=3)
    return f" (looked for {path.name} in {parent})" + (f"; did you mean {' or '.join(close)}?" if close else "")


def folder(path: Path, key: str) -> dict[str, list[Path]]:
    """The files of a folder by split, be it one that `save_to_disk` wrote or any other."""
    if (path / "state.json").is_file():
        return {"train": saved(path)}
    if (path / "dataset_dict.json").is_file():
        names = sorted(child.parent.name for child in path.glob("*/state.json"))
        splits = {name: split_of(Path(name)) or "train" for name in names}
        if (training := [name for name in names if splits[name] == "train"])[1:]:
            raise ConfigError(
                f"{key}={path}: splits {', '.join(training)} are there; name one, as {path / training[0]}"
            )
        return {splits[name]: saved(path / name) for name in names}
    listed = sorted(
        file
        for file in path.rglob("*")
        if readers.kind(file)
        and file.is_file()
        and file.name not in ASIDE
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not listed:
        there = sorted(child.name for child in path.iterdir())
        held = f"in it are {', '.join(there[:8])}{', …' if there[8:] else ''}" if there else "it is empty"
        raise ConfigError(f"{key}={path}: no data in this folder ({held}); {ENDINGS}")
    return by_split(listed, path)


def saved(path: Path) -> list[Path]:
    """The Arrow files of a data set that `save_to_disk` wrote, in order."""
    state = readers.parse(path / "state.json", (path / "state.json").read_bytes())
    try:
        listed = [path / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path / 'state.json'}: it names no files, as save_to_disk writes it") from error
    if missing := [file for file in listed if not file.is_file()]:
        raise ConfigError(f"{missing[0]}: the file is missing, of those that state.json names. Copy the folder again")
    return listed


def by_split(listed: list[Path], base: Path) -> dict[str, list[Path]]:
    """Files sorted into the splits that their names below a folder tell."""
    found: dict[str, list[Path]] = {}
    for file in listed:
        found.setdefault(split_of(file.relative_to(base)) or "train", []).append(file)
    return found


def split_of(path: Path) -> str | None:
    """The split that a name tells, the innermost one: `test` of `en/test/a.jsonl` and of `gsm8k_test.jsonl`."""
    for part in reversed(path.parts):
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in SPLITS.items():
            if set(names) & set(words):
                return split
    return None


def content(listed: list[Path]) -> str:
    """A hash of what files hold and of how they are read, the same wherever they are."""
    digest = hashlib.sha256()
    for file in listed:
        with readers.opened(file, unpack=False) as stream:
            digest.update(f"{readers.ending(file)} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def stream(listed: list[Path]) -> IterableDataset:
    return IterableDataset.from_generator(readers.rows, gen_kwargs={"files": listed})


def place(listed: list[Path], index: int) -> str:
    """Where a row of files stands."""
    same = {file.name for file in listed}
    named = ((file.name if len(same) == len(listed) else str(file), file) for file in listed)
    found = (f"{name} {where}" for name, file in named for where in readers.places(file))
    return next(islice(found, index, None))


def refuse_tokens(splits: dict[str, Rows], where: Callable[[str, int], str]) -> None:
    """Raises ConfigError where rows are tokens already, which a trainer would take instead of their text."""
    for split, rows in splits.items():
        first: dict[str, Any] = next(iter(rows), {})
        for name in ("input_ids", "labels", "attention_mask"):
            if isinstance(value := first.get(name), list) and value and isinstance(value[0], int):
                raise ConfigError(
                    f"{where(split, 0)}: column {name} holds tokens already; smoltrain tokenises text itself. "
                    "Leave that column out, or name those to use in data.columns"
                )


# ---------------------------------------------------------------- the hub


def hub(
    path: str, name: str | None, revision: str, split: str, test_split: str | None, streaming: bool = False
) -> Source:
    """Rows of a data set of the Hugging Face Hub, or of whatever hub HF_ENDPOINT names.

    `name` is its configuration. A split may be a slice of one, as `train[:10%]`. A gated or private data set takes its
    token from HF_TOKEN. With HF_HUB_OFFLINE set, the copy on this disk is read. A hub that does not answer is
    given up after HF_HUB_ETAG_TIMEOUT seconds (10); a download that stalls, after five tries of
    HF_HUB_DOWNLOAD_TIMEOUT seconds (10).

    Raises ConfigError for a name, configuration, revision, split or token that the hub does not know.
    """
    if Path(path).exists():
        raise ConfigError(f"data.path={path}: a file or folder of this name is here, which would be read instead")
    start = time.monotonic()
    commit = commit_of("dataset", path, revision)
    asked = {"train": split} | ({"test": test_split} if test_split else {})

    def where(key: str, index: int) -> str:
        return f"{path} {asked[key]} row {index + 1}"

    try:
        try:
            builder = load_dataset_builder(path, name, revision=revision)
        except ValueError as error:
            raise ConfigError(f"data.name={name}: {' '.join(str(error).split())}") from error
        if builder.hash != commit:  # where the hub fails it, datasets takes its newest copy, of whatever revision
            raise ConfigError(
                f"data.path={path}: revision {revision} is commit {commit[:8]}, but the copy on this disk is of "
                f"{(builder.hash or '')[:8]}. Try again with the hub in reach, and HF_HUB_OFFLINE not set"
            )
        check_splits(builder, asked)
        if not streaming:
            builder.download_and_prepare()
        build = builder.as_streaming_dataset if streaming else builder.as_dataset
        read = {key: build(split=wanted) for key, wanted in asked.items()}
        refuse_tokens(read, where)
    except DatasetGenerationError as error:
        raise ConfigError(f"data.path={path}: a file of it cannot be read: {error.__cause__ or error}") from error
    except (DatasetsError, OSError, httpx.HTTPError, RuntimeError) as error:
        if exhausted(error):
            raise
        waited = time.monotonic() - start
        raise ConfigError(
            f"data.path={path}: could not be loaded from {constants.ENDPOINT} ({waited:.0f} s): {error}"
        ) from error
    fingerprint = f"{path}@{commit}:{builder.config.name}:{split}:{test_split or ''}"
    return Source(path, read["train"], read.get("test"), fingerprint, where)


def check_splits(builder: DatasetBuilder, asked: dict[str, str]) -> None:
    """Raises ConfigError for splits that a data set does not have, before anything is downloaded."""
    there = list(builder.info.splits or builder.config.data_files or ())
    for key, wanted in asked.items():
        for part in wanted.split("+"):
            if there and part.split("[")[0].strip() not in there:
                option = "data.split" if key == "train" else "data.test_split"
                raise ConfigError(f"{option}={wanted}: there is no such split; there are {', '.join(map(str, there))}")
