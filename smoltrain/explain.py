"""The verbs that explain a config: `why` is a key what it is, `show` all of it with origins, `diff` two of them."""

import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from smoltrain import runs
from smoltrain.config import ConfigError, leaves
from smoltrain.config.compose import COMPOSING, compose, composed
from smoltrain.config.groups import options
from smoltrain.config.origins import COMMAND_LINE, Setting, Trace, trace
from smoltrain.config.overrides import spelled_out
from smoltrain.config.renamed import advice
from smoltrain.config.signatures import COMPUTED, REQUIRED, Parameter, signature
from smoltrain.config.validate import meant
from smoltrain.history import differing, opened, outcomes, resolve, settings
from smoltrain.lines import Line, aligned, brief, cut, line, number, say, scalar

Pairs = dict[str, dict[str, Any]]  # by name, what "a" has and what "b" has


def explain(verb: str, arguments: list[str]) -> int:
    """Runs one of the verbs and returns its exit code. Raises ConfigError where there is nothing to explain."""
    as_json, flags, rest = False, [], []
    remaining = iter(arguments)
    for argument in remaining:
        name, given, _ = argument.partition("=")
        if argument == "--json" and verb != "show":
            as_json = True
        elif name in ("--config-dir", "-cd"):
            folder = [] if given else [next(remaining, "")]
            if folder == [""]:
                raise ConfigError(f"{argument}: name the folder")
            flags += [argument, *folder]
        elif argument.startswith("-"):
            raise ConfigError(f"smoltrain {verb} takes no {argument}; smoltrain {verb} --help says what it takes")
        else:
            rest.append(argument)
    if verb == "diff":
        return diff(rest, flags, as_json)
    words = [argument for argument in rest if not is_override(argument)]
    if len(words) > 1 or rest[: len(words)] != words or (verb == "why" and not words):
        raise ConfigError(f"smoltrain {verb} takes one key and then overrides, as smoltrain {verb} seed trainer=dpo")
    overrides = spelled_out(rest[len(words) :])
    cfg = composing(overrides, flags)
    view = View.of(overrides, flags)
    return why(view, words[0], rest, as_json) if verb == "why" else show(view, "".join(words), cfg)


def is_override(argument: str) -> bool:
    return "=" in argument or argument.startswith(("~", "+"))


def refuse(overrides: list[str], arguments: list[str]) -> None:
    """Raises ConfigError for what is wrong with a config, but not for values that are still to come."""
    try:
        compose(overrides, arguments)
    except ConfigError as error:
        open_keys = tuple(f"{key} has no value" for key in error.missing)
        if wrong := [text for text in str(error).splitlines() if not (open_keys and text.startswith(open_keys))]:
            raise ConfigError("\n".join(wrong)) from error


def composing(overrides: list[str], flags: list[str]) -> DictConfig:
    """The config of a command line, right or wrong. Raises ConfigError where there is none, for all that is wrong."""
    try:
        return composed(overrides, [*flags, *overrides])
    except COMPOSING:
        compose(overrides, [*flags, *overrides])
        raise


@dataclass
class View:
    """A command line that composes: where its values come from, and what they come to."""

    overrides: list[str]
    arguments: list[str]
    trace: Trace
    config: DictConfig

    @classmethod
    def of(cls, overrides: list[str], flags: list[str]) -> "View":
        arguments = [*flags, *overrides]
        found = trace(overrides, arguments)
        return cls(overrides, arguments, found, OmegaConf.create(found.config))

    def resolved(self, key: str, value: Any) -> Any:
        """A key's value with each `${…}` in it followed; as it is where only a run knows what that stands for."""
        if "${" not in str(value) or "${hydra:" in str(value):
            return value
        try:
            found = OmegaConf.select(self.config, key, default=value)
            return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
        except OmegaConfBaseException:
            return value

    def taken(self, node: str) -> dict[str, tuple[Parameter, str]]:
        """What the class or function of a node takes, and its name; empty where there is none that can be read."""
        target = OmegaConf.select(self.config, f"{node}._target_")
        try:
            parameters = signature(target).parameters if isinstance(target, str) else {}
        except ConfigError:
            return {}
        return {name: (parameter, str(target)) for name, parameter in parameters.items()}


# ---------------------------------------------------------------- why


