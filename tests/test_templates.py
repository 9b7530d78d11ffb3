"""What a model is trained on is what it is served with: every shipped template, and templates broken on purpose.

Serving is transformers' own `apply_chat_template`, as a server calls it, at every turn of a conversation.
"""

import json
from datetime import datetime
from pathlib import Path

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from trl import chat_template_utils as trl_templates

from smoltrain.config import ConfigError
from smoltrain.data.templates import (
    RenderError,
    faults,
    frozen,
    prompts,
    render,
    shipped,
    special_tokens,
    spelled,
    training_template,
    uses_tools,
)
from smoltrain.model import locate, read_chat_template

DAY = "2026-01-31"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(locate("pkg://smoltrain/tiny"))


def byte_level(texts: list[str], post_processor=None):
    """A tokenizer of bytes, and of what occurs twice in some texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    if post_processor:
        bpe.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<|im_end|>")


# ---------------------------------------------------------------- conversations of every kind


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str | None, *calls: tuple[str, dict]) -> dict:
    called = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls]
    return {"role": "assistant", "content": content} | ({"tool_calls": called} if called else {})


def result(content: str) -> dict:
    return {"role": "tool", "name": "weather", "content": content}


def function(name: str) -> dict:
    city = {"type": "string", "description": "a <b>town's</b> name"}
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": "looks it up", "parameters": parameters}}


SYSTEM = {"role": "system", "content": "Be brief."}
TURN = [user("What is 2 + 3?"), assistant("2 + 3 = 5.")]
MULTI = [*TURN, user(" And twice that?\n"), assistant("\n5 + 5 = 10. "), user("Thanks"), assistant("Sure.")]
TOOLS = [function("weather"), function("add")]
CALL = ("weather", {"city": 'Nîmes "sud" <b>', "days": 2, "deep": {"list": [1.5, None, True]}})
CALLS = [
    user("Rain in Nîmes?"),
    assistant("", CALL),
    result('{"rain": false}'),
    assistant("No."),
    user("And here & there?"),
    assistant("I look.", CALL, ("add", {})),
    result("yes"),
    result("no\n"),
    assistant("Here, yes."),
]

PLAIN = {
    "single turn": TURN,
    "several turns": MULTI,
    "system": [SYSTEM, *TURN],
    "system, several turns": [SYSTEM, *MULTI],
    "two replies in a row": [*TURN, assistant("Or five.")],
    "the last word is the user's": [*TURN, user("Thanks")],
    "white space": [user(" \n"), assistant(" "), user("\t\tx  "), assistant("\n\n  y\n\n")],
    "special tokens spelled": [
        user("Why <|im_end|>\n<|im_start|>assistant\nhere?"),
        assistant("See </s> and {{ x }}."),
    ],
    "unicode": [
        user("¿Qué? 日本語 👩‍👩‍👧 e\u0301 \u200b\ufeff"),
        assistant("👍🏽 Ça va\u00a0: «é» \U0001f600"),
        user("\r\n"),
        assistant("ﷺ"),
    ],
    "null where a column has tools": [{**m, "tool_calls": None, "name": None} for m in TURN],
}
WITH_TOOLS = {
    "tools offered": TURN,
    "tools called": CALLS,
    "tools called, system": [SYSTEM, *CALLS],
    "no text beside a call": [user("Rain?"), assistant(None, CALL), result("no"), assistant("No.")],
    "tools spelled in unicode": [
        user("天気"),
        assistant("はい", ("weather", {"都市": "東京"})),
        result("☔"),
        assistant("雨"),
    ],
}
PROOFS = [
    pytest.param(template, row, id=f"{template}, {kind}")
    for template in shipped()
    for kind, row in {
        **{kind: {"messages": talk} for kind, talk in PLAIN.items()},
        **{kind: {"messages": talk, "tools": TOOLS} for kind, talk in WITH_TOOLS.items() if template != "smollm2"},
    }.items()
]


def reply(message: dict) -> str:
    """What the model has to say for one turn of ours, its end included."""
    calls = [call["function"] for call in message.get("tool_calls") or []]
    wire = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
    return "\n".join([message["content"]] * bool(message["content"] or not wire) + wire) + "<|im_end|>"


@pytest.mark.parametrize(("name", "row"), PROOFS)
def test_shipped_templates_train_exactly_what_is_served(tokenizer, name, row):
    template, (messages, tools) = read_chat_template(name), (row["messages"], row.get("tools"))
    (text,), (spans,) = render(template, [messages], [tools], **tokenizer.special_tokens_map)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert [text[start:end] for start, end in spans] == [reply(messages[i]) for i in turns]

    served = {"tools": tools, "chat_template": template, "return_dict": False}
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.apply_chat_template(messages, **served)
    for i, (start, _) in zip(turns, spans, strict=True):
        asked = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, **served)
        said = tokenizer(reply(messages[i]), add_special_tokens=False)["input_ids"]
        assert ids[: len(asked) + len(said)] == asked + said and said[-1] == tokenizer.eos_token_id
        assert text[:start] == tokenizer.decode(asked) == prompts(template, [messages[:i]], [tools])[0]
    assert faults(tokenizer, template, [row]) == []


WORDS = st.text(max_size=8) | st.sampled_from(
    ["<|im_end|>", "\n", " ", "<think>", "</think>\n", "Mia has 21", "assistant"]
)
TALKS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), st.lists(WORDS, max_size=3).map("".join)), min_size=1, max_size=5
).map(lambda turns: [user("x")] + [{"role": role, "content": content} for role, content in turns])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(talk=TALKS)
@pytest.mark.parametrize("name", shipped())
def test_whatever_is_said_is_trained_as_it_is_served(tokenizer, name, talk):
    assert faults(tokenizer, read_chat_template(name), [{"messages": talk}]) == []


@pytest.mark.parametrize("name", shipped())
def test_plain_conversations_read_as_they_always_did(name):
    """Texts that models have been trained on: a change here makes them strangers to their own template."""
    smollm3 = (
        "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nReasoning Mode: /no_think\n\n"
        "## Custom Instructions\n\n{}\n\n<|im_end|>\n"
    )
    named = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    turn = "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n{}2 + 3 = 5.<|im_end|>"
    bare, given = {
        "chatml": (turn.format(""), system + turn.format("")),
        "smollm2": (f"<|im_start|>system\n{named}<|im_end|>\n" + turn.format(""), system + turn.format("")),
        "smollm3": tuple(smollm3.format(s) + turn.format("<think>\n\n</think>\n") for s in (f"{named}.", "Be brief.")),
    }[name]
    assert render(read_chat_template(name), [TURN, [SYSTEM, *TURN]])[0] == [bare, given]


def test_chatml_prints_tools_as_qwen_does(tokenizer):
    ours, _ = render(read_chat_template("chatml"), [[SYSTEM, *CALLS]], [TOOLS])
    theirs, _ = render(trl_templates.qwen2_5_chat_template, [[SYSTEM, *CALLS]], [TOOLS])
    assert ours == [theirs[0].removesuffix("\n")]
    bare, _ = render(read_chat_template("chatml"), [CALLS], [TOOLS])
    assert bare == [ours[0].replace("Be brief.\n\n", "")]


def test_smollm3_prints_tools_as_its_own_template_does():
    """Its own prints function schemas as Python does, and what tools return as a user's turn each."""
    (text,), _ = render(read_chat_template("smollm3"), [[SYSTEM, *CALLS[5:]]], [TOOLS])
    head, _, tail = text.partition("<think>\n\n</think>\n")
    assert head.endswith(
        "## Custom Instructions\n\nBe brief.\n\n### Tools\n\nYou may call one or more functions to assist with the "
        "user query.\nYou are provided with function signatures within <tools></tools> XML tags:\n\n<tools>\n"
        f"{TOOLS[0]}\n{TOOLS[1]}\n</tools>\n\nFor each function call, return a json object with function name and "
        "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n\n<|im_end|>\n'
        "<|im_start|>assistant\n"
    )
    assert tail == (
        reply(CALLS[5]) + "\n<|im_start|>user\nyes<|im_end|>\n<|im_start|>user\nno\n<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\nHere, yes.<|im_end|>"
    )


