"""Shapes of rows: what each is read into, what cannot be read and why, and which shape a file is of."""

import copy
import json
import math
import pickle
import random
import re
from collections.abc import Iterator
from datetime import date
from typing import Any

import pytest
import yaml
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltrain.config import ConfigError
from smoltrain.data.formats import SHAPES, recognise
from smoltrain.data.messages import ROLES, RowError, shown

SHAPE = {shape.name: shape for shape in SHAPES}
KINDS = ("conversation", "preference", "unpaired", "text")


def said(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


Q, A, B = said(("user", "q"), ("assistant", "a"), ("assistant", "b"))
S, Q2, A2 = said(("system", "s"), ("user", "q2"), ("assistant", "a2"))
SCHEMA = {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}
TOOLS = [{"type": "function", "function": SCHEMA}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "2"}


def gpt(*turns: tuple[str, str]) -> list[dict]:
    return [{"from": speaker, "value": value} for speaker, value in turns]


GIVEN = [  # shape, a row as people have it, the canonical row
    ("messages", {"messages": [S, Q, A], "id": 3}, {"messages": [S, Q, A]}),
    ("messages", {"messages": [Q, A], "system": "s", "answer": "42"}, {"messages": [S, Q, A], "answer": "42"}),
    ("messages", {"messages": [Q, A], "answer": 42, "tools": None, "system": ""}, {"messages": [Q, A]}),
    ("messages", {"messages": [Q, A, Q2, A2]}, {"messages": [Q, A, Q2, A2]}),
    ("messages", {"messages": [A]}, {"messages": [A]}),
    ("messages", {"messages": [Q, A, CALLING, B, CALLING]}, {"messages": [Q, A, CALLING, B, CALLING]}),
    ("messages", {"messages": [Q, A, RESULT | {"content": ""}, B]}, {"messages": [Q, A, RESULT | {"content": ""}, B]}),
    (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "s"},
                Q | {"name": None},
                A | {"tool_calls": None, "train": None},
            ]
        },
        {"messages": [S, Q, A]},
    ),
    (
        "messages",
        {"messages": [Q | {"content": [{"type": "text", "text": "q"}, {"type": "text", "text": "2"}]}, A]},
        {"messages": [Q2, A]},
    ),
    (
        "messages",
        {"messages": [Q | {"weight": 0}, A | {"train": False}, Q2, A2 | {"train": True}]},
        {"messages": [Q, A | {"loss_weight": 0.0}, Q2, A2 | {"loss_weight": 1.0}]},
    ),
    (
        "messages",
        {"messages": [Q, A | {"weight": 0}, Q2, A2 | {"loss_weight": 0.5}]},
        {"messages": [Q, A | {"loss_weight": 0.0}, Q2, A2 | {"loss_weight": 0.5}]},
    ),
    (
        "messages",
        {
            "messages": [
                Q,
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **CALL, "index": None}]},
                RESULT | {"tool_call_id": "1", "name": "add"},
                A,
            ],
            "tools": TOOLS,
        },
        {"messages": [Q, CALLING, RESULT | {"name": "add"}, A], "tools": TOOLS},
    ),
    (
        "messages",
        {
            "messages": [
                Q,
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "add", "arguments": '{"x": 1, "y": null}'}}],
                },
            ],
            "tools": json.dumps([SCHEMA]),
        },
        {"messages": [Q, CALLING], "tools": TOOLS},
    ),
    (
        "messages",
        {"messages": [Q, A | {"reasoning_content": "hm"}]},
        {"messages": [Q, {"role": "assistant", "content": "<think>\nhm\n</think>\na"}]},
    ),
    (
        "messages",
        {
            "messages": [
                Q,
                {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": {"x": 1}}},
            ]
        },
        {"messages": [Q, CALLING]},
    ),
    ("sharegpt", {"conversations": gpt(("system", "s"), ("human", "q"), ("gpt", "a"))}, {"messages": [S, Q, A]}),
    ("sharegpt", {"conversations": [S, Q, A]}, {"messages": [S, Q, A]}),
    (
        "sharegpt",
        {
            "conversations": gpt(
                ("human", "q"),
                ("function_call", '{"name": "add", "arguments": {"x": 1}}'),
                ("observation", "2"),
                ("gpt", "a"),
            ),
            "tools": json.dumps(SCHEMA),
        },
        {"messages": [Q, CALLING, RESULT, A], "tools": TOOLS},
    ),
    (
        "sharegpt",
        {"conversations": gpt(("human", "q"), ("gpt", "a"), ("tool", "2"), ("gpt", "b"))},
        {"messages": [Q, A, RESULT, B]},
    ),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, {"messages": [Q, A]}),
    ("alpaca", {"instruction": "q", "output": "a"}, {"messages": [Q, A]}),
    (
        "alpaca",
        {"instruction": "do", "input": "it", "output": "a2", "system": "s", "history": [["q", "a"]]},
        {"messages": [S, Q, A, {"role": "user", "content": "do\n\nit"}, A2]},
    ),
    ("prompt_completion", {"prompt": "q", "completion": "a"}, {"messages": [Q, A]}),
    (
        "prompt_completion",
        {"prompt": [S, Q, A, Q2], "completion": [A2]},
        {"messages": [S, Q, A | {"loss_weight": 0.0}, Q2, A2]},
    ),
    ("prompt_response", {"prompt": "q", "response": "a", "answer": "42"}, {"messages": [Q, A], "answer": "42"}),
    ("question_answer", {"question": "q", "answer": "a"}, {"messages": [Q, A]}),
    ("user_assistant", {"user": "q", "assistant": "a", "system": "s"}, {"messages": [S, Q, A]}),
    ("openhermes_fr", {"prompt": "q", "accepted_completion": "a", "bad_entry": False}, {"messages": [Q, A]}),
    (
        "medical_o1",
        {"Question": "q", "Complex_CoT": "hm", "Response": "a"},
        {"messages": [Q, {"role": "assistant", "content": "<think>\nhm\n</think>\na"}]},
    ),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": [Q], "chosen": [A], "rejected": [B]}),
    (
        "preference",
        {"prompt": [S, Q], "chosen": [A], "rejected": B, "answer": "a", "tools": [SCHEMA]},
        {"prompt": [S, Q], "chosen": [A], "rejected": [B], "answer": "a", "tools": TOOLS},
    ),
    (  # UltraFeedback, binarised
        "preference",
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A], "score_chosen": 9.0},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
    ),
    (
        "implicit_prompt",
        {"chosen": [S, Q, A], "rejected": [S, Q, B]},
        {"prompt": [S, Q], "chosen": [A], "rejected": [B]},
    ),
    (
        "implicit_prompt",
        {"chosen": [Q, A, Q2, A2], "rejected": [Q, B]},
        {"prompt": [Q], "chosen": [A, Q2, A2], "rejected": [B]},
    ),
    (
        "sharegpt_preference",
        {"conversations": gpt(("human", "q")), "chosen": gpt(("gpt", "a"))[0], "rejected": gpt(("gpt", "b"))[0]},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
    ),
    (
        "messages_preference",
        {"messages": [Q, A, Q2], "chosen": "a2", "rejected": "b", "system": "s"},
        {"prompt": [S, Q, A, Q2], "chosen": [A2], "rejected": [B]},
    ),
    (
        "transcripts",
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant: a2",
            "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant: b",
        },
        {"prompt": [Q, A, Q2], "chosen": [A2], "rejected": [B]},
    ),
    (
        "transcripts",
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
    ),
    (
        "scored",
        {
            "instruction": "q",
            "completions": [
                {"response": "c", "overall_score": 5.0},
                {"response": "a", "overall_score": 9},
                {"response": "b", "overall_score": 2.5},
                {"response": "d", "overall_score": None},
            ],
        },
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
    ),
    (
        "scored",
        {
            "instruction": "q",
            "completions": [
                {"response": "b", "annotations": {"honesty": {"Rating": "2"}, "truth": {"Rating": "5"}}},
                {"response": "a", "annotations": {"honesty": {"Rating": "4"}, "truth": {"Rating": "N/A"}}},
            ],
        },
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
    ),
    ("unpaired", {"prompt": "q", "completion": "a", "label": True}, {"prompt": [Q], "completion": [A], "label": True}),
    (
        "unpaired",
        {"prompt": [S, Q], "completion": A, "label": 0},
        {"prompt": [S, Q], "completion": [A], "label": False},
    ),
    (
        "unpaired_response",
        {"prompt": "q", "response": "a", "label": "True", "system": "s"},
        {"prompt": [S, Q], "completion": [A], "label": True},
    ),
    ("text", {"text": "once\n"}, {"text": "once\n"}),
]


