"""What plain data of YAML an annotation lets through, and how to say so to the person who wrote the value."""

import ast
import difflib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from smoltrain.config.source import DEFINING, Definition, Module, Unknown, last


@dataclass(frozen=True)
class Kind:
    """Some of what a parameter takes, in words for one and for many of it.

    `choices` are its values where these are few; those of an enum are `spelled`: a text beside it is one of them.
    """

    one: str
    many: str
    takes: Callable[[Any], bool]
    choices: tuple[Any, ...] = ()
    spelled: bool = False


Kinds = tuple[Kind, ...]

NOTHING = Kind("null", "null", lambda value: value is None, (None,))
SWITCH = Kind("true or false", "true or false", lambda value: isinstance(value, bool), (True, False))
WHOLE = Kind("a whole number", "whole numbers", lambda value: type(value) is int)
NUMBER = Kind("a number", "numbers", lambda value: type(value) in (int, float))
TEXT = Kind("a text", "texts", lambda value: isinstance(value, str))
MAPPING = Kind("a mapping", "mappings", lambda value: isinstance(value, dict))
ANYTHING = Kind("anything", "anything", lambda value: True)

PLAIN = {"None": NOTHING, "NoneType": NOTHING, "bool": SWITCH, "int": WHOLE, "float": NUMBER, "str": TEXT}
PLAIN |= {"Path": TEXT, "PathLike": TEXT}
WRAPPERS = {"Annotated", "Final", "Required", "NotRequired", "ReadOnly", "InitVar"}
LISTS = {"list", "sequence", "mutablesequence", "iterable", "collection", "tuple", "set", "mutableset", "frozenset"}
LISTS |= {"abstractset"}
MAPPINGS = {"dict", "mapping", "mutablemapping", "ordereddict", "defaultdict"}


def one_of(choices: Iterable[Any], spelled: bool = False) -> Kind:
    values = tuple(dict.fromkeys(choices))
    shown = ", ".join(map(written, values))
    one = f"one of {shown}" if len(values) > 1 else shown
    return Kind(one, f"any of {shown}", lambda value: any(same(value, choice) for choice in values), values, spelled)


def few(values: Iterable[Any]) -> tuple[Any, ...]:
    """Values as choices; none where one of them is not a plain scalar."""
    found = tuple(values)
    return found if all(value is None or isinstance(value, str | bool | int | float) for value in found) else ()


def same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other


def written(value: Any) -> str:
    """A plain value as YAML has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


@cache
def kinds(annotation: str, module: Module, declared: tuple[Any, ...] = ()) -> Kinds:
    """What an annotation written in a module lets through; anything where it cannot be told.

    The `declared` choices, where there are any, are all that the scalars of the annotation may be.
    """
    try:
        found = Reader(module, declared).union(ast.parse(annotation.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError):
        return (ANYTHING,)
    return tuple(sorted(found, key=lambda kind: kind is not NOTHING))


@dataclass(frozen=True)
class Reader:
    """Reads annotations of one module."""

    module: Module
    declared: tuple[Any, ...]
    seen: frozenset[Definition] = frozenset()

    def union(self, *nodes: ast.expr) -> Kinds:
        """The alternatives that annotations are of, each once."""
        found = tuple(dict.fromkeys(kind for node in nodes for kind in self.alternatives(node)))
        if ANYTHING in found:
            return (ANYTHING,)
        covered = [TEXT] if any(kind.spelled for kind in found) else []
        covered += [WHOLE] if NUMBER in found else []
        return tuple(kind for kind in found if kind not in covered)

    def alternatives(self, node: ast.expr) -> Kinds:
        match node:
            case ast.Constant(value=None):
                return (NOTHING,)
            case ast.Constant(value=str(text)):
                return self.union(ast.parse(text.strip(), mode="eval").body)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self.union(left, right)
            case ast.Subscript(value=value, slice=inner):
                return self.subscript(last(value), inner.elts if isinstance(inner, ast.Tuple) else [inner])
            case ast.Name() | ast.Attribute():
                return self.name(node)
        return (ANYTHING,)

    def subscript(self, name: str, arguments: list[ast.expr]) -> Kinds:
        """`list[int]`, `Optional[str]`, `Literal["a", "b"]` and their like."""
        if name == "Union":
            return self.union(*arguments)
        if name == "Optional":
            return self.union(*arguments, ast.Constant(None))
        if name in WRAPPERS:
            return self.union(arguments[0])
        if name == "Literal":
            try:
                return (one_of(map(self.module.value, arguments)),)
            except Unknown:
                return (ANYTHING,)
        if name.lower() == "tuple" and not is_ellipsis(arguments[-1]):
            return (list_of(self.union(*arguments), tuple(map(self.union, arguments))),)
        if name.lower() in LISTS:
            return (list_of(self.union(arguments[0])),)
        if name.lower() in MAPPINGS and len(arguments) == 2:
            return (mapping_to(self.union(arguments[1])),)
        return (ANYTHING,)

    def name(self, node: ast.Name | ast.Attribute) -> Kinds:
        name = last(node)
        if name in PLAIN:
            kind = PLAIN[name]
            narrower = self.declared and not kind.choices and all(map(kind.takes, self.declared))
            return (one_of(self.declared) if narrower else kind,)
        if name.lower() in LISTS:
            return (list_of((ANYTHING,)),)
        if name.lower() in MAPPINGS:
            return (MAPPING,)
        found = self.module.named(node)
        if not isinstance(found, Definition) or found in self.seen:
            return (ANYTHING,)
        if found.is_class:
            return (of_class(found),)
        value = getattr(found.statement.tree, "value", None)  # a name for other types
        return Reader(found.module, self.declared, self.seen | {found}).union(value) if value else (ANYTHING,)


def of_class(found: Definition) -> Kind:
    """An enum as its values, what has fields as a mapping; other objects cannot be told from plain data."""
    if members := enumerated(found):
        return one_of(members, spelled=True)
    return MAPPING if is_record(found) or is_dataclass(found) else ANYTHING


def enumerated(found: Definition) -> tuple[Any, ...]:
    """The values of an enum's members; none of another class, or where they are computed."""
    if not any(ancestor.full_name == "enum.Enum" for ancestor in found.ancestors):
        return ()
    members = [s for name, (s, *_) in found.body.items() if s.word not in DEFINING and not name.startswith("_")]
    try:
        return few(member.value for member in members)
    except Unknown:
        return ()


