"""Files: every good kind gives back its rows exactly, every broken one is named with line and mend, and quickly."""

import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict, Json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoltrain.config import ConfigError
from smoltrain.data import readers
from smoltrain.data.sources import files

ROWS = [{"prompt": f"Frage {i}: größer?\nJa", "completion": f'"{i}", sagt er'} for i in range(30)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def jsonl(rows=ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows=ROWS, separator=",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows=ROWS, **options) -> bytes:
    sink = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def arrow(rows=ROWS) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, pa.Table.from_pylist(rows).schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows))
    return sink.getvalue()


def feather(rows=ROWS) -> bytes:
    sink = io.BytesIO()
    pa.feather.write_feather(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


GOOD = {
    "a.jsonl": (jsonl(), "line 18"),
    "b.ndjson": (jsonl().replace(b"\n", b"\r\n"), "line 18"),
    "c.json": (jsonl(), "line 18"),
    "d.json": (json.dumps(ROWS).encode(), "row 18"),
    "e.json": (json.dumps({"version": 2, "data": ROWS}, indent=1).encode(), "row 18"),
    "f.json": (json.dumps({"data": ROWS}).encode(), "row 18"),
    "g.jsonl": (b"\xef\xbb\xbf" + jsonl(), "line 18"),
    "h.jsonl": (b"\n  \n" + jsonl().replace(b"\n", b"\n\n"), "line 37"),
    "i.json.gz": (gzip.compress(json.dumps(ROWS).encode()), "row 18"),
    "j.jsonl.gz": (gzip.compress(jsonl()), "line 18"),
    "k.csv": (table(), "line 36"),  # each row takes two lines
    "l.csv": (b"\xef\xbb\xbf" + table(), "line 36"),
    "m.csv.gz": (gzip.compress(table()), "line 36"),
    "n.tsv": (table(separator="\t"), "line 36"),
    "o.parquet": (parquet(row_group_size=7), "row 18"),
    "p.arrow": (arrow(), "row 18"),
    "q.arrow": (feather(), "row 18"),
    "r.jsonl": (jsonl().rstrip(b"\n"), "line 18"),
    "s.jsonl": (gzip.compress(jsonl()), "line 18"),  # a gzip that is not named so
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_file_gives_back_its_rows_and_where_they_stand(tmp_path, name, streaming):
    content, place = GOOD[name]
    (tmp_path / name).write_bytes(content)
    source = files(name, streaming=streaming)
    assert list(source.train) == ROWS and source.test is None
    assert source.where("train", 17) == f"{name} {place}" and source.name == name[0]


def test_the_rows_of_a_file_are_cached_by_content(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "b.jsonl").write_bytes(jsonl())
    one, two = files("a.jsonl"), files("b.jsonl")
    assert one.fingerprint == two.fingerprint and len(list(tmp_path.glob("cache/**/*.arrow"))) == 1
    times = Path("a.jsonl").stat()
    (tmp_path / "a.jsonl").write_bytes(jsonl().replace(b"Frage", b"Fraga"))
    os.utime("a.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert files("a.jsonl").train[0]["prompt"].startswith("Fraga") and files("a.jsonl").fingerprint != one.fingerprint


def test_a_cell_of_a_csv_is_text_and_only_an_empty_one_is_missing(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n007,NA\n1.50,\n"",nan\n2020-01-01,true\n')
    assert [tuple(row.values()) for row in files("a.csv").train] == [
        ("007", "NA"),
        ("1.50", None),
        (None, "nan"),
        ("2020-01-01", "true"),
    ]


# What a table would change: each of these rows has to come back as it was given.
EXACT = {
    "dates are texts": [{"a": "2020-01-01", "b": [{"c": "2020-01-01 10:00:00"}]}],
    "numbers and texts within lists": [{"m": [{"content": "42"}]}, {"m": [{"content": [{"text": "x"}]}]}],
    "words of JSON are texts": [{"m": ["null", "true", {"a": 1}]}, {"m": ["42", '{"a": 1}']}],
    "arguments of tools keep their own keys": [
        {"m": [{"call": {"name": "f", "arguments": {"city": "Rome"}}}]},
        {"m": [{"call": {"name": "g", "arguments": {"day": "2020-01-01", "hours": [1, 2]}}}]},
    ],
    "an empty object": [{"m": [{"call": {"arguments": {}}}]}],
    "a lone surrogate pair, NUL and slash": [{"a": "\U0001f600 \0 / \u2028"}],
    "integers of 64 bits": [{"a": 2**63 - 1, "b": -(2**63)}],
    "digits of a float": [{"a": 0.1234567890123456, "m": [{"x": {"y": 0.1234567890123456}}]}],
    "integers and floats": [{"a": 1.0}, {"a": 2.5}],
}


@pytest.mark.parametrize("rows", EXACT.values(), ids=list(EXACT))
@pytest.mark.parametrize("write", [jsonl, lambda rows: json.dumps(rows).encode()])
def test_rows_of_json_are_not_changed(tmp_path, rows, write):
    (tmp_path / "a.json").write_bytes(write(rows))
    assert list(files("a.json").train) == rows


def test_later_rows_may_be_wider_than_the_first_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK", 64)
    given = [{"m": [{"role": "user", "x": None}], "s": None, "n": 1, "h": []} for _ in range(9)]
    given += [{"m": [{"role": "user", "x": {"k": 1}}], "s": "2020-01-01", "n": 1.5, "h": ["a"], "new": True}]
    given += [{"m": [{"role": "user", "x": {"l": 1}}], "s": "text", "n": 2, "h": [], "new": False}]
    (tmp_path / "a.jsonl").write_bytes(jsonl(given))
    rows = list(files("a.jsonl").train)
    assert rows == [{"new": None} | row for row in given]
    assert isinstance(files("a.jsonl").train.features["m"], Json)


def test_rows_may_have_thousands_of_different_keys(tmp_path):
    given = [{"a": "x"} | {f"k{i % 50}": 1, f"l{i}": 2} for i in range(2000)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(given))
    assert len(list(files("a.jsonl", streaming=True).train)) == 2000


def test_integers_that_no_float_holds_become_floats(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"a": 9223372036854775807}\n{"a": 1.5}\n{"a": 18446744073709551615}\n{"a": -1}\n'
    )
    assert [row["a"] for row in files("a.jsonl").train] == [2.0**63, 1.5, 2.0**64, -1.0]


def test_optional_columns_are_no_renamed_ones(tmp_path):
    given = [{"prompt": "q", "completion": "a"} | ({"system": "s"} if i % 3 else {"tools": "t"}) for i in range(9)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(given))
    assert [row["system"] for row in files("a.jsonl").train] == [row.get("system") for row in given]
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"a": "x", "b": "y"}, {"a": "x"}, {"a": "x"}]))
    assert len(files("b.jsonl").train) == 3


