"""Evaluation asks as a server does."""

from transformers import AutoTokenizer

from smoltrain.data.encode import Chat
from smoltrain.evaluate import replies
from smoltrain.model import locate


class Echo:
    """A model that says nothing, and keeps what it was asked."""

    device = "cpu"

    def eval(self):
        self.asked = []

    def generate(self, input_ids, **_):
        self.asked += input_ids.tolist()
        return input_ids


def test_the_tools_of_a_row_are_on_offer_when_it_is_answered():
    chat, echo = Chat(AutoTokenizer.from_pretrained(locate("pkg://smoltrain/tiny"))), Echo()
    says = [{"role": "user", "content": "Is it raining?"}, {"role": "assistant", "content": "Yes."}]
    tool = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
    rows = [{"messages": says, "tools": [tool]}, {"messages": says}]
    assert replies(echo, chat, rows, 4, 2) == ["", ""]
    asked = [chat.tokenizer.decode(ids).replace(chat.tokenizer.pad_token, "") for ids in echo.asked]
    assert asked == [
        text.replace(chat.tokenizer.pad_token, "")
        for text in chat.prompts([row | {"prompt": says[:1]} for row in rows])
    ]
    assert "weather" in asked[0] and "weather" not in asked[1]
