"""Every value can be traced to who set it: the chains, and the verbs that show them."""

import json
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from smoltrain.__main__ import main
from smoltrain.config import BASE, CONF, leaves, plain
from smoltrain.config.compose import COMPOSING, composed
from smoltrain.config.groups import defaults
from smoltrain.config.origins import Setting, origins
from smoltrain.explain import scalar
from smoltrain.runs import hold, let_go, this_process

OPTIONS = [f"{g}={f.stem}" for g in defaults() for f in sorted((CONF / g).glob("*.yaml")) if f.stem != BASE]


def agreed(overrides: list[str], arguments: list[str]) -> dict[str, list[Setting]]:
    """The chains of a command line, once they were found to end in what Hydra composes, leaf by leaf."""
    config = dict(leaves(plain(composed(overrides, arguments))))
    chains = {key: chain for key, chain in origins(overrides, arguments).items() if not key.startswith("hydra.")}
    ends = {key: chain[-1].value for key, chain in chains.items()}
    assert ends == config and {k: type(v) for k, v in ends.items()} == {k: type(v) for k, v in config.items()}
    return chains


def line_of(setting: Setting) -> str:
    """The line that a setting is said to stand in."""
    name, _, number = setting.where.rpartition(":")
    file = CONF / Path(name).relative_to("conf") if setting.shipped else Path(name)
    return file.read_text().splitlines()[int(number) - 1]


@pytest.mark.parametrize("option", ["", *OPTIONS])
def test_the_chains_of_every_option_end_in_the_config(option):
    for key, chain in agreed([option] if option else [], []).items():
        for setting in chain:
            assert key.rpartition(".")[2] in (setting.where if setting.typed else line_of(setting))


def test_what_omegaconf_does_with_question_marks_links_and_nulls(own):
    flags = own(
        data__own={"_target_": "x", "a": {"b": 1, "c": 2}, "link": "${.a}", "test_rows": "???", "seed": "???"},
        experiment__own="# @package _global_\n"
        + yaml.safe_dump({"data": {"link": {"b": 3}, "a": {}, "seed": 1}, "trainer": {"peft_config": {"r": 4}}}),
        peft__own="# @package trainer.peft_config\n# nothing\n",
    )
    chains = agreed(["data=own", "experiment=own", "peft=own", "+data.a.d=5"], flags)
    assert [(s.value, s.where) for s in chains["data.link.b"]] == [
        (1, "own/data/own.yaml:3"),
        (3, "own/experiment/own.yaml:5"),
    ]
    assert [s.value for s in chains["data.link.c"]] == [2] and "data.link.d" not in chains
    assert [s.value for s in chains["data.test_rows"]] == [500] and [s.value for s in chains["data.seed"]] == [0, 1]
    assert (
        "trainer.peft_config" not in chains and chains["trainer.peft_config.r"][-1].where == "own/experiment/own.yaml:9"
    )
    assert [s.value for s in agreed(["data=local", "data.path=x"], [])["data.path"]] == ["x"]  # ??? was no value
    nulled = agreed(["data=own", "data.a=null", "trainer.args.x=1", "~trainer.args.x"], flags)
    assert [s.value for s in nulled["data.a"]] == [{"b": 1, "c": 2}, None] and "data.a.b" not in nulled


def test_arguments_that_lead_into_links_and_lists(own):
    flags = own(data__own={"_target_": "x", "a": {"b": 1, "c": 2}, "link": "${data.a}", "list": [1, {"k": 2}]})
    chains = agreed(["data=own", "data.link.b=7", "data.list.1.k=8", "+data.link.n={x: 1}"], flags)
    assert [s.where for s in chains["data.link.b"]] == ["data.link.b=7"] and len(chains["data.a.b"]) == 1
    assert [s.value for s in chains["data.list"]] == [[1, {"k": 2}], [1, {"k": 8}]]
    assert chains["data.link.n.x"][-1].where == "+data.link.n={x: 1}" and "data.link.c" not in chains
    assert "data.a.b" not in agreed(["data=own", "~data.link.b"], flags)


# ---------------------------------------------------------------- whatever people write

