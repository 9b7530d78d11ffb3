"""What watches a run while it trains: its metrics, its checkpoints, its end, and its progress on the terminal."""

import math
import shutil
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from smoltrain import checkpoints
from smoltrain.endings import DiskFull, no_room
from smoltrain.runs import STOP, Diverged, Run


class RunCallback(TrainerCallback):
    """A TrainerCallback that also sees the whole run, from before the first evaluation to its final status."""

    def on_run_begin(self, run: Run) -> None:
        """The model is built and the record says with what; nothing is measured yet."""

    def on_run_end(self, run: Run) -> None:
        """The record is closed: status, metrics and error stand."""


class Metrics(RunCallback):
    """Writes every logged value to the run's metrics.jsonl."""

    def on_run_begin(self, run: Run) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.note(max_steps=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.record["steps"] = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.run.log(state.global_step, kwargs["logs"])


class Finite(RunCallback):
    """Stops a run in the step in which its loss, gradient norm or rewards are no longer finite, or whatever it logs.

    `trainer` is one that `trainers.watched` made. Weights are looked at before they are written. The gradients of a
    step that fp16's scaler left out may be infinite: it looks for the largest scale that way.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        told = getattr(self.trainer, "_metrics", {}).get("train", {})
        seen = {name: values[-1] for name, values in told.items() if "reward" in name and values}
        seen |= {"loss": self.trainer.step_loss, "grad_norm": self.trainer.step_grad_norm}
        self.trainer.step_loss = None
        self.look_at(seen, state.global_step)
        if control.should_save:
            self.look_at_weights(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look_at({n: value for n, value in kwargs["logs"].items() if isinstance(value, float)}, state.global_step)

    def look_at(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            scaled = self.trainer.args.fp16 and self.trainer.accelerator.optimizer_step_was_skipped
            left_out = name == "grad_norm" and scaled  # DeepSpeed leaves out any step of which it is not finite
            if value is not None and not math.isfinite(value) and not left_out:
                raise Diverged(f"{name} is {float(value)} at step {step}")

    def look_at_weights(self, step: int) -> None:
        trained = [weight for weight in self.trainer.model.parameters() if weight.requires_grad]
        own = map(self.trainer.sharing.local, trained) if self.trainer.sharing else trained
        if trained and not torch.stack([torch.isfinite(weight).all() for weight in own]).all():
            raise Diverged(f"the weights are no longer finite at step {step}")


STATE = "run_state.pt"


class Checkpoints(RunCallback):
    """Saves when a signal asks for it, seals what is saved, and carries over a resume what transformers does not.

    A checkpoint is sealed by a thread while training goes on: to read and hash it takes a third of the time that it
    takes to write it. The oldest ones go when a newer one is sealed.
    """

    def __init__(self, trainer: Any, run: Run, checkpoint: Path | None, pause_at: int | None):
        self.trainer, self.run, self.checkpoint, self.pause_at = trainer, run, checkpoint, pause_at
        trainer.before_best = self.refuse_damaged_best
        self.limit = trainer.args.save_total_limit
        trainer.args.save_total_limit = None  # transformers would remove the last sealed one before the next is there
        self.together = trainer.accelerator.num_processes > 1
        self.agreed: str | None = None  # which signal it is that all processes of a run stop for
        waits = timedelta(seconds=trainer.args.ddp_timeout)
        self.group = torch.distributed.new_group(backend="gloo", timeout=waits) if self.together else None
        self.known = torch.zeros(1, dtype=torch.int32)  # how many of them knew of one a step ago
        self.asking: Any = None
        self.sealing: Thread | None = None
        self.failure: OSError | None = None
        self.saved = int(checkpoint.name.split("-")[1]) if checkpoint else -1  # the step that is written already
        self.ending = self.due = False  # whether an epoch is at its end, and has a save to come

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        STOP.waits = True
        shared = self.trainer.sharing or self.trainer.model_wrapped is not self.trainer.model
        assert shared or not self.together, "gradients are not shared"
        if self.checkpoint is not None:
            state.compute_steps(args, state.max_steps)  # how often to log, measure and save: as it is asked for now
            if state.best_model_checkpoint:  # by its name, for a run may have been moved
                state.best_model_checkpoint = str(self.run.directory / Path(state.best_model_checkpoint).name)
            self.restore(torch.load(self.checkpoint / STATE, weights_only=True))
            self.trainer.ended = self.trainer.ended or self.paused(state)  # it is there already

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.agree()
        self.asked(args, state, control)
        self.postpone(state, control)
        self.before_saving(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.agree()
        self.asked(args, state, control)
        self.postpone(state, control)
        self.before_saving(state, control)

    def agree(self) -> None:
        """Has all processes of a run stop in the same step, one after the step in which one of them knew of a signal.

        They ask each other while they compute, past the accelerator, which nothing here has to wait for.
        """
        if not self.together or self.agreed:
            return
        if self.asking is not None:
            self.asking.wait()
            if self.known.item():
                self.agreed = STOP.asked or "SIGTERM"  # its own may come yet, and is no second one
                return
        self.known.fill_(STOP.asked is not None)
        self.asking = torch.distributed.all_reduce(self.known, group=self.group, async_op=True)

    @property
    def signal(self) -> str | None:
        """The signal for which training stops; of one that came too late for all processes to agree, they go on."""
        return self.agreed if self.together else STOP.asked

    def leaves(self, state: Any) -> bool:
        """Whether training stops here, to go on later."""
        return bool(self.signal and STOP.waits) or self.paused(state)

    def paused(self, state: Any) -> bool:
        return self.pause_at is not None and self.pause_at <= state.global_step < state.max_steps

    def asked(self, args: Any, state: Any, control: Any) -> None:
        """Saves, with all that it takes to go on, before training stops where it is to go on later."""
        if self.leaves(state):
            control.should_save, args.save_only_model = True, False

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ending = self.due = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ending = True
        control.should_save = control.should_save or self.due
        self.before_saving(state, control)

    def postpone(self, state: Any, control: Any) -> None:
        """Saves after the last step of an epoch once what is due at its end is logged and measured too.

        Resumed from there, the next epoch begins, and nobody would do it any more.
        """
        over = control.should_training_stop or state.epoch == int(state.epoch)
        if control.should_save and over and not (self.ending or self.leaves(state)):
            control.should_save, self.due = False, True

    def before_saving(self, state: Any, control: Any) -> None:
        """What is saved already is not written over; where a disk has no room, nothing is begun."""
        if self.leaves(state) and self.saved == state.global_step:
            control.should_training_stop = True
        control.should_save = control.should_save and self.saved != state.global_step
        if control.should_save:
            need, free = self.need(), shutil.disk_usage(self.run.directory).free
            if free < need:
                raise DiskFull(no_room(self.run.directory, need))

    def need(self) -> int:
        """Bytes of a checkpoint: those of the last one, or for the first its weights and Adam's two moments."""
        for folder in checkpoints.all_of(self.run.directory):
            if manifest := checkpoints.read(folder):
                return sum(file["size"] for file in manifest["files"].values())
        weights = list(self.trainer.model.parameters())
        trained = [weight for weight in weights if weight.requires_grad]
        adapter = len(trained) < len(weights) and hasattr(self.trainer.model, "peft_config")
        written = trained if adapter else weights
        sizes = {w: getattr(w, "ds_numel", w.numel()) for w in weights}  # of what DeepSpeed shares out, nothing is here
        return sum(sizes[w] * w.element_size() for w in written) + sum(8 * sizes[w] for w in trained)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()
        folder, kept = self.run.directory / f"checkpoint-{state.global_step}", self.state()
        control.should_training_stop = control.should_training_stop or self.leaves(state)
        self.saved = state.global_step
        self.trainer.accelerator.wait_for_everyone()  # each process writes its own random state
        if not self.run.writes:
            return
        torch.save(kept, folder / STATE)
        metrics = self.run.directory / "metrics.jsonl"
        facts = {
            "step": state.global_step,
            "config_hash": self.run.record["config_hash"],
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            "resumable": not args.save_only_model,
        }
        arguments = (folder, facts, state.best_model_checkpoint)
        self.sealing = Thread(target=self.seal, args=arguments, daemon=True)  # a second signal does not wait for it
        self.sealing.start()

    def seal(self, folder: Path, facts: dict[str, Any], best: str | None) -> None:
        try:
            if facts["metrics_bytes"]:
                checkpoints.synced(self.run.directory / "metrics.jsonl")
            checkpoints.seal(folder, **facts)
            checkpoints.rotate(self.run.directory, self.limit, best)
        except OSError as error:
            self.failure = error

    def finish(self) -> None:
        """Waits for the seal of the last checkpoint. Raises OSError where it could not be written."""
        self.join()
        if self.failure is not None:
            raise self.failure

    def join(self) -> None:
        if self.sealing is not None:
            self.sealing.join()

    def refuse_damaged_best(self, folder: Path) -> None:
        """Raises OSError where the checkpoint that is to become the final model is not what was saved."""
        self.finish()
        self.trainer.accelerator.wait_for_everyone()  # only the first of several processes seals
        manifest = checkpoints.read(folder)
        if wrong := "its manifest is gone" if manifest is None else checkpoints.damage(folder, manifest):
            raise OSError(f"{folder}: {wrong}; it is the best, and would be the final model")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        STOP.waits = False
        self.finish()

    # ------------------------------------------------------------ what transformers and TRL forget

    def state(self) -> dict[str, Any]:
        """Sums since the last log, tokens seen, a reference that moves, and what stops a run early."""
        trainer = self.trainer
        kept = {
            "loss": trainer.accelerator.reduce(trainer._tr_loss.clone(), "mean").item(),
            "total_loss": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
            "ended": trainer.control.should_training_stop,
            "training": trainer.model.training,
            "callbacks": {type(c).__name__: c.state()["attributes"] for c in self.exported()},
        }
        if hasattr(trainer, "_metrics"):
            kept |= {"metrics": {name: list(values) for name, values in trainer._metrics["train"].items()}}
            kept |= {"tokens": trainer._total_train_tokens}
        if getattr(trainer.args, "sync_ref_model", False):
            kept |= {"reference": trainer.ref_model.state_dict()}
        return kept

    def restore(self, kept: dict[str, Any]) -> None:
        trainer = self.trainer
        trainer._tr_loss.fill_(kept["loss"])
        trainer._total_loss_scalar = kept["total_loss"]
        trainer._globalstep_last_logged = kept["last_logged"]
        trainer.ended = kept["ended"]
        self.apply_learning_rate()
        trainer._initial_global_step = 0  # the mean loss is that of the whole run
        trainer.model.train(kept["training"])  # what is logged last, TRL takes for training's or evaluation's by this
        for callback in self.exported():
            for name, value in kept["callbacks"].get(type(callback).__name__, {}).items():
                setattr(callback, name, value)
        if "metrics" in kept:
            trainer._metrics["train"].update(kept["metrics"])
            trainer._total_train_tokens = kept["tokens"]
        if "reference" in kept:
            trainer.ref_model.load_state_dict(kept["reference"])

    def apply_learning_rate(self) -> None:
        """Sets the rate and the schedule that were asked for in place of those that the saved one brought along."""
        rate, scheduler = self.trainer.args.learning_rate, self.trainer.lr_scheduler
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
            for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["initial_lr"], group["lr"] = rate, rate * factor(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]

    def exported(self) -> list[Any]:
        """The callbacks that have a state, as early stopping has; of training's control, transformers takes care."""
        every = self.trainer.callback_handler.callbacks
        return [callback for callback in every if isinstance(callback, ExportableState)]


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
            done = state.global_step
            self.training = self.bars.add_task("training", total=state.max_steps, completed=done, values="")

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
