"""What a reference makes of pairs is computed once, for all runs for which it comes to the same, and for no others."""

import hashlib
import json
import os
import random
import shutil
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
from conftest import resolvable

from smoltrain import dpo, reference
from smoltrain.config import ConfigError
from smoltrain.config.compose import compose
from smoltrain.model import locate
from smoltrain.preflight import preflight
from smoltrain.train import build

ARGS = "trainer.args."
WORLD = ("trainer=dpo", "tracking=none", "data.train_rows=6", "data.test_rows=6", "evaluation.max_rows=0")
WORLD += (f"{ARGS}per_device_train_batch_size=4", f"{ARGS}per_device_eval_batch_size=4")
MATTERS = (  # to what the reference makes of the training rows, of those held out, or both
    "data.train_rows=7",
    "data.test_rows=7",
    "data.seed=4",
    "data.system_prompt=hi",
    f"{ARGS}max_length=44",  # cuts
    f"{ARGS}ld_alpha=0.5",
    "model.dtype=bfloat16",
    "model.name_or_path=other",
)
ROUNDS = (  # the same sums rounded otherwise, which may come to the same bits
    f"{ARGS}bf16=true",
    "model.attn_implementation=eager",
    "trainer.shared_prefix=false",
    f"{ARGS}per_device_train_batch_size=2",
    f"{ARGS}per_device_eval_batch_size=3",
    f"{ARGS}precompute_ref_batch_size=3",
    f"{ARGS}pad_to_multiple_of=4",
)
IDLE = (
    "seed=3",
    "name=mine",
    "model.name_or_path=same",
    "model.chat_template=chatml",  # which is the tiny model's own
    "peft=lora",
    f"{ARGS}max_length=2000",  # cuts nothing
    f"{ARGS}beta=0.3",
    f"{ARGS}loss_type=[sigmoid,sft]",
    f"{ARGS}f_divergence_type=js_divergence",
    f"{ARGS}use_weighting=true",
    f"{ARGS}learning_rate=1e-5",
    f"{ARGS}num_train_epochs=3",
    f"{ARGS}gradient_accumulation_steps=2",
    f"{ARGS}activation_checkpointing=true",
    f"{ARGS}disable_dropout=false",
    f"{ARGS}optim=sgd",
    f"{ARGS}dataloader_num_workers=1",
    f"{ARGS}full_determinism=false",
)


@pytest.fixture
def cold(folder, monkeypatch):
    """A cache with nothing in it: the folder where a run in this process keeps what it has computed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    return folder / "cache" / "smoltrain"


@pytest.fixture
def models(folder):
    """The tiny model in another folder, and one like it with other weights."""
    from safetensors.torch import load_file, save_file

    for name in ("same", "other"):
        shutil.copytree(locate("pkg://smoltrain/tiny"), name)
    weights = load_file("other/model.safetensors")
    weights["model.norm.weight"] *= 1.1
    save_file(weights, "other/model.safetensors", {"format": "pt"})


def trainer(*overrides):
    cfg = resolvable((*WORLD, *overrides))
    found = preflight(cfg)
    found.refuse()
    return build(cfg, found, [])


@pytest.fixture
def asked(monkeypatch):
    """Builds a trainer, and returns of its training and its held-out rows the key, and what it would compute itself."""

    def witnessed(trainer, rows, size, computed):
        seen.append((reference.key(trainer, rows, size), reference.silently(computed).tobytes()))
        return rows

    def ask(*overrides):
        seen.clear()
        trainer(*overrides)
        return list(seen)

    seen = []
    monkeypatch.setattr(dpo, "ahead", witnessed)
    return ask


def test_of_200_random_pairs_of_configs_none_finds_what_is_not_its_own_or_misses_what_is(asked, models, figure):
    rng, configs = random.Random(6), dict.fromkeys([(), *((one,) for one in MATTERS)])  # each beside its like
    while len(configs) < 21:
        chosen = {*rng.sample(MATTERS, rng.choice((0, 0, 0, 1))), *rng.sample(IDLE, 3)}
        chosen |= {*rng.sample(ROUNDS, rng.choice((0, 0, 0, 0, 1)))}
        if len({override.split("=")[0] for override in chosen}) == len(chosen):  # each key once
            configs.setdefault(tuple(sorted(chosen)), None)
    configs = {one: asked(*one) for one in configs}
    pairs = [(one, other) for one in configs for other in configs if one < other]
    hits = stale = needless = 0
    for one, other in rng.sample(pairs, 200):
        rounded = {*one} & {*ROUNDS} != {*other} & {*ROUNDS}
        for (key, values), (other_key, others) in zip(configs[one], configs[other], strict=True):
            hits += key == other_key
            stale += key == other_key and values != others
            needless += key != other_key and values == others and not rounded
    figure("pairs of DPO configs: a reference's values found that are not one's own", stale, 400)
    figure("pairs of DPO configs: a reference's values computed that were there", needless, 400)
    assert (stale, needless) == (0, 0)
    assert 100 < hits < 300


OTHERWISE = {  # another value of a field, where its type does not say one
    "bf16": True,
    "lr_scheduler_type": "linear",
    "optim": "sgd",
    "loss_type": "hinge",
    "loss_weights": [0.5],
    "truncation_mode": "keep_end",
    "f_divergence_type": "js_divergence",
    "pad_token": "<|im_end|>",
    "max_length": 44,
    "ld_alpha": 0.5,
    "pad_to_multiple_of": 64,
    "precompute_ref_batch_size": 3,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "eval_strategy": "epoch",
    "eval_delay": 1,
    "train_sampling_strategy": "sequential",
}
DECIDING = {"bf16", "ld_alpha", "max_length", "pad_to_multiple_of", "precompute_ref_batch_size"}
DECIDING |= {"per_device_train_batch_size", "per_device_eval_batch_size"}


@pytest.mark.torture
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of fields that go
def test_fields_of_dpo_config_are_in_the_key_if_and_only_if_they_change_the_values(asked, models):
    from trl import DPOConfig

    base, deciding, flipped = asked(), set(), set()
    for field in fields(DPOConfig):
        default = getattr(DPOConfig(output_dir="run", use_cpu=True), field.name)
        value = OTHERWISE.get(field.name, another(default))
        if value is None or field.name in ("output_dir", "precompute_ref_log_probs", "sync_ref_model"):
            continue
        try:
            other = asked(f"{ARGS}{field.name}={json.dumps(value)}")
        except ConfigError:  # no run has it
            continue
        flipped.add(field.name)
        keys, values = ([one[i] != two[i] for one, two in zip(base, other, strict=True)] for i in (0, 1))
        assert not any(changed and not key for key, changed in zip(keys, values, strict=True)), field.name
        if any(keys):
            deciding.add(field.name)
            assert any(values), field.name
    assert deciding == DECIDING
    assert len(flipped) > 40


def another(value):
    """A value unlike a field's own; None where nothing can be said without knowing the field."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value / 2 or 0.25
    return None


