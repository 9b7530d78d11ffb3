"""What a person reads of a run: the banner before, the table after, and `report.md` with a plot for good."""

import importlib.util
import json
import shlex
from pathlib import Path
from textwrap import shorten
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from smoltrain import runs
from smoltrain.checkpoints import MANIFEST, all_of
from smoltrain.config.groups import naming
from smoltrain.lines import machines, measured, scalar, short, some

SAMPLES = 3
SHOWN = 300  # letters of a text
# Why rows are dropped that nothing is wrong with, as the record has it.
BEYOND = "beyond data.test_rows"
REPEATED, HELD_OUT_TOO = "repeated", "held out too"
# Held-out losses are points: between two of them nothing was measured.
CURVES = {"loss": ("training loss", ".-"), "eval_loss": ("held-out loss", "o")}


def rows(data: Any, tokenizer: Any) -> dict[str, Any]:
    """What the record says of the data: its sources, what became of their rows, and fingerprints."""
    import hashlib

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    return {
        "rows": {split: data.total(split).plain() for split in ("train", "test")},
        "sources": {
            name: {"shape": data.shape(name).name, "unread_columns": data.unread(name), "drawn": data.drawn.get(name)}
            | {split: counts[split].plain() for split in counts}
            for name, counts in data.counts.items()
        },
        "fingerprints": data.fingerprints
        | {
            "tokenizer": digest(tokenizer.backend_tokenizer.to_str()),
            "chat_template": digest(tokenizer.chat_template),
        },
    }


def facts(trainer: Any) -> dict[str, Any]:
    """What the record says of the live parts: parameters, device, and the attention that it came to."""
    weights = list(trainer.model.parameters())
    return {
        "device": device_name(trainer.args.device),
        "attention": trainer.model.config._attn_implementation,
        "parameters": sum(p.numel() for p in weights),
        "trainable_parameters": sum(p.numel() for p in weights if p.requires_grad),
    }


def asked(rows: list[dict[str, Any]]) -> str:
    """A hash of what is answered by generation, in whatever order, and of the answers that are right."""
    import hashlib

    from smoltrain.data.tokens import question

    texts = sorted(json.dumps([question(row), row.get("answer")], sort_keys=True, default=str) for row in rows)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def fingerprint(model: Any) -> str:
    """Names the weights of a model, by the sums of their bits: exact, in any order and on any device."""
    import hashlib

    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    named = hashlib.sha256()
    for name, weight in model.named_parameters():
        total = weight.detach().reshape(-1).view(bits[weight.element_size()]).sum(dtype=torch.int64)
        named.update(f"{name} {tuple(weight.shape)} {total.item()}".encode())
    return named.hexdigest()[:16]


def device_name(device: Any) -> str:
    """`cpu`, or an accelerator with its maker's name, as `cuda:0 NVIDIA H100 80GB HBM3`."""
    import torch

    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def samples(rows: list[dict], replies: list[str]) -> list[dict[str, str]]:
    """The first few held-out questions, what the data answers, and the replies of the starting model."""
    from smoltrain.data.tokens import question

    return [
        {
            "question": question(row)[-1]["content"],
            "answer": (row.get("chosen") or row.get("completion") or row["messages"])[-1]["content"],
            "before": reply,
        }
        for row, reply in list(zip(rows, replies, strict=True))[:SAMPLES]
    ]


def answered(samples: list[dict[str, str]], replies: list[str]) -> list[dict[str, str]]:
    """The same with the replies of the trained model."""
    return [sample | {"after": reply} for sample, reply in zip(samples, replies, strict=False)]


def banner(run: runs.Run, console: Console | None = None) -> None:
    """Two or three lines: what is about to run, on what, and from where."""
    record, choices = run.record, run.record["choices"]
    console = console or Console(highlight=False, soft_wrap=True)
    parts = [f"{group} {choices[group]}" for group in ("model", "data", "hardware", "peft") if choices.get(group)]
    rate = record["config"]["trainer"]["args"]["learning_rate"]
    console.print(f"[bold]{choices['trainer']}[/]  {', '.join(parts)}")
    console.print(f"{record['trainer']}, learning rate {rate}, seed {record['seed']}")
    if record["parent"]:
        directory = Path(record["parent"]["directory"])
        console.print(f"from {short(directory)} ({outcome(runs.read(directory))})")


def data(run: runs.Run, console: Console | None = None) -> None:
    """Where the record is, a line for each source, and in yellow what is cut, dropped, repeated or leaked."""
    console = console or Console(highlight=False, soft_wrap=True)
    console.print(f"run   {short(run.directory)}")
    for line in sources(run.record):
        console.print(f"data  {line}")
    for line in chosen(run.record["perf"]):
        console.print(f"perf  {line}")
    for line in draws(run.record["sources"]):
        console.print(line)
    for line in lost(run.record):
        console.print(f"[yellow]{line}[/]")


def chosen(perf: dict[str, Any]) -> list[str]:
    """What was chosen for the machine, and why, a line each."""
    return [f"{key}={scalar(choice['value'])}: {choice['why']}" for key, choice in perf.items()]


