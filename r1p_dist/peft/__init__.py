"""DAC as a tuner of PEFT: `get_peft_model(model, R1PConfig(r=12, active=8))`. Importing it tells PEFT of the method."""

try:
    import peft as _  # noqa: F401  # so that nothing else can be what is missing
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("r1p_dist.peft needs peft: pip install 'r1p-dist[peft]'", name="peft") from error

from r1p_dist.peft.callback import R1PCallback as R1PCallback
from r1p_dist.peft.config import R1PConfig as R1PConfig
from r1p_dist.peft.layer import R1PLinear as R1PLinear
from r1p_dist.peft.model import R1PModel as R1PModel
from r1p_dist.peft.registry import register

register(R1PConfig, R1PModel)
