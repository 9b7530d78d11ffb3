"""What a person sees of a sweep while it runs: a line for each trial, and the time that is left."""

import signal
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from smoltrain import history, lines, runs

EVERY = 0.5  # seconds between two looks at what the trials have written


class Board:
    """The trials of a sweep: on a terminal a table of those that run, elsewhere a line for each that has ended.

    Of `total`, so many are `done` already.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done, self.seconds = total, done, 0.0
        self.before = done
        self.running: dict[int, tuple[Path, float]] = {}
        self.console = Console(highlight=False, soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.looked, self.waiting = 0.0, 0

    def __enter__(self) -> "Board":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def started(self, number: int, directory: Path) -> None:
        self.running[number] = directory, time.monotonic()

    def ended(self, number: int, directory: Path, code: int | None) -> None:
        """Prints how a trial ended."""
        seconds = time.monotonic() - self.running.pop(number, (directory, time.monotonic()))[1]
        self.done, self.seconds = self.done + 1, self.seconds + seconds
        left = f", {self.left()} left" if self.done < self.total else ""
        self.say(
            f"[{self.done}/{self.total}] {directory.name}  {came_to(directory, code)}  "
            f"({lines.duration(seconds)}{left})"
        )

    def left(self) -> str:
        """The time until all have ended, from the mean of those that have."""
        waiting = self.total - self.done
        return lines.duration(self.seconds / (self.done - self.before) * waiting / max(len(self.running), 1))

    def look(self) -> None:
        """Draws the trials that run anew, at most so often."""
        if not self.live.is_started or time.monotonic() - self.looked < EVERY:
            return
        self.looked = time.monotonic()
        table = Table.grid(padding=(0, 2))
        for directory, began in self.running.values():
            run = history.look(directory, directory.name)
            steps = "starting" if run.trouble else f"step {run.progress}"
            table.add_row(directory.name, steps, lines.duration(time.monotonic() - began))
        if self.waiting:
            table.add_row(f"{self.waiting} in the queue")
        self.live.update(table, refresh=True)


def came_to(directory: Path, code: int | None) -> str:
    """How a trial ended, in a few words."""
    record = history.look(directory, "").record
    if code == 2:  # what it goes on with, or begins with, is not as it has to be
        return f"refused: {last_line(directory / runs.LOG)}"
    if not record:
        return f"failed before it began; read {directory / runs.LOG}" if code else "nothing to do"
    name = record["config"]["objective"]
    if record["status"] == "preempted" and (value := record["paused"].get(str(record["steps"]))) is not None:
        return f"paused at step {record['steps']}  {name} {lines.measured(name, value)}"
    if code is not None and code < 0:
        return f"{record['status']}: killed by {signal.Signals(-code).name}"
    if record["status"] != "completed":
        why = (str(record["error"] or code).splitlines() or [""])[0].removeprefix("smoltrain.runs.Diverged: ")
        return f"{record['status']}: {why}"
    return f"completed  {name} {lines.measured(name, record['objective'])}"


def last_line(log: Path) -> str:
    """The last that a trial has printed."""
    said = log.read_text(errors="replace").splitlines() if log.exists() else []
    return said[-1] if said else ""