def test_a_line_of_12_mb_is_read(tmp_path):
    for name, content in (
        ("a.jsonl", jsonl([{"a": "x"}, {"a": "y" * 12_000_000}, {"a": "z"}])),
        ("a.csv", table([{"a": "x"}, {"a": "y" * 12_000_000}, {"a": "z"}])),
    ):
        (tmp_path / name).write_bytes(content)
        assert [len(row["a"]) for row in files(name).train] == [1, 12_000_000, 1]
        assert files(name).where("train", 2) == f"{name} line {3 if name == 'a.jsonl' else 4}"


# ---------------------------------------------------------------- several files


def lay(folder: Path, **contents: bytes) -> None:
    for name, content in contents.items():
        file = folder / name.replace("__", "/").replace("_json", ".json").replace("_csv", ".csv")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def first(rows) -> list[str]:
    return sorted({row["a"] for row in rows})


def row(text: str) -> bytes:
    return jsonl([{"a": text}])


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["x.jsonl", "y.jsonl.gz", "sub/z.json"], ["sub/z.json", "x.jsonl", "y.jsonl.gz"], None),
        (["train.jsonl", "test.jsonl", "validation.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "dev.jsonl"], None, ["dev.jsonl"]),
        (["gsm8k_train.jsonl", "gsm8k_test.jsonl"], ["gsm8k_train.jsonl"], ["gsm8k_test.jsonl"]),
        (["train/a.jsonl", "eval/a.jsonl"], ["train/a.jsonl"], ["eval/a.jsonl"]),
        (["a.jsonl", "valid.jsonl", "testimonials.jsonl"], ["a.jsonl", "testimonials.jsonl"], ["valid.jsonl"]),
        (["test_a.jsonl", "test_b.jsonl"], ["test_a.jsonl", "test_b.jsonl"], None),
    ],
)
@pytest.mark.parametrize("glob", ["", "/**/*.json*"])
def test_the_names_in_a_folder_or_glob_tell_the_splits(tmp_path, names, train, test, glob):
    folder = tmp_path / "test data"  # the folder's own name tells nothing
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(row(name)) if name.endswith("gz") else row(name))
    if not glob:
        (folder / "README.md").write_text("# what is here")
        (folder / "dataset_infos.json").write_text("{}")
        (folder / ".hidden.csv").write_text("a")
    source = files(f"{folder}{glob}")
    assert first(source.train) == (train or names[:2])
    assert (first(source.test) if source.test else None) == test
    listed = [source.where("train", i) for i in range(len(source.train))]
    assert [Path(place.removesuffix(" line 1")).name for place in listed] == [
        Path(row["a"]).name for row in source.train
    ]


