"""The interactive launcher: questions whose answers are overrides, the command they stand for, then that command.

Nothing here imports torch: the questions come at once, and only a run that was confirmed loads anything heavy.
"""

import argparse
import json
import re
import shlex
from collections.abc import Callable
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.prompt import Confirm, Prompt
from rich.text import Text

from smoltrain import runs
from smoltrain.config import ConfigError, plain, suggest
from smoltrain.config.compose import compose
from smoltrain.config.groups import defaults, options
from smoltrain.config.overrides import quoted
from smoltrain.config.signatures import signature
from smoltrain.config.targets import allowed
from smoltrain.history import completed
from smoltrain.report import outcome

TRAINER_TYPE = "trainer type"  # as the list of training parameters calls it
PARENTS = 9  # completed runs to start from, at most: those before them have names


def launch(arguments: list[str], start: Callable[[list[str]], int]) -> int:
    """Asks, shows, confirms, starts. Returns the run's exit code; 0 after a no; 1 where the answers end early."""
    launcher = Launcher(flags(arguments))
    try:
        launcher.converse()
        if not launcher.confirm():
            launcher.say("Nothing was started.")
            return 0
    except (EOFError, KeyboardInterrupt):
        launcher.say("\nStopped before the last question was answered; nothing was started.")
        return 1
    return start([*launcher.flags, *launcher.overrides])


def flags(arguments: list[str]) -> list[str]:
    """The flags that the launcher takes, which the run is started with too. Any other ends the process."""
    parser = argparse.ArgumentParser("smoltrain launch", add_help=False)  # `usage` has its screen
    parser.add_argument("--config-dir", "-cd", metavar="FOLDER")
    folder = parser.parse_args(arguments).config_dir
    if folder is None:
        return []
    return ["--config-dir", folder]


