"""Which rows a step of a run learned from: the order of its trainer, made again from the run's record.

Nothing is noted down for this while a run trains. Its rows are prepared once more (they are in the cache) and held
against the fingerprints in the record; then the trainer's own class, its sampler and accelerate's loader put them in
order as they did before, without a model.
"""

import json
import math
import re
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from smoltrain import runs
from smoltrain.config import ConfigError, leaves
from smoltrain.history import opened, resolve
from smoltrain.history import other_versions as versions_here

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from smoltrain.preflight import Preflight

# The methods that make a trainer's order, and whose code they may be: what anybody else's do is not known here.
ORDERING: tuple[str, ...] = (
    "get_train_dataloader",
    "_get_dataloader",
    "_get_train_sampler",
    "set_initial_training_values",
)
ORDERING += ("_inner_training_loop", "_run_epoch", "get_batch_samples")
KNOWN = ("transformers", "trl", "smoltrain")
DECIDING = ("torch", "transformers", "accelerate", "trl", "datasets", "tokenizers")  # another version, another order?

METRICS = ("loss", "grad_norm")
NEIGHBOURS = 20  # logged values around one, that say what is usual there
FEWEST = 8  # of them, below which nothing is unusual
# Spreads above the median, of logarithms, from which a value stands out. Of 4,500 values of undisturbed runs, with
# batches of 1 to 16 rows, three were farther, and one more than 6 away; a row that belongs nowhere was 12 and 17 away.
FAR = 7
FLAT = 0.01  # the least spread: a loss that no longer moves has none, and its last digits are no spikes
MOST = 10  # spikes that are named


# ---------------------------------------------------------------- the order


class Order:
    """The rows of each optimizer step of one process, as numbers in the training set, counted from 0.

    `steps` is how many steps there are, `per_epoch` how many in an epoch. Raises ConfigError where the order of a
    trainer or of its data is not known.
    """

    def __init__(self, found: "Preflight") -> None:
        self.trainer = without_model(found)
        self.loader = self.trainer.get_train_dataloader()
        _, self.per_epoch, *_, self.steps = self.trainer.set_initial_training_values(self.trainer.args, self.loader)
        self.epochs: dict[int, list[list[int]]] = {}

    def rows_of_step(self, step: int) -> list[list[int]]:
        """The rows of each sequence that a step (the first is 1) learns from: one of each, or of a pack several.

        Raises ConfigError where the sampler draws from a generator whose state by then nobody knows.
        """
        epoch, update = divmod(step - 1, self.per_epoch)
        size = self.trainer.args.gradient_accumulation_steps
        batches = self.batches(epoch)[update * size : (update + 1) * size]
        return [self.rows_in(sequence) for batch in batches for sequence in batch]

    def batches(self, epoch: int) -> list[list[int]]:
        if epoch not in self.epochs:
            sampler = getattr(self.loader.batch_sampler, "sampler", self.loader.batch_sampler)
            if not hasattr(sampler, "set_epoch") and getattr(sampler, "generator", self) is None:
                raise ConfigError(
                    "trainer.args.accelerator_config.use_seedable_sampler=false: the order is drawn from the generator "
                    "that everything else draws from too; it is not known"
                )
            self.loader.set_epoch(epoch)
            self.epochs[epoch] = list(self.loader.batch_sampler)
        return self.epochs[epoch]

    def rows_in(self, sequence: int) -> list[int]:
        """The rows that a sequence of the trainer's own data set is made of."""
        numbers = self.trainer.train_dataset[sequence]
        starts = accumulate([0, *numbers.get("seq_lengths", [])[:-1]])
        return [numbers["input_ids"][start] for start in starts]


def without_model(found: "Preflight") -> Any:
    """The run's trainer as far as it orders rows, on rows that are made of their own numbers.

    Its class is that of the run, but of all that is built of it only what transformers' Trainer builds.
    """
    from transformers import Trainer

    trainer = found.encoder.feed(found.trainer)
    kind, args = trainer.func, trainer.keywords["args"]
    others = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in KNOWN]
    own = [f"{base.__module__}.{base.__name__}.{name}" for base in others for name in ORDERING if name in vars(base)]
    if own:
        raise ConfigError(f"the trainer orders its rows itself ({', '.join(own)}); its order is not known")
    if not found.data.lengths.any():
        raise ConfigError(f"{kind.__name__} makes tokens and batches of its rows itself; its order is not known")
    args.remove_unused_columns = False
    packing = getattr(args, "packing", False)
    rows = numbered(found.data.lengths, whole=packing or args.train_sampling_strategy not in ("random", "sequential"))
    bare = object.__new__(kind)
    bare._move_model_to_device = lambda *_: None  # a skeleton has nothing to move
    rows = bare._prepare_dataset(rows, found.chat.tokenizer, args, packing, None, "train")
    Trainer.__init__(
        bare,
        model=found.skeleton,
        args=args,
        train_dataset=rows,
        processing_class=found.chat.tokenizer,
    )
    return bare


