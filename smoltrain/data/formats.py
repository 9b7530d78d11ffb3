"""The shapes that rows come in, and the two that trainers eat: `messages`, or `prompt`, `chosen` and `rejected`.

Adding a shape is adding one function below and naming the columns it needs in SHAPES.
"""

from datasets import Dataset

from smoltrain.config import ConfigError

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def messages(row: dict) -> dict:
    return {"messages": turns("user", list(row["messages"]))}


def sharegpt(row: dict) -> dict:
    return {"messages": turns("user", list(row["conversations"]))}


def prompt_completion(row: dict) -> dict:
    return {"messages": turns("user", row["prompt"]) + turns("assistant", row["completion"])}


def question_answer(row: dict) -> dict:
    return prompt_completion({"prompt": row["question"], "completion": row["answer"]})


def alpaca(row: dict) -> dict:
    prompt = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
    said = prompt_completion({"prompt": prompt, "completion": row["output"]})["messages"]
    return {"messages": turns("system", row["system"]) + said if row.get("system") else said}


def preference(row: dict) -> dict:
    chosen, rejected = turns("assistant", row["chosen"]), turns("assistant", row["rejected"])
    if len(chosen) > 1:  # whole conversations: what both begin with is the prompt
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen) - 1)
        if not rejected[shared:]:
            raise ConfigError("nothing is rejected: the rejected conversation is the beginning of the chosen one")
        return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    return {"prompt": turns("user", row["prompt"]), "chosen": chosen, "rejected": rejected}


def sharegpt_preference(row: dict) -> dict:
    return preference({**row, "prompt": row["conversations"]})


# The first shape whose columns are all there is taken, so preferences stand before what they contain.
SHAPES = {
    ("conversations", "chosen", "rejected"): sharegpt_preference,
    ("prompt", "chosen", "rejected"): preference,
    ("chosen", "rejected"): preference,
    ("messages",): messages,
    ("conversations",): sharegpt,
    ("prompt", "completion"): prompt_completion,
    ("question", "answer"): question_answer,
    ("instruction", "output"): alpaca,
}


def message(m: dict) -> dict:
    """`{role, content}` of a message in OpenAI's or ShareGPT's spelling."""
    role, content = (m["role"], m["content"]) if "role" in m else (m["from"], m["value"])
    if role not in ROLES:
        raise ConfigError(f"a message has the role {role!r}; known are {', '.join(ROLES)}")
    if m.get("tool_calls"):
        raise ConfigError(f"a message of {role!r} calls tools, which cannot be learned from yet")
    if not isinstance(content, str) or not content.strip():
        raise ConfigError(f"a message of {role!r} has no text but {content!r}")
    return {"role": ROLES[role], "content": content}


def turns(role: str, text: str | dict | list) -> list[dict]:
    """One or more messages, from a string said by `role`, a message, or a list of messages."""
    if isinstance(text, list):
        if not text:
            raise ConfigError("a conversation without messages")
        return [message(m) for m in text]
    return [message(text if isinstance(text, dict) else {"role": role, "content": text})]


def canonical(rows: Dataset, columns: dict[str, str] | None) -> Dataset:
    """The same rows as `messages` or as `prompt`, `chosen`, `rejected`, each a list of `{role, content}`.

    `columns` says which column of the file stands for which of a shape; without it the shape is recognised.
    Raises ConfigError where a column is missing, no shape fits, or a row cannot be read (with its number).
    """
    if columns:
        if missing := [name for name in columns.values() if name not in rows.column_names]:
            raise ConfigError(f"data.columns: no column {', '.join(missing)}; there are {', '.join(rows.column_names)}")
        rows = rows.select_columns(list(columns.values())).rename_columns(
            {theirs: ours for ours, theirs in columns.items() if ours != theirs}
        )
    shape = next((convert for needed, convert in SHAPES.items() if set(needed) <= set(rows.column_names)), None)
    if shape is None:
        known = "; ".join(", ".join(needed) for needed in SHAPES)
        raise ConfigError(
            f"data: columns {', '.join(rows.column_names)} fit none of the known shapes ({known}). "
            "Say which is which, e.g. data.columns={prompt: question, completion: answer}"
        )

    def convert(row: dict, number: int) -> dict:
        try:
            return shape(row)
        except (ConfigError, KeyError) as error:
            raise ConfigError(f"data: row {number + 1}: {error}") from error

    return rows.map(convert, with_indices=True, remove_columns=rows.column_names, desc="Reading rows")
