"""The same command goes on with what it did not finish, says what it has finished, and refuses what has changed."""

import json
from pathlib import Path

import pytest
from test_endings import FEW, equal, only_run

from smoltrain.__main__ import main
from smoltrain.runs import ROOT, config_hash, read, read_metrics

AUTO = (*FEW, "resume=auto")


class Broken(RuntimeError):
    """What a test stops a run with."""


@pytest.fixture
def broken(smoltrain, monkeypatch):
    """Runs a command that fails in the fourth step, and returns the directory of its run."""
    from transformers import Trainer

    def run(*arguments: str) -> Path:
        real = Trainer.training_step

        def step(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise Broken
            return real(self, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "training_step", step)
            with pytest.raises(Broken):
                smoltrain(*arguments, quick=AUTO)
        return only_run(Path.cwd())

    return run


def test_the_same_command_goes_on_where_a_run_failed(smoltrain, broken, capsys):
    run = broken()
    first = read(run)
    assert (first["status"], first["steps"]) == ("failed", 3) and "Broken" in (run / "traceback.txt").read_text()
    capsys.readouterr()
    assert smoltrain(quick=AUTO) == []  # no other run was made
    record = read(run)
    assert f"continues the failed run {run.relative_to(Path.cwd())} from checkpoint-2\n" in capsys.readouterr().out
    assert (record["status"], record["steps"], record["error"]) == ("completed", 6, None)
    assert [again["step"] for again in record["resumed"]] == [2] and record["start"] == first["start"]
    assert record["seconds"] > first["seconds"] and record["metrics"]["before/eval_loss"]
    (other,) = smoltrain("resume=never", quick=FEW)
    assert other["directory"] != run and equal(run, other["directory"])


@pytest.mark.parametrize("other", ["seed=1", "name=other", "resume=never", "trainer.args.learning_rate=0.002"])
def test_another_experiment_does_not_go_on_with_it(smoltrain, broken, other):
    run = broken()
    (record,) = smoltrain(other, quick=AUTO if "resume" not in other else FEW)
    assert record["directory"] != run and record["resumed"] == [] and read(run)["status"] == "failed"


def test_what_has_finished_is_said_and_not_done_again(smoltrain, capsys):
    (record,) = smoltrain(quick=AUTO)
    capsys.readouterr()
    for _ in range(2):
        assert smoltrain(quick=AUTO) == []
        out = capsys.readouterr().out
        assert f"this experiment has completed already: {record['directory'].relative_to(Path.cwd())} (sft," in out
        assert "resume=never runs it once more" in out
    assert [file.parent for file in ROOT.glob("*/*/run.json")] == [record["directory"].relative_to(Path.cwd())]
    assert len(list(ROOT.glob("*/*"))) == 1


def test_a_run_whose_model_is_gone_has_not_finished(smoltrain, capsys):
    (record,) = smoltrain(quick=AUTO)
    (record["directory"] / "model").rename(record["directory"] / "moved")
    (again,) = smoltrain(quick=AUTO)
    assert again["status"] == "completed"
    smoltrain(f"model.from_run={record['directory']}", quick=AUTO, code=2)
    assert "model, is gone" in capsys.readouterr().err


def test_on_a_terminal_it_may_be_done_again(smoltrain, monkeypatch):
    smoltrain(quick=AUTO)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("rich.prompt.Confirm.ask", lambda *_, **__: True)
    (again,) = smoltrain(quick=AUTO)
    assert again["status"] == "completed"


def rows(count: int, shift: int = 0) -> str:
    pairs = ({"prompt": f"{n + shift} and 1", "completion": f"{n + shift + 1}"} for n in range(count))
    return "".join(json.dumps(pair) + "\n" for pair in pairs)


OWN = ("data.path=mine.jsonl", "data.test_rows=8", "data.test_share=0.2", *FEW[3:])


def test_rows_that_changed_are_refused_or_accepted_aloud(smoltrain, broken, capsys, monkeypatch):
    monkeypatch.setattr("test_resume.AUTO", (*OWN, "resume=auto"))
    Path("mine.jsonl").write_text(rows(40))
    run = broken()
    Path("mine.jsonl").write_text(rows(40, shift=7))
    before = (run / "run.json").read_text()
    smoltrain(quick=AUTO, code=2)
    said = capsys.readouterr().err
    assert "the training rows (mine): not what it was when this run began" in said
    assert "resume=never starts a new run, resume_changes=accept" in said
    assert (run / "run.json").read_text() == before and (run / "checkpoint-2").is_dir()
    smoltrain("resume_changes=accept", quick=AUTO)
    assert read(run)["status"] == "completed" and "(resume_changes=accept)" in capsys.readouterr().out


def test_a_run_is_named_and_what_differs_is_refused_or_applied(smoltrain, broken, capsys):
    run = broken()
    changed = ("trainer.args.learning_rate=0.5", "trainer.args.per_device_train_batch_size=4", "evaluation.max_rows=1")
    quick = tuple(o for o in FEW if not o.startswith(("trainer.args.per_device", "evaluation.max_rows")))
    capsys.readouterr()
    smoltrain(f"resume={run}", *changed, quick=quick, code=2)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said[:2]] == list(changed[:2]) and "max_rows" not in str(said)
    assert "the continued run has 0.001" in said[0] and "resume_changes=accept goes on all the same" in said[2]
    smoltrain(f"resume={run}", "resume_changes=accept", "trainer.args.weight_decay=0.1", quick=FEW, code=2)
    assert "the saved optimizer brings its own" in capsys.readouterr().err
    smoltrain(f"resume={run}", "resume_changes=accept", "trainer.args.learning_rate=0.5", quick=FEW)
    rates = [row["learning_rate"] for row in read_metrics(run) if "loss" in row]
    assert len(rates) == 6 and max(rates[:2]) <= 0.001 and min(rates[2:5]) > 0.05
    smoltrain(f"resume={run}", quick=FEW, code=2)
    assert "this run is completed" in capsys.readouterr().err
    smoltrain("resume=nowhere", quick=FEW, code=2)
    assert "resume=nowhere: no run of that name" in capsys.readouterr().err


