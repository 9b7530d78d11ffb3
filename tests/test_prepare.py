"""From rows to what a trainer is given: no row is lost uncounted or moves across a split, none is read twice."""

import gzip
import json
import multiprocessing
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import resolvable
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from smoltrain import train
from smoltrain.config import ConfigError
from smoltrain.config.compose import compose
from smoltrain.data import local, mixture, streams, tokens
from smoltrain.data.encode import Chat, Conversations, Preferences, Untokenized
from smoltrain.data.splits import shares
from smoltrain.data.tokens import Pass
from smoltrain.model import locate, read_chat_template
from smoltrain.preflight import preflight

OWN = Path(__file__).parent / "conf"
END = "<|im_end|>"
HOW = {
    "test_share": 0.25,
    "test_rows": 500,
    "seed": 0,
    "on_too_long": "truncate",
    "on_bad_row": "error",
    "on_duplicate": "keep",
    "system_prompt": None,
    "workers": 1,
}
TAKEN = {"format": None, "columns": None, "keep_where": None, "drop_where": None, "max_rows": None}


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    return folder / "cache" / "smoltrain"


@pytest.fixture(scope="module")
def chat():
    return Chat(AutoTokenizer.from_pretrained(locate("pkg://smoltrain/tiny")))


def pair(i: int, **more) -> dict:
    return {"prompt": f"q{i}", "completion": f"a{i}", **more}


def lay(rows: list[dict], name: str = "rows.jsonl") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def data(rows: list[dict] | str, test_path: str | None = None, streaming: bool = False, **how):
    path = rows if isinstance(rows, str) else lay(rows)
    taken = {key: how.pop(key, value) for key, value in TAKEN.items()}
    return local(path, test_path, streaming, **taken, **(HOW | how))


def prepared(chat, rows, max_length: int | None = None, encoder=None, **how):
    return data(rows, **how).prepare(encoder or Conversations("assistant"), chat, max_length)


def replies(chat, rows) -> list[str]:
    """What is learned of each row, without its end of turn."""
    return [chat.tokenizer.decode([t for t in row["labels"] if t != -100]).removesuffix(END) for row in rows]


def sides(chat, done) -> tuple[set[str], set[str]]:
    return set(replies(chat, done.train)), set(replies(chat, done.test))


# ---------------------------------------------------------------- every row is counted


# A file is prepared for every example: what fails is shown as it was found, not shrunk for minutes.
BRISK = settings(
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],
)
REASONS = {"truncate": "all prompt at max_length", "drop": "longer than max_length"}
long_or_short = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=5, max_size=30)


@given(long_or_short, st.integers(8, 60), st.sampled_from(["truncate", "drop"]), st.sampled_from(["keep", "drop"]))
@settings(BRISK, max_examples=40)
def test_given_is_kept_and_dropped_whatever_the_rows(chat, sizes, max_length, on_too_long, on_duplicate):
    rows = [{"prompt": "é " * a, "completion": "東" * b} for a, b in sizes]
    rows += [{"prompt": "\0", "completion": "bad"}, {"prompt": "q", "completion": " "}]
    try:
        done = prepared(
            chat,
            rows,
            max_length,
            on_too_long=on_too_long,
            on_duplicate=on_duplicate,
            on_bad_row="drop",
            test_rows=5,
            test_share=0.5,
        )
    except ConfigError as error:
        assert re.search(r"no row is left to|not one is; data.test_share=", str(error))
        return
    (counts,) = done.counts.values()
    assert counts["train"].given + counts["test"].given == len(rows)
    for split, trained in {"train": done.train, "test": done.test}.items():
        c = counts[split]
        assert c.given == c.kept + sum(c.dropped.values()) and c.kept == len(trained)
        assert set(c.dropped) <= {
            REASONS[on_too_long],
            "repeated",
            "empty text",
            "NUL character",
            "beyond data.test_rows",
        }
        assert c.tokens == sum(map(len, trained["input_ids"]))
        assert c.trained == sum(label != -100 for labels in trained["labels"] for label in labels)
        assert max(map(len, trained["input_ids"])) <= max_length
    # what would have been learned of all readable rows is learned, lost to max_length, or left out for another reason
    if on_duplicate == "keep" and counts["test"].dropped["beyond data.test_rows"] == 0:
        whole = prepared(chat, rows, None, on_bad_row="drop", test_share=0.5)
        learnable = whole.total("train").trained + whole.total("test").trained
        assert learnable == sum(c.trained + c.lost for c in counts.values())
    assert done.lengths.tolist() == [len(ids) for ids in done.train["input_ids"]]


def test_rows_too_long_are_cut_dropped_or_an_error_as_asked(chat):
    rows = [pair(i) for i in range(40)] + [
        {"prompt": "q", "completion": "x" * 100},
        {"prompt": "y" * 100, "completion": "a"},
    ]
    whole = prepared(chat, rows)
    cut = prepared(chat, rows, 50)
    for split in ("train", "test"):
        assert cut.total(split).given == whole.total(split).given  # what is held out does not depend on it
    both = cut.total("train") + cut.total("test")
    assert (both.cut, dict(both.dropped)) == (1, {"all prompt at max_length": 1})
    lost = whole.total("train") + whole.total("test")
    assert both.trained + both.lost == lost.trained
    dropped = prepared(chat, rows, 50, on_too_long="drop")
    both = dropped.total("train") + dropped.total("test")
    assert (both.cut, dict(both.dropped), both.lost) == (0, {"longer than max_length": 2}, lost.trained - both.trained)
    with pytest.raises(ConfigError) as error:
        prepared(chat, rows, 50, on_too_long="error")
    assert "2 of 42 rows of rows are longer than trainer.args.max_length=50 tokens; the longest has " in str(
        error.value
    )
    longest = int(re.search(r"longest has (\d+) \(rows.jsonl line (\d+)\)", str(error.value))[2])
    assert longest in (41, 42) and "data.on_too_long=truncate or drop" in str(error.value)
    prepared(chat, rows, 500, on_too_long="error")


