"""What a run leaves behind: its record, its exit code, its report; and nothing where nothing ran."""

import contextlib
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import resolvable

from smoltrain import runs
from smoltrain.config import ConfigError, plain
from smoltrain.config.resolvers import stamp
from smoltrain.history import resolve
from smoltrain.runs import config_hash, read_metrics


def test_the_record_says_what_ran(smoltrain):
    (record,) = smoltrain("seed=3")
    assert (record["status"], record["seed"], record["steps"], record["trainer"]) == (
        "completed",
        3,
        2,
        "smoltrain.sft.SFTTrainer",
    )
    for split, given in (("train", 32), ("test", 8)):
        rows = record["rows"][split]
        assert (rows["given"], rows["dropped"], rows["cut"]) == (given, {}, 0) and rows["tokens"] > given * 40
    assert record["parameters"] == record["trainable_parameters"] == 1_036_416
    assert record["objective"] == record["metrics"]["eval_loss"] < record["metrics"]["before/eval_loss"]
    assert {"exact_match", "before/exact_match"} <= record["metrics"].keys()
    assert record["versions"]["trl"] and record["end"] >= record["start"] and record["error"] is None
    assert "seed=3" in record["overrides"] and record["config"]["trainer"]["args"]["seed"] == 3
    steps = [row["step"] for row in read_metrics(record["directory"]) if "loss" in row]
    assert steps == [1, 2]
    made = {"run.json", "metrics.jsonl", "model", "report.md", "curves.png", ".hydra", ".lock"}
    assert {file.name for file in record["directory"].iterdir()} == made


def test_a_checkpoint_brings_no_model_card(smoltrain):
    (record,) = smoltrain("trainer.args.save_strategy=steps", "trainer.args.save_steps=1")
    assert (record["directory"] / "checkpoint-2").is_dir() and not list(record["directory"].rglob("README.md"))


def test_the_same_command_gives_the_same_numbers(smoltrain):
    (first,), (second,), (other,) = smoltrain(), smoltrain(), smoltrain("seed=1")
    assert first["config_hash"] == second["config_hash"] != other["config_hash"]
    assert first["metrics"] == second["metrics"] != other["metrics"]
    assert first["fingerprints"] == second["fingerprints"] == other["fingerprints"]
    assert first["directory"] != second["directory"]


def test_the_hash_ignores_where_and_who_watches_and_nothing_else():
    def hashed(*overrides: str, output_dir: str = "x") -> str:
        cfg = resolvable(overrides)
        cfg.trainer.args.output_dir = output_dir
        return config_hash(plain(cfg, resolve=True), None)

    same = [("name=other",), ("tracking=none",), ("callbacks.progress=null",), ("data.workers=3",)]
    assert {hashed(*overrides) for overrides in same} == {hashed()} == {hashed(output_dir="y")}
    different = [("seed=1",), ("trainer=dpo",), ("trainer.args.max_length=9",), ("data.train_rows=9",), ("peft=lora",)]
    assert len({hashed(*overrides) for overrides in different} | {hashed()}) == len(different) + 1


def test_a_run_starts_from_another(smoltrain, capsys):
    (sft,) = smoltrain("name=first")
    for reference in ("latest", "first", str(sft["directory"]), sft["directory"].name):
        assert resolve(reference, completed=True).resolve() == sft["directory"]
    capsys.readouterr()
    (dpo,) = smoltrain("trainer=dpo", "model.from_run=latest")
    out = capsys.readouterr().out
    parent, model = (record["directory"].relative_to(Path.cwd()) for record in (sft, dpo))
    assert f"from {parent} (sft, exact_match {sft['metrics']['exact_match']:.1%})\n" in out
    assert f"\nmodel  {model}/model\nreport {model}/report.md\n" in out
    assert dpo["parent"] == {
        "directory": str(sft["directory"]),
        "config_hash": sft["config_hash"],
        "trainer": "smoltrain.sft.SFTTrainer",
    }
    assert dpo["metrics"]["before/exact_match"] == sft["metrics"]["exact_match"]
    assert dpo["config"]["model"]["from_run"] == str(sft["directory"])
    smoltrain("model.from_run=latest", "model=smollm2_135m", code=2)
    assert "choose the model that the run trained" in capsys.readouterr().err


