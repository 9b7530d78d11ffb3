"""What a `_target_` takes, read from its source: nothing is imported to know it."""

import ast
import importlib.util
import pkgutil
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from smoltrain.config import ConfigError, suggest
from smoltrain.config.kinds import Kinds, few, finite, fits, is_dataclass, is_record, kinds, mend, same, words
from smoltrain.config.source import Definition, Module, Statement, Unknown, last, module, module_at


class Default:
    """Stands where a default that could be shown is not."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


REQUIRED = Default("REQUIRED")  # there is none: a value has to be given
COMPUTED = Default("COMPUTED")  # there is one, and it is not a literal

# How a class's own code tells what its fields take, whatever its annotations say.
TYPES = "str|int|float|bool|list|dict"
ASKED = re.compile(rf"isinstance\(self\.(\w+), \(?((?:(?:{TYPES})(?:, )?)+)\)(?!\)?:\s*raise)")
SWITCHED = re.compile(r"self\.(\w+) = \{?(?:True|False)\b")
DEMANDED = re.compile(rf"not isinstance\(self\.(\w+), ({TYPES})\):\s*raise")


@dataclass(frozen=True)
class Parameter:
    """What a signature takes under one name, `declared` being the choices that a dataclass field's metadata names."""

    name: str
    annotation: str
    default: Any
    declared: tuple[Any, ...]
    file: Path
    line: int

    @cached_property
    def kinds(self) -> Kinds:
        """What it takes by its annotation and declared choices, and whatever else its class reckons with."""
        written = module_at(self.file)
        demanded, asked = reckoned(written, self.line)
        annotation = self.annotation or demanded.get(self.name, "Any")
        # A list or mapping of anything would widen one of a certain kind.
        also = [kind for kind in asked.get(self.name, ()) if kind not in ("list", "dict") or kind not in annotation]
        return kinds(" | ".join([annotation, *sorted(also)]), written, self.declared)

    @cached_property
    def choices(self) -> tuple[Any, ...]:
        """All values that it takes; empty where these are not a few."""
        return finite(self.kinds)


@dataclass(frozen=True)
class Signature:
    """What a target takes, and where it is really defined, whatever the name that it was reached by.

    `bases` are the real names of all classes that a class extends, nearest first, as far as they have Python source.
    `open` means that names are taken that are not among the `parameters`.
    """

    target: str
    module: str
    name: str
    is_class: bool
    bases: tuple[str, ...]
    parameters: dict[str, Parameter]
    open: bool


@cache
def signature(target: str) -> Signature:
    """The signature of what a dotted name stands for.

    Raises ConfigError where there is nothing of that name, or nothing that can be called.
    """
    found = find(target)
    parameters, is_open = constructor(found) if found.is_class else called(found)
    bases = tuple(ancestor.full_name for ancestor in found.ancestors) if found.is_class else ()
    return Signature(target, found.module.name, found.name, found.is_class, bases, parameters, is_open)


def misfit(value: Any, parameter: Parameter) -> str:
    """What a parameter allows, in words, where plain data does not fit it; empty where it does."""
    allowed = parameter.kinds
    if same(value, parameter.default) or fits(value, allowed):
        return ""
    return words(allowed) + mend(value, parameter.name, allowed)


def find(target: str) -> Definition:
    """The class or function that a dotted name stands for. Raises ConfigError which says what part is not there."""
    first, *rest = target.split(".")
    if not rest or not all(part.isidentifier() for part in (first, *rest)):
        raise ConfigError(f"{target}: a dotted name is wanted, as trl.SFTConfig is")
    here: Module | Definition | None = module(first)
    if here is None:
        raise ConfigError(f"{target}: there is no module {first}{suggest(first, installed())}")
    walked = first
    for part in rest:
        there = here.member(part)
        if there is None:
            if isinstance(here, Module) and not here.file and not here.folders:
                raise ConfigError(f"{target}: {walked} has no Python source to read {part} from")
            close = suggest(part, here.names(part)).replace("did you mean ", f"did you mean {walked}.")
            raise ConfigError(f"{target}: there is no {part} in {walked}{close}")
        here, walked = there, f"{walked}.{part}"
    if isinstance(here, Module):
        raise ConfigError(f"{target} is a module: name a class or a function in it")
    if not (here.is_class or here.is_function):
        raise ConfigError(f"{target} is a value, not a class or a function")
    return here


def installed() -> set[str]:
    """The names of all modules that are not inside another."""
    return {found.name for found in pkgutil.iter_modules()}


# ---------------------------------------------------------------- classes


def constructor(found: Definition) -> tuple[dict[str, Parameter], bool]:
    """The parameters with which a class is made, and whether it takes others too."""
    if is_record(found):
        return members(found), False
    for owner in (found, *found.ancestors):
        for name in ("__init__", "__new__"):
            if name in owner.body:
                return made_by(owner, name)
        if is_dataclass(owner):
            calls = [call for kind in (owner, *owner.ancestors) for call in kind.decorators.values() if call]
            return members(owner), any(k.arg == "accept_kwargs" for call in calls for k in call.keywords)
        if owner.decorators or None in owner.parents:  # what makes its __init__ is not written there
            return {}, True
    return {}, False