def test_pairs_that_differ_only_beyond_a_cut_are_dropped_and_counted(chat):
    def told(i: int, begin: str) -> dict:
        return {"prompt": f"q{i}", "chosen": f"{begin} yes {i}", "rejected": f"{begin} no {i}"}

    rows = [told(i, "") for i in range(40)] + [told(i, "x" * 100) for i in range(100, 110)]
    done = prepared(chat, rows, 60, Preferences())
    assert all(row["chosen_ids"] != row["rejected_ids"] for split in (done.train, done.test) for row in split)
    both = done.total("train") + done.total("test")
    assert (both.given, both.kept, dict(both.dropped)) == (50, 40, {"chosen equals rejected at max_length": 10})
    whole = prepared(chat, rows, None, Preferences())
    assert both.trained + both.lost == (whole.total("train") + whole.total("test")).trained


BAD = [
    {"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]},
    {"messages": []},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
    {"messages": []},
]


def told(i: int) -> dict:
    return {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}


@pytest.mark.parametrize("first", [0, 300])
def test_rows_that_cannot_be_read_stop_the_preparation_or_are_counted(chat, first):
    """Within the first rows, which are looked at before the long pass, and after them."""
    rows = [told(i) for i in range(first)] + BAD + [told(i) for i in range(first, 340)]
    with pytest.raises(ConfigError) as error:
        prepared(chat, rows)
    head, *lines, more, mend = str(error.value).splitlines()
    looked_at = "344" if first else "the first 100"
    assert head == (
        f"data: 4 of {looked_at} rows of rows cannot be learned from (empty messages 2, unknown role 1, null content 1)"
    )
    assert [line.split(": ")[0] for line in lines] == [f"  rows.jsonl line {first + i}" for i in (1, 2, 3)]
    assert "messages[0].role: unknown role, found 'robot'" in lines[0]
    assert (more, mend[-46:]) == ("  and 1 more", "with data.on_bad_row=drop: the run counts them.")[:2] or mend
    assert "data.on_bad_row=drop" in mend
    done = prepared(chat, rows, on_bad_row="drop")
    both = done.total("train") + done.total("test")
    assert both.dropped == {"empty messages": 2, "unknown role": 1, "null content": 1}
    assert (both.given, both.kept) == (344, 340)
    assert sides(chat, done)[0] | sides(chat, done)[1] == {f"a{i}" for i in range(340)}


def test_what_a_template_refuses_is_a_bad_row_and_takes_no_other_with_it(chat):
    tokenizer = AutoTokenizer.from_pretrained(locate("pkg://smoltrain/tiny"))
    tokenizer.chat_template = "{% if messages[0]['content'] == 'q7' %}{{ raise_exception('no 7') }}{% endif %}" + (
        tokenizer.chat_template
    )
    rows = [told(i) for i in range(300)]
    with pytest.raises(ConfigError, match=r"refused by the chat template 1\)\n  rows\.jsonl line 8: .*no 7"):
        prepared(Chat(tokenizer), rows)
    done = prepared(Chat(tokenizer), rows, on_bad_row="drop")
    assert (done.total("train") + done.total("test")).dropped == {"refused by the chat template": 1}
    assert len(done.train) + len(done.test) == 299


def silent(i: int) -> dict:
    row = told(i)
    row["messages"][1]["train"] = False
    return row


def test_rows_without_a_token_to_learn_are_counted_and_a_set_of_them_is_an_error(chat):
    done = prepared(chat, [silent(i) if i % 3 else told(i) for i in range(60)])
    both = done.total("train") + done.total("test")
    assert dict(both.dropped) == {"no token to learn": 40} and both.kept == 20
    with pytest.raises(ConfigError, match=r"no row is left to learn from, of \d+ \(\d+ no token to learn\)"):
        prepared(chat, [silent(i) for i in range(60)])
    message = (
        r"no row is left to learn from, of \d+ \(\d+ all prompt at max_length\); raise trainer\.args\.max_length=5"
    )
    with pytest.raises(ConfigError, match=message):
        prepared(chat, [told(i) for i in range(60)], 5)


def test_remarks_are_counted_by_what_they_say(chat):
    rows = [pair(i) for i in range(40)] + [{"prompt": f"say {END}", "completion": f"{i}"} for i in range(20)]
    done = prepared(chat, rows)
    assert (done.total("train") + done.total("test")).remarks == {f"{END} in its words": 20}


def test_an_option_that_is_none_is_named():
    unfit = {"test_share": (1.0, 0, "half"), "test_rows": (0, 1.5), "workers": (0, "all"), "seed": ("a",)}
    unfit |= dict.fromkeys(("on_too_long", "on_bad_row", "on_duplicate"), ("droop",)) | {"max_rows": (0, -5, "all")}
    for key, values in unfit.items():
        for value in values:
            with pytest.raises(ConfigError) as error:
                compose(["data=local", "data.path=rows.jsonl", f"data.{key}={value}"], [])
            assert str(error.value).startswith(f"data.{key}={value}: ")
            assert value != "droop" or "did you mean drop?" in str(error.value)


def test_a_column_that_rows_cannot_be_chosen_by_is_named(chat):
    rows = [pair(i, tags=["a"]) for i in range(20)]
    with pytest.raises(ConfigError, match=r"data\.keep_where: tags=a, and the column is list"):
        prepared(chat, rows, keep_where={"tags": "a"})


# ---------------------------------------------------------------- which rows


def test_a_system_prompt_is_put_before_conversations_without_one(chat):
    own = [told(i) for i in range(20)]
    for row in own:
        row["messages"].insert(0, {"role": "system", "content": "own"})
    rows = [told(i) for i in range(20, 60)] + own
    done = prepared(chat, rows, system_prompt="/no_think")
    texts = chat.tokenizer.batch_decode([*done.train["input_ids"], *done.test["input_ids"]])
    assert Counter(re.search(r"system\n(.*?)<", text)[1] for text in texts) == {"/no_think": 40, "own": 20}
    assert {row["messages"][0]["content"] for row in done.examples(60)} == {"/no_think", "own"}
    plain = prepared(chat, rows)
    assert sides(chat, plain) == sides(chat, done) and not any("no_think" in t for t in ids(chat, plain))
    text = prepared(chat, [{"text": f"t{i}"} for i in range(40)], system_prompt="/no_think")
    assert not any("no_think" in t for t in ids(chat, text))
    pairs = prepared(chat, PREFERENCES, encoder=Preferences(), system_prompt="/no_think")
    assert all("/no_think" in chat.tokenizer.decode(row) for row in pairs.train["prompt_ids"])


PREFERENCES = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40)]


