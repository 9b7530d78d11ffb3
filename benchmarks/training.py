"""What training costs: smoltrain's trainers, TRL's as they come, and TRL's tuned by hand, on the same rows.

Rows are made-up tokens with the lengths of known sets; the model is the embedded one. TRL as it comes pads, recomputes
activations and rounds to bf16; tuned by hand it does not, and SFT is tried without padding and packed as well. With a
reference that is known its log-probabilities are in the rows, else each step computes them. What the framework costs is
seen beside a loop of bare PyTorch, on short rows of one length.

Each is timed in processes of its own, which take turns: CPU seconds of the steps behind the first ones, all threads
together; the peak is of a process's resident memory. Medians and spread over repetitions. A ratio that is more than
5 % below the one in benchmarks/training.json ends it with 1; --record keeps those of this run there.
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
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

RECORD = Path(__file__).with_suffix(".json")
BATCH = {"SFT": 8, "DPO": 4}
WARM, STEPS, LONGEST = 3, 10, 1024
LOSS = 0.05  # of a ratio, from which on it counts
# Mean tokens of a prompt and of a reply, and the spread of their logarithms: HH and UltraFeedback as they are reported,
# GSM8K, alpaca_en_demo and dpo_en_demo as the embedded tokenizer spells them.
LENGTHS = {
    "GSM8K": (185, 0.40, 244, 0.48),
    "alpaca_en_demo": (71, 0.52, 580, 1.43),
    "one length": (32, 0.0, 32, 0.0),
    "HH": (130, 1.0, 130, 1.0),
    "UltraFeedback": (121, 0.7, 288, 0.7),
    "dpo_en_demo": (1558, 1.52, 1243, 1.3),
}
PLAIN = {"bf16": False, "activation_checkpointing": False}
SFT: dict[str, dict[str, Any]] = {
    "smoltrain": PLAIN,
    "TRL by hand, fp32": PLAIN,
    "TRL by hand, without padding": PLAIN | {"padding_free": True, "max_length": None},
    "TRL by hand, without padding, bf16": PLAIN | {"padding_free": True, "max_length": None, "bf16": True},
    "TRL by hand, packed": PLAIN | {"packing": True},
    "TRL as it comes": {},
}
DPO: dict[str, dict[str, Any]] = {"smoltrain": PLAIN, "TRL by hand": PLAIN, "TRL as it comes": {}}
LOOP: dict[str, dict[str, Any]] = {"smoltrain": PLAIN, "bare PyTorch": {}}
# Name, method, lengths, further arguments, what is compared.
CASES: list[tuple[str, str, str, dict[str, Any], dict[str, dict[str, Any]]]] = [
    ("SFT, one length", "SFT", "one length", {}, LOOP),
    *((f"SFT, {lengths}", "SFT", lengths, {}, SFT) for lengths in ("GSM8K", "alpaca_en_demo")),
    *(
        (f"DPO, {lengths}, reference {said}", "DPO", lengths, {"precompute_ref_log_probs": said == "known"}, DPO)
        for lengths in ("HH", "UltraFeedback", "dpo_en_demo")
        for said in ("computed", "known")
    ),
]


def rows(method: str, lengths: str, many: int) -> list[dict[str, list[int]]]:
    """Rows of random tokens, as long as those of a known set."""
    rng, (prompt, prompts, reply, replies) = np.random.default_rng(0), LENGTHS[lengths]

    def ids(mean: int, spread: float, most: int) -> list[int]:
        length = rng.lognormal(np.log(mean) - spread**2 / 2, spread)
        return rng.integers(5, 400, int(np.clip(length, 2, most))).tolist()

    made = []
    for _ in range(many):
        asked, said = ids(prompt, prompts, LONGEST // 2), ids(reply, replies, LONGEST // 2)
        if method == "SFT":
            made.append({"input_ids": asked + said, "labels": [-100] * len(asked) + said})
        else:
            other = ids(reply, replies, LONGEST // 2)
            made.append({"prompt_ids": asked, "chosen_ids": said, "rejected_ids": other})
    return made


def one(name: str, side: str) -> dict[str, float]:
    """Trains as one side of a case does, and returns what a token (no padding) or a pair costs."""
    _, method, lengths, more, sides = next(case for case in CASES if case[0] == name)
    steps = STEPS * (10 if sides is LOOP else 1)
    made = rows(method, lengths, BATCH[method] * (WARM + steps))
    with tempfile.TemporaryDirectory() as folder:
        if side == "bare PyTorch":
            began, counts = loop(made, BATCH[method])
        else:
            began, counts = trained(method, side == "smoltrain", made, folder, **more, **sides[side])
        wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    items = sum(counts[WARM:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wall": wall / items, "cpu": cpu / items, "peak": peak, "items": items / len(counts[WARM:])}


def trained(
    method: str, ours: bool, made: list[Any], folder: str, **args: Any
) -> tuple[tuple[float, float], list[int]]:
    """Trains one epoch; when the first steps were over, by both clocks, and what each batch held."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from smoltrain.dpo import DPOTrainer
    from smoltrain.model import locate
    from smoltrain.sft import SFTTrainer
    from smoltrain.trainers import given_tokens

    class Clock(TrainerCallback):
        began: tuple[float, float]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM:
                self.began = time.perf_counter(), time.process_time()

    kinds = {"SFT": (trl.SFTTrainer, SFTTrainer), "DPO": (trl.DPOTrainer, DPOTrainer)}
    layout = {getattr(kinds[method][1], "layout"): True} if ours else {}  # noqa: B009
    given: dict[str, Any] = {"output_dir": folder, "use_cpu": True, "max_length": LONGEST, "num_train_epochs": 1}
    given |= {"per_device_train_batch_size": BATCH[method], "report_to": "none", "save_strategy": "no"}
    config = getattr(trl, f"{method}Config")(**given | args, disable_tqdm=True)
    clock, source = Clock(), locate("pkg://smoltrain/tiny")
    trainer = given_tokens(partial(kinds[method][ours], args=config, **layout))(
        model=AutoModelForCausalLM.from_pretrained(source),
        train_dataset=Dataset.from_list(made),
        processing_class=AutoTokenizer.from_pretrained(source),
        callbacks=[clock],
    )
    counts, collate = [], trainer.data_collator

    def counted(batch: Any) -> Any:
        counts.append(len(batch) if method == "DPO" else sum(len(row["input_ids"]) for row in batch))
        return collate(batch)

    trainer.data_collator = counted
    trainer.train()
    return clock.began, counts


