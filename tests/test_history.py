"""Runs that are kept: which one a word means, the table, a screen of one, several compared, and how fast that is."""

import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from conftest import QUICK

from smoltrain.__main__ import main
from smoltrain.config import ConfigError
from smoltrain.history import COLUMNS, every, resolve
from smoltrain.lines import bars

SAVING = ("trainer.args.save_strategy=steps", "trainer.args.save_steps=1", "tracking=none", "name=grid")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A real sweep of two runs, SFT and DPO, made once."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["-m", *QUICK, *SAVING, "trainer=sft,dpo"]) == 0
    return sorted(file.parent for file in folder.glob("multirun/grid/*/*/run.json"))


def copied(source: str, target: str) -> None:
    """Weights are linked, which costs nothing; what a test may write to is its own."""
    (os.link if source.endswith((".safetensors", ".pt", "tokenizer.json")) else shutil.copy)(source, target)


@pytest.fixture
def kept(folder, made):
    """Copies a real run to `multirun/path`, with other values in its record, and in its config."""

    def copy(path: str, trainer: str = "sft", minutes: int = 0, args: dict | None = None, **changes) -> Path:
        directory = folder / "multirun" / path
        shutil.copytree(made[trainer == "dpo"], directory, copy_function=copied)
        file = directory / "run.json"
        start = (datetime.now(UTC) - timedelta(minutes=minutes, seconds=1)).isoformat(timespec="seconds")
        record = json.loads(file.read_text()) | {"name": path.split("/")[0], "start": start}
        record["config"] |= changes.pop("config", {})
        record["config"]["trainer"]["args"] |= args or {}
        file.write_text(json.dumps(record | changes))
        return directory

    return copy


@pytest.fixture
def several(kept):
    """Runs of all kinds, the newest first: a failed one, a sweep of two, one that diverged, one that is there twice."""
    kept(
        "broke/20260105-000000-eeee", minutes=1, status="failed", error="Traceback\nMemoryError: no room", objective=0.1
    )
    kept("grid/20260104-000000-dddd/1_seed-2", trainer="dpo", minutes=2, objective=0.25, seed=2)
    kept("grid/20260104-000000-dddd/0_seed-1", minutes=3, objective=0.5, seed=1)
    kept("hot/20260103-000000-cccc", minutes=4, status="diverged", objective=math.inf, steps=1)
    kept("demo/20260102-000000-bbbb", minutes=90, objective=0.75)
    kept("demo/20260101-000000-aaaa", minutes=3000, objective=0.125, args={"learning_rate": 2e-05})


NEWEST_FIRST = [
    "broke 20260105-000000-eeee",
    "grid 20260104-000000-dddd/1_seed-2",
    "grid 20260104-000000-dddd/0_seed-1",
    "hot 20260103-000000-cccc",
    "demo 20260102-000000-bbbb",
    "demo 20260101-000000-aaaa",
]


@pytest.fixture
def said(printed):
    """Runs a command line below `smoltrain runs` and returns what it prints."""
    return partial(printed, "runs")


def listed(text: str) -> list[str]:
    """The names and stamps in a table."""
    return [" ".join(row.split()[:2]) for row in text.splitlines()[1:]]


# ---------------------------------------------------------------- the table


def test_the_table_shows_what_became_of_each_run_the_newest_first(said, several):
    heading, *rows = said().splitlines()
    assert heading.split() == ["eval_loss" if column == "objective" else column for column in COLUMNS]
    assert listed(said()) == NEWEST_FIRST
    assert rows[0].split()[2:] == ["sft", "tiny", "failed", "2/2", "1", "min"]  # what it came to is not shown
    assert rows[1].split()[2:] == ["dpo", "tiny", "completed", "2/2", "0.2500", "2", "min"]
    assert rows[3].split()[2:] == ["sft", "tiny", "diverged", "1/2", "4", "min"]
    assert [row.split()[-2:] for row in rows[4:]] == [["2", "h"], ["2", "d"]]
    assert (
        len({row.index(word) for row in rows for word in (" completed ", " failed ", " diverged ") if word in row}) == 1
    )


