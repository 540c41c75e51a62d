"""The cross entropy of answer tokens in chunks: for it, logits of many tokens and a large vocabulary are never whole.

Only one chunk's logits live at a time, and their gradient. A head that does not learn is asked once: with a chunk's
losses comes their gradient for the hidden states, which the backward scales, row by row. A head that learns is asked
again in the backward, which knows by then what its weight's gradient is a sum of.

Legend: k tokens, d the decoder's width, v the vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from r1p_dist.kinds.llava.family import stand_in

CHUNK_LOGITS = 1 << 25  # 128 MiB in fp32; a vocabulary of 150,000 leaves 220 tokens, which still fill an accelerator

Finish = Callable[[torch.Tensor], torch.Tensor]


def give_losses(head: nn.Linear, finish: Finish) -> None:
    """Makes `head(hidden, wanted)` return the cross entropy (k,), fp32, of the logits `finish(head(hidden))`.

    hidden (k, d); wanted (k,): the right tokens. `head(hidden)` stays what it was. All chunks are in one call of the
    head, so ZeRO-3 gathers its weight once in the forward and once in the backward. The head has no bias.
    """

    def forward(plain: Callable, hidden: torch.Tensor, wanted: torch.Tensor | None = None) -> torch.Tensor:
        if wanted is None:
            return plain(hidden)
        if head.weight.requires_grad:
            return _LearningHead.apply(hidden, head.weight, wanted, head, finish)
        return _FrozenHead.apply(hidden, wanted, head, finish)

    stand_in(head, "forward", forward)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, wanted, head, finish):
        weight, learns = head.weight.detach(), ctx.needs_input_grad[0]
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if learns else None
        for rows in _chunks(hidden, weight):
            with torch.set_grad_enabled(learns):
                x = hidden[rows].detach().requires_grad_(learns)
                part = _losses(x, weight, wanted[rows], finish)
                if learns:
                    (gradient[rows],) = torch.autograd.grad(part.sum(), x)
            losses[rows] = part.detach()
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, given):
        (gradient,) = ctx.saved_tensors
        return (gradient * given[:, None]).to(gradient.dtype), None, None, None


class _LearningHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, wanted, head, finish):
        ctx.save_for_backward(hidden, wanted)
        ctx.head, ctx.finish = head, finish
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        for rows in _chunks(hidden, weight):
            losses[rows] = _losses(hidden[rows], weight, wanted[rows], finish)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, given):
        hidden, wanted = ctx.saved_tensors
        weight = ctx.head.weight.detach().requires_grad_()  # not saved: ZeRO-3 has gathered it again
        gradient, total = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(hidden, weight):
            with torch.enable_grad():
                x = hidden[rows].detach().requires_grad_()
                part = _losses(x, weight, wanted[rows], ctx.finish)
            gradient[rows], of_weight = torch.autograd.grad(part, (x, weight), given[rows])
            total += of_weight
        return gradient, total.to(weight.dtype), None, None, None


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS // len(weight))
    return (slice(start, start + size) for start in range(0, len(hidden), size))


def _losses(hidden: torch.Tensor, weight: torch.Tensor, wanted: torch.Tensor, finish: Finish) -> torch.Tensor:
    return F.cross_entropy(finish(F.linear(hidden, weight)).float(), wanted, reduction="none")
