"""How long the commands take that must not import torch: wall seconds, medians over interleaved repetitions."""

import json
import statistics
import subprocess
import sys
import time

REPEATS = 9
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import torch": [sys.executable, "-c", "import torch"],
    "smoltrain --help": [sys.executable, "-m", "smoltrain", "--help"],
    "smoltrain --cfg job": [sys.executable, "-m", "smoltrain", "--cfg", "job"],
    "a wrong option": [sys.executable, "-m", "smoltrain", "trainer=ppo"],
    "a wrong key": [sys.executable, "-m", "smoltrain", "trainer.args.lerning_rate=1"],
    "completion": [sys.executable, "-m", "smoltrain", "-sc", "query=bash"],
}


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(REPEATS):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, capture_output=True, check=False)
            times[name].append(time.perf_counter() - began)
    table = {name: {"median": statistics.median(t), "least": min(t), "most": max(t)} for name, t in times.items()}
    for name, row in table.items():
        print(f"{name:22} median {row['median']:.2f} s   {row['least']:.2f} to {row['most']:.2f}")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