# ---------------------------------------------------------------- found is as good as computed


def learned(record):
    rows = [json.loads(line) for line in (record["directory"] / "metrics.jsonl").read_text().splitlines()]
    clock = ("_runtime", "_per_second", "_time")
    model = record["directory"] / "model"
    weights = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(model.glob("*.safetensors"))]
    return [{k: v for k, v in row.items() if not k.endswith(clock)} for row in rows], weights


def test_a_run_that_finds_its_reference_is_bit_equal_to_one_that_computes_it_and_equal_to_one_that_does_not(
    smoltrain, cold
):
    whole = ("trainer=dpo", f"{ARGS}max_steps=-1", "data.train_rows=8", "peft=lora")
    whole += ("trainer.peft_config.lora_dropout=0.2", f"{ARGS}eval_strategy=epoch", f"{ARGS}num_train_epochs=2")
    [first] = smoltrain(*whole)
    kept = sorted(cold.glob("reference-*[!k]"))
    [second] = smoltrain(*whole)
    assert len(kept) == 2 and sorted(cold.glob("reference-*[!k]")) == kept
    assert learned(first) == learned(second)
    [third] = smoltrain(*whole, f"{ARGS}precompute_ref_log_probs=false")
    for one, other in zip(learned(first)[0], learned(third)[0], strict=True):
        ties = {key: (one.pop(key), other.pop(key)) for key in [*one] if key.endswith("rewards/accuracies")}
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
        for key, (mine, its) in ties.items():  # rewards that differ by rounding tie; of the others, a pair's may
            assert abs(one[key.replace("accuracies", "margins")]) < 1e-5 or abs(mine - its) <= 1 / 8


def test_a_reference_is_computed_ahead_where_whole_epochs_are_trained_and_it_can_be():
    def ahead(*overrides):
        return compose(["trainer=dpo", *overrides], []).trainer.args.precompute_ref_log_probs

    streamed = ("data=local", "data.path=rows.jsonl", "data.streaming=true", f"{ARGS}max_steps=5")
    assert ahead() is ahead(f"{ARGS}num_train_epochs=3") is True
    assert ahead(f"{ARGS}max_steps=5") is ahead(f"{ARGS}sync_ref_model=true") is ahead(*streamed) is False
    assert ahead(f"{ARGS}max_steps=5", f"{ARGS}precompute_ref_log_probs=true") is True
    assert ahead(f"{ARGS}precompute_ref_log_probs=false") is False


