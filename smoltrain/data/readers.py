"""How files become rows, exactly as they stand there, and what is wrong with those that cannot: file, line, mend.

JSON is checked line by line (orjson) and converted by pyarrow. datasets' own reader is not used for it: pyarrow alone
makes timestamps of texts that look like dates, takes NaN and invalid UTF-8, and crashes on a bare `null` or deep
nesting; datasets then makes the number 42 of the text "42" where types are mixed, and fills up the arguments of each
tool call with the keys of all others.
"""

import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import datasets
import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from datasets import Dataset, Features
from datasets.utils import tqdm

from smoltrain.config import ConfigError

KINDS = {  # ending -> kind; those of texts may be followed by .gz
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
CHUNK = 16 << 20  # bytes that are read at a time
VERSION = "1"  # of what is written to the cache; a change below that changes rows changes it

Row = dict[str, Any]


def ending(file: Path) -> str:
    """`.jsonl` of `a.jsonl` and `a.jsonl.gz`."""
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def kind(file: Path) -> str | None:
    """`json`, `csv`, `parquet` or `arrow`, by the ending of a name; None where it is none of these."""
    found = KINDS.get(ending(file))
    return None if file.suffix == ".gz" and found in ("parquet", "arrow") else found


def load(files: list[Path], key: str) -> Dataset:
    """The rows of files of one kind, memory-mapped from a cache that is written once for each `key`.

    `key` is a hash of their content. A cell of a csv is a text, null where it is empty. A column of objects whose keys
    differ below the first level (arguments of tools), or of lists of mixed types, has the feature Json, which keeps 15
    decimals of a float. An integer beyond 64 bits becomes a float.

    Raises ConfigError with file, line and mend for the first thing that is wrong.
    """
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "smoltrain" / f"{key}-{VERSION}.arrow"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_name(f"{cached.name}.{os.getpid()}")
        try:
            try:
                write(partial, tables(files))
            except Wider as wider:
                write(partial, tables(files, wider.schema))
            partial.rename(cached)
        finally:
            partial.unlink(missing_ok=True)
    return Dataset.from_file(str(cached))


def write(path: Path, tables: Iterator[pa.Table]) -> None:
    """Writes tables of one schema as a stream that `datasets` maps into memory."""
    with path.open("wb") as sink, tqdm(desc="Reading rows", unit=" rows") as bar:
        table = next(tables)
        schema = Features.from_arrow_schema(table.schema).arrow_schema
        with pa.ipc.new_stream(sink, schema) as writer:
            for part in chain([table], tables):
                writer.write_table(part if part.schema.equals(schema) else part.cast(schema))
                bar.update(len(part))


def tables(files: list[Path], schema: pa.Schema | None = None) -> Iterator[pa.Table]:
    """The rows of all files, in order and in one schema: the given one where that is known."""
    for file in files:
        look(file)
    count = 0
    for table in json_tables(files, schema) if kind(files[0]) == "json" else alike(files):
        count += len(table)
        yield table
    if not count:
        raise ConfigError(f"{files[0]}: there is no row in it")


def alike(files: list[Path]) -> Iterator[pa.Table]:
    """The rows of csv, parquet or arrow files. Raises ConfigError where their columns differ."""
    first: tuple[Path, pa.Schema] | None = None
    for file in files:
        for table in {"csv": csv_tables, "parquet": parquet_tables, "arrow": arrow_tables}[kind(file) or ""](file):
            first = first or (file, table.schema)
            if not table.schema.equals(first[1]):
                raise ConfigError(
                    f"{file}: {differ(first[1], table.schema)} in {first[0]}. "
                    "Files of one source have the same columns: write them so, or give them as two sources"
                )
            yield table


def differ(one: pa.Schema, other: pa.Schema) -> str:
    """What another schema has otherwise than one, as the beginning of a sentence that ends in where the one is."""
    for name in other.names:
        if name not in one.names:
            return f"there is a column {name} that is not"
        if not one.field(name).equals(other.field(name)):
            return f"column {name} is {other.field(name).type}, but {one.field(name).type}"
    missing = [name for name in one.names if name not in other.names]
    return f"there is no column {missing[0]}, as there is" if missing else "the columns stand in another order than"


def rows(files: list[Path]) -> Iterator[Row]:
    """The rows one by one, for streaming: nothing is cached, and what is wrong is raised where it is reached."""
    for file in files:
        look(file)
    if kind(files[0]) != "json":
        for table in tables(files):
            features = Features.from_arrow_schema(table.schema)
            yield from (features.decode_example(row) for row in table.to_pylist())
        return
    columns = Columns()
    for file in files:
        for chunk in json_chunks(file):
            for number, row in chunk.rows():
                columns.take(row, chunk, number)
                yield row
    columns.check_names()
    if not columns.total:
        raise ConfigError(f"{files[0]}: there is no row in it")


def places(file: Path) -> Iterator[str]:
    """Where each row of a file stands: `line 18`, or `row 18` in files that have no lines of rows."""
    if kind(file) == "json" and not whole(file):
        with opened(file) as stream:
            yield from (f"line {number}" for number, line in enumerate(stream, 1) if line.strip())
    elif kind(file) == "csv":
        yield from (f"line {number}" for number, _ in islice(csv_records(file), 1, None))
    else:
        counts = (len(elements(file)),) if kind(file) == "json" else (len(table) for table in tables([file]))
        yield from (f"row {number + 1}" for number in range(sum(counts)))


# ---------------------------------------------------------------- any file


@contextmanager
def opened(file: Path, unpack: bool = True) -> Iterator[BufferedReader]:
    """The bytes of a file, unpacked where it is a gzip. Raises ConfigError where they cannot be read to the end."""
    try:
        with file.open("rb") as raw:
            packed = unpack and raw.peek(2)[:2] == b"\x1f\x8b"
            yield cast(BufferedReader, gzip.GzipFile(fileobj=raw) if packed else raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{file}: the gzip is cut short or damaged ({error}). Copy or download it again") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error


LOOKS = (  # how files begin that are not what their names say
    (b"version https://git-lfs", "a pointer of git-lfs, not the file itself. Fetch it: git lfs pull"),
    (b"<!doctype", "a web page. Download the file itself (on the hub: /resolve/ in its address, not /blob/)"),
    (b"<html", "a web page. Download the file itself (on the hub: /resolve/ in its address, not /blob/)"),
    (b"<?xml", "XML. Write its rows as jsonl, csv or parquet"),
    (b"pk\x03\x04", "a zip archive. Unpack it: unzip"),
    (b"\xff\xfe", "UTF-16. Convert it: iconv -f utf-16 -t utf8"),
    (b"\xfe\xff", "UTF-16. Convert it: iconv -f utf-16 -t utf8"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd. Unpack it: zstd -d"),
)


def look(file: Path) -> None:
    """Raises ConfigError for a file that its first bytes show to be something else than its name says."""
    try:
        with file.open("rb") as raw:
            start = raw.read(2)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not start:
        raise ConfigError(f"{file}: the file is empty, there is no row in it")
    if file.suffix == ".gz" and start != b"\x1f\x8b":
        raise ConfigError(f"{file}: not a gzip, though it is named so. Rename it to {file.name.removesuffix('.gz')}")
    with opened(file) as stream:
        head = stream.read(4096)
    for beginning, what in LOOKS:
        if head.lower().lstrip().startswith(beginning):
            raise ConfigError(f"{file}: this is {what}")
    if kind(file) in ("json", "csv"):
        if head.startswith((b"PAR1", b"ARROW1")):
            raise ConfigError(f"{file}: this is not text but parquet or arrow. Rename it")
        if b"\0" in head:
            raise ConfigError(
                f"{file}: there are NUL bytes in it, so it is not a text (or UTF-16: iconv -f utf-16 -t utf8)"
            )


def bad_encoding(file: Path) -> ConfigError:
    """The first byte of a text that is not UTF-8."""
    offset = line = 0
    with opened(file) as stream:
        for text in stream:
            line += 1
            try:
                text.decode()
            except UnicodeDecodeError as error:
                byte = offset + error.start
                return ConfigError(
                    f"{file} line {line}: byte {byte} (0x{text[error.start]:02x}) is not UTF-8. "
                    f"Convert it, if it is Latin-1 by: iconv -f latin1 -t utf8 {file.name}"
                )
            offset += len(text)
    raise AssertionError(f"{file} is UTF-8")


def short(text: str | bytes, around: int = 0) -> str:
    """A text as an error shows it: at most 80 letters, those around the given position."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    start = max(0, min(around - 40, len(text) - 80))
    cut = text[start : start + 80].strip()
    return f"{'…' if start else ''}{cut}{'…' if start + 80 < len(text) else ''}"


# ---------------------------------------------------------------- columns of JSON


NAMES = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


@dataclass
class Shape:
    """Rows with the same columns of the same types: where the first one stands, which are first and last."""

    types: dict[str, type]
    place: str
    first: int
    last: int = 0


class Columns:
    """What the rows so far have for columns. Raises ConfigError where a type or a name changes on the way."""

    def __init__(self) -> None:
        self.shapes: dict[tuple, Shape] = {}
        self.names: dict[str, tuple[str, str]] = {}  # column -> what it holds, where it did so first
        self.total = 0

    def take(self, row: Row, chunk: "Chunk", number: int) -> None:
        key = (*row, *map(type, row.values()))
        shape = self.shapes.get(key)
        if shape is None:
            place = f"{chunk.file} {chunk.unit} {number}"
            self.check_types(row, place)
            shape = self.shapes[key] = Shape({k: type(v) for k, v in row.items()}, place, self.total)
        shape.last = self.total
        self.total += 1

    def check_types(self, row: Row, place: str) -> None:
        """Raises ConfigError where a column holds something else than before; null is of every type."""
        for key, value in row.items():
            if "\0" in key:
                raise ConfigError(f"{place}: there is a NUL in the name of column {key!r}. Rename it")
            if value is not None:
                name, before = self.names.setdefault(key, (NAMES[type(value)], place))
                if name != NAMES[type(value)]:
                    raise ConfigError(
                        f"{place}: column {key} is {NAMES[type(value)]} ({short(orjson.dumps(value))}), but {name} "
                        f"at {before}. Write it the same way in every row, or leave it out"
                    )

    def check_names(self) -> None:
        """Raises ConfigError where from some row to the last one columns stand in the place of others."""
        shapes = sorted(self.shapes.values(), key=lambda shape: shape.first)
        if len(shapes) > 1000:  # keys as these are no names of columns that could have changed
            return
        for number, shape in enumerate(shapes[1:], 1):
            before, after = shapes[:number], shapes[number:]
            if max(s.last for s in before) > shape.first:
                continue
            gone = always(before) - {key for s in after for key in s.types}
            new = always(after) - {key for s in before for key in s.types}
            if types(before, gone) & types(after, new):
                said = f"rows have {', '.join(sorted(new))} and no longer {', '.join(sorted(gone))}"
                raise ConfigError(
                    f"{shape.place}: from here on {said}. "
                    "Give the columns the same names in every row, or give the two parts as two sources"
                )


def always(shapes: list[Shape]) -> set[str]:
    """The columns that all of these rows have."""
    return set.intersection(*(set(shape.types) for shape in shapes))


def types(shapes: list[Shape], keys: set[str]) -> set[type]:
    return {shape.types[key] for shape in shapes for key in keys}


# ---------------------------------------------------------------- JSON


class Wider(Exception):
    """Later rows have more columns, or wider types, than the first ones; `schema` fits them all."""

    def __init__(self, schema: pa.Schema):
        self.schema = schema


def json_tables(files: list[Path], schema: pa.Schema | None) -> Iterator[pa.Table]:
    """The rows of JSON files in one schema; raises Wider at the end where it is not the one that all rows need."""
    columns, start = Columns(), schema
    for file in files:
        for chunk in json_chunks(file):
            before = columns.total
            for number, row in chunk.rows():
                columns.take(row, chunk, number)
            if columns.total == before:
                continue
            table = infer(chunk)
            schema = wider(schema, table.schema) if schema else table.schema
            start = start or schema
            if schema.equals(start):
                yield table if table.schema.equals(schema) else conform(chunk, schema)
    columns.check_names()
    if schema and not schema.equals(start):
        raise Wider(schema)


@dataclass
class Chunk:
    """Some rows of a JSON file as JSON lines, of which the first one is its `first` line or row."""

    file: Path
    unit: str
    first: int
    data: bytes

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Each row with the number of its line or row. Raises ConfigError for the first line that is no object."""
        for number, line in enumerate(self.data.split(b"\n"), self.first):
            if line and not line.isspace():
                try:
                    row = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise bad_json(self.file, line, error, number) from error
                if type(row) is not dict or not row:
                    raise no_row(f"{self.file} {self.unit} {number}", row)
                yield number, row

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for _, row in self.rows()]


def json_chunks(file: Path) -> Iterator[Chunk]:
    """The rows of a JSON file: JSON lines, an array of objects, or the one such array within an object."""
    if whole(file):
        found = elements(file)
        for start in range(0, len(found), 10_000):
            yield Chunk(file, "row", start + 1, b"\n".join(map(orjson.dumps, found[start : start + 10_000])))
        return
    number = 1
    with opened(file) as stream:
        while data := stream.read(CHUNK):
            data += stream.readline()
            yield Chunk(file, "line", number, data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data)
            number += data.count(b"\n")


def whole(file: Path) -> bool:
    """Whether a JSON file is one array, or one object that is more than a row, rather than JSON lines."""
    with opened(file) as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not head.startswith(b"{") or ending(file) != ".json":
            return head.startswith(b"[")
        line, *more = head.split(b"\n", 1) if b"\n" in head else (head + stream.readline(), b"")
        alone = not (more[0].strip() or stream.read(1))
    try:
        first = orjson.loads(line)
    except orjson.JSONDecodeError:
        return True
    return alone and isinstance(first, dict) and bool(first.keys() & WRAPPERS) and inside(first) is not None


WRAPPERS = {"data", "rows", "train", "examples", "instances", "items", "records", "samples"}


def elements(file: Path) -> list[Any]:
    """The array that a JSON file is, or the only one in the object that it is."""
    with opened(file) as stream:
        found = parse(file, stream.read().removeprefix(b"\xef\xbb\xbf"))
    if isinstance(found, list):
        return found
    if (rows := inside(found)) is None:
        raise ConfigError(
            f"{file}: this is one object with {', '.join(found) or 'nothing in it'}, not rows. "
            "Write an array of objects, or one object a line"
        )
    return rows


def inside(found: Row) -> list[Row] | None:
    """The rows within an object like `{"version": 1, "data": [{…}, …]}`; None where there are none but messages."""
    lists = [value for value in found.values() if isinstance(value, list)]
    if len(lists) != 1 or not all(isinstance(row, dict) and not {"role", "from"} & row.keys() for row in lists[0]):
        return None
    return lists[0]


def parse(file: Path, text: bytes) -> Any:
    """The value of a JSON text, which is all of a file."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise bad_json(file, text, error) from error


def bad_json(file: Path, text: bytes, error: orjson.JSONDecodeError, line: int | None = None) -> ConfigError:
    """What is wrong with a JSON text, which is the given line of a file or all of it."""
    try:
        letters = text.decode()
    except UnicodeDecodeError:
        return bad_encoding(file)
    at = error.pos  # in letters, as are error.lineno and error.colno, of the text
    said, number, column = error.msg, line or error.lineno, at + 1 if line else error.colno
    if letters[at : at + 8].lstrip("-").startswith(("NaN", "Infinity", "nan", "inf")):
        said = "NaN and Infinity are no JSON; write null"
    elif "depth" in said:
        said = "nested too deeply, more than 1,024 levels"
    elif line and "unexpected end" in said:
        said = "the line ends within an object; each line is one whole object (to write a file so: jq -c .)"
    return ConfigError(f"{file} line {number}: bad JSON at column {column}: {said}: {short(letters, at)}")


def no_row(place: str, value: Any) -> ConfigError:
    if value == {}:
        return ConfigError(f"{place}: an object with nothing in it. Remove it")
    name = NAMES.get(type(value), "null")
    return ConfigError(
        f'{place}: a row is an object, this is {name}: {short(orjson.dumps(value))}. Give it a name, e.g. {{"text": …}}'
    )


def infer(chunk: Chunk) -> pa.Table:
    """Rows as a table in the schema that these rows alone show."""
    try:
        table = as_table(chunk.data)
    except pa.ArrowInvalid as error:
        if "specified twice" in str(error):
            check_twice(chunk)
        table = from_rows(chunk)
    for number, name in enumerate(table.column_names):
        if any(ragged(part) for part in table[name].chunks):
            table = table.set_column(number, pa.field(name, pa.json_()), as_json(chunk.column(name)))
    schema = pa.schema([pa.field(f.name, without_times(f.type)) for f in table.schema])
    return table if table.schema.equals(schema) else conform(chunk, schema)


def conform(chunk: Chunk, schema: pa.Schema) -> pa.Table:
    """Rows as a table in a schema that fits them."""
    try:
        table = as_table(chunk.data, pa.schema([f for f in schema if f.type != pa.json_()]))
    except pa.ArrowInvalid:
        return from_rows(chunk, schema)
    columns = [as_json(chunk.column(f.name)) if f.type == pa.json_() else table[f.name] for f in schema]
    return pa.table(columns, schema=schema)


def as_table(data: bytes, schema: pa.Schema | None = None) -> pa.Table:
    """JSON lines as a table; with a schema, those of its columns."""
    options = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore" if schema else "infer")
    try:
        table = pa.json.read_json(io.BytesIO(data), pa.json.ReadOptions(block_size=1 << 20), options)
    except pa.ArrowInvalid as error:
        if "straddl" not in str(error):
            raise
        # A row has to fit into a block.
        table = pa.json.read_json(io.BytesIO(data), pa.json.ReadOptions(block_size=len(data) + 1), options)
    table.validate()  # lists of nothing but nulls come out broken (pyarrow 26)
    return table


def from_rows(chunk: Chunk, schema: pa.Schema | None = None) -> pa.Table:
    """Rows as a table, slowly: for what pyarrow cannot read itself."""
    columns = {}
    for name in schema.names if schema else dict.fromkeys(key for _, row in chunk.rows() for key in row):
        values = chunk.column(name)
        wanted = schema.field(name).type if schema else None
        try:
            columns[name] = as_json(values) if wanted == pa.json_() else pa.array(values, wanted)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            numbers = any(isinstance(value, int | float) for value in values)
            floats = [None if value is None else float(value) for value in values] if numbers else []
            columns[name] = pa.array(floats, pa.float64()) if numbers else as_json(values)
    return pa.table(columns)


def as_json(values: list[Any]) -> pa.Array:
    texts = [None if value is None else orjson.dumps(value).decode() for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


def check_twice(chunk: Chunk) -> None:
    """Raises ConfigError for the first row in which an object has one key twice."""

    def once(place: str, pairs: list[tuple[str, Any]]) -> Row:
        keys = [key for key, _ in pairs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise ConfigError(f"{place}: the key {twice} is there twice. Keep one of them")
        return dict(pairs)

    for number, line in enumerate(chunk.data.split(b"\n"), chunk.first):
        if line and not line.isspace():
            json.loads(line, object_pairs_hook=partial(once, f"{chunk.file} line {number}"))


def ragged(values: pa.Array, deep: bool = False) -> bool:
    """Whether objects below the first level differ in their keys: as a table, each would get the keys of all.

    On the first level (the keys of a message) a null means the same as no key.
    """
    if pa.types.is_list(values.type):
        return ragged(values.flatten(), deep)
    if not pa.types.is_struct(values.type):
        return False
    parts = values.flatten()
    if any("\0" in f.name for f in values.type):  # as in a name of C
        return True
    if not parts or (deep and any(part.null_count > values.null_count for part in parts)):
        return True
    return any(ragged(part, deep=True) for part in parts)


def without_times(type: pa.DataType) -> pa.DataType:
    """A type in which texts that look like times are texts."""
    if pa.types.is_timestamp(type):
        return pa.string()
    if pa.types.is_list(type):
        return pa.list_(without_times(type.value_type))
    if pa.types.is_struct(type):
        return pa.struct([pa.field(f.name, without_times(f.type)) for f in type])
    return type


def wider(one: pa.Schema, other: pa.Schema) -> pa.Schema:
    """A schema that fits the rows of both."""
    types = {f.name: f.type for f in one}
    for f in other:
        types[f.name] = both(types[f.name], f.type) if f.name in types else f.type
    return pa.schema(list(types.items()))


def both(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    deep, deeper = below(one), below(other)
    if any(deep[name] != deeper[name] for name in deep.keys() & deeper.keys()):
        return pa.json_()
    try:
        schemas = [pa.schema([("", one)]), pa.schema([("", other)])]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return pa.json_()


def below(type: pa.DataType) -> dict[str, pa.DataType]:
    """The nested types within the objects of a column."""
    while pa.types.is_list(type):
        type = type.value_type
    return {f.name: f.type for f in type if pa.types.is_nested(f.type)} if pa.types.is_struct(type) else {}


# ---------------------------------------------------------------- csv, parquet, arrow


def csv_tables(file: Path) -> Iterator[pa.Table]:
    """The rows of a csv, every cell a text and only an empty one null."""
    header = next((cells for _, cells in csv_records(file)), [])
    check_header(file, header)
    parsing = pa.csv.ParseOptions(delimiter=delimiter(file), newlines_in_values=True)
    reading = pa.csv.ReadOptions(block_size=CHUNK)
    converting = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(header, pa.string()), null_values=[""], strings_can_be_null=True
    )
    try:
        with opened(file) as stream:
            for batch in pa.csv.open_csv(stream, reading, parsing, converting):
                yield pa.Table.from_batches([batch])
    except pa.ArrowInvalid as error:
        check_records(file, len(header))
        raise ConfigError(f"{file}: cannot be read as csv: {error}") from error
    with opened(file) as stream:
        quotes = sum(part.count(b'"') for part in iter(lambda: stream.read(CHUNK), b""))
    if quotes % 2:
        check_records(file, len(header))


def delimiter(file: Path) -> str:
    return "\t" if ending(file) == ".tsv" else ","


def csv_records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The header and the rows of a csv, each with the line where it begins."""
    csv.field_size_limit(sys.maxsize)
    with opened(file) as stream:
        reader = csv.reader(
            io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=delimiter(file), strict=False
        )
        start = 1
        try:
            for cells in reader:
                if cells:
                    yield start, cells
                start = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise bad_encoding(file) from error


def check_header(file: Path, header: list[str]) -> None:
    """Raises ConfigError for names of columns that are missing or there twice, or a delimiter that is not a comma."""
    if not header:
        raise ConfigError(f"{file}: there is no row in it")
    for other, name in ((";", "semicolon"), ("\t", "tab")):
        if len(header) == 1 and other in header[0]:
            mend = (
                "name it .tsv" if other == "\t" else f"write commas: mlr --icsv --ifs '{other}' --ocsv cat {file.name}"
            )
            raise ConfigError(f"{file} line 1: there is one column, {header[0]!r}: separated by {name}s? If so, {mend}")
    for number, name in enumerate(header, 1):
        if not name.strip():
            raise ConfigError(
                f"{file} line 1: column {number} has no name. Give it one or remove it (pandas: to_csv(…, index=False))"
            )
        if header.count(name) > 1:
            raise ConfigError(f"{file} line 1: two columns are named {name}. Rename one of them")


def check_records(file: Path, columns: int) -> None:
    """Raises ConfigError for the first row of a csv that has more or fewer cells than the header, or a quote open."""
    line, cells = 0, [""]
    for line, cells in csv_records(file):
        if len(cells) != columns:
            raise ConfigError(
                f"{file} line {line}: {len(cells)} cells, but {columns} in the header: {short(','.join(cells))}. "
                "A cell with a comma, quote or line break in it stands in quotes"
            )
    if "\n" in cells[-1]:
        raise ConfigError(f"{file} line {line}: a quote is opened and never closed: {short(','.join(cells))}")


def parquet_tables(file: Path) -> Iterator[pa.Table]:
    with damaged(file, "parquet"), pa.parquet.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=10_000):
            table = pa.Table.from_batches([batch]).replace_schema_metadata(parquet.schema_arrow.metadata)
            yield checked(file, table)


def arrow_tables(file: Path) -> Iterator[pa.Table]:
    """The rows of an Arrow file, be it in the format of streams (as datasets writes) or of files (feather)."""
    with damaged(file, "arrow"), pa.OSFile(str(file)) as stream:
        if stream.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(stream)
            batches: Iterable[pa.RecordBatch] = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            stream.seek(0)
            batches = pa.ipc.open_stream(stream)
        for batch in batches:
            yield checked(file, pa.Table.from_batches([batch]))


def checked(file: Path, table: pa.Table) -> pa.Table:
    """A table of valid values, dictionaries (pandas' categories) as the values they stand for."""
    table.validate(full=True)
    for number, f in enumerate(table.schema):
        if pa.types.is_dictionary(f.type):
            table = table.set_column(number, f.name, table[f.name].cast(f.type.value_type))
    try:
        Features.from_arrow_schema(table.schema)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file}: a column is of a type that cannot be read: {short(str(error))}") from error
    return table


@contextmanager
def damaged(file: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"{file}: cannot be read as {name}, cut short or damaged: {short(str(error))}. Copy or download it again"
        ) from error
