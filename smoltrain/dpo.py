"""DPO on shared prefixes: what both replies of a pair begin with is computed once, and scored where a reply is.

    prompt + chosen, padded      ┐
    prompt + rejected, padded    ┘  ->    prompt | chosen | rejected | prompt | chosen | rejected | …

TRL's collator and loss are as they were. Between them a batch becomes one row without padding, in which each token that
two replies have in common stands once, at the position that it has in both. All that a model does token by token is
done on that row; its attention sees the pairs as they were, each reply behind its prompt, and the head the places that
predict a reply. What comes out per token goes back to where TRL expects it, so that every loss, metric and reference of
TRL's works on it. Exact but for the order of floating-point sums: 1e-6 relative in float32.
"""

import inspect
import types
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import trl
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.trainer.utils import FusedCausalLMOutput

from smoltrain.config import ConfigError
from smoltrain.reference import ahead, base

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # what TRL's fused head gives
IGNORED = -100  # the label of what is not predicted
ATTENTION = "shared_prefix"


class DPOTrainer(trl.DPOTrainer):
    """TRL's trainer, whose model computes once what the replies of a pair share, and its reference once for all runs.

    `shared_prefix` null is that where it is exact, and TRL's own layout, saying why, where it is not; true demands it,
    and raises ConfigError where it is not exact; false is TRL's own.
    """

    def __init__(self, *given: Any, shared_prefix: bool | None = None, **named: Any) -> None:
        self.shared_prefix = shared_prefix
        super().__init__(*given, **named)
        self.share()

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self.share()  # this is within TRL's __init__
        return ahead(self, dataset, batch_size, partial(super()._precompute_ref_logps, dataset, name, batch_size))

    def share(self) -> None:
        """Has the model, and the reference where that is another one, compute shared prefixes once from now on."""
        models = [base(model) for model in (self.model, self.ref_model) if model is not None]
        if self.shared_prefix is False or all(model.config._attn_implementation == ATTENTION for model in models):
            return
        if why := next(filter(None, map(self.inexact, models)), ""):
            if self.shared_prefix:
                raise ConfigError(f"trainer.shared_prefix=true: {why}")
            print(f"each prompt is computed twice: {why}")
            self.shared_prefix = False
            return
        self.shared_prefix = True
        for model in models:
            model.set_attn_implementation(ATTENTION)
            model.forward = types.MethodType(sharing(model.forward), model)

    def inexact(self, model: Any) -> str:
        """Why a reply would come to something else than behind a prompt of its own; empty where it would not."""
        config = model.config.get_text_config()
        others = sorted({*(getattr(config, "layer_types", None) or ())} - {"full_attention"})
        takes = inspect.signature(model.forward).parameters
        if self._is_vision_dataset:
            return "its rows have images"
        if config._attn_implementation != "sdpa":
            return f"model.attn_implementation={config._attn_implementation}, and it is sdpa that can share"
        if model._is_stateful or others:
            return f"{config.model_type} has layers other than full attention{', ' * bool(others)}{', '.join(others)}"
        if not hasattr(config, "layer_types") and getattr(config, "sliding_window", None):
            return f"{config.model_type} sees a window of {config.sliding_window} tokens only"
        if not model._supports_attention_backend or "position_ids" not in takes:
            return f"transformers lets nobody place the tokens of {config.model_type} and change its attention"
        if not all(getattr(part, "is_causal", True) for part in model.modules()):
            return f"{config.model_type} lets tokens see those that follow"
        if self.aux_loss_enabled:
            return "its experts are balanced over all tokens of a batch"
        if any(isinstance(part, torch.nn.Dropout) and part.p for part in model.modules()):
            return "both replies would have one dropout of the prompt"
        return ""


