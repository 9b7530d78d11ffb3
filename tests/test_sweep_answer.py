"""The answer of a sweep: what is ranked and what is not, what seeds can tell, what a key does, and what is refused."""

import csv
import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from functools import partial
from itertools import combinations, product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

from smoltrain import runs
from smoltrain.__main__ import main
from smoltrain.completion import offers
from smoltrain.config import ConfigError
from smoltrain.sweep import answer, record
from smoltrain.sweep.statistics import Configuration, against_the_best, estimate, holm, inside, p_value, quantile

OURS = {"host": platform.node(), "pid": os.getpid()}
STAMP = "20261123-140000-abcd"


def a_run(directory: Path, overrides: dict, status: str, objective: float | None, name: str, **facts) -> None:
    """Writes the record of a run and its metrics, as a run of 40 steps leaves them."""
    directory.mkdir(parents=True)
    trainer = overrides.get("trainer", "sft")
    args = {"learning_rate": overrides.get("trainer.args.learning_rate", 1e-3), "max_length": 128}
    args |= {"beta": overrides.get("trainer.args.beta")}
    done = {"completed": 40, "diverged": 7}.get(status, 20)
    metrics = {"before/eval_loss": 4.5} | ({"eval_loss": objective, "exact_match": 0.5} if objective else {})
    kept = {
        "status": status,
        "name": name,
        "trainer": f"trl.{trainer.upper()}Trainer",
        "model": "pkg://smoltrain/tiny",
        "config_hash": f"{abs(hash(json.dumps(overrides))):016x}"[:16],
        "choices": {"trainer": trainer, "model": "tiny", "data": "sums"},
        "overrides": [f"{key}={value}" for key, value in overrides.items()],
        "seed": overrides.get("seed", 0),
        "parent": None,
        "start": "2026-11-23T14:00:00+00:00",
        "end": "2026-11-23T14:00:05+00:00",
        "seconds": 5.0,
        "process": OURS,
        "resumed": [],
        "versions": {},
        "steps": done,
        "max_steps": 40,
        "metrics": metrics,
        "fingerprints": {} if status == "failed" else dict.fromkeys(("test", "asked"), overrides.get("data.path", "")),
        "objective": objective if status == "completed" else None,
        "error": "smoltrain.runs.Diverged: loss is nan at step 7" if status == "diverged" else None,
        "config": {
            "name": name,
            "seed": overrides.get("seed", 0),
            "objective": "eval_loss",
            "trainer": {"_target_": f"trl.{trainer.upper()}Trainer", "args": args},
            "model": {"name_or_path": overrides.get("model", "tiny"), "from_run": overrides.get("model.from_run")},
            "evaluation": {"max_new_tokens": overrides.get("evaluation.max_new_tokens")},
            "callbacks": {"tracking": {"_target_": "smoltrain.tracking.Trackio", "project": "smoltrain"}},
        },
    }
    (directory / "run.json").write_text(json.dumps(kept | facts))
    last = objective if objective and status == "completed" else 2.0
    losses = [(step, last + 3 * math.exp(-step / 10) + 0.1 * math.sin(7 * step + last)) for step in range(1, done + 1)]
    if status == "diverged":
        losses = [(step, loss + 1.7**step) for step, loss in losses]
    lines = [{"step": step, "loss": loss} for step, loss in losses]
    lines += [{"step": step, "eval_loss": loss + 0.1} for step, loss in losses if step % 10 == 0]
    if status == "diverged":
        lines[-1]["loss"] = math.nan
    lines.sort(key=lambda row: row["step"])
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    if status == "completed":
        (directory / "model").mkdir()


@pytest.fixture
def swept(folder):
    """Writes a sweep: its keys with their values, and of each combination what it came to, a number or a status."""

    def write(keys: dict[str, list], came, path: str = f"grid/{STAMP}", **facts) -> Path:
        return a_sweep(folder / "multirun" / path, keys, came, **facts)

    return write


