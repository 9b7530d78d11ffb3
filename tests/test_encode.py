"""Rows as tokens: the same as TRL's own preparation gives, and exactly what is to be learned marked in them."""

import json
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from smoltrain.config import ConfigError
from smoltrain.data.encode import IGNORED, Chat, Conversations, Encoded, Preferences, Untokenized, alike
from smoltrain.model import locate, read_chat_template

TINY = locate("pkg://smoltrain/tiny")
END = "<|im_end|>"


@pytest.fixture(scope="module")
def chat():
    return Chat(AutoTokenizer.from_pretrained(TINY))


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
TALKS = [
    [user("one"), assistant("two")],
    [SYSTEM, user("Mia has 3 plums."), assistant("  so she has\n")],
    [user("été 東京 🌍"), assistant("ça va"), user("and?"), assistant("東")],
    [SYSTEM, user("a"), assistant("b"), user("c" * 40), assistant("d"), user("e"), assistant("f 12")],
]
PAIRS = [
    {"prompt": talk[:-1], "chosen": talk[-1:], "rejected": [assistant(f"no, {i}")]} for i, talk in enumerate(TALKS)
]


def plain(columns: dict) -> dict[str, list]:
    return {name: np.asarray(values).tolist() for name, values in columns.items()}


def encode(encoder, chat, *rows: dict) -> list[Encoded]:
    return encoder.encode(list(rows), chat)


def learned(encoder, encoded: Encoded, chat) -> list[str]:
    return [chat.tokenizer.decode(ids) for ids, role in encoder.segments(encoded.columns) if role == "learned"]


# ---------------------------------------------------------------- the same as TRL's


def trls(trainer, rows: list[dict], chat, args, *rest) -> list[dict]:
    """What TRL's own step makes of rows, in a trainer without a model: the step asks no more of it."""
    made = object.__new__(trainer)
    made._tokenizer, made.chat_template, made.completion_only_loss = chat.tokenizer, None, False
    return made._prepare_dataset(Dataset.from_list(rows), chat.tokenizer, args, *rest, "train").to_list()


def plain_args(folder) -> dict:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "save_strategy": "no",
    }


def sft_args(folder, **more) -> SFTConfig:
    return SFTConfig(**plain_args(folder), **more)


@pytest.mark.parametrize("max_length", [None, 24, 12])
def test_conversations_are_what_trl_makes_of_them(chat, folder, max_length):
    rows = [{"messages": talk} for talk in TALKS]
    args = sft_args(folder, assistant_only_loss=True, max_length=max_length)
    expected = trls(SFTTrainer, rows, chat, args, False, None)
    encoder = Conversations("assistant")
    done = encode(encoder, chat, *rows)
    if max_length:
        done = [encoder.cut(row, max_length) if row.length > max_length else row for row in done]
    kept = [plain(row.columns) for row in done if row.trained]
    assert kept == [{name: row[name] for name in ("input_ids", "labels")} for row in expected]
    assert max_length != 12 or 0 < len(kept) < len(rows)


@pytest.mark.parametrize("max_length", [None, 40, 16])
def test_pairs_are_what_trl_makes_of_them(chat, folder, max_length):
    args = DPOConfig(**plain_args(folder), max_length=max_length)
    expected = trls(DPOTrainer, PAIRS, chat, args)
    encoder, names = Preferences(), ("prompt_ids", "chosen_ids", "rejected_ids")
    done = encode(encoder, chat, *PAIRS)
    if max_length:
        done = [encoder.cut(row, max_length) if row.length > max_length else row for row in done]
    kept = [plain(row.columns) for row in done if row.trained]
    assert len(kept) == len(expected) and (max_length != 16 or len(kept) < len(PAIRS))
    if max_length is None:
        assert kept == [{name: row[name] for name in names} for row in expected]
    collate = DataCollatorForPreference(chat.tokenizer.pad_token_id, max_length)
    for ours, theirs in zip(kept, expected, strict=True):  # TRL cuts only when it collates
        assert {k: v.tolist() for k, v in collate([ours]).items()} == {
            k: v.tolist() for k, v in collate([theirs]).items()
        }


