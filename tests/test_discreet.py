"""No secret leaves: planted in the environment, commands, YAML, git and exceptions, none is in a file or printed."""

import gzip
import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from conftest import QUICK
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.__main__ import main
from smoltrain.config import CONF, plain
from smoltrain.config.compose import compose
from smoltrain.config.groups import options
from smoltrain.config.resolvers import stamp
from smoltrain.secrets import leaks, leaky_overrides, redacted

ROOT = Path(__file__).parents[1]
DRAW = random.Random(4)  # made here, so that no scanner of repositories finds them


def letters(count: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    return "".join(DRAW.choices(alphabet, k=count))


HEX, UPPER = "0123456789abcdef", string.ascii_uppercase + string.digits
SHAPES = {
    "hf": f"hf_{letters(34)}",
    "hf_oauth": f"hf_oauth_{letters(12)}.{letters(12)}-{letters(6)}",
    "openai": f"sk-{letters(48)}",
    "openai_project": f"sk-proj-{letters(20)}_{letters(20)}-{letters(8)}",
    "anthropic": f"sk-ant-api03-{letters(20)}-{letters(20)}_{letters(8)}",
    "github": f"ghp_{letters(36)}",
    "github_oauth": f"gho_{letters(36)}",
    "github_pat": f"github_pat_{letters(22)}_{letters(59)}",
    "gitlab": f"glpat-{letters(20)}",
    "aws": f"AKIA{letters(16, UPPER)}",
    "slack": f"xoxb-{letters(12)}-{letters(24)}",
    "google": f"AIza{letters(35)}",
    "groq": f"gsk_{letters(52)}",
    "npm": f"npm_{letters(36)}",
    "replicate": f"r8_{letters(37)}",
    "stripe": f"sk_live_{letters(24)}",
    "jwt": f"eyJ{letters(20)}.eyJ{letters(40)}.{letters(43)}",
    "private_key": f"-----BEGIN RSA PRIVATE KEY-----\n{letters(64)}\n{letters(64)}\n-----END RSA PRIVATE KEY-----",
}
ENVIRONMENT = {
    "HF_TOKEN": f"hf_{letters(34)}",
    "WANDB_API_KEY": letters(40, HEX),
    "OPENAI_API_KEY": f"sk-proj-{letters(40)}",
    "MY_SECRET": letters(24),
    "DATABASE_PASSWORD": f'{letters(8)} ä"{letters(8)}/{letters(4)}',
}
COMMAND = {  # an override each, of which the part after `|` is secret
    "token": f"trainer.args.hub_token=|{letters(12)}",
    "path": f"data.path=https://me:|{letters(16)}|@example.org/rows.jsonl",
    "model": f"model.name_or_path=https://|{letters(16)}|@example.org/model",
    "unknown": f"api_kay=|glpat-{letters(20)}",
    "unparsed": f"data.columns={{prompt: [, token: |{letters(16)}",
}
OVERRIDES = COMMAND | {name: f"+x.y='|{secret}|'" for name, secret in SHAPES.items()}
YAML = {
    "value": f"data: {{system_prompt: 'Bearer |{letters(30)}|'}}",
    "list": f"data: {{path: [a.jsonl, 'xoxb-|{letters(12)}-{letters(24)}|']}}",
    "named": f"trainer: {{args: {{model_init_kwargs: {{apiKey: |{letters(14)}|}}}}}}",
    "hydra": f"hydra: {{job: {{env_set: {{HUB: |hf_{letters(34)}|}}}}}}",
    "interpolation": "name: ${oc.env:MY_SECRET}",
    "decoded": "data: {path: '${oc.decode:${oc.env:MY_SECRET}}'}",
    "indirect": "name: ${oc.env:${model.chat_template}}\nmodel: {chat_template: MY_SECRET}",
}
RAISED, REMOTE, COMMENT = letters(16), letters(16), letters(16)


def planted() -> dict[str, str]:
    """Every secret by where it was put."""
    marked = {name: text.split("|")[1] for name, text in [*COMMAND.items(), *YAML.items()] if "|" in text}
    return SHAPES | ENVIRONMENT | marked | {"raised": RAISED, "remote": REMOTE, "comment": COMMENT}


def spilt(text: str | bytes) -> set[str]:
    """The names of the secrets in a text, as they are or as JSON and Python spell them."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    forms = {name: {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]} for name, secret in planted().items()}
    return {name for name, spelled in forms.items() if any(form in text for form in spelled)}


def spilt_below(folder: Path) -> dict[str, set[str]]:
    """The files below a folder that hold a secret in their bytes or their name, those in .gz unpacked."""
    found = {}
    for file in folder.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        if names := spilt(content) | spilt(str(file.relative_to(folder))):
            found[str(file)] = names
    return found


@pytest.fixture
def environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def own(tmp_path_factory):
    """Writes an experiment with a comment into a folder elsewhere, and returns the arguments that choose it."""

    def write(text: str) -> list[str]:
        folder = tmp_path_factory.mktemp("own")
        (folder / "experiment").mkdir()
        (folder / "experiment" / "mine.yaml").write_text(
            f"# @package _global_\n# hf_{COMMENT}\n{text.replace('|', '')}"
        )
        return ["--config-dir", str(folder), "experiment=mine"]

    return write


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("before", [[], ["check"], ["--cfg", "job"], ["-m", "seed=1,2"]], ids=" ".join)
@pytest.mark.parametrize("override", OVERRIDES.values(), ids=list(OVERRIDES))
def test_a_command_with_a_secret_is_refused_and_not_repeated(folder, capfd, before, override):
    assert main([*before, override.replace("|", ""), "tracking=none"]) == 2
    out, err = capfd.readouterr()
    key = override.partition("=")[0].lstrip("+")
    assert err.startswith(f"{key}: a secret is taken only from the environment") and not spilt(out + err)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("before", [[], ["check"], ["--cfg", "job"], ["-m"]], ids=" ".join)
@pytest.mark.parametrize("text", YAML.values(), ids=list(YAML))
def test_a_file_with_a_secret_is_refused_and_not_repeated(folder, environment, own, capfd, before, text):
    assert main([*before, *own(text), "tracking=none"]) == 2
    out, err = capfd.readouterr()
    refused = ("a secret is taken only from the environment", "Hydra's own keys cannot be set in YAML")
    assert any(reason in err for reason in refused) and not spilt(out + err)
    assert list(folder.iterdir()) == []


def test_what_needs_a_variable_is_told_to_leave_it_there(environment):
    for override, mend in {
        "trainer.args.hub_token=abc": "set HF_TOKEN",
        f"x={SHAPES['hf']}": "set HF_TOKEN",
        "callbacks.wandb_key=" + "0123456789abcdef" * 2 + "01234567": "set WANDB_API_KEY",
        f"name=a-{ENVIRONMENT['MY_SECRET']}": "MY_SECRET is set there, leave its value out",
        "x=${oc.env:HF_TOKEN}": "what needs HF_TOKEN reads it there, leave it out",
        "--config-dir=https://a:b@example.org": "leave user and password out of the URL",
        "data.path=https://example.org/x?sig=abc": "sign no URL",
    }.items():
        (problem,) = leaky_overrides([override])
        key = override.partition("=")[0]
        assert problem.key == key and problem.text.startswith(f"{key}: ") and problem.text.endswith(mend)


def test_a_key_that_is_a_secret_is_starred():
    (problem,) = leaky_overrides([f"+{SHAPES['hf']}=1"])
    assert problem.key == "***" and not spilt(problem.text)
    assert not spilt(leaks({"a": {SHAPES["github"]: 1}})[0].text)


# ---------------------------------------------------------------- no false alarms


def test_nothing_that_is_shipped_is_taken_for_a_secret(environment):
    for file in [*CONF.rglob("*.*"), *(ROOT / "smoltrain").rglob("*.py"), ROOT / "README.md", ROOT / "Makefile"]:
        assert redacted(file.read_text()) == file.read_text(), file
    for group in ("trainer", "model", "data", "hardware", "peft", "tracking", "experiment"):
        for option in options(group, []):
            arguments = [f"{group}={option}", *(["data.path=a.jsonl"] if option in ("local", "hub") else [])]
            if option != "mixture":
                assert redacted(cfg := plain(compose(arguments, []))) == cfg


@pytest.mark.parametrize(
    "argument",
    [
        "trainer.args.hub_token=null",
        "trainer.args.hub_token=",
        "~trainer.args.hub_token",
        "trainer.args.eos_token=<|im_end|>",
        "trainer.args.pad_token=</s>",
        "model.eos_token=[EOS]",
        "evaluation.max_new_tokens=32",
        "trainer.peft_config.num_virtual_tokens=20",
        "trainer.args.include_num_input_tokens_seen=true",
        "model.revision=0123456789abcdef0123456789abcdef01234567",
        "model.name_or_path=hf-internal-testing/tiny-random-LlamaForCausalLM",
        "data.path=hf_tiny/sk-learn-notes-for-beginners.jsonl",
        "data.path=abfs://container@account.dfs.core.windows.net/rows.parquet",
        "data.path=hf://datasets/owner/name@refs-convert/rows.parquet",
        "data.path=/home/me/secrets/token/password.jsonl",
        "data.path=task-abcdefghijklmnopqrstuvwxyz.csv",
        "data.columns={prompt: ask, completion: reply}",
        "data.keep_where={language: fr}",
        "data.system_prompt='The bearer of this password: swordfish is a friend@home, see http://example.org/a:b@c'",
        "name=${oc.env:USER}",
        "hydra.job.env_copy=[HF_TOKEN]",
        "objective=eval_rewards/accuracies",
        "--config-dir=my_conf",
    ],
)
def test_ordinary_arguments_are_no_secrets(monkeypatch, argument):
    monkeypatch.setenv("SORT_KEY", "accuracies")
    monkeypatch.setenv("SSH_KEY", "/home/me")
    monkeypatch.setenv("SHORT_TOKEN", "fr")
    assert leaky_overrides([argument]) == [] and redacted(argument) == argument
    key, _, value = argument.partition("=")
    assert leaks({key: value}) == []


NAMES = st.text(string.ascii_lowercase + "_-./", min_size=1, max_size=40)
COMMITS = st.text(HEX, min_size=40, max_size=40)


@given(NAMES | COMMITS | st.builds("{}/{}".format, NAMES, NAMES) | st.floats().map(str) | st.just(stamp()))
def test_names_commits_stamps_and_numbers_are_no_secrets(text):
    for key in ("model.name_or_path", "model.revision", "data.path", "trainer.args.run_name"):
        assert leaky_overrides([f"{key}={text}"]) == [] == leaks({key: text})
    assert redacted({"a": [text, 1, None]}) == {"a": [text, 1, None]}


# ---------------------------------------------------------------- starred


@given(st.sampled_from(sorted(SHAPES)), st.text(max_size=20), st.text(max_size=20))
def test_a_secret_is_found_whatever_stands_around_it(name, before, after):
    text = f"{before}\n{SHAPES[name]} {after}"
    for spelled in (text, json.dumps(text), repr(text)):
        assert not spilt(redacted(spelled)) and redacted(redacted(spelled)) == redacted(spelled)


def test_a_value_of_the_environment_is_found_in_any_spelling(environment):
    secret = ENVIRONMENT["DATABASE_PASSWORD"]
    for spelled in (secret, json.dumps(secret), repr(secret), quote(secret, safe=""), quote_plus(secret)):
        assert redacted(f"<{spelled.strip(chr(34) + chr(39))}>") == "<***>"
    assert redacted(secret.replace(" ", "\n    ")) == "***"


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("DB_PASSWORD", "swordfishtrout", False),
        ("db_password", "swordfish", False),
        ("AWS_SECRET_ACCESS_KEY", "/wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY", False),
        ("MY_TOKEN", "~nobody-here/x", False),
        ("MY_SECRET", "/" + "x" * 5000, False),
        ("CI_CREDS", ".hidden-thing", False),
        ("OPENAI_API_KEY", "opensesame", False),
        ("SORT_KEY", "a1b2c3d4e5", False),
        ("SESSION_KEY", "accuracies", True),
        ("GIT_PASSWORD", "trainer", True),
        ("GOOGLE_APPLICATION_CREDENTIALS", str(ROOT / "README.md"), True),
    ],
)
def test_a_secret_variable_is_harmless_where_it_is_short_or_a_path_that_exists(monkeypatch, name, value, kept):
    monkeypatch.setenv(name, value)
    assert redacted(f"<{value}>") == (f"<{value}>" if kept else "<***>")
    assert bool(leaky_overrides([f"name={value}"])) is not kept


def test_a_key_in_an_address_and_creds_are_secrets():
    for part in ("access_key", "accesskey", "aws_access_key"):
        assert redacted(f"https://example.org/x?a=1&{part}=abc&b=2") == f"https://example.org/x?a=1&{part}=***&b=2"
    assert leaky_overrides(["trainer.my_creds=abc"])


# ---------------------------------------------------------------- real runs


def test_runs_leave_no_secret_and_no_pickled_arguments(folder, environment, smoltrain, own, capfd):
    """SFT, DPO and LoRA to their ends, with checkpoints and Trackio; beside a git remote that has a password."""
    subprocess.run(["git", "init", "-q"], check=True)
    remote = ["git", "config", "remote.origin.url", f"https://me:{REMOTE}@example.org/r.git"]
    subprocess.run(remote, check=True)
    saving = ["trainer.args.save_strategy=steps", "trainer.args.save_steps=1", "evaluation.max_rows=2"]
    chosen = own("name: mine")
    for overrides in ([], ["trainer=dpo", "peft=lora"]):
        (record,) = smoltrain(f"--config-dir={chosen[1]}", chosen[2], *overrides, *saving, quick=QUICK)
        assert (record["directory"] / "checkpoint-2" / "trainer_state.json").exists()
        assert list((record["directory"] / "model").glob("*.safetensors"))
    from trackio.utils import TRACKIO_DIR  # that of the first test of this process: Trackio reads it once

    assert list(Path(TRACKIO_DIR).glob("*.db"))
    assert spilt_below(folder / "multirun") == {} == spilt_below(Path(TRACKIO_DIR))
    assert spilt_below(Path(os.environ["HF_DATASETS_CACHE"])) == {}
    assert not list(folder.rglob("training_args*"))
    out, err = capfd.readouterr()
    assert not spilt(out + err)


FAILING = """
import logging, os, sys, warnings
from smoltrain import train
from smoltrain.__main__ import main

def fails(*args, **kwargs):
    told = " ".join([os.environ[name] for name in {names}] + ["https://me:" + sys.argv[1] + "@example.org/x"])
    warnings.warn(told)
    logging.getLogger("transformers").error(told)
    print(told)
    raise OSError(told)

def build(*args):
    trainer = built(*args)
    step, trainer.training_step = trainer.training_step, lambda *a: (fails if trainer.state.global_step else step)(*a)
    return trainer

built, train.build = train.build, build
sys.exit(main(sys.argv[2:]))
"""


def test_an_exception_with_secrets_is_told_without_them(folder, environment):
    """In a process of its own, with its real traceback; it fails at its second step, after a checkpoint."""
    program = FAILING.format(names=[*ENVIRONMENT])
    given = [*QUICK, "tracking=none", "trainer.args.save_strategy=steps", "trainer.args.save_steps=1"]
    command = [sys.executable, "-c", program, RAISED, *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not spilt(done.stdout + done.stderr)
    assert list(folder.glob("multirun/*/*/checkpoint-1")) and "Traceback" in done.stderr
    assert f"OSError: {' '.join(['***'] * 5)} https://***@example.org/x" in done.stderr
    (record,) = folder.glob("multirun/*/*/run.json")
    assert json.loads(record.read_text())["error"].endswith("https://***@example.org/x")
    assert "https://***@example.org/x" in (record.parent / "report.md").read_text()
    assert spilt_below(folder) == {}