def ids(chat, done) -> list[str]:
    return chat.tokenizer.batch_decode([*done.train["input_ids"], *done.test["input_ids"]])


def test_rows_are_chosen_by_column_and_number(chat):
    rows = [pair(i, lang=("fr", "en", None)[i % 3], bad=(True, False, None)[i % 4 % 3], n=i % 5) for i in range(120)]

    def chosen(**how) -> set[int]:
        train, test = sides(chat, prepared(chat, rows, test_share=0.3, **how))
        assert not train & test
        return {int(reply[1:]) for reply in train | test}

    assert chosen(keep_where={"lang": "fr"}) == {i for i in range(120) if i % 3 == 0}
    assert chosen(keep_where={"lang": ["fr", "en"], "n": 2}) == {i for i in range(120) if i % 3 < 2 and i % 5 == 2}
    assert chosen(drop_where="bad") == {i for i in range(120) if i % 4 not in (0, 3)}
    assert chosen(max_rows=30) == set(range(30))
    assert chosen(keep_where={"lang": "fr"}, max_rows=30) == set(range(0, 90, 3))
    with pytest.raises(ConfigError, match="rows has no column langue to choose rows by; did you mean lang"):
        chosen(keep_where={"langue": "fr"})
    with pytest.raises(ConfigError, match="leave no row of rows"):
        chosen(keep_where={"lang": "de"})
    with pytest.raises(ConfigError, match=r"data\.keep_where: lang=7, and the column is .*string"):
        chosen(keep_where={"lang": 7})
    with pytest.raises(ConfigError, match=r"data\.drop_where=lang: the column has to be true or false"):
        chosen(drop_where="lang")


def test_where_a_row_stands_is_said_after_a_filter_too(chat):
    rows = [pair(i, lang="fr" if i % 2 else "en") for i in range(60)]
    rows[41]["completion"] = " "
    with pytest.raises(ConfigError, match=r"rows\.jsonl line 42: completion: empty text"):
        prepared(chat, rows, keep_where={"lang": "fr"})


def test_columns_of_mixed_types_are_read_in_the_pass_as_at_first_sight(chat):
    rows = [told(i) for i in range(40)]
    rows[5]["messages"][0]["content"] = [{"type": "text", "text": "in parts"}]
    done = prepared(chat, rows)
    assert len(done.train) + len(done.test) == 40
    assert any("in parts" in text for text in ids(chat, done))


def test_the_arguments_of_tools_are_read_as_they_were_written(chat):
    def called(i: int) -> dict:
        call = {"type": "function", "function": {"name": "f", "arguments": {f"key{i}": [i, {"deep": None}]}}}
        ask, done = told(i)["messages"]
        return {"messages": [ask, done | {"tool_calls": [call]}, {"role": "tool", "content": "r"}, done]}

    texts = ids(chat, prepared(chat, [called(i) for i in range(40)]))
    for i in range(40):
        assert sum(f'"arguments": {{"key{i}": [{i}, {{}}]}}' in text for text in texts) == 1


# ---------------------------------------------------------------- splits


numbers = st.sets(st.integers(0, 400), min_size=20, max_size=60)


