"""Chat templates: what a model reads of a conversation, what of it is trained on, whether serving looks the same.

A template is Jinja with {% generation %} marks around what the assistant says, its end of turn included. Texts are
tokenised with `add_special_tokens=False`, in training as in serving: a BOS is the template's to print.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, cast

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from smoltrain.config import CONF, ConfigError

Message = dict[str, Any]
Span = tuple[int, int]

# What a template has to print of a conversation with tools; see `uses_tools`.
TOOL_PROBE: list[Message] = [
    {"role": "user", "content": "question"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "CALLED", "arguments": {"KEY": "VALUE"}}}],
    },
    {"role": "tool", "name": "CALLED", "content": "RESULT"},
]
PROBE_SCHEMA = {
    "type": "function",
    "function": {"name": "OFFERED", "description": "", "parameters": {"type": "object", "properties": {}}},
}


class RenderError(ConfigError):
    """One conversation that its template cannot print; `index` is its place among those that were given."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


def shipped() -> list[str]:
    """The names that model.chat_template may take, besides the path of a .jinja file."""
    return sorted(file.stem for file in (CONF / "chat_template").glob("*.jinja"))


def training_template(tokenizer, date: str) -> str:
    """The template that a tokenizer's rows are printed with: its own where it has marks, else TRL's training one.

    `date` is the day, such as 2026-01-31, that a template which prints today's date prints instead. Serve with the
    same text: it belongs into the tokenizer that is saved. Raises ConfigError where there is no template with marks.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    own = tokenizer.chat_template
    if isinstance(own, dict):  # named variants
        own = own.get("default")
    mend = f"choose one of {', '.join(shipped())}, or a .jinja file with the marks"
    if not own:
        raise ConfigError(f"model.chat_template: {tokenizer.name_or_path} has no chat template of its own; {mend}")
    try:
        render_jinja_template([], chat_template=own)
    except TemplateError as error:
        raise ConfigError(f"model.chat_template: the template of {tokenizer.name_or_path}: {error}") from error
    if has_generation_markers(own):
        return frozen(own, date)
    try:
        theirs = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ConfigError(
            f"model.chat_template: the template of {tokenizer.name_or_path} has no {{% generation %}} marks around "
            f"what the assistant says, and TRL has no training template for it; {mend}"
        ) from error
    return frozen(cast(str, theirs), date)


def frozen(template: str, date: str) -> str:
    """The template with what `strftime_now` prints on `date` in its place, so that no row depends on the day.

    `strftime_now` is the only clock that templates have. Raises ConfigError where its format is not a plain text.
    """
    try:
        day = datetime.fromisoformat(date)
    except ValueError as error:
        raise ConfigError(f"{date}: the date that a chat template prints is written as 2026-01-31") from error
    said = re.sub(
        r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)",
        lambda call: call["quote"] + day.strftime(call["format"]) + call["quote"],
        template,
    )
    said = re.sub(r"\bstrftime_now is (not )?defined\b", lambda test: "false" if test[1] else "true", said)
    if has_clock(said):
        raise ConfigError("model.chat_template: strftime_now(…) needs its format in quotes for its date to be frozen")
    return said


def has_clock(template: str) -> bool:
    return "strftime_now" in re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)


@lru_cache
def uses_tools(template: str) -> bool:
    """Whether a template prints the tools on offer, the calls of them, and what they returned."""
    try:
        text, _ = jinja(template, TOOL_PROBE, [PROBE_SCHEMA], bos_token="", eos_token="", pad_token="")
    except (TemplateError, TypeError):
        return False
    return all(word in text for word in ("OFFERED", "CALLED", "KEY", "VALUE", "RESULT"))


def render(
    template: str, conversations: Sequence[list[Message]], tools: Sequence[list | None] | None = None, **variables
) -> tuple[list[str], list[list[Span]]]:
    """Conversations as a model reads them, and for each the spans (in characters) that the model is to say.

    These are what stands between generation marks, less what a generation prompt gives: TRL's template of Qwen2.5
    has the newline after `assistant` between its marks, but a server prints it. `tools` has the function schemas of
    each conversation, or None. `variables` are the tokenizer's `special_tokens_map` and whatever else the template
    reads, such as `enable_thinking`. Raises RenderError at the first conversation that the template refuses, or whose
    tools it would not print.
    """
    given = given_between_marks(template, **variables)
    texts, spans = [], []
    for index, (messages, offered) in enumerate(zip(conversations, tools or [None] * len(conversations), strict=True)):
        text, marked = printed(template, messages, offered, index, return_assistant_tokens_mask=True, **variables)
        texts.append(text)
        spans.append([(start + len(given) * text.startswith(given, start, end), end) for start, end in marked])
    return texts, spans


def given_between_marks(template: str, **variables) -> str:
    """What a template prints first between generation marks although its generation prompt has it already."""
    asked: list[Message] = [{"role": "user", "content": "question"}]
    reply = {"role": "assistant", "content": "reply"}
    try:
        text, spans = printed(template, [*asked, reply], None, 0, return_assistant_tokens_mask=True, **variables)
        prompt, _ = printed(template, asked, None, 0, add_generation_prompt=True, **variables)
    except RenderError:  # a template that wants a system prompt, say: `faults` looks at the rows themselves
        return ""
    return prompt[spans[0][0] :] if spans and text.startswith(prompt) else ""


def prompts(
    template: str, conversations: Sequence[list[Message]], tools: Sequence[list | None] | None = None, **variables
) -> list[str]:
    """What a server gives a model to answer each of these conversations; see `render` for the arguments."""
    return [
        printed(template, messages, offered, index, add_generation_prompt=True, **variables)[0]
        for index, (messages, offered) in enumerate(
            zip(conversations, tools or [None] * len(conversations), strict=True)
        )
    ]


def printed(
    template: str, messages: list[Message], tools: list | None, index: int, **options
) -> tuple[str, list[Span]]:
    if not uses_tools(template) and (tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)):
        files = {name: CONF / "chat_template" / f"{name}.jinja" for name in shipped()}
        able = " or ".join(name for name, file in files.items() if uses_tools(file.read_text()))
        raise RenderError(
            "model.chat_template: this template prints no tools, or not the calls of them or what they return, and "
            f"the conversation has some; choose {able}, or leave out rows with tools",
            index,
        )
    try:
        return jinja(template, messages, tools, **options)
    except (TemplateError, TypeError) as error:
        raise RenderError(f"model.chat_template: the template refuses this conversation: {error}", index) from error


def jinja(template: str, messages: list[Message], tools: list | None, **options) -> tuple[str, list[Span]]:
    """As `apply_chat_template` prints it: what is null is not there."""
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    done = render_jinja_template([messages], tools=tools or None, chat_template=template, **options)
    (text,), spans = cast(tuple[list[str], list[list[Span]]], done)
    return text, spans[0] if spans else []


def special_tokens(tokenizer) -> re.Pattern[str]:
    """Matches what a tokenizer reads as one special token, wherever it stands."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    names = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def spelled(special: re.Pattern[str], messages: list[Message]) -> set[str]:
    """The special tokens that are spelled out in a conversation's words.

    Templates cannot tell them from their own, so `<|im_end|>` in a user's words ends the turn, in training and in
    serving alike. That is no fault of the template's, and rows about chat formats do it with reason: count them.
    """
    return {token for text in strings(messages) for token in special.findall(text)}