def test_a_run_that_is_named_brings_its_own_command(smoltrain, folder, broken, capsys):
    own = folder / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\nname: mine\ntrainer: {args: {max_grad_norm: 0.7}}\n")
    run = broken("--config-dir=own", "experiment=mine")
    capsys.readouterr()
    smoltrain(f"resume={run}", "resume_changes=accept", "trainer.args.learning_rate=0.5", quick=())
    changed = {"trainer.args.learning_rate": [0.001, 0.5]}
    assert read(run)["resumed"][0]["changed"] == changed and read(run)["steps"] == 6
    assert read(run)["name"] == "mine" and read(run)["config"]["trainer"]["args"]["max_grad_norm"] == 0.7
    assert "trainer.args.learning_rate=0.5: the continued run had 0.001" in capsys.readouterr().out
    assert main(["runs", "show", str(run)]) == 0
    assert "from step 2 on trainer.args.learning_rate=0.5, before 0.001" in capsys.readouterr().out
    assert main(["reproduce", str(run)]) == 2 and "went on with another config after step 2" in capsys.readouterr().err
    assert main(["runs", "rows", str(run), "--step", "2"]) == 2
    assert "steps from 3 on are known" in capsys.readouterr().err
    assert main(["runs", "rows", str(run), "--step", "3"]) == 0


def test_a_run_does_not_end_by_being_gone_on_with(smoltrain, broken, capsys):
    run = broken()
    before = listing(run)
    smoltrain(f"resume={run}", "resume_changes=accept", "trainer.args.max_steps=2", quick=(), code=2)
    assert "it is at step 2 of 6, and with what has changed its last step would be 2" in capsys.readouterr().err
    assert listing(run) == before


