"""What a target takes, read from its source, is what Python says of the real thing."""

import dataclasses
import enum
import importlib
import inspect
import subprocess
import sys
import time
import types
import typing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoltrain.config import ConfigError
from smoltrain.config.signatures import COMPUTED, REQUIRED, Parameter, misfit, signature

CONFIGS = [
    "trl.SFTConfig",
    "trl.DPOConfig",
    "trl.KTOConfig",
    "trl.GRPOConfig",
    "trl.RewardConfig",
    "transformers.TrainingArguments",
    "peft.LoraConfig",
    "peft.IA3Config",
    "smoltrain.model.Checkpoint",
]


def located(target: str) -> typing.Any:
    """The real thing, imported as Hydra does it."""
    module, _, rest = target.partition(".")
    found = importlib.import_module(module)
    for part in rest.split("."):
        module = f"{module}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(module)
    return found


# ---------------------------------------------------------------- dataclasses


@pytest.mark.parametrize("target", CONFIGS)
def test_the_fields_of_a_dataclass_are_those_of_the_class_itself(target):
    real, found = located(target), signature(target)
    assert (found.module, found.name) == (real.__module__, real.__qualname__)
    assert found.is_class
    assert not found.open
    assert [*found.parameters] == [f.name for f in dataclasses.fields(real)]
    assert [b for b in found.bases if "mixin" not in b.lower()] == [
        f"{c.__module__}.{c.__qualname__}" for c in real.__mro__[1:-1] if "mixin" not in c.__name__.lower()
    ]
    for f in dataclasses.fields(real):
        default = found.parameters[f.name].default
        if f.default is dataclasses.MISSING:
            assert default is (COMPUTED if f.default_factory is not dataclasses.MISSING else REQUIRED)
        elif default is COMPUTED:
            assert f.name == "optim"  # decided by the version of torch
        else:
            assert default == f.default


@pytest.mark.parametrize("target", CONFIGS)
def test_the_annotations_of_a_dataclass_are_those_of_the_class_itself(target):
    real = located(target)
    for f in dataclasses.fields(real):
        parameter = signature(target).parameters[f.name]
        scope = vars(
            sys.modules[next(c for c in real.__mro__ if f.name in vars(c).get("__annotations__", {})).__module__]
        )
        read = eval(parameter.annotation, dict(scope))
        assert read == (eval(f.type, dict(scope)) if isinstance(f.type, str) else f.type)
        line = parameter.file.read_text().splitlines()[parameter.line - 1]
        assert line.strip().startswith(f"{f.name}:")


@pytest.mark.parametrize("target", CONFIGS)
def test_defaults_fit(target):
    for parameter in signature(target).parameters.values():
        assert parameter.default in (COMPUTED, REQUIRED) or not misfit(parameter.default, parameter)


# ---------------------------------------------------------------- whatever else can be called

TARGETS = [
    "trl.SFTTrainer",
    "trl.DPOTrainer",
    "transformers.EarlyStoppingCallback",
    "transformers.BitsAndBytesConfig",
    "transformers.utils.logging.get_logger",
    "torch.optim.AdamW",
    "datasets.load_dataset",
    "smoltrain.data.local",
    "smoltrain.data.hub",
    "smoltrain.data.mixture",
    "smoltrain.data.sums.conversations",
    "smoltrain.data.encode.Conversations",
    "smoltrain.callbacks.Progress",
    "smoltrain.tracking.Trackio",
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "pathlib.Path.unlink",
    "os.path.join",
]


