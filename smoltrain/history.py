"""Runs that are kept, read from their directories: which one a word means, a table, a screen of one, several compared.

Nothing here imports Hydra or torch: a table of a thousand runs takes less than half a second.
"""

import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from smoltrain import runs
from smoltrain.checkpoints import BROKEN, GOING
from smoltrain.config import ConfigError, at, leaves, shown, suggest
from smoltrain.lines import (
    Line,
    aligned,
    bars,
    brief,
    cut,
    duration,
    line,
    machines,
    measured,
    number,
    padded,
    say,
    scalar,
    short,
    size,
    some,
    spaced,
    span,
)

OWN = re.compile(rf"model|\.hydra|({BROKEN}|{GOING})?checkpoint-.*")  # folders of a run, in which no other run is
# What a file that is no record raises: not there, not JSON, too deep, without what every record has.
NO_RECORD = (OSError, ValueError, RecursionError, TypeError, LookupError, AttributeError)
# What the fields of a record are, where it has them: an older one lacks some.
SHAPE = {"status": str, "steps": int | None, "max_steps": int | None, "objective": float | int | None}
SHAPE |= dict.fromkeys(("name", "start", "end", "trainer", "model", "error"), str | None)
SHAPE |= dict.fromkeys(("choices", "config", "metrics", "versions", "parent"), dict | None)
SHAPE |= dict.fromkeys(("overrides", "resumed"), list | None)
COLUMNS = ("name", "run", "trainer", "model", "status", "steps", "objective", "age")
RIGHT = tuple(map(COLUMNS.index, ("steps", "objective", "age")))
STYLES = {"completed": "green", "running": "cyan", "preempted": "yellow", "interrupted": "yellow"}
STYLES |= dict.fromkeys(("failed", "diverged", "unreadable"), "red")
PARTS = ("trainer", "model", "data", "recipe", "hardware", "peft", "tracking", "experiment")
NARROWEST = 24  # columns of the terminal for a run's own, which gives way to the others
NARROW, BROAD = 8, 40  # columns for a value of several that are compared, at least and at most
MARGIN = 13  # columns for the labels of a screen
WIDE = 120  # columns of a screen, at most
TALL = 4  # lines of a picture
SPARK = 24  # columns of a curve on one line
LISTED = 8  # runs, or values, that an error names


# ---------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Found:
    """A run directory and its record. Where that cannot be read it is empty, and `trouble` says why."""

    directory: Path
    path: str  # from the folder of all runs, as one would type it
    record: dict[str, Any]
    changed: float  # when the record was written, in seconds since 1970
    trouble: str = ""

    @property
    def name(self) -> str:
        return str(at(self.record, "name") or self.path.partition("/")[0])

    @property
    def run(self) -> str:
        """Its path without its name: a stamp, of a sweep's run with the job."""
        return self.path.removeprefix(f"{self.name}/")

    @property
    def status(self) -> str:
        return "unreadable" if self.trouble else str(self.record["status"])

    @cached_property
    def start(self) -> str:
        return str(at(self.record, "start") or datetime.fromtimestamp(self.changed, UTC).isoformat(timespec="seconds"))

    @property
    def trainer(self) -> str:
        """The option of its group, else the class."""
        return str(at(self.record, "choices.trainer") or at(self.record, "trainer") or "")

    @property
    def model(self) -> str:
        """The last part of what was trained, which is true whatever its option was called."""
        return str(at(self.record, "model") or "").rstrip("/").rpartition("/")[2]

    @cached_property
    def steps(self) -> int:
        """Steps taken: of a run that has not closed its record, those that its metrics tell of."""
        recorded = int(at(self.record, "steps") or 0)
        return recorded if at(self.record, "end") else max(recorded, last_step(self.directory))

    @property
    def progress(self) -> str:
        total = at(self.record, "max_steps")
        return f"{self.steps}/{total}" if total else str(self.steps)

    @property
    def objective(self) -> float | None:
        """What the run came to; only a run that completed came to anything."""
        return at(self.record, "objective") if self.status == "completed" else None

    @property
    def objective_name(self) -> str:
        return str(at(self.record, "config.objective") or "objective")

    @cached_property
    def age(self) -> float | None:
        """Seconds since it began."""
        try:
            return (datetime.now(UTC) - datetime.fromisoformat(self.start)).total_seconds()
        except (ValueError, TypeError):  # no time, or one without its zone
            return None

    @property
    def trail(self) -> str:
        """Its name and its path, in which every word that names it stands between slashes."""
        return f"/{self.path}/" if self.path.startswith(f"{self.name}/") else f"/{self.name}//{self.path}/"


