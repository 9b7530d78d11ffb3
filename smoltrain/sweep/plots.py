"""The picture of a sweep: losses by step, the objective against what was varied, a heat map where two keys were."""

import importlib.util
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltrain import runs
from smoltrain.history import NO_RECORD
from smoltrain.lines import brief, cut
from smoltrain.sweep.record import SEED, Trial
from smoltrain.sweep.statistics import Estimate, frozen

if TYPE_CHECKING:
    from smoltrain.sweep.answer import Answer

PICTURE = "sweep.png"
# Okabe and Ito's colours, which people of any colour vision tell apart, less the yellow that white swallows. Of more
# configurations than these the best and the others' objective is shown, on a scale that is as safe.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
SCALE, GREY, BEST = "viridis", "#999999", "#D55E00"
CURVES = {"loss": "training loss", "eval_loss": "held-out loss"}
PANELS = 3  # keys, each with a panel
POINTS = 200  # of a curve
DECADE = 10  # from the smallest to the largest number, from which on their axis is logarithmic
LETTERS = 12  # of a value on an axis
LEGEND = (34, 100)  # letters of a configuration, of several and of one


def draw(file: Path, found: "Answer") -> bool:
    """Draws the picture; False, and no file, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = [key for key in found.sweep.varied if key != SEED] or [*found.sweep.varied]
    curves = {name: logged(found, name) for name in CURVES}
    drawn = {name: lines for name, lines in curves.items() if any(lines.values())}
    mapped = len(keys) == 2
    panels = min(len(keys), PANELS) + mapped
    figure = Figure(figsize=(max(4.2 * panels, 10), 8.4 if drawn else 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(heading(found), x=0.01, ha="left", fontsize="medium", fontweight="bold")
    rows = figure.subfigures(1 + bool(drawn), 1, squeeze=False)[:, 0]
    colours = coloured(found)
    if drawn:
        every = rows[0].subplots(1, len(drawn), squeeze=False)[0]
        for axes, (name, lines) in zip(every, drawn.items(), strict=True):
            curve(axes, found, lines, CURVES[name], colours)
        legend(rows[0], every, found, colours)
    below = rows[-1].subplots(1, max(panels, 1), squeeze=False)[0]
    for axes, key in zip(below, keys[:PANELS], strict=False):
        against(axes, found, key, colours)
    if mapped:
        heat(below[-1], found, keys)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.png")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a letter that the font has not is a box
        figure.savefig(temporary, dpi=120)
    temporary.rename(file)
    return True


def heading(found: "Answer") -> str:
    statuses = ", ".join(f"{count} {status}" for status, count in found.sweep.counts.items())
    return literal(f"{found.sweep.name}  {found.sweep.directory.absolute().name}\n{statuses}")


def literal(text: str) -> str:
    """A text in which a dollar is a dollar."""
    return text.replace("$", r"\$")


def coloured(found: "Answer") -> list[Any]:
    """A colour for each configuration, in the order of the table; on a scale those that are not ranked are grey."""
    standings = found.standings
    if len(standings) <= len(COLOURS):
        return [*COLOURS[: len(standings)]]
    colour, _ = scale(found)
    return [
        BEST if i == 0 and one.ranked else colour(one.estimate.mean) if one.ranked and one.estimate else GREY
        for i, one in enumerate(standings)
    ]


def scale(found: "Answer") -> tuple[Any, Any]:
    """What gives an objective its colour, the better the darker, and the same for a bar beside it."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from numpy import linspace

    means = [one.estimate.mean for one in found.ranked if one.estimate] or [0.0]
    shades = colormaps[SCALE](linspace(0, 0.87, 256))  # its last ones are too bright for lines on white
    colours = ListedColormap(shades[::-1] if found.sweep.greater else shades)
    mappable = ScalarMappable(Normalize(min(means), max(means)), colours)
    return mappable.to_rgba, mappable


# ---------------------------------------------------------------- curves


def logged(found: "Answer", name: str) -> dict[int, list[tuple[int, float]]]:
    """What each trial logged of a loss, by its number."""
    return {trial.number: points(trial, name) for trial in found.sweep.trials}


def points(trial: Trial, name: str) -> list[tuple[int, float]]:
    try:
        every = [(row["step"], float(row[name])) for row in runs.read_metrics(trial.directory) if name in row]
    except NO_RECORD:
        return []
    finite = [point for point in every if math.isfinite(point[1])]
    wide = math.ceil(len(finite) / POINTS)
    bins = [finite[i : i + wide] for i in range(0, len(finite), wide)] if finite else []
    return [(part[-1][0], math.fsum(value for _, value in part) / len(part)) for part in bins]


