"""The answer of a sweep: what was varied and what came out, as a table, a picture, `results.csv` and `results.json`.

    sweep.json and the runs' records -> standings, comparisons, main effects -> lines for people, data for programs

Nothing here imports Hydra or torch: an answer of a hundred trials takes half a second, its picture another one.
"""

import csv
import io
import json
import math
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from smoltrain import runs
from smoltrain.config import ConfigError, at
from smoltrain.history import LISTED, STYLES, WIDE, parsed, room
from smoltrain.lines import Line, brief, cut, duration, line, padded, say, short, some, spaced
from smoltrain.sweep.plots import PICTURE, draw
from smoltrain.sweep.record import SEED, Sweep, Trial, comparable, exit_code, mend, read, resolve, telling
from smoltrain.sweep.statistics import (
    Comparison,
    Configuration,
    Effect,
    Estimate,
    against_the_best,
    effects,
    estimate,
    frozen,
    seeded,
    standings,
)

NARROW = 5  # columns for a value of the table, at least
PLACES = (4, 7)  # digits after the point of an objective, at least and at most
GO_ON = ("pending", *runs.UNFINISHED)  # what the same command runs
MARGIN = 8  # columns for the labels of the last lines
LINK = 250  # letters of a link, from which on it is only in results.json
DASHBOARD = "http://127.0.0.1:7860/"  # where Trackio's is, unless something else is there


@dataclass(frozen=True)
class Answer:
    """All that is said of a sweep, worked out once."""

    sweep: Sweep

    @cached_property
    def parts(self) -> list[tuple[str, "Answer"]]:
        """What can be compared, part by part, each with what it is called: all of it, where one measure is for all."""
        return [
            (" ".join(f"{key}={brief(value)}" for key, value in shared.items()), Answer(part))
            for shared, part in comparable(self.sweep)
        ]

    @cached_property
    def standings(self) -> list[Configuration]:
        return standings(self.sweep)

    @cached_property
    def ranked(self) -> list[Configuration]:
        return [one for one in self.standings if one.ranked]

    @cached_property
    def seeded(self) -> bool:
        return seeded(self.sweep)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Of all ranked but the best."""
        return against_the_best(self.ranked) if self.seeded else []

    @cached_property
    def effects(self) -> list[Effect]:
        return effects(self.sweep)

    @property
    def best(self) -> Trial | None:
        """The best trial of the best configuration."""
        return self.ranked[0].best(self.sweep.greater) if self.ranked else None

    @cached_property
    def over_seeds(self) -> Estimate | None:
        """The mean of the whole sweep, where it varies nothing but the seed."""
        values = [trial.objective for trial in self.sweep.trials if trial.objective is not None]
        return estimate(values) if self.sweep.varied == (SEED,) and len(values) > 1 else None

    @property
    def one_seed(self) -> bool:
        """Whether there is something to compare, and no way to tell a difference from chance."""
        return not self.seeded and len(self.ranked) > 1 and self.sweep.varied != (SEED,)

    @cached_property
    def keys(self) -> dict[str, str]:
        """What is varied, each key by its last parts, as many as tell it from the others."""
        return shortened([key for key in self.sweep.varied if not (self.seeded and key == SEED)])

    @cached_property
    def dashboard(self) -> str | None:
        """The page of Trackio's dashboard on which the curves of exactly these runs lie over one another."""
        tracked = [trial.run for trial in self.sweep.trials if at(trial.run.record, TRACKER) == TRACKED]
        if not tracked:
            return None
        shown = {
            "project": at(tracked[0].record, "config.callbacks.tracking.project"),
            "runs": ",".join(runs.called(run.directory) for run in tracked),
            "metric_filter": "|".join(dict.fromkeys(("train/loss", "eval/loss", logged(self.sweep.objective)))),
            "smoothing": 0,
        }
        return f"{DASHBOARD}?{urlencode(shown, safe='/,|')}"


