"""The entrypoint: one resolved config becomes one recorded run. The `_target_` in the config is the method."""

import os
import shutil
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from smoltrain import ranks, report, resume, runs
from smoltrain.checkpoints import all_of
from smoltrain.config import ConfigError, refusing
from smoltrain.config.targets import instantiate
from smoltrain.config.validate import validate
from smoltrain.endings import explained


def main(cfg: DictConfig) -> float:
    """Hydra's task: checks the config, opens the run, trains in it, and returns the objective for sweepers."""
    validate(cfg)
    parent = resume.pin_parent(cfg)
    if ranks.inside():
        raise ConfigError("WORLD_SIZE: several processes were started already; hardware.processes=2 starts them itself")
    ranks.refuse_elsewhere(cfg.hardware)
    if ranks.world(cfg.hardware) > 1:
        ranks.warm_up()
    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    if (directory / "run.json").exists() and directory.resolve() not in runs.CLAIMED:
        resume.claim_own(cfg, directory, hydra.mode == RunMode.MULTIRUN)
    choices = {group: option for group, option in hydra.runtime.choices.items() if not group.startswith("hydra/")}
    overrides = list(hydra.overrides.task)
    with (
        runs.Run(directory, cfg, choices, overrides, parent, report.write) as run,
        explained(run.directory, lambda: run.args),
    ):
        report.banner(run)
        train(cfg, run, fresh=cfg.resume == "never" or hydra.mode == RunMode.MULTIRUN)
    report.summary(run)
    return run.record["objective"]


def train(cfg: DictConfig, run: runs.Run, fresh: bool) -> None:
    """Data, model, trainer; evaluate, train, evaluate; save. Nothing here knows which method it is.

    Unless the run is to be a `fresh` one, it is not made again where it has ended already.
    """
    from transformers import set_seed

    from smoltrain.callbacks import Metrics
    from smoltrain.evaluate import evaluate, to_answer
    from smoltrain.perf import keep_memory
    from smoltrain.preflight import preflight, remarks

    found = preflight(cfg, chosen=run.record["perf"])
    found.refuse()
    chat, data = found.chat, found.data
    learned = report.rows(data, chat.tokenizer)
    ranks.refuse_other_rows(run, learned["fingerprints"])
    run.note(**learned, perf=found.choices.record, warnings=remarks(cfg, found))
    if not (fresh or all_of(run.directory)):
        resume.stop_if_finished(run)
    start = run.begins or resume.Start.of(run, cfg.resume_changes, learned["fingerprints"], found.steps)
    if ranks.world(cfg.hardware) > 1 and not ranks.inside():
        ranks.start(run, cfg.hardware, start)
        return
    report.data(run)
    with refusing("callbacks"):
        callbacks = [Metrics(), *(c for c in instantiate(cfg.callbacks).values() if c is not None)]
    # transformers' TensorBoard callback opens its file at the first evaluation, before it has read output_dir.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.directory)
    trainer = build(cfg, found, callbacks)
    ranks.refuse_another_size(trainer.args.world_size, cfg.hardware)
    keep_memory(trainer.args.device)
    finite, saving = watch(trainer, run, start.checkpoint, cfg.pause_at)
    model = {"model": report.fingerprint(trainer.model)}
    ranks.refuse_other_model(model["model"])
    resume.refuse_other(run, cfg.resume_changes, model)
    trainer.accelerator.wait_for_everyone()
    start.go_back(run)
    rows = to_answer(data.examples(cfg.evaluation.max_rows), report.SAMPLES)
    asked = {"asked": report.asked(rows)}
    run.note(**report.facts(trainer), fingerprints=learned["fingerprints"] | model | asked)
    run.watch([c for c in callbacks if hasattr(c, "on_run_begin")])

    if start.checkpoint is None:
        before, replies = evaluate(trainer, chat, rows, cfg.evaluation.max_new_tokens)
        if cfg.objective not in before:
            raise ConfigError(f"objective={cfg.objective}: not measured here; choose one of {', '.join(before)}")
        run.note(
            metrics={f"before/{name}": value for name, value in before.items()},
            samples=report.samples(rows, replies),
        )
    set_seed(cfg.seed)  # a run that goes on has not drawn what the evaluation before training draws
    try:
        trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint))
    finally:
        saving.join()  # whatever it ends with, what was saved is sealed before the record says how it ended
    if saving.signal:
        trainer.accelerator.wait_for_everyone()  # who leaves first, the others must not miss
        raise runs.Interrupted(f"interrupted by {saving.signal}, saved at step {trainer.state.global_step}")
    after, replies = evaluate(trainer, chat, rows, cfg.evaluation.max_new_tokens)
    if saving.paused(trainer.state):
        step = trainer.state.global_step
        run.note(paused=run.record["paused"] | {str(step): after[cfg.objective]})
        raise runs.Interrupted(f"paused at step {step} (pause_at={cfg.pause_at})")
    finite.look_at_weights(trainer.state.global_step)
    save(trainer, run.directory / "model", run.writes)
    if found.streamed:  # what became of its rows is known only now
        run.note(**report.rows(data, chat.tokenizer))
        report.data(run)
    run.note(
        steps=trainer.state.global_step,
        metrics=run.record["metrics"] | after,
        objective=after[cfg.objective],
        samples=report.answered(run.record["samples"], replies),
    )


