"""The two towers of a CLIP: where their linears are, which vector guides, and which tokens of a prompt are real.

Towers differ by who wrote their blocks. open_clip's own hide a fused projection in nn.MultiheadAttention, so they are
replaced by ones of the same weights (backbones/blocks.py). Blocks of timm and transformers call their linears as
modules: adapters take the place of these, found by where a block holds them, never by the name of a model. A tower of
another make is a place in `_PATHS`.
"""

from collections.abc import Iterator, Sequence

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from r1p_dist.adapters import FusedProjection, LowRankLinear
from r1p_dist.backbones.blocks import Block
from r1p_dist.backbones.slots import Slot
from r1p_dist.errors import InputError

# Where blocks that are not open_clip's hold the linear of a name; `gate` is the half of a gated MLP that its activation
# sees, `fc1` the other one.
_PATHS = {
    "q": ("attn.q_proj", "attention.self.query", "layer.0.SelfAttention.q", "self_attn.q_proj"),
    "k": ("attn.k_proj", "attention.self.key", "layer.0.SelfAttention.k", "self_attn.k_proj"),
    "v": ("attn.v_proj", "attention.self.value", "layer.0.SelfAttention.v", "self_attn.v_proj"),
    "out": (
        *("attn.proj", "token_mixer.proj", "attention.output.dense"),
        *("layer.0.SelfAttention.o", "self_attn.out_proj"),
    ),
    "gate": ("mlp.fc1_g", "mlp.w0", "layer.1.DenseReluDense.wi_0"),
    "fc1": (
        *("mlp.fc1", "mlp.fc1_x", "mlp.w1", "intermediate.dense"),
        *("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wi_1", "fc1"),
    ),
    "fc2": ("mlp.fc2", "mlp.w2", "output.dense", "layer.1.DenseReluDense.wo", "fc2"),
}
_FUSED = ("attn.qkv", "token_mixer.qkv")


class Tower:
    """A tower whose linears adapters can be put on.

    name: image or text. blocks: those with linears; none, for example, in a ResNet. guide: what `auto` stands for, the
    class token (`first`) where there is one, else the token that the tower pools at (`eot`) or the `mean` of all.
    is_own: the blocks are open_clip's. What of a tower is not an adapter may have dropout or batch statistics of its
    own, so it stays in eval mode (`train`): a frozen model gives the same features on any number of ranks.
    """

    guide = "first"

    def __init__(self, name: str, module: nn.Module):
        self.name, self.module = name, module
        self.is_own = is_own_tower(module)
        if self.is_own:
            blocks = module.transformer.resblocks
            for i, block in enumerate(blocks):
                blocks[i] = block if isinstance(block, Block) else Block(block)
        else:
            for block in _blocks_of_libraries(module):
                _open_fused(block)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.module.transformer.resblocks) if self.is_own else _blocks_of_libraries(self.module)

    def close(self) -> None:
        """Puts the library's own modules back, with the weights of now; there must be no adapters any more."""
        blocks = self.blocks
        for number, block in enumerate(blocks):
            if self.is_own:
                self.module.transformer.resblocks[number] = block.close()
                continue
            for path in _FUSED:
                if isinstance(fused := _at(block, path), FusedProjection):
                    attention = _at(block, path.rpartition(".")[0])
                    attention.qkv = fused.linear
                    if isinstance(fused, SplitBiasProjection):
                        attention.q_bias, attention.v_bias = fused.q_bias, fused.v_bias

    def train(self, mode: bool) -> None:
        """Puts adapters into training or eval mode, and the rest of a library's tower always into eval mode."""
        if self.is_own:
            return
        self.module.eval()
        for module in self.module.modules():
            if isinstance(module, LowRankLinear | FusedProjection):
                module.train(mode)

    def slots(self, layers: Sequence[str]) -> Iterator[Slot]:
        """Yields the slots of these layers, block by block. InputError: there are none."""
        found = _own_places if self.is_own else _places
        empty = True
        for number, block in enumerate(self.blocks):
            for layer, owner, attribute, linear, rows, input_from in found(block):
                if layer in layers:
                    empty = False
                    linear = linear.linear if isinstance(linear, LowRankLinear) else linear
                    slot_name = f"{self.name}.{number}.{layer}"
                    yield Slot(slot_name, self.name, layer, linear, rows, owner, attribute, input_from)
        if empty:
            raise InputError(
                f"backbone: the {self.name} tower, {self.described}, has no linears {', '.join(layers)} that adapters "
                "can serve; name the other tower in targets.towers, or use another model (r1p backbones lists them)"
            )

    @property
    def described(self) -> str:
        """The class of the tower."""
        inner = self.module.trunk if isinstance(self.module, TimmModel) else self.module
        return f"a {type(inner).__name__}"