@pytest.mark.parametrize(("name", "row", "expected"), GIVEN, ids=[f"{i}-{g[0]}" for i, g in enumerate(GIVEN)])
def test_every_shape_is_recognised_and_read(name, row, expected):
    kind, before = SHAPE[name].kind, copy.deepcopy(row)
    for shape in (
        recognise(list(row), [row], [kind], None, None),
        recognise(list(row), [row], KINDS, name, None),
        recognise(list(row), [], [kind], name, {}),
    ):
        assert (shape.name, shape.kind, shape.read(row)) == (name, kind, expected)
    assert row == before
    check_canonical(kind, expected)


def test_every_shape_has_a_fixture():
    assert {name for name, _, _ in GIVEN} == set(SHAPE)


def test_kinds_decide_between_shapes():
    row = {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A], "completion": "a", "label": 1}
    names = [recognise(list(row), [row], [kind], None, None).name for kind in ("preference", "unpaired")]
    assert names == ["preference", "unpaired"]
    del row["completion"]
    assert recognise(list(row), [row], ["conversation", "text"], None, None).name == "messages"


def test_replies_that_are_marked_as_good_or_bad_are_not_learned_as_all_good():
    row = {"prompt": "q", "completion": "a", "label": False}
    with pytest.raises(ConfigError, match=r"these are unpaired rows \(prompt, completion, label\)"):
        recognise(list(row), [row], ["conversation", "text"], None, None)
    assert recognise(list(row), [row], ["conversation"], "prompt_completion", None).name == "prompt_completion"