def numbered(lengths: "np.ndarray", whole: bool) -> "Dataset":
    """Rows with their number for every token; as long as they are, if `whole`, for where this decides on the order."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    lengths = lengths if whole else np.ones_like(lengths)
    numbers = pa.array(np.repeat(np.arange(len(lengths)), lengths), pa.int32())
    tokens = pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), numbers)
    return Dataset(pa.table({"input_ids": tokens, "labels": tokens}))


# ---------------------------------------------------------------- the record


def prepared_again(directory: Path, record: dict[str, Any]) -> "Preflight":
    """What the run had before its model. Raises ConfigError where its rows can no longer be had, or are others now."""
    import torch
    from omegaconf import OmegaConf

    from smoltrain import report
    from smoltrain.preflight import preflight

    flags = (key for key, value in leaves(record["config"]["data"], "data.") if value is True)
    if streamed := [key for key in flags if key.endswith(".streaming")]:
        raise ConfigError(f"{streamed[0]}=true: the rows of a stream pass once and are not kept; nobody knows which")
    cfg = OmegaConf.create(record["config"])
    cfg.trainer.args.update(output_dir=str(directory), report_to="none")
    if not torch.accelerator.is_available():  # the order is the same
        cfg.trainer.args.use_cpu = True
    found = preflight(cfg, chosen=record.get("perf", {}))
    if found.errors:
        raise ConfigError("\n  ".join([f"{directory}: its rows cannot be prepared again", *found.errors]))
    was, now = record["fingerprints"], report.rows(found.data, found.chat.tokenizer)
    names = {"train": f"the training rows ({', '.join(record['sources'])})"}
    names |= {"tokenizer": "the tokenizer", "chat_template": "the chat template"}
    changed = [said for key, said in names.items() if now["fingerprints"][key] != was[key]]
    if not changed and now["rows"]["train"] != record["rows"]["train"]:
        changed = ["what the training rows are as tokens"]
    if changed:
        raise ConfigError(
            f"{directory}: {' and '.join(changed)} changed since this run; which rows a step learned from is not known"
        )
    return found


def other_versions(record: dict[str, Any]) -> list[str]:
    """What is installed otherwise than it was for the run, of what makes the order, a line each."""
    deciding = {name: version for name, version in record["versions"].items() if name in DECIDING}
    return [f"{text}: the order may have been another" for text in versions_here(deciding)]


def steps_of(record: dict[str, Any], logged: list[dict[str, Any]]) -> int:
    """The last step that a run is known to have made; while it runs, its record does not say."""
    return max([record["steps"], *(row["step"] for row in logged)])


# ---------------------------------------------------------------- spikes


def spikes(logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl whose loss or gradient norm stands out, the farthest first, MOST of them.

    Each names the steps that it may come from, `first` to `last`: a loss is the mean since the line before, a gradient
    norm is that of the line's own step. Its `metrics` are by name the value and what is `usual` there, the 10th and
    the 90th percentile of the values around it.
    """
    rows = [row for row in logged if "loss" in row]
    before = {row["step"]: last for row, last in zip(rows, [0, *(row["step"] for row in rows)], strict=False)}
    found: dict[int, dict[str, Any]] = {}
    for metric in METRICS:
        measured = [row for row in rows if metric in row]
        for i, height, usual in unusual([row[metric] for row in measured]):
            step = measured[i]["step"]
            spike = found.setdefault(step, {"height": 0.0, "first": step, "last": step, "metrics": {}})
            spike["height"] = max(spike["height"], height)
            spike["first"] = before[step] + 1 if metric == "loss" else spike["first"]
            spike["metrics"][metric] = {"value": measured[i][metric], "usual": usual}
    return sorted(found.values(), key=lambda spike: -spike.pop("height"))[:MOST]


