"""perf=auto: what is left to the machine is chosen, with its reason, recorded and kept; what is set wins."""

import os
import platform
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import QUICK, resolvable
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from trl import SFTConfig, SFTTrainer

from smoltrain import budget, perf
from smoltrain.config.schema import AUTO
from smoltrain.model import locate
from smoltrain.preflight import preflight
from smoltrain.reproduce import measured
from smoltrain.runs import read
from smoltrain.trainers import watched

FEW = ("data.train_rows=200", "data.test_rows=8")
SHORT = (*(override for override in QUICK if "batch_size" not in override), "tracking=none")
ROWS, STEPS, CHECKPOINTING = perf.ROWS, perf.STEPS, perf.CHECKPOINTING


def chosen(*overrides: str) -> tuple[dict, list[str]]:
    """What a config leaves to the machine, by the last part of its key, and what would stop the run."""
    found = preflight(resolvable(["perf=auto", *FEW, *overrides]))
    return {key.rpartition(".")[2]: value for key, (value, _) in found.choices.made.items()}, found.errors


@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_every_choice_is_made_recorded_and_printed_with_its_reason(smoltrain, capfd, trainer):
    (record,) = smoltrain("perf=auto", f"trainer={trainer}", quick=SHORT)
    assert set(record["perf"]) == set(AUTO)
    said = capfd.readouterr().out
    report = (record["directory"] / "report.md").read_text()
    for key, choice in record["perf"].items():
        line = f"{key}={str(choice['value']).lower()}: {choice['why']}"
        assert line in said and line in report and len(choice["why"]) > 10
    assert record["config"]["trainer"]["args"]["bf16"] == "auto"  # what was asked for, on any machine


def test_what_was_chosen_is_what_ran(smoltrain):
    (auto,) = smoltrain("perf=auto", quick=SHORT)
    taken = [f"{key}={str(choice['value']).lower()}" for key, choice in auto["perf"].items()]
    (said,) = smoltrain("global_batch_size=16", *taken, quick=SHORT)
    assert said["perf"] == {} and said["config_hash"] != auto["config_hash"]
    assert said["steps"] == auto["steps"] and measured(said["directory"]) == measured(auto["directory"])
    one, other = ((record["directory"] / "model" / "model.safetensors").read_bytes() for record in (auto, said))
    assert one == other


def test_what_is_set_wins_and_the_rest_follows_it():
    made, errors = chosen(f"{ROWS}=4", f"{CHECKPOINTING}=true", "trainer.args.bf16=true")
    assert not errors and made["gradient_accumulation_steps"] == 4
    assert not {"per_device_train_batch_size", "activation_checkpointing", "bf16"} & set(made)
    assert chosen(f"{STEPS}=8")[0]["per_device_train_batch_size"] == 2
    assert chosen("model.attn_implementation=eager")[0].get("attn_implementation") is None


def test_rows_at_once_are_a_divisor_of_the_global_batch_with_enough_tokens(monkeypatch):
    monkeypatch.setitem(perf.ENOUGH, "cpu", 250)  # rows have some 47 tokens: 5.3 of them
    assert chosen("global_batch_size=24")[0]["per_device_train_batch_size"] == 6
    assert chosen("global_batch_size=24")[0]["gradient_accumulation_steps"] == 4
    assert chosen("global_batch_size=7")[0]["per_device_train_batch_size"] == 7
    pairs, _ = chosen("global_batch_size=24", "trainer=dpo")
    assert pairs["per_device_train_batch_size"] == 4  # of pairs, some 66 tokens each


def test_weights_that_are_shared_out_need_a_part_of_their_memory_in_each_process():
    own = ["perf=auto", *FEW, "hardware.processes=2"]
    stage2 = ("hardware=deepspeed", "hardware.zero.stage=2")
    together, fsdp, stage3, stage2 = (
        perf.needs(cfg, preflight(cfg), 1, False, 1)
        for cfg in (
            resolvable([*own, *how]) for how in (("hardware=ddp",), ("hardware=fsdp",), ("hardware=deepspeed",), stage2)
        )
    )
    assert fsdp.optimizer == together.optimizer / 2 and fsdp.weights == together.weights / 2
    assert fsdp.activations == together.activations and fsdp.total < together.total
    assert stage3 == fsdp and stage2.optimizer == fsdp.optimizer and stage2.weights == together.weights


def test_an_optimizer_that_is_offloaded_takes_no_memory_of_a_gpu(monkeypatch):
    cfg = resolvable([*FEW, "hardware=deepspeed", "hardware.processes=2", "hardware.zero.offload_optimizer.device=cpu"])
    found = preflight(cfg)
    assert perf.needs(cfg, found, 1, False, 1).optimizer > 0  # here it is the same memory
    monkeypatch.setattr(type(found.args), "device", torch.device("cuda"))
    assert perf.needs(cfg, found, 1, False, 1).optimizer == 0


