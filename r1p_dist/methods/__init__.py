"""The methods, one file per paper; METHODS maps the name in a recipe to the class."""

import difflib

from r1p_dist.backbones import ClipBackbone
from r1p_dist.config import RunConfig
from r1p_dist.errors import InputError
from r1p_dist.methods.dac import Dac
from r1p_dist.methods.lora import Joint, Lora
from r1p_dist.methods.method import Method as Method
from r1p_dist.methods.method import Stage as Stage
from r1p_dist.methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {"dac": Dac, "lora": Lora, "joint": Joint, "zero_shot": ZeroShot}


def make_method(config: RunConfig, backbone: ClipBackbone) -> Method:
    """Puts the method that a run's configuration names on the backbone. Raises InputError for an unknown one."""
    if config.method not in METHODS:
        nearest = difflib.get_close_matches(config.method, METHODS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise InputError(f"method={config.method}: no such method{hint}; there are {', '.join(METHODS)}")
    return METHODS[config.method](config, backbone)
