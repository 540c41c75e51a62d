"""The methods, one file per paper; METHODS maps the name in a recipe to the class."""

import difflib

from r1p_dist.backbones import Backbone
from r1p_dist.config import RunConfig
from r1p_dist.errors import InputError
from r1p_dist.methods.dac import Dac
from r1p_dist.methods.lora import Joint, Lora
from r1p_dist.methods.method import Method as Method
from r1p_dist.methods.method import Stage as Stage
from r1p_dist.methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {"dac": Dac, "lora": Lora, "joint": Joint, "zero_shot": ZeroShot}


def method_class(name: str) -> type[Method]:
    """Returns the method of that name; InputError where there is none."""
    if name not in METHODS:
        nearest = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise InputError(f"method={name}: no such method{hint}; there are {', '.join(METHODS)}")
    return METHODS[name]


def make_method(config: RunConfig, backbone: Backbone) -> Method:
    """Puts the method that a run's configuration names on the backbone. InputError: an unknown one."""
    return method_class(config.method)(config, backbone)