def test_a_given_test_path_wins_and_lists_are_taken_in_order(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    for name in ("d/train.jsonl", "d/test.jsonl", "own.jsonl", "more.jsonl"):
        (tmp_path / name).write_bytes(row(name) * 2)
    monkeypatch.setenv("HOME", str(tmp_path))
    source = files("~/d", test_path="~/own.jsonl")
    assert first(source.test) == ["own.jsonl"] and source.where("test", 1) == "own.jsonl line 2"
    source = files(["own.jsonl", "more.jsonl"])
    assert [row["a"] for row in source.train] == ["own.jsonl"] * 2 + ["more.jsonl"] * 2 and source.name == "own+more"
    assert source.where("train", 3) == "more.jsonl line 2"
    assert (files("~/d").name, files("d/*.jsonl").name, files("own.jsonl").name) == ("d", "d", "own")


def test_what_save_to_disk_wrote_is_read(tmp_path):
    data = Dataset.from_list(ROWS)
    data.save_to_disk("one", num_shards=3)
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"of a map")
    assert list(files("one").train) == ROWS and files("one").test is None
    DatasetDict(train=data, validation=data.select(range(3)), test=data.select(range(5))).save_to_disk("many")
    source = files("many")
    assert list(source.train) == ROWS and list(source.test) == ROWS[:5]
    assert files("many/validation").where("train", 2) == "data-00000-of-00001.arrow row 3"
    DatasetDict(train_sft=data, train_gen=data).save_to_disk("two")
    with pytest.raises(ConfigError, match="splits train_gen, train_sft are there; name one, as two/train_gen"):
        files("two")
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ConfigError, match=r"data-00001-of-00003\.arrow: the file is missing"):
        files("one")


# ---------------------------------------------------------------- what is broken

