"""A batch as one row of tokens without padding, scored where something is learned; every number stays what it was.

    first row, padded     ┐
    second row, padded    ┤  ->    first row | second row | …
    …                     ┘

TRL's collators and losses are as they were. Between them all that a model does token by token is done on the one row;
its attention sees each row alone, those of about one length in a block, and the head the places that predict what is
learned. What comes out per token goes back to where TRL expects it, so that every loss and metric of TRL's works on it.
Rows that TRL has packed into one are seen apart in the same way. Where rows begin with the same tokens, these can stand
in the row once (see dpo.py). Exact but for the order of floating-point sums: 1e-6 relative in float32.
"""

import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.trainer.utils import FusedCausalLMOutput

from smoltrain import head
from smoltrain.config import ConfigError
from smoltrain.reference import base

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # what TRL's fused head gives
VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")  # what flash kernels want
IGNORED = -100  # the label of what is not predicted
ATTENTION = "unpadded"
ALIKE = 0.8  # rows that are at least as long as this share of the longest in a block stand in it, padded


def unpad(
    asked: bool | None, key: str, inexact: Callable[[Any], str], instead: str, models: Iterable[Any], **how: Any
) -> bool:
    """Has models compute rows without padding from now on, unless one of them is `inexact` then; whether they do.

    Null asks for it where it is exact, and prints what happens `instead`; with true, that raises ConfigError.
    """
    if asked is False:
        return False
    bare = [base(model) for model in models if model is not None]
    if why := next(filter(None, map(inexact, bare)), ""):
        if asked:
            raise ConfigError(f"{key}=true: {why}")
        print(f"{instead}: {why}")
        return False
    for model in bare:
        if model.config._attn_implementation != ATTENTION:
            model.set_attn_implementation(ATTENTION)
            model.forward = types.MethodType(without_padding(model.forward, **how), model)
    return True


def inexact(model: Any, args: Any, adapters: Sequence[Any] = ()) -> str:
    """Why a row would come to something else than padded; empty where it would not.

    `model` may be one without weights, and stands without its adapters, whose configs they are.
    """
    config = model.config.get_text_config()
    others = sorted({*(getattr(config, "layer_types", None) or ())} - {"full_attention"})
    balance = args.router_aux_loss_coef
    if balance is None:
        balance = getattr(config, "router_aux_loss_coef", 0.0)
    if config is not model.config:
        return f"{model.config.model_type} sees images"
    if config._attn_implementation not in ("sdpa", ATTENTION):
        return f"model.attn_implementation={config._attn_implementation}; only sdpa sees rows apart"
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
        return f"{config.model_type} balances its experts over all tokens of a batch (router_aux_loss_coef={balance})"
    return ""


@dataclass
class Layout:
    """A batch of rows as one row of tokens.

    `ids` and `positions` (1, tokens) are what the model gets. For its attention the rows stand each alone, those of
    about one length in a block of this many rows and columns (`blocks`): `seen` are the tokens in them, one block after
    the other (None: all of them, as they stand), and `own` (tokens) is where among these each token is computed.
    `predicted` (rows, width - 1) are TRL's places that are scored, in whose order `source` and `labels` (1, places) are
    the tokens that predict them and those that are predicted.
    """

    ids: Tensor
    positions: Tensor
    blocks: list[tuple[int, int]]
    seen: Tensor | None
    own: Tensor
    predicted: Tensor
    source: Tensor
    labels: Tensor