def why(view: View, key: str, given: list[str], as_json: bool) -> int:
    answers = answered(view, key, set())
    for setting in (setting for answer in answers for setting in answer["chain"]):
        if setting["chosen"] == COMMAND_LINE and setting["where"] not in given:
            setting["chosen"] = f"meant by the {COMMAND_LINE}"  # `data.path=` alone means data=local, too
    if as_json:
        print(json.dumps(answers, indent=1, ensure_ascii=False, default=str))
    else:
        for i, answer in enumerate(answers):
            say(([line()] if i else []) + worded(answer))
    refuse(view.overrides, view.arguments)
    return 0


def answered(view: View, key: str, seen: set[str]) -> list[dict[str, Any]]:
    """What can be said of a group, a node or a key, chains newest first; after a key those that its `${…}` lead to."""
    seen.add(key)
    found = view.trace
    if key in found.groups:
        chain, files = found.groups[key][::-1], found.files.get(key, [])
        option = Path(files[-1]).stem if files and "${" in str(chain[0].value) else chain[0].value
        about = options(key, view.arguments).get(str(option), "")
        return [{"group": key, "value": option, "about": about, "chain": rows(chain), "files": files}]
    below = {name: chain[-1] for name, chain in found.leaves.items() if name.startswith(f"{key}.")}
    if below or key in found.nodes:
        resolved = {name: row(s) | {"value": view.resolved(name, s.value)} for name, s in below.items()}
        return [{"node": key, "leaves": resolved, "chain": rows(found.nodes.get(key, [])[::-1])}]
    chain = (found.leaves.get(key) or found.removed.get(key, []))[::-1]
    # A default is at the end of what set the key; of a key that nobody set, or that was removed, it is in force.
    chain[len(chain) if key in found.leaves else 0 : 0] = default(view, key)
    if not chain:
        raise ConfigError(unknown(view, key))
    links = [link for link in linked(key, chain[0].value) if link in found.leaves and link not in seen]
    answer = {"key": key, "value": view.resolved(key, chain[0].value), "chain": rows(chain)}
    return [answer, *(further for link in links for further in answered(view, link, seen))]


def rows(chain: list[Setting]) -> list[dict[str, Any]]:
    return [row(setting) for setting in chain]


def row(setting: Setting) -> dict[str, Any]:
    return {"value": setting.value, "where": setting.where, "chosen": setting.chosen}


LINK = re.compile(r"\$\{(\.*)([\w.]+)\}")


def linked(key: str, value: Any) -> list[str]:
    """The keys that the `${…}` in a value name: `${.x}` is beside the key, `${..x}` one level up."""
    parts = key.split(".")
    return [".".join([*(parts[: -len(dots)] if dots else []), name]) for dots, name in LINK.findall(str(value))]


def default(view: View, key: str) -> list[Setting]:
    """What the class or function that takes a key has for it by itself; nothing where it has nothing."""
    node, _, name = key.rpartition(".")
    parameter, target = view.taken(node).get(name, (None, "")) if node else (None, "")
    if parameter is None or parameter.default is REQUIRED:
        return []
    value = "computed" if parameter.default is COMPUTED else parameter.default
    inside = [parameter.file.relative_to(p) for p in map(Path, sys.path) if parameter.file.is_relative_to(p)]
    file = min(inside, key=lambda path: len(path.parts), default=parameter.file)
    return [Setting(value, f"{file}:{parameter.line}", True, f"default of {target}")]


def unknown(view: View, key: str) -> str:
    """That there is no such key: for a value above it that has none, or with the one that was probably meant."""
    found = view.trace
    for above in (key[: dot.start()] for dot in re.finditer(r"\.", key)):
        if above in found.leaves:
            setting = found.leaves[above][-1]
            return f"{key}: {above} is {brief(setting.value)}, it has no keys ({setting.where})"
    values = {name: value for name, value in found.config.items() if name != "hydra"}
    instead = advice(key, "…")
    return f"{key} is not a key of this config{f'; {instead}' if instead else meant(key, values)}"


