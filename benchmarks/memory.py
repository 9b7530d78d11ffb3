"""How near `smoltrain.budget.memory` is to the measured peak: a markdown table, each row trained in a fresh process.

Weights are random, of published architectures where the name says so; two optimizer steps of TRL's own trainer. On
CUDA the peak is the allocator's. On the CPU it is the process's resident memory above what it was with everything
imported and a small model trained, with a C library that hands back at once what is freed; the last column is with
the C library as it is, which keeps some of it for later.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# glibc: whatever is larger than this goes back to the system when it is freed; see mallopt(3).
PROMPT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# model, its layers (null: all), trainer, rows, tokens, further arguments of the trainer, LoRA, attention
Case = tuple[str, int | None, str, int, int, dict[str, Any], bool, str]
CASES: list[Case] = [
    ("tiny", None, "sft", 16, 128, {}, False, "sdpa"),
    ("tiny", None, "dpo", 16, 128, {}, False, "sdpa"),
    ("SmolLM2-135M", None, "sft", 2, 128, {}, False, "sdpa"),
    ("SmolLM2-135M", None, "sft", 2, 128, {"activation_checkpointing": True}, False, "sdpa"),
    ("SmolLM2-135M", 15, "sft", 2, 256, {"bf16": True, "gradient_accumulation_steps": 2}, False, "sdpa"),
    ("SmolLM2-135M", None, "dpo", 1, 128, {}, False, "sdpa"),
    ("SmolLM2-135M", None, "dpo", 1, 128, {"activation_checkpointing": True}, True, "sdpa"),
    ("SmolLM2-135M", 6, "sft", 1, 1024, {}, False, "eager"),
    ("SmolLM2-360M", None, "sft", 2, 128, {}, True, "sdpa"),
    ("Qwen3-0.6B", 4, "sft", 1, 256, {"optim": "adafactor"}, False, "sdpa"),
]


def main() -> None:
    print("| model | trainer | rows x tokens | | estimate, MB | measured, MB | error | measured as it is, MB |")
    print("|---|---|---|---|---:|---:|---:|---:|")
    worst = 0.0
    for case in CASES:
        estimate, measured = child(case, PROMPT)
        _, usual = child(case, {})
        name, layers, trainer, rows, tokens, extra, lora, attention = case
        error = estimate / measured - 1
        worst = max(worst, abs(error))
        notes = [f"{layers} layers"] if layers else []
        notes += ["LoRA"] if lora else []
        notes += [key if value is True else f"{key}={value}" for key, value in extra.items()]
        notes += [attention] if attention != "sdpa" else []
        print(
            f"| {name} | {trainer} | {rows} x {tokens} | {', '.join(notes)} "
            f"| {estimate / 2**20:,.0f} | {measured / 2**20:,.0f} | {error:+.1%} | {usual / 2**20:,.0f} |",
            flush=True,
        )
    print(f"\nworst {worst:.1%}")


def child(case: Case, environment: dict[str, str]) -> tuple[int, int]:
    """The estimate and the measured peak of one row, from a process of its own."""
    command = [sys.executable, __file__, json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"{case}\n{done.stderr}")
    estimate, measured = json.loads(done.stdout.splitlines()[-1])
    return estimate, measured


def one(case: Case) -> None:
    """Trains one row of the table and prints the estimate and the measured peak, in bytes."""
    import torch
    from transformers.utils import logging

    from smoltrain.budget import memory, watched

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    name, layers, method, rows, tokens, extra, lora, attention = case
    config = config_of(name, layers, attention)
    train(config_of("tiny", 1, attention), method, 2, 16, extra, lora)
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    cuda = torch.cuda.is_available()
    with watched(torch.device("cuda" if cuda else "cpu")) as peak:
        args, peft_config = train(config, method, rows, tokens, extra, lora)
    seen = rows * 2 if method == "dpo" else rows
    estimate = memory(config, args, peft_config, "float32", None, seen, tokens, method == "dpo" and not lora)
    print(json.dumps([estimate.total, peak[0]]))


def config_of(name: str, layers: int | None, attention: str) -> Any:
    from transformers import AutoConfig

    if name == "tiny":
        config = AutoConfig.from_pretrained(ROOT / "smoltrain" / "tiny")
    else:
        known = json.loads((ROOT / "tests" / "fixtures" / "architectures.json").read_text())
        found = next(value["config"] for key, value in known.items() if key.endswith(f"/{name}"))
        config = AutoConfig.for_model(**found)
    if layers:
        config.num_hidden_layers = layers
        config.layer_types = ["full_attention"] * layers
    config._attn_implementation = attention
    return config


def train(config: Any, method: str, rows: int, tokens: int, extra: dict[str, Any], lora: bool) -> tuple[Any, Any]:
    """Two steps of TRL's trainer on rows of so many tokens; returns its arguments and its adapter's config."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "bf16": cuda,
        "activation_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    shared: dict[str, Any] = {
        "output_dir": tempfile.gettempdir(),
        "use_cpu": not cuda,
        "max_steps": 2,
        "per_device_train_batch_size": rows,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "smoltrain" / "tiny")
    peft_config = LoraConfig(**LORA) if lora else None

    def model():
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=config._attn_implementation
        )

    count = rows * 2 * extra.get("gradient_accumulation_steps", 1)
    # The last row of a batch is shorter, as batches have it.
    lengths = [tokens - (8 if i % rows else 0) for i in range(count)]
    args: Any
    trainer: Any
    if method == "sft":
        args = SFTConfig(**defaults | shared | extra)
        ids = [[1 + i % 400 for i in range(length)] for length in lengths]
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = SFTTrainer(model(), args, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)
    else:
        args = DPOConfig(**defaults | shared | extra)
        text = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
        trainer = DPOTrainer(
            model(),
            None if lora else model(),
            args,
            train_dataset=text,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        replies = [[1 + i % 400 for i in range(length - 32)] for length in lengths]
        prompts = [list(range(1, 33))] * count
        trainer.train_dataset = Dataset.from_dict(
            {"prompt_ids": prompts, "chosen_ids": replies, "rejected_ids": [reply[8:] for reply in replies]}
        )
    trainer.train()
    return args, peft_config


if __name__ == "__main__":
    one(json.loads(sys.argv[1])) if len(sys.argv) > 1 else main()