class Launcher:
    """A conversation that ends in a list of overrides, each of which the config has accepted."""

    def __init__(self, flags: list[str]):
        self.flags = flags
        # What users and their files say is shown as it is, never read as rich's markup, and a command stays one line.
        self.console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
        self.choices: dict[str, str] = {}  # group or key -> value in Hydra's grammar, in the order asked

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.choices.items()]

    @property
    def config(self) -> DictConfig:
        return composed(tuple(self.overrides), tuple(self.flags))

    @property
    def command(self) -> str:
        return shlex.join(["smoltrain", *(f"--allow={name}" for name in allowed()), *self.flags, *self.overrides])

    # ------------------------------------------------------------ the questions

    def converse(self) -> None:
        self.choose("Step 1: Experiment", "experiment", "none, choose the parts")
        self.choose("Step 2: Model", "model", self.otherwise("model"))
        self.choose_parent()
        self.choose("Step 3: Data", "data", self.otherwise("data"))
        self.choose_trainer()
        self.choose("Step 4: Hardware", "hardware", self.otherwise("hardware"))
        self.choose("Step 5: Adapter", "peft", self.otherwise("peft"))
        self.choose("Step 6: Tracking", "tracking", self.otherwise("tracking"))
        self.choose_name()
        self.change_parameters()
        self.summarize()

    def choose(self, step: str, group: str, otherwise: str) -> None:
        """One option of a group; an empty line adds no override and so takes what `otherwise` describes."""
        found = options(group, self.flags)
        self.heading(step)
        self.menu([f"{option:24} {text}".rstrip() for option, text in found.items()])
        while answer := self.ask(f"{group.capitalize()} (number or name; Enter: {otherwise})"):
            if self.take(group, answer, list(found)):
                return

    def choose_parent(self) -> None:
        """A finished run of the chosen model to start from; not asked as long as there is none."""
        model = self.config.model
        ended = [(str(directory), runs.read(directory)) for directory in completed()]
        same = [(path, outcome(record)) for path, record in ended if record["model"] == model.name_or_path]
        found = dict(same[:PARENTS])
        if not found:
            return
        self.heading("Step 2.5: Starting Point")
        self.say("Completed runs of this model:")
        self.menu([f"{path}  {text}" for path, text in found.items()])
        while answer := self.ask(f"Start from (number or directory; Enter: {model.from_run or 'no run'})"):
            if self.take("model.from_run", answer, list(found)):
                return

    def choose_trainer(self) -> None:
        """The one question without a default: what kind of training this is must be said."""
        found = options("trainer", self.flags)
        self.heading("Step 3.5: Trainer Type Selection", 36)
        self.say("Select the type of training to perform:")
        self.menu([text or option for option, text in found.items()])
        while not self.take("trainer", self.ask(f"Trainer type (1-{len(found)})"), list(found)):
            pass

    def choose_name(self) -> None:
        self.heading("Step 7: Name")
        while answer := self.ask(f"Name of the run, its folder in multirun (Enter: {self.config.name})"):
            if self.accept("name", as_override(answer, text=True)):
                return

    def change_parameters(self) -> None:
        """Shows every training parameter of the resolved config and lets each be changed, until an empty line."""
        names = self.show_parameters()
        while answer := self.ask("Change which (number, name, or name=value; Enter: none)"):
            which, _, value = (part.strip() for part in answer.partition("="))
            name = pick(which, names) or which.removeprefix("trainer.args.")
            changed = self.change_trainer(value) if name in (TRAINER_TYPE, "trainer") else self.change(name, value)
            if changed:  # what is refused stays in sight: the list is longer than a small terminal
                names = self.show_parameters()

    def show_parameters(self) -> list[str]:
        shown = {TRAINER_TYPE: self.choices["trainer"], **parameters(self.config.trainer.args)}
        self.heading("Step 8: Training Parameters")
        if "experiment" in self.choices:
            self.say(f"What you have not changed is as the experiment {self.choices['experiment']} has it.\n")
        self.menu([f"{name:30} {value}" for name, value in shown.items()])
        return list(shown)

    def change_trainer(self, answer: str) -> bool:
        """Another trainer keeps the parameters that were changed, less those that it does not have."""
        changed = {key: value for key, value in self.choices.items() if key.startswith("trainer.")}
        self.choices = {key: value for key, value in self.choices.items() if key not in changed}
        if not (answer and self.take("trainer", answer, list(options("trainer", self.flags)))):
            self.choose_trainer()
        for key, value in changed.items():
            if key not in self.choices:
                self.accept(key, value)
        return True

    def change(self, name: str, value: str) -> bool:
        """Sets a field of `trainer.args`, whether or not the config has set it yet; asks for a value not yet given."""
        args = self.config.trainer.args
        known = {*parameters(args), *signature(args._target_).parameters}
        if name not in known:
            self.say(f"{name} is neither a number of the list nor a field of {args._target_}{suggest(name, known)}")
            return False
        value = value or self.ask(f"New value of {name} (Enter: leave it)")
        return bool(value) and self.accept(home(args, name), as_override(value))

    def summarize(self) -> None:
        cfg = self.config
        built = {"data": call(cfg.data), "trainer": cfg.trainer._target_, "model": call(cfg.model)}
        self.heading("Step 9: Configuration Summary")
        rows = {g: f"{self.choices.get(g, self.otherwise(g)):24} {built.get(g, '')}".rstrip() for g in defaults()}
        rows |= {key: value for key, value in self.choices.items() if key not in rows}
        rows["name"] = cfg.name
        for key, value in rows.items():
            self.say(f"{key:{max(map(len, rows))}}  {value}")
        self.say("\nThe command that this stands for:\n")
        self.say(f"{self.command}\n", "bold")

    def confirm(self) -> bool:
        question = Text("Start this run? [y/N]")
        return Confirm.ask(question, console=self.console, default=False, show_choices=False, show_default=False)

    # ------------------------------------------------------------ what they are made of

    def say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style)

    def heading(self, title: str, width: int = 0) -> None:
        self.say(f"\n{title}\n{'=' * (width or len(title))}\n", "bold")

    def menu(self, lines: list[str]) -> None:
        for number, line in enumerate(lines, 1):
            self.say(f"{number:{len(str(len(lines)))}}. {line}")
        self.say("")

    def ask(self, question: str) -> str:
        """One line, stripped. Raises EOFError where the input ends."""
        while True:
            answer = Prompt.ask(Text(question), console=self.console, default="", show_default=False).strip()
            if answer.isprintable():
                return answer
            self.say("That has characters that cannot be shown, an arrow key's perhaps; please type it again.")

    def otherwise(self, group: str) -> str:
        """What a group is when no option of it was chosen, in words."""
        if "experiment" in self.choices:
            return "the experiment's"
        return "what the trainer needs" if group == "data" else defaults()[group] or "none"

    def take(self, group: str, answer: str, names: list[str]) -> bool:
        """Chooses the option of a group that an answer means, or says why that cannot be."""
        option = pick(answer, names)
        if option is None:
            self.say(f"Please answer with a number from 1 to {len(names)}, or with a name: {', '.join(names)}.")
            return False
        return self.accept(group, as_override(option, text=True))

    def accept(self, key: str, value: str) -> bool:
        """Adds an override and asks for the values that it leaves open, or says why it is refused and adds nothing."""
        before = dict(self.choices)
        self.choices[key] = value
        try:
            while needed := self.open_key():
                answer = self.ask(f"{needed} is still needed (Enter: choose again)")
                if not answer:
                    break
                self.choices[needed] = as_override(answer)
            else:
                return True
        except ConfigError as error:
            self.say(str(error))
        self.choices = before
        return False

    def open_key(self) -> str | None:
        """A key that still has no value. Raises ConfigError where the choices make no config for another reason."""
        try:
            composed(tuple(self.overrides), tuple(self.flags))
        except ConfigError as error:
            if error.missing:
                return error.missing[0]
            raise
        return None


