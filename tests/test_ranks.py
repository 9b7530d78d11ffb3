"""hardware=ddp: the same experiment comes to the same in one process and in several, and none is left behind."""

import json
import re
import signal
import sqlite3
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import QUICK
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from smoltrain import fsdp, ranks, resume, runs, zero
from smoltrain.__main__ import main
from smoltrain.config import ConfigError
from smoltrain.model import locate
from smoltrain.runs import read, read_metrics
from smoltrain.trainers import watched

FEW = ("data.train_rows=400", "data.test_rows=8", "evaluation.max_rows=0", "tracking=none")
FIFTY = (*FEW, "trainer.args.max_steps=50", "trainer.args.logging_steps=1", "trainer.args.learning_rate=5e-5")
DDP = ("hardware=ddp", "global_batch_size=8")


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(directory) if "loss" in line]


def trained(smoltrain, processes: int, *overrides: str) -> tuple[dict, list[float]]:
    rows = f"trainer.args.per_device_train_batch_size={8 // processes // (1 if processes > 2 else 2)}"
    own = (f"name=with-{processes}", f"hardware.processes={processes}", rows)
    (record,) = smoltrain(*DDP, *own, *overrides, quick=())
    return record, losses(record["directory"])


PACKED = ("trainer=sft", "trainer.args.packing=true", "trainer.args.max_length=128")


@pytest.mark.parametrize(
    "overrides", [("trainer=sft",), ("trainer=dpo",), pytest.param(PACKED, marks=pytest.mark.torture)]
)
def test_one_process_and_two_take_the_same_fifty_steps(smoltrain, overrides):
    (one, alone), (two, together) = (trained(smoltrain, n, *overrides, *FIFTY) for n in (1, 2))
    assert len(alone) == 50 and together == pytest.approx(alone, abs=1e-5)
    assert sum(alone[-10:]) / 10 < alone[0]
    assert two["metrics"]["eval_loss"] == pytest.approx(one["metrics"]["eval_loss"], abs=1e-5)
    assert (two["status"], two["steps"], two["fingerprints"]["train"]) == (
        "completed",
        50,
        one["fingerprints"]["train"],
    )
    given = json.loads((two["directory"] / "ranks" / "given.json").read_text())["record"]["config"]
    assert given["trainer"]["args"]["gradient_accumulation_steps"] == 2
    assert "rows to learn from" in (two["directory"] / "ranks" / "1.log").read_text()


@pytest.mark.torture
def test_four_processes_take_them_too(smoltrain):
    (_, alone), (_, together) = (trained(smoltrain, n, *FIFTY) for n in (1, 4))
    assert together == pytest.approx(alone, abs=1e-5)


MACHINES = {
    "1": ("hardware=ddp", "hardware.processes=1"),
    "2": ("hardware=ddp", "hardware.processes=2"),
    "4": ("hardware=ddp", "hardware.processes=4", "trainer.args.per_device_train_batch_size=2"),
    "fsdp of 2": ("hardware=fsdp", "hardware.processes=2"),
}
ZERO = ("hardware=deepspeed", "hardware.processes=2", "trainer.args.per_device_train_batch_size=2")
MACHINES |= {
    "zero 3 of 2": ZERO,
    "zero 2 of 2": (*ZERO, "hardware.zero.stage=2"),
    "zero 3 of 3": ("hardware=deepspeed", "hardware.processes=3", "trainer.args.per_device_train_batch_size=1"),
    "offloaded": (*ZERO, "hardware.zero.offload_optimizer.device=cpu"),
}


