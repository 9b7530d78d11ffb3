"""The rows that a step learned from, as the record has it, are those that went through the model in that step."""

import json
import random
from dataclasses import replace
from functools import partial

import pytest
import transformers
from conftest import resolvable
from trl import SFTTrainer

from smoltrain import order, runs
from smoltrain.__main__ import main
from smoltrain.config import ConfigError
from smoltrain.config.overrides import spelled_out
from smoltrain.history import resolve
from smoltrain.preflight import preflight
from smoltrain.train import build

ARGS = "trainer.args."
QUICK = ("data.test_rows=10", "evaluation.max_rows=0", "tracking=none", "threads=1", f"{ARGS}logging_steps=1")
EPOCHS = (
    "data.train_rows=30",
    f"{ARGS}per_device_eval_batch_size=5",
    f"{ARGS}num_train_epochs=2",
    f"{ARGS}per_device_train_batch_size=4",
)
ONCE, TWICE = f"{ARGS}gradient_accumulation_steps=1", f"{ARGS}gradient_accumulation_steps=2"


@pytest.fixture
def seen(monkeypatch):
    """What went through the model: the tokens of each row of each step, of a pair those with the chosen reply."""
    steps: dict[int, list[list[int]]] = {}
    trained = transformers.Trainer.training_step

    def training_step(self, model, inputs, *rest):
        ids = inputs["input_ids"]
        if "position_ids" in inputs:  # one row after the other, each with positions of its own
            starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
            rows = [ids[0, a:b].tolist() for a, b in zip(starts, [*starts[1:], ids.shape[1]], strict=True)]
        else:
            rows = [row[mask.bool()].tolist() for row, mask in zip(ids, inputs["attention_mask"], strict=True)]
        pairs = "completion_mask" in inputs
        steps.setdefault(self.state.global_step + 1, []).extend(rows[: len(rows) // 2] if pairs else rows)
        return trained(self, model, inputs, *rest)

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)
    return steps


def named(made: order.Order, step: int, rows) -> list[list[int]]:
    """The tokens of the rows that a step learned from, as the order has it."""
    numbers = [number for sequence in made.rows_of_step(step) for number in sequence]
    return [rows[n].get("input_ids") or rows[n]["prompt_ids"] + rows[n]["chosen_ids"] for n in numbers]


def again(directory) -> tuple[order.Order, "order.Preflight"]:
    found = order.prepared_again(directory, runs.read(directory))
    return order.Order(found), found


@pytest.mark.parametrize(
    "overrides",
    [
        [TWICE],
        [TWICE, f"{ARGS}dataloader_drop_last=true", f"{ARGS}data_seed=7", f"{ARGS}shuffle_dataset=true"],
        [TWICE, f"{ARGS}packing=true", f"{ARGS}max_length=100"],
        [TWICE, "trainer=dpo"],
        [ONCE, f"{ARGS}train_sampling_strategy=sequential", "seed=3"],
        [TWICE, f"{ARGS}train_sampling_strategy=batch_rebalance"],
        [TWICE, f"{ARGS}train_sampling_strategy=group_by_length"],
    ],
    ids=" ".join,
)
def test_the_rows_of_every_step_are_those_that_went_through_the_model(smoltrain, seen, overrides):
    (record,) = smoltrain(*EPOCHS, *overrides, f"{ARGS}save_strategy=no", quick=QUICK)
    made, found = again(record["directory"])
    assert len(seen) == record["steps"] == made.steps and made.per_epoch * 2 == made.steps
    assert {step: named(made, step, found.data.train) for step in seen} == seen
    assert len({str(rows) for rows in seen.values()}) > made.per_epoch or "sequential" in str(overrides)


@pytest.mark.parametrize(
    "overrides",
    [[f"{ARGS}packing=true", f"{ARGS}max_length=100"], [f"{ARGS}train_sampling_strategy=group_by_length"]],
    ids=" ".join,
)
def test_the_order_is_the_same_after_a_run_was_resumed(folder, seen, overrides):
    cfg = resolvable([*QUICK, *EPOCHS, ONCE, *overrides])
    cfg.trainer.args.output_dir = str(folder)
    found = preflight(cfg)
    made = order.Order(preflight(cfg))
    middle = made.per_epoch * 3 // 2
    cfg.trainer.args.save_steps = middle
    build(cfg, preflight(cfg), []).train()
    whole = dict(seen)
    assert made.per_epoch < middle < made.steps
    seen.clear()
    build(cfg, preflight(cfg), []).train(resume_from_checkpoint=str(folder / f"checkpoint-{middle}"))
    assert list(seen) == [*range(middle + 1, made.steps + 1)]
    assert {step: named(made, step, found.data.train) for step in seen} == seen == {s: whole[s] for s in seen}


def test_an_order_drawn_from_the_generator_of_everything_is_not_known():
    unseeded = f"{ARGS}accelerator_config={{use_seedable_sampler: false}}"
    with pytest.raises(ConfigError, match=r"use_seedable_sampler=false: the order is drawn"):
        order.Order(preflight(resolvable(["data.train_rows=4", unseeded]))).rows_of_step(1)


# ---------------------------------------------------------------- the command

PLANTED = 17  # the row of the file, its line 18
ABSURD = "zxq ☃ QQQ @@@ ~~~ 9f8e7d ## vvv %%%" * 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run on a file of sums, one of which is none."""
    folder, rng = tmp_path_factory.mktemp("planted"), random.Random(0)
    with (folder / "my.jsonl").open("w") as file:
        for i in range(40):
            a, b = 2 + i, rng.randint(2, 40)
            reply = ABSURD if i == PLANTED else f"{a} + {b} = {a + b}. Mia has {a + b} plums."
            row = {"prompt": f"Mia has {a} plums and finds {b} more. How many plums?", "completion": reply}
            file.write(json.dumps(row) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HYDRA_FULL_ERROR", "1")
        batch = (f"{ARGS}per_device_train_batch_size=1", ONCE, f"{ARGS}save_strategy=no", "data.test_share=0.1")
        assert main(["name=planted", "data.path=my.jsonl", *QUICK, *batch]) == 0
    return folder


@pytest.fixture
def rows(trained, monkeypatch, capsys):
    """Runs `smoltrain runs rows` on that run, and returns what it prints."""
    monkeypatch.chdir(trained)
    capsys.readouterr()

    def run(*arguments: str, code: int = 0, reference: str = "planted") -> str:
        assert main(["runs", "rows", reference, *arguments]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return run


@pytest.fixture
def altered(trained, tmp_path):
    """A record like that of the run, but for some of its values, in a directory of its own."""
    (directory,) = trained.glob("multirun/planted/*")

    def make(**values) -> str:
        record = runs.read(directory)
        for key, value in values.items():
            *parents, last = key.split("__")
            node = record
            for parent in parents:
                node = node[parent]
            node[last] = value
        (tmp_path / "run.json").write_text(json.dumps(record))
        (tmp_path / "metrics.jsonl").write_text((directory / "metrics.jsonl").read_text())
        return str(tmp_path)

    return make


def test_a_row_that_belongs_nowhere_is_named_first(rows):
    facts = json.loads(rows("--spikes", "--json"))
    first, (step,) = facts["spikes"][0], facts["spikes"][0]["steps"]
    assert first["first"] == first["last"] == step["step"]
    loss = first["metrics"]["loss"]
    assert loss["value"] > 3 * loss["usual"][1] > 3 * loss["usual"][0] > 0
    (row,) = step["rows"]
    context, learned = row.pop("segments")
    assert learned == {"text": f"{ABSURD}<|im_end|>", "role": "learned"} and context["role"] == "context"
    assert context["text"].endswith("How many plums?<|im_end|>\n<|im_start|>assistant\n")
    assert row.pop("tokens") > row.pop("learned") > 40 and row.pop("row") <= PLANTED
    assert row == {"sequence": 0, "source": "my", "where": f"my.jsonl line {PLANTED + 1}"}
    said = rows("--spikes")
    assert said.startswith(f"spike 1  step {step['step']}  loss {loss['value']:.4g}, usual there ")
    assert f"⟦{ABSURD}<|im_end|>⟧" in said and said.index("\nspike 1\n") < said.index(ABSURD)


def test_steps_are_shown_one_by_one(rows):
    assert [step["step"] for step in json.loads(rows("--step", "3,5-6", "--json"))["steps"]] == [3, 5, 6]
    said = rows("--step=2")
    assert said.startswith("\nstep 2  1 row  context  learned ⟦⟧\n\nrow ") and said.count("⟦") == 2
    assert "tokens, 1" in said and "my.jsonl line " in said
    epoch = json.loads(rows("--step", "1-35", "--json"))["steps"]
    assert sorted(row["row"] for step in epoch for row in step["rows"]) == [*range(35)]


def test_what_cannot_be_asked_for_is_said_at_once(rows, monkeypatch, altered):
    monkeypatch.setattr(order, "prepared_again", None)
    for wrong, said in (
        (("--step", "0"), "planted has no such step; its steps are 1 to 35"),
        (("--step", "30-40"), "--step 36: "),
        (("--step", "x"), "--step x: a number, a range or several"),
        (("--step",), "--step : a number"),
        ((), "takes --step 120, --step 100-103, --step 3,7 or --spikes"),
        (("--spike",), "takes --step 120"),
        (("--step", "6-3"), "takes --step 120"),
    ):
        assert said in rows(*wrong, code=2).replace(str(resolve("planted")), "planted")
    assert main(["runs", "rows", "--spikes"]) == main(["runs", "row"]) == 2


def test_rows_that_are_others_now_are_refused(rows, altered, trained):
    for changed, said in (
        ({"fingerprints__tokenizer": "x", "fingerprints__chat_template": "x"}, "the tokenizer and the chat template"),
        ({"rows__train__trained": 5}, "what the training rows are as tokens"),
        ({"config__data__streaming": True}, "data.streaming=true: the rows of a stream pass once"),
        (
            {"config__data__path": "gone.jsonl"},
            "its rows cannot be prepared again\n  data.path=gone.jsonl: there is no",
        ),
    ):
        assert said in rows("--step", "1", code=2, reference=altered(**changed))
    file = trained / "my.jsonl"
    text = file.read_text()
    file.write_text(text.replace("plums?", "prunes?", 1))
    assert "the training rows (my) changed since this run; which rows" in rows("--step", "1", code=2)
    file.write_text(text)
    older = altered(versions__torch="1.0")
    assert rows("--step", "1", reference=older).startswith("torch 1.0, here 2")


def test_a_trainer_that_orders_its_rows_itself_is_refused():
    class Mine(SFTTrainer):
        def _get_train_sampler(self, *rest):
            return None

    found = preflight(resolvable(["data.train_rows=4"]))
    own = replace(found, trainer=partial(Mine, **found.trainer.keywords))
    with pytest.raises(ConfigError, match=r"orders its rows itself \(test_order.Mine._get_train_sampler\)"):
        order.Order(own)
    with pytest.raises(ConfigError, match="SFTTrainer makes tokens and batches of its rows itself"):
        order.Order(replace(found, data=replace(found.data, lengths=found.data.lengths * 0)))


def test_each_row_of_a_mixture_is_found_where_it_stands(trained, monkeypatch):
    monkeypatch.chdir(trained)
    overrides = ["data=[sums,local]", "data.sources.local.path=my.jsonl", "data.sources.sums.train_rows=9"]
    data = preflight(resolvable(spelled_out([*overrides, "data.weights={sums: 1, local: 3}"]))).data
    lines = (trained / "my.jsonl").read_text().splitlines()
    tokens: dict[tuple[str, str], str] = {}
    for number, row in enumerate(data.train):
        source, where = data.origin(number)
        assert tokens.setdefault((source, where), str(row)) == str(row)  # drawn again, it is the same row
    assert len(tokens) == len(set(tokens.values())) and {source for source, _ in tokens} == {"sums", "local"}
    assert all(int(where.split()[-1]) <= (9 if source == "sums" else len(lines)) for source, where in tokens)


# ---------------------------------------------------------------- spikes


def logged(losses: list[float], every: int = 1) -> list[dict]:
    return [{"step": (i + 1) * every, "loss": loss, "grad_norm": 1 + i / 1e3} for i, loss in enumerate(losses)]


def test_a_spike_is_what_stands_out_of_its_neighbours_and_nothing_else():
    rng = random.Random(0)
    falling = [5 / (1 + i / 10) * rng.lognormvariate(0, 0.2) for i in range(300)]
    assert order.spikes(logged(falling)) == [] == order.spikes(logged([0.5] * 300)) == order.spikes(logged([1, 9, 1]))
    assert order.spikes([{"step": 1, "eval_loss": 1.0}, {"step": 2, "train_loss": 9.0}]) == []
    falling[40] *= 15
    falling[200] *= 20
    found = order.spikes([{"step": 0, "eval_loss": 99.0}, *logged(falling)])
    assert [(spike["first"], spike["last"], *spike["metrics"]) for spike in found] == [
        (201, 201, "loss"),
        (41, 41, "loss"),
    ]
    assert [spike["first"] for spike in order.spikes(logged([-x for x in falling]))] == []
    assert len(order.spikes(logged([9.0 if i % 9 == 0 else 1 + i / 1e4 for i in range(300)]))) == order.MOST


def test_a_spike_of_several_steps_names_them_all():
    rows = logged([1.0 + i / 100 for i in range(20)], every=5)
    rows[10]["loss"] = 40.0
    rows[15]["grad_norm"] = 50.0
    norm, loss = sorted(order.spikes(rows), key=lambda spike: spike["metrics"].keys())
    assert (loss["first"], loss["last"]) == (51, 55) and (norm["first"], norm["last"]) == (80, 80)
    assert order.told(loss).startswith("steps 51 to 55  loss 40, usual there 1.01 to 1.18 (the mean of these steps; ")
    assert order.told(norm).startswith("step 80  grad_norm 50, usual there 1.0")
    rows[10]["grad_norm"] = 70.0
    both = order.spikes(rows)[0]
    assert (both["first"], both["last"]) == (51, 55) and order.told(both).endswith(" (of step 55)")


def test_what_is_not_finite_stands_out_most():
    rows = logged([1.0 + i / 100 for i in range(20)])
    rows[5]["loss"], rows[19]["loss"] = 99.0, float("nan")
    worst = order.spikes(rows)
    assert [spike["last"] for spike in worst] == [20, 6]
    assert json.loads(json.dumps(order.finite(worst[0])))["metrics"]["loss"]["value"] == "nan"