@pytest.mark.parametrize("words", ["some text", f"one {END} two {END}", "été 東京"])
@pytest.mark.parametrize("bos", [True, False])
def test_plain_text_is_what_trl_makes_of_it(chat, folder, bos, words):
    chat = Chat(with_bos()) if bos else chat
    expected = trls(SFTTrainer, [{"text": words}], chat, sft_args(folder, max_length=None), False, None)
    (row,) = encode(Conversations("assistant"), chat, {"text": words})
    assert plain(row.columns) == {name: expected[0][name] for name in ("input_ids", "labels")}


# ---------------------------------------------------------------- what is learned


def test_what_the_assistant_says_and_its_end_of_turn_are_learned_and_nothing_else(chat):
    encoder = Conversations("assistant")
    for talk, row in zip(TALKS, encode(encoder, chat, *({"messages": talk} for talk in TALKS)), strict=True):
        said = [message["content"] + END for message in talk if message["role"] == "assistant"]
        assert learned(encoder, row, chat) == said and row.remarks == ()
        assert row.trained == sum(label != IGNORED for label in row.columns["labels"])
        assert "".join(chat.tokenizer.decode(ids) for ids, _ in encoder.segments(row.columns)) == (
            chat.tokenizer.apply_chat_template(talk, tokenize=False)
        )


words = st.text("ab 1.\n<|é東", min_size=1, max_size=12).filter(str.strip)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.booleans())
@settings(derandomize=True, max_examples=100, deadline=None)
def test_whatever_is_said_is_learned_and_nothing_else(chat, turns, system):
    talk = [SYSTEM] * system + [m for asked, said in turns for m in (user(asked), assistant(said))]
    encoder = Conversations("assistant")
    (row,) = encode(encoder, chat, {"messages": talk})
    assert learned(encoder, row, chat) == [said + END for _, said in turns]
    (pair,) = encode(Preferences(), chat, {"prompt": talk[:-1], "chosen": talk[-1:], "rejected": [assistant("c")]})
    shown = [(chat.tokenizer.decode(ids), role) for ids, role in Preferences().segments(pair.columns)]
    assert shown[1:] == [(turns[-1][1] + END, "learned"), (f"c{END}", "rejected")]


def test_train_on_chooses_what_is_learned(chat):
    talk = [user("a"), assistant("b"), user("c"), assistant("d", loss_weight=1.0)]

    def by(train_on: str, talk=talk):
        encoder = Conversations(train_on)
        return learned(encoder, encode(encoder, chat, {"messages": talk})[0], chat)

    assert by("assistant") == by("weighted") == [f"b{END}", f"d{END}"]
    assert by("last") == [f"d{END}"]
    assert by("all") == [chat.tokenizer.apply_chat_template(talk, tokenize=False)]
    masked = [user("a"), assistant("b", loss_weight=0.0), user("c"), assistant("d")]
    assert by("assistant", masked) == by("weighted", masked) == [f"d{END}"]
    assert by("last", [*masked[:3], assistant("d", loss_weight=0.0)]) == []
    assert f"b{END}" in "".join(by("all", talk)) and f"b{END}" not in "".join(by("all", masked))


def test_a_weight_between_0_and_1_needs_to_be_asked_for(chat):
    row = {"messages": [user("a"), assistant("b", loss_weight=0.5)]}
    for train_on in ("assistant", "last"):
        error = encode(Conversations(train_on), chat, row)[0].error
        assert error and "found 0.5" in str(error) and "encode.train_on=weighted" in str(error)
    encoder = Conversations("weighted")
    (done,) = encode(encoder, chat, row)
    assert learned(encoder, done, chat) == [f"b{END}"]
    assert set(done.columns["loss_weights"]) == {0, 0.5}
    assert encoder.columns("conversation").keys() == {"input_ids", "labels", "loss_weights"}


def test_plain_text_beside_weighted_turns_weighs_1(chat):
    (row,) = encode(Conversations("weighted"), chat, {"text": "words"})
    assert set(row.columns["loss_weights"]) == {1} and len(row.columns["loss_weights"]) == row.length


