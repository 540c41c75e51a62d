"""The composed product: dropout, recomputed inputs, a product that was there before, half precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from r1p_dist.adapters import AdaptedLinear, FusedProjection
from r1p_dist.adapters.product import Product, composed_product

N, IN, OUT, K = 6, 10, 8, 3


def problem(
    dtype: torch.dtype = torch.float64, n: int = N
) -> tuple[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    x, A, B = (torch.randn(shape, generator=generator).to(dtype) for shape in ((n, IN), (K, IN), (OUT, K)))
    return linear, x, A, B


def mask_of(product: Product, count: int, width: int) -> torch.Tensor:
    return torch.cat([mask for _, mask in product.chunks(count, width, torch.empty(0))])


def test_masks_keep_each_element_independently_with_the_rate() -> None:
    rate, shape = 0.2, (3000, 512)  # more than one chunk
    draws = []
    for seed in range(4):
        torch.manual_seed(seed)
        product = Product(nn.Linear(1, 1), [], [], [], rate)
        mask = mask_of(product, *shape)
        assert len(list(product.chunks(*shape, mask))) > 1 and set(mask.unique().tolist()) == {0, 1}
        assert torch.equal(mask, mask_of(product, *shape)), "the backward must draw the forward's mask"
        draws.append(mask)
    keep = torch.stack(draws).double()
    count = keep.numel()
    assert abs(keep.mean().item() - 0.8) < 5 * (0.16 / count) ** 0.5
    centred = keep.flatten(1) - 0.8
    for distance in (1, 2, 3, 4, 512, 768000):  # neighbours in one draw, in the next, in the next row, the next chunk
        covariance = (centred[:, :-distance] * centred[:, distance:]).mean().item()
        assert abs(covariance) < 5 * 0.16 / centred[:, distance:].numel() ** 0.5, distance
    between = (centred[:-1] * centred[1:]).mean().item()  # masks of different calls
    assert abs(between) < 5 * 0.16 / centred[1:].numel() ** 0.5


def test_every_sixteen_bit_value_drops_or_keeps_as_the_rate_says(monkeypatch) -> None:
    """All 65,536 values once: exactly the rate's share of them drops."""
    product = Product(nn.Linear(1, 1), [], [], [], 0.2)
    every = torch.arange(-32768, 32768, dtype=torch.int16)
    monkeypatch.setattr(torch.Tensor, "random_", lambda draws, *limits, generator: draws.copy_(every.view(torch.int64)))
    assert (mask_of(product, 256, 256) == 0).sum() == round(0.2 * 65536)