@pytest.mark.parametrize("target", TARGETS)
def test_parameters_are_those_that_python_shows(target):
    real, found = located(target), signature(target)
    assert (found.module, found.name) == (real.__module__, real.__qualname__)
    assert found.is_class == inspect.isclass(real)
    shown = inspect.signature(real).parameters.values()
    rest = [p.annotation.__args__[0] for p in shown if typing.get_origin(p.annotation) is typing.Unpack]
    declared = [name for typed in rest for name in typing.get_type_hints(typed)]
    named = [p.name for p in shown if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert sorted(found.parameters) == sorted([*named, *declared])
    assert found.open == any(p.kind is p.VAR_KEYWORD and not rest for p in shown)
    for p in shown:
        if p.name in found.parameters:
            default = found.parameters[p.name].default
            assert default is REQUIRED if p.default is p.empty else default in (COMPUTED, p.default)


@pytest.mark.filterwarnings("ignore::Warning")
def test_an_experimental_trainer():
    found = signature("trl.experimental.orpo.ORPOConfig")
    assert (found.module, found.name) == ("trl.experimental.orpo.orpo_config", "ORPOConfig")
    assert found.bases[-1] == "transformers.training_args.TrainingArguments"
    assert {"beta", "learning_rate", "output_dir"} <= found.parameters.keys()


@pytest.mark.parametrize(
    ("target", "module", "name"),
    [
        ("transformers.AutoModelForCausalLM", "transformers.models.auto.modeling_auto", "AutoModelForCausalLM"),
        (
            "transformers.AutoModelForCausalLM.from_pretrained",
            "transformers.models.auto.modeling_auto",
            "AutoModelForCausalLM.from_pretrained",
        ),
        (
            "transformers.AutoProcessor.from_pretrained",
            "transformers.models.auto.processing_auto",
            "AutoProcessor.from_pretrained",
        ),
        ("transformers.models.auto.AutoConfig", "transformers.models.auto.configuration_auto", "AutoConfig"),
        ("transformers.LlamaConfig", "transformers.models.llama.configuration_llama", "LlamaConfig"),
        ("transformers.trainer.Trainer", "transformers.trainer", "Trainer"),
        ("trl.trainer.sft_trainer.Dataset", "datasets.arrow_dataset", "Dataset"),
        ("trl.trainer.sft_config.dataclass", "dataclasses", "dataclass"),
        ("smoltrain.preflight.torch.hub.load", "torch.hub", "load"),
        ("transformers.trainer.os.path.join", "posixpath", "join"),
        ("hydra.utils.instantiate", "hydra._internal.instantiate._instantiate2", "instantiate"),
    ],
)
def test_a_name_is_followed_to_where_it_is_defined(target, module, name):
    assert (signature(target).module, signature(target).name) == (module, name)


def test_fields_of_a_model_s_config_include_those_of_its_base():
    found = signature("transformers.LlamaConfig")
    assert {"hidden_size", "architectures"} <= found.parameters.keys()
    assert found.parameters["hidden_size"].default == 4096
    assert found.open


# ---------------------------------------------------------------- what is not there


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("trl.DPOTraner", "there is no DPOTraner in trl; did you mean trl.DPOTrainer?"),
        ("trll.DPOTrainer", "there is no module trll; did you mean trl?"),
        ("transformers.AutoModelForCasualLM", "in transformers; did you mean transformers.AutoModelForCausalLM?"),
        ("smoltrain.data.encode.Conversation", "did you mean smoltrain.data.encode.Conversations?"),
        ("smoltrain.date.local", "there is no date in smoltrain; did you mean smoltrain.data?"),
        (
            "transformers.AutoModelForCausalLM.from_pretraned",
            "did you mean transformers.AutoModelForCausalLM.from_pret",
        ),
        ("trl.trainer", "trl.trainer is a module"),
        ("smoltrain.data.encode.IGNORED", "smoltrain.data.encode.IGNORED is a value"),
        ("transformers.trainer.os.system", "there is no system in transformers.trainer.os"),
        ("builtins.eval", "builtins has no Python source"),
        ("trl", "a dotted name is wanted"),
        ("trl..SFTConfig", "a dotted name is wanted"),
        ("", "a dotted name is wanted"),
        ("trl.SFTTrainer.__init__.__globals__", "there is no __globals__ in trl.SFTTrainer.__init__"),
    ],
)
def test_what_cannot_be_found_is_named(target, told):
    with pytest.raises(ConfigError) as refused:
        signature(target)
    assert told in str(refused.value)


WORDS = ["trl", "transformers", "torch", "os", "smoltrain", "SFTConfig", "models", "auto", "__init__", "system", "data"]
PART = st.sampled_from(WORDS) | st.text(max_size=12) | st.from_regex(r"[A-Za-z_]\w{0,300}", fullmatch=True)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PART, max_size=5).map(".".join))
def test_any_text_is_found_or_refused_soon_and_imports_nothing(text):
    before, start = set(sys.modules), time.process_time()
    try:
        signature(text)
    except ConfigError as refused:
        assert text in str(refused)
    assert time.process_time() - start < 0.1  # 23 ms at most, on a machine with nothing else to do
    assert set(sys.modules) == before


READ = """
import sys, time
import hydra
from smoltrain.config.signatures import signature
before, start = set(sys.modules), time.process_time()
for target in sys.argv[1:]:
    signature(target)
print(time.process_time() - start)
assert not set(sys.modules) - before, set(sys.modules) - before
assert not {"torch", "transformers", "trl", "numpy", "datasets"} & set(sys.modules)
"""


