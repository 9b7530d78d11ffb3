"""A sweep is one object: each experiment once, in a process of its own, whatever becomes of the others."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from survival import came_to, differing
from test_endings import RUN, equal

from smoltrain.__main__ import main
from smoltrain.config.resolvers import register
from smoltrain.runs import read, there
from smoltrain.sweep import local, record
from smoltrain.sweep.space import Space

TINY = ("data.train_rows=24", "data.test_rows=8", "evaluation.max_rows=0", "tracking=none")
TINY += ("trainer.args.per_device_train_batch_size=2", "trainer.args.max_steps=2")
ANSWERING = ("evaluation.max_rows=2", "evaluation.max_new_tokens=2")
SAVING = ("trainer.args.save_steps=1", "trainer.args.logging_steps=1", "trainer.args.max_steps=4")

# In the process of each trial, what its seed says happens in its third step.
FATES = """
import os, torch, transformers
real = transformers.Trainer.training_step
def step(self, *given, **named):
    if self.state.global_step == 2:
        if self.args.seed == 1: raise RuntimeError('it broke')
        if self.args.seed == 2: os.kill(os.getpid(), 9)
        if self.args.seed == 3: return real(self, *given, **named) * float('nan')
        if self.args.seed == 4: raise MemoryError
    return real(self, *given, **named)
transformers.Trainer.training_step = step
"""

# In the process of each trial, steps that take the longer the greater its seed, and cost nothing.
PACED = """
import time, transformers
stepped = transformers.Trainer.training_step
def paced(self, *given, **named):
    time.sleep(0.3 * self.args.seed)
    return stepped(self, *given, **named)