def test_a_run_starts_from_an_adapter_merged(smoltrain):
    (lora,) = smoltrain("peft=lora", "trainer.args.learning_rate=0.01")
    assert lora["trainable_parameters"] < lora["parameters"] / 3
    assert (lora["directory"] / "model" / "adapter_config.json").exists()
    (after,) = smoltrain("model.from_run=latest", "trainer.args.learning_rate=0")
    assert after["metrics"]["before/eval_loss"] == pytest.approx(lora["metrics"]["eval_loss"], abs=1e-5)


def test_only_a_completed_run_has_a_model_to_start_from(smoltrain, folder, capsys):
    smoltrain("model.from_run=latest", code=2)
    assert "no completed run" in capsys.readouterr().err and list(folder.iterdir()) == []
    (record,) = smoltrain()
    file = record["directory"] / "run.json"
    file.write_text(json.dumps(runs.read(record["directory"]) | {"status": "failed"}))
    with pytest.raises(ConfigError, match="this run is failed"):
        resolve(str(record["directory"]), completed=True)
    with pytest.raises(ConfigError, match="no completed run"):
        resolve("latest", completed=True)


def test_a_diverged_run_exits_3_and_has_no_final_model(smoltrain, capsys):
    (record,) = smoltrain(
        "trainer.args.learning_rate=1e30", "trainer.args.max_grad_norm=0", "trainer.args.max_steps=6", code=3
    )
    assert record["status"] == "diverged" and record["objective"] is None
    assert "nan" in record["error"] or "inf" in record["error"]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"diverged at step {record['steps']} of 6; lower trainer.args.learning_rate=1e+30; report ")
    assert not (record["directory"] / "model").exists()
    assert "diverged" in (record["directory"] / "report.md").read_text()


def test_a_failing_run_says_so_and_passes_the_error_on(smoltrain, monkeypatch, folder):
    def fail(*args, **kwargs):
        raise OSError("no such tape")

    monkeypatch.setattr("trl.SFTTrainer.training_step", fail)
    with pytest.raises(OSError, match="no such tape"):
        smoltrain()
    (file,) = folder.glob("multirun/*/*/run.json")
    assert (json.loads(file.read_text())["status"], json.loads(file.read_text())["error"]) == (
        "failed",
        "OSError: no such tape",
    )
    assert "OSError: no such tape" in (file.parent / "report.md").read_text()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_is_preempted(forked, folder, sign):
    life = forked("tracking=none", "evaluation.max_rows=0", "trainer.args.max_steps=9999")
    life.until("\nstep 10/")
    life.kill(sign)
    code = life.wait(timeout=60)
    (file,) = folder.glob("multirun/*/*/run.json")
    record = json.loads(file.read_text())
    ended = f"interrupted by {sign.name}, saved at step {record['steps']}"
    assert (code, record["status"], record["error"]) == (143, "preempted", ended)
    assert record["steps"] >= 10 and not (file.parent / "model").exists()
    report = file.with_name("report.md").relative_to(folder)
    saved = f"preempted at step {record['steps']} of 9999; the same command goes on from checkpoint-{record['steps']}"
    last = f"{saved}; report {report}"
    assert life.stderr.splitlines()[-1] == last


def test_an_interrupt_while_rows_are_prepared_leaves_no_worker_behind(forked, folder):
    row = {"prompt": "How many plums? " * 40, "completion": "Seven."}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row | {"id": i}) + "\n" for i in range(30_000)))
    life = forked("data.path=rows.jsonl", "data.workers=2", "tracking=none")

    def workers() -> set[int]:
        children = Path(f"/proc/{life.pid}/task/{life.pid}/children")
        asked = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        return {pid for pid in asked if Path(f"/proc/{pid}/cmdline").read_bytes().count(b"lives")}

    while len(begun := workers()) < 2 and life.running():
        time.sleep(0.05)
    time.sleep(1)
    life.kill(signal.SIGTERM)
    assert len(begun) >= 2 and life.wait(timeout=30) == 143
    time.sleep(1)
    assert not [pid for pid in begun if Path(f"/proc/{pid}").exists()]


