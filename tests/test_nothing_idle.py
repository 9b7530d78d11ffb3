"""Every key of a config is read by something in the run it stands in; what is only copied or printed is not read."""

import copy
import dis
import functools
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass
from inspect import CO_VARKEYWORDS
from types import CodeType, FunctionType
from typing import Any

import pytest
from conftest import resolvable
from hydra._internal.instantiate import _instantiate2
from omegaconf import DictConfig

from smoltrain import train
from smoltrain.config import CONF, leaves, plain
from smoltrain.config.groups import options
from smoltrain.data import sums
from smoltrain.data.prepare import Data

# A dataclass that checks, copies or prints itself does not use what is in it; nor does a report, or the record.
PLUMBING = {
    "__init__",
    "__post_init__",
    "_validate_args",
    "__setattr__",
    "__repr__",
    "__str__",
    "__eq__",
    "__reduce_ex__",
}
PLUMBING |= {"to_dict", "to_diff_dict", "to_json_string", "to_sanitized_dict", "save_pretrained"}
WRITERS = ("dataclasses", "copy", "json", "pickle", "omegaconf", "hydra", "smoltrain.report", "smoltrain.runs")
# What a dataclass makes of a field while it checks itself; reading that is reading the field.
DERIVED = {"bf16": "mixed_precision", "fp16": "mixed_precision"}


class Trace:
    """What a run reads of its config: off the config itself, and off what is built from its nodes.

    A value that a function of ours takes is read where each function that it is handed on to has code that loads it.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self.patch = patch
        self.read: set[str] = set()
        self.fields: dict[type, set[str]] = defaultdict(set)  # what was read off objects of a class
        self.where: dict[type, set[str]] = defaultdict(set)  # the nodes that objects of a class were built from
        self.configs: list[dict[str, Any]] = []
        self.watch_config()
        patch.setattr(_instantiate2, "_call_target", functools.partial(self.build, _instantiate2._call_target))
        patch.setattr(train, "train", functools.partial(self.note, train.train))

    def note(self, original: Any, cfg: DictConfig, run: Any, fresh: bool) -> None:
        self.configs.append(plain(cfg))
        original(cfg, run, fresh)

    def unread(self) -> list[str]:
        """The leaves of the configs that ran which nothing has read."""
        found = dict.fromkeys(key for config in self.configs for key, _ in leaves(config))
        built = {key.rpartition(".")[0] for key in found if key.endswith("._target_")}
        read = self.read - built  # who reads an object has not read what is in it; who reads a dict has
        return [
            key
            for key in found
            if not (key.rpartition(".")[2].startswith("_") or any(above in read for above in (key, *parents(key))))
        ]

    # ------------------------------------------------------------ reads off the config

    def watch_config(self) -> None:
        original = DictConfig.__getattr__

        def read(cfg: DictConfig, name: str) -> Any:
            value = original(cfg, name)
            module = sys._getframe(1).f_globals["__name__"]
            ours = module.startswith("smoltrain.") and not module.startswith("smoltrain.config")
            if ours and not isinstance(value, DictConfig):
                self.read.add(str(cfg._get_full_key(name)))
            return value

        self.patch.setattr(DictConfig, "__getattr__", read)

    # ------------------------------------------------------------ reads off what is built

    def build(self, original: Any, target: Any, partial: bool, args: Any, kwargs: dict, key: str) -> Any:
        """Builds what a node describes, and has whatever is read of it noted under the node's key."""
        executed: set[CodeType] = set()

        def entered(frame: Any, event: str, _: Any) -> None:
            if event == "call" and frame.f_globals.get("__name__", "").startswith("smoltrain."):
                executed.add(frame.f_code)

        names = set(kwargs)
        own = isinstance(target, FunctionType)
        if own:
            sys.setprofile(entered)
        try:
            made = original(target, partial, args, kwargs, key)
        finally:
            if own:
                sys.setprofile(None)
        taken: set[str] = set()
        if isinstance(made, Data):
            taken = {*vars(made), *made.preparation, *(name for o in made.origins.values() for name in vars(o))}
            self.watch_data(made, key)
        if own:
            self.read |= {f"{key}.{name}" for name in names - taken if loaded(name, executed)}
        elif partial or not is_dataclass(target):
            codes = [*makers(target)]
            self.read |= {f"{key}.{n}" for n in names if any(n in c.co_varnames and n in loads(c) for c in codes)}
        if isinstance(target, type) and not partial:
            self.watch(target, key)
        return made

    def watch_data(self, data: Data, key: str) -> None:
        """What a function of ours makes of the keys of `data`: sources, which rows of them, and their preparation."""
        self.watch(Data, key)
        for origin in data.origins.values():
            self.watch(type(origin), key)
        data.preparation = Watched(data.preparation, lambda name: self.read.add(f"{key}.{name}"))  # type: ignore

    def watch(self, kind: type, key: str) -> None:
        self.where[kind].add(key)
        if len(self.where[kind]) > 1:
            return
        original = kind.__getattribute__

        def read(built: Any, name: str) -> Any:
            frame = sys._getframe(1)
            known = frame.f_globals.get("__name__", "")
            if not (frame.f_code.co_name in PLUMBING or known.startswith(WRITERS) or name.startswith("__")):
                self.fields[kind].add(name)
                self.read |= {f"{where}.{name}" for where in self.where[kind]}
                for field, derived in DERIVED.items():
                    if derived == name:
                        self.read |= {f"{where}.{field}" for where in self.where[kind]}
            return original(built, name)

        self.patch.setattr(kind, "__getattribute__", read)