def test_a_first_row_that_cannot_be_read_leaves_the_shape_as_it_is():
    rows = [{"chosen": None, "rejected": None}, {"chosen": [Q, A], "rejected": [Q, A]}, {"chosen": 3, "rejected": 4}]
    rows = [{"chosen": 3, "rejected": 4}, {"chosen": [Q, A], "rejected": [Q, A]}]
    shape = recognise(["chosen", "rejected"], rows, ["preference"], None, None)
    assert shape.name == "implicit_prompt"
    for row in rows:
        with pytest.raises(RowError):
            shape.read(row)


# ---------------------------------------------------------------- columns of other names


@pytest.mark.parametrize("format", [None, "preference"])
def test_columns_are_taken_as_declared_and_the_rest_by_name(format):
    row = {"ask": "q", "prompt": "not this", "chosen": "b", "rejected": "a", "system": "s"}
    mapping = {"prompt": "ask", "chosen": "rejected", "rejected": "chosen"}
    shape = recognise(list(row), [row], ["preference"], format, mapping)
    assert shape.read(row) == {"prompt": [S, Q], "chosen": [A], "rejected": [B]}
    with pytest.raises(RowError, match=r"^ask: empty text, found ' '; ") as raised:
        shape.read(row | {"ask": " "})
    assert (raised.value.field, raised.value.reason) == ("ask", "empty text")


def test_a_column_that_is_declared_otherwise_is_no_longer_itself():
    row = {"question": "q", "answer": "a"}
    shape = recognise(list(row), [row], KINDS, None, {"prompt": "question", "completion": "answer"})
    assert shape.name == "prompt_completion" and shape.read(row) == {"messages": [Q, A]}
    text = recognise(list(row), [row], KINDS, None, {"text": "answer"})
    assert text.read(row) == {"text": "a"}


def test_a_mapped_shape_and_its_errors_cross_to_other_processes():
    shape = pickle.loads(pickle.dumps(recognise(["chat"], [], KINDS, None, {"messages": "chat"})))
    with pytest.raises(RowError) as raised:
        shape.read({"chat": [Q, A | {"content": None}]})
    again = pickle.loads(pickle.dumps(raised.value))
    assert (
        str(again)
        == str(raised.value)
        == "chat[1].content: null content, found None; give it a text or leave the row out"
    )
    assert (again.field, again.reason) == ("chat[1].content", "null content")


# ---------------------------------------------------------------- what cannot be recognised


def refused(row: dict, kinds: list[str], format: str | None = None, mapping: dict | None = None) -> str:
    with pytest.raises(ConfigError) as raised:
        recognise(list(row), [row], kinds, format, mapping)
    assert not isinstance(raised.value, RowError)
    return str(raised.value)


def pasted(message: str) -> list[dict]:
    """The `data` of each YAML block in a message."""
    return [yaml.safe_load(block)["data"] for block in message.partition("in YAML:\n")[2].split("\nor\n")]


def test_of_two_shapes_that_fit_neither_is_guessed():
    row = {"instruction": "q", "output": "a" * 200, "text": "all of it"}
    message = refused(row, ["conversation", "text"])
    assert "these rows fit alpaca and text" in message and "columns: instruction, output, text" in message
    assert "  instruction: 'q'\n  output: 'aaaa" in message and "a" * 81 not in message
    assert pasted(message) == [{"format": "alpaca"}, {"format": "text"}]
    for data in pasted(message):
        assert recognise(list(row), [row], KINDS, data["format"], None).name == data["format"]