@pytest.mark.parametrize(
    ("first", "then", "overrides"),
    [
        ("fsdp of 2", "1", ("trainer=sft",)),
        ("1", "fsdp of 2", ("trainer=dpo", "peft=lora")),
        # Weights that are no multiple of three, and a group of them that is empty; two groups.
        ("zero 3 of 3", "zero 3 of 3", ("trainer=sft", "peft=lora", "global_batch_size=6")),
        ("zero 2 of 2", "1", ("trainer=dpo",)),
        pytest.param("zero 3 of 3", "zero 3 of 3", ("trainer=sft", "global_batch_size=6"), marks=pytest.mark.torture),
        pytest.param("zero 3 of 2", "1", ("trainer=sft",), marks=pytest.mark.torture),
        pytest.param("1", "zero 2 of 2", ("trainer=dpo", "peft=lora"), marks=pytest.mark.torture),
        pytest.param("offloaded", "zero 2 of 2", ("trainer=sft",), marks=pytest.mark.torture),
        pytest.param("zero 3 of 2", "fsdp of 2", ("trainer=dpo", "peft=lora"), marks=pytest.mark.torture),
        pytest.param("2", "zero 3 of 2", ("trainer=dpo",), marks=pytest.mark.torture),
        pytest.param("fsdp of 2", "2", ("trainer=sft", "peft=lora"), marks=pytest.mark.torture),
        pytest.param("2", "fsdp of 2", ("trainer=dpo",), marks=pytest.mark.torture),
        pytest.param("2", "4", ("trainer=sft",), marks=pytest.mark.torture),
        pytest.param("4", "1", ("trainer=dpo",), marks=pytest.mark.torture),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes_and_weights_shared_out_or_not(
    smoltrain, folder, first, then, overrides
):
    own = (*FEW, "global_batch_size=8", "trainer.args.max_steps=12", "trainer.args.logging_steps=1")
    own += ("trainer.args.learning_rate=5e-5", *overrides)
    (paused,) = smoltrain(*own, *MACHINES[first], "pause_at=6", quick=(), code=143)
    assert smoltrain(*own, *MACHINES[then], quick=()) == []  # no other run: the same one goes on
    again = read(paused["directory"])
    (whole,) = smoltrain(*own, *MACHINES["1"], "name=whole", quick=())
    assert again["status"] == "completed" and [life["step"] for life in again["resumed"]] == [6]
    assert losses(paused["directory"]) == pytest.approx(losses(whole["directory"]), abs=1e-5)
    assert again["metrics"]["eval_loss"] == pytest.approx(whole["metrics"]["eval_loss"], abs=1e-5)
    ours, theirs = (load_file(next((at["directory"] / "model").glob("*.safetensors"))) for at in (paused, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


def test_weights_that_are_shared_out_round_what_ddp_rounds_and_answer_what_one_process_answers(smoltrain):
    """In bf16 the log-probability of a reply is a sum of float32 all the same, and rewards differ by its noise."""
    own = (*FEW, "trainer=dpo", "global_batch_size=8", "trainer.args.max_steps=6", "trainer.args.logging_steps=1")
    own += ("trainer.args.bf16=true", "evaluation.max_rows=4", "evaluation.max_new_tokens=4")
    rewards, answers = [], []
    for on in ("2", "fsdp of 2", "zero 3 of 2"):
        (record,) = smoltrain(*own, *MACHINES[on], f"name={on.replace(' ', '-')}", quick=())
        lines = read_metrics(record["directory"])
        rewards.append([line["rewards/margins"] for line in lines if "rewards/margins" in line])
        answers.append([sample["before"] for sample in record["samples"]])
    assert len(rewards[0]) == 6 and max(map(abs, rewards[0])) > 1e-3 and answers[0]
    for found, said in zip(rewards[1:], answers[1:], strict=True):
        assert found == pytest.approx(rewards[0], abs=max(map(abs, rewards[0])) / 5)
        assert said == answers[0]


def test_the_best_model_is_kept_where_weights_are_shared_out(smoltrain):
    own = (*FEW, "global_batch_size=8", "trainer.args.max_steps=6", "trainer.args.learning_rate=5e-5")
    own += ("trainer.args.eval_strategy=steps", "trainer.args.eval_steps=2", "trainer.args.save_steps=2")
    own += ("trainer.args.load_best_model_at_end=true", "trainer.args.metric_for_best_model=eval_loss")
    own += ("trainer.args.greater_is_better=true", "trainer.args.save_total_limit=4")  # the first one is the best, so
    weights = []
    for number, on in enumerate(("1", "fsdp of 2", "zero 3 of 2")):
        (record,) = smoltrain(*own, *MACHINES[on], f"name=best-{number}", quick=())
        weights.append(load_file(record["directory"] / "model" / "model.safetensors"))
        saved = load_file(record["directory"] / "checkpoint-2" / "model.safetensors")
        assert all(torch.equal(weights[-1][name], saved[name]) for name in saved)
    for other in weights[1:]:
        assert all(torch.allclose(weights[0][name], other[name], atol=1e-5) for name in weights[0])


def test_deepspeed_that_is_not_installed_is_said_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert main(["hardware=deepspeed", "hardware.processes=2", "tracking=none"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'smoltrain[deepspeed]', or choose hardware=fsdp" in said and "Traceback" not in said


def test_what_a_batch_brings_along_is_not_rounded_as_weights_are():
    """A reference's log-probabilities, and the weights of tokens."""

    class Upstream:
        args = SimpleNamespace(device="cpu")

        def _prepare_input(self, data):
            return data.bfloat16() if torch.is_tensor(data) else {k: self._prepare_input(v) for k, v in data.items()}

    scores = torch.tensor([-106.3])
    one = watched(partial(Upstream))()
    one.sharing = zero
    assert torch.equal(one._prepare_input({"ref_chosen_logps": scores})["ref_chosen_logps"], scores)


def test_an_adapter_is_saved_as_the_optimizer_has_it_and_not_as_it_is_rounded_to_compute(smoltrain):
    own = (*FEW, *MACHINES["zero 3 of 2"], "global_batch_size=8", "trainer.args.max_steps=2", "peft=lora")
    (record,) = smoltrain(*own, "trainer.args.bf16=true", "trainer.args.learning_rate=1e-3", quick=())
    for folder in ("checkpoint-2", "model"):
        weights = load_file(record["directory"] / folder / "adapter_model.safetensors")
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        assert any((weight != weight.bfloat16().float()).any() for weight in weights.values())


def test_a_run_that_does_not_use_deepspeed_does_not_import_it(smoltrain):
    smoltrain("trainer.args.save_strategy=steps", "trainer.args.save_steps=1")
    assert "deepspeed" not in sys.modules


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT's own
def test_weights_are_found_by_the_names_they_are_saved_under_and_what_is_missing_is_said(folder):
    config = AutoConfig.from_pretrained(locate("pkg://smoltrain/tiny"), tie_word_embeddings=False)
    kept = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "use_dora": True}
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(**kept))
    other = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(**kept))
    model.save_pretrained(folder / "adapter")
    loaded = fsdp.load_weights(SimpleNamespace(model=other), folder / "adapter")
    assert loaded.missing_keys == loaded.unexpected_keys == []
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert any("magnitude" in name for name in trained) and any("modules_to_save" in name for name in trained)
    ours, theirs = dict(other.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in trained)
    whole = AutoModelForCausalLM.from_config(config)
    whole.save_pretrained(folder / "whole")
    file = folder / "whole" / "model.safetensors"
    save_file({n: w for n, w in load_file(file).items() if "norm" not in n} | {"stray": torch.zeros(1)}, file)
    loaded = fsdp.load_weights(SimpleNamespace(model=whole), folder / "whole")
    assert "model.norm.weight" in loaded.missing_keys and loaded.unexpected_keys == ["stray"]


PARTS = """
import json, os, signal, time
from pathlib import Path
from transformers import TrainerCallback

class Fails(TrainerCallback):
    def __init__(self, how: str):
        self.how = how
        if how == "loads others" and os.environ["RANK"] == "1":
            from smoltrain import report
            report.fingerprint = lambda model: "of other weights"

    def on_train_begin(self, args, state, control, model, **_):
        if self.how == "overflows":
            next(model.parameters()).register_hook(lambda gradient: gradient * float("inf"))

    def on_step_end(self, args, state, control, **_):
        if os.environ["RANK"] == "1" and state.global_step == 3:
            if self.how == "raises":
                raise ValueError("no good")
            if self.how == "hangs":
                time.sleep(100)
            if self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            command = json.loads(Path(args.output_dir, "run.json").read_text())["process"]["pid"]
            os.kill(command, signal.SIGTERM)
"""


@pytest.fixture
def failing(folder, monkeypatch):
    (folder / "my_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(folder)

    def command(how: str) -> list[str]:
        own = [f"+callbacks.fails={{_target_: my_parts.Fails, how: {how}}}", "trainer.args.save_steps=2"]
        return ["--allow", "my_parts", *DDP, "hardware.processes=2", *FEW, *own, "trainer.args.max_steps=6"]

    return command


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "rank 1 of 2: ValueError: no good"),
        ("dies", "rank 1 of 2 was killed by SIGKILL"),
        ("hangs", "rank 1 of 2 hangs in on_step_end, .*my_parts.py:[0-9]+: the others have waited for it as long"),
    ],
)
def test_the_rank_that_failed_first_is_named(failing, folder, monkeypatch, how, said):
    monkeypatch.setattr(ranks, "GRACE", 5)
    with pytest.raises(RuntimeError, match=said):
        main([*failing(how), "trainer.args.ddp_timeout=8"])
    (directory,) = (folder / "multirun").glob("*/*")
    record = read(directory)
    assert record["status"] == "failed" and re.search(said, record["error"])
    if how == "raises":
        assert "my_parts.py" in (directory / "traceback.txt").read_text()


def test_a_run_whose_gradients_are_infinite_has_diverged_though_deepspeed_leaves_its_steps_out(failing, folder):
    assert main([*failing("overflows"), *MACHINES["zero 2 of 2"]]) == 3
    (directory,) = (folder / "multirun").glob("*/*")
    assert read(directory)["status"] == "diverged" and "grad_norm is inf" in read(directory)["error"]


def test_weights_that_are_others_in_another_process_are_refused(failing, capsys):
    assert main(failing("loads others")) == 2
    assert "model: not the same weights on all nodes" in capsys.readouterr().err


def test_another_number_of_processes_than_was_asked_for_is_an_error():
    ranks.refuse_another_size(4, OmegaConf.create({"nodes": 2, "processes": 2}))
    with pytest.raises(ranks.RankFailed, match="4 processes were asked for, and 1 train together"):
        ranks.refuse_another_size(1, OmegaConf.create({"nodes": 2, "processes": 2}))


def test_a_signal_stops_all_ranks_in_one_step_and_the_same_command_goes_on(failing, folder, forked, smoltrain):
    assert forked(*failing("stops")).wait() == 143
    (directory,) = (folder / "multirun").glob("*/*")
    record = read(directory)
    assert record["status"] == "preempted" and "saved at step" in record["error"]
    steps = int(record["error"].split()[-1])
    assert 3 <= steps < 6 and (directory / f"checkpoint-{steps}" / "rng_state_1.pth").exists()
    assert forked(*failing("stops")).wait() == 0
    again = read(directory)
    assert again["status"] == "completed" and again["resumed"][0]["step"] == steps
    (whole,) = smoltrain(*(o for o in failing("stops")[2:] if "fails" not in o), "name=whole", quick=())
    weights = [(at / "model" / "model.safetensors").read_bytes() for at in (directory, whole["directory"])]
    assert weights[0] == weights[1]
    assert losses(directory) == pytest.approx(losses(whole["directory"]), rel=1e-6)  # the mean of what each has summed


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(pid for child in children for pid in descendants(child))]


