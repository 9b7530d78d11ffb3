"""The command `smoltrain`: finds the verb, runs it, and turns how it ended into an exit code.

Imports nothing heavy: help, `--cfg job`, completion and config errors answer in half a second.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from smoltrain.config import CONF, ConfigError, suggest
from smoltrain.usage import VERBS, overview

if TYPE_CHECKING:
    from hydra.types import TaskFunction
    from omegaconf import DictConfig

# No telemetry, no code of the hub; libraries' own bars only where someone looks, for what takes over a second, and gone
# when done. What datasets logs as an error it raises too, and an error is said once.
MANNERS = {"HF_HUB_DISABLE_TELEMETRY": "1", "USE_HUB_KERNELS": "NO", "DATASETS_VERBOSITY": "critical"}
MANNERS |= {"TQDM_DELAY": "1", "TQDM_LEAVE": ""}
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
    "--experimental-rerun",
    "--cfg",
    "-c",
    "--package",
    "-p",
}

FLAGS = {
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--hydra-help",
    "--config-dir",
    "-cd",
    "--multirun",
    "-m",
    "--run",
    "-r",
    "--resolve",
    "--package",
    "-p",
}
LOOKING = {"--cfg", "-c", "--info", "-i", "--hydra-help"}  # those with which nothing is run
# Flags of Hydra that would compose another config than ours, or unpickle one, and what to write instead.
NOT_OURS = {
    "--config-path": "a run is composed from smoltrain's conf; --config-dir adds a folder of your own beside it",
    "--config-name": "a run is composed from config.yaml; a named set of changes to it is an experiment, experiment=…",
    "--experimental-rerun": "it would unpickle a file; a run's report.md has the command that repeats it",
    "--allow": "name what to allow, --allow my_package",
}
NOT_OURS |= {"-cp": NOT_OURS["--config-path"], "-cn": NOT_OURS["--config-name"]}


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    0 completed, 1 failed, 2 refused before training, 3 diverged, 143 preempted.
    """
    arguments = sys.argv[1:] if argv is None else argv
    words = arguments[: arguments.index("--")] if "--" in arguments else arguments  # after it, another command's: Tab's
    verb, rest = (arguments[0], arguments[1:]) if arguments and arguments[0].isidentifier() else ("train", arguments)
    try:
        if verb not in VERBS:
            close = suggest(verb, VERBS) or "."
            raise ConfigError(f"{verb}: there is no such verb{close} Verbs are {', '.join(VERBS)}")
        if {"-sc", "--shell-completion"} & {word.partition("=")[0] for word in words}:
            raise ConfigError("-sc: completion is not Hydra's here; smoltrain completion installs it")
        if {"-h", "--help"} & set(words):
            print(VERBS[verb] if arguments[0] == verb else overview(arguments), end="")
            return 0
        if "--version" in words:
            from importlib import metadata

            print(f"smoltrain {metadata.version('smoltrain')}")
            return 0
        return run(verb, rest)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 143
    except BrokenPipeError:
        return 1


def run(verb: str, arguments: list[str]) -> int:
    """Runs a verb and returns its exit code. Each imports what it needs: Hydra costs 0.2 s, torch ten times that."""
    if verb == "completion":
        from smoltrain.completion import completion

        return completion(arguments)
    for name, value in MANNERS.items():
        os.environ.setdefault(name, value)
    from smoltrain.secrets import discreet_streams, leaky_overrides, refuse

    sys.excepthook = failed
    discreet_streams()
    refuse(leaky_overrides(arguments))
    if verb == "runs":  # composes nothing, but for rows
        from smoltrain.history import history

        return history(arguments)
    if verb == "sweep":  # nor does this
        from smoltrain.sweep.answer import answer

        return answer(arguments)
    from smoltrain.config.resolvers import register, stamp
    from smoltrain.config.targets import allowing

    register()
    stamp.cache_clear()
    with allowing(arguments) as rest:
        return dispatch(verb, rest)


