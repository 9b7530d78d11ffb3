"""Data as a run sees it: the embedded sums are right and disjoint, and what is lost of any rows is said."""

import json
import random
import re

import datasets
import pytest
from conftest import SHARED
from transformers import AutoTokenizer

from smoltrain.data import local, sums
from smoltrain.data.encode import Chat, Conversations
from smoltrain.model import locate


@pytest.fixture(scope="module")
def source():
    return sums.conversations(500, 200, seed=0).origins["sums"].source


def test_every_answer_is_right(source):
    for row in [*source.train, *source.test]:
        question, reply = (message["content"] for message in row["messages"])
        a, sign, b, result = re.match(r"(\d+) ([+-]) (\d+) = (\d+)\.", reply).groups()
        assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert f"has {a} " in question and f" {b}" in question and reply == row["answer"]
        assert reply.split(". ")[1].split()[0] == question.split()[0]


def test_every_mistake_is_wrong_and_every_choice_right():
    for row in sums.preferences(500, 200, seed=0).origins["sums_preferences"].source.train:
        assert row["chosen"][0]["content"] == row["answer"] != row["rejected"][0]["content"]


def test_a_held_out_sum_is_never_trained_on_nor_read_in_pretraining(source):
    from smoltrain.tiny.pretrain import documents

    def told(rows):
        return {row["answer"].split(" = ")[0] for row in rows}

    text = documents(random.Random(0))
    read = {match[0] for _ in range(20_000) if (match := re.search(r"\d+ [+-] \d+", "".join(next(text))))}
    assert len(read) > 7000 and not told(source.test) & (told(source.train) | read)


def test_the_same_seed_gives_the_same_rows_and_both_forms_hold_out_the_same(source):
    again, other = (sums.conversations(500, 200, seed=seed).origins["sums"].source for seed in (0, 1))
    assert again.train[:] == source.train[:] != other.train[:]
    assert again.fingerprint == source.fingerprint != other.fingerprint
    preferences = sums.preferences(5, 200, seed=0).origins["sums_preferences"].source
    assert source.test["answer"][:] == preferences.test["answer"][:]


def test_what_is_lost_is_counted_and_said(smoltrain, capsys):
    (record,) = smoltrain("trainer.args.max_length=40")
    train, out = record["rows"]["train"], capsys.readouterr().out
    assert train["given"] == 32 and train["cut"] > 0 and train["lost"] > 0
    assert f"train: {train['cut']} of 32 rows cut at trainer.args.max_length=40" in out
    assert f"train: lost that way: {train['lost']} tokens that would be learned" in out
    (record,) = smoltrain("trainer.args.max_length=47", "data.on_too_long=drop")
    train = record["rows"]["train"]
    dropped = train["dropped"]["longer than max_length"]
    assert dropped and train["kept"] == 32 - dropped
    assert f"train: {dropped} of 32 rows dropped: longer than max_length" in capsys.readouterr().out


def test_packed_rows_are_counted_too(smoltrain):
    (record,) = smoltrain("trainer.args.packing=true", "trainer.args.max_length=128", "evaluation.max_rows=0")
    train = record["rows"]["train"]
    assert (train["given"], train["kept"], train["cut"]) == (32, 32, 0) and train["tokens"] > 32 * 40


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not beside this checkout")
@pytest.mark.parametrize("steps", [25, pytest.param(100, marks=pytest.mark.torture)])
@pytest.mark.parametrize(
    ("trainer", "file", "rows"),
    [("sft", "gsm8k_train.jsonl", 400), ("sft", "alpaca_en_demo.json", 400), ("dpo", "dpo_en_demo.json", 300)],
)
def test_real_rows_are_learned_and_none_is_lost_in_silence(smoltrain, capsys, trainer, file, rows, steps):
    few = ("data.test_rows=24", f"data.max_rows={rows}", f"trainer.args.max_steps={steps}", "evaluation.max_rows=0")
    few += ("trainer.args.max_length=256", "data.test_share=0.1")
    small = ("trainer.args.per_device_train_batch_size=2", "trainer.args.per_device_eval_batch_size=4", "tracking=none")
    (record,) = smoltrain(f"trainer={trainer}", f"data.path={SHARED / file}", quick=(*few, *small))
    metrics, out = record["metrics"], capsys.readouterr().out
    assert record["status"] == "completed"
    # A few pairs say nothing of a model that cannot read them; of SFT they do.
    assert trainer == "dpo" or metrics["eval_loss"] < metrics["before/eval_loss"]
    assert sum(counts["given"] for counts in record["rows"].values()) == rows
    for split, counts in record["rows"].items():
        assert counts["given"] == counts["kept"] + sum(counts["dropped"].values())
        cut = re.search(rf"{split}: (\d+) of {counts['given']} rows cut", out)
        assert int(cut[1] if cut else 0) == counts["cut"]
        said = re.findall(rf"{split}: (\d+) of {counts['given']} rows dropped", out)
        left_over = counts["dropped"].pop("beyond data.test_rows", 0)
        assert sorted(map(int, said)) == sorted(counts["dropped"].values()) and (split == "test" or not left_over)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not beside this checkout")
def test_every_real_row_arrives_whole(folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    file = SHARED / "gsm8k_test.jsonl"
    given = {(row["question"], row["answer"]) for row in map(json.loads, file.read_text().splitlines())}
    how = {"test_share": 0.05, "test_rows": 2000, "seed": 0, "on_too_long": "error", "on_bad_row": "error"}
    how |= {"on_duplicate": "keep", "system_prompt": None, "workers": 1}
    chat, encoder = Chat(AutoTokenizer.from_pretrained(locate("pkg://smoltrain/tiny"))), Conversations("assistant")
    done = local(str(file), None, False, None, None, None, None, None, **how).prepare(encoder, chat, None)
    arrived = set()
    for row in [*done.train, *done.test]:
        (asked, _), (said, _) = encoder.segments(row)
        words = chat.tokenizer.decode(asked).removeprefix("<|im_start|>user\n")
        arrived.add((words.removesuffix("<|im_end|>\n<|im_start|>assistant\n"), chat.tokenizer.decode(said[:-1])))
    assert arrived == given
