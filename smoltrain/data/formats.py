"""The shapes that rows come in, and how each is read into one of the four kinds that trainers eat.

    conversation  {"messages": […]}                                       and "tools", "answer" where the row has them
    preference    {"prompt": […], "chosen": […], "rejected": […]}         likewise
    unpaired      {"prompt": […], "completion": […], "label": bool}
    text          {"text": "…"}

Messages are as `smoltrain.data.messages` says. Adding a shape is one small function and one line of SHAPES.
"""

import contextlib
import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from smoltrain.config import ConfigError, suggest
from smoltrain.data.messages import (
    EQUAL,
    WRONG,
    Messages,
    RowError,
    absent,
    bad,
    learnable,
    shown,
    text,
    thought,
    tools,
    turns,
)

LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}  # 1 and 0 are True and False
PLAIN_YAML = r"(?!(?i:y|n|yes|no|on|off|true|false|null)$)[A-Za-z_]\w*"  # needs no quotes
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Shape:
    """One way to write rows: the columns it needs, those it uses where they are there, and what reads them.

    `convert` is given the row and the names of the columns needed. `mapping` says in which column of the file each
    column stands; where it is empty, each stands under its own name.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[..., dict]
    mapping: dict[str, str] = field(default_factory=dict)

    def read(self, row: dict) -> dict:
        """The canonical row. Raises RowError, naming the file's own column, and nothing else whatever the row is."""
        if not isinstance(row, dict):
            raise bad("row", WRONG, row, "a row is an object of columns, {…}")
        if not self.mapping:
            return self.convert(row, *self.columns)
        try:
            return self.convert({ours: row.get(theirs) for ours, theirs in self.mapping.items()}, *self.columns)
        except RowError as error:
            ours = re.split(r"\W", error.field, maxsplit=1)[0]
            theirs = self.mapping.get(ours, ours)
            message, where = (theirs + said.removeprefix(ours) for said in (str(error), error.field))
            raise RowError(message, where, error.reason) from None

    def mapped(self, mapping: dict[str, str]) -> "Shape":
        """This shape for a file with other names: `mapping` where it says, the rest by name."""
        by_name = {name: name for name in (*self.columns, *self.optional) if name not in mapping.values()}
        return replace(self, mapping=by_name | mapping) if mapping else self

    def unread(self, columns: list[str]) -> list[str]:
        """The columns of a file that it does not use."""
        used = self.mapping.values() if self.mapping else (*self.columns, *self.optional)
        return [column for column in columns if column not in used]

    def misfits(self, first: list[dict]) -> RowError | None:
        """Why none of these rows has the types of this shape, or None where one has, be it readable or not."""
        misfit = None
        for row in first:
            try:
                self.read(row)
            except RowError as error:
                misfit = misfit or error
                if error.reason == WRONG:
                    continue
            return None
        return misfit

    def reads(self, first: list[dict]) -> bool:
        """Whether it reads any of these rows."""
        for row in first:
            with contextlib.suppress(RowError):
                self.read(row)
                return True
        return False


# ---------------------------------------------------------------- the shapes


def chat(row: dict, column: str) -> dict:
    return conversation(row, learnable(turns(row.get(column), column), column))


def pair(row: dict, prompt: str, reply: str) -> dict:
    """Only the reply is learned: replies within the prompt weigh 0 where they do not say themselves."""
    asked, said = exchange(row, prompt, reply)
    for m in asked:
        if m["role"] == "assistant":
            m.setdefault("loss_weight", 0.0)
    return conversation(row, asked + said)


def question_answer(row: dict, question: str, answer: str) -> dict:
    canonical = pair(row, question, answer)
    canonical.pop("answer", None)  # it is the reply
    return canonical


