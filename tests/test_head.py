"""The LM head off the GPU: its scores and gradients are those of plain logits in float64."""

import pytest
import torch
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction
from trl.trainer import utils

from smoltrain import head

N, HIDDEN, VOCABULARY = 37, 16, 50


def given(bias: bool) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    return [torch.randn(N, HIDDEN), torch.randn(VOCABULARY, HIDDEN), torch.randn(VOCABULARY) if bias else None]


def came_to(scored, parts, targets, dtype=torch.float32) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The scores, and the gradients of a sum of log-probabilities and entropies, each weighed."""
    leaves = [None if part is None else part.to(dtype, copy=True).requires_grad_() for part in parts]
    scores = scored(*leaves, targets)
    weights = torch.linspace(-1, 2, N, dtype=dtype)
    ((scores[0] + 0.3 * scores[1]) * weights).sum().backward()
    return [score.detach().double() for score in scores], [leaf.grad.double() for leaf in leaves if leaf is not None]


def plainly(scale: float):
    def scored(hidden, weight, bias, targets):
        logits = (torch.nn.functional.linear(hidden, weight, bias)) * scale
        logs = logits.log_softmax(-1)
        of_targets, entropy = logs.gather(-1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)
        return of_targets, entropy, (2 * logs).logsumexp(-1), logits.mean(-1), logits.argmax(-1) == targets

    return scored


@pytest.mark.parametrize("at_once", [1, 10 * VOCABULARY, 2**20])
@pytest.mark.parametrize(("bias", "scale", "temperature"), [(False, 1.0, 1.0), (True, 0.5, 1.0), (True, 1.0, 3.0)])
def test_scores_and_gradients_are_those_of_plain_logits(monkeypatch, at_once, bias, scale, temperature):
    monkeypatch.setattr(head, "AT_ONCE", at_once)
    parts = given(bias)
    likely = torch.nn.functional.linear(*parts).argmax(-1)
    targets = torch.where(torch.arange(N) % 2 == 0, likely, torch.arange(N))

    def ours(hidden, weight, bias, targets):
        return head.Head.apply(hidden, weight, bias, targets, temperature, 64, None, scale)

    (scores, gradients), (truth, theirs) = (
        came_to(ours, parts, targets),
        came_to(plainly(scale / temperature), parts, targets, torch.float64),
    )
    for found, right in zip([*scores, *gradients], [*truth, *theirs], strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sure", [False, True])
def test_in_bf16_it_rounds_as_trls_head_does(sure):
    parts, targets = given(False), torch.arange(N)
    if sure:  # of its targets, as a model is that has learned them
        parts[0] = 0.6 * parts[1][targets]

    def of(function):
        def scored(hidden, weight, bias, targets):
            with torch.autocast("cpu", torch.bfloat16):
                return function.apply(
                    hidden, weight, bias, targets, 1.0, 64, None, 1.0, ("log_probs", *OPTIONAL_OUTPUTS)
                )

        return scored

    (scores, gradients), (stock, its) = (
        came_to(of(function), parts, targets) for function in (head.Head, ChunkedLogProbFunction)
    )
    for found, right in zip(scores, stock, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    _, exact = came_to(plainly(1.0), parts, targets, torch.float64)
    for found, right, truth in zip(gradients, its, exact, strict=True):
        assert (found - truth).norm() < 1.2 * (right - truth).norm()


def test_nothing_is_kept_where_nothing_learns():
    hidden, weight, _ = given(False)
    with torch.no_grad():
        scores = head.Head.apply(
            hidden, weight.requires_grad_(), None, torch.arange(N), 1.0, 64, outputs=("log_probs",)
        )
    assert not scores[0].requires_grad and scores[1:] == (None,) * 4
    learned = head.Head.apply(hidden, weight, None, torch.arange(N), 1.0, 64, outputs=("log_probs",))[0]
    assert any(part is not None and part.shape == (N, VOCABULARY) for part in learned.grad_fn.saved_tensors)


def test_capped_logits_are_trls_and_trls_head_is_its_own_again():
    hidden, weight, _ = given(False)
    weight.requires_grad_()
    capped = head.Head.apply(hidden, weight, None, torch.arange(N), 1.0, 64, 5.0)
    assert "ChunkedLogProb" in type(capped[0].grad_fn).__name__
    with pytest.raises(ZeroDivisionError), head.once():
        assert utils._ChunkedLogProbFunction is head.Head
        _ = 1 / 0
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
