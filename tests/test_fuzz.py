"""Whatever is typed or written: an answer, never a traceback, never a wait. Exit 0 or 2."""

import contextlib
import io
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoltrain.__main__ import main
from smoltrain.config import BASE, CONF
from smoltrain.config.compose import compose
from smoltrain.config.groups import defaults
from smoltrain.config.validate import resolved


def below(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config, nodes before what they hold."""
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from below(value, f"{prefix}{key}.")


OPTIONS = {group: [f.stem for f in (CONF / group).glob("*.yaml") if f.stem != BASE] for group in defaults()}
KEYS = sorted(
    {key for chosen in ([], ["trainer=dpo", "peft=lora"]) for key in below(resolved(compose(chosen, []))[0])}
    | {"trainer.args.weight_decay", "data.path", "hydra.run.dir", "hydra.sweep.dir", "hydra.job.name", "hydra"}
)

text = st.text(max_size=12) | st.text(st.sampled_from("abc=,.:~+-$ {}[]()'\"\\/@#%&*!?\n\t0é\x00"), max_size=12)
words = st.sampled_from(
    [
        "null",
        "true",
        "1e-3",
        "-1",
        "0",
        "nan",
        "inf",
        "1e999",
        "10" * 40,
        "abc",
        "'quoted'",
        '"x"',
        "???",
        "",
        " ",
        "${seed}",
        "${name}",
        "${nowhere}",
        "${oc.env:HOME}",
        "${hydra:runtime.cwd}",
        "${",
        "${a",
        "${label:${name}}",
        "[1,2]",
        "{a: 1}",
        "{_target_: os.system, command: ls}",
        "1,2",
        "range(1,3)",
        "choice(a,b)",
        "glob(*)",
        "[",
        "}",
        "../x",
        "/etc/passwd",
        "~",
        "a=b",
        "int(3)",
        "sort(3,1)",
        "os.system",
        "trl.SFTConfig",
        "trl.Nothing",
    ]
)
keys = st.sampled_from(KEYS) | st.sampled_from(KEYS).map(lambda key: key[:-1]) | text
keys |= st.builds(lambda key, more: f"{key}.{more}", st.sampled_from(KEYS), text)
values = words | text | st.integers().map(str) | st.floats().map(str)
chosen = st.sampled_from([f"{group}={option}" for group, names in OPTIONS.items() for option in names])
chosen |= st.builds(lambda group, value: f"{group}={value}", st.sampled_from(sorted(OPTIONS)), values)
overrides = st.builds(
    lambda sign, key, value: f"{sign}{key}={value}", st.sampled_from(["", "", "", "+", "++", "~"]), keys, values
)
lists = st.lists(chosen | overrides | keys | text, max_size=6)


def nodes(inner: st.SearchStrategy) -> st.SearchStrategy:
    names = st.sampled_from([part for key in KEYS for part in key.split(".")]) | text | st.integers() | st.none()
    return st.dictionaries(names, inner, max_size=4)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | text | words | st.dates()
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | nodes(inner), max_leaves=8)


top = st.dictionaries(st.sampled_from(["seed", "name", "trainer", "data", "model", "callbacks", "hydra"]) | text, trees)
entries = st.lists(st.dictionaries(st.sampled_from(["override /trainer", "/model", "data"]) | text, scalars) | text)
headers = st.sampled_from(
    ["# @package _global_", "# @package trainer.args", "# @package ???", "# @package a b", "", "%"]
)


COMMANDS = (["show"], ["show", "trainer.args"], ["why", "seed"], ["--cfg", "job"])


def answer(arguments: list[str]) -> None:
    """One command line in this process: it exits with 0 or 2 and shows no traceback."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(arguments)
    assert code in (0, 2), (arguments, said.getvalue())
    assert "Traceback" not in said.getvalue(), said.getvalue()


def often(examples: int):
    return settings(
        max_examples=examples,
        deadline=timedelta(seconds=10),
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("examples", [80, pytest.param(100_000, marks=pytest.mark.torture)])
def test_any_list_of_overrides_is_answered(examples, folder):
    @often(examples)
    @given(st.sampled_from(COMMANDS), lists)
    def answered(command, overrides):
        answer([*command, *overrides])
        assert not list(folder.iterdir())

    answered()


@pytest.mark.parametrize("examples", [60, pytest.param(20_000, marks=pytest.mark.torture)])
def test_any_yaml_of_a_users_own_is_answered(examples, folder):
    file = folder / "own" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)

    @often(examples)
    @given(headers, top | trees, st.none() | entries, text)
    def answered(header, tree, defaults_list, rest):
        if isinstance(tree, dict) and defaults_list is not None:
            tree = {"defaults": defaults_list, **tree}
        written = f"{header}\n{yaml.safe_dump(tree, allow_unicode=True)}{rest if rest.startswith('#') else ''}"
        file.write_text(written, errors="surrogatepass")
        answer(["show", "--config-dir", "own", "experiment=mine"])
        assert sorted(path.name for path in Path().iterdir()) == ["own"]

    answered()
