"""The launcher: each dialogue runs as its user would run it, through a pipe or in a terminal, in an empty folder."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import resolvable
from omegaconf import OmegaConf

from smoltrain.config.compose import compose
from smoltrain.config.groups import options
from smoltrain.launch import as_override

LAUNCH = [sys.executable, "-m", "smoltrain", "launch"]
OWN = str(Path(__file__).parent / "conf")  # a user's own files: a third trainer
TRAINER_QUESTION = """
Step 3.5: Trainer Type Selection
====================================

Select the type of training to perform:
1. SFT (Supervised Fine-tuning) - Standard instruction tuning
2. DPO (Direct Preference Optimization) - Preference-based training
"""


def answers(
    experiment="",
    model="",
    parent=(),
    data=("",),
    trainer=("1",),
    peft="",
    tracking="",
    name="",
    parameters=(),
    start="N",
) -> list[str]:
    """The lines of a whole dialogue; an empty line takes a question's default."""
    hardware = ""
    return [experiment, model, *parent, *data, *trainer, hardware, peft, tracking, name, *parameters, "", start]


@pytest.fixture
def launch(forked):
    """Types the lines into `smoltrain launch` and returns what it printed, having checked its exit code."""

    def run(lines: list[str], *flags: str, code: int = 0) -> str:
        life = forked("launch", *flags, stdin="".join(f"{line}\n" for line in lines))
        assert life.wait(300) == code, life.stdout + life.stderr
        return life.stdout

    return run


def printed_command(output: str) -> str:
    return next(line for line in output.splitlines() if line.startswith("smoltrain "))


def printed_overrides(output: str) -> list[str]:
    return shlex.split(printed_command(output))[1:]


def resolved(overrides: list[str], *flags: str):
    return OmegaConf.to_container(resolvable(overrides, flags), resolve=True)


@pytest.mark.parametrize(("number", "same", "no"), [("1", [], "N"), ("2", ["trainer=dpo"], "")])
def test_a_number_is_a_trainer_and_the_defaults_are_the_config_of_the_plain_command(launch, folder, number, same, no):
    output = launch(answers(trainer=[number], start=no))
    assert TRAINER_QUESTION in output
    assert resolved(printed_overrides(output)) == resolved(same)
    assert list(folder.iterdir()) == []  # the answer to the last question was no


@pytest.mark.parametrize("refused", ["3", "0", "", "$(touch x)", "1 2"])
def test_any_other_answer_asks_again(launch, folder, refused):
    output = launch(answers(trainer=[refused, refused, "1"]))
    assert output.count("Trainer type (1-2):") == 3
    assert printed_overrides(output) == ["trainer=sft"]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "lines", [[], ["", "", "", "3"], answers()[:-1]], ids=["at once", "in the middle", "before y/N"]
)
def test_input_that_ends_early_starts_nothing(launch, folder, lines):
    assert "nothing was started" in launch(lines, code=1)
    assert list(folder.iterdir()) == []


def test_a_trainer_of_the_users_own_is_number_three(launch):
    output = launch(answers(trainer=["3"]), "--config-dir", OWN)
    assert "\n2. DPO" in output and "\n3. KTO" in output
    assert printed_overrides(output) == ["--config-dir", OWN, "trainer=kto"]
    assert resolved(["trainer=kto"], "--config-dir", OWN)["trainer"]["_target_"] in output


def test_every_file_of_conf_is_among_the_choices(launch):
    output = launch(answers())
    for group in ("experiment", "model", "data", "hardware", "peft", "tracking"):
        for number, (option, text) in enumerate(options(group, []).items(), 1):
            assert re.search(rf"^ *{number}\. {re.escape(option)} +{re.escape(text)}$", output, re.MULTILINE)


BOTH = {"experiment": "smollm2_135m_dpo", "model": "6", "trainer": ["2"]}
MENDED = ["seed", "many", "max_stepz", "run_name", "${nope}", "99", "max_steps", ""]


