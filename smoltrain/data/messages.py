"""What rows are made of: texts, messages in the spellings that people use, tools and their calls.

A message is {"role": system | user | assistant | tool, "content": str}, and where there is one "name", "tool_calls"
(OpenAI's, arguments as a dict) and "loss_weight" (a float, on the assistant's only). None stands for what is absent,
as Arrow fills it in. Whatever a value is, nothing but RowError leaves these functions.
"""

import json
import math
from reprlib import Repr
from typing import Any

from smoltrain.config import ConfigError

Messages = list[dict[str, Any]]

ROLES = {
    **{"system": "system", "developer": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "model": "assistant", "function_call": "assistant"},
    **{"tool": "tool", "function": "tool", "observation": "tool"},
}
WRONG = "wrong type"  # the one reason for which a row counts as being of another shape
EQUAL = "chosen equals rejected"
DEEPEST = 50  # levels of a tool's schema or arguments


class RowError(ConfigError):
    """One row cannot be read: `field` says where (`messages[2].content`), `reason` why, in words to count rows by."""

    def __init__(self, message: str, field: str = "", reason: str = ""):
        super().__init__(message)
        self.field, self.reason = field, reason


def bad(field: str, reason: str, found: Any, mend: str) -> RowError:
    return RowError(f"{field}: {reason}, found {shown(found)}; {mend}", field, reason)


def shown(value: Any) -> str:
    """Any value in at most 80 characters on one line, a long text by its beginning and its end."""
    brief = Repr()
    brief.maxstring = brief.maxother = 80
    try:
        text = brief.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def text(value: Any, field: str, blank: bool = False) -> str:
    """`value` if it is a text that can be tokenised, with something in it unless `blank`."""
    if not isinstance(value, str):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise bad(field, "null content", value, "give it a text or leave the row out")
        raise bad(field, WRONG, value, "a text is due here")
    if not blank and (not value or value.isspace()):
        raise bad(field, "empty text", value, "give it a text or leave the row out")
    if "\0" in value:
        raise bad(field, "NUL character", value, "remove it")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            near = value[max(error.start - 20, 0) : error.start + 20]
            raise bad(field, "lone surrogate", near, "half a character cannot be tokenised: remove it") from None
    return value


def thought(reasoning: str, reply: str) -> str:
    """A reply with the reasoning before it, as the models that think write it (DeepSeek-R1, Qwen3, SmolLM3)."""
    return f"<think>\n{reasoning}\n</think>\n{reply}"


# ---------------------------------------------------------------- messages


def turns(value: Any, field: str, speaker: str | None = None) -> Messages:
    """The messages in a list, in a single message or, where there is a `speaker`, in the text that it says."""
    if speaker and isinstance(value, str):
        if value.startswith("\n\nHuman:"):
            raise bad(field, WRONG, value, "this is a transcript: data.format=transcripts reads preferences of them")
        return [{"role": speaker, "content": text(value, field)}]
    if isinstance(value, dict):
        return [message(value, field)]
    if not isinstance(value, list):
        due = "a text or messages are due here" if speaker else "a list of messages is due here"
        raise bad(field, "null content" if value is None else WRONG, value, due)
    if not value:
        raise bad(field, "empty messages", value, "leave the row out")
    return [message(m, f"{field}[{i}]") for i, m in enumerate(value)]


def message(m: Any, field: str) -> dict[str, Any]:
    """One message, spelled role and content (OpenAI) or from and value (ShareGPT, whose function_call says a call)."""
    if not isinstance(m, dict):
        raise bad(field, WRONG, m, "a message {role, content} is due here")
    role_key, key = ("from", "value") if m.get("role") is None and "from" in m else ("role", "content")
    speaker, content = m.get(role_key), m.get(key)
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise bad(f"{field}.{role_key}", "unknown role", speaker, f"known are {', '.join(ROLES)}")
    field_of_content = f"{field}.{key}"
    more = extras(m, role, field) if len(m) > 2 or content is None else {}
    if speaker == "function_call":
        if not (calls := tool_calls(content, field_of_content)):
            raise bad(field_of_content, "null content", content, "a call {name, arguments} is due here")
        more["tool_calls"], content = calls, ""
    if isinstance(content, list):
        content = joined(content, field_of_content)
    elif content is None and "tool_calls" in more:
        content = ""
    content = text(content, field_of_content, blank="tool_calls" in more or role == "tool")
    if "reasoning" in more:
        content = thought(more.pop("reasoning"), content)
    return {"role": role, "content": content, **more}


def joined(parts: list, field: str) -> str:
    """The text of a content that is a list of parts, put together as chat templates do: with nothing between."""
    for i, part in enumerate(parts):
        if not isinstance(part, dict):
            raise bad(f"{field}[{i}]", WRONG, part, 'a part {"type": "text", "text": …} is due')
        if part.get("type") != "text":
            raise bad(f"{field}[{i}]", "not text", part.get("type"), "only text is trained: leave the row out")
    return "".join([text(part.get("text"), f"{field}[{i}].text", blank=True) for i, part in enumerate(parts)])