TRACKER, TRACKED = "config.callbacks.tracking._target_", "smoltrain.tracking.Trackio"


def logged(objective: str) -> str:
    """A held-out metric's name in a tracker."""
    return f"eval/{objective.removeprefix('eval_')}"


# ---------------------------------------------------------------- the verb


def answer(arguments: list[str]) -> int:
    """Runs `smoltrain sweep`, and returns its exit code. Raises ConfigError where there is nothing to show."""
    given, as_json, _ = parsed("sweep", arguments)
    if len(given) != 1:
        raise ConfigError(
            "smoltrain sweep takes one sweep: its directory, name or stamp, the beginning of one, or latest; "
            "a new one is started by smoltrain -m trainer=sft,dpo"
        )
    found = Answer(read(resolve(given[0])))
    if as_json:
        print(json.dumps(as_data(found), indent=1, ensure_ascii=False))
    else:
        tell(found)
    return 0


def overlay(reference: str) -> str:
    """The query with which Trackio's dashboard shows a sweep's runs and no others. Raises ConfigError for no sweep."""
    found = Answer(read(resolve(reference)))
    if found.dashboard is None:
        raise ConfigError(
            f"{reference}: Trackio has none of its runs; tracking=trackio, the default, keeps their curves"
        )
    return found.dashboard.removeprefix(DASHBOARD)


def summary(directory: Path) -> int:
    """The end of a sweep: writes its files, prints its table, and returns the exit code it comes to."""
    found = Answer(read(directory))
    tell(found)
    return exit_code(found.sweep)


def tell(found: Answer) -> None:
    """Prints the answer, and writes it into the sweep's directory, the picture after the table: it takes a second."""
    directory = found.sweep.directory
    with suppress(OSError):  # which `drawn` says
        runs.write_atomically(directory / "results.csv", as_table(found.sweep))
        runs.write_atomically(directory / "results.json", json.dumps(as_data(found), indent=1, allow_nan=False) + "\n")
    say(screen(found, room()))
    sys.stdout.flush()
    say(links(found, drawn(found)))


def drawn(found: Answer) -> list[str]:
    """Draws the answer; which files there are of it, or why there are none."""
    directory = found.sweep.directory
    try:
        for name in FILES:
            (directory / name).stat()
        pictures = [picture(called) for called, _ in found.parts]
        done = all(draw(directory / name, part) for name, (_, part) in zip(pictures, found.parts, strict=True))
    except OSError as error:
        return [f"not written, {error}"]
    missing = [] if done else [f"no {PICTURE}: matplotlib draws it, and is not installed; pip install matplotlib"]
    return [", ".join(str(short(directory / name)) for name in [*FILES, *(pictures if done else [])]), *missing]


FILES = ("results.csv", "results.json")


def picture(called: str) -> str:
    """The file in which a part of a sweep is drawn."""
    return f"sweep_{re.sub(r'[^a-zA-Z0-9.-]+', '-', called)}.png" if called else PICTURE


# ---------------------------------------------------------------- for people


def screen(found: Answer, wide: int) -> list[Line]:
    """What was varied and what came of it, in a table and in words."""
    sweep = found.sweep
    lines: list[Line] = [((sweep.name, "bold"), (f"  {sweep.directory.absolute().name}", ""))]
    lines += [*words([course(sweep)], wide), line()]
    if len(found.parts) > 1:
        lines += [*words([apart(found)], wide), line()]
    for called, part in found.parts:
        lines += [line(called, "bold")] if called else []
        lines += table(part, wide)
        lines += troubles(part, wide)
        lines += [line(), *words(remarks(part), wide)]
        if part.comparisons:
            lines += [line(), *compared(part, wide)]
        if part.effects:
            lines += [line(), *influences(part, wide)]
        lines.append(line())
    return lines