def sources(record: dict[str, Any]) -> list[str]:
    """What each source brought, a line each."""
    lines = []
    for name, source in record["sources"].items():
        train, test = source["train"], source["test"]
        learned = f"{train['kept']:,} rows to learn from" if train["given"] else "read while it is learned from"
        unread = f"; not read: {', '.join(source['unread_columns'])}" if source["unread_columns"] else ""
        aside = f" and {test['dropped'][BEYOND]:,} left aside (data.test_rows)" if BEYOND in test["dropped"] else ""
        lines.append(f"{name}: {source['shape']}, {learned}, {test['kept']:,} held out{aside}{unread}")
    return lines


def lost(record: dict[str, Any]) -> list[str]:
    """What is cut, dropped, repeated or leaked, and what else is odd, a line each."""
    limit = f"trainer.args.max_length={record['config']['trainer']['args']['max_length']}"
    said = [line for split, counts in record["rows"].items() for line in losses(split, counts, limit)]
    return said + record["warnings"]


def losses(split: str, counts: dict[str, Any], limit: str) -> list[str]:
    """What is lost or odd in a split, a line each: rows cut, dropped and repeated, tokens that are not learned."""
    lines = []
    given = some(counts["given"], "row")
    if counts["cut"]:
        lines.append(f"{counts['cut']:,} of {given} cut at {limit}")
    lines += [f"{rows:,} of {given} dropped: {why}" for why, rows in counts["dropped"].items() if why != BEYOND]
    if counts["lost"]:
        share = counts["lost"] / (counts["lost"] + counts["trained"])
        lines.append(f"lost that way: {some(counts['lost'], 'token')} that would be learned ({share:.1%})")
    lines += [f"{some(rows, 'row')} with {remark}" for remark, rows in counts["remarks"].items()]
    if counts["duplicates"] and REPEATED not in counts["dropped"]:
        lines.append(f"{some(counts['duplicates'], 'row')} repeated word for word (data.on_duplicate=drop)")
    if counts["held_out_too"] and HELD_OUT_TOO not in counts["dropped"]:
        lines.append(f"{some(counts['held_out_too'], 'row')} held out too (data.on_duplicate=drop)")
    return [f"{split}: {line}" for line in lines]


def draws(sources: dict[str, Any]) -> list[str]:
    """How often the rows of each source are learned from, a line each, where weights say so."""
    return [
        f"{name}: by data.weights an epoch draws {some(source['drawn'], 'row')} from the {source['train']['kept']:,}"
        for name, source in sources.items()
        if source["drawn"] not in (None, source["train"]["kept"])
    ]


def summary(run: runs.Run, console: Console | None = None) -> None:
    """The table before and after, a few replies, and where to look next."""
    console = console or Console(highlight=False)
    stopped = run.record["steps"] < run.record["max_steps"]
    steps = f"stopped early at step {progress(run.record)}" if stopped else f"{run.record['steps']} steps"
    took = f"{run.record['seconds']:.0f} s{' in all' if run.record['resumed'] else ''}"  # with what came before
    table = Table(title=f"{run.record['status']} in {took}, {steps}")
    table.add_column("held-out")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, before, after in before_and_after(run.record["metrics"]):
        table.add_row(name, measured(name, before), measured(name, after))
    console.print(table)
    for sample in run.record["samples"][:1]:
        console.print(f"question  {shorten(sample['question'], SHOWN)}", markup=False)
        console.print(f"before    {shorten(sample['before'], SHOWN) or '(nothing)'}", markup=False)
        console.print(f"after     {shorten(sample['after'], SHOWN)}", markup=False)
    console.print(f"\nmodel  {short(run.directory / 'model')}", soft_wrap=True)
    console.print(f"report {short(run.directory / 'report.md')}", soft_wrap=True)


def outcome(record: dict[str, Any]) -> str:
    """What a completed run came to, for where there is a line of it: `sft, exact_match 98.5%`."""
    name, _, after = before_and_after(record["metrics"])[0]
    return f"{record['choices']['trainer']}, {name} {measured(name, after)}"


def ending(directory: Path) -> str:
    """One line for a run that did not complete: how it ended and where, what to do, and where to read of it."""
    record = runs.read(directory)
    where = f"at step {progress(record)}" if record["steps"] else "before the first step"
    rate = record["config"]["trainer"]["args"]["learning_rate"]
    mend = f"; lower trainer.args.learning_rate={rate}" if record["status"] == "diverged" else ""
    if record["status"] in runs.UNFINISHED and not (directory.parent / "multirun.yaml").exists():
        found = [f for f in all_of(directory) if (f / MANIFEST).exists()]
        mend = f"; the same command goes on{f' from {found[0].name}' if found else ''}"
    return f"{record['status']} {where}{mend}; report {short(directory / 'report.md')}"


def progress(record: dict[str, Any]) -> str:
    """`40 of 125` steps; `0` where training has not begun."""
    return f"{record['steps']} of {record['max_steps']}" if record["max_steps"] else "0"