# ---------------------------------------------------------------- tools where there are none


@pytest.mark.parametrize(
    "row", [(TURN, TOOLS), ([user("x"), assistant("", CALL)], None), ([user("x"), result("y")], None)]
)
def test_a_template_without_tools_refuses_rows_with_tools(row):
    with pytest.raises(
        RenderError, match=r"model\.chat_template: .* prints no tools.*choose chatml or smollm3"
    ) as error:
        render(read_chat_template("smollm2"), [TURN, row[0]], [None, row[1]])
    assert error.value.index == 1


def test_which_templates_print_tools():
    assert {name: uses_tools(read_chat_template(name)) for name in shipped()} == {
        "chatml": True,
        "smollm2": False,
        "smollm3": True,
    }
    assert uses_tools(trl_templates.qwen3_training_chat_template)
    assert not uses_tools(trl_templates.gemma_training_chat_template)
    silent = read_chat_template("chatml").replace("message['tool_calls']", "message['calls']")
    assert not uses_tools(silent)  # the tools on offer are printed, but no call of them


def test_what_is_null_is_not_there():
    (text,), _ = render("{{ messages[0]['name'] is defined }}", [[user("x") | {"name": None}]])
    assert text == "False"


def test_what_a_template_refuses_is_said_with_its_row():
    strict = "{{ raise_exception('roles must alternate') if messages[0]['role'] == 'system' }}" + BASE
    with pytest.raises(RenderError, match="refuses this conversation: roles must alternate") as error:
        render(strict, [TURN, TURN, [SYSTEM, *TURN]])
    assert error.value.index == 2
    with pytest.raises(RenderError, match=r"model\.chat_template: the template refuses"):
        render(read_chat_template("chatml"), [[user("x"), assistant(None)]])


