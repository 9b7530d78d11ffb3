"""The one pass over the rows of a source: read, render, tokenise, mark, count. Its result is kept in a cache."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import multiprocess
import numpy as np
import orjson
import pyarrow as pa
from datasets import Dataset, Features

from smoltrain.data.cache import alone, folder
from smoltrain.data.encode import Chat, Encoded, Encoder
from smoltrain.data.formats import Shape
from smoltrain.data.messages import RowError
from smoltrain.data.splits import ALL_PROMPT, NO_TOKEN, TOO_LONG
from smoltrain.data.templates import RenderError

ROWS_PER_WORKER = 5_000  # below this a further process costs more than it brings
COUNTED = dict.fromkeys(("whole", "length", "tokens", "trained", "lost"), pa.int32()) | {"cut": pa.bool_()}
COUNTED |= dict.fromkeys(("identity", "question"), pa.int64())
COUNTED |= dict.fromkeys(("remarks", "reason", "detail"), pa.string())


@dataclass
class Pass:
    """The pass over the rows of one source: what `Dataset.map` calls, in several processes, on batches of raw rows."""

    shape: Shape
    encoder: Encoder
    chat: Chat
    max_length: int | None
    on_too_long: str
    system_prompt: str | None

    def __call__(self, table: pa.Table) -> pa.Table:
        features = Features.from_arrow_schema(table.schema)  # where a column is of JSON, Arrow alone has its text
        return self.over([features.decode_example(row) for row in table.to_pylist()])

    def over(self, raw: list[dict]) -> pa.Table:
        """Raw rows as tokens and what is counted of them, a line for each."""
        seen = [self.canonical(row) for row in raw]
        encoded = iter(self.encode([self.instructed(row) for row in seen if isinstance(row, dict)]))
        lines = [self.line(row, next(encoded)) if isinstance(row, dict) else refused(row) for row in seen]
        return pa.Table.from_pylist(lines, schema=self.schema)

    @property
    def schema(self) -> pa.Schema:
        return pa.schema(list((self.encoder.columns(self.shape.kind) | COUNTED).items()))

    def read(self, raw: dict) -> dict | RowError:
        """A raw row as it is learned from, or why it cannot be read."""
        row = self.canonical(raw)
        return self.instructed(row) if isinstance(row, dict) else row

    def canonical(self, raw: dict) -> dict | RowError:
        """A raw row in canonical form: what it is held out by, whatever system prompt is put before it."""
        try:
            return self.shape.read(raw)
        except RowError as error:
            return error

    def instructed(self, row: dict) -> dict:
        """The row with `system_prompt`, where it is a conversation without one of its own."""
        part = "prompt" if "prompt" in row else "messages"
        if not self.system_prompt or part not in row or row[part][0]["role"] == "system":
            return row
        return row | {part: [{"role": "system", "content": self.system_prompt}, *row[part]]}

    def encode(self, rows: list[dict]) -> list[Encoded]:
        """The rows as tokens; one that its template refuses does not take the others with it."""
        done: list[Encoded] = []
        while rows:
            try:
                return done + self.encoder.encode(rows, self.chat)
            except RenderError as error:
                said = RowError(str(error), "messages", "refused by the chat template")
                done += [*self.encode(rows[: error.index]), Encoded({}, 0, 0, error=said)]
                rows = rows[error.index + 1 :]
        return done

    def line(self, row: dict, encoded: Encoded) -> dict[str, Any]:
        """What is kept of one row: its tokens, what is counted, and why it is left out, where it is."""
        if encoded.error:
            return refused(encoded.error)
        reason, cut, whole = None, False, encoded.length
        if self.max_length is not None and encoded.length > self.max_length:
            if self.on_too_long == "truncate":
                encoded, cut = self.encoder.cut(encoded, self.max_length), True
            else:
                reason = TOO_LONG
                encoded = dataclasses.replace(encoded, trained=0, lost=encoded.trained)
        if reason is None and not encoded.trained:
            reason = encoded.vain or (ALL_PROMPT if cut else NO_TOKEN)
        asked = question(row)
        return encoded.columns | {
            "whole": whole,
            "length": encoded.length,
            "tokens": encoded.tokens,
            "trained": encoded.trained,
            "lost": encoded.lost,
            "cut": cut,
            "identity": identity(words(row)),
            "question": identity(unweighed(asked)) if asked else 0,
            "remarks": "; ".join(encoded.remarks) or None,
            "reason": reason,
        }


def refused(error: RowError) -> dict[str, Any]:
    return {"reason": error.reason, "detail": str(error)}


def identity(content: Any) -> int:
    """A number of 64 bits for the content of a row, the same on every machine."""
    text = orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def words(row: dict) -> dict:
    """What is said in a row, whatever its replies weigh and are compared with: neither makes another row of it."""
    said = {key: value for key, value in row.items() if key != "answer"}
    return said | {key: unweighed(said[key]) for key in ("messages", "prompt", "chosen", "rejected") if key in said}


def unweighed(messages: list[dict]) -> list[dict]:
    return [{k: v for k, v in m.items() if k != "loss_weight"} if "loss_weight" in m else m for m in messages]


def question(row: dict) -> list[dict]:
    """What a reply answers: a pair's prompt, a conversation without its last turn, nothing in plain text."""
    return row["prompt"] if "prompt" in row else row.get("messages", [])[:-1]


def passed(raw: Dataset, worker: Pass, key: str, workers: int | None) -> Dataset:
    """The rows after the pass, from the cache where they were before."""
    processes = min(workers or os.cpu_count() or 1, len(raw) // ROWS_PER_WORKER)
    try:
        with alone(key, "preparing the same rows"):
            done = raw.with_format("arrow").map(
                worker,
                batched=True,
                remove_columns=raw.column_names,
                features=Features.from_arrow_schema(worker.schema),
                num_proc=processes if processes > 1 else None,
                new_fingerprint=key,
                cache_file_name=str(folder() / f"{key}.arrow"),
                desc="Preparing rows",
            )
    except multiprocess.TimeoutError as error:  # datasets no longer waits for its workers: it has been interrupted
        raise error.__context__ or error from None
    return done.with_format(None)


def cache_key(fingerprint: str, split: str, numbers: np.ndarray, worker: Pass) -> str:
    """A hash of all that the tokens of a source depend on: `fingerprint` of its content, the tokenizer, this code."""
    tokenizer = worker.chat.tokenizer
    parts = [
        [fingerprint, split, hashlib.sha256(numbers.tobytes()).hexdigest()],
        [worker.shape.name, worker.shape.mapping, worker.system_prompt, worker.max_length, worker.on_too_long],
        [repr(worker.encoder), worker.chat.variables],
        [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map],
        [file.read_text() for file in sorted(Path(__file__).parent.glob("*.py"))],
        [metadata.version(package) for package in ("tokenizers", "transformers", "jinja2")],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