good, lines = jsonl(), jsonl().splitlines(keepends=True)
HTML = b"<!DOCTYPE html>\n<html><body>404</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
BROKEN = {  # file -> content, what the error says
    "bad_line.jsonl": (b"".join(lines[:6]) + b'{"prompt": "a" "b"}\n' + lines[7], "line 7: bad JSON at column 16"),
    "cut_line.jsonl": (good[:-20], "line 30: bad JSON .* the line ends within an object|line 30: bad JSON"),
    "pretty.jsonl": (json.dumps(ROWS[0], indent=1).encode(), "line 1: .* each line is one whole object .*jq -c"),
    "long_line.jsonl": (b'{"a": "' + b"x" * 9999 + b'" 1}', r"column 10009.*: …x{30,}"),
    "bad_array.json": (b'[{"a": 1},\n{"a" 2}]', "line 2: bad JSON at column 6"),
    "no_json.json": (b"hello\n", "line 1: bad JSON at column 1"),
    "single_quotes.jsonl": (b"{'a': 'b'}\n", "line 1: bad JSON at column 2"),
    "latin1.jsonl": (good + '{"prompt": "größer"}\n'.encode("latin1"), r"line 31: byte \d+ \(0xf6\).*iconv -f latin1"),
    "latin1.csv": ("a,b\nx,größer\n".encode("latin1"), r"line 2: byte 8 \(0xf6\) is not UTF-8.*iconv -f latin1"),
    "latin1_array.json": ('[{"a": "größer"}]'.encode("latin1"), r"line 1: byte 10 \(0xf6\)"),
    "utf16.jsonl": (good.decode().encode("utf-16"), "UTF-16. Convert it: iconv"),
    "utf16_bare.csv": ("a,b\n1,2\n".encode("utf-16-le"), "NUL bytes"),
    "empty.jsonl": (b"", "the file is empty"),
    "empty.parquet": (b"", "the file is empty"),
    "blank.jsonl": (b"\n  \n\n", "there is no row in it"),
    "no_rows.json": (b"[]", "there is no row in it"),
    "no_rows.csv": (b"a,b\n", "there is no row in it"),
    "renamed.jsonl": (
        jsonl([*ROWS[:4], *({"prompt": "q", "response": "a"} for _ in range(3))]),
        "line 5: from here on rows have response and no longer completion",
    ),
    "renamed_pair.json": (
        json.dumps([*ROWS[:4], {"question": "q", "answer": "a"}]).encode(),
        "row 5: from here on rows have answer, question and no longer completion, prompt",
    ),
    "number.jsonl": (
        jsonl([*ROWS[:4], {"prompt": "q", "completion": 12}]),
        r"line 5: column completion is a number \(12\), but text at .* line 1",
    ),
    "list.jsonl": (jsonl([ROWS[0], {"prompt": ["q"], "completion": "a"}]), "line 2: column prompt is a list"),
    "nan.jsonl": (b'{"a": "x", "b": NaN}\n', "line 1: .* column 17: NaN and Infinity are no JSON; write null"),
    "infinity.jsonl": (b'{"a": "x"}\n{"a": "x", "b": -Infinity}\n', "line 2: .* NaN and Infinity are no JSON"),
    "null.jsonl": (good + b"null\n", "line 31: a row is an object, this is null"),
    "text.jsonl": (b'"only text"\n', 'line 1: .*this is text: "only text".*Give it a name'),
    "numbers.json": (b"[1, 2]", "row 1: a row is an object, this is a number: 1"),
    "strings.json": (b'["a", "b"]', 'row 1: a row is an object, this is text: "a"'),
    "nothing.jsonl": (b'{"a": 1}\n{}\n', "line 2: an object with nothing in it"),
    "settings.json": (b'{"model": "x",\n "steps": 3}', "this is one object with model, steps, not rows"),
    "deep.jsonl": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "line 1: .* nested too deeply"),
    "huge.jsonl": (b'{"a": 1e999}\n', "line 1: bad JSON .* infinity"),
    "two_on_a_line.jsonl": (b'{"a": 1} null {"a": 2}\n', "line 1: bad JSON at column 10"),
    "twice.jsonl": (b'{"a": "x", "b": "y"}\n{"a": "x", "a": "z"}\n', "line 2: the key a is there twice"),
    "surrogate.jsonl": (b'{"a": "\\ud83d"}\n', "line 1: bad JSON at column 8: .*surrogate"),
    "cut.jsonl.gz": (gzip.compress(good)[:-30], "gzip is cut short or damaged"),
    "cut.csv.gz": (gzip.compress(table())[:-30], "gzip is cut short or damaged"),
    "flipped.jsonl.gz": (gzip.compress(good)[:40] + b"\0\0\0\0" + gzip.compress(good)[44:], "gzip is cut short or dam"),
    "plain.jsonl.gz": (good, "not a gzip, though it is named so. Rename it to plain.jsonl"),
    "page.json": (HTML, "this is a web page"),
    "page.csv": (b"\n" + HTML, "this is a web page"),
    "pointer.jsonl": (LFS, "git lfs pull"),
    "pointer.parquet": (LFS, "git lfs pull"),
    "zip.csv": (b"PK\x03\x04" + b"\0" * 50, "zip archive"),
    "really.json": (parquet(), "not text but parquet or arrow"),
    "cut.parquet": (parquet()[:-100], "cannot be read as parquet, cut short or damaged"),
    "text.parquet": (good, "cannot be read as parquet"),
    "cut.arrow": (arrow()[:-700], "cannot be read as arrow, cut short or damaged"),
    "invalid.arrow": (arrow([{"a": "ab"}]).replace(b"ab\0\0", b"\xff\xff\0\0"), "cannot be read as arrow"),
    "text.arrow": (good, "cannot be read as arrow"),
    "more.csv": (b"a,b\n1,2\n3,4,5\n", "line 3: 3 cells, but 2 in the header: 3,4,5"),
    "fewer.csv": (b'a,b\n"1\n1",2\n3\n', "line 4: 1 cells, but 2 in the header: 3"),
    "shifted.csv": (b"a,b\n0,1,2\n1,3,4\n", "line 2: 3 cells, but 2 in the header"),
    "same.csv": (b"a,b,a\n1,2,3\n", "line 1: two columns are named a"),
    "index.csv": (b",a,b\n0,1,2\n", r"line 1: column 1 has no name.*index=False"),
    "semicolon.csv": (b"prompt;completion\nq;a\n", "separated by semicolons"),
    "tabs.csv": (b"prompt\tcompletion\nq\ta\n", "separated by tabs. If so, name it .tsv"),
    "quote.csv": (b'a,b\n1,2\n3,"x\n5,6\n', "line 3: a quote is opened and never closed"),
    "tokens.jsonl": (b'{"messages": [], "input_ids": [1, 2]}\n', "line 1: column input_ids holds tokens already"),
    "labels.parquet": (parquet([{"text": "a", "labels": [1]}]), "row 1: column labels holds tokens already"),
}


