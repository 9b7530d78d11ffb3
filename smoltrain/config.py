"""The config before anything runs: its schema, its choices, and what is wrong with it, in the user's words.

Nothing here imports torch, transformers or trl, so that an error in a config costs half a second.
"""

import ast
import dataclasses
import difflib
import errno
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

PACKAGE = Path(__file__).parent
CONF = next(d for d in (PACKAGE / "conf", PACKAGE.parent / "conf") if d.is_dir())  # wheel, else checkout
BASE = "base"  # in every group, what its options share: a part of them, not one of them


class ConfigError(ValueError):
    """A config or its data cannot be run as asked; found before training, so the command exits with 2.

    `missing` are the keys that still need a value, where that is what is wrong.
    """

    def __init__(self, message: str, missing: Iterable[str] = ()):
        super().__init__(message)
        self.missing = tuple(missing)


def open_node() -> DictConfig:
    return OmegaConf.create({}, flags={"struct": False})


@dataclass
class Evaluation:
    max_rows: int = MISSING
    max_new_tokens: int = MISSING


@dataclass
class Check:
    step: bool | None = MISSING


@dataclass
class Config:
    """The keys of a run. Groups keep their own keys in their own YAML; `trainer.args` takes any field of its class."""

    name: str = MISSING
    seed: int = MISSING
    threads: int | None = MISSING
    objective: str = MISSING
    data: Any = field(default_factory=dict)
    encode: Any = MISSING
    trainer: Any = field(default_factory=lambda: {"args": open_node()})
    model: Any = MISSING
    evaluation: Evaluation = field(default_factory=Evaluation)
    check: Check = field(default_factory=Check)
    callbacks: Any = field(default_factory=open_node)


@cache
def stamp() -> str:
    """Names a run directory: when this process started its run, and four letters against a twin of that second."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"


def label(overrides: str) -> str:
    """`trainer.args.beta=0.1,data.path=a/b` as a directory's name: `beta-0.1_path-a_b`, at most 120 letters.

    It holds nothing that a shell or Hydra's grammar wants quoted, so that `model.from_run=` takes it as it is.
    """
    short = "_".join(re.sub(r"^[^=]*\.(?=[^.=]+=)", "", part) for part in overrides.split(",") if part)
    return re.sub(r"[^\w.+-]", "_", short.replace("=", "-"), flags=re.ASCII)[:120].rstrip("_")


@cache
def accelerator() -> str:
    """`cuda`, `mps` or `cpu`, read off the machine without importing torch."""
    if Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists():
        return "cuda"
    machine = os.uname()
    return "mps" if (machine.sysname, machine.machine) == ("Darwin", "arm64") else "cpu"


def register() -> None:
    """Makes the schema and the resolvers `${stamp:}`, `${label:…}` and `${accelerator_is:…}` known to Hydra."""
    ConfigStore.instance().store("schema", Config)
    OmegaConf.register_new_resolver("stamp", stamp, replace=True)
    OmegaConf.register_new_resolver("label", label, replace=True)
    OmegaConf.register_new_resolver("accelerator_is", lambda kind: accelerator() == kind, replace=True)


# ---------------------------------------------------------------- choices


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
    chosen = [entry for entry in plain(OmegaConf.load(CONF / "config.yaml"))["defaults"] if isinstance(entry, dict)]
    return {group: option for entry in chosen for group, option in entry.items() if " " not in group}


def compose(overrides: list[str], arguments: list[str]) -> DictConfig:
    """The config that a command line stands for, checked, for those who only want to look at it.

    Raises ConfigError for whatever Hydra or `validate` finds wrong.
    """
    import hydra

    extra = [quoted(f"file://{folder.absolute()}") for folder in folders(arguments)[:-1]]
    searchpath = [f"hydra.searchpath=[{','.join(extra)}]"] if extra else []
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("config", overrides=[*overrides, *searchpath])
    except COMPOSING as error:
        raise ConfigError(explain(error) + headless(overrides, arguments)) from error
    validate(cfg)
    return cfg


# Keys that hold paths and other texts, in which people write what Hydra's grammar gives a meaning: ~, =, <, commas.
TEXTS = {"data.path", "data.test_path", "data.system_prompt"}
TEXTS |= {"model.name_or_path", "model.from_run", "model.chat_template", "model.eos_token"}


def spelled_out(overrides: list[str]) -> list[str]:
    """The overrides that a command line is short for.

    `data=[a,b]` is a mixture of two options; a `data.path=` alone is a file of one's own; a path may hold what would
    otherwise have to be quoted.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    spelled = []
    for override in overrides:
        key, _, value = override.partition("=")
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException:
            spelled.append(f"{key}={quoted(value)}" if key in TEXTS else override)
            continue
        several = parsed.value() if key == "data" and not parsed.is_sweep_override() else None
        if isinstance(several, list):
            if len(set(several)) < len(several):
                raise ConfigError(
                    f"{override}: each source once. Files of one shape are one source, data.path=[a.jsonl,b.jsonl]; "
                    "for others, write each a file in a folder of your own, my_conf/data (defaults: [local, _self_])"
                )
            spelled += ["data=mixture", *(f"+data@data.sources.{name}={name}" for name in several)]
        else:
            spelled.append(override)
    keys = [override.partition("=")[0] for override in spelled]
    if "data.path" in keys and not {"data", "experiment"} & set(keys):
        spelled.insert(0, "data=local")
    return spelled