@pytest.mark.parametrize(
    ("lines", "command", "said"),
    [
        (answers(**BOTH), "experiment=smollm2_135m_dpo model=smollm2_135m_instruct trainer=dpo", "the experiment's"),
        (answers(data=["local", "", "local", "my.csv"]), "data=local data.path=my.csv trainer=sft", "still needed"),
        (answers(data=["nope", "sums"]), "data=sums trainer=sft", "from 1 to 8"),
        (
            answers(**BOTH),
            "experiment=smollm2_135m_dpo model=smollm2_135m_instruct trainer=dpo",
            "as the experiment smoll",
        ),
        (answers(peft="1"), "trainer=sft peft=lora", "peft        lora"),
        (answers(peft="nope\nqlora"), "trainer=sft peft=qlora", "with a name: lora, qlora"),
        (answers(parameters=["max_steps = 7"]), "trainer=sft trainer.args.max_steps=7", "max_steps             "),
        (answers(parameters=["5=7", "seed=3"]), "trainer=sft trainer.args.max_steps=7 seed=3", "Change which"),
        (
            answers(tracking="wandb", parameters=["trainer.args.run_name=a=b"]),
            "trainer=sft tracking=wandb trainer.args.run_name='a=b'",
            "a=b",
        ),
        (
            answers(parameters=["trainer=dpo", "beta=0.3"]),
            "trainer=dpo trainer.args.beta=0.3",
            "smoltrain.dpo.DPOTrainer",
        ),
        (answers(parameters=["trainer=ppo", "2"]), "trainer=dpo", "from 1 to 2"),
        (answers(name="a"), "trainer=sft name=a", "name        a"),
        (answers(name="../a\n..\n"), "trainer=sft", "one folder of multirun"),
        (answers(name="\x1b[A\n"), "trainer=sft", "cannot be shown"),
        (answers(name="[b]:smile:\n"), "trainer=sft", "name=[b]:smile:"),
        (answers(name="1e3"), "trainer=sft name='1e3'", "1e3"),
        (answers(parameters=["5", "7"]), "trainer=sft trainer.args.max_steps=7", "5. max_steps                      7"),
        (answers(parameters=["seed", "7"]), "trainer=sft seed=7", "2. seed                           7"),
        (answers(parameters=["weight_decay", "1e-2"]), "trainer=sft trainer.args.weight_decay=1e-2", "0.01"),
        (answers(parameters=MENDED), "trainer=sft", "did you mean max_steps?"),
        (
            answers(parameters=["1", "2", "beta", "0.3"]),
            "trainer=dpo trainer.args.beta=0.3",
            "smoltrain.dpo.DPOTrainer",
        ),
        (answers(trainer=["2"], parameters=["beta", "3", "1", "1"]), "trainer=sft", "args.beta=3 is not a field"),
    ],
)
def test_answers_become_this_command_and_are_shown(launch, lines, command, said):
    output = launch(lines)
    assert " ".join(printed_overrides(output)) == command
    assert said in output


TEXTS = [
    "it's",
    "a,b",
    "$(touch x)",
    "a=b, {c",
    "back\\slash\\",
    "a\\,b",
    "été #1",
    "choice(a,b)",
    "[bold]:smile:",
    "' ",
]


@pytest.mark.parametrize("typed", TEXTS)
def test_text_arrives_as_it_was_typed(typed):
    run = [f"trainer.args.run_name={as_override(typed)}", f"data.system_prompt={as_override(typed, text=True)}"]
    cfg = compose([*run, "tracking=wandb"], [])
    assert (cfg.trainer.args.run_name, cfg.data.system_prompt) == (typed, typed)


@pytest.mark.parametrize(
    ("typed", "value"), [("1e-4", 1e-4), ("7", 7), ("true", True), ("null", None), ("[1,a]", [1, "a"]), ("'7'", "7")]
)
def test_what_hydra_reads_as_a_value_stays_one(typed, value):
    given = f"trainer.args.lr_scheduler_kwargs={{x: {as_override(typed)}}}"  # whose values may be of any type
    assert compose([given], []).trainer.args.lr_scheduler_kwargs.x == value
    assert compose([f"data.system_prompt={as_override(typed, text=True)}"], []).data.system_prompt == typed


