"""Config groups and their options: ours, and those of the folders that a command line names."""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import yaml

from smoltrain.config import BASE, CONF, ConfigError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times as fast, where libyaml is there


def folders(arguments: list[str]) -> list[Path]:
    """Where a command line looks for YAML: its `--config-dir`, its `hydra.searchpath`, then the packaged files."""
    given = []
    for argument, following in pairwise([*arguments, ""]):
        flag, _, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            if not Path(value or following).is_dir():
                raise ConfigError(f"--config-dir {value or following}: there is no such folder")
            given.append(value or following)
        elif flag == "hydra.searchpath":
            given += [entry.strip().removeprefix("file://") for entry in value.strip("[]").split(",")]
    return [*map(Path, given), CONF]


def naming(own: list[str]) -> list[str]:
    """The part of a command line that names folders of users, which `folders` finds in it again."""
    if len(own) > 1:
        return [f"hydra.searchpath=[{','.join(own)}]"]
    return ["--config-dir", *own] if own else []


def options(group: str, arguments: list[str]) -> dict[str, str]:
    """The options of a config group and their descriptions, the default one first, users' own files included."""
    found: dict[str, str] = {}
    for folder in reversed(folders(arguments)):
        for file in sorted((folder / group).glob("*.yaml")):
            if file.stem != BASE:
                found.setdefault(file.stem, description(file))
    return dict(sorted(found.items(), key=lambda item: item[0] != defaults().get(group)))


def description(file: Path) -> str:
    """The first comment of a YAML file that is not an instruction to Hydra."""
    comments = (line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#"))
    return next((text for text in comments if text and not text.startswith("@")), "")


@cache
def defaults() -> dict[str, str | None]:
    """Each group that people choose from, and the option that a run takes when nothing is said."""
    listed = yaml.load((CONF / "config.yaml").read_text(), LOADER)["defaults"]
    chosen = {group: option for entry in listed if isinstance(entry, dict) for group, option in entry.items()}
    return {group: option for group, option in chosen.items() if " " not in group}


def package(file: Path) -> str:
    """Where in the config the keys of a file go, as its first line `# @package …` says; empty where it does not.

    Read as Hydra does, which passes over a header that stands below anything else, or is spelt otherwise.
    """
    for line in filter(None, map(str.strip, file.read_text(errors="replace").splitlines())):
        if not re.match(r"#\s*@", line):
            return ""
        if found := re.fullmatch(r"#+\s*@package +(\S+)", line):
            return found[1]
    return ""
