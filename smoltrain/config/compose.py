"""From a command line to a config that has been checked whole, or to everything that is wrong with it.

It is composed once: what was checked is what runs.
"""

import copy
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from smoltrain import secrets
from smoltrain.config import CONF, ConfigError, Problem, files, plain, suggest, targets
from smoltrain.config.groups import defaults, folders, options
from smoltrain.config.origins import Setting, origins
from smoltrain.config.overrides import no_such_option, quoted, read, sorted_out
from smoltrain.config.renamed import advice
from smoltrain.config.validate import meant, problems, resolved
from smoltrain.sweep import GROUP, of_sweep

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import TaskFunction

# Hydra refuses `trainer=null` with a plain ValueError. Variables that are not there, YAML nested too deeply, and files
# that hold no keys, it does not catch.
UNCAUGHT = (KeyError, RecursionError, OSError, AttributeError, TypeError, AssertionError)
COMPOSING = (HydraException, OmegaConfBaseException, YAMLError, ValueError)


def compose(overrides: list[str], arguments: list[str]) -> DictConfig:
    """The config of a run that a command line stands for; takes what `whole` takes, and raises the same."""
    return of_run(whole(overrides, arguments))


def of_run(cfg: DictConfig) -> DictConfig:
    """A config without Hydra's own node, whose place it leaves as it is."""
    cfg = copy.deepcopy(cfg)
    with read_write(cfg), open_dict(cfg):
        del cfg["hydra"]
    return cfg


def whole(overrides: list[str], arguments: list[str]) -> DictConfig:
    """The config that a command line stands for, Hydra's own node included.

    Raises one ConfigError for all that is wrong with it. `arguments` are where folders of users are named: flags, and
    `hydra.searchpath`. An override that cannot be used is set aside, so that the rest can be composed and judged too.
    """
    usable, strangers, found = sorted_out(overrides, arguments)
    if misplaced := targets.misplaced(usable):
        raise ConfigError(told(misplaced, overrides, {}))
    found += files.overshadowed(arguments)
    if slips := files.slips(overrides, arguments):
        raise ConfigError(told(found + slips, overrides, {}))
    while True:
        try:
            cfg, refused = inspected(usable, arguments)
            break
        except COMPOSING as error:
            culprit = blamed(error, usable)
            found.append(Problem(key_of(culprit), explain(error, arguments)))
            if not culprit:
                raise ConfigError(told(found, overrides, {}) + files.headless(overrides, arguments)) from error
            usable = [override for override in usable if override != culprit]
    with open_dict(cfg):
        if cfg.pop(GROUP, None) is not None:
            typed = next((o for o in overrides if of_sweep(o)), f"{GROUP}=")
            said = f"{typed}: how trials are chosen is no part of a run; smoltrain {typed} … starts a sweep"
            found.append(Problem(GROUP, said))
    chains = origins(usable, arguments)
    run = of_run(cfg)
    found += unknown_first_words(strangers, run) + problems(run, chains, refused)
    if found:
        text = told(found, overrides, chains)
        raise ConfigError(text + files.headless(overrides, arguments), [p.key for p in found if p.missing])
    return cfg


def composed(overrides: list[str], arguments: list[str]) -> DictConfig:
    """What Hydra makes of a command line for a run, unchecked."""
    return of_run(inspected(overrides, arguments)[0])


def inspected(overrides: list[str], arguments: list[str]) -> tuple[DictConfig, list[Problem]]:
    """What Hydra makes of a command line, its own node included, and what in it may not run; no more is checked."""
    import hydra

    extra = [quoted(f"file://{folder.absolute()}") for folder in folders(arguments)[:-1]]
    searchpath = [f"hydra.searchpath=[{','.join(extra)}]"] if extra else []
    given = [override for override in overrides if key_of(override) != "hydra.searchpath"]
    hydras = [override for override in given if key_of(override).startswith(("hydra.", "hydra/"))]
    given += searchpath
    with hydra.initialize_config_dir(str(CONF), job_name="smoltrain", version_base="1.3"):
        try:
            cfg = hydra.compose("config", overrides=given, return_hydra_config=True)
        except UNCAUGHT as error:
            raise HydraException(str(error)) from error
        ours = shipped(Path.cwd(), *hydras) if extra else cfg.hydra
    refused = targets.refusals(cfg) + targets.overridden(cfg.hydra, ours, given)
    # Before anything else is said, for what is said shows values.
    secrets.refuse(secrets.leaks(plain(cfg) | {"hydra": None}))
    return cfg, refused


def run_job(cfg: DictConfig, task: "TaskFunction", directory: str, below: str | None = None) -> "JobReturn":
    """Runs a task with a checked config as Hydra runs a job; `directory` and `below` are the keys that say where."""
    from hydra._internal.callbacks import Callbacks
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra.core import utils
    from hydra.types import HydraContext

    # Of a job's context it calls back only, and whom, no config of ours can say.
    context = HydraContext(config_loader=ConfigLoaderImpl(ConfigSearchPathImpl()), callbacks=Callbacks())
    return utils.run_job(task, cfg, directory, below, context)


