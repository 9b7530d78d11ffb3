"""The main promise: the trainer that was asked for, with the values that were asked for, wherever they stand."""

import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import resolvable
from hydra.utils import instantiate
from omegaconf import OmegaConf

from smoltrain import train
from smoltrain.config import CONF, ConfigError
from smoltrain.config.compose import compose
from smoltrain.config.groups import options
from smoltrain.config.resolvers import label
from smoltrain.data import sums
from smoltrain.preflight import preflight
from smoltrain.runs import read_metrics

OWN = Path(__file__).parent / "conf"


@pytest.fixture
def experiment(folder):
    """Writes an experiment into a config folder of the user's own and returns the flags that find it."""

    def write(text: str) -> list[str]:
        file = folder / "own" / "experiment" / "mine.yaml"
        file.parent.mkdir(parents=True)
        file.write_text("# @package _global_\n# mine\n" + text)
        return ["--config-dir", str(folder / "own")]

    return write


@pytest.fixture
def live(folder):
    """The live trainer that a command line stands for, on a few rows of the embedded data."""

    def build(*overrides: str):
        cfg = resolvable(overrides)
        found = preflight(cfg)
        found.refuse()
        return train.build(cfg, found, callbacks=[])

    return build


FEW = ("data.train_rows=16", "data.test_rows=8")


def test_sft_is_the_default_and_its_values_arrive(live):
    import trl

    trainer = live(*FEW, "seed=7", "trainer.args.learning_rate=3e-4", "trainer.args.max_length=96")
    assert isinstance(trainer, trl.SFTTrainer) and type(trainer.args) is trl.SFTConfig
    args = trainer.args
    assert (args.seed, args.learning_rate, args.max_length) == (7, 3e-4, 96)


def test_dpo_is_chosen_and_its_values_arrive(live):
    import trl

    trainer = live(*FEW, "trainer=dpo", "trainer.args.beta=0.3", "trainer.args.loss_type=hinge", "seed=5")
    assert isinstance(trainer, trl.DPOTrainer) and type(trainer.args) is trl.DPOConfig
    args = trainer.args
    assert (args.beta, args.loss_type, args.seed, trainer.beta) == (0.3, ["hinge"], 5, 0.3)


@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_every_configured_value_is_found_again(live, trainer):
    overrides = [f"trainer={trainer}", "trainer.args.weight_decay=0.01", "trainer.args.max_grad_norm=0.5"]
    args = live(*FEW, *overrides).args
    configured = resolvable(overrides).trainer.args
    for key, value in OmegaConf.to_container(configured, resolve=True).items():
        if key not in ("_target_", "output_dir"):
            found = getattr(args, key)
            found = found[0] if isinstance(found, list) and len(found) == 1 else found
            found = getattr(found, "value", found)
            assert found == value or (value == "none" and found == []), (key, value, found)


def test_what_both_share_stands_once(folder, monkeypatch):
    copy = shutil.copytree(CONF, folder / "conf")
    monkeypatch.setattr("smoltrain.config.compose.CONF", copy)
    base, dpo = copy / "trainer" / "base.yaml", copy / "trainer" / "dpo.yaml"
    base.write_text(base.read_text().replace("max_length: 1024", "max_length: 77"))
    assert [compose([f"trainer={t}"], []).trainer.args.max_length for t in ("sft", "dpo")] == [77, 77]
    dpo.write_text(dpo.read_text().replace("beta: 0.1", "beta: 0.1\n    max_length: 88"))
    assert [compose([f"trainer={t}"], []).trainer.args.max_length for t in ("sft", "dpo")] == [77, 88]


def test_an_unknown_trainer_lists_the_choices(smoltrain, folder, capsys):
    smoltrain("trainer=ppo", code=2)
    assert "Choose one of: dpo, sft" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


