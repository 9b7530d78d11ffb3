"""README is true: every command of it is run, every file of the house is there, and its figures are recent."""

import re
import shlex
from pathlib import Path

import pytest

from smoltrain.__main__ import main
from smoltrain.config import plain
from smoltrain.config.compose import compose, composed
from smoltrain.config.groups import options
from smoltrain.config.overrides import spelled_out
from smoltrain.config.resolvers import register
from smoltrain.data import sums

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True)[1:] for block in BLOCKS for line in block.strip().splitlines()]
CELLS = [shlex.split(cell)[1:] for cell in re.findall(r"`(smoltrain [^`]*)`", README) if not set("…>") & set(cell)]
EXPLAIN = (["why"], ["show"], ["diff"])
OF_RUNS = (["runs"], ["reproduce"], ["sweep"])
VERBS = (["check"], ["launch"], ["dashboard"], ["--help"], *EXPLAIN, *OF_RUNS)
GO_ON = [c for c in COMMANDS if any(a.startswith("resume=multirun/") for a in c)]
BEYOND = [c for c in COMMANDS if any(a.startswith("hydra/launcher=") for a in c)]  # which test_cluster runs
SEARCH = [c for c in COMMANDS if any(a.startswith("sweep=") for a in c)]
RUN = [c for c in COMMANDS if c[:1] not in VERBS and "--cfg" not in c and c not in [*GO_ON, *SEARCH, *BEYOND]]
CHECK = [c for c in COMMANDS if c[:1] == ["check"]]
CLUSTER = [c for c in CELLS if any(a.startswith(("hardware=", "hydra/launcher=")) for a in c)]
LOOK = [c for c in [*COMMANDS, *CELLS] if c[:1] in (["--help"], *EXPLAIN) or "--cfg" in c]


def told(form):
    """Sixty of the embedded rows, as a file of one's own has them."""
    (origin,) = form(60, 1, 0).origins.values()
    return origin.source.train.remove_columns("answer")


@pytest.fixture
def newcomer(folder):
    """A folder as README's reader has it: a file of rows, another with columns of its own names, own YAML files."""
    told(sums.conversations).to_json(str(folder / "my.jsonl"))
    told(sums.preferences).to_json(str(folder / "pairs.jsonl"))
    (folder / "my.csv").write_text("ask,reply\n" + "".join(f"{i} + 2 =,{i + 2}\n" for i in range(60)))
    for group, name, text in zip(("experiment", "sweep"), ("mine", "rates"), blocks("yaml"), strict=True):
        (folder / "my_conf" / group).mkdir(parents=True)
        (folder / "my_conf" / group / f"{name}.yaml").write_text(text)
    (folder / "tests").symlink_to(ROOT / "tests")
    return folder


@pytest.mark.parametrize("command", RUN, ids=" ".join)
def test_a_training_command_trains(newcomer, smoltrain, command):
    """Run for one step, on the tiny model where README's is downloaded, on local rows where README's are."""
    quick = ["trainer.args.max_steps=1", "evaluation.max_rows=2", "evaluation.max_new_tokens=2", "tracking=none"]
    flags = [a for a in command if a in ("-m",)]
    given = [a for a in command if a not in flags]
    folder = [given.pop(given.index("--config-dir")), given.pop(0)] if "--config-dir" in given else []
    cfg = compose(spelled_out([a for a in given if not flags or "," not in a]), folder)  # less what a sweep varies
    if cfg.model.name_or_path != "pkg://smoltrain/tiny":
        given += ["model=tiny", "hardware=cpu"]
    if cfg.data._target_.endswith("hub"):
        pairs = cfg.trainer._target_ == "smoltrain.dpo.DPOTrainer"
        given += ["data=local", f"data.path={'pairs' if pairs else 'my'}.jsonl"]
        cfg = compose([a for a in given if "=" in a], [])
    small = ["data.train_rows=16", "data.test_rows=8"] if "sums" in cfg.data._target_ else ["data.test_rows=4"]
    if any("from_run" in a for a in given):
        smoltrain()
    code = main([*flags, *folder, *given, *quick, *small])
    assert code == 0
    assert len(list(newcomer.glob("multirun/**/run.json"))) >= (4 if flags else 1)


@pytest.mark.parametrize("command", CLUSTER, ids=" ".join)
def test_a_command_for_other_machines_composes(monkeypatch, command):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    monkeypatch.setattr("smoltrain.config.resolvers.accelerator", lambda: "cuda")
    cfg = compose([a for a in command if a != "-m" and "," not in a], command)
    assert {a.partition("=")[0] for a in command} & {"hardware", "hydra/launcher"}
    assert cfg.hardware.processes in (1, 2, 8)