def alpaca(row: dict, instruction: str, output: str) -> dict:
    """The instruction, after an empty line its `input`; `history` is a list of earlier [question, reply]."""
    asked, given, history = text(row.get(instruction), instruction), row.get("input"), row.get("history")
    if not absent(given):
        asked = f"{asked}\n\n{text(given, 'input')}"
    if not isinstance(history, list | None):
        raise bad("history", WRONG, history, "a list of [question, reply] is due")
    said = []
    for i, earlier in enumerate(history or []):
        if not isinstance(earlier, list) or len(earlier) != 2:
            raise bad(f"history[{i}]", WRONG, earlier, "a list [question, reply] is due")
        for j, role in enumerate(("user", "assistant")):
            said.append({"role": role, "content": text(earlier[j], f"history[{i}][{j}]")})
    said.append({"role": "user", "content": asked})
    return conversation(row, said + learnable(turns(row.get(output), output, "assistant"), output, said, instruction))


def medical(row: dict, question: str, reasoning: str, response: str) -> dict:
    """The reasoning enters the reply as `thought` writes it: <think>, the reasoning, </think>, the response."""
    reply = thought(text(row.get(reasoning), reasoning), text(row.get(response), response))
    return pair({**row, response: reply}, question, response)


def preference(row: dict, prompt: str, *replies: str) -> dict:
    """Two replies to a prompt; where they are whole conversations, what these share is the prompt."""
    chosen, rejected = (turns(row.get(reply), reply, "assistant") for reply in replies)
    if chosen[0]["role"] != "assistant":
        return compared(row, prompt, *parted(chosen, rejected))
    return compared(row, prompt, turns(row.get(prompt), prompt, "user"), chosen, rejected)


def implicit_prompt(row: dict, *replies: str) -> dict:
    chosen, rejected = (turns(row.get(reply), reply) for reply in replies)
    return compared(row, "chosen", *parted(chosen, rejected))


def continued(row: dict, column: str, *replies: str) -> dict:
    """A conversation and two ways in which the assistant goes on."""
    asked, (chosen, rejected) = turns(row.get(column), column), (turns(row.get(r), r, "assistant") for r in replies)
    if chosen[0]["role"] != "assistant":
        raise bad("chosen", WRONG, chosen[0], f"the assistant's reply to {column} is due, not a whole conversation")
    return compared(row, column, asked, chosen, rejected)


def transcripts(row: dict, *replies: str) -> dict:
    """Anthropic HH, conversations as one string; where that is a reply only, `prompt` has what precedes it."""
    return compared(row, "chosen", *parted(*(transcript(row, reply) for reply in replies)))


def scored(row: dict, prompt: str, column: str) -> dict:
    """UltraFeedback: of several completions the best against the worst, the first where several are as good."""
    asked, found = turns(row.get(prompt), prompt, "user"), row.get(column)
    if not isinstance(found, list) or not all(isinstance(completion, dict) for completion in found):
        raise bad(column, WRONG, found, "a list of {response, overall_score} is due")
    scores = {i: score for i, completion in enumerate(found) if (score := rating(completion)) is not None}
    if len(scores) < 2:
        raise bad(column, "fewer than two scores", [*scores.values()], "give two an overall_score or Ratings")
    if len(set(scores.values())) == 1:
        raise bad(column, "tied scores", [*scores.values()], "none is better: leave the row out")
    ends = (choose(scores, key=scores.__getitem__) for choose in (max, min))
    said = (turns(found[i].get("response"), f"{column}[{i}].response", "assistant") for i in ends)
    return compared(row, prompt, asked, *said)


def unpaired(row: dict, prompt: str, reply: str, label: str) -> dict:
    (asked, said), given = exchange(row, prompt, reply), row.get(label)
    good = (
        LABELS.get(given.lower() if isinstance(given, str) else given) if isinstance(given, str | int | float) else None
    )
    if good is None:
        raise bad(label, "bad label", given, "true or false is due, or 1 or 0")
    return {"prompt": with_system(row, asked), "completion": said, "label": good}


def plain_text(row: dict, column: str) -> dict:
    return {"text": text(row.get(column), column)}