def test_a_schedule_that_is_accepted_holds_from_the_first_step_on(smoltrain, broken):
    run = broken("trainer.args.warmup_steps=0")
    constant = ("trainer.args.lr_scheduler_type=constant", "trainer.args.save_steps=1", "trainer.args.warmup_steps=0")
    smoltrain(f"resume={run}", "resume_changes=accept", *constant, quick=[o for o in FEW if "save_steps" not in o])
    rates = {row["step"]: row["learning_rate"] for row in read_metrics(run) if "loss" in row}
    assert rates[2] < 0.001 and {rates[step] for step in (3, 4, 5, 6)} == {0.001}
    assert {folder.name for folder in run.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}  # as asked for now


def listing(run: Path) -> dict[str, bytes]:
    """Its files, less what Hydra writes of a command before anything of it is judged."""
    files = (path for path in run.rglob("*") if path.is_file() and ".hydra" not in path.parts)
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


BEST = ("trainer.args.load_best_model_at_end=true", "trainer.args.eval_strategy=steps", "trainer.args.eval_steps=1")
BEST += ("trainer.args.learning_rate=0.5", "trainer.args.save_steps=1", *FEW[:6], *FEW[7:])  # the first is the best


@pytest.mark.parametrize("when", ["before", "at the end"])
def test_a_best_checkpoint_that_is_damaged_becomes_no_final_model(smoltrain, broken, capsys, monkeypatch, when):
    monkeypatch.setattr("test_resume.AUTO", (*BEST, "resume=auto"))
    run = broken()
    assert {folder.name for folder in run.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (1, 2, 3)}
    weights = run / "checkpoint-1" / "model.safetensors"

    def damage() -> None:
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")

    if when == "before":
        damage()
        before = listing(run)
        smoltrain(quick=AUTO, code=2)
        assert "model.safetensors is not as it was written; it is the best so far" in capsys.readouterr().err
        assert listing(run) == before
        return
    from transformers import Trainer

    real = Trainer._finalize_training
    monkeypatch.setattr(Trainer, "_finalize_training", lambda *a, **k: (damage(), real(*a, **k))[1])
    with pytest.raises(OSError, match="is not as it was written; it is the best"):
        smoltrain(quick=AUTO)
    assert read(run)["status"] == "failed" and not (run / "model").exists()


def test_a_run_none_of_whose_checkpoints_is_sound_starts_anew_only_when_told(smoltrain, broken, capsys):
    run = broken()
    (run / "metrics.jsonl").unlink()
    before = listing(run)
    smoltrain(quick=AUTO, code=2)
    said = capsys.readouterr().err
    assert (
        f"{run / 'checkpoint-2'}: metrics.jsonl has lost lines" in said and "no checkpoint of this run is sound" in said
    )
    assert listing(run) == before
    smoltrain("resume_changes=accept", quick=AUTO)
    assert read(run)["resumed"][0]["step"] == 0 and (run / "broken-checkpoint-2").is_dir()


def test_checkpoints_without_an_optimizer_make_room_for_those_that_have_one(smoltrain, monkeypatch, broken, capsys):
    with monkeypatch.context() as patched:
        patched.setattr("test_resume.AUTO", (*FEW, "trainer.args.save_only_model=true", "resume=auto"))
        run = broken()
    capsys.readouterr()
    smoltrain(f"resume={run}", "trainer.args.save_only_model=false", quick=FEW)
    out = capsys.readouterr().out
    assert "checkpoint-2: it holds no optimizer" in out and "set aside as broken-checkpoint-2" in out
    sound = [json.loads((folder / "manifest.json").read_text()) for folder in run.glob("checkpoint-*")]
    assert {(one["step"], one["resumable"]) for one in sound} == {(4, True), (6, True)}


