"""The tiny world of the tests: real commands in this process, in an empty folder, on a few rows."""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # of prepared rows, for this process and those it starts
# As the command sets them where no terminal is, before any test imports datasets or tqdm, which read them once.
os.environ |= {"DATASETS_VERBOSITY": "critical", "TQDM_DISABLE": "1"}

import pytest

from smoltrain.__main__ import main
from smoltrain.config.compose import compose
from smoltrain.config.resolvers import register

register()
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
