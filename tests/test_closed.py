"""A config that cannot lie: unknown keys and unfit values are found wherever they come from, all of them at once."""

import random
import re
import shutil

import pytest
from omegaconf import OmegaConf

from smoltrain.config import CONF, ConfigError
from smoltrain.config.compose import compose

NODES = {  # node -> what has to be chosen for it to be there
    "": [],
    "evaluation": [],
    "check": [],
    "data": [],
    "encode": [],
    "trainer": [],
    "trainer.args": [],
    "trainer.peft_config": ["peft=lora"],
    "model": [],
    "model.quantization_config": ["peft=qlora"],
    "callbacks.progress": [],
    "callbacks.tracking": [],
}


def errors(*overrides: str, arguments: tuple[str, ...] = ()) -> list[str]:
    """The lines that a command line is refused with."""
    with pytest.raises(ConfigError) as error:
        compose(list(overrides), list(arguments))
    return str(error.value).splitlines()


def nested(key: str, value: object) -> dict:
    """`a.b.c` and a value as `{"a": {"b": {"c": value}}}`."""
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


@pytest.fixture
def own(folder):
    """Writes a YAML file into the user's own folder and returns the arguments that find it."""

    def write(name: str, tree: dict, header: str = "_global_") -> tuple[str, ...]:
        file = folder / "own" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# @package {header}\n# Mine\n{OmegaConf.to_yaml(OmegaConf.create(tree))}")
        return ("--config-dir", "own")

    return write


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_an_unknown_key_on_the_command_line_is_an_error(node, prefix):
    key = f"{node}.nonsense" if node else "nonsense"
    (line,) = errors(*NODES[node], f"{prefix}{key}=1")
    assert line.startswith(f"{key}=1 is not a ") and line.endswith("(command line)")


@pytest.mark.parametrize("node", NODES)
def test_an_unknown_key_in_an_experiment_is_an_error_with_its_line(node, own):
    key = f"{node}.nonsense" if node else "nonsense"
    arguments = own("experiment/mine.yaml", nested(key, 1))
    line = 3 + key.count(".")
    assert f"{key}=1 is not a " in (said := errors(*NODES[node], "experiment=mine", arguments=arguments))[0]
    assert len(said) == 1 and said[0].endswith(f"(own/experiment/mine.yaml:{line})")


def test_an_unknown_key_in_an_own_option_is_an_error_with_its_line(own):
    arguments = own("model/mine.yaml", {"defaults": ["tiny@_global_", "_self_"], "model": {"dtyp": "float16"}})
    (line,) = errors("model=mine", arguments=arguments)
    assert line == (
        "model.dtyp=float16 is not a field of smoltrain.model.Checkpoint; did you mean model.dtype?"
        "  (own/model/mine.yaml:7)"
    )


def test_an_unknown_key_in_a_shipped_file_is_an_error_too(folder, monkeypatch):
    copy = shutil.copytree(CONF, folder / "conf")
    for module in ("smoltrain.config.compose", "smoltrain.config.groups", "smoltrain.config.origins"):
        monkeypatch.setattr(f"{module}.CONF", copy)
    base = copy / "trainer" / "base.yaml"
    base.write_text(base.read_text() + "  max_lenght: 3\n")
    (line,) = errors()
    assert "did you mean trainer.args.max_length?" in line and "trainer/base.yaml:" in line