def failed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints an exception that ends the process, without the frames of Hydra that led to it."""
    from smoltrain.ranks import RankFailed

    if issubclass(kind, RankFailed):  # where it failed, its notes say
        print("\n".join([str(error), *getattr(error, "__notes__", [])]), file=sys.stderr)
        return
    frames = []
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").split(".")[0] not in ("hydra", "omegaconf"):
            frames.append(trace)
        trace = trace.tb_next
    for frame in reversed(frames):
        trace = TracebackType(trace, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    traceback.print_exception(error.with_traceback(trace))


def dispatch(verb: str, arguments: list[str]) -> int:
    """Runs a verb of those that compose a config, or look at runs."""
    if verb == "check":
        return check(arguments)
    if verb in ("why", "show", "diff"):
        from smoltrain.explain import explain

        return explain(verb, arguments)
    if verb == "reproduce":
        from smoltrain.reproduce import reproduce

        return reproduce(arguments, start=train)
    if verb == "launch":
        from smoltrain.launch import launch

        return launch(arguments, start=train)
    if verb == "dashboard":
        from smoltrain.sweep.answer import overlay

        if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
            raise ConfigError(f"smoltrain dashboard takes at most one sweep, not {' '.join(arguments)}")
        query = overlay(arguments[0]) if arguments else ""
        from smoltrain.tracking import dashboard

        with contextlib.suppress(KeyboardInterrupt):
            dashboard(query)
        return 0
    return train(arguments)


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
    from smoltrain.config.compose import compose
    from smoltrain.secrets import redacted

    try:
        cfg = compose(overrides, [*hydra, *overrides])
        from smoltrain.check import check as known

        facts = known(cfg, strict, quiet=json_file == "-")
    except ConfigError as error:
        print(error, file=sys.stderr)
        facts = {"warnings": [], "errors": str(error).splitlines()}
    if json_file:
        text = json.dumps(redacted(facts), indent=1, ensure_ascii=False) + "\n"
        sys.stdout.write(text) if json_file == "-" else Path(json_file).write_text(text)
    return 2 if facts["errors"] else int(strict and bool(facts["warnings"]))


def train(arguments: list[str]) -> int:
    """Composes and checks a config, then `smoltrain.train.main` runs it: once, or in a sweep once for each trial."""
    from smoltrain.config.compose import COMPOSING, explain
    from smoltrain.runs import give_back
    from smoltrain.secrets import discreet_streams
    from smoltrain.sweep import asked_for

    listen()
    discreet_streams(outlive=True)
    exits: list[int] = []

    def task(cfg: "DictConfig") -> float:
        exits.append(1)  # an exception that passes through ends the process
        exits[-1], objective = attempt(cfg)
        return objective

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting
    flags, overrides = split(arguments)
    try:
        check_flags(flags)
        if LOOKING & {flag.partition("=")[0] for flag in flags}:
            by_hydra(*looked_at(flags, overrides), task)
        elif asked_for(flags, overrides):
            return sweep(flags, overrides, task)
        elif elsewhere := run_once(flags, overrides, task, exits):
            return elsewhere
    except (ConfigError, BrokenPipeError):
        raise
    except (*COMPOSING, OSError) as error:
        if 1 in exits:  # not composing, but from within a run
            raise
        said = f"cannot write the run's directory: {error}" if isinstance(error, OSError) else explain(error, arguments)
        raise ConfigError(said) from error
    finally:
        give_back()
    return max(exits, default=0)


def by_hydra(flags: list[str], overrides: list[str], task: "TaskFunction") -> None:
    """Runs a checked command line by Hydra's own main."""
    import hydra

    sys.argv = ["smoltrain", *flags, *overrides]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()


def sweep(flags: list[str], overrides: list[str], task: "TaskFunction") -> int:
    """Runs a sweep, and prints what came of it, whatever ended it."""
    from smoltrain.sweep.sweeper import answered, prepared

    command = prepared(flags, overrides)
    try:
        by_hydra(*command, task)
    except (KeyboardInterrupt, Exception) as error:
        if answered() is None or isinstance(error, KeyboardInterrupt):  # None: it had not begun
            raise
        if isinstance(error, ConfigError):
            print(error, file=sys.stderr)
        else:
            failed(type(error), error, error.__traceback__)
        return 1
    return answered() or 0


def looked_at(flags: list[str], overrides: list[str]) -> tuple[list[str], list[str]]:
    """The checked command line of a config that Hydra is to show: of a sweep, that of its first trial."""
    from smoltrain.config.compose import guard, whole
    from smoltrain.sweep import asked_for

    if not {"--cfg", "-c"} & {flag.partition("=")[0] for flag in flags}:
        guard(overrides, [*flags, *overrides])
    elif asked_for(flags, overrides):
        from smoltrain.sweep.space import Space

        space = Space.of(flags, overrides)
        return space.flags, space.first.overrides
    else:
        flags, overrides = with_its_own(flags, overrides)
        whole(overrides, [*flags, *overrides])
    return flags, overrides


def run_once(flags: list[str], overrides: list[str], task: "TaskFunction", exits: list[int]) -> int:
    """Checks the config of a run, and runs it: in a directory of its own, or where it goes on with another one.

    Where another node owns the run, this one helps it, or Slurm runs it, the exit code is that of the run; else 0, and
    that of the `task` is the last of `exits`.
    """
    from smoltrain.config.compose import of_run, whole

    flags, overrides = with_its_own(flags, overrides)
    cfg = whole(overrides, [*flags, *overrides])
    if cfg.hardware.slurm:
        from smoltrain.config.targets import instantiate

        job = instantiate(cfg.hardware.slurm)
        return job.run(cfg.name, cfg.hardware.nodes, [*flags, *overrides])  # type: ignore[no-any-return]
    if cfg.hardware.nodes == 1:
        begin(cfg, overrides, task)
        return 0
    from smoltrain.nodes import meeting
    from smoltrain.ranks import help_out

    with meeting(of_run(cfg)) as met:
        if met.index:
            return help_out(met, cfg.hardware.processes)
        begin(cfg, overrides, task)
        met.ended = exits[-1]
        return 0