@given(numbers, numbers, st.integers(1, 12), st.randoms(use_true_random=False))
@settings(BRISK, max_examples=30)
def test_growing_the_data_moves_no_row_across(chat, some, more, test_rows, random):
    order = [*some, *more - some]
    random.shuffle(order)
    try:
        small = sides(chat, prepared(chat, [pair(i) for i in some], test_rows=test_rows))
        large = sides(chat, prepared(chat, [pair(i) for i in order], test_rows=test_rows))
    except ConfigError as error:
        assert "not one is; raise the share" in str(error)
        return
    assert not small[0] & large[1] and not small[1] & large[0]
    assert small[0] <= large[0] and len(small[1]) <= test_rows


def test_what_is_held_out_depends_on_content_and_the_datas_own_seed(chat):
    rows = [pair(i) for i in range(200)]
    first = prepared(chat, rows)
    again = prepared(chat, rows[::-1])
    assert sides(chat, first) == sides(chat, again)
    assert replies(chat, first.test) == replies(chat, again.test)  # and in the same order
    assert first.fingerprints["test"] == again.fingerprints["test"]
    other = prepared(chat, rows, seed=1)
    assert sides(chat, first) != sides(chat, other) and first.fingerprints["test"] != other.fingerprints["test"]
    assert 0.15 < len(first.test) / 200 < 0.35
    few = prepared(chat, rows, test_rows=7)
    assert replies(chat, few.test) == replies(chat, first.test)[:7]
    assert sides(chat, few)[0] == sides(chat, first)[0]
    assert few.total("test").dropped == {"beyond data.test_rows": len(first.test) - 7}


def test_the_seed_of_a_run_is_not_that_of_the_split(chat):
    lay([pair(i) for i in range(60)])

    def held_out(*overrides: str) -> list[str]:
        cfg = resolvable(["data=local", "data.path=rows.jsonl", "data.test_share=0.25", *overrides])
        return replies(chat, preflight(cfg).data.test)

    assert held_out() == held_out("seed=1") != held_out("data.seed=1")


def test_about_the_share_that_was_asked_is_held_out():
    found = shares(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 100_000), 3)
    assert np.histogram(found, 10, (0, 1))[0] == pytest.approx(10_000, rel=0.05)
    assert shares(np.arange(3), 0).tolist() != shares(np.arange(3), 1).tolist()


def test_given_rows_are_held_out_rather_than_others(chat):
    lay([pair(i) for i in range(30)], "d/train.jsonl")
    lay([pair(i) for i in range(100, 110)], "d/test.jsonl")
    other = lay([pair(i) for i in range(200, 205)], "other.jsonl")
    done = prepared(chat, "d")
    assert sides(chat, done) == ({f"a{i}" for i in range(30)}, {f"a{i}" for i in range(100, 110)})
    assert sides(chat, prepared(chat, "d", test_path=other))[1] == {f"a{i}" for i in range(200, 205)}
    assert len(prepared(chat, "d", test_rows=4).test) == 4
    with pytest.raises(ConfigError, match=r"5 rows .*cannot be learned|test\.jsonl line 1: completion: empty text"):
        lay([pair(1) | {"completion": " "}] * 5, "d/test.jsonl")
        prepared(chat, "d")


def test_where_no_row_is_held_out_it_is_said(chat):
    with pytest.raises(ConfigError, match=r"data.test_share=0.01: rows are held out by their content, and of these 3"):
        prepared(chat, [pair(i) for i in range(3)], test_share=0.01)


def test_duplicates_and_leaks_are_counted_and_dropped_if_asked(chat):
    lay([pair(i) for i in (1, 2, 3, 3, 3, 4, 5)], "d/train.jsonl")
    lay([pair(i) for i in (5, 6, 6, 7)] + [{"prompt": "q1", "completion": "else"}], "d/test.jsonl")
    kept = prepared(chat, "d")
    train, test = kept.total("train"), kept.total("test")
    assert (train.given, train.kept, train.duplicates, train.held_out_too) == (7, 7, 2, 1)
    assert (test.given, test.kept, test.duplicates) == (5, 5, 1)
    assert kept.repeated_questions == 2
    dropped = prepared(chat, "d", on_duplicate="drop")
    train, test = dropped.total("train"), dropped.total("test")
    assert (train.kept, train.dropped) == (4, {"repeated": 2, "held out too": 1})
    assert (test.kept, test.dropped) == (4, {"repeated": 1})
    assert sorted(replies(chat, dropped.train)) == ["a1", "a2", "a3", "a4"]
    assert sorted(replies(chat, dropped.test)) == ["a5", "a6", "a7", "else"]
    assert dropped.repeated_questions == 1
    both = (train.duplicates, train.held_out_too, test.duplicates)
    assert both == (2, 1, 1)


def test_what_a_row_weighs_or_is_compared_with_moves_it_nowhere(chat):
    def held_out(**more) -> list[str]:
        rows = [told(i) | {"answer": "b"} if "answer" in more else told(i) for i in range(60)]
        for row in rows:
            row["messages"][1] |= {k: v for k, v in more.items() if k == "train"}
        return replies(chat, prepared(chat, rows).test)

    assert held_out() == held_out(answer=True) == held_out(train=True) != []


def test_the_same_words_in_another_shape_are_the_same_row(chat):
    lay([pair(i) for i in range(40)], "a.jsonl")
    lay([told(i) for i in range(40)], "b.jsonl")
    done = mixed(chat, {"a": "a.jsonl", "b": "b.jsonl"})
    assert done.total("train").duplicates == len(done.train) // 2
    assert not sides(chat, done)[0] & sides(chat, done)[1]