def test_the_rate_is_rounded_and_the_scaling_uses_the_rounded_one() -> None:
    product = Product(nn.Linear(1, 1), [], [2.0], [], 0.1)
    assert product.dropout == round(0.1 * 65536) / 65536 and product.scalings == [2.0 / (1 - product.dropout)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputed_input_gives_the_same_gradients(dropout: float) -> None:
    linear, source, A, B = problem()
    norm = nn.LayerNorm(IN, dtype=torch.float64).requires_grad_(False)
    nn.init.normal_(norm.weight)
    results = []
    for recompute in (None, norm.forward):
        leaves = [tensor.clone().requires_grad_() for tensor in (source, A, B)]
        torch.manual_seed(5)
        product = Product(linear, [slice(0, OUT)], [0.5], [None], dropout, recompute=recompute)
        y = composed_product(product, norm(leaves[0]), leaves[0], [leaves[1]], [leaves[2]])
        saved = [tensor.shape for tensor in y.grad_fn.saved_tensors]
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        assert saved[0] == (N, IN)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_input_is_not_kept_where_it_can_be_computed_again() -> None:
    adapted = AdaptedLinear(nn.Linear(IN, 16), rank=4, active=2, merged=1)
    gelu = nn.GELU()
    object.__setattr__(adapted, "recompute", gelu)
    h = torch.randn(2, 3, IN, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda t: t):
        x = gelu(h)
        adapted(x, h)
    assert h.data_ptr() in kept and x.data_ptr() not in kept


def test_a_product_computed_before_gives_the_same_output_and_gradients() -> None:
    linear, x, A, B = problem()
    results = []
    for ahead in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
        frozen = F.linear(x, linear.weight, linear.bias) if ahead else None
        product = Product(linear, [slice(0, OUT)], [0.5], [None], frozen=frozen)
        y = composed_product(product, leaves[0], None, [leaves[1]], [leaves[2]])
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    torch.testing.assert_close(*results)


def test_bf16_keeps_updates_below_the_grid_of_the_weight() -> None:
    """A small update is lost when it is added to W, or to a rounded product; not here."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 512).bfloat16().requires_grad_(False)
    x = torch.randn(512, 256).bfloat16()
    A, B = torch.randn(4, 256).bfloat16(), (torch.randn(512, 4) * 1e-5).bfloat16()
    update = (x.double() @ A.double().T) @ B.double().T
    plain = F.linear(x, linear.weight, linear.bias).double()
    assert 5e-5 < update.norm() / plain.norm() < 1e-3

    def arrived(y: torch.Tensor) -> float:
        return (((y.double() - plain) * update).sum() / update.square().sum()).item()

    ours = composed_product(Product(linear, [slice(0, 512)], [1.0], [None]), x, None, [A], [B])
    assert arrived(ours) == pytest.approx(1.0, abs=0.1)
    assert arrived(F.linear(x, linear.weight + B @ A, linear.bias)) < 0.6
    assert arrived(F.linear(x, linear.weight, linear.bias) + (x @ A.T) @ B.T) < 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_updates_below_the_grid_of_the_bias(dtype: torch.dtype) -> None:
    """One update of a hundredth of a step of the bias: onto the bias first, not a bit of it would arrive."""
    n, out = 4000, 8
    linear = nn.Linear(IN, out).to(dtype).requires_grad_(False)
    nn.init.constant_(linear.bias, 100.0)
    x = torch.randn(n, IN, generator=torch.Generator().manual_seed(0)).to(dtype)
    A, B = torch.zeros(1, IN, dtype=dtype), torch.full((out, 1), 1.0, dtype=dtype)
    step = 100 * torch.finfo(dtype).eps
    nn.init.normal_(linear.weight, std=step, generator=torch.Generator().manual_seed(1))  # spreads the roundings
    A[0, 0] = step / 100
    x[:, 0] = 1.0
    with_update, without = (
        composed_product(Product(linear, [slice(0, out)], [scaling], [None]), x, None, [A], [B]).double()
        for scaling in (1.0, 0.0)
    )
    arrived = (with_update - without).mean() / A[0, 0].double()
    assert arrived == pytest.approx(1.0, abs=0.3)


def test_feature_dropout_drops_whole_features_of_the_update_alone() -> None:
    torch.manual_seed(0)
    adapted = AdaptedLinear(nn.Linear(IN, OUT), 6, 6.0, 6, 2, dropout=0.3, dropout_kind="feature").double()
    nn.init.normal_(adapted.B)
    x = torch.eye(IN, dtype=torch.float64)[None]  # row i of the output shows feature i
    frozen = F.linear(x, adapted.linear.weight, adapted.linear.bias)
    update = (adapted.B @ adapted.A).T[None]  # scaling 1, all six experts are active
    factors = []
    for _ in range(300):
        factor = ((adapted(x) - frozen) / update)[0]
        torch.testing.assert_close(factor, factor[:, :1].expand_as(factor))  # one value per feature
        factors.append(factor[:, 0])
    factors = torch.stack(factors)
    dropped, kept = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1 / 0.7, dtype=torch.float64)
    assert all(torch.isclose(f, dropped) or torch.isclose(f, kept, rtol=1e-6) for f in factors.flatten())
    assert abs((factors > 0.5).double().mean().item() - 0.7) < 5 * (0.21 / factors.numel()) ** 0.5


def test_q_k_and_v_share_one_dropout_mask() -> None:
    torch.manual_seed(0)
    fused = FusedProjection(nn.Linear(IN, 3 * IN))
    for i, name in enumerate("qkv"):
        part = AdaptedLinear(fused.linear, 6, 6.0, 6, 2, dropout=0.5, rows=slice(i * IN, (i + 1) * IN))
        nn.init.ones_(part.A), nn.init.ones_(part.B)
        fused.parts[name] = part
    x = torch.randn(2, 4, IN)
    q, k, v = (fused(x) - F.linear(x, fused.linear.weight, fused.linear.bias)).chunk(3, dim=-1)
    torch.testing.assert_close(q, k)
    torch.testing.assert_close(q, v)


def test_autocast_runs_the_products_in_its_type() -> None:
    torch.manual_seed(0)
    adapted = AdaptedLinear(nn.Linear(16, 16), rank=4, active=2, merged=1)
    nn.init.normal_(adapted.B)
    x = torch.randn(2, 3, 16, requires_grad=True)
    expected = adapted(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=5e-2, rtol=2e-2)
    y.sum().backward()
    assert adapted.A.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


def test_bf16_gradients_are_summed_over_parts_without_loss() -> None:
    """Forty thousand tokens in ten parts: adding part by part in bf16 would round each time."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 64).bfloat16().requires_grad_(False)
    x = torch.rand(40_000, 256).bfloat16()
    A, B = torch.randn(4, 256).bfloat16().requires_grad_(), torch.randn(64, 4).bfloat16().requires_grad_()
    product = Product(linear, [slice(0, 64)], [1.0], [None])
    assert len(list(product.chunks(*x.shape, x))) == 10
    composed_product(product, x, None, [A], [B]).sum().backward()
    gB = B.detach().float().sum(0).bfloat16().float()  # the gradient of the output is 1 everywhere
    exact_A, exact_B = gB[:, None] * x.float().sum(0), (x.float() @ A.detach().float().T).sum(0).expand(64, 4)
    assert A.grad.dtype == B.grad.dtype == torch.bfloat16
    rounding = 2.0**-9  # of bf16: at most half a step, for each part and at the end
    torch.testing.assert_close(A.grad.float(), exact_A, rtol=3 * rounding, atol=0)
    torch.testing.assert_close(B.grad.float(), exact_B, rtol=3 * rounding, atol=0)
