"""What a config may run: which targets, by the name that they really have, and which of Hydra's own keys may be set.

A `_target_` names any callable of Python, so each is looked up in the table below before anything of it is imported.
Code of one's own is allowed by whoever types the command, with `--allow` or SMOLTRAIN_ALLOW, and never by a YAML file.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.plugin import Plugin
from hydra.plugins.sweeper import Sweeper
from hydra.utils import get_object
from hydra.utils import instantiate as build
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from smoltrain.config import ConfigError, Problem, leaves, plain, shown, suggest
from smoltrain.config.resolvers import PLUGIN
from smoltrain.config.resolvers import PLUGINS as REGISTERED
from smoltrain.config.signatures import signature
from smoltrain.usage import SETTABLE

ALLOW = "SMOLTRAIN_ALLOW"

# ---------------------------------------------------------------- the list


@dataclass(frozen=True)
class Kind:
    """Targets that may stand in a place: the names they really have (`*`: any text), and classes that they extend."""

    what: str
    names: tuple[str, ...]
    below: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()

    def has(self, name: str, bases: Iterable[str]) -> bool:
        named = any(fnmatchcase(name, pattern) for pattern in self.names)
        return named and (not self.below or not set(self.below).isdisjoint(bases))


SUMS = ("smoltrain.data.sums.conversations", "smoltrain.data.sums.preferences")
SOURCES = ("smoltrain.data.local", "smoltrain.data.hub", "smoltrain.data.mixture", *SUMS)
ENCODERS = tuple(f"smoltrain.data.encode.{name}" for name in ("Conversations", "Preferences", "Untokenized"))
CALLBACKS = ("smoltrain.callbacks.*", "smoltrain.tracking.Trackio", "transformers.*", "trl.*")
AUTO = "transformers.models.auto.*.Auto*.from_pretrained"

DATA = Kind("a source of rows", SOURCES, examples=SOURCES)
ENCODER = Kind("what makes rows tokens", ENCODERS, examples=ENCODERS)
MODEL = Kind("a checkpoint", ("smoltrain.model.Checkpoint",), examples=("smoltrain.model.Checkpoint",))
SLURM = Kind("a job of Slurm", ("smoltrain.slurm.Job",), examples=("smoltrain.slurm.Job",))
CALLBACK = Kind(
    "a callback of smoltrain, transformers or TRL",
    CALLBACKS,
    ("transformers.trainer_callback.TrainerCallback",),
    ("smoltrain.callbacks.Progress", "smoltrain.tracking.Trackio", "transformers.EarlyStoppingCallback"),
)
TRAINER = Kind(
    "a trainer of TRL",
    ("trl.*", "smoltrain.sft.SFTTrainer", "smoltrain.dpo.DPOTrainer"),
    ("transformers.trainer.Trainer",),
    ("smoltrain.sft.SFTTrainer", "smoltrain.dpo.DPOTrainer", "trl.KTOTrainer"),
)
ARGUMENTS = Kind(
    "the config class of a trainer",
    ("trl.*", "transformers.*"),
    ("transformers.training_args.TrainingArguments",),
    ("trl.SFTConfig", "trl.DPOConfig", "trl.KTOConfig"),
)
ADAPTER = Kind("a config of PEFT", ("peft.*",), ("peft.config.PeftConfigMixin",), ("peft.LoraConfig", "peft.IA3Config"))
QUANTISATION = Kind(
    "a quantisation of transformers",
    ("transformers.*",),
    ("transformers.utils.quantization_config.QuantizationConfigMixin",),
    ("transformers.BitsAndBytesConfig", "transformers.TorchAoConfig"),
)
# What a trainer takes as an argument of its own, and can be made from a config. An optimizer needs the model's weights,
# and a scheduler that optimizer, so that the class of one, with `_partial_`, is all that fits.
AUTOS = Kind("an auto class of transformers", (AUTO,), examples=("transformers.AutoModelForCausalLM.from_pretrained",))
REWARD = Kind("a reward of TRL", ("trl.rewards.*",), examples=("trl.rewards.accuracy_reward",))
OPTIMIZER = Kind(
    "an optimizer of torch",
    ("torch.optim.*",),
    ("torch.optim.optimizer.Optimizer",),
    ("torch.optim.AdamW",),
)
# What may stand where: the first pattern that is the whole key. Only names of these packages are looked into.
PLACES: tuple[tuple[str, tuple[Kind, ...]], ...] = (
    (r"data|data\.sources\.[^.]+", (DATA,)),
    (r"encode", (ENCODER,)),
    (r"model", (MODEL,)),
    (r"model\.quantization_config", (QUANTISATION,)),
    (r"callbacks\.[^.]+", (CALLBACK,)),
    (r"hardware\.slurm", (SLURM,)),
    (r"trainer", (TRAINER,)),
    (r"trainer\.args", (ARGUMENTS,)),
    (r"trainer\.peft_config", (ADAPTER,)),
    (r"trainer\.optimizer_cls_and_kwargs\[0\]", (OPTIMIZER,)),
    (r"trainer\.(ref_model|teacher_model|reward_processing_classes(\[\d+\])?)", (AUTOS,)),
    (r"trainer\.reward_funcs(\[\d+\])?", (REWARD, AUTOS)),
)
PLUGINS: dict[str, type[Plugin]] = {"hydra.launcher": Launcher, "hydra.sweeper": Sweeper}
PACKAGES = ("smoltrain", "trl", "transformers", "peft", "datasets", "torch")
OWN = "code of your own runs with --allow its_package on the command line, or SMOLTRAIN_ALLOW=its_package"

# Keys that would have a library run code it downloads or unpickles, or write elsewhere, wherever they stand, and what
# leaves that off.
NO_REMOTE_CODE = (
    "smoltrain runs no code that comes with a model, and there is no way yet to switch that on; leave it out"
)
CODE: dict[str, tuple[tuple[Any, ...], str]] = {
    "trust_remote_code": ((False, None), NO_REMOTE_CODE),
    "weights_only": ((True,), "weights are read as weights, never as a pickle that runs code; leave it out"),
    "auto_mapping": ((None,), "it names a module to import; leave it out"),
    "megatron_core": (("megatron.core", None), "it names a module to import; leave it out"),
    "megatron_config": ((None,), "it has the module that megatron_core names imported; leave it out"),
    "cache_dir": ((None,), "what is downloaded is kept where HF_HOME says; leave it out"),
    "use_kernels": ((False, None), "kernels are code that is downloaded; leave it out"),
}
# What Hydra reads beside `_target_`, and what may stand there.
PLUMBING: dict[str, tuple[tuple[Any, ...], str]] = {
    "_args_": ((), "write each argument by its name"),
    "_partial_": ((True, False), "true or false"),
    "_recursive_": ((True, False), "true or false"),
    "_convert_": (("none", "partial", "object", "all"), "one of none, partial, object, all"),
}
# Nodes of smoltrain's own, for which the code that uses them is written: these stand there as the shipped files have
# them, or not at all. What is handed over when it is built can be no `_partial_`.
OURS = re.compile(r"|data(\.sources(\.[^.]+)?)?|encode|model|callbacks|trainer(\.args)?|evaluation|check")
GIVEN = {"trainer._partial_": True, "trainer._convert_": "all", "data._convert_": "all", "model._convert_": "all"}
WHOLE = re.compile(r"hardware\.slurm|callbacks\.[^.]+|trainer\.peft_config|model\.quantization_config")

PER_RUN = re.compile(r"runtime\.choices\.|runtime\.config_sources|overrides\.|searchpath|job\.override_dirname")

MAPPINGS = 1000  # more than any config has that does not contain itself
NAME = "up to 100 letters, digits and . _ + -, beginning with a letter, digit or _, not ending with a dot"
TAKEN = {
    "trackio": "the dashboard's data is in multirun/trackio; choose another name",
    "latest": "model.from_run=latest means the run that completed last; choose another name",
}
FOLDERS = r"name|callbacks\.[^.]+\.project"

# ---------------------------------------------------------------- the checks


def refusals(cfg: Any, place: str = "") -> list[Problem]:
    """Everything in a config that would run what is not allowed, or write outside of multirun; nothing is imported.

    Interpolations are followed, and texts that hold JSON are read. Hydra's own node is looked at too, where it is
    there. `place` is the key of `cfg` itself. Raises ConfigError for a config that contains itself.
    """
    return [problem for key, name, value in entries(cfg, place) for problem in refused(key, name, value)]


def entries(cfg: Any, place: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every key of a config, dotted, with its last part and its value, which is resolved where it can be."""
    waiting = [(place, cfg)]
    for _ in range(MAPPINGS):
        if not waiting:
            return
        prefix, node = waiting.pop(0)
        for name, value in children(node):
            key = f"{prefix}[{name}]" if isinstance(node, Sequence) else f"{prefix}.{name}".removeprefix(".")
            yield key, str(name), value
            if isinstance(value, str) and value.lstrip().startswith("{"):  # as transformers reads it
                with suppress(ValueError):
                    value = json.loads(value)
            if isinstance(value, dict | list) or OmegaConf.is_config(value):
                waiting.append((key, value))
    raise ConfigError(
        f"{waiting[-1][0][:80]}: the config contains itself, or more than {MAPPINGS:,} mappings and lists"
    )