def with_bos(end: bool = False):
    """A tokenizer of bytes that puts <s> before a text, and with `end` its end after it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", END]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    single = f"<s> $A {END}" if end else "<s> $A"
    bpe.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), (END, 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token=END, chat_template=read_chat_template("chatml")
    )


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("text", ["words", "<s>words", f"words{END}"])
def test_plain_text_begins_and_ends_once(end, text):
    tokenizer = with_bos(end)
    (row,) = encode(Conversations("assistant"), Chat(tokenizer), {"text": text})
    assert tokenizer.decode(row.columns["input_ids"]) == f"<s>words{END}"
    assert row.columns["labels"].tolist() == row.columns["input_ids"].tolist() and row.trained == row.length
    assert bool(row.remarks) == (text != "words")


def test_chat_and_text_stand_side_by_side(chat):
    encoder = Conversations("assistant")
    rows = encode(encoder, chat, {"text": "t"}, {"messages": TALKS[0]}, {"text": "u"})
    assert [learned(encoder, row, chat) for row in rows] == [[f"t{END}"], [f"two{END}"], [f"u{END}"]]


# ---------------------------------------------------------------- what is odd


def remarks(encoder, chat, row: dict) -> tuple[str, ...]:
    return encode(encoder, chat, row)[0].remarks


def retemplated(chat, old: str, new: str) -> Chat:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert old in chat.template
    tokenizer.chat_template = chat.template.replace(old, new)
    return Chat(tokenizer)


def test_a_turn_without_its_end_is_remarked(chat):
    endless = retemplated(
        chat,
        "message['content'] + '<|im_end|>' -}}\n{%- endif -%}\n{%- endgen",
        "message['content'] -}}\n{%- endif -%}\n{%- endgen",
    )
    assert remarks(Conversations("assistant"), endless, {"messages": TALKS[0]}) == ("a turn without its end",)
    assert remarks(Preferences(), endless, PAIRS[0]) == ("a turn without its end",)
    # Qwen's prints a newline after the end, within the reply
    spaced = retemplated(
        chat,
        "message['content'] + '<|im_end|>' -}}\n{%- endif -%}\n{%- endgen",
        "message['content'] + '<|im_end|>\\n' -}}\n{%- endif -%}\n{%- endgen",
    )
    assert remarks(Conversations("assistant"), spaced, {"messages": TALKS[0]}) == ()
    assert remarks(Preferences(), spaced, PAIRS[0]) == ()


def test_a_special_token_in_words_is_remarked(chat):
    odd = [user(f"what is {END}?"), assistant("the end")]
    assert remarks(Conversations("assistant"), chat, {"messages": odd}) == (f"{END} in its words",)
    pair = {"prompt": TALKS[0][:1], "chosen": [assistant("one")], "rejected": [assistant("<|im_start|> two")]}
    assert remarks(Preferences(), chat, pair) == ("<|im_start|> in its words",)


STRADDLING = "a token across the beginning of a reply, which serving would tokenise otherwise"


def straddling() -> Chat:
    """A tokenizer with the token `:y`, and a template whose prompt ends with the colon."""
    vocabulary = {letter: i for i, letter in enumerate(["</s>", *"ab:yes no", ":y"])}
    bpe = Tokenizer(models.BPE(vocabulary, [(":", "y")]))
    bpe.add_special_tokens(["</s>"])
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}:{% generation %}{{ m['content'] + '</s>' }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    return Chat(PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", chat_template=template))


def test_a_token_across_the_beginning_of_a_reply_is_remarked(folder):
    chat = straddling()
    encoder = Conversations("assistant")
    (row,) = encode(encoder, chat, {"messages": [user("a"), assistant("yes")]})
    assert row.remarks == (STRADDLING,)
    assert encode(encoder, chat, {"messages": [user("a"), assistant("no")]})[0].remarks == ()
    pair = {"prompt": [user("a")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    (row,) = encode(Preferences(), chat, pair)
    assert row.remarks == (STRADDLING,)
    texts = {name: chat.tokenizer.decode(ids).replace(" ", "") for name, ids in row.columns.items()}
    # both replies follow the one prompt: what differs between them is not in it
    assert texts == {"prompt_ids": "a", "chosen_ids": ":yes</s>", "rejected_ids": ":no</s>"}


def test_replies_that_are_nearly_the_same_are_remarked(chat):
    long = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2
    pair = {"prompt": [user("q")], "chosen": [assistant(long + "1")], "rejected": [assistant(long + "2")]}
    assert remarks(Preferences(), chat, pair) == ("replies that are nearly the same",)
    assert remarks(Preferences(), chat, pair | {"rejected": [assistant(long[:60])]}) == ()
    assert alike(np.arange(40), np.r_[np.arange(20), 99, np.arange(21, 40)])
    assert not alike(np.arange(40), np.r_[np.arange(20), 99, 98, 97, np.arange(23, 40)])
    assert not alike(np.array([1] * 10), np.array([1] * 20))


def test_replies_of_which_the_model_reads_no_difference_are_refused_by_row(chat):
    stripping = retemplated(
        chat,
        "{{- message['content'] + '<|im_end|>' -}}\n{%- endif",
        "{{- message['content'] | trim + '<|im_end|>' -}}\n{%- endif",
    )
    pair = {"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("yes ")]}
    assert encode(Preferences(), chat, pair)[0].error is None
    assert "chosen equals rejected, found 'yes '" in str(encode(Preferences(), stripping, pair)[0].error)


def test_turns_of_others_within_a_reply_are_remarked(chat):
    """TRL learns all that follows a prompt, the user's words in it too."""
    pair = {
        "prompt": [user("q")],
        "chosen": [assistant("a"), user("more?"), assistant("b")],
        "rejected": [assistant("c")],
    }
    assert remarks(Preferences(), chat, pair) == ("turns of others in a reply, which are learned as its own",)