def apart(found: Answer) -> str:
    """Why the trials are not ranked in one table."""
    objective, parts = found.sweep.objective, [[*part.sweep.trials] for _, part in found.parts]
    keys = " and ".join(telling(parts, found.sweep.varied)) or "of these"
    return f"{objective} measures another thing for each {keys}: each is ranked by itself{mend(objective)}."


def course(sweep: Sweep) -> str:
    """How many trials there are and how each ended, and how long it took or is at it."""
    many = some(len(sweep.trials), "trial")
    statuses = ", ".join(f"{count} {status}" for status, count in sweep.counts.items())
    searched = "" if sweep.search.get("method", "grid") == "grid" else f", searched by {sweep.search['method']}"
    when = f"in {duration(sweep.seconds)}" if sweep.end else "cut off"
    if sweep.alive:
        when = f"for {duration((datetime.now(UTC) - sweep.since).total_seconds())} now"
    return f"{many}{searched}: {statuses or 'none yet'}; {when}"


def table(found: Answer, wide: int) -> list[Line]:
    """A row for each configuration, or trial, the best first; what is not ranked follows, and says why."""
    sweep, standing = found.sweep, found.standings
    steps = not found.seeded and len({one.trials[0].run.progress for one in standing if one.trials[0].run.record}) > 1
    top = ["", *found.keys.values(), *(["seeds"] if found.seeded else []), sweep.objective]
    top += [*(["steps"] if steps else []), ""]
    figures = measures(found)
    rows, styles = [], []
    for one, figure in zip(standing, figures, strict=True):
        values = [value_of(one, key) for key in found.keys]
        many = [f"{len(one.values)}" if one.ranked else f"{len(one.values)} of {len(one.trials)}"]
        went = [one.trials[0].run.progress if one.trials[0].run.record else ""]
        said, style = remark(found, one)
        rows.append(
            [place(found, one), *values, *(many if found.seeded else []), figure, *(went if steps else []), said]
        )
        first = "bold" if one is standing[0] and one.ranked else "" if one.ranked else "dim"
        styles.append([*[first] * (len(top) - 1), style])
    texts = [i for i, key in enumerate(found.keys, 1) if not all(is_number(one.overrides.get(key)) for one in standing)]
    right = {*range(len(top) - 1)} - {*texts}
    heading, *cells = fitted([top, *rows], range(1, len(found.keys) + 1), wide, right)
    return [line("  ".join(heading).rstrip(), "bold"), *map(spaced, cells, styles)]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def value_of(one: Configuration, key: str) -> str:
    return brief(one.overrides[key]) if key in one.overrides else "-"


def place(found: Answer, one: Configuration) -> str:
    """Its rank, which it has in common with what came to the same; a dash where it has none."""
    if not one.ranked or one.estimate is None:
        return "-"
    means = [other.estimate.mean for other in found.ranked if other.estimate]
    return str(means.index(one.estimate.mean) + 1)


def remark(found: Answer, one: Configuration) -> tuple[str, str]:
    """What is said of a row at its end, and its style."""
    if not one.ranked:
        if not found.seeded:
            missing = one.status == "completed"
            if (value := one.trials[0].paused) is not None:
                return f"stopped at {within(Estimate(value, None, 1), *precision(found.sweep.objective, []))}", "dim"
            return (f"no {found.sweep.objective}" if missing else one.status), STYLES.get(one.status, "dim")
        seeds: dict[str, list[str]] = {}
        for trial in one.trials:
            if trial.objective is None:
                status = trial.status if trial.status != "completed" else f"no {found.sweep.objective}"
                seeds.setdefault(status, []).append(str(trial.overrides.get(SEED)))
        told = "; ".join(f"{status}: seed {', '.join(which)}" for status, which in seeds.items())
        return told, STYLES.get(one.status, "dim")
    index = found.ranked.index(one)
    if index == 0:
        return ("best", "bold green") if found.sweep.varied != (SEED,) else ("", "")
    if not found.seeded:
        return "", ""
    return verdict(found.comparisons[index - 1])


