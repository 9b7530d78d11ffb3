"""The command `smoltrain`: finds the verb, runs it, and turns how it ended into an exit code.

Imports nothing heavy: help, `--cfg job`, completion and config errors answer in half a second.
"""

import contextlib
import gc
import io
import json
import math
import os
import re
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from smoltrain.config import (
    BASE,
    COMPOSING,
    CONF,
    ConfigError,
    compose,
    defaults,
    explain,
    options,
    register,
    spelled_out,
    stamp,
    suggest,
)
from smoltrain.runs import Diverged, Interrupted, discard

USAGE = """\
smoltrain: post-train small language models. What you ask for is what runs.

  smoltrain [group=option …] [key=value …]     train, once
  smoltrain -m key=value,value …               train once for each combination
  smoltrain check [overrides]                  what a run would learn from and cost, before it starts
  smoltrain launch                             choose interactively; prints the command it stands for
  smoltrain dashboard                          look at the curves of all runs
  smoltrain --cfg job [overrides]              print the config that would run, and run nothing
"""

CHECK = """\
smoltrain check [overrides]: what a run would learn from and cost, before it starts

  Reads, renders and tokenises every row as the run would, takes one step, and prints what it found.
  The overrides are those of the run: smoltrain check trainer=dpo data.path=my.jsonl

  --json FILE          writes all of it as JSON; with - to the standard output, where nothing else is printed then
  --strict             exit code 1 where there are warnings
  --config-dir FOLDER  YAML files of your own, as in a run
  check.step=true      takes one real step on the longest batch, without learning from it; by default where the model
                       is on this disk. false takes none, and leaves the time out

Exit codes: 0 ready, 1 warnings and --strict, 2 errors: what would stop the run.
Every run begins with the part of this that is cheap.
"""

EXAMPLES = """\
Examples
  smoltrain                                            SFT on the embedded model and data
  smoltrain trainer=dpo model.from_run=latest          DPO from the last run
  smoltrain trainer.args.learning_rate=5e-4 seed=1     any field of the trainer's config class
  smoltrain -m trainer=sft,dpo seed=1,2                four runs
  smoltrain --config-dir my_conf experiment=mine       with YAML files of your own

Completion for bash: eval "$(smoltrain -sc install=bash)"      All of Hydra's flags: smoltrain --hydra-help
"""

# No telemetry; libraries' own bars only where someone looks, for what takes over a second, and gone when done.
# What datasets logs as an error it raises too, and an error is said once.
MANNERS = {"HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DELAY": "1", "TQDM_LEAVE": "", "DATASETS_VERBOSITY": "critical"}
if not sys.stderr.isatty():
    MANNERS["TQDM_DISABLE"] = "1"
# Hydra's flags that are followed by a value.
VALUED = {
    "--json",
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--cfg",
    "-c",
    "--package",
    "-p",
}