def a_sweep(directory: Path, keys: dict[str, list], came, codes: dict[int, int | None] | None = None, **facts) -> Path:
    trials = []
    for number, values in enumerate(product(*keys.values())):
        overrides = dict(zip(keys, values, strict=True))
        label = f"{number}_" + "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in overrides.items())
        result = came(**{key.rpartition(".")[2]: value for key, value in overrides.items()})
        status = result if isinstance(result, str) else "completed"
        if status != "pending":
            objective = result if not isinstance(result, str) else -9.0 if status == "diverged" else None
            a_run(directory / label, overrides, status, objective, directory.parent.name)
        code = {"completed": 0, "diverged": 3, "preempted": 143, "failed": 1}.get(status)
        trials.append({"number": number, "overrides": overrides, "config_hash": f"{number:016x}", "directory": label})
        trials[-1]["code"] = (codes or {}).get(number, code)
    kept = {
        "name": directory.parent.name,
        "start": "2026-11-23T14:00:00+00:00",
        "since": "2026-11-23T14:00:00+00:00",
        "seconds": 200,
        "end": "2026-11-23T14:03:20+00:00",
        "process": OURS,
        "command": [f"{key}={','.join(map(str, values))}" for key, values in keys.items()],
        "from_run": {},
        "search": {"method": "grid"},
        "objective": "eval_loss",
        "varied": list(keys),
        "trials": trials,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sweep.json").write_text(json.dumps(kept | facts))
    return directory


@pytest.fixture(autouse=True)
def one_measure(request, monkeypatch):
    """These tests vary trainers and files for their short names; what is then compared apart, one test looks at."""
    if "apart" not in request.fixturenames:
        monkeypatch.setattr(record, "measure", lambda *_: [])


@pytest.fixture
def apart():
    """The objective measures what it measures."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """A picture takes longer than all the rest: only the tests that ask for `pictured` draw it."""
    if "pictured" not in request.fixturenames:
        monkeypatch.setattr("smoltrain.sweep.answer.draw", lambda file, found: True)


@pytest.fixture
def pictured():
    return None


@pytest.fixture
def at_work():
    """Makes this process that of a run or a sweep, until the test ends or lets go of it."""
    yield runs.hold
    for directory in [*runs.HELD]:
        runs.let_go(directory)


@pytest.fixture
def said(printed):
    """Runs a command line below `smoltrain sweep` and returns what it prints."""
    return partial(printed, "sweep")


@pytest.fixture
def terminal(monkeypatch):
    """Makes the standard output a terminal of so many columns."""

    def of(columns: int) -> None:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm-256color")

    return of


def rows(text: str) -> list[list[str]]:
    """The cells of the table, in which two spaces are between them."""
    table = text.split("\n\n")[1].splitlines()
    return [re.split(r"\s{2,}", row.strip()) for row in table]


RATE = "trainer.args.learning_rate"
GRID = {"trainer": ["sft", "dpo"], RATE: [1e-4, 1e-3], "seed": [1, 2, 3]}
CAME = dict(
    zip(
        product(*GRID.values()),
        (0.91, 0.94, 0.98, 0.95, 0.96, 0.97, 0.52, 0.55, 0.50, 0.551, 0.540, 0.571),
        strict=True,
    )
)


def came(trainer, learning_rate, seed):
    return CAME[trainer, learning_rate, seed]


def values(trainer, learning_rate):
    return [came(trainer, learning_rate, seed) for seed in (1, 2, 3)]


# ---------------------------------------------------------------- the table


def test_over_seeds_the_table_has_means_with_intervals_the_best_first(said, swept):
    swept(GRID, came)
    text = said("latest")
    assert text.splitlines()[:2] == [f"grid  {STAMP}", "12 trials: 12 completed; in 3 min"]
    heading, *found = rows(text)
    assert heading == ["trainer", "learning_rate", "seeds", "eval_loss"]
    expected = [("dpo", 1e-4), ("dpo", 1e-3), ("sft", 1e-4), ("sft", 1e-3)]
    for rank, (row, (trainer, rate)) in enumerate(zip(found, expected, strict=True), 1):
        low, high = stats.t.interval(0.95, 2, np.mean(values(trainer, rate)), stats.sem(values(trainer, rate)))
        assert row[:4] == [str(rank), trainer, str(rate), "3"]
        assert row[4] == f"{np.mean(values(trainer, rate)):.4f} ± {(high - low) / 2:.4f}"
    assert [row[5] for row in found] == ["best", "not distinguishable", "worse", "worse"]
    assert "95 % confidence interval (Student's t); smaller is better." in text


def test_every_configuration_is_compared_with_the_best_seed_by_seed(said, swept):
    swept(GRID, came)
    data = json.loads(said("grid", "--json"))
    groups = [values(*pair) for pair in product(GRID["trainer"], GRID[RATE])]
    pairs = list(combinations(range(4), 2))
    ordered = sorted(pairs, key=lambda pair: stats.ttest_rel(*(groups[i] for i in pair)).pvalue)
    corrected: dict[tuple, float] = {}
    for i, pair in enumerate(ordered):
        p = (6 - i) * stats.ttest_rel(*(groups[i] for i in pair)).pvalue
        corrected[pair] = min(max(p, *corrected.values(), 0), 1)
    best = 2
    for one in data["configurations"][1:]:
        index, against = one["trials"][0] // 3, one["against_the_best"]
        low, high = stats.ttest_rel(groups[index], groups[best]).confidence_interval(0.95)
        assert against["difference"]["mean"] == pytest.approx((low + high) / 2)
        assert against["difference"]["half"] == pytest.approx((high - low) / 2)
        assert against["p"] == pytest.approx(corrected[min(index, best), max(index, best)])
        assert against["distinguishable"] == (against["p"] <= 0.05)
    text = said("grid")
    assert "1 of 3 not distinguishable from the best" in text and "Holm for all 6 pairs" in text
    assert re.search(
        r"^2  trainer=dpo learning_rate=0.001 +\+0\.0307 ± 0\.\d{4} +3  [01]\.\d{3}  not distinguishable$", text, re.M
    )


def test_trials_of_one_seed_are_ranked_and_nothing_is_said_of_their_differences(said, swept):
    swept({RATE: [1e-5, 1e-4, 1e-3]}, lambda learning_rate: 0.5 + learning_rate)
    text = said("latest")
    assert [row[:3] for row in rows(text)[1:]] == [
        ["1", "1e-05", "0.5000"],
        ["2", "0.0001", "0.5001"],
        ["3", "0.001", "0.5010"],
    ]
    assert "One seed each: nothing can be said about which differences are more than chance." in text
    assert f"seeds   smoltrain -m {RATE}=1e-05,0.0001,0.001 seed=0,1,2\n" in text
    assert "±" not in text and "p of" not in text and "distinguishable" not in text


def test_seeds_alone_have_one_mean_and_nothing_to_compare(said, swept):
    swept({"seed": [4, 5, 6, 7]}, lambda seed: {4: 0.5, 5: 0.52, 6: 0.47, 7: 0.55}[seed])
    text = said("latest")
    half = stats.t.ppf(0.975, 3) * stats.sem([0.5, 0.52, 0.47, 0.55])
    assert f"Over 4 seeds: 0.5100 ± {half:.4f} (the mean" in text
    assert "One seed" not in text and "best  " not in text.split("\n\n")[1] and "distinguishable" not in text


def test_an_objective_that_grows_is_ranked_by_the_greatest(said, swept):
    swept({RATE: [1e-4, 1e-3]}, lambda learning_rate: 0.5 + learning_rate * 100, objective="eval_rewards/accuracies")
    text = said("latest")
    assert [row[2] for row in rows(text)[1:]] == ["60.0%", "51.0%"] and "greater is better" in text


# ---------------------------------------------------------------- what is not ranked


@pytest.mark.parametrize("status", ["diverged", "failed", "interrupted", "preempted", "running", "pending"])
@pytest.mark.parametrize("objective", ["eval_loss", "exact_match"])
def test_what_did_not_complete_is_marked_and_never_ranked_whatever_it_came_to(said, swept, at_work, status, objective):
    """The record of every one of these holds the best objective of all."""
    directory = swept({"data.path": ["a", "b", "c"]}, lambda path: status if path == "a" else 0.5, objective=objective)
    for file in directory.glob("0_*/run.json"):
        facts = {"objective": -9.0 if objective == "eval_loss" else 9.0, "status": status}
        file.write_text(json.dumps(json.loads(file.read_text()) | facts))
        if status == "running":
            at_work(file.parent)
    found = rows(said("latest"))[1:]
    assert [row[:2] for row in found] == [["1", "b"], ["1", "c"], ["-", "a"]] and found[2][-1] == status
    data = json.loads(said("latest", "--json"))
    assert data["best"] == [1] and data["configurations"][2]["rank"] is None and data["trials"][0]["objective"] is None


@pytest.mark.parametrize("status", ["diverged", "failed", "pending"])
def test_a_configuration_of_which_a_seed_did_not_complete_is_not_ranked(said, swept, status):
    """Its other seeds came to less than any other's: how good it is when it does not diverge is another question."""
    swept(
        {RATE: [1e-4, 1e-3, 1e-2], "seed": [1, 2, 3]},
        lambda learning_rate, seed: (
            (status if seed == 2 else 0.1 * seed) if learning_rate == 1e-3 else 0.5 + 0.01 * seed
        ),
    )
    text = said("latest")
    found = rows(text)[1:]
    assert [row[0] for row in found] == ["1", "1", "-"]
    assert found[2][1:4] == ["0.001", "2 of 3", "0.2000 ± 1.2706"] and found[2][4] == f"{status}: seed 2"
    assert "A configuration of which a seed did not complete is not ranked" in text
    assert "learning_rate=0.001 " not in text.split("seed by seed")[1].split("files")[0]
    assert json.loads(said("latest", "--json"))["best"] in ([0], [6])


def test_a_completed_trial_without_the_objective_is_not_ranked(said, swept):
    directory = swept({"data.path": ["a", "b"]}, lambda path: 0.5)
    file = directory / "1_path-b" / "run.json"
    for value in (None, math.nan):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"objective": value}))
        assert rows(said("latest"))[2] == ["-", "b", "-", "no eval_loss"]


