"""Tokens per second and memory of a vision-language model's step, packed and not, against PEFT's LoRA on the same one.

packed    a pool of experts on the decoder and the projector, with data.packing: votes, forward, backward, AdamW
padded    the same without packing
peft      PEFT's LoRA of the same rank on the same linears, with the same packed row and positions, in transformers' own
          forward, attention and loss, which make a mask of all pairs of tokens and the logits of every token
peft padded
          the same without packing

All train on the same conversations of unlike length, each about one picture, one answer in each, and have the same loss
before the first step. Tokens are those of conversations, without padding. A ratio is the median of the rounds' ratios.
Memory is the most that tensors take in a step beside weights, moments and batch: of every tensor that an operation
makes, counted, on any device; what a kernel takes for itself is not in it. --model names the family, as in
small_qwen2_5_vl; published sizes are scaled down.
"""

import argparse
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import interleaved, medians, processor, ratio
from benchmarks.models import LLAVAS, Weights, conversations, fill
from benchmarks.variants import Peft, Step, Variant
from r1p_dist.backbones.conversations import IGNORED
from r1p_dist.errors import InputError
from r1p_dist.kinds.llava.packing import use_packing
from r1p_dist.kinds.llava.weights import build_on_meta
from r1p_dist.storage_meter import StorageMeter

PADDING = 0
RATIOS = ("padded/packed", "peft/packed", "peft padded/packed")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the results of one run of the benchmark, as its JSON file holds them."""
    if arguments.model not in LLAVAS:
        raise InputError(f"--model {arguments.model}: must be one of {', '.join(LLAVAS)}")
    torch.set_num_threads(arguments.threads)
    variants = make_variants(arguments)
    real = variants["padded"].batch["attention_mask"]
    losses = {name: variant.loss(variant.batch, False).item() for name, variant in variants.items()}
    seconds = interleaved(
        {name: functools.partial(variant.step, False) for name, variant in variants.items()},
        arguments.pairs,
        torch.device(arguments.device),
    )
    memory = {name: peak_bytes(variant) for name, variant in variants.items()}
    pairs = [pair.split("/") for pair in RATIOS]
    return {
        "processor": processor(),
        "model": arguments.model,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "tokens": int(real.sum()),
        "padding": round(1 - real.float().mean().item(), 3),
        "loss": {name: round(loss, 4) for name, loss in losses.items()},
        "tokens_per_second": {name: round(int(real.sum()) / s, 1) for name, s in medians(seconds).items()},
        "memory_mb": {name: round(size / 1e6, 1) for name, size in memory.items()},
        "time": {f"{a}/{b}": round(ratio(seconds, a, b), 3) for a, b in pairs},
        "memory": {f"{a}/{b}": round(memory[a] / memory[b], 3) for a, b in pairs},
    }


def make_variants(arguments: argparse.Namespace) -> dict[str, Variant]:
    """Returns the variants, which share their frozen weights."""
    packed = Packed(arguments)
    others = {"padded": Padded, "peft": PackedPeft, "peft padded": PaddedPeft}
    return {"packed": packed} | {name: variant(arguments, packed.weights) for name, variant in others.items()}


def peak_bytes(variant: Variant) -> int:
    """Returns the most bytes of tensors that one step makes."""
    meter = StorageMeter()
    meter.ignore(variant.tensors())
    with meter:
        variant.step(False)
    return meter.take_peak()


class Padded(Step):
    def conversations(self, count: int, generator: torch.Generator) -> dict[str, Any]:
        batch = conversations(self.backbone, self.arguments.model, count, generator)
        return unlike(batch, self.backbone.config.image_token_id)


class Packed(Padded):
    def conversations(self, count: int, generator: torch.Generator) -> dict[str, Any]:
        use_packing(self.backbone.family.decoder_module)
        return super().conversations(count, generator) | {"is_packed": True}


class PaddedPeft(Peft):
    """In transformers' own model, untouched by ours."""

    def transformers_model(self, weights: Weights) -> nn.Module:
        model = build_on_meta(self.backbone.config)
        own = {name.removeprefix("model."): weight for name, weight in weights.items()}
        fill(model, self.device, self.dtype, own)
        return model

    def conversations(self, count: int, generator: torch.Generator) -> dict[str, Any]:
        batch = conversations(self.backbone, self.arguments.model, count, generator)
        return unlike(batch, self.backbone.config.image_token_id)

    def loss(self, batch: dict[str, Any], end_to_end: bool) -> torch.Tensor:
        return self.model(**self.given(batch), use_cache=False).loss

    def given(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        own = self.backbone.family.arguments(batch, batch["layout"].per_sample)
        own["pixel_values"] = own["pixel_values"].to(self.dtype)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")} | own


class PackedPeft(PaddedPeft):
    def conversations(self, count: int, generator: torch.Generator) -> dict[str, Any]:
        return super().conversations(count, generator) | {"is_packed": True}

    def given(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        given = super().given(batch)
        # without a mask, transformers finds the conversations by their positions
        del given["attention_mask"]
        positions = batch["position_ids"]
        if positions.ndim == 3:  # in time, rows and columns; transformers looks for those of the text before them
            in_order = [torch.arange(length, device=self.device) for length in batch["lengths"]]
            positions = torch.cat([torch.cat(in_order).expand(1, 1, -1), positions])
        return given | {"position_ids": positions}


def unlike(batch: dict[str, torch.Tensor], image_token: int) -> dict[str, torch.Tensor]:
    """Returns conversations of equal length cut to unlike ones: the last has all its prompt, the first a third.

    image_token: what stands for a picture, which comes first.
    """
    ids, labels, mask, prompts = (batch[name] for name in ("input_ids", "labels", "attention_mask", "prompt_length"))
    count, tokens = ids.shape
    seen = int((ids[0] == image_token).nonzero().max()) + 1
    rows = {"input_ids": [], "labels": [], "attention_mask": []}
    lengths = []
    for number, prompt in enumerate(prompts.tolist()):
        left_out = (prompt - seen) * 2 * (count - 1 - number) // (3 * max(1, count - 1))
        kept = torch.cat([torch.arange(seen), torch.arange(seen + left_out, tokens)])
        lengths.append(prompt - left_out)
        for name, value, padding in (
            ("input_ids", ids, PADDING),
            ("labels", labels, IGNORED),
            ("attention_mask", mask, 0),
        ):
            rows[name].append(F.pad(value[number, kept], (0, left_out), value=padding))
    return (
        batch | {name: torch.stack(values) for name, values in rows.items()} | {"prompt_length": torch.tensor(lengths)}
    )