def test_no_rank_outlives_its_command(folder, forked):
    parent = forked(*DDP, "hardware.processes=2", *FEW, "trainer.args.max_steps=5000")
    parent.until("step 5")
    ranks = descendants(parent.pid)
    assert len(ranks) == 4  # what they are forked from, what keeps count of semaphores, and two
    parent.kill()
    parent.wait()
    until = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < until
        time.sleep(0.1)
    (directory,) = (folder / "multirun").glob("*/*")
    assert read(directory)["status"] == "interrupted"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hardware.processes=0"], "hardware.processes=0: at least 1"),
        (["hardware.processes=3"], "3 processes share a multiple of 3 rows; the nearest are 15 and 18"),
        (["hardware.processes=2", "trainer.args.use_cpu=false"], "more than the 0 accelerators here"),
        (["hardware=ddp", "hardware.nodes=2", "hardware.rendezvous=127.0.0.1:99999"], "there is no port 99999"),
        (["hardware=cpu", "hardware.processes=2"], "global_batch_size=16, or choose hardware=ddp"),
        (["hardware.slurm.dry_run=true"], "choose hardware=slurm, slurm_ddp or slurm_fsdp"),
        (["-m", "hardware=slurm", "seed=1,2"], "trials of a sweep are jobs by hydra/launcher=slurm"),
        (["hardware=cpu", "trainer.args.ddp_timeout=5"], "it needs hardware.processes=2 or more"),
    ],
)
def test_what_cannot_be_shared_is_refused(folder, monkeypatch, capsys, overrides, said):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = [override for override in overrides if override == "-m"]
    given = ["global_batch_size=16"] if "hardware.processes=3" in overrides else []
    assert main([*flags, "hardware=ddp", *given, *overrides[len(flags) :]]) == 2
    assert said in capsys.readouterr().err