# Flags with which nothing is run, or something else than the config of that name.
LOOKING = {"--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--hydra-help"}
LOOKING |= {"--config-name", "-cn", "--config-path", "-cp", "--experimental-rerun"}
VERBS = ("train", "check", "launch", "dashboard")


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    0 completed, 1 failed, 2 refused before training, 3 diverged, 143 preempted.
    """
    arguments = sys.argv[1:] if argv is None else argv
    register()
    stamp.cache_clear()
    for name, value in MANNERS.items():
        os.environ.setdefault(name, value)
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("train", [])
    try:
        if verb == "launch":
            from smoltrain.launch import launch

            return launch(rest, start=train)
        if verb == "dashboard":
            from smoltrain.tracking import dashboard

            if rest:
                raise ConfigError(f"smoltrain dashboard takes no arguments, not {' '.join(rest)}")
            with contextlib.suppress(KeyboardInterrupt):
                dashboard()
            return 0
        if {"-h", "--help"} & set(arguments):
            return print_help(arguments) if verb != "check" else print(CHECK, end="") or 0
        if "--version" in arguments:
            print(f"smoltrain {metadata.version('smoltrain')}")
            return 0
        if {"-sc", "--shell-completion"} & set(arguments):
            return complete(arguments)
        if verb.isidentifier() and verb not in VERBS:
            raise ConfigError(
                f"{verb}: there is no such verb{suggest(verb, VERBS) or '.'} Verbs are {', '.join(VERBS)}"
            )
        if verb == "check":
            return check(rest)
        return train(rest if verb == "train" else arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 143
    except BrokenPipeError:
        return 1


def check(arguments: list[str]) -> int:
    """What can be known of a run before it starts: 0, 2 for errors, 1 for warnings with `--strict`.

    `--json FILE` writes all of it, errors of the config too; to the standard output, for `-`, and nothing else there.
    """
    flags, overrides = split(arguments)
    strict, json_file, hydra = False, None, []
    remaining = iter(flags)
    for flag in remaining:
        name, _, value = flag.partition("=")
        if name == "--strict":
            strict = True
        elif name == "--json":
            json_file = value or next(remaining, None)
            if json_file is None:
                raise ConfigError("--json: name the file to write, or - for the standard output")
            if json_file != "-" and not Path(json_file).absolute().parent.is_dir():
                raise ConfigError(f"--json {json_file}: there is no such folder")
        elif name in ("--config-dir", "-cd"):
            hydra += [flag] if value else [flag, next(remaining, "")]
        else:
            raise ConfigError(f"smoltrain check takes no {flag}; its flags are --json, --strict and --config-dir")
    try:
        cfg = compose(overrides, [*hydra, *overrides])
        from smoltrain.check import check as known

        facts = known(cfg, strict, quiet=json_file == "-")
    except ConfigError as error:
        print(error, file=sys.stderr)
        facts = {"warnings": [], "errors": [str(error)]}
    if json_file:
        text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
        sys.stdout.write(text) if json_file == "-" else Path(json_file).write_text(text)
    return 2 if facts["errors"] else int(strict and bool(facts["warnings"]))


def train(arguments: list[str]) -> int:
    """Hydra composes, then `smoltrain.train.main` runs: once, or with -m once for each combination."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    own = os.getpid()

    def interrupt(number: int, frame: Any) -> None:
        if os.getpid() != own:  # a worker that prepares rows, forked from here: nobody awaits its exception
            os._exit(128 + number)
        raise Interrupted(f"interrupted by {signal.Signals(number).name}")

    # SIGTERM ends a run as Ctrl+C does: the record says preempted, the exit code is 143.
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a shell's background jobs have it
            signal.signal(number, interrupt)
    exits = []

    def task(cfg):
        from smoltrain.report import ending
        from smoltrain.train import main

        exits.append(1)  # any other exception ends the process, after the rest of the sweep
        directory = Path(HydraConfig.get().runtime.output_dir)
        untouched = not (directory / "run.json").exists()
        try:
            objective = main(cfg)
        except ConfigError as error:
            print(error, file=sys.stderr)
            exits[-1] = 2
            if untouched:
                discard(directory)
            return math.inf
        except Diverged as error:
            print(f"{error}\n{ending(directory)}", file=sys.stderr)
            exits[-1] = 3
            return math.inf
        except BaseException:
            if (directory / "run.json").exists():
                print(ending(directory), file=sys.stderr)
            raise
        finally:
            gc.collect()  # a sweep's next run finds the memory free
        exits[-1] = 0
        return objective

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting
    flags, overrides = split(arguments)
    try:
        if not any(flag.split("=")[0] in LOOKING for flag in flags):
            check_every_run(overrides, flags)
        if {"-m", "--multirun"} & set(flags):
            overrides += label_by_what_varies(overrides)
        sys.argv = ["smoltrain", *flags, *overrides]
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    except ConfigError:
        raise
    except COMPOSING as error:
        if 1 in exits:  # not composing, but from within a run
            raise
        raise ConfigError(explain(error)) from error
    except OSError as error:
        if 1 in exits:
            raise
        raise ConfigError(f"cannot write the run's directory: {error}") from error
    return max(exits, default=0)


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The flags, each with its value, in one place, as argparse wants them; and the overrides, spelled out."""
    flags: list[str] = []
    overrides: list[str] = []
    valued = False
    for argument in arguments:
        if not (valued or argument.startswith(("-", "~")) or "=" in argument):
            raise ConfigError(stray(argument))
        (flags if valued or argument.startswith("-") else overrides).append(argument)
        valued = argument in VALUED
    return flags, spelled_out(overrides)


def stray(argument: str) -> str:
    """What somebody may have meant by an argument that is neither a flag nor key=value."""
    if argument in VERBS:
        return f"{argument}: a verb comes first, smoltrain {argument} …"
    mend = (
        f"did you mean data.path={argument}?" if Path(argument).suffix or Path(argument).exists() else "write key=value"
    )
    return f"{argument}: not an override; {mend}"


def check_every_run(overrides: list[str], flags: list[str]) -> None:
    """Composes and checks the run, or every combination of a grid, before anything starts or is written anywhere."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if any(override.startswith("hydra/sweeper") for override in overrides):
        return  # another sweeper chooses its values on the way
    grid = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
    for batch in grid if {"-m", "--multirun"} & set(flags) else [[overrides]]:
        for run in batch:
            compose([o for o in run if not o.startswith("hydra.")], [*flags, *overrides])


def label_by_what_varies(overrides: list[str]) -> list[str]:
    """The override that keeps what all runs of a sweep share out of the names of their directories."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(overrides)
    shared = [f"'{o.key_or_group}'" for o in parsed if not o.is_sweep_override() and o.key_or_group]
    return [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(shared)}]"] if shared else []


def print_help(arguments: list[str]) -> int:
    """One screen: the verbs, each group with its options and what they are, examples."""
    print(USAGE)
    for group in defaults():
        print(group)
        for option, text in options(group, arguments).items():
            print(f"  {option:24}{text}")
    print("\n" + EXAMPLES, end="")
    return 0


def complete(arguments: list[str]) -> int:
    """Prints what Hydra has for the shell, less the parts of each group that are not options."""
    with contextlib.redirect_stdout(io.StringIO()) as hydras:
        code = train(arguments)
    print(re.sub(rf"\S+={BASE}(\s|$)", "", hydras.getvalue()), end="")
    return code


if __name__ == "__main__":
    sys.exit(main())
