"""Preparing a chat file for training, smoltrain's way beside TRL's own: from the file to tokens, on the same machine.

Both get the same made-up conversations, tokenizer, template, max_length and number of processes, take turns in fresh
processes with empty caches, and have to come to the same `input_ids` and `labels`, row by row. Seconds are of the
work alone, without imports; those of the CPU are of all processes together. Memory is the largest sum of resident
memory over a process and its children, sampled ten times a second, pages that they share counted once for each.
Cached is a second process that finds all done. `--rows 1000000` makes a file of 1 GB.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
WORDS = 50_000  # in the language of the made-up texts, the n-th of them 1/n as frequent as the first
MAX_LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32_000, help="of the tokenizer that is made for this")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, os.cpu_count()])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smoltrain-preparation-") as name:
        folder = Path(name)
        write(folder / "rows.jsonl", given.rows)
        make_tokenizer(folder / "tokenizer", given.vocabulary)
        megabytes = (folder / "rows.jsonl").stat().st_size / 1e6
        print(
            f"{given.rows:,} conversations, {megabytes:,.0f} MB, {given.vocabulary:,} tokens, {os.cpu_count()} cores\n"
        )
        print(
            "| processes | | rows/s | tokens/s | seconds (spread) | reading, s | CPU, s | peak memory, GB | cached, s |"
        )
        print("|---:|---|---:|---:|---:|---:|---:|---:|---:|")
        for processes in dict.fromkeys(given.processes):
            compare(folder, processes, given.rows, given.repeats)


def compare(folder: Path, processes: int, rows: int, repeats: int) -> None:
    """Measures both, taking turns, and prints a line of the table for each and one for their ratio."""
    runs: dict[str, list[dict]] = {"smoltrain": [], "TRL": []}
    for _ in range(repeats):
        for side, done in runs.items():
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                first, again = (measured(side, folder, processes, cache) for _ in range(2))
            done.append(first | {"cached": again["seconds"]})
    digests = {run["digest"] for done in runs.values() for run in done}
    assert len(digests) == 1, f"the tokens or labels differ: {runs}"
    for side, done in runs.items():
        seconds = [run["seconds"] for run in done]
        reading, cpu, cached = (statistics.median(run[key] for run in done) for key in ("reading", "cpu", "cached"))
        middle = statistics.median(seconds)
        print(
            f"| {processes} | {side} | {rows / middle:,.0f} | {done[0]['tokens'] / middle:,.0f} | {middle:.1f} "
            f"({min(seconds):.1f} to {max(seconds):.1f}) | {reading:.1f} | {cpu:.1f} "
            f"| {max(run['memory'] for run in done) / 1e9:.2f} | {cached:.1f} |"
        )
    ratios = {
        key: [theirs[key] / ours[key] for ours, theirs in zip(*runs.values(), strict=True)]
        for key in ("seconds", "cpu")
    }
    wall, cpu = (f"**{statistics.median(r):.2f}** ({min(r):.2f} to {max(r):.2f})" for r in ratios.values())
    print(f"| {processes} | ratio | | | {wall} | | {cpu} | | |", flush=True)


def measured(side: str, folder: Path, processes: int, cache: str) -> dict:
    """What a fresh process says of itself, and the most memory that it and its children held until it was ready."""
    environment = os.environ | {"HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false"}  # its threads would make one process several
    environment |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}  # they would fill the pipe
    command = [sys.executable, __file__, side, str(folder), str(processes)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        peak = 0
        while child.poll() is None and not (Path(cache) / "ready").exists():
            peak = max(peak, memory(child.pid))
            time.sleep(0.1)
        out, err = child.communicate()
        (Path(cache) / "ready").unlink(missing_ok=True)
    if child.returncode:
        sys.exit(err)
    return json.loads(out.splitlines()[-1]) | {"memory": peak}


def memory(process: int) -> int:
    total = 0
    for one in [(parent := psutil.Process(process)), *parent.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:  # it has ended since it was listed
            continue
    return total


# ---------------------------------------------------------------- what is measured


def smoltrain(file: Path, tokenizer: Any, processes: int) -> Iterator[Any]:
    from smoltrain.data import local
    from smoltrain.data.encode import Chat, Conversations

    source: dict[str, Any] = {"path": str(file), "test_path": None, "streaming": False, "format": None}
    source |= dict.fromkeys(["columns", "keep_where", "drop_where", "max_rows", "system_prompt"])
    source |= {"test_share": 0.01, "test_rows": 500, "seed": 0, "workers": processes}
    source |= {"on_too_long": "truncate", "on_bad_row": "error", "on_duplicate": "keep"}
    yield
    data = local(**source)
    yield
    prepared = data.prepare(Conversations("assistant"), Chat(tokenizer), MAX_LENGTH)
    yield
    part = next(iter(prepared.sides.values()))["train"].part
    yield part.rows.select(np.flatnonzero(part.fit))  # in the order of the file, the held-out rows among them


def trl(file: Path, tokenizer: Any, processes: int) -> Iterator[Any]:
    from datasets import Dataset, load_dataset
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(file.parent / "trl"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=MAX_LENGTH,
        assistant_only_loss=True,
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ROOT / "smoltrain" / "tiny"))
    one = Dataset.from_list([{"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")]}])
    trainer: Any = SFTTrainer(model, args, train_dataset=one, processing_class=tokenizer)
    args.dataset_num_proc = processes if processes > 1 else None
    yield
    rows = load_dataset("json", data_files=str(file), split="train")
    yield
    done = trainer._prepare_dataset(rows, tokenizer, args, False, None, "train")
    yield
    yield done


def one(side: str, folder: Path, processes: int) -> None:
    """Prepares the file once and prints seconds, tokens and a digest of every row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    steps = (smoltrain if side == "smoltrain" else trl)(folder / "rows.jsonl", tokenizer, processes)
    next(steps)
    start, before = time.perf_counter(), cpu()
    next(steps)
    read = time.perf_counter()
    next(steps)
    end, after = time.perf_counter(), cpu()
    (Path(os.environ["HF_DATASETS_CACHE"]) / "ready").touch()
    tokens, digest = 0, hashlib.sha256()
    for table in next(steps).with_format("arrow").iter(1000):
        for row in zip(table["input_ids"], table["labels"], strict=True):
            ids, labels = (np.asarray(column.values, dtype=np.int32) for column in row)
            tokens += len(ids)
            digest.update(b"row" + ids.tobytes() + labels.tobytes())
    found = {"seconds": end - start, "reading": read - start, "cpu": after - before}
    print(json.dumps(found | {"tokens": tokens, "digest": digest.hexdigest()}))