def worded(answer: dict[str, Any]) -> list[Line]:
    chain = answer["chain"]
    if "node" in answer:
        cells = [
            (name.removeprefix(answer["node"] + "."), brief(leaf["value"], 40), place(leaf))
            for name, leaf in answer["leaves"].items()
        ]
        cells += [("", brief(setting["value"]), f"{setting['where']}  overridden") for setting in chain]
        ends = len(answer["leaves"])
        heading = f"{answer['node']}  {ends} key{'s' * (ends != 1)}"
        return [
            line(heading, "bold"),
            *(line(text, "dim" if i >= ends else "") for i, text in enumerate(aligned(cells))),
        ]
    name, value = answer.get("key") or answer["group"], answer["value"]
    if "key" in answer and chain[0]["where"].startswith("~"):
        heading = f"{name} is not set"
    elif value == MISSING:
        heading = f"{name} has no value: set {name}=…"
    else:
        heading = f"{name} = {brief(value, 200)}{'  (known when it runs)' if '${hydra:' in str(value) else ''}"
    texts = aligned([(shown(setting), cut(setting["where"]), note(i, setting)) for i, setting in enumerate(chain)])
    lines = [line(heading, "bold"), *(line(text, "dim" if i else "") for i, text in enumerate(texts))]
    if answer.get("files"):
        lines += [line(f"  {text}") for text in (answer["about"], f"read: {', '.join(answer['files'])}") if text]
    return lines


def shown(setting: dict[str, Any]) -> str:
    return "removed" if setting["where"].startswith("~") else brief(setting["value"])


def note(i: int, setting: dict[str, Any]) -> str:
    """What brought a setting, of the one in force; of all others, that they are overridden."""
    if i == 0:
        return setting["chosen"]
    return f"overridden, {setting['chosen']}" if setting["chosen"].startswith("default of ") else "overridden"


# ---------------------------------------------------------------- show


def show(view: View, key: str, cfg: DictConfig) -> int:
    """Prints the config, or a part of it as a file of one's own could hold it; then refuses what is wrong with it."""
    package, node = key, {name: value for name, value in view.trace.config.items() if name != "hydra"}
    for part in key.split(".") if key else []:
        if not isinstance(node, dict) or part not in node:
            group = f"{key} is a group and no node: smoltrain why {key} says what it brought"
            raise ConfigError(group if key in view.trace.groups else unknown(view, key))
        parent, node = node, node[part]
    if not isinstance(node, dict):
        package, _, last = key.rpartition(".")
        node = {last: parent[last]}
    if key:
        print(f"# @package {package or '_global_'}")
    lines = list(commented(view, node, f"{package}." if package else "", ""))
    column = max((len(text) for text, origin in lines if origin and len(text) <= 56), default=0)
    say([((f"{text:{column}}  ", ""), (f"# {origin}", "dim")) if origin else line(text) for text, origin in lines])
    compose(view.overrides, view.arguments)  # says what is wrong with it
    return 0


def commented(view: View, node: dict[Any, Any], prefix: str, margin: str) -> Iterator[tuple[str, str]]:
    """A node as lines of YAML, each with its origin."""
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield f"{margin}{scalar(key)}:", ""
            yield from commented(view, value, f"{name}.", f"{margin}  ")
            continue
        resolved, chain = view.resolved(name, value), view.trace.leaves.get(name)
        origin = origin_of(chain[-1], resolved) if chain else ""
        printable = "".join(letter if letter.isprintable() else " " for letter in origin)
        yield f"{margin}{scalar(key)}: {scalar(resolved)}", printable


def origin_of(setting: Setting, resolved: Any) -> str:
    """Where a value comes from, and what is written there, where that stands for another."""
    where = place(row(setting))
    return where if resolved == setting.value else f"{where}, {setting.value}"


# ---------------------------------------------------------------- diff


@dataclass
class Side:
    """One of two things compared: its resolved config by leaf, where each value comes from, and a run's record."""

    title: str
    values: dict[str, Any]
    places: dict[str, str]
    record: dict[str, Any] | None = None


def diff(given: list[str], flags: list[str], as_json: bool) -> int:
    if len(given) != 2:
        raise ConfigError("smoltrain diff takes two: experiments, runs, or overrides in quotes, '' for none")
    a, b = (side(reference, flags) for reference in given)
    found = differences(a, b)
    equal = not any(found.values())
    if as_json:
        answer = {"a": a.title, "b": b.title, "equal": equal} | found
        print(json.dumps(answer, indent=1, ensure_ascii=False, default=str))
    else:
        say([line(f"- {a.title}", "bold"), line(f"+ {b.title}", "bold"), *compared(found)])
    return int(not equal)