CHAT, PAIR, MORE = "conversation", "preference", ("system", "tools", "answer")
SHAPES = (  # of each kind, the one that stands for it first
    Shape("messages", CHAT, ("messages",), MORE, chat),
    Shape("sharegpt", CHAT, ("conversations",), MORE, chat),
    Shape("prompt_completion", CHAT, ("prompt", "completion"), MORE, pair),
    Shape("prompt_response", CHAT, ("prompt", "response"), MORE, pair),
    Shape("question_answer", CHAT, ("question", "answer"), ("system", "tools"), question_answer),
    Shape("user_assistant", CHAT, ("user", "assistant"), MORE, pair),
    Shape("alpaca", CHAT, ("instruction", "output"), ("input", "history", *MORE), alpaca),
    Shape("openhermes_fr", CHAT, ("prompt", "accepted_completion"), MORE, pair),
    Shape("medical_o1", CHAT, ("Question", "Complex_CoT", "Response"), MORE, medical),
    Shape("preference", PAIR, ("prompt", "chosen", "rejected"), MORE, preference),
    Shape("implicit_prompt", PAIR, ("chosen", "rejected"), MORE, implicit_prompt),
    Shape("sharegpt_preference", PAIR, ("conversations", "chosen", "rejected"), MORE, continued),
    Shape("messages_preference", PAIR, ("messages", "chosen", "rejected"), MORE, continued),
    Shape("transcripts", PAIR, ("chosen", "rejected"), ("prompt", *MORE), transcripts),
    Shape("scored", PAIR, ("instruction", "completions"), MORE, scored),
    Shape("unpaired", "unpaired", ("prompt", "completion", "label"), ("system",), unpaired),
    Shape("unpaired_response", "unpaired", ("prompt", "response", "label"), ("system",), unpaired),
    Shape("text", "text", ("text",), (), plain_text),
)


# ---------------------------------------------------------------- what they share


def conversation(row: dict, messages: Messages) -> dict:
    return with_more(row, {"messages": with_system(row, messages)})


def exchange(row: dict, prompt: str, reply: str) -> tuple[Messages, Messages]:
    asked = turns(row.get(prompt), prompt, "user")
    return asked, learnable(turns(row.get(reply), reply, "assistant"), reply, asked, prompt)


def compared(row: dict, field: str, prompt: Messages, chosen: Messages, rejected: Messages) -> dict:
    """A preference row of two different replies to a `prompt`, which stands in the column `field`."""
    learnable(chosen, "chosen", prompt, field)
    learnable(rejected, "rejected", prompt, field)
    if chosen == rejected:
        raise bad("rejected", EQUAL, rejected[-1]["content"], "leave the row out")
    return with_more(row, {"prompt": with_system(row, prompt), "chosen": chosen, "rejected": rejected})


