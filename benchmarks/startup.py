"""How long the answers take that must not import torch, and the error for a misspelt key beside that of others.

Wall seconds from Enter to the end of the process, and CPU seconds, which other work on the machine changes less:
medians over interleaved repetitions. Every repetition has to exit and to answer as is expected of it.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
SMOLTRAIN = [sys.executable, "-m", "smoltrain"]
ASK = [*SMOLTRAIN, "completion", "bash", "--"]
WRONG, RIGHT = "lerning_rate", "learning_rate"
# A config of TRL's own command that is right but for the key: nothing in it is missing or looked for on a hub.
TRL = f"model_name_or_path: nowhere\ndataset_name: nowhere\noutput_dir: out\nuse_cpu: true\nbf16: false\n{WRONG}: 1\n"
HYDRA = """\
import hydra
@hydra.main(version_base=None, config_path=".", config_name="config")
def main(cfg):
    print(cfg.trainer.args.learning_rate)
main()
"""
FILES = {"x.yaml": TRL, "app.py": HYDRA, "config.yaml": f"trainer: {{args: {{{RIGHT}: 0.001}}}}\n"}


@dataclass
class Case:
    """A command, its exit code, and what it has to print, a regular expression; then what was measured."""

    name: str
    command: list[str]
    code: int = 0
    expected: str = ""
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    printed: str = ""

    def measure(self, folder: Path) -> None:
        before, began = children(), time.perf_counter()
        done = subprocess.run(self.command, cwd=folder, capture_output=True, text=True, check=False)
        self.seconds.append(time.perf_counter() - began)
        self.cpu.append(children() - before)
        self.printed = done.stdout + done.stderr
        assert done.returncode == self.code, f"{self.name}: exit code {done.returncode}\n{self.printed}"
        assert re.search(self.expected, self.printed), f"{self.name}: no {self.expected!r} in\n{self.printed}"

    @property
    def row(self) -> dict[str, float]:
        return {
            "median": statistics.median(self.seconds),
            "least": min(self.seconds),
            "most": max(self.seconds),
            "cpu": statistics.median(self.cpu),
        }

    @property
    def answer(self) -> dict[str, object]:
        """Of an error, what there is to read: how many lines, the first, the one with the mistake, the mend in it."""
        lines = [line.strip() for line in self.printed.splitlines() if line.strip()]
        named = [line for line in lines if WRONG in line]
        mended = any(re.search(rf"\b{RIGHT}\b", line) for line in named)
        return {
            "code": self.code,
            "lines": len(lines),
            "first": lines[0],
            "named": (named or [""])[0],
            "mended": mended,
        }


CASES = [
    Case("python -c pass", [sys.executable, "-c", "pass"]),
    Case("import hydra", [sys.executable, "-c", "import hydra"]),
    Case("import torch", [sys.executable, "-c", "import torch"]),
    Case("smoltrain --help", [*SMOLTRAIN, "--help"], 0, "trainer=dpo"),
    Case("smoltrain --cfg job", [*SMOLTRAIN, "--cfg", "job"], 0, "_target_: trl.SFTConfig"),
    Case("a wrong option", [*SMOLTRAIN, "trainer=ppo"], 2, "trainer=ppo"),
    Case("Tab: options", [*ASK, "smoltrain trainer="], 0, r"dpo \n"),
    Case("Tab: keys", [*ASK, "smoltrain trainer=dpo trainer.args.be"], 0, "trainer.args.beta="),
    Case("Tab: values", [*ASK, "smoltrain trainer.args.lr_scheduler_type="], 0, "cosine "),
]
MISSPELT = [
    Case("smoltrain", [*SMOLTRAIN, f"trainer.args.{WRONG}=1"], 2, f"{WRONG}.*{RIGHT}"),
    Case("trl sft --config x.yaml", [str(BIN / "trl"), "sft", "--config", "x.yaml"], 2, WRONG),
    Case("a bare Hydra app", [sys.executable, "app.py", f"trainer.args.{WRONG}=1"], 1, WRONG),
]


def children() -> float:
    """CPU seconds of all processes that were started and awaited so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("HYDRA_FULL_ERROR", None)
    cases = [*CASES, *MISSPELT]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name, text in FILES.items():
            (folder / name).write_text(text)
        for _ in range(repeats):
            for case in cases:
                case.measure(folder)
    print(f"| {repeats} repetitions, load {os.getloadavg()[0]:.1f} | seconds (spread) | CPU s |\n|---|---:|---:|")
    for case in cases:
        row = case.row
        name = f"{case.name}, a misspelt key" if case in MISSPELT else case.name
        print(f"| {name} | {row['median']:.2f} ({row['least']:.2f} to {row['most']:.2f}) | {row['cpu']:.2f} |")
    print("\n| a misspelt key | exit code | lines | first line | names it | names the right one |")
    print("|---|---:|---:|---|---|---|")
    for case in MISSPELT:
        said = case.answer
        names = f"`{str(said['named'])[:90]}`" if said["named"] else "no"
        mended = "yes" if said["mended"] else "no"
        print(f"| {case.name} | {said['code']} | {said['lines']} | `{str(said['first'])[:90]}` | {names} | {mended} |")
    print(json.dumps({case.name: case.row | (case.answer if case in MISSPELT else {}) for case in cases}))


if __name__ == "__main__":
    main()
