"""TRL's LM head where no Triton kernel folds it: what it puts out, without computing the logits twice.

TRL's own code for such devices goes over all logits a dozen times, and computes them again for their gradients. Here
the logits of what is predicted are kept from one to the other, and become their gradients where they lie.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction, _use_triton
from trl.trainer import utils

TRLS = "_ChunkedLogProbFunction"  # under which name TRL's heads look for it
AT_ONCE = 2**22  # logits that are worked on while they are in a processor's cache


@contextlib.contextmanager
def once() -> Iterator[None]:
    """Has TRL's fused heads that are called meanwhile compute their logits once."""
    setattr(utils, TRLS, Head)
    try:
        yield
    finally:
        setattr(utils, TRLS, ChunkedLogProbFunction)


class Head:
    """Stands for TRL's `ChunkedLogProbFunction`, which does what this one does not: kernels for GPUs, capped logits."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """The log-probability of each of (N) targets after (N, hidden), and the further `outputs`; see there."""
        if softcap is not None or _use_triton(hidden.device):
            given = (hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs)
            return ChunkedLogProbFunction.apply(*given)
        learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return Scores.apply(hidden, weight, bias, targets, logit_scale / temperature, outputs, learns)


class Scores(torch.autograd.Function):
    """Scores of targets, (N) each, whose gradients come from the (N, vocabulary) logits that are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        outputs: tuple[str, ...],
        learns: bool,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        hidden_, weight_ = hidden.to(dtype), weight.to(dtype)
        bias_ = None if bias is None else bias.to(dtype)
        kept = hidden_.new_empty(len(targets) if learns else 0, len(weight))
        many = max(AT_ONCE // len(weight), 1)
        exact = dtype == torch.float32  # then the logarithms of probabilities are kept; rounded, they would be none
        log_z: list[Tensor] = []
        found: dict[str, list[Tensor]] = {name: [] for name in ("log_probs", *outputs)}
        for at in range(0, len(targets), many):
            given = linear(hidden_[at : at + many], weight_, bias_)
            logits = given.float()
            if scale != 1:
                logits.mul_(scale)
            logs, wanted = logits.log_softmax(-1), targets[at : at + many]
            if learns:
                kept[at : at + many] = logs if exact else given
            found["log_probs"].append(logs.gather(-1, wanted[:, None])[:, 0])
            log_z.append(logits.gather(-1, wanted[:, None])[:, 0] - found["log_probs"][-1])
            if "mean_logits" in outputs:
                found["mean_logits"].append(logits.mean(-1))
            if "is_top1" in outputs:
                found["is_top1"].append(logits.argmax(-1) == wanted)
            probabilities = torch.exp(logs, out=logits)
            if "entropy" in outputs:
                found["entropy"].append(-(logs * probabilities).sum(-1))
            if "log_sum_sq_probs" in outputs:
                found["log_sum_sq_probs"].append(probabilities.square().sum(-1).log())
        scores = {name: torch.cat(parts) if parts else hidden.new_empty(0) for name, parts in found.items()}
        normal = torch.cat(log_z) if log_z else hidden.new_empty(0)
        ctx.exact = exact
        ctx.save_for_backward(hidden_, weight_, targets, kept, normal, scores.get("entropy"))
        ctx.scale, ctx.dtypes = scale, [None if part is None else part.dtype for part in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*(scores[name] for name in outputs if name not in ("log_probs", "entropy")))
        return tuple(scores.get(name) for name in ("log_probs", *OPTIONAL_OUTPUTS))

    @staticmethod
    def backward(ctx: Any, of_logs: Tensor | None, of_entropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, kept, log_z, entropy = ctx.saved_tensors
        many = max(AT_ONCE // len(weight), 1)
        for at in range(0, len(targets), many):
            some = slice(at, at + many)
            log_p = kept[some] if ctx.exact else (kept[some].float() * ctx.scale).sub_(log_z[some, None])
            p = log_p.exp()
            gradient = torch.zeros_like(p)
            if of_logs is not None:  # of log p(target) by the logits: 1 at the target, less p
                gradient.scatter_(1, targets[some, None], 1.0).sub_(p).mul_(of_logs[some, None])
            if of_entropy is not None:  # of the entropy: -p (log p + entropy)
                gradient.addcmul_(log_p.add_(entropy[some, None]).mul_(p), of_entropy[some, None], value=-1)
            kept[some] = gradient.mul_(ctx.scale)
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        gradients = (
            kept @ weight if to_hidden else None,
            kept.t() @ hidden if to_weight else None,
            kept.sum(0, dtype=torch.float32) if to_bias else None,
        )
        back = (g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *back, None, None, None, None