def side(reference: str, flags: list[str]) -> Side:
    """What one argument of `diff` names: overrides, an experiment, or else a run."""
    try:
        words = shlex.split(reference)
    except ValueError as error:
        raise ConfigError(f"{reference}: {error}") from error
    if all(map(is_override, words)):
        return composition(" ".join(words) or "no overrides", words, flags)
    if reference in options("experiment", flags):
        return composition(f"experiment {reference}", [f"experiment={reference}"], flags)
    return finished(reference, options("experiment", flags))


def composition(title: str, overrides: list[str], flags: list[str]) -> Side:
    spelled = spelled_out(overrides)
    refuse(spelled, [*flags, *spelled])
    return Side(title, *looked(View.of(spelled, flags)))


def looked(view: View) -> tuple[dict[str, Any], dict[str, str]]:
    """The resolved values of a config by leaf, and the place of each."""
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for key, chain in view.trace.leaves.items():
        if not key.startswith("hydra."):
            value = view.resolved(key, chain[-1].value)
            spread = dict(leaves(value, f"{key}.")) if isinstance(value, dict) else {key: value}
            values |= spread
            places |= dict.fromkeys(spread, origin_of(chain[-1], value))
    return values, places


def finished(reference: str, experiments: Iterable[str]) -> Side:
    """A run that has ended. Raises ConfigError where there is none."""
    directory = resolve(reference, completed=reference == "latest", experiments=experiments)
    record = opened(directory).record
    if record["status"] == "running":
        raise ConfigError(f"{directory}: this run has not ended")
    return Side(f"run {directory}, {record['status']}", settings(record), recalled(record), record)


def recalled(record: dict[str, Any]) -> dict[str, str]:
    """Where the values of a run came from: its command line, or the line that gives a key the same value today."""
    recorded = dict(leaves(record["config"]))
    typed = {override.lstrip("+").partition("=")[0] for override in record["overrides"]}
    places = {key: COMMAND_LINE for key in recorded if key in typed}
    flags = [part for folder in record.get("config_dirs", []) for part in ("--config-dir", folder)]
    try:
        values, today = looked(View.of(record["overrides"], flags))
    except (ConfigError, *COMPOSING):
        return places
    return {key: today[key] for key, value in recorded.items() if key in values and values[key] == value} | places


def differences(a: Side, b: Side) -> dict[str, Pairs]:
    """What differs, by section and name, a side None where it has nothing; of results, if one differs, all."""

    def valued(side: Side, name: str) -> dict[str, Any] | None:
        return {"value": side.values[name], "where": side.places.get(name, "")} if name in side.values else None

    names = differing([a.values, b.values], runs.NOT_IDENTITY if a.record or b.record else ())
    found = {"config": {name: {"a": valued(a, name), "b": valued(b, name)} for name in names}}
    if a.record and b.record:
        for section, rows in outcomes([a.record, b.record]).items():
            found[section] = {name: {"a": left, "b": right} for name, (left, right) in rows.items()}
    return found


def compared(found: dict[str, Pairs]) -> list[Line]:
    """What differs, and which sections are equal."""
    cells = [
        (f"{mark} {name}", brief(pair[key]["value"], 40), pair[key]["where"])
        for name, pair in found["config"].items()
        for key, mark in (("a", "-"), ("b", "+"))
        if pair[key]
    ]
    texts = aligned(cells, margin="")
    lines = [line(), *(line(text, "red" if text.startswith("-") else "green") for text in texts)] if texts else []
    for section, pairs in found.items():
        if section != "config" and pairs:
            table = [(f"  {name}", number(pair["a"]), number(pair["b"])) for name, pair in pairs.items()]
            heading, *rest = aligned([(section, "-", "+"), *table], margin="")
            lines += [line(), line(heading, "bold"), *map(line, rest)]
    if equal := [section for section, pairs in found.items() if not pairs]:
        lines += [line(), line(f"equal: {', '.join(equal)}")]
    return lines


# ---------------------------------------------------------------- in letters


def place(row: dict[str, Any]) -> str:
    return COMMAND_LINE if row["chosen"] == COMMAND_LINE else row["where"]
