"""What a pair costs in DPO: smoltrain's trainer, TRL's as it comes, and TRL's tuned by hand, on the same batches.

Rows are made-up tokens with the lengths of HH (as long a prompt as a reply) and UltraFeedback (prompts of 121 tokens,
replies of 288), and of a preference file where one is given; the model is the embedded one, in batches of four pairs.
TRL as it comes recomputes activations and rounds to bf16; by hand both are off, as smoltrain has them on a CPU. With a
reference that is known its log-probabilities are in the rows, else each step computes them.

Each is timed in processes of its own, which take turns: CPU seconds of the steps behind the first ones, all threads
together; the peak is of a process's resident memory. Medians and spread over repetitions. A ratio that is more than
5 % below the one in benchmarks/dpo.json ends it with 1; --record writes that file anew.
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

import numpy as np

RECORD = Path(__file__).with_suffix(".json")
BATCH, WARM, STEPS, LONGEST = 4, 3, 40, 1024
# Mean tokens of a prompt and of a reply, and the spread of their logarithms.
LENGTHS = {"HH": (130, 130, 1.0), "UltraFeedback": (121, 288, 0.7)}
SIDES = ("smoltrain", "TRL by hand", "TRL as it comes")
LOSS = 0.05  # of a ratio, from which on it counts


def rows(lengths: str, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Pairs as tokens: of a file in LLaMA-Factory's shape of preferences, or made up with a known set's lengths."""
    many = BATCH * (WARM + STEPS)
    if lengths not in LENGTHS:
        found = json.loads(Path(lengths).read_text())[:many]
        return [
            {
                "prompt_ids": tokenizer("\n".join(turn["value"] for turn in row["conversations"]))["input_ids"],
                "chosen_ids": tokenizer(row["chosen"]["value"])["input_ids"],
                "rejected_ids": tokenizer(row["rejected"]["value"])["input_ids"],
            }
            for row in found
        ]
    rng, (prompt, reply, spread) = np.random.default_rng(0), LENGTHS[lengths]

    def ids(mean: int) -> list[int]:
        length = rng.lognormal(np.log(mean) - spread**2 / 2, spread)
        return rng.integers(5, 400, int(np.clip(length, 2, LONGEST // 2))).tolist()

    means = {"prompt_ids": prompt, "chosen_ids": reply, "rejected_ids": reply}
    return [{name: ids(mean) for name, mean in means.items()} for _ in range(many)]


def one(side: str, lengths: str, known: bool) -> dict[str, float]:
    """Trains on one set of rows as one side does, and returns what a pair costs."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from smoltrain.dpo import DPOTrainer
    from smoltrain.model import locate

    own: dict[str, Any] = {} if side == "TRL as it comes" else {"bf16": False, "activation_checkpointing": False}
    given: dict[str, Any] = {"shared_prefix": True} if side == "smoltrain" else {}

    class Given(DPOTrainer if given else trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    class Clock(TrainerCallback):
        began: tuple[float, float]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM:
                self.began = time.perf_counter(), time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(locate("pkg://smoltrain/tiny"))
        clock, data = Clock(), Dataset.from_list(rows(lengths, tokenizer))
        trainer = Given(
            model=AutoModelForCausalLM.from_pretrained(locate("pkg://smoltrain/tiny")),
            args=trl.DPOConfig(
                output_dir=folder,
                use_cpu=True,
                per_device_train_batch_size=BATCH,
                max_length=LONGEST,
                precompute_ref_log_probs=known,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                **own,
            ),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[clock],
            **given,
        )
        trainer.train()
        wall, cpu = time.perf_counter() - clock.began[0], time.process_time() - clock.began[1]
    pairs = len(data) - BATCH * WARM
    return {"wall": wall / pairs, "cpu": cpu / pairs, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def alone(side: str, lengths: str, known: bool) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps([side, lengths, known])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side}, {lengths}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(lengths: str, known: bool, repetitions: int) -> dict[str, float]:
    """Prints a line for each side, and returns how many times less CPU than each of the others ours takes."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(repetitions):
        for side, runs in found.items():
            runs.append(alone(side, lengths, known))
    for side, runs in found.items():
        cpu, wall, peak = (statistics.median(run[key] for run in runs) for key in ("cpu", "wall", "peak"))
        spread = f"{min(run['cpu'] for run in runs) * 1e3:.1f} to {max(run['cpu'] for run in runs) * 1e3:.1f}"
        what = f"{Path(lengths).stem}, reference {'known' if known else 'computed'}"
        print(f"| {what} | {side} | {1 / wall:.0f} | {cpu * 1e3:.1f} ({spread}) | {peak:,.0f} |", flush=True)
    ratios = {}
    for side in SIDES[1:]:  # of runs that stood beside each other
        each = [its["cpu"] / ours["cpu"] for ours, its in zip(found["smoltrain"], found[side], strict=True)]
        ratios[f"{Path(lengths).stem}, {'known' if known else 'computed'}, {side}"] = statistics.median(each)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--data", help="a JSON file of preferences, whose lengths are measured too")
    parser.add_argument("--record", action="store_true", help="keep these ratios as those to compare with")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    if given.one:
        print(json.dumps(one(*json.loads(given.one))))
        return
    print("| lengths | | pairs/s | CPU ms a pair (spread) | peak, MB |\n|---|---|---:|---:|---:|")
    ratios: dict[str, float] = {}
    for lengths in (*LENGTHS, *([given.data] if given.data else [])):
        for known in (False, True):
            ratios |= table(lengths, known, given.repetitions)
    print("\n".join(f"{name}: {ratio:.2f}x the CPU of smoltrain" for name, ratio in ratios.items()))
    if given.record:
        RECORD.write_text(json.dumps({name: round(ratio, 2) for name, ratio in ratios.items()}, indent=1) + "\n")
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    lost = [name for name, ratio in ratios.items() if ratio < before.get(name, 0) * (1 - LOSS)]
    if lost:
        sys.exit("".join(f"{name}: it was {before[name]:.2f}x\n" for name in lost))


if __name__ == "__main__":
    main()