def children(node: Any) -> Iterator[tuple[Any, Any]]:
    """The values of a mapping or list by their names or numbers, less those that are still `???`."""
    for name in range(len(node)) if isinstance(node, Sequence) else list(node):
        try:
            yield name, node[name]
        except MissingMandatoryValue:
            continue
        except OmegaConfBaseException:
            unresolved: Any = plain(node)
            yield name, unresolved[name]


def refused(key: str, name: str, value: Any) -> Iterator[Problem]:
    """What is wrong with one value, because of the name it has or of what it is."""
    said = f"{key}={shown(value)}"
    if name == "_target_" and (why := unlisted(key.removesuffix("_target_").removesuffix("."), value)):
        yield Problem(key, f"{said}: {why}")
    for fit, why in (table[name] for table in (CODE, PLUMBING) if name in table):
        if not among(value, fit):
            yield Problem(key, f"{said}: {why}")
            break
    else:
        if name in PLUMBING and (why := unlike(key, value)):
            yield Problem(key, f"{said}: {why}")
    if name == "attn_implementation" and "/" in str(value):
        yield Problem(key, f"{said}: a kernel of the hub is code that is downloaded; choose sdpa or eager")
    if isinstance(value, str) and value.startswith("pkg://") and not value.startswith("pkg://smoltrain/"):
        yield Problem(key, f"{said}: only pkg://smoltrain/… lies in a package; write the path of a folder")
    if re.fullmatch(FOLDERS, key) and value is not None and (why := misnamed(str(value))):
        yield Problem(key, f"{said}: {why}")