def verdict(comparison: Comparison) -> tuple[str, str]:
    if comparison.p is None:
        return "not comparable", "dim"
    return ("worse", "") if comparison.distinguishable else ("not distinguishable", "yellow")


def measures(found: Answer) -> list[str]:
    """The objective of each row, with half of its interval where it has one, all with as many digits."""
    values = [one.estimate for one in found.standings if one.estimate]
    share, digits = precision(found.sweep.objective, values)
    return ["-" if one.estimate is None else within(one.estimate, share, digits) for one in found.standings]


def precision(objective: str, values: Sequence[Estimate]) -> tuple[bool, int]:
    """Whether an objective is said in percent, and how many digits tell its values from one another and from 0."""
    share = objective == "exact_match" or objective.endswith("accuracies")
    scale = 100 if share else 1
    least, most = (1, 4) if share else PLACES

    def told_apart(digits: int) -> int:
        means = {round(scale * value.mean, digits) for value in values}
        return len(means) + sum(round(scale * (value.half or 0.0), digits) > 0 for value in values)

    return share, next(digits for digits in range(least, most + 1) if told_apart(digits) == told_apart(most))


def within(value: Estimate, share: bool, digits: int, sign: str = "") -> str:
    """`0.5123 ± 0.0100`, or only the mean; in percent `98.5% ± 0.7`."""
    scale = 100 if share else 1
    mean = f"{scale * value.mean:{sign}.{digits}f}{'%' if share else ''}"
    return mean if value.half is None else f"{mean} ± {scale * value.half:.{digits}f}"


def troubles(found: Answer, wide: int) -> list[Line]:
    """Why trials did not complete, a line each, as many as can be read."""
    told = [(trial, trial.error or "") for one in found.standings for trial in one.trials if trial.error]
    lines = []
    for trial, error in told[:LISTED]:
        why = next(iter(error.strip().splitlines()[-1:]), "").removeprefix("smoltrain.runs.Diverged: ")
        text = f"{trial.status}  {named(found, trial)}: {why}"
        lines.append(line(cut(text, wide), STYLES.get(trial.status, "")))
    rest = [line(f"{len(told) - LISTED} more in results.csv")] if len(told) > LISTED else []
    return [line(), *lines, *rest] if lines else []


def named(found: Answer, one: Trial | Configuration, room: int = 100) -> str:
    """What tells it from the others, as one would type it, by the last parts of the keys."""
    short = shortened(found.sweep.varied)
    return cut(" ".join(f"{short[key]}={brief(value)}" for key, value in one.overrides.items() if key in short), room)


def remarks(found: Answer) -> list[str]:
    """How to read the table, and what cannot be read from it."""
    sweep, ranked = found.sweep, found.ranked
    better = "greater" if sweep.greater else "smaller"
    said = []
    if not ranked:
        said.append(
            f"No {'configuration' if found.seeded else 'trial'} completed with {sweep.objective}: none is ranked."
        )
    elif found.seeded:
        said.append(
            f"{sweep.objective}: the mean over the seeds ± half of its 95 % confidence interval (Student's t); "
            f"{better} is better. ± is about the seeds alone: the {held_out(sweep)} are the same for all."
        )
    else:
        said.append(f"{sweep.objective}, on the {held_out(sweep)}: {better} is better.")
    if before := baseline(sweep):
        share, digits = precision(sweep.objective, [before])
        said.append(f"Before training: {within(before, share, digits)}.")
    if found.seeded and any(not one.ranked and one.status != "stopped" for one in found.standings):
        said.append(
            "A configuration of which a seed did not complete is not ranked: its mean is of the seeds that did, and "
            "the others may have been the hard ones."
        )
    if found.over_seeds:
        share, digits = precision(sweep.objective, [found.over_seeds])
        said.append(
            f"Over {found.over_seeds.count} seeds: {within(found.over_seeds, share, digits)} "
            "(the mean ± half of its 95 % confidence interval, Student's t)."
        )
        if len(ranked) < len(sweep.trials):
            said[-1] += " It is of the seeds that completed only."
    if found.one_seed:
        said.append(
            "One seed each: nothing can be said about which differences are more than chance. "
            "Below is the command that adds seeds."
        )
    if sweep.trials and not any(trial.run.record for trial in sweep.trials):
        said.append("Of none of these trials there is a record: if they ran, their directories are gone.")
    return said


