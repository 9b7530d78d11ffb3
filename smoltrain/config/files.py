"""Users' own YAML files: what is wrong with them that Hydra does not say, or not with the line."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from yaml import MappingNode, ScalarNode, SequenceNode, YAMLError

from smoltrain.config import BASE, CONF, Problem, suggest
from smoltrain.config.groups import LOADER, defaults, folders, options, package
from smoltrain.config.overrides import no_such_option
from smoltrain.config.schema import KEYS

KEYWORDS = {"override", "optional"}
NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class Entry:
    """One entry of a defaults list: `- override /model: tiny` chooses the option `tiny` of the group `model`.

    `option` is None where the entry chooses nothing, as `null` does, and for what a run has to start to know.
    """

    group: str
    option: str | None
    node: yaml.Node
    keywords: frozenset[str] = frozenset()
    absolute: bool = False
    package: str = ""

    @classmethod
    def of(cls, node: yaml.Node, beside: str) -> "Entry":
        """An entry of a file of the group `beside`, whose own options are named without a group."""
        if isinstance(node, MappingNode) and len(node.value) == 1 and isinstance(node.value[0][0], ScalarNode):
            key, value = node.value[0]
            *keywords, name = key.value.split() or [""]
            path, _, package = name.partition("@")
            chosen = value.value if isinstance(value, ScalarNode) and value.tag != NULL else None
            group, absolute = path.removeprefix("/"), path.startswith("/")
        else:
            path, _, package = str(node.value).partition("@")
            group, _, chosen = path.removeprefix("/").rpartition("/")
            group, absolute, keywords = group or beside, path.startswith("/"), []
        option = None if chosen is None or "${" in chosen else chosen
        return cls(group, option, node, frozenset(keywords), absolute, package)


def chosen(overrides: list[str], arguments: list[str]) -> dict[Path, str]:
    """The users' own files that a command line brings in, by the defaults lists of others too, with their groups."""
    found: dict[Path, str] = {}
    named = [(o.lstrip("+~").partition("=")[0].partition("@")[0], o.partition("=")[2]) for o in overrides if "=" in o]
    while named:
        group, option = named.pop()
        for file in (folder / group / f"{option}.yaml" for folder in folders(arguments)[:-1]):
            if file not in found and is_there(file):
                found[file] = group
                named += [(entry.group, entry.option) for entry in entries(file, group) if entry.option]
    return found


def defaults_of(file: Path) -> tuple[yaml.Node, yaml.Node] | None:
    """The defaults list of a file, key and value; None where it has none, or is no YAML."""
    try:
        tree = yaml.compose(file.read_text(errors="replace"), LOADER)
    except YAMLError:
        return None
    pairs = tree.value if isinstance(tree, MappingNode) else []
    return next(((key, value) for key, value in pairs if key.value == "defaults"), None)


def is_there(file: Path) -> bool:
    """Whether a file is there; it is not where its name is one that no file can have."""
    try:
        return file.is_file()
    except OSError:
        return False


def entries(file: Path, group: str) -> list[Entry]:
    listed = defaults_of(file)
    return [Entry.of(node, group) for node in listed[1].value] if listed and isinstance(listed[1], SequenceNode) else []


# ---------------------------------------------------------------- what is wrong


def slips(overrides: list[str], arguments: list[str]) -> list[Problem]:
    """What is wrong with the defaults lists of the users' files that a command line brings in, each with its line."""
    found = []
    for file, group in chosen(overrides, arguments).items():
        listed = defaults_of(file)
        if listed and not isinstance(listed[1], SequenceNode):
            found.append((file, listed[0], "defaults is a list: each of its lines begins with - "))
        overriding = False
        for entry in entries(file, group):
            said = slip(entry, group, arguments)
            if overriding and not said and isinstance(entry.node, ScalarNode) and entry.node.value != "_self_":
                said = f"{entry.node.value}: it stands before the first override"
            overriding |= "override" in entry.keywords
            found += [(file, entry.node, said)] if said else []
    return [Problem("", f"{file}:{node.start_mark.line + 1}: {said.rstrip()}") for file, node, said in found]