def test_objectives_of_several_names_are_named_beside_their_values(said, kept):
    kept("one/a", objective=0.5)
    kept("two/b", objective=0.985, config={"objective": "exact_match"})
    text = said()
    assert text.splitlines()[0].split()[6] == "objective" and "exact_match 98.5%" in text and "eval_loss 0.5000" in text


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["status=completed"], [1, 2, 4, 5]),
        (["trainer=dpo"], [1]),
        (["trainer=smoltrain.sft.SFTTrainer"], [0, 2, 3, 4, 5]),
        (["model=tiny"], [0, 1, 2, 3, 4, 5]),
        (["model=pkg://smoltrain/tiny", "name=hot"], [3]),
        (["run=20260104-000000-dddd/0_seed-1"], [2]),
        (["name=demo", "trainer.args.learning_rate=2e-05"], [5]),
        (["trainer.args.learning_rate=0.00002"], [5]),
        (["trainer.args.use_cpu=true", "name=demo"], [4, 5]),
        (["trainer.peft_config=null", "name=demo"], [4, 5]),
        (["objective=0.5"], [2]),
        (["steps=1/2"], [3]),
        (["steps=1"], [3]),
        (["trainer.args.beta=0.1"], [1]),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_filters_are_of_what_the_table_shows_and_of_the_config(said, several, filters, expected):
    assert listed(said(*filters)) == [NEWEST_FIRST[i] for i in expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status=complete"], "status=complete: no run has that; did you mean completed?"),
        (["trainer=kto"], "trainer=kto: no run has that; trainer is sft, dpo"),
        (["sttus=completed"], "did you mean status?"),
        (["learning_rate=1"], "did you mean trainer.args.learning_rate?"),
        (["trainer.args.lerning_rate=1"], "did you mean trainer.args.learning_rate?"),
        (["zzz=1"], "zzz: no run knows this key; the table has name, run"),
        (["trainer.args=1"], "trainer.args: no run knows this key"),
        (["--sort", "stats"], "did you mean status?"),
        (["--sort"], "--sort: it needs a value"),
        (["--plot", "x.png"], "smoltrain runs takes no --plot"),
        (["--sort=name", "--verbose"], "takes no --verbose"),
        (["shwo", "latest"], "did you mean show?"),
        (["--json", "show"], "it comes right after runs"),
        (["demo"], "name=demo; one run is smoltrain runs show demo"),
        (["show"], "takes one run"),
        (["show", "demo", "hot"], "takes one run"),
        (["show", "demo", "--sort=x"], "smoltrain runs show takes no --sort=x"),
        (["show", "demmo"], "did you mean demo?"),
        (["compare", "demo"], "takes two runs or more"),
        (["compare", "demo", "20260102-000000-bbbb"], "takes two runs or more"),  # one and the same
        (["compare", "demo", "--plot"], "--plot: it needs a value"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_trouble_is_said_and_exits_2(said, several, arguments, message):
    assert message in said(*arguments, code=2)


def test_filters_that_no_run_has_together_are_no_trouble(said, several):
    assert said("status=failed", "trainer=dpo") == "none of 6 runs has all of these: status=failed trainer=dpo\n"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("objective", [5, 1, 2, 4, 0, 3]),
        ("eval_loss", [5, 1, 2, 4, 0, 3]),
        ("age", [0, 1, 2, 3, 4, 5]),
        ("name", [0, 4, 5, 1, 2, 3]),
        ("run", [5, 4, 3, 2, 1, 0]),
        ("steps", [3, 0, 1, 2, 4, 5]),
        ("status", [1, 2, 4, 5, 3, 0]),
        ("trainer", [1, 0, 2, 3, 4, 5]),
        ("trainer.args.learning_rate", [5, 1, 0, 2, 3, 4]),
        ("trainer.args.beta", [1, 0, 2, 3, 4, 5]),
    ],
)
def test_rows_are_sorted_by_a_column_or_a_key_and_what_has_none_is_last(said, several, key, expected):
    assert listed(said("--sort", key)) == [NEWEST_FIRST[i] for i in expected]


