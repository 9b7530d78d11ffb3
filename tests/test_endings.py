"""How a run ends, whatever ends it: a signal in any phase, numbers no longer finite, a full disk, no memory."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import pytest
import torch

from smoltrain.endings import DiskFull, OutOfMemory, explained
from smoltrain.runs import CLOCK, read, read_metrics, worst

FEW = ("data.train_rows=32", "data.test_rows=8", "evaluation.max_rows=2", "evaluation.max_new_tokens=2")
FEW += ("trainer.args.per_device_train_batch_size=2", "trainer.args.max_steps=6", "trainer.args.save_steps=2")
FEW += ("trainer.args.logging_steps=1", "tracking=none")
PAIRS = ("trainer=dpo", "trainer.args.precompute_ref_log_probs=true")

# Makes one phase last, and tells when it has begun: a signal comes when we want it.
SLOWED = """
import time
def slowed(owner, name, mark, after=False):
    real = getattr(owner, name)
    def slow(*args, **kwargs):
        done = real(*args, **kwargs) if after else None
        print(mark, flush=True)
        time.sleep(1.5)
        return done if after else real(*args, **kwargs)
    setattr(owner, name, slow)
"""
RUN = "import runpy; runpy.run_module('smoltrain', run_name='__main__', alter_sys=True)"
PHASES = {  # where: what to slow down, whether training has begun, which command
    "preparation": ("import smoltrain.preflight as m; slowed(m, 'preflight', 'HERE')", False, ()),
    "model": ("import smoltrain.train as m; slowed(m, 'build', 'HERE')", False, ()),
    "reference pass": ("import trl; slowed(trl.DPOTrainer, '_precompute_ref_logps', 'HERE')", False, PAIRS),
    "step": ("import trl; slowed(trl.SFTTrainer, 'training_step', 'HERE')", True, ()),
    "save": ("import trl; slowed(trl.SFTTrainer, '_save_checkpoint', 'HERE')", True, ()),
    "seal": ("import smoltrain.checkpoints as m; slowed(m, 'seal', 'HERE')", True, ()),
    "rotation": ("import smoltrain.checkpoints as m; slowed(m, 'rotate', 'HERE')", True, ()),
    "final save": ("import smoltrain.train as m; slowed(m, 'save', 'HERE')", False, ()),
}


def only_run(folder: Path) -> Path:
    (file,) = folder.glob("multirun/*/*/run.json")
    return file.parent


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


def learned(run: Path) -> list[dict]:
    """The metrics of a run, less what a clock measured."""
    return [{k: v for k, v in row.items() if not k.endswith(CLOCK)} for row in read_metrics(run)]


def equal(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and learned(one) == learned(other)


@pytest.fixture(scope="module")
def undisturbed(lives, tmp_path_factory):
    """Runs that nothing disturbs, by their command."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*more: str) -> Path:
        if more not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            with lives.start([*FEW, *more], cwd=folder) as life:
                assert life.wait() == 0, life.stderr
            made[more] = only_run(folder)
        return made[more]

    return run


def alternating(places: Iterable[str]) -> list:
    """Each place with the one signal and the next with the other; under torture all with both."""
    both = list(enumerate(product(places, (signal.SIGTERM, signal.SIGINT))))
    marks = [[] if n % 4 in (0, 3) else [pytest.mark.torture] for n, _ in both]
    return [
        pytest.param(place, number, marks=mark, id=f"{place}-{number.name[3:]}")
        for (_, (place, number)), mark in zip(both, marks, strict=True)
    ]