def test_neither_a_random_number_nor_a_file_of_trl_comes_of_computing_it(cold):
    import torch

    found = trainer()
    before = torch.random.get_rng_state()
    size = found.args.per_device_eval_batch_size
    rows = found.eval_dataset.remove_columns(list(reference.COLUMNS))
    shutil.rmtree(cold)
    found._precompute_ref_logps(rows, "eval", size)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert datasets.is_caching_enabled()
    assert {file.name[:10] for file in cold.iterdir()} == {"reference-"}


def test_what_is_asked_once_training_has_begun_is_not_kept(cold):
    found = trainer("peft=lora")
    rows = found.eval_dataset.remove_columns(list(reference.COLUMNS)).select([2, 1, 0])
    found.state.global_step = 1
    before = sorted(cold.glob("reference-*"))
    again = found._precompute_ref_logps(rows, "eval", 4)
    assert sorted(cold.glob("reference-*")) == before
    assert again["ref_chosen_logps"] == pytest.approx(found.eval_dataset["ref_chosen_logps"][2::-1], rel=1e-5)


def columns(found):
    return [list(found.train_dataset[name]) + list(found.eval_dataset[name]) for name in reference.COLUMNS]


def test_a_damaged_file_is_computed_again_and_says_so(cold, capsys):
    whole = columns(trainer())
    files = [file for file in cold.glob("reference-*") if not file.suffix]
    for file, damage in zip(files, (lambda old: old[:-3], lambda old: old[:40] + b"\0" + old[41:]), strict=True):
        file.write_bytes(damage(file.read_bytes()))
    capsys.readouterr()
    assert columns(trainer()) == whole
    assert capsys.readouterr().err.count("is damaged") == 2
    assert columns(trainer()) == whole
    assert "is damaged" not in capsys.readouterr().err


def test_a_folder_that_takes_no_file_costs_time_and_nothing_else(cold, capsys):
    whole = columns(trainer())
    for file in [file for file in cold.glob("reference-*") if not file.suffix]:
        file.unlink()
        file.with_suffix(".partial").mkdir()  # so that nothing can be written there
    capsys.readouterr()
    assert columns(trainer()) == whole
    assert capsys.readouterr().err.count("not kept for other runs") == 2


def test_what_trl_did_not_compute_is_not_kept(cold):
    found = trainer()
    found.data_collator = lambda rows: collate(rows)
    collate = trainer(f"{ARGS}pad_to_multiple_of=64").data_collator
    assert not reference.own(found)


def test_rows_are_packed_once_for_all_runs(cold):
    packed = (f"{ARGS}packing=true", f"{ARGS}max_length=64", f"{ARGS}max_steps=1")
    written = {}
    for seed in (1, 2):
        cfg = resolvable(("data.train_rows=16", "data.test_rows=8", "evaluation.max_rows=0", f"seed={seed}", *packed))
        trainer = build(cfg, preflight(cfg), [])
        assert "seq_lengths" in trainer.train_dataset.column_names
        written[seed] = {file: file.stat().st_mtime_ns for file in cold.glob("*.arrow")}
    assert written[1] == written[2]


# ---------------------------------------------------------------- several processes

SHOWN = f"""
import hashlib, os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import smoltrain.data.tokens as tokens, trl
from smoltrain.config.resolvers import register
register()
def told(owner, name, what):
    real = getattr(owner, name)
    def telling(*args, **kwargs):
        with open("told", "a") as file:
            file.write(what + "\\n")
        SLOW
        return real(*args, **kwargs)
    setattr(owner, name, telling)
told(trl.DPOTrainer, "_precompute_ref_logps", "pass")
told(tokens.Pass, "__call__", "rows")
import test_reference
found = test_reference.trainer()
print("came to", hashlib.sha256(repr(test_reference.columns(found)).encode()).hexdigest())
"""


def test_of_processes_that_begin_at_once_one_prepares_the_rows_and_computes_the_reference(forked, folder):
    env = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
    lives = [forked(code=SHOWN.replace("SLOW", "pass"), env=env) for _ in range(8)]
    for life in lives:
        assert life.wait() == 0, life.stderr
    assert len({life.stdout for life in lives}) == 1 and "came to" in lives[0].stdout
    assert sorted((folder / "told").read_text().split()) == ["pass"] * 2 + ["rows"] * 2


def test_a_process_that_is_killed_over_it_leaves_it_to_one_that_waits(forked, folder):
    env = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
    slow = SHOWN.replace("SLOW", 'what == "pass" and (print("HERE", flush=True), __import__("time").sleep(60))')
    first = forked(code=slow, env=env)
    first.until("HERE")
    others = [forked(code=SHOWN.replace("SLOW", "pass"), env=env) for _ in range(3)]
    for life in others:
        life.until("another process is computing what the reference makes of the same rows: waiting for it")
    others[0].kill()  # while it waits
    first.kill()
    assert [life.wait() for life in others] == [-9, 0, 0]
    assert others[1].stdout == others[2].stdout != ""
    assert (folder / "told").read_text().split().count("pass") == 3