KEYS = st.sampled_from(["a", "b"])
SCALARS = st.sampled_from(
    [0, 3, 0.5, True, None, "text", "", "???", "${seed}", "a: b", "1e-3", [], [1, "x"], [{"a": 1}]]
)
LINKS = st.sampled_from(["${data.a}", "${data.b}", "${.b}", "${..a}", "${callbacks}", "${data.a.b}"])
TREES = st.recursive(SCALARS | LINKS, lambda below: st.dictionaries(KEYS, below, max_size=3), max_leaves=8)
NODES = st.dictionaries(KEYS, TREES, max_size=3)
PLACES = st.sampled_from(["data", "data", "model", "callbacks", "trainer.args"])
DOTTED = st.builds(lambda place, keys: ".".join([place, *keys]), PLACES, st.lists(KEYS, max_size=2))
ARGUMENTS = st.builds(
    lambda mark, key, value: f"~{key}" if mark == "~" else f"{mark}{key}={inline(value)}",
    st.sampled_from(["", "+", "++", "++", "~"]),
    DOTTED,
    TREES,
)
CHOICES = st.sampled_from([*OPTIONS, "data=own", "experiment=own", "+extra=own", "hydra/job_logging=none", "~peft"])


def inline(value) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(inline, value))}]"
    if isinstance(value, str):
        return value if value.startswith("${") else f"'{value}'"
    return {None: "null", True: "true"}.get(value, str(value)) if not isinstance(value, int | float) else str(value)


@pytest.fixture
def own(folder):
    """Writes YAML files of a user's own, as trees, and returns the flags that find them."""

    def write(**files) -> list[str]:
        for name, text in files.items():
            file = folder / "own" / f"{name.replace('__', '/')}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False))
        return ["--config-dir", str(folder / "own")]

    return write


WRITTEN = given(
    overrides=st.lists(ARGUMENTS | CHOICES, max_size=4),
    data=NODES,
    experiment=st.dictionaries(st.sampled_from(["data", "model", "callbacks"]), NODES, max_size=3),
    extra=NODES,
    package=st.sampled_from(["_global_", "data", "model.b", "callbacks.a", "_group_"]),
    order=st.permutations([{"override /trainer": "dpo"}, {"override /data": "sums"}]),
    listed=st.permutations(["local", "_self_"]),
)


def ends_in_the_config(own, overrides, data, experiment, extra, package, order, listed):
    arguments = own(
        data__own={"defaults": listed, **data},
        experiment__own="# @package _global_\n" + yaml.safe_dump({"defaults": [*order, "_self_"], **experiment}),
        extra__own=f"# @package {package}\n" + yaml.safe_dump(extra),
    )
    try:
        composed(overrides, arguments)
    except (*COMPOSING, AssertionError):  # Hydra asserts where an argument leads below a null
        assume(False)
    agreed(overrides, arguments)


SLOW = list(HealthCheck)
test_the_chains_of_whatever_is_written_end_in_the_config = settings(
    max_examples=15, deadline=None, suppress_health_check=SLOW
)(WRITTEN(ends_in_the_config))
test_the_chains_of_a_thousand_end_in_the_config = pytest.mark.torture(
    settings(max_examples=1000, deadline=None, suppress_health_check=SLOW)(WRITTEN(ends_in_the_config))
)


# ---------------------------------------------------------------- the verbs

MINE = """\
# @package _global_
defaults:
  - override /trainer: dpo
  - override /peft: lora
  - _self_
trainer:
  args: {beta: 0.3}
"""


@pytest.fixture
def said(capsys):
    """Runs a command line and returns what it prints, its runs of spaces as one."""

    def run(*arguments: str, code: int = 0) -> str:
        assert main([*arguments]) == code
        captured = capsys.readouterr()
        return "\n".join(" ".join(line.split()) for line in (captured.out + captured.err).splitlines())

    return run


def at(text: str, file: Path) -> str:
    """The place of the one line of a file that holds a text, as the verbs write it."""
    (number,) = [i for i, line in enumerate(file.read_text().splitlines(), 1) if text in line]
    return f"{file.relative_to(CONF.parent if file.is_relative_to(CONF) else Path.cwd())}:{number}"


