"""Python modules as they are written: what the names in them stand for, read without importing anything."""

import ast
import importlib.util
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

STRING = (
    r'"""[^"\\]*+(?:(?:\\.|"(?!""))[^"\\]*+)*+"""'
    r"|'''[^'\\]*+(?:(?:\\.|'(?!''))[^'\\]*+)*+'''"
    r'|"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"'
    r"|'[^'\\\n]*+(?:\\.[^'\\\n]*+)*+'"
)
WORD = r"""(?:@|[^\W\d]\w*+(?!["']))"""  # what a statement begins with, if it is one that binds a name
HEADER = re.compile(
    rf"{STRING}|\#[^\n]*|\\.|(?P<open>[(\[{{])|(?P<close>[)\]}}])|\n(?P<indent>[ \t]*)(?={WORD})", re.DOTALL
)
BRANCHES = {"if", "elif", "else", "try", "except", "finally", "with", "for", "while"}
FUNCTION = ("def", "async")
DEFINING = ("class", *FUNCTION)
BOUND = re.compile(r"\s*(?:class\s+|(?:async\s+)?def\s+|(?=\w+\s*(?::|=(?!=))))(\w+)")
STAR = re.compile(r"\s*from\s+([.\w]+)\s+import\s+\*")
FEW = 20  # star imports that are all followed; of more, those whose module's name is how the name begins


class Unknown(Exception):
    """The value of an expression cannot be read off the source."""


@cache
def statement_at(indent: str) -> re.Pattern[str]:
    """Matches a whole statement that begins, after a newline, with this indentation; else what is before the first.

    In one go, since files are long: strings, comments and continued lines are stepped over, brackets are not looked at.
    """
    begin = rf"\n{indent}(?P<word>{WORD})"
    step = rf"""{STRING}|\#[^\n]*+|\\.|[^"'#\\\n]++|\n(?!{indent}{WORD})|["']"""
    return re.compile(rf"(?:{begin})?+(?>{step})*+", re.DOTALL)


