"""`smoltrain check`: it says what is there, and whatever would stop a run stops here, before a model is loaded."""

import csv
import gzip
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHARED

from smoltrain.__main__ import main
from smoltrain.model import Checkpoint, locate

SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
FEW = ("data.train_rows=32", "data.test_rows=10")


@pytest.fixture
def unloadable(monkeypatch):
    """A world in which nothing may load a model."""

    def load(self, tokenizer):
        raise AssertionError("a model is being loaded")

    monkeypatch.setattr(Checkpoint, "model", load)


@pytest.fixture
def checked(capfd):
    """Runs `smoltrain check` and returns its exit code, its facts, what it printed and what it complained of."""

    def run(*arguments):
        code = main(["check", *arguments, "--json", "facts.json"])
        out, err = capfd.readouterr()
        return code, json.loads(Path("facts.json").read_text()), out, err

    return run


def rows(count=60, **more):
    return [{"prompt": f"How much is {i}?", "completion": f"It is {i}.", **more} for i in range(count)]


def pairs(count=60):
    return [{"prompt": f"How much is {i}?", "chosen": f"It is {i}.", "rejected": f"No, {i + 1}!"} for i in range(count)]


def write(name, lines):
    Path(name).write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


# ---------------------------------------------------------------- what it says


def test_what_is_there_what_is_learned_and_what_it_costs(checked):
    write("mine.jsonl", [*rows(300), *rows(3), {"prompt": "word " * 200, "completion": "yes"}])
    write("held.jsonl", [*rows(2), *({"prompt": f"Is it {i}?", "completion": "Yes."} for i in range(8))])
    given = ("data.path=mine.jsonl", "data.test_path=held.jsonl")
    code, facts, out, err = checked(*given, "trainer.args.max_length=100", "threads=1")
    assert (code, err) == (0, "")
    source = facts["sources"]["mine"]
    assert source["shape"] == "prompt_completion"
    train = source["train"]
    assert (train["given"], train["kept"], train["dropped"]) == (304, 303, {"all prompt at max_length": 1})
    assert 0 < train["trained"] < train["tokens"] and train["duplicates"] == 3 and facts["repeated_questions"] == 2
    assert train["held_out_too"] == 4 and source["test"]["kept"] == 10
    assert sum(facts["lengths"]["rows"]) == 314 and facts["lengths"]["longest"] > 200
    assert [role for _, role in facts["samples"][0]] == ["context", "learned"]
    assert facts["samples"][0][1][0].endswith("<|im_end|>")
    cost = facts["budget"]
    assert cost["steps"]["total"] == -(-train["kept"] // 16) and cost["steps"]["effective_batch"] == 16
    assert cost["memory"]["total"] > cost["memory"]["weights"] > 0 and cost["disk"]["total"] < cost["disk"]["free"]
    assert cost["step"]["seconds"] > 0 and cost["seconds"] > cost["step"]["seconds"] and cost["padding"] == 0
    assert "training equals the text of serving" in out and "⟦It is" in out and "ready" in out
    assert any("1 of" in line and "all prompt" in line for line in facts["warnings"])
    assert not Path("multirun").exists()


def test_pairs_are_weighed_against_each_other(checked):
    wordy = [{**row, "chosen": row["chosen"] + " I am very sure of it" * 3} for row in pairs()]
    write("pairs.jsonl", wordy)
    code, facts, out, _ = checked("trainer=dpo", "data.path=pairs.jsonl", "check.step=false")
    bias = facts["preferences"]
    assert code == 0 and bias["chosen_longer"] == 1 and bias["chosen_tokens"] > 2 * bias["rejected_tokens"]
    assert [role for _, role in facts["samples"][0]] == ["context", "learned", "rejected"]
    assert any("length alone tells them apart" in line for line in facts["warnings"])
    assert facts["sources"]["pairs"]["train"]["trained"] < facts["sources"]["pairs"]["train"]["tokens"]
    assert facts["budget"]["memory"]["reference"] == 0 and "equal 0" in out
    few = ("trainer.args.max_steps=5", "--strict")  # to which a reference of all rows would not be worth it
    code, facts, _, _ = checked("trainer=dpo", "data.path=pairs.jsonl", "check.step=false", *few)
    assert code == 1 and facts["budget"]["memory"]["reference"] > 0


def test_padding_is_reckoned_where_it_is_computed(checked):
    write("mine.jsonl", [*rows(60), *({"prompt": f"{i} " + "word " * 60, "completion": "yes"} for i in range(20))])
    costs = {}
    for asked in ("true", "false"):
        given = ("data.path=mine.jsonl", "data.test_rows=8", f"trainer.unpadded={asked}")
        code, facts, out, _ = checked(*given, "check.step=true")
        costs[asked] = cost = facts["budget"]
        assert code == 0 and f"{cost['padding']:.0%} of a batch is padding" in out
    without, stock = costs["true"], costs["false"]
    assert without["padding"] == 0 and 0.3 < stock["padding"] < 0.8
    ratio = [cost["seconds"] / cost["step"]["seconds_of_batch"] / cost["steps"]["total"] for cost in (without, stock)]
    assert ratio[0] < 0.6 and ratio[1] > 0.8  # of a batch on average, in the longest one


def test_packed_rows_are_reckoned_as_long_as_can_be(checked):
    packed = ("trainer.args.packing=true", "trainer.args.max_length=128", "trainer.args.per_device_train_batch_size=4")
    code, facts, _, _ = checked("data.train_rows=200", "data.test_rows=8", *packed)
    cost, train = facts["budget"], facts["rows"]["train"]
    assert code == 0 and cost["longest"] == 128 and cost["steps"]["total"] == -(-train["tokens"] // (4 * 128))
    assert cost["padding"] < 0.02 and cost["step"]["length"] == 128 and cost["seconds"] > 0


def test_rows_that_trl_tokenises_are_looked_at_too(checked):
    conf = str(Path(__file__).parent / "conf")
    code, facts, out, _ = checked("--config-dir", conf, "trainer=kto", *FEW)
    assert code == 0 and facts["budget"]["step"]["length"] < 100 and "how many is not known" in out


def test_strict_is_content_where_nothing_is_odd(checked):
    assert checked(*FEW, "check.step=false", "--strict")[0] == 0


def test_json_alone_on_the_standard_output(capfd):
    assert main(["check", *FEW, "check.step=false", "--json", "-"]) == 0
    assert json.loads(capfd.readouterr().out)["errors"] == []
    assert main(["check", "--json", "-", "trainer.args.lerning_rate=1"]) == 2
    assert "did you mean trainer.args.learning_rate" in json.loads(capfd.readouterr().out)["errors"][0]


def test_a_stream_is_looked_at_and_has_to_be_told_its_end(checked):
    write("mine.jsonl", rows(300))
    code, facts, _, err = checked("data.path=mine.jsonl", "data.streaming=true", "check.step=false")
    assert code == 2 and "set trainer.args.max_steps" in err and facts["errors"]
    code, facts, _, _ = checked(
        "data.path=mine.jsonl", "data.streaming=true", "check.step=false", "trainer.args.max_steps=7"
    )
    assert code == 0 and facts["streamed"]
    assert facts["budget"]["steps"] | {"total": 7, "epochs": None} == facts["budget"]["steps"]


def test_help_explains_the_flags(capfd):
    assert main(["check", "--help"]) == 0
    out = capfd.readouterr().out
    assert all(word in out for word in ("--json", "--strict", "check.step", "Exit codes"))
    assert main(["check", "--jsn=a"]) == 2 and "its flags are" in capfd.readouterr().err


def test_a_long_sample_keeps_its_boundaries():
    from smoltrain.check import LINES, height, sample

    segments = [("<user>\n" + "word " * 900, "context"), ("yes " * 900 + "<end>", "learned"), ("no<end>", "rejected")]
    text = sample(segments, 80, coloured=False).plain
    assert height(text, 80) <= LINES + 3 and text.count("letters …") == 2
    assert "⟦yes " in text and "<end>⟧\n⟨no<end>⟩" in text
    turns = [(f"turn {i} ", ("context", "learned")[i % 2]) for i in range(40)]
    text = sample(turns, 80, coloured=False).plain
    assert "turn 0" in text and "⟦turn 39 ⟧" in text and "30 more parts" in text


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not beside this checkout")
@pytest.mark.parametrize(
    ("trainer", "file", "shape"),
    [
        ("sft", "alpaca_en_demo.json", "alpaca"),
        ("sft", "gsm8k_test.jsonl", "question_answer"),
        ("dpo", "dpo_en_demo.json", "sharegpt_preference"),
    ],
)
def test_real_rows_are_all_accounted_for(checked, trainer, file, shape):
    given = len(json.loads((SHARED / file).read_text())) if file.endswith(".json") else 1319
    code, facts, _, _ = checked(f"trainer={trainer}", f"data.path={SHARED / file}", "check.step=false")
    (source,) = facts["sources"].values()
    assert code == 0 and source["shape"] == shape
    assert sum(source[split]["kept"] + sum(source[split]["dropped"].values()) for split in ("train", "test")) == given


# ---------------------------------------------------------------- what would stop a run


def no_template():
    """The tiny model without a chat template."""
    shutil.copytree(locate("pkg://smoltrain/tiny"), "bare")
    Path("bare/chat_template.jinja").unlink(missing_ok=True)
    config = json.loads(Path("bare/tokenizer_config.json").read_text())
    Path("bare/tokenizer_config.json").write_text(json.dumps(config | {"chat_template": None}))


def no_weights():
    shutil.copytree(locate("pkg://smoltrain/tiny"), "bare", ignore=shutil.ignore_patterns("*.safetensors"))


def large_tokenizer():
    """A model with fewer embeddings than its tokenizer has tokens."""
    shutil.copytree(locate("pkg://smoltrain/tiny"), "bare")
    config = json.loads(Path("bare/config.json").read_text())
    Path("bare/config.json").write_text(json.dumps(config | {"vocab_size": 100}))


def few():
    write("few.jsonl", rows(12))


def packed_away():
    write("long.jsonl", [{"prompt": "word " * 100, "completion": "yes"}] * 40)


STOPPERS = {
    "scheduler": (
        ["trainer.args.lr_scheduler_type=cosin"],
        r"trainer.args.lr_scheduler_type=cosin: .*did you mean cosine",
    ),
    "scheduler lacks": (
        ["trainer.args.lr_scheduler_type=cosine_with_min_lr"],
        r"trainer.args.lr_scheduler_type: .*min_lr",
    ),
    "optimizer": (["trainer.args.optim=adam_torch"], r"trainer.args.optim=adam_torch: .*did you mean adamw_torch"),
    "optimizer lacks": (
        ["trainer.args.optim=galore_adamw", "trainer.args.optim_target_modules=all-linear"],
        r"trainer.args.optim: .*install `galore_torch`",
    ),
    "strategy": (["trainer.args.eval_strategy=step"], r"trainer.args.eval_strategy=step: .*did you mean steps"),
    "order": (["trainer.args.train_sampling_strategy=grup"], r"train_sampling_strategy=grup: .* one of random"),
    "max_length": (["trainer.args.max_length=-5"], r"trainer.args.max_length=-5: at least 1"),
    "empty batch": (["trainer.args.per_device_train_batch_size=0"], r"per_device_train_batch_size=0: at least 1"),
    "no step": (["trainer.args.max_steps=0"], r"trainer.args.max_steps=0: at least 1, or -1"),
    "no epoch": (["trainer.args.num_train_epochs=0"], r"trainer.args.num_train_epochs=0: more than 0"),
    "packing": (["trainer.args.packing=true", "trainer.args.max_length=null"], r"max_length=null: packing fills rows"),
    "variable": (["+model.chat_template_kwargs.thinking=false"], r"the chat template reads no variable thinking"),
    "stream": (
        [
            "data.path=few.jsonl",
            "data.streaming=true",
            "trainer.args.max_steps=2",
            "trainer.args.dataloader_num_workers=1",
        ],
        r"data.streaming=true: its rows are counted as they are read.*dataloader_num_workers=0",
    ),
    "loss of DPO": (["trainer=dpo", "trainer.args.loss_type=sigmod"], r"loss_type=sigmod: DPOTrainer knows .*sigmoid"),
    "loss of SFT": (["trainer.args.loss_type=nlll"], r"loss_type=nlll: .*one of nll, dft"),
    "best": (
        ["trainer.args.load_best_model_at_end=true"],
        r"load_best_model_at_end=true: the best is found by evaluating",
    ),
    "best of what": (["trainer.args.save_strategy=best", "trainer.args.eval_strategy=steps"], r"metric_for_best_model"),
    "metric": (
        [
            "trainer.args.metric_for_best_model=eval_los",
            "trainer.args.save_strategy=best",
            "trainer.args.eval_strategy=steps",
        ],
        r"metric_for_best_model=eval_los: .*did you mean eval_loss",
    ),
    "objective": (["objective=exactmatch"], r"objective=exactmatch: what is measured is called"),
    "objective of DPO": (
        ["objective=eval_rewards/accuracies"],
        r"objective=.*: not measured here; choose one of .*eval_loss",
    ),
    "model folder": (["model.name_or_path=./no/model"], r"model.name_or_path=./no/model: there is no such folder"),
    "model name": (["model.name_or_path=org/none"], r"model.name_or_path=org/none: no copy"),
    "weights": (["model.name_or_path=./bare"], r"name_or_path=./bare: no weights", no_weights),
    "no template": (["model.name_or_path=./bare"], r"model.chat_template: .*no chat template.*chatml", no_template),
    "embedding": (["model.name_or_path=./bare"], r"\d+ tokens in the tokenizer, 100 in the model", large_tokenizer),
    "dtype": (["model.dtype=float99"], r"model.dtype=float99: .* takes one of float32, bfloat16"),
    "end of turn": (["model.eos_token=<nope>"], r"model.eos_token=<nope>: not a token"),
    "LoRA": (
        ["peft=lora", "trainer.peft_config.target_modules=[q_prj]"],
        r"target_modules: q_prj matches no layer.*q_proj",
    ),
    "LoRA in part": (
        ["peft=lora", "trainer.peft_config.target_modules=[q_proj,x]"],
        r"target_modules: x matches no layer",
    ),
    **{
        f"LoRA's {field}": (["peft=lora", f"++trainer.peft_config.{field}={value}"], message)
        for field, value, message in (
            ("rank_pattern", "{q_prj: 4}", "rank_pattern: q_prj matches no layer"),
            (
                "alpha_pattern",
                "{lm_head: 4}",
                "alpha_pattern: lm_head .* that gets an adapter",
            ),
            ("exclude_modules", "[proj]", "exclude_modules: proj matches no layer"),
            ("modules_to_save", "[lm_hed]", "modules_to_save: lm_hed matches no layer"),
            ("target_modules", "'['", r"trainer.peft_config: \[ is no regular expression, unterminated"),
        )
    },
    "kind for DPO": (
        ["trainer=dpo", "data=sums"],
        r"data: smoltrain.dpo.DPOTrainer eats preference rows .*these are conversation",
    ),
    "kind for SFT": (
        ["data=sums_preferences"],
        r"data: smoltrain.sft.SFTTrainer eats conversation rows .*these are preference",
    ),
    "all prompt": (
        ["data.path=long.jsonl", "trainer.args.max_length=50"],
        r"no row is left .*all prompt.*max_length=50",
        packed_away,
    ),
    "no batch": (
        ["data.path=few.jsonl", "data.test_share=0.3", "trainer.args.dataloader_drop_last=true"],
        r"make no batch of 16",
        few,
    ),
    "train_on": (["encode.train_on=assistants"], r"encode.train_on=assistants: .*did you mean assistant"),
    "device": (["trainer.args.use_cpu=false"], r"use_cpu=false, and this machine has no accelerator"),
    "device of a job": (["hardware=slurm"], r"hardware.slurm: this machine has no accelerator; check it where the job"),
    "weights packed": (
        ["encode.train_on=weighted", "trainer.args.packing=true"],
        r"encode.train_on=weighted: the weights need trainer.args.packing=false",
    ),
    "share": (["data.test_share=2"], r"data.test_share=2"),
    "too long": (
        ["data.path=long.jsonl", "trainer.args.max_length=50", "data.on_too_long=error"],
        r"longer than trainer.args.max_length=50",
        packed_away,
    ),
    "run": (["model.from_run=latest"], r"model.from_run|no completed run"),
}


@pytest.mark.parametrize("name", STOPPERS)
def test_what_would_stop_the_run_stops_here(checked, unloadable, name):
    overrides, message, *prepare = STOPPERS[name]
    for make in prepare:
        make()
    small = [] if any(o.startswith("data") for o in overrides) else FEW
    code, facts, _, err = checked(*small, *overrides)
    assert code == 2 and re.search(message, err, re.DOTALL), err
    assert "Traceback" not in err and any(re.search(message, error, re.DOTALL) for error in facts["errors"])


@pytest.mark.parametrize("name", ["scheduler lacks", "LoRA", "objective", "kind for DPO", "embedding"])
def test_and_stops_a_run_before_a_model_is_loaded(unloadable, capfd, name):
    overrides, message, *prepare = STOPPERS[name]
    for make in prepare:
        make()
    assert main([*overrides, "tracking=none"]) == 2
    assert re.search(message, capfd.readouterr().err, re.DOTALL)
    assert not [*Path("multirun").rglob("run.json")]


def test_layers_are_matched_as_peft_matches_them(checked):
    fields = ["target_modules='.*(q|down)_proj'", "rank_pattern={down_proj: 2}"]
    code, facts, _, _ = checked("peft=lora", *(f"++trainer.peft_config.{field}" for field in fields), *FEW)
    assert code == 0 and not facts["errors"]


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["trainer.args.max_steps=1"], True),
        (["trainer.args.warmup_steps=100", "trainer.args.num_train_epochs=2"], True),
        (["trainer.args.warmup_steps=100", "trainer.args.lr_scheduler_type=constant_with_warmup"], True),
        (["trainer.args.max_steps=2"], False),
        (["trainer.args.max_steps=1", "trainer.args.warmup_steps=0"], False),
    ],
)
def test_a_run_that_only_warms_up_is_remarked(checked, overrides, warned):
    _, facts, _, _ = checked(*overrides, *FEW)
    assert any("before the learning rate has risen" in text for text in facts["warnings"]) is warned


