"""What a person reads of a run: the banner before, the table after, and `report.md` with a plot for good."""

import importlib.util
import shlex
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from smoltrain import runs

SAMPLES = 3
# Held-out losses are points: between two of them nothing was measured.
CURVES = {"loss": ("training loss", ".-"), "eval_loss": ("held-out loss", "o")}


def facts(trainer: Any, data: Any) -> dict[str, Any]:
    """What the record says of the live parts: rows, tokens, parameters, fingerprints, device."""
    import hashlib

    from smoltrain.data import counts, fingerprint

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    tokenizer = trainer.processing_class
    weights = list(trainer.model.parameters())
    return {
        "device": device_name(trainer.args.device),
        "rows": {
            split: counts(data[split], prepared, trainer.args.max_length)
            for split, prepared in (("train", trainer.train_dataset), ("test", trainer.eval_dataset))
        },
        "parameters": sum(p.numel() for p in weights),
        "trainable_parameters": sum(p.numel() for p in weights if p.requires_grad),
        "fingerprints": {
            "train": fingerprint(data["train"]),
            "test": fingerprint(data["test"]),
            "tokenizer": digest(tokenizer.backend_tokenizer.to_str()),
            "chat_template": digest(tokenizer.chat_template),
        },
    }


def device_name(device: Any) -> str:
    """`cpu`, or an accelerator with its maker's name, as `cuda:0 NVIDIA H100 80GB HBM3`."""
    import torch

    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def samples(rows: Any, before: list[str], after: list[str]) -> list[dict[str, str]]:
    """The first few held-out questions with the replies of the starting and of the trained model."""
    from smoltrain.data import question

    return [
        {"question": question(row)[-1]["content"], "answer": row["answer"], "before": first, "after": last}
        for row, first, last in zip(rows.select(range(min(SAMPLES, len(after)))), before, after, strict=False)
    ]


def banner(run: runs.Run, console: Console | None = None) -> None:
    """A few lines: what is about to run, on what, and where its record is."""
    record, choices = run.record, run.record["choices"]
    console = console or Console(highlight=False, soft_wrap=True)
    parts = [f"{group} {choices[group]}" for group in ("model", "data", "hardware", "peft") if choices.get(group)]
    rate = record["config"]["trainer"]["args"]["learning_rate"]
    console.print(f"[bold]{choices['trainer']}[/]  {', '.join(parts)}")
    console.print(f"{record['trainer']}, learning rate {rate}, seed {record['seed']}")
    if record["parent"]:
        directory = Path(record["parent"]["directory"])
        console.print(f"from {short(directory)} ({outcome(runs.read(directory))})")
    console.print(f"run  {short(run.directory)}")


def lost_rows(run: runs.Run, console: Console | None = None) -> None:
    """One line for each split of which rows were dropped or cut; nothing where none was."""
    limit = f"trainer.args.max_length={run.record['config']['trainer']['args']['max_length']}"
    console = console or Console(highlight=False, soft_wrap=True)
    for split, rows in run.record["rows"].items():
        if rows["cut"]:
            console.print(f"[yellow]{split}: {rows['cut']} of {rows['given']} rows reach {limit} and may be cut[/]")
        if rows["dropped"]:
            console.print(
                f"[yellow]{split}: {rows['dropped']} of {rows['given']} rows are dropped, all prompt at {limit}[/]"
            )


def summary(run: runs.Run, console: Console | None = None) -> None:
    """The table before and after, a few replies, and where to look next."""
    console = console or Console(highlight=False)
    stopped = run.record["steps"] < run.record["max_steps"]
    steps = f"stopped early at step {progress(run.record)}" if stopped else f"{run.record['steps']} steps"
    table = Table(title=f"{run.record['status']} in {run.record['seconds']:.0f} s, {steps}")
    table.add_column("held-out")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, before, after in before_and_after(run.record["metrics"]):
        table.add_row(name, number(name, before), number(name, after))
    console.print(table)
    for sample in run.record["samples"][:1]:
        console.print(f"question  {sample['question']}", markup=False)
        console.print(f"before    {sample['before'] or '(nothing)'}", markup=False)
        console.print(f"after     {sample['after']}", markup=False)
    console.print(f"\nmodel  {short(run.directory / 'model')}", soft_wrap=True)
    console.print(f"report {short(run.directory / 'report.md')}", soft_wrap=True)


def outcome(record: dict[str, Any]) -> str:
    """What a completed run came to, for where there is a line of it: `sft, exact_match 98.5%`."""
    name, _, after = before_and_after(record["metrics"])[0]
    return f"{record['choices']['trainer']}, {name} {number(name, after)}"


def ending(directory: Path) -> str:
    """One line for a run that did not complete: how it ended and where, what to do, and where to read of it."""
    record = runs.read(directory)
    where = f"at step {progress(record)}" if record["steps"] else "before the first step"
    rate = record["config"]["trainer"]["args"]["learning_rate"]
    mend = f"; lower trainer.args.learning_rate={rate}" if record["status"] == "diverged" else ""
    return f"{record['status']} {where}{mend}; report {short(directory / 'report.md')}"


def progress(record: dict[str, Any]) -> str:
    """`40 of 125` steps; `0` where training has not begun."""
    return f"{record['steps']} of {record['max_steps']}" if record["max_steps"] else "0"


def short(path: Path) -> Path:
    """A path as one would type it here: relative where it is below the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


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


def number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if name == "exact_match" or name.endswith("accuracies") else f"{value:.4f}"


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
    lines += ["", "## Held-out metrics", "", "| | before | after |", "|---|---:|---:|"]
    lines += [f"| {n} | {number(n, b)} | {number(n, a)} |" for n, b, a in before_and_after(record["metrics"])]
    for sample in record.get("samples", []):
        lines += ["", f"> {sample['question']}", "", f"- before: {sample['before']}", f"- after: {sample['after']}"]
    losses = [row for row in metrics if "loss" in row]
    if losses:
        lines += ["", "## Training", "", f"Loss {losses[0]['loss']:.4f} at step {losses[0]['step']}, "]
        lines[-1] += f"{losses[-1]['loss']:.4f} at step {losses[-1]['step']}."
        if plot(directory / "curves.png", metrics):
            lines += ["", "![curves](curves.png)"]
    lines += ["", "## Versions", "", ", ".join(f"{name} {version}" for name, version in record["versions"].items())]
    lines += ["", "## Parameters", "", "```yaml", OmegaConf.to_yaml(record["config"]).rstrip(), "```", ""]
    (directory / "report.md").write_text("\n".join(lines))


def command(record: dict[str, Any]) -> str:
    """The command line that stands for a run; of a sweep's run, for that one alone."""
    folders = record["config_dirs"]
    own = ["--config-dir", *folders] if len(folders) == 1 else [f"hydra.searchpath=[{','.join(folders)}]"]
    return shlex.join(["smoltrain", *(own if folders else []), *record["overrides"]])


def plot(file: Path, metrics: list[dict[str, Any]]) -> bool:
    """Draws training and held-out loss by step; False, and no file, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, (title, style) in CURVES.items():
        points = [(row["step"], row[name]) for row in metrics if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=title)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    return True