@pytest.mark.parametrize(
    "added",
    [
        "+trainer.args.weight_decay=0.1",
        "trainer.args.weight_decay=0.1",
        "++trainer.args.max_length=9",
        "trainer.peft_config.use_dora=true",
        "+trainer.peft_config.use_dora=true",
    ],
)
def test_a_key_is_added_where_the_target_takes_it(added):
    compose(["peft=lora", added], [])


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("seed=abc", "whole number"),
        ("seed=1.5", "whole number"),
        ("seed=null", "whole number"),
        ("name=[a]", "one folder of multirun"),
        ("threads=true", "whole number"),
        ("evaluation.max_rows=many", "whole number"),
        ("check.step=maybe", "true or false"),
        ("data.on_too_long=trunkate", "did you mean truncate?"),
        ("data.test_share=half", "number"),
        ("data.workers=two", "whole number"),
        ("encode.train_on=assistent", "did you mean assistant?"),
        ("model.dtype=float99", "float32, bfloat16, float16"),
        ("model.attn_implementation=sdpaa", "did you mean sdpa?"),
        ("model.attn_implementation=owner/kernel", "sdpa"),
        ("trainer.args.learning_rate=abc", "a number"),
        ("trainer.args.learning_rate=true", "a number"),
        ("trainer.args.bf16=2.5", "true or false"),
        ("trainer.args.logging_steps=[1]", "a number"),
        ("trainer.args.lr_scheduler_type=cosin", "did you mean cosine?"),
        ("trainer.args.log_level=loud", "one of detail, debug, info"),
        ("trainer.args.optim=adamw_trch", "did you mean adamw_torch?"),
        ("trainer.args.eval_strategy=stpes", "did you mean steps?"),
        ("trainer.args.packing_strategy=bdf", "did you mean bfd?"),
        ("trainer.args.max_length=1e3", "whole number"),
        ("trainer.peft_config.r=big", "whole number"),
        ("callbacks.progress._partial_=5", "_partial_"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_that_says_what_is_allowed(override, allowed):
    (line,) = errors("peft=lora", override)
    assert line.startswith(override.partition("=")[0]) and allowed in line and "(command line)" in line


def test_everything_wrong_is_said_at_once(own):
    arguments = own("experiment/mine.yaml", {"seed": "abc", "trainer": {"args": {"max_lenght": 3}}, "evaluatoin": 4})
    said = errors(
        "experiment=mine",
        "model=tinny",
        "trainer=dpoo",
        "lerning_rate=1",
        "trainer.args.batea=0.1",
        "data.train_rows=x",
        "threads=1,2",
        "name=a=b}",
        "seed.x=1",
        arguments=arguments,
    )
    begins = [
        "model=tinny: there is no such option; did you mean tiny?",
        "trainer=dpoo: there is no such option; did you mean dpo?",
        "lerning_rate=1 is not a key of a run; did you mean trainer.args.learning_rate?",
        "trainer.args.batea=0.1 is not a field of trl.DPOConfig; did you mean trainer.args.beta?",
        "data.train_rows=x: ",
        "threads=1,2: add -m",
        "seed=abc: ",
        "trainer.args.max_lenght=3 is not a field of trl.DPOConfig; did you mean trainer.args.max_length?",
        "evaluatoin=4 is not a key of a run; did you mean evaluation?",
    ]
    for begin in begins:
        assert any(line.startswith(begin) for line in said), (begin, said)
    assert sum("own/experiment/mine.yaml:" in line for line in said) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.args.lerning_rate=1", "did you mean trainer.args.learning_rate?"),
        ("trainer.arg.beta=1", "did you mean trainer.args"),
        ("modle=tiny", "did you mean model?"),
        ("+learning_rate=1e-3", "did you mean trainer.args.learning_rate?"),
        ("lr=1e-3", "lr=1e-3 is not a key of a run; write trainer.args.learning_rate=1e-3"),
        ("trainer=sft,dpo", "trainer=sft,dpo: add -m to run each of them"),
        ("seed=range(1,3)", "seed=range(1,3): add -m to run each of them"),
        ("callbacks=null", "callbacks.progress=null"),
        ("learning_rate=1e-3", "did you mean trainer.args.learning_rate?"),
        ("trainer.weight_decai=1", "did you mean trainer.args.weight_decay?"),
        ("train_rows=9", "did you mean data.train_rows?"),
        ("peft.r=8", "peft is a group"),
        ("experiment=smollm3_3b_stf", "did you mean smollm3_3b_sft?"),
        ("trainer=dpoo", "there is no such option; did you mean dpo? Choose one of: dpo, sft"),
        ("trainer=null", "Choose one of: dpo, sft"),
        ("~trainer.args.beta", "nothing of that name"),
        ("~seed", "seed has no value"),
        ("~model.dtype", "model.dtype has no value"),
        ("~data.on_bad_row", "data.on_bad_row has no value"),
        ("~data.workers", "nothing of that name"),
        ("+seed=3", "it is there already; set it without the +"),
        ("trainer.args=5", "trainer.args"),
        ("evaluation=null", "evaluation"),
        ("seed=${nowhere}", "nowhere"),
        ("name=${name}", "name"),
        ("trainer.model=x", "a run hands it over itself"),
        ("data=local", "data.path has no value: set data.path=…"),
        ("callbacks.x=3", "it needs a _target_"),
    ],
)
def test_a_mistake_is_named_with_its_mend(override, message):
    assert message in "\n".join(errors(override))