def test_where_nothing_completed_nothing_is_ranked(said, swept):
    swept({RATE: [1e-1, 1.0], "seed": [1, 2]}, lambda **_: "diverged")
    text = said("latest")
    assert "No configuration completed with eval_loss: none is ranked." in text and "best" not in text
    assert {row[0] for row in rows(text)[1:]} == {"-"}


def test_the_reasons_are_below_the_table(said, swept):
    directory = swept(
        {"data.path": [*"abcd"]},
        lambda path: {"a": "diverged", "b": "failed", "c": "pending", "d": "interrupted"}[path],
        codes={1: 1, 2: -9, 3: -9},
    )
    file = directory / "1_path-b" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"error": "Traceback\n  deep\nMemoryError: no room"}))
    text = said("latest")
    assert "\ndiverged  path=a: loss is nan at step 7\n" in text and "\nfailed  path=b: MemoryError: no room\n" in text
    assert "\nfailed  path=c: killed by SIGKILL\n" in text and "\ninterrupted  path=d: killed by SIGKILL\n" in text
    assert text.count("go on   smoltrain -m data.path=a,b,c,d\n") == 1


def test_a_sweep_that_runs_says_so_and_one_that_was_cut_off_too(said, swept, at_work):
    came = {"a": 0.5, "b": "running", "c": "pending"}
    directory = swept({"data.path": ["a", "b", "c"]}, lambda path: came[path], end=None)
    for one in (directory, directory / "1_path-b"):
        at_work(one)
    text = said("latest")
    assert re.search(r"3 trials: 1 completed, 1 running, 1 pending; for .* now", text) and "go on" not in text
    for one in (directory, directory / "1_path-b"):
        runs.let_go(one)
    text = said("latest")
    assert "3 trials: 1 completed, 1 interrupted, 1 pending; cut off" in text and "go on " in text


# ---------------------------------------------------------------- what each key does


