"""What a training step is compared with: the frozen model (`limit`), ours (`step`, `compiled`, `steady`), PEFT's LoRA.

A variant is a model under training with the batch that all of them see. Variants of one model share its frozen
weights, so that the largest ones fit on one card.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.models import CLASSES, Weights, build, conversations, fill, first_blocks, pictures
from r1p_dist.backbones import ClipBackbone, LlavaBackbone
from r1p_dist.config import TrainConfig
from r1p_dist.errors import InputError
from r1p_dist.kinds import kind_of
from r1p_dist.kinds.open_clip.backbone import build_on_meta
from r1p_dist.kinds.open_clip.weights import model_source
from r1p_dist.losses import contrastive_loss
from r1p_dist.methods import make_method
from r1p_dist.moments.sketch import Sketch
from r1p_dist.moments.whitening import Whitening
from r1p_dist.optimizer import make_optimizer
from r1p_dist.recipes import load_config

RANK, ALPHA = 12, 1.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPTS = "a photo of a {}."


class Variant:
    """arguments: model, batch, dtype, dropout, dropout_kind and device, as of tools/dev/benchmark.py step."""

    def __init__(self, arguments: argparse.Namespace, weights: Weights | None = None):
        """weights: frozen ones to share; new ones are drawn without."""
        torch.manual_seed(0)
        self.arguments = arguments
        self.device, self.dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
        self.backbone: ClipBackbone | LlavaBackbone = build(arguments.model, self.device, self.dtype, weights)
        self.weights = dict(self.backbone.named_parameters())  # by their names before there are adapters
        self.is_clip = isinstance(self.backbone, ClipBackbone)
        self.batch = self.make_batch(arguments.batch)
        self.model: nn.Module = self.backbone
        self.prepare()
        self.model.to(self.dtype).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(trained, TrainConfig()) if trained else None

    def make_batch(self, count: int) -> dict[str, Any]:
        """Returns a batch of random samples on the device, made ready as in training."""
        generator = torch.Generator().manual_seed(1)
        prompts: list[str] = []
        if self.is_clip:
            prompts = [PROMPTS.format(name) for name in CLASSES]
            self.prompts = self.backbone.tokenize(prompts)
            batch = pictures(self.backbone, count, generator)
            batch["image"] = batch["image"].to(self.dtype)
        else:
            batch = self.conversations(count, generator)
        batch = self.backbone.preparer(prompts)(batch)
        self.backbone.begin_step([batch], TrainConfig())
        return {k: value.to(self.device) if isinstance(value, torch.Tensor) else value for k, value in batch.items()}

    def conversations(self, count: int, generator: torch.Generator) -> dict[str, Any]:
        """Returns a batch of random conversations, on the CPU."""
        return conversations(self.backbone, self.arguments.model, count, generator)

    def prepare(self) -> None:
        """Makes the model what is to be measured."""
        raise NotImplementedError

    def checkpoint_blocks(self) -> None:
        """Makes every block run its forward again in the backward."""
        self.backbone.checkpoint_blocks()

    def clip(self) -> nn.Module:
        return self.backbone.model

    def loss(self, batch: dict[str, Any], end_to_end: bool) -> torch.Tensor:
        """Returns the loss; of a CLIP without `end_to_end` each sample's own prompt is encoded, untrimmed."""
        if not self.is_clip:
            return self.backbone.loss(self.backbone, batch)
        clip, label = self.clip(), batch["label"]
        self.backbone.routing["text"].weights = None
        image = F.normalize(clip.visual(batch["image"]).float(), dim=-1)
        text = F.normalize(clip.text(self.prompts[label]).float(), dim=-1)
        return contrastive_loss(image, text, label, self.backbone.logit_scale)

    def step(self, end_to_end: bool) -> None:
        self.loss(self.batch, end_to_end).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def tensors(self) -> list[torch.Tensor]:
        """Returns all that stays between two steps: weights, adapters, moments and the batch."""
        moments = (
            [] if self.optimizer is None else [s for state in self.optimizer.state.values() for s in state.values()]
        )
        batch = [value for value in self.batch.values() if isinstance(value, torch.Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *moments, *batch]


class Limit(Variant):
    def prepare(self) -> None:
        for module in first_blocks(self.backbone):
            module.register_forward_pre_hook(require_gradient, with_kwargs=True)


class Step(Variant):
    def prepare(self) -> None:
        dropout = [f"options.dropout={self.arguments.dropout}", f"options.dropout_kind={self.arguments.dropout_kind}"]
        recipe = "mini_mtil_dac" if self.is_clip else "mini_instruct"
        config = load_config(recipe, [*dropout, f"options.rank={RANK}", f"options.alpha={ALPHA}"])
        self.method = make_method(config, self.backbone)

    def loss(self, batch: dict[str, Any], end_to_end: bool) -> torch.Tensor:
        if self.is_clip and not end_to_end:
            return super().loss(batch, end_to_end)
        return self.method.loss(self.backbone, batch)[0]

    def step(self, end_to_end: bool) -> None:
        super().step(end_to_end)
        self.method.after_step(None)


class Compiled(Step):
    """The same with train.compile=true."""

    def prepare(self) -> None:
        super().prepare()
        self.backbone.compile_blocks()


class Steady(Step):
    """The method of that name, as it trains from the second task on."""

    def prepare(self) -> None:
        options = [f"options.{key}={value}" for key, value in (("rank", RANK), ("alpha", ALPHA))]
        recipe = "mini_mtil" if self.is_clip else "mini_instruct"
        config = load_config(recipe, ["method=steady", *options, f"options.dropout={self.arguments.dropout}"])
        self.method = make_method(config, self.backbone)
        own = self.method.options
        inner = functools.cache(lambda width: Whitening.of(self._moment(width), own.ridge))
        outer = functools.cache(lambda width: Whitening.of(self._sketch(width), own.outer_ridge))
        for adapter in self.method.adapters:
            adapter.whitening, adapter.scale = inner(adapter.in_features), 1.0
            if own.outer_ridge is not None:
                adapter.outer = outer(adapter.out_features)

    def _moment(self, width: int) -> torch.Tensor | Sketch:
        """Returns one of the form that the method keeps for inputs of that width."""
        is_wide = width > self.method.options.sketch_above
        return self._sketch(width) if is_wide else torch.eye(width, device=self.device)

    def _sketch(self, width: int) -> Sketch:
        factor = torch.eye(width, min(width, self.method.options.sketch), device=self.device)
        return Sketch(factor, factor.new_tensor(0.1))


class Peft(Variant):
    def prepare(self) -> None:
        try:
            import peft
        except ImportError as error:
            raise InputError("--against peft: PEFT is not installed; pip install peft") from error
        if self.is_clip:
            self.model = build_on_meta(model_source(self.arguments.model), None, False).requires_grad_(False)
            for tower in (self.model.visual, self.model.text):
                for block in tower.transformer.resblocks:
                    block.attn = SplitAttention(block.attn)
            fill(self.model, self.device, self.dtype, {})
            adapted = self.model
            targets = ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"]
        else:
            adapted = self.transformers_model(self.weights)
            self.model = self.backbone if adapted is self.backbone.model else adapted
            kind = kind_of(self.backbone.kind)
            linears = {slot.linear for slot in self.backbone.slots(kind.default_towers, kind.layers)}
            targets = [name for name, module in self.backbone.model.named_modules() if module in linears]
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=self.arguments.dropout, target_modules=targets, bias="none"
        )
        peft.inject_adapter_in_model(config, adapted)

    def transformers_model(self, weights: Weights) -> nn.Module:
        """Returns the LLaVA that gets PEFT's adapters, the backbone's or another; weights: by the backbone's names."""
        return self.backbone.model

    def checkpoint_blocks(self) -> None:
        if not self.is_clip:
            return super().checkpoint_blocks()
        self.model.visual.set_grad_checkpointing(True)
        self.model.text.set_grad_checkpointing(True)

    def clip(self) -> nn.Module:
        return self.model


