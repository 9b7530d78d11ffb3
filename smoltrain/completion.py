"""Completion at the prompt: what may stand where the cursor is, for bash, zsh and fish.

    the words so far -> which kind of word comes next -> all of that kind, less what does not begin as was typed

Tab is answered in 0.3 s, so that nothing here may import Hydra, let alone torch.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from smoltrain.config import CONF, ConfigError, suggest
from smoltrain.config.groups import defaults, options
from smoltrain.config.rules import Run, reserved
from smoltrain.config.schema import AUTO, PREPARATION, SCHEMA
from smoltrain.config.signatures import REQUIRED, Parameter, signature
from smoltrain.config.sketch import sketch
from smoltrain.usage import SETTABLE, VERBS, flags, summary

# Each asks this command what to offer: `completion SHELL -- …`. A line of the answer is a whole word, finished where it
# ends with a space; for zsh and fish a description follows, after a tab.
SCRIPTS = {
    # bash replaces what follows the last of COMP_WORDBREAKS, = and : among them, so that it is told only that.
    "bash": """\
_smoltrain() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        COMPREPLY+=("$line")
    done < <("${1/#\\~\\//$HOME/}" completion bash -- "${COMP_LINE:0:COMP_POINT}" "$COMP_WORDBREAKS" 2>/dev/null)
}
complete -o nospace -F _smoltrain smoltrain
""",
    "zsh": """\