def test_a_prompt_in_a_reply_is_remarked(chat):
    asked = "how many plums does Mia have?"
    pair = {"prompt": [user(asked)], "chosen": [assistant(f"{asked} Three")], "rejected": [assistant("Two")]}
    assert remarks(Preferences(), chat, pair) == ("the prompt in a reply",)
    short = {"prompt": [user("Three")], "chosen": [assistant("Three it is")], "rejected": [assistant("Two")]}
    assert remarks(Preferences(), chat, short) == ()


def test_turns_that_a_template_does_not_mark_are_refused_by_row(chat):
    once = retemplated(
        chat, "{%- if message['role'] == 'assistant' -%}", "{%- if message['role'] == 'assistant' and loop.last -%}"
    )
    two, one = encode(Conversations("assistant"), once, {"messages": TALKS[2]}, {"messages": TALKS[0]})
    assert one.error is None and "does not mark, found 2" in str(two.error)


def test_a_prompt_that_is_printed_otherwise_in_serving_is_refused_by_row(chat):
    thinking = retemplated(chat, "'\\n<|im_start|>assistant\\n' -}}", "'\\n<|im_start|>assistant\\n<think>' -}}")
    error = encode(Preferences(), thinking, PAIRS[0])[0].error
    assert error and "training and serving differ" in str(error) and "<think>" in str(error)


# ---------------------------------------------------------------- what is cut


def test_a_cut_keeps_the_beginning_and_counts_what_is_lost(chat):
    for encoder, row in ((Conversations("weighted"), {"messages": TALKS[3]}), (Preferences(), PAIRS[3])):
        (whole,) = encode(encoder, chat, row)
        for length in range(1, whole.length):
            cut = encoder.cut(whole, length)
            assert cut.length == length and cut.trained + cut.lost == whole.trained
            prompt = cut.columns.get("prompt_ids", [])
            for name, ids in cut.columns.items():
                assert name == "prompt_ids" or len(ids) <= max(0, length - len(prompt))
                assert list(ids) == list(whole.columns[name][: len(ids)])
            assert bool(cut.trained) == (length > (len(prompt) or first_learned(whole)))


def first_learned(row: Encoded) -> int:
    return int(np.argmax(row.columns["labels"] != IGNORED))


# ---------------------------------------------------------------- the loss