class Module:
    """A module by its name, its file (None where there is no Python source), and the folders of its submodules."""

    def __init__(self, name: str, file: Path | None, folders: Iterable[str] = ()):
        self.name, self.file, self.folders = name, file, tuple(folders)

    # ------------------------------------------------------------ its text

    @cached_property
    def text(self) -> str:
        """The file's text, after a newline, so that each of its lines comes after one."""
        return "\n" + (self.file.read_text(encoding="utf-8", errors="replace") if self.file else "")

    @cached_property
    def newlines(self) -> list[int]:
        return [found.start() for found in re.finditer("\n", self.text)]

    def block(self, start: int, stop: int, indent: str) -> Iterator["Statement"]:
        """The statements in a part of the text that have this indentation, each with its decorators and its body."""
        begin = -1
        while start < stop:
            found = statement_at(indent).match(self.text, start, stop)
            assert found and found.end() > start
            start = found.end()
            if found["word"]:
                begin = found.start() if begin < 0 else begin
                if found["word"] != "@":
                    yield Statement(self, begin, found.start(), start, indent, found["word"])
                    begin = -1

    def scope(self, block: Iterable["Statement"]) -> Iterator["Statement"]:
        """The statements of a scope, those within its `if` and `try` included."""
        for statement in block:
            if statement.word in BRANCHES:
                yield from self.scope(statement.block)
            else:
                yield statement

    @cached_property
    def statements(self) -> list["Statement"]:
        return list(self.scope(self.block(0, len(self.text), "")))

    @cached_property
    def imports(self) -> list["Statement"]:
        return [statement for statement in self.statements if statement.word in ("from", "import")]

    @cached_property
    def bound(self) -> dict[str, list["Statement"]]:
        """What defines or assigns each name; imports are apart."""
        return by_name(self.statements)

    @cached_property
    def exported(self) -> set[str] | None:
        """The names in `__all__`; None where they cannot be read, or there is none."""
        if len(re.findall(r"^__all__\b", self.text, re.MULTILINE)) != 1 or "__all__" not in self.bound:
            return None
        try:
            return set(self.bound["__all__"][0].value)
        except (Unknown, TypeError):
            return None

    # ------------------------------------------------------------ what its names stand for

    @cached_property
    def submodules(self) -> set[str]:
        entries = [entry for folder in self.folders if Path(folder).is_dir() for entry in Path(folder).iterdir()]
        found = {entry.stem for entry in entries if entry.suffix in ("", ".py") and entry.stem.isidentifier()}
        return found - {"__init__", "__pycache__"}

    def submodule(self, name: str) -> "Module | None":
        return module(f"{self.name}.{name}") if name in self.submodules else None

    def member(self, name: str, seen: frozenset = frozenset()) -> "Module | Definition | None":
        """What a name of this module is, where it is really defined; None where that is not to be found."""
        if (self.name, name) in seen:  # a package imports its own submodule
            return self.submodule(name)
        seen |= {(self.name, name)}
        found = next((thing for thing in self.bindings(name, seen) if thing is not None), None)
        return found or self.submodule(name) or self.far(name, seen)

    def bindings(self, name: str, seen: frozenset) -> Iterator["Module | Definition | None"]:
        """What a name may be, the likeliest first: by the last statement that binds it, but for those in a branch.

        An import that is tried comes before what stands in for it. A value comes last: `A = wrapped(A)` is still A.
        """
        imports = [s for s in self.imports if self.text.find(name, s.start, s.stop) >= 0]
        values = []
        for statement in sorted([*imports, *self.bound.get(name, [])], key=precedence):
            tree = statement.tree
            if statement.word in DEFINING:
                yield Definition(self, name, statement)
            elif isinstance(tree, ast.Import | ast.ImportFrom):
                yield from self.imported(name, tree, seen)
            elif isinstance(tree, ast.Assign | ast.AnnAssign):
                values.append(Definition(self, name, statement))
                if isinstance(tree.value, ast.Name | ast.Attribute):
                    yield self.named(tree.value, seen)
        yield from values

    def imported(
        self, name: str, tree: ast.Import | ast.ImportFrom, seen: frozenset
    ) -> Iterator["Module | Definition | None"]:
        for alias in tree.names:
            if isinstance(tree, ast.ImportFrom):
                if name == (alias.asname or alias.name) and (source := self.origin(tree.module or "", tree.level)):
                    yield source.member(alias.name, seen)
            elif name == (alias.asname or alias.name.partition(".")[0]):
                yield module(alias.name if alias.asname else name)

    def far(self, name: str, seen: frozenset) -> "Module | Definition | None":
        """What a name is that comes by a star import, or from the table of a package that imports lazily."""
        stars = [source for source in self.stars(name) if source.brings(name)]
        return next((found for source in (*stars, *self.lazy(name)) if (found := source.member(name, seen))), None)

    def brings(self, name: str) -> bool:
        """Whether a star import from here may bring a name."""
        return not name.startswith("_") if self.exported is None else name in self.exported

    def stars(self, name: str) -> Iterator["Module"]:
        """The modules whose star imports may bring a name; where they are very many, those that it begins with."""
        stars = [found for s in self.imports if (found := STAR.match(self.text, s.start, s.stop))]
        for source in (found[1] for found in stars):
            short = source.rpartition(".")[2].replace("_", "")
            if len(stars) <= FEW or name.lower().startswith(short):
                above = len(source) - len(source.lstrip("."))
                if starred := self.origin(source.lstrip("."), above):
                    yield starred

    def lazy(self, name: str) -> Iterator["Module"]:
        """The modules that bring a name by `_import_structure`, the table of transformers, trl and their like."""
        for statement in self.bound.get("_import_structure", []):
            try:
                table = statement.value
            except Unknown:
                continue
            for source in (key for key, names in table.items() if name in names) if isinstance(table, dict) else ():
                if found := module(f"{self.name}.{source}"):
                    yield found

    def origin(self, name: str, level: int) -> "Module | None":
        """The module that is imported from by a name and a number of dots before it."""
        if not level:
            return module(name)
        package = self.name.split(".") if self.folders else self.name.split(".")[:-1]
        package = package[: len(package) - level + 1]
        return module(".".join([*package, name] if name else package)) if package else None

    def named(self, node: ast.AST | None, seen: frozenset = frozenset()) -> "Module | Definition | None":
        """What an expression such as `A`, `a.B` or `A[int]` stands for in this module."""
        if isinstance(node, ast.Name):
            return self.member(node.id, seen)
        if isinstance(node, ast.Subscript):
            return self.named(node.value, seen)
        if isinstance(node, ast.Attribute) and (parent := self.named(node.value, seen)):
            return parent.member(node.attr, seen)
        return None

    def value(self, node: ast.AST | None) -> Any:
        """The value of an expression that is plain data, names of such data and simple calls on it included.

        Raises Unknown for any other.
        """
        try:
            return ast.literal_eval(node)  # type: ignore[arg-type]
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            pass
        match node:
            case ast.List(elts=items):
                return [self.value(item) for item in items]
            case ast.Dict(keys=keys, values=values):
                return {self.value(key): self.value(value) for key, value in zip(keys, values, strict=True)}
            case ast.Call(func=ast.Name("dict"), args=[], keywords=keywords):
                given: dict[str, Any] = {}
                for keyword in keywords:
                    value = self.value(keyword.value)
                    given |= {keyword.arg: value} if keyword.arg else value
                return given
            case ast.Call(func=ast.Name("list"), args=[items], keywords=[]):
                return list(self.value(items))
            case ast.Call(func=ast.Attribute(value=table, attr="keys"), args=[], keywords=[]):
                return list(self.value(table))
            case ast.Call(func=ast.Attribute(value=table, attr="copy"), args=[], keywords=[]):
                return self.value(table)
            case ast.Call(func=function, args=[], keywords=[]):
                found = self.named(function)
                if isinstance(found, Definition) and found.is_function:
                    return found.returned
            case ast.Name() | ast.Attribute():
                found = self.named(node)
                if isinstance(found, Definition) and len(found.siblings) == 1:
                    return found.statement.value
                if isinstance(node, ast.Attribute) and node.attr == "value":  # of an enum's member
                    return self.value(node.value)
        raise Unknown

    def names(self, like: str) -> set[str]:
        """The names to be had from this module; of those that come by star imports, what `like` may have meant."""
        words = {word for s in self.imports for word in re.findall(r"\w+", s.text.partition("import")[2])} - {"as"}
        words |= self.bound.keys() | self.submodules
        done, pending = {self.name}, [self]
        while pending:
            for source in pending.pop().stars(like):
                if source.name not in done:
                    done.add(source.name)
                    pending.append(source)
                    words |= source.exported or source.bound.keys()
        return words