@dataclass
class Layout:
    """A batch of pairs as one row of tokens, each of a common beginning once.

    `ids` and `positions` (1, tokens) are what the model gets. `rows` (2 x pairs, width) says of each place in TRL's
    batch which token stands there, and `own` (tokens) of each token a place of it. `predicted` (2 x pairs, width - 1)
    are TRL's places that are scored, in whose order `source` and `labels` (1, places) are the tokens that predict
    them and those that are predicted.
    """

    ids: Tensor
    positions: Tensor
    rows: Tensor
    own: Tensor
    predicted: Tensor
    source: Tensor
    labels: Tensor


def laid_out(ids: Tensor, attended: Tensor, labels: Tensor) -> Layout:
    """Lays out a batch of TRL's: (2 x pairs, width), the chosen replies first, padded on the right."""
    pairs, width = len(ids) // 2, ids.shape[1]
    real = attended.bool()
    same = (ids[:pairs] == ids[pairs:]) & real[:pairs] & real[pairs:]
    common = same.cumprod(1).bool()
    once = torch.cat([real[:pairs], real[pairs:] & ~common])
    number = (once.flatten().cumsum(0) - 1).view_as(ids).clamp(min=0)
    rows = torch.cat([number[:pairs], torch.where(common, number[:pairs], number[pairs:])])
    own = once.flatten().nonzero()[:, 0]
    predicted = labels[:, 1:] != IGNORED
    places = predicted.flatten().nonzero()[:, 0]
    return Layout(
        ids=ids.flatten()[own][None],
        positions=(own % width)[None],
        rows=rows,
        own=own,
        predicted=predicted,
        source=rows[:, :-1].flatten()[places][None],
        labels=labels[:, 1:].flatten()[places][None],
    )


def sharing(forward: Any) -> Any:
    """A model's forward with TRL's fused head: of a batch of pairs on shared prefixes, of anything else as it was."""

    def shared(self: Any, *given: Any, **named: Any) -> Any:
        if not named.get("fused_lm_head") or named.get("labels") is None:
            return forward(*given, **named)
        laid = laid_out(*(named.pop(name) for name in ("input_ids", "attention_mask", "labels")))
        hook = self.base_model.register_forward_hook(only(laid.source))
        try:
            out = forward(
                input_ids=laid.ids,
                attention_mask=laid.ids.new_empty(1, 1, 0, 0),  # passed on as it is, and fit for no other attention
                position_ids=laid.positions,
                shift_labels=laid.labels,
                shared_prefix=laid,
                **named,
            )
        finally:
            hook.remove()
        return back(out, laid.predicted)

    return shared


def only(source: Tensor) -> Any:
    """A hook that leaves of what a backbone puts out the tokens that predict something: (1, places, hidden)."""

    def kept(module: Any, given: Any, out: Any) -> Any:
        out.last_hidden_state = out.last_hidden_state[0][source]
        return out

    return kept


def back(out: FusedCausalLMOutput, predicted: Tensor) -> FusedCausalLMOutput:
    """What came out of each predicted token, where TRL's own layout has it; zero elsewhere, as there."""
    for name in PER_TOKEN:
        value = getattr(out, name)
        if value is not None:
            setattr(out, name, value.new_zeros(predicted.shape).masked_scatter(predicted, value))
    out.label_mask = predicted
    return out


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prefix: Layout | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa, of a row of shared prefixes on each reply behind its prompt: causal, so padding is unseen.

    A prompt's attention is computed for both replies: without a mask that costs less than the whole square of a pair.
    Nothing is added in more than one order: a token stands in two places at most.
    """
    if shared_prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **named)
    rows, own = shared_prefix.rows, shared_prefix.own

    def apart(states: Tensor) -> Tensor:  # (1, heads, tokens, size) to (2 x pairs, heads, width, size)
        return states[0].index_select(1, rows.flatten()).unflatten(1, rows.shape).transpose(0, 1)

    out, _ = sdpa_attention_forward(module, apart(query), apart(key), apart(value), None, **named)
    return out.flatten(0, 1).index_select(0, own)[None], None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