def test_main_effects_are_means_over_what_completed_for_each_value(said, swept):
    """At a rate of 0.01 DPO did not complete: no trainer is better off for having been spared what was hard."""
    came = {("sft", 1e-3): 0.9, ("sft", 1e-2): 2.0, ("dpo", 1e-3): 0.5, ("dpo", 1e-2): "diverged"}
    swept({"trainer": ["sft", "dpo"], RATE: [1e-3, 1e-2]}, lambda trainer, learning_rate: came[trainer, learning_rate])
    by_trainer, by_rate = json.loads(said("latest", "--json"))["main_effects"]
    assert by_trainer == {
        "part": "",
        "key": "trainer",
        "means": [["sft", 0.9], ["dpo", 0.5]],
        "combinations": 1,
        "of": 2,
    }
    assert by_rate == {"part": "", "key": RATE, "means": [[1e-3, 0.9], [1e-2, 2.0]], "combinations": 1, "of": 2}
    text = said("latest")
    assert re.search(r"^trainer +dpo +0\.5000  1 of 2$", text, re.M) and "of the other keys that completed" in text


def test_a_value_of_which_nothing_completed_stands_in_no_ones_way(said, swept):
    swept(
        {RATE: [1e-3, 1e-2, 1.0], "seed": [1, 2]},
        lambda learning_rate, seed: "diverged" if learning_rate == 1 else seed,
    )
    assert "by key" not in said("latest")  # one key, and the table says it all
    keys = {"trainer": ["sft", "dpo"], RATE: [1e-3, 1.0], "seed": [1, 2]}
    swept(keys, lambda trainer, learning_rate, seed: "diverged" if learning_rate == 1 else 1.0 * seed, "hot/2")
    _, by_rate = json.loads(said("hot", "--json"))["main_effects"]
    assert by_rate == {"part": "", "key": RATE, "means": [[1e-3, 1.5], [1.0, None]], "combinations": 4, "of": 4}
    assert re.search(r"^ +1\.0 +-  none completed$", said("hot"), re.M)


def test_where_no_combination_completed_for_every_value_it_is_said(said, swept):
    came = {("sft", 1e-3): 0.9, ("dpo", 1e-2): 0.5}
    swept(
        {"trainer": ["sft", "dpo"], RATE: [1e-3, 1e-2]},
        lambda trainer, learning_rate: came.get((trainer, learning_rate), "failed"),
    )
    assert said("latest").count("no combination of the other keys completed for each of its values") == 2


# ---------------------------------------------------------------- statistics


def test_an_interval_holds_the_mean_95_times_in_100():
    random = np.random.default_rng(0)
    for seeds in (2, 3, 5):
        found = [estimate(list(random.normal(0.7, 0.1, seeds))) for _ in range(2000)]
        assert np.mean([abs(one.mean - 0.7) <= one.half for one in found]) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 29, 200])
def test_students_t_is_his(freedom):
    for t in (1e-3, 0.1, 1.0, 2.5, 15.0, 1e4):
        assert inside(t, freedom) == pytest.approx(1 - 2 * stats.t.sf(t, freedom), abs=1e-12)
    assert quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-12)


def of_seeds(columns: np.ndarray) -> list[Configuration]:
    """Configurations of these values by seed, the best first."""
    found = [Configuration({}, ()) for _ in columns]
    for one, column in zip(found, sorted(columns, key=np.mean), strict=True):
        one.__dict__["values"] = {str(seed): float(value) for seed, value in enumerate(column)}
    return found


@pytest.mark.parametrize("many", [2, 3, 8])
def test_equal_configurations_are_not_distinguishable_at_least_95_times_in_100(many):
    """Although the best was chosen by its results; a seed makes all of them better or worse."""
    random, wrong = np.random.default_rng(many), 0
    for _ in range(400):
        columns = random.normal(0, 0.1, (many, 5)) + random.normal(0, 1, (1, 5))
        wrong += any(one.distinguishable for one in against_the_best(of_seeds(columns)))
    assert wrong / 400 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


def test_different_configurations_are_distinguished():
    random, right = np.random.default_rng(1), 0
    for _ in range(100):
        columns = random.normal(0, 0.1, (4, 5)) + random.normal(0, 1, (1, 5)) + np.array([[0], [0], [1], [1]])
        right += [one.distinguishable for one in against_the_best(of_seeds(columns))] == [False, True, True]
    assert right >= 90


def test_holm_is_what_he_defined():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_differences_that_are_all_the_same_are_not_certain():
    """Two rows more of a test set, for each of three seeds: the t-test would divide by nothing."""
    assert p_value([0.985 - 0.975, 0.98 - 0.97, 0.99 - 0.98]) == 0.25 and p_value([0.0, 0.0]) == 1.0
    assert estimate([0.5, 0.5]).half == 0.0


def test_configurations_are_compared_over_the_seeds_that_both_have(said, swept):
    directory = swept({RATE: [1e-4, 1e-3, 1e-2], "seed": [1, 2, 3]}, lambda learning_rate, seed: learning_rate + seed)
    kept = json.loads((directory / "sweep.json").read_text())
    kept["trials"] = [trial for i, trial in enumerate(kept["trials"]) if i not in (5, 7, 8)]
    (directory / "sweep.json").write_text(json.dumps(kept))
    text = said("latest")
    assert [row[2] for row in rows(text)[1:]] == ["1", "2", "3"]
    assert "not comparable" in text and {row[1] for row in rows(text)[1:]} == {"0.0001", "0.001", "0.01"}


# ---------------------------------------------------------------- files