@pytest.mark.parametrize("command", SEARCH, ids=" ".join)
def test_a_search_ends_in_a_table(newcomer, capsys, command):
    """Of two trials, or steps, where README's has twenty or more."""
    few = {"sweep.trials=20": "sweep.trials=2", "trainer.args.max_steps=64": "trainer.args.max_steps=4"}
    given = [few.get(a, a) for a in command]
    given += [] if any("max_steps" in a for a in given) else ["trainer.args.max_steps=1"]
    quick = ["evaluation.max_rows=2", "evaluation.max_new_tokens=2", "tracking=none", "data.train_rows=16"]
    assert main([*given, *quick, "data.test_rows=8"]) == 0
    assert re.search(r"^1 +[\d.e-]+ +[\d.]+ .*best$", capsys.readouterr().out, re.MULTILINE)
    assert ["sweep", "latest"] in COMMANDS and main(["sweep", "latest"]) == 0
    assert "1 completed" in capsys.readouterr().out.replace("2 completed", "1 completed")


def test_the_own_sweep_is_the_one_that_is_typed(newcomer):
    from smoltrain.sweep.space import Space

    register()
    own = Space.of(["--config-dir", "my_conf"], ["sweep=rates"])
    typed = Space.of([], ["trainer.args.learning_rate=3e-4,1e-3,3e-3", "seed=1,2,3"])
    assert [(axis.key, axis.values) for axis in own.axes] == [(axis.key, axis.values) for axis in typed.axes]


@pytest.mark.parametrize("command", BEYOND, ids=" ".join)
def test_a_sweep_beyond_this_machine_is_one_that_can_be_started(command):
    from smoltrain.sweep.sweeper import prepared

    flags, hydras = prepared(["-m"], [a for a in command if a != "-m"])
    assert flags == ["-m"] and composed(hydras, []) and {a.partition("=")[0] for a in hydras} > {"hydra/launcher"}


@pytest.mark.parametrize("command", CHECK, ids=" ".join)
def test_a_checking_command_finds_the_run_ready(newcomer, capsys, command):
    given = [argument for argument in command if argument != "--strict"]  # sixty rows are not a thousand
    assert main([*given, "check.step=false"]) == 0
    assert "ready" in capsys.readouterr().out and not (newcomer / "multirun").exists()


def test_the_own_experiment_trains_an_adapter_stops_early_and_is_loaded_as_shown(newcomer, smoltrain, capsys):
    tiny = ("model=tiny", "hardware=cpu", "data.test_rows=4", "tracking=none", "evaluation.max_rows=0")
    still = ("trainer.args.learning_rate=0", "trainer.args.eval_steps=1", "trainer.args.max_steps=9")
    (record,) = smoltrain("--config-dir=my_conf", quick=("experiment=mine", *tiny, *still))
    assert (record["name"], record["choices"]["peft"], record["steps"]) == ("mine", "lora", 4)
    model = capsys.readouterr().out.split("\nmodel  ")[1].splitlines()[0]
    exec(blocks("python")[0].replace("multirun/…/model", model), {})
    assert capsys.readouterr().out.startswith("<|im_start|>user\nMia has 21 beads")