@pytest.mark.parametrize(
    ("row", "kinds", "format", "columns"),
    [
        (
            {"id": 1, "ask": "q", "my reply": "a"},
            ["conversation", "text"],
            "prompt_completion",
            {"prompt": "ask", "completion": "my reply"},
        ),
        (
            {"instruction": "q", "context": "", "response": "a", "category": "c"},
            ["conversation", "text"],
            "alpaca",
            {"output": "response", "input": "context"},
        ),
        (
            {"id": 1, "on": "q", "c d": "a"},
            ["conversation"],
            "prompt_completion",
            {"prompt": "on", "completion": "c d"},
        ),
        ({"dialog": [Q, A], "n": 2}, ["conversation", "text"], "messages", {"messages": "dialog"}),
        (
            {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
            ["preference"],
            "preference",
            {"prompt": "question"},
        ),
        (
            {"Context": "q", "good": "a", "bad": "b"},
            ["preference"],
            "preference",
            {"prompt": "Context", "chosen": "good", "rejected": "bad"},
        ),
        ({"story": "once"}, ["text"], "text", {"text": "story"}),
    ],
)
def test_where_no_shape_fits_the_yaml_to_paste_is_guessed_and_works(row, kinds, format, columns):
    message = refused(row, kinds)
    assert f"data: columns {', '.join(row)} fit none of the known shapes" in message
    assert all(f"  {name}: {shown(value)}" in message for name, value in row.items())
    assert pasted(message) == [{"format": format, "columns": columns}]
    shape = recognise(list(row), [row], kinds, format, columns)
    check_canonical(shape.kind, shape.read(row))


def test_what_cannot_be_guessed_is_left_to_fill_in():
    assert pasted(refused({"a": "x"}, ["preference"])) == [
        {"format": "preference", "columns": {"prompt": "a", "chosen": "???", "rejected": "???"}}
    ]


def test_rows_of_another_kind_are_said_to_be_that():
    message = refused({"messages": [Q, A]}, ["preference"])
    assert message.startswith(
        "data: the trainer eats preference rows (prompt, chosen, rejected); these are conversation rows (messages); "
        "lacking: chosen, rejected. "
    )
    assert "in YAML" not in message
    assert message == refused({"messages": [Q, A]}, ["preference"], "messages")


@pytest.mark.parametrize(
    ("format", "mapping", "expected"),
    [
        ("messagse", None, "data.format=messagse is none of messages, sharegpt, "),
        ("messagse", None, "did you mean messages?"),
        ("prompt_response", None, "data.format=prompt_response: lacking response\ncolumns: prompt, reply\n"),
        ("prompt_response", None, "  format: prompt_response\n  columns: {response: reply}"),
        (None, {"response": "repyl"}, "data.columns: no column repyl; there are prompt, reply; did you mean reply?"),
        (None, {"respose": "reply"}, "data.columns: respose is none of "),
        (None, {"respose": "reply"}, "did you mean response?"),
        ("text", {"response": "reply"}, "data.columns: response is none of text"),
        (None, {3: "reply"}, "data.columns: 3 is none of "),
        (None, {"text": 3}, "data.columns: no column 3; there are prompt, reply"),
        (None, {"text": "prompt", "label": "reply"}, "data: columns prompt, reply fit none"),
    ],
)
def test_what_is_declared_wrongly_is_named(format, mapping, expected):
    assert expected in refused({"prompt": "q", "reply": "a"}, list(KINDS), format, mapping)


def test_a_shape_whose_columns_are_there_with_other_types_says_which():
    message = refused({"messages": "hello"}, ["conversation"])
    assert "\nnot messages: messages: wrong type, found 'hello'; a list of messages is due here\n" in message


# ---------------------------------------------------------------- rows that cannot be read


def deep(levels: int) -> dict:
    return {"x": deep(levels - 1)} if levels else {}


def calling(**call) -> dict:
    return {"messages": [Q, {"role": "assistant", "content": None, "tool_calls": [call]}]}


BAD = [  # shape, row, field, reason
    ("messages", [], "row", "wrong type"),
    ("messages", {}, "messages", "null content"),
    ("messages", {"messages": []}, "messages", "empty messages"),
    ("messages", {"messages": "q"}, "messages", "wrong type"),
    ("messages", {"messages": ["q", "a"]}, "messages[0]", "wrong type"),
    ("messages", {"messages": [Q, A | {"content": None}]}, "messages[1].content", "null content"),
    ("messages", {"messages": [Q, {"role": "assistant"}]}, "messages[1].content", "null content"),
    ("messages", {"messages": [Q, A | {"content": math.nan}]}, "messages[1].content", "null content"),
    ("messages", {"messages": [Q, A | {"content": 3}]}, "messages[1].content", "wrong type"),
    ("messages", {"messages": [Q, A | {"content": {"a": 1}}]}, "messages[1].content", "wrong type"),
    ("messages", {"messages": [Q, A | {"content": ""}]}, "messages[1].content", "empty text"),
    ("messages", {"messages": [Q, A | {"content": " \n\u3000"}]}, "messages[1].content", "empty text"),
    ("messages", {"messages": [Q, A | {"content": []}]}, "messages[1].content", "empty text"),
    ("messages", {"messages": [Q, A | {"content": ["a"]}]}, "messages[1].content[0]", "wrong type"),
    ("messages", {"messages": [Q, A | {"content": [{"type": "image_url"}]}]}, "messages[1].content[0]", "not text"),
    ("messages", {"messages": [Q, A | {"content": [{"type": "text"}]}]}, "messages[1].content[0].text", "null content"),
    ("messages", {"messages": [Q, A | {"content": "a\ud800"}]}, "messages[1].content", "lone surrogate"),
    ("messages", {"messages": [Q, A | {"content": "a\0"}]}, "messages[1].content", "NUL character"),
    ("messages", {"messages": [Q, A | {"role": "robot"}]}, "messages[1].role", "unknown role"),
    ("messages", {"messages": [Q, A | {"role": None}]}, "messages[1].role", "unknown role"),
    ("messages", {"messages": [Q, A | {"role": ["user"]}]}, "messages[1].role", "unknown role"),
    ("sharegpt", {"conversations": gpt(("robot", "q"))}, "conversations[0].from", "unknown role"),
    ("sharegpt", {"conversations": gpt(("human", "q"), ("gpt", ""))}, "conversations[1].value", "empty text"),
    ("sharegpt", {"conversations": gpt(("function_call", "add 1"))}, "conversations[0].value", "bad JSON"),
    ("sharegpt", {"conversations": gpt(("function_call", ""))}, "conversations[0].value", "null content"),
    ("sharegpt", {"conversations": gpt(("function_call", "[" * 10**5))}, "conversations[0].value", "bad JSON"),
    ("messages", {"messages": [Q, Q2, A]}, "messages[1]", "two user turns in a row"),
    ("messages", {"messages": [Q, A, B]}, "messages[2]", "two assistant turns in a row"),
    ("messages", {"messages": [Q, A, S, Q, A]}, "messages[2]", "system not first"),
    ("messages", {"messages": [S, S, Q, A]}, "messages[1]", "system not first"),
    ("messages", {"messages": [Q, RESULT, A]}, "messages[1]", "tool without a call"),
    ("messages", {"messages": [Q, A, Q2]}, "messages[2]", "does not end with the assistant"),
    ("messages", {"messages": [Q, CALLING, RESULT]}, "messages[2]", "does not end with the assistant"),
    ("messages", {"messages": [S, Q]}, "messages[1]", "no assistant turn"),
    ("messages", {"messages": [S, Q, A], "system": "t"}, "system", "two system prompts"),
    ("messages", {"messages": [Q, A], "system": 3}, "system", "wrong type"),
    ("messages", {"messages": [Q, A], "answer": "\ud800"}, "answer", "lone surrogate"),
    ("messages", {"messages": [Q, A | {"name": 3}]}, "messages[1].name", "wrong type"),
    *(
        ("messages", {"messages": [Q, A | {key: value}]}, f"messages[1].{key}", "bad loss weight")
        for key, value in [
            *[("loss_weight", v) for v in (-1, math.nan, math.inf, "1", True, [1], 10**400)],
            *[("weight", -0.5), ("train", 1), ("train", "false")],
        ]
    ),
    ("messages", {"messages": [Q | {"weight": 1}, A]}, "messages[0].weight", "bad loss weight"),
    ("messages", {"messages": [Q | {"train": True}, A]}, "messages[0].train", "bad loss weight"),
    ("messages", {"messages": [Q | {"tool_calls": [CALL]}, A]}, "messages[0].tool_calls", "call by another"),
    ("messages", {"messages": [Q, A | {"tool_calls": 3}]}, "messages[1].tool_calls", "wrong type"),
    ("messages", {"messages": [Q, A | {"tool_calls": [3]}]}, "messages[1].tool_calls[0]", "wrong type"),
    ("messages", calling(arguments={}), "messages[1].tool_calls[0].name", "null content"),
    ("messages", calling(name="f", arguments="{"), "messages[1].tool_calls[0].arguments", "bad JSON"),
    ("messages", calling(name="f", arguments=[1]), "messages[1].tool_calls[0].arguments", "wrong type"),
    ("messages", calling(name="f", arguments={"x": math.inf}), "messages[1].tool_calls[0].arguments", "not a number"),
    ("messages", calling(name="f", arguments={"x": b"1"}), "messages[1].tool_calls[0].arguments", "wrong type"),
    ("messages", calling(name="f", arguments={"x": 10**5000}), "messages[1].tool_calls[0].arguments", "wrong type"),
    ("messages", calling(name="f", arguments={1: 2}), "messages[1].tool_calls[0].arguments", "wrong type"),
    ("messages", calling(name="f", arguments=deep(60)), "messages[1].tool_calls[0].arguments", "nested too deeply"),
    ("messages", {"messages": [Q, A], "tools": "[{"}, "tools", "bad JSON"),
    ("messages", {"messages": [Q, A], "tools": 3}, "tools", "wrong type"),
    ("messages", {"messages": [Q, A], "tools": ["add"]}, "tools[0]", "wrong type"),
    ("messages", {"messages": [Q, A], "tools": [{"function": "add"}]}, "tools[0]", "wrong type"),
    ("messages", {"messages": [Q, A], "tools": [{"description": "x"}]}, "tools[0].name", "null content"),
    ("messages", {"messages": [Q, A], "tools": [{"name": "f", "parameters": 3}]}, "tools[0].parameters", "wrong type"),
    ("prompt_completion", {"prompt": "q", "completion": None}, "completion", "null content"),
    ("prompt_completion", {"prompt": "q"}, "completion", "null content"),
    ("prompt_completion", {"prompt": "q", "completion": " "}, "completion", "empty text"),
    ("prompt_completion", {"prompt": 3, "completion": "a"}, "prompt", "wrong type"),
    ("prompt_completion", {"prompt": "\n\nHuman: q\n\nAssistant:", "completion": "a"}, "prompt", "wrong type"),
    ("prompt_completion", {"prompt": "q", "completion": [Q, A]}, "completion[0]", "not a reply"),
    ("prompt_completion", {"prompt": [Q, A], "completion": "b"}, "completion[0]", "two assistant turns in a row"),
    ("question_answer", {"question": "q", "answer": ""}, "answer", "empty text"),
    ("alpaca", {"instruction": "", "input": "i", "output": "a"}, "instruction", "empty text"),
    ("alpaca", {"instruction": "q", "input": 3, "output": "a"}, "input", "wrong type"),
    ("alpaca", {"instruction": "q", "output": "a", "history": "h"}, "history", "wrong type"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["q"]]}, "history[0]", "wrong type"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["q", None]]}, "history[0][1]", "null content"),
    ("medical_o1", {"Question": "q", "Complex_CoT": None, "Response": "a"}, "Complex_CoT", "null content"),
    ("medical_o1", {"Question": "q", "Complex_CoT": "hm", "Response": ""}, "Response", "empty text"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "rejected", "chosen equals rejected"),
    ("preference", {"prompt": "q", "chosen": [Q, A], "rejected": [Q, A]}, "rejected", "chosen equals rejected"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": None}, "rejected", "null content"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": [Q, B]}, "rejected[0]", "not a reply"),
    (
        "messages_preference",
        {"messages": [Q, CALLING], "chosen": "a", "rejected": [RESULT, B]},
        "rejected[0]",
        "not a reply",
    ),
    ("unpaired", {"prompt": [Q, A], "completion": [Q2, A2], "label": 1}, "completion[0]", "not a reply"),
    ("preference", {"prompt": [S], "chosen": [A, Q], "rejected": [B]}, "chosen[1]", "does not end with the assistant"),
    ("implicit_prompt", {"chosen": [Q, A, Q2, A2], "rejected": [Q, A]}, "rejected", "nothing is rejected"),
    ("implicit_prompt", {"chosen": [Q], "rejected": [Q, A]}, "chosen", "nothing is chosen"),
    ("implicit_prompt", {"chosen": [Q, A], "rejected": [Q2, A]}, "rejected[0]", "prompts differ"),
    ("implicit_prompt", {"chosen": [S, Q, A], "rejected": [S, Q2, A]}, "rejected[1]", "prompts differ"),
    ("implicit_prompt", {"chosen": [A], "rejected": [B]}, "rejected[0]", "prompts differ"),
    ("sharegpt_preference", {"conversations": [Q], "chosen": [Q, A], "rejected": [Q, B]}, "chosen", "wrong type"),
    ("transcripts", {"chosen": "a", "rejected": "b"}, "chosen", "wrong type"),
    ("transcripts", {"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": "x"}, "chosen[1].content", "empty text"),
    ("transcripts", {"chosen": ["a"], "rejected": "x"}, "chosen", "wrong type"),
    ("scored", {"instruction": "q", "completions": ["a", "b"]}, "completions", "wrong type"),
    ("scored", {"instruction": "q", "completions": [{"response": "a"}] * 3}, "completions", "fewer than two scores"),
    (
        "scored",
        {"instruction": "q", "completions": [{"response": "a", "overall_score": 4}, {"response": "b"}]},
        "completions",
        "fewer than two scores",
    ),
    (
        "scored",
        {"instruction": "q", "completions": [{"response": r, "overall_score": 4} for r in "ab"]},
        "completions",
        "tied scores",
    ),
    (
        "scored",
        {"instruction": "q", "completions": [{"overall_score": 4}, {"response": "a", "overall_score": "9"}]},
        "completions[0].response",
        "null content",
    ),
    *(
        ("unpaired", {"prompt": "q", "completion": "a", "label": label}, "label", "bad label")
        for label in (None, 2, "good", [True], math.nan)
    ),
    ("text", {"text": 3}, "text", "wrong type"),
    ("text", {"text": None}, "text", "null content"),
    ("text", {"text": "\t"}, "text", "empty text"),
]


