"""What watches a run while it trains: the record of its metrics, and its progress on the terminal."""

import math
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from transformers import TrainerCallback

from smoltrain.runs import Diverged, Run


class RunCallback(TrainerCallback):
    """A TrainerCallback that also sees the whole run, from before the first evaluation to its final status."""

    def on_run_begin(self, run: Run) -> None:
        """The model is built and the record says with what; nothing is measured yet."""

    def on_run_end(self, run: Run) -> None:
        """The record is closed: status, metrics and error stand."""


class Metrics(RunCallback):
    """Writes every logged value to the run's metrics.jsonl and stops a run whose values are no longer finite."""

    def on_run_begin(self, run: Run) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.record["max_steps"] = state.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.record["steps"] = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if state.is_world_process_zero:
            self.run.log(state.global_step, logs)
        for name, value in logs.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise Diverged(f"{name} is {value} at step {state.global_step}")


class Progress(RunCallback):
    """A bar with loss and learning rate on a terminal; a plain line at every log elsewhere."""

    def __init__(self) -> None:
        self.console = Console()
        self.bars = Bars(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.training: TaskID | None = None
        self.evaluating: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bars.start()
            self.training = self.bars.add_task("training", total=state.max_steps, values="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training is not None:
            self.bars.update(self.training, completed=state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            if self.evaluating is None:
                self.bars.start()
                self.evaluating = self.bars.add_task("evaluating", total=len(kwargs["eval_dataloader"]), values="")
            self.bars.advance(self.evaluating)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.evaluating is not None:
            self.bars.remove_task(self.evaluating)
            self.evaluating = None
        if self.training is None:
            self.bars.stop()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if self.training is None or "loss" not in logs:
            return
        values = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.1e}"
        self.bars.update(self.training, values=values)
        if not self.console.is_terminal:
            print(f"step {state.global_step}/{state.max_steps}  {values}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bars.stop()
        if self.training is not None:
            self.bars.remove_task(self.training)  # its last frame stays; a later evaluation does not draw it again
        self.training = None

    def on_run_end(self, run: Run) -> None:
        self.bars.stop()