#compdef smoltrain
_smoltrain() {
    local line word
    local -a finished begun
    for line in ${(f)"$("${${(Q)words[1]}/#\\~\\//$HOME/}" completion zsh -- \\
            "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)"}; do
        word=${${line%%$'\\t'*}//:/\\\\:}
        [[ $line == *$'\\t'?* ]] && line=":${line#*$'\\t'}" || line=
        if [[ $word == *' ' ]]; then finished+=("${word% }$line"); else begun+=("$word$line"); fi
    done
    _describe -V smoltrain finished -- begun -S ''
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _smoltrain smoltrain
""",
    "fish": """\
function __smoltrain_complete
    set -l words (commandline -opc)
    set -l command (string replace -r '^~/' "$HOME/" -- $words[1])
    $command completion fish -- $words[2..] (commandline -ct) 2>/dev/null
end
complete -c smoltrain -f -a '(__smoltrain_complete)'
""",
}


@dataclass(frozen=True)
class Offer:
    """A word that may stand at the cursor, whole, and what it is."""

    text: str
    about: str = ""

    @property
    def finished(self) -> bool:
        """Whether the next word may follow: a key waits for its value, a folder for its file, a list for its end."""
        return self.text[-1] not in "=./" and self.text.count("[") == self.text.count("]")

    @property
    def ended(self) -> str:
        """The word where its shell will not wait for the end of a list."""
        return self.text if self.finished or "[" not in self.text else f"{self.text}]"


def completion(arguments: list[str]) -> int:
    """Prints the script for a shell; after `--`, what that script asked for; without a shell, which there are."""
    if not arguments:
        print(VERBS["completion"], end="")
        return 0
    shell, *asked = arguments
    if shell not in SCRIPTS:
        close = suggest(shell, SCRIPTS) or "."
        raise ConfigError(f"completion {shell}: there is no such script{close} Choose one of: {', '.join(SCRIPTS)}")
    if not asked:
        print(SCRIPTS[shell], end="")
    elif asked[0] != "--" or len(asked) < 2:
        raise ConfigError(f"smoltrain completion {shell} takes no {' '.join(asked)}")
    else:
        answer: dict[str, Callable[..., list[str]]] = {"bash": for_bash, "zsh": for_zsh, "fish": for_fish}
        lines = answer[shell](*asked[1:])
        print(*lines, sep="\n", end="\n" if lines else "")
    return 0


# ---------------------------------------------------------------- the shells


def for_bash(line: str, breaks: str = " \t\n\"'><=;|&(:") -> list[str]:
    """What to offer at the end of a command line, less what of the last word bash leaves as it is, quoted as it needs.

    `breaks` are the characters after which readline takes a new word to begin. It closes an open quote itself.
    """
    words, typed, quote, start = parse(line, breaks)
    if quote:
        return [offer.ended[start:] for offer in offers(words[1:], typed)]
    escaped = [(re.sub(r"([\s\\'\"$&;()|<>*?!`#])", r"\\\1", o.text[start:]), o) for o in offers(words[1:], typed)]
    return [f"{text} " if offer.finished else text for text, offer in escaped]


def for_zsh(*words: str) -> list[str]:
    """What to offer in place of the last word, with descriptions."""
    found = offers(list(words[:-1]), words[-1])
    return [f"{offer.text}{' ' if offer.finished else ''}\t{offer.about}" for offer in found]


def for_fish(*words: str) -> list[str]:
    """As for zsh; fish quotes a word itself, and ends it unless it is a key or a folder."""
    return [f"{offer.ended}\t{offer.about}" for offer in offers(list(words[:-1]), parse(words[-1])[1])]


def parse(line: str, breaks: str = "") -> tuple[list[str], str, str, int]:
    """The words of a line that ends at the cursor, as a shell reads them, and the last one, which may be unfinished.

    With it the quote that is still open, and how much of it stands before the last break or that quote.
    """
    words: list[str] = []
    word, quote, start, escaped = "", "", 0, False
    for letter in line:
        if escaped:
            word, escaped = word + letter, False
        elif letter == "\\" and quote != "'":
            escaped = True
        elif letter == quote:
            quote = ""
        elif quote:
            word += letter
        elif letter in "'\"":
            quote, start = letter, len(word)
        elif letter.isspace():
            words += [word] if word else []
            word, start = "", 0
        else:
            word += letter
            start = len(word) if letter in breaks else start
    return words, word, quote, start


# ---------------------------------------------------------------- the kinds of words


def offers(words: list[str], typed: str) -> list[Offer]:
    """What may stand in place of `typed` after these words, in the order in which it is shown."""
    verb = words[0] if words and words[0] in VERBS else "train"
    given = words[1:] if words[:1] == [verb] else words
    known = flags(verb)
    flag, sign, _ = typed.partition("=")
    if given and (kind := known.get(given[-1], ("", ""))[0]):
        found = of_kind(kind, given, typed)
    elif typed.startswith("-") and sign:
        kind = known.get(flag, ("", ""))[0]
        found = [Offer(f"{flag}={offer.text}", offer.about) for offer in of_kind(kind, given, typed[len(flag) + 1 :])]
    elif typed.startswith("-"):
        found = [Offer(name, about) for name, (_, about) in known.items()]
    else:
        found = [] if words else [Offer(name, summary(name)[1]) for name in VERBS]
        found += [offer for kind in arguments(verb, given, typed) for offer in of_kind(kind, given, typed)]
    return [o for o in found if o.text.startswith(typed) and (o.finished or o.text != typed)]


def arguments(verb: str, given: list[str], typed: str) -> list[str]:
    """The kinds of a verb's next argument, in the order of its usage; `[overrides]` may follow all others."""
    kinds = summary(verb)[0].split()[2:]
    rest = [kind for kind in kinds if kind == "[overrides]"]
    valued = {word for flag, word in pairwise(given) if flags(verb).get(flag, ("", ""))[0]}
    passed = [word for word in given if "=" not in word and word[:1] not in ("", "-") and word not in valued]
    if kinds and kinds[-1].rstrip("]").endswith("…"):  # may come again and again
        kinds += kinds[-1:] * len(passed)
    if len(passed) < len(kinds) - len(rest) and "=" not in typed:
        kind = kinds[len(passed)]
        return [kind.strip("[]…"), *(rest if kind.startswith("[") else [])]
    return rest


def of_kind(kind: str, words: list[str], typed: str) -> list[Offer]:
    """The words of a kind that a usage or a flag names."""
    if "|" in kind:
        return [Offer(choice) for choice in kind.split("|")]
    return KINDS[kind](words, typed) if kind in KINDS else []


def overrides(words: list[str], typed: str) -> list[Offer]:
    """Groups, and the keys of the config that the words stand for; after a `=`, the values."""
    mark, key, sign, value = re.fullmatch(r"([+~]*)([^=]*)(=?)(.*)", typed, re.DOTALL).groups()  # type: ignore[union-attr]
    if sign:
        return [Offer(f"{mark}{key}={offer.text}", offer.about) for offer in values(words, key, value)]
    config = {name: node for name, node in sketch(words).items() if name != "hydra"}
    if not mark and key.startswith("hydra"):
        return [Offer(name.removesuffix("…") if "…" in name else f"{name}=") for name in SETTABLE]
    if mark == "~":  # removes what is there
        return [Offer(f"~{offer.text.rstrip('=')}", offer.about) for offer in keys(config, key, only_set=True)]
    found = [Offer(f"{group}=", ", ".join(options(group, words))) for group in defaults()] + keys(config, key)
    found += [] if mark else [Offer("hydra.")]
    return [Offer(mark + offer.text, offer.about) for offer in found]


def bare_keys(words: list[str], typed: str) -> list[Offer]:
    """Keys without the `=` of an override."""
    return [Offer(offer.text.rstrip("="), offer.about) for offer in keys(sketch(words), typed)]


def keys(config: dict[str, Any], typed: str, only_set: bool = False) -> list[Offer]:
    """The keys of a config, one level after the other; a level on which only one node can be meant is skipped."""
    parents = typed.rpartition(".")[0]
    node = at(config, parents) or {}
    found = []
    for name, parameter in takes(config, parents).items():
        text = f"{parents}.{name}".lstrip(".")
        inner = node.get(name)
        needed = not isinstance(inner, dict) and parameter is not None and parameter.default is REQUIRED
        if text.startswith(typed) and (not only_set or (name in node and not needed)):
            now = f"now {as_typed(inner)}" if name in node else ""
            about = ", ".join(filter(None, (parameter.annotation if parameter else "", now)))
            found.append(Offer(f"{text}.") if isinstance(inner, dict) and inner else Offer(f"{text}=", about))
    if len(found) == 1 and found[0].text.endswith("."):
        return keys(config, found[0].text, only_set) or found
    return found


def takes(config: dict[str, Any], key: str) -> dict[str, Parameter | None]:
    """The keys that may be set below a key: those that are there, and the parameters of what is built from them.

    What is partial gets the rest of its parameters live. What a run refuses whatever its value is not offered.
    """
    node = at(config, key) or {}
    targets = [SCHEMA.get(key), None if node.get("_partial_") else node.get("_target_")]
    found: dict[str, Parameter | None] = {name: None for name in node if not name.startswith("_")}
    for target in filter(None, targets):
        try:
            found |= signature(target).parameters
        except ConfigError:
            continue
    without = set(signature(PREPARATION).parameters) if key.startswith("data.sources.") else set()
    if key == "trainer.args":
        encoder = str((at(config, "encode") or {}).get("_target_"))
        without |= {name.removeprefix("trainer.args.") for name in reserved(encoder)}
    return {name: parameter for name, parameter in found.items() if name not in without}


def at(config: dict[str, Any], key: str) -> dict[str, Any] | None:
    """The node at a dotted key, or None where there is none."""
    node: Any = config
    for part in filter(None, key.split(".")):
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else None


# ---------------------------------------------------------------- values


def values(words: list[str], key: str, typed: str) -> list[Offer]:
    """The values of a group or key, also as the next one of a sweep (`a,b`) or of a list (`[a,b]`)."""
    head, last = re.fullmatch(r"(\[?(?:[^,]*,)*)(.*)", typed, re.DOTALL).groups()  # type: ignore[union-attr]
    group = key.partition("@")[0]
    parents, _, name = key.rpartition(".")
    if group in defaults():
        found = [Offer(option, about) for option, about in options(group, words).items()]
    elif key == "model.from_run":
        found = finished_runs(words, last)
    elif key == "model.chat_template":
        found = [Offer(file.stem) for file in sorted((CONF / "chat_template").glob("*.jinja"))] + files(words, last)
    elif key == "model.name_or_path" or (parents.startswith("data") and name in ("path", "test_path")):
        found = files(words, last)
    else:
        config = sketch(words)
        parameter = takes(config, parents).get(name)
        choices = parameter.choices if parameter else ()
        if parameter and not choices and parents == "trainer.args":  # a text that the trainer compares with names
            with suppress(ConfigError, KeyError):
                choices = tuple(Run(config, ()).named(name))
        found = [Offer(as_typed(choice)) for choice in ("auto",) * (key in AUTO) + tuple(choices)]
        if parameter and found and "None" in parameter.annotation and Offer("null") not in found:
            found.append(Offer("null"))
    before = head.strip("[,").split(",")
    return [Offer(head + offer.text, offer.about) for offer in found if offer.text not in before]


def as_typed(value: Any) -> str:
    """A value in Hydra's grammar."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def finished_runs(words: list[str], typed: str) -> list[Offer]:
    """The runs that completed here, the last one first, by their names and stamps."""
    return kept_runs(words, typed, ("completed",))


def kept_runs(words: list[str], typed: str, statuses: tuple[str, ...] = ()) -> list[Offer]:
    """The runs that are kept here, of these statuses if any are given, as `history.resolve` takes them, last first."""
    from smoltrain.history import every  # whose own imports cost as much as the rest of an answer

    found: dict[str, str] = {}
    for run in every():
        if run.status in statuses or not statuses:
            found.setdefault("latest", f"the last of them, {run.path}")
            found.setdefault(run.name, f"the last of them, {run.run}")
            found[run.run] = ""
    return [Offer(name, about) for name, about in found.items()]


def kept_sweeps(words: list[str], typed: str) -> list[Offer]:
    """The sweeps that are kept here, as `sweep.record.resolve` takes them, the last first."""
    from smoltrain.runs import ROOT
    from smoltrain.sweep.record import sweeps

    found: dict[str, str] = {}
    for directory in sweeps():
        name, _, stamp = str(directory.relative_to(ROOT)).rpartition("/")
        found.setdefault("latest", f"the last of them, {name}/{stamp}")
        if name:
            found.setdefault(name, f"the last of them, {stamp}")
        found.setdefault(stamp, "")
    return [Offer(name, about) for name, about in found.items()]


def experiments_and_runs(words: list[str], typed: str) -> list[Offer]:
    """What can be compared."""
    return [Offer(*item) for item in options("experiment", words).items()] + finished_runs(words, typed)


def files(words: list[str], typed: str, only_folders: bool = False) -> list[Offer]:
    """The files and folders that begin as typed, hidden ones only after a dot; none that is no line of an answer."""
    folder, slash, last = typed.rpartition("/")
    try:
        inside = sorted(Path(folder + slash).expanduser().iterdir())
    except (OSError, RuntimeError, ValueError):  # no such folder, a ~user that there is not, a NUL
        return []
    begun = [p for p in inside if p.name.startswith(last) and p.name.isprintable()]
    shown = [p for p in begun if not p.name.startswith(".") or last.startswith(".")]
    return [
        Offer(f"{folder}{slash}{p.name}{'/' if p.is_dir() else ''}") for p in shown if p.is_dir() or not only_folders
    ]


def nothing(words: list[str], typed: str) -> list[Offer]:
    """What only the user knows, as the names of their own code."""
    return []


def shells(words: list[str], typed: str) -> list[Offer]:
    return [Offer(shell) for shell in SCRIPTS]


# What a verb's usage and its flags call their arguments.
KINDS: dict[str, Callable[..., list[Offer]]] = {
    "[overrides]": overrides,
    "KEY": bare_keys,
    "A": experiments_and_runs,
    "B": experiments_and_runs,
    "RUN": kept_runs,
    "SWEEP": kept_sweeps,
    "FILE": files,
    "FOLDER": partial(files, only_folders=True),
    "NAME": nothing,
    "SHELL": shells,
}