def test_memory_decides_how_many_rows_and_whether_activations_are_kept(monkeypatch):
    needs, known = perf.needs, {}

    def needed(cfg, found, *how):  # of one config, which is counted once
        return known[how] if how in known else known.setdefault(how, needs(cfg, found, *how))

    monkeypatch.setattr(perf, "needs", needed)
    cfg = resolvable(["perf=auto", *FEW])
    found = preflight(cfg)
    bytes_of = {
        (rows, recomputes): perf.needs(cfg, found, rows, recomputes, 16 // rows).total
        for rows, recomputes in [(16, False), (4, False), (1, False), (16, True), (1, True)]
    }
    assert bytes_of[1, False] < bytes_of[4, False] < bytes_of[16, False] and bytes_of[16, True] < bytes_of[16, False]

    def with_free(size: int):
        monkeypatch.setattr(perf, "available", lambda device: int(size / perf.USABLE["cpu"]) + 1)
        return chosen()

    for (rows, recomputes), size in bytes_of.items():
        if not recomputes:
            made, errors = with_free(size)
            assert not errors and made["per_device_train_batch_size"] == rows
            assert made["gradient_accumulation_steps"] == 16 // rows and not made["activation_checkpointing"]
    made, _ = with_free(min(bytes_of[1, True], bytes_of[1, False] - 1))
    assert made["activation_checkpointing"] and made["per_device_train_batch_size"] >= 1
    made, (error,) = with_free(bytes_of[1, True] // 2)
    assert error.startswith("memory: ") and "peft=lora" in error


def test_a_run_that_goes_on_or_is_made_again_keeps_what_it_chose(smoltrain, monkeypatch):
    at_work = ("perf=auto", "trainer.args.max_steps=4", "evaluation.max_rows=0", "pause_at=2")
    quick = tuple(override for override in SHORT if not override.startswith(("resume", "evaluation")))
    (paused,) = smoltrain(*at_work, quick=quick, code=143)
    monkeypatch.setitem(perf.ENOUGH, "cpu", 100)  # another machine would choose other rows
    assert chosen()[0]["per_device_train_batch_size"] < 16
    assert smoltrain("perf=auto", "trainer.args.max_steps=4", "evaluation.max_rows=0", quick=quick) == []
    record = read(paused["directory"])
    assert record["status"] == "completed" and record["perf"] == paused["perf"]
    (again,) = smoltrain("reproduce", str(paused["directory"]), quick=())
    assert again["config"]["trainer"]["args"]["per_device_train_batch_size"] == 16


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.args.bf16=aut"], "trl.SFTConfig takes auto, null, true or false"),
        (["trainer.args.learning_rate=auto"], "trainer.args.learning_rate=auto: "),
    ],
)
def test_auto_is_a_value_of_what_can_be_chosen_alone(smoltrain, capsys, overrides, said):
    smoltrain(*overrides, quick=(), code=2)
    assert said in capsys.readouterr().err


def test_precision_is_what_the_machine_multiplies_fast():
    here = perf.Machine("cpu", bf16=True, liger=False)
    assert perf.precision(here, 576, False, "float32")[0] is True
    assert perf.precision(here, 128, False, "float32")[0] is False
    assert perf.precision(perf.Machine("cuda", True, False), 128, False, "float32")[0] is True
    assert perf.precision(perf.Machine("cuda", False, False), 576, False, "float32")[0] is False
    assert perf.precision(perf.Machine("cuda", True, False), 576, True, "float32")[0] is False
    assert perf.precision(perf.Machine("cuda", True, False), 576, False, "float16")[0] is False


def test_liger_is_taken_where_it_is_installed_and_rows_are_padded():
    there = perf.Machine("cuda", True, liger=True)
    assert perf.liger(there, alone=False)[0] is True
    assert perf.liger(there, alone=True)[0] is False
    assert perf.liger(perf.Machine("cuda", True, liger=False), alone=False)[0] is False
    assert perf.liger(perf.Machine("cpu", True, liger=True), alone=False)[0] is False


def test_attention_is_torchs_own_where_the_model_has_it():
    assert perf.attention(LlamaConfig())[0] == "sdpa"
    assert perf.attention(AutoConfig.for_model("codegen"))[0] == "eager"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library keeps memory in its own way")
@pytest.mark.parametrize(("device", "kept"), [("cpu", True), ("cuda", False)])
def test_a_processor_keeps_the_memory_that_each_step_asks_for(device, kept):
    assert (held_after_a_tensor(device) > 60e6) == kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library keeps memory in its own way")
def test_how_the_environment_wants_memory_to_be_kept_it_stays():
    assert held_after_a_tensor("cpu", MALLOC_ARENA_MAX="2") < 10e6


def held_after_a_tensor(device: str, **environment: str) -> int:
    """Bytes that a process has more than before a tensor of 64 MB came and went."""
    script = (
        "import torch; from smoltrain.budget import resident; from smoltrain.perf import keep_memory\n"
        f"from pathlib import Path; keep_memory(torch.device({device!r})); status = Path('/proc/self/status')\n"
        "before = resident(status, 'VmRSS'); torch.ones(16_000_000); print(resident(status, 'VmRSS') - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | environment, capture_output=True, check=True)
    return int(done.stdout)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own
def test_operations_are_counted_as_upstream_counts_them(folder):
    plain, ours = partial(SFTTrainer), watched(partial(SFTTrainer))
    batch, counted = {"input_ids": torch.zeros(3, 7, dtype=torch.long)}, []
    for kind in (plain, ours):
        args = SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none")
        data = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(locate("pkg://smoltrain/tiny")))
        tokenizer = AutoTokenizer.from_pretrained(locate("pkg://smoltrain/tiny"))
        one = kind(model=model, args=args, train_dataset=data, processing_class=tokenizer)
        counted.append([one.floating_point_ops(batch), one.floating_point_ops(batch), one.floating_point_ops({})])
    assert counted[0] == counted[1] and counted[0][0] > 1e7


@pytest.mark.parametrize("how", [("perf=auto",), ("hardware=ddp",)])
def test_what_is_planned_for_two_processes_is_what_is_planned_for_one(how):
    plans = []
    for processes in (1, 2):
        found = preflight(resolvable([*how, *FEW, f"hardware.processes={processes}", "trainer.args.use_cpu=true"]))
        assert not found.errors
        plans.append(budget.steps(found.data.lengths.size, found.args))
    assert plans[0] == plans[1] and plans[0].effective_batch == 16