# ---------------------------------------------------------------- mixtures


def one_of_several(source):
    """A source, or the path of one, that leaves its preparation to the mixture."""
    source = data(source) if isinstance(source, str) else source
    source.preparation = {}
    return source


def mixed(chat, sources: dict, weights=None, stopping="all_exhausted", encoder=None, **how):
    made = {name: one_of_several(source) for name, source in sources.items()}
    return mixture(made, weights, stopping, **(HOW | how)).prepare(encoder or Conversations("assistant"), chat, None)


@pytest.fixture
def two():
    lay([{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(3000)], "a.jsonl")
    lay([{"prompt": f"q{i}", "completion": f"b{i}"} for i in range(1000)], "b.jsonl")
    return {"a": "a.jsonl", "b": "b.jsonl"}


def test_a_mixture_has_every_row_once_and_counts_by_source(chat, two):
    done = mixed(chat, two, test_rows=60)
    assert {name: c["train"].given + c["test"].given for name, c in done.counts.items()} == {"a": 3000, "b": 1000}
    assert len(set(replies(chat, done.train))) == len(done.train) == done.total("train").kept
    assert len(done.test) == 60 == done.total("test").kept
    assert Counter(reply[0] for reply in replies(chat, done.test)) == {
        name: counts["test"].kept for name, counts in done.counts.items()
    }
    assert [row["messages"][1]["content"] for row in done.examples(60)] == replies(chat, done.test)


@pytest.mark.parametrize(("stopping", "few", "many"), [("first_exhausted", 0, 1), ("all_exhausted", 1, 0)])
def test_rows_are_drawn_as_weighed(chat, two, stopping, few, many):
    done = mixed(chat, two, {"a": 1, "b": 1}, stopping)
    drawn = replies(chat, done.train)
    assert Counter(reply[0] for reply in drawn) == done.drawn  # as the record says
    share = Counter(reply[0] for reply in drawn)["a"] / len(drawn)
    assert abs(share - 0.5) < 0.02
    times = Counter(drawn)
    given = {name: c["train"].kept for name, c in done.counts.items()}
    if stopping == "all_exhausted":  # every row at least once, those of the smaller again and again
        assert len(times) == sum(given.values()) and max(times.values()) > 1
        assert len(drawn) == pytest.approx(2 * given["a"], rel=0.05)
    else:  # no row twice, the larger one not to its end
        assert max(times.values()) == 1 and len(drawn) == pytest.approx(2 * given["b"], rel=0.1)
    assert replies(chat, mixed(chat, two, {"a": 1, "b": 1}, stopping).train) == drawn


def test_weights_are_shares_whatever_their_sum(chat, two):
    drawn = replies(chat, mixed(chat, two, {"b": 30, "a": 10}).train)
    assert abs(Counter(reply[0] for reply in drawn)["b"] / len(drawn) - 0.75) < 0.02


def test_each_source_has_its_own_cap_and_filter(chat, two):
    capped = {"a": data("a.jsonl", max_rows=50), "b": "b.jsonl"}
    done = mixed(chat, capped)
    assert {name: c["train"].given + c["test"].given for name, c in done.counts.items()} == {"a": 50, "b": 1000}


UNFIT = [{"a": 1}, {"a": 1, "c": 2}, {"a": 1, "b": 0}, {"a": 1, "b": 1, "c": 1}, {"a": 1, "b": "most"}, {}]


@pytest.mark.parametrize("weights", UNFIT)
def test_weights_that_fit_no_source_are_named_before_any_row_is_read(chat, weights, monkeypatch):
    monkeypatch.setattr(Pass, "__call__", None)
    lay([pair(1)])
    with pytest.raises(ConfigError, match=r"data.weights=.*: give each of a, b a weight above 0, and no other"):
        mixed(chat, {"a": "rows.jsonl", "b": "rows.jsonl"}, weights)


def test_what_a_source_says_of_preparation_is_not_ignored_in_a_mixture(chat, two):
    with pytest.raises(ConfigError, match=r"data.sources.a: test_share, .* would be ignored"):
        mixture({"a": data("a.jsonl"), "b": data("b.jsonl")}, None, "all_exhausted", **HOW)


def test_a_source_of_which_nothing_is_left_cannot_be_drawn_from(chat, two):
    lay([pair(i) | {"completion": "x" * 99} for i in range(9)], "c.jsonl")
    made = {name: one_of_several(f"{name}.jsonl") for name in "bc"}
    drawing = mixture(made, {"b": 1, "c": 1}, "all_exhausted", **(HOW | {"on_too_long": "drop"}))
    with pytest.raises(ConfigError, match=r"data\.weights: no row of c is left to learn from"):
        drawing.prepare(Conversations("assistant"), chat, 60)


def test_sources_of_different_kinds_do_not_mix(chat):
    lay([{"prompt": "q", "completion": f"a{i}", "label": True} for i in range(40)], "a.jsonl")
    lay(PREFERENCES, "b.jsonl")
    with pytest.raises(ConfigError, match=r"a has unpaired rows \(unpaired\), b has preference rows \(preference\)"):
        mixed(chat, {"a": "a.jsonl", "b": "b.jsonl"}, encoder=Untokenized(["unpaired", "preference"]))
    with pytest.raises(ConfigError, match=r"data\.sources\.c: a mixture within a mixture"):
        mixed(chat, {"c": mixture(dict.fromkeys("ab", one_of_several("a.jsonl")), None, "all_exhausted", **HOW)})
    with pytest.raises(ConfigError, match=r"data\.sources: name at least one"):
        mixed(chat, {})


def test_a_mixture_is_a_list_on_the_command_line(smoltrain, folder):
    for name, rows in (("a", 60), ("b", 40)):
        lay([{"prompt": f"q{i}", "completion": f"{name}{i}"} for i in range(rows)], f"{name}.jsonl")
        (folder / "own" / "data").mkdir(parents=True, exist_ok=True)
        (folder / "own" / "data" / f"{name}.yaml").write_text(f"defaults: [local, _self_]\npath: {name}.jsonl\n")
    quick = (
        "trainer.args.save_strategy=no",
        "tracking=none",
        "trainer.args.max_steps=1",
        "evaluation.max_new_tokens=4",
    )
    said = ("--config-dir=own", "data=[a,b,sums]", "data.sources.b.max_rows=30", "data.sources.sums.train_rows=20")
    (record,) = smoltrain(
        *said, "data.sources.sums.test_rows=5", "data.weights={a:1,b:2,sums:1}", "data.test_share=0.2", quick=quick
    )
    found = {name: s["train"]["given"] + s["test"]["given"] for name, s in record["sources"].items()}
    assert found == {"a": 60, "b": 30, "sums": 25} and record["status"] == "completed"
    assert record["samples"] and "exact_match" in record["metrics"]  # of the rows that have an answer
    assert record["sources"]["sums"]["shape"] == "messages" and record["sources"]["a"]["shape"] == "prompt_completion"
    for split in ("train", "test"):
        assert record["rows"][split]["kept"] == sum(s[split]["kept"] for s in record["sources"].values())
    cfg = compose(["data=mixture", "+data@data.sources.sums=sums"], [])
    assert cfg.data.sources.sums.train_rows == 2000


# ---------------------------------------------------------------- the cache


@pytest.fixture
def passes(monkeypatch):
    """The batches that went through the pass, in this process."""
    seen = []
    real = Pass.over

    def over(self, raw):
        seen.append(len(raw))
        return real(self, raw)

    monkeypatch.setattr(Pass, "over", over)
    return seen


def test_rows_are_prepared_once_for_all_that_share_them(chat, passes, folder, monkeypatch):
    rows = [told(i) for i in range(60)]

    def ran(chat=chat, max_length: int | None = None, rows=rows, **how) -> bool:
        passes.clear()
        prepared(chat, rows, max_length, **how)
        return bool(passes)

    assert ran() and not ran()
    assert not ran(seed=1) and not ran(test_share=0.5) and not ran(test_rows=3) and not ran(on_duplicate="drop")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert not ran()
    for how in (
        {"max_length": 30},
        {"max_length": 30, "on_too_long": "drop"},
        {"encoder": Conversations("last")},
        {"system_prompt": "x"},
        {"max_rows": 50},
        {"rows": [*rows[:-1], told(1000)]},
    ):
        assert ran(**how) and not ran(**how)
    other = AutoTokenizer.from_pretrained(locate("pkg://smoltrain/tiny"))
    other.chat_template = read_chat_template("smollm2")
    assert ran(Chat(other)) and not ran(Chat(other))
    larger = AutoTokenizer.from_pretrained(locate("pkg://smoltrain/tiny"))
    larger.add_tokens(["q1"])
    assert ran(Chat(larger))
    assert ran(Chat(chat.tokenizer, {"enable_thinking": False}))
    assert not ran()


def one_process(path: str, cached: str, barrier, results) -> None:
    datasets.config.HF_DATASETS_CACHE = Path(cached)
    tokenizer = AutoTokenizer.from_pretrained(locate("pkg://smoltrain/tiny"))
    barrier.wait(60)
    done = prepared(Chat(tokenizer), path)
    results.put((done.fingerprints, done.train["input_ids"][:]))


def test_two_processes_at_once_do_no_harm(chat, cache):
    path = str(Path(lay([told(i) for i in range(3000)])).absolute())
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    both = [context.Process(target=one_process, args=(path, cache.parent, barrier, results)) for _ in range(2)]
    for process in both:
        process.start()
    found = [results.get(timeout=60) for _ in both]
    for process in both:
        process.join(60)
    done = prepared(chat, path)
    assert found[0] == found[1] == (done.fingerprints, done.train["input_ids"][:])
    assert not [file.name for file in cache.iterdir() if not file.name.endswith((".arrow", ".lock"))]


def test_several_workers_give_what_one_gives(chat, monkeypatch, passes):
    monkeypatch.setattr(tokens, "ROWS_PER_WORKER", 100)
    rows = [told(i) for i in range(300)]
    rows[250]["messages"] = []
    two = prepared(chat, rows, 40, workers=2, on_bad_row="drop")
    assert not passes  # they were others' processes
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("other").absolute())
    one = prepared(chat, rows, 40, workers=1, on_bad_row="drop")
    assert passes and one.fingerprints == two.fingerprints and one.counts == two.counts
    assert one.train["input_ids"][:] == two.train["input_ids"][:] and one.lengths.tolist() == two.lengths.tolist()
    passes.clear()
    prepared(chat, rows, 40, workers=2, on_bad_row="drop")
    assert not passes  # what one has prepared serves two