def every(root: Path = runs.ROOT) -> list[Found]:
    """All runs below a folder, the one that started last first."""
    found = (look(Path(directory), directory[len(str(root)) + 1 :] or ".") for directory in directories(str(root)))
    return sorted(found, key=lambda run: (run.start, run.changed, run.path), reverse=True)


def completed(root: Path = runs.ROOT) -> list[Path]:
    """The directories of all runs that completed, the one that started last first."""
    return [run.directory for run in every(root) if run.status == "completed"]


def directories(folder: str) -> Iterator[str]:
    """The run directories in a folder: each that holds a run.json."""
    try:
        with os.scandir(folder) as entries:
            inside = list(entries)
    except OSError:
        return
    a_run = any(entry.name == "run.json" for entry in inside)
    if a_run:
        yield folder
    for entry in inside:
        if entry.is_dir(follow_symlinks=False) and not (a_run and OWN.fullmatch(entry.name)):
            yield from directories(entry.path)


def look(directory: Path, path: str) -> Found:
    changed = 0.0
    try:
        changed = (directory / "run.json").stat().st_mtime
        record = runs.read(directory)
        if wrong := [key for key, kind in SHAPE.items() if not isinstance(record.get(key), kind)]:
            raise TypeError(f"{wrong[0]} is {shown(record.get(wrong[0]))}")
    except NO_RECORD as error:
        why = f"{directory / 'run.json'}: unreadable, {type(error).__name__}: {error}"
        return Found(directory, path, {}, changed, why)
    return Found(directory, path, record, changed)


def opened(directory: Path) -> Found:
    """A run with a record. Raises ConfigError where it cannot be read."""
    return readable(look(directory, below(str(directory), runs.ROOT)))


def readable(run: Found) -> Found:
    if run.trouble:
        raise ConfigError(run.trouble)
    return run