def before_and_after(metrics: dict[str, float]) -> list[tuple[str, float | None, float | None]]:
    """Each metric with its values before and after, those that people read first on top."""
    names = {name.removeprefix("before/") for name in metrics}
    first = ("exact_match", "eval_loss", "eval_rewards/accuracies")
    ordered = sorted(names, key=lambda name: (first.index(name) if name in first else len(first), name))
    return [(name, told(metrics, "before/", name), told(metrics, "", name)) for name in ordered]


def told(metrics: dict[str, float], prefix: str, name: str) -> float | None:
    """A metric; None where it was not measured or says nothing."""
    # A model that still is its own reference gives both replies of a pair the same reward; TRL counts that as wrong.
    tie = name == "eval_rewards/accuracies" and metrics.get(f"{prefix}eval_rewards/margins") == 0
    return None if tie else metrics.get(f"{prefix}{name}")


def write(directory: Path) -> None:
    """Writes report.md, and curves.png where matplotlib is installed, from the run's record alone."""
    record, metrics = runs.read(directory), runs.read_metrics(directory)
    args = record["config"]["trainer"]["args"]
    lines = [
        f"# {record['name']}: {record['status']}",
        "",
        "| | |",
        "|---|---|",
        f"| trainer type | {record['choices']['trainer']} ({record['trainer']}) |",
        f"| model | {record['choices']['model']} ({record['model']}) |",
        f"| data | {record['choices']['data']} ({record['config']['data']['_target_']}) |",
        f"| learning rate | {args['learning_rate']} |",
        f"| hardware | {record['choices']['hardware']}, {machines(record['config'])} |",
        f"| steps | {progress(record)} |",
        f"| duration | {record['seconds']} s |",
        f"| seed | {record['seed']} |",
        f"| config hash | {record['config_hash']} |",
        f"| command | `{command(record)}` |",
        f"| started | {record['start']} |",
    ]
    if record["parent"]:
        lines.append(f"| from run | {record['parent']['directory']} ({record['parent']['trainer']}) |")
    if record["error"]:
        lines += ["", "## Error", "", "```", record["error"], "```"]
    if "rows" in record:
        lines += ["", "## Data", "", *data_table(record)]
    if record.get("perf"):
        lines += ["", "## Chosen for the machine", "", *(f"- {line}" for line in chosen(record["perf"]))]
    lines += ["", "## Held-out metrics", "", "| | before | after |", "|---|---:|---:|"]
    lines += [f"| {n} | {measured(n, b)} | {measured(n, a)} |" for n, b, a in before_and_after(record["metrics"])]
    for sample in record.get("samples", []):
        lines += ["", f"> {shorten(sample['question'], SHOWN)}", ""]
        lines += [
            f"- {name}: {shorten(sample[name], SHOWN)}" for name in ("answer", "before", "after") if name in sample
        ]
    losses = [row for row in metrics if "loss" in row]
    if losses:
        lines += ["", "## Training", "", f"Loss {losses[0]['loss']:.4f} at step {losses[0]['step']}, "]
        lines[-1] += f"{losses[-1]['loss']:.4f} at step {losses[-1]['step']}."
        if plot(directory / "curves.png", {"": metrics}):
            lines += ["", "![curves](curves.png)"]
    lines += ["", "## Versions", "", ", ".join(f"{name} {version}" for name, version in record["versions"].items())]
    lines += ["", "## Parameters", "", "```yaml", OmegaConf.to_yaml(record["config"]).rstrip(), "```", ""]
    (directory / "report.md").write_text("\n".join(lines))


def data_table(record: dict[str, Any]) -> list[str]:
    """Markdown: what became of the rows of each source, and below it what is lost or odd."""
    lines = ["| source | shape | split | given | kept | cut | tokens | learned | lost |", "|---|---|---|" + "---:|" * 6]
    for name, source in record["sources"].items():
        for split in ("train", "test"):
            numbers = (source[split][key] for key in ("given", "kept", "cut", "tokens", "trained", "lost"))
            lines.append(f"| {name} | {source['shape']} | {split} | {' | '.join(f'{n:,}' for n in numbers)} |")
    said = [*draws(record["sources"]), *lost(record)]
    return [*lines, *([""] if said else []), *(f"- {line}" for line in said)]


def command(record: dict[str, Any]) -> str:
    """The command line that stands for a run; of a sweep's run, for that one alone."""
    allowed = [f"--allow={name}" for name in record["allowed"]]
    return shlex.join(["smoltrain", *allowed, *naming(record["config_dirs"]), *record["overrides"]])


def plot(file: Path, runs: dict[str, list[dict[str, Any]]]) -> bool:
    """Draws the losses of runs by step, given their metrics by what each is called; a single one needs no name.

    False, and no file, where matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (called, metrics) in enumerate(runs.items()):
        for name, (title, style) in CURVES.items():
            points = [(row["step"], row[name]) for row in metrics if name in row]
            if points:
                label = title if len(runs) == 1 else called if name == "loss" else f"{called}, {title}"
                (drawn,) = axes.plot(*zip(*points, strict=True), style, label=label)
                if len(runs) > 1:
                    drawn.set_color(f"C{i}")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False, fontsize="small" if len(runs) > 1 else None)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    return True
