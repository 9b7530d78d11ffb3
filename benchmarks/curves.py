"""Records tests/curves.json: the held-out losses of real runs on their way, on which tests replay searches.

Sixteen configs of the tiny model, eight learning rates at two batch sizes, each with every seed: one run at a time,
in a process of its own that is forked from one that has imported everything. A seed that is there is not run again; a
run takes 4 s of one core.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests" / "curves.json"
RATE, BATCH = "trainer.args.learning_rate", "trainer.args.per_device_train_batch_size"
CONFIGS = [
    {RATE: rate, BATCH: batch}
    for rate, batch in itertools.product([3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1], [2, 4])
]
STEPS, EVERY = 64, 4
COMMAND = [
    "trainer=sft",
    "data.train_rows=512",
    "data.test_rows=32",
    f"trainer.args.max_steps={STEPS}",
    "trainer.args.lr_scheduler_type=warmup_stable_decay",
    "trainer.args.lr_scheduler_kwargs={num_decay_steps:16}",
    "trainer.args.warmup_steps=2",
    "trainer.args.eval_strategy=steps",
    f"trainer.args.eval_steps={EVERY}",
    "trainer.args.save_strategy=no",
    "evaluation.max_rows=0",
    "tracking=none",
    "resume=never",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    sys.path[:0] = [str(ROOT / "tests")]
    from lives import Lives

    recorded = json.loads(FILE.read_text())["seeds"] if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/rows"
        os.chdir(folder)
        with Lives() as lives:
            for seed in range(seeds):
                if str(seed) not in recorded:
                    recorded[str(seed)] = [curve(lives, config, seed) for config in CONFIGS]
                    write(recorded)


def curve(lives: Any, config: dict[str, float], seed: int) -> list[float | None]:
    """The held-out losses of one run, one for every EVERY steps; None once it has diverged."""
    began, directory = time.monotonic(), Path(tempfile.mkdtemp(dir="."))
    varied = [f"{key}={value}" for key, value in config.items()]
    with lives.start([*COMMAND, *varied, f"seed={seed}", f"hydra.run.dir={directory}"]) as life:
        if life.wait(600) not in (0, 3):
            sys.exit(life.stderr)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    found = [round(losses[step], 4) if step in losses else None for step in range(EVERY, STEPS + 1, EVERY)]
    print(f"{time.monotonic() - began:.1f} s", seed, *config.values(), found, flush=True)
    return found


def write(recorded: dict[str, list[list[float | None]]]) -> None:
    """One line for each curve."""
    seeds = [
        f'"{seed}": [\n' + ",\n".join(json.dumps(line) for line in lines) + "\n]" for seed, lines in recorded.items()
    ]
    head = {"command": COMMAND, "steps": list(range(EVERY, STEPS + 1, EVERY)), "configs": CONFIGS}
    FILE.write_text(json.dumps(head)[:-1] + ',\n"seeds": {\n' + ",\n".join(seeds) + "\n}}\n")


if __name__ == "__main__":
    main()