# ---------------------------------------------------------------- streams


def streamed(rows: list[dict] | str, **how):
    return data(rows, streaming=True, **how)


def test_a_stream_holds_out_what_its_file_does(chat):
    rows = [told(i) for i in range(400)]
    rows[3]["messages"][0]["content"] = [{"type": "text", "text": "in parts"}]
    rows[7]["messages"][1]["content"] = "long " * 30
    for max_length, how in ((None, {}), (40, {"on_too_long": "drop"}), (60, {"seed": 3, "test_share": 0.1})):
        encoder = Conversations("assistant")
        whole = data(rows, **how).prepare(encoder, chat, max_length)
        flow = streamed(rows, **how).prepare(encoder, chat, max_length)
        assert replies(chat, flow.test) == replies(chat, whole.test)
        assert flow.examples(5) == whole.examples(5)
        assert sorted(replies(chat, flow.train)) == sorted(replies(chat, whole.train))
        assert {k: v.plain() for k, v in flow.counts["rows"].items()} == {
            k: v.plain() for k, v in whole.counts["rows"].items()
        }


def test_a_row_of_a_stream_is_counted_once_however_often_it_is_read(chat):
    flow = streamed([told(i) for i in range(200)]).prepare(Conversations("assistant"), chat, None)
    assert flow.total("train").given == 0
    next(iter(flow.train))
    for _ in range(2):
        list(flow.train)
    assert flow.total("train").given == flow.total("train").kept == 200 - len(flow.test)