def test_the_printed_command_pasted_into_a_shell_is_the_same_config(launch, folder):
    value = "it's \"mine\", $(touch x); `touch y` a\\'b & {c} #"
    command = printed_command(launch(answers(tracking="wandb", parameters=["run_name", value])))
    looked_at = command.replace("smoltrain ", "smoltrain --cfg job ", 1)
    env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    pasted = subprocess.run(["sh", "-c", looked_at], env=env, capture_output=True, text=True, check=True)
    cfg = yaml.safe_load(pasted.stdout)
    assert cfg["trainer"]["args"]["run_name"] == value
    assert not (folder / "x").exists() and not (folder / "y").exists()


def test_asking_imports_nothing_heavy(folder):
    code = "import sys; from smoltrain.__main__ import main; sys.exit(main(['launch']) or 'torch' in sys.modules)"
    text = "\n".join(answers()) + "\n"
    assert (
        subprocess.run([sys.executable, "-c", code], input=text, text=True, stdout=subprocess.DEVNULL).returncode == 0
    )


@pytest.mark.parametrize("flags", [["--config-dir", "nowhere"], ["seed=1"], ["--config-dir"]])
def test_flags_that_it_cannot_use_are_refused_before_the_first_question(launch, flags):
    assert launch([], *flags, code=2) == ""


def test_yes_runs_what_was_shown_and_the_next_run_can_start_from_it(launch, folder):
    launch(answers(parameters=["max_steps", "1"], start="y"))
    (file,) = folder.glob("multirun/default/*/run.json")
    record = json.loads(file.read_text())
    assert (record["status"], record["trainer"], record["steps"]) == ("completed", "smoltrain.sft.SFTTrainer", 1)
    assert record["overrides"] == ["trainer=sft", "trainer.args.max_steps=1"]
    first = file.parent.relative_to(folder)
    output = launch(answers(parent=["2", "1"], trainer=["2"]))
    assert f"\n1. {first}  sft, exact_match 0.0%\n" in output and "from 1 to 1" in output
    assert printed_overrides(output) == [f"model.from_run={first}", "trainer=dpo"]
    assert "Starting Point" not in launch(answers(model="smollm2_360m"))
    assert printed_overrides(launch(answers(parent=[""]))) == ["trainer=sft"]


@pytest.fixture
def tmux(folder):
    """Runs tmux on a server of its own, which ends with the test."""
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    server = ["tmux", "-L", f"smoltrain-{os.getpid()}", "-f", os.devnull]

    def run(*arguments: str) -> str:
        return subprocess.run([*server, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout

    yield run
    subprocess.run([*server, "kill-server"], capture_output=True)


def test_it_works_under_tmux(tmux, folder):
    tmux("new-session", "-d", "-x", "160", "-y", "50", f"{shlex.join(LAUNCH)}; echo exit=$?; exec sleep 300")

    def wait_for(text: str) -> str:
        deadline = time.monotonic() + 60
        while text not in (screen := tmux("capture-pane", "-p", "-S", "-")):
            assert time.monotonic() < deadline, screen
            time.sleep(0.05)
        return screen

    questions = [
        "Experiment (",
        "Model (",
        "Data (",
        "Trainer type (",
        "Hardware (",
        "Peft (",
        "Tracking (",
        "Name of",
        "Change",
    ]
    for question in questions:
        wait_for(question)
        tmux("send-keys", "1" if question == "Trainer type (" else "", "Enter")
    screen = wait_for("Start this run?")
    assert TRAINER_QUESTION in screen and "\nsmoltrain trainer=sft\n" in screen
    tmux("send-keys", "N", "Enter")
    wait_for("exit=0")
    assert list(folder.iterdir()) == []
