"""One micro step on the meta device: what it computes, keeps and asks ZeRO-3 for, from shapes alone.

Forward and backward really run, on tensors without content, so the order of modules, the order in which gradients
arrive and the life of every activation are those of the code that trains. Every kind of model is described by the same
two things: a model on the meta device with its adapters, and a function that runs its forward.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from r1p_dist.adapters import FusedProjection, LowRankLinear
from r1p_dist.storage_meter import StorageMeter

_INDEXING = ("index", "index_put")
_MATRIX_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}


@dataclass(frozen=True)
class Parameter:
    """name: as in the model. kind: `frozen`, `adapter` (trained) or `router` (neither in the backbone nor trained)."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def is_trained(self) -> bool:
        return self.kind == "adapter"


@dataclass(frozen=True)
class Visit:
    """A module is entered or left: DeepSpeed's ZeRO-3 fetches or may release its parameters then.

    is_recompute: in the second forward of activation checkpointing. peak: the most activation bytes that lived since
    the visit before this one; live: those that live now.
    """

    module: int
    is_fetch: bool
    is_backward: bool
    is_recompute: bool
    peak: int
    live: int


@dataclass
class Trace:
    """What one micro step does. parameters_of: per module the indices of its own parameters and of those it borrows.

    gradients: indices of trained parameters in the order in which their gradients arrive. forward_live: activation
    bytes at the end of the forward. tail: the highest activation bytes after the last visit.
    """

    parameters: list[Parameter]
    parameters_of: list[list[int]]
    visits: list[Visit] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    outputs_with_gradient: int = 0
    forward_live: int = 0
    tail: int = 0
    forward_flops: int = 0
    backward_flops: int = 0

    @property
    def peak(self) -> int:
        """The highest activation bytes of the micro step, without the loss."""
        return max([self.tail, *(visit.peak for visit in self.visits)])


def trace_step(
    model: nn.Module, forward: Callable[[], Sequence[torch.Tensor]], known: Iterable[torch.Tensor] = ()
) -> Trace:
    """Returns the trace of one forward and backward of a model on the meta device.

    forward: runs the model and returns what the loss is computed from; the loss itself is left out. known: tensors that
    are there before and after it, counted elsewhere.
    """
    modules = list(model.modules())
    names = {parameter: name for name, parameter in model.named_parameters()}
    index = {parameter: i for i, parameter in enumerate(names)}
    borrowed = {module: _borrowed(module) for module in modules}
    meter = _Meter()
    recorder = _Recorder(modules, borrowed, meter)
    trained = [parameter for parameter in index if parameter.requires_grad]
    arrived: list[int] = []

    def on_gradient(parameter: nn.Parameter) -> None:
        arrived.append(index[parameter])
        parameter.grad = None  # gradients are counted by ZeRO stage, not here

    handles = [parameter.register_post_accumulate_grad_hook(on_gradient) for parameter in trained]
    handles += recorder.hooks()
    meter.ignore([*model.parameters(), *model.buffers(), *known])  # not activations
    trace = Trace([_describe(name, parameter) for parameter, name in names.items()], [])
    try:
        with recorder.watched_parameters(), _fused_attention(meter), meter:
            outputs = list(forward())
            trace.forward_live, trace.forward_flops = meter.live, meter.flops
            outputs = [output for output in outputs if output.requires_grad]  # a tower without adapters needs none
            trace.outputs_with_gradient = len(outputs)
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
            del outputs
    finally:
        for handle in handles:
            handle.remove()
    trace.visits, trace.gradients = recorder.visits, arrived
    trace.parameters_of = [
        [index[parameter] for parameter in dict.fromkeys([*module.parameters(recurse=False), *borrowed[module]])]
        for module in modules
    ]
    trace.tail, trace.backward_flops = meter.take_peak(), meter.flops - trace.forward_flops
    return trace


def _describe(name: str, parameter: nn.Parameter) -> Parameter:
    kind = "adapter" if parameter.requires_grad else "router" if ".router." in name else "frozen"
    return Parameter(name, tuple(parameter.shape), kind)


def _borrowed(module: nn.Module) -> list[nn.Parameter]:
    return module.borrowed_parameters() if isinstance(module, LowRankLinear | FusedProjection) else []


class _Meter(StorageMeter):
    """Counts floating-point operations too.

    Tensors on the CPU have content, for code that reads it, and become meta tensors where they meet those.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        args, kwargs = _without_content(name, args, kwargs or {})
        output = function(*args, **kwargs)
        if name in _MATRIX_PRODUCTS:
            left, right = (args[place] for place in _MATRIX_PRODUCTS[name])
            self.flops += 2 * left.numel() * right.shape[-1]
        elif name == "convolution":
            self.flops += 2 * output.numel() * args[1].shape[1:].numel()
        self.see(output)
        return output


def _without_content(name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Returns an operation's arguments, all on the meta device where one is; not a mask whose sum decides a shape.

    Code that moves a tensor to where another one is moves nothing: numbers and masks keep their content, which is
    looked into later, and what has none gets none.
    """
    if name == "_to_copy" and (args[0].is_meta or not args[0].is_floating_point()):
        return args, kwargs | {"device": None}
    if not any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
        return args, kwargs
    kept: set[int] = set()
    if name in _INDEXING:
        kept = {id(index) for index in args[1] if index is not None and index.dtype == torch.bool}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if id(tensor) in kept else tensor.to("meta")

    return tree_map_only(torch.Tensor, move, (args, kwargs))


