"""SFT without padding: each row is computed as long as it is, and scored where it is learned."""

from functools import partial
from typing import Any

import trl

from smoltrain.unpadded import inexact, unpad


class SFTTrainer(trl.SFTTrainer):
    """TRL's trainer, whose model computes no padding.

    `unpadded` null is that where it is exact, and TRL's own layout, saying why, where it is not; true demands it, and
    raises ConfigError where it is not exact; false is TRL's own.
    """

    layout = "unpadded"
    inexact = staticmethod(inexact)

    def __init__(self, *given: Any, unpadded: bool | None = None, **named: Any) -> None:
        super().__init__(*given, **named)
        adapters = [*getattr(self.model, "peft_config", {}).values()]
        why = partial(inexact, args=self.args, adapters=adapters)
        self.unpadded = unpad(unpadded, "trainer.unpadded", why, "padding is computed too", [self.model])