def begin(cfg: "DictConfig", overrides: list[str], task: "TaskFunction") -> None:
    """Runs a checked config by Hydra, in a directory of its own, or where it goes on with another run."""
    from hydra.types import RunMode

    from smoltrain.config.compose import of_run, run_job
    from smoltrain.resume import continued

    cfg.hydra.mode = RunMode.RUN
    if directory := continued(of_run(cfg), overrides):
        cfg.hydra.run.dir = str(directory)
    run_job(cfg, task, "hydra.run.dir").return_value  # noqa: B018 - it raises what the task did


def with_its_own(flags: list[str], overrides: list[str]) -> tuple[list[str], list[str]]:
    """A command line with that of the run, which `resume=` names, in it."""
    if not any(override.startswith("resume=") for override in overrides):
        return flags, overrides
    from smoltrain.resume import with_its_own

    return with_its_own(flags, overrides)


def listen() -> None:
    """Ends what this process runs as Ctrl+C does when it gets SIGTERM or SIGINT, or its terminal goes."""
    from smoltrain.runs import STOP

    own = os.getpid()

    def interrupt(number: int, frame: Any) -> None:
        if os.getpid() == own:
            STOP.ask(signal.Signals(number).name)
        elif not loads_batches():  # a worker that prepares rows, forked from here: nobody awaits its exception
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a shell's background jobs have it
            signal.signal(number, interrupt)


def attempt(cfg: "DictConfig") -> tuple[int, float]:
    """Runs a composed config; says how it ended as an exit code, and what a sweeper is to know of it."""
    from hydra.core.hydra_config import HydraConfig

    from smoltrain.report import ending
    from smoltrain.runs import STOP, Diverged, Finished, discard, read, worst
    from smoltrain.train import main

    directory = Path(HydraConfig.get().runtime.output_dir)
    untouched = not (directory / "run.json").exists()
    STOP.waits, STOP.asked = False, None
    try:
        return 0, main(cfg)
    except ConfigError as error:
        print(error, file=sys.stderr)
        if untouched:
            discard(directory)
        return 2, worst(cfg.objective)
    except Diverged as error:
        print(f"{error}\n{ending(directory)}", file=sys.stderr)
        return 3, worst(cfg.objective)
    except Finished as error:
        discard(directory)
        record = read(error.directory)
        return (3, worst(cfg.objective)) if record["status"] == "diverged" else (0, record["objective"])
    except BaseException:
        if (directory / "run.json").exists():
            print(ending(directory), file=sys.stderr)
        raise


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The flags, each with its value, in one place, as argparse wants them; and the overrides, spelled out."""
    from smoltrain.config.overrides import spelled_out

    flags: list[str] = []
    overrides: list[str] = []
    valued = False
    for argument in arguments:
        if not (valued or argument.startswith(("-", "~")) or "=" in argument):
            raise ConfigError(stray(argument, flags[-1] if flags else ""))
        (flags if valued or argument.startswith("-") else overrides).append(argument)
        valued = argument in VALUED
    return flags, spelled_out(overrides)


def stray(argument: str, flag: str) -> str:
    """What somebody may have meant by an argument that is neither a flag nor key=value; `flag` is the last one."""
    if flag.startswith("--") and flag not in FLAGS | {"--strict"}:
        key = flag.removeprefix("--")
        return f"{flag} {argument}: there is no such flag{suggest(flag, FLAGS) or f'; write {key}={argument}'}"
    if argument in VERBS:
        return f"{argument}: a verb comes first, smoltrain {argument} …"
    mend = f"did you mean data.path={argument}?" if Path(argument).exists() else "write key=value"
    return f"{argument}: not an override; {mend}"


def check_flags(flags: list[str]) -> None:
    """Raises ConfigError for a flag that a run does not take; argparse would complete what begins like one."""
    valued, before = False, ""
    names = [flag.partition("=")[0] for flag in flags]
    if alone := {"--resolve", "--package", "-p"} & {*names} if not {"--cfg", "-c"} & {*names} else set():
        raise ConfigError(f"{min(alone)}: it is about what --cfg job shows, and runs nothing")
    if names.count("--config-dir") + names.count("-cd") > 1:
        raise ConfigError("--config-dir: one folder; hydra.searchpath=[one,other] names several")
    for flag in flags:
        name = flag.partition("=")[0]
        if valued and flag.startswith("-"):
            raise ConfigError(f"{flag}: the flag before it needs a value")
        if not valued and name not in FLAGS:
            known = FLAGS | {"--help", "--version", "--allow"}
            mend = NOT_OURS.get(name) or f"there is no such flag{suggest(name, known)}"
            raise ConfigError(f"{flag}: {mend}")
        if valued and before in ("--cfg", "-c") and flag not in ("job", "hydra", "all"):
            raise ConfigError(f"{before} {flag}: choose one of job, hydra, all")
        valued, before = not valued and flag in VALUED, flag
    if valued:
        raise ConfigError(f"{flags[-1]}: it needs a value")


def loads_batches() -> bool:
    """Whether this process is one that a DataLoader made; that ends with the process that trains, and not before."""
    return "torch" in sys.modules and sys.modules["torch"].utils.data.get_worker_info() is not None


if __name__ == "__main__":
    sys.exit(main())