def test_no_run_at_all_says_how_to_make_one(said, folder):
    assert "smoltrain makes one" in said() and "smoltrain makes one" in said("status=completed", "--sort=age")
    assert said("--json") == "[]\n" and list(folder.iterdir()) == []
    assert "zzz: no run knows this key" in said("zzz=1", code=2)


def test_the_table_as_json(said, several):
    rows = json.loads(said("--json", "--sort=objective"))
    assert [row["objective"] for row in rows] == [0.125, 0.25, 0.5, 0.75, None, None]
    newest = json.loads(said("--json", "name=grid"))[0]
    assert newest["directory"] == "multirun/grid/20260104-000000-dddd/1_seed-2"
    assert (newest["steps"], newest["max_steps"], newest["objective_name"]) == (2, 2, "eval_loss")
    assert 110 < newest["age"] < 180 and set(COLUMNS) < newest.keys()


BROKEN = {
    "cut": '{"status": "compl',
    "empty": "",
    "list": "[]",
    "nothing": "{}",
    "text": '"status"',
    "types": '{"status": "completed", "metrics": [], "config": 3}',
    "number": '{"status": "completed", "objective": "low"}',
    "status": '{"status": null}',
    "binary": b"\xff\xfe\x00",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_record_that_cannot_be_read_is_a_row_and_stops_no_other(said, kept, folder, broken):
    good = kept("good/20260101-000000-aaaa")
    bad = folder / "multirun" / "bad" / "20260102-000000-bbbb"
    bad.mkdir(parents=True)
    text = BROKEN[broken]
    (bad / "run.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    _, *rows = said().splitlines()
    assert [row.split()[:3] for row in rows if row.startswith("bad")] == [["bad", bad.name, "unreadable"]]
    assert len(rows) == 2 and listed(said("status=unreadable")) == [f"bad {bad.name}"]
    assert listed(said("--sort=objective"))[-1].startswith("bad") and len(json.loads(said("--json"))) == 2
    for look in (["show", "bad"], ["show", "bad", "--json"], ["compare", "good", "bad"]):
        assert said(*look, code=2).startswith(f"{bad / 'run.json'}: unreadable".replace(f"{folder}/", ""))
    assert resolve("latest", completed=True) == good.relative_to(folder)


def test_a_directory_that_is_called_run_json_is_unreadable_too(said, kept, folder):
    kept("good/a")
    (folder / "multirun" / "odd" / "b" / "run.json").mkdir(parents=True)
    assert "unreadable" in said()


def test_a_run_that_has_not_ended_has_the_steps_that_it_logged(said, kept):
    directory = kept("now/a", steps=0, end=None, status="preempted")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "loss": 1.5}\n{"step": 41, "lo')
    assert "40/2" in said()
    (directory / "metrics.jsonl").write_text("")
    assert " 0/2 " in said()


def test_a_run_whose_process_is_gone_is_interrupted_and_may_be_looked_for_as_such(said, kept):
    process = {"host": platform.node(), "pid": os.getpid(), "started": 1.0}  # another process had this number then
    kept("dead/a", status="running", end=None, objective=0.5, process=process)
    kept("good/b", minutes=1)
    assert listed(said("status=interrupted")) == ["dead a"] and "0.5000" not in said()
    assert resolve("latest").name == "a" and resolve("latest", completed=True).name == "b"
    assert said("show", "dead").splitlines()[1].startswith("interrupted ")


def test_runs_are_found_wherever_they_are_and_not_within_one_another(kept, folder):
    kept("model/20260101-000000-aaaa")  # a name like that of a folder which each run has
    kept("deep/er/still/a")
    outer = kept("outer/a")
    kept("outer/a/again")
    shutil.copy(outer / "run.json", outer / "checkpoint-1" / "run.json")
    (folder / "multirun" / "loop").symlink_to(folder / "multirun")
    found = sorted(run.path for run in every())
    assert found == ["deep/er/still/a", "model/20260101-000000-aaaa", "outer/a", "outer/a/again"]


# ---------------------------------------------------------------- which run a word means


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("latest", "broke/20260105-000000-eeee"),
        ("demo", "demo/20260102-000000-bbbb"),
        ("dem", "demo/20260102-000000-bbbb"),
        ("20260101-000000-aaaa", "demo/20260101-000000-aaaa"),
        ("20260101", "demo/20260101-000000-aaaa"),
        ("demo/20260101", "demo/20260101-000000-aaaa"),
        ("demo/20260101-000000-aaaa", "demo/20260101-000000-aaaa"),
        ("multirun/demo/20260101-000000-aaaa", "demo/20260101-000000-aaaa"),
        ("multirun/demo/20260101-000000-aaaa/", "demo/20260101-000000-aaaa"),
        ("multirun/demo/", "demo/20260102-000000-bbbb"),
        ("./multirun/demo/../hot", "hot/20260103-000000-cccc"),
        ("grid", "grid/20260104-000000-dddd/1_seed-2"),
        ("20260104-000000-dddd/0_seed-1", "grid/20260104-000000-dddd/0_seed-1"),
        ("20260104-000000-dddd/0", "grid/20260104-000000-dddd/0_seed-1"),
        ("0_seed-1", "grid/20260104-000000-dddd/0_seed-1"),
    ],
)
def test_a_run_is_meant_by(several, folder, reference, expected):
    assert resolve(reference).resolve() == folder / "multirun" / expected


