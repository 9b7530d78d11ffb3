"""What a sweep varies: from a command line to its axes, and from a combination of values to one checked run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from smoltrain import runs
from smoltrain.config import ConfigError, plain
from smoltrain.config.compose import composed, of_run, whole
from smoltrain.config.groups import options
from smoltrain.config.overrides import quoted, read, spelled_out
from smoltrain.config.signatures import signature
from smoltrain.config.targets import allowed
from smoltrain.config.validate import lacking, mistyped, resolved, unknown
from smoltrain.history import resolve
from smoltrain.reproduce import literal
from smoltrain.sweep import GROUP, of_sweep
from smoltrain.sweep.search import Axis, Settings, axis

SETTINGS = f"{Settings.__module__}.{Settings.__name__}"


@dataclass
class Trial:
    """One run of a sweep: what is varied, the command line that it stands for, and the experiment that this is."""

    values: dict[str, Any]
    overrides: list[str]
    whole: DictConfig  # checked, with Hydra's own node

    @cached_property
    def cfg(self) -> DictConfig:
        return of_run(self.whole)

    @cached_property
    def config_hash(self) -> str:
        from smoltrain.resume import pin_parent

        parent = pin_parent(self.cfg)
        return runs.config_hash(resolved(self.cfg)[0], parent)


@dataclass
class Space:
    """A command line taken apart: what all trials share, what is varied, and how the trials are chosen."""

    flags: list[str]
    overrides: list[str]
    settings: Settings
    constants: list[str]
    axes: list[Axis]
    made: dict[str, Trial] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)  # the directories of the runs that `model.from_run` names

    @classmethod
    def of(cls, flags: list[str], overrides: list[str]) -> "Space":
        """Raises ConfigError where the preset is wrong, nothing is varied, or an axis has no value."""
        flags = [flag for flag in flags if flag not in ("-m", "--multirun")]
        chosen = settings([o for o in overrides if of_sweep(o)], flags)
        parsed: dict[str, Override | str] = {}
        for word in [f"{key}={listed(values)}" for key, values in chosen.params.items()]:
            found = read(word)
            parsed[named(found) if found else word] = found or word
        seen: set[str] = set()
        for word in [o for o in overrides if not of_sweep(o)]:  # what is typed wins over the preset
            found = read(word)
            key = named(found) if found else word
            if key in seen and any(isinstance(o, Override) and o.is_sweep_override() for o in (found, parsed[key])):
                raise ConfigError(f"{word}: {key} is given twice; name all of its values in one place")
            parsed[key] = found or word
            seen.add(key)
        varied = [o for o in parsed.values() if isinstance(o, Override) and o.is_sweep_override()]
        if strange := [o for o in varied if named(o) == "name" or named(o).startswith("hydra")]:
            raise ConfigError(f"{strange[0].input_line}: one for the whole sweep; it is no part of an experiment")
        rest = [str(o.input_line if isinstance(o, Override) else o) for o in parsed.values() if o not in varied]
        if not varied and any(map(of_sweep, overrides)):
            typed = next(filter(of_sweep, overrides))
            raise ConfigError(f"{typed}: nothing is varied; name values, seed=1,2,3 or key=interval(from,to)")
        return cls(flags, overrides, chosen, rest, [axis(override, flags) for override in varied])

    def trial(self, values: dict[str, Any]) -> Trial:
        """The run of a combination of values. Raises ConfigError for all that is wrong with it."""
        signs = {axis.key: axis.sign for axis in self.axes}
        varied = [f"{signs.get(key, '')}{key}={written(key, value)}" for key, value in values.items()]
        if " ".join(varied) not in self.made:
            overrides = spelled_out([*self.constants, *varied])
            with outside_hydra():
                cfg = whole(overrides, [*self.flags, *overrides])
            if cfg.resume not in ("auto", "never"):
                raise ConfigError(f"resume={cfg.resume}: one run goes on at a time; name it without -m")
            if cfg.pause_at is not None:
                raise ConfigError(f"pause_at={cfg.pause_at}: in a sweep, sweep=halving is what pauses")
            if cfg.model.from_run is not None:
                cfg.model.from_run = parent = self.parent(str(cfg.model.from_run))
                overrides = [o for o in overrides if o.partition("=")[0].lstrip("+") != "model.from_run"]
                overrides.append(f"model.from_run={quoted(parent)}")
            self.made[" ".join(varied)] = Trial(values, overrides, cfg)
        return self.made[" ".join(varied)]

    def parent(self, reference: str) -> str:
        """The directory of the run that `model.from_run` means, the same one for all trials and whenever they run."""
        if reference not in self.parents:
            self.parents[reference] = str(resolve(reference, completed=True).absolute())
        return self.parents[reference]

    def started_from(self, parents: dict[str, str]) -> "Space":
        """The same with these runs as what `model.from_run` means: `latest` is another one since a sweep began."""
        return self if parents == self.parents else replace(self, parents=dict(parents), made={})

    @property
    def command(self) -> list[str]:
        """What is typed after `smoltrain -m` for the same sweep to go on."""
        allow = [f"--allow={name}" for name in allowed()]
        return [*allow, *self.flags, *(o for o in self.overrides if not o.lstrip("+").startswith("resume="))]

    def typed(self, key: str) -> bool:
        """Whether a key is set for all trials, by whatever was typed or by a preset."""
        return any(constant.partition("=")[0].lstrip("+") == key for constant in self.constants)

    @property
    def first(self) -> Trial:
        """The first of all, which stands for what they share."""
        return self.trial({axis.key: axis.values[0] if axis.values else axis.low for axis in self.axes})


@contextmanager
def outside_hydra() -> Iterator[None]:
    """Lets a config be composed while Hydra runs the sweep that it is for, which knows one at a time."""
    hydra = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = hydra


def named(override: Override) -> str:
    """The key of an override, whatever sign it is typed with; what is removed is another one."""
    return override.get_key_element().lstrip("+")


def listed(values: Any) -> str:
    """The values of a key in a preset, as they are typed: a text as it is, of a list each."""
    if isinstance(values, list):
        return ",".join(map(literal, values))
    return values if isinstance(values, str) else literal(values)


def settings(overrides: list[str], flags: list[str]) -> Settings:
    """How trials are chosen: by the preset that is named, with what is typed besides."""
    chosen = [o for o in overrides if o.lstrip("+~").partition("=")[0] == GROUP]
    read_as = [(o, read(o.removeprefix("~"))) for o in chosen]
    if strange := [o for o, found in read_as if o.startswith("~") or not (found and isinstance(found._value, str))]:
        raise ConfigError(f"{strange[0]}: one way to choose trials, {GROUP}={', '.join(options(GROUP, flags))}")
    preset = chosen or [f"{GROUP}=grid"]
    typed = [f"++{o.lstrip('+')}" for o in overrides if o not in chosen]  # a key that is none gets here too
    node = plain(composed([preset[-1].lstrip("+"), *typed], flags))
    taken, values = signature(SETTINGS), node[GROUP]
    wrong = [*unknown(GROUP, values, taken, {}), *mistyped(GROUP, values, taken), *lacking(GROUP, values, taken)]
    if wrong:
        raise ConfigError("\n".join(problem.text for problem in wrong))
    return Settings(**values)


def written(key: str, value: Any) -> str:
    """A value as one types it, quoted where Hydra's grammar would read another one."""
    if isinstance(value, str):
        found = read(f"{key}={value}")
        plain_text = found is not None and not found.is_sweep_override() and found.value() == value
        return value if plain_text else quoted(value)
    return literal(value)
