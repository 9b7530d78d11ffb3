"""DPO on shared prefixes: what both replies of a pair begin with is computed once, without padding.

    prompt + chosen, padded      ┐
    prompt + rejected, padded    ┘  ->    prompt | chosen | rejected | prompt | chosen | rejected | …

Each token that two replies have in common stands once, at the position that it has in both; attention sees each reply
behind its prompt (unpadded.py). The paper on it: "Accelerating Direct Preference Optimization with Prefix Sharing"
(arXiv 2410.20305), whose one masked row a pair is another way to the same numbers.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import trl
from torch import Tensor

from smoltrain import unpadded
from smoltrain.reference import ahead


class DPOTrainer(trl.DPOTrainer):
    """TRL's trainer, whose model computes once what the replies of a pair share, and its reference once for all runs.

    `shared_prefix` null is that where it is exact, and TRL's own layout, saying why, where it is not; true demands it,
    and raises ConfigError where it is not exact; false is TRL's own.
    """

    layout = "shared_prefix"

    def __init__(self, *given: Any, shared_prefix: bool | None = None, **named: Any) -> None:
        self.shared_prefix = shared_prefix
        super().__init__(*given, **named)
        self.share()

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self.share()  # this is within TRL's __init__
        return ahead(self, dataset, batch_size, partial(super()._precompute_ref_logps, dataset, name, batch_size))

    def share(self) -> None:
        """Has the model, and the reference where that is another one, compute shared prefixes once from now on."""
        adapters = [*getattr(self.model, "peft_config", {}).values()]
        why = partial(self.inexact, args=self.args, adapters=adapters)
        asked, instead = self.shared_prefix, "each prompt is computed twice"
        models = [self.model, self.ref_model]
        self.shared_prefix = unpadded.unpad(asked, "trainer.shared_prefix", why, instead, models, shared=first)

    @staticmethod
    def inexact(model: Any, args: Any, adapters: Sequence[Any] = ()) -> str:
        """Why a reply would come to something else than behind a prompt of its own; empty where it would not."""
        if why := unpadded.inexact(model, args, adapters):
            return why
        if any(isinstance(part, torch.nn.Dropout) and part.p for part in model.modules()) and not args.disable_dropout:
            return "both replies would have one dropout of the prompt (disable_dropout=false)"
        return ""


def first(ids: Tensor, real: Tensor) -> Tensor:
    """The places at which a batch of TRL's is computed, counted through it; (2 x pairs, width), chosen replies first.

    A rejected reply's are the chosen one's as long as both are the same.
    """
    pairs = len(ids) // 2
    places = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    same = (ids[:pairs] == ids[pairs:]) & real[:pairs] & real[pairs:]
    common = same.cumprod(1).bool()
    return torch.cat([places[:pairs], torch.where(common, places[:pairs], places[pairs:])])
