"""SFT without padding comes to what TRL's own layout comes to, token by token, and says where it would not."""

import random
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_dpo import KINDS, came_to, small
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from smoltrain.__main__ import main
from smoltrain.config import ConfigError
from smoltrain.head import Scores
from smoltrain.model import locate
from smoltrain.sft import SFTTrainer
from smoltrain.trainers import given_tokens, weighing
from smoltrain.unpadded import ATTENTION, apart

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # TRL's own
    pytest.mark.filterwarnings("ignore:.*label_smoothing_factor:FutureWarning"),
]

TINY = locate("pkg://smoltrain/tiny")


def rows(many: int, length: tuple[int, int], seed: int = 0) -> Dataset:
    """Rows of random tokens of so many, from and to, of which those behind the first third are learned."""
    rng, made = random.Random(seed), []
    for _ in range(many):
        ids = [rng.randrange(5, 400) for _ in range(rng.randint(*length))]
        made.append({"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]})
    return Dataset.from_list(made)


def trainer(
    folder, data: Dataset, unpadded: bool | None, model=None, lora=None, wrap=given_tokens, **args
) -> SFTTrainer:
    torch.manual_seed(0)
    model = model or AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="sdpa", dtype=torch.float32)
    given = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    given |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "disable_tqdm": True}
    given |= {"activation_checkpointing": False, "logging_steps": 1, "learning_rate": 1e-3, "max_length": 64}
    return wrap(partial(SFTTrainer, args=SFTConfig(**given | args)))(
        model=model,
        train_dataset=data,
        eval_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(TINY),
        peft_config=lora,
        unpadded=unpadded,
    )


def per_token(one: SFTTrainer, batch: dict) -> torch.Tensor:
    return one.model(**batch, fused_lm_head=True).log_probs


def same(ours: SFTTrainer, stock: SFTTrainer, batch: dict, atol: float = 1e-5) -> None:
    (logps, gradient, metrics), (stocks, its, said) = came_to(ours, batch, per_token), came_to(stock, batch, per_token)
    torch.testing.assert_close(logps, stocks, rtol=1e-5, atol=atol)
    if its.any():  # else there was nothing to learn
        assert torch.nn.functional.cosine_similarity(gradient.double(), its.double(), 0) >= 0.99999
    torch.testing.assert_close(gradient, its, rtol=1e-4, atol=1e-5)
    assert metrics.keys() == said.keys() and metrics == pytest.approx(said, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("many", "length"), [(4, (3, 60)), (1, (30, 30)), (4, (20, 20)), (8, (2, 200)), (3, (1, 1)), (4, (1, 3))]
)
@pytest.mark.parametrize("how", [{}, {"padding_free": True, "max_length": None}, {"loss_type": "dft"}])
def test_each_row_comes_to_what_it_comes_to_alone(folder, many, length, how):
    data = rows(many, length)
    ours, stock = (trainer(folder, data, unpadded, **how) for unpadded in (True, False))
    with torch.no_grad():  # likely tokens only: the weight of an unlikely one in loss_type=dft is lost in rounding
        for one in (ours, stock):
            one.model.base_model.norm.weight.mul_(0.1)
    same(ours, stock, stock.data_collator(list(data)))


@pytest.mark.parametrize(
    "way", ["whole", "lora", "accumulated", "recomputed", "packed", "free", "weighted", "smoothed"]
)
def test_fifty_steps_are_the_same_fifty_steps(folder, way):
    data, args, wrap = rows(40, (2, 40)), {"max_steps": 50}, given_tokens
    if way == "weighted":
        wrap = weighing
        data = data.map(lambda row: {"loss_weights": [n % 3 / 2 for n in range(len(row["input_ids"]))]})
    args |= {
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "recomputed": {"activation_checkpointing": True},
        "packed": {"packing": True, "per_device_train_batch_size": 2},
        "free": {"padding_free": True, "max_length": None},
        "smoothed": {"label_smoothing_factor": 0.1},
    }.get(way, {})
    lora = LoraConfig(r=4, target_modules="all-linear") if way == "lora" else None
    losses = []
    for unpadded in (True, False):
        one = trainer(folder, data, unpadded, lora=lora, wrap=wrap, **args)
        assert one.unpadded is unpadded
        one.train()
        losses.append([line["loss"] for line in one.state.log_history if "loss" in line])
        losses[-1].append(one.evaluate()["eval_loss"])
    assert len(losses[0]) == 51 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.01