def test_results_are_written_for_programs(pictured, said, swept, folder):
    directory = swept(
        {"trainer": ["sft", "dpo"], "trainer.args.use_cpu": [True]},
        lambda trainer, use_cpu: 0.5 if trainer == "sft" else "diverged",
    )
    said("latest")
    with (directory / "results.csv").open() as file:
        first, second = csv.DictReader(file)
    assert [*first][:4] == ["number", "trainer", "trainer.args.use_cpu", "status"]
    assert (first["trainer"], first["trainer.args.use_cpu"], first["status"]) == ("sft", "true", "completed")
    assert (first["objective"], first["eval_loss"], first["exact_match"], first["steps"]) == ("0.5", "0.5", "0.5", "40")
    assert first["directory"] == f"multirun/grid/{STAMP}/0_trainer-sft_use_cpu-True" and first["seconds"] == "5.0"
    assert (second["status"], second["objective"]) == ("diverged", "") and "loss is nan" in second["error"]
    data = json.loads((directory / "results.json").read_text(), parse_constant=pytest.fail)
    assert data == json.loads(said("latest", "--json")) and data["exit_code"] == 3
    assert data["trials"][0]["metrics"] == {"eval_loss": 0.5, "exact_match": 0.5}
    assert (directory / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in directory.iterdir() if file.is_file()} == {
        "sweep.json",
        "results.csv",
        "results.json",
        "sweep.png",
    }


def test_as_json_nothing_is_written_and_numbers_are_finite(said, swept):
    directory = swept({"data.path": ["a"]}, lambda path: 0.5)
    file = directory / "0_path-a" / "run.json"
    kept = json.loads(file.read_text())
    kept["metrics"]["eval_entropy"] = math.inf
    file.write_text(json.dumps(kept))
    (trial,) = json.loads(said("latest", "--json"), parse_constant=pytest.fail)["trials"]
    assert trial["metrics"]["eval_entropy"] is None
    assert {entry.name for entry in directory.iterdir()} == {"sweep.json", "0_path-a"}


def test_a_folder_that_cannot_be_written_to_does_not_hide_the_table(pictured, said, swept):
    directory = swept({"data.path": ["a", "b"]}, lambda path: 0.5)
    (directory / "results.csv.tmp").mkdir()
    text = said("latest")
    assert "0.5000" in text and "files   not written, " in text


def test_without_matplotlib_there_is_no_picture_and_it_is_said(pictured, said, swept, monkeypatch):
    directory = swept({"data.path": ["a", "b"]}, lambda path: 0.5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = said("latest")
    assert "no sweep.png: matplotlib draws it, and is not installed; pip install matplotlib" in text
    assert "results.csv" in text and not (directory / "sweep.png").exists()


# ---------------------------------------------------------------- the picture


ODD = {"a": 0.5, "$x_{1$ & ünter": 0.6, "日本": "diverged", "_b": "pending", None: 0.7, 3: "failed"}


@pytest.mark.parametrize(
    ("keys", "came"),
    [
        (GRID, came),
        ({RATE: [10.0**-i for i in range(9)]}, lambda learning_rate: learning_rate),
        ({"data.path": list(ODD)}, lambda path: ODD[path]),
        ({"seed": [1, 2]}, lambda seed: 0.5),
        ({RATE: [1e-3, 1e-2], "seed": [1, 2]}, lambda **_: "diverged"),
        ({RATE: [1e-3, 1e-2], "trainer": ["sft", "dpo"]}, lambda **_: "pending"),
        ({RATE: [-1.0, 0.0, math.inf], "x": [1, 2], "y": [[1], {"a": 2}], "z": [True, False]}, lambda **_: 0.5),
        ({}, lambda: 0.5),
        ({RATE: []}, lambda learning_rate: 0.5),
    ],
    ids=["grid", "decades", "odd", "seeds", "diverged", "pending", "four", "nothing", "none"],
)
def test_a_picture_is_drawn_of_whatever_there_is(pictured, said, swept, keys, came):
    directory = swept(keys, came)
    said("latest")
    assert (directory / "sweep.png").stat().st_size > 5000


def test_numbers_over_a_decade_have_a_logarithmic_axis_and_words_none():
    from matplotlib.figure import Figure

    from smoltrain.sweep.plots import placed

    scales = []
    for values in ([1e-4, 1e-3], [1, 2, 8], [0.0, 10.0, 100.0], ["sft", "dpo"], [True, False], [1, "x"]):
        axes = Figure().subplots()
        places = placed(axes, values)
        scales.append((axes.get_xscale(), list(places.values())))
    assert scales[0] == ("log", [1e-4, 1e-3]) and scales[1] == ("linear", [1.0, 2.0, 8.0])
    assert scales[2][0] == "linear" and scales[3] == scales[4] == scales[5] == ("linear", [0, 1])


def test_what_diverged_does_not_flatten_the_other_curves():
    from matplotlib.figure import Figure

    from smoltrain.sweep.plots import limits

    axes = Figure().subplots()
    axes.plot([1, 2], [1.0, 1e9])
    limits(axes, [1.0, 2.0])
    assert axes.get_ylim()[1] < 2.2


# ---------------------------------------------------------------- the terminal


LONG = {"trainer": ["sft", "dpo"], "data.path": ["a/very/long/path/of/a/file.jsonl", "b.jsonl"], RATE: [1e-3, 1e-2]}


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("colour", [True, False])
def test_a_table_fits_the_terminal(capsys, swept, terminal, monkeypatch, columns, colour):
    keys = LONG | {"seed": [1, 2, 3]}
    swept(
        keys,
        lambda trainer, path, learning_rate, seed: "diverged" if path[0] == "b" and seed == 2 else 0.5 + 0.1 * seed,
    )
    terminal(columns)
    monkeypatch.setenv(*(("FORCE_COLOR", "1") if colour else ("NO_COLOR", "1")))
    assert main(["sweep", "latest"]) == 0
    printed = capsys.readouterr().out
    assert ("\x1b[32m" in printed or "\x1b[1;32m" in printed) == colour == ("\x1b[31m" in printed)
    text = re.sub(r"\x1b\[[\d;]*m", "", printed)
    table = text.split("\nfiles ")[0]
    assert max(map(len, table.splitlines())) <= columns
    assert "…" in table or columns == 120
    assert (
        ("diverged: seed 2" if columns > 60 else "diverged: …") in table
        and "0.7000 ± 0.2484" in table
        and "not distinguishable" in table
    )
    assert f"smoltrain dashboard {STAMP}\n" in text and "0_trainer-sft_path-a/" in text  # to be copied, whole


def test_without_a_terminal_there_is_no_colour_and_no_value_is_cut(said, swept):
    paths = [f"{'long/' * 9}{name}" for name in "ab"]
    swept({"data.path": paths, "data.test_path": paths, "model.name_or_path": paths}, lambda **_: 0.5)
    text = said("latest")
    assert (
        "\x1b" not in text
        and "…" not in text.split("\n\n")[1]
        and max(map(len, text.split("\n\n")[2].splitlines())) < 121
    )


# ---------------------------------------------------------------- where to look next


def test_the_dashboards_link_shows_these_runs_and_no_others(said, swept, monkeypatch):
    from urllib.parse import parse_qs, urlsplit

    swept({RATE: [1e-4, 1e-3]}, lambda learning_rate: 0.5)
    (link,) = re.findall(r"http://\S+", said("latest"))
    query = parse_qs(urlsplit(link).query)
    names = [f"{STAMP}/{number}_learning_rate-{rate}" for number, rate in ((0, 1e-4), (1, 1e-3))]
    assert query["runs"] == [",".join(names)] and query["project"] == ["smoltrain"]
    assert query["metric_filter"] == ["train/loss|eval/loss"]

    opened = []
    tracking = ModuleType("smoltrain.tracking")  # the real one imports transformers: see test_tracking
    tracking.dashboard = opened.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "smoltrain.tracking", tracking)
    assert main(["dashboard", "latest"]) == 0
    assert opened == [f"?{urlsplit(link).query}"]