@cache
def shipped(folder: Path, *overrides: str) -> DictConfig:
    """Hydra's own node in a process that is in `folder`, which the node names, without any file of a user's."""
    import hydra

    return hydra.compose("config", overrides=list(overrides), return_hydra_config=True).hydra


def guard(overrides: list[str], arguments: list[str]) -> None:
    """Raises ConfigError for what may not run in a config that is only looked at, and may be wrong otherwise."""
    found = targets.misplaced(overrides)
    if not found:  # a search path that names a package would import it
        try:
            _, found = inspected(overrides, arguments)
        except COMPOSING as error:
            raise ConfigError(explain(error, arguments)) from error
    if found:
        raise ConfigError(told(found, overrides, {}))


# ---------------------------------------------------------------- what went wrong


def key_of(override: str) -> str:
    parsed = read(override)
    return parsed.key_or_group if parsed else override


def blamed(error: Exception, overrides: list[str]) -> str:
    """The override that Hydra could not use; empty where it is not one of them, but a file."""
    said = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        chosen = re.compile(rf"\+?{re.escape(group)}(@[^=]*)?=.*{re.escape(option)}")
        return next((override for override in overrides if chosen.match(override)), "")
    return next((o for o in overrides if o in said or f"'{key_of(o)}'" in said), "")


def explain(error: Exception, arguments: list[str]) -> str:
    """What was found wrong while composing (one of COMPOSING), for the person who typed it or wrote the file."""
    if lost := re.search(r"Could not (?:find|load) '((?:hydra/)?\w+)/([^'/]+)'", str(error)):
        group, option = lost.groups()
        return no_such_option(group, option, list(options(group, arguments)))
    if isinstance(error.__cause__ or error, (YAMLError, *UNCAUGHT)) and (unfit := [*files.unreadable(arguments)]):
        return "\n".join(unfit)
    cause = error.__cause__ or error
    said = f"{error} {cause}"
    lines = str(error).splitlines() or [
        f"this cannot be composed ({type(cause).__name__}); is each defaults list right?"
    ]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if "An item is already at" in first:
        return f"{quoted_in(first)}: it is there already; set it without the +"
    if no_group := re.search(r"Could not override '(([\w/]+)(?:@.*)?)'\.\s*(No match|Did you mean)", said):
        close = suggest(no_group[2], defaults()) or "."
        return f"{no_group[1]}: there is no such group{close} Groups: {', '.join(defaults())}"
    if stray := re.search(r"Could not override '(hydra\.launcher\.\w+)'(?s:.*)is not in struct", said):
        return f"{stray[1]}: this launcher takes no such key; --cfg hydra --package hydra.launcher shows those it takes"
    if inside := re.search(r"Could not override '([\w.]+)\.\w+'|full_key: ([\w.]+)", said):
        return f"{inside[1] or inside[2]} is a value and has no keys of its own"
    if "Could not delete" in first:
        return f"~{quoted_in(first)}: there is nothing of that name to remove"
    detail = str(cause).splitlines()[0] if str(cause) else ""
    return first if first.startswith(detail) else f"{first}: {detail}"


def quoted_in(message: str) -> str:
    return message.split("'")[1]


def unknown_first_words(overrides: list[str], cfg: DictConfig) -> list[Problem]:
    values, _ = resolved(cfg)
    found = []
    for override in overrides:
        key, value = key_of(override), override.partition("=")[2]
        if instead := advice(key, value):
            found.append(Problem(key, f"{override.lstrip('+~')} is not a key of a run; {instead}"))
            continue
        group = key.split(".")[0]
        mend = meant(key, values)
        if group in defaults() and not mend.startswith("; did you mean"):
            mend = f": {group} is a group, {group}={' or '.join(options(group, []))} chooses a file of it"
        found.append(Problem(key, f"{override.lstrip('+~')} is not a key of a run{mend}"))
    return found


def told(found: list[Problem], overrides: list[str], chains: dict[str, list[Setting]]) -> str:
    """Each problem on a line of its own, and where its value was set: the command line, or the line of a file."""
    typed = {key_of(override) for override in overrides}
    typed |= {override.partition("=")[0].lstrip("+~") for override in overrides}
    lines = []
    for problem in found:
        chain = chains.get(problem.key) or nearby(problem.key, chains)
        if problem.key in typed:
            where = "  (command line)"
        elif chain and not problem.missing:
            where = f"  ({'command line' if chain[-1].typed else chain[-1].where})"
        else:
            where = ""
        lines.append("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in problem.text) + where)
    return "\n".join(dict.fromkeys(lines))


def nearby(key: str, chains: dict[str, list[Setting]]) -> list[Setting] | None:
    """The chain of the first leaf below a key, else of the nearest value above it."""
    below = next((chain for leaf, chain in chains.items() if leaf.startswith(f"{key}.")), None)
    parts = key.split(".")
    above = [found for n in range(len(parts) - 1, 0, -1) if (found := chains.get(".".join(parts[:n])))]
    return below or (above[0] if above else None)