transformers.Trainer.training_step = paced
"""


@pytest.fixture
def sweep(forked, folder):
    """Runs a sweep in a process of its own, and returns what it printed and its trials by what is varied."""

    def run(*arguments: str, code: int = 0, program: str = RUN) -> tuple[str, dict[str, record.Trial]]:
        life = forked("-m", *TINY, *arguments, code=program)
        assert life.wait(300) == code, life.stdout + life.stderr
        return life.stdout + life.stderr, trials(folder)

    return run


def trials(folder: Path) -> dict[str, record.Trial]:
    """Those of the last sweep."""
    found = record.sweeps(folder / "multirun")
    return {written(trial.overrides): trial for trial in record.read(found[0]).trials} if found else {}


def written(overrides: dict) -> str:
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in overrides.items())


def logs(folder: Path) -> dict[Path, str]:
    """When each record of a run was written last."""
    return {file.parent: file.read_text() for file in folder.glob("multirun/**/run.json")}


def test_each_trial_is_the_run_that_it_would_be_alone(sweep, forked, folder):
    said, done = sweep(*ANSWERING, "trainer=sft,dpo", "seed=0,1")
    assert [*done] == ["trainer=sft seed=0", "trainer=sft seed=1", "trainer=dpo seed=0", "trainer=dpo seed=1"]
    for trial in done.values():
        alone = forked(
            *trial.run.record["overrides"], "resume=never", f"hydra.run.dir={folder / 'alone' / trial.directory.name}"
        )
        assert alone.wait() == 0, alone.stderr
        assert equal(trial.directory, folder / "alone" / trial.directory.name)
        assert read(folder / "alone" / trial.directory.name)["config_hash"] == trial.config_hash
        assert "completed in" in (trial.directory / "log.txt").read_text()
    assert "[4/4]" in said and "4 trials: 4 completed" in said and "4 s left" not in said.splitlines()[-1]
    assert {"results.csv", "results.json", "sweep.json", "sweep_trainer-sft.png"} <= {
        p.name for p in trial.directory.parent.iterdir()
    }


def test_the_same_command_runs_what_is_missing_and_nothing_else(sweep, folder, capsys):
    _, done = sweep("seed=0,1")
    before = logs(folder)
    said, again = sweep("seed=0,1")
    assert "continues the sweep" in said and logs(folder) == before and [*again] == [*done]
    _, more = sweep("seed=0,1,2")
    assert {path: text for path, text in logs(folder).items() if path in before} == before
    assert [*more] == [*done, "seed=2"] and len(record.sweeps(folder / "multirun")) == 1
    _, fewer = sweep("seed=2,0")  # another sweep, whose trials have all been run
    assert {trial.directory.name for trial in fewer.values()} == {"0_seed-0", "2_seed-2"}
    assert len(logs(folder)) == 3 and len(record.sweeps(folder / "multirun")) == 2
    sweep("seed=0,1", "resume=never")
    assert len(logs(folder)) == 5 and len(record.sweeps(folder / "multirun")) == 3


def test_what_is_one_experiment_is_run_once(sweep, folder):
    said, done = sweep("data.workers=1,2", "seed=0")
    assert len(done) == 1 and len(logs(folder)) == 1 and "1 trial: 1 completed" in said


def test_a_trial_that_comes_to_nothing_is_a_row_and_stops_no_other(sweep, folder):
    said, done = sweep("seed=0,1,2,3,4,5", *SAVING, code=1, program=FATES + RUN)
    status = {name: trial.status for name, trial in done.items()}
    assert status == {
        "seed=0": "completed",
        "seed=1": "failed",
        "seed=2": "interrupted",
        "seed=3": "diverged",
        "seed=4": "failed",
        "seed=5": "completed",
    }
    assert "it broke" in said and "out of memory" in said
    before = logs(folder)
    said, again = sweep("seed=0,1,2,3,4,5", *SAVING, code=3)  # mended: what failed goes on, what diverged stays so
    assert {name for name, trial in again.items() if trial.status == "completed"} == {*status} - {"seed=3"}
    assert {path.name for path, text in logs(folder).items() if before[path] != text} == {
        f"{n}_seed-{n}" for n in (1, 2, 4)
    }
    assert [one["step"] for one in read(again["seed=2"].directory)["resumed"]] in ([1], [2])  # which was sealed by then


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.torture)])
def test_a_signal_reaches_every_trial_and_the_same_command_goes_on(sweep, forked, folder, number):
    command = ("seed=0,1,2", *SAVING, "trainer.args.max_steps=8")
    life = forked("-m", *TINY, *command, code=PACED + RUN)
    life.until("[1/3]")
    life.kill(number)
    assert life.wait() == 143, life.stderr
    before = {name: trial.status for name, trial in trials(folder).items()}
    assert set(before.values()) <= {"completed", "preempted", "pending"} and "completed" in before.values()
    ended = logs(folder)
    _, done = sweep(*command)
    assert {trial.status for trial in done.values()} == {"completed"}
    assert all(logs(folder)[path] == text for path, text in ended.items() if json.loads(text)["status"] == "completed")


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.torture)])
def test_a_sweep_that_is_killed_repeats_no_trial_and_loses_none(forked, folder, figure, kills):
    command = ("-m", *TINY, "seed=0,1,2,3", *SAVING)
    rng, hits, repeated = random.Random(kills), 0, 0
    ended: dict[Path, str] = {}
    while True:
        life = forked(*command)
        try:
            assert life.wait(rng.uniform(1, 4) if hits < kills else 300) == 0, life.stderr
            break
        except TimeoutError:
            life.kill()
            life.wait()
            hits += 1
        now = {path: text for path, text in logs(folder).items() if json.loads(text)["status"] == "completed"}
        repeated += sum(now.get(path) != text for path, text in ended.items())
        ended = now
    done = trials(folder)
    assert repeated == 0 and len(done) == 4 and {trial.status for trial in done.values()} == {"completed"}
    assert len(logs(folder)) == 4
    figure("kill -9 of a whole sweep: no trial repeated, none lost", hits, hits)


def test_where_a_fork_is_unsafe_a_process_is_begun_anew(sweep, folder):
    (folder / "own" / "experiment").mkdir(parents=True)
    (folder / "own" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ntrainer: {args: {adam_beta1: 0.8}}\n"
    )
    own = ("--config-dir=own", "experiment=mine")
    sweep(*own, "name=forked")
    spawn = "import smoltrain.sweep.local as m; m.unsafe_to_fork = lambda: True"
    sweep(*own, "name=spawned", program=f"{spawn}\n{RUN}")
    (forked,), (spawned,) = (folder.glob(f"multirun/{name}/*/0") for name in ("forked", "spawned"))
    assert equal(forked, spawned)


@pytest.mark.parametrize(("gpus", "processes", "own"), [("47", 1, ["4", "7", "4"]), ("0123", 2, ["0,1", "2,3", "0,1"])])
def test_more_trials_than_gpus_share_them(folder, monkeypatch, gpus, processes, own):
    seen, config = [], OmegaConf.create({"hardware": {"processes": processes}})
    monkeypatch.setattr(local, "devices", lambda: [*gpus])
    monkeypatch.setattr(local, "unsafe_to_fork", lambda: True)
    monkeypatch.setattr(local, "spawned", lambda job, environment: seen.append(environment["CUDA_VISIBLE_DEVICES"]))
    for slot in range(3):
        local.Local(jobs=3).start(local.Job(slot, config, folder / str(slot), slot=slot))
    assert seen == own


def test_who_reads_no_further_loses_no_results(sweep, forked, folder):
    sweep("seed=0,1")
    (done,) = folder.glob("multirun/*/*/sweep.json")
    (done.parent / "results.csv").unlink()
    closed = "import os; read, write = os.pipe(); os.close(read); os.dup2(write, 1)"
    life = forked("sweep", "latest", code=f"{closed}\n{RUN}")
    assert life.wait() == 1 and life.stderr == "" and (done.parent / "results.csv").exists()


def test_rows_that_have_changed_are_not_taken_for_those_of_before(sweep, folder):
    pairs = [{"prompt": f"{n} and 1", "completion": f"{n + 1}"} for n in range(40)]
    own = [o for o in TINY if not o.startswith("data.")]
    (folder / "mine.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = ("-m", "data.path=mine.jsonl", "data.test_share=0.2", *own, "seed=0,1")
    assert main([*command]) == 0
    (folder / "mine.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs[1:]))
    before = logs(folder)
    assert main([*command]) == main([*command, "data.workers=2"]) == 2 and logs(folder) == before
    (run,) = folder.glob("multirun/default/*/1_seed-1/run.json")
    run.write_text(run.read_text().replace('"completed"', '"failed"'))  # nor for those that one that failed began with
    before = logs(folder)
    assert main([*command]) == 2 and logs(folder) == before
    assert main([*command, "resume=never"]) == 0 and len(logs(folder)) == 4


def test_halving_stops_the_worst_and_goes_on_with_the_best(sweep, forked, folder):
    rates = "trainer.args.learning_rate=1e-5,1e-4,1e-3,3e-3"
    level = ("trainer.args.lr_scheduler_type=constant", "trainer.args.max_steps=8")
    said, done = sweep("sweep=halving", rates, *level, *ANSWERING)
    status = {name: (trial.status, trial.run.steps) for name, trial in done.items()}
    assert sorted(status.values()) == [("completed", 8)] + [("stopped", 2)] * 3
    [best] = [name for name, trial in done.items() if trial.status == "completed"]
    early = {name: trial.run.record["paused"]["2"] for name, trial in done.items()}
    assert min(early, key=early.get) == best and "3 stopped" in said
    assert all(f"stopped at {value:.4f}" in said for name, value in early.items() if name != best)
    assert f"paused at step 2  eval_loss {early[best]:.4f}" in said and "preempted" not in said
    before = logs(folder)
    sweep("sweep=halving", rates, *level, *ANSWERING)
    assert logs(folder) == before
    assert forked(*TINY, *ANSWERING, *level, f"trainer.args.{best}", "name=whole").wait() == 0
    (whole,) = folder.glob("multirun/whole/*")
    assert equal(done[best].directory, whole)  # paused and gone on with, or not


def test_tpe_asks_for_trials_until_there_are_enough(sweep, folder):
    pytest.importorskip("optuna")
    rate = "trainer.args.learning_rate=tag(log,interval(1e-5,1e-2))"
    _, done = sweep("sweep=tpe", "sweep.trials=3", rate)
    assert len(done) == 3 and {trial.status for trial in done.values()} == {"completed"}
    before = logs(folder)
    _, again = sweep("sweep=tpe", "sweep.trials=3", rate)
    assert logs(folder) == before and [*again] == [*done]


def test_tpe_runs_again_what_failed(sweep, folder):
    pytest.importorskip("optuna")
    command = ("sweep=tpe", "sweep.trials=2", "seed=1", "trainer.args.adam_beta1=interval(0.8,0.9)", "threads=1")
    command += ("trainer.args.max_steps=4",)
    said, done = sweep(*command, code=1, program=FATES + RUN)
    assert {trial.status for trial in done.values()} == {"failed"} and "[2/2]" in said and "[1/1]" not in said
    _, again = sweep(*command)
    assert [*again] == [*done] and {trial.status for trial in again.values()} == {"completed"}


def test_values_that_do_not_go_together_cost_a_search_one_trial(sweep, folder):
    pytest.importorskip("optuna")
    best = (
        "load_best_model_at_end=true",
        "save_strategy=steps",
        "eval_strategy=steps",
        "save_steps=2,3",
        "eval_steps=1,2",
    )
    best += ("max_steps=4",)
    command = ("sweep=tpe", "sweep.trials=4", "hydra.launcher.jobs=1", *(f"trainer.args.{one}" for one in best))
    said, done = sweep(*command)
    assert len(done) == 3 and "save_steps=3" in said and "3 trials, searched by tpe: 3 completed" in said


def test_latest_is_one_run_for_all_trials_whenever_they_run(sweep, forked, folder):
    assert forked(*TINY, "trainer.args.max_steps=1").wait() == 0
    (first,) = logs(folder)
    command = ("model.from_run=latest", "seed=0,1")
    _, done = sweep(*command)
    assert {trial.run.record["parent"]["directory"] for trial in done.values()} == {str(first)}
    before = logs(folder)
    said, _ = sweep(*command)
    assert "continues the sweep" in said and logs(folder) == before
    _, more = sweep(command[0], "seed=0,1,2")
    assert more["seed=2"].run.record["parent"]["directory"] == str(first) and len(logs(folder)) == 4
    said, other = sweep(
        command[0], "seed=3,4", "trainer.args.weight_decay=0.1"
    )  # another sweep, for which it is another one
    assert other["seed=3"].run.record["parent"]["directory"] != str(first)
    assert f"{more['seed=2'].directory.name}, for all trials" in said


def test_a_search_over_what_has_become_another_experiment_is_another_search(sweep, folder):
    (folder / "own" / "experiment").mkdir(parents=True)
    mine = folder / "own" / "experiment" / "mine.yaml"
    command = ("--config-dir=own", "experiment=mine", "name=search", "sweep=random", "sweep.trials=1", "seed=0")
    for rate in (0.001, 0.002):
        mine.write_text(f"# @package _global_\ntrainer: {{args: {{learning_rate: {rate}}}}}\n")
        sweep(*command, "trainer.args.weight_decay=0,0.1")
    said, _ = sweep(*command, "trainer.args.weight_decay=0,0.1")
    (older, newer) = record.sweeps(folder / "multirun")[::-1]
    assert len(record.read(older).trials) == len(record.read(newer).trials) == 1 and "continues the sweep" in said
    shown = record.read(newer).command
    assert {"--config-dir=own", "experiment=mine"} <= {*shown} and "resume=never" not in shown


def test_a_key_that_is_added_is_of_the_trials_that_were_there_too(sweep, folder):
    sweep("seed=0,1")
    _, done = sweep("trainer=sft,dpo", "seed=0,1")
    assert [*done] == ["trainer=sft seed=0", "trainer=sft seed=1", "trainer=dpo seed=0", "trainer=dpo seed=1"]
    assert len(logs(folder)) == 4 and done["trainer=sft seed=0"].directory.name == "0_seed-0"


def test_of_one_sweep_one_process_is_at_it(forked, folder):
    command = ("-m", *TINY, "seed=1,2", "trainer.args.max_steps=200", "threads=2")
    first = forked(*command, code=PACED + RUN)
    first.until_there(folder / "multirun", "*/*/*/run.json")
    second = forked(*command)
    assert second.wait() == 2 and "this sweep is running" in second.stderr
    typed = forked(*command, "hydra.sweep.dir=mine", "name=other", code=PACED + RUN)
    typed.until_there(folder / "mine", "sweep.json")
    again = forked("-m", *TINY, "seed=5,6", "hydra.sweep.dir=mine")
    assert again.wait() == 2 and "hydra.sweep.dir=mine: another sweep is there" in again.stderr
    for life in (first, typed):
        life.kill(signal.SIGTERM)
        assert life.wait() == 143
        assert "2 trials" in life.stdout and "cut off" in life.stdout and "go on" in life.stdout


SLOW = """
import os, time, smoltrain.preflight
from pathlib import Path
def slow(cfg):
    Path('writing').write_text(str(os.getpid()))
    Path('writing').rename('worker')
    time.sleep(60)
