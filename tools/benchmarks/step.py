"""The time, floating point operations and memory of one training step, against the frozen model and PEFT's LoRA.

limit  the frozen model without adapters, gradient flowing to the input of the first block of each tower; with this
       project's attention, which is faster than open_clip's nn.MultiheadAttention
step   the same model with a pool of experts on q, k, v, out, fc1 and fc2: votes, forward, backward, AdamW
peft   open_clip's blocks with PEFT's LoRA of the same rank, alpha and dropout on the same linears (q, k and v as
       linears of their own, as Hugging Face's CLIP has them): forward, backward, AdamW

`same_work`: all encode one untrimmed prompt per sample. `end_to_end`: `step` encodes each distinct prompt once, trimmed
to the longest, as it does in training; the others stay as they are. `median_s` has the times of both, those of the
second with that suffix; a ratio is the median of the rounds' ratios. Memory is the highest anonymous memory over two
steps in a fresh process, less what the process had before the model was built.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    addmm_flop,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop,
    sdpa_flop,
)

from benchmarks.measure import (
    PeakMemory,
    anonymous_bytes,
    in_fresh_process,
    interleaved,
    medians,
    processor,
    quiet,
    ratio,
)
from r1p_dist import attach_pool, load_clip
from r1p_dist.backbones import ClipBackbone
from r1p_dist.config import TrainConfig
from r1p_dist.errors import InputError
from r1p_dist.losses import contrastive_loss
from r1p_dist.optimizer import make_optimizer

RANK, ALPHA = 12, 1.0
CLASSES = ("airplane", "bicycle", "church", "dog", "elephant", "fountain", "guitar", "harbour", "island", "jaguar")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the results of one run of the benchmark, as its JSON file holds them."""
    names = ["step", *arguments.against.split(",")]
    for name in names:
        if name not in VARIANTS:
            raise InputError(f"--against {arguments.against}: no variant {name!r}; there are limit and peft")
    torch.set_num_threads(arguments.threads)
    with quiet():  # random weights are meant
        variants = {name: VARIANTS[name](arguments) for name in names}
    result: dict[str, Any] = {
        "processor": processor(),
        "model": arguments.model,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "dropout": arguments.dropout,
        "dropout_kind": arguments.dropout_kind,
    }
    for work in ("same_work", "end_to_end"):
        steps = {name: functools.partial(variant.step, work == "end_to_end") for name, variant in variants.items()}
        seconds = interleaved(steps, arguments.pairs)
        ratios = {}
        if "limit" in names:
            ratios["step/limit"] = ratio(seconds, "step", "limit")
        if "peft" in names:
            ratios["peft/step"] = ratio(seconds, "peft", "step")
        if "limit" in names:
            flops = {name: _count_flops(steps[name]) for name in ("step", "limit")}
            memory = {name: in_fresh_process(_peak_memory, arguments, name, work == "end_to_end") for name in flops}
            ratios["flops step/limit"] = flops["step"] / flops["limit"]
            ratios["memory step/limit"] = memory["step"] / memory["limit"]
            result.setdefault("memory_mb", {})[work] = {name: round(value / 1e6) for name, value in memory.items()}
        result[work] = {name: round(value, 3) for name, value in ratios.items()}
        suffix = " end_to_end" if work == "end_to_end" else ""
        for name, value in medians(seconds).items():
            result.setdefault("median_s", {})[name + suffix] = round(value, 4)
    return result


class Variant:
    """A model under training, and the batches that all variants see."""

    def __init__(self, arguments: argparse.Namespace):
        torch.manual_seed(0)
        dtype = getattr(torch, arguments.dtype)
        self.backbone: ClipBackbone = load_clip(arguments.model)
        self.prompts = self.backbone.tokenize([f"a photo of a {name}." for name in CLASSES])
        self.model: nn.Module = self.backbone
        self.prepare(arguments)
        self.model.to(dtype).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(trained, TrainConfig()) if trained else None
        generator = torch.Generator().manual_seed(1)
        self.image = random_images(self.backbone, arguments.batch, generator).to(dtype)
        self.label = torch.randint(len(CLASSES), (arguments.batch,), generator=generator)

    def prepare(self, arguments: argparse.Namespace) -> None:
        raise NotImplementedError

    def loss(self, end_to_end: bool) -> torch.Tensor:
        """Returns the contrastive loss; without `end_to_end` each sample's own prompt is encoded, untrimmed."""
        clip, tokens = self.clip(), self.prompts[self.label]
        self.backbone.routing["text"].weights = None
        image = F.normalize(clip.visual(self.image).float(), dim=-1)
        text = F.normalize(clip.text(tokens).float(), dim=-1)
        return contrastive_loss(image, text, self.label, self.backbone.logit_scale)

    def clip(self) -> nn.Module:
        return self.backbone.model

    def step(self, end_to_end: bool) -> None:
        self.loss(end_to_end).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def random_images(backbone: ClipBackbone, count: int, generator: torch.Generator) -> torch.Tensor:
    size = backbone.preprocess["size"]
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return torch.randn(count, 3, height, width, generator=generator)


