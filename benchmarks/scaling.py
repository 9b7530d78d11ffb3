"""What several processes bring: steps a second of a run in one process and in two, and how soon the first is done.

Each process computes with one thread, so that two have twice of what one has; one process with two threads is what the
same cores do without a second process, and two runs side by side what they do at most. The steps are those of one
experiment (`global_batch_size`), timed by the lines that it prints. How soon the first step is done is compared with
`torchrun` around TRL's own trainer, on rows that are tokens already. All take turns; medians and spread.

    python benchmarks/scaling.py [--repetitions 3] [--json FILE]
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROWS, STEPS = 16, 40
RUN: tuple[str, ...] = (
    "tracking=none",
    "evaluation.max_rows=0",
    "data.test_rows=8",
    f"data.train_rows={ROWS * STEPS}",
    "resume=never",
)
RUN += ("hardware=ddp", f"global_batch_size={ROWS}", "trainer.args.logging_steps=1", f"trainer.args.max_steps={STEPS}")
RUN += ("trainer.args.save_strategy=no", "trainer.args.per_device_train_batch_size=8")
STOCK = """
import sys, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

class Says(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.is_world_process_zero:
            print(f"step {state.global_step}/", flush=True)

rows = Dataset.from_dict({"input_ids": [list(range(5, 101))] * 64})
args = SFTConfig(output_dir=sys.argv[2], use_cpu=True, bf16=False, max_steps=2, per_device_train_batch_size=8,
                 report_to="none", save_strategy="no", disable_tqdm=True, activation_checkpointing=False)
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[Says()]).train()
"""


def smoltrain(processes: int, threads: int) -> list[str]:
    own = (f"hardware.processes={processes}", f"threads={threads}")
    return [sys.executable, "-m", "smoltrain", *RUN, *own]


def timed(command: list[str], folder: Path, threads: int, until: int) -> list[float]:
    """Seconds from a command's start to the end of each of its first steps."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    began, seen = time.monotonic(), list[float]()
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    said = []
    with subprocess.Popen(command, cwd=folder, env=environment, process_group=0, **streams) as process:
        for line in process.stdout or ():
            said.append(line)
            if line.startswith(f"step {len(seen) + 1}/"):
                seen.append(time.monotonic() - began)
            if len(seen) == until:
                break
        else:
            raise RuntimeError("".join(said[-30:]))
        os.killpg(process.pid, signal.SIGTERM)
        process.stdout and process.stdout.read()
    return seen


def measured(repetitions: int, folder: Path) -> dict[str, list[float]]:
    """By what was measured, a value of each repetition: steps a second, or seconds to the first step."""
    from smoltrain.model import locate

    script = folder / "stock.py"
    script.write_text(STOCK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    torchrun += [str(locate("pkg://smoltrain/tiny")), str(folder / "out")]
    sides = {"1 process": (1, 1), "2 processes": (2, 1), "1 process of 2 threads": (1, 2)}
    found: dict[str, list[float]] = {}
    for turn in range(repetitions + 1):  # the first one prepares the rows, for all
        for name, (processes, threads) in sides.items():
            seen = timed(smoltrain(processes, threads), folder, threads, STEPS)
            if turn:
                found.setdefault(f"steps a second, {name}", []).append((STEPS - 6) / (seen[-1] - seen[5]))
                if threads == 1:
                    found.setdefault(f"seconds to the first step, smoltrain, {name}", []).append(seen[0])
        if turn:
            with ThreadPoolExecutor() as both:
                seens = [*both.map(lambda n: timed([*smoltrain(1, 1), f"name=run-{n}"], folder, 1, STEPS), range(2))]
            rate = sum((STEPS - 6) / (seen[-1] - seen[5]) for seen in seens)
            found.setdefault("steps a second, two runs of 1 process side by side", []).append(rate)
            seen = timed(torchrun, folder, 1, 1)
            found.setdefault("seconds to the first step, torchrun with TRL, 2 processes", []).append(seen[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(given.repetitions, Path(folder))
    print("| | median (spread) |\n|---|---:|")
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) |")
    one, two = (found[f"steps a second, {name}"] for name in ("1 process", "2 processes"))
    ratios = [b / a for a, b in zip(one, two, strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"two processes take {statistics.median(ratios):.2f} ({spread}) times the steps of one")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