@pytest.mark.parametrize(("name", "row", "field", "reason"), BAD)
def test_a_row_that_cannot_be_read_says_where_and_why(name, row, field, reason):
    with pytest.raises(RowError) as raised:
        SHAPE[name].read(row)
    error = raised.value
    assert (error.field, error.reason) == (field, reason)
    assert re.fullmatch(re.escape(f"{field}: {reason}, found ") + r".{1,80}; .{5,150}", str(error))


def test_an_unknown_role_is_answered_with_those_known():
    with pytest.raises(RowError, match=", ".join(ROLES)):
        SHAPE["messages"].read({"messages": [Q | {"role": "robot"}]})


# ---------------------------------------------------------------- whatever a row is


def check_canonical(kind: str, row: dict) -> None:
    """Fails unless `row` is what the parts behind may rely on."""
    if kind == "text":
        assert set(row) == {"text"} and row["text"].strip()
    elif kind == "unpaired":
        assert set(row) == {"prompt", "completion", "label"} and isinstance(row["label"], bool)
        assert row["prompt"] and row["completion"][0]["role"] == "assistant"
        check_turns([*row["prompt"], *row["completion"]])
    elif kind == "conversation":
        assert {"messages"} <= set(row) <= {"messages", "tools", "answer"}
        check_turns(row["messages"])
    else:
        assert {"prompt", "chosen", "rejected"} <= set(row) <= {"prompt", "chosen", "rejected", "tools", "answer"}
        assert row["prompt"] and row["chosen"] != row["rejected"]
        for reply in (row["chosen"], row["rejected"]):
            assert reply[0]["role"] == "assistant"
            check_turns([*row["prompt"], *reply])
    for tool in row.get("tools", []):
        assert set(tool) == {"type", "function"} and tool["function"]["name"].strip()
    assert row.get("answer", "x").strip() and row.get("tools", "x")
    written = json.dumps(row, allow_nan=False, ensure_ascii=False)
    assert written.encode() and "\\u0000" not in written
    standard = {"conversation": "messages", "text": "text"}.get(kind, kind)
    assert SHAPE[standard].read(row) == row  # what is canonical is read as it is


