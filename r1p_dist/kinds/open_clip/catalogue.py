"""open_clip's models by name: which of their linears adapters go on, from shapes alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch

import open_clip

from r1p_dist.errors import InputError
from r1p_dist.kinds.open_clip import LAYERS, TOWERS
from r1p_dist.kinds.open_clip.backbone import build_on_meta, explain_faults
from r1p_dist.kinds.open_clip.towers import open_towers
from r1p_dist.kinds.open_clip.weights import hub_parts, model_source


@dataclass
class Listed:
    """A model. linears: of each tower that adapters go on, how many; reasons: of each other tower, why not.

    loss: contrastive or sigmoid. hub: what of it open_clip fetches from the hub, beside the weights, and the places.
    """

    name: str
    loss: str
    linears: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    hub: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Whether adapters go on it: `yes`, `text alone`, `image alone` or `no`."""
        towers = list(self.linears)
        return "yes" if len(towers) == len(TOWERS) else f"{towers[0]} alone" if towers else "no"

    def __str__(self) -> str:
        counts = ", ".join(f"{count} linears in the {tower} tower" for tower, count in self.linears.items())
        parts = [f"{self.verdict}: {counts}, {self.loss} loss"] if counts else [self.verdict]
        parts += list(dict.fromkeys(self.reasons.values()))
        parts += [f"from the hub: {', '.join(map(' '.join, self.hub.items()))}"] if self.hub and counts else []
        return f"{self.name}  {'; '.join(parts)}"


def names(pattern: str = "*") -> list[str]:
    """Returns the names of open_clip's models that a pattern of the shell fits; without * or ?, a part of the name."""
    pattern = pattern.lower() if any(sign in pattern for sign in "*?[") else f"*{pattern.lower()}*"
    return [name for name in ["tiny", *open_clip.list_models()] if fnmatch(name.lower(), pattern)]


def lines(pattern: str = "*") -> Iterator[str]:
    """Yields what `r1p backbones` prints of this kind, a line for each model."""
    return map(str, describe(names(pattern)))


def describe(models: Iterable[str]) -> Iterator[Listed]:
    """Yields what can be said of each model; none is loaded, and nothing is fetched."""
    for name in models:
        source = model_source(name)
        loss = "sigmoid" if "init_logit_bias" in (open_clip.get_model_config(source) or {}) else "contrastive"
        listed = Listed(name, loss, hub=hub_parts(source))
        try:
            with explain_faults(name, None):
                towers = open_towers(build_on_meta(source, None, False))
            for tower in TOWERS:
                try:
                    listed.linears[tower] = sum(1 for _ in towers[tower].slots(LAYERS))
                except InputError:
                    listed.reasons[tower] = f"its {tower} tower, {towers[tower].described}, has no linears to serve"
        except InputError as error:
            reason = str(error).partition(": cannot load: ")[2] or str(error).removeprefix("backbone: ")
            listed.reasons = dict.fromkeys(TOWERS, reason)
        yield listed
