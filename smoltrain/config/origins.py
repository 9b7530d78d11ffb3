"""Who set each key of a config: the line of a file or the argument, and what it overrode, as a chain.

Hydra says which files a command line reads, in which order, and where in the config each belongs. Here they are merged
once more, as OmegaConf merges them, with its place beside every value.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository, IConfigRepository
from hydra._internal.defaults_list import _create_result_default, create_defaults_list
from hydra.core.default_element import DefaultsTreeNode, GroupDefault, InputDefault, ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader, split_key

from smoltrain.config import CONF, ConfigError, plain
from smoltrain.config.groups import folders
from smoltrain.config.overrides import quoted, read

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Setting:
    """One value that a key was given.

    `value` is as written, with its `${…}`; `where` is file:line, or the argument itself. `shipped` says whether the
    file is ours or Hydra's own. `chosen` says what brought it: `command line`, or of a file the choice, as
    `trainer=dpo (command line)`; it is empty for files that are always read.
    """

    value: Any
    where: str
    shipped: bool
    chosen: str = ""

    @property
    def typed(self) -> bool:
        """Whether it is an argument of the command line."""
        return self.chosen == COMMAND_LINE


Chain = list[Setting]  # oldest first; the last one is in force


@dataclass
class Trace:
    """Where a config comes from: the chains of its leaves and of the choices behind its files."""

    config: dict[str, Any]  # as composed, unresolved; Hydra's own node included
    leaves: dict[str, Chain]
    nodes: dict[str, Chain]  # what stood at a key before it became a node
    removed: dict[str, Chain]  # by `~key`, which is the last of the chain, without a value
    groups: dict[str, Chain]  # of each group; a setting's value is the option
    files: dict[str, list[str]]  # what the option of a group brought, in the order of reading


def origins(overrides: list[str], arguments: list[str]) -> dict[str, Chain]:
    """The chain of each dotted leaf key of the config that a command line composes to, Hydra's own node included.

    Takes what `compose` takes; lists are leaves. The command line has to compose.
    """
    return trace(overrides, arguments).leaves


def trace(overrides: list[str], arguments: list[str]) -> Trace:
    """As `origins`, with the choices behind the files."""
    given = [override for override in overrides if not override.startswith("hydra.searchpath=")]
    if extra := [quoted(f"file://{folder.absolute()}") for folder in folders(arguments)[:-1]]:
        given.append(f"hydra.searchpath=[{','.join(extra)}]")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        parsed = [override for text in given if (override := read(text))]
        repository = CachingConfigRepository(Marked(loader.config_search_path))
        loader._process_config_searchpath("config", parsed, repository)
        found = create_defaults_list(repository, "config", parsed, prepend_hydra=True, skip_missing=False)
        groups = choices(found.defaults_tree, repository, parsed, found.config_overrides)
        merged = Merged()
        brought: dict[str, list[str]] = {}
        for default, by in merging(found.defaults_tree):
            assert default.config_path is not None
            layer = repository.load_config(default.config_path)
            assert isinstance(layer, Layer)
            group, _, option = default.config_path.rpartition("/")
            if group in groups and isinstance(groups[group][-1].value, list):  # `experiment=[a,b]`
                by = group, option
            brought.setdefault(by[0], []).append(layer.name)
            merged.add(layer.tree, default.package.split(".") if default.package else [], told(by, groups))
        for override in found.config_overrides:
            merged.override(override)
    root = merged.root
    return Trace(values(root), dict(root.chains()), dict(root.replaced()), merged.removed, groups, brought)


# ---------------------------------------------------------------- files


@dataclass
class Layer(ConfigResult):
    """A file as Hydra's repository hands it out; in `tree` its keys, and a Setting for each leaf."""

    name: str = ""
    tree: dict[Any, Any] = field(default_factory=dict)


class Marked(ConfigRepository):
    """Hydra's repository, but that it reads with libyaml, where that is there, and keeps the line of every key."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None:
            return None
        name, text = located(source, config_path)
        shipped = source.scheme() != "file" or Path(source.path) == CONF
        found = marked(text, name, shipped)
        if found is None:  # a dataclass, Hydra's own or our schema; or a file without a key
            loaded = super().load_config(config_path)
            assert loaded is not None
            return Layer(
                **vars(loaded), name=name, tree=settings(without_defaults(plain(loaded.config)), name, shipped)
            )
        tree, lines = found
        # Hydra looks at no other keys before it merges.
        config = OmegaConf.create({key: values(tree[key]) for key in ("defaults", "hydra") if key in tree})
        listed = self._create_defaults_list(config_path, self._extract_defaults_list(config_path, config))
        for default, line in zip(listed, lines, strict=True):
            if isinstance(default, GroupDefault):  # whose value Hydra replaces by what is chosen
                vars(default)["written"] = Setting(default.value, f"{name}:{line}", shipped)
        header = ConfigSource._get_header_dict(text[:512])
        return Layer(source.provider, source.path, config, header, listed, name=name, tree=without_defaults(tree))


def without_defaults(tree: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in tree.items() if key != "defaults"}


def located(source: ConfigSource, config_path: str) -> tuple[str, str]:
    """A file's name as people know it, and its text; of a dataclass, no text."""
    inside = ConfigSource._normalize_file_name(config_path)
    if source.scheme() == "file":
        file = Path(source.path) / inside
        if Path(source.path) == CONF:
            name = f"conf/{inside}"
        else:
            name = str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)
        return name, file.read_text(encoding="utf-8")
    if source.scheme() == "pkg":
        package = package_files(source.path)
        return f"{source.path.replace('.', '/')}/{inside}", package.joinpath(inside).read_text(encoding="utf-8")
    return config_path, ""


