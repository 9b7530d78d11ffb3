"""What a trainer is given: rows as tokens, with those that are learned marked and those that were cut counted.

An encoder names the kinds of rows it takes and turns a batch of them into columns. A trainer's YAML chooses one
(`encode: {_target_: …}`), so that nothing in train.py asks which method runs.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from smoltrain.data import templates
from smoltrain.data.messages import EQUAL, RowError, bad

IGNORED = -100  # the label of a token that is not learned, in torch's cross entropy
IDS = pa.list_(pa.int32())
MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
ENDLESS = "a turn without its end"
STRADDLING = "a token across the beginning of a reply, which serving would tokenise otherwise"
EQUAL_CUT = f"{EQUAL} at max_length"
OTHERS = "turns of others in a reply, which are learned as its own"
ALIKE = "replies that are nearly the same"
REPEATED_PROMPT = "the prompt in a reply"
LONG = 20  # letters that a prompt needs for its repetition in a reply to mean anything


@dataclass
class Encoded:
    """One row as the columns that a collator eats, and what is to be counted of it.

    `length` is what the longest of its forwards takes, `tokens` are those of all of them, the prompt of a pair twice;
    `trained` of them are learned, `lost` more would have been, were the row not too long; `remarks` say what is odd
    about it; `error` why it cannot be used after all, and `vain` why, once cut, nothing is left of it to learn.
    """

    columns: dict[str, Any]
    length: int
    trained: int
    lost: int = 0
    remarks: tuple[str, ...] = ()
    error: RowError | None = None
    vain: str | None = None

    @property
    def tokens(self) -> int:
        pair = [len(self.columns[name]) for name in ("chosen_ids", "rejected_ids") if name in self.columns]
        return sum(pair) + len(pair) * len(self.columns["prompt_ids"]) if pair else self.length


@dataclass(frozen=True)
class Chat:
    """What text needs to become tokens: a tokenizer with its template, and the template's variables."""

    tokenizer: Any
    variables: dict[str, Any] = field(default_factory=dict)

    def rendered(self, rows: list[dict], *parts: str) -> tuple[list[str], list[list[templates.Span]]]:
        """The messages of several columns, joined, as text, and the spans of characters that the assistant says."""
        return templates.render(self.template, joined(rows, parts), offered(rows), **self.given)

    def prompts(self, rows: list[dict]) -> list[str]:
        """The prompts as text, up to where a reply begins."""
        return templates.prompts(self.template, joined(rows, ("prompt",)), offered(rows), **self.given)

    @property
    def template(self) -> str:
        return self.tokenizer.chat_template

    @property
    def given(self) -> dict[str, Any]:
        return self.tokenizer.special_tokens_map | self.variables

    def tokenize(self, texts: list[str], add_special_tokens: bool = False) -> list[Any]:
        """A `tokenizers.Encoding` for each text, whole; a rendered one has its special tokens already."""
        tokenizer = self.tokenizer.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

    def spelled(self, messages: list[dict]) -> tuple[str, ...]:
        """A remark where the words of a conversation spell out a special token, which then acts as one."""
        found = templates.spelled(self.special, messages)
        return tuple(f"{token} in its words" for token in sorted(found))

    def stops(self, ids: np.ndarray) -> bool:
        """Whether these tokens end with the end of turn, and after it at most the space that a template prints."""
        end = len(ids)
        while end and ids[end - 1] != self.eos and not self.tokenizer.decode(ids[end - 1]).strip():
            end -= 1
        return end > 0 and ids[end - 1] == self.eos

    # A tokenizer works these out each time that it is asked.

    @cached_property
    def special(self) -> re.Pattern[str]:
        return templates.special_tokens(self.tokenizer)

    @cached_property
    def eos(self) -> int:
        return self.tokenizer.eos_token_id


class Encoder(Protocol):
    """What a trainer eats: the `encode` of its YAML.

    `kinds` are those of `formats` that it takes. `rows_a_forward` says how many sequences a row becomes,
    `last_turn_only` whether only a conversation's last reply is learned.
    """

    rows_a_forward: ClassVar[int]

    @property
    def kinds(self) -> Sequence[str]: ...
    @property
    def last_turn_only(self) -> bool: ...
    def columns(self, kind: str) -> dict[str, pa.DataType]: ...
    def encode(self, rows: list[dict], chat: Chat) -> list[Encoded]: ...
    def cut(self, row: Encoded, max_length: int) -> Encoded: ...
    def conversation(self, row: dict) -> dict | None: ...
    def segments(self, row: dict) -> list[tuple[list[int], str]]: ...
    def balance(self, rows: Dataset) -> dict[str, float] | None: ...
    def feed(self, trainer: partial) -> partial: ...