@pytest.fixture
def losses(chat, folder):
    """The loss of a real trainer on a batch, by `train_on`, and the log-probabilities of its tokens."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")

    def loss(train_on: str, rows: list[dict], **more) -> tuple[float, list[Encoded], torch.nn.Module]:
        encoder = Conversations(train_on)
        done = encode(encoder, chat, *rows)
        schema = pa.schema(list(encoder.columns("conversation").items()))
        data = Dataset(pa.Table.from_pylist([row.columns for row in done], schema=schema))
        args = sft_args(folder, per_device_train_batch_size=8, per_device_eval_batch_size=8, **more)
        trainer = encoder.feed(partial(SFTTrainer, args=args))(
            model=model, processing_class=chat.tokenizer, train_dataset=data, eval_dataset=data
        )
        return trainer, done, model

    return loss


WEIGHED = [
    {"messages": [user("a"), assistant("b c d", loss_weight=0.25), user("c"), assistant("d e", loss_weight=2.0)]},
    {"messages": [SYSTEM, user("a"), assistant("b" * 30), user("c"), assistant("x", loss_weight=0.0)]},
]


def test_the_weighted_loss_is_the_weighted_mean(losses):
    trainer, rows, model = losses("weighted", WEIGHED)
    total, learned = 0.0, 0
    for row in rows:
        ids = torch.tensor(np.array(row.columns["input_ids"], dtype=np.int64))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        lost = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total += float((lost * torch.tensor(row.columns["loss_weights"])[1:]).sum())
        learned += row.trained
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / learned, rel=1e-5)
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(total / learned, rel=1e-5)


def test_weights_of_1_are_no_weights(losses):
    rows = [{"messages": talk} for talk in TALKS]
    plainly, weighted = (losses(train_on, rows)[0].evaluate()["eval_loss"] for train_on in ("assistant", "weighted"))
    assert plainly == weighted
    padded = losses("weighted", rows, pad_to_multiple_of=64)[0].evaluate()["eval_loss"]
    assert padded == pytest.approx(plainly, rel=1e-5)


def test_what_is_weighed_is_what_is_trained(losses, folder):
    silenced = [{"messages": [user("a"), assistant("b", loss_weight=1e-9)]}] * 8
    trainer, _, model = losses("weighted", silenced, max_steps=1, learning_rate=1.0, optim="sgd", logging_steps=1)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer.train()
    moved = [(weight.detach() - before[name]).abs().max() for name, weight in model.named_parameters()]
    assert max(moved) < 1e-6
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0, abs=1e-6)


def test_rows_cut_at_their_end_are_not_said_to_be_cut_at_their_beginning(folder):
    with pytest.warns(FutureWarning, match="keep_end"):
        args = sft_args(folder, truncation_mode="keep_end")
    with pytest.raises(ConfigError, match=r"trainer\.args\.truncation_mode=keep_end: rows are cut at their end"):
        Conversations("assistant").feed(partial(SFTTrainer, args=args))


def test_packing_and_shuffling_are_still_trls(losses):
    rows = [{"messages": talk} for talk in TALKS]
    packed = losses("assistant", rows, packing=True, max_length=128)[0]
    tokens = sum(row.length for row in losses("assistant", rows)[1])
    assert sum(map(len, packed.train_dataset["input_ids"])) == tokens and len(packed.train_dataset) < len(rows)
    only_eval = losses("assistant", rows, eval_packing=True, max_length=128)[0]
    assert len(only_eval.train_dataset) == len(rows) > len(only_eval.eval_dataset)
    shuffled = losses("assistant", rows * 4, shuffle_dataset=True)[0].train_dataset["input_ids"]
    assert shuffled[:] != losses("assistant", rows * 4)[0].train_dataset["input_ids"][:]


# ---------------------------------------------------------------- rows that a trainer tokenises itself


def test_rows_for_a_trainer_that_tokenises_are_given_as_they_are(chat):
    encoder = Untokenized(["unpaired", "preference"])
    row = {"prompt": [user("q")], "completion": [assistant("a")], "label": True}
    (done,) = encode(encoder, chat, row)
    schema = pa.schema(list(encoder.columns("unpaired").items()))
    assert pa.Table.from_pylist([done.columns], schema=schema).to_pylist() == [row]
    trainer = partial(SFTTrainer)
    assert encoder.feed(trainer) is trainer


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"completion": [assistant("", tool_calls=[{"type": "function"}])]}, "completion[0].tool_calls"),
        ({"completion": [assistant("a", loss_weight=0.0)]}, "completion[0].loss_weight"),
        ({"completion": [assistant("a", loss_weight=1.0)]}, None),
    ],
)
def test_what_such_a_trainer_would_not_see_is_refused_by_row(chat, more, field):
    row = {"prompt": [user("q")], "completion": [assistant("a")], "label": True} | more
    error = encode(Untokenized(["unpaired"]), chat, row)[0].error
    assert (error.field if error else None) == field


def test_a_batch_is_encoded_as_its_rows_are(chat):
    """So that nothing depends on which rows happen to stand together."""
    for encoder, rows in ((Conversations("weighted"), [{"messages": t} for t in TALKS]), (Preferences(), PAIRS)):
        together = encode(encoder, chat, *rows)
        alone = [encode(encoder, chat, row)[0] for row in rows]
        assert json.dumps([plain(row.columns) for row in together]) == json.dumps([plain(r.columns) for r in alone])
