"""DPO on shared prefixes comes to what TRL's own layout comes to, pair by pair, and says where it would not."""

import random

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer
from trl import DPOConfig

from smoltrain.__main__ import main
from smoltrain.config import ConfigError
from smoltrain.dpo import DPOTrainer, first
from smoltrain.head import Scores
from smoltrain.model import locate
from smoltrain.unpadded import laid_out

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own

TINY = locate("pkg://smoltrain/tiny")
LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired")
LOSSES += ("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")


def rows(pairs: int, prompt: tuple[int, int], reply: tuple[int, int], seed: int = 0) -> Dataset:
    """Pairs of random tokens, with prompts and replies of so many, from and to."""
    rng = random.Random(seed)

    def ids(between: tuple[int, int]) -> list[int]:
        return [rng.randrange(5, 400) for _ in range(rng.randint(*between))]

    return Dataset.from_list(
        [{"prompt_ids": ids(prompt), "chosen_ids": ids(reply), "rejected_ids": ids(reply)} for _ in range(pairs)]
    )


class Given(DPOTrainer):
    """Takes rows that are tokens already."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


def trainer(folder, data: Dataset, shared: bool | None, model=None, lora=None, **args) -> DPOTrainer:
    torch.manual_seed(0)
    model = model or AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="sdpa", dtype=torch.float32)
    given = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    given |= {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "disable_tqdm": True,
        "max_length": None,
    }
    given |= {"activation_checkpointing": False, "logging_steps": 1, "learning_rate": 1e-4}
    return Given(
        model=model,
        args=DPOConfig(**given | args),
        train_dataset=data,
        eval_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(TINY),
        peft_config=lora,
        shared_prefix=shared,
    )


def per_reply(one: DPOTrainer, batch: dict) -> torch.Tensor:
    return torch.cat(one.compute_ref_log_probs(one.model, batch))


def came_to(one: Trainer, batch: dict, scored=per_reply) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """The log-probabilities that are `scored`, all gradients, and the metrics, of one batch."""
    one.model.train()
    with torch.no_grad():
        logps = scored(one, batch)
    one.model.zero_grad()
    one.compute_loss(one.model, dict(batch)).backward()
    gradients = [p.grad.flatten() for p in one.model.parameters() if p.grad is not None]
    return logps, torch.cat(gradients), {name: values[-1] for name, values in one._metrics["train"].items()}


@pytest.mark.parametrize(
    ("pairs", "prompt", "reply", "cut"),
    [
        (4, (0, 0), (3, 40), None),  # nothing predicts the first token
        (4, (0, 9), (3, 40), None),
        (1, (30, 30), (10, 20), None),
        (4, (20, 60), (2, 60), None),
        (4, (90, 180), (10, 20), None),  # 90 % of a row
        (6, (5, 50), (1, 60), 40),  # cut, some of them to nothing but the prompt
        (4, (1, 1), (1, 1), None),
    ],
)
def test_each_pair_comes_to_what_it_comes_to_alone(folder, pairs, prompt, reply, cut):
    data = rows(pairs, prompt, reply)
    ours, stock = (trainer(folder, data, shared, max_length=cut) for shared in (True, False))
    batch = stock.data_collator([data[n] for n in range(pairs)])
    (logps, gradient, metrics), (stocks, its, said) = came_to(ours, batch), came_to(stock, batch)
    torch.testing.assert_close(logps, stocks, rtol=1e-5, atol=1e-5)
    assert torch.nn.functional.cosine_similarity(gradient.double(), its.double(), 0) >= 0.99999
    torch.testing.assert_close(gradient, its, rtol=1e-4, atol=1e-5)
    assert metrics.keys() == said.keys() and metrics == pytest.approx(said, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_trls(folder, loss):
    data = rows(4, (5, 30), (3, 30))
    args = {"loss_type": loss, "ld_alpha": 0.5, "label_smoothing": 0.1, "use_weighting": loss == "sigmoid"}
    ours, stock = (trainer(folder, data, shared, **args) for shared in (True, False))
    with torch.no_grad():
        for one in (ours, stock):
            for weight in one.model.parameters():
                weight.mul_(1.02)  # so that it is another one than the reference
    batch = stock.data_collator([data[n] for n in range(4)])
    (_, gradient, metrics), (_, its, said) = came_to(ours, batch), came_to(stock, batch)
    torch.testing.assert_close(gradient, its, rtol=1e-3, atol=1e-4)
    assert metrics == pytest.approx(said, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("way", ["whole", "lora", "ahead", "accumulated", "recomputed"])
def test_fifty_steps_are_the_same_fifty_steps(folder, way):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules="all-linear") if way == "lora" else None
    args = {
        "max_steps": 50,
        "precompute_ref_log_probs": way == "ahead",
        "activation_checkpointing": way == "recomputed",
    }
    args |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} if way == "accumulated" else {}
    losses = []
    for shared in (True, False):
        one = trainer(folder, rows(40, (0, 24), (2, 16)), shared, lora=lora, **args)
        one.train()
        losses.append(
            [line["loss"] for line in one.state.log_history if "loss" in line] + [one.evaluate()["eval_loss"]]
        )
    assert len(losses[0]) == 51 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.01


def test_a_prompt_is_computed_once_and_the_head_where_a_reply_is_predicted(folder, monkeypatch):
    ours = trainer(folder, rows(4, (40, 40), (10, 10)), None)
    batch = ours.data_collator([ours.train_dataset[n] for n in range(4)])
    seen, scored = [], []
    ours.model.base_model.embed_tokens.register_forward_hook(lambda _, given, __: seen.append(given[0].shape))
    real = Scores.apply
    monkeypatch.setattr(Scores, "apply", lambda hidden, *rest: scored.append(len(hidden)) or real(hidden, *rest))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    out = ours.model(**given, fused_lm_head=True)
    assert out.label_mask.equal(labels[:, 1:] != -100) and out.log_probs.shape == out.label_mask.shape
    assert batch["input_ids"].shape == (8, 50) and seen == [(1, 240)] and scored == [80]


def test_a_batch_is_one_row_in_which_a_common_beginning_stands_once():
    ids = torch.tensor([[1, 2, 3, 0], [7, 8, 9, 5], [1, 2, 4, 5], [7, 8, 9, 0]])
    labels = torch.tensor([[-100, -100, 3, -100], [-100, 8, 9, 5], [-100, -100, 4, 5], [-100, 8, 9, -100]])
    real = ids > 0
    laid = laid_out(ids, labels, real, torch.arange(4).expand_as(ids), first(ids, real))
    assert laid.ids.tolist() == [[1, 2, 3, 7, 8, 9, 5, 4, 5]]
    assert laid.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 2, 3]]
    assert laid.blocks == [(2, 4), (2, 3)]  # rows of one length stand together, behind their prompts
    assert laid.seen.tolist() == [3, 4, 5, 6, 0, 1, 7, 8, 0, 1, 2, 3, 4, 5]
    assert laid.seen[laid.own].tolist() == [*range(9)]
    assert laid.source.tolist() == [[1, 3, 4, 5, 1, 7, 3, 4]] and laid.labels.tolist() == [[3, 8, 9, 5, 4, 5, 8, 9]]


KINDS = ("llama", "qwen2", "qwen3", "gemma", "phi3", "olmo2", "granite", "cohere", "glm4", "starcoder2", "gpt_neox")
KINDS += ("mixtral",)
SMALL = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}


def small(kind: str, **own) -> PreTrainedModel:
    """A small model of an architecture, with weights that make much of what a token sees."""
    torch.manual_seed(0)
    known = AutoConfig.for_model(kind).to_dict().keys()
    config = AutoConfig.for_model(kind, **{key: value for key, value in SMALL.items() if key in known} | own)
    return AutoModelForCausalLM.from_config(config, attn_implementation=own.get("attn_implementation", "sdpa"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_architectures_that_people_train_are_exact(folder, kind):
    data, balance = rows(4, (0, 30), (3, 30)), 0.0 if kind == "mixtral" else None
    ours, stock = (
        trainer(folder, data, shared, small(kind), precompute_ref_log_probs=True, router_aux_loss_coef=balance)
        for shared in (True, False)
    )
    batch = stock.data_collator([ours.train_dataset[n] for n in range(4)])
    (logps, gradient, _), (stocks, its, _) = came_to(ours, batch), came_to(stock, batch)
    torch.testing.assert_close(logps, stocks, rtol=1e-5, atol=1e-4)
    assert torch.nn.functional.cosine_similarity(gradient.double(), its.double(), 0) >= 0.99999


@pytest.mark.parametrize(
    ("kind", "own", "why"),
    [
        ("mistral", {"sliding_window": 8}, "mistral sees a window of 8 tokens only"),
        ("gemma3_text", {"sliding_window": 8}, "gemma3_text has layers other than full attention, sliding_attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "lfm2 has layers other than full attention, conv"),
        ("mamba", {"attn_implementation": "eager"}, "model.attn_implementation=eager"),
        ("mixtral", {}, "mixtral balances its experts over all tokens of a batch"),
        ("llama", {"attn_implementation": "eager"}, "model.attn_implementation=eager; only sdpa sees rows apart"),
        ("gpt2", {}, "both replies would have one dropout of the prompt"),
    ],
)
def test_where_it_is_not_exact_trl_does_as_it_always_does_and_that_is_said(folder, capsys, kind, own, why):
    data, args = rows(4, (5, 30), (3, 30)), {"precompute_ref_log_probs": True, "disable_dropout": kind != "gpt2"}
    one = trainer(folder, data, None, small(kind, **own), **args)
    assert one.shared_prefix is False and f"each prompt is computed twice: {why}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=rf"trainer\.shared_prefix=true: {why}"):
        trainer(folder, data, True, small(kind, **own), **args)


def test_what_cannot_share_is_refused_before_a_weight_is_loaded(folder, capsys):
    command = ["trainer=dpo", "trainer.shared_prefix=true", "data.train_rows=8", "data.test_rows=8"]
    assert main([*command, "model.attn_implementation=eager"]) == 2
    assert "trainer.shared_prefix=true: model.attn_implementation=eager" in capsys.readouterr().err
    prompts = ["++trainer.peft_config._target_=peft.PromptTuningConfig", "++trainer.peft_config.num_virtual_tokens=4"]
    prompts += ["++trainer.peft_config.task_type=CAUSAL_LM", "++trainer.peft_config.tokenizer_name_or_path=null"]
    assert main([*command, *prompts]) == 2
    assert "the adapter puts tokens of its own before each row" in capsys.readouterr().err
    assert not (folder / "multirun").exists()