def quoted(text: str) -> str:
    """A text as Hydra's grammar takes it, whatever stands in it."""
    return QuotedString(text, Quote.single).with_quotes()


def plain(cfg: Any, resolve: bool = False) -> dict[str, Any]:
    """A config as ordinary dicts and lists."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=resolve))


# ---------------------------------------------------------------- what is wrong with it


def validate(cfg: DictConfig) -> None:
    """Raises one ConfigError for values left open, `${…}` that lead nowhere and unknown fields of `trainer.args`."""
    shape = misshapen(cfg)
    if shape:
        raise ConfigError("\n".join(shape))
    missing = unset(plain(cfg))
    problems = [f"{key} has no value: set {key}=…" for key in missing] + dangling(cfg)
    if not missing:
        target = cfg.trainer.args._target_
        known = fields(target)
        for key, value in plain(cfg.trainer.args).items():
            if key.startswith("_") or not known:
                continue
            if key not in known:
                problems.append(f"trainer.args.{key} is not a field of {target}{suggest(key, known)}")
            elif not fits(value, known[key]):
                problems.append(f"trainer.args.{key}={value}: {target} takes {known[key]}")
        problems += reserved(plain(cfg)) + out_of_range(plain(cfg.trainer.args))
        problems += never_stopping(plain(cfg)) + endless(plain(cfg))
    if problems:
        raise ConfigError("\n".join(problems), missing)


# Fields of trainer.args that are not a user's to set: the values that leave them alone, and what to do instead.
OUTPUT_DIR = "${hydra:runtime.output_dir}"
RESERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "output_dir": ((OUTPUT_DIR,), "everything of a run is in one directory, choose it with hydra.run.dir="),
    "resume_from_checkpoint": (
        (None, False),
        "a run cannot be resumed yet; start it again, or start another from a completed one with model.from_run=",
    ),
    "push_to_hub": (
        (None, False),
        "a run pushes nothing; when it has completed: hf upload <you>/<name> <the run's directory>/model",
    ),
    "hub_token": ((None,), "a token is taken only from the environment, set HF_TOKEN"),
}
# Rows are tokens when TRL gets them, so these would be accepted and ignored.
TOKENIZING = {
    "assistant_only_loss": "encode.train_on=assistant, last, all or weighted says what is learned",
    "completion_only_loss": "encode.train_on=assistant, last, all or weighted says what is learned",
    "truncation_mode": "data.on_too_long=truncate, drop or error says what becomes of rows that are too long",
    "dataset_num_proc": "data.workers says how many processes prepare rows",
    "dataset_text_field": "data.columns={text: …} says which column it is",
    "dataset_kwargs": "rows are prepared before TRL sees them",
    "chat_template_path": "model.chat_template names the template",
    "eos_token": "model.eos_token names the token",
}


UNTOKENIZED = "smoltrain.data.encode.Untokenized"


def reserved(cfg: dict[str, Any]) -> list[str]:
    """What is wrong with each reserved field that was set; its value is not shown, one is a secret."""
    args = cfg["trainer"]["args"]
    instead = {
        key: mend for key, (left_alone, mend) in RESERVED.items() if args.get(key, left_alone[0]) not in left_alone
    }
    if cfg["encode"]["_target_"] != UNTOKENIZED:
        instead |= {key: mend for key, mend in TOKENIZING.items() if key in args}
    return [f"trainer.args.{key}: {mend}" for key, mend in instead.items()]


AT_LEAST_1 = ("max_length", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def out_of_range(args: dict[str, Any]) -> list[str]:
    """Numbers that transformers and TRL take and make nonsense of: rows without their end, a run without a step."""

    def below(key: str, least: float) -> bool:
        return isinstance(value := args.get(key), int | float) and value < least

    problems = [f"trainer.args.{key}={args[key]}: at least 1" for key in AT_LEAST_1 if below(key, 1)]
    steps = args.get("max_steps", -1)
    if below("max_steps", 1) and steps != -1:
        problems.append(f"trainer.args.max_steps={steps}: at least 1, or -1 for num_train_epochs")
    if steps == -1 and below("num_train_epochs", 1e-9):
        problems.append(f"trainer.args.num_train_epochs={args['num_train_epochs']}: more than 0")
    return problems


EARLY_STOPPING = "transformers.EarlyStoppingCallback"


def never_stopping(cfg: dict[str, Any]) -> list[str]:
    """What early stopping lacks, which transformers only asserts when training begins."""
    args = cfg["trainer"]["args"]
    stopping = [name for name, made in cfg["callbacks"].items() if made and made["_target_"] == EARLY_STOPPING]
    needed = []
    if args.get("eval_strategy", "no") in ("no", False):
        needed.append("trainer.args.eval_strategy=steps trainer.args.eval_steps=…")
    # load_best_model_at_end brings a metric of its own: the loss
    if args.get("metric_for_best_model") is None and not args.get("load_best_model_at_end"):
        needed.append("trainer.args.metric_for_best_model=eval_loss")
    return [
        f"callbacks.{name} stops by what is measured on the way: set {' '.join(needed)}" for name in stopping if needed
    ]


def endless(cfg: dict[str, Any]) -> list[str]:
    """What a run over a stream lacks, which transformers says once model and data are there, or never."""
    args = cfg["trainer"]["args"]
    streams = [key for key, value in leaves(cfg["data"], "data.") if key.endswith(".streaming") and value is True]
    problems = []
    if streams and args.get("max_steps", -1) <= 0:
        problems.append("nobody knows how many rows a stream has; set trainer.args.max_steps=…")
    if streams and args.get("dataloader_num_workers", 0):
        problems.append(
            "its rows are counted as they are read, in this process; set trainer.args.dataloader_num_workers=0"
        )
    return [f"{streams[0]}=true: {problem}" for problem in problems]


def misshapen(cfg: DictConfig) -> list[str]:
    """What stands where it cannot: keys that a run does not have, and nothing where a component is described."""
    known = [f.name for f in dataclasses.fields(Config)]
    problems = [f"{key} is not a key of a run{suggest_key(key, known, cfg)}" for key in plain(cfg) if key not in known]
    for key in ("data", "encode", "trainer", "trainer.args", "model"):
        if not OmegaConf.is_dict(node := OmegaConf.select(cfg, key)) or "_target_" not in node:
            problems.append(f"{key} has no _target_: nothing says what to build; choose one with {key.split('.')[0]}=…")
    if not OmegaConf.is_dict(cfg.callbacks):
        problems.append("callbacks: name the one to remove, e.g. callbacks.progress=null")
    else:
        problems += [
            f"callbacks.{name}={made}: it needs a _target_ that says what to build, or is null"
            for name, made in plain(cfg.callbacks).items()
            if made is not None and not (isinstance(made, dict) and "_target_" in made)
        ]
    if "/" in cfg.name or cfg.name in ("", ".", ".."):
        problems.append(f"name={cfg.name}: it becomes one folder of multirun, without a slash")
    if cfg.name == "trackio":
        problems.append("name=trackio: the dashboard's data is in multirun/trackio; choose another name")
    if not 0 <= cfg.seed < 2**32:
        problems.append(f"seed={cfg.seed}: 0 to {2**32 - 1}, as numpy takes it")
    if cfg.threads is not None and cfg.threads < 1:
        problems.append(f"threads={cfg.threads}: at least 1, or null for every core")
    if cfg.evaluation.max_rows < 0 or cfg.evaluation.max_new_tokens < 1:
        problems.append("evaluation: max_rows is 0 or more, max_new_tokens at least 1")
    return problems


# How an annotation in TRL's source allows a plain value; whatever else is annotated is left to the class itself.
PLAIN: dict[str, Any] = {"float": (int, float), "int": int, "bool": bool, "None": type(None)}


def fits(value: Any, annotation: str) -> bool:
    """Whether a value may stand in a field with this annotation, as far as plain types tell."""
    names = [name.strip() for name in annotation.split("|")]
    if not set(names) <= PLAIN.keys() or (isinstance(value, str) and "${" in value):
        return True
    if isinstance(value, bool) and "bool" not in names:
        return False
    return any(isinstance(value, PLAIN[name]) for name in names)


def dangling(cfg: DictConfig) -> list[str]:
    """What is wrong with each `${…}` that cannot be resolved; `${hydra:…}` stands for what only a run knows."""
    problems = []
    for key, value in leaves(plain(cfg)):
        if isinstance(value, str) and "${" in value and "${hydra:" not in value:
            try:
                OmegaConf.select(cfg, key)
            except OmegaConfBaseException as error:
                problems.append(f"{key}={value}: {str(error).splitlines()[0]}")
    return problems


def unset(node: dict[str, Any]) -> list[str]:
    """The keys, dotted, whose value is still `???`."""
    return [key for key, value in leaves(node) if isinstance(value, str) and value == MISSING]


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a config with its value, lists as values."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@cache
def fields(target: str) -> dict[str, str]:
    """The fields of a TRL config class and their annotations, read from its source; empty where it is not found.

    A class outside trl and transformers (a user's own) is left to its constructor, which refuses what it lacks.
    """
    found: dict[str, str] = {}
    package, name = target.split(".")[0], target.split(".")[-1]
    if package not in ("trl", "transformers"):
        return {}
    for source in sources():
        text = source.read_text()
        if re.search(rf"^class {name}\b", text, re.MULTILINE):
            node = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name)
            for base in node.bases:
                if isinstance(base, ast.Name):
                    found |= fields(f"trl.{base.id}")
            for f in node.body:
                if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name):
                    found[f.target.id] = ast.unparse(f.annotation)
            return found
    return {}


def sources() -> Iterator[Path]:
    """The files in which trl and transformers define the arguments of their trainers, the likeliest first."""
    yield from sorted((package_folder("trl") / "trainer").glob("*_config.py"))
    yield package_folder("transformers") / "training_args.py"
    yield from sorted((package_folder("trl") / "experimental").rglob("*_config.py"))


def package_folder(package: str) -> Path:
    """Where an installed package is, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{package} is not installed")
    return Path(spec.origin).parent


def suggest(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def suggest_key(word: str, keys: Iterable[str], node: DictConfig, prefix: str = "") -> str:
    """As `suggest`, of the keys of a node, those further down, and the fields that the classes named there take."""
    found: dict[str, str] = {}
    for key, value in leaves({key: value for key, value in plain(node).items() if key in keys}):
        parents, _, last = key.rpartition(".")
        found |= {name: f"{parents}.{name}" for name in (fields(str(value)) if last == "_target_" else [last])}
    found |= {key: key for key in keys}
    close = difflib.get_close_matches(word, found, n=1)
    return f"; did you mean {prefix}{found[close[0]]}?" if close else ""


# Hydra refuses `peft=null` with a plain ValueError.
COMPOSING = (HydraException, OmegaConfBaseException, YAMLError, ValueError)


def explain(error: Exception) -> str:
    """What was found wrong while composing (one of COMPOSING), as one message for the person who typed it."""
    if isinstance(error, YAMLError):
        return f"unreadable YAML: {error}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        choices = sorted(o for o in error.options if o != BASE)
        close = suggest(option, choices) or "."
        return f"{group}={option}: there is no such option{close} Choose one of: {', '.join(choices)}"
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) and error.__cause__ else error
    lines = str(error).splitlines()
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if several := re.fullmatch(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'.*", first):
        return f"{several[1]}: add -m to run each of them; a list is key=[a,b], a text with a comma key=\"'a,b'\""
    detail = str(cause).splitlines()[0] if str(cause) else ""
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        parents, _, last = str(cause.full_key).rpartition(".")
        prefix = f"{parents}." if parents else ""
        keys = [str(key) for key in cause.parent_node if key != "hydra"]
        keys += [] if parents else [group for group in defaults() if group not in keys]
        close = suggest_key(last, keys, cause.parent_node, prefix)
        if parents == "data" and not close:  # a key of other data
            local = [key for key in plain(OmegaConf.load(CONF / "data" / "local.yaml")) if key != "_target_"]
            close = suggest(f"data.{last}", [f"data.{key}" for key in local])
        return f"{cause.full_key} is not a key of this config{close or '. Keys there: ' + ', '.join(keys)}"
    if isinstance(error, InterpolationResolutionError):
        return str(error)
    return first if first.startswith(detail) else f"{first}: {detail}"


def headless(overrides: list[str], arguments: list[str]) -> str:
    """What to add to users' own files that were chosen, where all of ours in that group begin with where they go."""
    advice = ""
    for group, _, option in (override.partition("=") for override in overrides):
        needed = {header(file) for file in (CONF / group).glob("*.yaml") if file.stem != BASE}
        for file in (folder / group / f"{option}.yaml" for folder in folders(arguments)[:-1]):
            if file.is_file() and not header(file) and needed and all(needed):
                advice += f"\n{file}: its first line has to be {' or '.join(f'`{line}`' for line in sorted(needed))}"
    return advice


def header(file: Path) -> str:
    """The comment of a YAML file that tells Hydra where in the config its keys go; empty where it has none."""
    return next((line for line in file.read_text().splitlines() if line.startswith("# @package ")), "")


REFUSALS = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def exhausted(error: BaseException) -> bool:
    """Whether the machine ran out of memory or disk: then the run has failed, and nothing was wrong with its config."""
    return type(error).__name__ == "OutOfMemoryError" or getattr(error, "errno", None) == errno.ENOSPC


@contextmanager
def refusing(key: str) -> Iterator[None]:
    """Turns what a component refuses while it is built from `key` into a ConfigError that names the key."""
    try:
        yield
    except ConfigError:
        raise
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            raise cause from None
        if cause is not None and (not isinstance(cause, REFUSALS) or exhausted(cause)):
            raise
        raise ConfigError(f"{key}: {cause or str(error).splitlines()[0]}") from error
    except REFUSALS as error:
        if exhausted(error):
            raise
        raise ConfigError(f"{key}: {error}") from error
