"""Any module with linears in one's own loop: linears by their names, as PEFT's `target_modules` has them."""

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from r1p_dist.adapters import Routing
from r1p_dist.backbones.host import Host
from r1p_dist.backbones.slots import Slot
from r1p_dist.errors import InputError

_IGNORED = -100  # the label that torch's and transformers' losses pass over


class PlainHost(Host):
    """A model of which nothing is known but its linears; what they get is (batch, …, in), the batch first.

    targets: the whole names of linears or their ends, or a regular expression that a whole name must match. The guide
    is the `mean` or the `first` of a sample's tokens, or `last_prompt`. Where the model is called with a 2-dimensional
    attention_mask, padding is left out, and what follows the first label that is not -100, too.
    InputError: a name that no linear has, or a linear that an adapter cannot serve.
    """

    towers = default_towers = even_towers = ("model",)
    layers = ()
    guides = {"model": ("mean", "first", "last_prompt")}

    def __init__(self, model: nn.Module, targets: str | Sequence[str]):
        self._names = find_linears(model, targets)
        super().__init__(model)
        self.routing = {"model": Routing()}
        self._hook = model.register_forward_pre_hook(self._hear, with_kwargs=True)

    def slots(self, towers: Sequence[str], layers: Sequence[str]) -> Iterator[Slot]:
        for name in self._names:
            owner, _, attribute = name.rpartition(".")
            linear = self.model.get_submodule(name)
            yield Slot(name, "model", attribute, linear, None, self.model.get_submodule(owner), attribute)

    def close(self) -> nn.Module:
        self._hook.remove()
        return super().close()

    def _hear(self, model: nn.Module, inputs: tuple, options: dict[str, Any]) -> None:
        tell_prompts(self.routing["model"], inputs, options)


def tell_prompts(routing: Routing, inputs: tuple, options: Mapping[str, Any]) -> None:
    """Tells the routers of a model which tokens are of the prompts, from what the model is called with."""
    ids = options.get("input_ids", inputs[0] if inputs else None)
    prompt = prompt_tokens(ids, options.get("attention_mask"), options.get("labels"))
    routing.padding = routing.real = prompt
    routing.end = None if prompt is None else (torch.arange(prompt.shape[1], device=prompt.device) * prompt).amax(1)


def prompt_tokens(
    ids: torch.Tensor | None, mask: torch.Tensor | None, labels: torch.Tensor | None
) -> torch.Tensor | None:
    """Returns which tokens (n, t) are of the prompts: no padding, and before the first label that counts.

    None where that is not known: of ids (n, t), mask and labels each may be absent or something else.
    """
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        prompt = mask.bool()
    elif isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point():
        prompt = torch.ones_like(ids, dtype=torch.bool)
    else:
        return None
    if isinstance(labels, torch.Tensor) and labels.shape == prompt.shape:
        before = (labels != _IGNORED).cumsum(1) == 0
        # where the labels begin with the first token, as those of a text without a question, all of it is seen
        prompt = torch.where((prompt & before).any(1, keepdim=True), prompt & before, prompt)
    return prompt


def find_linears(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Returns the names of the linears that targets name, in the model's order. InputError: as of `PlainHost`."""
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if name and isinstance(module, nn.Linear)]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise InputError(f"targets={targets!r}: not a regular expression: {error}") from error
        chosen = [name for name in linears if pattern.fullmatch(name)]
        if not chosen:
            raise InputError(f"targets={targets!r}: matches the whole name of no linear; {_described(linears)}")
    else:
        for target in targets:
            if not any(_is_named(name, target) for name in linears):
                raise InputError(_no_linear(target, modules, linears))
        chosen = [name for name in linears if any(_is_named(name, target) for target in targets)]
        if not chosen:
            raise InputError(f"targets: names no linear; {_described(linears)}")
    _refuse_unserved(model, chosen)
    return chosen


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _no_linear(target: str, modules: dict[str, nn.Module], linears: Sequence[str]) -> str:
    others = {type(module).__name__ for name, module in modules.items() if _is_named(name, target)}
    if others:
        return f"targets: {target!r} is a {' or '.join(sorted(others))}, not a linear; {_described(linears)}"
    owners = {type(module).__name__ for module in modules.values() if target in module._parameters}
    if owners:  # as experts of a mixture, all of a layer in one weight
        return (
            f"targets: {target!r} is a weight of a {' or '.join(sorted(owners))} itself, not a linear; "
            f"{_described(linears)}"
        )
    ends = sorted({name.rpartition(".")[2] for name in linears})
    nearest = difflib.get_close_matches(target, ends, n=1) or difflib.get_close_matches(target, linears, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"targets: no linear is named {target!r}; {hint}{_described(linears)}"


def _described(linears: Sequence[str]) -> str:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    return f"the model has {', '.join(ends[:12]) + (' …' if len(ends) > 12 else '') or 'no linears at all'}"


def _refuse_unserved(model: nn.Module, names: Sequence[str]) -> None:
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name in names:
        own = type(model.get_submodule(name))
        if own.forward is not nn.Linear.forward:
            raise InputError(f"targets: {name} is a {own.__name__}, which computes more than a linear; leave it out")
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.MultiheadAttention):
            raise InputError(f"targets: {name} is never called: nn.MultiheadAttention reads its weight; leave it out")
        if holders[id(model.get_submodule(name).weight)] > 1:
            raise InputError(f"targets: {name} shares its weight with another module, which a merge would change too")
