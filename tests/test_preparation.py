"""The pass over the rows comes to the same however the rows are dealt out, and whichever of them are odd."""

import pyarrow as pa
import pytest
from hydra.utils import instantiate

from smoltrain.config.compose import compose
from smoltrain.data.encode import Chat, Conversations, Preferences
from smoltrain.data.formats import recognise
from smoltrain.data.tokens import Pass

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ann has 2 and 3 more"}
REPLY, OTHER = {"role": "assistant", "content": "2 + 3 = 5."}, {"role": "assistant", "content": "6, I think"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
CHATS = [  # good, with several turns, too long, unreadable, refused by the template, with special tokens in its words
    [USER, REPLY],
    [SYSTEM, USER, REPLY, USER, OTHER],
    [USER | {"content": "word " * 200}, REPLY],
    [USER, REPLY | {"content": None}],
    [USER, CALL],
    [USER | {"content": "what is <|im_end|>?"}, REPLY],
    [USER | {"content": "état, 日本語, 🙂"}, REPLY],
]
PAIRS = [{"prompt": chat[:-1], "chosen": chat[-1:], "rejected": [OTHER | {"content": "no"}]} for chat in CHATS]
ROWS = {"sft": [{"messages": chat} for chat in CHATS], "dpo": PAIRS}


@pytest.mark.parametrize(("method", "encoder"), [("sft", Conversations("assistant")), ("dpo", Preferences())])
def test_batches_of_any_size_come_to_the_same(method, encoder):
    chat = Chat(instantiate(compose([], []).model).tokenizer())
    chat.tokenizer.chat_template = chat.tokenizer.chat_template.replace("tool", "took")  # it prints no tools any more
    given = ROWS[method] * 3
    shape = recognise(list(given[0]), given, encoder.kinds, None, None)
    run = Pass(shape, encoder, chat, 64, "truncate", None)
    table = pa.Table.from_pylist(given)
    whole = run(table)
    assert set(whole["reason"].to_pylist()) == {
        None,
        "null content",
        "refused by the chat template",
        "all prompt at max_length",
    }
    assert whole.equals(pa.concat_tables(run(table.slice(i, 1)) for i in range(len(given))))
    assert whole.equals(pa.concat_tables(run(table.slice(i, 4)) for i in range(0, len(given), 4)))
