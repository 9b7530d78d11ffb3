"""Lines for people: in columns, in colour where a terminal is, with values as one would type them."""

import json
import math
import re
import sys
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

Line = tuple[tuple[str, str], ...]  # parts, each with its style
BLOCKS, CROSS = " ▁▂▃▄▅▆▇█", "\N{MULTIPLICATION SIGN}"


def padded(cells: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[list[str]]:
    """Rows of cells, each cell as wide as its column; columns of which the number is in `right` end alike."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [[f"{c:{'>' if i in right else ''}{widths[i]}}" for i, c in enumerate(row)] for row in cells]


def aligned(cells: Sequence[Sequence[str]], margin: str = "  ", right: Collection[int] = ()) -> list[str]:
    """Rows of cells as lines, in columns."""
    return [(margin + "  ".join(row)).rstrip() for row in padded(cells, right)]


def line(text: str = "", style: str = "") -> Line:
    return ((text, style),)


def spaced(cells: Sequence[str], styles: Sequence[str]) -> Line:
    """A row of cells as a line, each in its style."""
    return tuple(
        (f"{'  ' if i else ''}{text}", style) for i, (text, style) in enumerate(zip(cells, styles, strict=True))
    )


def say(lines: list[Line]) -> None:
    """Prints lines, on a terminal in their styles."""
    if not sys.stdout.isatty():
        print("\n".join("".join(text for text, _ in parts).rstrip() for parts in lines))
        return
    from rich.console import Console
    from rich.text import Text

    Console(highlight=False, soft_wrap=True).print(Text("\n").join(Text.assemble(*parts) for parts in lines))


def number(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def brief(value: Any, room: int = 60) -> str:
    """A value as one would type it, cut where it is long."""
    typed = isinstance(value, float) or (isinstance(value, str) and re.match(r"[?$\w]", value) and value.isprintable())
    return cut(str(value) if typed else scalar(value), room)


def cut(text: str, room: int = 60) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}…"


WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}  # which YAML reads as something else
PLAIN = re.compile(r"[A-Za-z_/](?:[\w./@+-]| (?=[\w/]))*", re.ASCII)


def scalar(value: Any) -> str:
    """A value as YAML on one line, read back as it was by YAML 1.1 and 1.2."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(key)}: {scalar(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(scalar, value)) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        text = repr(value)
        if not math.isfinite(value):
            return text.replace("inf", ".inf").replace("nan", ".nan")
        return text if "." in text else text.replace("e", ".0e")
    text = str(value)
    if isinstance(value, int) or (PLAIN.fullmatch(text) and text.lower() not in WORDS):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in quoted)


def measured(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if name == "exact_match" or name.endswith("accuracies") else f"{value:.4f}"


def some(count: int, thing: str) -> str:
    """A number of things: `1 row`, `1,200 rows`, `2 processes`."""
    return f"{count:,} {thing}{'' if count == 1 else 'es' if thing.endswith('s') else 's'}"


def machines(config: dict[str, Any]) -> str:
    """What a run is shared by: `4 processes on 2 nodes`; one from before there could be several has one."""
    hardware = config.get("hardware", {})
    nodes, processes = hardware.get("nodes", 1), hardware.get("processes", 1)
    return some(nodes * processes, "process") + (f" on {some(nodes, 'node')}" if nodes > 1 else "")


def size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def short(path: Path) -> Path:
    """A path as one would type it here: relative where it is below the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def span(points: Iterable[tuple[int, float]]) -> tuple[float, float]:
    """The lowest and the highest value of those that are numbers."""
    values = [value for _, value in points if math.isfinite(value)] or [0.0]
    return min(values), max(values)


def bars(
    points: Sequence[tuple[int, float]], last: int, wide: int, low: float, high: float, tall: int = 1
) -> list[str]:
    """A curve in blocks, from step 0 to `last`: what is logged at a step is the mean since it was last logged.

    A value that is no number is a cross, and after the last point nothing is drawn.
    """
    steps = [step for step, _ in points]
    levels: list[float] = []
    for column in range(wide):
        first, after = (bisect_right(steps, edge * last / wide) for edge in (column, column + 1))
        within = [value for _, value in points[first : max(after, first + 1)]]
        levels.append(sum(within) / len(within) if within else -math.inf)
    scale = (8 * tall - 1) / (high - low) if high > low else 0.0

    def block(level: float, row: int) -> str:
        if level == -math.inf:
            return " "
        if not math.isfinite(level):
            return CROSS if row == tall - 1 else " "
        return BLOCKS[min(max(1 + round((level - low) * scale) - 8 * (tall - 1 - row), 0), 8)]

    return ["".join(block(level, row) for level in levels) for row in range(tall)]
