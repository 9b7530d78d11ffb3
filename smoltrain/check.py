"""`smoltrain check`: what can be known of a run before a step of it is paid for.

What would stop the run is found by `preflight`, as in every run; here is what is to be said of the rows, and what the
run will cost. The facts are plain data, as --json writes them; the `show_…` functions print them for people.
"""

import math
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from smoltrain import budget, perf, report, runs
from smoltrain.config import plain
from smoltrain.data.encode import ALIKE, ENDLESS, REPEATED_PROMPT
from smoltrain.data.messages import EQUAL
from smoltrain.lines import duration, size, some
from smoltrain.preflight import Preflight, preflight, remarks
from smoltrain.ranks import world

SAMPLES = 3
LINES = 12  # of a sample
UNCUT = 300  # letters of a sample's part that are always shown
BINS = 10
STREAMED = 10_000  # rows of a stream that are looked at
STEP = 6e10  # operations of the real step on a processor, some seconds; a GPU takes the whole batch
SHORTEST = 128  # but at least so many tokens


def check(cfg: DictConfig, strict: bool, quiet: bool = False) -> dict[str, Any]:
    """Prints, unless `quiet`, what a run would learn from and cost, and returns it as plain data.

    Its `errors` would stop the run, its `warnings` would not; if `strict`, they keep it from being called ready.
    """
    from smoltrain.resume import pin_parent

    console = Console(highlight=False, quiet=quiet, width=None if sys.stdout.isatty() else WIDE)
    cfg.trainer.args.output_dir = str(runs.ROOT / cfg.name)
    pin_parent(cfg)
    found = preflight(cfg, sample=STREAMED)
    facts = about(cfg, found)
    show_plan(console, facts)
    if "rows" in facts:
        show_rows(console, facts)
        show_learned(console, facts)
    if found.fit:
        with found.part("trainer"):
            facts["budget"] = about_cost(cfg, found, facts)
            show_budget(console, facts["budget"])
    show_verdict(console, facts, strict)
    return facts


# ---------------------------------------------------------------- facts


def about(cfg: DictConfig, found: Preflight) -> dict[str, Any]:
    """What is known before anything is computed: the run's parts, its rows, three of them, what is right or odd."""
    facts: dict[str, Any] = {
        "trainer": cfg.trainer._target_,
        "perf": found.choices.record,
        "model": cfg.model.from_run or cfg.model.name_or_path,
        "warnings": [],
        "errors": found.errors,
    }
    if found.skeleton is not None:
        facts["parameters"] = sum(p.numel() for p in found.skeleton.parameters())
    if found.chat is not None:
        facts |= {"end_of_turn": found.chat.tokenizer.eos_token, "chat_template": cfg.model.chat_template}
    if found.data is not None:
        facts |= about_rows(found, cfg.trainer.args.max_length)
        facts["encode"] = {key: value for key, value in plain(cfg.encode).items() if not key.startswith("_")}
        facts |= {"checked": agreed(found, facts), "samples": samples(found)}
        limit = f"trainer.args.max_length={cfg.trainer.args.max_length}"
        for split, counts in facts["rows"].items():
            facts["warnings"] += report.losses(split, counts, limit)
        if found.trainer is not None and found.skeleton is not None:
            facts["warnings"] += remarks(cfg, found)
    return facts


def about_rows(found: Preflight, max_length: int | None) -> dict[str, Any]:
    """What became of the rows of each source, and how long they are."""
    data = found.data
    parts = {id(side.part): side.part for sides in data.sides.values() for side in sides.values()}
    whole = np.concatenate([part.whole[part.readable] for part in parts.values()])
    facts: dict[str, Any] = {
        **report.rows(data, found.chat.tokenizer),
        "streamed": found.streamed,
        "rows_an_epoch": len(data.lengths),
        "repeated_questions": data.repeated_questions,
        "preferences": found.encoder.balance(data.train),
    }
    if whole.any():
        marks = np.percentile(whole, [50, 95, 99]).astype(int).tolist()
        bounds = edges(whole)
        facts["lengths"] = {
            "edges": bounds.tolist(),
            "rows": np.histogram(whole, bounds)[0].tolist(),
            "percentiles": dict(zip(("50", "95", "99"), marks, strict=True)),
            "longest": int(whole.max()),
            "max_length": max_length,
        }
    return facts