smoltrain.preflight.preflight = slow
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_while_rows_are_prepared_leaves_no_process(sweep, forked, folder, number):
    life = forked("-m", *TINY, "seed=0,1", code=SLOW + RUN)
    life.until_there(folder, "worker")
    worker = int((folder / "worker").read_text())
    again = forked("-m", *TINY, "seed=0,1")
    assert again.wait() == 2 and "this sweep is running" in again.stderr
    life.kill(number)
    assert life.wait() == (143 if number == signal.SIGTERM else -9)
    last = time.monotonic() + 10
    while there(worker) and time.monotonic() < last:
        time.sleep(0.05)
    assert not there(worker)
    assert number == signal.SIGKILL or not [*folder.glob("multirun/**/sweep.json")]
    _, done = sweep("seed=0,1")  # which has begun nothing, and is taken up
    assert len(record.sweeps(folder / "multirun")) == 1 and len(done) == 2


def test_records_that_cannot_be_read_and_runs_that_have_moved_stop_nothing(sweep, folder):
    sweep("seed=0,1")
    (broken,) = folder.glob("multirun/default/*/0_seed-0")
    (broken / "run.json").write_text("")
    said, done = sweep("seed=0,1", code=1)
    assert done["seed=1"].status == "completed" and "unreadable" in said and "0_seed-0" in said
    sweep("seed=1,2")
    (folder / "elsewhere").mkdir()
    (folder / "multirun").rename(folder / "elsewhere" / "multirun")
    (newest, older) = record.sweeps(folder / "elsewhere" / "multirun")
    assert {trial.status for trial in record.read(newest).trials} == {"completed"}
    shutil.rmtree(older)
    (folder / "elsewhere" / "multirun").rename(folder / "multirun")
    _, again = sweep("seed=1,2")
    assert {trial.directory.parent.name for trial in again.values()} == {newest.name}