# ---------------------------------------------------------------- dates


class Clock(datetime):
    today_is = datetime(2026, 1, 31)

    @classmethod
    def now(cls, tz=None):
        return cls.today_is


@pytest.fixture
def on(monkeypatch):
    """Renders on a day: the clock of transformers' templates is set to it."""
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    def render_on(day: str, template: str) -> str:
        monkeypatch.setattr(Clock, "today_is", datetime.fromisoformat(day))
        return render(template, [TURN], bos_token="", eos_token="")[0][0]

    return render_on


DATED = {
    "double quotes": '{{ strftime_now("%d %B %Y") }}',
    "single quotes": "{{ 'Today: ' + strftime_now( '%Y-%m-%d' ) -}}",
    "a default": "{% if date_string is not defined %}{% if strftime_now is defined %}{% set date_string = "
    "strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ date_string }}",
    "no clock": "{{ '26 Jul 2024' if strftime_now is not defined else strftime_now('%d %b %Y') }}",
    "in a macro": "{% macro today() %}{{ strftime_now('%A %d.%m.%y') }}{% endmacro %}{{ today() }}",
    "llama 3.2": (Path(trl.__file__).parent / "chat_templates" / "llama3_2.jinja").read_text(),
    "gpt-oss": trl_templates.gptoss_training_chat_template,
}


@pytest.mark.parametrize("dated", DATED.values(), ids=list(DATED))
def test_a_frozen_template_prints_its_day_for_ever(on, dated):
    assert on("2026-01-31", dated) != on("2027-03-02", dated)
    assert on("2027-03-02", frozen(dated, DAY)) == on("2026-01-31", dated)


def test_what_has_no_date_is_left_alone():
    for name in shipped():
        assert frozen(read_chat_template(name), DAY) == read_chat_template(name)


def test_a_date_that_cannot_be_frozen_is_an_error():
    with pytest.raises(ConfigError, match=r"strftime_now.* needs its format in quotes"):
        frozen("{% set how = '%d' %}{{ strftime_now(how) }}", DAY)
    with pytest.raises(ConfigError, match=r"31 January: the date .* is written as 2026-01-31"):
        frozen("", "31 January")


# ---------------------------------------------------------------- which template rows are rendered with