def parted(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """What two conversations begin with alike, and the two that follow."""
    if chosen == rejected:
        raise bad("rejected", EQUAL, rejected[-1]["content"], "leave the row out")
    alike = (a == b for a, b in zip(chosen, rejected, strict=False))
    i = next((i for i, same in enumerate(alike) if not same), min(len(chosen), len(rejected)))
    for name, reply in (("rejected", rejected), ("chosen", chosen)):
        if i == len(reply):
            raise bad(name, f"nothing is {name}", reply[-1]["content"], "it is only the beginning of the other one")
    for name, reply in (("rejected", rejected), ("chosen", chosen)):
        if i == 0 or reply[i]["role"] != "assistant":
            raise bad(f"{name}[{i}]", "prompts differ", reply[i]["content"], "chosen and rejected answer one prompt")
    return chosen[:i], chosen[i:], rejected[i:]


def with_system(row: dict, messages: Messages) -> Messages:
    """`messages` after what the column `system` says."""
    if absent(row.get("system")):
        return messages
    if messages[0]["role"] == "system":
        raise bad("system", "two system prompts", row["system"], "the messages have one too: keep one")
    return [{"role": "system", "content": text(row["system"], "system")}, *messages]


def with_more(row: dict, canonical: dict) -> dict:
    """`canonical` with the row's tools, and its `answer` for exact match where that is a text."""
    if row.get("tools") is not None and (schemas := tools(row["tools"], "tools")):
        canonical["tools"] = schemas
    if isinstance(answer := row.get("answer"), str) and not absent(answer):
        canonical["answer"] = text(answer, "answer")
    return canonical


def transcript(row: dict, column: str) -> Messages:
    """The turns of a string, each stripped: `\\n\\nHuman: … \\n\\nAssistant: …`."""
    said = text(row.get(column), column)
    if not TURN.match(said) and not absent(row.get("prompt")):
        said = text(row["prompt"], "prompt") + said
    if not TURN.match(said):
        raise bad(column, WRONG, said, r"'\n\nHuman: … \n\nAssistant: …' is due")
    _, *pieces = TURN.split(said)
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    return turns([{"role": role.lower(), "content": content.strip()} for role, content in pairs], column)


def rating(completion: dict) -> float | None:
    """The overall score of a completion, or the mean of its annotations' Ratings (numbers, or texts like "4")."""
    if (overall := number(completion.get("overall_score"))) is not None:
        return overall
    annotations = completion.get("annotations")
    aspects = annotations.values() if isinstance(annotations, dict) else ()
    found = [r for a in aspects if isinstance(a, dict) and (r := number(a.get("Rating"))) is not None]
    return sum(found) / len(found) if found else None


def number(value: Any) -> float | None:
    try:
        found = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


# ---------------------------------------------------------------- which shape it is


def recognise(
    columns: list[str], first: list[dict], kinds: Sequence[str], format: str | None, mapping: dict[str, str] | None
) -> Shape:
    """The shape of a file's rows among those of `kinds`, from its columns and first rows or as declared.

    `format` (data.format) names the shape, `mapping` (data.columns) the file's column for each of the shape's; what it
    does not name is taken by name. Of several shapes that fit, one that needs all that another needs and more wins.
    Raises ConfigError, with the columns, the first row and YAML to paste, where none fits or several do.
    """
    names = [shape.name for shape in SHAPES]
    if format is not None and format not in names:
        raise ConfigError(f"data.format={format} is none of {', '.join(names)}{suggest(str(format), names)}")
    known = [shape for shape in SHAPES if format in (None, shape.name)]
    mapping = mapping or {}
    check_mapping(mapping, columns, known)
    there = mapping.keys() | (set(columns) - set(mapping.values()))
    complete = [s.mapped(mapping) for s in known if mapping.keys() <= uses(s) and there.issuperset(s.columns)]
    fitting = [s for s in complete if format or not s.misfits(first)]
    eaten = [s for s in fitting if s.kind in kinds]
    others = [s for s in fitting if s.kind not in kinds and s.reads(first)]
    if others and not format and not any(s.reads(first) for s in eaten):  # the columns fit, no row does
        eaten, fitting = [], others[-1:]
    best = [s for s in eaten if not any(set(s.columns) < set(other.columns) for other in eaten)]
    marked = [s for s in fitting if s.kind == "unpaired" and "unpaired" not in kinds and not format]
    if len(best) == 1 and any(set(s.columns) > set(best[0].columns) for s in marked):  # bad replies are among them
        best, fitting, others = [], marked, marked
    if len(best) == 1:
        return best[0]
    row = next((row for row in first if isinstance(row, dict)), {})
    sure, likely = guess(columns, row, known if format and not fitting else [s for s in SHAPES if s.kind in kinds])
    blocks = [likely]
    if best:
        problem = f"data: these rows fit {' and '.join(s.name for s in best)}; declare which is meant"
        blocks = [block(s.name, mapping) for s in best]
    elif fitting:
        problem = other_kind(fitting[0], kinds, there)
        blocks = blocks if sure and not others else []
    elif format:
        problem = f"data.format={format}: lacking {', '.join(c for c in known[0].columns if c not in there)}"
    else:
        refused = [f"\nnot {s.name}: {s.misfits(first)}" for s in complete if s.kind in kinds]
        problem = f"data: columns {', '.join(columns)} fit none of the known shapes{''.join(refused)}"
        blocks = [] if refused and not sure else blocks
    seen = [f"  {column}: {shown(row.get(column))}" for column in columns]
    paste = ["in YAML:", "\nor\n".join(blocks)] if blocks else []
    raise ConfigError("\n".join([problem, f"columns: {', '.join(columns)}", "first row:", *seen, *paste]))


def uses(shape: Shape) -> set[str]:
    return {*shape.columns, *shape.optional}


def check_mapping(mapping: dict[str, str], columns: list[str], known: list[Shape]) -> None:
    names = sorted(set().union(*map(uses, known)))
    for ours, theirs in mapping.items():
        if ours not in names:
            raise ConfigError(f"data.columns: {ours} is none of {', '.join(names)}{suggest(str(ours), names)}")
        if theirs not in columns:
            found = f"there are {', '.join(columns)}{suggest(str(theirs), columns)}"
            raise ConfigError(f"data.columns: no column {theirs}; {found}")


def other_kind(found: Shape, kinds: Sequence[str], there: set[str]) -> str:
    """That the rows are good but not for this trainer, and what they would need."""
    wanted = [next(s for s in SHAPES if s.kind == kind) for kind in kinds]
    eats = " or ".join(f"{s.kind} rows ({', '.join(s.columns)})" for s in wanted)
    needs = [[name for name in s.columns if name not in there] for s in SHAPES if s.kind in kinds]
    fewest = sorted(needs, key=len)[0]
    lacking = f"; lacking: {', '.join(fewest)}" if fewest else ""
    these = f"{found.kind} rows ({', '.join(found.columns)})"
    return f"data: the trainer eats {eats}; these are {these}{lacking}. Choose other data= or another trainer="


ALIKE = (  # names for one thing: from these the YAML that an error proposes is guessed
    {"prompt", "instruction", "question", "query", "user", "human", "ask", "problem", "input"},
    {"completion", "response", "answer", "output", "assistant", "reply", "solution", "target", "accepted_completion"},
    {"messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns"},
    {"chosen", "accepted", "preferred", "winner", "good", "better"},
    {"rejected", "refused", "dispreferred", "loser", "bad", "worse"},
    {"input", "context"},
    {"system", "system_prompt"},
    {"text", "content", "document", "body"},
    {"label", "rating", "thumbs", "is_good"},
)


def guess(columns: list[str], row: dict, shapes: list[Shape]) -> tuple[bool, str]:
    """Whether all that one of these shapes needs was found in a row, and YAML that declares the likeliest of them."""
    guesses = []
    for shape in shapes:
        names = [*shape.columns, *shape.optional]
        mapping = {name: name for name in names if name in columns}
        for ours in names:
            like = (c for c in columns if c not in mapping.values() and any({ours, c.lower()} <= a for a in ALIKE))
            if ours not in mapping and (theirs := next(like, None)) is not None:
                mapping[ours] = theirs
        lacking = [name for name in shape.columns if name not in mapping]
        rest = [c for c in columns if c not in mapping.values() and isinstance(row.get(c), str | list | dict)]
        score = len(mapping)
        mapping |= dict(zip_longest(lacking, rest[: len(lacking)], fillvalue="???"))
        unfit = "???" in mapping.values() or shape.mapped(mapping).misfits([row]) is not None
        guesses.append((unfit, len(lacking) / len(shape.columns), -score, shape.name, mapping))
    unfit, missing, _, name, mapping = min(guesses, key=lambda guessed: guessed[:3])
    return not unfit and not missing, block(name, mapping)


def block(format: str, mapping: dict[str, str]) -> str:
    """The YAML that declares a shape, in which `???` still has to be filled in, and the same on the command line."""
    renamed = {ours: theirs for ours, theirs in mapping.items() if ours != theirs}
    quoted = (f"{o}: {t if re.fullmatch(PLAIN_YAML, t) else json.dumps(t)}" for o, t in renamed.items())
    declared = [f"format: {format}"] + ([f"columns: {{{', '.join(quoted)}}}"] if renamed else [])
    typed = shlex.join(f"data.{line.replace(': ', '=', 1)}" for line in declared)
    return "\n".join(["data:", *(f"  {line}" for line in declared), f"# {typed}"])
