"""Checkpoints that can be trusted: a manifest seals each, and a run goes on from the newest whose seal holds."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)")
BROKEN = "broken-"  # before the name of what no run can go on from
NO_OPTIMIZER = "it holds no optimizer (trainer.args.save_only_model=true)"
GOING = "deleted-"  # before the name of what rotation removes, while it goes


def seal(folder: Path, **facts: Any) -> dict[str, Any]:
    """Writes the manifest of a checkpoint: sha256 and size of each of its files, and facts of it, such as its step.

    It is written last and in one move, after all that it vouches for is on the disk: a checkpoint is there when its
    manifest is. Returns the manifest.
    """
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        files[str(file.relative_to(folder))] = {"sha256": digest(file), "size": file.stat().st_size}
        synced(file)
    for inner in {file.parent for file in map(folder.joinpath, files)} | {folder}:
        synced(inner)
    manifest = {**facts, "files": files}
    manifest["seal"] = sealed(manifest)
    unfinished = folder / f"{MANIFEST}.tmp"
    unfinished.write_text(json.dumps(manifest, indent=1) + "\n")
    synced(unfinished)
    unfinished.rename(folder / MANIFEST)
    synced(folder)
    synced(folder.parent)
    return manifest


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sealed(manifest: dict[str, Any]) -> str:
    """The digest of a manifest itself, less the one that stands in it."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def synced(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None where it has none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def fault(folder: Path, hashes: Collection[str]) -> str:
    """Why a run cannot go on from a checkpoint; empty where it can. `hashes` are those of the run's own configs."""
    if not (folder / MANIFEST).exists():
        return "it has no manifest, its save never ended"
    manifest = read(folder)
    if manifest is None or manifest.get("seal") != sealed(manifest):
        return f"its {MANIFEST} is not as it was written"
    if f"checkpoint-{manifest['step']}" != folder.name:
        return f"its {MANIFEST} is that of checkpoint-{manifest['step']}"
    if manifest["config_hash"] not in hashes:
        return f"it is of another run, with the config {manifest['config_hash']}"
    metrics = folder.parent / "metrics.jsonl"
    if (metrics.stat().st_size if metrics.exists() else 0) < manifest["metrics_bytes"]:
        return "metrics.jsonl has lost lines from before it"
    return damage(folder, manifest)


def damage(folder: Path, manifest: dict[str, Any]) -> str:
    """Which file of a checkpoint is not what its manifest says; empty where each is."""
    for name, known in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != known["size"]:
            return f"{name} has {size:,} bytes and was written with {known['size']:,}"
        if digest(file) != known["sha256"]:
            return f"{name} is not as it was written"
    return ""


def all_of(directory: Path) -> list[Path]:
    """The checkpoints of a run, sound or not, the newest first."""
    numbered = [(int(found[1]), path) for path in directory.iterdir() if (found := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest(directory: Path, hashes: Collection[str]) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that a run can go on from, None where there is none; and why it is none of the newer ones.

    Nothing is touched yet: `tidy` does that.
    """
    unfit: dict[Path, str] = {}
    for folder in all_of(directory):
        wrong = fault(folder, hashes)
        if not (wrong or (read(folder) or {})["resumable"]):
            wrong = NO_OPTIMIZER
        if not wrong:
            return folder, unfit
        unfit[folder] = wrong
    return None, unfit


def tidy(directory: Path, unfit: dict[Path, str], say: Callable[[str], None]) -> None:
    """Removes what was being removed, and sets aside what a run does not go on from; `say` is told which and why.

    Each keeps its files under another name: newer ones would else be taken for what the run is yet to save.
    """
    for gone in directory.glob(f"{GOING}checkpoint-*/"):
        shutil.rmtree(gone)
    for folder, wrong in unfit.items():
        say(f"{folder.name}: {wrong}; set aside as {set_aside(folder).name}")


def set_aside(folder: Path) -> Path:
    """Gives a checkpoint a name that nothing takes for one, and returns its new path."""
    taken = sum(1 for _ in folder.parent.glob(f"{BROKEN}{folder.name}*"))
    aside = folder.with_name(f"{BROKEN}{folder.name}" + (f".{taken}" if taken else ""))
    folder.rename(aside)
    synced(folder.parent)
    return aside


def rotate(directory: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest sealed checkpoints beyond `limit`, but not the best one; those that are not sealed stay.

    What goes is renamed first, so that no half of it is ever taken for a checkpoint.
    """
    kept = [folder for folder in all_of(directory) if (folder / MANIFEST).exists()]
    for folder in kept[limit or len(kept) :]:
        if best is None or folder != Path(best):
            shutil.rmtree(folder.rename(folder.with_name(f"{GOING}{folder.name}")))
