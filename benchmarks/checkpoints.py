"""What it costs to seal a checkpoint, beside what it costs to write it: in a real run, save by save.

The manifest is made by a thread while training goes on; what counts is how long training waits for it.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any


def timed(owner: Any, name: str, seconds: dict[str, list[float]]) -> None:
    """Has a method note how long each of its calls takes, under its own name."""
    real: Callable[..., Any] = getattr(owner, name)

    def measured(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            seconds[name].append(time.perf_counter() - began)

    setattr(owner, name, measured)


def model_of(folder: Path, layers: int) -> Path:
    """Writes a model with the embedded tokenizer, a hidden size of 1,024 and random weights, 12.6M for each layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from smoltrain.model import locate

    made = Path(shutil.copytree(locate("pkg://smoltrain/tiny"), folder / "model"))
    config = AutoConfig.from_pretrained(made)
    config.update({"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers, "layer_types": None})
    config.update({"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64, "no_rope_layers": None})
    AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict())).save_pretrained(made)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--saves", type=int, default=8)
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    from transformers import Trainer

    from smoltrain import checkpoints
    from smoltrain.__main__ import main as smoltrain
    from smoltrain.callbacks import Checkpoints

    seconds: dict[str, list[float]] = defaultdict(list)
    timed(Trainer, "_save_checkpoint", seconds)
    timed(Checkpoints, "on_save", seconds)
    timed(checkpoints, "seal", seconds)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        few = [
            "data.train_rows=64",
            "data.test_rows=8",
            "evaluation.max_rows=0",
            "tracking=none",
            "callbacks.progress=null",
        ]
        steps = [f"trainer.args.max_steps={6 * given.saves}", "trainer.args.save_steps=6", "threads=2"]
        command = [*few, *steps, f"model.name_or_path={model_of(Path(folder), given.layers)}"]
        assert smoltrain(command) == 0
        size = sum(file.stat().st_size for file in next(Path().glob("multirun/*/*/checkpoint-*")).iterdir())
    print(f"\n{given.saves} checkpoints of {size / 1e6:,.0f} MB; seconds, median (spread)")
    for name, what in (("_save_checkpoint", "written"), ("on_save", "training waits"), ("seal", "sealed meanwhile")):
        values = seconds[name]
        print(f"{what:18} {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    shares = [wait / write for wait, write in zip(seconds["on_save"], seconds["_save_checkpoint"], strict=True)]
    print(
        f"training waits {statistics.median(shares):.1%} of the time of a save ({min(shares):.1%} to {max(shares):.1%})"
    )


if __name__ == "__main__":
    main()
