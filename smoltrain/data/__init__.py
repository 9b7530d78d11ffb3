"""Data: sources of rows (`sources`, `sums`), the shapes they come in (`formats`), rows as tokens (`encode`).

    sources -> one pass over the rows: read, render, tokenise, mark, count (cached) -> split, mix -> a trainer

After the one pass only numbers of rows are moved about.
"""

from typing import Any, Literal, Unpack

from smoltrain.config import ConfigError
from smoltrain.data import sources as places
from smoltrain.data.prepare import Data, Origin, Preparation


def local(
    path: str | list[str],
    test_path: str | None,
    streaming: bool,
    format: str | None,
    columns: dict[str, str] | None,
    keep_where: dict[str, Any] | None,
    drop_where: str | None,
    max_rows: int | None,
    **preparation: Unpack[Preparation],
) -> Data:
    """The rows of one's own files: a file, several, a directory, or what `save_to_disk` wrote."""
    source = places.files(path, test_path, streaming)
    return Data({source.name: Origin(source, format, columns, keep_where, drop_where, max_rows)}, preparation)


def hub(
    path: str,
    name: str | None,
    revision: str,
    split: str,
    test_split: str | None,
    streaming: bool,
    format: str | None,
    columns: dict[str, str] | None,
    keep_where: dict[str, Any] | None,
    drop_where: str | None,
    max_rows: int | None,
    **preparation: Unpack[Preparation],
) -> Data:
    """A data set of the Hugging Face Hub."""
    source = places.hub(path, name, revision, split, test_split, streaming)
    return Data({source.name: Origin(source, format, columns, keep_where, drop_where, max_rows)}, preparation)


def mixture(
    sources: dict[str, Data],
    weights: dict[str, float] | None,
    stopping_strategy: Literal["all_exhausted", "first_exhausted"],
    **preparation: Unpack[Preparation],
) -> Data:
    """Several sources as one: all their rows, or drawn with `weights` until `stopping_strategy` says so.

    `first_exhausted` leaves rows of the others out, `all_exhausted` repeats those of the smaller ones
    (`datasets.interleave_datasets`).
    """
    if not sources:
        raise ConfigError("data.sources: name at least one, or write data=[a,b]")
    for name, data in sources.items():
        if len(data.origins) > 1:
            raise ConfigError(f"data.sources.{name}: a mixture within a mixture; name its sources themselves")
        if data.preparation:
            own = ", ".join(data.preparation)
            raise ConfigError(
                f"data.sources.{name}: {own} would be ignored; in a mixture these are keys of data itself"
            )
    origins = {name: origin for name, data in sources.items() for origin in data.origins.values()}
    return Data(origins, preparation, weights, stopping_strategy)
