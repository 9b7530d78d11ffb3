"""What a sweep varies: from a command line to its axes, and from a combination of values to one checked run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from smoltrain import runs
from smoltrain.config import ConfigError, plain
from smoltrain.config.compose import composed, of_run, whole
from smoltrain.config.overrides import quoted, read, spelled_out
from smoltrain.config.signatures import signature
from smoltrain.config.validate import lacking, mistyped, resolved, unknown
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

    @classmethod
    def of(cls, flags: list[str], overrides: list[str]) -> "Space":
        """Raises ConfigError where the preset is wrong, nothing is varied, or an axis has no value."""
        flags = [flag for flag in flags if flag not in ("-m", "--multirun")]
        chosen = settings([o for o in overrides if of_sweep(o)], flags)
        words = [f"{k}={values if isinstance(values, str) else literal(values)}" for k, values in chosen.params.items()]
        words += [o for o in overrides if not of_sweep(o)]
        parsed: dict[str, Override | str] = {}
        for word in words:  # what is typed wins over the preset
            found = read(word)
            parsed[found.get_key_element() if found else word] = found or word
        varied = [o for o in parsed.values() if isinstance(o, Override) and o.is_sweep_override()]
        rest = [str(o.input_line if isinstance(o, Override) else o) for o in parsed.values() if o not in varied]
        if not varied and any(map(of_sweep, overrides)):
            typed = next(filter(of_sweep, overrides))
            raise ConfigError(f"{typed}: nothing is varied; name values, seed=1,2,3 or key=interval(from,to)")
        return cls(flags, overrides, chosen, rest, [axis(override, flags) for override in varied])

    def trial(self, values: dict[str, Any]) -> Trial:
        """The run of a combination of values. Raises ConfigError for all that is wrong with it."""
        varied = [f"{key}={written(key, value)}" for key, value in values.items()]
        if " ".join(varied) not in self.made:
            overrides = spelled_out([*self.constants, *varied])
            with outside_hydra():
                trial = Trial(values, overrides, whole(overrides, [*self.flags, *overrides]))
            if trial.cfg.resume not in ("auto", "never"):
                raise ConfigError(f"resume={trial.cfg.resume}: one run goes on at a time; name it without -m")
            self.made[" ".join(varied)] = trial
        return self.made[" ".join(varied)]

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


def settings(overrides: list[str], flags: list[str]) -> Settings:
    """How trials are chosen: by the preset that is named, with what is typed besides."""
    preset = [o for o in overrides if o.lstrip("+").startswith(f"{GROUP}=")] or [f"{GROUP}=grid"]
    typed = [
        f"++{o.lstrip('+')}" for o in overrides if o not in preset
    ]  # so that a key that there is not, gets here too
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
