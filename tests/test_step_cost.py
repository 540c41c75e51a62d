"""What a step of ViT-B/16 costs, counted instead of timed: operations, and bytes kept for the backward.

Times are measured by tools/dev/benchmark.py, never by a test.
"""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, flop_registry, register_flop_formula

from r1p_dist import attach_pool
from r1p_dist.adapters import AdaptedLinear
from r1p_dist.kinds.open_clip.towers import open_towers

BATCH, TOKENS = 8, 77

if torch.ops.aten.addmm_ not in flop_registry:  # torch's counter does not know it
    register_flop_formula(torch.ops.aten.addmm_, get_raw=True)(addmm_flop)


def require_gradient(module, inputs, keywords):
    return (inputs[0].detach().requires_grad_(), *inputs[1:]), keywords


def build(device: str, with_pool: bool, layers: int = 12, **options) -> torch.nn.Module:
    config = open_clip.get_model_config("ViT-B-16")
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = layers
    with torch.device(device):
        model = open_clip.model.CustomTextCLIP(**config).requires_grad_(False)
    open_towers(model)
    if with_pool:
        attach_pool(model, **options)
    else:
        for tower in (model.visual, model.text):
            tower.transformer.resblocks[0].register_forward_pre_hook(require_gradient, with_kwargs=True)
    return model.train()


def loss(model: torch.nn.Module, device: str) -> torch.Tensor:
    image = torch.zeros(BATCH, 3, 224, 224, device=device)
    text = torch.zeros(BATCH, TOKENS, dtype=torch.int64, device=device)
    features = F.normalize(model.visual(image), dim=-1), F.normalize(model.text(text), dim=-1)
    return (features[0] @ features[1].T).sum()


def count_operations(model: torch.nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        loss(model, "meta").backward()
    return counter.get_total_flops()


def count_kept_bytes(model: torch.nn.Module) -> int:
    """Returns the bytes of all storages, each once, that autograd keeps between forward and backward, less weights."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss(model, "cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        kept.pop(tensor.untyped_storage()._cdata, None)
    assert result.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_a_step_needs_hardly_more_operations_than_the_frozen_model() -> None:
    limit = count_operations(build("meta", with_pool=False))
    step = count_operations(build("meta", with_pool=True))
    image, text = BATCH * 197 * 12 * 768**2, BATCH * TOKENS * 12 * 512**2  # weights times tokens of a block
    assert limit > 2 * 2 * 12 * (image + text), "both towers, forward and backward, must be counted"
    assert 1.0 < step / limit <= 1.03


@pytest.mark.slow
def test_a_step_keeps_hardly_more_than_the_frozen_model() -> None:
    limit = count_kept_bytes(build("cpu", with_pool=False, layers=3))
    step = count_kept_bytes(build("cpu", with_pool=True, layers=3, dropout=0.2))
    assert limit > BATCH * 197 * 768 * 4 * 10 * 3, "ten vectors of the model's width per token and block"
    assert step / limit <= 1.08


def test_experts_of_a_step_are_the_active_ones_only() -> None:
    """Eight of twelve: products of idle experts would cost half as much again."""
    adapted = AdaptedLinear(torch.nn.Linear(64, 64), rank=12, active=8, merged=4)
    x = torch.randn(4, 16, 64, requires_grad=True)
    big, thin = 2 * (4 * 16) * 64 * 64, 2 * (4 * 16) * 8 * (64 + 64)
    with FlopCounterMode(display=False) as counter:
        adapted(x).sum().backward()
    router = 2 * 4 * 64 * 12
    assert counter.get_total_flops() == 2 * big + 3 * thin + router
