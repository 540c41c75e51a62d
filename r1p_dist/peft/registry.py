"""The name R1P among PEFT's methods."""

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method

NAME = "R1P"


def register(config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Tells PEFT of the method, as its own methods do."""
    register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model)


def peft_type() -> PeftType:
    """Returns the method's member of PEFT's enumeration, which has none for methods from outside until it is added."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_, member._sort_order_ = NAME, NAME, len(PeftType)
        PeftType._member_names_.append(NAME)
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)  # the enumeration's own refuses further members
        PeftType._member_map_[NAME] = member
    return PeftType[NAME]