def test_a_sweep_is_kept_where_it_is_typed_and_a_preset_may_type_it(sweep, forked, folder):
    sweep("seed=0", "hydra.sweep.dir=a")
    said, _ = sweep("seed=0", "hydra.sweep.dir=b")
    assert "continues" not in said and (folder / "b" / "sweep.json").exists()
    (folder / "own" / "sweep").mkdir(parents=True)
    text = "# One\ndefaults: [base, _self_]\nparams: {name: cited, hydra.sweep.dir: 'out/${name}', seed: 0}\n"
    (folder / "own" / "sweep" / "mine.yaml").write_text(text.replace("seed: 0", "seed: '0,1'"))
    life = forked("--config-dir=own", "sweep=mine", *TINY)
    assert life.wait() == 0, life.stderr
    (folder / "far" / "away").mkdir(parents=True)
    sweep("seed=0")
    (folder / "multirun" / "link").symlink_to(folder / "far" / "away")  # what has been run, is not run through it
    sweep("seed=0", "hydra.sweep.dir=multirun/link/sweep")
    assert len([*folder.glob("multirun/default/*/*/run.json")]) == 1 and not [*folder.glob("far/**/run.json")]
    assert [trial.status for trial in record.read(folder / "far" / "away" / "sweep").trials] == ["completed"]
    assert {path.parent.name for path in folder.glob("out/cited/*/run.json")} == {"0_seed-0", "1_seed-1"}


