"""A sweep on Slurm and on Ray comes to what it comes to here; each is a real one, of one machine."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from smoltrain.__main__ import main
from smoltrain.slurm import queued

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
SCRIPT = Path(__file__).with_name("slurm.sh")
PART = """
import time
from pathlib import Path

import transformers


class Trouble(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        Path(f"step-{args.seed}").touch()
        if Path("slow").exists():
            time.sleep(0.2)
        if args.seed == 3:
            raise ValueError("seed 3 is a bad one")
"""
SWEEP = ("-m", "--allow", "parts", "callbacks.trouble={_target_: parts.Trouble}", "data.train_rows=32")
SWEEP += ("data.test_rows=8", "evaluation.max_rows=0", "tracking=none", "trainer.args.max_steps=40")
SWEEP += ("trainer.args.per_device_train_batch_size=2", "trainer.args.logging_steps=1", "seed=1,3")


@pytest.fixture(scope="module")
def slurm():
    """Starts Slurm. Skips where it cannot be."""
    pytest.importorskip("submitit")
    lacking = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=PATH) is None]
    if lacking:
        pytest.skip(f"there is no {lacking[0]} here; apt-get install slurm-wlm munge")
    if os.getuid():
        pytest.skip("only root can start a Slurm")
    lock = Path(tempfile.gettempdir(), "smoltrain-tests-slurm.lock")
    with lock.open("w") as one, tempfile.TemporaryDirectory() as folder:
        fcntl.flock(one, fcntl.LOCK_EX)  # a machine is one node at a time
        started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, check=False)
        try:
            if started.returncode:
                pytest.skip(f"Slurm does not start here: {started.stderr}")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
                yield
        finally:
            subprocess.run([SCRIPT, "stop", folder], check=True)


@pytest.fixture
def sweep(forked, folder):
    """Starts the sweep by a launcher, under whose name it is kept."""
    (folder / "parts.py").write_text(PART)

    def start(launcher: str):
        return forked(*SWEEP, f"name={launcher}", f"hydra/launcher={launcher}")

    return start


@pytest.fixture(scope="module")
def here(lives, tmp_path_factory) -> dict:
    """What the sweep comes to on this machine, without another program."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "parts.py").write_text(PART)
    with lives.start((*SWEEP, "name=local", "hydra/launcher=local"), cwd=folder) as life:
        assert life.wait() == 1, life.stderr
    return came_to(folder, "local")


def came_to(folder: Path, launcher: str) -> dict:
    """Of each trial of a sweep how it ended, what it came to, and its weights."""
    (directory,) = (folder / "multirun" / launcher).iterdir()
    results = json.loads((directory / "results.json").read_text())
    found = {}
    for trial in results["trials"]:
        weights = directory / trial["directory"] / "model" / "model.safetensors"
        kept = weights.read_bytes() if weights.exists() else None
        found[trial["number"]] = trial["status"], trial["objective"], trial["error"], kept
    return found


def until(true, seconds: float = 60) -> None:
    last = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < last
        time.sleep(0.1)


def test_on_slurm_a_job_that_is_cancelled_has_saved_and_goes_on_and_the_end_is_that_of_a_sweep_here(
    slurm, sweep, folder, here
):
    (folder / "slow").touch()
    first = sweep("slurm")
    until(lambda: (folder / "step-1").exists() or not first.running())
    (directory,) = (folder / "multirun/slurm").glob("*")
    subprocess.run(["scancel", (directory / "0_seed-1/slurm_job").read_text()], check=True)
    assert first.wait() == 1, first.stderr
    preempted, failed = came_to(folder, "slurm").values()
    assert preempted[0] == "preempted" and "SIGTERM" in preempted[2]
    assert failed[0] == "failed" and "seed 3 is a bad one" in failed[2]
    assert "[2/2]" in first.stdout and "in Slurm's queue" in first.stdout
    assert "SIGTERM: saving after this step" in (directory / "0_seed-1/log.txt").read_text()
    (folder / "slow").unlink()
    assert sweep("slurm").wait() == 1
    record = json.loads((directory / "0_seed-1/run.json").read_text())
    assert [again["step"] > 0 for again in record["resumed"]] == [True]
    assert came_to(folder, "slurm") == here
    assert [trial[0] for trial in came_to(folder, "slurm").values()] == ["completed", "failed"]


def test_on_ray_a_sweep_comes_to_what_it_comes_to_here(sweep, folder, here):
    pytest.importorskip("ray")
    done = sweep("ray")
    assert done.wait() == 1, done.stderr
    assert came_to(folder, "ray") == here
    assert [trial[0] for trial in came_to(folder, "ray").values()] == ["completed", "failed"]
    assert "completed" in done.stdout and "seed 3 is a bad one" in done.stdout


RUN = ("--allow", "parts", "callbacks.trouble={_target_: parts.Trouble}", "data.train_rows=64", "data.test_rows=8")
RUN += ("evaluation.max_rows=0", "tracking=none", "trainer.args.logging_steps=1", "trainer.args.max_steps=30", "seed=1")
RUN += ("hardware.slurm.gpus_per_node=null", "trainer.args.use_cpu=true", "trainer.args.bf16=false")
RUN += ("trainer.args.per_device_train_batch_size=2",)
DDP = ("hardware=slurm_ddp", "global_batch_size=4", "hardware.processes=2", "hardware.slurm.cpus_per_task=2", *RUN)


SHOWN = ("hardware.slurm.dry_run=true", "resume=never")


def jobs() -> list[str]:
    return sorted(queued() or {})


def test_a_job_that_is_preempted_is_queued_again_and_goes_on_with_the_same_run(slurm, forked, folder):
    (folder / "parts.py").write_text(PART)
    (folder / "slow").touch()
    life = forked(*DDP)
    life.until("step 3/30")
    subprocess.run(
        ["sbatch", "--parsable", "--partition=urgent", "--cpus-per-task=2", "--output=/dev/null", "--wrap=rm slow"],
        check=True,
        capture_output=True,
    )
    assert life.wait() == 0, life.stdout + life.stderr
    (file,) = (folder / "multirun").glob("*/*/run.json")
    record = json.loads(file.read_text())
    assert record["status"] == "completed" and [again["step"] >= 3 for again in record["resumed"]] == [True]
    assert "saving after this step" in life.stdout and "continues the preempted run" in life.stdout
    assert "step 30/30" in life.stdout


def test_a_job_is_shown_by_a_dry_run_which_sbatch_takes_as_it_is_and_a_signal_cancels_it(slurm, forked, folder):
    (folder / "parts.py").write_text(PART)
    shown = forked("hardware=slurm", *RUN, "trainer.args.max_steps=2", "hardware.slurm.dry_run=true")
    assert shown.wait() == 0 and not jobs()
    told = subprocess.run(["sbatch", "--parsable"], input=shown.stdout, capture_output=True, text=True, check=True)
    until(lambda: not jobs())
    ended = folder / f"multirun/default/slurm-{told.stdout.strip()}.code"
    assert ended.read_text() == "0\n", ended.with_suffix(".log").read_text()
    (folder / "slow").touch()
    life = forked("hardware=slurm", *RUN)
    life.until("step 3/30")
    life.kill(15)
    assert life.wait() == 143 and not jobs(), life.stdout + life.stderr
    records = [json.loads(file.read_text())["status"] for file in (folder / "multirun").glob("*/*/run.json")]
    assert sorted(records) == ["completed", "preempted"]


def test_what_slurm_refuses_and_what_it_lacks_is_said(slurm, monkeypatch, capsys, folder):
    monkeypatch.setenv("PATH", PATH)
    assert main(["hardware=slurm", "hardware.slurm.partition=none"]) == 2
    assert "Slurm refuses the job" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(folder))
    assert main(["hardware=slurm"]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    assert main(["hardware=slurm_ddp", "hardware.nodes=2", "global_batch_size=64", *SHOWN]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=2" in script and "#SBATCH --gpus-per-node=8" in script and "rendezvous=$node" in script
    assert "${SLURM_RESTART_COUNT:+resume=auto}" in script and "dry_run" not in script


@pytest.mark.torture
def test_jobs_of_a_sweep_that_is_killed_go_on_and_the_same_sweep_waits_for_them(slurm, sweep, folder):
    (folder / "slow").touch()
    first = sweep("slurm")
    until(lambda: (folder / "step-1").exists() or not first.running())
    first.kill()
    jobs = queued()
    again = sweep("slurm")
    again.until("in Slurm's queue already")
    assert {*queued()} <= {*jobs}
    assert again.wait() == 1
    (directory,) = (folder / "multirun/slurm").glob("*")
    record = json.loads((directory / "0_seed-1/run.json").read_text())
    assert record["status"] == "completed" and record["resumed"] == []


@pytest.mark.torture
def test_a_signal_to_the_sweep_ends_its_jobs_or_tasks_once_they_have_saved(slurm, sweep, folder):
    for launcher in ("slurm", "ray"):
        (folder / "slow").touch()
        first = sweep(launcher)
        until(lambda: (folder / "step-1").exists() or not first.running())  # noqa: B023
        first.kill(15)
        assert first.wait() == 143
        (directory,) = (folder / "multirun" / launcher).glob("*")
        assert json.loads((directory / "0_seed-1/run.json").read_text())["status"] == "preempted"
        assert not queued()
        (folder / "slow").unlink()
        assert sweep(launcher).wait() == 1
        (folder / "step-1").unlink()
        assert came_to(folder, launcher)[0][0] == "completed"


@pytest.mark.parametrize(
    ("launcher", "package", "more", "said"),
    [
        ("slurm", "submitit", (), "pip install 'smoltrain[slurm]'"),
        ("ray", "ray", (), "pip install 'smoltrain[ray]'"),
        ("slurm", None, ("hydra.launcher.timeout_min=long",), "hydra.launcher.timeout_min"),
        ("ray", None, ("hydra.launcher.num_gpu=1",), "num_gpu"),
        ("slurm", None, (), "there is no sbatch here"),
        ("slurms", None, (), "slurm"),
    ],
)
def test_what_a_launcher_lacks_is_said_before_anything_is_written(
    folder, capsys, monkeypatch, launcher, package, more, said
):
    if package is None and launcher in ("slurm", "ray"):
        pytest.importorskip("submitit" if launcher == "slurm" else "ray")
    if package is not None:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("PATH", str(folder))
    assert main(["-m", f"hydra/launcher={launcher}", "seed=1,2", "tracking=none", *more]) == 2
    assert said in capsys.readouterr().err and not (folder / "multirun").exists()