def test_a_directory_that_is_in_use_is_left_alone(smoltrain, folder, capsys):
    mine = folder / "mine"
    mine.mkdir()
    (mine / "report.md").write_text("of mine")
    for arguments in (("objective=eval_losss",), ("resume=never",), ()):
        smoltrain(f"hydra.run.dir={mine}", *arguments, quick=FEW, code=2)
        assert "it holds report.md; choose a directory that is new or empty" in capsys.readouterr().err
        assert listing(mine) == {"report.md": b"of mine"}
    (record,) = smoltrain("hydra.run.dir=new", quick=FEW) or [read(folder / "new")]
    assert record["status"] == "completed"
    smoltrain("hydra.run.dir=new", quick=FEW, code=2)
    assert "there is a run already, completed; choose another directory" in capsys.readouterr().err


def test_a_folder_of_the_users_in_a_run_survives_its_continuation(smoltrain, broken):
    run = broken()
    (run / "deleted-photos").mkdir()
    (run / "deleted-notes.txt").write_text("mine")
    smoltrain(quick=AUTO)
    assert read(run)["status"] == "completed"
    assert (run / "deleted-photos").is_dir() and (run / "deleted-notes.txt").read_text() == "mine"


def test_a_claimed_run_that_then_is_refused_is_what_it_was(smoltrain, broken, monkeypatch):
    run = broken()
    before = (run / "run.json").read_text()
    monkeypatch.setenv("WORLD_SIZE", "2")
    smoltrain(quick=AUTO, code=2)
    assert (run / "run.json").read_text() == before
    monkeypatch.delenv("WORLD_SIZE")
    smoltrain(quick=AUTO)
    assert read(run)["status"] == "completed"


def test_a_sweep_goes_on_with_no_run_by_name(smoltrain, broken, capsys):
    run = broken()
    smoltrain("-m", f"resume={run}", "seed=0,1", quick=FEW, code=2)
    assert "one run goes on at a time; name it without -m" in capsys.readouterr().err


def test_other_weights_to_begin_with_are_refused(smoltrain, folder, broken, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    from smoltrain.model import locate

    mine = shutil.copytree(locate("pkg://smoltrain/tiny"), folder / "mine")
    run = broken(f"model.name_or_path={mine}")
    weights = load_file(mine / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
    before = listing(run)
    smoltrain(f"model.name_or_path={mine}", quick=AUTO, code=2)
    assert "the model: not what it was when this run began" in capsys.readouterr().err
    assert listing(run) == before


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.torture)])
def test_many_starts_at_once_share_nothing(forked, folder, times):
    small = [o for o in FEW if not o.startswith(("evaluation", "trainer.args.max_steps"))]
    small += ["evaluation.max_rows=0", "trainer.args.max_steps=3", "resume=never"]
    for n in range(times):
        lives = [forked(*small, f"name=n{n}") for _ in range(8)]
        assert [life.wait(600) for life in lives] == [0] * 8
        records = [read(file.parent) for file in folder.glob(f"multirun/n{n}/*/run.json")]
        assert [record["status"] for record in records] == ["completed"] * 8
        logged = [read_metrics(file.parent) for file in folder.glob(f"multirun/n{n}/*/run.json")]
        assert {len(lines) for lines in logged} == {len(logged[0])} and len(logged[0]) > 3


def test_one_of_many_goes_on_with_an_unfinished_run(forked, folder, broken):
    run = broken()
    lives = [forked(*AUTO) for _ in range(3)]
    assert [life.wait(600) for life in lives] == [0] * 3
    assert sum("continues the failed run" in life.stdout for life in lives) == 1
    assert read(run)["status"] == "completed" and len(list(folder.glob("multirun/*/*/run.json"))) == 3


def test_the_directory_of_a_run_is_no_part_of_what_it_is():
    config = {
        "trainer": {"args": {"output_dir": "x"}},
        "model": {},
        "callbacks": {"own": {"file": "/runs/a/own.txt"}},
        "data": {},
        "hardware": {},
    }
    other = json.loads(json.dumps(config).replace("/runs/a", "${hydra:runtime.output_dir}"))
    assert config_hash(config, None, Path("/runs/a")) == config_hash(other, None)
    assert config_hash(config, None) != config_hash(other, None)
