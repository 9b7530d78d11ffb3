"""Tab: what is offered for words of every kind, that it is of the config that Hydra composes, and real shells."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from smoltrain.__main__ import main
from smoltrain.completion import SCRIPTS, for_bash, offers
from smoltrain.config import CONF, plain
from smoltrain.config.groups import defaults, options
from smoltrain.config.overrides import spelled_out
from smoltrain.config.sketch import sketch
from smoltrain.usage import VERBS, flags, summary

ROOT = Path(__file__).parents[1]
ARGS = "trainer.args."
OWN = ["--config-dir", str(Path(__file__).parent / "conf")]
STARTED = "import sys, smoltrain.__main__ as m; sys.exit(m.main(sys.argv[1:]))"


def offered(*words: str) -> list[str]:
    return [offer.text for offer in offers(list(words[:-1]), words[-1])]


# ---------------------------------------------------------------- the config without Hydra

EACH = [[f"{group}={option}"] for group in defaults() for option in options(group, [])]
TOGETHER = [
    [],
    ["experiment=smollm3_3b_dpo", "trainer=sft"],
    ["trainer=dpo", "data=sums"],
    ["data=[sums,local]"],
    ["data.path=my.jsonl"],
    ["+data@data.sources.x=local", "data=mixture"],
    ["+callbacks.x._target_=a.B", "trainer=dpo"],
]


@pytest.mark.parametrize("words", [*EACH, *TOGETHER], ids=" ".join)
def test_the_sketch_of_a_config_is_the_one_that_hydra_composes(words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = plain(compose("config", overrides=spelled_out(words)))
    drawn = sketch(words)
    assert drawn.pop("hydra") and drawn == composed


def test_the_sketch_of_half_a_word_or_a_broken_file_is_that_of_the_rest(folder):
    (folder / "own" / "experiment").mkdir(parents=True)
    (folder / "own" / "experiment" / "broken.yaml").write_text("a: [\n")
    (folder / "own" / "experiment" / "list.yaml").write_text("- a\n")
    plain_one = sketch([])
    for words in (["trainer"], ["seed="], ["-m"], ["trainer=nosuch"], ["experiment=broken"], ["experiment=list"]):
        drawn = sketch(["--config-dir", "own", *words])
        assert drawn.keys() == plain_one.keys() - ({"encode"} if words == ["trainer=nosuch"] else set())


# ---------------------------------------------------------------- what is offered


def test_the_first_word_may_be_a_verb_a_group_or_a_key():
    found = offered("")
    assert found[: len(VERBS)] == list(VERBS)
    assert {f"{group}=" for group in defaults()} | {"seed=", "trainer.", "callbacks."} <= set(found)
    assert offered("che") == ["check", "check.step="] and not {*VERBS} & {*offered("seed=1", "")}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trainer="], ["trainer=sft", "trainer=dpo"]),
        (["check", "trainer=d"], ["trainer=dpo"]),
        (["trainer=nosuch"], []),
        (["-m", "trainer=sft,d"], ["trainer=sft,dpo"]),
        (["-m", "trainer=sft,s"], []),
        (["data=[sums,lo"], ["data=[sums,local"]),
        (["+data@data.sources.mine=lo"], ["+data@data.sources.mine=local"]),
        ([*OWN, "trainer=k"], ["trainer=kto"]),
        (["trainer=dpo", "trainer.args.be"], ["trainer.args.beta="]),
        (["experiment=smollm3_3b_dpo", "trainer.args.be"], ["trainer.args.beta="]),
        (["trainer.args.be"], []),
        (["trainer.args.resume"], []),  # which a run refuses
        (["trainer.args.dataset_text"], []),
        (
            ["encode._target_=smoltrain.data.encode.Untokenized", "trainer.args.dataset_text"],
            [f"{ARGS}dataset_text_field="],
        ),
        ([*OWN, "trainer=kto", "trainer.args.desirable"], ["trainer.args.desirable_weight="]),
        (["trainer.args.lr_scheduler_t"], ["trainer.args.lr_scheduler_type="]),
        (["+trainer.args.learning_r"], ["+trainer.args.learning_rate="]),
        (["~trainer.args.learning"], ["~trainer.args.learning_rate"]),
        (["trainer.args.learning_rate=5e-5,"], []),
        (["evaluation."], ["evaluation.max_rows=", "evaluation.max_new_tokens="]),
        (["peft=lora", "trainer.peft_config.lora_al"], ["trainer.peft_config.lora_alpha="]),
        (["peft=lora", "trainer.peft_config.use_rs"], ["trainer.peft_config.use_rslora="]),
        (["trainer.p"], ["trainer.peft_config="]),
        (["data.test_s"], ["data.test_share="]),
        (["data=[sums,local]", "data.sources.local.keep"], ["data.sources.local.keep_where="]),
        (["data=[sums,local]", "data.sources.local.test_s"], []),
        (["callbacks.tracking.p"], ["callbacks.tracking.project="]),
        (["model.tem"], ["model.template_date="]),
        (["model.chat_template=ch"], ["model.chat_template=chatml"]),
        (["--cf"], ["--cfg"]),
        (["--cfg", ""], ["job", "hydra", "all"]),
        (["--cfg=j"], ["--cfg=job"]),
        (["check", "--"], ["--json", "--strict", "--config-dir", "--allow"]),
        (["--al"], ["--allow"]),
        (["--allow", ""], []),
        (["show", "--al"], ["--allow"]),
        (["trainer.args.bf16="], [f"trainer.args.bf16={value}" for value in ("auto", "null", "true", "false")]),
        (["hyd"], ["hydra."]),
        (["hydra.sw"], ["hydra.sweep.dir=", "hydra.sweep.subdir="]),
        (["hydra.job"], []),
        (["+hydra."], []),
        (["~hydra."], []),
        (["~name"], []),
        (["~seed"], []),
        (["~evaluation.max_r"], []),
        (["~model.rev"], []),
        (["~trainer.pe"], ["~trainer.peft_config"]),
        (
            ["trainer=dpo", "trainer.args.loss_type=sig"],
            ["trainer.args.loss_type=sigmoid", "trainer.args.loss_type=sigmoid_norm"],
        ),
        (["trainer.args.run_name="], []),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["completion", "bash", ""], []),
        (["dashboard", ""], []),
        (["--package", "trainer.args.lea"], ["trainer.args.learning_rate"]),
    ],
    ids=lambda words: " ".join(sorted(words) if isinstance(words, set) else words),
)
def test_what_is_offered(words, expected):
    assert offered(*words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trainer.args.bf16="], {"true", "false"}),
        (["trainer.args.lr_scheduler_type="], {"linear", "cosine", "constant_with_warmup"}),
        (["trainer.args.eval_strategy="], {"no", "steps", "epoch"}),
        (["trainer.args.optim="], {"adamw_torch", "adafactor"}),
        (["data.on_too_long="], {"truncate", "drop", "error"}),
        (["data.on_bad_row="], {"error", "drop"}),
        (["data.on_duplicate="], {"keep", "drop"}),
        (["data=mixture", "data.stopping_strategy="], {"all_exhausted", "first_exhausted"}),
        (["encode.train_on="], {"assistant", "last", "all", "weighted"}),
        (["check.step="], {"true", "false", "null"}),
    ],
    ids=lambda words: " ".join(sorted(words) if isinstance(words, set) else words),
)
def test_the_values_that_can_be_chosen_are_offered(words, expected):
    assert {f"{words[-1]}{value}" for value in expected} <= set(offered(*words))


def test_keys_come_level_by_level():
    assert all(word.count(".") == 2 for word in offered("trainer.args."))
    offers = {"trainer.args.", "trainer.peft_config=", "trainer.unpadded="}  # the rest is handed over live
    assert set(offered("trainer.")) == offers
    assert offered("eval") == offered("evaluation.")
    assert offered("peft=lora", "trainer.p") == offered("peft=lora", "trainer.peft_config.")


def test_options_and_keys_are_described():
    about = {offer.text: offer.about for offer in offers([], "trainer=")}
    assert about["trainer=sft"] == options("trainer", [])["sft"]
    (beta,) = offers(["trainer=dpo"], "trainer.args.be")
    assert beta.about == "float, now 0.1"


def test_a_folder_of_ones_own_offers_its_experiments(folder):
    (folder / "own" / "experiment").mkdir(parents=True)
    (folder / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\n# Mine\nname: mine\n")
    assert offered("--config-dir", "own", "experiment=mi") == ["experiment=mine"]
    assert offered("--config-dir=own", "experiment=mi") == ["experiment=mine"]
    assert offered("--config-dir", "o") == ["own/"] and offered("--config-dir=o") == ["--config-dir=own/"]


def test_files_are_offered_where_a_path_is_wanted(folder):
    (folder / "rows").mkdir()
    for name in ("rows/a.jsonl", "rows/b.jsonl", "rows/.hidden", "read.me"):
        (folder / name).touch()
    assert offered("data.path=r") == ["data.path=read.me", "data.path=rows/"]
    assert offered("data.path=rows/") == ["data.path=rows/a.jsonl", "data.path=rows/b.jsonl"]
    assert offered("data.path=rows/.") == ["data.path=rows/.hidden"]
    assert offered("data.path=[rows/a.jsonl,rows/b") == ["data.path=[rows/a.jsonl,rows/b.jsonl"]
    assert offered("data.path=nowhere/") == [] == offered("data.path=~nobody-here/")
    assert offered("check", "--json", "read") == ["read.me"] and offered("--config-dir", "re") == []


def finish(directory: Path, status: str, start: str) -> None:
    directory.mkdir(parents=True)
    (directory / "run.json").write_text(json.dumps({"status": status, "start": start}))


def test_runs_are_offered_by_name_and_stamp(folder):
    assert offered("model.from_run=") == []
    finish(folder / "multirun" / "demo" / "20260101-000000-aaaa", "completed", "2026-01-01")
    finish(folder / "multirun" / "demo" / "20260102-000000-bbbb", "failed", "2026-01-02")
    finish(folder / "multirun" / "sweep" / "20260103-000000-cccc" / "0_seed-1", "completed", "2026-01-03")
    names = ["latest", "sweep", "20260103-000000-cccc/0_seed-1", "demo", "20260101-000000-aaaa"]
    assert offered("model.from_run=") == [f"model.from_run={name}" for name in names]
    every = [*names[:4], "20260102-000000-bbbb", names[4]]
    assert offered("runs", "show", "") == offered("runs", "compare", "demo", "latest", "") == every
    assert offered("runs", "") == ["show", "compare", "rows"] and offered(
        "runs", "compare", "demo", "--plot", "mult"
    ) == ["multirun/"]


def test_a_verbs_usage_says_what_follows_it(monkeypatch, folder):
    """As the verbs that are still to come have it: KEY, and two things to compare."""
    monkeypatch.setitem(VERBS, "why", "smoltrain why KEY [overrides]: who set a key\n")
    monkeypatch.setitem(VERBS, "show", "smoltrain show [KEY] [overrides]: a config\n")
    monkeypatch.setitem(VERBS, "diff", "smoltrain diff A B: what differs\n")
    finish(folder / "multirun" / "demo" / "20260101-000000-aaaa", "completed", "2026-01-01")
    assert offered("why", "trainer.args.learning") == ["trainer.args.learning_rate"]
    assert offered("why", "trainer.args.learning_rate", "trainer=d") == ["trainer=dpo"]
    assert offered("why", "trainer=dpo", "trainer.args.be") == ["trainer.args.beta"]
    assert offered("show", "trainer=dpo", "trainer.args.be") == ["trainer.args.beta", "trainer.args.beta="]
    assert {"smollm3_3b_sft", "latest", "demo"} <= set(offered("diff", "")) == {*offered("diff", "demo", ""), "demo"}
    assert offered("diff", "demo", "latest", "") == []


@pytest.mark.parametrize("verb", VERBS)
def test_the_flags_of_a_screen_are_offered_and_every_argument_is_of_a_known_kind(verb):
    from smoltrain.completion import KINDS

    assert set(offered(verb, "-")) == {flag for flag in flags(verb) if flag != "-"}
    kinds = [kind for kind, _ in flags(verb).values() if kind] + summary(verb)[0].split()[2:]
    assert all(kind in KINDS or kind.strip("[]…") in KINDS or "|" in kind for kind in kinds)


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("smoltrain trainer=d", ["dpo "]),
        ("smoltrain trainer.args.lr_scheduler_t", ["trainer.args.lr_scheduler_type="]),
        ("smoltrain data=[sums,lo", ["[sums,local"]),
        ("smoltrain 'data=[sums,lo", ["data=[sums,local]"]),
        ("smoltrain data.path=a:", ["b.jsonl "]),
        ("smoltrain data.path=some", ["some\\ rows.jsonl "]),
        ("smoltrain data.path=some\\ r", ["some\\ rows.jsonl "]),
        ('smoltrain data.path="some r', ["some rows.jsonl"]),
        ("smoltrain seed=1   che", ["check.step="]),
    ],
)
def test_bash_is_told_what_follows_its_word_breaks(folder, line, expected):
    for name in ("some rows.jsonl", "a:b.jsonl"):
        (folder / name).touch()
    assert for_bash(line) == expected


def test_dots_too_may_be_word_breaks_in_bash():
    assert for_bash("smoltrain trainer.args.lr_scheduler_t", " =.") == ["lr_scheduler_type="]


def test_the_command_prints_scripts_and_says_which_there_are(capsys):
    for shell, script in SCRIPTS.items():
        assert main(["completion", shell]) == 0 and capsys.readouterr().out == script
    assert main(["completion"]) == 0
    screen = capsys.readouterr().out
    assert all(shell in screen for shell in SCRIPTS) and main(["completion", "--help"]) == 0
    assert capsys.readouterr().out == screen
    assert main(["completion", "zhs"]) == 2 and "did you mean zsh?" in capsys.readouterr().err
    assert main(["completion", "bash", "zsh"]) == 2 and "takes no zsh" in capsys.readouterr().err
    assert main(["-sc", "install=bash"]) == 2 and "smoltrain completion" in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["trainer=dpo trainer.args.", "trainer.args.lr_scheduler_type=", "data.path=/"])
def test_an_answer_imports_neither_hydra_nor_omegaconf(typed):
    program = (
        "import sys\nfrom smoltrain.__main__ import main\nmain(sys.argv[1:])\n"
        "print('HEAVY', sorted({'hydra', 'omegaconf', 'torch', 'numpy', 'rich'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, "completion", "bash", "--", f"smoltrain {typed}"]
    *answer, last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert answer and last == "HEAVY []"


# ---------------------------------------------------------------- real shells

WITHIN = 60  # seconds, on a machine that has much else to do


@pytest.fixture
def typed(folder, monkeypatch):
    """Installs completion as its screen says, types keys into an interactive shell, and returns what a command got."""
    home, binaries = folder / "home", folder / "bin"
    for path in (home, binaries, folder / "my_conf"):
        path.mkdir()
    (folder / "some rows.jsonl").touch()
    # The command itself for its completion; for all else, a file with its arguments.
    (binaries / "smoltrain").write_text(
        f'#!/bin/sh\nif [ "$1" = completion ]; then exec {sys.executable} -c "{STARTED}" "$@"; fi\n'
        f'printf "%s\\n" "$@" > {folder}/words.tmp\nmv {folder}/words.tmp {folder}/words\n'
    )
    (binaries / "smoltrain").chmod(0o755)
    for name, value in {"HOME": home, "ZDOTDIR": home, "XDG_CONFIG_HOME": home / ".config"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")

    def type_into(shell: str, keys: str) -> list[str]:
        if not shutil.which(shell):
            pytest.skip(f"{shell} is not installed here")
        (install,) = re.findall(rf"^  {shell} +(.*)$", VERBS["completion"], re.MULTILINE)
        (home / ".config" / "fish" / "completions").mkdir(parents=True)  # fish makes it when it is first started
        (home / ".zshrc").write_text("autoload -Uz compinit && compinit -u\n")  # without it, a question of root's zsh
        subprocess.run([shell, "-c", install], check=True)
        return interact([shell, "-i"], keys, folder / "words")

    return type_into


def interact(command: list[str], keys: str, result: Path) -> list[str]:
    """Starts a command on a terminal of its own, types, and returns the lines of the file that comes of it."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, b"\x32\x00\x64\x00\x00\x00\x00\x00")
    shown, begun, unsent = b"", time.monotonic(), keys.encode()
    try:
        while not result.exists():
            assert time.monotonic() - begun < WITHIN, shown.decode(errors="replace")
            if select.select([terminal], [], [], 0.3)[0]:
                shown += os.read(terminal, 4096)
            elif unsent and shown:  # the prompt is there, and nothing more comes
                os.write(terminal, unsent)
                unsent = b""
    finally:
        os.kill(process, signal.SIGKILL)
        os.close(terminal)
        os.waitpid(process, 0)
    return result.read_text().splitlines()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("-m trainer=sft,d\t seed=1 che\tt\t", ["-m", "trainer=sft,dpo", "seed=1", "check.step=true"]),
        ("trainer=dpo trainer.args.be\t0.2", ["trainer=dpo", "trainer.args.beta=0.2"]),
        ("--config-d\tmy_c\t data.path=some\t", ["--config-dir", "my_conf/", "data.path=some rows.jsonl"]),
        ("'data.path=some r\t", ["data.path=some rows.jsonl"]),
        ("dash\t", ["dashboard"]),
        ("chec\t trainer=d\t", ["check", "trainer=dpo"]),
    ],
)
@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_real_shell_completes(typed, shell, keys, expected):
    assert typed(shell, f"smoltrain {keys}\r") == expected


@pytest.mark.parametrize(
    ("shell", "keys"),
    [
        ("bash", "data=[sums,loc\t]"),
        ("bash", "'data=[sums,loc\t"),
        ("zsh", "data=\\[sums,loc\t]"),  # which to zsh is a pattern otherwise
        ("zsh", "'data=[sums,loc\t]'"),
        ("fish", "data=[sums,loc\t"),  # ends the word, and so the list
    ],
)
def test_a_real_shell_completes_a_list(typed, shell, keys):
    assert typed(shell, f"smoltrain {keys}\r") == ["data=[sums,local]"]