def test_what_is_held_out_of_a_stream_depends_on_the_seed_and_not_on_the_cache(chat):
    rows = [told(i) for i in range(200)]
    tests = []
    for seed in range(4):
        tests.append(
            replies(chat, streamed(rows, seed=seed, test_rows=5).prepare(Conversations("last"), chat, None).test)
        )
    assert len({tuple(test) for test in tests}) == 4 and {len(test) for test in tests} == {5}


def test_columns_that_come_later_in_a_stream_are_left_out(chat):
    rows = [told(i) for i in range(1500)]
    for row in rows[1200:]:
        row["note"] = "late"
    rows[1300]["messages"] = []
    flow = streamed(rows, on_bad_row="drop").prepare(Conversations("assistant"), chat, None)
    read = list(flow.train)
    assert {name for row in read for name in row} == {"input_ids", "labels"}
    assert len(read) == flow.total("train").kept == 1499 - len(flow.test)


@pytest.mark.parametrize("line", [5, 1200])
def test_a_bad_row_of_a_stream_is_named(chat, line):
    rows = [told(i) for i in range(1300)]
    rows[line - 1]["messages"][1]["content"] = " "
    message = rf"rows\.jsonl line {line}: messages\[1\]\.content: empty text"
    if line < 100:
        with pytest.raises(ConfigError, match=message):
            streamed(rows).prepare(Conversations("assistant"), chat, None)
    else:
        flow = streamed(rows, test_rows=5).prepare(Conversations("assistant"), chat, None)
        with pytest.raises(streams.UnfitRow, match=message + ".*data.on_bad_row=drop"):
            list(flow.train)
    dropped = streamed(rows, on_bad_row="drop").prepare(Conversations("assistant"), chat, None)
    list(dropped.train)
    assert dropped.total("train").dropped == {"empty text": 1}


def test_the_seed_of_a_run_orders_its_stream(folder):
    lay([pair(i) for i in range(60)], "rows.jsonl")
    stream = ["data.path=rows.jsonl", "data.streaming=true", "data.test_share=0.25", "trainer.args.max_steps=1"]

    def order(*overrides: str) -> list[list[int]]:
        cfg = resolvable(["data=local", *stream, *overrides])
        return [row["input_ids"] for row in train.build(cfg, preflight(cfg), []).train_dataset]

    first, again, other = order("seed=1"), order("seed=1"), order("seed=2")
    assert first == again != other and sorted(first) == sorted(other)