def cpu() -> float:
    """Seconds that this process and the children it waited for have computed."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# ---------------------------------------------------------------- made-up conversations


@lru_cache
def text() -> str:
    """20 MB of a language with Zipf's frequencies: words of syllables, accents, numbers, punctuation, lines."""
    random = np.random.default_rng(0)
    syllables = [a + b for a in (*"bcdfglmnprstv", "st", "tr") for b in (*"aeioué", "ai", "on", "er")]
    words = ["".join(random.choice(syllables, size)) for size in random.integers(1, 5, WORDS)]
    words[9::50] = [str(number) for number in random.integers(0, 10_000, len(words[9::50]))]
    shares = 1 / np.arange(1, WORDS + 1)
    drawn = random.choice(WORDS, 3_000_000, p=shares / shares.sum())
    ends = random.choice([" ", " ", " ", " ", " ", " ", " ", ", ", ". ", ".\n"], len(drawn))
    return "".join(words[word] + end for word, end in zip(drawn.tolist(), ends.tolist(), strict=True))


def write(file: Path, rows: int) -> None:
    """Conversations of 1 to 3 exchanges, message lengths log-normal: about 1 kB a row, the same at every call."""
    random = np.random.default_rng(1)
    said = text()
    with file.open("w", encoding="utf-8") as out:
        for turns in (2 * random.integers(1, 4, rows)).tolist():
            lengths = np.minimum(random.lognormal(4.9, 1.0, turns), 20_000).astype(int) + 1
            starts = random.integers(0, len(said) - 20_001, turns)
            messages = [
                {"role": ("user", "assistant")[i % 2], "content": said[start : start + length].strip() or "a"}
                for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True))
            ]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def make_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE of these texts, with the special tokens and the template of the embedded model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tiny = AutoTokenizer.from_pretrained(ROOT / "smoltrain" / "tiny")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=tiny.all_special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text()[:5_000_000]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **tiny.special_tokens_map)
    tokenizer.chat_template = tiny.chat_template
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if sys.argv[1:2] in (["smoltrain"], ["TRL"]):
        one(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