def among(value: Any, fit: Iterable[Any]) -> bool:
    return any(value is one or (isinstance(one, str) and value == one) for one in fit)


def unlike(key: str, value: Any) -> str:
    """Why what Hydra reads beside a target cannot stand at a key, though it is of its kind; empty where it can."""
    node = key.rpartition(".")[0]
    if OURS.fullmatch(node) and not among(value, (GIVEN[key],) if key in GIVEN else ()):
        return f"the code needs {shown(GIVEN[key])} there; leave it out" if key in GIVEN else "leave it out"
    if WHOLE.fullmatch(node) and key.endswith("._partial_") and value:
        return "what stands there has to be built whole; leave it out"
    return ""


def misnamed(name: str) -> str:
    """Why a text cannot be the name of a folder of runs, wherever it is typed again; empty where it can."""
    if not re.fullmatch(r"\w[\w.+-]{0,99}(?<!\.)", name, re.ASCII):
        return f"it becomes one folder of multirun: {NAME}"
    return TAKEN.get(name.lower(), "")


def unlisted(place: str, target: Any) -> str:
    """Why a target may not stand in a place; empty where it may."""
    if not isinstance(target, str):
        return "it has to be the dotted name of a class or function"
    if place in PLUGINS:
        installed = sorted(f"{kind.__module__}.{kind.__name__}" for kind in Plugins.instance().discover(PLUGINS[place]))
        ours = [f"{PLUGIN}.{name}" for name in REGISTERED]
        return "" if target in [*installed, *ours] else f"it is not installed; {', '.join(installed)} is"
    package, kinds = target.split(".")[0], kinds_of(place)
    if package not in PACKAGES and package not in {name.split(".")[0] for name in allowed()}:
        return wanted(kinds, target)
    try:
        real, bases = defined(target)
    except ConfigError as error:
        return str(error).removeprefix(f"{target}: ")
    return "" if listed(kinds, real, bases) else wanted(kinds, target, real)


def kinds_of(place: str) -> tuple[Kind, ...]:
    return next((kinds for pattern, kinds in PLACES if re.fullmatch(pattern, place)), ())


def listed(kinds: tuple[Kind, ...], real: str, bases: Iterable[str]) -> bool:
    """Whether what is really named so is on the list, or the user's own."""
    own = any(real == name or real.startswith(f"{name}.") for name in allowed())
    return own or any(kind.has(real, bases) for kind in kinds)


def defined(target: str) -> tuple[str, tuple[str, ...]]:
    """The name that a target really has, and those of the classes that it extends, read from source."""
    owner, _, method = target.rpartition(".")
    if method == "from_pretrained":
        found = signature(owner)
        return f"{found.module}.{found.name}.{method}", ()
    found = signature(target)
    return f"{found.module}.{found.name}", found.bases


def wanted(kinds: tuple[Kind, ...], target: str, real: str = "") -> str:
    """What is allowed in a place instead of a target, in words."""
    examples = [name for kind in kinds for name in kind.examples]
    what = " or ".join(kind.what for kind in kinds) + (f", as {', '.join(examples)}" if len(kinds) == 1 else "")
    stands = f"there it has to be {what}" if kinds else "nothing is built there"
    return f"{f'this is {real}; ' if real not in ('', target) else ''}{stands}{suggest(target, examples)}; {OWN}"