def test_several_processes_are_one_run_in_a_tracker_share_what_is_answered_and_say_what_is_seen_twice(
    smoltrain, folder, capsys
):
    own = ("global_batch_size=4", "data.train_rows=33", "trainer.args.max_steps=-1", "evaluation.max_rows=5")
    ddp = ("hardware=ddp", "trainer.args.per_device_train_batch_size=2", *own)
    (record,) = smoltrain(*ddp, "hardware.processes=2", "tracking=trackio", quick=QUICK)
    (alone,) = smoltrain(*ddp, "hardware.processes=1", "name=alone", "tracking=none", quick=QUICK)
    assert any("the last pass of an epoch sees 3 rows twice" in odd for odd in record["warnings"])
    assert not any("twice" in odd for odd in alone["warnings"])
    assert record["metrics"]["before/exact_match"] == alone["metrics"]["before/exact_match"]
    assert [s["before"] for s in record["samples"]] == [s["before"] for s in alone["samples"]] and record["samples"]
    with sqlite3.connect(folder / "trackio" / "smoltrain.db") as tracked:
        logged = tracked.execute("select run_name, metrics from metrics").fetchall()
    assert {name for name, _ in logged} == {"/".join(record["directory"].parts[-2:])}
    assert json.loads(logged[-1][1])["status"] == "completed"