def strings(value) -> Iterator[str]:
    """Every text within nested lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


# ---------------------------------------------------------------- is a template fit to train with?


def faults(
    tokenizer,
    template: str,
    rows: Sequence[dict],
    eos_token_ids: Collection[int] = (),
    last_turn_only: bool = False,
    **variables,
) -> list[str]:
    """What is wrong with a template on these conversations, in plain words, each fault said once; nothing if it is fit.

    Fit means, for every assistant turn that is trained on: it is printed as it would be if the conversation ended
    there; it follows exactly the text, and the tokens, that a server gives a model to reply to; its marks enclose what
    is said and an end of turn (`tokenizer.eos_token` or one of `eos_token_ids`, the model's). Besides, every
    message is printed, BOS is not doubled nor missing, and nothing depends on today's date.
    """
    variables = {**tokenizer.special_tokens_map, **variables}
    ends = {tokenizer.eos_token_id, *eos_token_ids} - {None}
    first: dict[str, str] = {}
    count: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        seen = set()
        for kind, words in row_faults(tokenizer, template, row, ends, last_turn_only, variables):
            first.setdefault(kind, f"conversation {number}, {words}")
            seen.add(kind)
        for kind in seen:
            count[kind] = count.get(kind, 0) + 1
    dated = ["it prints today's date, so that rows change at midnight"] if has_clock(template) else []
    return dated + [f"{words} ({count[kind]} of {len(rows)} conversations)" for kind, words in first.items()]


def row_faults(
    tokenizer, template: str, row: dict, ends: set[int], last_turn_only: bool, variables: dict
) -> Iterator[tuple[str, str]]:
    """Kind and words of each fault on one conversation."""
    messages, tools = row["messages"], row.get("tools")
    try:
        (text,), (spans,) = render(template, [messages], [tools], **variables)
    except RenderError as error:
        yield "refused", str(error)
        return
    yield from bos_faults(tokenizer, text, messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) != len(turns):
        yield (
            "marks",
            f"marks: {len(turns)} assistant turns, but {len(spans)} spans between {{% generation %}} marks; "
            "mark each turn once",
        )
        return
    yield from print_faults(text, spans, messages, tools or [])
    for turn, span in list(zip(turns, spans, strict=True))[-1 if last_turn_only else 0 :]:
        yield from turn_faults(template, text, span, messages, turn, tools, variables)
        yield from token_faults(tokenizer, text, span, turn, ends)


def bos_faults(tokenizer, text: str, messages: list[Message]) -> Iterator[tuple[str, str]]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    own = sum(1 for said in strings(messages) for _ in re.finditer(re.escape(tokenizer.bos_token), said))
    if ids[:2] == [bos, bos]:
        yield "bos", f"BOS: {tokenizer.bos_token} stands twice at the beginning; print it once"
    elif tokenizer("x")["input_ids"][:1] == [bos] and (ids[:1] != [bos] or ids.count(bos) - own != 1):
        yield (
            "bos",
            f"BOS: {tokenizer.bos_token} stands {ids.count(bos) - own} times in the text, which begins with "
            f"{shown(text)}; this tokenizer's texts begin with one, so print {{{{ bos_token }}}} once, first of all",
        )


def print_faults(text: str, spans: list[Span], messages: list[Message], tools: list[dict]) -> Iterator[tuple[str, str]]:
    """Whether each message is printed in its place: the assistant's between its marks, others before the next ones."""
    names = [tool["function"]["name"] for tool in tools]
    for name in names:
        if name not in text[: spans[0][0] if spans else None]:
            yield "tools", f"tools: {name} is on offer, but not printed before the first reply"
    left = list(spans)
    position = 0
    for number, message in enumerate(messages, 1):
        role, content = message["role"], (message.get("content") or "").strip()
        start, end = left.pop(0) if role == "assistant" else (position, left[0][0] if left else len(text))
        place = text[start:end]
        found = [place.find(form) + len(form) for form in forms(content) if form in place]
        if not found:
            where = "between its marks" if role == "assistant" else "in its place"
            yield f"{role} text", f"message {number}: what the {role} says, {shown(content)}, is not printed {where}"
        position = end if role == "assistant" else start + min(found, default=0)
        for call in message.get("tool_calls") or []:
            for word in strings([call["function"]["name"], call["function"]["arguments"]]):
                if not any(form in place for form in forms(word)):
                    yield "calls", f"message {number}: {shown(word)} of a tool call is not printed between its marks"


def forms(words: str) -> set[str]:
    """How a template may print words: as they are, or within JSON."""
    return {words, json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1]}


