"""What a sweep of DPO costs: ours, one `trl dpo` after another, and Hydra's basic launcher around TRL as it comes.

Four learning rates and two seeds on the embedded model and 500 pairs, one epoch each, in batches of eight. All three
train on the same pairs; ours also measures before and after, on the 100 held-out rows of the data. Wall and CPU seconds
of whole commands, their processes included: medians over repetitions in which the three take turns. What one more trial
costs besides its steps is measured with trials of one step.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
RATES, SEEDS = ("1e-6", "3e-6", "1e-5", "3e-5"), ("1", "2")
PAIRS, HELD_OUT = 500, 100
OURS = [sys.executable, "-m", "smoltrain", "-m", "trainer=dpo", "data.path=pairs.jsonl"]
OURS += ["data.test_path=held.jsonl", "evaluation.max_rows=0", "tracking=none"]
OURS += ["trainer.args.per_device_train_batch_size=8", "trainer.args.save_strategy=no", "resume=never"]
APP = """\
import hydra
@hydra.main(version_base=None, config_path=None)
def main(cfg):
    from datasets import Dataset, load_dataset
    from trl import DPOConfig, DPOTrainer
    args = DPOConfig(output_dir=hydra.core.hydra_config.HydraConfig.get().runtime.output_dir, learning_rate=cfg.rate,
                     seed=cfg.seed, per_device_train_batch_size=8, num_train_epochs=1, max_steps=cfg.steps,
                     use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True)
    rows = load_dataset("json", data_files="pairs.jsonl", split="train")
    DPOTrainer(model=cfg.model, args=args, train_dataset=rows).train()
main()
"""


def commands(steps: int, model: str) -> dict[str, list[list[str]]]:
    """What each of the three types for all trials; fewer steps than an epoch are to see what the rest costs."""
    few = [] if steps < 0 else [f"trainer.args.max_steps={steps}"]
    ours = [*OURS, *few, f"trainer.args.learning_rate={','.join(RATES)}", f"seed={','.join(SEEDS)}"]
    app = [sys.executable, "app.py", "-m", f"+rate={','.join(RATES)}", f"+seed={','.join(SEEDS)}", f"+steps={steps}"]
    trl = [str(BIN / "trl"), "dpo", "--model_name_or_path", model, "--dataset_name", "pairs", "--use_cpu", "--bf16"]
    trl += ["false", "--per_device_train_batch_size", "8", "--num_train_epochs", "1", "--max_steps", str(steps)]
    trl += ["--save_strategy", "no", "--disable_tqdm", "true", "--report_to", "none"]
    each = [("--learning_rate", rate, "--seed", seed) for rate in RATES for seed in SEEDS]
    return {
        "smoltrain -m": [ours],
        "8 x trl dpo": [[*trl, *one, "--output_dir", f"trl{i}"] for i, one in enumerate(each)],
        "Hydra's basic launcher, stock TRL": [[*app, f"+model={model}"]],
    }


def measured(run: list[list[str]], folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of commands, one after the other. Raises RuntimeError where one fails."""
    before, began = children(), time.perf_counter()
    for command in run:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - began, children() - before


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def written(folder: Path) -> None:
    """The pairs, as conversations: of the embedded data, so that nothing has to be fetched."""
    from smoltrain.data.sums import preferences

    handling: Any = {"test_share": 0.0, "on_too_long": "error", "on_bad_row": "error", "on_duplicate": "keep"}
    source = preferences(PAIRS, HELD_OUT, 0, **handling, system_prompt=None, workers=None)
    rows = source.origins["sums_preferences"].source
    (folder / "pairs").mkdir()
    for name, part in (("pairs.jsonl", rows.train), ("held.jsonl", rows.test), ("pairs/train.jsonl", rows.train)):
        assert part is not None
        kept = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in part]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in kept))
    (folder / "app.py").write_text(APP)


def table(steps: int, repetitions: int, folder: Path) -> dict[str, dict[str, float]]:
    from smoltrain.model import locate

    seconds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repetitions):
        for name, run in commands(steps, locate("pkg://smoltrain/tiny")).items():
            seconds.setdefault(name, []).append(measured(run, folder))
    found = {}
    for name, pairs in seconds.items():
        wall, cpu = zip(*pairs, strict=True)
        found[name] = {
            "wall": statistics.median(wall),
            "cpu": statistics.median(cpu),
            "least": min(cpu),
            "most": max(cpu),
        }
        row = found[name]
        print(f"{name:36} {row['wall']:8.1f} {row['cpu']:8.1f} ({row['least']:.1f} to {row['most']:.1f})", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder))
        for steps, title in ((1, "8 trials of one step"), (-1, f"8 trials of {PAIRS} pairs")):
            print(f"\n{title:36} {'wall s':>8} {'CPU s':>8} (spread)")
            found[title] = table(steps, given.repetitions, Path(folder))
    for title, rows in found.items():
        ours = rows["smoltrain -m"]["cpu"]
        print(f"{title}: " + ", ".join(f"{row['cpu'] / ours:.1f}x the CPU in {name}" for name, row in rows.items()))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