MOST_ROWS = "config.evaluation.max_rows"


def held_out(sweep: Sweep) -> str:
    """How many held-out rows there are; as many are answered by generation as `evaluation.max_rows` allows."""
    rows = next((kept for trial in sweep.trials if (kept := at(trial.run.record, "rows.test.kept"))), None)
    asked = next((most for trial in sweep.trials if (most := at(trial.run.record, MOST_ROWS))), None)
    if rows and asked and sweep.objective == "exact_match":
        rows = min(rows, asked)
    return some(rows, "held-out row") if rows else "held-out rows"


def baseline(sweep: Sweep) -> Estimate | None:
    """What the objective was before training, where all trials began alike."""
    before = {
        at(trial.run.record, "metrics").get(f"before/{sweep.objective}") for trial in sweep.trials if trial.metrics
    }
    value = before.pop() if len(before) == 1 else None
    return None if value is None else Estimate(value, None, 1)


def with_seeds(sweep: Sweep) -> str:
    """The sweep's command with three seeds, the one that was used among them: its trials are not run again."""
    used = sorted({trial.run.record["seed"] for trial in sweep.trials if isinstance(trial.run.record.get("seed"), int)})
    first = used[0] if used else 1
    others = [override for override in sweep.command if not override.lstrip("+").startswith(f"{SEED}=")]
    return shlex.join(["smoltrain", "-m", *others, f"{SEED}={first},{first + 1},{first + 2}"])


def compared(found: Answer, wide: int) -> list[Line]:
    """Each configuration against the best, seed by seed."""
    share, digits = precision(found.sweep.objective, [one.difference for one in found.comparisons if one.difference])
    rows, styles = [["", "seed by seed, against the best", "difference", "seeds", "p", ""]], [["bold"] * 6]
    for one, comparison in list(zip(found.ranked[1:], found.comparisons, strict=True))[: 2 * LISTED]:
        difference, p = comparison.difference, comparison.p
        much = within(difference, share, digits, sign="+") if difference else "-"
        many = str(difference.count) if difference else "0"
        said, style = verdict(comparison)
        rows.append([place(found, one), named(found, one), much, many, "-" if p is None else written_p(p), said])
        styles.append([*[""] * 5, style])
    lines = list(map(spaced, fitted(rows, [1], wide, right=(0, 2, 3, 4)), styles))
    if len(found.comparisons) > 2 * LISTED:
        lines.append(line(f"{len(found.comparisons) - 2 * LISTED} more in results.json"))
    alike = sum(comparison.p is not None and not comparison.distinguishable for comparison in found.comparisons)
    pairs = len(found.ranked) * (len(found.ranked) - 1) // 2
    caption = (
        f"{alike} of {len(found.comparisons)} not distinguishable from the best: there p is over 0.05. "
        "The mean of the differences over the seeds that both have ± half of its 95 % confidence interval; p of the "
        f"paired t-test, corrected by Holm for all {pairs} pairs, for the best was chosen by its results. The interval "
        "is that of one difference alone, uncorrected."
        if pairs > 1
        else "The mean of the differences over the seeds that both have ± half of its 95 % confidence interval; p of "
        "the paired t-test. Not distinguishable: p is over 0.05."
    )
    return [*lines, *words([caption], wide)]