def test_too_long_is_an_error_in_a_stream_too(chat):
    rows = [told(i) for i in range(300)]
    kept = shares(np.array([tokens.identity(row) for row in rows]), 0) >= 0.25
    line = int(np.flatnonzero(kept)[-1])
    rows[line]["messages"][1]["content"] = "x" * 100
    how = {"on_too_long": "error", "test_share": 0.25}
    with pytest.raises((streams.UnfitRow, ConfigError), match=rf"rows\.jsonl line {line + 1}\b"):
        list(streamed(rows, **how).prepare(Conversations("assistant"), chat, 50).train)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"on_duplicate": "drop"}, "data.on_duplicate=drop: in a stream nothing is remembered; set it to keep"),
        ({"keep_where": {"a": 1}}, "rows cannot be streamed: every source has to be, and none can be filtered"),
        ({"drop_where": "a"}, "rows cannot be streamed: every source has to be, and none can be filtered"),
        ({"test_share": 1e-9}, "no row at the beginning of the stream is held out; raise the share"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(chat, how, message):
    for sample in (None, 30):  # in a run, and when it is checked
        if sample is None or "test_share" not in how:
            with pytest.raises(ConfigError, match=re.escape(message)):
                streamed([told(i) for i in range(50)], **how).prepare(Conversations("assistant"), chat, None, sample)


def test_given_rows_are_held_out_of_a_stream(chat):
    test = lay([told(i) for i in range(500, 520)], "test.jsonl")
    flow = streamed([told(i) for i in range(50)], test_path=test, test_rows=8)
    done = flow.prepare(Conversations("assistant"), chat, None)
    assert len(done.test) == 8 and len(list(done.train)) == 50
    sampled = streamed([told(i) for i in range(50)], test_path=test).prepare(Conversations("assistant"), chat, None, 30)
    assert (len(sampled.train), len(sampled.test)) == (30, 20)


def test_rows_of_a_stream_that_are_held_out_too_are_counted(chat):
    test = lay([told(i) for i in range(40, 60)], "test.jsonl")
    done = streamed([told(i) for i in range(50)], test_path=test).prepare(Conversations("assistant"), chat, None)
    assert len(list(done.train)) == 50 and done.total("train").held_out_too == 10


def test_streams_are_mixed_too(chat):
    lay([{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(100)], "a.jsonl")
    lay([{"prompt": f"q{i}", "completion": f"b{i}"} for i in range(100)], "b.jsonl")
    both = {"a": streamed("a.jsonl"), "b": streamed("b.jsonl")}
    done = mixed(chat, both, {"a": 1, "b": 1}, "all_exhausted")
    assert {reply[0] for reply in replies(chat, done.train)} == {"a", "b"}
    counts = {name: c["train"].kept + c["test"].kept for name, c in done.counts.items()}
    assert counts == {"a": 100, "b": 100}
    with pytest.raises(ConfigError, match="b cannot be streamed: every source has to be"):
        mixed(chat, {"a": streamed("a.jsonl"), "b": "b.jsonl"})


STREAMING = ("data.path=rows.jsonl.gz", "data.streaming=true", "evaluation.max_rows=0", "data.test_rows=8")
BRIEF = ("trainer.args.save_strategy=no", "tracking=none")


def packed(rows: list[dict]) -> None:
    Path("rows.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def test_a_run_streams_its_rows(smoltrain):
    packed([told(i) for i in range(200)])
    (record,) = smoltrain(*STREAMING, "trainer.args.max_steps=3", quick=BRIEF)
    assert (record["status"], record["steps"]) == ("completed", 3)
    train, test = record["rows"]["train"], record["rows"]["test"]
    assert test["kept"] == 8 and 0 < train["kept"] == train["given"] < 200 and train["trained"] > 0
    assert record["sources"]["rows"]["train"] == train
    (pairs,) = smoltrain_dpo(smoltrain)
    assert pairs["status"] == "completed" and pairs["rows"]["train"]["kept"] > 0


def smoltrain_dpo(smoltrain):
    packed(PREFERENCES)
    return smoltrain("trainer=dpo", *STREAMING, "data.test_share=0.2", "trainer.args.max_steps=2", quick=BRIEF)


def test_a_run_over_a_stream_needs_to_know_its_end(smoltrain, capsys):
    packed([told(i) for i in range(200)])
    assert smoltrain(*STREAMING, quick=BRIEF, code=2) == []
    assert "data.streaming=true: nobody knows how many rows a stream has; set trainer.args.max_steps=…" in (
        capsys.readouterr().err
    )


def test_a_bad_row_ends_a_run_that_streams(smoltrain, capsys, monkeypatch):
    """Refused where it is found before the first step; after it the run has failed, and its record says where."""
    rows = [told(i) for i in range(400)]
    rows[300]["messages"] = []
    packed(rows)
    where = "rows.jsonl.gz line 301: messages: empty messages"
    assert smoltrain(*STREAMING, "trainer.args.max_steps=2", quick=BRIEF, code=2) == []
    assert where in capsys.readouterr().err
    monkeypatch.setattr(streams, "BUFFER", 10)
    monkeypatch.setattr(streams, "BATCH", 100)
    with pytest.raises(streams.UnfitRow, match=re.escape(where)):
        smoltrain(*STREAMING, "trainer.args.max_steps=50", quick=BRIEF)
    (file,) = Path("multirun").glob("**/run.json")
    record = json.loads(file.read_text())
    assert record["status"] == "failed" and where in record["error"] and record["steps"] > 0


# ---------------------------------------------------------------- a trainer that tokenises itself


@pytest.mark.parametrize("kind", ["unpaired", "preference"])
def test_kto_learns_from_labelled_replies_and_from_pairs(smoltrain, kind):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(60)]
    lay(rows if kind == "unpaired" else PREFERENCES)
    said = ("data=local", "data.path=rows.jsonl", "data.test_share=0.2", "evaluation.max_rows=0")
    batch = ("trainer.args.max_steps=2", "trainer.args.per_device_train_batch_size=4")
    (record,) = smoltrain(f"--config-dir={OWN}", "trainer=kto", *said, *batch, quick=BRIEF)
    assert (record["status"], record["steps"]) == ("completed", 2)
    assert record["sources"]["rows"]["shape"] == kind
    assert record["rows"]["train"]["given"] + record["rows"]["test"]["given"] == len(
        rows if kind == "unpaired" else PREFERENCES
    )


def test_rows_for_kto_stay_as_they_were(chat):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(60)]
    done = prepared(chat, rows, encoder=Untokenized(["unpaired", "preference"]))
    for row in [*done.train, *done.test]:
        (asked,), (said,) = row["prompt"], row["completion"]
        assert asked["content"][1:] == said["content"][1:] and row["label"] == (int(said["content"][1:]) % 2 == 0)