DPO = "defaults:\n  - override /trainer: dpo\n  - _self_\n"
SFT = "defaults:\n  - override /trainer: sft\n  - _self_\n"
PRIORITY = [  # file, command line, key, what runs
    ("", [], "trainer._target_", "smoltrain.sft.SFTTrainer"),
    (DPO, [], "trainer._target_", "smoltrain.dpo.DPOTrainer"),
    (DPO, ["trainer=sft"], "trainer._target_", "smoltrain.sft.SFTTrainer"),
    (SFT, ["trainer=dpo"], "trainer._target_", "smoltrain.dpo.DPOTrainer"),
    ("", ["model=smollm2_135m"], "trainer.args.learning_rate", 2e-5),
    ("trainer: {args: {learning_rate: 3.0}}", [], "trainer.args.learning_rate", 3.0),
    ("trainer: {args: {learning_rate: 3.0}}", ["trainer.args.learning_rate=4"], "trainer.args.learning_rate", 4),
    ("", [], "trainer.args.max_length", 1024),
    ("trainer: {args: {max_length: 50}}", [], "trainer.args.max_length", 50),
    ("trainer: {args: {max_length: 50}}", ["trainer.args.max_length=60"], "trainer.args.max_length", 60),
    ("", [], "model.name_or_path", "pkg://smoltrain/tiny"),
    ("defaults: [override /model: smollm2_360m]", [], "model.name_or_path", "HuggingFaceTB/SmolLM2-360M"),
    ("defaults: [override /model: smollm2_360m]", ["model=tiny"], "model.name_or_path", "pkg://smoltrain/tiny"),
    ("", [], "data._target_", "smoltrain.data.sums.conversations"),
    ("defaults: [override /data: smoltalk2]", [], "data.path", "HuggingFaceTB/smoltalk2"),
    ("defaults: [override /data: smoltalk2]", ["data=sums"], "data._target_", "smoltrain.data.sums.conversations"),
    ("defaults: [override /data: smoltalk2]", ["trainer=dpo"], "data.path", "HuggingFaceTB/smoltalk2"),
    (DPO, [], "data._target_", "smoltrain.data.sums.preferences"),
    (DPO, ["trainer=sft"], "data._target_", "smoltrain.data.sums.conversations"),
    ("", ["trainer=dpo", "data=sums"], "data._target_", "smoltrain.data.sums.conversations"),
    ("", ["data=sums", "trainer=dpo"], "data._target_", "smoltrain.data.sums.conversations"),
]


@pytest.mark.parametrize(("file", "overrides", "key", "expected"), PRIORITY)
def test_the_command_line_beats_the_file_and_the_file_beats_the_groups(experiment, file, overrides, key, expected):
    flags, chosen = (experiment(file), ["experiment=mine"]) if file else ([], [])
    for arguments in ([*chosen, *overrides], [*overrides, *chosen]):
        assert OmegaConf.select(compose(arguments, flags), key) == expected


def test_every_surface_agrees_with_the_resolved_config(smoltrain, capsys):
    (record,) = smoltrain("trainer=dpo", "trainer.args.learning_rate=0.00071", "tracking=trackio")
    out = capsys.readouterr().out
    assert record["config"]["trainer"]["args"]["learning_rate"] == 0.00071
    report = (record["directory"] / "report.md").read_text()
    for surface in (out, report):
        assert "smoltrain.dpo.DPOTrainer" in surface and "0.00071" in surface
    import trackio

    name = "/".join(record["directory"].parts[-2:])
    (run,) = [run for run in trackio.Api().runs("smoltrain") if run.name == name]
    assert run.config["learning_rate"] == 0.00071 and run.config["trainer"] == "smoltrain.dpo.DPOTrainer"
    assert run.config["config"]["trainer"]["args"]["learning_rate"] == 0.00071


@pytest.mark.parametrize(
    ("arguments", "lacks"),
    [
        (("trainer=dpo", "data=sums"), "lacking: chosen, rejected"),
        (("data=sums_preferences",), "lacking: messages"),
    ],
)
def test_the_wrong_rows_are_refused_before_a_model_loads(smoltrain, folder, capsys, monkeypatch, arguments, lacks):
    monkeypatch.setattr("smoltrain.model.Checkpoint.model", lambda *_: pytest.fail("the model was loaded"))
    smoltrain(*arguments, code=2)
    error = capsys.readouterr().err
    assert lacks in error and "columns: " in error
    assert list(folder.iterdir()) == []


def test_dpo_starts_at_ln2_and_logs_rewards(smoltrain):
    (record,) = smoltrain("trainer=dpo")
    logs = read_metrics(record["directory"])
    first = next(row for row in logs if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")} <= first.keys()
    # nothing is right or wrong as long as the model is its own reference
    after = f"{record['metrics']['eval_rewards/accuracies']:.1%}"
    assert f"| eval_rewards/accuracies | - | {after} |" in (record["directory"] / "report.md").read_text()


def test_sft_logs_no_rewards(smoltrain):
    (record,) = smoltrain()
    assert not any("rewards" in key for row in read_metrics(record["directory"]) for key in row)


def test_the_sft_loss_counts_the_reply_and_the_end_of_turn_only(live):
    trainer = live(*FEW)
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = trainer.processing_class
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=False)
        reply = text.split("<|im_start|>assistant\n")[1].split("<|im_end|>")[0] + "<|im_end|>"
        assert tokenizer.decode(labels[labels != -100], skip_special_tokens=False) == reply
        assert all(label == token for label, token in zip(labels, ids, strict=True) if label != -100)


