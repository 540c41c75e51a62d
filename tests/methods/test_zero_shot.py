"""Zero-shot: nothing is put on the backbone, so nothing is trained, kept or merged."""

from types import SimpleNamespace

import torch

from r1p_dist.methods import make_method
from r1p_dist.recipes import load_config
from tests.small_clip import make_backbone


def test_the_model_stays_the_pristine_one() -> None:
    backbone, pristine = make_backbone(), make_backbone()
    method = make_method(load_config("mini_mtil_dac", ["method=zero_shot"]), backbone)
    assert not method.trains and not method.trainable_parameters() and method.count_parameters() == 0
    assert not method.updates() and not method.memory() and not method.columns
    with method.select(SimpleNamespace(name="flags")):
        names = [name for name, _ in backbone.named_parameters()]
        assert names == [name for name, _ in pristine.named_parameters()]
        assert all(torch.equal(*pair) for pair in zip(backbone.parameters(), pristine.parameters(), strict=True))
