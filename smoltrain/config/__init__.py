"""The config before anything runs: composed, checked whole, and explained, in the user's words.

    command line -> compose (groups, files) -> validate (keys, types, rules) -> one config that can be run

Nothing in this package imports torch, transformers or trl, so that an error in a config costs half a second; what the
shell asks for completions imports not even Hydra.
"""

import difflib
import errno
import json
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

PACKAGE = Path(__file__).parents[1]
CONF = next(d for d in (PACKAGE / "conf", PACKAGE.parent / "conf") if d.is_dir())  # wheel, else checkout
BASE = "base"  # in every group, what its options share: a part of them, not one of them


class ConfigError(ValueError):
    """A config or its data cannot be run as asked; found before training, so the command exits with 2.

    `missing` are the keys that still need a value, where that is what is wrong.
    """

    def __init__(self, message: str, missing: Iterable[str] = ()):
        super().__init__(message)
        self.missing = tuple(missing)


@dataclass(frozen=True)
class Problem:
    """What is wrong with one key: `text` begins with the key. `missing` where it lacks a value."""

    key: str
    text: str
    missing: bool = False


def plain(cfg: Any, resolve: bool = False) -> dict[str, Any]:
    """A config as ordinary dicts and lists."""
    from omegaconf import OmegaConf

    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=resolve))


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a config with its value, lists as values."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def at(values: dict[str, Any], key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    node: Any = values
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def shown(value: Any) -> str:
    """A value as one would type it, its middle left out where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 80 else f"{text[:50]} … {text[-20:]}"


def closest(word: str, choices: Iterable[str]) -> str:
    """The choice most like a word, whatever their case; empty where none is."""
    known = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), known, n=1)
    return known[close[0]] if close else ""


def suggest(word: str, choices: Iterable[str]) -> str:
    close = closest(word, choices)
    return f"; did you mean {close}?" if close else ""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSALS = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def exhausted(error: BaseException) -> bool:
    """Whether the machine ran out of memory or disk: then the run has failed, and nothing was wrong with its config."""
    return out_of_memory(error) or getattr(error, "errno", None) in DISK_FULL


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine ran out of memory, in torch's words of an accelerator's and of the CPU's, or Python's."""
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return named or "can't allocate memory" in str(error) or "out of memory" in str(error)


def place(error: BaseException | None) -> str:
    """Where an exception arose in a user's own code, as ` (file:line, in function)`; empty where it did not."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    libraries = [PACKAGE, *(Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib", "platlib"))]
    own = [
        f
        for f in frames
        if Path(f.filename).is_file() and not any(Path(f.filename).is_relative_to(folder) for folder in libraries)
    ]
    return f" ({own[-1].filename}:{own[-1].lineno}, in {own[-1].name})" if own else ""


@contextmanager
def refusing(key: str) -> Iterator[None]:
    """Turns what a component refuses while it is built from `key` into a ConfigError that names the key."""
    from hydra.errors import InstantiationException

    try:
        yield
    except ConfigError:
        raise
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            raise cause from None
        if cause is not None and (not isinstance(cause, REFUSALS) or exhausted(cause)):
            raise cause from None
        raise ConfigError(f"{key}: {cause or str(error).splitlines()[0]}{place(cause)}") from error
    except REFUSALS as error:
        if exhausted(error):
            raise
        raise ConfigError(f"{key}: {error}") from error
