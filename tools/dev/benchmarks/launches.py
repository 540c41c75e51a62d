"""How many operations of torch a step needs per adapted linear, beyond those of the frozen model.

On an accelerator each is the launch of a kernel, and small models wait for launches more than for arithmetic. Views are
not counted. Shapes alone are run, so that nothing depends on the machine; `compiled` runs `tiny` for real instead, and
counts the kernels that torch.compile's compiler made of a block and what it calls beside them.
"""

import argparse
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import quiet
from benchmarks.models import first_blocks
from benchmarks.variants import require_gradient
from r1p_dist import attach_pool, load_clip
from r1p_dist.backbones import Placement
from r1p_dist.backbones.compiling import compile_blocks

_BATCH, _TOKENS = 8, 77
# They make no kernel run: views, and memory that is not filled.
_FREE = set(
    "view _unsafe_view t transpose permute slice select expand detach unsqueeze squeeze split split_with_sizes alias "
    "as_strided unbind _reshape_alias narrow is_same_size lift_fresh empty empty_like new_empty new_empty_strided "
    "promote_types".split()
)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the calls per adapted linear, by kind."""
    with quiet():
        limit, _ = _calls(arguments.model, with_pool=False)
        step, adapted = _calls(arguments.model, with_pool=True)
    step.subtract(limit)
    calls = {name: round(count / adapted, 2) for name, count in step.most_common() if count > 0}
    result = {"model": arguments.model, "calls": round(sum(step.values()) / adapted, 1), "by_kind": calls}
    if arguments.compiled:
        result["tiny"] = {name: _launches(compiles) for name, compiles in (("eager", False), ("compiled", True))}
    return result


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in _FREE:
            self.counted[name] += 1
        return function(*args, **(kwargs or {}))


def _calls(name: str, with_pool: bool) -> tuple[Counter[str], int]:
    """Returns the operations of a forward and backward of both towers, and how many linears are adapted."""
    backbone = load_clip(name, placement=Placement(torch.device("meta")))
    model = backbone.model
    adapters = attach_pool(model).adapters if with_pool else []
    if not with_pool:
        for block in first_blocks(backbone):
            block.register_forward_pre_hook(require_gradient, with_kwargs=True)
    size = model.visual.image_size
    image = torch.zeros(_BATCH, 3, *size, device="meta")
    text = torch.zeros(_BATCH, _TOKENS, dtype=torch.int64, device="meta")
    model.train()
    with _Calls() as calls:
        features = F.normalize(model.visual(image), dim=-1), F.normalize(model.text(text), dim=-1)
        (features[0] @ features[1].T).sum().backward()
    return calls.counted, len(adapters)


def _launches(compiles: bool) -> float:
    """Returns the kernels of a block's forward and backward per adapted linear, as a profile of a CPU shows them."""
    backbone = load_clip("tiny")
    attach_pool(backbone)
    block: nn.Module = backbone.model.visual.transformer.resblocks[1]
    if compiles:
        torch._inductor.config.cpp.enable_kernel_profile = True
        compile_blocks([block])
    x = torch.randn(_BATCH, 17, backbone.model.visual.transformer.width, requires_grad=True)
    block.train()
    for _ in range(2):
        block(x).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        block(x).sum().backward()
    leaves = [event for event in profile.events() if not event.cpu_children and _is_kernel(event.name)]
    return round(len(leaves) / 6, 1)


def _is_kernel(name: str) -> bool:
    space, _, operation = name.rpartition("::")
    if space == "aten":
        return operation not in _FREE
    return "fused" in name