class SplitBiasProjection(FusedProjection):
    """The fused projection of an attention that holds biases of q and v beside it, as EVA's does.

    The attention would read the weight itself to add them, and so go past the adapters: here they are.
    """

    def __init__(self, attention: nn.Module):
        super().__init__(attention.qkv)
        self.q_bias, self.v_bias = attention.q_bias, attention.v_bias
        attention.q_bias = attention.v_bias = None

    def forward(self, x: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, source) + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])


class ImageTower(Tower):
    """An image tower."""

    def __init__(self, module: nn.Module):
        super().__init__("image", module)
        inner = module.trunk if isinstance(module, TimmModel) else module
        has_class = any(getattr(inner, name, None) is not None for name in ("cls_token", "class_embedding"))
        self.guide = "first" if has_class else "mean"


class TextTower(Tower):
    """A text tower of open_clip's; tokens (m, context)."""

    def __init__(self, module: nn.Module):
        super().__init__("text", module)
        self._has_class = getattr(module, "cls_emb", None) is not None
        self._pools_at = "last" if self._has_class else getattr(module, "pool_type", None) or module.text_pool_type
        self._sees_padding = not (self._has_class or getattr(module, "use_pad_mask", False))
        self.guide = "first" if self._pools_at == "first" else "eot"

    @property
    def entry(self) -> nn.Module:
        """The module whose input are the tokens, however the tower is called."""
        return self.module.token_embedding

    def trim(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns tokens (m, longest prompt), where nothing behind it is ever seen, and the place (m,) in a block's
        input of each token that the tower pools at; the host waits for a device."""
        end = self.end(tokens)
        if self._pools_at not in ("first", "last") and self.module.attn_mask is not None:
            tokens = tokens[:, : int(end.max()) + 1]  # causal
        return tokens, end

    def end(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the place (m,) in a block's input of each token that the tower pools at."""
        if self._pools_at in ("first", "last"):
            last = tokens.shape[1] - 1 + self._has_class if self._pools_at == "last" else 0
            return tokens.new_full((len(tokens),), last)
        return (tokens == self.module.eos_id).int().argmax(1) if self._pools_at == "eos" else tokens.argmax(1)

    def real(self, tokens: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Returns which tokens of a block's input (m, tokens) are no padding, for `trim`'s tokens and places."""
        if not self._sees_padding:
            real = tokens != self.module.pad_id
            return torch.cat([real, real.new_ones(len(real), 1)], 1) if self._has_class else real
        if self._pools_at in ("first", "last"):  # trained to read padding
            return torch.ones_like(tokens, dtype=torch.bool)
        return torch.arange(tokens.shape[1], device=tokens.device) <= end[:, None]


class HfTextTower(Tower):
    """A text tower of transformers; tokens (m, context), padded at their end."""

    def __init__(self, module: HFTextEncoder):
        super().__init__("text", module)
        self._padding = module.config.pad_token_id
        self.guide = "first" if hasattr(module.pooler, "cls_token_position") else "mean"
        if isinstance(module.transformer, PreTrainedModel):
            # transformers would put its hooks in later, and an engine takes away all hooks that came in its time
            maybe_install_capturing_hooks(module.transformer)

    @property
    def entry(self) -> nn.Module:
        """As of a `TextTower`."""
        return self.module

    def trim(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of a `TextTower`."""
        end = self.end(tokens)
        return tokens[:, : int(end.max()) + 1], end

    def end(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the place (m,) of the last real token."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return (places * (tokens != self._padding)).amax(1)

    def real(self, tokens: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """As of a `TextTower`."""
        return tokens != self._padding


class HfTower(Tower):
    """A tower of a CLIPModel or SiglipModel of transformers.

    It keeps the mode of its model, for transformers' gradient checkpointing asks for that; these have no statistics of
    a batch, and dropout only where their configuration says so.
    """

    def train(self, mode: bool) -> None:
        """Does nothing."""


class HfImageTower(HfTower):
    """The image tower of a CLIPModel or SiglipModel."""

    def __init__(self, module: nn.Module):
        super().__init__("image", module)
        self.guide = "first" if hasattr(module.embeddings, "class_embedding") else "mean"


class HfClipText(HfTower):
    """The text tower of a CLIPModel (is_causal) or SiglipModel; tokens (m, context).

    A CLIP's pools at the end token and sees none behind it; a SigLIP's at the last one, and was trained to see padding.
    """

    guide = "eot"

    def __init__(self, module: nn.Module, is_causal: bool):
        super().__init__("text", module)
        self._is_causal = is_causal

    @property
    def entry(self) -> nn.Module:
        """As of a `TextTower`."""
        return self.module.embeddings.token_embedding

    def end(self, tokens: torch.Tensor) -> torch.Tensor:
        """As of a `TextTower`."""
        if not self._is_causal:
            return tokens.new_full((len(tokens),), tokens.shape[1] - 1)
        eos = self.module.config.eos_token_id
        # 2 stands in old configurations, whatever the token is; transformers takes the highest then, as OpenAI did
        return tokens.argmax(1) if eos == 2 else (tokens == eos).int().argmax(1)

    def real(self, tokens: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """As of a `TextTower`."""
        if not self._is_causal:
            return torch.ones_like(tokens, dtype=torch.bool)
        return torch.arange(tokens.shape[1], device=tokens.device) <= end[:, None]


def is_own_tower(module: nn.Module) -> bool:
    """Whether a tower is made of open_clip's own residual attention blocks."""
    blocks = getattr(getattr(module, "transformer", None), "resblocks", ())
    return len(blocks) > 0 and all(isinstance(block, ResidualAttentionBlock | Block) for block in blocks)


def open_towers(model: nn.Module) -> dict[str, Tower]:
    """Returns both towers of an open_clip model, by name, with their linears open to adapters."""
    text = getattr(model, "text", model)
    return {
        "image": ImageTower(model.visual),
        "text": HfTextTower(text) if isinstance(text, HFTextEncoder) else TextTower(text),
    }


def _own_places(block: Block) -> Iterator[tuple]:
    """Yields layer, owner, attribute, linear, rows and what computes the linear's input, of a block of open_clip's."""
    attention, mlp = block.attn, block.mlp
    for layer, rows in zip("qkv", _thirds(attention.in_proj.linear), strict=True):
        yield layer, attention.in_proj.parts, layer, attention.in_proj.linear, rows, None
    yield "out", attention, "out_proj", attention.out_proj, None, None
    yield "fc1", mlp, "c_fc", mlp.c_fc, None, block.ln_2
    yield "fc2", mlp, "c_proj", mlp.c_proj, None, mlp.gelu


def _places(block: nn.Module) -> Iterator[tuple]:
    """Yields the same of a block of a library."""
    for path in _FUSED:
        if isinstance(fused := _at(block, path), FusedProjection):
            for layer, rows in zip("qkv", _thirds(fused.linear), strict=True):
                yield layer, fused.parts, layer, fused.linear, rows, None
    for layer, paths in _PATHS.items():
        for path in paths:
            if isinstance(linear := _at(block, path), nn.Linear | LowRankLinear):
                owner, _, attribute = path.rpartition(".")
                yield layer, _at(block, owner), attribute, linear, None, None


def _blocks_of_libraries(tower: nn.Module) -> list[nn.Module]:
    """Returns the modules of lists that hold linears where blocks of timm or transformers have them."""
    known = (*_FUSED, *(path for paths in _PATHS.values() for path in paths))
    linears = nn.Linear | LowRankLinear | FusedProjection
    return [
        module
        for name, module in tower.named_modules()
        if name.rpartition(".")[2].isdigit() and any(isinstance(_at(module, path), linears) for path in known)
    ]


def _open_fused(block: nn.Module) -> None:
    for path in _FUSED:
        if isinstance(linear := _at(block, path), nn.Linear):
            attention = _at(block, path.rpartition(".")[0])
            is_split = getattr(attention, "q_bias", None) is not None
            attention.qkv = SplitBiasProjection(attention) if is_split else FusedProjection(linear)


def _thirds(linear: nn.Linear) -> list[slice]:
    width = linear.out_features // 3
    return [slice(i * width, (i + 1) * width) for i in range(3)]


def _at(module: nn.Module, path: str) -> nn.Module | None:
    """Returns the module at a path, None where there is none."""
    for name in path.split(".") if path else ():
        module = module._modules.get(name)
        if module is None:
            return None
    return module