def test_weights_stay_whole_where_there_is_one_process(smoltrain):
    (record,) = smoltrain("hardware=fsdp", "hardware.processes=1", "trainer.args.per_device_train_batch_size=4")
    assert record["status"] == "completed" and record["config"]["trainer"]["args"]["fsdp"] is False


def test_a_run_that_differs_in_what_an_update_sees_alone_is_named(smoltrain, capsys):
    own = (*FEW, "trainer.args.max_steps=4", "name=same")
    smoltrain(*own, "hardware=ddp", "hardware.processes=2", "pause_at=2", quick=(), code=143)
    assert len(smoltrain(*own, "hardware=cpu", quick=())) == 1  # another one, and why is said
    assert "says global_batch_size=16; with the same here, this would go on with it" in capsys.readouterr().err


def test_one_process_goes_on_with_what_several_have_begun_by_that_word(smoltrain, capsys):
    own = (*FEW, "trainer.args.max_steps=4", "global_batch_size=16")
    (paused,) = smoltrain(*own, "hardware=ddp", "hardware.processes=2", "pause_at=2", quick=(), code=143)
    assert main(["runs", "show", str(paused["directory"])]) == 0
    assert re.search(r"on .+, in 2 processes", capsys.readouterr().out)
    assert smoltrain(*own, "hardware=cpu", quick=()) == []
    said = capsys.readouterr().out
    assert "from checkpoint-2, in 1 process where it had 2 processes" in said
    assert re.search(r"completed in \d+ s in all, 4 steps", said)
    assert read(paused["directory"])["status"] == "completed"


def told(folder: Path, rank: int, kind: str, at: float) -> None:
    said = {"rank": rank, "kind": kind, "message": "why", "said": f"{kind}: why", "trace": "", "at": at}
    (folder / f"{rank}.json").write_text(json.dumps(said))


def test_a_run_whose_ranks_had_to_be_killed_is_no_completed_one(folder):
    with pytest.raises(runs.Interrupted, match="by SIGTERM"):
        ranks.refuse_failures(folder, [None, None], runs.Interrupted("interrupted by SIGTERM"))
    ranks.refuse_failures(folder, [0, 0], runs.Interrupted("interrupted by SIGTERM"))  # it came too late


def test_what_ended_a_run_is_what_the_first_rank_says_and_not_who_misses_it(folder):
    told(folder, 1, "Diverged", 1.0)
    told(folder, 2, "RuntimeError", 2.0)
    with pytest.raises(runs.Diverged, match="why"):
        ranks.refuse_failures(folder, [-signal.SIGABRT, 3, 1], None)
    told(folder, 1, "RuntimeError", 0.5)  # by a clock that is behind
    told(folder, 2, "Diverged", 2.0)
    with pytest.raises(runs.Diverged, match="why"):
        ranks.refuse_failures(folder, [None, 1, 3], None)
    with pytest.raises(ranks.RankFailed, match="rank 0 of 3 was killed by SIGKILL"):
        ranks.refuse_failures(folder, [-signal.SIGKILL, 3, 1], None)


def test_rows_and_weights_that_are_others_on_another_node_are_refused(folder):
    given = {"record": {"fingerprints": {"train": "a", "test": "b"}}, "former": None}
    rank = ranks.Rank(folder, given | {"begins": {"checkpoint": None, "unfit": {}}}, writes=False)
    ranks.refuse_other_rows(rank, {"train": "a", "test": "b"})
    with pytest.raises(ConfigError, match="test: not the same on"):
        ranks.refuse_other_rows(rank, {"train": "a", "test": "c"})


def test_where_a_run_begins_is_told_as_it_is(folder):
    start = resume.Start(folder / "checkpoint-5", {folder / "checkpoint-9": "it has no manifest"})
    assert resume.Start.heard(folder, json.loads(json.dumps(start.told))) == start


def test_a_text_that_looks_like_an_interpolation_stays_one():
    config = {"data": {"system_prompt": "use ${name}", "paths": ["${a}/b"]}, "n": 1}
    assert OmegaConf.to_container(OmegaConf.create(ranks.literal(config)), resolve=True) == config
