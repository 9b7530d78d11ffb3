"""What people type: what a command is short for, what cannot be read, and options that are not there."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from smoltrain.config import CONF, ConfigError, Problem, closest, shown, suggest
from smoltrain.config.groups import defaults, options
from smoltrain.config.schema import KEYS

# Keys that hold paths and other texts, in which people write what Hydra's grammar gives a meaning: ~, =, <, commas.
TEXTS = {"name", "data.path", "data.test_path", "data.system_prompt"}
TEXTS |= {"model.name_or_path", "model.from_run", "model.chat_template", "model.eos_token"}


def spelled_out(overrides: list[str]) -> list[str]:
    """The overrides that a command line is short for.

    `data=[a,b]` is a mixture of two options; a `data.path=` alone is a file of one's own; `peft=null` takes back what
    an experiment chose; a path may hold what would otherwise have to be quoted, and a name may be a number.
    """
    spelled = [part for override in overrides for part in spelled_out_one(override)]
    keys = [override.partition("=")[0] for override in spelled]
    if "data.path" in keys and not {"data", "experiment"} & set(keys):
        spelled.insert(0, "data=local")
    return spelled


def spelled_out_one(override: str) -> list[str]:
    key, _, value = override.partition("=")
    parsed = read(override)
    if parsed is None:
        return [f"{key}={quoted(value)}" if key in TEXTS else override]
    if parsed.is_sweep_override() or parsed.is_delete():
        return [override]
    given = parsed.value()
    if key in TEXTS and isinstance(given, bool | int | float):
        return [f"{key}={quoted(value)}"]
    if given is None and key in defaults() and defaults()[key] is None:
        return [f"~{key}"]
    if key == "data" and isinstance(given, list):
        sources = [str(name) for name in given]
        if len(set(sources)) < len(sources):
            raise ConfigError(
                f"{override}: each source once. Files of one shape are one source, data.path=[a.jsonl,b.jsonl]; "
                "for others, write each a file in a folder of your own, my_conf/data (defaults: [local, _self_])"
            )
        return ["data=mixture", *(f"+data@data.sources.{name}={name}" for name in sources)]
    return [override]


@cache
def read(override: str) -> Override | None:
    """An override as Hydra's grammar has it; None where it is none."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def quoted(text: str) -> str:
    """A text as Hydra's grammar takes it, whatever stands in it."""
    return QuotedString(text, Quote.single).with_quotes()


def sorted_out(overrides: list[str], arguments: list[str]) -> tuple[list[str], list[str], list[Problem]]:
    """The overrides that Hydra can use; those whose first word is no key of a run; what is wrong with the others.

    In place of an option that is not there stands the one that was probably meant, so that what else was typed can be
    judged too.
    """
    usable, strangers, found = [], [], []
    for override in overrides:
        parsed = read(override)
        key = parsed.key_or_group if parsed else override.lstrip("+~").partition("=")[0]
        if parsed is None or parsed.is_sweep_override():
            found.append(Problem(key, unreadable(override)))
        elif (CONF / key).is_dir() and "/" not in key:
            option, known = parsed.value(), list(options(key, arguments))
            if parsed.is_delete() or option in known:
                usable.append(override)
                continue
            found.append(Problem(key, no_such_option(key, option, known)))
            close = closest(str(option), known)
            if close and key in ("trainer", "model"):  # of another experiment or source, nothing would be to the point
                usable.append(f"{key}={close}")
        elif key.split(".")[0] in KEYS or key.startswith("hydra"):
            usable.append(override)
        else:
            strangers.append(override)
    return usable, strangers, found


def unreadable(override: str) -> str:
    """What to write instead of something that is not key=value, or is several values where one is wanted."""
    key, _, value = override.partition("=")
    if read(override):
        return f"{override}: add -m to run each of them; a list is key=[a,b], a text with a comma key=\"'a,b'\""
    mend = f"quote the value, {key}={quoted(value)}" if value else "write key=value"
    return f"{override}: this cannot be read; {mend}"


def no_such_option(group: str, option: Any, known: list[str]) -> str:
    """An option that is not there, the one that may have been meant, and those that are."""
    close = suggest(str(option), known) or "."
    if near := elsewhere(group, str(option)):
        close = f" without --config-dir {near.parts[0]}, where {near} is."
    return f"{group}={shown(option)}: there is no such option{close} Choose one of: {', '.join(sorted(known))}"


def elsewhere(group: str, option: str) -> Path | None:
    """The file of an option that was not found, where a folder right here has one."""
    named = re.fullmatch(r"[\w.-]{1,100}", option) is not None
    return next(iter(sorted(Path().glob(f"*/{group}/{option}.yaml"))), None) if named else None
