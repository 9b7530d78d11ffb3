"""Data: the embedded sums are right and disjoint, files of every shape are read, and nothing is lost in silence."""

import json
import random
import re

import pytest
from conftest import SHARED
from datasets import Dataset, DatasetDict

from smoltrain.config import ConfigError
from smoltrain.data import fingerprint, sums
from smoltrain.data.formats import SHAPES, canonical
from smoltrain.data.sources import local


@pytest.fixture(scope="module")
def rows() -> DatasetDict:
    return sums.conversations(500, 200, seed=0)


def test_every_answer_is_right(rows):
    for row in [*rows["train"], *rows["test"]]:
        question, reply = (message["content"] for message in row["messages"])
        a, sign, b, result = re.match(r"(\d+) ([+-]) (\d+) = (\d+)\.", reply).groups()
        assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert f"has {a} " in question and f" {b}" in question and reply == row["answer"]
        assert reply.split(". ")[1].split()[0] == question.split()[0]


def test_every_mistake_is_wrong_and_every_choice_right():
    for row in [*sums.preferences(500, 200, seed=0)["train"]]:
        assert row["chosen"][0]["content"] == row["answer"] != row["rejected"][0]["content"]


def test_a_held_out_sum_is_never_trained_on_nor_read_in_pretraining(rows):
    from smoltrain.tiny.pretrain import documents

    def told(split):
        return {row["answer"].split(" = ")[0] for row in rows[split]}

    text = documents(random.Random(0))
    read = {match[0] for _ in range(20_000) if (match := re.search(r"\d+ [+-] \d+", "".join(next(text))))}
    assert len(read) > 7000 and not told("test") & (told("train") | read)


def test_the_same_seed_gives_the_same_rows_and_both_forms_hold_out_the_same(rows):
    again, other = sums.conversations(500, 200, seed=0), sums.conversations(500, 200, seed=1)
    assert fingerprint(again["train"]) == fingerprint(rows["train"]) != fingerprint(other["train"])
    assert rows["test"]["answer"] == sums.preferences(5, 200, seed=0)["test"]["answer"]


def test_a_fingerprint_is_of_the_content():
    rows = Dataset.from_list([{"a": i} for i in range(3000)])
    assert fingerprint(rows) == fingerprint(Dataset.from_list(list(rows))) == fingerprint(rows.select(range(3000)))
    assert fingerprint(rows) != fingerprint(rows.select(range(2999))) != fingerprint(rows.shuffle(seed=0))


SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
OTHER = {"role": "assistant", "content": "b"}
GIVEN = {  # shape -> a row as people have it, the row that trainers eat
    ("messages",): ({"messages": SAID}, {"messages": SAID}),
    ("conversations",): (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": SAID},
    ),
    ("prompt", "completion"): ({"prompt": "q", "completion": "a"}, {"messages": SAID}),
    ("question", "answer"): ({"question": "q", "answer": "a"}, {"messages": SAID}),
    ("instruction", "output"): (
        {"instruction": "i", "input": "q", "output": "a"},
        {"messages": [{"role": "user", "content": "i\n\nq"}, SAID[1]]},
    ),
    ("prompt", "chosen", "rejected"): (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": SAID[:1], "chosen": SAID[1:], "rejected": [OTHER]},
    ),
    ("chosen", "rejected"): (
        {"chosen": SAID, "rejected": [SAID[0], OTHER]},
        {"prompt": SAID[:1], "chosen": SAID[1:], "rejected": [OTHER]},
    ),
    ("conversations", "chosen", "rejected"): (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"prompt": SAID[:1], "chosen": SAID[1:], "rejected": [OTHER]},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_read(shape):
    given, expected = GIVEN[shape]
    assert canonical(Dataset.from_list([given]), None)[0] == expected


def test_whole_conversations_as_preferences_share_their_prompt():
    row = {"prompt": "q", "chosen": SAID, "rejected": [SAID[0], OTHER], "messages": SAID, "score_chosen": 9.0}
    expected = {"prompt": SAID[:1], "chosen": SAID[1:], "rejected": [OTHER]}
    assert canonical(Dataset.from_list([row]), None)[0] == expected


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_is_read_through_its_column_names(folder, ending):
    table = Dataset.from_list([{"id": i, "ask": f"q{i}", "say": f"a{i}"} for i in range(20)])
    file = str(folder / f"rows.{ending}")
    {"csv": table.to_csv, "parquet": table.to_parquet}.get(ending, table.to_json)(file)
    data = local(file, {"prompt": "ask", "completion": "say"}, test_rows=5, max_rows=None, seed=0)
    assert (len(data["train"]), len(data["test"])) == (15, 5)
    pairs = {tuple(m["content"] for m in row["messages"]) for row in [*data["train"], *data["test"]]}
    assert pairs == {(f"q{i}", f"a{i}") for i in range(20)}


def test_a_cell_of_a_csv_is_text(folder):
    (folder / "rows.csv").write_text("prompt,completion\n007,NA\n" + "1,2\n" * 3)
    data = local("rows.csv", None, test_rows=1, max_rows=None, seed=0)
    said = {tuple(m["content"] for m in row["messages"]) for row in [*data["train"], *data["test"]]}
    assert said == {("007", "NA"), ("1", "2")}


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"text": "only"}, None, "fit none of the known shapes"),
        ({"a": "q", "b": "r"}, {"prompt": "a", "completion": "c"}, "no column c; there are a, b"),
        ({"messages": [{"role": "robot", "content": "x"}]}, None, "row 1: a message has the role 'robot'"),
        ({"messages": []}, None, "row 1: a conversation without messages"),
        ({"chosen": SAID, "rejected": SAID[:1]}, None, "row 1: nothing is rejected"),
        ({"messages": [SAID[0] | {"tool_calls": ["f"]}]}, None, "row 1: a message of 'user' calls tools"),
        ({"prompt": "q", "completion": " "}, None, "row 1: a message of 'assistant' has no text but ' '"),
        ({"prompt": "q", "completion": None}, None, "row 1: a message of 'assistant' has no text but None"),
    ],
)
def test_what_cannot_be_read_is_named(row, columns, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        canonical(Dataset.from_list([row]), columns)


def test_rows_cut_and_dropped_are_counted_and_said(smoltrain, capsys):
    (record,) = smoltrain("trainer.args.max_length=40")
    train = record["rows"]["train"]
    assert train["given"] == 32 and train["cut"] > 0
    assert f"{train['cut']} of 32 rows reach trainer.args.max_length=40 and may be cut" in capsys.readouterr().out
    (record,) = smoltrain("trainer.args.max_length=30")
    train = record["rows"]["train"]
    assert train["dropped"] > 0
    assert f"{train['dropped']} of 32 rows are dropped" in capsys.readouterr().out


def test_packed_rows_are_counted_too(smoltrain):
    (record,) = smoltrain("trainer.args.packing=true", "trainer.args.max_length=128", "evaluation.max_rows=0")
    assert record["rows"]["train"] | {"tokens": 0} == {"given": 32, "dropped": 0, "cut": 0, "tokens": 0}
    assert record["rows"]["train"]["tokens"] > 32 * 40
    (record,) = smoltrain(
        "trainer.args.packing=true", "trainer.args.packing_strategy=wrapped", "trainer.args.max_length=128"
    )
    assert record["rows"]["train"]["dropped"] is record["rows"]["train"]["cut"] is None  # rows cannot be told apart


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not beside this checkout")
@pytest.mark.parametrize(
    ("trainer", "file", "rows"),
    [("sft", "gsm8k_train.jsonl", 400), ("sft", "alpaca_en_demo.json", 400), ("dpo", "dpo_en_demo.json", 300)],
)
def test_real_rows_are_learned_and_none_is_lost_in_silence(smoltrain, capsys, trainer, file, rows):
    few = ("data.test_rows=24", f"data.max_rows={rows}", "trainer.args.max_steps=100", "evaluation.max_rows=0")
    small = ("trainer.args.per_device_train_batch_size=2", "trainer.args.per_device_eval_batch_size=4", "tracking=none")
    (record,) = smoltrain(f"trainer={trainer}", "data=local", f"data.path={SHARED / file}", quick=(*few, *small))
    metrics, out = record["metrics"], capsys.readouterr().out
    assert record["status"] == "completed" and metrics["eval_loss"] < metrics["before/eval_loss"]
    for split, counted in record["rows"].items():
        assert counted["given"] == (24 if split == "test" else rows - 24)
        for kind, said in (("cut", "may be cut"), ("dropped", "are dropped")):
            found = re.search(rf"{split}: (\d+) of {counted['given']} rows .*{said}", out)
            assert int(found[1] if found else 0) == counted[kind]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not beside this checkout")
def test_every_real_row_arrives_whole():
    lines = (SHARED / "gsm8k_test.jsonl").read_text().splitlines()
    given = {(row["question"], row["answer"]) for row in map(json.loads, lines)}
    data = local(str(SHARED / "gsm8k_test.jsonl"), None, test_rows=100, max_rows=None, seed=0)
    rows = [*data["train"], *data["test"]]
    assert len(rows) == len(lines)
    assert {tuple(m["content"] for m in row["messages"]) for row in rows} == given