def test_why_begins_with_what_is_in_force_and_ends_with_the_default(said, own):
    flags = own(experiment__mine=MINE)
    first, *chain = said("why", "trainer.args.beta", *flags, "experiment=mine", "trainer.args.beta=0.2").splitlines()
    assert first == "trainer.args.beta = 0.2"
    assert chain[:3] == [
        "0.2 trainer.args.beta=0.2 command line",
        f"0.3 {at('beta', Path.cwd() / 'own' / 'experiment' / 'mine.yaml')} overridden",
        f"0.1 {at('beta', CONF / 'trainer' / 'dpo.yaml')} overridden",
    ]
    assert chain[3].startswith("0.1 trl/trainer/dpo_config.py:") and chain[3].endswith("default of trl.DPOConfig")
    assert len(chain) == 4


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["trainer.args.seed", "seed=3"], ["trainer.args.seed = 3", "", "seed = 3", "3 seed=3 command line"]),
        (
            ["trainer.args.learning_rate"],
            [f"0.001 {at('e-3', CONF / 'recipe' / 'tiny_sft.yaml')} recipe=tiny_sft (conf"],
        ),
        (["trainer.args.weight_decay"], ["trainer.args.weight_decay = 0.0", "0.0 transformers/training_args.py:"]),
        (["trainer.args.max_length", "~trainer.args.max_length"], ["removed ~trainer.args.max_length overridden"]),
        (
            ["data.path", "data=local"],
            ["data.path has no value: set data.path=…", "??? conf/data/local.yaml:3 data=loc"],
        ),
        (["trainer.args.output_dir"], ["trainer.args.output_dir = ${hydra:runtime.output_dir} (known when it runs)"]),
        (
            ["trainer", "trainer=dpo"],
            ["trainer = dpo", "dpo trainer=dpo command line", "read: conf/trainer/base.yaml, "],
        ),
        (["data", "trainer=dpo"], ["data = sums_preferences", "sums_preferences conf/trainer/dpo.yaml:", "sums conf/"]),
        (
            ["data", "experiment=smollm3_3b_dpo"],
            ["ultrafeedback_binarized conf/experiment/smollm3_3b_dpo.yaml:5 experiment="],
        ),
        (["recipe"], ["recipe = tiny_sft", "${model}_${trainer} conf/config.yaml:"]),
        (["peft"], ["peft = null"]),
        (["data", "data.path=x.jsonl"], ["local data=local meant by the command line"]),
        (
            ["peft", "experiment=smollm3_3b_dpo", "~peft"],
            ["peft = null", "removed ~peft command line", "lora conf/exp"],
        ),
        (["evaluation"], ["evaluation 2 keys", "max_rows 200 conf/config.yaml:"]),
        (
            ["trainer.peft_config", "peft=lora"],
            ["r 16 conf/peft/lora.yaml:", "null conf/trainer/base.yaml:4 overridden"],
        ),
        (
            ["trainer.peft_config", "peft=lora", "trainer.peft_config=null"],
            ["{_target_: peft.LoraConfig, task_type: CA"],
        ),
        (["hydra.run.dir"], ["multirun/${name}/${stamp:} conf/config.yaml:", "name = default"]),
        (
            ["data.sources.sums.seed", "data=[sums,hub]"],
            ["0 conf/data/sums.yaml:5 data@data.sources.sums=sums (command"],
        ),
    ],
    ids=" ".join,
)
def test_why(said, arguments, lines):
    answer = said("why", *arguments).splitlines()
    for line in lines:
        assert any(found.startswith(line) for found in answer), answer


def test_who_chose_a_file_is_told_through_the_files_that_chose(said, own):
    flags = own(experiment__mine=MINE)
    assert "dpo own/experiment/mine.yaml:3 experiment=mine (command line)" in said(
        "why", "trainer", *flags, "experiment=mine"
    )
    assert "trainer=dpo (own/experiment/mine.yaml:3)" in said("why", "data", *flags, "experiment=mine")
    chain = said("why", "data", "experiment=smollm3_3b_dpo", "data=sums").splitlines()[1:5]
    assert [line.split()[0] for line in chain] == ["sums", "ultrafeedback_binarized", "sums_preferences", "sums"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["why", "trainer.args.lerning_rate"], "did you mean trainer.args.learning_rate?"),
        (["why", "beta", "trainer=dpo"], "did you mean trainer.args.beta?"),
        (["why", "trainer.peft_config.r"], "trainer.peft_config is null, it has no keys (conf/trainer/base.yaml:4)"),
        (["why", "seed", "trainer=dpp"], "did you mean dpo?"),
        (["why", "trainer=dpo"], "smoltrain why takes one key"),
        (["why", "seed", "--strict"], "smoltrain why takes no --strict"),
        (["why", "seed", "--config-dir"], "--config-dir: name the folder"),
        (["show", "perf"], "perf is a group"),
        (["show", "data=local"], "data.path has no value: set data.path=…"),
        (["diff", "sums"], "smoltrain diff takes two"),
        (["diff", "smollm3_3b_dp0", ""], "did you mean smollm3_3b_dpo?"),
        (["diff", "'", ""], "No closing quotation"),
        (["diff", "trainer=dpp", ""], "did you mean dpo?"),
    ],
    ids=" ".join,
)
def test_trouble_is_said_and_exits_2(said, arguments, message):
    assert message in said(*arguments, code=2)


