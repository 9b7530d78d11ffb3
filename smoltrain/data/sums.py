"""Sums in small stories: a chat task that a one-million-parameter model learns and that anyone can check.

    user       Mia has 37 plums and finds 48 more. How many plums does Mia have now?
    assistant  37 + 48 = 85. Mia has 85 plums.

Everything is generated from a seed. A sum such as `37 + 48` belongs either to the training side or to the
test side, whatever the story around it, so a held-out answer cannot have been memorised.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Unpack

from datasets import Dataset

from smoltrain.config import ConfigError
from smoltrain.data.prepare import Data, Handling, Origin
from smoltrain.data.sources import Source

NAMES = ("Mia", "Leo", "Ada", "Tom", "Zoe", "Sam", "Ivy", "Max", "Eva", "Ben", "Lia", "Joe")
THINGS = ("plums", "shells", "stamps", "coins", "pears", "books", "beads", "cards", "nuts", "keys", "pens", "eggs")
GAINS = ("finds {b} more", "buys {b} more", "is given {b} more", "picks up {b} more")
LOSSES = ("loses {b}", "sells {b}", "gives away {b}", "drops {b}")

TEST_SHARE = 10  # one sum in this many is held out


@dataclass(frozen=True)
class Story:
    """One sum, told about one person: `a + b` or `a - b`, operands and result between 2 and 99."""

    name: str
    things: str
    event: str
    a: int
    sign: str
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b if self.sign == "+" else self.a - self.b

    @property
    def opening(self) -> str:
        return f"{self.name} has {self.a} {self.things} and {self.event.format(b=self.b)}."

    @property
    def question(self) -> str:
        return f"{self.opening} How many {self.things} does {self.name} have now?"

    def reply(self) -> str:
        """The right answer, in full."""
        return f"{self.a} {self.sign} {self.b} = {self.result}. {self.name} has {self.result} {self.things}."

    def mistake(self, rng: random.Random) -> str:
        """A reply that is wrong the way people are: the other operation, another name, or nothing has happened."""
        kind = rng.choice(("operation", "name", "event"))
        if kind == "operation" and self.a > self.b:
            return replace(self, sign="-" if self.sign == "+" else "+").reply()
        equation, _, answer = self.reply().partition(". ")
        if kind == "name":
            answer = answer.replace(self.name, rng.choice([name for name in NAMES if name != self.name]))
        else:
            answer = answer.replace(str(self.result), str(self.a))
        return f"{equation}. {answer}"


def sides() -> tuple[list[tuple[int, str, int]], list[tuple[int, str, int]]]:
    """Every sum there is, split once and for all into those to train on and those held out."""
    sums = [(a, sign, b) for a in range(2, 100) for b in range(2, 100) for sign in "+-" if fits(a, sign, b)]
    held_out = {s for s in sums if zlib.crc32(f"{s[0]}{s[1]}{s[2]}".encode()) % TEST_SHARE == 0}
    return [s for s in sums if s not in held_out], [s for s in sums if s in held_out]


def fits(a: int, sign: str, b: int) -> bool:
    return a + b <= 99 if sign == "+" else a - b >= 2


def stories(sums: list[tuple[int, str, int]], rows: int, rng: random.Random) -> list[Story]:
    """`rows` stories about different sums (each sum once while they last), drawn with `rng`."""
    drawn = [s for _ in range(-(-rows // len(sums))) for s in rng.sample(sums, len(sums))][:rows]
    return [
        Story(rng.choice(NAMES), rng.choice(THINGS), rng.choice(GAINS if sign == "+" else LOSSES), a, sign, b)
        for a, sign, b in drawn
    ]


def conversations(train_rows: int, test_rows: int, seed: int, **handling: Unpack[Handling]) -> Data:
    """Question and answer as `messages`, with the whole right reply once more in `answer` for exact match."""

    def row(story: Story, rng: random.Random) -> dict:
        reply = {"role": "assistant", "content": story.reply()}
        return {"messages": [{"role": "user", "content": story.question}, reply], "answer": story.reply()}

    return generate("sums", row, train_rows, test_rows, seed, handling)


def preferences(train_rows: int, test_rows: int, seed: int, **handling: Unpack[Handling]) -> Data:
    """The right reply (`chosen`) against a plausible mistake (`rejected`), with the right one in `answer`."""

    def row(story: Story, rng: random.Random) -> dict:
        return {
            "prompt": [{"role": "user", "content": story.question}],
            "chosen": [{"role": "assistant", "content": story.reply()}],
            "rejected": [{"role": "assistant", "content": story.mistake(rng)}],
            "answer": story.reply(),
        }

    return generate("sums_preferences", row, train_rows, test_rows, seed, handling)


def generate(
    name: str,
    row: Callable[[Story, random.Random], dict],
    train_rows: int,
    test_rows: int,
    seed: int,
    handling: Handling,
) -> Data:
    if min(train_rows, test_rows) < 1:
        raise ConfigError(f"data.train_rows={train_rows}, data.test_rows={test_rows}: at least 1 row of each")
    splits = {}
    for (split, rows), sums in zip({"train": train_rows, "test": test_rows}.items(), sides(), strict=True):
        rng = random.Random(f"{split} {seed}")
        splits[split] = Dataset.from_list([row(story, rng) for story in stories(sums, rows, rng)])
    fingerprint = f"{name} {train_rows} {test_rows} {seed}"
    source = Source(name, splits["train"], splits["test"], fingerprint, lambda split, i: f"{split} row {i + 1}")
    if not handling:  # one of several sources
        return Data({name: Origin(source)}, {})
    return Data({name: Origin(source)}, {**handling, "test_rows": test_rows, "seed": seed})  # all of it is held out