@cache
def reader() -> Any:
    """YAML as OmegaConf reads it, in C where libyaml is there."""
    omegaconfs = get_yaml_loader()
    resolving = {name: getattr(omegaconfs, name) for name in ("yaml_implicit_resolvers", "yaml_constructors")}
    return type("Reader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), resolving)


@lru_cache(maxsize=256)
def marked(text: str, name: str, shipped: bool) -> tuple[dict[Any, Any], list[int]] | None:
    """The keys of a YAML text with a Setting for each leaf, and the lines of its defaults list; None without keys."""
    loader = reader()(text)
    root = loader.get_single_node()
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}: a config file holds keys and their values")
    if root is None:
        return None
    lines: list[int] = []

    def tree(node: yaml.MappingNode) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        return {loader.construct_object(key, deep=True): leaf(value, key) for key, value in node.value}

    def leaf(node: yaml.Node, key: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return tree(node)
        if node in defaults:
            lines.extend(entry.start_mark.line + 1 for entry in node.value)
        return Setting(loader.construct_object(node, deep=True), f"{name}:{key.start_mark.line + 1}", shipped)

    defaults = [v for k, v in root.value if k.value == "defaults" and isinstance(v, yaml.SequenceNode)]
    return tree(root), lines


def settings(node: dict[Any, Any], where: str, shipped: bool, chosen: str = "") -> dict[Any, Any]:
    """Plain values as Settings, all of one place."""
    return {
        key: settings(value, where, shipped, chosen)
        if isinstance(value, dict)
        else Setting(value, where, shipped, chosen)
        for key, value in node.items()
    }


# ---------------------------------------------------------------- choices

Choice = tuple[str, str]  # a group and its option; empty for files that are always read
Tree = DefaultsTreeNode | InputDefault


def opened(tree: Tree, above: Choice) -> tuple[InputDefault, list[Any], Choice]:
    """A file in Hydra's tree of defaults, what its defaults list brings, and the choice that brought itself."""
    node, below = (tree.node, tree.children or []) if isinstance(tree, DefaultsTreeNode) else (tree, [])
    return node, below, (node.get_override_key(), str(node.get_name())) if isinstance(node, GroupDefault) else above


def visited(tree: Tree, above: Choice = ("", "")) -> Iterator[tuple[InputDefault, Choice]]:
    """The files as Hydra visits them: of their `override` lines for a group, the first wins."""
    node, below, by = opened(tree, above)
    if not (node.is_virtual() or node.is_self() or node.is_deleted() or node.is_missing() or node.get_name() is None):
        yield node, by
    for child in reversed(below):
        yield from visited(child, by)


def merging(
    tree: Tree, parent: DefaultsTreeNode | None = None, above: Choice = ("", "")
) -> Iterator[tuple[ResultDefault, Choice]]:
    """The files as Hydra merges them."""
    node, below, by = opened(tree, above)
    if not below and not node.is_deleted() and not node.is_missing():
        found = _create_result_default(parent, node)
        if found is not None:
            yield found, by
    for child in below:
        assert isinstance(tree, DefaultsTreeNode)
        yield from merging(child, tree, by)


def choices(
    tree: DefaultsTreeNode, repository: IConfigRepository, parsed: list[Override], settings: list[Override]
) -> dict[str, Chain]:
    """Of each group, the line that names its option, the `override` lines of other files, and the arguments."""
    named: dict[str, list[tuple[Setting, Choice]]] = {}
    overriding: dict[str, list[tuple[Setting, Choice]]] = {}
    for node, by in visited(tree):
        layer = repository.load_config(node.get_config_path())
        assert layer is not None
        for default in copy.deepcopy(layer.defaults_list or []):
            if isinstance(default, GroupDefault):
                default.update_parent(node.get_group_path(), node.get_final_package())
                written = vars(default).get("written") or Setting(default.value, node.get_config_path(), True)
                lines = overriding if default.override else named
                lines.setdefault(default.get_override_key(), []).insert(0, (written, by))
    found = {group: named.get(group, []) + overriding.get(group, []) for group in named | overriding}
    chains = {group: [written for written, _ in lines] for group, lines in found.items()}
    for override in parsed:
        if not any(override is other for other in settings):
            assert override.input_line is not None
            option = None if override.is_delete() else override.value()
            chain = chains.setdefault(override.get_key_element().lstrip("+~"), [])
            chain.append(Setting(option, override.input_line, False, COMMAND_LINE))
    for group, written_by in found.items():
        for i, (written, by) in enumerate(written_by):
            chains[group][i] = replace(written, chosen=told(by, chains))
    return chains


def told(by: Choice, groups: dict[str, Chain]) -> str:
    """A choice in words, with who made it: `trainer=dpo (command line)`."""
    group, option = by
    if not group:
        return ""
    made = groups[group][-1]
    return f"{group}={option} ({COMMAND_LINE if made.typed else made.where})"


# ---------------------------------------------------------------- merging


class Branch(dict[Any, Any]):
    """A node of the config: by key a chain, or a further node. `before` is what stood there before it was a node."""

    def __init__(self, before: Chain) -> None:
        super().__init__()
        self.before = before

    def chains(self, prefix: str = "") -> Iterator[tuple[str, Chain]]:
        for key, value in self.items():
            if isinstance(value, Branch):
                yield from value.chains(f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    def replaced(self, prefix: str = "") -> Iterator[tuple[str, Chain]]:
        for key, value in self.items():
            if isinstance(value, Branch):
                if value.before:
                    yield f"{prefix}{key}", value.before
                yield from value.replaced(f"{prefix}{key}.")


def values(node: Any) -> Any:
    """What a tree of settings or chains holds, as plain values."""
    if isinstance(node, dict):
        return {key: values(value) for key, value in node.items()}
    return node[-1].value if isinstance(node, list) else node.value


def history(old: Branch | Chain | None) -> Chain:
    """The chain of what a new value replaces. A node counts as one value, `???` as none."""
    if isinstance(old, Branch):
        newest = [chain[-1] for _, chain in old.chains()]
        return [*old.before, *(replace(setting, value=values(old)) for setting in newest[:1])]
    return [setting for setting in old or [] if setting.value != MISSING]


class Merged:
    """The config so far. Its rules are OmegaConf's: nodes are merged, lists and all other values replaced."""

    def __init__(self) -> None:
        self.root = Branch([])
        self.removed: dict[str, Chain] = {}

    def add(self, tree: dict[Any, Any], package: list[str], chosen: str) -> None:
        """A file, below the keys of its package."""
        for part in reversed(package):
            tree = {part: tree}
        self.merge([], tree, chosen)

    def merge(self, path: list[Any], tree: dict[Any, Any], chosen: str) -> None:
        into = self.at(path)
        for key, new in tree.items():
            old = into.get(key)
            if isinstance(new, dict):
                if not isinstance(old, Branch):
                    target = self.target([*path, key])
                    into[key] = Branch(history(old)) if target is None else copy.deepcopy(self.at(target))
                self.merge([*path, key], new, chosen)
            elif old is None or new.value != MISSING:
                into[key] = [*history(old), replace(new, chosen=chosen) if chosen else new]

    def at(self, path: list[Any]) -> Any:
        node: Any = self.root
        for key in path:
            node = node.get(key) if isinstance(node, Branch) else None
        return node

    def target(self, path: list[Any]) -> list[Any] | None:
        """The path of the node that `${…}` at a path stands for; None where there is none."""
        old = self.at(path)
        if not isinstance(old, list) or not isinstance(old[-1].value, str) or "${" not in old[-1].value:
            return None
        root = node = OmegaConf.create(values(self.root))
        for key in path:
            node = node._get_node(key)
        found = node._maybe_dereference_node()
        keys: list[Any] = []
        while isinstance(found, DictConfig) and found is not root:
            keys.insert(0, found._key())
            found = found._get_parent()
        return keys if found is root and isinstance(self.at(keys), Branch) else None

    def override(self, override: Override) -> None:
        """An argument. Its key may lead into lists; where it leads into `${…}`, a node takes that one's place."""
        assert override.input_line is not None
        key, value, where = split_key(override.key_or_group), override.value(), override.input_line
        path: list[Any] = []
        for part in key[:-1]:
            path.append(part)
            old = self.at(path)
            if isinstance(old, Branch):
                continue
            if override.is_delete() and (target := self.target(path)) is not None:  # Hydra removes what is pointed to
                path = target
                continue
            holder = self.at(path[:-1])
            if old and isinstance(old[-1].value, list):
                changed = OmegaConf.create({part: old[-1].value})
                OmegaConf.update(changed, ".".join(key[key.index(part) :]), value, force_add=True)
                holder[part] = [*old, Setting(plain(changed)[part], where, False, COMMAND_LINE)]
                return
            holder[part] = Branch(history(old))
        holder, last = self.at(path), key[-1]
        if override.is_delete():
            gone = Branch([])
            gone[".".join([*path, last])] = holder.pop(last)
            self.removed |= {k: [*chain, Setting(None, where, False, COMMAND_LINE)] for k, chain in gone.chains()}
        elif isinstance(value, dict):
            if not isinstance(holder.get(last), Branch):
                holder[last] = Branch(history(holder.get(last)))
            self.merge([*path, last], settings(value, where, False), COMMAND_LINE)
        else:
            holder[last] = [*history(holder.get(last)), Setting(value, where, False, COMMAND_LINE)]