def test_all_that_is_wrong_is_told_at_once(checked, unloadable):
    write("bad.jsonl", [*rows(20), {"prompt": "q", "completion": None}])
    code, facts, _, err = checked("trainer.args.optim=adam", "encode.train_on=x", "model.dtype=float99")
    assert code == 2 and len(facts["errors"]) == 3
    assert all(key in err for key in ("trainer.args.optim", "encode.train_on", "model.dtype"))
    found = [
        "model.chat_template=none_such",
        "data.path=none.jsonl",
        "trainer.args.lr_scheduler_type=cosine_with_min_lr",
    ]
    code, facts, _, err = checked(*found)  # what only the rows, the model and the trainer tell
    assert code == 2 and len(facts["errors"]) == 2
    assert all(key in err for key in ("model.chat_template", "data.path=none.jsonl"))


def test_a_disk_that_is_full_and_a_memory_that_is_small(checked, unloadable, monkeypatch):
    from smoltrain import perf

    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(perf, "available", lambda device: 1000)
    code, facts, _, err = checked(*FEW)
    assert code == 2 and "disk: " in err and "1 kB are free" in err and "memory: " in err
    assert len(facts["errors"]) == 2 and facts["budget"]["disk"]["free"] == 1000


def test_a_run_says_its_warnings_once(smoltrain, capfd):
    write("few.jsonl", rows(12) + rows(2))
    (record,) = smoltrain(
        "data.path=few.jsonl", "data.test_share=0.3", quick=("tracking=none", "evaluation.max_rows=0")
    )
    out = capfd.readouterr().out
    assert out.count("a step would see 16") == 1 and any("a step would see 16" in line for line in record["warnings"])
    report = (record["directory"] / "report.md").read_text()
    assert "## Data" in report and "a step would see 16" in report and "repeated word for word" in report