def written_p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def influences(found: Answer, wide: int) -> list[Line]:
    """The main effect of each key: the mean objective by value, the best first."""
    objective, short = found.sweep.objective, shortened(found.sweep.varied)
    sign = -1 if found.sweep.greater else 1
    every = [Estimate(mean, None, 1) for effect in found.effects for _, mean in effect.means if mean is not None]
    share, digits = precision(objective, every)
    rows, styles = [["by key", "", objective, "of"]], [["bold"] * 4]
    for effect in found.effects:
        if not effect.combinations or len(effect.means) > 2 * LISTED:
            why = "no combination of the other keys completed for each of its values"
            if effect.combinations:
                why = f"{len(effect.means)} values, in results.json"
            rows.append([short[effect.key], "", "-", why])
            styles.append(["", "", "", "dim"])
            continue
        key = short[effect.key]
        for value, mean in sorted(effect.means, key=lambda m: (m[1] is None, sign * (m[1] or 0.0))):
            told = "-" if mean is None else within(Estimate(mean, None, 1), share, digits)
            of = "none completed" if mean is None else f"{effect.combinations} of {effect.of}"
            rows.append([key, brief(value), told, of])
            styles.append(["", "", "", "dim" if mean is None else ""])
            key = ""
    lines = list(map(spaced, fitted(rows, [1, 3], wide, right=(2,)), styles))
    caption = (
        f"The mean over those combinations of the other keys{' and seeds' if SEED in found.sweep.varied else ''} "
        "that completed for each value of the key."
    )
    return [*lines, *words([caption], wide)]


def links(found: Answer, files: list[str]) -> list[Line]:
    """Where to look next: the files, the curves of all runs, the best of them. Nothing here is cut: it is copied."""
    told = [("files", files)]
    if not found.sweep.alive and ({*GO_ON} & {*found.sweep.counts} or not found.sweep.end):
        told.append(("go on", [shlex.join(["smoltrain", "-m", *found.sweep.command])]))
    if found.one_seed:
        told.append(("seeds", [with_seeds(found.sweep)]))
    if found.dashboard:
        overlaid = [f"smoltrain dashboard {found.sweep.directory.absolute().name}"]
        overlaid += [f"or, where smoltrain dashboard runs, {found.dashboard}"] if len(found.dashboard) < LINK else []
        told.append(("curves", overlaid))
    for called, part in found.parts:
        if not part.best or part.sweep.varied == (SEED,):  # of seeds, the best one is the luckiest
            continue
        directory = short(part.best.directory)
        go_on = [f"model.from_run={directory} starts a run from it"] if (directory / "model").is_dir() else []
        told.append(
            ("best", [*([called] if called else []), shlex.join(["smoltrain", "runs", "show", str(directory)]), *go_on])
        )
    return [
        ((f"{label if i == 0 else '':{MARGIN}}", "dim"), (text, ""))
        for label, texts in told
        for i, text in enumerate(texts)
    ]


def words(texts: Iterable[str], wide: int) -> list[Line]:
    """Sentences, broken where the terminal ends, or can no longer be read with ease; a command is not."""
    return [
        line(part)
        for text in texts
        for part in textwrap.wrap(text, min(wide, WIDE), break_long_words=False, break_on_hyphens=False)
    ]


def fitted(cells: Sequence[Sequence[str]], columns: Iterable[int], wide: int, right: Iterable[int]) -> list[list[str]]:
    """Rows of cells that fit in a width: the widest of these columns gives way first, none to less than NARROW.

    Where that is not enough the last column does.
    """
    limits = [max(map(len, column)) for column in zip(*cells, strict=True)]
    over = sum(limits) + 2 * (len(limits) - 1) - wide
    giving = [*columns]
    while over > 0 and (widest := max(giving, key=limits.__getitem__, default=-1)) >= 0 and limits[widest] > NARROW:
        limits[widest] -= 1
        over -= 1
    limits[-1] = max(limits[-1] - max(over, 0), NARROW)
    return padded([[cut(text, limit) for text, limit in zip(row, limits, strict=True)] for row in cells], tuple(right))