def check_turns(messages: list[dict]) -> None:
    last = "nobody"
    for i, m in enumerate(messages):
        role, calls = m["role"], m.get("tool_calls")
        assert {"role", "content"} <= set(m) <= {"role", "content", "name", "tool_calls", "loss_weight"}
        assert role in ("system", "user", "assistant", "tool") and (role != "system" or i == 0)
        assert role != "user" or last != "user"
        assert isinstance(m["content"], str) and (m["content"].strip() or calls or role == "tool")
        assert "tool_calls" not in m or (calls and role == "assistant")
        for call in calls or []:
            assert set(call) == {"type", "function"} and set(call["function"]) == {"name", "arguments"}
            assert call["function"]["name"].strip() and isinstance(call["function"]["arguments"], dict)
        if "loss_weight" in m:
            assert role == "assistant" and isinstance(m["loss_weight"], float) and 0 <= m["loss_weight"] < math.inf
        last = role
    assert last == "assistant"


KEYS = sorted(
    {name for shape in SHAPES for name in (*shape.columns, *shape.optional)}
    | {"role", "content", "from", "value", "name", "tool_calls", "function_call", "function", "arguments", "parameters"}
    | {"type", "loss_weight", "weight", "train", "reasoning_content", "thinking", "overall_score", "annotations"}
)
WORDS = [
    *ROLES,
    "q",
    "a",
    "",
    " ",
    "text",
    "image",
    "{}",
    "[]",
    "null",
    '{"name": "f"}',
    "\n\nHuman: q\n\nAssistant: a",
]
WORDS += ["\ud800", "\0", "é", "true", "1", "[" * 2000, '{"name": "f", "arguments": {"x": NaN}}', "\n\nAssistant:"]
OTHERS = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    math.nan,
    math.inf,
    10**400,
    10**5000,
    b"x",
    date(2020, 1, 1),
    {1},
    (),
    object,
]
PIECES: list[Any] = [Q, A, B, S, CALLING, RESULT, [Q, A], [Q, B], TOOLS, CALL]