def test_a_name_may_be_a_number_and_an_adapter_is_taken_back(smoltrain):
    from smoltrain.config.overrides import spelled_out

    assert compose(spelled_out(["name=2026"]), []).name == "2026"
    assert compose(spelled_out(["experiment=smollm3_3b_dpo", "peft=null"]), []).trainer.peft_config is None


def test_a_file_that_would_not_be_read_is_refused(own):
    arguments = own("trainer/dpo.yaml", {"seed": 3})
    assert "own/trainer/dpo.yaml" in errors(arguments=arguments)[0]


def test_a_wrong_option_in_a_users_file_is_named_with_its_line(own):
    arguments = own("experiment/mine.yaml", {"defaults": [{"override /trainer": "dpoo"}, "_self_"]})
    (line,) = errors("experiment=mine", arguments=arguments)
    assert "did you mean dpo?" in line and "own/experiment/mine.yaml:4" in line


@pytest.mark.parametrize(
    ("written", "line", "said"),
    [
        ("defaults:\n  override /model: tiny", 2, "defaults is a list: each of its lines begins with -"),
        ("defaults:\n  - override /trainer: [dpo]", 3, "trainer: one option is chosen, - override /trainer: sft"),
        ("defaults:\n  - override /trainer:\n      dpo: 1", 3, "trainer: one option is chosen"),
        ("defaults:\n  - override /trainer: dpo\n  - _self", 4, "_self: write _self_"),
        ("defaults:\n  - override model: tiny", 3, "model is chosen already; write - override /model: tiny"),
        ("defaults:\n  - /model: tiny", 3, "model is chosen already; write - override /model: tiny"),
        ("defaults:\n  - override /modle: tiny", 3, "modle: there is no such group; did you mean model?"),
        ("defaults:\n  - override /trainer:dpo", 3, "a blank follows the colon, - override /trainer: dpo"),
        ("defaults:\n  - [dpo]", 3, "an entry of a defaults list chooses one option"),
        ("defaults:\n  - {override /trainer: dpo, override /model: tiny}", 3, "an entry of a defaults list"),
        ("defaults:\n  - smollm3_3b_stf", 3, "did you mean smollm3_3b_sft?"),
        ("defaults:\n  - override /experiment: smollm3_3b_sft", 3, "by its name alone, - smollm3_3b_sft"),
        ("defaults:\n  - override /model: tiny\n  - smollm3_3b_sft", 4, "it stands before the first override"),
        ("trainer:\n  args:\n  learning_rate: 1", 3, "trainer.args=null: it has keys of its own; in a file they stand"),
        ("trainer:\nargs:\n  learning_rate: 1", 2, "trainer=null: it has keys of its own"),
        ("trainer.args.learning_rate: 1", 2, "in a file each part of a key stands on a line of its own"),
    ],
)
def test_a_slip_in_a_users_file_is_named_with_its_line(folder, written, line, said):
    file = folder / "own" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"# @package _global_\n{written}\n")
    (text,) = errors("experiment=mine", arguments=("--config-dir", "own"))
    assert said in text and f"own/experiment/mine.yaml:{line}" in text


def test_a_slip_in_a_file_that_another_names_is_found_too(own):
    own("experiment/first.yaml", {"defaults": [{"override /trainer": "dpoo"}]})
    arguments = own("experiment/mine.yaml", {"defaults": ["first", "_self_"]})
    (line,) = errors("experiment=mine", arguments=arguments)
    assert line.startswith("own/experiment/first.yaml:4: trainer=dpoo: there is no such option; did you mean dpo?")


