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
from collections.abc import Sequence
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
ALIKE = 0.8  # rows that are at least as long as this share of the longest in a block stand in it, padded


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
        adapters = [*getattr(self.model, "peft_config", {}).values()]
        if why := next(filter(None, (self.inexact(model, self.args, adapters) for model in models)), ""):
            if self.shared_prefix:
                raise ConfigError(f"trainer.shared_prefix=true: {why}")
            print(f"each prompt is computed twice: {why}")
            self.shared_prefix = False
            return
        self.shared_prefix = True
        for model in models:
            model.set_attn_implementation(ATTENTION)
            model.forward = types.MethodType(sharing(model.forward), model)

    @staticmethod
    def inexact(model: Any, args: Any, adapters: Sequence[Any] = ()) -> str:
        """Why a reply would come to something else than behind a prompt of its own; empty where it would not.

        `model` may be one without weights, and stands without its adapters, whose configs they are.
        """
        config = model.config.get_text_config()
        others = sorted({*(getattr(config, "layer_types", None) or ())} - {"full_attention"})
        balance = args.router_aux_loss_coef
        if balance is None:
            balance = getattr(config, "router_aux_loss_coef", 0.0)
        if config is not model.config:
            return f"{model.config.model_type} sees images"
        if config._attn_implementation != "sdpa":
            return f"model.attn_implementation={config._attn_implementation}, and it is sdpa that can share"
        if model._is_stateful or others:
            return f"{config.model_type} has layers other than full attention{', ' * bool(others)}{', '.join(others)}"
        if not hasattr(config, "layer_types") and getattr(config, "sliding_window", None):
            return f"{config.model_type} sees a window of {config.sliding_window} tokens only"
        if not model._supports_attention_backend or "position_ids" not in inspect.signature(model.forward).parameters:
            return f"transformers lets nobody place the tokens of {config.model_type} and change its attention"
        if not all(getattr(part, "is_causal", True) for part in model.modules()):
            return f"{config.model_type} lets tokens see those that follow"
        if any(adapter.is_prompt_learning for adapter in adapters):
            return "the adapter puts tokens of its own before each row"
        if hasattr(config, "output_router_logits") and balance:
            return (
                f"{config.model_type} balances its experts over all tokens of a batch (router_aux_loss_coef={balance})"
            )
        if any(isinstance(part, torch.nn.Dropout) and part.p for part in model.modules()) and not args.disable_dropout:
            return "both replies would have one dropout of the prompt (disable_dropout=false)"
        return ""


@dataclass
class Layout:
    """A batch of pairs as one row of tokens, each of a common beginning once.

    `ids` and `positions` (1, tokens) are what the model gets. For its attention the replies stand each behind its
    prompt again, those of about one length in a block of this many rows and columns (`blocks`): `seen` are the tokens
    in them, one block after the other, and `own` (tokens) is where among these each token is computed. `predicted`
    (2 x pairs, width - 1) are TRL's places that are scored, in whose order `source` and `labels` (1, places) are the
    tokens that predict them and those that are predicted.
    """

    ids: Tensor
    positions: Tensor
    blocks: list[tuple[int, int]]
    seen: Tensor
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
    blocks, places = apart(real.sum(1), width)
    order = torch.empty_like(rows).flatten().index_copy(0, places, torch.arange(len(places), device=ids.device))
    predicted = labels[:, 1:] != IGNORED
    scored = predicted.flatten().nonzero()[:, 0]
    return Layout(
        ids=ids.flatten()[own][None],
        positions=(own % width)[None],
        blocks=blocks,
        seen=rows.flatten()[places],
        own=order[own],
        predicted=predicted,
        source=rows[:, :-1].flatten()[scored][None],
        labels=labels[:, 1:].flatten()[scored][None],
    )


def apart(lengths: Tensor, width: int) -> tuple[list[tuple[int, int]], Tensor]:
    """Blocks of rows of about one length, the longest first, and where in a batch of this width their places are."""
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    starts = [0]
    for row, size in enumerate(sizes):
        if size < ALIKE * sizes[starts[-1]]:
            starts.append(row)
    ends = [*starts[1:], len(sizes)]
    blocks = [(end - start, sizes[start]) for start, end in zip(starts, ends, strict=True)]
    columns = torch.arange(width, device=lengths.device)
    places = [(order[a:b, None] * width + columns[: sizes[a]]).flatten() for a, b in zip(starts, ends, strict=True)]
    return blocks, torch.cat(places)


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
    blocks, seen = shared_prefix.blocks, shared_prefix.seen

    def of_blocks(states: Tensor) -> list[Tensor]:  # (1, heads, tokens, size) to blocks of (rows, heads, width, size)
        parts = states[0].index_select(1, seen).split([rows * width for rows, width in blocks], dim=1)
        return [part.unflatten(1, block).transpose(0, 1) for part, block in zip(parts, blocks, strict=True)]

    each = zip(of_blocks(query), of_blocks(key), of_blocks(value), strict=True)
    out = [sdpa_attention_forward(module, *block, None, **named)[0].flatten(0, 1) for block in each]
    return torch.cat(out).index_select(0, shared_prefix.own)[None], None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