def is_record(found: Definition) -> bool:
    """Whether a class is a TypedDict or a NamedTuple."""
    trees = [owner.statement.tree for owner in (found, *found.ancestors)]
    bases = [last(base) for tree in trees if isinstance(tree, ast.ClassDef) for base in tree.bases]
    return "TypedDict" in bases or "NamedTuple" in bases


def is_dataclass(found: Definition) -> bool:
    """Whether a class is made from its annotated names, by its own decorator or that of a class it extends."""
    inherited = any("dataclass_transform" in ancestor.decorators for ancestor in found.ancestors)
    return inherited or "dataclass" in found.decorators


def list_of(each: Kinds, places: tuple[Kinds, ...] = ()) -> Kind:
    """A list whose items are of some kinds; with `places`, one item for each of them."""

    def takes(value: Any) -> bool:
        if not isinstance(value, list | tuple):
            return False
        if places:
            return len(value) == len(places) and all(map(fits, value, places))
        return all(fits(item, each) for item in value)

    number = f"{len(places)} " if places else ""
    shown = f" of {number}{words(each, many=True)}" if each != (ANYTHING,) else ""
    return Kind(f"a list{shown}", f"lists{shown}", takes)


def mapping_to(each: Kinds) -> Kind:
    def takes(value: Any) -> bool:
        return isinstance(value, dict) and all(fits(item, each) for item in value.values())

    shown = f" to {words(each, many=True)}" if each != (ANYTHING,) else ""
    return Kind(f"a mapping{shown}", f"mappings{shown}", takes)


def is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def words(allowed: Kinds, many: bool = False) -> str:
    """Kinds as one phrase: `null, true or false`."""
    parts = [[kind.many if many else kind.one] if kind is not SWITCH else ["true", "false"] for kind in allowed]
    *others, final = dict.fromkeys(part for several in parts for part in several)
    return f"{', '.join(others)} or {final}" if others else final


def fits(value: Any, allowed: Kinds) -> bool:
    """Whether plain data is of one of some kinds, as far as it is there: not what a `_target_` becomes."""
    if value == "???":
        return True
    if isinstance(value, dict) and "_target_" in value:
        return not all(kind in PLAIN.values() or kind.choices for kind in allowed)
    return any(kind.takes(value) for kind in allowed)


def finite(allowed: Kinds) -> tuple[Any, ...]:
    """All values that are of some kinds, where these are few; else none."""
    return tuple(choice for kind in allowed for choice in kind.choices) if all(k.choices for k in allowed) else ()


def mend(value: Any, name: str, allowed: Kinds) -> str:
    """How to write what was probably meant, as the end of a sentence; empty where nobody knows."""
    choices = [choice for kind in allowed for choice in kind.choices]
    if value is False and "no" in choices:
        return '; write "no" in quotes, YAML reads a bare no as false'
    if value is not None and fits([value], allowed):
        return f"; write [{written(value)}]"
    if isinstance(value, bool | int | float) and fits(str(value), allowed):
        return f"; for a text, quote it: {name}=\"'{written(value)}'\""
    if isinstance(value, float) and value.is_integer() and fits(int(value), allowed):
        return f"; write {int(value)}"
    if isinstance(value, str):
        return misspelt(value, allowed, {choice.lower(): choice for choice in choices if isinstance(choice, str)})
    return ""


def misspelt(text: str, allowed: Kinds, choices: dict[str, str]) -> str:
    """What a text was probably meant to be: one of `choices`, by their small letters, or a plain value."""
    plain = as_plain(text)
    if plain is not None and fits(plain, allowed):
        return f"; write {written(plain)}, without quotes"
    if text.lower() in ("null", "none", "~") and fits(None, allowed):
        return "; write null"
    close = difflib.get_close_matches(text.lower(), choices, n=1)
    return f"; did you mean {choices[close[0]]}?" if close else ""


def as_plain(text: str) -> bool | int | float | None:
    """The number or truth that a text spells."""
    lowered = text.strip().lower()
    if lowered in ("true", "yes", "on", "false", "no", "off"):
        return lowered in ("true", "yes", "on")
    if re.fullmatch(r"[+-]?\d{1,30}", lowered):
        return int(lowered)
    return float(lowered) if re.fullmatch(r"[+-]?(\d{1,30}\.?\d*|\.\d+)(e[+-]?\d{1,2})?", lowered) else None