@dataclass(frozen=True, eq=False)
class Statement:
    """A statement of a module, from `start`, where its decorators begin, over its `head` to before `stop`."""

    module: Module
    start: int
    head: int
    stop: int
    indent: str
    word: str

    @property
    def text(self) -> str:
        return self.module.text[self.start : self.stop]

    def line(self, node: ast.AST | None = None) -> int:
        """The line of the file where the statement's head is, or a node of its tree."""
        if node is None:
            return bisect_left(self.module.newlines, self.head) + 1
        return bisect_left(self.module.newlines, self.start) + node.lineno - 1  # type: ignore[attr-defined]

    def written(self, node: ast.expr) -> str:
        """A node of its tree as it is written."""
        lines = self.text.encode().split(b"\n")
        if node.lineno != node.end_lineno:
            return ast.unparse(node)
        return lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode()

    @cached_property
    def inner(self) -> tuple[int, str]:
        """Where its body begins, and with what indentation; where it ends, if it has none on lines of its own."""
        depth = 0
        for token in HEADER.finditer(self.module.text, self.head + 1, self.stop):
            depth += (token.lastgroup == "open") - (token.lastgroup == "close")
            if token.lastgroup == "indent" and not depth:
                return token.start(), token["indent"]
        return self.stop, ""

    @property
    def block(self) -> Iterator["Statement"]:
        start, indent = self.inner
        return self.module.block(start, self.stop, indent)

    @cached_property
    def tree(self) -> ast.stmt:
        """The statement, parsed; of a class or a function only what is before its body."""
        text = self.text
        if self.word in DEFINING and self.inner[0] < self.stop:
            text = f"{self.module.text[self.start : self.inner[0]]}\n{self.inner[1]}pass"
        try:
            tree = ast.parse(f"if 1:{text}" if self.indent else text).body[0]
        except (SyntaxError, ValueError, RecursionError):
            return ast.Pass()
        return tree.body[0] if self.indent and isinstance(tree, ast.If) else tree

    @property
    def value(self) -> Any:
        """What it assigns. Raises Unknown where that is not plain data."""
        try:
            if isinstance(self.tree, ast.Assign | ast.AnnAssign):
                return self.module.value(self.tree.value)
        except RecursionError:  # it is made of itself
            pass
        raise Unknown


def precedence(statement: Statement) -> tuple[int, int]:
    if not statement.indent:
        return 0, -statement.start
    return (2, -statement.start) if statement.word in DEFINING else (1, statement.start)