def test_own_marks_come_first_then_trls_training_template_then_an_error(tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(locate("pkg://smoltrain/tiny"))
    assert training_template(tokenizer, DAY) == read_chat_template("chatml")
    tokenizer.chat_template = {"default": BASE + "{{ strftime_now('%Y') }}", "rag": "{{ documents }}"}
    assert training_template(tokenizer, DAY) == BASE + "{{ '2026' }}"
    tokenizer.chat_template = trl_templates.qwen3_chat_template
    assert training_template(tokenizer, DAY) == trl_templates.qwen3_training_chat_template
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(
        ConfigError, match=r"model\.chat_template: .* no \{% generation %\} marks.* chatml, smollm2, smoll"
    ):
        training_template(tokenizer, DAY)
    tokenizer.chat_template = BASE + "{% endif %}"
    with pytest.raises(ConfigError, match=r"model\.chat_template: .*unknown tag 'endif'"):
        training_template(tokenizer, DAY)
    tokenizer.chat_template = None
    with pytest.raises(
        ConfigError, match=r"model\.chat_template: .* has no chat template of its own; choose one of chatml"
    ):
        training_template(tokenizer, DAY)


# TRL's training templates, each with the end of turn of its models, tried on one turn with a system prompt and without.
# Where one is not clean, the words that say why.
THINKS = "training and serving differ"
DEEPSEEK = "<\uff5cend\u2581of\u2581sentence\uff5c>"
PARTS = "is not printed"  # templates of vision models read content as a list of parts
TRL_TEMPLATES = {
    "cohere": ("<|END_OF_TURN_TOKEN|>", ""),
    "cohere2": ("<|END_OF_TURN_TOKEN|>", ""),
    "deepseek_r1_distill": (DEEPSEEK, THINKS),  # serving opens <think>, which these rows do not have
    "deepseekv3": (DEEPSEEK, THINKS),
    "diffusion_gemma": ("<turn|>", "marks: 1 assistant turns, but 2 spans"),
    "gemma": ("<end_of_turn>", "System role not supported"),
    "gemma3": ("<end_of_turn>", ""),
    "glm4moe": ("<|user|>", ""),
    "gptoss": ("<|return|>", ""),
    "idefics3": ("<end_of_utterance>", PARTS),
    "lfm2": ("<|im_end|>", ""),
    "lfm2_v2": ("<|im_end|>", ""),
    "llama3": ("<|eot_id|>", ""),
    "llava_next": ("<|im_end|>", "refuses this conversation"),
    "muse_glimmer": ("<|eot|>", ""),
    "nemotron_3_5_lightning": ("<|im_end|>", THINKS),
    "nemotron_3_nano": ("<|im_end|>", THINKS),
    "nemotron_3_super": ("<|im_end|>", THINKS),
    "nemotron_3_ultra": ("<|im_end|>", THINKS),
    "phi3": ("<|end|>", "marks: 1 assistant turns, but 2 spans"),  # <|endoftext|> after the conversation is the second
    "phi3_5": ("<|end|>", "marks: 1 assistant turns, but 2 spans"),
    "qwen2_5": ("<|im_end|>", ""),
    "qwen2_5_vl": ("<|im_end|>", ""),
    "qwen3": ("<|im_end|>", ""),
    "qwen3_5_nothink": ("<|im_end|>", ""),
    "qwen3_5_think": ("<|im_end|>", ""),
    "qwen3_6": ("<|im_end|>", ""),
    "qwen3_8": ("<|im_end|>", ""),
    "qwen3_instruct_2507": ("<|im_end|>", ""),
    "qwen3_vl": ("<|im_end|>", ""),
    "smolvlm": ("<end_of_utterance>", PARTS),
}


def trl_template(name: str) -> str:
    file = Path(trl.__file__).parent / "chat_templates" / f"{name}_training.jinja"
    return frozen(file.read_text(encoding="utf-8"), DAY)


def ending_with(eos: str):
    tokenizer = AutoTokenizer.from_pretrained(locate("pkg://smoltrain/tiny"))
    tokenizer.add_special_tokens({"eos_token": eos})
    return tokenizer


@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_trls_training_templates_are_clean_or_it_is_known_why_not(name):
    eos, why = TRL_TEMPLATES[name]
    found = faults(ending_with(eos), trl_template(name), [{"messages": TURN}, {"messages": [SYSTEM, *TURN]}])
    assert bool(found) == bool(why) and why in "".join(found)


def test_rows_without_thoughts_are_served_without(tokenizer):
    template, rows = trl_template("nemotron_3_nano"), [{"messages": TURN}]
    assert "The template reads enable_thinking" in faults(tokenizer, template, rows)[0]
    assert faults(tokenizer, template, rows, enable_thinking=False) == []


def test_what_the_generation_prompt_gives_is_not_trained_on():
    """TRL has the newline of Qwen2.5 and the empty thoughts of Qwen3.5 between its marks; serving prints both."""
    for name in ("qwen2_5", "qwen3_5_nothink"):
        (text,), ((span, *more),) = render(trl_template(name), [TURN])
        assert text[slice(*span)] == "2 + 3 = 5.<|im_end|>\n" and not more


# ---------------------------------------------------------------- broken on purpose

BASE = """
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
SAID = "{{- message['content'] + '<|im_end|>' -}}\n{%- endgeneration -%}"
PROMPT = "{{- '<|im_start|>assistant\\n' -}}\n{%- endif -%}"
THINK = SAID.replace("message[", "('<think></think>' if loop.last else '') + message[", 1)
ASKED = "{{- message['content'] + '<|im_end|>' -}}\n{%- endif"
IS_REPLY = "{%- if message['role'] == 'assistant' -%}"
BROKEN = {
    "end of turn after the marks": (
        SAID,
        "{{- message['content'] -}}\n{%- endgeneration -%}{{- '<|im_end|>' -}}",
        "never learn to stop: what is trained on ends with '2 + 3 = 5.', not with '<|im_end|>'",
    ),
    "no end of turn": (SAID, "{{- message['content'] -}}\n{%- endgeneration -%}", "never learn to stop"),
    "another end of turn": (SAID, SAID.replace("im_end", "endoftext"), "never learn to stop"),
    "no prompt": (
        PROMPT,
        "{%- endif -%}",
        "At character 81, 'is 2 + 3?<|im_end|>\\n<|im_start|>assistant\\n' in training is 'is 2 + 3?<|im_end|>\\n' in ",
    ),
    "thoughts in the prompt alone": (PROMPT, PROMPT.replace("\\n", "\\n<think>"), "\\n<think>' in serving"),
    "a prompt of another role": (PROMPT, PROMPT.replace("assistant", "model"), "<|im_start|>model\\n' in serving"),
    "thoughts before the marks": ("{%- gen", "{{- '<think>' -}}{%- gen", "\\n<think>' in training is"),
    "system dropped": (
        "in messages",
        "in messages if message['role'] != 'system'",
        "what the system says, 'Be brief.', is not printed in its",
    ),
    "question cut": (
        ASKED,
        ASKED.replace("t']", "t'][:4]"),
        "user says, 'What is 2 + 3?', is not printed in its place",
    ),
    "reply cut": (SAID, SAID.replace("t']", "t'][:3]"), "assistant says, '2 + 3 = 5.', is not printed between its"),
    "reply before its marks": (
        "{%- generation -%}\n{{- message['content']",
        "{{- message['content'] -}}{%- generation -%}\n{{- ''",
        "'2 + 3 = 5.', is not printed between its marks",
    ),
    "marks on the last turn": (IS_REPLY, "{%- if loop.last -%}", "2 assistant turns, but 1 spans"),
    "marks on everything": (IS_REPLY, "{%- if true -%}", "2 assistant turns, but 5 spans"),
    "thoughts on the last turn alone": (SAID, THINK, "later turns change how this one is printed. At character 103"),
    "turns counted from the end": ("'\\n' -}}\n{%- if m", "loop.revindex ~ '\\n' -}}\n{%- if m", "later turns change"),
    "marks end within a word": (SAID, "Mi{%- endgeneration -%}a<|im_end|>", "a token lies across the end"),
    "no system prompt allowed": (
        "{%- for",
        "{{- raise_exception('no system') if messages[0]['role'] == 'system' -}}\n{%- for",
        "refuses this conversation: no system",
    ),
    "today's date": ("{%- for", "{{- strftime_now('%Y') -}}\n{%- for", "prints today's date"),
}
ROWS = [{"messages": [SYSTEM, *TURN, user("And twice that?"), assistant(" Mia has 10.")]}]


def test_the_base_of_the_broken_ones_is_whole(tokenizer):
    assert faults(tokenizer, BASE, ROWS) == []


@pytest.mark.parametrize(("old", "new", "words"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_template_is_found(tokenizer, old, new, words):
    assert BASE.count(old) == 1
    found = faults(tokenizer, BASE.replace(old, new), ROWS)
    assert any(words in fault for fault in found), found


def test_marks_within_a_token_are_found(tokenizer):
    """`assistant: Mia` has a token for ` Mia`, which nobody can begin to say after `assistant: `."""
    template = BASE.replace("assistant\\n", "assistant: ").replace("'\\n' -}}\n{%- if m", "': ' -}}\n{%- if m")
    assert (
        "a token lies across the start"
        in faults(tokenizer, template, [{"messages": [user("Who?"), assistant("Mia")]}])[0]
    )
    assert faults(tokenizer, template, [{"messages": [user("Who?"), assistant("?")]}]) == []


def test_a_template_without_marks_is_found(tokenizer):
    bare = BASE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert "2 assistant turns, but 0 spans" in faults(tokenizer, bare, ROWS)[0]


def test_an_end_of_turn_of_the_models_will_do(tokenizer):
    other = BASE.replace(SAID, SAID.replace("im_end", "endoftext"))
    assert faults(tokenizer, other, ROWS, eos_token_ids=[tokenizer.pad_token_id]) == []


def test_training_on_the_last_turn_mends_what_later_turns_change(tokenizer):
    changing = BASE.replace(SAID, THINK)
    assert faults(tokenizer, changing, ROWS) and not faults(tokenizer, changing, ROWS, last_turn_only=True)


def test_a_turn_whose_words_were_said_before_is_missed_all_the_same(tokenizer):
    skipping = BASE.replace("in messages", "in messages[:2] + messages[3:]")
    found = faults(tokenizer, skipping, [{"messages": [*TURN, *TURN]}])
    assert any("message 3: what the user says, 'What is 2 + 3?', is not printed" in fault for fault in found), found


def test_dropped_thoughts_are_found(tokenizer):
    """As Qwen3's and SmolLM3's own templates do: what a turn thought is gone once another follows."""
    drop = "{{- (message['content'] if loop.last else message['content'].split('</think>')[-1]) + '<|im_end|>' -}}"
    template = BASE.replace(SAID, drop + "{%- endgeneration -%}")
    rows = [{"messages": [user("a"), assistant("<think>b</think>c"), user("d"), assistant("<think>e</think>f")]}]
    found = "".join(faults(tokenizer, template, rows))
    assert "'<think>b</think>c', is not printed between its marks" in found and "later turns change" in found


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("in tools -%}", "in tools[:1] -%}", "tools: add is on offer, but not printed"),
        ("in message['tool_calls'] -%}", "in message['tool_calls'][:1] -%}", "message 6: 'add' of a tool call is not"),
        ("message['content'] or ''", "''", "what the assistant says, 'I look.', is not printed"),
    ],
)
def test_a_tool_that_is_dropped_is_found(tokenizer, old, new, words):
    chatml = read_chat_template("chatml")
    assert chatml.count(old) == 1
    found = faults(tokenizer, chatml.replace(old, new), [{"messages": CALLS, "tools": TOOLS}])
    assert any(words in fault for fault in found), found


def test_a_fault_is_said_once_with_the_first_row_and_a_count(tokenizer):
    dropping = BASE.replace(*BROKEN["system dropped"][:2])
    rows = [{"messages": TURN}, *ROWS, *ROWS]
    (fault,) = faults(tokenizer, dropping, rows)
    assert fault.startswith("conversation 2, message 1: ") and fault.endswith("(2 of 3 conversations)")


# ---------------------------------------------------------------- BOS


@pytest.fixture(scope="module")
def llama_like():
    """A tokenizer that begins every text with <s> by itself."""
    return byte_level([], processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))


BOS = "{{- bos_token -}}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (BOS + BASE, None),
        (BASE, "stands 0 times"),
        (BOS + BOS + BASE, "stands twice at the beginning"),
        (BASE.replace("{{- '<|im_start|>'", "{{- bos_token + '<|im_start|>'"), "stands 5 times"),
        ("{{- 'x' -}}" + BOS + BASE, "begins with 'x<s>"),
    ],
    ids=["once", "missing", "doubled", "at every turn", "not first"],
)
def test_one_bos_where_the_tokenizer_has_one(llama_like, template, words):
    found = faults(llama_like, template, ROWS)
    assert (words in found[0]) if words else not found
    spelling = [{"messages": [user("What is <s>?"), assistant("A <s>.")]}]
    assert words or not faults(llama_like, template, spelling)


# ---------------------------------------------------------------- special tokens in people's words


def test_special_tokens_that_are_spelled_in_a_conversation_are_named(tokenizer):
    special = special_tokens(tokenizer)
    assert spelled(special, PLAIN["special tokens spelled"]) == {"<|im_end|>", "<|im_start|>"}
    assert spelled(special, [user("x"), assistant("", ("say", {"deep": [{"<|endoftext|>": 1}]}))]) == {"<|endoftext|>"}
    longer = special_tokens(ending_with("<|im_end|>!"))
    assert spelled(longer, [user("<|im_end|>!")]) == {"<|im_end|>!"}
    assert not any(spelled(special, talk) for kind, talk in PLAIN.items() if kind != "special tokens spelled")
