"""The methods, one file per paper; METHODS maps the name in a recipe to the class."""

from r1p_dist.methods.dac import Dac
from r1p_dist.methods.lora import Joint, Lora
from r1p_dist.methods.method import Method as Method
from r1p_dist.methods.method import Stage as Stage
from r1p_dist.methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {"dac": Dac, "lora": Lora, "joint": Joint, "zero_shot": ZeroShot}