def slip(entry: Entry, beside: str, arguments: list[str]) -> str:
    """What is wrong with an entry of a file of the group `beside`; empty where nothing is."""
    group, option, node = entry.group, entry.option, entry.node
    if not isinstance(node, MappingNode):
        return misnamed(entry, arguments)
    if len(node.value) != 1:
        return "an entry of a defaults list chooses one option, - override /model: tiny"
    value = node.value[0][1]
    known = {*defaults(), *(path.name for folder in folders(arguments) for path in folder.glob("*/"))}
    mend = f"- override /{group}: {option or 'null'}"
    if group in ("hydra/launcher", "hydra/sweeper"):  # ours would win, without a word
        return f"{group}: it is chosen on the command line, hydra/launcher={option}, and by no file"
    if group.startswith(("hydra", ".")):
        return ""
    if group not in known:
        return f"{group}: there is no such group{suggest(group, defaults()) or '.'} Groups: {', '.join(defaults())}"
    if group == beside and not entry.package:
        return f"{group}: a file extends another of its own group by its name alone, - {option}"
    if not isinstance(value, ScalarNode):
        return f"{group}: one option is chosen, {mend.replace('null', next(iter(options(group, arguments))))}"
    if group in defaults() and not entry.package and ("override" not in entry.keywords or not entry.absolute):
        return f"{group} is chosen already; write {mend}"
    if option is None or "optional" in entry.keywords:
        return ""
    return unknown(group, option, arguments)


def misnamed(entry: Entry, arguments: list[str]) -> str:
    """What is wrong with an entry that names a file and no group; empty where nothing is."""
    text = str(entry.node.value)
    if not isinstance(entry.node, ScalarNode):
        return "an entry of a defaults list chooses one option, - override /model: tiny"
    if text == "_self_" or ".." in text or entry.option is None:
        return ""
    if text.strip("_") == "self":
        return f"{text}: write _self_"
    if ":" in text or set(text.split()) & KEYWORDS:
        return f"{text}: a blank follows the colon, - override /trainer: dpo"
    return unknown(entry.group, entry.option, arguments)


def unknown(group: str, option: str, arguments: list[str]) -> str:
    if any(is_there(folder / group / f"{option}.yaml") for folder in folders(arguments)):
        return ""
    return no_such_option(group, option, list(options(group, arguments)))


def unreadable(arguments: list[str]) -> Iterator[str]:
    """What is wrong with users' files that cannot be read, or hold something else than keys and their values."""
    for file in (file for folder in folders(arguments)[:-1] for file in sorted(folder.rglob("*.yaml"))):
        try:
            node = yaml.compose(file.read_text(errors="replace"), LOADER)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            yield f"{file}:{line}: unreadable YAML, {error.problem}"
        except YAMLError as error:
            yield f"{file}: unreadable YAML, {' '.join(str(error).split())}"
        else:
            if node is not None and not isinstance(node, MappingNode):
                yield f"{file}: a config file holds keys and their values"


def overshadowed(arguments: list[str]) -> list[Problem]:
    """Users' files that have the names of ours, which are read instead."""
    pairs = [(folder, file) for folder in folders(arguments)[:-1] for file in sorted(folder.rglob("*.yaml"))]
    return [
        Problem("", f"{file}: smoltrain has a file of this name, which would be read instead; call yours another")
        for folder, file in pairs
        if (CONF / file.relative_to(folder)).is_file()
    ]


def headless(overrides: list[str], arguments: list[str]) -> str:
    """What the first line of users' own files that were chosen has to be, where it sends their keys nowhere."""
    advice = ""
    for file, group in chosen(overrides, arguments).items():
        needed = {package(ours) for ours in (CONF / group).glob("*.yaml") if ours.stem != BASE}
        reaches = package(file).partition(".")[0] in (*KEYS, "_global_", "_group_", "hydra")
        if needed and all(needed) and not reaches:
            lines = " or ".join(f"`# @package {name}`" for name in sorted(needed))
            advice += f"\n{file}: its first line has to be {lines}"
    return advice
