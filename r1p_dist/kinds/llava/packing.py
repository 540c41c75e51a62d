"""Conversations of a micro batch in one row, without padding, each of which sees itself alone.

Only attention and positions know of the others in the row: every conversation is attended by itself, by SDPA or as a
sequence of flash attention's, so there is no mask of all pairs of tokens, and kernels that skip what a causal mask
hides serve as they do without packing.

Legend: n conversations of up to t tokens, T tokens of all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from r1p_dist.kinds.llava.family import Batch

# Decoders whose tokens see what is before them, all of it and nothing else, by transformers' attention functions.
DECODERS = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text")
_FLASH = "flash_attention_2"
_ATTENTION = "r1p_dist_packed"


def unpackable(decoder: PreTrainedModel) -> str | None:
    """Returns why conversations of a decoder cannot be packed; None: they can."""
    config = decoder.config
    if config.model_type not in DECODERS:
        return f"is a {config.model_type}; those that can are {', '.join(DECODERS)}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        return "attends by a sliding window"
    if config._attn_implementation == "eager":
        return "attends eagerly (backbone.attn_implementation), by a mask of all pairs"
    return None


def use_packing(decoder: PreTrainedModel) -> None:
    """Makes a decoder that attends by SDPA do so part by part where its forward gets `packed_options`."""
    if decoder.config._attn_implementation == _FLASH:
        return  # it is told of sequences as it is
    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    decoder.config._attn_implementation = _ATTENTION


def pack(batch: Batch) -> Batch:
    """Returns a training batch, padded on the right, with its n conversations in one row.

    input_ids, attention_mask, labels (1, T); position_ids (…, 1, T), from those of the padded batch or restarting at 0;
    "places" (n, t): where each token of the padded batch is in the row, 0 for padding; "bounds" (n + 1,): where each
    conversation begins, and the end; "lengths": tokens of each, on the host.
    """
    real = batch["attention_mask"].bool()
    counts = real.sum(1)
    positions = torch.arange(real.shape[1]).expand(real.shape)
    starts = counts.cumsum(0) - counts
    packed = {name: batch[name][real][None] for name in ("input_ids", "attention_mask", "labels")}
    packed["position_ids"] = batch.get("position_ids", positions)[..., real][..., None, :]
    packed["places"] = (starts[:, None] + positions) * real
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return batch | packed | {"bounds": bounds, "lengths": counts.tolist()}


def packed_options(decoder: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Returns what a decoder's forward takes so that each conversation of a packed batch sees itself alone."""
    if decoder.config._attn_implementation == _FLASH:
        bounds, longest = batch["bounds"], max(batch["lengths"])
        options = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
        return options | {"attention_mask": None}
    # no mask is made of one that is made already; attention does not read it
    made = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=batch["input_ids"].device)
    return {"packed_lengths": batch["lengths"], "attention_mask": made}


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_lengths: Sequence[int] | None = None,
    **options,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: (1, heads, T, width) each -> (1, T, heads, width)."""
    if packed_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    parts = zip(*(x.split(packed_lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *part, None, **options | {"is_causal": True})[0] for part in parts]
    return torch.cat(outputs, dim=1), None