def test_an_interrupt_inside_an_import_is_still_143(folder):
    """`python -m` forgets the exit code once KeyboardInterrupt has left a text that was executed, as dataclasses do."""
    (folder / "program.py").write_text(
        "import os, signal, smoltrain.train\nfrom smoltrain.__main__ import main\n"
        "smoltrain.train.train = lambda *_, **__: exec('import os, signal; os.kill(os.getpid(), signal.SIGINT)')\n"
        "raise SystemExit(main(['tracking=none']))"
    )
    done = subprocess.run([sys.executable, "-m", "program"], capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    last = r"preempted before the first step; the same command goes on; report multirun/default/[\w-]+/report.md\n"
    assert re.fullmatch(last, done.stderr)


EARLY = "callbacks.early={_target_: transformers.EarlyStoppingCallback}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data=local", "data.path=nowhere.jsonl"), "data.path=nowhere.jsonl: there is no such file"),
        (("data=local", "data.path=broken.json"), "broken.json"),
        (("data=local", "data.path=odd.txt"), "odd.txt"),
        (("data=local", "data.path=shapeless.jsonl"), "fit none of the known shapes"),
        (("data=local", "data.path=short.jsonl"), "data.test_share=0.05"),
        (("--config-dir=own", "experiment=bad"), "bad.yaml"),
        (("--config-dir=nowhere",), "nowhere"),
        (("model=nothing",), "Choose one of: "),
        (("hydra.run.dir=file/run",), "cannot write the run's directory"),
        (("trainer.args.hub_token=abc",), "only from the environment"),
        (("trainer.args.output_dir=here",), "trainer.args.output_dir: everything of a run is in one directory"),
        (("trainer.args.resume_from_checkpoint=here",), "the same command goes on with its unfinished run"),
        (("trainer.args.push_to_hub=true",), "trainer.args.push_to_hub: a run pushes nothing"),
        (("seed=-1",), "seed=-1: 0 to 4294967295"),
        (("threads=0",), "threads=0: at least 1, or null"),
        ((EARLY,), "set trainer.args.eval_strategy=steps trainer.args.eval_steps=…"),
        ((EARLY, "trainer.args.eval_strategy=epoch"), "set trainer.args.metric_for_best_model=eval_loss"),
        ((EARLY, "trainer.args.load_best_model_at_end=true"), "set trainer.args.eval_strategy=steps"),
        (("name=trackio",), "name=trackio: the dashboard's data"),
        (("objective=eval_accuracy",), "objective=eval_accuracy: not measured here"),
        (("trainer.args.optim=adamw_nonsense",), "adamw_nonsense"),
        (("model.chat_template=none_such",), "model.chat_template=none_such: no such file; choose one of chatml"),
        (("seed=1", "seed"), "seed"),
        (("hardware=mps",), "this machine has no accelerator"),
        (("+foo=1", "trainer.args.beta=1"), "foo=1 is not a key of a run"),
        (("trainer.args.beta=1", "trainer.args.gama=1"), "trainer.args.gama=1 is not a field of trl.SFTConfig"),
        (("name=../out",), "it becomes one folder"),
        (("callbacks.progress=3",), "callbacks.progress=3: it needs a _target_"),
        (("callbacks=null",), "callbacks.progress=null"),
        (("data=local", "data.path=none.jsonl"), "there is no row"),
        (("evaluation.max_new_tokens=0",), "at least 1"),
        (("trainer.args.learning_rate=abc",), "trainer.args.learning_rate=abc: trl.SFTConfig takes a number"),
        (("trainer.args.bf16=2.5",), "trainer.args.bf16=2.5: trl.SFTConfig takes auto, null, true or false"),
        (("model.dtype=float99",), "takes one of float32, bfloat16, float16"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(folder, capfd, arguments, message):
    (folder / "own" / "experiment").mkdir(parents=True)
    (folder / "own" / "experiment" / "bad.yaml").write_text("# @package _global_\n{seed: [")
    (folder / "broken.json").write_text('{"messages": [')
    (folder / "odd.txt").write_text("text")
    (folder / "none.jsonl").write_text("")
    (folder / "file").write_text("a file, not a folder")
    (folder / "shapeless.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    (folder / "short.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    before = sorted(folder.rglob("*"))
    from smoltrain.__main__ import main

    flags = [a for a in arguments if a.startswith("--")]
    few = ("data.train_rows=32", "data.test_rows=8") if "data=local" not in arguments else ()
    arguments = [*flags, *few, "evaluation.max_rows=0", "tracking=none", *(a for a in arguments if a not in flags)]
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error
    assert sorted(folder.rglob("*")) == before


def test_a_sweep_goes_on_after_a_diverged_run(smoltrain):
    records = smoltrain(
        "-m", "trainer.args.learning_rate=1e30,1e-4", "trainer.args.max_grad_norm=0", "trainer.args.max_steps=6", code=3
    )
    assert [r["status"] for r in records] == ["diverged", "completed"]


def test_a_sweep_over_a_choice_that_is_not_there_says_so(smoltrain, capsys):
    assert smoltrain("-m", "trainer=sft,ppo", code=2) == []  # Hydra composes every run before the first starts
    assert "Choose one of: dpo, sft" in capsys.readouterr().err


LOGGED = "trainer.args.logging_steps=1"


def test_a_terminal_sees_a_bar_with_loss_and_learning_rate(forked):
    ours, theirs = pty.openpty()
    few = ("data.train_rows=64", "data.test_rows=8", "evaluation.max_rows=0", "tracking=none", LOGGED)
    life = forked(*few, terminal=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(ours, 4096):
            shown += part
    assert life.wait() == 0
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"training +[━╸╺ ]+ *4/4 +loss \d\.\d+ +lr \d\.\de-\d+", text), text[-2000:]


def test_stamps_differ_within_a_second():
    assert len({stamp.__wrapped__() for _ in range(20)}) == 20


def test_the_record_is_written_whole_or_not_at_all(folder, monkeypatch):
    file = folder / "run.json"
    runs.write_atomically(file, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        runs.write_atomically(file, "new")
    assert file.read_text() == "old"


def test_a_refused_run_leaves_what_is_not_its_own(smoltrain, folder, capsys):
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("dear")
    smoltrain("hydra.run.dir=mine", "objective=nothing", code=2)
    assert [file.name for file in (folder / "mine").rglob("*")] == ["notes.txt"]
    (record,) = smoltrain("hydra.run.dir=multirun/a/b")
    smoltrain("hydra.run.dir=multirun/a/b", code=2)
    assert "there is a run already" in capsys.readouterr().err
    assert runs.read(record["directory"])["status"] == "completed" and (record["directory"] / "model").is_dir()


def test_dpo_after_lora_has_the_merged_model_as_its_reference(smoltrain):
    (lora,) = smoltrain("peft=lora", "trainer.args.learning_rate=0.01", "trainer.args.max_steps=8")
    (dpo,) = smoltrain("trainer=dpo", "model.from_run=latest", "peft=lora", "trainer.args.learning_rate=0.01")
    assert dpo["metrics"]["before/eval_loss"] == pytest.approx(math.log(2), abs=1e-3)
    (after,) = smoltrain("trainer=dpo", "model.from_run=latest", "trainer.args.learning_rate=0")
    for name in ("eval_mean_token_accuracy", "eval_logps/chosen"):  # the whole chain, not its last adapter alone
        assert after["metrics"][f"before/{name}"] == pytest.approx(dpo["metrics"][name], rel=1e-3)
    assert lora["directory"] != dpo["directory"]


def test_two_equal_parents_make_the_same_experiment(smoltrain):
    children = []
    for name in ("a", "b"):
        smoltrain(f"name={name}")
        children += smoltrain("trainer=dpo", f"model.from_run={name}")
    assert children[0]["config_hash"] == children[1]["config_hash"]
    assert children[0]["parent"]["directory"] != children[1]["parent"]["directory"]


def test_a_failed_run_of_a_sweep_is_exit_1_and_the_others_go_on(smoltrain, folder, monkeypatch):
    import trl

    step = trl.SFTTrainer.training_step

    def fail_once(self, *args, **kwargs):
        if self.args.seed == 1:
            raise OSError("a disk that went away")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "training_step", fail_once)
    smoltrain("-m", "seed=1,2", code=1)
    statuses = {json.loads(file.read_text())["status"] for file in folder.glob("multirun/**/run.json")}
    assert statuses == {"failed", "completed"}


def test_a_sweep_is_checked_whole_before_it_starts_and_shows_no_secret(smoltrain, folder, capsys):
    assert smoltrain("-m", "trainer=dpo,sft", "trainer.args.beta=0.3", code=2) == []
    assert "trainer.args.beta=0.3 is not a field of trl.SFTConfig" in capsys.readouterr().err
    assert smoltrain("-m", "seed=1,2", "trainer.args.hub_token=hf_SECRET", code=2) == []
    assert list(folder.iterdir()) == []


def test_out_of_memory_while_loading_is_a_failure_not_a_config_error(smoltrain, folder, monkeypatch):
    import torch

    from smoltrain.endings import OutOfMemory

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("smoltrain.model.Checkpoint.model", fail)
    with pytest.raises(OutOfMemory, match="per_device_train_batch_size"):
        smoltrain()
    (file,) = folder.glob("multirun/*/*/run.json")
    assert json.loads(file.read_text())["status"] == "failed"


def test_several_processes_are_refused(smoltrain, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    smoltrain(code=2)
    assert "WORLD_SIZE" in capsys.readouterr().err
