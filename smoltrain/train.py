"""The entrypoint: one resolved config becomes one recorded run. The `_target_` in the config is the method."""

import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from smoltrain import report, runs
from smoltrain.config import ConfigError, refusing
from smoltrain.config.targets import instantiate
from smoltrain.config.validate import validate


def main(cfg: DictConfig) -> float:
    """Hydra's task: checks the config, opens the run, trains in it, and returns the objective for sweepers."""
    validate(cfg)
    parent = pin_parent(cfg)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("WORLD_SIZE: several processes were started, and a run is one process")
    hydra = HydraConfig.get()
    if (Path(hydra.runtime.output_dir) / "run.json").exists():
        raise ConfigError(f"hydra.run.dir={hydra.runtime.output_dir}: there is a run already; choose another directory")
    choices = {group: option for group, option in hydra.runtime.choices.items() if not group.startswith("hydra/")}
    overrides = list(hydra.overrides.task)
    with runs.Run(hydra.runtime.output_dir, cfg, choices, overrides, parent, report.write) as run:
        report.banner(run)
        train(cfg, run)
    report.summary(run)
    return run.record["objective"]


def train(cfg: DictConfig, run: runs.Run) -> None:
    """Data, model, trainer; evaluate, train, evaluate; save. Nothing here knows which method it is."""
    from smoltrain.callbacks import Metrics
    from smoltrain.evaluate import evaluate, to_answer
    from smoltrain.preflight import preflight, remarks

    found = preflight(cfg)
    found.refuse()
    chat, data = found.chat, found.data
    run.note(**report.rows(data, chat.tokenizer), warnings=remarks(cfg, found))
    report.data(run)
    with refusing("callbacks"):
        callbacks = [Metrics(), *(c for c in instantiate(cfg.callbacks).values() if c is not None)]
    # transformers' TensorBoard callback opens its file at the first evaluation, before it has read output_dir.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.directory)
    trainer = build(cfg, found, callbacks)
    run.note(**report.facts(trainer))
    run.watch([c for c in callbacks if hasattr(c, "on_run_begin")])

    rows = to_answer(data.examples(cfg.evaluation.max_rows), report.SAMPLES)
    before, first_replies = evaluate(trainer, chat, rows, cfg.evaluation.max_new_tokens)
    if cfg.objective not in before:
        raise ConfigError(f"objective={cfg.objective}: not measured here; choose one of {', '.join(before)}")
    run.note(metrics={f"before/{name}": value for name, value in before.items()})
    trainer.train()
    after, replies = evaluate(trainer, chat, rows, cfg.evaluation.max_new_tokens)
    trainer.save_model(str(run.directory / "model"))
    if found.streamed:  # what became of its rows is known only now
        run.note(**report.rows(data, chat.tokenizer))
        report.data(run)
    run.note(
        steps=trainer.state.global_step,
        metrics=run.record["metrics"] | after,
        objective=after[cfg.objective],
        samples=report.samples(rows, first_replies, replies),
    )


def build(cfg: DictConfig, found: Any, callbacks: list[Any]) -> Any:
    """The trainer that `cfg.trainer` describes, with everything live in it that the preflight found."""
    import torch
    from datasets import IterableDataset
    from transformers import PrinterCallback, set_seed
    from transformers import trainer as module

    from smoltrain.data.streams import BUFFER

    set_seed(cfg.seed)
    torch.set_num_threads(cfg.threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    with refusing("model"):
        model = found.checkpoint.model(found.chat.tokenizer)
    rows = found.data.train
    if isinstance(rows, IterableDataset):  # a trainer shuffles what it can index; a stream, it cannot
        rows = rows.shuffle(seed=cfg.seed, buffer_size=BUFFER)
    with refusing("trainer"):
        trainer = found.encoder.feed(instantiate(cfg.trainer))(
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


def pin_parent(cfg: DictConfig) -> dict | None:
    """Replaces `model.from_run` by the directory it means today, and returns what the record keeps of that run."""
    if cfg.model.from_run is None:
        return None
    directory = runs.find(str(cfg.model.from_run)).resolve()
    parent = runs.read(directory)
    if parent["model"] != cfg.model.name_or_path:
        raise ConfigError(
            f"model.from_run={cfg.model.from_run}: {directory} trained {parent['model']}, but model= says "
            f"{cfg.model.name_or_path}; choose the model that the run trained"
        )
    cfg.model.from_run = str(directory)
    return {"directory": str(directory), "config_hash": parent["config_hash"], "trainer": parent["trainer"]}