def junk(rng: random.Random, depth: int = 0) -> Any:
    """A word, another thing, a piece of a good row, or a list or dict of all these."""
    kind = rng.randrange(4 if depth > 2 else 6)
    if kind < 3:
        return copy.deepcopy(rng.choice((WORDS, OTHERS, PIECES)[kind]))
    if kind == 3:
        return "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x11000)))) for _ in range(rng.randrange(4)))
    if kind == 4:
        return [junk(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice((*KEYS, 1, "\ud800")): junk(rng, depth + 1) for _ in range(rng.randrange(4))}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place within a row: the list or dict, and the index or key."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def damaged(seed: int) -> dict:
    """A good row, or the columns of two, or a third of the time none, and up to three places of it changed."""
    rng = random.Random(seed)
    row = {rng.choice(KEYS): junk(rng) for _ in range(rng.randrange(5))} if rng.random() < 0.3 else {}
    for _ in range(rng.choice((0, 1, 1, 1, 2)) or not row):
        row |= copy.deepcopy(rng.choice(GIVEN)[1])
    for _ in range(rng.randrange(4)):
        place, key = rng.choice([*places(row)] or [(row, "messages")])
        change = rng.randrange(6)
        if change == 0 and isinstance(place, list):
            place.insert(key, copy.deepcopy(place[key]))
        elif change == 1:
            place.pop(key, None) if isinstance(place, dict) else place.pop(key)
        elif change == 2 and isinstance(place, dict):
            place[rng.choice(KEYS)] = junk(rng)
        elif change == 3 and isinstance(place, list):
            rng.shuffle(place)
        else:
            place[key] = junk(rng)
    return row


def read_by_every_shape(row: dict) -> None:
    for shape in SHAPES:
        try:
            canonical = shape.read(row)
        except RowError as error:
            assert error.field and error.reason and len(str(error)) < 400
            assert str(error).encode()
        else:
            check_canonical(shape.kind, canonical)
    for kinds in (["conversation", "text"], ["preference"], ["unpaired"]):
        try:
            shape = recognise(list(row), [row], kinds, None, None)
        except ConfigError as error:
            assert not isinstance(error, RowError)
        else:
            assert shape.kind in kinds


@settings(max_examples=2000, derandomize=True, deadline=None)
@given(st.integers(0, 2**64))
def test_whatever_a_row_is_only_a_row_error_leaves(seed):
    read_by_every_shape(damaged(seed))


@pytest.mark.torture
def test_whatever_100_000_rows_are_only_row_errors_leave():
    for seed in range(100_000):
        read_by_every_shape(damaged(seed))


# ---------------------------------------------------------------- real rows


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not beside this checkout")
@pytest.mark.parametrize(
    ("file", "name", "kind"),
    [
        ("gsm8k_test.jsonl", "question_answer", "conversation"),
        ("gsm8k_train.jsonl", "question_answer", "conversation"),
        ("alpaca_en_demo.json", "alpaca", "conversation"),
        ("dpo_en_demo.json", "sharegpt_preference", "preference"),
    ],
)
def test_real_rows_are_recognised_and_read(file, name, kind):
    content = (SHARED / file).read_text()
    rows = [json.loads(line) for line in content.splitlines()] if file.endswith("l") else json.loads(content)
    shape = recognise(list(rows[0]), rows[:100], [kind], None, None)
    assert shape.name == name
    for row in rows:
        check_canonical(kind, shape.read(row))


def test_rows_whose_columns_fit_but_none_of_which_can_be_read_are_told_as_what_they_are():
    asked = [{"from": "human", "value": "q"}]
    row = {"conversations": asked, "chosen": "a", "rejected": "b"}
    with pytest.raises(ConfigError, match=r"these are preference rows \(conversations, chosen, rejected\)\. Choose"):
        recognise(list(row), [row], ("conversation", "text"), None, None)
    answered = row | {"conversations": [*asked, {"from": "gpt", "value": "a"}]}
    assert recognise(list(row), [answered], ("conversation", "text"), None, None).name == "sharegpt"
