"""Blocks of a backbone compiled by torch.compile, one by one: all of a tower share one compilation."""

import functools
from collections.abc import Iterable

import torch
from torch import nn

from r1p_dist.adapters.recomputing import note_for_compiled

# What one block's code may be compiled for: towers, widths, first and later votes, with and without past tasks …
_VARIANTS = 64


def compile_blocks(blocks: Iterable[nn.Module], **options) -> None:
    """Compiles the training forward of each block; in eval mode it runs as it is.

    To be called before activation checkpointing is put around the blocks. options: those of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    for block in blocks:
        block.forward = _compiled(block, torch.compile(block.forward, **options))


def _compiled(block: nn.Module, compiled):
    plain = block.forward

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        if not block.training:
            return plain(*args, **kwargs)
        note_for_compiled()
        return compiled(*args, **kwargs)

    return forward
