"""The config that a command line stands for, nearly: composed with yaml alone, for which completion has the time."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from smoltrain.config.groups import LOADER, defaults, folders

Places = tuple[Path, ...]


def sketch(words: list[str]) -> dict[str, Any]:
    """The keys of the config that words stand for, with values as their files have them, unresolved and unchecked.

    Groups take their files as with Hydra. A word that is no `key=value` yet changes nothing, of several values the
    first counts, and what cannot be read is left out: somebody is still typing.
    """
    places = tuple(reversed(folders(words)))  # of one name, ours is read
    given = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word and word[0] != "-")
    if "data.path" in given and not {"data", "experiment"} & set(given):
        given["data"] = "local"
    if given.get("data", "").startswith("["):
        given |= {f"data@data.sources.{name}": name for name in re.findall(r"[\w.-]+", given["data"])}
        given["data"] = "mixture"
    chosen = choices(given, places)
    config: dict[str, Any] = {}
    for package, body in parts("config", "", chosen, places):
        merge(config, package, body)
    for key, value in given.items():
        group, _, package = key.partition("@")
        for _, body in parts(f"{group}/{value}", "", {}, places) if package else ():
            merge(config, package, body)
        if not package and key not in chosen:
            merge(config, key, value)
    return config


def choices(given: dict[str, str], places: Places) -> dict[str, str]:
    """The option of each group: the command line's, else one that a chosen file asks for, else the default.

    Where several files ask for one, the file of the later group in the defaults list wins, as with Hydra.
    """
    found = {group: option.split(",")[0] for group, option in given.items() if group in defaults()}
    for group, option in reversed(defaults().items()):
        found.setdefault(group, option or "")
        for entry in read(f"{group}/{found[group]}", places)[1]:
            if isinstance(entry, dict):
                found = {key.removeprefix("override /"): str(option) for key, option in entry.items()} | found
    return found


def parts(name: str, package: str, chosen: dict[str, str], places: Places) -> list[tuple[str, dict[str, Any]]]:
    """What a file and those that its defaults list names put into the config, in their order: where, and which keys.

    `package` is where its keys go unless its own header says otherwise.
    """
    header, entries, body = read(name, places)
    here = package if header is None else header
    found: list[tuple[str, dict[str, Any]]] = []
    for entry in entries if "_self_" in entries else [*entries, "_self_"]:
        if entry == "_self_":
            found += [(here, body)] if body else []
        elif isinstance(entry, str):  # another option of this group: base, or base@trainer
            option, _, at = entry.partition("@")
            inner = parts(str(Path(name).parent / option), here, chosen, places)
            found += [(".".join(filter(None, (here, at))), keys) for _, keys in inner] if at else inner
        else:
            for key, option in entry.items():  # an option of a group
                group = key.removeprefix("optional ")
                if group.startswith("override "):
                    continue  # `choices` has read it
                option = re.sub(r"\$\{(\w+)\}", lambda named: chosen.get(named[1], ""), str(chosen.get(group, option)))
                found += parts(f"{group}/{option}", group, chosen, places)
    return found


def merge(config: dict[str, Any], package: str, value: Any) -> None:
    """Puts a value, or the keys of a mapping, where a dotted key says."""
    if isinstance(value, dict):
        node = config
        for part in filter(None, package.split(".")):
            node[part] = node[part] if isinstance(node.get(part), dict) else {}
            node = node[part]
        for key, inner in value.items():
            merge(node, str(key), inner)
    else:
        parents, _, last = package.rpartition(".")
        if parents:
            merge(config, parents, {last: value})
        else:
            config[last] = value


@cache
def read(name: str, places: Places) -> tuple[str | None, list[Any], dict[str, Any]]:
    """Of a file: the package that its header names, its defaults list, and its keys; nothing of one that is not there.

    The package is empty for `_global_`, and None where the header names none.
    """
    for file in (folder / f"{name}.yaml" for folder in places):
        try:
            text = file.read_text()
            body = yaml.load(text, LOADER)
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(body, dict):
            header = re.search(r"^# @package (\S+)", text, re.MULTILINE)
            package = header[1].removeprefix("_global_") if header else None
            return package, body.pop("defaults", None) or [], body
    return None, [], {}