def last_step(directory: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0 where there is none."""
    try:
        with (directory / "metrics.jsonl").open("rb") as file:
            file.seek(-min(file.seek(0, os.SEEK_END), 1 << 14), os.SEEK_END)
            return int(json.loads(file.read().rsplit(b"\n", 2)[-2])["step"])
    except NO_RECORD:
        return 0


# ---------------------------------------------------------------- which run a word means


def resolve(reference: str, root: Path = runs.ROOT, completed: bool = False, experiments: Iterable[str] = ()) -> Path:
    """The directory of the run that `reference` means: a path, `latest`, a name, a stamp, or the beginning of one.

    Of those of a name the one that started last; if it has to be a completed one, the last of these. Raises ConfigError
    where there is none, or several: a beginning of many, a sweep's stamp. `experiments` may have been meant too.
    """
    found, newest = named(reference, root, experiments, "completed " if completed else "")
    if len(found) > 1 and not newest:
        raise ConfigError(f"{reference}: these are {len(found)} runs, name one: {listing(run.run for run in found)}")
    ended = [run for run in found if run.status == "completed"]
    if completed and not ended:
        if newest:
            raise ConfigError(nothing(reference, root, "completed "))
        raise ConfigError(f"{reference}: this run is {found[0].status}; only a completed run has a final model")
    return (ended if completed else found)[0].directory


def named(
    reference: str, root: Path = runs.ROOT, experiments: Iterable[str] = (), kind: str = ""
) -> tuple[list[Found], bool]:
    """All runs that a reference names, and whether it means the first of them, as a name and `latest` do.

    The runs of a sweep are in the order of its jobs. `kind` says what is wanted, where nothing is found.
    """
    if one := at_path(reference, root):
        return [one], False
    found, word = every(root), below(reference, root)
    if reference == "latest" and found:
        return found, True
    exact = [run for run in found if f"/{word}/" in run.trail]
    if word and not exact:
        begun = {whole for run in found for whole in re.findall(rf"/({re.escape(word)}[^/]*)(?=/)", run.trail)}
        if len(begun) > 1:
            raise ConfigError(f"{reference}: {len(begun)} runs begin so, {listing(sorted(begun))}")
        word = next(iter(begun), "")
        exact = [run for run in found if f"/{word}/" in run.trail]
    if not (word and exact):
        close = suggest(reference, [*experiments, *(word for run in found for word in words(run))])
        raise ConfigError(f"{nothing(reference, root, 'experiment and no ' if experiments else kind)}{close}")
    newest = word in {name for run in exact for name in (run.name, run.path.partition("/")[0])}
    return (exact, True) if newest else (sorted(exact, key=lambda run: counted(run.path)), False)


def nothing(reference: str, root: Path, kind: str) -> str:
    called = "" if reference == "latest" else " of that name, stamp or path"
    return f"{reference}: no {kind}run{called} in {root.absolute()}"


def at_path(reference: str, root: Path) -> Found | None:
    """The run in a directory."""
    directory = Path(reference)
    try:
        there = (directory / "run.json").is_file()
    except OSError:  # a name that no file can have
        there = False
    return look(directory, below(reference, root)) if there else None


def below(reference: str, root: Path) -> str:
    """A path as seen from the folder of all runs, where it leads there; any other word as it is."""
    path = Path(os.path.abspath(reference))  # noqa: PTH100 - resolves `..`, follows no link
    inside = path.is_relative_to(root.absolute()) and path != root.absolute()
    return str(path.relative_to(root.absolute())) if inside else reference.rstrip("/")


def words(run: Found) -> list[str]:
    """What a run may be called: its name, its stamp, of a sweep's run that with its job."""
    parts = run.run.split("/")
    return [run.name, *("/".join(parts[:end]) for end in range(1, len(parts) + 1))]


def listing(names: Iterable[str]) -> str:
    known = list(names)
    rest = [f"{len(known) - LISTED} more"] if len(known) > LISTED else []
    return ", ".join(known[:LISTED] + rest)


def counted(path: str) -> list[tuple[int, str]]:
    """What sorts paths by the numbers in them: job 10 comes after job 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


# ---------------------------------------------------------------- the verb


def history(arguments: list[str]) -> int:
    """Runs `smoltrain runs`, and returns its exit code. Raises ConfigError where there is nothing to show."""
    if arguments and arguments[0] in LOOKS:
        return LOOKS[arguments[0]](arguments[1:])
    return table(arguments)


def parsed(look: str, arguments: list[str], valued: str = "") -> tuple[list[str], bool, str]:
    """The words of a command line, whether it has `--json`, and the value of its only flag that takes one."""
    given, as_json, value = [], False, ""
    remaining = iter(arguments)
    for argument in remaining:
        name, sign, text = argument.partition("=")
        if argument == "--json":
            as_json = True
        elif valued and name == valued:
            value = text if sign else next(remaining, "")
            if not value:
                raise ConfigError(f"{valued}: it needs a value")
        elif argument.startswith("-"):
            raise ConfigError(
                f"smoltrain {look} takes no {argument}; smoltrain {look.split()[0]} --help says what it takes"
            )
        else:
            given.append(argument)
    return given, as_json, value


# ---------------------------------------------------------------- the table


def table(arguments: list[str]) -> int:
    filters, as_json, key = parsed("runs", arguments, "--sort")
    for word in filters:
        if "=" not in word:
            raise ConfigError(stray(word))
    found = every()
    chosen = filtered(found, filters)
    if key:
        chosen = ordered(chosen, key, found)
    if as_json:
        print(json.dumps([facts(run) for run in chosen], indent=1, ensure_ascii=False))
    elif not found:
        print(f"no run in {runs.ROOT.absolute()} yet; smoltrain makes one, smoltrain --help says how to choose which")
    elif not chosen:
        print(f"none of {len(found)} runs has all of these: {' '.join(filters)}")
    else:
        say(tabulated(chosen, room()))
    return 0


def stray(word: str) -> str:
    """What somebody may have meant by a word that is neither a filter nor follows another."""
    if word in LOOKS:
        return f"{word}: it comes right after runs, smoltrain runs {word} …"
    if close := suggest(word, LOOKS):
        return f"{word}: neither a filter nor a word that follows runs{close}"
    return f"{word}: write a filter as key=value, name={word}; one run is smoltrain runs show {word}"


def filtered(found: list[Found], filters: list[str]) -> list[Found]:
    """The runs that have all these values. Raises ConfigError for a key or a value that none has."""
    chosen = found
    for text in filters:
        key, _, typed = text.partition("=")
        known(key, found)
        chosen = [run for run in chosen if has(run, key, typed)]
        if found and not chosen and not any(has(run, key, typed) for run in found):
            values = list(dict.fromkeys(spelled[0] for run in found if (spelled := spellings(run, key))))
            there = f"; {key} is {listing(values)}" if values else ""
            raise ConfigError(f"{text}: no run has that{suggest(typed, values) or there}")
    return chosen


def known(key: str, found: list[Found]) -> None:
    """Raises ConfigError for a key that no run knows."""
    if key not in COLUMNS and not any(spellings(run, key) for run in found):
        keys = dict.fromkeys(name for run in found for name, _ in leaves(at(run.record, "config") or {}))
        inner = next((f"; did you mean {name}?" for name in keys if name.endswith(f".{key}")), "")
        close = inner or suggest(key, [*COLUMNS, *keys]) or f"; the table has {', '.join(COLUMNS)}"
        raise ConfigError(f"{key}: no run knows this key{close}")


def has(run: Found, key: str, typed: str) -> bool:
    return any(typed == spelling or same_number(typed, spelling) for spelling in spellings(run, key))


def same_number(typed: str, spelling: str) -> bool:
    try:
        return float(typed) == float(spelling)
    except ValueError:
        return False


def spellings(run: Found, key: str) -> list[str]:
    """How the value of a column or a config key may be typed, first as it is shown; empty where a run has none."""
    if key in COLUMNS:
        result = run.objective
        others = {
            "run": [run.path],
            "trainer": [at(run.record, "trainer")],
            "model": [at(run.record, "model"), at(run.record, "choices.model")],
            "steps": [str(run.steps)],
            "objective": [] if result is None else [number(result), run.objective_name],
        }
        return [str(word) for word in (cell(run, key), *others.get(key, [])) if word]
    *parents, last = key.split(".")
    node = at(run.record, ".".join(["config", *parents]))
    if not isinstance(node, dict) or last not in node or isinstance(node[last], dict):
        return []
    value = node[last]
    written = str(value) if isinstance(value, str | float) else scalar(value)
    return [written, written.replace(" ", "")]


def cell(run: Found, column: str) -> str:
    if run.trouble and column not in ("name", "run", "status", "age"):
        return ""
    if column == "age":
        return "" if run.age is None else ago(run.age)
    if column == "objective":
        return "" if run.objective is None else measured(run.objective_name, run.objective)
    return run.progress if column == "steps" else str(getattr(run, column))


def ago(seconds: float) -> str:
    for unit, many in (("s", 60), ("min", 60), ("h", 24)):
        if seconds < many:
            return f"{max(seconds, 0):.0f} {unit}"
        seconds /= many
    return f"{seconds:.0f} d"


def ordered(chosen: list[Found], key: str, found: list[Found]) -> list[Found]:
    """Runs by a column or a config key, the smallest first; those that have none last, in the order they had."""
    if any(key == run.objective_name for run in found):
        key = "objective"
    known(key, found)

    def rank(run: Found) -> tuple[bool, str, float, str]:
        if key == "objective":
            return run.objective is None, run.objective_name, run.objective or 0.0, ""
        if key in ("steps", "age"):
            value = run.steps if key == "steps" else run.age
            return value is None, "", value or 0.0, ""
        spelled = spellings(run, key)
        try:
            return not spelled, "", float(spelled[0]), ""
        except (ValueError, IndexError):
            return not spelled, "", math.inf, spelled[0] if spelled else ""

    return sorted(chosen, key=rank)


def facts(run: Found) -> dict[str, Any]:
    """A row of the table as data; `age` in seconds."""
    values = {column: getattr(run, column) for column in COLUMNS}
    more = {name: at(run.record, name) for name in ("max_steps", "end", "config_hash")}
    return values | more | {"objective_name": run.objective_name, "start": run.start, "directory": str(run.directory)}


def tabulated(chosen: list[Found], wide: int) -> list[Line]:
    """The table's lines; where they would be wider than the terminal, the paths of runs are cut."""
    heading, rows = list(COLUMNS), [[cell(run, column) for column in COLUMNS] for run in chosen]
    result = COLUMNS.index("objective")
    named = {run.objective_name for run in chosen if run.objective is not None}
    if len(named) == 1:  # said once
        heading[result] = named.pop()
    else:
        for run, row in zip(chosen, rows, strict=True):
            row[result] = f"{run.objective_name} {row[result]}" if row[result] else ""
    top, *lines = padded(narrowed([heading, *rows], COLUMNS.index("run"), wide), RIGHT)
    styles = [[STYLES.get(run.status, "") if column == "status" else "" for column in COLUMNS] for run in chosen]
    return [line("  ".join(top), "bold"), *map(spaced, lines, styles)]


def narrowed(cells: list[list[str]], column: int, wide: int) -> list[list[str]]:
    """Rows of cells that fit in a width, one column of them cut for it; never to less than can be told apart."""
    over = len("  ".join(padded(cells)[0])) - wide
    kept = max(max(len(row[column]) for row in cells) - max(over, 0), NARROWEST)
    return [[cut(text, kept) if i == column else text for i, text in enumerate(row)] for row in cells]


def room() -> int:
    """The columns of the terminal; without one, there is no end to a line."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


# ---------------------------------------------------------------- one run


def show(arguments: list[str]) -> int:
    given, as_json, _ = parsed("runs show", arguments)
    if len(given) != 1:
        raise ConfigError("smoltrain runs show takes one run: its path, name or stamp, the beginning of one, or latest")
    run = opened(resolve(given[0]))
    if as_json:
        print(json.dumps(run.record, indent=1, ensure_ascii=False))
    else:
        say(screen(run, min(room(), WIDE)))
    return 0


def screen(run: Found, wide: int) -> list[Line]:
    """How a run ended, what it was, what it left, its metrics and its loss."""
    from smoltrain.report import before_and_after

    lines: list[Line] = [((run.name, "bold"), (f"  {run.run}", ""))]
    for label, texts, style in about(run, wide - MARGIN):
        for i, text in enumerate(texts):
            lines.append(((f"{label if i == 0 else '':{MARGIN}}", style or "dim"), (text, style)))
    if metrics := before_and_after(at(run.record, "metrics") or {}):
        cells = [(name, measured(name, before), measured(name, after)) for name, before, after in metrics]
        heading, *rows = aligned([("held-out", "before", "after"), *cells], margin="", right=(1, 2))
        lines += [line(), line(heading, "bold"), *map(line, rows)]
    if points := losses(run):
        lines += [line(), *plotted(points, max(min(wide - 2 * MARGIN, WIDE // 2), SPARK))]
    return lines


def about(run: Found, wide: int) -> Iterator[tuple[str, list[str], str]]:
    """What is said of a run: a label, lines of text, and their style."""
    from smoltrain.report import command, draws, lost, sources

    record, directory = run.record, run.directory
    of = f" of {record['max_steps']}" if record.get("max_steps") else ""
    took = f" in {duration(record['seconds'])}" if record.get("seconds") else ""
    began = ""
    if run.age is not None:
        began = f", began {ago(run.age)} ago ({datetime.fromisoformat(run.start):%Y-%m-%d %H:%M %Z})"
    yield run.status, [f"{run.steps}{of} steps{took}{began}"], STYLES.get(run.status, "")
    if record.get("error"):
        yield "error", str(record["error"]).splitlines()[-1:], "red"
    if parts := record.get("choices"):
        yield "parts", [", ".join(f"{group} {parts[group]}" for group in PARTS if parts.get(group))], ""
    live = [some(record["parameters"], "parameter"), f"on {record['device']}"] if "parameters" in record else []
    if (among := machines(record.get("config") or {})) != "1 process":
        live.append(f"in {among}")
    yield "model", [", ".join([str(record.get("model")), *live])], ""
    if parent := record.get("parent"):
        yield "from", [f"{short(Path(parent['directory']))} ({parent['trainer']}, config {parent['config_hash']})"], ""
    if "sources" in record:
        yield "data", sources(record) + draws(record["sources"]), ""
        yield "", lost(record), "yellow"
    if "allowed" in record:
        yield "command", [command(record)], ""
    yield "overrides", filled(record.get("overrides") or [], wide), ""
    if again := record.get("resumed"):
        steps = ", ".join(str(one["step"]) for one in again)
        yield "resumed", [f"{some(len(again), 'time')}, at step {steps}"], ""
        for one in again:
            since, changed = f"from step {one['step']} on", (one.get("changed") or {}).items()
            yield "", [f"{since} {key}={shown(new)}, before {shown(old)}" for key, (old, new) in changed], "yellow"
    yield "versions", other_versions(record.get("versions") or {}), "yellow"
    saved = sorted(
        [*directory.glob("checkpoint-*/"), *directory.glob(f"{BROKEN}checkpoint-*/")],
        key=lambda folder: counted(folder.name),
    )
    yield "saved", filled([f"{folder.name} {size(weight(folder))}" for folder in saved], wide), ""
    if (directory / "model").is_dir():
        label = "final" if run.status == "completed" else "unfinished"
        yield label, [f"{short(directory / 'model')}  {size(weight(directory / 'model'))}"], ""
    if run.status in runs.UNFINISHED:
        yield "go on", [f"smoltrain resume={short(directory)}"], ""
    read = [str(short(directory / name)) for name in ("report.md", "traceback.txt") if (directory / name).is_file()]
    yield "read", read or [str(short(directory))], ""


def filled(texts: Iterable[str], wide: int) -> list[str]:
    """Texts as lines that are at most so wide, two spaces between them; none is broken."""
    lines: list[str] = []
    for text in texts:
        if lines and len(lines[-1]) + 2 + len(text) <= wide:
            lines[-1] += f"  {text}"
        else:
            lines.append(text)
    return lines


def weight(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def other_versions(recorded: dict[str, str]) -> list[str]:
    """The versions of a run that are not those installed here."""
    from importlib import metadata

    def here(name: str) -> str:
        try:
            return platform.python_version() if name == "python" else metadata.version(name)
        except metadata.PackageNotFoundError:
            return "not installed"

    now = {name: here(name) for name in recorded}
    return [f"{name} {version}, here {now[name]}" for name, version in recorded.items() if now[name] != version]


# ---------------------------------------------------------------- curves


def losses(run: Found) -> list[tuple[int, float]]:
    """The training loss by step; none where it cannot be read."""
    try:
        return [(row["step"], row["loss"]) for row in runs.read_metrics(run.directory) if "loss" in row]
    except NO_RECORD:
        return []


def plotted(points: list[tuple[int, float]], wide: int) -> list[Line]:
    """A loss curve as a small picture, with its highest and lowest value and its first and last step."""
    low, high = span(points)
    labels = [f"{high:.4f}", *[""] * (TALL - 2), f"{low:.4f}"]
    rows = bars(points, points[-1][0], wide, low, high, TALL)
    lines = [
        (("loss" if i == 0 else "    ", "bold"), (f"{label:>{MARGIN - 2}}  ", "dim"), (row, "cyan"))
        for i, (label, row) in enumerate(zip(labels, rows, strict=True))
    ]
    last = f"step {points[-1][0]}"
    return [*lines, line(f"{'':{MARGIN + 2}}{0:<{wide - len(last)}}{last}", "dim")]


# ---------------------------------------------------------------- several runs


def compare(arguments: list[str]) -> int:
    given, as_json, file = parsed("runs compare", arguments, "--plot")
    chosen: dict[Path, Found] = {}
    for reference in given:
        found, newest = named(reference)
        chosen |= {run.directory.resolve(): readable(run) for run in (found[:1] if newest else found)}
    if len(chosen) < 2:
        raise ConfigError("smoltrain runs compare takes two runs or more, or a sweep's stamp for all of its runs")
    sides = {lettered(i): run for i, run in enumerate(chosen.values())}
    if file:
        draw(Path(file), sides)
    if as_json:
        print(json.dumps(as_data(sides), indent=1, ensure_ascii=False))
    else:
        say(side_by_side(sides, room()) + ([line(), line(f"plot  {file}")] if file else []))
    return 0


def lettered(number: int) -> str:
    """A, B … Z, AA, as a spreadsheet's columns are called."""
    return (lettered(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


def settings(record: dict[str, Any]) -> dict[str, Any]:
    """A run's config by leaf; the run that it starts from is the same experiment wherever it is kept."""
    values = dict(leaves(record.get("config", {})))
    if parent := record.get("parent"):
        values["model.from_run"] = f"a run with the config {parent['config_hash']}"
    return values


def differing(values: Sequence[dict[str, Any]], left_out: Sequence[str] = runs.NOT_IDENTITY) -> list[str]:
    """The keys that not all have with the same value, node by node; not those that make no other experiment."""
    every = [n for n in dict.fromkeys(chain(*values)) if not any(f"{n}.".startswith(f"{key}.") for key in left_out)]
    nodes = {node: i for i, node in enumerate(dict.fromkeys(name.rpartition(".")[0] for name in every))}
    other = [name for name in every if any(name not in one or one[name] != values[0].get(name) for one in values)]
    return sorted(other, key=lambda name: nodes[name.rpartition(".")[0]])  # what only one has is beside the rest


def results(record: dict[str, Any]) -> dict[str, Any]:
    outcome = {name: record.get(name) for name in ("status", "steps", "objective")}
    return outcome | {n: value for n, value in record.get("metrics", {}).items() if not n.startswith("before/")}


# What is compared of runs, beside their configs.
SECTIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "results": results,
    "versions": lambda record: record.get("versions", {}),
    "data": lambda record: record.get("fingerprints", {}),
}


def outcomes(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """What differs between runs by section and name, None where one has nothing; of results, if one differs, all."""
    found = {}
    for section, taken in SECTIONS.items():
        values = [taken(record) for record in records]
        rows = {name: [one.get(name) for one in values] for name in dict.fromkeys(chain(*values))}
        other = {name: row for name, row in rows.items() if any(value != row[0] for value in row)}
        found[section] = rows if other and section == "results" else other
    return found


def as_data(sides: dict[str, Found]) -> dict[str, Any]:
    """Runs by letter with their results; of config keys, versions and data what differs, where a run has it."""
    values = {letter: settings(run.record) for letter, run in sides.items()}
    every = {letter: facts(run) | {"results": results(run.record)} for letter, run in sides.items()}
    found: dict[str, Any] = {"runs": every, "config": {}}
    for key in differing(list(values.values())):
        found["config"][key] = {letter: one[key] for letter, one in values.items() if key in one}
    sections = outcomes([run.record for run in sides.values()])
    for section in ("versions", "data"):
        found[section] = {name: dict(zip(sides, row, strict=True)) for name, row in sections[section].items()}
    return found


def side_by_side(sides: dict[str, Found], wide: int) -> list[Line]:
    """A line for each run with its curve, then what differs and the final metrics, a column for each run.

    Curves of runs of one trainer have one scale; the losses of different ones say different things.
    """
    curves = {letter: losses(run) for letter, run in sides.items()}
    last = max((points[-1][0] for points in curves.values() if points), default=1)
    cells = []
    for letter, run in sides.items():
        alike = [curves[other] for other, one in sides.items() if one.trainer == run.trainer]
        curve = bars(curves[letter], last, SPARK, *span(chain(*alike)))[0]
        ends = [f"{value:.4f}" for _, value in curves[letter]]
        loss = f"loss {ends[0]} to {ends[-1]}" if ends else "no loss"
        cells.append([letter, run.name, run.run, run.status, run.progress, curve, loss])
    lines: list[Line] = []
    for run, texts in zip(sides.values(), padded(narrowed(cells, 2, wide)), strict=True):
        styles = ("bold", "", "", STYLES.get(run.status, ""), "", "cyan", "")
        lines.append(spaced(texts, styles))
    rows, equal = compared(sides, wide)
    for text, row in zip(aligned(rows, margin=""), rows, strict=True):
        lines.append(line(text, "bold" if row[1:] == (*sides,) else ""))
    return [*lines, *([line(), line(f"equal: {', '.join(equal)}")] if equal else [])]


def compared(sides: dict[str, Found], wide: int) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows of cells, those of each section below a heading with the runs' letters; and the sections without any."""
    from smoltrain.report import before_and_after

    values = [settings(run.record) for run in sides.values()]
    keys = differing(values)
    each = min(max((wide - max(map(len, keys), default=0)) // len(sides) - 2, NARROW), BROAD)
    final = [{n: after for n, _, after in before_and_after(at(run.record, "metrics") or {})} for run in sides.values()]
    told = dict.fromkeys(name for one in final for name, after in one.items() if after is not None)
    other = outcomes([run.record for run in sides.values()])
    sections: dict[str, list[tuple[str, ...]]] = {
        "config": [(key, *(brief(one[key], each) if key in one else "-" for one in values)) for key in keys],
        "held-out": [(name, *(measured(name, one.get(name)) for one in final)) for name in told],
        "versions": [(name, *map(number, row)) for name, row in other["versions"].items()],
        "data": [(name, *map(number, row)) for name, row in other["data"].items()],
    }
    rows: list[tuple[str, ...]] = []
    for section, cells in sections.items():
        rows += [("",) * (len(sides) + 1), (section, *sides), *cells] if cells else []
    return rows, [section for section, cells in sections.items() if not cells and section != "held-out"]


def draw(file: Path, sides: dict[str, Found]) -> None:
    """Draws the losses of runs into a file. Raises ConfigError where there are none, or matplotlib is not there."""
    from smoltrain.report import plot

    if not any(map(losses, sides.values())):
        raise ConfigError(f"--plot {file}: none of these runs has logged a loss that can be read")
    metrics = {f"{letter}  {run.name} {run.run}": runs.read_metrics(run.directory) for letter, run in sides.items()}
    try:
        drawn = plot(file, metrics)
    except (OSError, ValueError) as error:  # no such folder, no such format
        raise ConfigError(f"--plot {file}: {error}") from error
    if not drawn:
        raise ConfigError(f"--plot {file}: matplotlib draws it, and is not installed; pip install matplotlib")


def rows(arguments: list[str]) -> int:
    """The rows of a step, for which the run's config is composed and its data prepared again."""
    from smoltrain.config.resolvers import register
    from smoltrain.config.targets import allowing
    from smoltrain.order import rows

    register()
    with allowing(arguments) as rest:
        return rows(rest)


# What may follow `runs`.
LOOKS: dict[str, Callable[[list[str]], int]] = {"show": show, "compare": compare, "rows": rows}