def curve(axes: Any, found: "Answer", lines: dict[int, list[tuple[int, float]]], name: str, colours: list[Any]) -> None:
    """A loss by step, a line for each trial; that of the best configuration is the thickest, and on top."""
    ends: list[tuple[tuple[int, float], Any]] = []
    for i, one in reversed(list(enumerate(found.standings))):
        first = i == 0 and one.ranked
        style: dict[str, Any] = {"color": colours[i], "linewidth": 2.4 if first else 1.1, "zorder": 3 if first else 2}
        style["alpha"] = 1.0 if first or len(found.standings) <= len(COLOURS) else 0.75
        for trial in one.trials:
            known = lines[trial.number]
            if not known:
                continue
            dashed = trial.status in ("diverged", "failed")
            few = len(known) <= 12
            marker = "o" if few and not dashed else None
            axes.plot(*zip(*known, strict=True), "--" if dashed else "-", marker=marker, markersize=3, **style)
            if dashed:
                ends.append((known[-1], style["color"]))
    sound = {trial.number for trial in found.sweep.trials if trial.status != "diverged"}
    limits(axes, [v for number, known in lines.items() if number in sound for _, v in known])
    for (step, value), colour in ends:
        axes.plot(step, min(value, axes.get_ylim()[1]), "X", color=colour, markersize=7, zorder=4, clip_on=False)
    tidy(axes, "step", name)


def limits(axes: Any, values: Sequence[float]) -> None:
    """Shows what these values span: what diverged may leave the picture, and does not flatten the rest."""
    if not values:
        return
    low, high = min(values), max(values)
    if low > 0 and high / low > 2 * DECADE:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.2, high * 1.2)
    else:
        margin = (high - low) * 0.07 or abs(high) * 0.07 or 1.0
        axes.set_ylim(low - margin, high + margin)


def legend(row: Any, every: Sequence[Any], found: "Answer", colours: list[Any]) -> None:
    """Which colour is which configuration, or which objective."""
    from matplotlib.lines import Line2D

    from smoltrain.sweep.answer import named

    few = len(found.standings) <= len(COLOURS)
    handles = []
    for i, one in enumerate(found.standings if few else found.standings[:1]):
        said = "best: " if i == 0 and one.ranked else "" if one.ranked else f"{one.status}: "
        text = literal(cut(f"{said}{named(found, one)}", LEGEND[not few]))
        handles.append(Line2D([], [], color=colours[i], linewidth=2.4 if i == 0 and one.ranked else 1.5, label=text))
    if not few and len(found.ranked) < len(found.standings):
        handles.append(Line2D([], [], color=GREY, linewidth=1.5, label="not ranked"))
    if any(trial.status in ("diverged", "failed") for trial in found.sweep.trials):
        handles.append(Line2D([], [], color=GREY, linestyle="--", marker="X", label="diverged or failed there"))
    row.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize="small")
    if not few and len(found.ranked) > 1:
        row.colorbar(scale(found)[1], ax=list(every), label=literal(found.sweep.objective), pad=0.01)


# ---------------------------------------------------------------- keys


def against(axes: Any, found: "Answer", key: str, colours: list[Any]) -> None:
    """The objective by the values of a key: each completed trial, the mean, and above what came to nothing."""
    places = placed(axes, [trial.overrides.get(key) for trial in found.sweep.trials])
    known: list[float] = []
    for i, one in enumerate(found.standings):
        for trial in one.trials:
            x = places[frozen(trial.overrides.get(key))]
            if trial.objective is not None:
                known.append(trial.objective)
                axes.plot(x, trial.objective, "o", color=colours[i], markersize=5, alpha=0.8, zorder=2)
            elif trial.status in ("diverged", "failed"):
                axes.plot(x, 1.0, "X", color=GREY, markersize=7, transform=axes.get_xaxis_transform(), clip_on=False)
    if found.best and found.best.objective is not None:
        x = places[frozen(found.best.overrides.get(key))]
        axes.plot(x, found.best.objective, "o", mfc="none", mec="black", markersize=10, mew=1.5, label="best", zorder=4)
    axes.margins(x=0.1)
    limits(axes, known + means(axes, found, key, places))
    tidy(axes, key, found.sweep.objective)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1.02), ncols=2, frameon=False, fontsize="small")