@pytest.mark.parametrize(
    ("reference", "expected"),
    [("latest", "grid/20260104-000000-dddd/1_seed-2"), ("demo", "demo/20260102-000000-bbbb")],
)
def test_where_a_model_is_needed_the_newest_completed_one_is_meant(several, folder, reference, expected):
    assert resolve(reference, completed=True).resolve() == folder / "multirun" / expected


@pytest.mark.parametrize(
    ("reference", "completed", "message"),
    [
        ("2026", False, "5 runs begin so, 20260101-000000-aaaa, 20260102-000000-bbbb"),
        ("20260104", False, "these are 2 runs, name one: 20260104-000000-dddd/0_seed-1, 20260104-000000-dddd/1_seed-2"),
        ("20260104-000000-dddd", True, "these are 2 runs"),
        ("demmo", False, "no run of that name, stamp or path in .*multirun; did you mean demo?"),
        ("20260101-000000-aaab", False, "did you mean 20260101-000000-aaaa?"),
        ("", False, "no run of that name"),
        ("/", False, "no run of that name"),
        ("x" * 5000, False, "no run of that name"),
        ("a\0b", False, "no run of that name"),
        ("multirun", False, "no run of that name"),
        ("hot", True, "hot: no completed run of that name"),
        ("20260103-000000-cccc", True, "this run is diverged; only a completed run has a final model"),
        ("multirun/hot/20260103-000000-cccc", True, "this run is diverged"),
    ],
    ids=lambda text: str(text)[:24].replace("\0", "0"),
)
def test_what_names_no_run_or_several_is_refused(several, reference, completed, message):
    with pytest.raises(ConfigError, match=message):
        resolve(reference, completed=completed)


def test_a_run_is_called_as_its_record_says_wherever_it_is_kept(kept, folder):
    kept("elsewhere/20260101-000000-aaaa", name="mine")
    assert resolve("mine") == resolve("elsewhere") == resolve("2026")
    (run,) = every()
    assert (run.name, run.run) == ("mine", "elsewhere/20260101-000000-aaaa")