def test_a_key_is_the_same_with_whatever_sign_and_values_may_be_nodes():
    register()
    space = Space.of([], ["sweep=seeds", "++seed=7,8"])
    assert [(axis.key, axis.values, axis.sign) for axis in space.axes] == [("seed", [7, 8], "++")]
    assert "++seed=7" in space.first.overrides and space.first.cfg.seed == 7
    kinds = "trainer.args.lr_scheduler_kwargs={num_decay_steps:1},{num_decay_steps:2}"
    space = Space.of(
        [], [kinds, "trainer.args.lr_scheduler_type=warmup_stable_decay", "trainer.args.max_grad_norm=inf,1"]
    )
    trial = space.trial({axis.key: axis.values[0] for axis in space.axes})
    assert trial.cfg.trainer.args.lr_scheduler_kwargs == {"num_decay_steps": 1}
    assert trial.cfg.trainer.args.max_grad_norm == float("inf")


def test_a_reviewed_file_is_a_sweep(forked, folder):
    (folder / "own" / "sweep").mkdir(parents=True)
    text = "# Two rates\ndefaults: [base, _self_]\nparams: {trainer: dpo, seed: [0, 1], trainer.args.beta: 0.2}\n"
    (folder / "own" / "sweep" / "mine.yaml").write_text(text)
    assert [axis.values for axis in Space.of(["--config-dir=own"], ["sweep=mine"]).axes] == [[0, 1]]
    life = forked("--config-dir=own", "+sweep=mine", *TINY, "seed=3,4")  # what is typed wins
    assert life.wait() == 0, life.stderr
    done = trials(folder)
    assert [*done] == ["seed=3", "seed=4"]
    overrides = done["seed=3"].run.record["overrides"]
    assert {"trainer=dpo", "trainer.args.beta=0.2", "seed=3"} <= {*overrides}
    assert not [o for o in overrides if o.startswith("sweep")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-m", "seed=range(3,3)"), "seed=range(3,3): there is no value in it"),
        (("-m", "trainer.args.learnin_rate=1,2"), "did you mean trainer.args.learning_rate?"),
        (("-m", "seed=1,2", "objective=nothing"), "objective=nothing: what is measured is called"),
        (("-m", "trainer.args.learning_rate=interval(1,2)"), "a grid has no end in an interval"),
        (("-m", "data.path=nowhere.jsonl", "seed=1,2"), "nowhere.jsonl: there is no such file"),
        (("-m", "seed=1,2", "resume=latest"), "one run goes on at a time"),
        (("sweep=halving", "seed=1,2", "trainer.args.learning_rate=1,2"), "trainer.args.max_steps"),
        (("sweep=halving", "seed=1,2", "trainer.args.max_steps=8"), "lr_scheduler_type=cosine: sweep=halving compares"),
        (("sweep=nothing", "seed=1,2"), "sweep=nothing: there is no such option"),
        (("sweep=tpe", "trainer=sft,dpoo,dpo", "sweep.trials=6"), "trainer=dpoo: there is no such option"),
        (("sweep=tpe", "sweep.trials=0", "seed=1,2"), "sweep.trials=0: a sweep has at least one trial"),
        (("sweep=tpe", "trainer=sft,dpo", "sweep.trials=2"), "eval_loss measures another thing"),
        (("sweep=tpe", "evaluation.max_rows=2,4", "objective=exact_match"), "exact_match measures another thing"),
        (("-m", "seed=1,2", "pause_at=2"), "pause_at=2: in a sweep, sweep=halving is what pauses"),
        (("-m", "seed=1,2", "seed=3"), "seed=3: seed is given twice"),
        (("-m", "seed=1,2", "name=a,b"), "name=a,b: one for the whole sweep"),
        (("-m", "sweep=null", "seed=1,2"), "one way to choose trials"),
        (("sweep=tpe,random", "seed=1,2"), "sweep=tpe,random: one way to choose trials"),
        (("sweep.trials=many", "seed=1,2"), "sweep.trials=many"),
        (("sweep.trails=3", "seed=1,2"), "sweep.trails=3 is not a field of"),
        (("-m", "seed=1,2", "hydra.sweep.dir=mine"), "hydra.sweep.dir=mine: it holds report.md"),
    ],
)
def test_bad_input_is_said_before_the_first_trial(folder, capfd, arguments, message):
    (folder / "mine").mkdir()
    (folder / "mine" / "report.md").write_text("mine")
    few = [o for o in TINY if "max_steps" not in o and not (o.startswith("data.") and "data.path" in str(arguments))]
    few = [o for o in few if o.partition("=")[0] not in str(arguments)]
    assert main([*arguments, *few]) == 2
    said = capfd.readouterr().err
    assert message in said and "Traceback" not in said
    assert not [*folder.glob("multirun/**/run.json")] and [*folder.glob("mine/*")] == [folder / "mine" / "report.md"]


def test_the_directory_of_another_sweep_is_refused(sweep, folder):
    sweep("seed=0", "hydra.sweep.dir=mine", "name=one")
    said, _ = sweep("seed=1", "hydra.sweep.dir=mine", code=2)
    assert "hydra.sweep.dir=mine: another sweep is there" in said


def test_a_pause_costs_nothing(forked, folder):
    command = (*TINY, *ANSWERING, *SAVING, "trainer=dpo")
    calm = forked(*command, "name=calm")
    assert calm.wait() == 0, calm.stderr
    assert forked(*command, "pause_at=2").wait() == 143
    (run,) = folder.glob("multirun/default/*")
    stopped = read(run)
    assert (stopped["status"], stopped["steps"], [*stopped["paused"]]) == ("preempted", 2, ["2"])
    assert forked(*command).wait() == 0
    for name in ("calm", "default"):
        (folder / name).mkdir()
        (folder / "multirun" / name).rename(folder / name / "multirun")
    found = differing(came_to(folder / "calm"), came_to(folder / "default"))
    assert {*found} <= {"run.json paused", "run.json name", "run.json overrides"}