# ---------------------------------------------------------------- Hydra's own keys


def misplaced(overrides: list[str]) -> list[Problem]:
    """What is wrong with each of Hydra's own keys on a command line; what Hydra cannot read is left to it."""
    problems = []
    for override in overrides:
        with suppress(HydraException):
            parsed = OverridesParser.create().parse_override(override)
            if re.split("[./]", parsed.key_or_group)[0] == "hydra" and (why := unsettable(parsed)):
                problems.append(Problem(parsed.key_or_group, f"{override}: {why}"))
    return problems


def unsettable(override: Override) -> str:
    """Why an override of one of Hydra's keys is refused; empty where it is not."""
    key, value = override.key_or_group, override.value()
    parameter = re.match(r"hydra\.(launcher|sweeper)\.(?!params\b|_)", key)
    if override.type != OverrideType.CHANGE or not (parameter or key in SETTABLE):
        return f"of Hydra's own keys, these can be set: {', '.join(SETTABLE)}"
    if key in ("hydra/launcher", "hydra/sweeper") and not re.fullmatch(r"\w+", str(value)):
        return "name one that is installed"
    if key == "hydra.sweep.subdir" and (Path(str(value)).is_absolute() or ".." in Path(str(value)).parts):
        return "it is a folder in that of the sweep, hydra.sweep.dir: no / at its beginning, and no .. in it"
    if key == "hydra.searchpath":
        for folder in value if isinstance(value, list) else [value]:
            path = str(folder).removeprefix("file://")
            if "://" in path or not Path(path).is_dir():
                return f"{folder} is no folder on this disk; write its path, or file:// and its path"
    return ""


def overridden(hydra: Any, shipped: Any, given: list[str]) -> list[Problem]:
    """Hydra's own keys that YAML files have set, by comparing its node with that of a run without them.

    Overrides that are not among those `given` would be applied by a sweep.
    """
    now, then = (
        {key: value for key, value in leaves(plain(node)) if not PER_RUN.match(key)} for node in (hydra, shipped)
    )
    differing = {key: now.get(key) for key in sorted(now.keys() | then.keys()) if now.get(key) != then.get(key)}
    applied = plain(hydra.overrides)
    if added := {*applied["hydra"], *applied["task"]} - {*given}:
        differing["overrides"] = sorted(added)
    return [
        Problem(
            f"hydra.{key}",
            f"hydra.{key}={shown(value)}: Hydra's own keys cannot be set in YAML; "
            f"on the command line, these can: {', '.join(SETTABLE)}",
        )
        for key, value in differing.items()
    ]


# ---------------------------------------------------------------- code of one's own


@contextmanager
def allowing(arguments: list[str]) -> Iterator[list[str]]:
    """Takes `--allow NAME` out of a command line; within, NAME is allowed, in processes that are started too."""
    rest, names = [], []
    remaining = iter(arguments)
    for argument in remaining:
        flag, _, value = argument.partition("=")
        if flag == "--allow" and (name := value or next(remaining, "")):
            names.append(name)
        else:
            rest.append(argument)
    before = os.environ.get(ALLOW)
    if names:
        os.environ[ALLOW] = ",".join(names if before is None else [before, *names])
    try:
        yield rest
    finally:
        if names:
            del os.environ[ALLOW]
            os.environ |= {} if before is None else {ALLOW: before}


def allowed() -> list[str]:
    """The packages, modules and names of their own that a user has allowed. Raises ConfigError for what is none."""
    names = [name.strip() for name in os.environ.get(ALLOW, "").split(",") if name.strip()]
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"--allow {name}: name a package, or a module or class in it, as my_package.module")
    return names


def instantiate(node: Any) -> Any:
    """Builds what a node of the config describes, once each thing that Hydra finds for it has proved to be allowed.

    Names are looked up in source before they are imported; then the live objects say themselves what they are.
    Raises ConfigError where one of them is not on the list.
    """
    place = str(node._get_full_key(None))
    problems = refusals(node, place)
    for key, name, target in () if problems else entries(node, place):
        if name == "_target_":
            kinds = kinds_of(key.removesuffix("._target_"))
            real, bases = identity(get_object(target))
            if not listed(kinds, real, bases):
                problems.append(Problem(key, f"{key}={target}: {wanted(kinds, target, real)}"))
    if problems:
        raise ConfigError("\n".join(problem.text for problem in problems))
    return build(node)


def identity(found: Any) -> tuple[str, list[str]]:
    """The name that a live object says it has, and those of the classes that it extends."""

    def name(thing: Any) -> str:
        return f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', None)}"

    if isinstance(owner := getattr(found, "__self__", None), type):  # a method of a class
        return f"{name(owner)}.{found.__name__}", []
    return name(found), [name(kind) for kind in getattr(found, "__mro__", ())]
