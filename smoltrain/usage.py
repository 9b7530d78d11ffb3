"""What the command says of itself: its verbs, their flags and arguments, and the screens of `--help`."""

import re
import shutil
import sys

# Each verb's own screen, which is all that is said of it anywhere. Its first line is the usage and, after a colon, what
# the verb does: `--help` shows it, and completion offers what it names (`completion.KINDS`). A line that begins with a
# flag is that flag: its names, the kind of its value, what it is for.
VERBS = {
    "train": """\
smoltrain [train] [overrides]: train, once; with -m once for each combination

  The overrides choose options of groups and set keys: smoltrain trainer=dpo trainer.args.beta=0.2 seed=1
  They are checked whole before anything starts. The verb may be left out.

  -m, --multirun       every combination of the values that are given with commas: -m trainer=sft,dpo seed=1,2
  --config-dir FOLDER  YAML files of your own, beside ours
  --allow NAME         code of your own that may run: a package, or a module or class in it
  --cfg job|hydra|all  print the config that would run, and run nothing
  --package KEY        with --cfg: print only what is below this key
  --resolve            with --cfg: print values in place of ${…}
  --hydra-help         all flags of Hydra
  --version            the version of smoltrain

Exit codes: 0 completed, 1 failed, 2 refused before training, 3 diverged, 143 preempted.
""",
    "check": """\
smoltrain check [overrides]: what a run would learn from and cost, before it starts

  Reads, renders and tokenises every row as the run would, takes one step, and prints what it found.
  The overrides are those of the run: smoltrain check trainer=dpo data.path=my.jsonl

  --json FILE          writes all of it as JSON; with - to the standard output, where nothing else is printed then
  --strict             exit code 1 where there are warnings
  --config-dir FOLDER  YAML files of your own, as in a run
  --allow NAME         code of your own that may run, as in a run
  check.step=true      takes one real step on the longest batch, without learning from it; by default where the model
                       is on this disk. false takes none, and leaves the time out

Exit codes: 0 ready, 1 warnings and --strict, 2 errors: what would stop the run.
Every run begins with the part of this that is cheap.
""",
    "why": """\
smoltrain why KEY [overrides]: what a key is, who set it, and what that overrode

  KEY is a key (seed), a node (trainer.args) or a group (trainer); the overrides are those of the run:
  smoltrain why trainer.args.learning_rate trainer=dpo
  The newest setting comes first, what the class itself would take last. A value like ${seed} is followed to that key.

  --json               the same as JSON
  --config-dir FOLDER  YAML files of your own, as in a run
  --allow NAME         code of your own that may run, as in a run
""",
    "show": """\
smoltrain show [KEY] [overrides]: the config that would run, each value with its origin

  It is YAML, and the origins are comments. With a KEY only that: smoltrain show trainer.args trainer=dpo
  What is wrong with the config is said after it; the exit code is 2 then.

  --config-dir FOLDER  YAML files of your own, as in a run
  --allow NAME         code of your own that may run, as in a run
""",
    "diff": """\
smoltrain diff A B: what differs between two configs or two runs, key by key

  A and B are each an experiment's name; overrides in quotes, 'trainer=dpo seed=1', or '' for none; or a run that has
  ended: its directory, name or stamp, the beginning of one, or latest. Of two runs the results are compared too; where
  they are kept, their names and who watched are no differences.

  --json               the same as JSON
  --config-dir FOLDER  YAML files of your own, as in a run
  --allow NAME         code of your own that may run, as in a run

Exit codes: 0 nothing differs, 1 something does, 2 trouble.
""",
    "reproduce": """\
smoltrain reproduce RUN: make a run again and say whether the same came out

  RUN is a completed run: its directory, name or stamp, or latest. What differs from then, of versions, data and the
  machine, is said; on the same machine metrics and weights are equal to the last bit. The new run stands beside the
  old one.

  --allow NAME         code of your own that may run, as in a run

Exit codes: 0 metrics and weights are equal, 1 they are not, 2 refused.
""",
    "runs": """\
smoltrain runs [show|compare|rows RUN…]: all runs of this folder, one, or several side by side

  Without more it prints a table, newest first. Filters are key=value, of its columns or of the config, and several are
  and-ed: smoltrain runs status=completed trainer=dpo trainer.args.learning_rate=2e-05

  show RUN             how a run ended, what it was, what it left, its metrics, its loss
  compare RUN RUN…     what differs between the configs of runs, beside their final metrics and losses
  rows RUN             the data rows that a step learned from, as they were trained on, worked out from the record

  RUN is a run's directory, name (the newest of that name) or stamp, the beginning of one, or latest, the newest of all.
  A sweep's stamp stands for all its runs in compare; one of them is STAMP/JOB.

  --sort KEY           by a column or a config key, the smallest first; runs without one come last
  --plot FILE          compare: draws the losses into a picture, .png or .svg; needs matplotlib
  --json               the same as JSON; show prints the record
  --step 120|100-103   rows: of one step, of a range, or of several, 3,7
  --spikes             rows: of the steps whose loss or gradient norm stands out, the farthest first
  --allow NAME         rows: code of your own that may run, as in the run

Exit codes: 0 shown, 2 trouble.
""",
    "sweep": """\
smoltrain sweep SWEEP: what came of a sweep, while it runs and after

  A table of what was varied and what came out, the best first; what diverged or failed is marked and never ranked.
  Over seeds the mean and its 95 % confidence interval, each configuration against the best seed by seed, and which
  cannot be told from it; the mean by each key. All of it and a picture go to results.csv, results.json and sweep.png in
  the sweep's directory.

  SWEEP is a sweep's directory, name (the newest of that name) or stamp, the beginning of one, or latest. It is started
  by smoltrain -m trainer=sft,dpo seed=1,2,3.

  --json               the same as JSON, and no file is written

Exit codes: 0 shown, 2 trouble.
""",
    "launch": """\
smoltrain launch: choose interactively; prints the command it stands for

  Asks for the parts of a run and its parameters, one question after the other, and starts it once you confirm.

  --config-dir FOLDER  YAML files of your own, as choices beside ours
""",
    "dashboard": """\
smoltrain dashboard [SWEEP]: the curves of all runs, or of one sweep, in a browser

  Opens Trackio on multirun/trackio of this folder, until Ctrl+C; with a SWEEP on its runs and no others.
""",
    "completion": """\
smoltrain completion SHELL: completion with Tab, for bash, zsh or fish

  One command installs it, for every shell that is opened from then on:

  bash   echo 'eval "$(smoltrain completion bash)"' >> ~/.bashrc
  zsh    echo 'eval "$(smoltrain completion zsh)"' >> ~/.zshrc
  fish   mkdir -p ~/.config/fish/completions; smoltrain completion fish > ~/.config/fish/completions/smoltrain.fish

  It knows verbs, flags, groups and their options, the keys of the config that the words so far stand for, what can be
  chosen as their values, files, and finished runs.
""",
}

