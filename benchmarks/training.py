"""What training costs: smoltrain's trainers, TRL's as they come, and TRL's tuned by hand, on the same rows.

Rows are made-up tokens with the lengths of known sets; weights are random, but the embedded model's. smoltrain runs as
`perf=auto` has it on this machine. TRL as it comes pads, recomputes activations and rounds to bf16; tuned by hand it
does not recompute, and SFT is tried without padding. With a reference that is known its log-probabilities are in the
rows, else each step computes them. What the framework costs is seen beside a loop of bare PyTorch, on rows of a few
tokens.

Each is timed in processes of its own, which take turns: on a processor CPU seconds of the steps behind the first ones,
all threads together, and the peak of a process's resident memory; on a GPU wall seconds and the peak of its allocator,
with the share of its peak arithmetic that the model's own takes (MFU; attention counted row by row, causally). Medians
and spread over repetitions. A ratio that is more than 5 % below the one in benchmarks/training.json ends it with 1;
--record keeps those of this run there; --json FILE writes all that was measured.

    python benchmarks/training.py          the processor's cases, or with a GPU in the machine the GPU's
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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_suffix(".json")
WARM, STEPS = 2, 6
LOSS = 0.05  # of a ratio, from which on it counts
# Mean tokens of a prompt and of a reply, and the spread of their logarithms: HH and UltraFeedback as they are reported,
# GSM8K, alpaca_en_demo and dpo_en_demo as the embedded tokenizer spells them.
LENGTHS = {
    "GSM8K": (185, 0.40, 244, 0.48),
    "alpaca_en_demo": (71, 0.52, 580, 1.43),
    "a few tokens": (4, 0.0, 4, 0.0),
    "HH": (130, 1.0, 130, 1.0),
    "UltraFeedback": (121, 0.7, 288, 0.7),
    "dpo_en_demo": (1558, 1.52, 1243, 1.3),
}
REPLIES = ("input_ids", "chosen_ids", "rejected_ids")
OURS, STOCK, LOOP = "smoltrain", "TRL as it comes", "bare PyTorch"
PLAIN = {"bf16": False, "activation_checkpointing": False}
FREE = {"padding_free": True, "max_length": None, "bf16": True, "activation_checkpointing": False}
PACKED = {"packing": True, "bf16": True, "activation_checkpointing": False}
SFT: dict[str, dict[str, Any]] = {
    OURS: {},
    "TRL by hand, fp32": PLAIN,
    "TRL by hand, bf16": PLAIN | {"bf16": True},
    "TRL by hand, bf16 without padding": FREE,
    STOCK: {},
}
DPO: dict[str, dict[str, Any]] = {
    OURS: {},
    "TRL by hand, fp32": PLAIN,
    "TRL by hand, bf16": PLAIN | {"bf16": True},
    STOCK: {},
}
# Where the model is small, a conversion to bf16 costs more than it brings: perf=auto has the embedded one in float32.
SMALL: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 4096, "head_dim": 64}


@dataclass(frozen=True)
class Case:
    """What is compared: a `model`, a method (SFT or DPO), rows as long as those of a set, and each side's arguments."""

    model: str
    method: str
    lengths: str
    sides: dict[str, dict[str, Any]]
    args: dict[str, Any] = field(default_factory=dict)
    batch: int = 8
    longest: int = 1024

    @property
    def name(self) -> str:
        said = {True: ", reference known", False: ", reference computed", None: ""}
        packed = ", packed" if self.args.get("packing") else ""
        known = said[self.args.get("precompute_ref_log_probs")]
        return f"{self.model}, {self.method}, {self.lengths}{known}{packed}"