@pytest.mark.parametrize("attention", ["unpadded", "sdpa", "eager"])
@pytest.mark.parametrize("how", [{}, {"packing": True}, {"padding_free": True, "max_length": None}])
def test_no_row_sees_another(folder, attention, how):
    model = AutoModelForCausalLM.from_pretrained(
        TINY, attn_implementation="eager" if attention == "eager" else "sdpa", dtype=torch.float32
    )
    data = rows(6, (5, 25))
    one = trainer(folder, data, attention == "unpadded", model, per_device_train_batch_size=6, **how)
    assert one.model.config._attn_implementation == attention
    batch = one.data_collator(list(one.train_dataset))
    flat = {"input_ids": batch["input_ids"].flatten(), "labels": batch["labels"].flatten()}
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
    places = batch["position_ids"] if "position_ids" in batch else (real.cumsum(1) - 1)
    row = ((places == 0) & real).flatten().cumsum(0)
    assert row.max() == 6

    def logps(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out = one.model(**batch | {"input_ids": ids.view_as(batch["input_ids"])}, fused_lm_head=True).log_probs
        return torch.nn.functional.pad(out, (1, 0)).flatten()

    before = logps(flat["input_ids"])
    for changed in range(1, 7):
        others = (row != changed) & real.flatten()
        after = logps(torch.where(others | ~real.flatten(), flat["input_ids"], flat["input_ids"] % 390 + 5))
        assert torch.allclose(after[others], before[others], rtol=0, atol=2e-5)
        assert not torch.allclose(after[~others], before[~others], atol=1e-2)


def test_no_padding_is_computed_and_the_head_where_something_is_learned(folder, monkeypatch):
    data = rows(4, (3, 60))
    ours = trainer(folder, data, None)
    seen, scored = [], []
    ours.model.base_model.embed_tokens.register_forward_hook(lambda _, given, __: seen.append(given[0].numel()))
    real = Scores.apply
    monkeypatch.setattr(Scores, "apply", lambda hidden, *rest: scored.append(len(hidden)) or real(hidden, *rest))
    batch = ours.data_collator(list(data))
    learned = batch["labels"][:, 1:] != -100
    assert ours.model(**batch, fused_lm_head=True).label_mask.equal(learned)
    assert seen == [sum(len(row["input_ids"]) for row in data)] and seen[0] < batch["input_ids"].numel()
    assert scored == [sum(label != -100 for row in data for label in row["labels"][1:])]


def test_rows_of_about_one_length_stand_in_a_block():
    blocks, order, begins = apart(torch.tensor([5, 10, 9, 1, 8, 4]))
    assert blocks == [(3, 10), (2, 5), (1, 1)]
    assert order.tolist() == [1, 2, 4, 0, 5, 3] and begins.tolist() == [30, 0, 10, 40, 20, 35]


@pytest.mark.parametrize("kind", KINDS)
def test_the_architectures_that_people_train_are_exact(folder, kind):
    data, balance = rows(4, (3, 60)), 0.0 if kind == "mixtral" else None
    ours, stock = (trainer(folder, data, on, small(kind), router_aux_loss_coef=balance) for on in (True, False))
    same(ours, stock, stock.data_collator(list(data)), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "own", "why"),
    [
        ("mistral", {"sliding_window": 8}, "mistral sees a window of 8 tokens only"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "lfm2 has layers other than full attention, conv"),
        ("mixtral", {"output_router_logits": True}, "mixtral balances its experts over all tokens of a batch"),
        ("llama", {"attn_implementation": "eager"}, "model.attn_implementation=eager; only sdpa sees rows apart"),
    ],
)
def test_where_it_is_not_exact_trl_does_as_it_always_does_and_that_is_said(folder, capsys, kind, own, why):
    one = trainer(folder, rows(4, (5, 30)), None, small(kind, **own))
    assert one.unpadded is False and f"padding is computed too: {why}" in capsys.readouterr().out
    assert one.model.config._attn_implementation != ATTENTION
    with pytest.raises(ConfigError, match=rf"trainer\.unpadded=true: {why}"):
        trainer(folder, rows(4, (5, 30)), True, small(kind, **own))


def test_what_cannot_do_without_padding_is_refused_before_a_weight_is_loaded(folder, capsys):
    command = ["trainer.unpadded=true", "model.attn_implementation=eager", "data.train_rows=8", "data.test_rows=8"]
    assert main(command) == 2
    assert "trainer.unpadded=true: model.attn_implementation=eager" in capsys.readouterr().err
    assert not (folder / "multirun").exists()


def test_a_ratio_that_is_5_percent_worse_than_the_recorded_one_is_told(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import training

    before = {"SFT: TRL": 2.0, "DPO: TRL": 3.0}
    assert training.lost({"SFT: TRL": 1.91, "DPO: TRL": 2.86, "new": 1.0}, before) == []
    assert training.lost({"SFT: TRL": 1.89, "DPO: TRL": 3.1}, before) == [
        "SFT: TRL: 1.89x the time of smoltrain, and it was 2.00x"
    ]
