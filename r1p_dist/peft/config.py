"""The configuration of the tuner."""

from dataclasses import dataclass, field
from typing import Any, Literal

from peft.config import PeftConfig

from r1p_dist.attached_pool import check_options
from r1p_dist.peft.registry import peft_type

peft_type()  # PEFT looks the type up by its name in a saved configuration


@dataclass
class R1PConfig(PeftConfig):
    """A pool of rank-1 experts on each linear that target_modules names (DAC, arXiv 2601.22828).

    r, alpha, active, merged, dropout, router_grad, ago_weight, ago_reduction: as in `attach_pool`. guide: the vector
    that routers read: the mean of the prompt's tokens, the first or the last of them. seed: of the experts. tasks: of a
    stream that are finished; `R1PModel.next_task` counts them. target_modules, exclude_modules, layers_to_transform,
    layers_pattern, modules_to_save: PEFT's. InputError: values that do not fit.
    """

    r: int = 12
    alpha: float = 1.0
    active: int = 8
    merged: int = 4
    dropout: float = 0.0
    guide: Literal["mean", "first", "last_prompt"] = "mean"
    router_grad: Literal["none", "straight_through", "gated"] = "none"
    ago_weight: float = 0.1
    ago_reduction: Literal["sum_top", "paper_mean"] = "sum_top"
    seed: int = 0
    tasks: int = 0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        check_options(self.options())

    def options(self) -> dict[str, Any]:
        """Returns the options of DAC."""
        return {
            **{"rank": self.r, "alpha": self.alpha, "active": self.active, "merged": self.merged},
            **{"dropout": self.dropout, "router_grad": self.router_grad},
            "ago": {"weight": self.ago_weight, "reduction": self.ago_reduction},
        }