KNOWN = [{"precompute_ref_log_probs": known} for known in (False, True)]
CPU = [
    Case("1M", "SFT", "a few tokens", {OURS: {}, LOOP: {}}),
    *(Case("4M", "SFT", lengths, SFT) for lengths in ("GSM8K", "alpaca_en_demo")),
    *(Case("4M", "DPO", lengths, DPO, known, 4) for lengths in ("HH", "UltraFeedback") for known in KNOWN),
    Case("4M", "DPO", "dpo_en_demo", DPO, KNOWN[1], 4),
    Case("1M", "SFT", "GSM8K", SFT),
    Case("1M", "DPO", "HH", DPO, KNOWN[1], 4),
]
LARGE = {"SmolLM2-135M": (16, 2048), "SmolLM2-360M": (8, 2048), "SmolLM2-1.7B": (4, 2048), "SmolLM3-3B": (4, 4096)}
GPU = [
    *(
        Case(model, "SFT", "UltraFeedback", {OURS: PACKED, "TRL by hand, packed": PACKED, STOCK: {}}, PACKED, *size)
        for model, size in LARGE.items()
    ),
    *(Case(model, "SFT", "UltraFeedback", SFT, {}, *size) for model, size in LARGE.items()),
    *(
        Case(model, "DPO", lengths, DPO, known, rows // 2, longest)
        for model, (rows, longest) in LARGE.items()
        for lengths in ("HH", "UltraFeedback")
        for known in KNOWN
    ),
]


def rows(case: Case, many: int) -> list[dict[str, list[int]]]:
    """Rows of random tokens, as long as those of a known set."""
    rng, (prompt, prompts, reply, replies) = np.random.default_rng(0), LENGTHS[case.lengths]

    def ids(mean: int, spread: float, most: int) -> list[int]:
        length = rng.lognormal(np.log(mean) - spread**2 / 2, spread)
        return rng.integers(5, 400, int(np.clip(length, 2, most))).tolist()

    made = []
    for _ in range(many):
        asked, said = ids(prompt, prompts, case.longest // 2), ids(reply, replies, case.longest // 2)
        if case.method == "SFT":
            made.append({"input_ids": asked + said, "labels": [-100] * len(asked) + said})
        else:
            other = ids(reply, replies, case.longest // 2)
            made.append({"prompt_ids": asked, "chosen_ids": said, "rejected_ids": other})
    return made


def model_of(name: str) -> Any:
    """A model in float32: the embedded one, or one of random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from smoltrain.model import locate

    if name == "1M":
        return AutoModelForCausalLM.from_pretrained(locate("pkg://smoltrain/tiny"), dtype=torch.float32)
    torch.manual_seed(0)
    with torch.device(device()):
        return AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32, attn_implementation="sdpa")


def config_of(name: str) -> Any:
    """The config of the embedded model (1M), of one like it with four times the weights, or of a known architecture."""
    from transformers import AutoConfig

    from smoltrain.model import locate

    if name.startswith("SmolLM"):
        known = json.loads((ROOT / "tests" / "fixtures" / "architectures.json").read_text())
        return AutoConfig.for_model(**known[f"HuggingFaceTB/{name}"]["config"])
    config = AutoConfig.from_pretrained(locate("pkg://smoltrain/tiny"))
    config.update(SMALL if name == "4M" else {})
    return config


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class Clock:
    """Times the steps behind the first ones, and when the first was over, counted from the start of the process."""

    def __init__(self, warm: int) -> None:
        self.warm, self.taken = warm, 0
        self.first = self.wall = self.cpu = 0.0

    def step(self) -> None:
        settle()
        self.taken += 1
        if self.taken == 1:
            self.first = time.time() - started()
        if self.taken == self.warm:
            self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self) -> tuple[float, float]:
        settle()
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


def settle() -> None:
    if device() == "cuda":
        import torch

        torch.cuda.synchronize()


def started() -> float:
    """When this process began, in seconds since the epoch."""
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return boot + int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


def one(name: str, side: str) -> dict[str, float]:
    """Trains as one side of a case does, and returns what a token (no padding) or a pair costs."""
    case = next(case for case in CPU + GPU if case.name == name)
    steps = STEPS * (30 if LOOP in case.sides else 1)
    packs = case.longest // 400 if case.args.get("packing") else 1
    made, clock = rows(case, case.batch * (WARM + steps) * packs), Clock(WARM)
    with tempfile.TemporaryDirectory() as folder:
        if side == LOOP:
            counts = loop(case, made, clock)
        else:
            counts = trained(case, side, made, clock, output_dir=folder, max_steps=WARM + steps)
    wall, cpu = clock.stop()
    items = sum(counts[WARM : WARM + steps])
    found = {"wall": wall / items, "cpu": cpu / items, "items": items / steps, "first": clock.first, "peak": peak()}
    return found | {"share": operations(case, made) * items / wall / limit()}


def peak() -> float:
    """Megabytes that were held at most."""
    import torch

    if device() == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def operations(case: Case, made: list[Any]) -> float:
    """Operations that a token or a pair needs: by each weight two forward and four back, and its rows' attention.

    What a pair shares counts once, and a reference that is computed a third of a step.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(case.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = model.num_parameters(exclude_embeddings=True)
    weights += config.vocab_size * config.hidden_size * config.tie_word_embeddings  # the head multiplies by them too
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = (
        6 * config.num_hidden_layers * config.num_attention_heads * head
    )  # of two tokens, the later sees the other
    total, tokens = 0.0, 0
    for row in made:
        prompt, replies = len(row.get("prompt_ids", ())), [len(row[key]) for key in row if key in REPLIES]
        seen = [(prompt + reply) ** 2 for reply in replies]
        tokens += prompt + sum(replies)
        total += 6 * weights * (prompt + sum(replies)) + attention * (sum(seen) - prompt**2 * (len(replies) - 1))
    each = total / (tokens if case.method == "SFT" else len(made))
    return each if case.args.get("precompute_ref_log_probs", True) else each * 4 / 3


def limit() -> float:
    """Operations a second that this machine can do: of a GPU what its maker says, else what a large product reaches."""
    import torch
    from trl.trainer.utils import get_peak_flops

    if device() == "cuda" and (said := get_peak_flops(torch.cuda.get_device_name(), "bfloat16")):
        return said
    size, kind = (8192, torch.bfloat16) if device() == "cuda" else (1024, torch.float32)
    one = torch.randn(size, size, device=device(), dtype=kind)
    _ = one @ one
    settle()
    began = time.perf_counter()
    for _ in range(10):
        one @ one
    settle()
    return 10 * 2 * size**3 / (time.perf_counter() - began)


def trained(case: Case, side: str, made: list[Any], clock: Clock, **given: Any) -> list[int]:
    """Trains on rows, and returns what each batch held."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    from smoltrain import perf
    from smoltrain.dpo import DPOTrainer
    from smoltrain.model import locate
    from smoltrain.sft import SFTTrainer
    from smoltrain.trainers import given_tokens, watched

    class Timed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.step()

    model, here, cpu = model_of(case.model), perf.machine(False), device() == "cpu"
    kinds = {"SFT": (trl.SFTTrainer, SFTTrainer), "DPO": (trl.DPOTrainer, DPOTrainer)}
    kind, layout = kinds[case.method][side == OURS], {}
    if side == OURS:
        layout = {getattr(kind, "layout"): True}  # noqa: B009
        bf16, _ = perf.precision(here, model.config.hidden_size, False, "float32")
        given |= {"bf16": bf16, "activation_checkpointing": False}
        perf.keep_memory(torch.device(device()))
    given |= {"use_cpu": cpu, "max_length": case.longest, "disable_tqdm": True}
    given |= {"per_device_train_batch_size": case.batch, "report_to": "none", "save_strategy": "no"}
    args = case.args if side != STOCK or case.method == "DPO" else {}
    config = getattr(trl, f"{case.method}Config")(**given | args | case.sides[side])
    wrap = given_tokens(partial(kind, args=config, **layout))
    trainer = (watched(wrap) if side == OURS else wrap)(
        model=model,
        train_dataset=Dataset.from_list(made),
        processing_class=AutoTokenizer.from_pretrained(locate("pkg://smoltrain/tiny")),
        callbacks=[Timed()],
    )
    counts, collate = [], trainer.data_collator

    def counted(batch: Any) -> Any:
        counts.append(len(batch) if case.method == "DPO" else sum(len(row["input_ids"]) for row in batch))
        return collate(batch)

    trainer.data_collator = counted
    trainer.train()
    return counts


def loop(case: Case, made: list[Any], clock: Clock) -> list[int]:
    """The same steps in a loop of bare PyTorch."""
    import torch

    model = model_of(case.model).train().to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
    counts: list[int] = []
    for batch in batches(made, case.batch):
        ids, labels = (torch.tensor([row[key] for row in batch], device=device()) for key in ("input_ids", "labels"))
        logits = model(ids).logits[:, :-1].float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        counts.append(ids.numel())
        clock.step()
    return counts


def batches(made: list[Any], size: int) -> Iterator[list[Any]]:
    return (made[at : at + size] for at in range(0, len(made), size))


def alone(name: str, side: str) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps([name, side])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}, {side}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(case: Case, repetitions: int) -> dict[str, Any]:
    """Prints a line for each side; returns what was measured, and how many times as much as ours the others take."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in case.sides}
    for _ in range(repetitions):
        for side, runs in found.items():
            runs.append(alone(case.name, side))
    clock, ratios = ("cpu" if device() == "cpu" else "wall"), {}
    for side, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        each = [run[clock] / ours[clock] for ours, run in zip(found[OURS], runs, strict=True)]  # side by side
        ratios[f"{case.name}: {side}"] = ratio = statistics.median(each)
        spread = " to ".join(figure(1 / end(run[clock] for run in runs)) for end in (max, min))
        print(
            f"| {case.name} | {side} | {figure(1 / middle['wall'])} | {figure(1 / middle[clock])} ({spread}) "
            f"| {middle['wall'] * middle['items'] * 1e3:,.1f} | {middle['share']:.0%} "
            f"| {ratio:.2f} ({min(each):.2f} to {max(each):.2f}) | {middle['peak']:,.0f} | {middle['first']:.1f} |",
            flush=True,
        )
    del ratios[f"{case.name}: {OURS}"]
    return {"ratios": ratios, "runs": {case.name: found}}


def figure(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def lost(ratios: dict[str, float], before: dict[str, float]) -> list[str]:
    """The ratios that are lower than they were, and by how much."""
    return [
        f"{name}: {ratio:.2f}x the time of smoltrain, and it was {before[name]:.2f}x"
        for name, ratio in ratios.items()
        if ratio < before.get(name, 0) * (1 - LOSS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", default="", help="the cases whose names have this in them")
    parser.add_argument("--record", action="store_true", help="keep these ratios as those to compare with")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    if given.one:
        print(json.dumps(one(*json.loads(given.one))))
        return
    clock = "a CPU s" if device() == "cpu" else "a s"
    print(f"| rows | | tokens or pairs a s | {clock} (spread) | ms a step | of the limit ", end="")
    print("| time, smoltrain 1 (spread) | peak, MB | first step, s |\n|---|---|---:|---:|---:|---:|---:|---:|---:|")
    ratios: dict[str, float] = {}
    runs: dict[str, Any] = {}
    for case in CPU if device() == "cpu" else GPU:
        if given.only in case.name:
            found = table(case, given.repetitions)
            ratios, runs = ratios | found["ratios"], runs | found["runs"]
    if given.json:
        given.json.write_text(json.dumps({"ratios": ratios, "runs": runs}, indent=1) + "\n")
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if given.record:
        kept = before | {name: round(ratio, 3) for name, ratio in ratios.items()}
        RECORD.write_text(json.dumps(kept, indent=1) + "\n")
    elif lines := lost(ratios, before):
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    main()
