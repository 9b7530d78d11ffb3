"""Pulling the plug costs nothing but the steps since the last save, whatever a run was about to write."""

import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import pytest
from lives import COMMAND
from survival import SMALL, STOCK, WITNESS, came_to, differing, digest, lived, undisturbed, weights

from smoltrain import checkpoints, runs

SFT = ("data.train_rows=48", "trainer.args.save_steps=2")
DPO = ("trainer=dpo", *SFT)
BEST = ("trainer.args.eval_strategy=steps", "trainer.args.eval_steps=2", "trainer.args.load_best_model_at_end=true")
PATIENCE = "callbacks.early={_target_: transformers.EarlyStoppingCallback, early_stopping_patience: 1}"
EPOCHS = ("trainer.args.max_steps=-1", "trainer.args.num_train_epochs=2", "data.train_rows=14")
AT_EPOCHS = ("trainer.args.eval_strategy=epoch", "trainer.args.logging_strategy=epoch")
LORA = ("peft=lora", "trainer.peft_config.lora_dropout=0.2")
STREAM = ("data.path=../rows.jsonl", "data.streaming=true", "data.test_share=0.1", "trainer.args.save_steps=2")
VARIANTS: dict[str, tuple[str, ...]] = {
    "sft": SFT,
    "dpo": DPO,
    "sft packed": (*SFT, "trainer.args.packing=true", "trainer.args.max_length=64"),
    "sft lora": (*SFT, *LORA),
    "sft accumulated": (*SFT, "trainer.args.gradient_accumulation_steps=2"),
    "sft saved at epochs": (*EPOCHS, "trainer.args.save_strategy=epoch"),
    "sft measured at epochs": (*EPOCHS, *AT_EPOCHS, "trainer.args.save_steps=7"),
    "sft with a worker": (*SFT, "trainer.args.dataloader_num_workers=1"),
    "sft best": (*SFT, *BEST, "trainer.args.learning_rate=0.03"),
    "sft early": (*SFT, *BEST, PATIENCE, "trainer.args.learning_rate=0.2"),
    "sft streamed": STREAM,
    "dpo reference moves": (*DPO, "trainer.args.sync_ref_model=true", "trainer.args.ref_model_sync_steps=3"),
    "dpo reference once": (*DPO, "trainer.args.precompute_ref_log_probs=true"),
    "dpo lora": (*DPO, *LORA),
    "dpo at epochs": (*DPO, *EPOCHS, *AT_EPOCHS, "trainer.args.gradient_accumulation_steps=2"),
    "dpo best": (*DPO, *BEST, PATIENCE, "trainer.args.learning_rate=0.01"),
}
KILLS = {"sft": 20, "dpo": 34}  # of each variant: 200 and more of SFT, and of DPO
THREE_SAVES = (*SMALL, *SFT, "trainer.args.max_steps=6", "trainer.args.save_total_limit=1")
LOGGED = (*SMALL, "trainer.args.logging_steps=1")  # so that each save vouches for other lines of metrics.jsonl
DIES_AT_9 = """
import os, smoltrain.runs as runs
log = runs.Run.log
runs.Run.log = lambda run, step, *rest: os.kill(os.getpid(), 9) if step == 9 else log(run, step, *rest)
"""
STOCK_THREE_SAVES = json.dumps({"max_steps": 6, "save_total_limit": 3})
long = partial(pytest.param, marks=pytest.mark.torture)


# ---------------------------------------------------------------- kill -9 at random moments