class Watched(dict):
    """A dict that tells which of its keys were asked for."""

    def __init__(self, values: Any, tell: Any):
        super().__init__(values)
        self.tell = tell

    def __getitem__(self, key: str) -> Any:
        self.tell(key)
        return super().__getitem__(key)


def parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def loads(code: CodeType) -> set[str]:
    """The names of local variables that a function loads, those within it included."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))}
    inner = [loads(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return {str(name) for name in found}.union(*inner)


def makers(kind: type) -> Iterator[CodeType]:
    """The code of each `__init__` that sees what a class is made with: one that takes any name hands it on."""
    for owner in kind.__mro__:
        own = vars(owner).get("__init__")
        if isinstance(own, FunctionType):
            yield own.__code__
            if not own.__code__.co_flags & CO_VARKEYWORDS:
                return


def loaded(name: str, executed: set[CodeType]) -> bool:
    """Whether every function that ran and takes an argument of this name has code that loads it."""
    takers = [c for c in executed if name in c.co_varnames[: c.co_argcount + c.co_kwonlyargcount]]
    return bool(takers) and all(name in loads(code) for code in takers)


@pytest.fixture
def traced(smoltrain, folder, monkeypatch):
    """Runs one command line and returns the trace of it."""

    def run(*arguments: str) -> Trace:
        with monkeypatch.context() as patch:
            trace = Trace(patch)
            (record,) = smoltrain(*arguments, quick=QUICK)
        assert record["status"] == "completed" and trace.configs
        return trace

    return run


QUICK = ("trainer.args.max_steps=1", "evaluation.max_rows=2", "evaluation.max_new_tokens=2")
FEW = ("data.train_rows=16", "data.test_rows=4")
# perf=auto reads the first, several nodes the second (test_nodes), `smoltrain check` the third: see below.
OTHERS = ["global_batch_size", "hardware.rendezvous", "check.step"]

RUNS = {
    "sft": FEW,
    "dpo": ("trainer=dpo", *FEW),
    "mixture": (
        *("data=[sums,local]", "data.sources.local.path=rows.jsonl", "data.test_rows=4", "tracking=none"),
        "data.weights={sums: 1, local: 1}",  # without them, data.stopping_strategy is a choice that nobody makes
    ),
    "adapter": ("peft=lora", "hardware=auto", "tracking=none", *FEW),
}


def rows(kind: str) -> None:
    """Writes a few rows that this trainer eats."""
    made = sums.preferences(60, 1, 0) if kind == "dpo" else sums.conversations(60, 1, 0)
    (origin,) = made.origins.values()
    origin.source.train.remove_columns("answer").to_json("rows.jsonl")


@pytest.mark.parametrize("name", RUNS)
def test_every_default_is_read(traced, name):
    rows(name)
    assert traced(*RUNS[name]).unread() == OTHERS


def test_what_only_a_check_reads_is_read_there(folder):
    from smoltrain.check import check

    with pytest.MonkeyPatch.context() as patch:
        trace = Trace(patch)
        check(resolvable([*QUICK, *FEW, "check.step=false"]), strict=False, quiet=True)
    assert "check.step" in trace.read


def test_what_is_left_to_the_machine_is_read(traced):
    assert traced("perf=auto", *FEW).unread() == OTHERS[1:]


def test_a_key_that_nothing_reads_is_found(traced, folder, monkeypatch):
    conf = shutil.copytree(CONF, folder / "conf")
    for module in ("compose", "groups", "origins"):
        monkeypatch.setattr(f"smoltrain.config.{module}.CONF", conf)
    monkeypatch.setattr("smoltrain.__main__.CONF", conf)
    base = conf / "trainer" / "base.yaml"
    base.write_text(base.read_text() + "  trackio_space_id: somewhere\n")
    assert traced("tracking=none", *FEW).unread() == [OTHERS[0], "trainer.args.trackio_space_id", *OTHERS[1:]]


@dataclass
class Part:
    used: int
    unused: int


def part(handed_on: int, dropped: int, unused: int) -> int:
    def inner(dropped: int) -> int:
        return handed_on

    return inner(dropped)


def test_reads_are_told_from_plumbing(monkeypatch):
    trace = Trace(monkeypatch)
    monkeypatch.setitem(part.__globals__, "__name__", "smoltrain.part")
    trace.build(
        lambda target, partial, args, kwargs, key: target(**kwargs),
        part,
        False,
        (),
        {"handed_on": 1, "dropped": 2, "unused": 3},
        "a",
    )
    built = trace.build(
        lambda target, partial, args, kwargs, key: target(**kwargs), Part, False, (), {"used": 1, "unused": 2}, "b"
    )
    asdict(built), repr(built), copy.copy(built)
    assert trace.read == {"a.handed_on"}
    assert built.used == 1 and trace.read == {"a.handed_on", "b.used"}


@pytest.mark.parametrize("experiment", options("experiment", []))
def test_every_key_of_an_experiment_is_read(traced, experiment):
    rows(experiment[-3:])
    tiny = ("model=tiny", "data=local", "data.path=rows.jsonl", "data.test_rows=4", "hardware=cpu", "tracking=none")
    assert traced(f"experiment={experiment}", *tiny).unread() == OTHERS