def made_by(owner: Definition, name: str) -> tuple[dict[str, Parameter], bool]:
    """The parameters of `__init__` or `__new__`; one that hands on what else is named takes its ancestor's too."""
    statement = owner.body[name][-1]
    own, is_open = called(Definition(owner.module, f"{owner.name}.{name}", statement))
    kwarg = statement.tree.args.kwarg if isinstance(statement.tree, ast.FunctionDef) else None
    handed_on = kwarg and re.search(rf"super\(\)\.{name}\([^()]*\*\*{kwarg.arg}\b", statement.text)
    if not (handed_on and owner.ancestors):
        return own, is_open
    inherited, is_open = constructor(owner.ancestors[0])
    return inherited | own, is_open


def members(found: Definition) -> dict[str, Parameter]:
    """The fields of a dataclass, a TypedDict or a NamedTuple, those of the classes that it extends first."""
    collected: dict[str, Parameter] = {}
    for owner in reversed((found, *found.ancestors)):
        if is_dataclass(owner) or is_record(owner):
            collected |= fields(owner)
    return collected


@cache
def fields(owner: Definition) -> dict[str, Parameter]:
    """What the annotated names in the body of a class are, as parameters."""
    found = {}
    header = owner.statement.tree
    partial = isinstance(header, ast.ClassDef) and any(k.arg == "total" and is_false(k.value) for k in header.keywords)
    for name, statements in owner.body.items():
        tree = statements[-1].tree
        if isinstance(tree, ast.AnnAssign) and last(tree.annotation) != "KW_ONLY":
            annotation = statements[-1].written(tree.annotation)
            given = field_call(tree.value)
            if "ClassVar" in annotation or is_false(given.get("init")):
                continue
            computed = partial or "NotRequired" in annotation or "default_factory" in given
            field = (given.get("default"), computed, given.get("metadata"))
            found[name] = parameter(statements[-1], name, annotation, *field)
    return found


def field_call(value: ast.expr | None) -> dict[str, ast.expr]:
    """The keyword arguments of `field(…)`, or of a validator that makes one: `interval(min=0)(default=1)`."""
    if isinstance(value, ast.Call) and (last(value.func).endswith("field") or isinstance(value.func, ast.Call)):
        return {k.arg: k.value for k in value.keywords if k.arg}
    return {"default": value} if value else {}


def is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


# ---------------------------------------------------------------- functions


def called(found: Definition) -> tuple[dict[str, Parameter], bool]:
    """The parameters of a function, and whether it takes others; less those that Python itself hands over."""
    statement, tree = found.statement, found.statement.tree
    if not isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
        return {}, True
    given, method = tree.args, found.name.rpartition(".")[2]
    positional = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    if "." in found.name and (method in ("__init__", "__new__") or "classmethod" in found.decorators):
        positional, defaults = positional[1:], defaults[1:]
    collected = {}
    for argument, default in zip([*positional, *given.kwonlyargs], [*defaults, *given.kw_defaults], strict=True):
        annotation = statement.written(argument.annotation) if argument.annotation else ""
        collected[argument.arg] = parameter(statement, argument.arg, annotation, default, line=statement.line(argument))
    if given.kwarg is None:
        return collected, False
    match given.kwarg.annotation:
        case ast.Subscript(value=wrapper, slice=inner) if last(wrapper) == "Unpack":
            unpacked = found.module.named(inner)
            if isinstance(unpacked, Definition) and unpacked.is_class:
                return collected | members(unpacked), False
    return collected, True


def parameter(
    statement: Statement,
    name: str,
    annotation: str,
    default: ast.expr | None,
    computed: bool = False,
    metadata: ast.expr | None = None,
    line: int = 0,
) -> Parameter:
    written = statement.module
    assert written.file is not None
    value: Any = COMPUTED if computed else REQUIRED
    if default is not None:
        try:
            value = written.value(default)
        except Unknown:
            value = COMPUTED
    return Parameter(name, annotation, value, declared(written, metadata), written.file, line or statement.line())


def declared(written: Module, metadata: ast.expr | None) -> tuple[Any, ...]:
    """The `choices` of a dataclass field's metadata, where they can be read."""
    for key, value in zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ():
        if isinstance(key, ast.Constant) and key.value == "choices":
            try:
                return few(written.value(value))
            except (Unknown, TypeError):
                return ()
    return ()


def reckoned(written: Module, line: int) -> tuple[dict[str, str], dict[str, set[str]]]:
    """The types that the class around a line demands of its fields, and those that it asks for or sets, by name."""
    for start in written.newlines[line - 1 : line]:
        for statement in written.statements:
            if statement.word == "class" and statement.start <= start < statement.stop:
                return reckoning(statement)
    return {}, {}


@cache
def reckoning(statement: Statement) -> tuple[dict[str, str], dict[str, set[str]]]:
    text = statement.text
    asked: dict[str, set[str]] = {name: {"bool"} for name in SWITCHED.findall(text)}
    for name, types in ASKED.findall(text):
        asked[name] = asked.get(name, set()) | set(types.split(", "))
    return dict(DEMANDED.findall(text)), asked


def package_folder(package: str) -> Path:
    """Where an installed package is, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{package} is not installed")
    return Path(spec.origin).parent