@pytest.fixture
def cut_off(smoltrain, monkeypatch):
    """Makes a run that fails in its fourth step and has a checkpoint of each before, and returns its directory."""
    from test_endings import FEW
    from transformers import Trainer

    def run(*arguments):
        real = Trainer.training_step

        def step(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise RuntimeError("cut off")
            return real(self, *args, **kwargs)

        often = tuple(o for o in FEW if "save_steps" not in o)
        with monkeypatch.context() as patched, pytest.raises(RuntimeError):
            patched.setattr(Trainer, "training_step", step)
            smoltrain(*arguments, "trainer.args.save_steps=1", quick=often)
        (file,) = Path().glob("multirun/*/*/run.json")
        return file.parent, (*often, "trainer.args.save_steps=1")

    return run


def test_a_broken_run_is_gone_on_with_as_shown(cut_off, smoltrain, capsys):
    ((line, *shown),) = [
        text.splitlines() for text in re.findall(r"```text\n\$ (.*?)\n```", README, re.DOTALL) if "name=long" in text
    ]
    run, quick = cut_off("name=long")
    file = run / "checkpoint-3" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    smoltrain(*shlex.split(line)[1:], quick=quick)
    said = [text for text in capsys.readouterr().out.splitlines() if text.startswith(("checkpoint-3", "continues"))]

    def general(text):
        return re.sub(r"checkpoint-\d+|\d{8}-\d{6}-\w{4}|failed|interrupted", "…", text)

    assert [*map(general, said)] == [*map(general, shown)] and len(shown) == 2


@pytest.mark.parametrize("command", GO_ON, ids=" ".join)
def test_a_named_run_is_gone_on_with(cut_off, smoltrain, command):
    run, quick = cut_off("name=long")
    smoltrain(*(f"resume={run}" if a.startswith("resume=") else a for a in command), "name=long", quick=quick)


def test_runs_are_looked_at(smoltrain, capsys):
    smoltrain("name=demo")
    smoltrain("seed=2")
    looks = [command for command in COMMANDS if command[:1] == ["runs"]]
    for command in looks:
        capsys.readouterr()
        assert main(command) == 0
        assert "20" in capsys.readouterr().out
    named = {command[1] for command in looks if len(command) > 1}
    assert {"show", "compare", "rows", "status=completed"} == named


def test_a_run_is_made_again(smoltrain, capsys):
    assert ["reproduce", "latest"] in COMMANDS
    smoltrain("name=once")
    assert main(["reproduce", "latest"]) == 0 and capsys.readouterr().out.endswith("weights  equal\n")


@pytest.mark.parametrize("command", LOOK, ids=" ".join)
def test_a_looking_command_looks(capsys, command):
    assert main(command) == int(command[0] == "diff")  # as diff has it: 1 where something differs
    assert "trainer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [c for c in CELLS if c not in [*LOOK, *CLUSTER, ["launch"], ["dashboard"]]], ids=" ".join
)
def test_a_command_in_a_table_composes(command):
    overrides = [a for a in command if "=" in a and a != "install=bash" and a != "-m"]
    assert plain(compose(overrides, []))["trainer"]["_target_"]


WRONG = "name: wrong\ndata: {on_too_long: cut}\ntrainer:\n  args:\n    eval_steps: 50\n    beta: 0\n"
SLOW = "name: slow\ndefaults: [override /trainer: dpo, _self_]\ntrainer:\n  args:\n    learning_rate: 5.0e-6\n"
SESSIONS = {
    shown[0]: "\n".join(shown[1:])
    for text in re.findall(r"```text\n\\$ (.*?)\n```", README, re.DOTALL)
    if (shown := text.splitlines()) and not re.search(" check | name=long", shown[0])
}


@pytest.mark.parametrize("line", SESSIONS)
def test_what_a_command_prints_is_what_readme_shows(newcomer, capsys, line):
    for name, text in {"wrong": WRONG, "slow": SLOW}.items():
        (newcomer / "my_conf" / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n# Mine\n{text}")
    main(shlex.split(line)[1:])
    said = capsys.readouterr()
    assert (said.out or said.err).strip() == SESSIONS[line]


def test_every_make_target_named_is_there():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)`", README)) | {"setup", "train"}
    assert named <= targets and {"demo", "bench", "torture", "tiny"} <= named


def test_the_picture_of_the_house_is_true():
    picture = README.split("## The house")[1].split("```")[1]
    names = re.findall(r"[\w/]+\.(?:py|yaml)|[a-z_]+/", picture)
    assert "train.py" in names and "conf/" in names
    for name in names:
        assert any((ROOT / where / name).exists() for where in ("", "conf", "smoltrain")), name
    files = {f.name for f in (ROOT / "smoltrain").glob("*.py")} - {"__init__.py"}
    folders = {f"{f.name}/" for f in (ROOT / "conf").iterdir() if f.is_dir()}
    assert files <= set(names) and folders <= set(names)


def test_every_option_that_readme_names_exists():
    for group in ("trainer", "model", "data", "hardware", "perf", "peft", "tracking", "experiment", "sweep"):
        known = {
            *options(group, []),
            *options(group, ["--config-dir", str(ROOT / "tests" / "conf")]),
            "mine",
            "ppo",
            "dpoo",
            "wrong",
            "slow",
            "rates",
        }
        for option in re.findall(rf"(?<![\w.]){group}=([\w.]+)", README):
            assert option in known, f"{group}={option}"


def test_the_messages_in_troubleshooting_are_the_real_ones(folder, capfd):
    for arguments, cell in (
        (["trainer=ppo"], "Choose one of: dpo, sft"),
        (["trainer.args.lerning_rate=1"], None),
        (["learning_rate=1"], None),
    ):
        assert main(arguments) == 2
        error = capfd.readouterr().err.strip().removesuffix("  (command line)")
        assert (cell or error) in README and (cell or error) in error