@pytest.mark.parametrize("verb", ["why", "show", "diff"])
def test_each_verb_has_a_short_screen_of_help(said, verb):
    assert said(verb, "--help").startswith(f"smoltrain {verb} ")


def test_why_as_json(capsys):
    assert main(["why", "trainer.args.seed", "seed=3", "--json"]) == 0
    first, followed = json.loads(capsys.readouterr().out)
    assert (first["key"], first["value"], first["chain"][0]["value"]) == ("trainer.args.seed", 3, "${seed}")
    assert followed["chain"] == [
        {"value": 3, "where": "seed=3", "chosen": "command line"},
        {"value": 0, "where": at("of the order of rows", CONF / "config.yaml"), "chosen": ""},
    ]


def resolved(overrides: list[str]) -> dict:
    """The config of a command line, as far as it can be known before it runs."""
    cfg = composed(overrides, [])
    output_dir = plain(cfg)["trainer"]["args"]["output_dir"]
    cfg.trainer.args.output_dir = "later"
    values = plain(cfg, resolve=True)
    values["trainer"]["args"]["output_dir"] = output_dir
    return values


ODD = "data.system_prompt='a: b # c\nd'"


@pytest.mark.parametrize("option", ["", "trainer=dpo", "peft=qlora", ODD, *[o for o in OPTIONS if "experiment" in o]])
def test_what_show_prints_loads_to_the_config(capsys, option):
    overrides = [option] if option else []
    assert main(["show", *overrides]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text) == OmegaConf.to_container(OmegaConf.create(text)) == resolved(overrides)
    nodes = [line for line in text.splitlines() if "#" not in line]
    assert all(line.endswith((":", "{}")) for line in nodes)


def test_a_shown_part_is_a_file_that_could_be_ones_own(capsys, own, folder):
    assert main(["show", "trainer.args", "trainer.args.max_steps=7"]) == 0
    flags = own(extra__shown=capsys.readouterr().out)
    assert agreed(["+extra=shown"], flags)["trainer.args.max_steps"][-1].where == "own/extra/shown.yaml:6"
    assert main(["show", "trainer.args.seed"]) == 0
    assert capsys.readouterr().out == "# @package trainer.args\nseed: 0  # conf/trainer/base.yaml:7, ${seed}\n"


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
WORDS = st.sampled_from(
    ["yes", "No", "null", "~", "1e3", "1e-3", "0x1", "1_0", ".5", "=", "<<", "- a", "a: b", "a #b", " a", "1:2"]
)


@given(st.recursive(PLAIN | WORDS, lambda b: st.lists(b, max_size=3) | st.dictionaries(st.text(), b, max_size=3)))
def test_every_value_is_written_as_yaml_that_reads_it_back(value):
    assert yaml.safe_load(f"key: {scalar(value)}  # comment") == {"key": value}
    assert "\n" not in scalar(value)