def laid_out(ids: Tensor, labels: Tensor, real: Tensor, positions: Tensor, first: Tensor | None = None) -> Layout:
    """Lays out a batch of TRL's, all of it (rows, width): which places are `real`, each row's `positions` from 0.

    More than one row may stand in a row of the batch. `first` are the places, counted through the batch, at which what
    would come out of each place is computed; without it, each at its own.
    """
    places = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    first = places if first is None else first
    once = (real & (first == places)).flatten()
    number = (once.cumsum(0) - 1).clamp(min=0)[first].flatten()  # of the token that is computed for a place
    began = (real & (positions == 0)).flatten()
    starts, counted = began.nonzero()[:, 0], real.flatten().cumsum(0)
    blocks, row, offsets = apart(counted[starts].diff(append=counted[-1:] + 1))
    own = once.nonzero()[:, 0]
    seen = None
    if len(blocks) > 1 or math.prod(blocks[0]) > len(own):
        parts = [
            (starts[some, None] + torch.arange(width, device=ids.device)).flatten()
            for some, (_, width) in zip(row.split([rows for rows, _ in blocks]), blocks, strict=True)
        ]
        seen = number[torch.cat(parts).clamp(max=ids.numel() - 1)]  # behind a row's end stands any token, seen by none
    predicted = labels[:, 1:] != IGNORED
    scored = predicted.flatten().nonzero()[:, 0]
    return Layout(
        ids=ids.flatten()[own][None],
        positions=positions.flatten()[own][None],
        blocks=blocks,
        seen=seen,
        own=(offsets[began.cumsum(0) - 1] + positions.flatten())[own],
        predicted=predicted,
        source=number.view_as(ids)[:, :-1].flatten()[scored][None],
        labels=labels[:, 1:].flatten()[scored][None],
    )


def apart(lengths: Tensor) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
    """Blocks of rows of about one length, which rows stand in them, the longest first, and where each row begins."""
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    blocks: list[tuple[int, int]] = []
    begin, begins = 0, []
    for size in sizes:
        rows, width = blocks.pop() if blocks and size >= ALIKE * blocks[-1][1] else (0, size)
        blocks.append((rows + 1, width))
        begins.append(begin)
        begin += width
    return blocks, order, torch.empty_like(order).index_copy(0, order, order.new_tensor(begins))


def without_padding(forward: Any, shared: Callable[[Tensor, Tensor], Tensor] | None = None) -> Any:
    """A model's forward with TRL's fused head: of a batch with labels as one row, of anything else as it was.

    `shared` finds, of tokens and which of them are real, `first` of `laid_out`.
    """

    @functools.wraps(forward.__func__)  # generation asks what it takes
    def computed(self: Any, *given: Any, **named: Any) -> Any:
        if not named.get("fused_lm_head") or named.get("labels") is None:
            return forward(*given, **named)
        ids, labels, mask, positions = (
            named.pop(name, None) for name in ("input_ids", "labels", "attention_mask", "position_ids")
        )
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if positions is None:
            positions = (real.cumsum(1) - 1).clamp(min=0)
        laid = laid_out(ids, labels, real, positions, shared and shared(ids, real))
        hook = self.base_model.register_forward_hook(only(laid.source))
        try:
            with head.once():
                out = forward(
                    input_ids=laid.ids,
                    attention_mask=laid.ids.new_empty(1, 1, 0, 0),  # passed on as it is, fit for no other attention
                    position_ids=laid.positions,
                    shift_labels=laid.labels,
                    unpadded=laid,
                    **{name: value for name, value in named.items() if name not in VARLEN},
                )
        finally:
            hook.remove()
        return back(out, laid.predicted)

    return computed


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
    unpadded: Layout | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa, on each row of a batch alone: causal, so that what stands behind a row's end is unseen.

    No mask says who sees whom: its square over all rows would cost more than what rows that begin alike compute twice.
    """
    if unpadded is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **named)
    blocks, seen = unpadded.blocks, unpadded.seen

    def of_blocks(states: Tensor) -> list[Tensor]:  # (1, heads, tokens, size) to blocks of (rows, heads, width, size)
        found = states[0] if seen is None else states[0].index_select(1, seen)
        parts = found.split([rows * width for rows, width in blocks], dim=1)
        return [part.unflatten(1, block).transpose(0, 1) for part, block in zip(parts, blocks, strict=True)]

    each = zip(of_blocks(query), of_blocks(key), of_blocks(value), strict=True)
    out = [sdpa_attention_forward(module, *block, None, **named)[0].flatten(0, 1) for block in each]
    return (out[0] if seen is None else torch.cat(out).index_select(0, unpadded.own))[None], None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
