"""What the reference of preference training makes of each pair: computed once, and found by all runs that share it.

A run that computes its reference's log-probabilities ahead of training (`precompute_ref_log_probs`) leaves them beside
the prepared rows, in a file named by a hash of all that decides about their bits: the tokens in their order, how they
are batched, padded and cut, the reference's weights and architecture, what the loss wants of them, the arithmetic, the
versions. Nothing else is in that name: whatever learns by them, or how the rows came to be these, finds them.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets

from smoltrain.data.cache import alone, folder

TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# Of a model's config: its name, who wrote it, and what only generation and padding read. No reference depends on it.
IDLE = {"_name_or_path", "transformers_version", "architectures", "dtype", "use_cache"}
IDLE |= {"pad_token_id", "bos_token_id", "eos_token_id"}


def ahead(trainer: Any, rows: Dataset, batch_size: int, computed: Callable[[], Dataset]) -> Dataset:
    """The rows with two more columns, found or else `computed` by TRL's own pass; both come to the same, bit for bit.

    Nothing is kept where the pass is not TRL's own, where several processes share it, or once training has begun,
    which may have moved what it reads.
    """
    if not own(trainer) or trainer.state.global_step or trainer.accelerator.num_processes > 1:
        return computed()
    name = f"reference-{key(trainer, rows, batch_size)}"
    with alone(name, "computing what the reference makes of the same rows"):
        found = read(folder() / name)
        if found is None:
            found = silently(computed)
            keep(folder() / name, found)
        columns = pa.table(dict(zip(COLUMNS, found, strict=True)))
        return concatenate_datasets([rows, Dataset(columns, fingerprint=name)], axis=1)


def own(trainer: Any) -> bool:
    """Whether rows are batched, and their log-probabilities computed, by nobody's code but TRL's."""
    from trl import DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    ours = type(trainer.data_collator) is DataCollatorForPreference
    return ours and type(trainer).compute_ref_log_probs is DPOTrainer.compute_ref_log_probs


def silently(computed: Callable[[], Dataset]) -> np.ndarray:
    """What is computed, (2, rows) in float32, without a random number drawn or another copy kept of it."""
    with torch.random.fork_rng(devices=[]), without_cache():  # a DataLoader draws a number on the CPU
        table = computed().select_columns(list(COLUMNS)).with_format("arrow")[:]
    return np.stack([table[name].to_numpy() for name in COLUMNS]).astype("<f4")


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Has TRL write its own file to a folder that goes with this process."""
    enabled = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_caching()


# ---------------------------------------------------------------- the key


def key(trainer: Any, rows: Dataset, batch_size: int) -> str:
    """A hash of all that the log-probabilities depend on."""
    tokens, longest, uneven = content(rows)
    collator, model = trainer.data_collator, trainer.ref_model or trainer.model
    cuts = collator.max_length is not None and longest > collator.max_length
    parts = [
        tokens,
        # A sum over a batch depends on how wide it is. What the padding says does not matter: it is masked.
        [min(batch_size, len(rows)), collator.pad_to_multiple_of or 1],
        [collator.max_length, collator.truncation_mode] if cuts else None,
        trainer.ld_alpha if uneven else None,
        weights(model),
        architecture(model),
        arithmetic(trainer.accelerator),
        [metadata.version(package) for package in ("torch", "transformers", "trl", "accelerate")],
        [Path(__file__).with_name(name).read_text() for name in ("reference.py", "dpo.py", "unpadded.py", "head.py")],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def content(rows: Dataset) -> tuple[str, int, bool]:
    """A hash of all tokens in the order of the rows, how many the longest pair has, and whether lengths differ.

    That is of a chosen and a rejected reply: of two that end together none has the tail that `ld_alpha` weighs.
    """
    named, longest, uneven = hashlib.sha256(), 0, False
    for table in rows.select_columns(list(TOKENS)).with_format("arrow").iter(1000):
        columns = [table[name].combine_chunks() for name in TOKENS]
        prompt, chosen, rejected = lengths = [column.value_lengths().to_numpy() for column in columns]
        for counted, column in zip(lengths, columns, strict=True):
            named.update(counted.tobytes())
            named.update(column.flatten().to_numpy().tobytes())
        longest = max(longest, int((prompt + np.maximum(chosen, rejected)).max()))
        uneven |= bool((chosen != rejected).any())
    return named.hexdigest(), longest, uneven


def weights(model: Any) -> str:
    """A hash of a reference's weights, without an adapter that is trained beside them: then they are its base."""
    trained = set(getattr(model, "peft_config", ())) - {"ref"}
    named = hashlib.sha256()
    for name, weight in sorted((bare(name), weight) for name, weight in base(model).state_dict().items()):
        if trained.isdisjoint(name.split(".")):
            named.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            named.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return named.hexdigest()


def base(model: Any) -> Any:
    """The model that an adapter is put into, or an engine of DeepSpeed's made of."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "peft_config") else model


def bare(name: str) -> str:
    """The name that a weight has without an adapter."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def architecture(model: Any) -> list[Any]:
    model = base(model)
    known = {name: value for name, value in model.config.to_dict().items() if name not in IDLE}
    return [type(model).__name__, model.config._attn_implementation, known]


def arithmetic(accelerator: Any) -> list[Any]:
    """What decides how the same sums are rounded: the precision, and the machine that adds them up."""
    device = accelerator.device
    if device.type == "cpu":
        return [accelerator.mixed_precision, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    modes = [torch.backends.cuda.matmul.fp32_precision == "tf32", torch.are_deterministic_algorithms_enabled()]
    return [accelerator.mixed_precision, name, *modes]


# ---------------------------------------------------------------- the file


def keep(file: Path, found: np.ndarray) -> None:
    """Writes them whole or not at all, behind their sum; a folder that takes no file costs the next run its time."""
    unfinished = file.with_suffix(".partial")
    content = found.tobytes()
    try:
        unfinished.write_bytes(hashlib.sha256(content).digest() + content)
        unfinished.rename(file)
    except OSError as error:
        print(f"the reference's log-probabilities are not kept for other runs: {error}", file=sys.stderr)


def read(file: Path) -> np.ndarray | None:
    """What is kept in a file, if there is one and it is what was written."""
    if not file.exists():
        return None
    content = file.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        print(f"{file} is damaged: its log-probabilities of the reference are computed again", file=sys.stderr)
        return None
    return np.frombuffer(content[32:], "<f4").reshape(2, -1)
