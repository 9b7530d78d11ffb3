"""What a run will take is said before it runs, and is what it takes."""

import ctypes
import json
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from smoltrain.budget import disk, memory, step, steps
from smoltrain.sft import SFTTrainer as Unpadded

# As train.py: peft and TRL still call activation checkpointing by its old names.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

ROOT = Path(__file__).parents[1]
TINY = ROOT / "smoltrain" / "tiny"
SETTINGS = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "max_length": 64}


def arguments(**given) -> SFTConfig:
    return SFTConfig(output_dir="out", disable_tqdm=True, **SETTINGS | given)


def trainer_of(args, rows=24, length=32, peft_config=None, model=None, kind=SFTTrainer):
    ids = [[1 + i % 300 for i in range(length - row % 3)] for row in range(rows)]
    return kind(
        model or AutoModelForCausalLM.from_pretrained(TINY, dtype="float32"),
        args,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=AutoTokenizer.from_pretrained(TINY),
        peft_config=peft_config,
    )


def lora():
    from peft import LoraConfig

    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def config_of(name=None, **changes):
    if name is None:
        config = AutoConfig.from_pretrained(TINY)
    else:
        known = json.loads((ROOT / "tests" / "fixtures" / "architectures.json").read_text())
        config = AutoConfig.for_model(**known[name]["config"] | changes)
    config._attn_implementation = "sdpa"
    return config


SMALL = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 40000}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_the_estimate_is_near_the_measured_peak(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from memory import PROMPT, child

    estimate, measured = child(("tiny", None, "dpo", 16, 128, {}, False, "sdpa"), PROMPT)
    assert estimate == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("unpadded", [False, True])
@pytest.mark.parametrize("given", [{}, {"bf16": True, "activation_checkpointing": True}])
def test_the_estimate_is_what_the_allocator_is_asked_for(given, unpadded):
    from torch.profiler import ProfilerActivity, profile

    config = config_of("HuggingFaceTB/SmolLM2-135M", **SMALL)
    args = arguments(max_steps=2, per_device_train_batch_size=4, save_strategy="no", **given)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        trainer_of(args, length=64, model=model, kind=Unpadded if unpadded else SFTTrainer).train()
    moves = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = max(accumulate(e.nbytes() for e in sorted(moves, key=lambda e: e.start_ns())))
    estimate = memory(config, args, None, "float32", None, 4, 64, False, unpadded)
    # Without data, the two gradients of the shared embedding are not added in place.
    twice = 4 * config.vocab_size * config.hidden_size if given or unpadded else 0
    assert 0.98 * peak <= estimate.total <= 1.02 * peak + twice


def test_weights_and_optimizer_are_those_of_the_published_model(name="HuggingFaceTB/SmolLM2-135M"):
    known = json.loads((ROOT / "tests" / "fixtures" / "architectures.json").read_text())
    config = config_of(name)
    found = memory(config, arguments(), None, "float32", None, 1, 16, True)
    weights = 4 * known[name]["parameters"]
    assert found.weights == found.reference == found.saved == weights
    assert found.optimizer == pytest.approx(2 * weights, rel=1e-5)
    assert found.total >= 4 * weights


def test_each_choice_moves_the_part_it_is_about():
    def of(rows=4, length=64, reference=False, peft_config=None, dtype="float32", quantization_config=None, **given):
        config = config_of("HuggingFaceTB/SmolLM2-135M", **SMALL)
        args = arguments(**given)
        return memory(config, args, peft_config, dtype, quantization_config, rows, length, reference)

    plain = of()
    assert of(rows=8).activations > 1.8 * plain.activations
    assert of(activation_checkpointing=True).activations < 0.6 * plain.activations
    assert of(dtype="bfloat16").weights == plain.weights / 2
    assert of(optim="sgd").optimizer == 0 < of(optim="adafactor").optimizer < plain.optimizer / 4
    assert of(optim="lion_8bit").optimizer == pytest.approx(plain.optimizer / 8, rel=0.02)
    assert of(gradient_accumulation_steps=2).gradients == plain.saved
    assert plain.reference == 0
    assert of(reference=True).reference == plain.weights
    adapted = of(peft_config=lora())
    assert adapted.weights == plain.weights + adapted.saved
    assert adapted.optimizer == pytest.approx(2 * adapted.saved, rel=0.01)

    from transformers import BitsAndBytesConfig

    quantized = of(peft_config=lora(), dtype="bfloat16", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    linear = 2 * (96 * 96 * 2 + 96 * 48 * 2 + 3 * 96 * 256)
    assert quantized.weights == pytest.approx(plain.weights / 2 - linear * (2 - 4.5 / 8) + adapted.saved / 2, rel=0.001)


def test_an_estimate_draws_no_random_number():
    before = torch.get_rng_state()
    memory(config_of(), arguments(), lora(), "float32", None, 2, 16, False)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("given", [{}, {"save_only_model": True}, {"peft": True}])
def test_checkpoints_take_the_bytes_that_were_said(folder, given):
    peft_config = lora() if given.pop("peft", False) else None
    args = arguments(max_steps=4, save_steps=1, save_total_limit=2, per_device_train_batch_size=2, **given)
    planned = steps(24, args)
    tokenizer = sum((TINY / name).stat().st_size for name in ("tokenizer.json", "tokenizer_config.json"))
    said = disk(memory(config_of(), args, peft_config, "float32", None, 2, 32, False), args, planned, tokenizer)
    trainer = trainer_of(args, peft_config=peft_config)
    trainer.train()
    trainer.save_model("model")
    written = sorted(folder.glob("out/checkpoint-*"))
    assert len(written) == 2 == said.checkpoints - 1
    for directory, size in ((written[-1], said.checkpoint), (folder / "model", said.model)):
        assert sum(f.stat().st_size for f in directory.iterdir()) == pytest.approx(size, rel=0.02)
    assert 0 < said.total < said.free


def test_no_checkpoints_where_none_are_saved():
    args = arguments(max_steps=4, save_strategy="no")
    found = disk(memory(config_of(), args, None, "float32", None, 2, 32, False), args, steps(24, args), 0)
    assert found.checkpoints == 0
    assert found.total == found.model


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"max_steps": 5},
        {"num_train_epochs": 2.5},
        {"gradient_accumulation_steps": 4},
        {"dataloader_drop_last": True, "num_train_epochs": 2},
        {"per_device_train_batch_size": 64},
    ],
)
def test_steps_are_those_that_the_trainer_counts(given):
    args = arguments(**{"per_device_train_batch_size": 5} | given)
    trainer = trainer_of(args, rows=23)
    _, per_epoch, *_, total = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    planned = steps(23, args)
    assert planned.per_epoch == per_epoch
    assert planned.total == total


def test_a_real_step_leaves_no_trace():
    trainer = trainer_of(arguments(per_device_train_batch_size=4))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    batch = next(iter(trainer.get_train_dataloader()))
    random = torch.get_rng_state()
    if sys.platform == "linux":  # what earlier tests freed goes back first, or the step would grow into it unseen
        ctypes.CDLL(None).malloc_trim(0)
    taken = step(trainer, batch)
    assert taken.seconds > 0
    assert taken.peak is None or taken.peak > sum(p.numel() * 4 for p in trainer.model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.optimizer is None