def shortened(keys: Iterable[str]) -> dict[str, str]:
    """Each key by its last parts, as many as tell it from the others."""
    every = list(keys)

    def last(key: str, parts: int) -> str:
        return ".".join(key.split(".")[-parts:])

    def short(key: str) -> str:
        parts = range(1, key.count(".") + 2)
        return next(last(key, n) for n in parts if [last(other, n) for other in every].count(last(key, n)) == 1)

    return {key: short(key) for key in every}


# ---------------------------------------------------------------- for programs


def as_data(found: Answer) -> dict[str, Any]:
    """The whole answer; what is no finite number is null."""
    sweep = found.sweep
    every = [(called, part, one) for called, part in found.parts for one in part.standings]
    compared: dict[int, Comparison] = {}
    for _, part in found.parts:
        compared |= dict(zip(map(id, part.ranked[1:]), part.comparisons, strict=False))
    configurations = []
    for called, part, one in every:
        comparison = compared.get(id(one))
        configurations.append(
            {
                "part": called,
                "rank": int(place(part, one)) if one.ranked else None,
                "overrides": one.overrides,
                "status": one.status,
                "trials": [trial.number for trial in one.trials],
                "completed": len(one.values),
                "mean": one.estimate and one.estimate.mean,
                "half": one.estimate and one.estimate.half,
                "against_the_best": asdict(comparison) | {"distinguishable": comparison.distinguishable}
                if comparison
                else None,
            }
        )
    return finite(
        {
            "name": sweep.name,
            "directory": str(sweep.directory),
            "start": sweep.start.isoformat(),
            "end": sweep.end and sweep.end.isoformat(),
            "command": sweep.command,
            "search": sweep.search,
            "objective": sweep.objective,
            "greater_is_better": sweep.greater,
            "varied": sweep.varied,
            "statuses": sweep.counts,
            "exit_code": exit_code(sweep),
            "best": [part.best.number for _, part in found.parts if part.best],
            "over_seeds": found.over_seeds and asdict(found.over_seeds),
            "configurations": configurations,
            "main_effects": [{"part": called} | asdict(e) for called, part in found.parts for e in part.effects],
            "dashboard": found.dashboard,
            "trials": [row(trial) | {"metrics": trial.metrics} for trial in sweep.trials],
        }
    )


def row(trial: Trial) -> dict[str, Any]:
    """A trial as data, without its metrics."""
    record = trial.run.record
    return {
        "number": trial.number,
        "overrides": trial.overrides,
        "status": trial.status,
        "objective": trial.objective,
        "steps": trial.run.steps if record else None,
        "max_steps": record.get("max_steps"),
        "paused": record.get("paused") or None,
        "seconds": record.get("seconds"),
        "config_hash": trial.config_hash,
        "directory": str(trial.directory),
        "error": trial.error,
    }


def finite(value: Any) -> Any:
    """Data as strict JSON has it, which knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_table(sweep: Sweep) -> str:
    """CSV, a row for each trial in the order in which they were made: keys by their whole names, final metrics last."""
    metrics = dict.fromkeys(name for trial in sweep.trials for name in trial.metrics)
    file = io.StringIO()
    facts = [name for name in FACTS if name != "number"]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["number", *sweep.varied, *facts, *metrics])
    for trial in sweep.trials:
        told = row(trial)
        varied = [simple(trial.overrides.get(key)) for key in sweep.varied]
        writer.writerow(
            [trial.number, *varied, *(simple(told[n]) for n in facts), *(trial.metrics.get(n) for n in metrics)]
        )
    return file.getvalue()


FACTS: tuple[str, ...] = ("number", "status", "objective", "steps", "max_steps", "paused", "seconds")
FACTS += ("config_hash", "directory", "error")


def simple(value: Any) -> Any:
    """A value as a cell: a list or a node as JSON, true and false as one would type them."""
    return frozen(value) if isinstance(value, bool | list | dict) else value
