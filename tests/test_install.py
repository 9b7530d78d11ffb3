"""How it stands up: what a quick answer imports, the wheel in a fresh environment, own YAML files, make's targets."""

import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

from smoltrain.__main__ import main
from smoltrain.config.groups import options
from smoltrain.usage import VERBS

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "trl", "datasets", "peft", "accelerate", "trackio", "pandas", "numpy")
QUICK = [
    ["--help"],
    ["--version"],
    ["--cfg", "job"],
    ["trainer=ppo"],
    ["trainer.args.lerning_rate=1"],
    ["data=local"],
    ["why", "trainer.args.beta", "trainer=dpo"],
    ["show", "trainer=dpo"],
    ["diff", "", "trainer=dpo"],
    ["completion", "bash"],
    ["completion", "bash", "--", "smoltrain trainer.args.be"],
]


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_a_quick_answer_imports_nothing_heavy(arguments):
    program = (
        "import sys\nfrom smoltrain.__main__ import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        f"print('HEAVY', sorted(set(sys.modules) & set({HEAVY})))"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_version_is_ours(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"smoltrain {metadata.version('smoltrain')}\n"


def test_help_names_every_option_with_its_description(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for group in ("trainer", "model", "data", "hardware", "perf", "peft", "tracking", "experiment"):
        for option, description in options(group, []).items():
            assert description and any(option in line and description in line for line in text.splitlines())
    assert len(text.splitlines()) <= 67 and max(map(len, text.splitlines())) <= 100  # one screen
    assert "base " not in [line.strip().split(" ")[0] + " " for line in text.splitlines()]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_is_its_screen(verb, capsys):
    assert main([verb, "--help"]) == 0 and capsys.readouterr().out == VERBS[verb]
    assert main([f"{verb}x"]) == 2 and f"did you mean {verb}?" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["--config-dir={}", "hydra.searchpath=[file://{}]"])
def test_a_users_own_folder_joins(smoltrain, folder, how):
    own = folder / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\n# Mine\nname: mine\nseed: 11\n")
    (record,) = smoltrain(how.format(folder / "own"), "experiment=mine")
    assert (record["name"], record["seed"], record["directory"].parent.name) == ("mine", 11, "mine")
    assert f"| command | `smoltrain --config-dir {folder / 'own'} " in (record["directory"] / "report.md").read_text()
    assert options("experiment", [how.format(folder / "own")])["mine"] == "Mine"


def test_the_wheel_runs_in_a_fresh_environment(folder, monkeypatch):
    monkeypatch.delenv("TRACKIO_DIR")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = folder.glob("smoltrain-*.whl")
    venv.create(folder / "fresh")
    python = folder / "fresh" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # Its dependencies are those of this environment, whose own (editable) smoltrain a .pth file does not bring along.
    (site,) = folder.glob("fresh/lib/python*/site-packages")
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(here)
    command = folder / "fresh" / "bin" / "smoltrain"
    work = folder / "elsewhere"
    work.mkdir()

    def run(*arguments: str) -> str:
        done = subprocess.run([command, *arguments], cwd=work, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import smoltrain.config as c; print(c.CONF)"
    found = subprocess.run([python, "-c", where], cwd=work, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(site / "smoltrain" / "conf")
    assert run("--cfg", "job") == (Path(__file__).parent / "golden.yaml").read_text()
    few = ("data.train_rows=8", "data.test_rows=4", "evaluation.max_rows=2", "trainer.args.max_steps=1")
    assert "completed" in run(*few, "trainer=dpo")
    assert (work / "multirun" / "default").is_dir() and (work / "multirun" / "trackio").is_dir()


def test_an_editable_install_reads_the_checkout():
    from smoltrain.config import CONF

    assert CONF == ROOT / "conf"


def test_make_help_lists_every_target():
    text = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    targets = "setup train dpo demo sweep launch dashboard real tiny test torture lint bench clean"
    assert [line.split()[1] for line in text.splitlines()] == ["help", *targets.split()]


def test_make_setup_is_quick_the_second_time():
    done = subprocess.run(
        ["make", "-n", "-o", "pyproject.toml", "-o", "constraints.txt", "setup"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install" not in done.stdout
