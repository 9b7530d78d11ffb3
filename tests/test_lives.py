"""The forked processes in which other tests run commands are what fresh ones would be, but for the time they take."""

import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK
from lives import COMMAND

END = "import sys; {}"


@pytest.mark.parametrize(
    ("code", "returncode", "stderr"),
    [
        ("pass", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('said')", 1, "said\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM, ""),
        ("import os; os.kill(os.getpid(), 2)", -signal.SIGINT, "KeyboardInterrupt\n"),
        ("sys.excepthook = lambda kind, *_: print(kind.__name__, file=sys.stderr); 1 / 0", 1, "ZeroDivisionError\n"),
        ("import os; os._exit(7)", 7, ""),
        ("import atexit; atexit.register(print, 'last', file=sys.stderr); sys.exit(3)", 3, "last\n"),
        (
            "import threading as t, time; t.Thread(target=lambda: (time.sleep(0.1), sys.stderr.write('x'))).start()",
            0,
            "x",
        ),
    ],
)
def test_it_ends_as_a_process_ends(forked, code, returncode, stderr):
    life = forked(code=END.format(code))
    real = subprocess.run([sys.executable, "-c", END.format(code)], capture_output=True, text=True, check=False)
    assert life.wait() == returncode == real.returncode
    assert life.stdout == real.stdout == "" and life.stderr.endswith(stderr) and real.stderr.endswith(stderr)
    assert bool(life.stderr) == bool(stderr)


def test_it_has_the_folder_the_environment_the_arguments_and_the_input_it_was_given(forked, folder, monkeypatch):
    (folder / "sub").mkdir()
    code = (
        "import os, sys; print(os.getcwd(), os.environ['GIVEN'], sys.argv, input(), sys.path[0] in ('', os.getcwd()))"
    )
    monkeypatch.setenv("GIVEN", "x")
    life = forked("a", "b=c", code=code, cwd=folder / "sub", stdin="typed\n")
    assert life.wait() == 0 and life.stdout == f"{folder}/sub x ['-c', 'a', 'b=c'] typed True\n"
    life = forked(code="import os; print(sorted(os.environ))", env=dict(os.environ) | {"OTHER": "y"})
    assert life.wait() == 0 and life.stdout == f"{sorted([*os.environ, 'OTHER'])}\n"


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "HF_HUB_OFFLINE", "PYTHONHASHSEED", "HOME"])
def test_what_is_read_at_an_import_cannot_be_set(forked, monkeypatch, name):
    monkeypatch.setenv(name, "3")
    with pytest.raises(ValueError, match=f"{name}: read once"):
        forked(code="")


def test_nothing_runs_in_it_and_nothing_has_been_drawn_or_computed(forked):
    code = """if True:
        import os, random, signal, sys, threading
        import numpy, torch
        from hydra.core.global_hydra import GlobalHydra
        assert len(os.listdir("/proc/self/task")) == 1 == threading.active_count()
        assert torch.get_num_threads() == 1
        assert not GlobalHydra().is_initialized() and not torch.cuda.is_initialized()
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
        assert sys.excepthook is sys.__excepthook__ and sys.stdout is sys.__stdout__
        assert "trackio" not in sys.modules and "smoltrain.__main__" not in sys.modules
        print(random.random(), numpy.random.rand(), torch.initial_seed(), sorted(os.listdir("/proc/self/fd")))"""
    one, other = forked(code=code), forked(code=code)
    assert one.wait() == other.wait() == 0, one.stderr
    (*one, one_open), (*other, other_open) = (life.stdout.split(" ", 3) for life in (one, other))
    assert not set(one) & set(other)
    assert one_open == other_open == "['0', '1', '2', '3']\n"  # the last reads the folder


def test_two_at_once_do_not_mix_and_a_signal_reaches_one(forked):
    code = "import sys, time; print(sys.argv[1], flush=True); time.sleep(60)"
    one, other = forked("one", code=code), forked("other", code=code)
    one.until("one")
    other.until("other")
    assert one.pid != other.pid and (one.stdout, other.stdout) == ("one\n", "other\n")
    with pytest.raises(TimeoutError):
        one.wait(timeout=0.05)
    one.kill(signal.SIGTERM)
    assert one.wait() == -signal.SIGTERM and other.running()
    other.kill()
    assert other.wait() == -signal.SIGKILL


def test_what_is_never_printed_is_not_awaited_for_ever(forked):
    with pytest.raises(AssertionError, match="'more' was not printed, but:\nsome"):
        forked(code="print('some')").until("more")


def made(folder: Path) -> dict[str, str]:
    """What the runs in a folder made, less times: a sum of each file of weights, the metrics."""
    weights = [*folder.glob("multirun/*/*/*/**/*.safetensors")]
    found = {str(Path(*file.parts[-3:])): hashlib.sha256(file.read_bytes()).hexdigest() for file in weights}
    assert len(found) == 4  # of a checkpoint and of the end, twice
    for file in folder.glob("multirun/*/*/*/metrics.jsonl"):
        found[file.parent.name] = re.sub(r'"\w+(runtime|per_second|preparation_time)": [^,}]*', "", file.read_text())
    return found


def test_runs_are_bit_for_bit_what_they_are_in_a_fresh_process(forked, folder):
    arguments = ["-m", *QUICK, "tracking=none", "trainer=sft,dpo", "trainer.args.save_strategy=steps"]
    (folder / "real").mkdir()
    (folder / "life").mkdir()
    command = [sys.executable, "-c", COMMAND, *arguments]
    real = subprocess.run(command, cwd=folder / "real", capture_output=True, text=True, check=True)
    life = forked(*arguments, cwd=folder / "life")
    assert life.wait() == 0, life.stderr

    def timeless(text: str) -> list[str]:
        told = [line for line in text.splitlines() if not re.search(r"multirun/|completed; in|^default ", line)]
        return sorted(re.sub(r"^\[\d/2\] |  \(.*\)$", "", line) for line in told)

    assert timeless(life.stdout) == timeless(real.stdout) and life.stderr == real.stderr
    for real_log, log in zip(*(sorted((folder / name).glob("**/log.txt")) for name in ("real", "life")), strict=True):
        logs = [re.sub(r"completed in.*|multirun/\S+", "", file.read_text()) for file in (real_log, log)]
        assert logs[0] == logs[1] and "loss" in logs[0]
    assert made(folder / "life") == made(folder / "real")


def test_what_a_run_is_refused_for_is_2_and_an_exception_in_one_is_1(forked):
    life = forked("trainer.args.lerning_rate=1")
    assert life.wait() == 2 and life.stderr.startswith("trainer.args.lerning_rate=1 is not a field of trl.SFTConfig")
    broken = "import smoltrain.train as module; module.train = lambda *_, **__: 1 / 0\n"
    life = forked("tracking=none", code=broken + COMMAND)
    assert life.wait() == 1 and "ZeroDivisionError" in life.stderr and "site-packages/hydra" not in life.stderr