def by_name(statements: Iterable[Statement]) -> dict[str, list[Statement]]:
    """The definitions and assignments among statements, by the name that they bind."""
    found: dict[str, list[Statement]] = {}
    for statement in statements:
        bound = BOUND.match(statement.module.text, statement.head, statement.stop)
        if bound and statement.word not in ("from", "import"):
            found.setdefault(bound[1], []).append(statement)
    return found


def last(node: ast.expr) -> str:
    """The last part of a dotted name, or of the name that is called or subscripted."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=inner) | ast.Subscript(value=inner):
            return last(inner)
    return ""


@dataclass(frozen=True)
class Definition:
    """A class, a function or an assigned value by the module and the qualified name under which it is written."""

    module: Module
    name: str
    statement: Statement = field(compare=False)

    @property
    def is_class(self) -> bool:
        return self.statement.word == "class"

    @property
    def is_function(self) -> bool:
        return self.statement.word in FUNCTION

    @property
    def full_name(self) -> str:
        return f"{self.module.name}.{self.name}"

    @cached_property
    def body(self) -> dict[str, list[Statement]]:
        """Of a class, what defines or assigns each name in it."""
        return by_name(self.module.scope(self.statement.block)) if self.is_class else {}

    @property
    def siblings(self) -> list[Statement]:
        """What binds the same name in the same scope."""
        return self.module.bound.get(self.name, [self.statement])

    @property
    def returned(self) -> Any:
        """What a function returns that does nothing else. Raises Unknown for any other."""
        statements = list(self.statement.block)
        tree = statements[0].tree if statements else None
        if len(statements) == 1 and isinstance(tree, ast.Return):
            return self.module.value(tree.value)
        raise Unknown

    @cached_property
    def parents(self) -> list["Definition | None"]:
        """The base classes as they are written, None for each that has no Python source; `object` is left out."""
        tree = self.statement.tree
        nodes = [base for base in tree.bases if last(base) != "object"] if isinstance(tree, ast.ClassDef) else []
        found = [self.module.named(base, frozenset({(self.module.name, self.name)})) for base in nodes]
        return [thing if isinstance(thing, Definition) and thing.is_class else None for thing in found]

    @cached_property
    def ancestors(self) -> tuple["Definition", ...]:
        """All classes that it extends, nearest first: the last mention of each counts, as Python has it."""
        return tuple(dict.fromkeys(reversed(list(self.lineage(frozenset({self}))))))[::-1]

    def lineage(self, seen: frozenset) -> Iterator["Definition"]:
        for parent in self.parents:
            if parent is not None and parent not in seen:
                yield parent
                yield from parent.lineage(seen | {parent})

    @property
    def decorators(self) -> dict[str, ast.Call | None]:
        """The last part of each decorator's name, with the call that it is, where it is one."""
        nodes = getattr(self.statement.tree, "decorator_list", [])
        return {last(node): node if isinstance(node, ast.Call) else None for node in nodes}

    def member(self, name: str, seen: frozenset = frozenset()) -> "Definition | None":
        """What is written under a name in a class, or in one that it extends."""
        for owner in (self, *self.ancestors):
            if name in owner.body:
                return Definition(owner.module, f"{owner.name}.{name}", owner.body[name][-1])
        return None

    def names(self, like: str) -> set[str]:
        return {name for owner in (self, *self.ancestors) for name in owner.body}


@cache
def module(name: str) -> Module | None:
    """A module by its dotted name; None where there is none. Nothing is imported: only the top name is looked for."""
    package, _, last = name.rpartition(".")
    if package:
        parent = module(package)
        for folder in map(Path, parent.folders if parent and last in parent.submodules else ()):
            if (folder / last / "__init__.py").is_file():
                return Module(name, folder / last / "__init__.py", [str(folder / last)])
            if (folder / f"{last}.py").is_file():
                return Module(name, folder / f"{last}.py")
            if (folder / last).is_dir():
                return Module(name, None, [str(folder / last)])
        return None
    try:
        # First where the files are: other finders may import something to find what they are asked for.
        spec = PathFinder.find_spec(name) or importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    file = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    return Module(name, file, spec.submodule_search_locations or ())


@cache
def module_at(file: Path) -> Module:
    """The module that a file is, by the name under which it is imported where that can be told."""
    names, folder = [] if file.stem == "__init__" else [file.stem], file.parent
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    found = module(".".join(names))
    return found if found and found.file == file else Module(".".join(names), file)