def test_many_that_begin_alike_are_not_all_listed(kept, folder):
    for i in range(12):
        (folder / "multirun" / "x" / f"2026-{i:02}").mkdir(parents=True)
        (folder / "multirun" / "x" / f"2026-{i:02}" / "run.json").write_text('{"status": "failed"}')
    with pytest.raises(ConfigError, match=r"12 runs begin so, 2026-00, .*2026-07, 4 more$"):
        resolve("2026")


# ---------------------------------------------------------------- one run


def test_a_screen_says_how_a_run_ended_what_it_was_and_what_it_left(said, kept, made):
    kept("demo/20260101-000000-aaaa", seconds=100.0, minutes=2)
    text = said("show", "demo")
    shown = dict(line.split(maxsplit=1) for line in text.splitlines()[:15] if len(line.split()) > 1)
    assert text.startswith("demo  20260101-000000-aaaa\n")
    assert shown["completed"].startswith("2 of 2 steps in 2 min, began 2 min ago (20")
    assert shown["parts"].startswith("trainer sft, model tiny, data sums")
    assert shown["model"] == "pkg://smoltrain/tiny, 1,036,416 parameters, on cpu"
    assert shown["data"] == "sums: messages, 32 rows to learn from, 8 held out"
    assert shown["command"].startswith("smoltrain data.train_rows=32") and "trainer=sft" in shown["command"]
    assert shown["overrides"].startswith("data.train_rows=32  data.test_rows=8")
    assert shown["saved"].startswith("checkpoint-1 13 MB  checkpoint-2 13 MB")
    assert shown["final"].startswith("multirun/demo/20260101-000000-aaaa/model  4 MB")
    assert shown["read"] == "multirun/demo/20260101-000000-aaaa/report.md"
    record = json.loads((made[0] / "run.json").read_text())
    before, after = (f"{record['metrics'][key]:.4f}" for key in ("before/eval_loss", "eval_loss"))
    assert ["eval_loss", before, after] in [line.split() for line in text.splitlines()]
    assert "versions" not in text and "resumed" not in text and "error" not in text and "from" not in shown
    assert text.splitlines()[-1].split() == ["0", "step", "2"] and "█" in text.splitlines()[-5]
    assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_a_screen_says_what_went_wrong_and_what_is_no_longer_the_same(said, kept):
    parent = {"directory": "/there/multirun/base/s", "config_hash": "abc", "trainer": "trl.SFTTrainer"}
    resumed = [{"step": 40, "at": "2026-01-01T00:00:00+00:00"}, {"step": 80, "at": "2026-01-02T00:00:00+00:00"}]
    facts = {"error": "Traceback\n  deep\nMemoryError: no room", "parent": parent, "resumed": resumed}
    versions = {"trl": "0.1", "rich": "1.0", "no-such-package": "2.0"}
    directory = kept("broke/a", status="failed", versions=versions, warnings=["one thing is odd"], **facts)
    (directory / "traceback.txt").write_text("all of it")
    (directory / "checkpoint-2").rename(directory / "broken-checkpoint-2")
    (directory / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n')
    lines = said("show", "broke").splitlines()
    assert "error        MemoryError: no room" in lines and "deep" not in " ".join(lines)
    assert {"read         multirun/broke/a/report.md", "             multirun/broke/a/traceback.txt"} <= set(lines)
    assert any(line.startswith("saved        broken-checkpoint-2 13 MB  checkpoint-1 13 MB") for line in lines)
    assert any(line.startswith("unfinished   multirun/broke/a/model  ") for line in lines)
    assert "from         /there/multirun/base/s (trl.SFTTrainer, config abc)" in lines
    assert "resumed      2 times, at step 40, 80" in lines and "             one thing is odd" in lines
    assert any(line.startswith("versions     trl 0.1, here ") for line in lines)
    assert "             no-such-package 2.0, here not installed" in lines
    assert lines[-2].endswith("\N{MULTIPLICATION SIGN}")


def test_a_screen_of_an_older_record_says_what_it_has(said, folder):
    (folder / "multirun" / "old" / "a").mkdir(parents=True)
    file = folder / "multirun" / "old" / "a" / "run.json"
    file.write_text('{"status": "completed", "start": "1", "model": "owner/name", "metrics": {"eval_loss": 0.5}}')
    assert said("show", "old").splitlines()[:4] == [
        "old  a",
        "completed    0 steps",
        "model        owner/name",
        "read         multirun/old/a",
    ]
    (file.parent / "metrics.jsonl").write_text("no json\n")
    assert "loss" not in said("show", "old").replace("eval_loss", "") and said("compare", "old", "old", code=2)


def test_a_record_is_printed_as_it_is(said, kept):
    directory = kept("demo/a")
    assert json.loads(said("show", "demo", "--json")) == json.loads((directory / "run.json").read_text())


# ---------------------------------------------------------------- several runs


def test_what_differs_is_beside_what_came_of_it(said, kept, folder):
    kept("one/a")
    kept("two/b", status="diverged", metrics={}, args={"learning_rate": 0.5}, config={"name": "other"})
    kept("three/c", trainer="dpo", versions={"trl": "0.1"})
    lines = [line.split() for line in said("compare", "one", "two", "three").splitlines()]
    assert [line[:5] for line in lines[:3]] == [
        ["A", "one", "a", "completed", "2/2"],
        ["B", "two", "b", "diverged", "2/2"],
        ["C", "three", "c", "completed", "2/2"],
    ]
    assert lines[0][-4:-2] == ["loss", lines[1][-3]] and set(lines[0][5]) <= set("▁▂▃▄▅▆▇█")
    assert ["config", "A", "B", "C"] in lines and ["trainer.args.learning_rate", "0.001", "0.5", "3e-05"] in lines
    assert ["trainer.args.beta", "-", "-", "0.1"] in lines and ["held-out", "A", "B", "C"] in lines
    (loss,) = [line for line in lines if line[:1] == ["eval_loss"]]
    assert loss[2] == "-" and float(loss[1]) > float(loss[3])
    assert ["versions", "A", "B", "C"] in lines and ["data", "A", "B", "C"] in lines
    shown = {line[0] for line in lines if line}
    assert not {"name", "data.workers", "trainer.args.output_dir", "seed", "eval_runtime"} & shown
    assert [*folder.iterdir()] == [folder / "multirun"]  # no picture unless asked


def test_what_is_equal_is_said_and_a_sweep_stands_for_all_its_runs(said, several):
    text = said("compare", "20260104-000000-dddd", "demo")
    assert [line.split()[1:3] for line in text.splitlines()[:3]] == [
        ["grid", "20260104-000000-dddd/0_seed-1"],
        ["grid", "20260104-000000-dddd/1_seed-2"],
        ["demo", "20260102-000000-bbbb"],
    ]
    assert text.endswith("\n\nequal: versions\n")
    assert said("compare", "demo", "hot").endswith("\n\nequal: config, versions, data\n")


def test_a_comparison_as_data(said, kept):
    kept("one/a")
    kept("two/b", trainer="dpo")
    answer = json.loads(said("compare", "one", "two", "--json"))
    assert answer["config"]["trainer.args.beta"] == {"B": 0.1} and answer["versions"] == {}
    assert answer["config"]["trainer._target_"] == {"A": "smoltrain.sft.SFTTrainer", "B": "smoltrain.dpo.DPOTrainer"}
    assert answer["runs"]["A"]["results"]["eval_loss"] == answer["runs"]["A"]["objective"]
    assert {"train", "test"} <= set(answer["data"])


def test_curves_are_drawn_where_they_are_asked_for(said, kept, folder, monkeypatch):
    kept("one/a")
    kept("two/b", trainer="dpo")
    assert said("compare", "one", "two", "--plot", "curves.png").endswith("\nplot  curves.png\n")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(said("compare", "one", "two", "--plot=curves.svg", "--json"))
    text = (folder / "curves.svg").read_text()
    assert text.startswith("<?xml") and "two b" in text
    assert "--plot x.docx: " in said("compare", "one", "two", "--plot", "x.docx", code=2)
    assert "--plot no/x.png: " in said("compare", "one", "two", "--plot", "no/x.png", code=2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install matplotlib" in said("compare", "one", "two", "--plot", "y.png", code=2)
    for name in ("one/a", "two/b"):
        (folder / "multirun" / name / "metrics.jsonl").unlink()
    assert "none of these runs has logged a loss" in said("compare", "one", "two", "--plot", "y.png", code=2)
    assert not (folder / "y.png").exists() and "no loss" in said("compare", "one", "two")


# ---------------------------------------------------------------- curves in blocks


@pytest.mark.parametrize(
    ("points", "last", "wide", "expected"),
    [
        ([(1, 8.0), (2, 1.0)], 2, 4, "██▁▁"),
        ([(2, 8.0), (4, 1.0)], 4, 4, "██▁▁"),  # what is logged at step 2 is of steps 1 and 2
        ([(1, 8.0), (2, 1.0)], 4, 4, "█▁  "),  # nothing after the end
        ([(i, float(9 - i)) for i in range(1, 9)], 8, 8, "█▇▆▅▄▃▂▁"),
        ([(1, 8.0), (2, 6.0), (3, 3.0), (4, 1.0)], 4, 2, "▇▂"),  # the mean of a column
        ([(1, 8.0), (2, math.nan), (3, 1.0)], 3, 3, "█\N{MULTIPLICATION SIGN}▁"),
        ([(1, 8.0), (2, math.inf)], 2, 2, "█\N{MULTIPLICATION SIGN}"),
        ([], 4, 4, "    "),
    ],
)
def test_a_curve_in_blocks(points, last, wide, expected):
    assert bars(points, last, wide, 1.0, 8.0) == [expected]


def test_a_taller_curve_fills_line_by_line_and_a_flat_one_stays_flat():
    assert bars([(1, 16.0), (2, 8.0), (3, 1.0)], 3, 3, 1.0, 16.0, tall=2) == ["█  ", "██▁"]
    assert bars([(1, 3.0), (2, 3.0)], 2, 2, 3.0, 3.0) == ["▁▁"]


# ---------------------------------------------------------------- the terminal, and how fast it is


def test_a_terminal_that_is_too_narrow_cuts_the_paths_of_runs(kept, capsys, monkeypatch):
    kept(f"grid/20260104-000000-dddd/0_{'long-' * 20}name")
    kept("demo/20260101-000000-aaaa")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(["runs"]) == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert max(map(len, text.splitlines())) <= 90 and "…" in text and "20260101-000000-aaaa" in text


def test_a_thousand_runs_are_listed_in_half_a_second_and_without_anything_heavy(kept, folder):
    """CPU time of the whole command, the start of Python included."""
    record = json.loads((kept("real/a") / "run.json").read_text())
    statuses = ("completed", "completed", "failed", "diverged", "preempted")
    for i in range(1000):
        directory = folder / "multirun" / f"name{i % 13}" / f"20260101-{i:06}-aaaa"
        for inner in ("model", "checkpoint-100", ".hydra"):
            (directory / inner).mkdir(parents=True)
        start = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=i)).isoformat()
        changed = {"name": f"name{i % 13}", "start": start, "status": statuses[i % 5], "objective": i / 1000}
        (directory / "run.json").write_text(json.dumps(record | changed, indent=1))
    heavy = "{'torch', 'numpy', 'hydra', 'omegaconf', 'rich', 'datasets'}"
    program = f"import sys\nfrom smoltrain.__main__ import main\nmain(sys.argv[1:])\nprint({heavy} & set(sys.modules))"
    command = [sys.executable, "-c", program, "runs", "trainer.args.seed=0", "--sort=objective"]
    took = []
    for _ in range(3):  # the first compiles what no test has imported yet, and the machine has much else to do
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    *lines, last = done.stdout.splitlines()
    assert len(lines) == 1002 and last == "set()" and min(took) <= 0.5