def test_diff_of_configs(said):
    assert "- data.path ??? conf/data/local.yaml:3" in said("diff", "data=local", "", code=1)
    assert said("diff", "", "seed=0") == "- no overrides\n+ seed=0\n\nequal: config"
    lines = said("diff", "seed=1 trainer.args.beta=0.2 trainer=dpo", "trainer=dpo peft=lora", code=1).splitlines()
    assert "- trainer.args.beta 0.2 command line" in lines
    assert f"+ trainer.args.beta 0.1 {at('beta', CONF / 'trainer' / 'dpo.yaml')}" in lines
    assert {"- seed 1 command line", "- trainer.args.seed 1 conf/trainer/base.yaml:7, ${seed}"} <= set(lines)
    assert f"- trainer.peft_config null {at('peft_config', CONF / 'trainer' / 'base.yaml')}" in lines
    assert f"+ trainer.peft_config.r 16 {at('r: 16', CONF / 'peft' / 'lora.yaml')}" in lines
    assert not [line for line in lines if "data." in line]
    experiments = said("diff", "smollm3_3b_sft", "smollm3_3b_dpo", code=1)
    sft, dpo = at("name:", CONF / "data" / "smoltalk2.yaml"), at("name:", CONF / "data" / "hub.yaml")
    assert f"- data.name SFT {sft}\n+ data.name null {dpo}" in experiments
    assert "max_steps" not in experiments and "learning_rate" not in experiments


@pytest.fixture
def record(folder):
    """Writes the record of a run that has ended, without running it."""

    def write(name: str, *overrides: str, **facts) -> Path:
        directory = folder / "multirun" / name
        directory.mkdir(parents=True)
        config = resolved([*overrides])
        config["trainer"]["args"]["output_dir"] = str(directory)
        written = {
            "status": "completed",
            "start": str(len(list(folder.glob("multirun/*/*")))),
            "overrides": list(overrides),
            "config_dirs": [],
            "parent": None,
            "steps": 2,
            "objective": 0.5,
            "metrics": {"eval_loss": 0.5, "before/eval_loss": 0.9},
            "versions": {"torch": "2.10"},
            "fingerprints": {"train": "abc"},
            "config": config,
        }
        (directory / "run.json").write_text(json.dumps(written | facts))
        return directory

    return write


def test_diff_of_runs(said, record):
    record("one/20260101-000000-aaaa", "name=one")
    record("two/20260102-000000-bbbb", "name=two", "tracking=none", "data.workers=1")
    assert said("diff", "one", "20260102", code=0).endswith("equal: config, results, versions, data")
    facts = {"objective": 0.25, "metrics": {"eval_loss": 0.25}, "versions": {"torch": "2.11"}, "status": "diverged"}
    third = record("two/20260103-000000-cccc", "trainer.args.learning_rate=0.1", **facts)
    answer = said("diff", "one", "two", code=1).splitlines()
    assert answer[1] == "+ run multirun/two/20260103-000000-cccc, diverged"
    assert "- trainer.args.learning_rate 0.001 conf/recipe/tiny_sft.yaml:3" in answer
    assert "+ trainer.args.learning_rate 0.1 command line" in answer
    assert {"eval_loss 0.5 0.25", "status completed diverged", "steps 2 2", "torch 2.10 2.11"} <= set(answer)
    assert answer[-1] == "equal: data" and not any("name" in line or "output_dir" in line for line in answer)
    assert said("diff", str(third), "trainer.args.learning_rate=0.1").endswith("equal: config")
    assert "3 runs begin so" in said("diff", "2026", "one", code=2)
    assert "no completed run" not in said("diff", "latest", "latest")
    fourth = record("three/20260104-000000-dddd", status="running", process=this_process())
    hold(fourth)
    assert "has not ended" in said("diff", "three", "one", code=2)
    let_go(fourth)


def test_runs_are_the_same_experiment_by_the_parent_they_have_not_by_its_folder(said, record):
    for name in ("a", "b", "c"):
        parent = {"config_hash": "1" if name != "c" else "2", "directory": name, "trainer": "t"}
        record(f"x/{name}", f"model.from_run=/somewhere/{name}", parent=parent)
    assert "equal: config" in said("diff", "multirun/x/a", "b")
    assert "model.from_run" in said("diff", "a", "c", code=1)


def test_diff_as_json(capsys, record):
    record("one/a", "seed=1")
    assert main(["diff", "one", "", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["equal"] is False and answer["config"]["seed"]["a"] == {"value": 1, "where": "command line"}


def test_thousands_of_keys_are_compared_at_once(said, record):
    many = {f"k{i}": i for i in range(3000)}
    for name, value in (("a", 0), ("b", 1)):
        file = record(f"many/{name}") / "run.json"
        run = json.loads(file.read_text())
        run["config"]["data"] |= many | {"k7": value}
        file.write_text(json.dumps(run))
    begin = time.process_time()
    assert "- data.k7 0" in said("diff", "a", "b", code=1)
    assert time.process_time() - begin < 2