def test_runs_that_are_not_in_trackio_have_no_link(said, swept, capsys):
    directory = swept({RATE: [1e-4, 1e-3]}, lambda learning_rate: 0.5)
    for file in directory.glob("*/run.json"):
        file.write_text(file.read_text().replace("smoltrain.tracking.Trackio", "other.Tracker"))
    assert "dashboard" not in said("latest") and json.loads(said("latest", "--json"))["dashboard"] is None
    assert main(["dashboard", "latest"]) == main(["dashboard", "a", "b"]) == main(["dashboard", "--json"]) == 2
    errors = capsys.readouterr().err
    assert "latest: Trackio has none of its runs" in errors and "takes at most one sweep, not a b" in errors


def test_a_link_of_many_runs_is_in_results_json(said, swept):
    directory = swept({RATE: [10.0**-i for i in range(20)]}, lambda learning_rate: learning_rate)
    assert "http" not in said("latest") and "http" in (directory / "results.json").read_text()


def test_the_best_trial_is_the_best_one_of_the_best_configuration(said, swept):
    directory = swept(
        {"trainer": ["sft", "dpo"], "seed": [1, 2]},
        lambda trainer, seed: {("sft", 1): 0.1, ("sft", 2): 0.9, ("dpo", 1): 0.4, ("dpo", 2): 0.3}[trainer, seed],
    )
    best = f"{directory.relative_to(Path.cwd())}/3_trainer-dpo_seed-2"
    assert f"best    smoltrain runs show {best}\n        model.from_run={best} starts a run from it\n" in said("latest")
    (directory / "3_trainer-dpo_seed-2" / "model").rmdir()
    assert "model.from_run" not in said("latest")


# ---------------------------------------------------------------- trials


def test_a_trial_that_is_there_twice_is_one_row_and_one_may_be_elsewhere(said, swept, folder):
    directory = swept({"data.path": ["a", "b", "c"]}, lambda path: {"a": 0.5, "b": 0.6, "c": 0.7}[path])
    shutil.move(directory / "1_path-b", folder / "multirun" / "before")
    kept = json.loads((directory / "sweep.json").read_text())
    kept["trials"][1]["directory"] = "../../before"
    for name in ("config_hash", "directory"):
        kept["trials"][2][name] = kept["trials"][0][name]
    (directory / "sweep.json").write_text(json.dumps(kept))
    assert [row[1:3] for row in rows(said("latest"))[1:]] == [["a", "0.5000"], ["b", "0.6000"]]
    kept["trials"][1]["directory"] = str(folder / "multirun" / "before")
    (directory / "sweep.json").write_text(json.dumps(kept))
    assert len(rows(said("latest"))) == 3