def extras(m: dict, role: str, field: str) -> dict[str, Any]:
    """What a message has beside role and content: name, tool calls, reasoning, how much it weighs in the loss."""
    more: dict[str, Any] = {}
    if not absent(m.get("name")):
        more["name"] = text(m["name"], f"{field}.name")
    for key in ("tool_calls", "function_call"):  # the second is OpenAI's older spelling, of one call
        if m.get(key) is not None and (calls := tool_calls(m[key], f"{field}.{key}")):
            if role != "assistant":
                raise bad(f"{field}.{key}", "call by another", role, "only the assistant calls tools")
            more["tool_calls"] = calls
    for key in ("reasoning_content", "thinking"):
        if role == "assistant" and not absent(m.get(key)):
            more["reasoning"] = text(m[key], f"{field}.{key}")
    for key in ("loss_weight", "weight", "train"):
        if (value := m.get(key)) is not None:
            if (
                isinstance(value, bool) != (key == "train")
                or not isinstance(value, int | float)
                or not 0 <= value < 1e9
            ):
                raise bad(f"{field}.{key}", "bad loss weight", value, "0 or more is due; for train true or false")
            if role == "assistant":
                more.setdefault("loss_weight", float(value))
            elif value:  # 0 says what holds anyway, and some data sets say it
                raise bad(f"{field}.{key}", "bad loss weight", value, f"a turn of the {role} is not learned")
    return more


def learnable(messages: Messages, field: str, prompt: Messages | None = None, prompt_field: str = "") -> Messages:
    """`messages` if their turns are in order and end with the assistant's; after a `prompt` they begin with it too."""
    prompt = prompt or []
    whole, last = [*prompt, *messages], {"role": "nobody"}

    def at(i: int) -> str:
        return f"{prompt_field}[{i}]" if i < len(prompt) else f"{field}[{i - len(prompt)}]"

    if prompt and messages[0]["role"] != "assistant":
        raise bad(f"{field}[0]", "not a reply", messages[0]["role"], "what follows a prompt begins with the assistant")
    for i, m in enumerate(whole):
        role, before = m["role"], last["role"]
        if role == "system" and i:
            raise bad(at(i), "system not first", m["content"], "a system prompt stands first")
        if role == "tool" and before not in ("assistant", "tool"):
            raise bad(at(i), "tool without a call", before, "the result of a tool follows the assistant's call")
        if role == before != "tool" and "tool_calls" not in m and "tool_calls" not in last:
            raise bad(at(i), f"two {role} turns in a row", m["content"], "join them or leave the row out")
        last = m
    if last["role"] != "assistant":
        spoken = any(m["role"] == "assistant" for m in whole)
        reason = "does not end with the assistant" if spoken else "no assistant turn"
        raise bad(at(len(whole) - 1), reason, last["role"], "there is nothing to learn: end with its reply")
    return messages


# ---------------------------------------------------------------- tools


def tool_calls(value: Any, field: str) -> Messages:
    """OpenAI's tool calls from a list of them or of {name, arguments}, from one, or from these as JSON."""
    calls = []
    for at, call in functions(value, field):
        given = call.get("arguments")
        arguments = {} if absent(given) else parsed(given, f"{at}.arguments")
        if not isinstance(arguments, dict):
            raise bad(f"{at}.arguments", WRONG, arguments, "an object {…} of arguments is due")
        arguments = clean(arguments, f"{at}.arguments")
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return calls


def tools(value: Any, field: str) -> Messages:
    """OpenAI's function schemas from a list of them, with or without the {type, function} around, or this as JSON."""
    schemas = []
    for at, schema in functions(value, field):
        parameters = parsed(schema.get("parameters"), f"{at}.parameters")
        if not isinstance(parameters, dict | None):
            raise bad(f"{at}.parameters", WRONG, parameters, "a JSON schema {…} is due")
        schemas.append({"type": "function", "function": clean({**schema, "parameters": parameters}, at)})
    return schemas


def functions(value: Any, field: str) -> list[tuple[str, dict]]:
    """The {name, …} of each function that is described or called, and where it stands."""
    value = None if absent(value) else parsed(value, field)
    if not isinstance(value, list | dict | None):
        raise bad(field, WRONG, value, "a list of functions is due, or JSON of it")
    found = []
    for i, function in enumerate([value] if isinstance(value, dict) else value or []):
        at = f"{field}[{i}]"
        inner = function.get("function") if isinstance(function, dict) else None
        function = function if inner is None else inner
        if not isinstance(function, dict):
            raise bad(at, WRONG, function, "a function {name, …} is due")
        text(function.get("name"), f"{at}.name")
        found.append((at, function))
    return found


def parsed(value: Any, field: str) -> Any:
    """What a string of JSON says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise bad(field, "bad JSON", value, "JSON is due here") from None


def clean(value: Any, field: str, depth: int = 0) -> Any:
    """A JSON value without the keys that are null, as Arrow gives every row the keys of all."""
    if depth > DEEPEST:
        raise bad(field, "nested too deeply", value, f"at most {DEEPEST} levels are read")
    if isinstance(value, dict):
        kept = ((text(key, field, blank=True), item) for key, item in value.items() if item is not None)
        return {key: clean(item, field, depth + 1) for key, item in kept}
    if isinstance(value, list):
        return [clean(item, field, depth + 1) for item in value]
    if isinstance(value, str):
        return text(value, field, blank=True)
    if isinstance(value, float) and not math.isfinite(value):
        raise bad(field, "not a number", value, "JSON has no such number")
    if not isinstance(value, int | float | None) or (isinstance(value, int) and value.bit_length() > 63):
        raise bad(field, WRONG, value, "only what JSON can say is due here, integers within 64 bits")
    return value
