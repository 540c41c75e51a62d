"""Losses of answer tokens in chunks: equal to the plain form, with logits that are never whole."""

import pytest
import torch
import torch.nn.functional as F

from r1p_dist.kinds.llava import token_losses
from r1p_dist.kinds.llava.token_losses import give_losses
from r1p_dist.storage_meter import StorageMeter

TOKENS, WIDTH, VOCABULARY = 50, 16, 2000


def cap(logits: torch.Tensor) -> torch.Tensor:
    return 3.0 * (logits / 3.0).tanh()


def unchanged(logits: torch.Tensor) -> torch.Tensor:
    return logits


def make(dtype: torch.dtype, learns: bool) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype).requires_grad_(learns)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    return head, hidden, torch.randint(VOCABULARY, (TOKENS,)), torch.rand(TOKENS)


def run(is_plain: bool, dtype: torch.dtype, learns: bool, finish) -> tuple[list[torch.Tensor], int]:
    """Returns the losses and gradients of weighted tokens, and the most bytes that lived beside what was given."""
    head, hidden, wanted, weights = make(dtype, learns)
    if not is_plain:
        give_losses(head, finish)
    meter = StorageMeter()
    meter.ignore([head.weight, hidden, wanted, weights])
    with meter:
        if is_plain:
            losses = F.cross_entropy(finish(head(hidden)).float(), wanted, reduction="none")
        else:
            losses = head(hidden, wanted)
        (losses * weights).sum().backward()
    gradients = [hidden.grad, head.weight.grad] if learns else [hidden.grad]
    return [losses.detach(), *gradients], meter.take_peak()


@pytest.mark.parametrize("finish", [unchanged, cap])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_equal_the_plain_form(dtype: torch.dtype, learns: bool, finish, monkeypatch) -> None:
    monkeypatch.setattr(token_losses, "CHUNK_LOGITS", 7 * VOCABULARY + 3)  # seven tokens, and one in the last chunk
    (losses, *gradients), _ = run(False, dtype, learns, finish)
    (expected, *expected_gradients), _ = run(True, dtype, learns, finish)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)
    bound = 1e-5 if dtype == torch.float32 else 1e-2  # two roundings to eight bits
    for found, plain in zip(gradients, expected_gradients, strict=True):
        assert found.dtype == dtype and (found - plain).float().norm() <= bound * plain.float().norm()


@pytest.mark.parametrize("learns", [False, True])
def test_memory_is_that_of_one_chunk(learns: bool, monkeypatch) -> None:
    monkeypatch.setattr(token_losses, "CHUNK_LOGITS", 5 * VOCABULARY)
    whole, chunk = TOKENS * VOCABULARY * 4, 5 * VOCABULARY * 4
    of_weight = 4 * WIDTH * VOCABULARY * 3 if learns else 0  # a chunk's gradient, their sum, and a copy of that
    _, peak = run(False, torch.float32, learns, unchanged)
    _, plain = run(True, torch.float32, learns, unchanged)
    assert peak <= 4 * chunk + of_weight + 4 * TOKENS * WIDTH * 4
    assert plain >= 2 * whole > peak, "the comparison would show nothing"


def test_a_head_that_is_asked_for_logits_or_without_gradients_stays_what_it_was() -> None:
    head, hidden, wanted, _ = make(torch.float32, False)
    expected = head(hidden)
    give_losses(head, unchanged)
    assert torch.equal(head(hidden), expected)
    with torch.no_grad():
        torch.testing.assert_close(head(hidden, wanted), F.cross_entropy(expected, wanted, reduction="none"))
    assert head(hidden[:0], wanted[:0]).shape == (0,), "a micro batch may have no answers"