def watch(trainer: Any, run: runs.Run, checkpoint: Path | None, pause_at: int | None) -> tuple[Any, Any]:
    """Adds, and returns, what stops a run that diverges and what makes its checkpoints ones to trust."""
    from smoltrain.callbacks import Checkpoints, Finite

    finite, saving = Finite(trainer), Checkpoints(trainer, run, checkpoint, pause_at)
    trainer.add_callback(finite)
    trainer.add_callback(saving)
    return finite, saving


def save(trainer: Any, folder: Path, writes: bool) -> None:
    """Writes the final model, which is there whole or not at all. Of several processes one does, by help of all."""
    unfinished = folder.with_name(runs.UNFINISHED_MODEL)
    for left in (unfinished, folder) if writes else ():  # by a life that ended before the record said completed
        shutil.rmtree(left, ignore_errors=True)
    trainer.save_model(str(unfinished))
    if writes:
        unfinished.rename(folder)


def build(cfg: DictConfig, found: Any, callbacks: list[Any]) -> Any:
    """The trainer that `cfg.trainer` describes, with everything live in it that the preflight found."""
    import torch
    from datasets import IterableDataset
    from transformers import PrinterCallback, set_seed
    from transformers import trainer as module

    from smoltrain.data.streams import BUFFER
    from smoltrain.preflight import single
    from smoltrain.trainers import watched

    set_seed(cfg.seed)
    torch.set_num_threads(cfg.threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    with refusing("model"):
        model = found.checkpoint.model(found.chat.tokenizer)
    rows = found.data.train
    if isinstance(rows, IterableDataset):  # a trainer shuffles what it can index; a stream, it cannot
        rows = rows.shuffle(seed=cfg.seed, buffer_size=BUFFER)
    described = cfg.trainer if ranks.inside() else single(cfg.trainer)
    with refusing("trainer"):
        trainer = watched(found.encoder.feed(instantiate(described)))(
            model=model,
            processing_class=found.chat.tokenizer,
            train_dataset=rows,
            eval_dataset=found.data.test,
            callbacks=callbacks,
        )
    trainer.remove_callback(PrinterCallback)  # Progress prints
    # A pickle of all arguments, beside every checkpoint, that nothing reads: it is written to nowhere.
    module.TRAINING_ARGS_NAME = os.devnull
    trainer.create_model_card = lambda **_: None  # TRL's names no model, and would replace a README.md of the user's
    return trainer