@cache
def composed(overrides: tuple[str, ...], flags: tuple[str, ...]) -> DictConfig:
    return compose(list(overrides), list(flags))


def pick(answer: str, names: list[str]) -> str | None:
    """The name that an answer means, by its number from 1 on or in full; None where it means none."""
    numbered = {str(number): name for number, name in enumerate(names, 1)}
    return numbered.get(answer, answer if answer in names else None)


def as_override(typed: str, text: bool = False) -> str:
    """The override value that means what was typed, in quotes where Hydra's grammar would refuse or change it.

    Numbers, true, null, lists, quoted texts are what they are to Hydra, unless only a text is wanted.
    """
    try:
        override = OverridesParser.create().parse_override(f"key={typed}")
    except HydraException:
        return quoted(typed)
    if override.is_sweep_override():  # one run is asked for: `a,b` is a text with a comma
        return quoted(typed)
    read = override.value()
    special = not isinstance(read, str) or typed[0] in "'\""
    return typed if read == typed or (special and not text) else quoted(typed)


def parameters(node: DictConfig) -> dict[str, str]:
    """The fields of a node, resolved, as one would type them, less those that only a started run knows."""
    names = [n for n, value in plain(node).items() if n[0] != "_" and not str(value).startswith("${hydra:")]
    return {name: as_typed(node[name]) for name in names}


def as_typed(value: Any) -> str:
    read = plain(value, resolve=True) if OmegaConf.is_config(value) else value
    return read if isinstance(read, str) else json.dumps(read, default=str)


def home(args: DictConfig, name: str) -> str:
    """The key that a field of `trainer.args` takes its value from: itself, or where `${…}` points, as `seed` does."""
    pointer = re.fullmatch(r"\$\{(\w[\w.]*)\}", str(plain(args).get(name)))
    return pointer[1] if pointer else f"trainer.args.{name}"


def call(node: DictConfig) -> str:
    """What a node of the config builds: `target(key=value, …)`, less what is null."""
    given = ", ".join(f"{key}={value}" for key, value in parameters(node).items() if value != "null")
    return f"{node._target_}({given})"