class Limit(Variant):
    def prepare(self, arguments: argparse.Namespace) -> None:
        for tower in (self.backbone.model.visual, self.backbone.model.text):
            tower.transformer.resblocks[0].register_forward_pre_hook(require_gradient, with_kwargs=True)


class Step(Variant):
    def prepare(self, arguments: argparse.Namespace) -> None:
        attach_pool(
            self.backbone,
            rank=RANK,
            alpha=ALPHA,
            dropout=arguments.dropout,
            dropout_kind=arguments.dropout_kind,
        )
        self.backbone.set_prompts([f"a photo of a {name}." for name in CLASSES])

    def loss(self, end_to_end: bool) -> torch.Tensor:
        if not end_to_end:
            return super().loss(end_to_end)
        return self.backbone.loss(self.backbone, self.backbone.prepare({"image": self.image, "label": self.label}))


class Peft(Variant):
    def prepare(self, arguments: argparse.Namespace) -> None:
        try:
            import peft
        except ImportError as error:
            raise InputError("--against peft: PEFT is not installed; pip install peft") from error
        self.model = _plain_model(arguments.model)
        for tower in (self.model.visual, self.model.text):
            for block in tower.transformer.resblocks:
                block.attn = SplitAttention(block.attn)
        targets = ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"]
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=arguments.dropout, target_modules=targets, bias="none"
        )
        peft.inject_adapter_in_model(config, self.model)

    def clip(self) -> nn.Module:
        return self.model


VARIANTS: dict[str, Callable[[argparse.Namespace], Variant]] = {"limit": Limit, "step": Step, "peft": Peft}


class SplitAttention(nn.Module):
    """An nn.MultiheadAttention with q, k and v as linears of their own, as PEFT's users have them; called like it."""

    def __init__(self, source: nn.MultiheadAttention):
        super().__init__()
        width, self.num_heads = source.embed_dim, source.num_heads
        weights, biases = source.in_proj_weight.chunk(3), source.in_proj_bias.chunk(3)
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            projection = nn.Linear(width, width)
            projection.weight, projection.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            self.add_module(name, projection)
        self.out_proj = nn.Linear(width, width)
        self.out_proj.load_state_dict(source.out_proj.state_dict())
        self.requires_grad_(False)

    def forward(self, query, key, value, need_weights=False, attn_mask=None):
        batch, tokens, width = query.shape
        q, k, v = (
            projection(query).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(y.transpose(1, 2).reshape(batch, tokens, width)), None


def _plain_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    source = f"local-dir:{_tiny_folder()}" if name == "tiny" else name
    return open_clip.create_model(source, force_custom_text=True).requires_grad_(False)


def _tiny_folder() -> str:
    from importlib import resources

    return str(resources.files("r1p_dist") / "assets" / "tiny")


def require_gradient(module: nn.Module, inputs: tuple, keywords: dict) -> tuple[tuple, dict]:
    return (inputs[0].detach().requires_grad_(), *inputs[1:]), keywords


# what torch's counter does not know
for operation, formula in (
    (torch.ops.aten.addmm_, addmm_flop),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop),
):
    if operation not in flop_registry:
        register_flop_formula(operation, get_raw=True)(formula)


def _count_flops(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def _peak_memory(arguments: argparse.Namespace, name: str, end_to_end: bool) -> int:
    torch.set_num_threads(arguments.threads)
    before = anonymous_bytes()
    with quiet():
        variant = VARIANTS[name](arguments)
    with PeakMemory() as peak:
        for _ in range(2):
            variant.step(end_to_end)
    return peak.bytes - before
