"""open_clip's residual attention block with its linears open to adapters; the names of its weights stay the same."""

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

from r1p_dist.adapters import FusedProjection, LowRankLinear
from r1p_dist.backbones.recompute import set_recompute


class Attention(nn.Module):
    """Self-attention with the weights of an nn.MultiheadAttention, which hides its fused projection from adapters."""

    def __init__(self, source: nn.MultiheadAttention):
        super().__init__()
        width = source.embed_dim
        in_proj = nn.Linear(width, 3 * width, bias=source.in_proj_bias is not None, device="meta")
        in_proj.weight, in_proj.bias = source.in_proj_weight, source.in_proj_bias
        self.in_proj = FusedProjection(in_proj)
        self.out_proj = nn.Linear(width, width, bias=source.out_proj.bias is not None, device="meta")
        self.out_proj.weight, self.out_proj.bias = source.out_proj.weight, source.out_proj.bias
        self.num_heads = source.num_heads

    def forward(self, x: torch.Tensor, source: torch.Tensor, attn_mask: torch.Tensor | None) -> torch.Tensor:
        """x, computed from source, (batch, tokens, width) -> the same; attn_mask: additive (>= tokens)^2, or of each
        sample and head (batch * heads, tokens, tokens)."""
        batch, tokens, width = x.shape
        heads = self.in_proj(x, source).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, head width)
        if attn_mask is not None:
            attn_mask = attn_mask[..., :tokens, :tokens].to(q.dtype)  # trimmed prompts
            attn_mask = attn_mask.view(batch, -1, tokens, tokens) if attn_mask.ndim == 3 else attn_mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """open_clip's residual attention block, called like it.

    The adapted linears get, beside their input, what a LayerNorm or the activation computed it from: autograd keeps
    that anyway, and computing the input again in the backward takes much less than the memory to keep it is worth.
    """

    def __init__(self, source: ResidualAttentionBlock):
        super().__init__()
        self.ln_1, self.ls_1, self.ln_2, self.ls_2 = source.ln_1, source.ls_1, source.ln_2, source.ls_2
        self.attn, self.mlp = Attention(source.attn), source.mlp
        set_recompute(self.attn.in_proj, self.ln_1)
        object.__setattr__(self, "_source", source)  # not a child: it has the same modules
        self.beside: nn.Module | None = None  # of the MLP: what it makes of the same residual is added too

    def close(self) -> ResidualAttentionBlock:
        """Returns open_clip's own block with the weights that this one has now; it must have no adapters."""
        source, attention = self._source, self.attn
        source.attn.in_proj_weight, source.attn.in_proj_bias = (
            attention.in_proj.linear.weight,
            attention.in_proj.linear.bias,
        )
        source.attn.out_proj.weight, source.attn.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias
        return source.train(self.training)

    def get_weight_dtype(self) -> torch.dtype:
        return self.mlp.c_fc.weight.dtype

    def forward(self, q_x: torch.Tensor, k_x: None = None, v_x: None = None, attn_mask: torch.Tensor | None = None):
        """Returns (batch, tokens, width) for q_x of that shape; attn_mask: additive (>= tokens)^2."""
        x = q_x + self.ls_1(self.attn(self.ln_1(q_x), q_x.detach(), attn_mask))
        h = _apply(self.mlp.c_fc, self.ln_2(x), x)
        y = x + self.ls_2(_apply(self.mlp.c_proj, self.mlp.gelu(h), h))
        return y if self.beside is None else y + self.beside(x)


def _apply(layer: nn.Module, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return layer(x, source.detach()) if isinstance(layer, LowRankLinear) else layer(x)