@pytest.mark.parametrize(
    ("name", "kills"), [("sft", 6), ("dpo", 6), *(long(name, KILLS[name[:3]]) for name in VARIANTS)]
)
def test_a_run_that_is_killed_at_random_moments_ends_as_if_nothing_had_happened(lives, folder, figure, name, kills):
    questions = [{"role": "user", "content": f"What is {a} + 7?"} for a in range(2, 102)]
    rows = [
        {"messages": [asked, {"role": "assistant", "content": f"It is {a}."}]} for a, asked in enumerate(questions, 9)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (*SMALL, *VARIANTS[name])
    seconds = seconds_of(lives, folder / "calm", *arguments)
    calm, rng = came_to(folder / "calm"), random.Random(name)
    different = {}
    hits = 0
    while hits < kills:
        run = folder / f"{len(different)}"
        *dead, last = lived(lives, run, *arguments, after=[rng.uniform(0, seconds) for _ in range(3)])
        assert last.returncode == 0, last.stdout + last.stderr
        different[run] = differing(calm, came_to(run))
        hits += len(dead)
    method = name[:3].upper()
    equal = [run for run, names in different.items() if not names]
    figure(f"{method}: kill -9 of a running command", hits)
    figure(f"{method}: runs so killed up to 3 times that end bit-equal", len(equal), len(different))
    assert not any(different.values()), different


def test_a_process_that_was_killed_is_gone_though_nobody_has_awaited_it(folder):
    code = "import time, pathlib, smoltrain.runs as r; r.hold(pathlib.Path()); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        told = {"host": platform.node(), "pid": process.pid}
        process.stdout.readline()
        assert not runs.gone(folder, told)
        process.kill()
        process.stdout.read()  # until its end, which nobody awaits
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert runs.gone(folder, told)


def seconds_of(lives, run: Path, *arguments: str, code: str = COMMAND) -> float:
    undisturbed(lives, run, code="pass")  # the first one waits for the server
    began = time.monotonic()
    undisturbed(lives, run, *arguments, code=code)
    return time.monotonic() - began


@pytest.mark.torture
@pytest.mark.parametrize("method", ["SFT", "DPO"])
def test_the_stock_stack_still_loses_runs_that_are_killed(lives, folder, figure, method):
    seconds = seconds_of(lives, folder / "calm", method, code=STOCK)
    rng, calm = random.Random(method), weights(folder / "calm")
    hits, equal = 0, []
    while hits < 60:
        run = folder / f"{len(equal)}"
        *dead, last = lived(lives, run, method, code=STOCK, after=[rng.uniform(0, seconds) for _ in range(3)])
        equal.append(last.returncode == 0 and weights(run) == calm)
        hits += len(dead)
    figure(f"{method}: kill -9 of a running command", hits, stack="stock")
    figure(f"{method}: runs so killed up to 3 times that end bit-equal", sum(equal), len(equal), stack="stock")
    assert not all(equal)


# ---------------------------------------------------------------- death at every write, rename, sync and removal


@pytest.fixture(scope="module")
def three_saves(lives, tmp_path_factory):
    """What a run of three saves comes to, and the directory of one that has kept them all."""
    folder = tmp_path_factory.mktemp("saves")
    undisturbed(lives, folder / "calm", *THREE_SAVES)
    undisturbed(lives, folder / "all", *THREE_SAVES, "trainer.args.save_total_limit=3")
    [whole] = folder.glob("all/multirun/*/*")
    return came_to(folder / "calm"), whole


@pytest.mark.parametrize("begins", ["anew", "again"])
@pytest.mark.parametrize("ends", [2, long(None)])
def test_death_at_any_write_costs_no_checkpoint_that_was_there(lives, three_saves, folder, figure, begins, ends):
    calm, whole = three_saves
    if begins == "again":  # from a kill in its second save
        undisturbed(lives, folder / "first", *THREE_SAVES, str(folder / "before"), code=WITNESS + COMMAND)
        half = next(
            s for s in sorted(folder.glob("before/[0-9]*")) if any(s.glob("multirun/*/*/checkpoint-4/run_state.pt"))
        )
        shutil.copytree(half, folder / "seen")
    undisturbed(lives, folder / "seen", *THREE_SAVES, str(folder / "states"), code=WITNESS + COMMAND)
    assert not differing(calm, came_to(folder / "seen"))

    states = sorted(folder.glob("states/[0-9]*"))
    step = 0
    for state in states:
        for record in linked(state, folder / "look").glob("multirun/*/*/run.json"):
            step = look_for_the_newest(record.parent, whole, step)
    assert len(states) > 100 and step == 6
    figure("states of the disk in three saves: the newest checkpoint is found", len(states), len(states))

    chosen = states if ends is None else random.Random(begins).sample(states[len(states) // 4 :], ends)
    different = {}
    for state in chosen:
        shutil.copytree(state, folder / "again")
        undisturbed(lives, folder / "again", *THREE_SAVES)
        different[state] = differing(calm, came_to(folder / "again"))
        shutil.rmtree(folder / "again")
    equal = [state for state, names in different.items() if not names]
    figure("states of the disk in three saves: the run ends bit-equal", len(equal), len(chosen))
    assert not any(different.values()), different


def linked(folder: Path, to: Path) -> Path:
    """A copy of a folder, made of hard links: what is done to its names is not done to the folder's."""
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(folder, to, copy_function=os.link)


def look_for_the_newest(run: Path, whole: Path, earlier: int) -> int:
    """Lets a run find its newest checkpoint, holds it against that of an undisturbed run, and returns its step."""
    every = {folder.name for folder in checkpoints.all_of(run)}
    sealed = {name for name in every if (run / name / "manifest.json").exists()}
    step = max((int(name.split("-")[1]) for name in sealed), default=0)
    files, said = inodes(run), []
    found, unfit = checkpoints.newest(run, {json.loads((run / "run.json").read_text())["config_hash"]})
    checkpoints.tidy(run, unfit, said.append)
    assert step >= earlier and found == (run / f"checkpoint-{step}" if step else None)
    broken = sorted(every - sealed, reverse=True)
    assert [line.partition(";")[0] for line in said] == [
        f"{name}: it has no manifest, its save never ended" for name in broken
    ]
    assert inodes(run) == files
    if found:
        there = {file.name for file in found.iterdir()} - {"manifest.json"}
        assert {name: digest(found / name) for name in there} == {
            file.name: digest(file) for file in (whole / found.name).iterdir() if file.name != "manifest.json"
        }
    return step


def inodes(run: Path) -> set[int]:
    """All files of a run, under whatever name, but for what rotation was removing."""
    files = (path for path in run.rglob("*") if path.is_file())
    return {file.stat().st_ino for file in files if not file.relative_to(run).parts[0].startswith("deleted-")}


@pytest.mark.torture
def test_the_stock_stack_still_loses_runs_whose_save_is_cut_off(lives, folder, figure):
    arguments = ("SFT", STOCK_THREE_SAVES)
    undisturbed(lives, folder / "seen", *arguments, str(folder / "states"), code=WITNESS + STOCK)
    equal = []
    for state in sorted(folder.glob("states/[0-9]*")):
        shutil.copytree(state, folder / "again")
        [life] = lived(lives, folder / "again", *arguments, code=STOCK)
        equal.append(life.returncode == 0 and weights(folder / "again") == weights(folder / "seen"))
        shutil.rmtree(folder / "again")
    figure("states of the disk in three saves: the run ends bit-equal", sum(equal), len(equal), stack="stock")
    assert not all(equal)


# ---------------------------------------------------------------- damage to the newest checkpoint


@pytest.fixture(scope="module")
def plug_pulled(lives, tmp_path_factory):
    """Makes a run of a variant that was killed when it had two sealed checkpoints, and returns its folder."""

    @cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp("pulled")
        with lives.start((*LOGGED, *VARIANTS[name]), code=DIES_AT_9 + COMMAND, cwd=folder) as life:
            assert life.wait() == -signal.SIGKILL
        [run] = folder.glob("multirun/*/*")
        for half in [path for path in checkpoints.all_of(run) if not (path / "manifest.json").exists()]:
            shutil.rmtree(half)
        return folder

    return made


def damaged(whole: bytes, older: bytes) -> dict[str, bytes | None]:
    """What a file is after each kind of damage; None where it is no more."""
    flipped = bytearray(whole)
    rng = random.Random(whole)
    flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    cut = {f"cut to {percent} %": whole[: len(whole) * percent // 100] for percent in (0, 50, 99)}
    swapped = {"swapped with an older one": older} if older != whole else {}
    return {"deleted": None, "one bit flipped": bytes(flipped), **cut, **swapped}


def write(file: Path, content: bytes | None) -> None:
    file.unlink()  # it is linked: what is written over, is so everywhere
    if content is not None:
        file.write_bytes(content)


@pytest.mark.parametrize("name", ["sft", long("sft lora"), long("dpo reference moves")])
def test_any_damage_to_the_newest_checkpoint_is_detected_and_the_one_before_it_taken(plug_pulled, folder, figure, name):
    [run] = plug_pulled(name).glob("multirun/*/*")
    newer, older = checkpoints.all_of(run)
    count = 0
    for file in sorted(path.relative_to(newer) for path in newer.rglob("*") if path.is_file()):
        for kind, content in damaged((newer / file).read_bytes(), (older / file).read_bytes()).items():
            harmed = linked(run, folder / "harmed")
            write(harmed / newer.name / file, content)
            said = falls_back(harmed, newer.name, older.name)
            assert str(file) in said or (file.name, kind) == ("manifest.json", "deleted"), (kind, said)
            count += 1
    assert count > 60
    figure("damages to a file of the newest checkpoint: detected", count, count)

    harmed = linked(run, folder / "harmed")
    shutil.rmtree(harmed / newer.name)
    shutil.copytree(older, harmed / newer.name)
    assert falls_back(harmed, newer.name, older.name) == f"its manifest.json is that of {older.name}"
    harmed = linked(run, folder / "harmed")
    length = json.loads((newer / "manifest.json").read_text())["metrics_bytes"]
    write(harmed / "metrics.jsonl", (run / "metrics.jsonl").read_bytes()[: length - 1])
    assert falls_back(harmed, newer.name, older.name) == "metrics.jsonl has lost lines from before it"


def falls_back(run: Path, newer: str, older: str) -> str:
    """Lets a run find its older checkpoint the newest, and returns why; nothing is deleted."""
    files, said = inodes(run), []
    found, unfit = checkpoints.newest(run, {json.loads((run / "run.json").read_text())["config_hash"]})
    assert inodes(run) == files
    checkpoints.tidy(run, unfit, said.append)
    assert found == run / older and inodes(run) == files
    return re.fullmatch(f"{newer}: (.*); set aside as broken-{newer}", *said)[1]


@pytest.fixture(scope="module")
def calm(lives, tmp_path_factory):
    """What such a run comes to where nothing has happened to it."""
    folder = tmp_path_factory.mktemp("calm")
    undisturbed(lives, folder, *LOGGED, *VARIANTS["sft"])
    return came_to(folder)


@pytest.mark.parametrize("harm", ["optimizer.pt deleted", "model.safetensors one bit flipped", "swapped"])
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_it(
    lives, plug_pulled, calm, folder, harm
):
    shutil.copytree(plug_pulled("sft"), folder / "harmed")
    [run] = folder.glob("harmed/multirun/*/*")
    newer, older = checkpoints.all_of(run)
    if harm == "swapped":
        shutil.rmtree(newer)
        shutil.copytree(older, newer)
    else:
        name, kind = harm.split(" ", 1)
        write(newer / name, damaged((newer / name).read_bytes(), b"")[kind])
    said = undisturbed(lives, folder / "harmed", *LOGGED, *VARIANTS["sft"])
    assert f"set aside as broken-{newer.name}" in said and f"from {older.name}" in said
    assert not differing(calm, came_to(folder / "harmed"))


# ---------------------------------------------------------------- the same, and the stock stack
# A test here that fails says that upstream has mended something, and that our own mend of it can go.


@pytest.fixture(scope="module")
def stock_run(lives, tmp_path_factory):
    """The folder of an SFT run that TRL alone made, of three saves."""
    folder = tmp_path_factory.mktemp("stock")
    undisturbed(lives, folder, "SFT", STOCK_THREE_SAVES, code=STOCK)
    return folder


def before_its_last_save(whole: Path, to: Path) -> Path:
    """Copies a run to what it was at its second save, and returns the folder of its checkpoints."""
    [run] = shutil.copytree(whole, to).glob("multirun/*/*")
    shutil.rmtree(run / "checkpoint-6")
    shutil.rmtree(run / "model")
    return run


def test_the_stock_stack_still_takes_half_a_checkpoint_for_the_newest(lives, stock_run, folder):
    run = before_its_last_save(stock_run, folder / "again")
    (run / "checkpoint-6").mkdir()
    shutil.copy(run / "checkpoint-4" / "config.json", run / "checkpoint-6")  # what is written first
    [life] = lived(lives, folder / "again", "SFT", STOCK_THREE_SAVES, code=STOCK)
    assert life.returncode == 1 and "Can't find a valid checkpoint at" in life.stderr


def test_the_stock_stack_still_resumes_from_damage_in_silence_and_ends_with_other_weights(lives, stock_run, folder):
    said, came = {}, {}
    for harm in ("", "optimizer.pt deleted", "model.safetensors one bit flipped"):
        run = before_its_last_save(stock_run, folder / f"after {harm}")
        name, _, kind = harm.partition(" ")
        if harm:
            file = run / "checkpoint-4" / name
            write(file, damaged(file.read_bytes(), b"")[kind])
        [life] = lived(lives, folder / f"after {harm}", "SFT", STOCK_THREE_SAVES, code=STOCK)
        assert life.returncode == 0 and "ended at step 6" in life.stdout
        said[harm] = "".join(line for line in life.stderr.splitlines() if "mtime" not in line)  # of saves in one second
        came[harm] = weights(folder / f"after {harm}")
    unharmed, *harmed = came.values()
    assert unharmed == weights(stock_run) and unharmed not in harmed
    assert len(set(said.values())) == 1, said


def test_the_stock_stack_still_takes_a_step_more_when_it_resumes_from_the_last_one(lives, folder):
    arguments = ("SFT", json.dumps({"max_steps": 5, "save_steps": 5, "lr_scheduler_type": "constant"}))
    assert "ended at step 5" in undisturbed(lives, folder / "run", *arguments, code=STOCK)
    ended = weights(folder / "run")
    assert "ended at step 6" in undisturbed(lives, folder / "run", *arguments, code=STOCK)
    assert weights(folder / "run") != ended


@pytest.mark.parametrize("moves", [False, True])
def test_the_stock_stack_still_forgets_the_moved_reference_of_dpo(lives, folder, moves):
    settings = json.loads(STOCK_THREE_SAVES) | {"sync_ref_model": moves, "ref_model_sync_steps": 2}
    arguments = ("DPO", json.dumps(settings))
    undisturbed(lives, folder / "run", *arguments, code=STOCK)
    before_its_last_save(folder / "run", folder / "again")
    undisturbed(lives, folder / "again", *arguments, code=STOCK)
    assert (weights(folder / "again") == weights(folder / "run")) is not moves


@pytest.mark.torture
def test_the_stock_stack_still_resumes_from_most_damage_in_silence(lives, stock_run, folder, figure):
    run = before_its_last_save(stock_run, folder / "whole")
    newer, older = run / "checkpoint-4", run / "checkpoint-2"
    ends = []
    for file in sorted(newer.iterdir()):
        for content in damaged(file.read_bytes(), (older / file.name).read_bytes()).values():
            harmed = linked(folder / "whole", folder / "harmed")
            write(harmed / file.relative_to(folder / "whole"), content)
            [life] = lived(lives, harmed, "SFT", STOCK_THREE_SAVES, code=STOCK)
            ends.append("refused" if life.returncode else weights(harmed) == weights(stock_run))
    figure("damages to a file of the newest checkpoint: detected", ends.count("refused"), len(ends), stack="stock")
    figure(
        "damages to a file of the newest checkpoint: other weights in silence", ends.count(False), len(ends), "stock"
    )
    assert False in ends