@pytest.mark.parametrize("header", ["# @package _global", "# @package: _global_", "# Mine\n# @package _global_"])
def test_a_header_that_hydra_passes_over_is_said(folder, header):
    file = folder / "own" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"{header}\nseed: 3\n")
    said = errors("experiment=mine", arguments=("--config-dir", "own"))
    assert said[-1] == "own/experiment/mine.yaml: its first line has to be `# @package _global_`"


@pytest.mark.parametrize("value", [1, {"_target_": None}], ids=str)
@pytest.mark.parametrize("key", ["[", "]", "a]b", "a[", "[\0", "a.b"])
def test_a_key_that_no_path_can_name_is_an_error_too(own, key, value):
    (line,) = errors("experiment=mine", arguments=own("experiment/mine.yaml", {key: value}))
    said = "is not a key of a run" if value == 1 else "_target_=null: it has to be the dotted name"
    assert said in line and "own/experiment/mine.yaml:" in line and line.isprintable()


def test_a_folder_that_was_forgotten_is_named(own):
    own("experiment/mine.yaml", {"seed": 3})
    (line,) = errors("experiment=mine")
    assert "no such option without --config-dir own, where own/experiment/mine.yaml is" in line


def test_a_misspelt_field_is_met_with_the_right_one(folder):
    """One letter swapped, dropped or doubled, in any field of the class: the error names that field, or one as near."""
    from smoltrain.config.signatures import signature

    rng, right, meant = random.Random(0), 0, {}
    fields = sorted(name for name in signature("trl.SFTConfig").parameters if len(name) > 5)
    chosen = rng.sample(fields, 40)
    for name in chosen:
        i = rng.randrange(1, len(name) - 1)
        wrong = rng.choice(
            [
                name[:i] + name[i + 1 :],
                name[:i] + name[i] + name[i:],
                name[: i - 1] + name[i] + name[i - 1] + name[i + 1 :],
            ]
        )
        if wrong in fields or wrong == name:
            right += 1
        else:
            meant[wrong] = name
    lines = errors(*(f"trainer.args.{wrong}=1" for wrong in meant))
    assert len(lines) == len(meant)
    for wrong, name in meant.items():
        (line,) = (line for line in lines if line.startswith(f"trainer.args.{wrong}=1 "))
        found = re.search(r"did you mean trainer\.args\.(\w+)\?", line)
        right += found is not None and found[1] == name
    assert right >= 38


PART = "import transformers\n\n\nclass Part(transformers.TrainerCallback):\n    def __init__(self):\n        {}\n"


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("raise ValueError('no such file of mine')", 2, "callbacks: no such file of mine (FILE:6, in __init__)"),
        ("{}['absent']", 1, "KeyError: 'absent'"),
    ],
)
def test_an_exception_in_a_users_own_part_shows_their_frame_and_not_hydras(forked, folder, body, code, said):
    (folder / "parts.py").write_text(PART.format(body))
    few = ["data.train_rows=16", "data.test_rows=8", "evaluation.max_rows=0", "tracking=none"]
    done = forked("--allow", "parts", "callbacks.own={_target_: parts.Part}", *few)
    assert done.wait() == code, done.stderr
    assert said.replace("FILE", str(folder / "parts.py")) in done.stderr
    assert 'parts.py", line 6, in __init__' in done.stderr or code == 2
    assert "site-packages" not in done.stderr.replace("site-packages/smoltrain", "")


@pytest.mark.parametrize("place", range(3))
def test_m_may_stand_anywhere(smoltrain, place):
    arguments = ["seed=1,2", "trainer.args.max_steps=1"]
    arguments.insert(place, "-m")
    from smoltrain.__main__ import main, split

    flags, overrides = split(arguments)
    assert flags == ["-m"] and "seed=1,2" in overrides
    assert main([*arguments, "trainer.args.lerning_rate=1"]) == 2
