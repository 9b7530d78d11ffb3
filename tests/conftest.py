"""The tiny world of the tests: real commands in this process, in an empty folder, on a few rows."""

import atexit
import contextlib
import gc
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # where two threads are asked for, none spins while the other has no core
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # of prepared rows, for this process and those it starts
from smoltrain.__main__ import MANNERS, main

os.environ |= MANNERS  # as the command does, before any test imports what reads them once

import pytest
from lives import Life, Lives

from smoltrain.config.compose import compose
from smoltrain.config.resolvers import register

register()
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs, and all they start, ignore
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"])

QUICK = (
    "data.train_rows=32",
    "data.test_rows=8",
    "evaluation.max_rows=4",
    "evaluation.max_new_tokens=4",
    "trainer.args.max_steps=2",
    "trainer.args.logging_steps=1",
    "trainer.args.per_device_train_batch_size=4",
    "trainer.args.save_strategy=no",
    "resume=never",
)
SHARED = Path(__file__).parents[2] / "shared" / "data"


def resolvable(overrides: Sequence[str], arguments: Sequence[str] = ()):
    """The config of a command line, with the directory in it that only a run in a Hydra app knows."""
    cfg = compose(list(overrides), list(arguments))
    cfg.trainer.args.output_dir = "run"
    return cfg


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test starts in an empty folder of its own, with Trackio's data in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    return tmp_path


settled = 0


@pytest.fixture(autouse=True)
def settle():
    """What has been imported is not looked through again: a run collects its garbage, half of its time went there."""
    global settled
    yield
    if len(sys.modules) > settled + 50:
        gc.collect()
        gc.freeze()
        settled = len(sys.modules)


@pytest.fixture
def smoltrain(folder):
    """Runs one command line, QUICK overrides before it, and returns the records of the runs it made in order."""

    def run(*arguments: str, code: int = 0, quick: tuple[str, ...] = (*QUICK, "tracking=none")) -> list[dict]:
        before = set(folder.glob("multirun/**/run.json"))
        flags = [a for a in arguments if a.startswith("-")]
        if "evaluation.max_rows=0" in arguments:  # then nothing is generated
            quick = tuple(a for a in quick if not a.startswith("evaluation."))
        assert main([*flags, *quick, *(a for a in arguments if a not in flags)]) == code
        files = set(folder.glob("multirun/**/run.json")) - before
        records = [json.loads(file.read_text()) | {"directory": file.parent} for file in files]
        return sorted(records, key=lambda record: str(record["directory"]))

    return run


@pytest.fixture
def printed(capsys):
    """Runs a command line that only shows something, and returns what it prints, on the stream where it belongs."""

    def run(*arguments: str, code: int = 0) -> str:
        assert main([*arguments]) == code
        captured = capsys.readouterr()
        assert (captured.err if code == 0 else captured.out) == ""
        return captured.out + captured.err

    return run


@pytest.fixture(scope="session")
def lives():
    with Lives() as server:
        yield server


@pytest.fixture
def forked(lives, folder):
    """Starts one command line in a process of its own that has imported everything: see `lives.Lives.start`."""
    with contextlib.ExitStack() as living:

        def start(*arguments: str, **given) -> Life:
            return living.enter_context(lives.start(arguments, **given))

        yield start


@pytest.fixture
def figure(record_property):
    """Notes how many of so many cases were good; `make torture` ends with a table of these."""

    def note(what: str, good: int, of: int | None = None, stack: str = "smoltrain") -> None:
        record_property("figure", [what, stack, good, of])

    return note


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr != "torture":
        return
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    table: dict[str, dict[str, list[int | None]]] = {}
    for what, stack, good, of in (noted for r in reports for name, noted in r.user_properties if name == "figure"):
        sums = table.setdefault(what, {}).setdefault(stack, [0, of and 0])
        sums[:] = [sums[0] + good, of and sums[1] + of]
    if table:
        terminalreporter.write_line(f"\n{'':72}{'smoltrain':>16}{'TRL alone':>16}")
    for what, stacks in sorted(table.items()):
        said = {stack: f"{good:,}" + (f" of {of:,}" if of else "") for stack, (good, of) in stacks.items()}
        terminalreporter.write_line(f"{what:72}{said.get('smoltrain', ''):>16}{said.get('stock', ''):>16}")