# ---------------------------------------------------------------- broken files, through the command


def turn(role, content):
    return {"role": role, "content": content}


def chats(*messages):
    """Good conversations, and at the end one of these messages."""
    return [*({"messages": SAID} for _ in range(30)), {"messages": list(messages)}]


def with_pair(**bad):
    return [*pairs(30), pairs(1)[0] | bad]


def table(name, columns):
    pq.write_table(pa.table(columns), name)


def truncated(name, content):
    Path(name).write_bytes(content[: len(content) // 2])


def parquet_bytes():
    table("whole.parquet", {"prompt": ["q"] * 500, "completion": [str(i) for i in range(500)]})
    content = Path("whole.parquet").read_bytes()
    Path("whole.parquet").unlink()
    return content


def folder_without_data():
    Path("mine").mkdir()
    Path("mine/README.md").write_text("no rows")


def mixed_folder():
    Path("mine").mkdir()
    write("mine/a.jsonl", rows(3))
    Path("mine/b.csv").write_text("prompt,completion\nq,a\n")


def shifted_csv():
    with Path("mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], *[["q", "a"]] * 20, ["q", "a", "b"]])


GOOD = rows(30)
ROW31, LINE31 = r"(row|line|item) 31\b", r"line 31\b"
# name: the file, what writes it, what the message has to say, and the overrides besides its path
BROKEN = {
    "bad JSON at line n": (
        "mine.jsonl",
        lambda: write("mine.jsonl", [*GOOD, '{"prompt": "q", "completion": }\n']),
        LINE31,
    ),
    "JSON without its end": (
        "mine.json",
        lambda: Path("mine.json").write_text('[{"prompt": "q", "completion": "a"},'),
        r"mine.json",
    ),
    "a JSON number": ("mine.json", lambda: Path("mine.json").write_text("17"), r"mine.json"),
    "a JSON object of scalars": (
        "mine.json",
        lambda: Path("mine.json").write_text('{"a": 1}'),
        r"columns? a\b|mine.json",
    ),
    "wrong encoding": (
        "mine.jsonl",
        lambda: Path("mine.jsonl").write_bytes('{"prompt": "caf\u00e9", "completion": "a"}\n'.encode("latin-1")),
        r"mine.jsonl.* 1\b",
    ),
    "UTF-16": (
        "mine.csv",
        lambda: Path("mine.csv").write_bytes("prompt,completion\nq,a\n".encode("utf-16")[2:]),
        r"mine.csv",
    ),
    "empty file": ("mine.jsonl", lambda: Path("mine.jsonl").touch(), r"mine.jsonl.*empty|no row"),
    "only blank lines": ("mine.jsonl", lambda: Path("mine.jsonl").write_text("\n\n\n"), r"mine.jsonl"),
    "a header alone": ("mine.csv", lambda: Path("mine.csv").write_text("prompt,completion\n"), r"mine.csv"),
    "null content": (
        "mine.jsonl",
        lambda: write("mine.jsonl", [*GOOD, rows(1, completion=None)[0]]),
        rf"mine.jsonl {LINE31}: completion: null content",
    ),
    "null in a message": (
        "mine.jsonl",
        lambda: write("mine.jsonl", chats(SAID[0], turn("assistant", None))),
        rf"{LINE31}: messages\[1\].content: null",
    ),
    "empty text": (
        "mine.jsonl",
        lambda: write("mine.jsonl", [*GOOD, rows(1, completion=" ")[0]]),
        rf"{LINE31}: completion: empty text",
    ),
    "unknown role": (
        "mine.jsonl",
        lambda: write("mine.jsonl", chats(turn("robot", "x"))),
        rf"{LINE31}: messages\[0\].role: unknown role",
    ),
    "two user turns": (
        "mine.jsonl",
        lambda: write("mine.jsonl", chats(SAID[0], *SAID)),
        rf"{LINE31}: messages\[1\].*two user turns",
    ),
    "nothing to learn": ("mine.jsonl", lambda: write("mine.jsonl", chats(SAID[0])), rf"{LINE31}: messages\[0\]"),
    "system in the middle": (
        "mine.jsonl",
        lambda: write("mine.jsonl", chats(*SAID, turn("system", "s"), *SAID)),
        rf"{LINE31}: messages\[2\].*system not first",
    ),
    "a tool's result alone": (
        "mine.jsonl",
        lambda: write("mine.jsonl", chats(SAID[0], turn("tool", "r"), SAID[1])),
        rf"{LINE31}: messages\[1\].*tool without a call",
    ),
    "empty messages": ("mine.jsonl", lambda: write("mine.jsonl", chats()), rf"{LINE31}: messages: empty messages"),
    "messages as a text": (
        "mine.jsonl",
        lambda: write("mine.jsonl", [*chats(*SAID), {"messages": "hello"}]),
        r"line 32: column messages is text",
    ),
    "an image": (
        "mine.jsonl",
        lambda: write("mine.jsonl", chats(turn("user", [{"type": "image", "url": "u"}]), SAID[1])),
        rf"{LINE31}: messages\[0\].content\[0\].*not text",
    ),
    "a bad loss weight": (
        "mine.jsonl",
        lambda: write("mine.jsonl", chats(SAID[0], SAID[1] | {"loss_weight": -1})),
        rf"{LINE31}: messages\[1\].loss_weight",
    ),
    "a weight without weighing": (
        "mine.jsonl",
        lambda: write("mine.jsonl", chats(SAID[0], SAID[1] | {"loss_weight": 0.5})),
        rf"{LINE31}: loss_weight.*encode.train_on=weighted",
    ),
    "tools that are no JSON": (
        "mine.jsonl",
        lambda: write("mine.jsonl", [{"messages": SAID, "tools": "{"}] * 30),
        r"line 1\b: tools: bad JSON",
    ),
    "missing column": ("mine.jsonl", lambda: write("mine.jsonl", [{"prompt": "q"}] * 20), r"columns: prompt"),
    "strange columns": (
        "mine.jsonl",
        lambda: write("mine.jsonl", [{"ask": "q", "say": "a"}] * 20),
        r"in YAML:.*columns: \{",
    ),
    "a renamed column": (
        "mine.jsonl",
        lambda: write("mine.jsonl", [*GOOD, *({"prompt": "q", "reply": "a"} for _ in range(5))]),
        rf"{LINE31}",
    ),
    "NaN": ("mine.jsonl", lambda: write("mine.jsonl", [*GOOD, '{"prompt": "q", "completion": NaN}\n']), rf"{LINE31}"),
    "a number for a text": (
        "mine.jsonl",
        lambda: write("mine.jsonl", [*GOOD, rows(1, completion=7)[0]]),
        rf"{LINE31}: column completion is a number",
    ),
    "NUL": (
        "mine.jsonl",
        lambda: write("mine.jsonl", [*GOOD, rows(1, completion="a\0b")[0]]),
        rf"{LINE31}: completion: NUL",
    ),
    "half a character": (
        "mine.jsonl",
        lambda: write("mine.jsonl", [*GOOD, '{"prompt": "q", "completion": "\\ud800"}\n']),
        rf"{LINE31}",
    ),
    "input_ids": (
        "mine.jsonl",
        lambda: write("mine.jsonl", rows(20, input_ids=[1, 2])),
        r"mine.jsonl line 1: column input_ids",
    ),
    "shapes of two kinds": (
        "mine.jsonl",
        lambda: write("mine.jsonl", [{"messages": SAID, "text": "t"}] * 20),
        r"fit messages and text; declare.*format: messages.*format: text",
    ),
    "no such format": (
        "mine.jsonl",
        lambda: write("mine.jsonl", GOOD),
        r"data.format=alpacca .*did you mean alpaca",
        "data.format=alpacca",
    ),
    "no such column": (
        "mine.jsonl",
        lambda: write("mine.jsonl", GOOD),
        r"no column promt; .*did you mean prompt",
        "data.columns={prompt: promt}",
    ),
    "no such filter": (
        "mine.jsonl",
        lambda: write("mine.jsonl", GOOD),
        r"no column lang to choose",
        "data.keep_where={lang: fr}",
    ),
    "a filter that leaves none": (
        "mine.jsonl",
        lambda: write("mine.jsonl", rows(20, lang="fr")),
        r"leave no row",
        "data.keep_where={lang: en}",
    ),
    "a folder without data": ("mine", folder_without_data, r"data.path=mine: no data in this folder .*README.md"),
    "a folder of two kinds": ("mine", mixed_folder, r"different kinds, .*a.jsonl and .*b.csv"),
    "no such file": (
        "mine.jsonl",
        lambda: write("mime.jsonl", GOOD),
        r"no such file or folder .*did you mean mime.jsonl",
    ),
    "an ending nobody reads": ("mine.docx", lambda: Path("mine.docx").touch(), r"cannot read .docx"),
    "no such test file": (
        "mine.jsonl",
        lambda: write("mine.jsonl", GOOD),
        r"data.test_path=t.jsonl: there is no such",
        "data.test_path=t.jsonl",
    ),
    "truncated gzip": (
        "mine.jsonl.gz",
        lambda: truncated("mine.jsonl.gz", gzip.compress(json.dumps(rows(1)[0]).encode() * 99)),
        r"mine.jsonl.gz",
    ),
    "truncated parquet": ("mine.parquet", lambda: truncated("mine.parquet", parquet_bytes()), r"mine.parquet"),
    "parquet by name only": ("mine.parquet", lambda: Path("mine.parquet").write_text("{}"), r"mine.parquet"),
    "null in parquet": (
        "mine.parquet",
        lambda: table("mine.parquet", {"prompt": ["q"] * 31, "completion": ["a"] * 30 + [None]}),
        rf"mine.parquet {ROW31}: completion: null",
    ),
    "a CSV with a shifted header": ("mine.csv", shifted_csv, r"mine.csv line 22"),
    "a quote without its end": (
        "mine.csv",
        lambda: Path("mine.csv").write_text('prompt,completion\nq,"a\nq,a\n' + "q,a\n" * 20),
        r"mine.csv",
    ),
    "chosen equals rejected": (
        "pairs.jsonl",
        lambda: write("pairs.jsonl", with_pair(rejected="It is 0.")),
        rf"pairs.jsonl {LINE31}: rejected: chosen equals rejected",
        "trainer=dpo",
    ),
    "chosen null": (
        "pairs.jsonl",
        lambda: write("pairs.jsonl", with_pair(chosen=None)),
        rf"{LINE31}: chosen: null content",
        "trainer=dpo",
    ),
    "prompts that differ": (
        "pairs.jsonl",
        lambda: write("pairs.jsonl", [{"chosen": SAID, "rejected": [turn("user", "p"), SAID[1]]}] * 9),
        r"line 1\b: .*prompts differ",
        "trainer=dpo",
    ),
    "conversations to DPO": (
        "mine.jsonl",
        lambda: write("mine.jsonl", chats(*SAID)),
        r"data: smoltrain.dpo.DPOTrainer eats preference rows .*lacking: ",
        "trainer=dpo",
    ),
    "pairs to SFT": (
        "pairs.jsonl",
        lambda: write("pairs.jsonl", pairs()),
        r"data: smoltrain.sft.SFTTrainer eats conversation rows",
    ),
    "KTO rows to DPO": (
        "mine.jsonl",
        lambda: write("mine.jsonl", rows(20, label=True)),
        r"data: smoltrain.dpo.DPOTrainer eats preference rows",
        "trainer=dpo",
    ),
    "one row": ("mine.jsonl", lambda: write("mine.jsonl", rows(1)), r"data.test_share=0.05"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_with_its_place_and_mend(checked, unloadable, name):
    path, make, message, *overrides = BROKEN[name]
    make()
    code, facts, _, err = checked(f"data.path={path}", *overrides)
    assert code == 2 and re.search(message, err, re.DOTALL), err
    assert "Traceback" not in err and len(facts["errors"]) == 1
    assert not Path("multirun").exists()


def test_a_run_refuses_a_broken_file_and_leaves_nothing(unloadable, capfd):
    write("mine.jsonl", [*GOOD, rows(1, completion=None)[0]])
    assert main(["data.path=mine.jsonl", "tracking=none"]) == 2
    assert "mine.jsonl line 31: completion: null content" in capfd.readouterr().err
    assert not [file for file in Path("multirun").rglob("*") if file.is_file()]


def test_the_steps_of_packed_rows_are_a_lower_bound(checked):
    packed = ("trainer.args.packing=true", "trainer.args.max_length=128", "check.step=false")
    assert "at least" in checked(*FEW, *packed)[2]
    assert "at least" not in checked(*FEW, *packed, "trainer.args.max_steps=7")[2]