@dataclass(frozen=True)
class Conversations:
    """Conversations and plain texts as `input_ids` and `labels`, for TRL's SFTTrainer.

    `train_on` chooses what is learned: `assistant` (each of its turns whose `loss_weight` is not 0), `last` (the last
    of them), `all` (every token, but those of turns whose `loss_weight` is 0), or `weighted` (each turn as its
    message's `loss_weight` says, 1 where it says nothing; the loss is the weighted sum over the number of learned
    tokens). Plain text is learned whole.
    """

    train_on: Literal["assistant", "last", "all", "weighted"]
    kinds: ClassVar = ("conversation", "text")
    rows_a_forward: ClassVar = 1

    @property
    def last_turn_only(self) -> bool:
        return self.train_on == "last"

    def columns(self, kind: str) -> dict[str, pa.DataType]:
        weights = {"loss_weights": pa.list_(pa.float32())} if self.train_on == "weighted" else {}
        return {"input_ids": IDS, "labels": IDS} | weights

    def encode(self, rows: list[dict], chat: Chat) -> list[Encoded]:
        texts, spans = chat.rendered([row for row in rows if "messages" in row], "messages")
        told = iter(zip(chat.tokenize(texts), spans, strict=True))
        plain = iter(chat.tokenize([row["text"] for row in rows if "text" in row], add_special_tokens=True))
        return [
            self.turns(row, *next(told), chat) if "messages" in row else self.text(row, next(plain), chat)
            for row in rows
        ]

    def text(self, row: dict, encoding: Any, chat: Chat) -> Encoded:
        """Plain text: what the tokenizer begins with, once, the text, and the end, once."""
        bos, eos = chat.tokenizer.bos_token_id, chat.tokenizer.eos_token_id
        ids = encoding.ids if encoding.ids[-1:] == [eos] else [*encoding.ids, eos]
        ids = ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids  # the text may spell them itself
        ids = ids[:-1] if ids[-2:] == [eos, eos] else ids
        columns = self.marked(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=np.float32))
        return Encoded(columns, len(ids), len(ids), remarks=chat.spelled([{"content": row["text"]}]))

    def marked(self, ids: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        columns = {"input_ids": ids, "labels": np.where(weights > 0, ids, IGNORED)}
        return columns | {"loss_weights": weights} if self.train_on == "weighted" else columns

    def turns(self, row: dict, encoding: Any, spans: list[tuple[int, int]], chat: Chat) -> Encoded:
        ids = np.array(encoding.ids, dtype=np.int32)
        turns = [(first_token(encoding, start), first_token(encoding, end)) for start, end in spans]
        exact = all(begins_at(encoding, start, token) for (start, _), (token, _) in zip(spans, turns, strict=True))
        weights = np.zeros(len(ids), dtype=np.float32)
        said = [m.get("loss_weight", 1.0) for m in row["messages"] if m["role"] == "assistant"]
        if len(said) != len(turns) and self.train_on != "all":
            mend = "choose a model.chat_template with {% generation %} around each of them"
            error = bad("messages", "assistant turns that the template does not mark", len(said), mend)
            return Encoded({}, 0, 0, error=error)
        odd = [weight for weight in said if weight not in (0, 1)]
        if odd and self.train_on != "weighted":
            error = bad("loss_weight", "neither 0 nor 1", odd[0], "set encode.train_on=weighted to weigh turns")
            return Encoded({}, 0, 0, error=error)
        weights[:] = self.train_on == "all"
        weighed = list(zip(turns, said, strict=False))
        for (start, end), weight in weighed[-1:] if self.train_on == "last" else weighed:
            weights[start:end] = weight
        remarks: tuple[str, ...] = () if all(chat.stops(ids[:end]) for _, end in turns) else (ENDLESS,)
        remarks += () if exact else (STRADDLING,)
        remarks += chat.spelled(row["messages"])
        return Encoded(self.marked(ids, weights), len(ids), int((weights > 0).sum()), remarks=remarks)

    def cut(self, row: Encoded, max_length: int) -> Encoded:
        """The first `max_length` tokens of a row."""
        columns = {name: values[:max_length] for name, values in row.columns.items()}
        trained = int((columns["labels"] != IGNORED).sum())
        return Encoded(columns, max_length, trained, row.trained - trained, row.remarks)

    def conversation(self, row: dict) -> dict | None:
        """The row as a conversation, if it is one."""
        return row if "messages" in row else None

    def segments(self, row: dict) -> list[tuple[list[int], str]]:
        """The ids of a row in runs that are `learned`, or `context`."""
        learned = np.array(row["labels"]) != IGNORED
        starts = [0, *(np.flatnonzero(learned[1:] != learned[:-1]) + 1)]
        runs = zip(starts, [*starts[1:], len(learned)], strict=True)
        return [(row["input_ids"][a:b], "learned" if learned[a] else "context") for a, b in runs]

    def balance(self, rows: Dataset) -> None:
        """Nothing to weigh against each other."""

    def feed(self, trainer: partial) -> partial:
        """The trainer, made to take rows that are tokens already."""
        from smoltrain.trainers import given_tokens, weighing

        return weighing(trainer) if self.train_on == "weighted" else given_tokens(trainer)


@dataclass(frozen=True)
class Preferences:
    """Pairs of replies as `prompt_ids`, `chosen_ids` and `rejected_ids`, for TRL's DPOTrainer."""

    kinds: ClassVar = ("preference",)
    rows_a_forward: ClassVar = 2
    last_turn_only: ClassVar = True

    def columns(self, kind: str) -> dict[str, pa.DataType]:
        return {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS}

    def encode(self, rows: list[dict], chat: Chat) -> list[Encoded]:
        prompts = chat.prompts(rows)
        texts = [chat.rendered(rows, "prompt", reply)[0] for reply in ("chosen", "rejected")]
        whole = zip(rows, prompts, zip(*texts, strict=True), zip(*map(chat.tokenize, texts), strict=True), strict=True)
        return [self.pair(*row, chat) for row in whole]

    def pair(self, row: dict, prompt: str, texts: tuple[str, str], encodings: tuple[Any, Any], chat: Chat) -> Encoded:
        for text in texts:
            if not text.startswith(prompt):
                error = f"prompt: training and serving differ. {templates.parting(text, prompt)} in serving"
                return Encoded({}, 0, 0, error=RowError(error, "prompt", "prompt printed otherwise than in serving"))
        ids = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        starts = [first_token(encoding, len(prompt)) for encoding in encodings]
        exact = all(begins_at(encoding, len(prompt), start) for encoding, start in zip(encodings, starts, strict=True))
        shared = min(starts)
        shared = int(np.argmin(np.append(ids[0][:shared] == ids[1][:shared], False)))  # both replies follow one prompt
        before, chosen, rejected = ids[0][:shared], ids[0][shared:], ids[1][shared:]
        if np.array_equal(chosen, rejected):  # of different texts: a template may strip them, a tokenizer fold them
            said, mend = row["rejected"][-1]["content"], "the model would read no difference: leave the row out"
            return Encoded({}, 0, 0, error=bad("rejected", EQUAL, said, mend))
        columns = {"prompt_ids": before, "chosen_ids": chosen, "rejected_ids": rejected}
        length = len(before) + max(len(chosen), len(rejected))
        remarks = [] if chat.stops(chosen) and chat.stops(rejected) else [ENDLESS]
        remarks += [] if exact else [STRADDLING]
        remarks += [ALIKE] if alike(chosen, rejected) else []
        remarks += (
            [OTHERS] if any(m["role"] != "assistant" for part in ("chosen", "rejected") for m in row[part]) else []
        )
        asked = row["prompt"][-1]["content"]
        replies = [message["content"] for part in ("chosen", "rejected") for message in row[part]]
        remarks += [REPEATED_PROMPT] if len(asked) >= LONG and any(asked in reply for reply in replies) else []
        spelled = chat.spelled([m for part in ("prompt", "chosen", "rejected") for m in row[part]])
        return Encoded(columns, length, len(chosen) + len(rejected), remarks=(*remarks, *spelled))

    def cut(self, row: Encoded, max_length: int) -> Encoded:
        """The prompt and as much of each reply as `max_length` tokens hold."""
        prompt = row.columns["prompt_ids"]
        room = max(0, max_length - len(prompt))
        columns = {"prompt_ids": prompt} | {name: row.columns[name][:room] for name in ("chosen_ids", "rejected_ids")}
        vain = EQUAL_CUT if room and np.array_equal(columns["chosen_ids"], columns["rejected_ids"]) else None
        trained = len(columns["chosen_ids"]) + len(columns["rejected_ids"]) if room and not vain else 0
        return Encoded(columns, min(row.length, max_length), trained, row.trained - trained, row.remarks, vain=vain)

    def conversation(self, row: dict) -> dict | None:
        return row | {"messages": row["prompt"] + row["chosen"]}

    def segments(self, row: dict) -> list[tuple[list[int], str]]:
        """The ids of a row: its prompt, what is learned, what is rejected."""
        return [(row["prompt_ids"], "context"), (row["chosen_ids"], "learned"), (row["rejected_ids"], "rejected")]

    def balance(self, rows: Dataset) -> dict[str, float]:
        """Tokens of chosen and of rejected replies, on average, and the shares of pairs in which each is longer."""
        table = rows.with_format("arrow")[:]
        chosen, rejected = (pc.list_value_length(table[name]).to_numpy() for name in ("chosen_ids", "rejected_ids"))
        return {
            "chosen_tokens": float(chosen.mean()),
            "rejected_tokens": float(rejected.mean()),
            "chosen_longer": float((chosen > rejected).mean()),
            "rejected_longer": float((chosen < rejected).mean()),
        }

    def feed(self, trainer: partial) -> partial:
        from smoltrain.trainers import given_tokens

        return given_tokens(trainer)


@dataclass(frozen=True)
class Untokenized:
    """Rows as TRL's own formats, for a trainer that tokenises them itself; it cuts them itself too, uncounted.

    Of a message it is given role and content, so a row with tools or weights is refused.
    """

    kinds: list[str]
    rows_a_forward: ClassVar = 1
    last_turn_only: ClassVar = True

    def columns(self, kind: str) -> dict[str, pa.DataType]:
        names = {"unpaired": ("prompt", "completion"), "preference": ("prompt", "chosen", "rejected")}
        names |= {"conversation": ("messages",), "text": ()}
        other = {"unpaired": {"label": pa.bool_()}, "text": {"text": pa.string()}}
        return dict.fromkeys(names[kind], MESSAGES) | other.get(kind, {})

    def encode(self, rows: list[dict], chat: Chat) -> list[Encoded]:
        return [Encoded(row, 0, 1, error=more_than_said(row)) for row in rows]

    def cut(self, row: Encoded, max_length: int) -> Encoded:
        return row

    def conversation(self, row: dict) -> dict | None:
        return None

    def segments(self, row: dict) -> list[tuple[list[int], str]]:
        return []

    def balance(self, rows: Dataset) -> None:
        return None

    def feed(self, trainer: partial) -> partial:
        return trainer


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether all but a twentieth of the longer of two replies is what both begin and end with."""
    shorter = min(len(one), len(other))
    begin = int(np.argmin(np.append(one[:shorter] == other[:shorter], False)))
    end = int(np.argmin(np.append(one[::-1][: shorter - begin] == other[::-1][: shorter - begin], False)))
    return begin + end >= 0.95 * max(len(one), len(other))


def joined(rows: list[dict], parts: tuple[str, ...]) -> list[list[dict]]:
    return [[message for part in parts for message in row[part]] for row in rows]


def offered(rows: list[dict]) -> list[list[dict] | None]:
    return [row.get("tools") for row in rows]


def more_than_said(row: dict) -> RowError | None:
    """What of a row the columns of Untokenized cannot hold."""
    mend = "this trainer is given role and content alone: leave the row out"
    if row.get("tools"):
        return bad("tools", "tools that this trainer does not take", row["tools"], mend)
    for name, messages in row.items():
        for i, message in enumerate(messages if isinstance(messages, list) else []):
            for key, value in message.items():
                if key not in ("role", "content") and (key, value) != ("loss_weight", 1):
                    return bad(f"{name}[{i}].{key}", f"{key} that this trainer does not take", value, mend)
    return None


def first_token(encoding: Any, character: int) -> int:
    """The number of the first token that begins at or after a character of the text."""
    token = encoding.char_to_token(character)
    if token is not None and begins_at(encoding, character, token):
        return token
    if not len(encoding) or encoding.token_to_chars(len(encoding) - 1)[0] < character:
        return len(encoding)
    return next(i for i, (start, _) in enumerate(encoding.offsets) if start >= character)


def begins_at(encoding: Any, character: int, token: int) -> bool:
    return token < len(encoding) and encoding.token_to_chars(token)[0] == character