def test_a_directory_that_was_deleted_and_a_record_that_cannot_be_read_are_rows(said, swept):
    directory = swept({"data.path": ["a", "b", "c"]}, lambda path: 0.5, codes={1: 0, 2: 1})
    shutil.rmtree(directory / "1_path-b")
    (directory / "2_path-c" / "run.json").write_text('{"status": "comp')
    text = said("latest")
    assert [row[-1] for row in rows(text)[1:]] == ["best", "pending", "failed"]
    assert f"pending  path=b: exit code 0, and no record in multirun/grid/{STAMP}/1_path-b\n" in text
    assert f"failed  path=c: multirun/grid/{STAMP}/2_path-c/run.json: unreadable, JSONDecodeError" in text
    for name in ("0_path-a", "2_path-c"):
        shutil.rmtree(directory / name)
    text = said("latest")
    assert "No trial completed" in text and "their directories are gone" in text


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["completed", "completed"], 0),
        (["completed", "diverged"], 3),
        (["diverged", "preempted"], 143),
        (["completed", "preempted", "failed"], 1),
        (["diverged", "interrupted"], 1),
        (["diverged", "pending"], 1),
        ([], 0),
    ],
)
def test_the_exit_code_of_a_sweep_tells_how_it_went(swept, capsys, statuses, code):
    directory = swept({"x": list(range(len(statuses)))}, lambda x: 0.5 if statuses[x] == "completed" else statuses[x])
    assert answer.summary(directory) == record.exit_code(record.read(directory)) == code
    assert f"{len(statuses)} trials" in capsys.readouterr().out and (directory / "results.json").exists()
    assert main(["sweep", str(directory)]) == 0  # shown
    kept = json.loads((directory / "sweep.json").read_text())
    (directory / "sweep.json").write_text(json.dumps(kept | {"end": None}))
    assert record.exit_code(record.read(directory)) == (
        code or 1
    )  # of one that was cut off, whatever its trials came to


# ---------------------------------------------------------------- which sweep, and trouble


@pytest.fixture
def three(swept, folder):
    for path, hour in ((f"grid/{STAMP}", 14), ("grid/20261124-000000-eeee", 15), ("deep/er/20261125-000000-ffff", 13)):
        swept({"x": [1, 2]}, lambda x: 0.5, path, start=f"2026-11-23T{hour}:00:00+00:00")
    a_run(folder / "multirun" / "single" / "20261126-000000-aaaa", {}, "completed", 0.5, "single")
    (folder / "empty").mkdir()


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("latest", "grid/20261124-000000-eeee"),
        ("grid", "grid/20261124-000000-eeee"),
        ("gri", "grid/20261124-000000-eeee"),
        (STAMP, f"grid/{STAMP}"),
        ("20261123", f"grid/{STAMP}"),
        (f"grid/{STAMP}", f"grid/{STAMP}"),
        ("deep", "deep/er/20261125-000000-ffff"),
        ("deep/er", "deep/er/20261125-000000-ffff"),
        (f"multirun/grid/{STAMP}/", f"grid/{STAMP}"),
        ("multirun/grid", "grid/20261124-000000-eeee"),
    ],
)
def test_a_sweep_is_meant_by(three, folder, reference, expected):
    assert record.resolve(reference).resolve() == folder / "multirun" / expected


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("2026112", "3 sweeps begin so, 20261123-140000-abcd, 20261124-000000-eeee, 20261125-000000-ffff"),
        ("gird", r"no sweep of that name, stamp or path in .*multirun; did you mean grid\?"),
        ("empty", "empty: this is an empty folder, no sweep"),
        ("single", r"single: this is a run, no sweep .*; smoltrain runs show single"),
        ("multirun/single/20261126-000000-aaaa", "this is a single run, no sweep; smoltrain runs show multirun/single"),
        (f"multirun/grid/{STAMP}/0_x-1", f"this is a trial of the sweep {STAMP}; smoltrain sweep {STAMP}"),
        (
            f"multirun/grid/{STAMP}/sweep.json",
            f"this is a file; a sweep is named by its directory, multirun/grid/{STAMP}",
        ),
        ("multirun/single", "no sweep.json is in this folder, so that it is no sweep; 1 run is in it"),
        ("trainer=sft,dpo", "a sweep is started by smoltrain -m trainer=sft,dpo"),
        ("", "no sweep of that name"),
        ("x" * 5000, "no sweep of that name"),
        ("a\0b", "no sweep of that name"),
    ],
    ids=lambda text: str(text)[:24].replace("\0", "0"),
)
def test_what_is_no_sweep_is_refused_and_said_what_it_is(three, reference, message):
    with pytest.raises(ConfigError, match=message):
        record.resolve(reference)


def test_a_whole_name_is_meant_before_the_beginning_of_another(swept, folder):
    for name, hour in (("grid", 14), ("gridlock", 15)):
        swept({"x": [1, 2]}, lambda x: 0.5, f"{name}/{hour}", start=f"2026-11-23T{hour}:00:00+00:00")
    assert record.resolve("grid") == Path("multirun/grid/14")
    with pytest.raises(ConfigError, match="gri: 2 sweeps begin so, grid, gridlock"):
        record.resolve("gri")


def test_sweeps_are_completed_at_the_prompt(three):
    found = [offer.text for offer in offers(["sweep"], "")]
    grid = ["latest", "grid", "20261124-000000-eeee", STAMP]
    assert found == [*grid, "deep/er", "20261125-000000-ffff"] == [offer.text for offer in offers(["dashboard"], "")]


def test_no_sweep_at_all_says_how_to_make_one(said, folder):
    assert "there is no sweep in" in said("latest", code=2) and "smoltrain -m trainer=sft,dpo" in said("x", code=2)
    assert "takes one sweep" in said(code=2) and "--plot; smoltrain sweep --help" in said("latest", "--plot", code=2)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"name": 1}',
        "[" * 100_000,
        {"trials": [{"number": 0}]},
        {"trials": [3]},
        {"start": "yesterday"},
        {"process": []},
        {"objective": None},
    ],
    ids=lambda broken: str(broken)[:20],
)
def test_a_sweep_that_cannot_be_read_is_named_and_hides_no_other(said, swept, broken):
    swept({"x": [1]}, lambda x: 0.5, "good/1")
    file = swept({"x": [1]}, lambda x: 0.5, "bad/2") / "sweep.json"
    file.write_text(broken if isinstance(broken, str) else json.dumps(json.loads(file.read_text()) | broken))
    assert said("bad", code=2).startswith("multirun/bad/2/sweep.json: unreadable, ")
    assert rows(said("good"))[1][:2] == ["1", "1"]