@contextmanager
def _fused_attention(meter: _Meter) -> Iterator[None]:
    """Gives attention the memory of a fused kernel, which the meta device has not: no (tokens, tokens) scores.

    A TorchFunctionMode would not reach the second forward of activation checkpointing, which runs in the backward.
    """
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *_, **__: _FusedAttention.apply(q, k, v, meter)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class _FusedAttention(torch.autograd.Function):
    """q, k, v (batch, heads, tokens, width) -> the same; keeps them, the output and one number per row of scores."""

    @staticmethod
    def forward(ctx, q, k, v, meter):
        output, rows = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, output, rows)
        ctx.meter, ctx.flops = meter, 4 * q.numel() * k.shape[-2]
        meter.flops += ctx.flops
        return output

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, _, _ = ctx.saved_tensors
        ctx.meter.flops += ctx.flops * 5 // 2  # five products of the forward's two
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class _Recorder:
    """Notes a model's visits in the places where DeepSpeed's ZeRO-3 has its hooks (its parameter_offload.py)."""

    def __init__(self, modules: list[nn.Module], borrowed: dict[nn.Module, list[nn.Parameter]], meter: _Meter) -> None:
        self.visits: list[Visit] = []
        self._modules, self._borrowed, self._meter = modules, borrowed, meter
        self._stack: list[nn.Module] = []
        self._remaining: dict[int, int] = {}

    def hooks(self) -> Iterator[Any]:
        for number, module in enumerate(self._modules):
            yield module.register_forward_pre_hook(self._entering(number, module))
            yield module.register_forward_hook(self._leaving(number, module))

    def note(self, module: int, is_fetch: bool, is_backward: bool) -> None:
        is_recompute = not is_backward and torch._C._current_graph_task_id() != -1
        peak = self._meter.take_peak()
        self.visits.append(Visit(module, is_fetch, is_backward, is_recompute, peak, self._meter.live))

    def _entering(self, number: int, module: nn.Module) -> Callable:
        def hook(_, inputs):
            self._stack.append(module)
            self.note(number, is_fetch=True, is_backward=False)
            self._remaining[number] = 0
            return tree_map_only(torch.Tensor, lambda tensor: _AfterBackward.apply(tensor, self, number), inputs)

        return hook

    def _leaving(self, number: int, module: nn.Module) -> Callable:
        def hook(_, inputs, output):
            self._stack.pop()
            self.note(number, is_fetch=False, is_backward=False)
            return tree_map_only(torch.Tensor, lambda tensor: _BeforeBackward.apply(tensor, self, number), output)

        return hook

    def input_needs_gradient(self, number: int) -> None:
        self._remaining[number] += 1

    def input_got_gradient(self, number: int) -> None:
        self._remaining[number] -= 1
        if self._remaining[number] == 0:
            self.note(number, is_fetch=False, is_backward=True)

    @contextmanager
    def watched_parameters(self) -> Iterator[None]:
        """Finds parameters that code reads outside of the modules that own or borrow them.

        ZeRO-3 gathers such a parameter then, and from the next step on with the innermost module that ran.
        """
        plain = {module: module._parameters for module in self._modules}
        for module in self._modules:
            module.__dict__["_parameters"] = _WatchedParameters(plain[module], self._read)
        try:
            yield
        finally:
            for module in self._modules:
                module.__dict__["_parameters"] = plain[module]

    def _read(self, parameter: nn.Parameter) -> None:
        if not self._stack or torch._C._current_graph_task_id() != -1:
            return
        for module in self._stack:
            own = dict.values(module._parameters)
            if any(parameter is other for other in [*own, *self._borrowed[module]]):
                return
        self._borrowed[self._stack[-1]].append(parameter)


class _WatchedParameters(dict):
    """A module's parameters; tells when one is read."""

    def __init__(self, parameters: dict[str, nn.Parameter | None], read: Callable[[nn.Parameter], None]) -> None:
        super().__init__(parameters)
        self._read = read

    def __getitem__(self, name: str) -> nn.Parameter | None:
        parameter = super().__getitem__(name)
        if parameter is not None:
            self._read(parameter)
        return parameter


class _BeforeBackward(torch.autograd.Function):
    """Stands behind a module's output: its backward runs before the module's."""

    @staticmethod
    def forward(ctx, output, recorder, number):
        ctx.recorder, ctx.number = recorder, number
        return output.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.recorder.note(ctx.number, is_fetch=True, is_backward=True)
        return gradient, None, None


class _AfterBackward(torch.autograd.Function):
    """Stands before a module's input: its backward runs after the module's."""

    @staticmethod
    def forward(ctx, x, recorder, number):
        ctx.recorder, ctx.number = recorder, number
        if x.requires_grad:
            recorder.input_needs_gradient(number)
        return x.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.recorder.input_got_gradient(ctx.number)
        return gradient, None, None
