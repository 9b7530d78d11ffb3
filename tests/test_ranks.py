"""hardware=ddp: the same experiment comes to the same in one process and in several, and none is left behind."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import QUICK
from omegaconf import OmegaConf

from smoltrain import ranks, runs
from smoltrain.__main__ import main
from smoltrain.runs import read, read_metrics

FEW = ("data.train_rows=400", "data.test_rows=8", "evaluation.max_rows=0", "tracking=none")
FIFTY = (*FEW, "trainer.args.max_steps=50", "trainer.args.logging_steps=1", "trainer.args.learning_rate=5e-5")
DDP = ("hardware=ddp", "global_batch_size=8")


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(directory) if "loss" in line]


def trained(smoltrain, processes: int, *overrides: str) -> tuple[dict, list[float]]:
    rows = f"trainer.args.per_device_train_batch_size={8 // processes // (1 if processes > 2 else 2)}"
    (record,) = smoltrain(*DDP, f"hardware.processes={processes}", rows, *overrides, quick=())
    return record, losses(record["directory"])


@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_one_process_and_two_take_the_same_fifty_steps(smoltrain, trainer):
    (one, alone), (two, together) = (trained(smoltrain, n, f"trainer={trainer}", *FIFTY) for n in (1, 2))
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


PARTS = """
import os, signal, time
from transformers import TrainerCallback

class Fails(TrainerCallback):
    def __init__(self, how: str):
        self.how = how

    def on_step_end(self, args, state, control, **_):
        if os.environ["RANK"] == "1" and state.global_step == 3:
            if self.how == "raises":
                raise ValueError("no good")
            os.kill(*((os.getpid(), signal.SIGKILL) if self.how == "dies" else (os.getppid(), signal.SIGTERM)))
"""


@pytest.fixture
def failing(folder, monkeypatch):
    (folder / "my_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def command(how: str) -> list[str]:
        own = [f"+callbacks.fails={{_target_: my_parts.Fails, how: {how}}}", "trainer.args.save_steps=2"]
        return ["--allow", "my_parts", *DDP, "hardware.processes=2", *FEW, *own, "trainer.args.max_steps=6"]

    return command


@pytest.mark.parametrize(
    ("how", "said"), [("raises", "rank 1 of 2: ValueError: no good"), ("dies", "rank 1 of 2 was killed by SIGKILL")]
)
def test_the_rank_that_failed_first_is_named(failing, folder, how, said):
    with pytest.raises(RuntimeError, match=said):
        main(failing(how))
    (directory,) = (folder / "multirun").glob("*/*")
    record = read(directory)
    assert record["status"] == "failed" and said in record["error"]
    if how == "raises":
        assert "my_parts.py" in (directory / "traceback.txt").read_text()


def test_a_signal_stops_all_ranks_in_one_step_and_the_same_command_goes_on(failing, folder, smoltrain):
    command = [sys.executable, "-m", "smoltrain", *failing("stops")]
    assert subprocess.run(command, capture_output=True, timeout=240).returncode == 143
    (directory,) = (folder / "multirun").glob("*/*")
    record = read(directory)
    assert record["status"] == "preempted" and "saved at step" in record["error"]
    steps = int(record["error"].split()[-1])
    assert 3 <= steps < 6 and (directory / f"checkpoint-{steps}" / "rng_state_1.pth").exists()
    assert subprocess.run(command, capture_output=True, timeout=240).returncode == 0
    again = read(directory)
    assert again["status"] == "completed" and again["resumed"][0]["step"] == steps
    (whole,) = smoltrain(*(o for o in failing("stops")[2:] if "fails" not in o), "name=whole", quick=())
    weights = [(at / "model" / "model.safetensors").read_bytes() for at in (directory, whole["directory"])]
    assert weights[0] == weights[1] and losses(directory) == losses(whole["directory"])


def test_no_rank_outlives_its_command(folder):
    command = [sys.executable, "-m", "smoltrain", *DDP, "hardware.processes=2", *FEW, "trainer.args.max_steps=5000"]
    log = folder / "log"
    with log.open("w") as file:
        parent = subprocess.Popen(command, stdout=file, stderr=file)
    ranks: list[int] = []
    until = time.monotonic() + 120
    while "step 5" not in log.read_text():
        assert time.monotonic() < until and parent.poll() is None, log.read_text()
        time.sleep(0.1)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    ranks = [int(pid) for pid in children]
    assert len(ranks) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < until
        time.sleep(0.1)
    (directory,) = (folder / "multirun").glob("*/*")
    assert read(directory)["status"] == "interrupted"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hardware.processes=0"], "hardware.processes=0: at least 1"),
        (["hardware.processes=3"], "3 processes of 4 rows at once see a multiple of 12; the nearest are 12 and 24"),
        (["hardware.processes=2", "trainer.args.use_cpu=false"], "more than the 0 accelerators here"),
        (["hardware=cpu", "trainer.args.ddp_timeout=5"], "it needs hardware.processes=2 or more"),
    ],
)
def test_what_cannot_be_shared_is_refused(folder, monkeypatch, capsys, overrides, said):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["hardware=ddp", "global_batch_size=16", *overrides]) == 2
    assert said in capsys.readouterr().err


def test_several_processes_are_one_run_in_a_tracker(smoltrain, folder):
    (record,) = smoltrain(*DDP, "hardware.processes=2", *FEW, "tracking=trackio", quick=QUICK)
    with sqlite3.connect(folder / "trackio" / "smoltrain.db") as tracked:
        logged = tracked.execute("select run_name, metrics from metrics").fetchall()
    assert {name for name, _ in logged} == {"/".join(record["directory"].parts[-2:])}
    assert json.loads(logged[-1][1])["status"] == "completed"


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
    with pytest.raises(ranks.RankFailed, match="rank 0 of 3 was killed by SIGKILL"):
        ranks.refuse_failures(folder, [-signal.SIGKILL, 3, 1], None)


def test_a_text_that_looks_like_an_interpolation_stays_one():
    config = {"data": {"system_prompt": "use ${name}", "paths": ["${a}/b"]}, "n": 1}
    assert OmegaConf.to_container(OmegaConf.create(ranks.literal(config)), resolve=True) == config