# ---------------------------------------------------------------- how fast it is


def test_a_hundred_trials_are_answered_in_half_a_second_and_without_anything_heavy(swept):
    """CPU time of the whole command, the start of Python and Student's t included."""
    swept(
        {"trainer": ["sft", "dpo"], RATE: [10.0**-i for i in range(10)], "seed": [1, 2, 3, 4, 5]},
        lambda trainer, learning_rate, seed: learning_rate + 0.1 * seed + math.sin(seed / learning_rate),
    )
    heavy = "{'torch', 'hydra', 'omegaconf', 'rich', 'datasets', 'matplotlib'}"
    program = f"import sys\nfrom smoltrain.__main__ import main\nmain(sys.argv[1:])\nprint({heavy} & set(sys.modules))"
    command = [sys.executable, "-c", program, "sweep", "latest", "--json"]
    took = []
    for _ in range(3):  # the first compiles what no test has imported yet, and the machine has much else to do
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    *lines, last = done.stdout.splitlines()
    assert len(json.loads("\n".join(lines))["trials"]) == 100 and last == "set()" and min(took) <= 0.5


def test_losses_of_different_trainers_are_not_ranked_against_each_other(apart, swept, said):
    """DPO's loss is lower than SFT's whatever was learned."""
    came = {("sft", 1e-3): 2.0, ("sft", 1e-2): 3.0, ("dpo", 1e-3): 0.7, ("dpo", 1e-2): 0.6}
    keys = {"trainer": ["sft", "dpo"], RATE: [1e-3, 1e-2]}
    folder = swept(keys, lambda trainer, learning_rate: came[trainer, learning_rate])
    text = said("latest")
    assert "eval_loss measures another thing for each trainer: each is ranked by itself; objective=exact_match" in text
    first, second = text.split("trainer=sft\n")[1].split("trainer=dpo\n")[:2]
    assert re.findall(r"^(\d) +([\d.]+) ", first, re.MULTILINE) == [("1", "0.001"), ("2", "0.01")]
    assert re.findall(r"^(\d) +([\d.]+) ", second, re.MULTILINE) == [("1", "0.01"), ("2", "0.001")]
    data = json.loads(said("latest", "--json"))
    assert data["best"] == [0, 3] and {one["part"] for one in data["configurations"]} == {"trainer=sft", "trainer=dpo"}
    (folder / "sweep.json").write_text((folder / "sweep.json").read_text().replace('"eval_loss"', '"exact_match"'))
    assert "measures another thing" not in said("latest")
    swept({"data.path": ["a", "b"]}, lambda path: 0.5, path=f"rows/{STAMP}", objective="exact_match")
    assert "exact_match measures another thing for each data.path" in said("rows")


def test_what_is_measured_decides_what_is_compared_and_not_which_key_was_varied(apart, swept, said, folder):
    margins = {"objective": "eval_rewards/margins"}
    swept({"trainer.args.beta": [0.1, 1.0]}, lambda beta: beta, path=f"margins/{STAMP}", **margins)
    assert "margins measures another thing for each trainer.args.beta" in said("margins")
    swept({"trainer.args.beta": [0.1, 1.0]}, lambda beta: beta, path=f"right/{STAMP}", objective="eval_accuracies")
    assert "another thing" not in said("right")
    swept({"experiment": ["a", "b"]}, lambda experiment: 0.5, path=f"same/{STAMP}")
    assert "another thing" not in said("same")
    swept({"model.from_run": ["a", "b"]}, lambda from_run: 0.5, path=f"started/{STAMP}")
    assert "another thing" not in said("started")
    keys = {"trainer.args.beta": [0.1], "model.from_run": ["a", "b"]}
    swept(keys, lambda beta, from_run: 0.5, path=f"reference/{STAMP}")
    assert "eval_loss measures another thing for each model.from_run" in said("reference")
    keys = {"evaluation.max_new_tokens": [2, 8]}
    swept(keys, lambda max_new_tokens: 0.5, path=f"cut/{STAMP}", objective="exact_match")
    assert "exact_match measures another thing for each evaluation.max_new_tokens" in said("cut")
    came = {"a": 0.1, "b": 0.2, "c": 0.3}
    swept({"model": ["a", "b", "c"]}, lambda model: came[model], path=f"models/{STAMP}")
    for run in (folder / "multirun/models").glob("*/*/run.json"):  # two of them read alike
        run.write_text(run.read_text().replace('{"name_or_path": "b"}', '{"name_or_path": "a"}'))
    text = said("models")
    assert "for each model: each is ranked by itself" in text and "model=a,b" in text and "model=c" in text
    # What failed before its rows were known stands with those of its values.
    came = {("sft", 1): 2.0, ("sft", 2): 2.1, ("dpo", 1): 0.6, ("dpo", 2): "failed"}
    swept({"trainer": ["sft", "dpo"], "seed": [1, 2]}, lambda trainer, seed: came[trainer, seed], path=f"gap/{STAMP}")
    sft, dpo = said("gap").split("trainer=sft\n")[1].split("trainer=dpo\n")[:2]
    assert "failed" not in sft.split("\n\n")[0] and "failed" in dpo.split("\n\n")[0]
