"""How much of a small update arrives in a bf16 output, for four ways to add it to the frozen product.

One linear of 768 to 3,072, 1,576 tokens, rank 8. For updates of growing size, the realised change of the output
projected on the true one: 1 means that all of it arrives, 0 that rounding loses it. The first line is the size of the
update against the output.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import processor
from r1p_dist.adapters.product import Product, composed_product

TOKENS, IN, OUT, RANK = 1576, 768, 3072, 8


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns {"update/output": [per scale], "arrives": {form: [per scale]}}."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    linear = nn.Linear(IN, OUT, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(draw(OUT, IN) / IN**0.5)
    linear.bias.copy_(draw(OUT) / 2)
    W, b = linear.weight, linear.bias
    x, A = (draw(TOKENS, IN) + 2 * draw(IN)).bfloat16(), (draw(RANK, IN) / IN**0.5).bfloat16()
    frozen = F.linear(x, W, b).double()
    sizes, arrives = [], {}
    for scale in arguments.scales:
        B = (scale * draw(OUT, RANK)).bfloat16()
        update = (x.double() @ A.double().T) @ B.double().T
        u = x @ A.T
        forms = {
            "W + update, then the product": F.linear(x, torch.addmm(W, B, A), b),
            "product, then the update added": F.linear(x, W, b).addmm_(u, B.T),
            "bias + update, then the product added": torch.addmm(b, u, B.T).addmm_(x, W.T),
            "ours": composed_product(Product(linear, [slice(0, OUT)], [1.0], [None]), x, None, [A], [B]),
        }
        sizes.append(float(f"{update.norm() / frozen.norm():.1e}"))
        for name, y in forms.items():
            share = ((y.double() - frozen) * update).sum() / update.square().sum()
            arrives.setdefault(name, []).append(round(share.item(), 3))
    return {"processor": processor(), "update/output": sizes, "arrives": arrives}
