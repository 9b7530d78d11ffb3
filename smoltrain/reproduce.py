"""The verb `reproduce`: makes a run again from its record, and says whether the same came out."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from smoltrain import runs
from smoltrain.config import ConfigError, leaves, shown
from smoltrain.config.compose import compose
from smoltrain.config.groups import naming
from smoltrain.config.overrides import quoted
from smoltrain.config.resolvers import stamp
from smoltrain.config.schema import SCHEMA
from smoltrain.config.validate import resolved
from smoltrain.history import opened, resolve

AS_IT_WAS = ("trainer.args.output_dir", "resume", "resume_changes")  # of the record's config, what another run has anew


def reproduce(arguments: list[str], start: Callable[[list[str]], int]) -> int:
    """Runs a recorded run again and compares: 0 where metrics and weights are equal, 1 where they are not.

    `start` runs a command line. Raises ConfigError where there is no such run, or no way to its config.
    """
    flags, names = [a for a in arguments if a.startswith("-")], [a for a in arguments if not a.startswith("-")]
    if len(names) != 1 or flags:
        raise ConfigError("smoltrain reproduce takes one run: its directory, name, stamp, or latest")
    directory = resolve(names[0], completed=True)
    record = opened(directory).record
    if lost := [key for key in ("config", "config_dirs", "overrides", "name") if key not in record]:
        raise ConfigError(f"{directory}: its record does not say with what it ran ({', '.join(lost)} missing)")
    if changed := [again["step"] for again in record["resumed"] if again["config_hash"] != record["config_hash"]]:
        raise ConfigError(f"{directory}: it went on with another config after step {max(changed)}; no one command does")
    command = [*naming(record["config_dirs"]), *record["overrides"]]
    again = runs.ROOT / record["name"] / stamp()
    code = start([*command, *mended(record, command), "resume=never", f"hydra.run.dir={quoted(str(again))}"])
    if not (again / "run.json").is_file():
        return code
    return compare(directory, again)


def mended(record: dict[str, Any], command: list[str]) -> list[str]:
    """The overrides that a recorded command needs today to mean what it meant then."""
    overrides = [argument for argument in command if "=" in argument and not argument.startswith("-")]
    now = dict(leaves(resolved(compose(overrides, command))[0]))
    then = {key: value for key, value in leaves(record["config"]) if key not in AS_IT_WAS}
    then |= {key: choice["value"] for key, choice in record.get("perf", {}).items()}
    changed = {key: value for key, value in then.items() if now.get(key, MISSING) != value}
    new = [key for key in now if not (key in then or key in AS_IT_WAS or key.partition(".")[0] in SCHEMA)]
    for key, value in changed.items():
        print(f"{key}={shown(value)}, as it was: today it would be {shown(now.get(key))}", file=sys.stderr)
    return [*(f"++{key}={literal(value)}" for key, value in changed.items()), *(f"~{key}" for key in new)]


MISSING = object()


def literal(value: Any) -> str:
    """A value as Hydra's grammar takes it."""
    if isinstance(value, dict):
        keys = (re.sub(r"([^\w.$/%+*@?|-])", r"\\\1", str(key)) for key in value)  # which it takes in no quotes
        return "{" + ",".join(f"{key}:{literal(inner)}" for key, inner in zip(keys, value.values(), strict=True)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return quoted(value) if isinstance(value, str) else json.dumps(value)


def compare(then: Path, now: Path) -> int:
    """Prints what differs between a run and its repetition; 0 where metrics and weights are bit-equal."""
    before, after = runs.read(then), runs.read(now)
    for section in ("versions", "hardware", "fingerprints", "git"):
        for name, value in (before.get(section) or {}).items():
            if (other := (after.get(section) or {}).get(name)) != value:
                print(f"{section} {name}: {shown(other)} now, {shown(value)} then", file=sys.stderr)
    rows = [*differing(measured(then), measured(now))]
    one, other = weights(then), weights(now)
    files = [name for name in one | other if one.get(name) != other.get(name)]
    print(f"metrics  {'equal' if not rows else rows[0]}")
    if not one:
        print(f"weights  cannot be compared: {then / 'model'} has none")
    else:
        print(f"weights  {'equal' if not files else f'differ in {len(files)} of {len(one | other)} files'}")
    if before["status"] != after["status"]:
        print(f"status   {after['status']} now, {before['status']} then")
    return int(bool(rows or files or not one or before["status"] != after["status"]))


def measured(directory: Path) -> list[dict[str, Any]]:
    """The metrics of a run, less what a clock measured."""
    rows = runs.read_metrics(directory)
    return [{name: value for name, value in row.items() if not name.endswith(runs.CLOCK)} for row in rows]


def differing(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[str]:
    for one, other in zip(then, now, strict=False):
        for name in one.keys() | other.keys():
            if one.get(name) != other.get(name):
                yield f"differ from step {one['step']} on: {name} is {other.get(name)} now and was {one.get(name)}"
    if len(then) != len(now):
        yield f"are {len(now)} lines now and were {len(then)}"


def weights(directory: Path) -> dict[str, str]:
    """The digest of each file of weights of a final model."""
    from smoltrain.checkpoints import digest

    return {file.name: digest(file) for file in sorted((directory / "model").glob("*.safetensors"))}