def test_the_signatures_of_a_run_are_read_in_a_tenth_of_a_second():
    targets = [
        "trl.SFTConfig",
        "trl.DPOConfig",
        "peft.LoraConfig",
        "smoltrain.model.Checkpoint",
        "smoltrain.data.local",
    ]
    command = [sys.executable, "-c", READ, *targets]
    took = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(took) < 0.12


# ---------------------------------------------------------------- a module of one's own

OWN = '''
import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Optional, TypedDict, Union, Unpack

import json as js
from own_pkg import *
from own_pkg.deep import Real as Alias

try:
    from not_installed import Wanted
except ImportError:
    class Wanted:
        def __init__(self, fallback: int): ...

class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"

class Level(int, enum.Enum):
    LOW = 1
    HIGH = 2

class Computed(enum.Enum):
    A = enum.auto()

Size = Union[int, Literal["auto"]]
LEVELS = ["low", "high"]

class Preparation(TypedDict, total=False):
    seed: int
    columns: dict[str, str] | None

class Point(NamedTuple):
    x: int
    y: int = 0

Itself = Union[list["Itself"], "Itself", int]
ENDLESS = [ENDLESS]

class Base:
    def __init__(self, size: int, *, deep: bool = False): ...

class Open(Base):
    def __init__(self, x, **kwargs):
        """def __init__(self, not_me): a text that looks like code
    class Neither: pass"""
        super().__init__(**kwargs)

class Inheriting(Base):
    pass

@dataclass
class Made(Base):
    """Made of fields."""

    shared: ClassVar[int] = 3
    name: str
    colour: Colour = Colour.RED
    size: "Size" = "auto"
    level: str = field(default="low", metadata={"choices": LEVELS})
    many: list[int] = field(default_factory=list)
    hidden: int = field(default=0, init=False)

    def __post_init__(self):
        if isinstance(self.many, str):
            self.many = self.many.split()

def prepared(path: str, **preparation: Unpack[Preparation]): ...

def takes(
    colour: Colour, level: Level, computed: Computed, pair: tuple[int, str], places: Sequence[Path],
    table: dict[str, float], unknown: "js.JSONDecoder", anything: Any, later: Optional["Colour"] = None, /, *rest: int,
    last=[1, 2], itself: Itself = ENDLESS,
): ...

class Outer:
    class Inner:
        @classmethod
        def make(cls, depth: int = 3): ...

        @staticmethod
        def plain(depth): ...

def rebound(not_me): ...
from own_pkg.deep import Real as rebound
rebound = rebound

a = b"\\
def hidden(): pass"
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    name = f"own_{time.time_ns()}"
    package = tmp_path / "own_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("from .deep import Starred, _Private\n__all__ = ['Starred']\n")
    (package / "deep.py").write_text("class Real:\n    pass\nclass Starred:\n    pass\nclass _Private:\n    pass\n")
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_module_of_one_s_own(own):
    def names(target):
        return [*signature(f"{own}.{target}").parameters]

    assert names("prepared") == ["path", "seed", "columns"]
    assert not signature(f"{own}.prepared").open
    assert signature(f"{own}.prepared").parameters["seed"].default is COMPUTED  # total=False: it may be left out
    assert signature(f"{own}.Point").parameters["x"].default is REQUIRED
    assert names("Point") == ["x", "y"]
    assert names("Open") == ["size", "deep", "x"]  # what it hands on is taken by what it extends
    assert not signature(f"{own}.Open").open
    assert signature(f"{own}.Open").bases == (f"{own}.Base",)
    assert names("Inheriting") == ["size", "deep"]
    assert names("Made") == ["name", "colour", "size", "level", "many"]
    assert names("Outer.Inner.make") == names("Outer.Inner.plain") == ["depth"]
    assert names("Wanted") == ["fallback"]
    assert signature(f"{own}.Alias").module == signature(f"{own}.Starred").module == "own_pkg.deep"
    assert signature(f"{own}.rebound").module == "own_pkg.deep"
    assert signature(f"{own}.js.dumps").module == "json"
    for missing in ("Neither", "hidden", "_Private", "not_me"):
        with pytest.raises(ConfigError):
            signature(f"{own}.{missing}")
    assert "own_pkg" not in sys.modules


def test_choices_are_all_that_a_parameter_takes(own):
    made, taken = signature(f"{own}.Made").parameters, signature(f"{own}.takes").parameters
    assert made["colour"].choices == ("red", "blue")
    assert made["colour"].default == "red"
    assert made["level"].choices == ("low", "high")
    assert made["size"].choices == made["name"].choices == taken["computed"].choices == ()
    assert taken["later"].choices == (None, "red", "blue")
    assert taken["last"].default == [1, 2]
    sft = signature("trl.SFTConfig").parameters
    assert sft["log_level"].choices == ("detail", "debug", "info", "warning", "error", "critical", "passive")
    assert sft["bf16"].choices == (None, True, False)


# ---------------------------------------------------------------- what fits


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("name", 3, "a text; for a text, quote it: name=\"'3'\""),
        ("name", {"_target_": "x.y"}, "a text"),
        ("colour", "rde", "one of red, blue; did you mean red?"),
        ("colour", "RED", "one of red, blue; did you mean red?"),
        ("size", 2.0, "a whole number or auto; write 2"),
        ("level", "lo", "one of low, high; did you mean low?"),
        ("many", 3, "a list of whole numbers or a text; write [3]"),
        ("many", [1, "b"], "a list of whole numbers or a text"),
        ("many", "1 2", ""),
    ],
)
def test_a_misfit_is_told_in_words(own, name, value, told):
    assert misfit(value, signature(f"{own}.Made").parameters[name]) == told


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("level", 2, ""),
        ("level", 3, "one of 1, 2"),
        ("level", True, "one of 1, 2"),
        ("computed", "anything", ""),
        ("pair", [1, "a"], ""),
        ("pair", [1], "a list of 2 whole numbers or texts"),
        ("places", ["a", "b"], ""),
        ("places", "a", "a list of texts; write [a]"),
        ("table", {"a": 1, "b": 0.5}, ""),
        ("table", {"a": "b"}, "a mapping to numbers"),
        ("table", {"_target_": "x.y"}, ""),
        ("unknown", 7, ""),
        ("itself", 7, ""),
        ("anything", [7], ""),
        ("later", "red", ""),
        ("later", None, ""),
    ],
)
def test_a_misfit_of_a_function_is_told_in_words(own, name, value, told):
    assert misfit(value, signature(f"{own}.takes").parameters[name]) == told


@pytest.mark.parametrize(
    ("target", "name", "value", "told"),
    [
        ("trl.SFTConfig", "learning_rate", "1e-3", "a number; write 0.001, without quotes"),
        ("trl.SFTConfig", "learning_rate", True, "a number"),
        ("trl.SFTConfig", "max_steps", 1e3, "a whole number; write 1000"),
        ("trl.SFTConfig", "bf16", "yes", "null, true or false; write true, without quotes"),
        ("trl.SFTConfig", "max_length", "none", "null or a whole number; write null"),
        (
            "trl.SFTConfig",
            "eval_strategy",
            False,
            'one of no, steps, epoch; write "no" in quotes, YAML reads a bare no',
        ),
        ("trl.SFTConfig", "log_level", "wrning", "critical, passive; did you mean warning?"),
        ("trl.SFTConfig", "label_names", "labels", "null or a list of texts; write [labels]"),
        ("trl.DPOConfig", "loss_type", 3, "a list of texts or a text; for a text, quote it: loss_type=\"'3'\""),
        ("peft.LoraConfig", "task_type", "CAUSAL_ML", "FEATURE_EXTRACTION; did you mean CAUSAL_LM?"),
        ("peft.LoraConfig", "layer_replication", [[0, 4, 5]], "null or a list of lists of 2 whole numbers"),
        ("peft.LoraConfig", "target_parameters", "a", "null or a list of texts; write [a]"),
        ("transformers.BitsAndBytesConfig", "load_in_4bit", "yes", "true or false; write true, without quotes"),
    ],
)
def test_a_misfit_of_upstream_s_is_told_in_words(target, name, value, told):
    assert told in misfit(value, signature(target).parameters[name])


DOCUMENTED = {
    "learning_rate": [1, 2e-5],
    "lr_scheduler_kwargs": [{"num_cycles": 1}, '{"num_cycles": 1}', None],
    "warmup_steps": [100, 0.1],
    "optim_target_modules": ["all-linear", ["q_proj"]],
    "logging_steps": [5, 0.1],
    "report_to": ["none", "all", "wandb", ["wandb", "tensorboard"]],
    "debug": ["underflow_overflow", "underflow_overflow tpu_metrics_debug", ["underflow_overflow"]],
    "fsdp": [True, "full_shard auto_wrap", ["full_shard"]],
    "fsdp_config": [{"version": 2}, "fsdp.json"],
    "deepspeed": ["ds.json", {"zero_optimization": {"stage": 2}}],
    "include_num_input_tokens_seen": [True, "all", "non_padding"],
    "accelerator_config": [{"split_batches": False}, "a.json"],
    "eval_steps": [50, 0.1, None],
    "num_train_epochs": [1, 0.5],
    "pad_to_multiple_of": [8, None, "auto"],
    "model_init_kwargs": [{"dtype": "bfloat16"}, None],
    "loss_type": ["sigmoid", ["sigmoid", "bco_pair"], "apo_zero"],
    "loss_weights": [[1, 0.5], None],
    "trackio_static_space_id": [False, None, "a/b"],
    "metric_for_best_model": ["eval_loss", None],
    "max_length": [1024, None],
}


@pytest.mark.parametrize("target", ["trl.SFTConfig", "trl.DPOConfig"])
def test_documented_values_fit(target):
    documented = DOCUMENTED | ({"loss_type": ["nll", "dft"]} if target == "trl.SFTConfig" else {})
    for name, parameter in signature(target).parameters.items():
        assert not [value for value in documented.get(name, []) if misfit(value, parameter)], name


@pytest.mark.parametrize("name", ["eval_strategy", "save_strategy", "hub_strategy", "lr_scheduler_type", "optim"])
def test_choices_of_an_enum_are_what_transformers_makes_one_of(name):
    from transformers import trainer_utils, training_args

    kinds = {
        "eval_strategy": trainer_utils.IntervalStrategy,
        "save_strategy": trainer_utils.SaveStrategy,
        "hub_strategy": trainer_utils.HubStrategy,
        "lr_scheduler_type": trainer_utils.SchedulerType,
        "optim": training_args.OptimizerNames,
    }
    parameter = signature("trl.SFTConfig").parameters[name]
    for member in kinds[name]:
        for text in (member.value, member.name):
            try:
                taken = isinstance(kinds[name](text), enum.Enum)
            except ValueError:
                taken = False
            assert taken == (not misfit(text, parameter))


SCALARS = ["int", "float", "bool", "str", "None", "Literal['a', 'no', 3]"]
SIMPLE = st.sampled_from(SCALARS)
ANNOTATIONS = (
    SIMPLE
    | st.lists(SIMPLE, min_size=2, max_size=3).map(" | ".join)
    | st.recursive(
        SIMPLE,
        lambda inner: st.one_of(
            inner.map(lambda a: f"list[{a}]"),
            inner.map(lambda a: f"dict[str, {a}]"),
            inner.map(lambda a: f"Optional[{a}]"),
            st.lists(inner, min_size=1, max_size=3).map(lambda several: f"Union[{', '.join(several)}]"),
            st.lists(inner, min_size=2, max_size=3).map(" | ".join),
            st.lists(inner, min_size=1, max_size=3).map(lambda several: f"tuple[{', '.join(several)}]"),
        ),
        max_leaves=3,
    )
)
PLAIN = (
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.sampled_from(["a", "no", "b", "3"])
)
VALUES = PLAIN | st.recursive(
    PLAIN, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=2), v, max_size=2), max_leaves=3
)


def accepts(kind: typing.Any, value: typing.Any) -> bool:
    """Whether a real type takes plain data, as strictly as YAML tells one from another."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(a) and value == a for a in arguments)
    if origin is list:
        return isinstance(value, list) and all(accepts(arguments[0], item) for item in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(arguments) and all(map(accepts, arguments, value))
    if origin is dict:
        return isinstance(value, dict) and all(accepts(arguments[1], item) for item in value.values())
    if kind is float:
        return type(value) in (int, float)
    return value is None if kind in (None, type(None)) else type(value) is kind


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANNOTATIONS, VALUES)
def test_what_fits_an_annotation_is_what_its_types_take(annotation, value):
    try:
        kind = eval(annotation, vars(typing))
    except TypeError:  # None | None
        return
    parameter = Parameter("x", annotation, REQUIRED, (), Path(__file__), 1)
    told = misfit(value, parameter)
    assert accepts(kind, value) == (told == "")
    if parameter.choices:
        assert all(not misfit(choice, parameter) for choice in parameter.choices)
