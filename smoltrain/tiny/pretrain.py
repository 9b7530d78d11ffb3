"""Makes the embedded model from nothing: its tokenizer, then a base pre-trained on plain text about sums.

    python -m smoltrain.tiny.pretrain [directory]

The base has read sums and stories but never a conversation: it can add, it does not know how to answer.
That is what SFT teaches it, in seconds. Held-out sums (`smoltrain.data.sums`) never occur in the text.
The same script gives the same weights on the same kind of processor: one seed, two threads, no dropout.
"""

import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM, set_seed

from smoltrain.config import CONF
from smoltrain.data.sums import sides, stories

HERE = Path(__file__).parent
CHAT_TEMPLATE = CONF / "chat_template" / "chatml.jinja"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 512
LENGTH, BATCH, STEPS, LEARNING_RATE = 96, 32, 4000, 2e-3


def documents(rng: random.Random):
    """Plain text without end, as pairs of what is given and what follows from it: bare sums, and stories told.

    Operands, names and things are drawn at random, so there is nothing to learn in them, and the noise of
    their gradient hides the carry: only what follows is trained on.
    """
    train, _ = sides()
    while True:
        for number, story in enumerate(stories(train, len(train), rng)):
            if number % 4 == 0:
                yield story.opening, f" {story.reply()[:-1]} now."
            else:
                yield f"{story.a} {story.sign} {story.b} =", f" {story.result}."


def train_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE that keeps digits apart, as SmolLM2 and SmolLM3 do, with ChatML's marks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    told = stories(sides()[0], 20_000, random.Random(0))
    tokenizer.train_from_iterator(
        [f"user\n{story.question}\nassistant\n{story.reply()}" for story in told],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048
    )
    fast.chat_template = CHAT_TEMPLATE.read_text()
    fast.save_pretrained(directory)
    return fast


def batches(tokenizer: PreTrainedTokenizerFast, seed: int):
    """`(BATCH, LENGTH)` windows of one endless stream of documents, each ended by `<|endoftext|>`, and its labels."""
    text, end = documents(random.Random(seed)), tokenizer.pad_token_id
    ids: list[int] = []
    labels: list[int] = []
    while True:
        while len(ids) < BATCH * LENGTH:
            given, told = zip(*[next(text) for _ in range(512)], strict=True)
            for left, right in zip(tokenizer(given)["input_ids"], tokenizer(told)["input_ids"], strict=True):
                ids += [*left, *right, end]
                labels += [*[-100] * len(left), *right, end]
        yield tuple(torch.tensor(stream[: BATCH * LENGTH]).view(BATCH, LENGTH) for stream in (ids, labels))
        ids, labels = ids[BATCH * LENGTH :], labels[BATCH * LENGTH :]


@torch.no_grad()
def held_out_accuracy(model: SmolLM3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """The share of held-out sums `37 + 48 = 85` whose every result token is the model's first choice."""
    alike: dict[tuple[int, int], list[tuple[list[int], list[int]]]] = {}  # of one shape, to be read at once
    for a, sign, b in sides()[1]:
        given = [tokenizer.pad_token_id, *tokenizer(f"{a} {sign} {b} =")["input_ids"]]
        told = tokenizer(f" {a + b if sign == '+' else a - b}.")["input_ids"]
        alike.setdefault((len(given), len(told)), []).append((given, told))
    right = []
    for (read, _), rows in alike.items():
        ids = torch.tensor([given + told for given, told in rows])
        right += (model(input_ids=ids).logits[:, read - 1 : -1].argmax(-1) == ids[:, read:]).all(-1).tolist()
    return sum(right) / len(right)


def pretrain(directory: Path, steps: int = STEPS) -> None:
    """Writes tokenizer, configuration and bfloat16 weights to `directory`, in under 30 minutes on 2 cores."""
    torch.set_num_threads(2)
    set_seed(0)
    tokenizer = train_tokenizer(directory)
    config = SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = SmolLM3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    started = time.monotonic()
    for step, (ids, labels) in zip(range(1, steps + 1), batches(tokenizer, seed=0), strict=False):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 500 == 0 or step == steps:
            right, seconds = held_out_accuracy(model, tokenizer), time.monotonic() - started
            print(
                f"step {step}/{steps}  loss {loss.item():.4f}  held-out sums {right:.1%}  {seconds:.0f} s", flush=True
            )
    model.bfloat16().save_pretrained(directory)


if __name__ == "__main__":
    pretrain(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