def turn_faults(
    template: str, text: str, span: Span, messages: list[Message], turn: int, tools: list | None, variables: dict
) -> Iterator[tuple[str, str]]:
    """Whether one turn is printed as when it is said, and after what a server would ask with."""
    if turn == 0:  # nobody can be asked with an empty conversation: there is no serving to compare with
        return
    try:
        (then,), (spans,) = render(template, [messages[: turn + 1]], [tools], **variables)
        (prompt,) = prompts(template, [messages[:turn]], [tools], **variables)
    except RenderError as error:
        yield "refused", f"cut after message {turn}: {error}"
        return
    start, end = spans[-1]
    if spans[-1] != span or then[:end] != text[: span[1]]:
        yield (
            "later turns",
            f"message {turn + 1}: later turns change how this one is printed. {parting(text[: span[1]], then[:end])} "
            "if the conversation ended there. Train on the last turn only, or choose another model.chat_template",
        )
    if prompt != then[:start]:
        if "enable_thinking" in template:
            mend = "The template reads enable_thinking: train and serve with what fits the rows"
        else:
            mend = "A template has to print the same under add_generation_prompt as before {% generation %}"
        yield (
            "prompt",
            f"message {turn + 1}: training and serving differ. {parting(then[:start], prompt)} in serving. {mend}",
        )


def token_faults(tokenizer, text: str, span: Span, turn: int, ends: set[int]) -> Iterator[tuple[str, str]]:
    """Whether tokens keep to the marks of one turn, and the last between them is an end of turn."""
    texts = [text, text[: span[0]], text[: span[1]]]
    whole, before, until = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for side, ids, character in ("start", before, span[0]), ("end", until, span[1]):
        if whole[: len(ids)] != ids:
            around = shown(text[max(0, character - 10) : character + 10])
            yield (
                f"{side} token",
                f"message {turn + 1}: a token lies across the {side} of what is trained on, in {around}: training and "
                "serving differ in tokens. End the prompt with a special token or newline, and begin no reply with one",
            )
            return
    said = whole[len(before) : len(until)]
    while said and said[-1] not in ends and not tokenizer.decode(said[-1:]).strip():
        said = said[:-1]
    if not said or said[-1] not in ends:
        known = " or ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(ends)))) or "an eos_token: there is none"
        last = shown(text[span[0] : span[1]], -20)
        yield (
            "end of turn",
            f"message {turn + 1}: the model would never learn to stop: what is trained on ends with {last}, not with "
            f"{known}. Put {{% endgeneration %}} after the end of turn, or set model.eos_token to the one printed",
        )


def parting(trained: str, served: str) -> str:
    """Where two texts part, and what each goes on with."""
    shorter = min(len(trained), len(served))
    at = next((i for i in range(shorter) if trained[i] != served[i]), shorter)
    seen = max(0, at - 20)
    return f"At character {at}, {shown(trained[seen:])} in training is {shown(served[seen:])}"


def shown(text: str, length: int = 60) -> str:
    """The beginning of a text (its end, where `length` is negative), quoted."""
    if len(text) <= abs(length):
        return repr(text)
    return repr(text[:length] + "…") if length > 0 else repr("…" + text[length:])
