"""The loss of fine-tuning: torch's, in less memory, and loud where that would show."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from layer_streamer.llm.finetuning import loss as losses
from layer_streamer.llm.finetuning.loss import token_loss
from layer_streamer.llm.finetuning.samples import UNSAID


def plain(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """As transformers has it."""
    scores = logits_BTV[:, :-1].float().flatten(0, 1)
    return functional.cross_entropy(scores, labels_BT[:, 1:].flatten(), ignore_index=UNSAID)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(2, 9), st.integers(1, 40), st.integers(0, 99), st.booleans(),
)  # fmt: skip
def test_loss_and_gradients_are_torchs_whatever_the_chunks(
    rows: int, tokens: int, at_once: int, seed: int, half: bool
) -> None:
    made, dtype = torch.Generator().manual_seed(seed), torch.bfloat16 if half else torch.float32
    x = torch.randn(rows, tokens, 7, generator=made)
    head = torch.randn(7, 23, generator=made)
    labels = torch.randint(0, 23, (rows, tokens), generator=made)
    labels[torch.rand(rows, tokens, generator=made) < 0.4] = UNSAID
    labels[0, 1] = 5
    found = []
    for each in (plain, token_loss):
        own = x.clone().requires_grad_()
        logits = (own @ head).to(dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "CHUNK_NBYTES", 4 * 23 * at_once)
            loss = each(logits, labels)
        (loss * 3).backward()
        with torch.no_grad():
            quiet = each((x @ head).to(dtype), labels)
        found.append((loss.detach(), own.grad, quiet))
    for one, other in zip(*found, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0.05 if half else 1e-6)


def test_what_several_batches_are_divided_by_may_be_given() -> None:
    logits, labels = torch.randn(1, 5, 8), torch.tensor([[1, 2, UNSAID, 3, 4]])
    whole = token_loss(logits, labels)
    for learned in (6, torch.tensor(6)):
        torch.testing.assert_close(token_loss(logits, labels, learned) * 2, whole)


def test_logits_without_a_gradient_are_left_as_they_are() -> None:
    logits = torch.randn(1, 5, 8)
    before = logits.clone()
    token_loss(logits, torch.tensor([[1, 2, UNSAID, 3, 4]]))
    assert torch.equal(logits, before)


def test_a_graph_that_needs_the_logits_themselves_is_an_error_and_no_wrong_gradient() -> None:
    x = torch.randn(1, 5, 8, requires_grad=True)
    loss = token_loss(x.tanh(), torch.tensor([[1, 2, 3, 4, 5]]))  # whose backward has its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