def means(axes: Any, found: "Answer", key: str, places: dict[str, float]) -> list[float]:
    """Draws the means: of the seeds with their interval where this is the only key, else over the other keys, balanced.

    Returns the ends of the intervals that are not out of proportion, as those of two seeds are.
    """
    if found.effects:
        effect = next(effect for effect in found.effects if effect.key == key)
        marks = sorted((places[frozen(value)], mean) for value, mean in effect.means if mean is not None)
        if marks:
            kind = "_-" if isinstance(effect.means[0][0], int | float) else "_"
            said = f"mean of {effect.combinations} combinations"
            axes.plot(
                *zip(*marks, strict=True), kind, color="black", linewidth=0.8, markersize=16, zorder=3, label=said
            )
        return []
    if not found.seeded or not found.ranked:
        return []
    known = [(places[frozen(one.overrides.get(key))], one.estimate) for one in found.ranked if one.estimate]
    xs, ys, halves = [x for x, _ in known], [e.mean for _, e in known], [e.half or 0.0 for _, e in known]
    style = {"color": "black", "markersize": 14, "capsize": 4, "zorder": 3}
    axes.errorbar(xs, ys, halves, fmt="_", label="mean, 95 % interval", **style)
    span = max(max(one.values.values()) - min(one.values.values()) for one in found.ranked) or math.inf
    return [y + sign * half for y, half in zip(ys, halves, strict=True) for sign in (-1, 1) if half < 4 * span]


def placed(axes: Any, values: Iterable[Any]) -> dict[str, float]:
    """Where the values of a key are on an axis: numbers to scale, over a decade to a logarithmic one."""
    every = {frozen(value): value for value in values}
    numbers = [v for v in every.values() if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    if len(numbers) < max(len(every), 2):
        axes.set_xticks(range(len(every)), [literal(brief(value, LETTERS)) for value in every.values()])
        axes.set_xlim(-0.6, len(every) - 0.4)
        if len(every) > 4:
            axes.tick_params(axis="x", rotation=45)
        return {name: i for i, name in enumerate(every)}
    if min(numbers) > 0 and max(numbers) / min(numbers) >= DECADE:
        axes.set_xscale("log")
    if len(numbers) <= 6:
        axes.set_xticks(numbers, [brief(number) for number in numbers])
        axes.minorticks_off()
    return {name: float(value) for name, value in every.items()}


def heat(axes: Any, found: "Answer", keys: Sequence[str]) -> None:
    """The mean objective by two keys; grey where it is not ranked, with what became of it."""
    from matplotlib.patches import Rectangle

    from smoltrain.sweep.answer import precision, within

    columns, rows = (ordered(trial.overrides.get(key) for trial in found.sweep.trials) for key in keys)
    colour, mappable = scale(found)
    share, digits = precision(found.sweep.objective, [one.estimate for one in found.ranked if one.estimate])
    crowd = max(len(columns), len(rows))
    for i, one in reversed(list(enumerate(found.standings))):
        x, y = (
            list(sides).index(frozen(one.overrides.get(key))) for sides, key in zip((columns, rows), keys, strict=True)
        )
        ranked = one.estimate if one.ranked else None
        fill: Any = colour(ranked.mean) if ranked else "#e6e6e6"
        first = i == 0 and ranked is not None
        edge: dict[str, Any] = (
            {"edgecolor": BEST, "linewidth": 3, "zorder": 2} if first else {"edgecolor": "white", "linewidth": 1.5}
        )
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=fill, clip_on=not first, **edge))
        text = within(Estimate(ranked.mean, None, 1), share, digits) if ranked else one.status
        dark = ranked is not None and 0.3 * fill[0] + 0.59 * fill[1] + 0.11 * fill[2] < 0.5
        style = {"color": "white" if dark else "#222222", "fontsize": 9 if crowd <= 4 else 7 if crowd <= 7 else 5}
        axes.text(x, y, text, ha="center", va="center", zorder=3, **style)
    axes.set_xticks(range(len(columns)), [literal(brief(value, LETTERS)) for value in columns.values()])
    axes.set_yticks(range(len(rows)), [literal(brief(value, LETTERS)) for value in rows.values()])
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-0.5, len(rows) - 0.5))
    tidy(axes, *keys)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.tick_params(length=0)
    if len(found.ranked) > 1:
        axes.figure.colorbar(mappable, ax=axes, label=literal(found.sweep.objective), pad=0.02)


def ordered(values: Iterable[Any]) -> dict[str, Any]:
    """Values that differ, numbers by size and others as they come."""
    every = {frozen(value): value for value in values}
    numbers = all(isinstance(value, int | float) for value in every.values())
    return dict(sorted(every.items(), key=lambda item: item[1])) if numbers else every


def tidy(axes: Any, across: str, up: str) -> None:
    axes.set_xlabel(literal(across))
    axes.set_ylabel(literal(up))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eeeeee", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
