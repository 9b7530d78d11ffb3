"""The main job as a newcomer runs it: whole commands, full size, in processes of their own, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Runs smoltrain where any connection, and any look-up of a name, is an error that no library can miss.
OFFLINE = """
import sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto") and not isinstance(args[-1], str):
        sys.stderr.write(f"NETWORK {event} {args}\\n")
        raise SystemExit(99)

sys.addaudithook(refuse)
from smoltrain.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One folder for all runs, and the newcomer's home."""
    return tmp_path_factory.mktemp("demo")


def outcome(home: Path, returncode: int, out: str, error: str, before: set[Path]) -> tuple[dict, str]:
    """The record of the run that is new in a folder, and what it printed."""
    assert returncode == 0 and "NETWORK" not in error, error
    (file,) = set(home.glob("multirun/*/*/run.json")) - before
    return json.loads(file.read_text()), out


@pytest.fixture(scope="module")
def sft(home):
    """The first run, which knows nothing of the tests' environment but that it has one core."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "HF_TOKEN": "hf_none", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", OFFLINE, "name=demo"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    return outcome(home, done.returncode, done.stdout, done.stderr, set())


@pytest.fixture
def run(home, forked):
    """Runs one more command offline and returns its record and what it printed."""

    def command(*arguments: str) -> tuple[dict, str]:
        before = set(home.glob("multirun/*/*/run.json"))
        life = forked(*arguments, code=OFFLINE, cwd=home, env=os.environ | {"HF_TOKEN": "hf_none"})
        return outcome(home, life.wait(600), life.stdout, life.stderr, before)

    return command


def test_sft_gains_forty_points_and_shows_it(sft):
    record, out = sft
    metrics = record["metrics"]
    assert metrics["exact_match"] - metrics["before/exact_match"] >= 0.4
    assert metrics["eval_loss"] < metrics["before/eval_loss"] / 10
    for name in ("exact_match", "before/exact_match"):
        assert f"{metrics[name]:.1%}" in out
    assert "step 10/125" in out and "lr " in out  # plain lines where there is no terminal


def test_dpo_learns_the_preferences_and_forgets_nothing(run, sft):
    record, out = run("name=demo", "trainer=dpo", "model.from_run=demo")
    metrics = record["metrics"]
    assert metrics["eval_rewards/accuracies"] >= 0.9 and f"{metrics['eval_rewards/accuracies']:.1%}" in out
    assert metrics["exact_match"] >= sft[0]["metrics"]["exact_match"] - 0.01
    assert record["parent"]["config_hash"] == sft[0]["config_hash"]


@pytest.mark.parametrize(
    ("trainer", "metric", "reached"), [("sft", "exact_match", 0.4), ("dpo", "eval_rewards/accuracies", 0.9)]
)
def test_a_crippled_run_reaches_none_of_it(run, trainer, metric, reached):
    few = ("data.train_rows=64", "data.test_rows=64", "evaluation.max_rows=64")
    record, _ = run(f"trainer={trainer}", "trainer.args.learning_rate=0", *few)
    metrics = record["metrics"]
    assert metrics[metric] - metrics.get(f"before/{metric}", 0) < reached / 2
    assert metrics["eval_loss"] == pytest.approx(metrics["before/eval_loss"], rel=1e-4)


def test_the_embedded_model_is_small_and_whole():
    from hydra.utils import instantiate

    from smoltrain.config import PACKAGE
    from smoltrain.config.compose import compose

    files = [file for file in (PACKAGE / "tiny").iterdir() if file.suffix in (".json", ".safetensors", ".jinja")]
    assert sum(file.stat().st_size for file in files) < 4e6
    checkpoint = instantiate(compose([], []).model)
    tokenizer = checkpoint.tokenizer()
    model = checkpoint.model(tokenizer)
    assert model.config.model_type == "smollm3" and model.num_parameters() == 1_036_416
    assert tokenizer.convert_ids_to_tokens(model.config.eos_token_id) == "<|im_end|>"


def test_pretraining_repeats_bit_for_bit(forked, folder):
    code = "import sys, pathlib, smoltrain.tiny.pretrain as made; made.pretrain(pathlib.Path(sys.argv[1]), steps=3)"
    for name in ("a", "b"):  # in processes of their own, for it takes two threads
        life = forked(name, code=code)
        assert life.wait() == 0, life.stderr
    files = [(folder / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


@pytest.mark.torture
def test_the_script_makes_the_shipped_weights(folder):
    """20 minutes. Bit for bit on the kind of processor that made them; elsewhere the sums must be right."""
    from safetensors.torch import load_file

    from smoltrain.config import PACKAGE
    from smoltrain.tiny.pretrain import pretrain

    pretrain(folder)
    made, shipped = (load_file(where / "model.safetensors") for where in (folder, PACKAGE / "tiny"))
    assert made.keys() == shipped.keys()
    assert all((made[name] == shipped[name]).all() for name in made)
