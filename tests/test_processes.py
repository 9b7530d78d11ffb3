"""Several processes, each with its share of a batch, come to what one process comes to with all of it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_dpo import rows as pairs
from test_dpo import trainer as preferring
from test_sft import rows
from test_sft import trainer as tuned

STEPS, BATCH = 8, 4
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # TRL's own
    pytest.mark.filterwarnings("ignore:.*label_smoothing_factor:FutureWarning"),
]


def losses(folder: Path, method: str, ours: bool, processes: int) -> list[float]:
    """The loss of each step, of rows as different in length as they come, a process's share of each batch at a time."""
    args = {"per_device_train_batch_size": BATCH // processes, "max_steps": STEPS, "seed": 3, "learning_rate": 1e-4}
    if method == "sft":
        one = tuned(folder, rows(STEPS * BATCH, (3, 60)), ours, **args)
    else:
        one = preferring(folder, pairs(STEPS * BATCH, (0, 24), (2, 16)), ours, **args)
    one.train()
    return [line["loss"] for line in one.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> dict[str, list[float]]:
    """By method and layout, the losses of two processes that train together."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in ("0", "1"):
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        given |= {"PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, __file__, str(folder)]
        started.append(subprocess.Popen(command, env=os.environ | given, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    return json.loads(said[0].splitlines()[-1])


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_two_processes_learn_what_one_learns(folder, of_two, method):
    together = of_two[f"{method}, ours"]
    assert len(together) == STEPS
    assert together == pytest.approx(of_two[f"{method}, stock"], abs=1e-5)
    assert together == pytest.approx(losses(folder, method, True, 1), abs=1e-5)


if __name__ == "__main__":
    found = {
        f"{method}, {'ours' if ours else 'stock'}": losses(Path(sys.argv[1]), method, ours, 2)
        for method in ("sft", "dpo")
        for ours in (True, False)
    }
    print(json.dumps(found))