@pytest.mark.parametrize(
    ("name", "streaming"),
    [*((name, False) for name in BROKEN), *((name, True) for name in BROKEN if name != "twice.jsonl")],
)
def test_what_is_broken_is_named_with_its_place(tmp_path, name, streaming):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=message) as caught:
        list(files(name, streaming=streaming).train)
    assert name in str(caught.value) and time.monotonic() - start < 2
    assert not list(tmp_path.glob("cache/**/*.arrow*")) or "tokens" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_is_not_there_is_told_with_what_is(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(good)
    for path, message in {
        "data/trian.jsonl": f"looked for trian.jsonl in {tmp_path}/data); did you mean train.jsonl?",
        "dta/train.jsonl": f"looked for dta in {tmp_path}); did you mean data?",
        "data/*.csv": "no file is named like this",
        "notes.txt": "cannot read .txt; .json, .jsonl",
        "empty": "no data in this folder (it is empty)",
        "other": "no data in this folder (in it are README.md, a.txt)",
        "mixed": "files of different kinds, mixed/a.csv and mixed/b.jsonl. Name those of one kind, as in 'mixed/*.csv'",
        "x" * 300: "no file has so long a name",
        "packed": "cannot read .gz",
    }.items():
        (tmp_path / "empty").mkdir(exist_ok=True)
        lay(tmp_path, **{"notes.txt": b"x", "other/a.txt": b"x", "other/README.md": b"x"})
        lay(tmp_path, **{"mixed/a.csv": b"a\n1\n", "mixed/b.jsonl": good, "rows.parquet.gz": b"x"})
        with pytest.raises(ConfigError, match=re.escape(message)):
            files("rows.parquet.gz" if path == "packed" else path)
    with pytest.raises(ConfigError, match="files of different kinds"):
        files(["data/train.jsonl", "mixed/a.csv"])
    with pytest.raises(ConfigError, match=r"data.test_path=none.jsonl: there is no such file"):
        files("data/train.jsonl", test_path="none.jsonl")
    with pytest.raises(ConfigError, match="name at least one file"):
        files([])


def test_files_of_one_source_have_the_same_columns(tmp_path):
    lay(tmp_path, **{"d/a.csv": b"a,b\n1,2\n", "d/b.csv": b"a,c\n1,2\n", "j/a.jsonl": row("x")})
    with pytest.raises(ConfigError, match=r"b.csv: there is a column c that is not in d/a.csv"):
        files("d")
    (tmp_path / "j" / "b.jsonl").write_bytes(jsonl([{"b": "x"}]))
    with pytest.raises(ConfigError, match=r"j/b.jsonl line 1: from here on rows have b and no longer a"):
        files("j")
    (tmp_path / "j" / "b.jsonl").write_bytes(jsonl([{"a": 1}]))
    with pytest.raises(
        ConfigError, match=r"j/b.jsonl line 1: column a is a number \(1\), but text at j/a.jsonl line 1"
    ):
        files("j")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(good)
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(ConfigError, match=r"a.jsonl: cannot be read: Permission denied"):
        files("a.jsonl")


# ---------------------------------------------------------------- made by hypothesis

KEPT = {name: content for name, (content, _) in GOOD.items()}


@st.composite
def damage(draw) -> tuple[str, bytes]:
    """A good file with some bytes changed, cut off, taken out, doubled, or put in."""
    name = draw(st.sampled_from(sorted(KEPT)))
    content = bytearray(KEPT[name])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([1, 2, 8, 100]))
        match draw(st.sampled_from(["change", "cut", "take", "double", "put"])):
            case "change":
                content[at : at + length] = draw(st.binary(min_size=length, max_size=length))
            case "cut":
                del content[at:]
            case "take":
                del content[at : at + length]
            case "double":
                content[at:at] = content[at : at + length]
            case "put":
                words = [b"\n", b'"', b"{", b"]", b",", b"null", b"NaN", b"\xff", b"\0", b"\r", b"1e999", b"\\u0000"]
                content[at:at] = draw(st.sampled_from(words)) * draw(st.sampled_from([1, 3]))
    return name, bytes(content)


