"""What is wrong with a composed config: all of it at once, before anything is built."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

from omegaconf import MISSING, DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from smoltrain.config import CONF, ConfigError, Problem, at, leaves, rules, shown
from smoltrain.config.groups import defaults
from smoltrain.config.renamed import advice
from smoltrain.config.schema import AUTO, NODES, PREPARATION, SCHEMA
from smoltrain.config.signatures import REQUIRED, Signature, misfit, signature

REST_IGNORED = "transformers.utils.quantization_config.QuantizationConfigMixin"  # takes any name, and drops it
BUILT = ("data", "encode", "trainer", "trainer.args", "model")  # of these a config has exactly one each
HYDRAS = {"_target_", "_partial_", "_convert_", "_recursive_"}  # keys that say how a node is built
OWN_KEYS = "it has keys of its own; in a file they stand below it, indented"
# Handed over live, when they are there: a config that set them would be overruled.
LIVE = {"trainer": {"model", "processing_class", "train_dataset", "eval_dataset", "callbacks"}}


def validate(cfg: DictConfig) -> None:
    """Raises one ConfigError for all that is wrong with a config, one line each."""
    if found := problems(cfg):
        raise ConfigError("\n".join(problem.text for problem in found), [p.key for p in found if p.missing])


def problems(
    cfg: DictConfig, chains: Mapping[str, Any] = MappingProxyType({}), refused: Sequence[Problem] = ()
) -> list[Problem]:
    """All that is wrong with a config: values left open, `${…}` that lead nowhere, unknown keys, unfit values.

    `chains` are its `origins`, without which nobody knows what was set to no effect. `refused` is what may not run
    (`targets`); of what a refused target takes, nothing is said.
    """
    values, found = resolved(cfg)
    shape = misshapen(values)
    unread = {key for problem in refused for key in (problem.key, problem.key.removesuffix("._target_"))}
    unresolved = {problem.key for problem in found}
    found += shape or [
        p for p in unfit(values) if not {p.key, p.key.rpartition(".")[0]} & unread and p.key not in unresolved
    ]
    found += refused
    wrong = {problem.key for problem in found}
    if not shape and wrong.isdisjoint(("trainer._target_", "trainer.args._target_")):
        found += [problem for problem in rules.problems(values, chains, wrong) if problem.key not in wrong]
        wrong = {problem.key for problem in found}
    return [p for p in found if pointer(cfg, p.key) not in wrong - {p.key}]  # it is said of what it points to


# ---------------------------------------------------------------- values


def resolved(cfg: DictConfig) -> tuple[dict[str, Any], list[Problem]]:
    """The config as plain values, and each `${…}` in it that cannot be resolved, which then stands for itself.

    The run's own directory, which only the run knows, is left alone.
    """
    found: list[Problem] = []

    def value(node: Any, key: Any, path: str) -> Any:
        raw = node._get_node(key)
        if raw._is_missing():
            return MISSING
        if raw._is_none():
            return None
        if not raw._is_interpolation():
            return plain_of(raw, path) if isinstance(raw, DictConfig | ListConfig) else raw._value()
        text = str(raw._value())
        if text == rules.OUTPUT_DIR:
            return text
        if "${hydra:" in text:
            found.append(Problem(path, f"{path}={text}: only a run that has started knows that; write a value"))
            return text
        try:
            seen = node[key]
            return OmegaConf.to_container(seen, resolve=True) if OmegaConf.is_config(seen) else seen
        except (OmegaConfBaseException, RecursionError) as error:
            reason = str(error).splitlines()[0] if isinstance(error, OmegaConfBaseException) else "it leads to itself"
            found.append(Problem(path, f"{path}={text}: {reason}"))
            return text

    def plain_of(node: DictConfig | ListConfig, path: str) -> Any:
        if isinstance(node, ListConfig):
            return [value(node, i, f"{path}[{i}]") for i in range(len(node))]
        return {key: value(node, key, f"{path}.{key}".lstrip(".")) for key in cast(dict[str, Any], node)}

    return plain_of(cfg, ""), found


def pointer(cfg: DictConfig, key: str) -> str:
    """The key that a value is taken from, as `${seed}` is; empty where it stands there itself."""
    raw: Any = cfg
    for part in key.split("."):
        raw = raw._get_node(part, validate_access=False) if isinstance(raw, DictConfig) else None
    found = re.fullmatch(r"\$\{([\w.]+)\}", str(raw._value())) if isinstance(raw, Node) else None
    return found[1] if found else ""


def misshapen(values: dict[str, Any]) -> list[Problem]:
    """What stands where it cannot, so that nothing can be said of what lies below it."""
    found = []
    for key in NODES:
        if key in values and not isinstance(values[key], dict):
            mend = "remove one by its name, callbacks.progress=null" if key == "callbacks" else OWN_KEYS
            if key in defaults() and isinstance(values[key], str):
                mend = f"a group is chosen in the defaults list, - override /{key}: {values[key]}"
            found.append(Problem(key, f"{key}={shown(values[key])}: {mend}"))
    for key in BUILT:
        node = at(values, key)
        if any(key.startswith(problem.key) for problem in found) or (isinstance(node, dict) and "_target_" in node):
            continue
        group = key.split(".")[0]
        if not isinstance(node, dict):
            found.append(Problem(key, f"{key}={shown(node)}: {OWN_KEYS}"))
            continue
        found.append(Problem(key, f"{key} has no _target_: nothing says what to build; choose one with {group}=…"))
    for key, needed in {"trainer.peft_config": "peft=lora", "model.quantization_config": "peft=qlora"}.items():
        node = at(values, key)
        if isinstance(node, dict) and "_target_" not in node:
            leaf = next((f"{name}={shown(value)}" for name, value in leaves(node, f"{key}.")), key)
            found.append(Problem(leaf.partition("=")[0], f"{leaf}: {key} says what it is with {needed}"))
    callbacks = values.get("callbacks")
    for name, made in callbacks.items() if isinstance(callbacks, dict) else ():
        if made is not None and not (isinstance(made, dict) and "_target_" in made):
            key = f"callbacks.{name}"
            found.append(Problem(key, f"{key}={shown(made)}: it needs a _target_ that says what to build, or is null"))
    return found


# ---------------------------------------------------------------- keys and types


def unfit(values: dict[str, Any]) -> Iterator[Problem]:
    """Keys that nothing takes and values of the wrong type, of the run itself and of all that it builds."""
    for key, node in nodes(values):
        target = SCHEMA.get(key) or node["_target_"]
        try:
            taken = signature(target)
        except ConfigError as error:
            yield Problem(f"{key}._target_", f"{key}._target_={target}: {error}")
            continue
        yield from unknown(key, node, taken, values)
        yield from mistyped(key, node, taken)
        yield from lacking(key, node, taken)


def nodes(values: Any, key: str = "") -> Iterator[tuple[str, dict[Any, Any]]]:
    """Each node that is held against a signature, with its dotted key: the run's own, and those with a `_target_`."""
    if isinstance(values, dict):
        if key in SCHEMA or isinstance(values.get("_target_"), str):
            yield key, values
        for name, value in values.items():
            yield from nodes(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for i, value in enumerate(values):
            yield from nodes(value, f"{key}[{i}]")


def unknown(key: str, node: dict[str, Any], taken: Signature, values: dict[str, Any]) -> Iterator[Problem]:
    live = LIVE.get(key, set())
    for name, value in node.items():
        path = f"{key}.{name}" if key else str(name)
        if name in HYDRAS and key not in SCHEMA:
            continue
        if name in live:
            yield Problem(
                path, f"{path}={shown(value)}: a run hands it over itself; model=, data= and callbacks say what"
            )
        elif name not in taken.parameters and not (taken.open and REST_IGNORED not in taken.bases):
            of = f"a field of {taken.target}" if key not in SCHEMA else f"a key of {key or 'a run'}"
            mend = f"; {instead}" if (instead := advice(path, value)) else meant(path, values)
            if "." in str(name):
                mend = "; in a file each part of a key stands on a line of its own, indented below the one before"
            yield Problem(path, f"{path}={shown(value)} is not {of}{mend}")


def mistyped(key: str, node: dict[str, Any], taken: Signature) -> Iterator[Problem]:
    for name, value in node.items():
        path = f"{key}.{name}" if key else str(name)
        if value == MISSING:
            yield Problem(path, f"{path} has no value: set {path}=…", missing=True)
        elif path in AUTO and value == "auto":
            continue
        elif name in taken.parameters and (allowed := misfit(value, taken.parameters[name])):
            taker = taken.target if key not in SCHEMA else key or "a run"
            yield Problem(path, f"{path}={shown(value)}: {taker} takes {'auto, ' * (path in AUTO)}{allowed}")


def lacking(key: str, node: dict[str, Any], taken: Signature) -> Iterator[Problem]:
    """Keys that a component cannot do without; of a `_partial_` one, the code hands the rest over.

    What becomes of the rows of a mixture, `data` says for all of its sources.
    """
    spared = signature(PREPARATION).parameters if key.startswith("data.") else {}
    for name, parameter in taken.parameters.items():
        if parameter.default is REQUIRED and not (name in node or name in spared or node.get("_partial_") is True):
            path = f"{key}.{name}" if key else name
            yield Problem(path, f"{path} has no value, and {taken.target} needs one: set {path}=…", missing=True)


# ---------------------------------------------------------------- what was meant


def meant(path: str, values: dict[str, Any]) -> str:
    """What an unknown key was meant to be, as `; did you mean …?`, else who takes it, else what is beside it."""
    parents, _, last = path.rpartition(".")
    known = [name for name in names(values) if name != path]
    here = [name for name in known if name.rpartition(".")[0] == parents]
    if close := nearest(last, known, 1.0) or nearest(last, here, 0.6):  # the same word elsewhere, or a like one here
        return f"; did you mean {close}?"
    if others := takers(path):
        return f"; {' or '.join(others)} takes it"
    if close := nearest(last, known, 0.7):
        return f"; did you mean {close}?"
    beside = sorted(name.rpartition(".")[2] for name in here)
    return f". Keys there: {', '.join(beside)}" if 0 < len(beside) <= 20 else ""


def nearest(word: str, keys: list[str], cutoff: float) -> str:
    """The key whose last word is most like one, whatever their case."""
    by_last = {key.rpartition(".")[2].lower(): key for key in reversed(keys)}
    close = difflib.get_close_matches(word.lower(), by_last, 1, cutoff)
    return by_last[close[0]] if close else ""


def takers(path: str) -> list[str]:
    """The options of a group with which a key could be set, as `trainer=dpo`."""
    parents, _, last = path.rpartition(".")
    group = parents.split(".")[0]
    found = []
    for file in sorted((CONF / group).glob("*.yaml")) if parents in ("data", "trainer.args") else ():
        targets = re.findall(r"^ *_target_: (\S+)", file.read_text(), re.MULTILINE)
        if any(last in signature(target).parameters for target in targets):
            found.append(f"{group}={file.stem}")
    return found


def names(values: dict[str, Any]) -> list[str]:
    """Every key that could be set in this config: groups, nodes, and what their components take."""
    found = [*defaults()]
    for key, node in nodes(values):
        try:
            taken = signature(SCHEMA.get(key) or node["_target_"])
        except ConfigError:
            continue
        found += [key, *(f"{key}.{n}" if key else n for n in taken.parameters if n not in LIVE.get(key, set()))]
    return [name for name in dict.fromkeys(found) if name]
