"""What watches a run: Trackio with real steps and the final word, other trackers by a line of YAML, or nothing."""

import json
import re
import urllib.request

import pytest
from lives import COMMAND


def tracked(record) -> tuple:
    """The Trackio run of a record and its rows, as the dashboard reads them."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    name = "/".join(record["directory"].parts[-2:])
    (run,) = [run for run in trackio.Api().runs("smoltrain") if run.name == name]
    return run, SQLiteStorage.get_logs("smoltrain", name)


def test_both_trainers_write_one_run_each_with_the_same_core(smoltrain):
    core = {"eval/loss", "eval/exact_match", "train/loss", "train/learning_rate", "train/grad_norm"}
    for trainer in ("sft", "dpo"):
        (record,) = smoltrain(f"trainer={trainer}", "name=pair", "tracking=trackio")
        run, rows = tracked(record)
        assert run.config["_Group"] == "pair" and run.config["seed"] == 0
        assert run.config["config_hash"] == record["config_hash"]
        assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
        assert rows[0]["step"] == 0 and rows[0]["status"] == "running"
        assert rows[-1]["status"] == "completed" and rows[-1]["step"] == 2
        assert {k.removeprefix("final/"): v for k, v in rows[-1].items() if "final/" in k} == record["metrics"]
        assert core <= {key for row in rows for key in row}


def test_a_failed_run_is_failed_there_too(smoltrain):
    (record,) = smoltrain(
        "tracking=trackio",
        "trainer.args.learning_rate=1e30",
        "trainer.args.max_grad_norm=0",
        "trainer.args.max_steps=6",
        code=3,
    )
    _, rows = tracked(record)
    assert rows[-1]["status"] == "diverged"


def test_none_needs_no_trackio(forked, folder):
    """In a process where importing trackio fails, as where it is not installed."""
    program = (
        "import sys; sys.modules['trackio'] = None\nfrom smoltrain.__main__ import main\n"
        "few = ['data.train_rows=8', 'data.test_rows=4', 'evaluation.max_rows=0', 'trainer.args.max_steps=1']\n"
        "codes = [main([*few, 'resume=never', 'tracking=' + tracker]) for tracker in ('none', 'trackio')]\n"
        "assert codes == [0, 2], codes"
    )
    done = forked(code=program)
    assert done.wait() == 0, done.stderr
    assert "tracking=trackio needs `pip install trackio`" in done.stderr
    (file,) = folder.glob("multirun/*/*/run.json")
    assert json.loads(file.read_text())["status"] == "completed"


# transformers' MLflowCallback fails again while it is collected after it has refused.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow"])
def test_other_trackers_are_a_line_of_yaml(smoltrain, capsys, tracker):
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    from smoltrain.config import CONF
    from smoltrain.config.compose import compose

    lines = (CONF / "tracking" / f"{tracker}.yaml").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [f"report_to: {tracker}"]
    assert compose([f"tracking={tracker}"], []).trainer.args.report_to == tracker in INTEGRATION_TO_CALLBACK
    smoltrain(f"tracking={tracker}", code=2)  # not installed here: said before anything runs
    assert tracker in capsys.readouterr().err.lower()


def test_the_dashboard_opens_on_this_projects_runs(smoltrain, forked, monkeypatch):
    smoltrain("tracking=trackio")
    from trackio.utils import TRACKIO_DIR  # that of the first test of this process: Trackio reads it once

    monkeypatch.setenv("TRACKIO_DIR", str(TRACKIO_DIR))
    monkeypatch.setenv("BROWSER", "true")  # the command, which opens nothing
    life = forked("dashboard", code=f"import sys; sys.stdout.reconfigure(line_buffering=True)\n{COMMAND}")
    life.until("http://")
    url = re.search(r"http://[\d.:]+/", life.stdout)[0]
    with urllib.request.urlopen(url, timeout=20) as page:
        assert page.status == 200 and "<html" in page.read().decode().lower()


def test_the_dashboard_opens_on_the_runs_that_a_query_chooses(folder, monkeypatch, capsys):
    from smoltrain import tracking

    class Stub:
        show = staticmethod(
            lambda **_: (None, "http://127.0.0.1:7999/", None, "http://127.0.0.1:7999/?project=smoltrain")
        )

    opened = []
    monkeypatch.setattr(tracking, "open_trackio", Stub)
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("threading.Event.wait", lambda self: None)
    (folder / "trackio").mkdir()
    (folder / "trackio" / "smoltrain.db").touch()
    tracking.dashboard("?project=smoltrain&runs=a/b,a/c")
    assert opened == ["http://127.0.0.1:7999/?project=smoltrain&runs=a/b,a/c"] and opened[0] in capsys.readouterr().out


def test_the_dashboard_of_no_runs_says_so(folder, capsys):
    from smoltrain.__main__ import main

    assert main(["dashboard"]) == 2
    assert f"{folder / 'trackio'}: no run is tracked there yet; make one with `smoltrain`" in capsys.readouterr().err