VARIANTS: dict[str, Callable[..., Variant]] = {
    "limit": Limit,
    "step": Step,
    "compiled": Compiled,
    "steady": Steady,
    "peft": Peft,
}


def make_variants(names: list[str], arguments: argparse.Namespace) -> dict[str, Variant]:
    """Returns variants of one model, which share its frozen weights; InputError: PEFT is asked for and not there."""
    variants: dict[str, Variant] = {}
    weights: Weights | None = None
    for name in names:
        variants[name] = VARIANTS[name](arguments, weights)
        weights = weights or variants[name].weights
    return variants


class SplitAttention(nn.Module):
    """An nn.MultiheadAttention with q, k and v as linears of their own, as PEFT's users have them; called like it.

    On the meta device, as a model without weights is.
    """

    def __init__(self, source: nn.MultiheadAttention):
        super().__init__()
        self.num_heads, width = source.num_heads, source.embed_dim
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(width, width, device="meta"))
        self.requires_grad_(False)

    def forward(self, query, key, value, need_weights=False, attn_mask=None):
        batch, tokens, width = query.shape
        q, k, v = (
            projection(query).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(y.transpose(1, 2).reshape(batch, tokens, width)), None


def require_gradient(module: nn.Module, inputs: tuple, keywords: dict) -> tuple[tuple, dict]:
    return (inputs[0].detach().requires_grad_(), *inputs[1:]), keywords