def test_a_sweep_makes_four_labelled_runs(smoltrain):
    records = smoltrain("-m", "trainer=sft,dpo", "seed=1,2")
    assert [(r["trainer"], r["seed"]) for r in records] == [
        (trainer, seed) for trainer in ("smoltrain.sft.SFTTrainer", "smoltrain.dpo.DPOTrainer") for seed in (1, 2)
    ]
    names = [r["directory"].name for r in records]
    assert names == ["0_trainer-sft_seed-1", "1_trainer-sft_seed-2", "2_trainer-dpo_seed-1", "3_trainer-dpo_seed-2"]
    assert len({r["directory"].parent for r in records}) == 1
    assert compose([f"model.from_run={records[2]['directory']}"], []).model.from_run == str(records[2]["directory"])
    assert len({r["config_hash"] for r in records}) == 4


def test_module_and_command_resolve_to_the_same_bytes():
    command = [str(Path(sys.executable).parent / "smoltrain")]
    outputs = [
        subprocess.run([*start, "--cfg", "job"], capture_output=True, check=True).stdout
        for start in (command, [sys.executable, "-m", "smoltrain"])
    ]
    assert outputs[0] == outputs[1] == (Path(__file__).parent / "golden.yaml").read_bytes()


def test_callbacks_are_config(smoltrain, capsys):
    early = "callbacks.early={_target_: transformers.EarlyStoppingCallback, early_stopping_patience: 1}"
    stopping = ("trainer.args.eval_strategy=steps", "trainer.args.eval_steps=1", "trainer.args.save_strategy=best")
    best = ("trainer.args.load_best_model_at_end=true", "trainer.args.metric_for_best_model=eval_loss")
    (record,) = smoltrain(early, *stopping, *best, "trainer.args.max_steps=6", "trainer.args.learning_rate=0")
    assert record["steps"] == 2  # nothing improves: the first evaluation is the best, the second stops it
    assert "stopped early at step 2 of 6" in " ".join(capsys.readouterr().out.split())
    assert "| steps | 2 of 6 |" in (record["directory"] / "report.md").read_text()


def test_another_trl_trainer_is_one_yaml_file(smoltrain):
    file = OWN / "trainer" / "kto.yaml"
    assert len(file.read_text().splitlines()) <= 10
    (record,) = smoltrain(f"--config-dir={OWN}", "trainer=kto", "evaluation.max_rows=0", "trainer.args.max_steps=1")
    assert (record["trainer"], record["status"], record["steps"]) == ("trl.KTOTrainer", "completed", 1)


@pytest.mark.parametrize(
    ("group", "text", "header"),
    [
        ("experiment", "seed: 3", "`# @package _global_`"),
        ("hardware", "bf16: false", "`# @package _global_` or `# @package trainer.args`"),
        ("peft", "r: 8", "`# @package _global_` or `# @package trainer.peft_config`"),
        ("trainer", "defaults: [base@trainer, override /data: sums, _self_]", "`# @package _global_`"),
    ],
)
def test_a_file_that_does_not_say_where_it_goes_is_named(folder, group, text, header):
    file = folder / "own" / group / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"# Mine\n{text}\n")
    with pytest.raises(ConfigError) as error:
        compose([f"{group}=mine"], ["--config-dir", str(folder / "own")])
    assert str(error.value).splitlines()[-1] == f"{file}: its first line has to be {header}"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("trainer.args.beta=0.1,data.path=a/b", "beta-0.1_path-a_b"),
        ("trainer.args.learning_rate=1e-05,peft=lora", "learning_rate-1e-05_peft-lora"),
        ("trainer.args.loss_type=[sigmoid,hinge]", "loss_type-_sigmoid_hinge"),
        ("data.path=données $x.csv", "path-donn_es__x.csv"),
    ],
)
def test_a_label_needs_no_quotes(overrides, name):
    assert label(overrides) == name == shlex.quote(name)


@pytest.mark.parametrize("experiment", options("experiment", []))
def test_every_experiment_survives_a_step_with_the_tiny_model(smoltrain, folder, experiment):
    kinds = instantiate(compose([f"experiment={experiment}"], []).encode).kinds
    rows = sums.preferences(60, 1, 0) if "preference" in kinds else sums.conversations(60, 1, 0)
    (origin,) = rows.origins.values()
    origin.source.train.remove_columns("answer").to_json(str(folder / "rows.jsonl"))
    tiny = ("model=tiny", "data=local", "data.path=rows.jsonl", "data.test_rows=4", "hardware=cpu", "tracking=none")
    (record,) = smoltrain(f"experiment={experiment}", quick=(*tiny, "trainer.args.max_steps=1"))
    assert (record["status"], record["steps"], record["name"]) == ("completed", 1, experiment)


def test_an_unknown_verb_is_named_with_its_mend(smoltrain, capsys):
    from smoltrain.__main__ import main

    assert main(["trian", "seed=1"]) == 2
    assert "trian: there is no such verb; did you mean train?" in capsys.readouterr().err