def survives(folder: Path, name: str, content: bytes) -> None:
    """Either rows come back, all of which can be said where they stand, or a ConfigError."""
    file = folder / name
    file.write_bytes(content)
    start = time.monotonic()
    try:
        source = files(str(file))
        assert all(isinstance(row, dict) for row in source.train)
        assert source.where("train", len(source.train) - 1).startswith(name)
        assert list(files(str(file), streaming=True).train)
    except ConfigError as error:
        assert name in str(error) and str(error).isprintable() is not None
    assert time.monotonic() - start < 5


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(damage())
def test_damaged_files_are_refused_or_read(tmp_path, broken):
    survives(tmp_path, *broken)


@pytest.mark.torture
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(damage())
def test_damaged_files_are_refused_or_read_for_long(tmp_path, broken):
    survives(tmp_path, *broken)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.integers(-99, 99).map(lambda n: n / 4)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.lists(st.fixed_dictionaries({"a": st.lists(VALUES, max_size=3), "b": st.none() | st.text()}), min_size=1))
def test_any_rows_of_json_come_back(tmp_path, rows):
    text = jsonl(rows)
    (tmp_path / "a.jsonl").write_bytes(text)
    read = list(files("a.jsonl").train)
    for one, other in zip(read, rows, strict=True):
        assert one["b"] == other["b"] and filled(one["a"], other["a"])


def filled(one, other) -> bool:
    """Whether two values are the same, but for nulls of the first level's keys, integers that became floats."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(filled(one.get(key), other.get(key)) for key in one.keys() | other.keys())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(filled, one, other))
    return one == other


@pytest.mark.torture
def test_the_bad_line_of_50_mb_is_found_within_2_seconds(tmp_path):
    count = 25_000_000 // len(good)
    (tmp_path / "a.jsonl").write_bytes(good * count + b'{"a": \n' + good * count)
    start = time.process_time()
    with pytest.raises(ConfigError, match=f"line {30 * count + 1}: bad JSON"):
        files("a.jsonl")
    assert time.process_time() - start < 2


def test_nothing_of_the_users_is_touched_and_no_network_is_asked(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(good)
    (tmp_path / "a.jsonl").chmod(0o444)
    script = "import socket; socket.socket.connect = None; from smoltrain.data.sources import files; files('a.jsonl')"
    kept = {name: value for name, value in os.environ.items() if name != "HF_DATASETS_CACHE"}
    environment = kept | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(readers.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert (tmp_path / "a.jsonl").read_bytes() == good and {p.name for p in tmp_path.iterdir()} == {"a.jsonl", "home"}