def loop(made: list[Any], size: int) -> tuple[tuple[float, float], list[int]]:
    """The same steps in a loop of bare PyTorch."""
    import torch
    from transformers import AutoModelForCausalLM

    from smoltrain.model import locate

    model = AutoModelForCausalLM.from_pretrained(locate("pkg://smoltrain/tiny")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
    counts: list[int] = []
    for batch in batches(made, size):
        ids, labels = (torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels"))
        logits = model(ids).logits[:, :-1].float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        counts.append(ids.numel())
        if len(counts) == WARM:
            began = time.perf_counter(), time.process_time()
    return began, counts


def batches(made: list[Any], size: int) -> Iterator[list[Any]]:
    return (made[at : at + size] for at in range(0, len(made), size))


def alone(name: str, side: str) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps([name, side])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}, {side}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(name: str, sides: dict[str, Any], repetitions: int) -> dict[str, float]:
    """Prints a line for each side, and returns how many times as much CPU as ours each of the others takes."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(repetitions):
        for side, runs in found.items():
            runs.append(alone(name, side))
    ratios = {}
    for side, runs in found.items():
        cpu, wall, peak, items = (
            statistics.median(run[key] for run in runs) for key in ("cpu", "wall", "peak", "items")
        )
        each = [run["cpu"] / ours["cpu"] for ours, run in zip(found["smoltrain"], runs, strict=True)]  # side by side
        ratios[f"{name}: {side}"] = ratio = statistics.median(each)
        spread = " to ".join(figure(1 / end(run["cpu"] for run in runs)) for end in (max, min))
        print(
            f"| {name} | {side} | {figure(1 / wall)} | {figure(1 / cpu)} ({spread}) | {cpu * items * 1e3:,.1f} "
            f"| {ratio:.2f} ({min(each):.2f} to {max(each):.2f}) | {peak:,.0f} |",
            flush=True,
        )
    del ratios[f"{name}: smoltrain"]
    return ratios


def figure(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def lost(ratios: dict[str, float], before: dict[str, float]) -> list[str]:
    """The ratios that are lower than they were, and by how much."""
    return [
        f"{name}: {ratio:.2f}x the CPU of smoltrain, and it was {before[name]:.2f}x"
        for name, ratio in ratios.items()
        if ratio < before.get(name, 0) * (1 - LOSS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", default="", help="the cases whose names have this in them")
    parser.add_argument("--record", action="store_true", help="keep these ratios as those to compare with")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    if given.one:
        print(json.dumps(one(*json.loads(given.one))))
        return
    print("| rows | | tokens or pairs a s | a CPU s (spread) | CPU ms a step | CPU, smoltrain 1 (spread) | peak, MB |")
    print("|---|---|---:|---:|---:|---:|---:|")
    ratios: dict[str, float] = {}
    for name, _, _, _, sides in CASES:
        if given.only in name:
            ratios |= table(name, sides, given.repetitions)
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if given.record:
        kept = before | {name: round(ratio, 3) for name, ratio in ratios.items()}
        RECORD.write_text(json.dumps(kept, indent=1) + "\n")
    elif lines := lost(ratios, before):
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    main()
