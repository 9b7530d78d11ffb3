"""Secrets stay where they are, in the environment: refused in a config, starred in whatever leaves the process.

What is starred in a text and what is refused in a config is the same, so a config that runs is recorded as it is.
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

from smoltrain.config import ConfigError, Problem

STARS = "***"
# What looks like a secret wherever it stands, and what to do instead. A first group is shown, the rest is starred.
# Lengths and digits keep out names: of models (hf_tiny), files (sk-learn-notes), words (bearer of news).
SHAPES = [
    (re.compile(shape), mend)
    for shape, mend in (
        (r"hf_(?:oauth_(?=\D{0,99}\d)[\w.-]{16,}|[A-Za-z0-9]{16,})", "set HF_TOKEN"),
        (r"sk-ant-[\w-]{16,}", "set ANTHROPIC_API_KEY"),
        (r"sk-(?:proj|or|svcacct|admin)-[\w-]{16,}", "set OPENAI_API_KEY"),
        (r"sk-(?:(?<![A-Za-z0-9]sk-)|(?<=\\[nrt]sk-))[A-Za-z0-9]{20,}", "set OPENAI_API_KEY"),  # not of a disk-…
        (r"gh[opusr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}", "set GITHUB_TOKEN"),
        (r"glpat-[\w-]{16,}", "set GITLAB_TOKEN"),
        (r"A[KS]IA[0-9A-Z]{16}\b", "set AWS_ACCESS_KEY_ID"),
        (r"xox[abeoprs]-[\w-]{10,}", "set SLACK_TOKEN"),
        (r"AIza[\w-]{30,}", "set GOOGLE_API_KEY"),
        (r"gsk_[A-Za-z0-9]{40,}", "set GROQ_API_KEY"),
        (r"npm_[A-Za-z0-9]{30,}", "set NPM_TOKEN"),
        (r"r8_[A-Za-z0-9]{30,}", "set REPLICATE_API_TOKEN"),
        (r"[rs]k_live_[A-Za-z0-9]{16,}", "set STRIPE_API_KEY"),
        (r"wandb_v1_\w{16,}", "set WANDB_API_KEY"),
        (r"eyJ[\w-]{8,999}\.[\w-]{8,}\.[\w-]*", "leave the web token out"),
        (r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", "leave the key out"),
        (r"((?i:\b(?:bearer|basic)\s+))(?=\S*\d|\S{20})[\w.~+/=-]{12,}", "leave the header out"),
        (
            r"((?i:[?&][\w-]*(?:token|signature|credential|(?:api|access)_?key|secret|password|\bsig)=))[^\s&#'\"]+",
            "sign no URL",
        ),
        (r"(?<=://)[^\s/?#@:'\"]*:[^\s/?#'\"]+(?=@)", "leave user and password out of the URL"),
        (r"(?<=https://)[^\s/?#'\"]+(?=@)|(?<=http://)[^\s/?#'\"]+(?=@)", "leave the user out of the URL"),
    )
]

# Keys that say that their value is one, as the last word or words of a part of the key. `eos_token` does not.
NAMED = re.compile(
    r"(?:^|_)(?:(?:api|access|secret|private|auth|signing)_?keys?|secrets?|passwords?|passwd|passphrase|pwd|creds|credentials?"
    r"|authorization)$|(?:^|(?:^|_)(?:hub|hf|huggingface|api|access|auth|bearer|refresh|session|security|private|personal"
    r"|wandb|openai|github|gitlab|slack))_?token$"
)
# What may be one where a key ends with token or key and says no more: long, of letters with digits, as wandb's 40.
RANDOM = re.compile(r"(?=\D*\d)(?=[^A-Za-z]*[A-Za-z])[A-Za-z0-9+/=]{20,}")
LIBRARIES = {"wandb": "WANDB_API_KEY", "openai": "OPENAI_API_KEY", "github": "GITHUB_TOKEN", "token": "HF_TOKEN"}
NOTHING = {"", "null", "none", "~", "true", "false", "???", STARS}

ENVIRONMENT = re.compile(r"\boc\.env:\s*['\"]?(\w+)")
LITERAL = re.compile(r"""[{,]\s*["']?([\w.-]+)["']?\s*:\s*["']?([^\s"',}]*)""")
VARIABLE = re.compile(
    r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|CREDS|_PASS|_PWD|_PAT)$", re.IGNORECASE
)
# Keys that say of what; all others, as SORT_KEY or a desktop's SESSION_KEY, often hold a plain word or a path.
TELLING = re.compile(r"(?:API|ACCESS|SECRET|PRIVATE|AUTH|SIGNING|ENCRYPTION)_?KEY$", re.IGNORECASE)
PLAIN = re.compile(r"[a-z_]{,15}|[/~.].*")
SHORT = 8  # characters; shorter values would star ordinary text


# ---------------------------------------------------------------- what leaves the process


def redacted(data: Any) -> Any:
    """A text, or plain data with its texts, in which each secret is `***`; lists and dicts are new ones."""
    return starred(data, [spellings(value) for value in sorted(environment().values(), key=len, reverse=True)])


def starred(data: Any, values: list[re.Pattern[str]]) -> Any:
    """As `redacted`, given what finds the values of the environment."""
    if isinstance(data, dict):
        return {starred(key, values): starred(value, values) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [starred(value, values) for value in data]
    if not isinstance(data, str):
        return data
    text = data
    for spelling in values:
        text = spelling.sub(STARS, text)
    for shape, _ in SHAPES:
        text = shape.sub(lambda match: (match[1] if match.re.groups else "") + STARS, text)
    return text


class Discreet:
    """A text stream in which each secret is `***`: tracebacks, warnings and logs of libraries pass it too."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.outlives_its_reader = False

    def write(self, text: str) -> int:
        with self.read_or_not():
            self.stream.write(redacted(text))
        return len(text)

    def flush(self) -> None:
        with self.read_or_not():
            self.stream.flush()

    @contextmanager
    def read_or_not(self) -> Iterator[None]:
        """Within, a reader may have gone, as `head` does: where nobody is to stop for that, nobody is told any more."""
        try:
            yield
        except BrokenPipeError:
            if not self.outlives_its_reader:
                raise
            with open(os.devnull, "w") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), self.stream.fileno())

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def discreet_streams(outlive: bool = False) -> None:
    """Lets this process print no secret, and `outlive` who reads what it prints, as a run that has its record."""
    for name in ("stdout", "stderr"):
        if not isinstance(stream := getattr(sys, name), Discreet):
            stream = Discreet(stream)
            setattr(sys, name, stream)
        stream.outlives_its_reader = outlive


def environment() -> dict[str, str]:
    """The variables of the environment that hold a secret, going by their names."""
    found = {name: os.environ[name] for name in os.environ if secret(name)}
    return {name: value for name, value in found.items() if not harmless(name, value.strip())}


def harmless(variable: str, value: str) -> bool:
    """Whether a value keeps nothing secret: one that is short, the path of a file, what a mere key often is."""
    if len(value) < SHORT or (bare(variable) and PLAIN.fullmatch(value)):
        return True
    with suppress(OSError, RuntimeError, ValueError):  # too long for a path, a ~user that there is not, a NUL
        return "/" in value and Path(value).expanduser().exists()
    return False


@cache
def bare(variable: str) -> bool:
    """Whether a variable's name says that it is a key, and not of what kind."""
    return bool(variable.upper().endswith("KEY") and not TELLING.search(variable))


@cache
def secret(variable: str) -> bool:
    """Whether a variable's name says that its value is secret."""
    return bool(VARIABLE.search(variable))


@cache
def spellings(value: str) -> re.Pattern[str]:
    """Finds a value in a text as it is, wrapped to other lines, and as JSON, Python and URLs spell it."""
    forms = {json.dumps(value)[1:-1], repr(value)[1:-1], quote(value, safe=""), quote_plus(value)}
    wrapped = r"\s+".join(map(re.escape, value.split()))
    return re.compile("|".join([wrapped, *map(re.escape, sorted(forms, key=len, reverse=True))]))


# ---------------------------------------------------------------- what is refused


def refuse(problems: list[Problem]) -> None:
    """Raises one ConfigError for the secrets that were found, and for nothing else: other messages show values."""
    if problems:
        raise ConfigError("\n".join(problem.text for problem in problems))


def leaky_overrides(arguments: list[str]) -> list[Problem]:
    """What is secret in a command line, its flags included, as `leaks` has it, whether or not it can be parsed."""
    problems = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        inside = LITERAL.findall(value) if value.lstrip("'\"")[:1] in ("{", "[") else []
        pairs = [("", argument), (key, value), *((f"{key}.{name}", inner) for name, inner in inside)]
        if mend := next(filter(None, (instead(*pair) for pair in pairs)), ""):
            problems.append(problem(redacted(argument).partition("=")[0].lstrip("+~"), mend))
    return problems


def leaks(cfg: dict[str, Any]) -> list[Problem]:
    """What is secret in a composed config: keys that say so, values that look so, values of secret variables.

    Interpolations (`${oc.env:HF_TOKEN}`) are judged by what they name and by what they come to.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems, tree = [], OmegaConf.create(cfg)
    for key, value in texts(cfg):
        mend = instead(key, value)
        if not mend and "${" in value:
            # One that leads nowhere is said by `validate`; some, only a run can resolve.
            with suppress(OmegaConfBaseException):
                mend = instead(key, str(OmegaConf.select(tree, key)))
        if mend:
            problems.append(problem(redacted(key), mend))
    return problems


def problem(key: str, mend: str) -> Problem:
    return Problem(key, f"{key}: a secret is taken only from the environment, and not shown here; {mend}")


def texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every value of plain data as a text, with its key: `a.b` of a dict, `a[0]` of a list."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from texts(value, f"{key}[{index}]")
    else:
        yield key, str(node)


def instead(key: str, value: str) -> str:
    """What to do instead of setting `key` to `value`, where either is secret; empty where neither is."""
    value = value.strip(" '\"")
    for text in (value, key):
        for variable in filter(secret, ENVIRONMENT.findall(text)):
            return f"what needs {variable} reads it there, leave it out"
        for variable, value_there in environment().items():
            if spellings(value_there).search(text):
                return f"{variable} is set there, leave its value out"
        for shape, mend in SHAPES:
            if shape.search(text):
                return mend
    if value.lower() not in NOTHING and named(key, value):
        known = next((variable for word, variable in LIBRARIES.items() if word in key.lower()), None)
        return f"set {known}" if known else "set the variable that its library reads"
    return ""


def named(key: str, value: str) -> bool:
    """Whether a key says that its value is secret, in any of its parts: `hubToken`, `api_keys[0]`, `secrets.mine`."""
    words = [re.sub("(?<=[a-z])(?=[A-Z])|[^A-Za-z0-9]+", "_", part).lower() for part in key.split(".")]
    words = [word.rstrip("_0123456789") for word in words]
    return any(map(NAMED.search, words)) or (words[-1].endswith(("token", "key")) and bool(RANDOM.fullmatch(value)))