def unusual(values: list[float]) -> Iterator[tuple[int, float, list[float]]]:
    """The places of values that stand out above those around them, by how many spreads, and what is usual there.

    The spread is the median distance from the median, scaled to the standard deviation of a normal distribution. What
    is never negative is compared by its logarithm, as it varies by factors. A value that is not finite is infinitely
    far.
    """
    positive = all(value >= 0 for value in values if math.isfinite(value))

    def scaled(value: float) -> float:
        return math.log(max(value, sys.float_info.min)) if positive else value

    for i, value in enumerate(values):
        start = max(0, min(i - NEIGHBOURS // 2, len(values) - NEIGHBOURS - 1))
        around = values[start:i] + values[i + 1 : start + NEIGHBOURS + 1]
        around = [x for x in around if math.isfinite(x)]
        if len(around) < FEWEST:
            continue
        middle = median(map(scaled, around))
        least = FLAT if positive else max(FLAT * abs(middle), sys.float_info.min)
        spread = max(1.4826 * median(abs(scaled(x) - middle) for x in around), least)
        height = (scaled(value) - middle) / spread if math.isfinite(value) else math.inf
        if height > FAR:
            deciles = quantiles(around, n=10)
            yield i, height, [deciles[0], deciles[-1]]


# ---------------------------------------------------------------- the command


def rows(arguments: list[str]) -> int:
    """`smoltrain runs rows RUN`: shows the rows of `--step` or of the `--spikes`; with `--json` as data."""
    reference, asked, as_json = parsed(arguments)
    directory = resolve(reference)
    record, logged = opened(directory).record, runs.read_metrics(directory)
    if lost := [key for key in ("config", "fingerprints", "versions", "rows", "sources") if key not in record]:
        raise ConfigError(f"{directory}: its record does not say what it read ({', '.join(lost)} missing)")
    last = steps_of(record, logged)
    for step in asked or []:
        if not 1 <= step <= last:
            there = f"its steps are 1 to {last:,}" if last else "it made no step"
            raise ConfigError(f"--step {step}: {directory} has no such step; {there}")
    facts: dict[str, Any] = {"run": str(directory), "warnings": other_versions(record)}
    if record["status"] == "diverged" and not asked:
        facts["warnings"].append(f"{record['error']}, which is not logged: --step {last} shows the rows of that step")
    groups: list[dict[str, Any]] = [{"steps": asked}] if asked else spikes(logged)
    if groups:
        refuse_changed(record, min([*(asked or []), *(group["first"] for group in groups if "first" in group)]))
        found = prepared_again(directory, record)
        order = Order(found)
        for group in groups:
            steps = group.get("steps") or range(group["first"], group["last"] + 1)
            group["steps"] = [{"step": step, "rows": learned(order.rows_of_step(step), found)} for step in steps]
    facts |= groups[0] if asked else {"spikes": groups}
    if as_json:
        print(json.dumps(finite(facts), indent=1, ensure_ascii=False))
    else:
        show(facts, sum("loss" in row for row in logged))
    return 0


def refuse_changed(record: dict[str, Any], first: int) -> None:
    """Raises ConfigError for a step made before a run went on with another config; the record has the last one."""
    changed = [again["step"] for again in record["resumed"] if again["config_hash"] != record["config_hash"]]
    if changed and first <= max(changed):
        raise ConfigError(
            f"step {first}: this run went on with another config after step {max(changed)} (resume_changes=accept), "
            f"and what it read before, its record no longer says; steps from {max(changed) + 1} on are known"
        )


def parsed(arguments: list[str]) -> tuple[str, list[int] | None, bool]:
    """The run, its steps (None: its spikes), and whether JSON is wanted."""
    usage = "smoltrain runs rows RUN takes --step 120, --step 100-103, --step 3,7 or --spikes, and --json"
    words: list[str] = []
    steps: list[int] | None = []
    as_json = False
    remaining = iter(arguments)
    for argument in remaining:
        flag, _, value = argument.partition("=")
        if flag == "--step":
            value = value or next(remaining, "")
            if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", value):
                raise ConfigError(f"--step {value}: a number, a range or several; {usage}")
            spans = [[int(end) for end in part.split("-")] for part in value.split(",")]
            steps = [step for span in spans for step in range(span[0], span[-1] + 1)]
        elif argument == "--spikes":
            steps = None
        elif argument == "--json":
            as_json = True
        else:
            words.append(argument)
    if len(words) != 1 or words[0].startswith("-") or steps == []:
        raise ConfigError(usage)
    return words[0], steps, as_json


def learned(sequences: list[list[int]], found: "Preflight") -> list[dict[str, Any]]:
    """What is to be said of each row of a step: which it is, where it comes from, its tokens and its text.

    `sequence` counts the sequences of the step: rows of one pack have the same. `segments` are texts, each with its
    role: `context`, `learned` or `rejected`. A prompt is counted as often as it goes through the model.
    """
    data, encoder, decode = found.data, found.encoder, found.chat.tokenizer.decode
    facts = []
    for sequence, numbers in enumerate(sequences):
        for number in numbers:
            segments = encoder.segments(data.train[number])
            trained = sum(len(ids) for ids, role in segments if role != "context")
            context = sum(len(ids) for ids, role in segments if role == "context")
            source, where = data.origin(number)
            fact = {"row": number, "sequence": sequence, "source": source, "where": where}
            fact |= {"tokens": trained + encoder.rows_a_forward * context, "learned": trained}
            facts.append(fact | {"segments": [{"text": decode(ids), "role": role} for ids, role in segments]})
    return facts


def finite(value: Any) -> Any:
    """The same with texts for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def show(facts: dict[str, Any], measured: int) -> None:
    """Prints the spikes, if they were asked for, then the rows, as `smoltrain check` shows its samples."""
    from rich.console import Console

    from smoltrain.check import WIDE

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    for line in facts["warnings"]:
        console.print(f"[yellow]{line}[/]")
    if "spikes" not in facts:
        show_steps(console, facts["steps"])
        return
    if not facts["spikes"]:
        few = "" if measured > FEWEST else ", too few to tell what is usual"
        console.print(f"no loss and no gradient norm stands out; {measured:,} of each were logged{few}")
    for i, spike in enumerate(facts["spikes"], 1):
        console.print(f"spike {i:<3}{told(spike)}")
    for i, spike in enumerate(facts["spikes"], 1):
        console.print(f"\n[bold]spike {i}[/]")
        show_steps(console, spike["steps"])


def told(spike: dict[str, Any]) -> str:
    """A spike in a line: `step 40  loss 7.91, usual there 0.41 to 0.62`."""
    first, last = spike["first"], spike["last"]
    said = [
        f"{name} {metric['value']:.4g}, usual there {metric['usual'][0]:.4g} to {metric['usual'][1]:.4g}"
        for name, metric in spike["metrics"].items()
    ]
    if first == last:
        return f"step {last:,}  {'; '.join(said)}"
    said[0] += " (the mean of these steps; which of them it was is not recorded)"
    if len(said) > 1:
        said[1] += f" (of step {last:,})"
    return f"steps {first:,} to {last:,}  {'; '.join(said)}"


def show_steps(console: Any, steps: list[dict[str, Any]]) -> None:
    from rich.text import Text

    from smoltrain.check import MARKS, STYLES, sample
    from smoltrain.lines import some

    coloured = console.color_system is not None
    roles = {part["role"]: None for step in steps for row in step["rows"] for part in row["segments"]}
    legend = [(role if coloured else f"{role} {''.join(MARKS[role])}".strip(), STYLES[role]) for role in roles]
    for step in steps:
        sequences = {row["sequence"] for row in step["rows"]}
        packs = f" in {some(len(sequences), 'pack')}" if len(sequences) < len(step["rows"]) else ""
        title = Text(f"\nstep {step['step']:,}", "bold").append(
            f"  {some(len(step['rows']), 'row')}{packs}", "not bold"
        )
        console.print(Text("  ").join([title, *(Text(*entry) for entry in legend)]))
        for row in step["rows"]:
            place = row["where"] if row["source"] in row["where"] else f"{row['source']}: {row['where']}"
            pack = f"pack {row['sequence'] + 1}  " if packs else ""
            said = f"{pack}row {row['row']:,}  {place}  {some(row['tokens'], 'token')}, {row['learned']:,} learned"
            console.print(Text(f"\n{said}", "bold"), soft_wrap=True)
            segments = [(part["text"], part["role"]) for part in row["segments"]]
            console.print(sample(segments, min(console.width, 120), coloured), soft_wrap=not coloured)