@pytest.mark.parametrize(("phase", "number"), alternating(PHASES))
def test_a_signal_ends_a_run_in_any_phase_and_the_same_command_goes_on(forked, folder, undisturbed, phase, number):
    slow, training, more = PHASES[phase]
    env = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}  # in which no reference is found
    life = forked(*FEW, *more, code=f"{SLOWED}{slow}\n{RUN}", env=env)
    life.until("HERE")
    life.kill(number)
    assert life.wait() == 143, life.stderr
    run = only_run(folder)
    record = read(run)
    assert (record["status"], record["objective"]) == ("preempted", None) and signal.Signals(number).name in record[
        "error"
    ]
    assert not (run / "model").exists() and "Traceback" not in life.stderr
    if training:
        assert (run / f"checkpoint-{record['steps']}" / "manifest.json").exists() and "saved at step" in record["error"]
    again = forked(*FEW, *more, env=env)
    assert again.wait() == 0, again.stderr
    assert f"continues the preempted run {run.relative_to(folder)} from" in again.stdout
    assert read(only_run(folder))["status"] == "completed" and equal(run, undisturbed(*more))


IMPORTING = """
import sys, time
class Slow:
    def find_spec(self, name, *_):
        if name == "torch":
            print("HERE", flush=True)
            time.sleep(1.5)
sys.meta_path.insert(0, Slow())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.torture)], ids=str)
def test_a_signal_ends_a_run_while_it_imports(forked, folder, undisturbed, number):
    command = [sys.executable, "-c", f"{IMPORTING}{RUN}", *FEW]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.stdout.readline().strip() != "HERE":
            assert process.poll() is None
        process.send_signal(number)
        said = process.communicate()[1]
    assert process.returncode == 143 and "Traceback" not in said and read(only_run(folder))["status"] == "preempted"
    again = forked(*FEW)
    assert again.wait() == 0 and equal(only_run(folder), undisturbed())


def test_a_signal_whose_exception_is_lost_ends_a_run_all_the_same(forked, folder):
    lost = "class Last:\n  def __del__(self): print('HERE', flush=True); time.sleep(1.5)\n"
    lost += "import smoltrain.train as m; real = m.build; m.build = lambda *given: (Last(), real(*given))[1]"
    life = forked(*FEW, code=f"{SLOWED}{lost}\n{RUN}")
    life.until("HERE")
    life.kill(signal.SIGTERM)
    assert life.wait() == 143 and "Exception ignored in" in life.stderr
    assert read(only_run(folder))["error"] == "interrupted by SIGTERM, saved at step 1"


def test_a_second_signal_leaves_at_once(forked, folder):
    life = forked(*FEW, code=f"{SLOWED}{PHASES['step'][0]}\n{RUN}")
    life.until("HERE")
    life.kill(signal.SIGTERM)
    life.until("once more leaves at once")
    time.sleep(1.1)  # sooner, it would be taken for the same
    life.kill(signal.SIGTERM)
    assert life.wait(20) == 143
    record = read(only_run(folder))
    assert record["status"] == "preempted" and "saved" not in record["error"]
    assert not list(only_run(folder).glob("checkpoint-*"))


def test_two_signals_at_once_are_one(forked, folder):
    life = forked(*FEW, code=f"{SLOWED}{PHASES['step'][0]}\n{RUN}")
    life.until("HERE")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        life.kill(number)
    assert life.wait(20) == 143 and "the same command goes on from checkpoint-1;" in life.stderr
    assert read(only_run(folder))["error"].endswith("saved at step 1")


def test_what_a_signal_saves_can_be_gone_on_from_though_only_models_are_kept(forked, folder):
    command = (*FEW, "trainer.args.save_only_model=true")
    life = forked(*command, code=f"{SLOWED}{PHASES['step'][0]}\n{RUN}")
    life.until("HERE")
    life.kill(signal.SIGTERM)
    assert life.wait() == 143, life.stderr
    again = forked(*command)
    assert again.wait() == 0 and "from checkpoint-1" in again.stdout, again.stdout


def test_a_signal_after_the_final_model_is_written_leaves_none(forked, folder, undisturbed):
    slow = "import smoltrain.train as m; slowed(m, 'save', 'HERE', after=True)"
    life = forked(*FEW, code=f"{SLOWED}{slow}\n{RUN}")
    life.until("HERE")
    life.kill(signal.SIGTERM)
    assert life.wait() == 143 and not (only_run(folder) / "model").exists()
    assert forked(*FEW).wait() == 0 and equal(only_run(folder), undisturbed())
    assert not (only_run(folder) / "unfinished-model").exists()


def test_a_signal_while_an_evaluation_ends_a_run_early_does_not_make_it_longer(forked, folder):
    patience = "callbacks.early={_target_: transformers.EarlyStoppingCallback, early_stopping_patience: 1}"
    measured = ("trainer.args.eval_strategy=steps", "trainer.args.eval_steps=1", "trainer.args.learning_rate=0.2")
    best = ("trainer.args.load_best_model_at_end=true", "trainer.args.save_steps=1", "trainer.args.max_steps=9")
    command = (*FEW, patience, *measured, *best)
    calm = forked(*command, "name=calm")
    assert calm.wait() == 0, calm.stderr
    (file,) = folder.glob("multirun/calm/*/run.json")
    steps = read(file.parent)["steps"]
    assert 1 < steps < 9
    at = f"if self.state.global_step == {steps}: print('HERE', flush=True); time.sleep(1.5)"
    slow = f"import trl\nreal = trl.SFTTrainer.evaluate\ndef slow(self, *a, **k):\n    {at}\n"
    slow += "    return real(self, *a, **k)\ntrl.SFTTrainer.evaluate = slow"
    life = forked(*command, code=f"{SLOWED}{slow}\n{RUN}")
    life.until("HERE")
    life.kill(signal.SIGTERM)
    assert life.wait() == 143, life.stderr
    again = forked(*command)
    assert again.wait() == 0, again.stderr
    (run,) = {file.parent for file in folder.glob("multirun/default/*/run.json")}
    assert read(run)["steps"] == steps and equal(run, file.parent)


def test_a_process_that_is_gone_reads_as_interrupted(forked, folder):
    life = forked(*FEW, code=f"{SLOWED}{PHASES['step'][0]}\n{RUN}")
    life.until("HERE")
    assert read(only_run(folder))["status"] == "running"
    life.kill(signal.SIGKILL)
    life.wait()
    assert read(only_run(folder))["status"] == "interrupted"
    file = only_run(folder) / "run.json"
    elsewhere = json.loads(file.read_text())
    elsewhere["process"] = {"host": "another", "pid": 1}  # a number that is taken everywhere
    file.write_text(json.dumps(elsewhere))
    assert read(only_run(folder))["status"] == "interrupted"


# ---------------------------------------------------------------- numbers that are no longer finite


def spoil(monkeypatch, what: str, step: int, value: float) -> None:
    """Makes a number of a trainer no longer finite, in one step."""
    import trl
    from transformers import Trainer

    def at(self) -> bool:
        return self.state.global_step == step - 1

    if what == "loss":
        real = Trainer.training_step
        monkeypatch.setattr(Trainer, "training_step", lambda s, *a, **k: real(s, *a, **k) * (value if at(s) else 1.0))
    elif what == "gradient":
        real = Trainer._clip_grad_norm

        def clip(self, model):
            if at(self):
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(value)
            return real(self, model)

        monkeypatch.setattr(Trainer, "_clip_grad_norm", clip)
    elif what == "rewards":
        real = trl.DPOTrainer.compute_loss

        def compute(self, *a, **k):
            loss = real(self, *a, **k)
            if at(self) and self.model.training:
                self._metrics["train"]["rewards/chosen"][-1] = value
            return loss

        monkeypatch.setattr(trl.DPOTrainer, "compute_loss", compute)
    elif what == "weights":
        from smoltrain.callbacks import Finite

        real = Finite.on_step_end

        def end(self, args, state, control, **kwargs):
            if state.global_step == step:
                with torch.no_grad():
                    next(self.trainer.model.parameters())[0, 0] = value
            return real(self, args, state, control, **kwargs)

        monkeypatch.setattr(Finite, "on_step_end", end)


POINTS = [
    ("loss", 1, float("nan"), ()),
    ("loss", 3, float("inf"), ()),
    ("loss", 6, float("-inf"), ()),
    ("loss", 2, float("nan"), ("trainer=dpo",)),
    ("loss", 2, float("nan"), ("trainer.args.gradient_accumulation_steps=2",)),
    ("gradient", 1, float("nan"), ()),
    ("gradient", 4, float("inf"), ("trainer=dpo",)),
    ("gradient", 5, float("nan"), ("peft=lora",)),
    ("rewards", 2, float("nan"), ("trainer=dpo",)),
    ("rewards", 5, float("inf"), ("trainer=dpo",)),
    ("weights", 2, float("nan"), ()),
    ("weights", 6, float("inf"), ("trainer=dpo",)),
]


@pytest.mark.parametrize(("what", "step", "value", "more"), POINTS)
def test_a_run_that_diverges_stops_in_that_step(smoltrain, monkeypatch, capsys, what, step, value, more):
    spoil(monkeypatch, what, step, value)
    (record,) = smoltrain(
        *more, "trainer.args.logging_steps=5", code=3, quick=(*FEW[:-2], "tracking=none", "resume=never")
    )
    run = record["directory"]
    assert (record["status"], record["objective"], record["steps"]) == ("diverged", None, step)
    assert what.removesuffix("ient") in record["error"] and f"at step {step}" in record["error"]
    assert not (run / "model").exists() and not (run / f"checkpoint-{step}").exists()
    sound = {folder.name for folder in run.glob("checkpoint-*")}
    assert sound == {f"checkpoint-{s}" for s in range(2, step, 2)[-2:]}  # those from before it


def test_a_run_that_diverged_is_not_tried_again_in_silence(smoltrain, monkeypatch, capsys):
    spoil(monkeypatch, "loss", 3, float("nan"))
    (record,) = smoltrain(code=3, quick=FEW)
    monkeypatch.undo()
    capsys.readouterr()
    monkeypatch.chdir(record["directory"].parents[2])
    assert smoltrain(code=3, quick=FEW) == []
    assert "this experiment has diverged already" in capsys.readouterr().out


def test_a_step_that_the_scaler_of_fp16_leaves_out_is_no_divergence(smoltrain, monkeypatch):
    from accelerate import Accelerator
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda *_, **__: float("inf"))
    (record,) = smoltrain(code=3, quick=(*FEW, "resume=never"))
    assert record["error"].endswith("grad_norm is inf at step 1")
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", True)
    smoltrain(code=3, quick=(*FEW, "resume=never"))  # by somebody else, as DeepSpeed does

    def scaled(trainer, *_, **__):
        trainer.args.fp16 = True  # which needs a GPU
        return float("inf")

    monkeypatch.setattr(Trainer, "_get_grad_norm", scaled)
    (record,) = smoltrain("trainer.args.logging_steps=1", quick=(*FEW[:-2], "tracking=none", "resume=never"))
    assert record["status"] == "completed"
    assert {row["grad_norm"] for row in read_metrics(record["directory"]) if "loss" in row} == {float("inf")}


def test_a_sweeper_is_told_the_worst_value():
    assert worst("eval_loss") == float("inf") and worst("exact_match") == worst("eval_rewards/accuracies") == -float(
        "inf"
    )


# ---------------------------------------------------------------- what the machine runs out of

LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"
SIZES = [int(1000 * 1.4**n) for n in range(30)]  # 1 kB to 17 MB; the optimizer's file is the largest, of 8.3 MB


@pytest.mark.parametrize(
    "size",
    [pytest.param(s, marks=[pytest.mark.torture] if n not in (5, 14, 24, 26) else []) for n, s in enumerate(SIZES)],
)
def test_a_disk_that_is_full_costs_nothing_but_the_steps_since_the_last_save(forked, folder, undisturbed, size):
    life = forked(*FEW, code=f"{LIMITED.format(size)}\n{RUN}")
    code = life.wait()
    assert code in (0, 1, 2), life.stderr
    again = forked(*FEW)
    assert again.wait() == 0, again.stderr
    run = only_run(folder)
    assert read(run)["status"] == "completed" and equal(run, undisturbed())
    if code == 1 and size > 20_000:  # what is printed goes to a file too
        assert "are free on this disk; once there is room, the same command goes on" in life.stderr
    else:
        assert code == 0 or "DiskFull" in life.stderr or "cannot write" in life.stderr


def test_a_disk_without_room_is_found_before_a_save_begins(smoltrain, monkeypatch, capsys):
    import shutil

    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000_000))
    with pytest.raises(DiskFull):
        smoltrain(quick=FEW)
    (record,) = [read(file.parent) for file in Path().glob("multirun/*/*/run.json")]
    run = only_run(Path.cwd())
    assert record["status"] == "failed" and not list(run.glob("checkpoint-*"))
    assert f"{run}: a checkpoint needs 12 MB, and 5 MB are free on this disk" in record["error"]
    assert "DiskFull" in (run / "traceback.txt").read_text()
    monkeypatch.undo()
    monkeypatch.chdir(run.parents[2])
    smoltrain(quick=FEW)
    assert read(run)["status"] == "completed"


def test_a_full_disk_is_that_of_the_file_that_could_not_be_written(tmp_path):
    elsewhere = tmp_path / "cache" / "rows.arrow"
    elsewhere.parent.mkdir()
    with pytest.raises(DiskFull, match=str(elsewhere.parent)), explained(Path("run"), dict):
        raise OSError(errno.ENOSPC, "No space left on device", str(elsewhere))


def test_memory_that_runs_out_while_the_model_is_loaded_is_no_slip_in_the_config(smoltrain, monkeypatch):
    from smoltrain.model import Checkpoint

    monkeypatch.setattr(Checkpoint, "model", lambda *_: torch.empty(2**50))
    with pytest.raises(OutOfMemory):
        smoltrain(quick=FEW)
    (file,) = Path().glob("multirun/*/*/run.json")
    assert read(file.parent)["status"] == "failed"


def test_memory_that_runs_out_names_what_helps(monkeypatch):
    args = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_length": 1024}
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()):
        with pytest.raises(OutOfMemory) as caught, explained(Path(), lambda: args):
            raise error
        lines = [line.strip().split(" ")[0] for line in str(caught.value).splitlines()]
        assert lines == [
            "out",
            "trainer.args.per_device_train_batch_size=4",
            "trainer.args.activation_checkpointing=true",
            "trainer.args.max_length=512",
            "peft=lora",
        ]
    with pytest.raises(OutOfMemory), explained(Path(), lambda: args):
        torch.empty(2**50)  # what torch says of a CPU
    with pytest.raises(OutOfMemory, match="peft=lora"), explained(Path(), dict):
        raise MemoryError
    with pytest.raises(RuntimeError, match="something else"), explained(Path(), lambda: args):
        raise RuntimeError("something else")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_outlives_who_reads_what_it_prints(forked, folder, processes):
    reader, writer = os.pipe()
    own = ("hardware=ddp", f"hardware.processes={processes}", "global_batch_size=4")
    life = forked(*FEW, *own, terminal=writer)
    os.close(writer)
    said = b""
    while b"step 1/" not in said:
        said += (more := os.read(reader, 100))
        assert more, said
    os.close(reader)  # as head does, when it has seen enough
    assert life.wait() == 0
    (directory,) = (folder / "multirun").glob("*/*")
    assert (read(directory)["status"], read(directory)["steps"]) == ("completed", 6)
    assert f"| hardware | ddp, {processes} process" in (directory / "report.md").read_text()