# Of Hydra's own keys, those that may be set, on the command line only: where a run is kept, how a sweep is run.
SETTABLE: tuple[str, ...] = (
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.searchpath",
    "hydra.verbose",
)
SETTABLE += ("hydra/launcher", "hydra.launcher.…")

TOGETHER = {"sweep": "how the trials of a sweep are chosen"}  # groups of which one line is enough

EXAMPLES = """\
Examples
  smoltrain                                            SFT on the embedded model and data
  smoltrain trainer=dpo model.from_run=latest          DPO from the last run
  smoltrain trainer.args.learning_rate=5e-4 seed=1     any field of the trainer's config class
  smoltrain -m trainer=sft,dpo seed=1,2                four runs
  smoltrain --config-dir my_conf experiment=mine       with YAML files of your own

More of a verb: smoltrain check --help. Completion with Tab: smoltrain completion
"""


def summary(verb: str) -> tuple[str, str]:
    """How a verb is used, and what it does."""
    usage, _, text = VERBS[verb].partition("\n")[0].partition(": ")
    return usage, text


def flags(verb: str) -> dict[str, tuple[str, str]]:
    """The flags that a verb's screen explains: of each the kind of its value, or none, and what it is for."""
    lines = re.findall(r"^  (-[\w-]+)(?:, (--[\w-]+))?(?: (\S+))?  +(.+)$", VERBS[verb], re.MULTILINE)
    return {name: (kind, text) for short, long, kind, text in lines for name in (short, long) if name}


def overview(arguments: list[str]) -> str:
    """One screen: the verbs, each group with its options and what they are, the default first, and examples."""
    from smoltrain.config.groups import defaults, options  # which read YAML, as no other screen does

    lines = ["smoltrain: post-train small language models. What you ask for is what runs.", ""]
    wide = max(len(summary(verb)[0]) for verb in VERBS) + 2
    lines += [f"  {usage:{wide}}{text}" for usage, text in map(summary, VERBS)]
    lines += ["", "Overrides are key=value or group=option; a group's first is its default (peft, experiment: none)"]
    for group in defaults():
        if group in TOGETHER:
            choices = f"{group}={'|'.join(options(group, arguments))}"
            lines.append(f"  {choices:38}  {TOGETHER[group]}")
            continue
        lines += [f"  {f'{group}={option}':30}{text}" for option, text in options(group, arguments).items()]
    lines += ["", *EXAMPLES.splitlines()]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else max(map(len, lines))
    return "".join(f"{line if len(line) <= width else line[: width - 1] + '…'}\n" for line in lines)