def edges(lengths: np.ndarray) -> np.ndarray:
    """Round bounds for some ten bins of lengths, of which the last has all beyond the 99th percentile."""
    low, high = lengths.min(), np.percentile(lengths, 99)
    rough = max((high - low) / BINS, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(int(power * digit) for digit in (1, 2, 5, 10) if power * digit >= rough)
    bounds = np.arange(low // step * step, high + step, step).astype(int)
    return np.append(bounds[bounds <= lengths.max()], lengths.max() + 1)


def agreed(found: Preflight, facts: dict[str, Any]) -> list[str]:
    """What was looked at and is as it should be, in words."""
    tokenizer, data, lines = found.chat.tokenizer, found.data, []
    if found.compared:
        lines.append(
            f"{some(found.compared, 'conversation')} compared: the text of training equals the text of serving, turn "
            "by turn, and every message is printed"
        )
        begins = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        lines.append(f"one {tokenizer.bos_token} at the beginning" if begins else "no BOS, as this tokenizer adds none")
    totals = facts["rows"].values()
    kept, cut = (sum(counts[name] for counts in totals) for name in ("kept", "cut"))
    if any(counts["tokens"] for counts in totals) and not any(ENDLESS in counts["remarks"] for counts in totals):
        but = f", but those that were cut ({cut:,})" if cut else ""
        lines.append(f"{tokenizer.eos_token} is learned at the end of every reply, in all {some(kept, 'row')}{but}")
    if not found.streamed:
        train = facts["rows"]["train"]
        lines += ["no row is there twice"] if not any(counts["duplicates"] for counts in totals) else []
        lines += ["no row is trained on and held out"] if not train["held_out_too"] else []
        lines += ["no held-out row asks what a training row asks"] if not data.repeated_questions else []
    return lines


def samples(found: Preflight) -> list[list[tuple[str, str]]]:
    """A few training rows as text, in segments that are `context`, `learned` or `rejected`."""
    rows = found.data.train.select(range(min(SAMPLES, len(found.data.train))))
    decode = found.chat.tokenizer.decode
    return [[(decode(ids), role) for ids, role in found.encoder.segments(row)] for row in rows]


# ---------------------------------------------------------------- cost


def about_cost(cfg: DictConfig, found: Preflight, facts: dict[str, Any]) -> dict[str, Any]:
    """Steps, memory, disk and time; what would stop the run is added to the errors."""
    args, data, trainer, checkpoint = found.args, found.data, found.trainer, found.checkpoint
    assert trainer is not None
    longest = perf.longest(found)
    plan = budget.steps(packed_rows(args, data.lengths), args)
    kept = sum(int(side["train"].part.length[side["train"].kept].sum()) for side in data.sides.values())
    tokens = facts["rows"]["train"]["tokens"] / max(kept, 1) * data.lengths.mean()  # of a row, as weights draw them
    tokens *= len(data.lengths) / packed_rows(args, data.lengths)
    most, usual = perf.of_a_row(found, longest, args.per_device_train_batch_size)
    cost: dict[str, Any] = {
        "steps": asdict(plan) | ({"epochs": None} if found.streamed else {}),
        "tokens_per_step": round(tokens * plan.effective_batch),
        "padding": 1 - tokens / (found.encoder.rows_a_forward * usual) if tokens and not found.unpadded else 0.0,
        "longest": longest,
        "at_least": getattr(args, "packing", False) and args.max_steps <= 0,  # packed as if nothing were wasted
    }
    memory = perf.needs(
        cfg,
        found,
        args.per_device_train_batch_size,
        args.activation_checkpointing,
        args.gradient_accumulation_steps,
    )
    there = perf.available(args.device)
    cost["memory"] = memory.parts | {"total": memory.total, "available": there}
    if memory.total > there:
        found.errors.append(
            f"memory: {size(memory.total)} are needed and {size(there)} are there; lower "
            f"trainer.args.per_device_train_batch_size={args.per_device_train_batch_size} or "
            f"max_length={args.max_length}, or set trainer.args.activation_checkpointing=true or peft=lora"
        )
    spelled = len(found.chat.tokenizer.backend_tokenizer.to_str())
    disk = budget.disk(memory, args, plan, tokenizer=spelled)
    cost["disk"] = asdict(disk) | {"total": disk.total}
    if disk.total > disk.free:
        found.errors.append(
            f"disk: {size(disk.total)} will be written and {size(disk.free)} are free; make room, or lower "
            f"trainer.args.save_total_limit={args.save_total_limit} or set trainer.args.save_strategy=no"
        )
    wanted = Path(checkpoint.source).is_dir() if cfg.check.step is None else cfg.check.step
    if found.fit and wanted:
        cost["step"] = one_step(cfg, found, facts["parameters"], longest)
        steps = args.gradient_accumulation_steps * plan.total / world(cfg.hardware)
        cost["seconds"] = cost["step"]["seconds_of_batch"] * usual / most * steps
    return cost


def packed_rows(args: Any, lengths: np.ndarray) -> int:
    """The rows that batches are made of; packed ones as if nothing were wasted."""
    if getattr(args, "packing", False) and lengths.any():
        return max(1, int(np.ceil(lengths.sum() / args.max_length)))
    return len(lengths)


def one_step(cfg: DictConfig, found: Preflight, parameters: int, longest: int) -> dict[str, Any]:
    """What one real step took; on a processor only on as much of the longest batch as takes STEP operations.

    `seconds_of_batch` are those of the whole batch, reckoned from it.
    """
    from smoltrain.train import build

    data = found.data
    with tempfile.TemporaryDirectory() as folder:
        cfg.trainer.args.output_dir = folder
        rows = size = found.args.per_device_train_batch_size
        if not getattr(found.args, "packing", False):  # else each is as long as can be
            longest_rows = data.train.select(np.argsort(-data.lengths, kind="stable")[:size])
            found = replace(found, data=replace(data, train=longest_rows, test=data.test.select([0])))
        trainer = build(cfg, found, [])
        order = np.arange(len(trainer.train_dataset))
        inputs = whole = collated(trainer, order[:rows], longest)
        width = length = max(value.shape[1] for value in inputs.values() if value.ndim == 2)
        if trainer.args.device.type == "cpu":
            tokens = int(STEP / (6 * parameters * found.encoder.rows_a_forward))
            rows = max(1, min(rows, tokens // width))
            length = min(width, max(SHORTEST, tokens // rows))
            inputs = collated(trainer, order[:rows], longest)
        took = budget.step(trainer, first_columns(inputs, length))
        slope = took.seconds
        if length < width:  # of a large model: what the update takes does not grow with the tokens
            slope = 2 * max(0.0, took.seconds - budget.step(trainer, first_columns(inputs, length // 2)).seconds)
        left = computed(whole, found.unpadded) / computed(first_columns(inputs, length), found.unpadded) - 1
    return asdict(took) | {"rows": rows, "length": length, "seconds_of_batch": took.seconds + left * slope}


def collated(trainer: Any, order: np.ndarray, length: int) -> dict[str, Any]:
    """Rows as the batch that the trainer's collator makes of them; what it strings together is side by side again."""
    inputs = trainer.data_collator(list(trainer.train_dataset.select(order)))
    if not getattr(trainer, "padding_free", False):
        return inputs
    rows = max(1, inputs["input_ids"].numel() // length)
    apart = {name: inputs[name].flatten()[: rows * length].view(rows, -1) for name in ("input_ids", "labels")}
    return apart | {"attention_mask": torch.ones_like(apart["input_ids"])}


def computed(inputs: dict[str, Any], unpadded: bool) -> int:
    """Tokens of a batch that the model computes."""
    if unpadded:
        return int(inputs["attention_mask"].sum())
    return max(value.numel() for value in inputs.values() if value.ndim == 2)


def first_columns(inputs: dict[str, Any], length: int) -> dict[str, Any]:
    """A batch of which each row keeps so many tokens."""
    return {name: value[:, :length] if value.ndim == 2 else value for name, value in inputs.items()}


# ---------------------------------------------------------------- what people read

WIDE = 200  # columns where no terminal says how many there are
STYLES = {"context": "dim", "learned": "green", "rejected": "red"}
MARKS = {"context": ("", ""), "learned": ("⟦", "⟧"), "rejected": ("⟨", "⟩")}  # where there are no colours


def told(console: Console, lines: list[tuple[str, str]]) -> None:
    """Labels, and what is said of each, wrapped beside it."""
    if not console.is_terminal:
        for label, text in lines:
            console.print(f"{label}{' ' * (10 - Text.from_markup(label).cell_len)}", end="")
            console.print(text, markup=False, soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=8, no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in lines:
        grid.add_row(label, Text(text))
    console.print(grid)


def show_plan(console: Console, facts: dict[str, Any]) -> None:
    model = facts["model"] + (f", {facts['parameters']:,} parameters" if "parameters" in facts else "")
    if "end_of_turn" in facts:
        template = facts["chat_template"] or "its own"
        model += f"; chat template: {template}; end of turn: {facts['end_of_turn']}"
    chosen = [("perf", line) for line in report.chosen(facts["perf"])]
    told(console, [("trainer", facts["trainer"]), ("model", model), *chosen])


def show_rows(console: Console, facts: dict[str, Any]) -> None:
    console.print("\n[bold]What you have[/]")
    for name, found in facts["sources"].items():
        unread = f"; columns not read: {', '.join(found['unread_columns'])}" if found["unread_columns"] else ""
        console.print(f"{name}: rows of shape {found['shape']}{unread}")
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("")
        for heading in ("rows", "kept", "dropped", "cut", "tokens", "learned", ""):
            table.add_column(heading, justify="right")
        for split in ("train", "test"):
            counts = found[split]
            dropped = sum(counts["dropped"].values())
            numbers = [f"{n:,}" for n in (counts["given"], counts["kept"], dropped, counts["cut"])]
            if counts["tokens"]:
                share = f"{counts['trained'] / counts['tokens']:.0%}"
                numbers += [f"{counts['tokens']:,}", f"{counts['trained']:,}", share]
            table.add_row(split, *numbers)
        console.print(table)
        for split in ("train", "test"):
            for reason, rows in found[split]["dropped"].items():
                console.print(f"[dim]{split}: {rows:,} dropped: {reason}[/]")
    for line in report.draws(facts["sources"]):
        console.print(line)
    if facts["streamed"]:
        seen = sum(counts["given"] for counts in facts["rows"].values())
        console.print(f"[dim]a stream: its first {seen:,} rows were looked at[/]")
    if "lengths" in facts:
        histogram(console, facts["lengths"])
    if bias := facts["preferences"]:
        train = facts["rows"]["train"]
        dropped, odd = train["dropped"], train["remarks"]
        said = (
            f"chosen replies have {bias['chosen_tokens']:.0f} tokens on average, rejected ones "
            f"{bias['rejected_tokens']:.0f}; the chosen one is longer in {bias['chosen_longer']:.0%} of pairs, the "
            f"rejected one in {bias['rejected_longer']:.0%}; equal {dropped.get(EQUAL, 0):,}, null "
            f"{dropped.get('null content', 0):,}, nearly equal {odd.get(ALIKE, 0):,}, prompt repeated in a reply "
            f"{odd.get(REPEATED_PROMPT, 0):,}"
        )
        console.print()
        told(console, [("pairs", said)])


def histogram(console: Console, lengths: dict[str, Any]) -> None:
    limit, marks = lengths["max_length"], lengths["percentiles"]
    console.print(
        f"\ntokens of a row, before any cut: half have up to {marks['50']:,}, 95% up to {marks['95']:,}, 99% up to "
        f"{marks['99']:,}; the longest {lengths['longest']:,}" + (f"; max_length {limit:,}" if limit else "")
    )
    top, bounds = max(lengths["rows"]), lengths["edges"]
    grid = Table.grid(padding=(0, 1))
    for justify in ("right", "left", "right"):
        grid.add_column(justify=justify)  # type: ignore[arg-type]
    for low, high, rows in zip(bounds, bounds[1:], lengths["rows"], strict=False):
        beyond = limit is not None and high - 1 > limit
        bar = "█" * round(40 * rows / top) or ("▏" if rows else "")
        grid.add_row(
            f"{low:,} to {high - 1:,}" if high - 1 > low else f"{low:,}",
            Text(bar, "yellow" if beyond else "green"),
            f"{rows:,}",
        )
    console.print(grid)


def show_learned(console: Console, facts: dict[str, Any]) -> None:
    console.print(
        "\n[bold]What is learned[/]",
        *(f"[dim]encode.{k}={v}[/]" for k, v in facts["encode"].items() if isinstance(v, str)),
    )
    told(console, [("[green]ok[/]", line) for line in facts["checked"]])
    coloured = console.color_system is not None
    roles = {role: None for segments in facts["samples"] for _, role in segments}
    legend = [(role if coloured else f"{role} {''.join(MARKS[role])}".strip(), STYLES[role]) for role in roles]
    for number, segments in enumerate(facts["samples"], 1):
        if segments:
            line = Text(f"\nsample {number}", "bold").append("  ")
            console.print(Text("  ").join([line, *(Text(*entry) for entry in legend)]))
            console.print(sample(segments, min(console.width, 120), coloured), soft_wrap=not coloured)


def sample(segments: list[tuple[str, str]], width: int, coloured: bool) -> Text:
    """One row in about LINES lines: long segments, and many of them, lose their middle, and no boundary its place."""
    if len(segments) > LINES:
        gap = (f"\n… {len(segments) - LINES + 2} more parts …\n", "context")
        segments = [*segments[: LINES // 2 - 1], gap, *segments[-LINES // 2 + 1 :]]
    needed = [height(said, width) for said, _ in segments]
    given: dict[int, int] = {}
    for place, i in enumerate(sorted(range(len(segments)), key=lambda i: needed[i])):  # the short ones leave room
        given[i] = min(needed[i], max(1, (LINES - sum(given.values())) // (len(segments) - place)))
    text = Text()
    for i, (said, role) in enumerate(segments):
        begin, end = ("", "") if coloured else MARKS[role]
        if role == "rejected":
            text.append("\n")
        text.append(begin + shortened(said, given[i], width) + end, STYLES[role])
    return text


def shortened(text: str, lines: int, width: int) -> str:
    """A text without its middle, where it would take more than so many lines."""
    if len(text) <= UNCUT or height(text, width) <= lines:
        return text
    half, room = max(1, lines // 2), max(20, (lines * width - 10) // 2)
    head = "\n".join(text[:room].split("\n")[:half])
    tail = "\n".join(text[-room:].split("\n")[-half:])
    return f"{head} [… {len(text) - len(head) - len(tail):,} letters …] {tail.lstrip()}"


def height(text: str, width: int) -> int:
    """The lines that a text takes."""
    return sum(max(1, math.ceil(len(line) / width)) for line in text.removesuffix("\n").split("\n"))


def show_budget(console: Console, cost: dict[str, Any]) -> None:
    steps, memory, disk = cost["steps"], cost["memory"], cost["disk"]
    epochs = f" ({epochs_of(steps['epochs'])} of {steps['per_epoch']:,})" if steps["epochs"] else ""
    tokens = "; TRL makes the tokens of these itself, so how many is not known"
    if cost["tokens_per_step"]:
        tokens = f", {cost['tokens_per_step']:,} tokens; {cost['padding']:.0%} of a batch is padding"
    said = ", ".join(f"{part} {size(memory[part])}" for part in budget.PARTS if memory[part])
    kept = f"{some(disk['checkpoints'], 'checkpoint')} of {size(disk['checkpoint'])}, " if disk["checkpoints"] else ""
    lines = [
        ("steps", f"{'at least ' * cost['at_least']}{steps['total']:,}{epochs}"),
        ("a step", some(steps["effective_batch"], "row") + tokens),
        (
            "memory",
            f"{size(memory['total'])} at the peak, on the longest batch ({said}); {size(memory['available'])} there",
        ),
        ("disk", f"{size(disk['total'])} ({kept}the model {size(disk['model'])}); {size(disk['free'])} free"),
    ]
    if "step" in cost:
        step = cost["step"]
        peak = f", {size(step['peak'])} of memory" if step["peak"] else ""
        on = f"{some(step['rows'], 'row')} of {step['length']:,} tokens"
        lines += [
            ("one step", f"{step['seconds']:.2f} s measured on {on}{peak}"),
            ("time", f"about {duration(cost['seconds'])} of training; loading and evaluation come on top"),
        ]
    else:
        lines.append(("time", "not measured; check.step=true takes one real step"))
    console.print("\n[bold]What it costs[/]")
    told(console, lines)


def show_verdict(console: Console, facts: dict[str, Any], strict: bool) -> None:
    """Warnings and errors, and whether the run would start; errors go where errors go."""
    console.print()
    told(console, [("[yellow]warning[/]", line) for line in facts["warnings"]])
    stream = Console(highlight=False, stderr=True, width=None if sys.stderr.isatty() else WIDE)
    for line in facts["errors"]:
        stream.print(Text.assemble(("error", "red"), "  ", line), soft_wrap=True)
    warned = some(len(facts["warnings"]), "warning") if facts["warnings"] else ""
    if facts["errors"]:
        console.print(f"[red]not ready[/]  {', '.join(filter(None, [some(len(facts['errors']), 'error'), warned]))}")
    else:
        verdict = "[red]not ready[/]" if strict and facts["warnings"] else "[green]ready[/]"
        told(console, [(verdict, warned + (", and --strict" if strict and facts["warnings"] else ""))])


def epochs_of(count: float) -> str:
    return "1 epoch" if round(count, 2) == 1 else f"{count:.3g} epochs"
